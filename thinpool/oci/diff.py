"""What differs between two trees, file by file, and that difference as a layer's tar.

An entry is *modified* where its type, mode, owner, size, modification time, content, link target,
device number or extended attributes differ; of a directory its own times do not count. Something
deleted is named once, however much was in it; of something added everything is named. A directory
that became something else, or the reverse, is modified (and what the new directory holds, added).
Hard links between files are not compared, only what each name shows.

Content. Files of equal size are compared byte by byte, unless the trees are *related*: two
snapshots with a common ancestor, or a snapshot and its origin, of one filesystem. They share inode
numbers and times of what neither changed, and every change to an inode, its content and its
attributes sets its ctime, which no user can set back. So for related trees an entry whose inode
number, ctime, mtime, size, mode and owner are equal in both is unchanged, and is not read. Equal
size and mtime alone would prove nothing, as anybody may set an mtime.

What remains: both sides change the same inode after they parted, to the same size, within one tick
of the clock that stamps ctime (4 ms on many kernels). Where the caller knows when they parted,
``parted_ns`` closes that gap: what has a later ctime is compared by content all the same.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from thinpool.oci import tree
from thinpool.oci.export import TarWriter, open_file, read_error
from thinpool.oci.extract import WHITEOUT
from thinpool.oci.streams import CHUNK

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator

Kind: TypeAlias = Literal["added", "modified", "deleted"]

ENTRIES: Final = "entries"  # the reason of a directory that is named for what changed in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One path that differs.

    Attributes:
        path: from the root, in bytes.
        kind: added, modified or deleted.
        type: S_IFMT bits of what is there now, or was, if deleted.
        size: bytes of the regular file or the link's target that is there now; if deleted, of all
            that went with it.
        inode: the number of what is there now, if it has more names than one; else 0.
        reasons: of a modification: type, mode, owner, size, mtime, content, target, device, xattrs,
            and ``entries`` for a directory in which something changed.
    """

    path: bytes
    kind: Kind
    type: int
    size: int
    inode: int = 0
    reasons: tuple[str, ...] = ()


