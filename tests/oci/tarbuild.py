"""A tar writer that lies on request: every field of a header can be set to what it must not be."""

from __future__ import annotations

import io
import os

from thinpool.oci.extract import Extracted, Extractor
from thinpool.oci.streams import IteratorSource

BLOCK = 512
ME, MY_GROUP = os.geteuid(), os.getegid()  # what anybody may give to a file


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def base256(value: int, width: int) -> bytes:
    raw = bytearray(value.to_bytes(width, "big", signed=value < 0))
    raw[0] |= 0x80
    return bytes(raw)


def number(value: int | bytes, width: int) -> bytes:
    if isinstance(value, bytes):
        return value.ljust(width, b"\0")
    if 0 <= value < 8 ** (width - 1):
        return octal(value, width)
    return base256(value, width)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def header(
    name: bytes,
    *,
    kind: bytes = b"0",
    size: int | bytes = 0,
    mode: int | bytes = 0o644,
    uid: int | bytes = ME,
    gid: int | bytes = MY_GROUP,
    mtime: int | bytes = 1_600_000_000,
    linkname: bytes = b"",
    magic: bytes = b"ustar\00000",
    device: tuple[int | bytes, int | bytes] = (0, 0),
    prefix: bytes = b"",
    checksum: bytes | None = None,
    tail: bytes | None = None,
) -> bytes:
    block = b"".join(
        (
            name[:100].ljust(100, b"\0"),
            number(mode, 8),
            number(uid, 8),
            number(gid, 8),
            number(size, 12),
            number(mtime, 12),
            b" " * 8,
            kind,
            linkname[:100].ljust(100, b"\0"),
            magic,
            bytes(64),
            number(device[0], 8),
            number(device[1], 8),
            prefix[:155].ljust(155, b"\0"),
            bytes(12),
        )
    )
    if tail is not None:  # whatever stands from offset 345 on, as in GNU's headers
        block = block[:345] + tail.ljust(BLOCK - 345, b"\0")
    assert len(block) == BLOCK
    total = checksum if checksum is not None else b"%06o\0 " % sum(block)
    return block[:148] + total + block[156:]


def record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    size = len(body) + 1
    while len(b"%d" % size) + len(body) != size:
        size = len(b"%d" % size) + len(body)
    return b"%d" % size + body


class Tar:
    """Members one after the other; ``bytes()`` ends it."""

    def __init__(self) -> None:
        self.out = io.BytesIO()

    def raw(self, data: bytes) -> Tar:
        self.out.write(data)
        return self

    def pax(self, records: dict[bytes, bytes] | bytes, kind: bytes = b"x") -> Tar:
        if isinstance(records, dict):
            records = b"".join(record(key, value) for key, value in records.items())
        return self.raw(header(b"PaxHeaders/x", kind=kind, size=len(records)) + padded(records))

    def long(self, kind: bytes, name: bytes) -> Tar:
        return self.raw(
            header(b"././@LongLink", kind=kind, size=len(name) + 1, magic=b"ustar  \0")
            + padded(name + b"\0")
        )

    def add(self, name: bytes, data: bytes = b"", **fields) -> Tar:
        fields.setdefault("size", len(data))
        if len(name) > 100:
            self.long(b"L", name)
        if len(fields.get("linkname", b"")) > 100:
            self.long(b"K", fields["linkname"])
        return self.raw(header(name, **fields) + padded(data))

    def file(self, name: bytes, data: bytes = b"", **fields) -> Tar:
        return self.add(name, data, **fields)

    def dir(self, name: bytes, **fields) -> Tar:
        fields.setdefault("mode", 0o755)
        return self.add(name, kind=b"5", **fields)

    def symlink(self, name: bytes, target: bytes, **fields) -> Tar:
        fields.setdefault("mode", 0o777)
        return self.add(name, kind=b"2", linkname=target, **fields)

    def link(self, name: bytes, target: bytes, **fields) -> Tar:
        return self.add(name, kind=b"1", linkname=target, **fields)

    def end(self) -> bytes:
        return self.out.getvalue() + bytes(2 * BLOCK)


def extract(root, data: bytes, **options) -> Extracted:
    """Apply ``data`` to the directory ``root``."""
    pieces = (data[at : at + 100_000] for at in range(0, len(data), 100_000))
    need_end = options.pop("need_end", True)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return Extractor(fd, **options).apply(IteratorSource(pieces), need_end=need_end)
    finally:
        os.close(fd)
