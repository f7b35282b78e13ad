"""What a file or device carries already, told by the marks that formats leave.

Used to refuse overwriting what is somebody's. A mark needs no valid checksum: a damaged pool is
still a pool. Facts: each format's own specification, as blkid and file(1) know them too.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.host import loop
from thinpool.host.failures import failure
from thinpool.host.holders import describe, find_holders

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB: Final = 1 << 10
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mark:
    """Bytes at an offset; a negative offset counts from the end."""

    name: str
    offset: int
    magic: bytes
    also: tuple[int, bytes] | None = None


_MARKS: Final = (
    _Mark(name="dm-thin metadata", offset=32, magic=struct.pack("<Q", 27022010)),
    _Mark(name="dm-cache metadata", offset=32, magic=struct.pack("<Q", 6142003)),
    _Mark(name="dm-era metadata", offset=32, magic=struct.pack("<Q", 2126579579)),
    _Mark(name="LUKS", offset=0, magic=b"LUKS\xba\xbe"),
    _Mark(name="LUKS", offset=16 * KIB, magic=b"SKUL\xba\xbe"),
    *(
        _Mark(name="LVM physical volume", offset=512 * n, magic=b"LABELONE", also=(24, b"LVM2 001"))
        for n in range(4)
    ),
    _Mark(name="xfs", offset=0, magic=b"XFSB"),
    _Mark(name="btrfs", offset=64 * KIB + 64, magic=b"_BHRfS_M"),
    _Mark(name="bcachefs or bcache", offset=4096 + 24, magic=bytes.fromhex("c68573f64e1a45ca")),
    _Mark(name="bcachefs", offset=4096 + 24, magic=bytes.fromhex("c68573f66668909d")),
    *(
        _Mark(name="swap", offset=page - 10, magic=magic)
        for page in (4 * KIB, 8 * KIB, 16 * KIB, 64 * KIB)
        for magic in (b"SWAPSPACE2", b"SWAP-SPACE", b"S1SUSPEND\0", b"S2SUSPEND\0")
    ),
    _Mark(name="Linux RAID member", offset=0, magic=struct.pack("<I", 0xA92B4EFC)),
    _Mark(name="Linux RAID member", offset=4096, magic=struct.pack("<I", 0xA92B4EFC)),
    _Mark(name="f2fs", offset=1024, magic=struct.pack("<I", 0xF2F52010)),
    _Mark(name="erofs", offset=1024, magic=struct.pack("<I", 0xE0F5E1E2)),
    _Mark(name="squashfs", offset=0, magic=b"hsqs"),
    _Mark(name="ISO 9660", offset=32 * KIB + 1, magic=b"CD001"),
    _Mark(name="UDF", offset=32 * KIB + 1, magic=b"BEA01"),
    _Mark(name="ntfs", offset=3, magic=b"NTFS    "),
    _Mark(name="exfat", offset=3, magic=b"EXFAT   "),
    _Mark(name="fat", offset=54, magic=b"FAT1"),
    _Mark(name="fat", offset=82, magic=b"FAT32"),
    _Mark(name="jfs", offset=32 * KIB, magic=b"JFS1"),
    _Mark(name="reiserfs", offset=64 * KIB + 52, magic=b"ReIsEr"),
    _Mark(name="nilfs2", offset=1024 + 6, magic=struct.pack("<H", 0x3434)),
    _Mark(name="qcow2", offset=0, magic=b"QFI\xfb"),
    _Mark(name="vmdk", offset=0, magic=b"KDMV"),
    _Mark(name="vdi", offset=64, magic=struct.pack("<I", 0xBEDA107F)),
    _Mark(name="vhdx", offset=0, magic=b"vhdxfile"),
    _Mark(name="vhd", offset=-512, magic=b"conectix"),
    _Mark(name="VDO", offset=0, magic=b"dmvdo001"),
    _Mark(name="dm-verity hashes", offset=0, magic=b"verity\0\0"),
    _Mark(name="dm-integrity", offset=0, magic=b"integrt\0"),
    _Mark(name="dm-snapshot", offset=0, magic=b"SnAp"),
    _Mark(name="Ceph BlueStore", offset=0, magic=b"bluestore block device"),
    _Mark(name="GPT partition table", offset=512, magic=b"EFI PART"),
    _Mark(name="GPT partition table", offset=4096, magic=b"EFI PART"),
    _Mark(name="GPT partition table", offset=-512, magic=b"EFI PART"),
)
_HEAD: Final = 64 * KIB + 4 * KIB
_EXT_MAGIC: Final = struct.pack("<H", 0xEF53)
_EXT_COMPAT_JOURNAL: Final = 0x4
_EXT_INCOMPAT_JOURNAL_DEVICE: Final = 0x8
_EXT_INCOMPAT_EXTENTS: Final = 0x40
_MD_0_90: Final = 64 * KIB
_ZFS_UBERBLOCK: Final = 0x00BAB10C
_ZFS_LABEL: Final = 256 * KIB
_ZFS_UBERBLOCKS: Final = 128 * KIB
_PARTITION: Final = struct.Struct("<BBBBBBBBII")

_SCAN_ALL: Final = 4 << 30
_SCAN_ENDS: Final = 4 * MIB
_SAMPLES: Final = 1024
_SAMPLE: Final = 4096
_CHUNK: Final = MIB


def carries(path: str | os.PathLike[str]) -> str | None:
    """What a file or device carries, or None for a new, empty or all-zero one.

    A filesystem, a partition table, a pool's metadata, another program's disk image are named;
    anything else that isn't zero is "data". All of a file's data is looked at, up to 4 GiB; of
    what is larger, and of devices, both ends and a thousand places between.

    Raises:
        UsageError: it is neither a file nor a block device.
        NotPermittedError, StorageIOError: it can't be read.
    """
    name = os.fspath(path)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as cause:
        raise failure(cause, f"cannot read {name}", path=name) from cause
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise errors.UsageError(f"{name} is neither a file nor a block device", path=name)
        size = os.lseek(fd, 0, os.SEEK_END)
        return signature(fd, size) or ("data" if _has_data(fd, size, mode) else None)
    except OSError as cause:
        raise failure(cause, f"cannot read {name}", path=name) from cause
    finally:
        os.close(fd)


def refuse_foreign(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Raise unless a file or device may be overwritten.

    Args:
        path: what is to be overwritten; it need not be there.
        force: overwrite whatever it carries. What is in use is refused all the same.

    Raises:
        ForeignDataError: it carries something; ``carries`` says what.
        BusyError: it is a device that is mounted or has another device on top, or a file that
            a loop device is attached to.
        UsageError, NotPermittedError, StorageIOError: as ``carries``.
    """
    name = os.fspath(path)
    found = carries(name)
    with contextlib.suppress(FileNotFoundError):
        _refuse_used(name)
    if found is not None and not force:
        raise errors.ForeignDataError(
            f"{name} already carries {found}; nothing was written; "
            "give another, or --force to overwrite it",
            path=name,
            carries=found,
        )


