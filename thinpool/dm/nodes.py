"""Nodes under /dev/mapper, made and removed by us where no udevd does it, or where it failed to.

Names of devices are also file names there, and udev would escape what it doesn't know; so names
that we give keep to the characters that stay as they are.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.dm.abi import NAME_MAX, UUID_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DIRECTORY: Final = "/dev/mapper"

_ALLOWED: Final = re.compile(r"[A-Za-z0-9#+.:=@_-]+")
_RESERVED: Final = {".", "..", "control"}
_NODE_MODE: Final = 0o600


def check_name(name: str) -> str:
    """A name that we may give.

    Raises:
        UsageError: it is too long, or not a file's name that udev leaves as it is.
    """
    if name in _RESERVED or len(name) > NAME_MAX or _ALLOWED.fullmatch(name) is None:
        message = (
            f"{name!r} is no device-mapper name: 1 to {NAME_MAX} of A-Z a-z 0-9 # + - . : = @ _"
        )
        raise errors.UsageError(f"{message}, and not {', '.join(sorted(_RESERVED))}", name=name)
    return name


def check_uuid(uuid: str) -> str:
    """A uuid that we may give.

    Raises:
        UsageError: as for names.
    """
    if len(uuid) > UUID_MAX or _ALLOWED.fullmatch(uuid) is None:
        message = (
            f"{uuid!r} is no device-mapper uuid: 1 to {UUID_MAX} of A-Z a-z 0-9 # + - . : = @ _"
        )
        raise errors.UsageError(message, name=uuid)
    return uuid


def path_of(name: str) -> str:
    """Where a device's node is, or would be."""
    return f"{DIRECTORY}/{name}"


def leads_to(path: str, number: int) -> bool:
    """Whether a path is, or links to, the block device of that number."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return stat.S_ISBLK(found.st_mode) and found.st_rdev == number


def make(name: str, number: int) -> str:
    """Make a device's node unless it is there; replace one that leads elsewhere.

    Raises:
        OSError: it cannot be made.
    """
    path = path_of(name)
    if leads_to(path, number):
        return path
    with _locked():
        fresh = f"{DIRECTORY}/.{os.getpid()}.{os.minor(number)}.node"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        os.mknod(fresh, _NODE_MODE | stat.S_IFBLK, number)
        os.rename(fresh, path)
    return path


def remove(name: str, exists: Callable[[], bool]) -> None:
    """Remove a device's node after the device ended.

    Args:
        name: the device's.
        exists: whether a device of that name exists now: if somebody has made one meanwhile,
            the node is its.
    """
    path = path_of(name)
    if not os.path.lexists(path):
        return
    with _locked():
        if not exists():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One process at a time changes nodes."""
    fd = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
