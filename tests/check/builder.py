"""Metadata from scratch, good by itself and easy to spoil.

A Builder lays out nodes and devices, counts references by itself, and writes both space maps; what
it makes without further ado is legal in every respect. An Image is the result: it knows what each
block is, changes any field by its name, and keeps checksums right while it does.

    builder = Builder(metadata_blocks=1024, data_blocks=2048)
    root = builder.tree({block: (block, 0) for block in range(1000)})
    image = builder.device(1, root).device(2, root).finish()
    image.superblock(version=3)
    image.node(root, nr_entries=3)
    path.write_bytes(image.data)

Nothing here uses the C core's trees or space maps, only its checksum.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from thinpool.format import (
    BLOCK_SIZE,
    DEVICE_DETAILS,
    INDEX_ENTRY,
    NODE_HEADER,
    SPACE_MAP_ROOT,
    SUPERBLOCK,
    Details,
    IndexEntry,
    NodeHeader,
    Salt,
    SpaceMapRoot,
    Superblock,
    sealed,
)
from thinpool.format.limits import (
    BITMAP_ENTRIES,
    NODE_INTERNAL,
    NODE_LEAF,
    SUPERBLOCK_MAGIC,
    node_max_entries,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

HEADER = 32
PAIRS = (0, 2, 1, 3)

Entry = tuple[int, int]  # of a mapping: data block, time


@dataclass
class Image:
    """Metadata as bytes, with what each block is.

    Attributes:
        data: the whole device.
        kinds: the checksum's salt of each block that has one.
        bitmaps: of both maps ("data", "metadata"): the bitmap blocks in order.
        index_leaf: of the data map's index: where its entries stand.
        overflow: of both maps: the root of the overflow tree, a leaf here.
    """

    data: bytearray
    kinds: dict[int, Salt]
    bitmaps: dict[str, list[int]] = field(default_factory=dict)
    index_leaf: int = 0
    overflow: dict[str, int] = field(default_factory=dict)

    # ---- blocks -------------------------------------------------------------------------

    def block(self, number: int) -> bytes:
        return bytes(self.data[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE])

    def poke(self, number: int, offset: int, new: bytes, *, seal: bool = True) -> Self:
        """Change bytes of a block."""
        at = number * BLOCK_SIZE + offset
        self.data[at : at + len(new)] = new
        return self.seal(number) if seal else self

    def seal(self, number: int) -> Self:
        """Make its checksum right again."""
        block = sealed(self.block(number), self.kinds[number])
        self.data[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE] = block
        return self

    def seal_all(self) -> Self:
        for number in self.kinds:
            if (number + 1) * BLOCK_SIZE <= len(self.data):
                self.seal(number)
        return self

    def break_checksum(self, number: int) -> Self:
        wrong = bytes([self.block(number)[0] ^ 1])
        return self.poke(number, 0, wrong, seal=False)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.data)
        return path

    # ---- superblock ---------------------------------------------------------------------

    @property
    def facts(self) -> Superblock:
        return SUPERBLOCK.parse(self.block(0))

    def superblock(self, number: int = 0, **changes: Any) -> Self:
        """Change fields of the superblock, or of a metadata snapshot's."""
        changed = replace(SUPERBLOCK.parse(self.block(number)), **changes)
        return self.poke(number, 0, SUPERBLOCK.build(changed))

    def map_root(self, which: str, **changes: int) -> Self:
        """Change fields of a space map's root."""
        name = f"{which}_space_map"
        return self.superblock(**{name: replace(getattr(self.facts, name), **changes)})

    # ---- nodes --------------------------------------------------------------------------

    def header(self, number: int) -> NodeHeader:
        return NODE_HEADER.parse(self.block(number))

    def node(self, number: int, **changes: int) -> Self:
        """Change fields of a node's head; keys and values stay where they are."""
        return self.poke(number, 0, NODE_HEADER.build(replace(self.header(number), **changes)))

    def key(self, number: int, index: int, key: int | None = None) -> int:
        """A node's key, changed first when one is given."""
        if key is not None:
            self.poke(number, HEADER + 8 * index, struct.pack("<Q", key))
        return int(struct.unpack_from("<Q", self.block(number), HEADER + 8 * index)[0])

    def value_at(self, number: int, index: int) -> int:
        """Offset of a value in its block."""
        header = self.header(number)
        return HEADER + 8 * header.max_entries + header.value_size * index

    def value(self, number: int, index: int, value: int | None = None) -> int:
        """A node's value of 8 bytes, changed first when one is given."""
        if value is not None:
            self.poke(number, self.value_at(number, index), struct.pack("<Q", value))
        return int(struct.unpack_from("<Q", self.block(number), self.value_at(number, index))[0])

    def room(self, number: int, max_entries: int) -> Self:
        """Change max_entries and move the values to where they then stand."""
        header = self.header(number)
        begin = self.value_at(number, 0)
        values = self.block(number)[begin : begin + header.nr_entries * header.value_size]
        self.node(number, max_entries=max_entries)
        rest = bytes(BLOCK_SIZE - HEADER - 8 * max_entries)
        self.poke(number, HEADER + 8 * max_entries, rest)
        return self.poke(number, HEADER + 8 * max_entries, values)

    def details(self, index: int, **changes: int) -> Self:
        """Change fields of the index'th device's details."""
        root = self.facts.device_details_root
        at = self.value_at(root, index)
        old = DEVICE_DETAILS.parse(self.block(root), at)
        return self.poke(root, at, DEVICE_DETAILS.build(replace(old, **changes)))

    def drop_entry(self, number: int, index: int) -> Self:
        """Remove one entry of a node."""
        header = self.header(number)
        for moved in range(index, header.nr_entries - 1):
            self.key(number, moved, self.key(number, moved + 1))
            begin = self.value_at(number, moved + 1)
            value = self.block(number)[begin : begin + header.value_size]
            self.poke(number, self.value_at(number, moved), value)
        return self.node(number, nr_entries=header.nr_entries - 1)

    # ---- space maps ---------------------------------------------------------------------

    def pair(self, which: str, block: int, count: int) -> Self:
        """Change what a bitmap says of a block: 0 to 3."""
        bitmap, entry = divmod(block, BITMAP_ENTRIES)
        number = self.bitmaps[which][bitmap]
        at = 16 + entry // 4
        shift = 2 * (entry % 4)
        byte = self.block(number)[at] & ~(3 << shift) | PAIRS[count] << shift
        return self.poke(number, at, bytes([byte]))

    def index(self, which: str, entry: int, **changes: int) -> Self:
        """Change fields of an index entry."""
        if which == "metadata":
            number, at = self.facts.metadata_space_map.bitmap_root, 16 + 16 * entry
        else:
            number, at = self.index_leaf, self.value_at(self.index_leaf, entry)
        old = INDEX_ENTRY.parse(self.block(number), at)
        return self.poke(number, at, INDEX_ENTRY.build(replace(old, **changes)))

    def overflow_entries(self, which: str, entries: Mapping[int, int]) -> Self:
        """Put other entries into an overflow tree of one leaf."""
        number = self.overflow[which]
        self.node(number, nr_entries=len(entries))
        for index, (block, count) in enumerate(sorted(entries.items())):
            self.key(number, index, block)
            self.poke(number, self.value_at(number, index), struct.pack("<I", count))
        return self


