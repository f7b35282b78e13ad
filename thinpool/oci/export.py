"""A directory tree as a tar: deterministic, streamed, readable by GNU tar, Go and Python.

One tree gives one sequence of bytes: names in byte order, PAX records sorted, owners by number,
modification times to the nanosecond, no access or change times, no names of users. Only where a
file's holes are is the filesystem's business and shows (``sparse=False`` writes them as zeros).

* The root comes first as ``./``; other names have no leading ``./``, directories a trailing slash.
* Files with several names are hard links to the first of them.
* Files with holes are GNU sparse files, PAX version 1.0.
* Extended attributes are ``SCHILY.xattr.*`` records, ACLs and ``security.capability`` among them;
  labels of the host's security modules are not.
* Sockets are left out, and directories on which something is mounted stay empty; each is a note.

Memory is constant but for one path for each file whose further names are yet to come.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final

from thinpool.errors import NotPermittedError, StorageIOError
from thinpool.oci import tree
from thinpool.oci.streams import CHUNK
from thinpool.oci.tar import (
    BLOCK,
    BLOCK_DEVICE,
    CHARACTER,
    DIRECTORY,
    FIFO,
    HARD_LINK,
    REGULAR,
    SYMLINK,
    TarLimits,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_NAME_MAX: Final = 100
_OCTAL_7: Final = 8**7 - 1
_OCTAL_11: Final = 8**11 - 1
_SEGMENTS_MAX: Final = TarLimits().sparse_segments
_KINDS: Final = {
    stat.S_IFREG: REGULAR,
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFCHR: CHARACTER,
    stat.S_IFBLK: BLOCK_DEVICE,
    stat.S_IFIFO: FIFO,
}
_OPEN_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def iter_tar(
    root_fd: int,
    *,
    sparse: bool = True,
    note: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[bytes]:
    """The pieces of a tar of all below a directory.

    Args:
        root_fd: stays open and is the caller's, until the iterator is done.
        sparse: write files with holes as sparse files.
        note: told what is left out, a line each.
        progress: told the bytes of each piece of file data read.

    Raises:
        StorageIOError: the tree cannot be read, or a file changed while it was.
        NotPermittedError: something in it is not the caller's to read.
    """
    writer = TarWriter(sparse=sparse, note=note, progress=progress)
    try:
        device = os.fstat(root_fd).st_dev
        for entry in tree.walk(root_fd):
            if entry.status.st_dev != device:
                # What is mounted here is not the tree's; its mount point's own mode is not known.
                entry.enter = False
                writer.note(entry.path, "something is mounted on it, left empty")
            yield from writer.entry(entry)
    except OSError as error:
        raise read_error(error) from error
    yield writer.end()


def read_error(error: OSError) -> StorageIOError | NotPermittedError:
    """The typed error for a system call that failed on a tree that is read."""
    name = error.filename
    shown = text(os.fsencode(name)) if isinstance(name, str | bytes) else "a directory"
    message = f"cannot read {shown}: {error.strerror}"
    if error.errno in (errno.EPERM, errno.EACCES):
        return NotPermittedError(message, operation="read", path=shown)
    return StorageIOError(message, errno=error.errno, path=shown)


class TarWriter:
    """Turns entries of a walk into the bytes of a tar."""

    def __init__(
        self,
        *,
        sparse: bool = True,
        note: Callable[[str], None] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """As :func:`iter_tar`."""
        self._sparse = sparse
        self._note = note
        self._progress = progress
        self._pending = bytearray()
        self._links: dict[int, tuple[bytes, int]] = {}  # inode: first name, names yet to come

    def note(self, path: bytes, what: str) -> None:
        """Report something left out."""
        if self._note is not None:
            self._note(f"{text(path)}: {what}")

    def entry(self, entry: tree.Entry, *, links: bool = True) -> Iterator[bytes]:
        """One entry with its data; pieces come when enough has gathered.

        Args:
            entry: see :func:`~thinpool.oci.tree.walk`.
            links: whether a file seen before under another name becomes a hard link.
        """
        status = entry.status
        kind = _KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is None:
            self.note(entry.path, "a socket, left out")
            return
        name = entry.path or b"."
        if kind == DIRECTORY:
            name += b"/"
        elif links and status.st_nlink > 1:
            first = self._first_name(status, entry.path)
            if first is not None:
                self._header(name, HARD_LINK, status, linkname=first)
                return
        records = {
            b"SCHILY.xattr." + attribute: value
            for attribute, value in tree.xattrs(entry.directory, entry.name).items()
        }
        if kind == REGULAR:
            yield from self._file(entry, name, records)
        elif kind == SYMLINK:
            target = os.readlink(entry.name, dir_fd=entry.directory)
            self._header(name, kind, status, linkname=target, records=records)
        else:
            self._header(name, kind, status, records=records)
        if len(self._pending) >= CHUNK:
            yield self._flush()

    def whiteout(self, path: bytes) -> None:
        """An empty file of this name, root's, for layers."""
        self._raw_header(path, REGULAR, mode=0, uid=0, gid=0, size=0, mtime_ns=0)

    def end(self) -> bytes:
        """The end mark, with what has gathered before it."""
        self._pending += bytes(2 * BLOCK)
        return self._flush()

    def _flush(self) -> bytes:
        data = bytes(self._pending)
        self._pending.clear()
        return data

    def _first_name(self, status: os.stat_result, path: bytes) -> bytes | None:
        first, left = self._links.get(status.st_ino, (None, status.st_nlink))
        if left <= 1:
            self._links.pop(status.st_ino, None)
        else:
            self._links[status.st_ino] = (path if first is None else first, left - 1)
        return first

    # ---- headers ---------------------------------------------------------------------------

    def _header(
        self,
        name: bytes,
        kind: bytes,
        status: os.stat_result,
        *,
        size: int = 0,
        linkname: bytes = b"",
        records: dict[bytes, bytes] | None = None,
    ) -> None:
        device = status.st_rdev if kind in (CHARACTER, BLOCK_DEVICE) else 0
        self._raw_header(
            name,
            kind,
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            size=size,
            mtime_ns=status.st_mtime_ns,
            linkname=linkname,
            device=(os.major(device), os.minor(device)),
            records=records,
        )

    def _raw_header(
        self,
        name: bytes,
        kind: bytes,
        *,
        mode: int,
        uid: int,
        gid: int,
        size: int,
        mtime_ns: int,
        linkname: bytes = b"",
        device: tuple[int, int] = (0, 0),
        records: dict[bytes, bytes] | None = None,
    ) -> None:
        records = dict(records) if records else {}
        if len(name) > _NAME_MAX:
            records[b"path"] = name
        if len(linkname) > _NAME_MAX:
            records[b"linkpath"] = linkname
        seconds, nanoseconds = divmod(mtime_ns, 1_000_000_000)
        if nanoseconds or not 0 <= seconds <= _OCTAL_11:
            records[b"mtime"] = _decimal(mtime_ns)
        numbers = {b"uid": uid, b"gid": gid, b"size": size}
        most = {b"uid": _OCTAL_7, b"gid": _OCTAL_7, b"size": _OCTAL_11}
        for key, value in numbers.items():
            if value > most[key]:
                records[key] = b"%d" % value
                numbers[key] = 0
        if records:
            body = b"".join(_record(key, records[key]) for key in sorted(records))
            base = name.rstrip(b"/").rpartition(b"/")[2]
            self._pending += _ustar(
                b"PaxHeaders/" + base[:80], b"x", mode=0o644, uid=0, gid=0, size=len(body), mtime=0
            )
            self._pending += body + bytes(-len(body) % BLOCK)
        self._pending += _ustar(
            name,
            kind,
            mode=mode,
            uid=numbers[b"uid"],
            gid=numbers[b"gid"],
            size=numbers[b"size"],
            mtime=max(0, min(seconds, _OCTAL_11)),
            linkname=linkname,
            device=device,
        )

    # ---- data ------------------------------------------------------------------------------

    def _file(self, entry: tree.Entry, name: bytes, records: dict[bytes, bytes]) -> Iterator[bytes]:
        status = entry.status
        if not status.st_size:
            self._header(name, REGULAR, status, records=records)
            return
        fd = open_file(entry)
        try:
            size = status.st_size
            segments = [(0, size)]
            holes = self._sparse and status.st_blocks * 512 < size
            if holes:
                segments = _segments(fd, size)
            if not holes or segments == [(0, size)]:
                self._header(name, REGULAR, status, size=size, records=records)
            else:
                directory, _, base = name.rpartition(b"/")
                lines = [len(segments), *(number for pair in segments for number in pair)]
                sparse_map = b"".join(b"%d\n" % number for number in lines)
                sparse_map += bytes(-len(sparse_map) % BLOCK)
                records |= {
                    b"GNU.sparse.major": b"1",
                    b"GNU.sparse.minor": b"0",
                    b"GNU.sparse.name": name,
                    b"GNU.sparse.realsize": b"%d" % size,
                }
                size = len(sparse_map) + sum(length for _, length in segments)
                shown = (directory + b"/" if directory else b"") + b"GNUSparseFile.0/" + base
                self._header(shown, REGULAR, status, size=size, records=records)
                self._pending += sparse_map
            for offset, length in segments:
                yield from self._data(fd, offset, length, entry.path)
            self._pending += bytes(-size % BLOCK)
        finally:
            os.close(fd)

    def _data(self, fd: int, offset: int, length: int, path: bytes) -> Iterator[bytes]:
        while length:
            data = os.pread(fd, min(length, CHUNK), offset)
            if not data:
                raise StorageIOError(
                    f"{text(path)}: became shorter while it was read", path=text(path)
                )
            self._pending += data
            offset += len(data)
            length -= len(data)
            if self._progress is not None:
                self._progress(len(data))
            if len(self._pending) >= CHUNK:
                yield self._flush()


