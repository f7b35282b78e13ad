"""The two devices under a pool of the kernel's: block devices as they are, files through loop.

A loop device of ours outlives the process, as the dm device over it does; a successor finds it by
the file. Whoever opens a pool holds it alone, so a loop device over one of its files, whole and
writable, is a predecessor's.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.dm.targets import device_text
from thinpool.engine import BlockDevice
from thinpool.host import loop
from thinpool.host.failures import failure
from thinpool.host.holders import describe, find_holders

if TYPE_CHECKING:
    from collections.abc import Collection

_SECTOR: Final = 512


@dataclass(slots=True, kw_only=True)
class Backing:
    """One of them.

    Attributes:
        path: as pool.json has it.
        device: for readers, and for growth: the file or the device itself, past any cache that the
            kernel's pool does not know.
        number: of the block device that the kernel is given.
        loop: over the file; None for a block device.
    """

    path: str
    device: BlockDevice
    number: int
    loop: loop.LoopDevice | None

    @property
    def text(self) -> str:
        """As tables take it."""
        return device_text(self.number)

    @property
    def node(self) -> str:
        """The block device's path."""
        return self.loop.path if self.loop is not None else self.path

    def block_size(self) -> int:
        """Bytes of the block device as the kernel sees it; a loop follows its file first."""
        if self.loop is not None:
            return loop.set_capacity(self.loop)
        return size_of(self.path)

    def let_go(self) -> None:
        """Take the loop device down. The file stays."""
        if self.loop is not None:
            loop.detach(self.loop)

    def close(self) -> None:
        """Close the reader; the block device stays."""
        self.device.close()


def size_of(path: str) -> int:
    """Bytes of a file or device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as cause:
        raise failure(cause, f"cannot open {path}", path=path) from cause
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def open_backing(path: str, *, pool: str, used: Collection[int]) -> Backing:
    """Find or make the block device of one of a pool's two halves.

    Args:
        path: a file or a block device.
        pool: the pool's name, for messages.
        used: device numbers that the kernel's pool stands on already.

    Raises:
        NotFoundError: it is gone.
        BusyError: something else has it.
        NotPermittedError, UnsupportedHostError: no loop device, or no direct I/O to the file.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError as cause:
        raise errors.device_gone(pool, path) from cause
    except OSError as cause:
        raise failure(cause, f"pool {pool}: cannot look at {path}", path=path) from cause
    if stat.S_ISBLK(found.st_mode):
        if found.st_rdev not in used:
            _refuse_held(path, found.st_rdev, pool)
        return Backing(path=path, device=_reader(path), number=found.st_rdev, loop=None)
    device = _loop_over(path, pool=pool, used=used)
    try:
        return Backing(path=path, device=_reader(path), number=device.device, loop=device)
    except BaseException:
        if device.device not in used:
            loop.detach(device)
        raise


def _loop_over(path: str, *, pool: str, used: Collection[int]) -> loop.LoopDevice:
    there = loop.find(path)
    for device in there:
        if device.device in used:
            return device
    for device in there:
        _refuse_held(device.path, device.device, pool, behind=path)
        if not (device.offset or device.size_limit or device.read_only or device.autoclear):
            return device  # a predecessor's, which died before the kernel had its pool
        raise errors.BusyError(
            f"pool {pool}: {path} is in use under {device.path}: take that down first with "
            f"'losetup -d {device.path}'",
            holder=device.path,
            path=path,
        )
    return loop.attach(path, direct_io=can_be_direct(path))


def _refuse_held(path: str, number: int, pool: str, *, behind: str | None = None) -> None:
    """What is mounted, or under another dm device, is not ours to take."""
    stacked = [each for each in find_holders(number, path=path) if each.how != "open"]
    if stacked:
        what = path if behind is None else f"{behind}, under {path},"
        raise errors.BusyError(
            f"pool {pool}: {what} is in use: {describe(stacked)}; take that down first",
            holder=describe(stacked),
            path=behind or path,
        )


def _reader(path: str) -> BlockDevice:
    """Past the page cache where that can be; on tmpfs loop uses the same cache."""
    return BlockDevice.open_file(path, direct=can_be_direct(path))


def can_be_direct(path: str) -> bool:
    """Whether the host takes O_DIRECT here; tmpfs does not."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True