class Builder:
    """Lays out metadata. Blocks are handed out in the order of the calls."""

    def __init__(
        self,
        *,
        metadata_blocks: int = 1024,
        data_blocks: int = 2048,
        block_sectors: int = 128,
        time: int = 1,
        transaction_id: int = 1,
    ) -> None:
        self._metadata_blocks = metadata_blocks
        self._data_blocks = data_blocks
        self._block_sectors = block_sectors
        self._time = time
        self._transaction_id = transaction_id
        self._next = 1
        self._blocks: dict[int, bytes] = {}
        self._kinds: dict[int, Salt] = {0: Salt.SUPERBLOCK}
        self._children: dict[int, list[int]] = {}  # of every node, what it points to
        self._mapped: dict[int, list[int]] = {}  # of device leaves, the data blocks
        self._entries: dict[int, int] = {}  # below a node
        self._devices: dict[int, tuple[int, Details]] = {}
        self._held: dict[int, tuple[int, Details]] | None = None

    # ---- nodes --------------------------------------------------------------------------

    def take(self) -> int:
        """A fresh block."""
        number, self._next = self._next, self._next + 1
        return number

    def continue_at(self, number: int) -> Self:
        """Hand out blocks from here on."""
        self._next = number
        return self

    def _node(
        self,
        flags: int,
        value_size: int,
        entries: Iterable[tuple[int, bytes]],
        max_entries: int | None = None,
    ) -> int:
        number = self.take()
        pairs = list(entries)
        room = node_max_entries(value_size) if max_entries is None else max_entries
        header = NodeHeader(
            csum=0,
            flags=flags,
            blocknr=number,
            nr_entries=len(pairs),
            max_entries=room,
            value_size=value_size,
            padding=0,
        )
        keys = b"".join(struct.pack("<Q", key) for key, _ in pairs).ljust(8 * room, b"\0")
        values = b"".join(value for _, value in pairs)
        block = (NODE_HEADER.build(header) + keys + values).ljust(BLOCK_SIZE, b"\0")
        self._blocks[number] = sealed(block, Salt.NODE)
        self._kinds[number] = Salt.NODE
        return number

    def leaf(self, entries: Mapping[int, Entry], *, max_entries: int | None = None) -> int:
        """A leaf of a device's tree."""
        packed = [
            (key, struct.pack("<Q", block << 24 | time))
            for key, (block, time) in sorted(entries.items())
        ]
        number = self._node(NODE_LEAF, 8, packed, max_entries)
        self._mapped[number] = [block for block, _ in entries.values()]
        self._entries[number] = len(packed)
        return number

    def internal(
        self, children: Iterable[tuple[int, int]], *, max_entries: int | None = None
    ) -> int:
        """An internal node of (separator, block)."""
        pairs = list(children)
        packed = [(key, struct.pack("<Q", block)) for key, block in pairs]
        number = self._node(NODE_INTERNAL, 8, packed, max_entries)
        self._children[number] = [block for _, block in pairs]
        self._entries[number] = sum(self._entries.get(block, 0) for _, block in pairs)
        return number

    def tree(self, entries: Mapping[int, Entry], *, per_leaf: int = 252) -> int:
        """A legal tree of mappings; its root."""
        keys = sorted(entries)
        groups = _groups(keys, per_leaf)
        level = [
            (group[0] if group else 0, self.leaf({key: entries[key] for key in group}))
            for group in groups
        ]
        while len(level) > 1:
            level = [(part[0][0], self.internal(part)) for part in _groups(level, 252)]
        return level[0][1]

    def _plain_tree(self, value_size: int, entries: list[tuple[int, bytes]]) -> tuple[int, int]:
        """A tree of other values: its root and its first leaf."""
        parts = _groups(entries, node_max_entries(value_size))
        level = [
            (part[0][0] if part else 0, self._node(NODE_LEAF, value_size, part)) for part in parts
        ]
        first = level[0][1]
        while len(level) > 1:
            level = [(part[0][0], self.internal(part)) for part in _groups(level, 252)]
        return level[0][1], first

    # ---- devices ------------------------------------------------------------------------

    def device(self, number: int, root: int, **details: int) -> Self:
        """A device with a tree that stands already; details differ only where asked."""
        values = {
            "mapped_blocks": self._entries[root],
            "transaction_id": 0,
            "creation_time": 0,
            "snapshotted_time": self._time,
        }
        self._devices[number] = (root, Details(**values | details))
        return self

    def hold(self) -> Self:
        """A metadata snapshot of the devices so far."""
        self._held = dict(self._devices)
        return self

    def without(self, number: int) -> Self:
        """Delete a device."""
        del self._devices[number]
        return self

    def _device_trees(self, devices: Mapping[int, tuple[int, Details]]) -> tuple[int, int]:
        roots = [(key, struct.pack("<Q", root)) for key, (root, _) in sorted(devices.items())]
        top, _ = self._plain_tree(8, roots)
        self._add_top_level(top, [root for root, _ in devices.values()])
        details = [(key, DEVICE_DETAILS.build(each)) for key, (_, each) in sorted(devices.items())]
        return top, self._plain_tree(24, details)[0]

    def _add_top_level(self, top: int, roots: list[int]) -> None:
        node = top
        while node in self._children:
            node = self._children[node][0]
        self._children[node] = self._children.get(node, []) + roots

    # ---- counting -----------------------------------------------------------------------

    def _counts(self, roots: list[int]) -> tuple[Counter[int], Counter[int]]:
        """References to metadata blocks and to data blocks, from distinct nodes."""
        metadata, data = Counter(roots), Counter[int]()
        seen: set[int] = set()
        waiting = list(roots)
        while waiting:
            number = waiting.pop()
            if number in seen:
                continue
            seen.add(number)
            children = self._children.get(number, [])
            metadata.update(children)
            waiting += children
            data.update(self._mapped.get(number, []))
        return metadata, data

    def _bitmaps(self, counts: Mapping[int, int], nr_blocks: int, numbers: list[int]) -> list[int]:
        """Write bitmap blocks; how many entries of each are used."""
        used = []
        for index, number in enumerate(numbers):
            words = bytearray(BLOCK_SIZE - 16)
            first = index * BITMAP_ENTRIES
            here = [
                block
                for block, count in counts.items()
                if first <= block < min(first + BITMAP_ENTRIES, nr_blocks) and count
            ]
            for block in here:
                entry = block - first
                words[entry // 4] |= PAIRS[min(counts[block], 3)] << 2 * (entry % 4)
            block_bytes = struct.pack("<IIQ", 0, 0, number) + words
            self._blocks[number] = sealed(block_bytes, Salt.BITMAP)
            self._kinds[number] = Salt.BITMAP
            used.append(len(here))
        return used

    # ---- the whole ----------------------------------------------------------------------

    def finish(self) -> Image:
        """Top levels, details, space maps, superblock."""
        image = Image(bytearray(), self._kinds)
        roots = list(self._device_trees(self._devices))
        held_block = 0
        held_roots: list[int] = []
        if self._held is not None:
            held_roots = list(self._device_trees(self._held))
            held_block = self.take()
            self._kinds[held_block] = Salt.SUPERBLOCK
        metadata, data = self._counts(roots + held_roots)
        data_root = self._data_map(image, metadata, data)
        metadata[0] += 1
        metadata[held_block] += bool(held_block)
        metadata_root = self._metadata_map(image, metadata)
        superblock = self._superblock(data_root, metadata_root, roots, held_block)
        self._blocks[0] = superblock
        if held_block:
            empty = SpaceMapRoot(nr_blocks=0, nr_allocated=0, bitmap_root=0, ref_count_root=0)
            copy = self._superblock(empty, empty, held_roots, 0, place=held_block)
            self._blocks[held_block] = copy
        image.data = bytearray(self._metadata_blocks * BLOCK_SIZE)
        for number, block in self._blocks.items():
            image.data[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE] = block
        return image

    def _data_map(self, image: Image, metadata: Counter[int], data: Counter[int]) -> SpaceMapRoot:
        nr_bitmaps = -(-self._data_blocks // BITMAP_ENTRIES)
        numbers = [self.take() for _ in range(nr_bitmaps)]
        used = self._bitmaps(data, self._data_blocks, numbers)
        index, image.index_leaf = self._plain_tree(
            16,
            [
                (at, INDEX_ENTRY.build(_index_entry(data, at, number, used[at])))
                for at, number in enumerate(numbers)
            ],
        )
        overflow, _ = self._plain_tree(4, _overflowing(data))
        image.bitmaps["data"] = numbers
        image.overflow["data"] = overflow
        more, _ = self._counts([index, overflow])
        metadata.update(more)
        metadata.update(numbers)
        return SpaceMapRoot(
            nr_blocks=self._data_blocks,
            nr_allocated=sum(used),
            bitmap_root=index,
            ref_count_root=overflow,
        )

    def _metadata_map(self, image: Image, metadata: Counter[int]) -> SpaceMapRoot:
        index = self.take()
        nr_bitmaps = -(-self._metadata_blocks // BITMAP_ENTRIES)
        numbers = [self.take() for _ in range(nr_bitmaps)]
        # Its own blocks all have a count of 1, so that they add no entry.
        overflow, _ = self._plain_tree(4, _overflowing(metadata))
        more, _ = self._counts([overflow])
        metadata.update(more)
        metadata.update([index, *numbers])
        used = self._bitmaps(metadata, self._metadata_blocks, numbers)
        entries = b"".join(
            INDEX_ENTRY.build(_index_entry(metadata, at, number, used[at]))
            for at, number in enumerate(numbers)
        )
        block = (struct.pack("<IIQ", 0, 0, index) + entries).ljust(BLOCK_SIZE, b"\0")
        self._blocks[index] = sealed(block, Salt.INDEX)
        self._kinds[index] = Salt.INDEX
        image.bitmaps["metadata"] = numbers
        image.overflow["metadata"] = overflow
        return SpaceMapRoot(
            nr_blocks=self._metadata_blocks,
            nr_allocated=sum(used),
            bitmap_root=index,
            ref_count_root=overflow,
        )

    def _superblock(
        self,
        data_root: SpaceMapRoot,
        metadata_root: SpaceMapRoot,
        roots: list[int],
        held_root: int,
        *,
        place: int = 0,
    ) -> bytes:
        superblock = Superblock(
            csum=0,
            flags=0,
            blocknr=place,
            uuid=bytes(16),
            magic=SUPERBLOCK_MAGIC,
            version=2,
            time=self._time,
            trans_id=self._transaction_id,
            held_root=held_root,
            data_space_map=data_root,
            data_space_map_rest=bytes(128 - SPACE_MAP_ROOT.size),
            metadata_space_map=metadata_root,
            metadata_space_map_rest=bytes(128 - SPACE_MAP_ROOT.size),
            data_mapping_root=roots[0],
            device_details_root=roots[1],
            data_block_size=self._block_sectors,
            metadata_block_size=8,
            metadata_nr_blocks=self._metadata_blocks,
            compat_flags=0,
            compat_ro_flags=0,
            incompat_flags=0,
        )
        return sealed(SUPERBLOCK.build(superblock).ljust(BLOCK_SIZE, b"\0"), Salt.SUPERBLOCK)


def _groups(items: list[Any], most: int) -> list[list[Any]]:
    """Parts of nearly the same length, none longer; one empty part of nothing."""
    nr = max(1, -(-len(items) // most))
    return [items[len(items) * i // nr : len(items) * (i + 1) // nr] for i in range(nr)]


def _overflowing(counts: Mapping[int, int]) -> list[tuple[int, bytes]]:
    return [(block, struct.pack("<I", n)) for block, n in sorted(counts.items()) if n >= 3]


def _index_entry(counts: Mapping[int, int], at: int, number: int, used: int) -> IndexEntry:
    first = at * BITMAP_ENTRIES
    free = next((e for e in range(BITMAP_ENTRIES) if not counts.get(first + e)), BITMAP_ENTRIES)
    return IndexEntry(blocknr=number, nr_free=BITMAP_ENTRIES - used, none_free_before=free)
