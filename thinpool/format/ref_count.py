"""Value of an overflow tree: a reference count that two bits cannot hold."""

from __future__ import annotations

from dataclasses import dataclass

from thinpool.format.record import Record, u32


@dataclass(frozen=True, slots=True, kw_only=True)
class RefCount:
    """Of the block that is the key."""

    count: int


REF_COUNT = Record(
    "ref_count",
    "Overflow value",
    RefCount,
    u32("count", "references", "3 or more, exactly where the bitmap says 3."),
)
