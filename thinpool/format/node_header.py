"""The head of a btree node."""

from __future__ import annotations

from dataclasses import dataclass

from thinpool.format.record import Record, u32, u64


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeHeader:
    """Before the keys and values of a node."""

    csum: int
    flags: int
    blocknr: int
    nr_entries: int
    max_entries: int
    value_size: int
    padding: int


NODE_HEADER = Record(
    "node_header",
    "B-tree node header",
    NodeHeader,
    u32("csum", "", "Checksum, salt 121107."),
    u32("flags", "bits", "1: internal node. 2: leaf."),
    u64("blocknr", "metadata block", "Its own place."),
    u32("nr_entries", "entries", "Keys and values in use."),
    u32("max_entries", "entries", "Room: the values begin after so many keys."),
    u32("value_size", "bytes", "Of a value: 8 in internal nodes, the tree's in leaves."),
    u32("padding", "", "Zeros."),
)