def open_file(entry: tree.Entry) -> int:
    """Open a regular file for reading, without touching its access time where that is allowed."""
    try:
        fd = os.open(entry.name, _OPEN_FILE | os.O_NOATIME, dir_fd=entry.directory)
    except PermissionError:
        fd = os.open(entry.name, _OPEN_FILE, dir_fd=entry.directory)
    found = os.fstat(fd)
    if (found.st_ino, stat.S_IFMT(found.st_mode)) != (entry.status.st_ino, stat.S_IFREG):
        os.close(fd)
        raise StorageIOError(
            f"{text(entry.path)}: was replaced while it was read", path=text(entry.path)
        )
    return fd


def _segments(fd: int, size: int) -> list[tuple[int, int]]:
    """Where a file has data; ends with an empty segment at the end where the file ends in a hole.

    More segments than readers take are joined with the hole between them.
    """
    found: list[tuple[int, int]] = []
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        if start >= size:
            break
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        found.append((start, at - start))
        if len(found) >= _SEGMENTS_MAX - 1:
            found = [
                (first[0], last[0] + last[1] - first[0])
                for first, last in zip(
                    found[::2], found[1::2] + found[-1:] * (len(found) % 2), strict=True
                )
            ]
    if at < size or not found or sum(found[-1]) < size:
        found.append((size, 0))
    return found


def _decimal(nanoseconds: int) -> bytes:
    sign = b"-" if nanoseconds < 0 else b""
    seconds, fraction = divmod(abs(nanoseconds), 1_000_000_000)
    if not fraction:
        return sign + b"%d" % seconds
    return sign + b"%d.%09d" % (seconds, fraction)


def _record(key: bytes, value: bytes) -> bytes:
    """A PAX record; its length counts the length's own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) != len(str(rest)):
        length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _ustar(
    name: bytes,
    kind: bytes,
    *,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime: int,
    linkname: bytes = b"",
    device: tuple[int, int] = (0, 0),
) -> bytes:
    start = b"%s%07o\0%07o\0%07o\0%011o\0%011o\0" % (
        name[:_NAME_MAX].ljust(_NAME_MAX, b"\0"),
        mode,
        uid,
        gid,
        size,
        mtime,
    )
    end = b"%s%sustar\x0000%s%07o\0%07o\0%s" % (
        kind,
        linkname[:_NAME_MAX].ljust(_NAME_MAX, b"\0"),
        bytes(64),
        device[0],
        device[1],
        bytes(167),
    )
    return b"%s%06o\0 %s" % (start, sum(start) + sum(end) + 8 * 0x20, end)
