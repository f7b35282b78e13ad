"""The index block of the metadata space map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thinpool.format.index_entry import INDEX_ENTRY
from thinpool.format.limits import INDEX_ENTRIES
from thinpool.format.record import Record, array, u32, u64

if TYPE_CHECKING:
    from thinpool.format.index_entry import IndexEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataIndex:
    """One block names all bitmaps of the metadata space map, which bounds its size."""

    csum: int
    padding: int
    blocknr: int
    entries: tuple[IndexEntry, ...]


METADATA_INDEX = Record(
    "metadata_index",
    "Metadata index block",
    MetadataIndex,
    u32("csum", "", "Checksum, salt 160478."),
    u32("padding", "", "Zeros."),
    u64("blocknr", "metadata block", "Its own place."),
    array("entries", INDEX_ENTRIES, INDEX_ENTRY, "One a bitmap; zeros after the last."),
)
