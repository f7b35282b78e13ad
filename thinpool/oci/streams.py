"""Byte sources: files, decompression, digests, limits.

A source has one method, ``read(size)``: at least one and at most ``size`` bytes, or ``b""`` at the
end. Everything is streamed in bounded memory whatever the input says: output per step is at most
:data:`CHUNK`, a zstd window at most :data:`ZSTD_WINDOW_MAX`. Decompression happens inside this
process with zlib and libzstd, never by running a program.

Sources are not thread-safe; one reader each.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import zstandard

from thinpool.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from hashlib import _Hash

CHUNK: Final = 256 * 1024
ZSTD_WINDOW_MAX: Final = 128 * 1024 * 1024  # what every zstd decoder must take with --long

_GZIP_MAGIC: Final = b"\x1f\x8b"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_REFUSED_MAGICS: Final = (
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "zip"),
    (b"\x89LZO", "lzop"),
)
# Registered algorithms of the OCI image spec, descriptor.md; the lengths are of the hex form.
_DIGEST_LENGTHS: Final = {"sha256": 64, "sha512": 128}
_DIGEST = re.compile(r"([a-z0-9]+):([0-9a-f]+)", re.ASCII)


class Source(Protocol):
    """Where bytes come from."""

    def read(self, size: int, /) -> bytes:
        """At least one and at most ``size`` bytes; ``b""`` at the end."""
        ...


def check_digest(text: object, *, member: str) -> str:
    """``text`` if it is a digest that can be verified.

    Raises:
        ArchiveError: not ``sha256:<64 hex>`` or ``sha512:<128 hex>``.
    """
    if isinstance(text, str):
        found = _DIGEST.fullmatch(text)
        if found and _DIGEST_LENGTHS.get(found[1]) == len(found[2]):
            return text
    raise ArchiveError(f"{member}: {text!r:.100} is not a sha256 or sha512 digest", member=member)


class FileSource:
    """A descriptor read in order from where it stands; the caller owns it."""

    def __init__(self, fd: int) -> None:
        """Read from ``fd``."""
        self._fd = fd

    def read(self, size: int, /) -> bytes:
        """As :class:`Source`."""
        return os.read(self._fd, min(size, CHUNK))


@runtime_checkable
class SkippingSource(Source, Protocol):
    """A source that can pass over bytes without reading them."""

    def skip(self, size: int, /) -> int:
        """Pass over ``size`` bytes, or what is left; returns how many."""
        ...


class RangeSource:
    """A piece of a seekable descriptor; leaves its position alone."""

    def __init__(self, fd: int, *, offset: int, size: int, member: str) -> None:
        """Read ``[offset, offset + size - 1]`` of ``fd``, which the caller owns."""
        self._fd = fd
        self._offset = offset
        self._left = size
        self._member = member

    def read(self, size: int, /) -> bytes:
        """As :class:`Source`; the file ending early is an :class:`ArchiveError`."""
        if not self._left:
            return b""
        data = os.pread(self._fd, min(size, CHUNK, self._left), self._offset)
        if not data:
            raise ArchiveError(
                f"{self._member}: the archive is cut short, {self._left} bytes are missing",
                member=self._member,
            )
        self._offset += len(data)
        self._left -= len(data)
        return data

    def skip(self, size: int, /) -> int:
        """As :class:`SkippingSource`."""
        size = min(size, self._left)
        self._offset += size
        self._left -= size
        return size


class IteratorSource:
    """The pieces of an iterator, one after the other, of whatever size."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        """Take pieces as they are asked for."""
        self._pieces = pieces
        self._piece = b""
        self._at = 0

    def read(self, size: int, /) -> bytes:
        """As :class:`Source`."""
        while self._at == len(self._piece):
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._piece, self._at = piece, 0
        start = self._at
        self._at = min(start + size, len(self._piece))
        return self._piece[start : self._at]


class PeekSource:
    """A source whose first bytes can be looked at before they are read."""

    def __init__(self, source: Source) -> None:
        """Wrap ``source``."""
        self._source = source
        self._head = b""

    def peek(self, size: int) -> bytes:
        """The next ``size`` bytes, or fewer at the end."""
        while len(self._head) < size:
            data = self._source.read(size - len(self._head))
            if not data:
                break
            self._head += data
        return self._head[:size]

    def read(self, size: int, /) -> bytes:
        """As :class:`Source`."""
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        return self._source.read(size)


class HashingSource:
    """Digests what passes; at the end compares with what was promised."""

    def __init__(self, source: Source, *, member: str, digest: str | None = None) -> None:
        """Wrap ``source``.

        Args:
            source: what is read.
            member: its name, for errors.
            digest: promised ``algorithm:hex``, or None to compute sha256.
        """
        self._source = source
        self._member = member
        self._wanted = digest
        self._algorithm = digest.partition(":")[0] if digest else "sha256"
        self._hash: _Hash = hashlib.new(self._algorithm)

    @property
    def digest(self) -> str:
        """The digest of what was read so far."""
        return f"{self._algorithm}:{self._hash.hexdigest()}"

    def read(self, size: int, /) -> bytes:
        """As :class:`Source`.

        Raises:
            ArchiveError: at the end where the digest is not the promised one.
        """
        data = self._source.read(size)
        if data:
            self._hash.update(data)
        elif self._wanted is not None and self.digest != self._wanted:
            raise ArchiveError(
                f"{self._member}: its digest is {self.digest}, not {self._wanted}",
                member=self._member,
                found=self.digest,
                wanted=self._wanted,
            )
        return data


class LimitSource:
    """Ends a stream that grows beyond ``limit`` bytes in an error."""

    def __init__(self, source: Source, *, limit: int, member: str) -> None:
        """Wrap ``source``."""
        self._source = source
        self._limit = limit
        self._left = limit
        self._member = member

    def read(self, size: int, /) -> bytes:
        """As :class:`Source`."""
        data = self._source.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ArchiveError(
                f"{self._member}: unpacks to more than the {self._limit} bytes allowed",
                member=self._member,
                limit=self._limit,
            )
        return data


class CountingSource:
    """Tells a callback how many bytes passed, after each read."""

    def __init__(self, source: Source, passed: Callable[[int], None]) -> None:
        """Wrap ``source``; ``passed`` gets the size of each piece."""
        self._source = source
        self._passed = passed

    def read(self, size: int, /) -> bytes:
        """As :class:`Source`."""
        data = self._source.read(size)
        self._passed(len(data))
        return data


class GzipSource:
    """gzip members one after the other; zero padding after the last is ignored."""

    def __init__(self, source: Source, *, member: str) -> None:
        """Decompress ``source``."""
        self._source = source
        self._member = member
        self._inflate = zlib.decompressobj(wbits=31)
        self._input = b""
        self._started = False
        self._ended = False

    def read(self, size: int, /) -> bytes:
        """As :class:`Source`."""
        size = min(size, CHUNK)
        while not self._ended:
            if not self._input:
                self._input = self._source.read(CHUNK)
                if not self._input:
                    # zlib may still hold output for input it has taken.
                    data = self._step(b"", size)
                    if data:
                        return data
                    if self._started:
                        self._bad("the gzip stream is cut short")
                    self._ended = True
                    break
            if not self._started:
                self._begin()
                if self._ended:
                    break
            data = self._step(self._input, size)
            if data:
                return data
        return b""

    def _begin(self) -> None:
        """At the start of a member, or in what follows the last one."""
        while self._input[:1] == b"\0":
            self._input = self._input.lstrip(b"\0") or self._source.read(CHUNK)
        if not self._input:
            self._ended = True
            return
        while len(self._input) < len(_GZIP_MAGIC):
            more = self._source.read(CHUNK)
            if not more:
                break
            self._input += more
        if self._input[:2] != _GZIP_MAGIC:
            self._bad("something that is not gzip follows the gzip stream")
        self._inflate = zlib.decompressobj(wbits=31)
        self._started = True

    def _step(self, data: bytes, size: int) -> bytes:
        if not self._started:
            return b""
        try:
            out = self._inflate.decompress(data, size)
        except zlib.error as error:
            raise ArchiveError(
                f"{self._member}: the gzip stream is damaged ({error})", member=self._member
            ) from error
        if self._inflate.eof:
            self._input = self._inflate.unused_data
            self._started = False
        else:
            self._input = self._inflate.unconsumed_tail
        return out

    def _bad(self, what: str) -> None:
        raise ArchiveError(f"{self._member}: {what}", member=self._member)


class ZstdSource:
    """zstd frames one after the other, skippable ones included.

    The stream is cut at block boundaries here (RFC 8878) and handed to libzstd a block at a time:
    a block makes at most 128 KiB, so a few bytes of input can never ask for gigabytes at once, and
    an end inside a frame is noticed, which libzstd's streaming calls leave to the caller.
    """

    def __init__(self, source: Source, *, member: str) -> None:
        """Decompress ``source``."""
        self._source = source
        self._member = member
        self._factory = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_MAX)
        self._pieces = self._decode()
        self._rest = b""
        self._input = b""
        self._at = 0

    def read(self, size: int, /) -> bytes:
        """As :class:`Source`."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = piece
        if len(self._rest) <= size:
            data, self._rest = self._rest, b""
        else:
            data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def _take(self, size: int) -> bytes:
        while len(self._input) - self._at < size:
            more = self._source.read(CHUNK)
            if not more:
                self._bad("the zstd stream is cut short")
            self._input = self._input[self._at :] + more
            self._at = 0
        data = self._input[self._at : self._at + size]
        self._at += size
        return data

    def _at_end(self) -> bool:
        if self._at < len(self._input):
            return False
        self._input, self._at = self._source.read(CHUNK), 0
        return not self._input

    def _decode(self) -> Iterator[bytes]:
        while not self._at_end():
            magic = self._take(4)
            if magic[1:] == b"\x2a\x4d\x18" and magic[0] & 0xF0 == 0x50:  # noqa: PLR2004 (skippable)
                left = int.from_bytes(self._take(4), "little")
                while left:
                    left -= len(self._take(min(left, CHUNK)))
            elif magic == _ZSTD_MAGIC:
                yield from self._frame(magic)
            else:
                self._bad("something that is not zstd follows the zstd stream")

    def _frame(self, magic: bytes) -> Iterator[bytes]:
        descriptor = self._take(1)
        flags = descriptor[0]
        single = flags >> 5 & 1
        rest = (0 if single else 1) + (0, 1, 2, 4)[flags & 3]
        rest += (single, 2, 4, 8)[flags >> 6]
        decoder = self._factory.decompressobj()
        try:
            decoder.decompress(magic + descriptor + self._take(rest))
            last = 0
            while not last:
                header = self._take(3)
                value = int.from_bytes(header, "little")
                last, kind, size = value & 1, value >> 1 & 3, value >> 3
                tail = 4 if last and flags & 4 else 0  # the content checksum ends the frame
                out = decoder.decompress(header + self._take((1 if kind == 1 else size) + tail))
                if out:
                    yield out
        except (zstandard.ZstdError, MemoryError) as error:
            raise ArchiveError(
                f"{self._member}: the zstd stream is damaged ({error})", member=self._member
            ) from error
        if not decoder.eof:
            self._bad("the zstd stream is damaged")

    def _bad(self, what: str) -> None:
        raise ArchiveError(f"{self._member}: {what}", member=self._member)


def decompressed(source: Source, *, member: str) -> tuple[Source, str]:
    """``source`` without the compression that its first bytes show.

    Returns:
        The plain source, and ``"gzip"``, ``"zstd"`` or ``"plain"``.

    Raises:
        ArchiveError: a compression that is not supported.
    """
    peek = PeekSource(source)
    head = peek.peek(8)
    if head.startswith(_GZIP_MAGIC):
        return GzipSource(peek, member=member), "gzip"
    skippable = head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50  # noqa: PLR2004
    if head.startswith(_ZSTD_MAGIC) or skippable:
        return ZstdSource(peek, member=member), "zstd"
    for magic, name in _REFUSED_MAGICS:
        if head.startswith(magic):
            raise ArchiveError(
                f"{member}: is compressed with {name}; only gzip and zstd are supported",
                member=member,
                compression=name,
            )
    return peek, "plain"
