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
"""

from __future__ import annotations

import itertools
import os
import struct
from typing import TYPE_CHECKING, Final

from thinpool.host.ext4layout import Ext4, Inode, UnknownLayoutError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = 2

_FIRST_INODE: Final = 11
_CHANGED_MAX: Final = 20_000
_DEPTH_MAX: Final = 4096
_GUESSES: Final = 4
_NEEDLES_MAX: Final = 64  # so many are sooner searched for than a block's entries are read

Range = tuple[int, int]
"""Where a range of bytes begins, and where the next byte is that is not in it."""


def _entries(block: bytes) -> Iterator[int]:
    """The inode numbers of a directory block's entries."""
    offset = 0
    while offset + 8 <= len(block):
        number, length, name = struct.unpack_from("<IHB", block, offset)
        if length < 8 or length % 4 or offset + length > len(block):  # noqa: PLR2004
            raise UnknownLayoutError
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
        return _leading(_opened(before_fd), _opened(after_fd), differing)
    except (UnknownLayoutError, struct.error, OSError):
        return None


def _opened(fd: int) -> Ext4:
    return Ext4(lambda offset, length: os.pread(fd, length, offset))


def _leading(before: Ext4, after: Ext4, differing: Sequence[Range]) -> frozenset[int]:
    common = min(len(before.tables), len(after.tables))
    if (
        before.tables[:common] != after.tables[:common]
        or (before.per_group, before.inode_size, before.block)
        != (after.per_group, after.inode_size, after.block)
        or len(after.tables) < common
    ):
        raise UnknownLayoutError
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
            raise UnknownLayoutError
    holding = _Search(after, wanted).run(changed)
    return _with_ancestors(after, changed | holding) | wanted.keys() | others


def _changed(
    before: Ext4, after: Ext4, common: int, differing: Sequence[Range]
) -> Iterator[tuple[int, Inode | None, Inode]]:
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
) -> Iterator[tuple[int, Inode | None, Inode]]:
    if old == new:
        return
    for offset in range(0, len(new), size):
        at = number + offset // size
        raw = new[offset : offset + size]
        was = None if old is None else old[offset : offset + size]
        if (at == ROOT or at >= _FIRST_INODE) and (was is None or not _same(was, raw)):
            yield at, None if was is None else Inode(was), Inode(raw)


class _Search:
    """Looks for the directories that hold files of which only the inode changed."""

    def __init__(self, side: Ext4, wanted: dict[int, int]) -> None:
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
            raise UnknownLayoutError
        return self._found

    def _look_in(self, directories: Iterator[tuple[int, Inode]]) -> None:
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


def _with_ancestors(side: Ext4, directories: set[int]) -> frozenset[int]:
    leading = {ROOT}
    for number in directories:
        at = number
        for _ in range(_DEPTH_MAX):
            if at in leading:
                break
            leading.add(at)
            at = side.parent(at)
        else:
            raise UnknownLayoutError
    return frozenset(leading)
