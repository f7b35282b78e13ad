"""The space of an ext4's journal, while nobody uses it.

A journal fills in turn from its first block to its last, and since Linux 6.3 goes on behind its
last transaction after a remount. So a volume maps in time all of its journal (16 MiB), and each
snapshot that is written to copies the part it goes on in. Once an ext4 is cleanly unmounted, its
journal holds nothing: the log is unmapped here and the next mount begins at its first block, which
lies in the same data block as the journal's own superblock, so that a first fsync in a clone copies
one block of the pool fewer.

Either half of it alone leaves a filesystem in order: an empty journal says where a log would begin
by ``s_start`` being 0, and nothing then reads the log; ``s_head`` is where the next one is begun,
and 0, as mke2fs leaves it, means at the first block. Blocks of earlier transactions that stay in
the log are told by their sequence numbers, as in any journal that has gone round.

The layout is that of the kernel's Documentation/filesystems/ext4/journal.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from thinpool.format.checksum import crc32c
from thinpool.host.ext4layout import EXTENT_DEPTH_MAX, EXTENTS, Ext4, UnknownLayoutError

if TYPE_CHECKING:
    from thinpool.engine import VolumeIO

_MAGIC: Final = 0xC03B3998
_SUPERBLOCK_V2: Final = 4
_SIZE: Final = 1024
_CHECKSUMMED: Final = 0x8 | 0x10
"""Of the features: checksums of version 2 or 3, with which the journal's superblock has one too."""
_KNOWN: Final = 0x1 | 0x2 | _CHECKSUMMED
"""Revocation, 64 bit. Not: asynchronous commit, fast commits (an area of their own)."""
_CRC32C: Final = 4
_HEAD: Final = 0x58
_CHECKSUM: Final = 0xFC
_READS_MAX: Final = 64
_BYTES_MAX: Final = 32 << 20


class _Bounded:
    """Reads of a volume, so many and no more: what is followed may lead in circles."""

    def __init__(self, volume: VolumeIO) -> None:
        self._volume = volume
        self._reads = 0
        self._bytes = 0

    def read(self, offset: int, length: int) -> bytes:
        self._reads += 1
        self._bytes += length
        if (
            self._reads > _READS_MAX
            or self._bytes > _BYTES_MAX
            or offset + length > self._volume.size
        ):
            raise UnknownLayoutError
        return self._volume.read(offset, length)


def release_journal(volume: VolumeIO, *, block_size: int) -> int:
    """Unmap the log of a clean ext4, and let the next one begin at the journal's first block.

    Nothing is done where the volume holds anything else, or an ext4 that is not known to be
    understood: its journal is to be replayed, is elsewhere, or has features unknown here. Nothing
    is made durable; a crash leaves all, some or none of it, each of which is in order.

    Args:
        volume: writable, and used by nobody else.
        block_size: bytes of a data block of the pool; only whole ones are unmapped.

    Returns:
        Bytes that are unmapped now and belong to the log, whether they were mapped or not.

    Raises:
        ThinpoolError: a read, a write or a discard failed.
    """
    try:
        return _release(volume, block_size)
    except (UnknownLayoutError, struct.error):
        return 0


def _release(volume: VolumeIO, block_size: int) -> int:
    filesystem = Ext4(_Bounded(volume).read)
    journal = filesystem.inode(filesystem.journal_inode)
    if not filesystem.journal_inode or not journal.is_used or not journal.flags & EXTENTS:
        raise UnknownLayoutError
    block = filesystem.block
    runs = [
        (first * block, length * block)
        for first, length in filesystem.extents(journal.blocks, EXTENT_DEPTH_MAX)
    ]
    if not runs or any(begin + length > volume.size for begin, length in runs):
        raise UnknownLayoutError
    superblock = bytearray(filesystem.read(runs[0][0], _SIZE))
    _check(superblock, block=block, size=sum(length for _, length in runs))
    released = 0
    for begin, length in runs:
        # The superblock's block stays, and with it the pool's block that it is in.
        begin_whole = -(-(begin + (block if begin == runs[0][0] else 0)) // block_size) * block_size
        end_whole = (begin + length) // block_size * block_size
        if begin_whole < end_whole:
            volume.discard(begin_whole, end_whole - begin_whole)
            released += end_whole - begin_whole
    first, head = (
        struct.unpack_from(">I", superblock, 0x14)[0],
        struct.unpack_from(">I", superblock, _HEAD)[0],
    )
    if head > first:
        struct.pack_into(">I", superblock, _HEAD, 0)
        if struct.unpack_from(">I", superblock, 0x28)[0] & _CHECKSUMMED:
            struct.pack_into(">I", superblock, _CHECKSUM, _checksum(superblock))
        volume.write(runs[0][0], superblock)
    return released


def _check(superblock: bytearray, *, block: int, size: int) -> None:
    """Refuse all but an empty journal that is understood."""
    magic, kind = struct.unpack_from(">II", superblock)
    block_size, blocks, _first, _sequence, start, failed = struct.unpack_from(
        ">IIIIII", superblock, 0xC
    )
    (features,) = struct.unpack_from(">I", superblock, 0x28)
    empty = start == 0 and failed == 0
    fits = block_size == block and blocks * block == size
    if (magic, kind) != (_MAGIC, _SUPERBLOCK_V2) or features & ~_KNOWN or not empty or not fits:
        raise UnknownLayoutError
    if features & _CHECKSUMMED:
        (found,) = struct.unpack_from(">I", superblock, _CHECKSUM)
        if superblock[0x50] != _CRC32C or found != _checksum(superblock):
            raise UnknownLayoutError


def _checksum(superblock: bytearray) -> int:
    data = bytearray(superblock)
    struct.pack_into(">I", data, _CHECKSUM, 0)
    return crc32c(data)