def iter_changes(
    before_fd: int,
    after_fd: int,
    *,
    related: bool = False,
    parted_ns: int | None = None,
    parents: bool = False,
    within: Container[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Change]:
    """What changed from one tree to the other, names in byte order, a directory before its entries.

    Args:
        before_fd: the root directory of the first tree; stays open, as the next.
        after_fd: of the second.
        related: they are snapshots of one filesystem, see above.
        parted_ns: when they parted, in nanoseconds since 1970, not later than the snapshot.
        parents: name as modified also the directories in which something changed, up to but
            without the root; Docker lists them.
        within: the inode numbers of all that may differ and of the directories that lead there,
            where the caller knows them: what both trees have under one name and number that is not
            among them is passed over.
        progress: called with the number of entries looked at since the last call.

    Raises:
        StorageIOError, NotPermittedError: a tree cannot be read.
    """
    walk = _Comparison(
        before_fd,
        after_fd,
        related=related,
        parted_ns=parted_ns,
        parents=parents,
        within=within,
        progress=progress,
    )
    try:
        for change, _ in walk.run():
            yield change
    except OSError as error:
        raise read_error(error) from error


def iter_layer(
    before_fd: int,
    after_fd: int,
    *,
    related: bool = False,
    parted_ns: int | None = None,
    within: Container[int] | None = None,
    sparse: bool = True,
    note: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[bytes]:
    """The pieces of a layer's tar that turns the first tree into the second.

    What is deleted is a whiteout; directories in which something changed are in it, so that their
    metadata is kept. Files that have several names are hard links as far as the names are in the
    layer. Names that begin as whiteouts do cannot be in a layer and are left out.

    Args:
        before_fd: the root directory of the first tree; stays open, as the next.
        after_fd: of the second.
        related: see :func:`iter_changes`.
        parted_ns: likewise.
        within: likewise.
        sparse: see :func:`~thinpool.oci.export.iter_tar`.
        note: told what is left out, a line each.
        progress: told the bytes of file data read.

    Raises:
        StorageIOError, NotPermittedError: a tree cannot be read.
    """
    writer = TarWriter(sparse=sparse, note=note, progress=progress)
    walk = _Comparison(
        before_fd,
        after_fd,
        related=related,
        parted_ns=parted_ns,
        parents=True,
        within=within,
        progress=None,
    )
    try:
        for change, entry in walk.run():
            directory, slash, name = change.path.rpartition(b"/")
            if name.startswith(WHITEOUT):
                writer.note(change.path, "its name is reserved in layers, left out")
                if entry is not None:
                    entry.enter = False
            elif entry is None:
                writer.whiteout(directory + slash + WHITEOUT + name)
            else:
                yield from writer.entry(entry)
    except OSError as error:
        raise read_error(error) from error
    yield writer.end()


_Found: TypeAlias = "tuple[Change, tree.Entry | None]"


class _Frame:
    """A directory that both trees have."""

    __slots__ = ("entry_names", "inodes", "named", "path", "status")

    def __init__(
        self,
        path: bytes,
        inodes: tuple[int, int],
        entry_names: list[bytes],
        status: os.stat_result,
        *,
        named: bool,
    ) -> None:
        self.path = path
        self.inodes = inodes
        self.entry_names = entry_names
        self.status = status
        self.named = named  # whether it was yielded, or need not be


class _Comparison:
    """A walk through two trees at once; see tree.py for why one descriptor a side."""

    def __init__(
        self,
        before_fd: int,
        after_fd: int,
        *,
        related: bool,
        parted_ns: int | None,
        parents: bool,
        within: Container[int] | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._within = within
        self._roots = (before_fd, after_fd)
        self._related = related
        self._parted_ns = parted_ns
        self._parents = parents
        self._progress = progress
        self._fds: list[int] = []
        self._stack: list[_Frame] = []

    def run(self) -> Iterator[_Found]:
        """Each change with where its entry is, which is valid until the next."""
        try:
            for root in self._roots:
                self._fds.append(os.open(b".", tree.OPEN_DIRECTORY, dir_fd=root))
            yield from self._root()
            while self._stack:
                frame = self._stack[-1]
                if frame.entry_names:
                    yield from self._entry(frame, frame.entry_names.pop())
                    continue
                self._stack.pop()
                if self._stack:
                    for side, inode in enumerate(self._stack[-1].inodes):
                        self._move(side, tree.open_parent(self._fds[side], inode))
        finally:
            for fd in self._fds:
                os.close(fd)

    def _move(self, side: int, fd: int) -> None:
        os.close(self._fds[side])
        self._fds[side] = fd

    def _root(self) -> Iterator[_Found]:
        before, after = (os.fstat(fd) for fd in self._fds)
        reasons = self._reasons(b".", before, after)
        if reasons:
            entry = tree.Entry(self._fds[1], b".", b"", after)
            yield _modified(b"", after, reasons), entry
        self._push(b"", (before.st_ino, after.st_ino), after, named=True)

    def _push(
        self, path: bytes, inodes: tuple[int, int], status: os.stat_result, *, named: bool
    ) -> None:
        names = self._names()
        if self._progress is not None:
            self._progress(len(names))
        self._stack.append(_Frame(path, inodes, sorted(names, reverse=True), status, named=named))

    def _names(self) -> set[bytes]:
        """The names of the two directories that are to be looked at."""
        if self._within is None:
            return {os.fsencode(name) for fd in self._fds for name in os.listdir(fd)}  # noqa: PTH208 (a descriptor)
        before, after = (_numbers(fd) for fd in self._fds)
        return {
            os.fsencode(name)
            for name in before.keys() | after.keys()
            if before.get(name) != after.get(name) or after[name] in self._within
        }

    def _entry(self, frame: _Frame, name: bytes) -> Iterator[_Found]:
        path = frame.path + b"/" + name if frame.path else name
        before, after = (_status(fd, name) for fd in self._fds)
        if after is None:
            if before is not None:
                yield from self._ancestors()
                size = _size_below(self._fds[0], name, before)
                kind = stat.S_IFMT(before.st_mode)
                yield Change(path=path, kind="deleted", type=kind, size=size), None
        elif before is None:
            yield from self._ancestors()
            yield from self._added(path, name, after)
        else:
            yield from self._both(path, name, before, after)

    def _both(
        self, path: bytes, name: bytes, before: os.stat_result, after: os.stat_result
    ) -> Iterator[_Found]:
        directories = [stat.S_ISDIR(status.st_mode) for status in (before, after)]
        reasons = self._reasons(name, before, after)
        entered = True
        if reasons:
            yield from self._ancestors()
            entry = tree.Entry(self._fds[1], name, path, after)
            yield _modified(path, after, reasons), entry
            entered = entry.enter
        if all(directories) and entered:
            opened = [tree.open_directory(fd, name) for fd in self._fds]
            for side, (fd, _) in enumerate(opened):
                self._move(side, fd)
            named = bool(reasons) or not self._parents
            self._push(path, (opened[0][1], opened[1][1]), after, named=named)
        elif directories[1] and entered:
            yield from self._below(path, name)

    def _added(self, path: bytes, name: bytes, status: os.stat_result) -> Iterator[_Found]:
        entry = tree.Entry(self._fds[1], name, path, status)
        yield _added(path, status), entry
        if stat.S_ISDIR(status.st_mode) and entry.enter:
            yield from self._below(path, name)

    def _below(self, path: bytes, name: bytes) -> Iterator[_Found]:
        """Everything in a directory that is new."""
        fd, _ = tree.open_directory(self._fds[1], name)
        try:
            for entry in tree.walk(fd):
                if entry.path:
                    entry.path = path + b"/" + entry.path
                    yield _added(entry.path, entry.status), entry
        finally:
            os.close(fd)

    def _ancestors(self) -> Iterator[_Found]:
        """The directories above a change that have not been named yet."""
        if self._stack[-1].named:
            return
        for depth, frame in enumerate(self._stack):
            if not frame.named:
                frame.named = True
                yield from self._named_directory(depth)

    def _named_directory(self, depth: int) -> Iterator[_Found]:
        """A directory on the way to where the walk is."""
        fd = os.open(b".", tree.OPEN_DIRECTORY, dir_fd=self._fds[1])
        try:
            for above in reversed(self._stack[depth:-1]):
                parent = tree.open_parent(fd, above.inodes[1])
                os.close(fd)
                fd = parent
            frame = self._stack[depth]
            entry = tree.Entry(fd, b".", frame.path, frame.status)
            yield _modified(frame.path, frame.status, (ENTRIES,)), entry
        finally:
            os.close(fd)

    # ---- two entries -----------------------------------------------------------------------

    def _reasons(
        self, name: bytes, before: os.stat_result, after: os.stat_result
    ) -> tuple[str, ...]:
        """In what two entries of one name differ."""
        if self._related and self._untouched(before, after):
            return ()
        kind = stat.S_IFMT(after.st_mode)
        if stat.S_IFMT(before.st_mode) != kind:
            return ("type",)
        found = []
        if before.st_mode != after.st_mode:
            found.append("mode")
        if (before.st_uid, before.st_gid) != (after.st_uid, after.st_gid):
            found.append("owner")
        if kind != stat.S_IFDIR and before.st_mtime_ns != after.st_mtime_ns:
            found.append("mtime")
        found += self._content_reasons(name, before, after)
        first, second = (tree.xattrs(fd, name) for fd in self._fds)
        if first != second:
            found.append("xattrs")
        return tuple(found)

    def _content_reasons(
        self, name: bytes, before: os.stat_result, after: os.stat_result
    ) -> list[str]:
        """In what the content of two entries of one type differs."""
        kind = stat.S_IFMT(after.st_mode)
        if kind == stat.S_IFREG:
            if before.st_size != after.st_size:
                return ["size", "content"]
            if before.st_size and not self._equal(name, before, after):
                return ["content"]
        elif kind == stat.S_IFLNK:
            first, second = (os.readlink(name, dir_fd=fd) for fd in self._fds)
            if first != second:
                return ["target"]
        elif kind in (stat.S_IFCHR, stat.S_IFBLK) and before.st_rdev != after.st_rdev:
            return ["device"]
        return []

    def _untouched(self, before: os.stat_result, after: os.stat_result) -> bool:
        return (
            before.st_ino == after.st_ino
            and before.st_ctime_ns == after.st_ctime_ns
            and before.st_mtime_ns == after.st_mtime_ns
            and before.st_size == after.st_size
            and before.st_mode == after.st_mode
            and before.st_uid == after.st_uid
            and before.st_gid == after.st_gid
            and (self._parted_ns is None or after.st_ctime_ns < self._parted_ns)
        )

    def _equal(self, name: bytes, before: os.stat_result, after: os.stat_result) -> bool:
        if (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino):
            return True  # one tree given twice
        first = open_file(tree.Entry(self._fds[0], name, name, before))
        try:
            second = open_file(tree.Entry(self._fds[1], name, name, after))
            try:
                return _equal_content(first, second)
            finally:
                os.close(second)
        finally:
            os.close(first)


def _equal_content(first: int, second: int) -> bool:
    offset = 0
    while True:
        data = os.pread(first, CHUNK, offset)
        if data != os.pread(second, CHUNK, offset):
            return False
        if not data:
            return True
        offset += len(data)


def _numbers(fd: int) -> dict[str, int]:
    """The inode number of each name in a directory."""
    with os.scandir(fd) as found:
        return {entry.name: entry.inode() for entry in found}


def _status(fd: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _size(status: os.stat_result) -> int:
    kind = stat.S_IFMT(status.st_mode)
    return status.st_size if kind in (stat.S_IFREG, stat.S_IFLNK) else 0


def _shared(status: os.stat_result) -> int:
    several = status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode)
    return status.st_ino if several else 0


def _size_below(fd: int, name: bytes, status: os.stat_result) -> int:
    if not stat.S_ISDIR(status.st_mode):
        return _size(status)
    directory, _ = tree.open_directory(fd, name)
    try:
        return sum(_size(entry.status) for entry in tree.walk(directory))
    finally:
        os.close(directory)


def _added(path: bytes, status: os.stat_result) -> Change:
    kind = stat.S_IFMT(status.st_mode)
    size, inode = _size(status), _shared(status)
    return Change(path=path, kind="added", type=kind, size=size, inode=inode)


def _modified(path: bytes, status: os.stat_result, reasons: tuple[str, ...]) -> Change:
    kind = stat.S_IFMT(status.st_mode)
    return Change(
        path=path,
        kind="modified",
        type=kind,
        size=_size(status),
        inode=_shared(status),
        reasons=reasons,
    )
