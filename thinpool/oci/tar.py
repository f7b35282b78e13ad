"""A streaming tar parser that trusts nothing: ustar, GNU and PAX, sparse files, raw byte names.

Reads members in order from a :class:`~thinpool.oci.streams.Source` that cannot seek. Follows what
the tar of Docker's engine (Go's archive/tar) makes of an archive where the formats leave room:
links, directories, devices and fifos carry no data whatever their size field says; a GNU long name
wins over a PAX path; of several PAX headers for one member the records add up.

What cannot be so is an :class:`~thinpool.errors.ArchiveError` with the member's name: a wrong
checksum, a number that is none, PAX records whose length is not theirs, sparse maps that overlap or
do not add up, sizes of headers beyond :class:`TarLimits`, an end in the middle.

Not thread-safe. A member's data is to be taken before the next member is asked for; what was not
taken is skipped.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from thinpool.errors import ArchiveError
from thinpool.oci.streams import CHUNK, SkippingSource, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK: Final = 512

REGULAR: Final = b"0"
HARD_LINK: Final = b"1"
SYMLINK: Final = b"2"
CHARACTER: Final = b"3"
BLOCK_DEVICE: Final = b"4"
DIRECTORY: Final = b"5"
FIFO: Final = b"6"

_KINDS: Final = {
    b"\0": REGULAR,
    b"0": REGULAR,
    b"7": REGULAR,  # contiguous
    b"S": REGULAR,  # GNU sparse
    b"1": HARD_LINK,
    b"2": SYMLINK,
    b"3": CHARACTER,
    b"4": BLOCK_DEVICE,
    b"5": DIRECTORY,
    b"6": FIFO,
}

# name mode uid gid size mtime checksum type linkname magic+version devmajor devminor prefix
_SUM_AT: Final = 148
_HEADER: Final = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_KIND_FIELD: Final = 7
_SIZE_FIELD: Final = 4
_ZERO: Final = bytes(BLOCK)
_SCHILY_XATTR: Final = b"SCHILY.xattr."
_TIME = re.compile(rb"(-?)([0-9]{1,19})(?:\.([0-9]*))?")
_NUMBER_DIGITS_MAX: Final = 19
_OFFSET_MAX: Final = (1 << 63) - 1
# Records of a global header that would change how every later member is read or where it goes.
_GLOBAL_REFUSED = re.compile(rb"path|linkpath|size|GNU\.sparse\..*|SCHILY\.xattr\..*")
_GLOBAL_USED: Final = frozenset((b"uid", b"gid", b"mtime", b"atime"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TarLimits:
    """What an archive may ask for at most.

    Attributes:
        members: entries of one archive; each costs its name and about 150 bytes of memory.
        header_bytes: of one PAX header (Go's limit), of all global ones together, of a long name.
        sparse_segments: of one sparse file.
    """

    members: int = 4_000_000
    header_bytes: int = 1 << 20
    sparse_segments: int = 1 << 18


class Member:
    """One entry of an archive; names are the bytes of the archive.

    Attributes:
        name: never empty; a directory's trailing slash kept.
        kind: one of the constants of this module.
        mode: permission bits with setuid, setgid and sticky.
        mtime_ns, atime_ns: nanoseconds since 1970; atime is None where the archive has none.
        size: bytes of the file as it will read; zero for all but regular files.
        xattrs: extended attributes by name.
        sparse: (offset, length) of the data segments, in order; None for a file without holes.
    """

    __slots__ = (
        "atime_ns",
        "device",
        "gid",
        "kind",
        "linkname",
        "mode",
        "mtime_ns",
        "name",
        "size",
        "sparse",
        "uid",
        "xattrs",
    )

    def __init__(self) -> None:
        """An empty regular file."""
        self.name = b""
        self.kind = REGULAR
        self.linkname = b""
        self.mode = 0
        self.uid = 0
        self.gid = 0
        self.size = 0
        self.mtime_ns = 0
        self.atime_ns: int | None = None
        self.device = (0, 0)
        self.xattrs: dict[bytes, bytes] = {}
        self.sparse: list[tuple[int, int]] | None = None


class _Extra:
    """What the headers before a member's own say about it."""

    __slots__ = ("linkname", "name", "records", "size", "sparse_pairs")

    def __init__(self) -> None:
        self.name = b""
        self.linkname = b""
        self.records: dict[bytes, bytes] = {}
        self.sparse_pairs: list[bytes] = []  # in order: offset, length, offset, ...
        self.size = 0


_NO_EXTRA: Final = _Extra()


def text(name: bytes) -> str:
    """A member's name for a message: printable, and short."""
    shown = name.decode("utf-8", "backslashreplace")
    if not shown.isprintable():
        shown = "".join(
            one if one.isprintable() else one.encode("unicode_escape").decode() for one in shown
        )
    return shown if len(shown) <= 200 else shown[:197] + "..."  # noqa: PLR2004 (a line)


class TarReader:
    """Members of a tar stream."""

    def __init__(
        self,
        source: Source,
        *,
        archive: str = "archive",
        limits: TarLimits | None = None,
        need_end: bool = True,
    ) -> None:
        """Read from ``source``.

        Args:
            source: uncompressed.
            archive: its name, for errors about no member in particular.
            limits: see :class:`TarLimits`.
            need_end: an archive without its end mark is cut short. False suits where a digest
                proves that nothing is missing, because some writers leave the mark out.
        """
        self._source = source
        self._archive = archive
        self._limits = limits or TarLimits()
        self._need_end = need_end
        self._buffer = memoryview(b"")
        self._at = 0
        self._taken = 0  # from the source, buffer included
        self._name = archive
        self._left = 0  # of the current member's data, without padding
        self._padding = 0
        self._globals: dict[bytes, bytes] = {}
        self._global_bytes = 0
        self.count = 0

    # ---- the stream ------------------------------------------------------------------------

    def _fill(self) -> bool:
        data = self._source.read(CHUNK)
        self._buffer = memoryview(data)
        self._at = 0
        self._taken += len(data)
        return bool(data)

    def _exactly(self, size: int) -> bytes:
        """``size`` bytes, which a caller has bounded."""
        end = self._at + size
        if end <= len(self._buffer):
            data = bytes(self._buffer[self._at : end])
            self._at = end
            return data
        data = bytes(self._buffer[self._at :])
        pieces, left = [data], size - len(data)
        while left:
            if not self._fill():
                self._cut()
            piece = bytes(self._buffer[:left])
            self._at = len(piece)
            left -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    @property
    def position(self) -> int:
        """Where in the archive the reader is: after a member's header, where its data begins."""
        return self._taken - len(self._buffer) + self._at

    def _skip(self, size: int) -> None:
        if size > len(self._buffer) - self._at and isinstance(self._source, SkippingSource):
            beyond = size - (len(self._buffer) - self._at)
            self._at = len(self._buffer)
            if self._source.skip(beyond) != beyond:
                self._cut()
            self._taken += beyond
        else:
            self._feed(size, None)

    def _feed(self, size: int, sink: Callable[[memoryview], object] | None) -> None:
        while size:
            if self._at == len(self._buffer) and not self._fill():
                self._cut()
            piece = self._buffer[self._at : self._at + size]
            self._at += len(piece)
            size -= len(piece)
            if sink is not None:
                sink(piece)

    def _cut(self) -> NoReturn:
        raise ArchiveError(f"{self._archive}: cut short in {self._name}", member=self._name)

    def _bad(self, what: str) -> NoReturn:
        raise ArchiveError(f"{self._archive}: {self._name}: {what}", member=self._name)

    # ---- members ---------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Member]:
        """Every member once, in order; after the last the source is read to its end.

        Raises:
            ArchiveError: as the module says.
        """
        while (member := self._next()) is not None:
            yield member
        self._drain()

    def data(self, sink: Callable[[memoryview], object]) -> None:
        """Give the current member's data, as stored, to ``sink`` piece by piece.

        A piece is valid during the call. Of a sparse file this is the segments' bytes in order.
        """
        left, self._left = self._left, 0
        self._feed(left, sink)

    def segment(self, size: int, sink: Callable[[memoryview], object]) -> None:
        """The next ``size`` bytes of the current member's data, at most what is left of it."""
        size = min(size, self._left)
        self._left -= size
        self._feed(size, sink)

    def _next(self) -> Member | None:
        extra: _Extra | None = None
        while True:
            self._skip(self._left + self._padding)
            self._left = self._padding = 0
            header = self._header()
            if header is None:
                if extra is not None:
                    self._cut()
                return None
            self._count()
            fields = _HEADER.unpack(header)
            kind = fields[_KIND_FIELD]
            if kind in b"xgLK":
                extra = self._extra_header(kind, fields, extra or _Extra())
            elif kind == b"V":  # a volume's label
                self._expect(self._number(fields[_SIZE_FIELD], "size"))
            else:
                return self._member(fields, header, extra or _NO_EXTRA)

    def _expect(self, size: int) -> None:
        """So many bytes of data follow the header."""
        self._left = size
        self._padding = -size % BLOCK

    def _extra_header(self, kind: bytes, fields: tuple[bytes, ...], extra: _Extra) -> _Extra:
        size = self._number(fields[_SIZE_FIELD], "size")
        extra.size += size
        if extra.size > self._limits.header_bytes:
            self._bad(f"headers of {extra.size} bytes; {self._limits.header_bytes} are allowed")
        body = self._exactly(size)
        self._padding = -size % BLOCK
        if kind == b"L":
            extra.name = body.rstrip(b"\0")
        elif kind == b"K":
            extra.linkname = body.rstrip(b"\0")
        elif kind == b"g":
            self._global(body)
        else:
            for key, value in self._records(body):
                if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                    extra.sparse_pairs.append(value)
                else:
                    extra.records[key] = value
        return extra

    def _count(self) -> None:
        self.count += 1
        if self.count > self._limits.members:
            self._bad(f"more than the {self._limits.members} members allowed")

    def _header(self) -> bytes | None:
        """The next header block; None at the archive's end."""
        if self._at == len(self._buffer) and not self._fill():
            if self._need_end:
                raise ArchiveError(
                    f"{self._archive}: cut short after {self._name}: the end mark is missing",
                    member=self._name,
                )
            return None
        header = self._exactly(BLOCK)
        if header == _ZERO:
            if self._at == len(self._buffer) and not self._fill():
                if self._need_end:
                    self._cut()
                return None
            if self._exactly(BLOCK) != _ZERO:
                self._bad("a block of zeros stands between members")
            return None
        self._check_sum(header)
        return header

    def _check_sum(self, header: bytes) -> None:
        """The sum of all bytes with the sum's own field as blanks; some old writers sum signed."""
        field = header[_SUM_AT : _SUM_AT + 8]
        stored = self._number(field, "checksum")
        total = sum(header) - sum(field) + 8 * 0x20
        if stored != total:
            others = header[:_SUM_AT] + header[_SUM_AT + 8 :]
            if stored != total - 0x100 * sum(byte >> 7 for byte in others):
                self._bad("what follows is not a tar header (its checksum is wrong)")

    def _drain(self) -> None:
        """Read on to the source's end, so that digests of all of it can be checked."""
        count = len(self._buffer) - self._at
        while self._fill():
            count += len(self._buffer)
        self._at = len(self._buffer)
        if count % BLOCK and self._need_end:
            self._name = "the padding at its end"
            self._cut()

    def _member(self, fields: tuple[bytes, ...], header: bytes, extra: _Extra) -> Member:
        name, mode, uid, gid, size, mtime, _, kind, link, magic, _, _, prefix = fields
        member = Member()
        name = name.split(b"\0", 1)[0]
        if prefix[0] and magic.startswith(b"ustar\0"):
            if header[508:] == b"tar\0":
                prefix = prefix[:131]  # star keeps two times behind a shorter prefix
            name = prefix.split(b"\0", 1)[0] + b"/" + name
        member.name = extra.name or name
        self._name = text(member.name)
        member.linkname = extra.linkname or link.split(b"\0", 1)[0]
        member.mode = self._number(mode, "mode") & 0o7777
        member.uid = self._number(uid, "uid")
        member.gid = self._number(gid, "gid")
        stored = self._number(size, "size")
        # GNU writers give times before 1970 in base 256.
        member.mtime_ns = self._number(mtime, "mtime", negative=True) * 1_000_000_000
        if extra.records or self._globals:
            stored = self._pax(member, extra, stored)
        member.kind = self._kind(kind, member)
        if b"\0" in member.name or b"\0" in member.linkname:
            self._bad("a NUL byte in its name")
        if member.kind in (CHARACTER, BLOCK_DEVICE):
            member.device = (self._number(fields[10], "major"), self._number(fields[11], "minor"))
        elif member.kind == REGULAR:
            self._expect(stored)
            member.size = stored
            if kind == b"S":
                member.size = self._number(header[483:495], "real size")
                self._check_map(member, self._old_gnu_map(header), stored)
            elif extra.sparse_pairs or any(key.startswith(b"GNU.sparse.") for key in extra.records):
                self._pax_sparse(member, extra)
        return member

    def _kind(self, kind: bytes, member: Member) -> bytes:
        if kind == b"\0" and member.name.endswith(b"/"):
            return DIRECTORY  # how tar before POSIX wrote them
        try:
            return _KINDS[kind]
        except KeyError:
            self._bad(f"members of type {ascii(kind)[1:]} are not supported")

    def _number(self, field: bytes, what: str, *, negative: bool = False) -> int:
        first = field[0]
        if first & 0x80:  # base 256, two's complement
            if first == 0xFF:  # noqa: PLR2004
                value = int.from_bytes(field, "big", signed=True)
            else:
                value = int.from_bytes(field, "big") ^ 1 << 8 * len(field) - 1
            if value > _OFFSET_MAX or value < (-_OFFSET_MAX if negative else 0):
                self._bad(f"its {what} is out of range")
            return value
        digits = field.strip(b" \0")
        if b"\0" in digits:
            digits = digits.split(b"\0", 1)[0].rstrip(b" ")
        if not digits:
            return 0
        if digits.isdigit():
            try:
                return int(digits, 8)
            except ValueError:
                pass
        self._bad(f"its {what} is not a number: {digits!r}")
        return None

    # ---- PAX -------------------------------------------------------------------------------

    def _records(self, body: bytes) -> Iterator[tuple[bytes, bytes]]:
        r"""Records of a PAX header: ``LENGTH KEY=VALUE\\n``, LENGTH counting all of it."""
        at = 0
        end = len(body)
        while at < end:
            blank = body.find(b" ", at, at + 21)
            digits = body[at:blank] if blank > 0 else b""
            if not digits.isdigit():
                if not body[at:].strip(b"\0"):
                    return  # padding inside the declared size, which some writers leave
                self._bad("a PAX record without a length")
            stop = at + int(digits)
            equals = body.find(b"=", blank + 1, stop)
            if stop > end or stop <= blank or equals <= blank + 1 or body[stop - 1] != 0x0A:  # noqa: PLR2004
                self._bad("a PAX record whose length is wrong")
            yield body[blank + 1 : equals], body[equals + 1 : stop - 1]
            at = stop

    def _global(self, body: bytes) -> None:
        self._global_bytes += len(body)
        if self._global_bytes > self._limits.header_bytes:
            self._bad(f"global headers of more than {self._limits.header_bytes} bytes")
        for key, value in self._records(body):
            if _GLOBAL_REFUSED.fullmatch(key):
                self._bad(f"a global header sets {text(key)} for every member")
            if key in _GLOBAL_USED:
                self._globals[key] = value

    def _pax(self, member: Member, extra: _Extra, stored: int) -> int:
        """Put records into ``member``; returns the size of its stored data."""
        records = self._globals | extra.records
        if b"path" in records and not extra.name:
            member.name = self._pax_name(records[b"path"], "path")
            self._name = text(member.name)
        if b"linkpath" in records and not extra.linkname:
            member.linkname = self._pax_name(records[b"linkpath"], "linkpath")
        for key, value in records.items():
            if key == b"size":
                stored = self._pax_number(value, "size")
            elif key == b"mtime":
                member.mtime_ns = self._pax_time(value, "mtime")
            elif key == b"atime":
                member.atime_ns = self._pax_time(value, "atime")
            elif key in (b"uid", b"gid"):
                setattr(member, key.decode(), self._pax_number(value, key.decode()))
            elif key.startswith(_SCHILY_XATTR):
                name = key[len(_SCHILY_XATTR) :]
                if not name or b"\0" in name:
                    self._bad("an extended attribute without a name")
                member.xattrs[name] = value
        return stored

    def _pax_name(self, value: bytes, what: str) -> bytes:
        if b"\0" in value:
            self._bad(f"a NUL byte in its PAX {what}")
        return value

    def _pax_number(self, value: bytes, what: str) -> int:
        if not value.isdigit() or len(value) > _NUMBER_DIGITS_MAX or int(value) > _OFFSET_MAX:
            self._bad(f"its PAX {what} is not a number: {text(value)}")
        return int(value)

    def _pax_time(self, value: bytes, what: str) -> int:
        found = _TIME.fullmatch(value)
        if found is None:
            self._bad(f"its PAX {what} is not a time: {text(value)}")
        fraction = int(((found[3] or b"") + b"000000000")[:9])
        time = int(found[2]) * 1_000_000_000 + fraction
        return -time if found[1] else time

    # ---- sparse files ----------------------------------------------------------------------

    def _old_gnu_map(self, header: bytes) -> list[tuple[int, int]]:
        segments: list[tuple[int, int]] = []

        def take(block: bytes, start: int, count: int) -> None:
            for at in range(start, start + 24 * count, 24):
                pair = block[at : at + 24]
                if not pair.strip(b"\0"):
                    return
                segments.append(
                    (self._number(pair[:12], "sparse map"), self._number(pair[12:], "sparse map"))
                )

        take(header, 386, 4)
        more = header[482]
        while more:
            block = self._exactly(BLOCK)
            take(block, 0, 21)
            more = block[504]
            if len(segments) > self._limits.sparse_segments:
                self._bad("too many segments in a sparse file")
        return segments

    def _pax_sparse(self, member: Member, extra: _Extra) -> None:
        records, pairs = extra.records, extra.sparse_pairs
        major, minor = records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor")
        name = records.get(b"GNU.sparse.name")
        if name:
            member.name = self._pax_name(name, "sparse name")
            self._name = text(member.name)
        if (major, minor) == (b"1", b"0"):
            size = records.get(b"GNU.sparse.realsize")
        elif (major or b"0") == b"0" and (minor or b"0") in (b"0", b"1"):
            size = records.get(b"GNU.sparse.size") or records.get(b"GNU.sparse.realsize")
        else:
            self._bad("a sparse file of a version that is not known")
        if size is None:
            self._bad("a sparse file without its size")
        member.size = self._pax_number(size, "sparse size")
        if major == b"1":
            segments = self._leading_map()
        else:
            if b"GNU.sparse.map" in records:
                text_map = records[b"GNU.sparse.map"]
                pairs = text_map.split(b",") if text_map else []
            if len(pairs) % 2:
                self._bad("a sparse map with an odd number of entries")
            if len(pairs) // 2 > self._limits.sparse_segments:
                self._bad("too many segments in a sparse file")
            numbers = [self._pax_number(value, "sparse map") for value in pairs]
            segments = list(zip(numbers[::2], numbers[1::2], strict=True))
        self._check_map(member, segments, self._left)

    def _leading_map(self) -> list[tuple[int, int]]:
        """PAX sparse 1.0: decimal lines at the start of the data, filled up to a block."""
        pending = b""

        def line() -> int:
            nonlocal pending
            while b"\n" not in pending:
                if len(pending) > _NUMBER_DIGITS_MAX or self._left < BLOCK:
                    self._bad("a damaged sparse map")
                pending += self._exactly(BLOCK)
                self._left -= BLOCK
            value, _, pending = pending.partition(b"\n")
            return self._pax_number(value, "sparse map")

        count = line()
        if count > self._limits.sparse_segments:
            self._bad("too many segments in a sparse file")
        return [(line(), line()) for _ in range(count)]

    def _check_map(self, member: Member, segments: list[tuple[int, int]], stored: int) -> None:
        at = total = 0
        for offset, length in segments:
            if offset < at or offset + length > member.size:
                self._bad("a sparse map that overlaps or leaves the file")
            at = offset + length
            total += length
        if total != stored:
            self._bad(f"a sparse map of {total} bytes for {stored} bytes of data")
        member.sparse = [segment for segment in segments if segment[1]]
