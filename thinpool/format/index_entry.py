"""What a space map's index says of one bitmap."""

from __future__ import annotations

from dataclasses import dataclass

from thinpool.format.record import Record, u32, u64


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexEntry:
    """Entry i describes blocks 16320 i to 16320 i + 16319."""

    blocknr: int
    nr_free: int
    none_free_before: int


INDEX_ENTRY = Record(
    "index_entry",
    "Index entry",
    IndexEntry,
    u64("blocknr", "metadata block", "The bitmap."),
    u32(
        "nr_free",
        "entries",
        "Entries of count 0, those past the end of the device included. 0 hides the bitmap.",
    ),
    u32("none_free_before", "entry", "No entry below has count 0. Too low is harmless."),
)
