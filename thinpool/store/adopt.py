"""What a pool that we did not make tells of its volumes: sizes and filesystems.

A device's size stands nowhere in the pool's metadata. A filesystem's superblock says it; without
one, the end of the highest mapping is the least that it can be.

Facts: ext2/3/4 superblock at byte 1024 (kernel Documentation/filesystems/ext4/super.rst): magic
0xEF53 at 0x38, s_blocks_count_lo at 0x4, s_log_block_size at 0x18, s_feature_incompat at 0x60
(0x80: 64 bit), s_blocks_count_hi at 0x150. XFS superblock at byte 0 (XFS Algorithms & Data
Structures): magic XFSB, sb_blocksize at 4, sb_dblocks at 8, big-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.engine import SECTOR

if TYPE_CHECKING:
    from thinpool.engine import PoolBackend, VolumeInfo, VolumeIO

_LARGEST: Final = 1 << 50
"""Bytes; what a volume of unknown size is opened with to look at it."""
_HEAD: Final = 4096
_EXT_MAGIC: Final = 0xEF53
_EXT_64BIT: Final = 0x80
_EXT_LOG_BLOCK_MAX: Final = 6
_XFS_BLOCK_MAX: Final = 65536
_EXT4_FEATURES: Final = 0x2C0  # extents, 64 bit, flex_bg
_EXT3_JOURNAL: Final = 0x4


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What could be found out."""

    size: int
    filesystem: str | None
    exact: bool


def filesystem_of(head: bytes) -> tuple[str, int] | None:
    """The filesystem and its bytes, from the first 4 KiB of a device; None for no known one."""
    if head[:4] == b"XFSB":
        block_size, blocks = struct.unpack_from(">IQ", head, 4)
        if SECTOR <= block_size <= _XFS_BLOCK_MAX and blocks:
            return "xfs", block_size * blocks
        return None
    (magic,) = struct.unpack_from("<H", head, 1024 + 0x38)
    if magic != _EXT_MAGIC:
        return None
    (blocks,) = struct.unpack_from("<I", head, 1024 + 0x4)
    (log_block_size,) = struct.unpack_from("<I", head, 1024 + 0x18)
    compat, incompat = struct.unpack_from("<II", head, 1024 + 0x5C)
    if incompat & _EXT_64BIT:
        (high,) = struct.unpack_from("<I", head, 1024 + 0x150)
        blocks |= high << 32
    if log_block_size > _EXT_LOG_BLOCK_MAX or not blocks:
        return None
    old = "ext3" if compat & _EXT3_JOURNAL else "ext2"
    name = "ext4" if incompat & _EXT4_FEATURES else old
    return name, blocks * (1024 << log_block_size)


def look_at(pool: PoolBackend, info: VolumeInfo, *, block_size: int) -> Found:
    """Find out a volume's size. Reads mappings and at most its first 4 KiB.

    A device that cannot be read is taken as one without a filesystem.
    """
    if info.mapped_blocks == 0:
        return Found(size=block_size, filesystem=None, exact=False)
    volume = pool.open_volume(info.id, size=_LARGEST, read_only=True)
    try:
        end = _mapped_end(volume)
        try:
            found = filesystem_of(volume.read(0, _HEAD))
        except errors.ThinpoolError:
            found = None
    finally:
        volume.close()
    if found is None:
        return Found(size=end, filesystem=None, exact=False)
    filesystem, size = found
    size = -(-size // SECTOR) * SECTOR
    return Found(size=max(size, end), filesystem=filesystem, exact=True)


def _mapped_end(volume: VolumeIO) -> int:
    """The end of the highest mapping, by bisection: stretches may be many."""
    low, high = 0, volume.size  # something is mapped at or after low, nothing at or after high
    end = 0
    while low < high:
        middle = (low + high) // 2
        found = volume.next_data(middle)
        if found is None:
            high = middle
        else:
            end = max(end, found[1])
            low = found[1]
            if low >= volume.size or volume.next_data(low) is None:
                break
    return end
