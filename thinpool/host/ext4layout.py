"""An ext4 as its bytes say: superblock, group descriptors, inodes, extents, directories.

Whatever is not known to be understood (features, a journal to be replayed, counts that do not fit)
is refused; what is read may come from anyone.

The layout is that of the kernel's Documentation/filesystems/ext4.
"""

from __future__ import annotations

import re
import stat
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXTENTS: Final = 0x80000
EXTENT_DEPTH_MAX: Final = 5
HAS_JOURNAL: Final = 0x4

_SUPERBLOCK: Final = 1024
_MAGIC: Final = 0xEF53
_64BIT: Final = 0x80
# filetype, extents, 64bit, flex_bg, csum_seed. Not: recover, meta_bg, inline_data, casefold, ...
_KNOWN: Final = 0x2 | 0x40 | _64BIT | 0x200 | 0x2000
_NEEDED: Final = 0x2 | 0x40
_INODE_SIZE_LEAST: Final = 160
_DESCRIPTOR_64: Final = 64
_UNINITIALISED: Final = 1
_EXTENT_MAGIC: Final = 0xF30A
_EXTENT_LENGTH_MAX: Final = 0x8000  # more says that the extent is not written
_DIRECTORY_BLOCKS_MAX: Final = 1 << 16
_GROUPS_MAX: Final = 1 << 18  # 32 TiB
_READ: Final = 1 << 20
_DIRECTORY_MODE: Final = re.compile(rb"[\x40-\x4f]")  # the high byte of a directory's mode
_NEAR: Final = 256  # inodes: one read of a pool block


class UnknownLayoutError(Exception):
    """Something that is not understood here."""


class Inode:
    """What is needed of an inode."""

    __slots__ = ("blocks", "flags", "generation", "links", "mode", "size")

    def __init__(self, raw: bytes) -> None:
        """Read the inode's bytes."""
        self.mode: int
        self.links: int
        self.flags: int
        self.generation: int
        (self.mode,) = struct.unpack_from("<H", raw, 0)
        (low,) = struct.unpack_from("<I", raw, 0x4)
        (self.links,) = struct.unpack_from("<H", raw, 0x1A)
        (self.flags,) = struct.unpack_from("<I", raw, 0x20)
        self.blocks = raw[0x28:0x64]
        (self.generation,) = struct.unpack_from("<I", raw, 0x64)
        (high,) = struct.unpack_from("<I", raw, 0x6C)
        self.size = high << 32 | low

    @property
    def is_used(self) -> bool:
        """Whether it is anything."""
        return self.links > 0 and self.mode != 0

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)


