"""Where a space map begins: stands twice in the superblock."""

from __future__ import annotations

from dataclasses import dataclass

from thinpool.format.record import Record, u64


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceMapRoot:
    """Root of the data or the metadata space map."""

    nr_blocks: int
    nr_allocated: int
    bitmap_root: int
    ref_count_root: int


SPACE_MAP_ROOT = Record(
    "space_map_root",
    "Space-map root",
    SpaceMapRoot,
    u64("nr_blocks", "blocks", "Blocks that the map counts: the size of the device."),
    u64("nr_allocated", "blocks", "Blocks whose reference count is not 0."),
    u64(
        "bitmap_root",
        "metadata block",
        "Data: root of the tree of index entries. Metadata: the index block.",
    ),
    u64("ref_count_root", "metadata block", "Root of the overflow tree: counts of 3 and more."),
)
