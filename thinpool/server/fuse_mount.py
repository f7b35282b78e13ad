"""The kernel's side of a FUSE mount: opening the connection, mounting it, more descriptors on it.

The descriptors belong to the supervisor, which keeps them all open: a request that was read
through one can be answered through that one only, by any process that shares it.

Facts: linux/fuse.h; Documentation/filesystems/fuse.rst.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.host import syscalls
from thinpool.host.failures import failure
from thinpool.host.mountinfo import mount_at

if TYPE_CHECKING:
    from pathlib import Path

_FUSE_DEV_IOC_CLONE: Final = 0x8004E500
_MAX_IO: Final = 1 << 20
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MS_NOEXEC: Final = 8
_MS_NOATIME: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseConnection:
    """A mounted connection.

    Attributes:
        mount_point: where it is mounted.
        number: of the connection, under fusectl.
        fds: every descriptor on it.
    """

    mount_point: str
    number: int
    fds: tuple[int, ...]


def open_connection(mount_point: Path, *, source: str, descriptors: int) -> FuseConnection:
    """Mount a FUSE filesystem whose server is still to come; requests wait for it.

    Args:
        mount_point: an existing directory.
        source: what the mount table shows as device.
        descriptors: how many, one for each data thread.

    Raises:
        UnsupportedHostError: no /dev/fuse.
        NotPermittedError: this user may not mount.
    """
    asked = f"cannot serve files at {mount_point}"
    fds: list[int] = []
    with contextlib.ExitStack() as undo:
        undo.callback(_close_all, fds)
        try:
            fds.append(_open_device())
            syscalls.mount(
                source,
                str(mount_point),
                "fuse.thinpool",
                _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_NOATIME,
                f"fd={fds[0]},rootmode=40755,user_id={os.geteuid()},group_id={os.getegid()},"
                f"allow_other,default_permissions,max_read={_MAX_IO}",
            )
            number = _connection_number(mount_point)
            for _ in range(descriptors - 1):
                fds.append(_open_device())
                fcntl.ioctl(fds[-1], _FUSE_DEV_IOC_CLONE, struct.pack("=I", fds[0]))
        except FileNotFoundError as cause:
            raise errors.UnsupportedHostError(
                f"{asked}: no /dev/fuse on this host", missing="fuse"
            ) from cause
        except OSError as cause:
            raise failure(cause, asked, path=str(mount_point)) from cause
        undo.pop_all()
    return FuseConnection(mount_point=str(mount_point), number=number, fds=tuple(fds))


def _open_device() -> int:
    return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)


def _connection_number(mount_point: Path) -> int:
    """From the mount table: a stat of the mount would wait for the server."""
    entry = mount_at(str(mount_point))
    if entry is None:
        raise FileNotFoundError(str(mount_point))
    return os.minor(entry.device)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
