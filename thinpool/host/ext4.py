"""What changed in an ext4 since a snapshot, and the directories that lead there, without a walk.

Two block devices with an ext4 of one origin (snapshots of each other), and the ranges of bytes in
which they may differ. Of those, the ones that hold inode tables are compared inode by inode. Then
the directories are found that lead to a changed inode: a directory knows the one above it; a file
whose name did not change does not, and is looked for in the directories just before it in the inode
table, where it is if a tree was written in order, then among all of its block group, which is where
ext4 puts files, and in all others then. The cost is that of what changed and of what is near it.

Nothing is decided here about what a change is: a walk of both trees that looks only at these
inodes sees everything that differs. Whatever is not known to be understood (features, a
journal to be replayed, tables that moved, counts that do not fit) gives no answer, and the caller
walks everything.

The layout is that of the kernel's Documentation/filesystems/ext4.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = 2

_SUPERBLOCK: Final = 1024
_MAGIC: Final = 0xEF53
_64BIT: Final = 0x80
# filetype, extents, 64bit, flex_bg, csum_seed. Not: recover, meta_bg, inline_data, casefold, ...
_KNOWN: Final = 0x2 | 0x40 | _64BIT | 0x200 | 0x2000
_NEEDED: Final = 0x2 | 0x40
_FIRST_INODE: Final = 11
_INODE_SIZE_LEAST: Final = 160
_DESCRIPTOR_64: Final = 64
_UNINITIALISED: Final = 1
_EXTENTS: Final = 0x80000
_EXTENT_MAGIC: Final = 0xF30A
_EXTENT_DEPTH_MAX: Final = 5
_UNWRITTEN: Final = 0x8000
_DIRECTORY_BLOCKS_MAX: Final = 1 << 16
_CHANGED_MAX: Final = 20_000
_DEPTH_MAX: Final = 4096
_READ: Final = 1 << 20
_DIRECTORY_MODE: Final = re.compile(rb"[\x40-\x4f]")  # the high byte of a directory's mode
_NEAR: Final = 256  # inodes: one read of a pool block
_GUESSES: Final = 4
_NEEDLES_MAX: Final = 64  # so many are sooner searched for than a block's entries are read

Range = tuple[int, int]
"""Where a range of bytes begins, and where the next byte is that is not in it."""


class _UnknownError(Exception):
    """Something that is not understood here."""


class _Inode:
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
        return self.links > 0 and self.mode != 0

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


class _Ext4:
    """One side, read through a descriptor that stays the caller's."""

    def __init__(self, fd: int) -> None:
        """Read superblock and group descriptors.

        Raises:
            _UnknownError: it is not as expected.
        """
        self._fd = fd
        head = self.read(_SUPERBLOCK, 1024)
        (self.inodes,) = struct.unpack_from("<I", head, 0)
        (first,) = struct.unpack_from("<I", head, 0x14)
        (shift,) = struct.unpack_from("<I", head, 0x18)
        (self.per_group,) = struct.unpack_from("<I", head, 0x28)
        (magic,) = struct.unpack_from("<H", head, 0x38)
        (self.inode_size,) = struct.unpack_from("<H", head, 0x58)
        (incompatible,) = struct.unpack_from("<I", head, 0x60)
        known = not incompatible & ~_KNOWN and incompatible & _NEEDED == _NEEDED
        if (
            magic != _MAGIC
            or not known
            or shift > 6  # noqa: PLR2004 - 64 KiB
            or self.inode_size < _INODE_SIZE_LEAST
            or not self.per_group
        ):
            raise _UnknownError
        self.block = 1024 << shift
        size = struct.unpack_from("<H", head, 0xFE)[0] if incompatible & _64BIT else 32
        groups = -(-self.inodes // self.per_group)
        if size < 32:  # noqa: PLR2004 - the least there is
            raise _UnknownError
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
        data = os.pread(self._fd, length, offset)
        if len(data) != length:
            raise _UnknownError
        return data

    def inode(self, number: int) -> _Inode:
        group, index = divmod(number - 1, self.per_group)
        if not 0 <= group < len(self.tables):
            raise _UnknownError
        return _Inode(self.read(self.tables[group] + index * self.inode_size, self.inode_size))

    def directories(self, group: int) -> Iterator[tuple[int, _Inode]]:
        """A group's directories, by number."""
        size, left = self.inode_size, self.used[group] * self.inode_size
        at, number = self.tables[group], group * self.per_group + 1
        step = _READ // size * size
        while left > 0:
            data = self.read(at, min(step, left))
            # The high byte of each inode's mode, picked out and looked through in one go.
            for found in _DIRECTORY_MODE.finditer(data[1::size]):
                index = found.start()
                inode = _Inode(data[index * size : (index + 1) * size])
                if inode.is_used:
                    yield number + index, inode
            number += len(data) // size
            at += len(data)
            left -= len(data)

    def directories_before(self, number: int) -> Iterator[tuple[int, _Inode]]:
        """The directories just before an inode in its group, the nearest first."""
        group, index = divmod(number - 1, self.per_group)
        first, size = group * self.per_group + 1, self.inode_size
        low = max(index - _NEAR, 0)
        data = self.read(self.tables[group] + low * size, (index - low) * size)
        found = [each.start() for each in _DIRECTORY_MODE.finditer(data[1::size])]
        for at in reversed(found):
            inode = _Inode(data[at * size : (at + 1) * size])
            if inode.is_used:
                yield first + low + at, inode

    def directory_blocks(self, directory: _Inode) -> Iterator[bytes]:
        """The blocks of a directory, in no order."""
        if not directory.is_directory or not directory.flags & _EXTENTS:
            raise _UnknownError
        count = 0
        for start, length in self._extents(directory.blocks, _EXTENT_DEPTH_MAX):
            for number in range(start, start + length):
                count += 1
                if count > _DIRECTORY_BLOCKS_MAX:
                    raise _UnknownError
                yield self.read(number * self.block, self.block)

    def _extents(self, node: bytes, depth_most: int) -> Iterator[tuple[int, int]]:
        """Runs of blocks: the first, and how many."""
        magic, entries, _, depth = struct.unpack_from("<HHHH", node)
        if magic != _EXTENT_MAGIC or depth > depth_most or 12 + entries * 12 > len(node):
            raise _UnknownError
        for offset in range(12, 12 + entries * 12, 12):
            if depth:
                _, low, high = struct.unpack_from("<IIH", node, offset)
                child = self.read((high << 32 | low) * self.block, self.block)
                yield from self._extents(child, depth - 1)
            else:
                _, length, high, low = struct.unpack_from("<IHHI", node, offset)
                if length < _UNWRITTEN:
                    yield high << 32 | low, length

    def parent(self, number: int) -> int:
        """The directory above a directory: its second entry."""
        for block in self.directory_blocks(self.inode(number)):
            above, _, length = struct.unpack_from("<IHB", block, 12)
            if block[6] == 1 and length == 2 and block[20:22] == b"..":  # noqa: PLR2004
                return int(above)
        raise _UnknownError


def _entries(block: bytes) -> Iterator[int]:
    """The inode numbers of a directory block's entries."""
    offset = 0
    while offset + 8 <= len(block):
        number, length, name = struct.unpack_from("<IHB", block, offset)
        if length < 8 or length % 4 or offset + length > len(block):  # noqa: PLR2004
            raise _UnknownError
        if number and name:
            yield number
        offset += length


def _same(first: bytes, second: bytes) -> bool:
    """Whether two inodes are one: all but access time, checksum and version."""
    return (
        first[0x0:0x8] == second[0x0:0x8]
        and first[0xC:0x24] == second[0xC:0x24]
        and first[0x28:0x74] == second[0x28:0x74]
        and first[0x84:0x8C] == second[0x84:0x8C]
    )


def leading_inodes(
    before_fd: int, after_fd: int, differing: Sequence[Range]
) -> frozenset[int] | None:
    """The directories of the second filesystem that lead to something that differs in the first.

    Args:
        before_fd: the device of the first; stays open, as the next.
        after_fd: of the second. Nobody writes to either.
        differing: ranges of bytes outside of which the two are equal, in order.

    Returns:
        The numbers of all inodes that may differ, and of the directories that lead to them, the
        root among them; None where only a walk can tell.
    """
    try:
        return _leading(_Ext4(before_fd), _Ext4(after_fd), differing)
    except (_UnknownError, struct.error, OSError):
        return None


def _leading(before: _Ext4, after: _Ext4, differing: Sequence[Range]) -> frozenset[int]:
    common = min(len(before.tables), len(after.tables))
    if (
        before.tables[:common] != after.tables[:common]
        or (before.per_group, before.inode_size, before.block)
        != (after.per_group, after.inode_size, after.block)
        or len(after.tables) < common
    ):
        raise _UnknownError
    changed: set[int] = set()
    wanted: dict[int, int] = {}
    others: set[int] = set()
    for number, old, new in _changed(before, after, common, differing):
        if new.is_directory and new.is_used:
            changed.add(number)
        elif new.is_used and old is not None and old.is_used and old.generation == new.generation:
            wanted[number] = new.links
        else:  # made or removed: in directories that differ themselves
            others.add(number)
        if len(changed) + len(wanted) + len(others) > _CHANGED_MAX:
            raise _UnknownError
    holding = _Search(after, wanted).run(changed)
    return _with_ancestors(after, changed | holding) | wanted.keys() | others


def _changed(
    before: _Ext4, after: _Ext4, common: int, differing: Sequence[Range]
) -> Iterator[tuple[int, _Inode | None, _Inode]]:
    """Inodes of the second that differ from those of the first: number, old, new."""
    size = after.inode_size
    span = after.per_group * size
    starts = sorted((table, group) for group, table in enumerate(after.tables))
    at = 0
    for table, group in starts:
        while at < len(differing) and differing[at][1] <= table:
            at += 1
        index = at
        while index < len(differing) and differing[index][0] < table + span:
            begin = max(differing[index][0] - table, 0) // size
            end = min(-(-(min(differing[index][1], table + span) - table) // size), after.per_group)
            index += 1
            if begin < end:
                number = group * after.per_group + begin + 1
                new = after.read(table + begin * size, (end - begin) * size)
                old = before.read(table + begin * size, len(new)) if group < common else None
                yield from _differing(number, old, new, size)


def _differing(
    number: int, old: bytes | None, new: bytes, size: int
) -> Iterator[tuple[int, _Inode | None, _Inode]]:
    if old == new:
        return
    for offset in range(0, len(new), size):
        at = number + offset // size
        raw = new[offset : offset + size]
        was = None if old is None else old[offset : offset + size]
        if (at == ROOT or at >= _FIRST_INODE) and (was is None or not _same(was, raw)):
            yield at, None if was is None else _Inode(was), _Inode(raw)


class _Search:
    """Looks for the directories that hold files of which only the inode changed."""

    def __init__(self, side: _Ext4, wanted: dict[int, int]) -> None:
        """``wanted``: how many names each inode has."""
        self._side = side
        self._wanted = wanted
        self._left = dict(wanted)
        self._needles: dict[int, bytes] = {number: struct.pack("<I", number) for number in wanted}
        self._seen: set[int] = set()
        self._found: set[int] = set()

    def run(self, likely: set[int]) -> set[int]:
        """Every directory with a name of a wanted inode."""
        self._look_in((number, self._side.inode(number)) for number in sorted(likely))
        for number in sorted(self._wanted):
            if number in self._left:
                before = itertools.islice(self._side.directories_before(number), _GUESSES)
                self._look_in(before)
        per_group = self._side.per_group
        near = sorted({(number - 1) // per_group for number in self._left})
        far = [group for group in range(len(self._side.tables)) if group not in near]
        for group in (*near, *far):
            if not self._left:
                break
            self._look_in(self._side.directories(group))
        if self._left:
            raise _UnknownError
        return self._found

    def _look_in(self, directories: Iterator[tuple[int, _Inode]]) -> None:
        for number, inode in directories:
            if not self._left:
                return
            if number in self._seen:
                continue
            self._seen.add(number)
            for block in self._side.directory_blocks(inode):
                few = len(self._needles) <= _NEEDLES_MAX
                if not few or any(needle in block for needle in self._needles.values()):
                    self._count(number, block)

    def _count(self, directory: int, block: bytes) -> None:
        for number in _entries(block):
            if number in self._wanted:
                self._found.add(directory)
                left = self._left.get(number, 0) - 1
                if left > 0:
                    self._left[number] = left
                else:
                    self._left.pop(number, None)
                    self._needles.pop(number, None)


def _with_ancestors(side: _Ext4, directories: set[int]) -> frozenset[int]:
    leading = {ROOT}
    for number in directories:
        at = number
        for _ in range(_DEPTH_MAX):
            if at in leading:
                break
            leading.add(at)
            at = side.parent(at)
        else:
            raise _UnknownError
    return frozenset(leading)