class Ext4:
    """A clean ext4 of known features, read through a function (offset, length).

    Attributes:
        inodes: how many.
        per_group: of them in each group.
        inode_size: bytes.
        block: bytes.
        journal_inode: number of the journal's; 0 without one, or with one elsewhere.
        tables: where each group's inode table is, in bytes.
        used: how many of each group's inodes were ever used.
    """

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        """Read superblock and group descriptors.

        Raises:
            UnknownLayoutError: it is not as expected.
        """
        self._read = read
        head = self.read(_SUPERBLOCK, 1024)
        (self.inodes,) = struct.unpack_from("<I", head, 0)
        (first,) = struct.unpack_from("<I", head, 0x14)
        (shift,) = struct.unpack_from("<I", head, 0x18)
        (self.per_group,) = struct.unpack_from("<I", head, 0x28)
        (magic,) = struct.unpack_from("<H", head, 0x38)
        (self.inode_size,) = struct.unpack_from("<H", head, 0x58)
        compatible, incompatible = struct.unpack_from("<II", head, 0x5C)
        known = not incompatible & ~_KNOWN and incompatible & _NEEDED == _NEEDED
        if (
            magic != _MAGIC
            or not known
            or shift > 6  # noqa: PLR2004 - 64 KiB
            or self.inode_size < _INODE_SIZE_LEAST
            or not self.per_group
        ):
            raise UnknownLayoutError
        self.block = 1024 << shift
        (inode,) = struct.unpack_from("<I", head, 0xE0)
        self.journal_inode = int(inode) if compatible & HAS_JOURNAL else 0
        size = struct.unpack_from("<H", head, 0xFE)[0] if incompatible & _64BIT else 32
        groups = -(-self.inodes // self.per_group)
        if size < 32 or groups > _GROUPS_MAX:  # noqa: PLR2004 - the least there is
            raise UnknownLayoutError
        self.tables, self.used = self._descriptors((first + 1) * self.block, groups, size)

    def _descriptors(self, at: int, groups: int, size: int) -> tuple[list[int], list[int]]:
        """Where each group's inode table is in bytes, and how many of its inodes were ever used."""
        raw = self.read(at, groups * size)
        tables, used = [], []
        for offset in range(0, len(raw), size):
            (table,) = struct.unpack_from("<I", raw, offset + 0x8)
            (flags,) = struct.unpack_from("<H", raw, offset + 0x12)
            (unused,) = struct.unpack_from("<H", raw, offset + 0x1C)
            if size >= _DESCRIPTOR_64:
                table |= struct.unpack_from("<I", raw, offset + 0x28)[0] << 32
                unused |= struct.unpack_from("<H", raw, offset + 0x32)[0] << 16
            tables.append(table * self.block)
            used.append(0 if flags & _UNINITIALISED else max(self.per_group - unused, 0))
        return tables, used

    def read(self, offset: int, length: int) -> bytes:
        """All of these bytes."""
        data = self._read(offset, length)
        if len(data) != length:
            raise UnknownLayoutError
        return data

    def inode(self, number: int) -> Inode:
        """An inode by number."""
        group, index = divmod(number - 1, self.per_group)
        if not 0 <= group < len(self.tables):
            raise UnknownLayoutError
        return Inode(self.read(self.tables[group] + index * self.inode_size, self.inode_size))

    def directories(self, group: int) -> Iterator[tuple[int, Inode]]:
        """A group's directories, by number."""
        size, left = self.inode_size, self.used[group] * self.inode_size
        at, number = self.tables[group], group * self.per_group + 1
        step = _READ // size * size
        while left > 0:
            data = self.read(at, min(step, left))
            # The high byte of each inode's mode, picked out and looked through in one go.
            for found in _DIRECTORY_MODE.finditer(data[1::size]):
                index = found.start()
                inode = Inode(data[index * size : (index + 1) * size])
                if inode.is_used:
                    yield number + index, inode
            number += len(data) // size
            at += len(data)
            left -= len(data)

    def directories_before(self, number: int) -> Iterator[tuple[int, Inode]]:
        """The directories just before an inode in its group, the nearest first."""
        group, index = divmod(number - 1, self.per_group)
        first, size = group * self.per_group + 1, self.inode_size
        low = max(index - _NEAR, 0)
        data = self.read(self.tables[group] + low * size, (index - low) * size)
        found = [each.start() for each in _DIRECTORY_MODE.finditer(data[1::size])]
        for at in reversed(found):
            inode = Inode(data[at * size : (at + 1) * size])
            if inode.is_used:
                yield first + low + at, inode

    def directory_blocks(self, directory: Inode) -> Iterator[bytes]:
        """The blocks of a directory, in no order."""
        if not directory.is_directory or not directory.flags & EXTENTS:
            raise UnknownLayoutError
        count = 0
        for start, length in self.extents(directory.blocks, EXTENT_DEPTH_MAX):
            for number in range(start, start + length):
                count += 1
                if count > _DIRECTORY_BLOCKS_MAX:
                    raise UnknownLayoutError
                yield self.read(number * self.block, self.block)

    def extents(self, node: bytes, depth_most: int) -> Iterator[tuple[int, int]]:
        """Runs of blocks: the first, and how many."""
        magic, entries, _, depth = struct.unpack_from("<HHHH", node)
        if magic != _EXTENT_MAGIC or depth > depth_most or 12 + entries * 12 > len(node):
            raise UnknownLayoutError
        for offset in range(12, 12 + entries * 12, 12):
            if depth:
                _, low, high = struct.unpack_from("<IIH", node, offset)
                child = self.read((high << 32 | low) * self.block, self.block)
                yield from self.extents(child, depth - 1)
            else:
                _, length, high, low = struct.unpack_from("<IHHI", node, offset)
                if length <= _EXTENT_LENGTH_MAX:
                    yield high << 32 | low, length

    def parent(self, number: int) -> int:
        """The directory above a directory: its second entry."""
        for block in self.directory_blocks(self.inode(number)):
            above, _, length = struct.unpack_from("<IHB", block, 12)
            if block[6] == 1 and length == 2 and block[20:22] == b"..":  # noqa: PLR2004
                return int(above)
        raise UnknownLayoutError