def signature(fd: int, size: int) -> str | None:
    """The format whose marks are found in what is open; None if none is known."""
    head = os.pread(fd, _HEAD, 0)
    filesystem = _ext(head)
    if filesystem is not None:
        return filesystem
    for mark in _MARKS:
        if _matches(fd, size, head, mark):
            return mark.name
    if _is_md(fd, size):
        return "Linux RAID member"
    if _is_zfs(fd, size):
        return "zfs"
    return "MBR partition table" if _is_mbr(head) else None


def data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """The (start, end) of a file that aren't holes, bytes; the whole of what knows no holes."""
    end = os.lseek(fd, 0, os.SEEK_END)
    position = 0
    while position < end:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            position = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError:  # ENXIO: nothing but a hole is left
            return
        yield start, position


# ---- the steps ----------------------------------------------------------------------------


def _matches(fd: int, size: int, head: bytes, mark: _Mark) -> bool:
    at = mark.offset if mark.offset >= 0 else size + mark.offset
    if at < 0 or not _holds(fd, head, at, mark.magic):
        return False
    return mark.also is None or _holds(fd, head, at + mark.also[0], mark.also[1])


def _holds(fd: int, head: bytes, at: int, magic: bytes) -> bool:
    if at + len(magic) <= len(head):
        return head[at : at + len(magic)] == magic
    return os.pread(fd, len(magic), at) == magic


