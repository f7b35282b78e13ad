"""Sizes and limits of dm-thin metadata, version 2."""

from __future__ import annotations

from typing import Final

from thinpool.format.record import BLOCK_SIZE

SECTOR_SIZE: Final = 512
BITMAP_ENTRIES: Final = 16320
"""Reference counts in one bitmap block."""
INDEX_ENTRIES: Final = 255
"""Bitmaps of the metadata space map."""
METADATA_BLOCKS_MAX: Final = INDEX_ENTRIES * BITMAP_ENTRIES
DATA_BLOCK_SECTORS_MIN: Final = 128
DATA_BLOCK_SECTORS_MAX: Final = 2097152
DATA_BLOCKS_MAX: Final = 1 << 40
TIME_MAX: Final = (1 << 24) - 1
DEVICE_ID_MAX: Final = (1 << 24) - 1

SUPERBLOCK_MAGIC: Final = 27022010
SUPERBLOCK_VERSION: Final = 2
NEEDS_CHECK: Final = 1
"""Bit of the superblock's flags."""

NODE_INTERNAL: Final = 1
NODE_LEAF: Final = 2


def node_max_entries(value_size: int) -> int:
    """Entries of a node whose values have so many bytes: a multiple of 3."""
    return 3 * ((BLOCK_SIZE - 32) // (8 + value_size) // 3)
