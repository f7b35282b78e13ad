"""The log of intents: a file of fixed size beside the catalogue; one write makes one durable.

In SQLite the same costs a transaction of several pages. Here it is a single write of a few sectors
into space that was allocated and written before: no metadata of the host's filesystem changes with
it, and on a full disk it still succeeds. Writing and flushing are two calls, so that a flush can
run beside what must not become durable before it.

A record is never changed. It stands at a multiple of 4 KiB: its header, JSON, zeros. Records follow
each other; where the next does not fit, writing begins again at the start, which its user allows
only when nothing that is overwritten is needed any more. Each has a sequence number, and the token
of the catalogue that it belongs to: what another catalogue left here is passed over, and so is a
record that was cut short by a crash, whose checksum is wrong.

Not thread-safe.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from thinpool.host.failures import failure

if TYPE_CHECKING:
    from pathlib import Path

SUFFIX: Final = "-intents"
_BLOCK: Final = 4096
_BLOCKS: Final = 128
SIZE: Final = _BLOCKS * _BLOCK
"""Bytes of the file."""
RECORD_MAX: Final = 16 * _BLOCK
"""A longer record, with its header, is not taken."""
TOKEN_BYTES: Final = 16
_MAGIC: Final = b"tpIL"
_HEADER: Final = struct.Struct("<4sI16sQdI")
"""Magic, CRC-32 of what follows it to the end of the JSON, token, sequence number, seconds since
the epoch, bytes of JSON."""
_CHECKED: Final = 8
"""Where the checksum begins to count."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A record.

    Attributes:
        sequence: its number; later ones are greater.
        made: seconds since the epoch.
        payload: JSON.
    """

    sequence: int
    made: float
    payload: bytes


class IntentLog:
    """The log of one catalogue, open for writing.

    Args:
        path: of the file; made when it is not there.
        token: of the catalogue, TOKEN_BYTES.
    """

    def __init__(self, path: Path, token: bytes) -> None:
        """Open it, and read what it holds.

        Raises:
            HostSpaceError: it is not there, and the disk has no space for it.
            StorageIOError, NotPermittedError: the host's errors.
        """
        self.path: Final = path
        self._token = token
        try:
            self._fd = _open(path)
        except OSError as cause:
            raise failure(
                cause, f"the log of intents {path} cannot be opened", path=str(path)
            ) from cause
        try:
            entries = sorted(self._read(), key=lambda each: each[1].sequence)
        except OSError as cause:
            self.close()
            raise failure(
                cause, f"the log of intents {path} cannot be read", path=str(path)
            ) from cause
        self.entries = [entry for _, entry in entries]
        """What it held when it was opened, in the order in which it was written."""
        self._next = entries[-1][0] + _blocks_of(entries[-1][1].payload) if entries else 0

    def _read(self) -> list[tuple[int, Entry]]:
        with mmap.mmap(self._fd, SIZE, prot=mmap.PROT_READ) as view:
            data = bytes(view)
        found = []
        for number in range(_BLOCKS):
            entry = _parse(data[number * _BLOCK : number * _BLOCK + RECORD_MAX], self._token)
            if entry is not None:
                found.append((number, entry))
        return found

    def forget(self) -> None:
        """Keep nothing of what it held in memory."""
        self.entries = []

    @staticmethod
    def takes(payload: bytes) -> bool:
        """Whether a record can be so long."""
        return _HEADER.size + len(payload) <= RECORD_MAX

    def has_room(self, payload: bytes) -> bool:
        """Whether the next record follows the last; else it goes over the first ones."""
        return self._next + _blocks_of(payload) <= _BLOCKS

    def append(self, entry: Entry) -> None:
        """Write a record. Survives this process on return, and a power cut after a flush.

        Raises:
            HostSpaceError, StorageIOError: the host's; it may stand there nevertheless.
        """
        if not self.has_room(entry.payload):
            self._next = 0
        blocks = _blocks_of(entry.payload)
        checked = _HEADER.pack(
            _MAGIC, 0, self._token, entry.sequence, entry.made, len(entry.payload)
        )[_CHECKED:]
        crc = zlib.crc32(entry.payload, zlib.crc32(checked))
        record = _MAGIC + struct.pack("<I", crc) + checked + entry.payload
        try:
            # Whole blocks: none has to be read for it.
            padded = record.ljust(blocks * _BLOCK, b"\0")
            written = os.pwrite(self._fd, padded, self._next * _BLOCK)
            if written != blocks * _BLOCK:
                raise OSError(errno.EIO, f"{written} of {blocks * _BLOCK} bytes were written")  # noqa: TRY301 - one way out
        except OSError as cause:
            raise failure(
                cause, f"the log of intents {self.path} cannot be written", path=str(self.path)
            ) from cause
        self._next += blocks

    def fileno(self) -> int:
        """For whoever makes durable what was written.

        Where that fails, what was written last may be lost, and the log is to be used no more.
        """
        return self._fd

    def close(self) -> None:
        """Let go."""
        os.close(self._fd)


def _blocks_of(payload: bytes) -> int:
    return -(-(_HEADER.size + len(payload)) // _BLOCK)


def _parse(data: bytes, token: bytes) -> Entry | None:
    """The record at the beginning of some bytes; None where there is none, or none of ours."""
    if len(data) < _HEADER.size:
        return None
    magic, crc, owner, sequence, made, length = _HEADER.unpack_from(data)
    end = _HEADER.size + length
    if magic != _MAGIC or owner != token or end > len(data):
        return None
    if zlib.crc32(data[_CHECKED:end]) != crc:
        return None
    return Entry(sequence, made, data[_HEADER.size : end])


def _open(path: Path) -> int:
    """A descriptor, of a file that is made if need be."""
    if not path.exists():
        _make(path)
    elif path.stat().st_size < SIZE:
        _fill(path)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def _make(path: Path) -> None:
    """Make it whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb"):
            pass
        _fill(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _fill(path: Path) -> None:
    """Write every block behind its end, so that none is written for the first time later."""
    with path.open("ab") as file:
        file.write(bytes(SIZE - path.stat().st_size))
        file.flush()
        os.fsync(file.fileno())
