"""Disks for a machine that lose power: what was not flushed may be lost, reordered or torn.

A server of the NBD protocol, which QEMU speaks, with one export a disk. Every write is served from
a live file at once, and kept in one log that orders the requests of all disks, flushes included.
An image at any point of that log is what disks with volatile write caches may hold when the power
goes there: all that came before each disk's last completed flush, and of what came after any
subset, one of them perhaps in part; of two writes to one place, no disk lets the earlier win. So
one run of a machine, killed or not, gives as many power cuts as there are requests.

Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md (fixed newstyle,
simple replies, without structured replies).
"""

from __future__ import annotations

import contextlib
import enum
import os
import shutil
import socket
import struct
import subprocess
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from tests.system.conftest import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

SECTOR = 512
MAGIC = b"NBDMAGICIHAVEOPT"
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPTION_ABORT, OPTION_INFO, OPTION_GO = 2, 6, 7
REPLY_ACK, REPLY_INFO, REPLY_UNSUPPORTED, REPLY_UNKNOWN = 1, 3, 0x80000001, 0x80000006
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
HAS_FLAGS, CAN_FLUSH, CAN_FUA, CAN_TRIM, CAN_ZERO = 1, 4, 8, 32, 64
READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, ZERO = range(7)
FLAG_FUA = 1
EINVAL = 22
REQUEST_MOST = 32 << 20


class Kind(enum.Enum):
    """What a log entry does to its disk."""

    WRITE = "write"
    ZERO = "zero"
    FLUSH = "flush"


@dataclass(frozen=True, slots=True)
class Entry:
    """One request that changed a disk, or a flush of it; ``forced`` is durable by itself."""

    disk: str
    kind: Kind
    offset: int = 0
    length: int = 0
    data: bytes = b""
    forced: bool = False


class PowerCutDisks:
    """Named disks on one socket. A context manager; QEMU may come and go any number of times.

    Args:
        folder: for the socket and the live files.
        sources: each disk's first content; the files are copied, sparse.
    """

    def __init__(self, folder: Path, sources: Mapping[str, Path]) -> None:
        self.socket = folder / "nbd"
        self._folder = folder
        self._lock = threading.Lock()
        self._log: list[Entry] = []
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._descriptors: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        for name, source in sources.items():
            self._begin(name, source)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.socket))
        self._listener.listen(16)
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _begin(self, name: str, source: Path) -> None:
        for kind in ("base", "live"):
            copy_sparse(source, self._folder / f"{name}.{kind}")
        if name in self._descriptors:
            os.close(self._descriptors[name])
        self._descriptors[name] = os.open(self._folder / f"{name}.live", os.O_RDWR | os.O_CLOEXEC)
        self._sizes[name] = os.fstat(self._descriptors[name]).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()
        self.disconnect()
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def address(self, name: str) -> str:
        """What QEMU is given as this disk's file."""
        return f"nbd:unix:{self.socket}:exportname={name}"

    # ---- the log ------------------------------------------------------------------------------

    def position(self) -> int:
        """How many entries the log has: a point at which the power may go."""
        with self._lock:
            return len(self._log)

    def log(self) -> list[Entry]:
        """A copy of it."""
        with self._lock:
            return list(self._log)

    def disconnect(self) -> None:
        """End what is connected, and wait until nothing more can be written."""
        with self._lock:
            connections, threads = list(self._connections), list(self._threads)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        self._threads = [thread for thread in self._threads if thread.is_alive()]

    def image(self, position: int, target: Path, random_: random.Random | None) -> dict[str, Path]:
        """Make the disks of a power cut at a point of the log.

        Args:
            position: entries before it.
            target: a folder for the images, named as the disks.
            random_: chooses what of the unflushed is lost or torn; None keeps all of it.
        """
        target.mkdir(exist_ok=True)
        entries = self.log()[:position]
        found = {}
        for name in self._descriptors:
            found[name] = target / name
            copy_sparse(self._folder / f"{name}.base", found[name])
            mine = [entry for entry in entries if entry.disk == name]
            with found[name].open("r+b") as file:
                for entry, length in survivors(mine, random_):
                    apply(file.fileno(), entry, length)
        return found

    def restart_from(self, images: Mapping[str, Path]) -> None:
        """Go on with these images, and an empty log. Nothing may be connected."""
        self.disconnect()
        with self._lock:
            self._log.clear()
            for name, path in images.items():
                self._begin(name, path)

    # ---- the protocol -------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._attend, args=(connection,), daemon=True)
            with self._lock:
                self._connections.add(connection)
                self._threads.append(thread)
            thread.start()

    def _attend(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError, EOFError):
                name = self._negotiate(connection)
                if name is not None:
                    self._serve(connection, name)
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _negotiate(self, connection: socket.socket) -> str | None:
        """The export that the client chose; None when it went."""
        connection.sendall(MAGIC + struct.pack(">H", FIXED_NEWSTYLE | NO_ZEROES))
        receive(connection, 4)
        while True:
            magic, option, length = struct.unpack(">QII", receive(connection, 16))
            if magic != OPTION_MAGIC or length > 65536:
                return None
            data = receive(connection, length)

            def reply(kind: int, payload: bytes = b"", option: int = option) -> None:
                head = struct.pack(">QIII", OPTION_REPLY_MAGIC, option, kind, len(payload))
                connection.sendall(head + payload)

            if option == OPTION_ABORT:
                reply(REPLY_ACK)
                return None
            if option not in (OPTION_GO, OPTION_INFO):
                reply(REPLY_UNSUPPORTED)
                continue
            (size,) = struct.unpack_from(">I", data)
            name = data[4 : 4 + size].decode()
            if name not in self._sizes:
                reply(REPLY_UNKNOWN)
                continue
            flags = HAS_FLAGS | CAN_FLUSH | CAN_FUA | CAN_TRIM | CAN_ZERO
            reply(REPLY_INFO, struct.pack(">HQH", INFO_EXPORT, self._sizes[name], flags))
            reply(REPLY_INFO, struct.pack(">HIII", INFO_BLOCK_SIZE, 1, 4096, REQUEST_MOST))
            reply(REPLY_ACK)
            if option == OPTION_GO:
                return name

    def _serve(self, connection: socket.socket, name: str) -> None:
        while True:
            head = struct.unpack(">IHHQQI", receive(connection, 28))
            magic, flags, kind, cookie, offset, length = head
            if magic != REQUEST_MAGIC or kind == DISCONNECT:
                return
            data = receive(connection, length) if kind == WRITE else b""
            error, answer = 0, b""
            if kind != FLUSH and offset + length > self._sizes[name]:
                error = EINVAL
            elif kind == READ:
                answer = os.pread(self._descriptors[name], length, offset)
            elif kind == WRITE:
                self._take(Entry(name, Kind.WRITE, offset, length, data, bool(flags & FLAG_FUA)))
            elif kind in (TRIM, ZERO):
                self._take(Entry(name, Kind.ZERO, offset, length, b"", bool(flags & FLAG_FUA)))
            elif kind == FLUSH:
                self._take(Entry(name, Kind.FLUSH))
            else:
                error = EINVAL
            connection.sendall(struct.pack(">IIQ", REPLY_MAGIC, error, cookie) + answer)

    def _take(self, entry: Entry) -> None:
        with self._lock:
            self._log.append(entry)
            apply(self._descriptors[entry.disk], entry, entry.length)


