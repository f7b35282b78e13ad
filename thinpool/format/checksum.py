"""Checksums: raw CRC-32C of a block but its first four bytes, xored with the kind's salt."""

from __future__ import annotations

from enum import IntEnum

from thinpool._native import ffi, lib
from thinpool.format.record import BLOCK_SIZE


class Salt(IntEnum):
    """Each kind of block has its own, so that one cannot be taken for another."""

    SUPERBLOCK = 160774
    NODE = 121107
    INDEX = 160478
    BITMAP = 240779


def crc32c(data: bytes | bytearray) -> int:
    """CRC-32C begun with all bits set and not inverted at the end: the one of ext4 and jbd2."""
    with ffi.from_buffer("unsigned char[]", data) as raw:
        return int(lib.tp_crc32c(0xFFFFFFFF, raw, len(data)))


def checksum(block: bytes | bytearray, salt: Salt) -> int:
    """What the first four bytes of a block should be."""
    if len(block) != BLOCK_SIZE:
        raise ValueError(f"a metadata block has {BLOCK_SIZE} bytes, not {len(block)}")
    with ffi.from_buffer("unsigned char[]", block) as data:
        return int(lib.tp_crc32c(0xFFFFFFFF, data + 4, BLOCK_SIZE - 4)) ^ salt


def sealed(block: bytes | bytearray, salt: Salt) -> bytes:
    """The block with its checksum in place."""
    return checksum(block, salt).to_bytes(4, "little") + bytes(block[4:])


def kind_of(block: bytes | bytearray) -> Salt | None:
    """What a block's checksum says that it is; None when it is none of the four."""
    raw = checksum(block, Salt.SUPERBLOCK) ^ Salt.SUPERBLOCK
    salt = raw ^ int.from_bytes(block[:4], "little")
    return Salt(salt) if salt in Salt.__members__.values() else None