def _ext(head: bytes) -> str | None:
    if head[1024 + 56 : 1024 + 58] != _EXT_MAGIC:
        return None
    compat, incompat = struct.unpack_from("<II", head, 1024 + 92)
    if incompat & _EXT_INCOMPAT_JOURNAL_DEVICE:
        return "ext4 journal"
    if incompat & _EXT_INCOMPAT_EXTENTS:
        return "ext4"
    return "ext3" if compat & _EXT_COMPAT_JOURNAL else "ext2"


def _is_md(fd: int, size: int) -> bool:
    magics = (struct.pack("<I", 0xA92B4EFC), struct.pack(">I", 0xA92B4EFC))
    places = [(size // _MD_0_90 - 1) * _MD_0_90, (size - 8 * KIB) // (4 * KIB) * (4 * KIB)]
    return any(at > 0 and os.pread(fd, 4, at) in magics for at in places)


def _is_zfs(fd: int, size: int) -> bool:
    magics = (struct.pack("<Q", _ZFS_UBERBLOCK), struct.pack(">Q", _ZFS_UBERBLOCK))
    last = size // _ZFS_LABEL * _ZFS_LABEL - _ZFS_LABEL
    for label in (0, last):
        if label < 0:
            continue
        array = os.pread(fd, _ZFS_UBERBLOCKS, label + _ZFS_UBERBLOCKS)
        if any(array[at : at + 8] in magics for at in range(0, len(array), KIB)):
            return True
    return False


def _is_mbr(head: bytes) -> bool:
    """A boot sector's end mark with a partition entry that could be one."""
    if head[510:512] != b"\x55\xaa":
        return False
    for index in range(4):
        status, _h, _s, _c, kind, *_end, start, length = _PARTITION.unpack_from(
            head, 446 + 16 * index
        )
        if status in (0, 0x80) and kind and start and length:
            return True
    return False


def _has_data(fd: int, size: int, mode: int) -> bool:
    ranges = list(data_ranges(fd)) if stat.S_ISREG(mode) else [(0, size)]
    if stat.S_ISREG(mode) and sum(end - start for start, end in ranges) <= _SCAN_ALL:
        return any(_nonzero(fd, start, end) for start, end in ranges)
    if _nonzero(fd, 0, min(size, _SCAN_ENDS)) or _nonzero(fd, max(0, size - _SCAN_ENDS), size):
        return True
    step = max(_SAMPLE, size // _SAMPLES // _SAMPLE * _SAMPLE)
    return any(_nonzero(fd, at, min(at + _SAMPLE, size)) for at in range(0, size, step))


def _nonzero(fd: int, start: int, end: int) -> bool:
    zeros = bytes(_CHUNK)
    at = start
    while at < end:
        chunk = os.pread(fd, min(_CHUNK, end - at), at)
        if not chunk:
            return False
        if chunk != (zeros if len(chunk) == _CHUNK else bytes(len(chunk))):
            return True
        at += len(chunk)
    return False


def _refuse_used(name: str) -> None:
    node = os.stat(name)
    if stat.S_ISREG(node.st_mode):
        attached = loop.find(name)
        if attached:
            raise errors.BusyError(
                f"{name} is in use: {attached[0].path} is attached to it",
                holder=attached[0].path,
                path=name,
            )
        return
    try:
        os.close(os.open(name, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as cause:
        holder = describe(find_holders(node.st_rdev, path=name))
        error = failure(cause, f"cannot use {name}", path=name)
        if isinstance(error, errors.BusyError):
            raise errors.BusyError(
                f"{name} is in use: {holder or 'by something not visible from here'}",
                holder=holder,
                path=name,
            ) from cause
        raise error from cause
