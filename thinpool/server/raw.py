"""Raw I/O on a volume: data through a memfd that client and server share, requests on a socket.

One request is in flight on a handle. Reads, writes, zeroes and discards at given offsets can be
repeated, so a handle whose server is replaced opens its volume again and repeats what was open.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, Final, Self

from thinpool import errors
from thinpool.server import protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_REOPEN_S: Final = 60.0
_PAUSE_S: Final = 0.02
_REPEATS: Final = 20


class VolumeHandle:
    """A volume open for raw I/O. Offsets and lengths are bytes, of any alignment. Thread-safe.

    Args:
        channel: makes a connection to the server.
        name: of the volume.
        writable: for writing, too.
        lease: that the volume is built under.
        timeout: seconds to wait for others.
    """

    def __init__(
        self,
        channel: Callable[[], socket.socket],
        name: str,
        *,
        writable: bool,
        lease: str | None,
        timeout: float,
    ) -> None:
        """Open it."""
        self._channel = channel
        self._name = name
        self._hello = json.dumps(
            {"name": name, "writable": writable, "lease": lease, "timeout": timeout}
        ).encode()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._memory_fd, self._memory = _shared_memory()
        self._size = 0
        try:
            self._reopen()
        except BaseException:
            self._release()
            raise

    # ---- the channel ------------------------------------------------------------------------

    def _reopen(self) -> None:
        deadline = time.monotonic() + _REOPEN_S
        while True:
            try:
                self._open()
            except OSError as cause:
                if time.monotonic() > deadline:
                    raise errors.ServerError(
                        f"the server that has {self._name} open broke off", name=self._name
                    ) from cause
                time.sleep(_PAUSE_S)
            else:
                return

    def _open(self) -> None:
        sock = self._channel()
        try:
            hello = protocol.RAW_HELLO.pack(
                protocol.RAW_MAGIC, protocol.VERSION, len(self._hello), protocol.RAW_CHUNK
            )
            socket.send_fds(sock, [hello], [self._memory_fd])
            sock.sendall(self._hello)
            size, _ = _reply(sock)
        except BaseException:
            sock.close()
            raise
        self._socket = sock
        self._size = size

    def _call(self, operation: int, offset: int, length: int) -> tuple[int, int]:
        """One request, repeated over replacements of the server. Call with the lock held."""
        for _ in range(_REPEATS):
            if self._socket is None:
                raise errors.ClosedError(f"the handle on {self._name} was closed")
            try:
                self._socket.sendall(protocol.RAW_REQUEST.pack(operation, 0, offset, length))
                return _reply(self._socket)
            except OSError:
                self._socket.close()
                self._reopen()
        raise errors.ServerError(
            f"the server that has {self._name} open broke off {_REPEATS} times at one request",
            name=self._name,
        )

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._size:
            raise errors.UsageError(
                f"{length} bytes at {offset} lie past the end of {self._name}, "
                f"which has {self._size}",
                what="offset",
                value=offset,
                size=self._size,
            )

    # ---- I/O --------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Of the volume."""
        return self._name

    @property
    def size(self) -> int:
        """Of the volume when it was opened."""
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """Read within the volume; what was never written is zeros."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer."""
        view = memoryview(buffer).cast("B")
        if view.readonly:
            raise BufferError("the buffer to read into is read-only")
        self._check(offset, len(view))
        for begin in range(0, len(view), protocol.RAW_CHUNK):
            part = view[begin : begin + protocol.RAW_CHUNK]
            with self._lock:
                self._call(protocol.RAW_READ, offset + begin, len(part))
                part[:] = self._memory[: len(part)]

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write; survives power loss after the next flush."""
        view = memoryview(data).cast("B")
        self._check(offset, len(view))
        for begin in range(0, len(view), protocol.RAW_CHUNK):
            part = view[begin : begin + protocol.RAW_CHUNK]
            with self._lock:
                self._memory[: len(part)] = part
                self._call(protocol.RAW_WRITE, offset + begin, len(part))

    def zero(self, offset: int, length: int) -> None:
        """Whole blocks are unmapped, partial ends zeroed: all of it reads as zeros afterwards."""
        self._check(offset, length)
        with self._lock:
            self._call(protocol.RAW_ZERO, offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Unmap whole blocks within the range and leave partial ends alone."""
        self._check(offset, length)
        with self._lock:
            self._call(protocol.RAW_DISCARD, offset, length)

    def flush(self) -> None:
        """What was written before survives power loss on return."""
        with self._lock:
            self._call(protocol.RAW_FLUSH, 0, 0)

    def next_data(self, offset: int) -> tuple[int, int] | None:
        """The next mapped stretch (begin, end) at or after offset, None when there is none."""
        if offset >= self._size:
            return None
        with self._lock:
            begin, end = self._call(protocol.RAW_NEXT_DATA, offset, 0)
        return None if begin == end else (begin, min(end, self._size))

    # ---- closing ----------------------------------------------------------------------------

    def _release(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._memory_fd >= 0:
            self._memory.close()
            os.close(self._memory_fd)
            self._memory_fd = -1

    def close(self) -> None:
        """Let go, when the server has. Twice is fine. What was not flushed may still be lost."""
        with self._lock:
            if self._socket is not None:
                try:
                    self._socket.shutdown(socket.SHUT_WR)
                    self._socket.settimeout(_REOPEN_S)
                    self._socket.recv(1)  # the end: the volume is not open there any more
                except OSError:
                    pass
            self._release()

    def __enter__(self) -> Self:
        """The handle itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """Warn of a handle that nobody closed."""
        if getattr(self, "_memory_fd", -1) >= 0:
            warnings.warn(
                f"the handle on {self._name} was never closed",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
            self._release()


def _shared_memory() -> tuple[int, mmap.mmap]:
    descriptor = os.memfd_create("thinpool-raw", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, protocol.RAW_CHUNK)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return descriptor, mmap.mmap(descriptor, protocol.RAW_CHUNK)


def receive(sock: socket.socket, length: int) -> bytes:
    """Exactly so many bytes.

    Raises:
        ConnectionError: the connection ended before.
    """
    parts = []
    while length:
        part = sock.recv(length)
        if not part:
            raise ConnectionResetError("the connection ended")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _reply(sock: socket.socket) -> tuple[int, int]:
    status, length, first, second = protocol.RAW_REPLY.unpack(
        receive(sock, protocol.RAW_REPLY.size)
    )
    document: Any = json.loads(receive(sock, length)) if length else None
    if status:
        raise protocol.error_from_json(document)
    return first, second