def receive(connection: socket.socket, length: int) -> bytes:
    """Exactly so many bytes.

    Raises:
        EOFError: it was closed.
    """
    found = bytearray()
    while len(found) < length:
        part = connection.recv(min(length - len(found), 1 << 20))
        if not part:
            raise EOFError
        found += part
    return bytes(found)


def apply(descriptor: int, entry: Entry, length: int) -> None:
    """Do to a file what an entry did, or the first part of it."""
    if entry.kind is Kind.WRITE:
        os.pwrite(descriptor, entry.data[:length], entry.offset)
    elif entry.kind is Kind.ZERO and length:
        fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, entry.offset, length)


def survivors(
    entries: Sequence[Entry], random_: random.Random | None
) -> Iterator[tuple[Entry, int]]:
    """What of a disk's log is on it after a power cut at its end: entries, and how much of each."""
    flushed = max((i for i, entry in enumerate(entries) if entry.kind is Kind.FLUSH), default=-1)
    changes = [entry for entry in entries[: flushed + 1] if entry.kind is not Kind.FLUSH]
    yield from ((entry, entry.length) for entry in changes)
    loose = list(entries[flushed + 1 :])
    if random_ is None:
        yield from ((entry, entry.length) for entry in loose)
        return
    chance = random_.choice((0.0, 0.2, 0.5, 0.8, 1.0))
    kept = [entry for entry in loose if entry.forced or random_.random() < chance]
    torn = random_.randrange(len(kept)) if kept and random_.random() < 0.5 else None
    for number, entry in enumerate(kept):
        if number == torn and not entry.forced:
            yield entry, random_.randrange(entry.length // SECTOR + 1) * SECTOR
        else:
            yield entry, entry.length


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file with its holes."""
    cp = shutil.which("cp")
    assert cp is not None
    subprocess.run([cp, "--sparse=always", "--reflink=auto", source, target], check=True)
