"""The server's end of a raw channel: one thread for each, which blocks in the C core.

Data lies in a memfd that the client passes and that is sealed against shrinking, so that nothing
the client does to it can hurt the server; the socket carries requests of a fixed size.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import mmap
import os
import socket
from typing import TYPE_CHECKING, Any

from thinpool import errors
from thinpool.server import protocol
from thinpool.server.raw import receive
from thinpool.store.core import Caller

if TYPE_CHECKING:
    from thinpool.engine import VolumeIO
    from thinpool.store.service import PoolService

logger = logging.getLogger(__name__)


def serve_channel(sock: socket.socket, service: PoolService) -> None:
    """Serve one channel until its client ends it. Closes the socket."""
    with sock:
        try:
            arguments, memory = _open(sock)
        except (OSError, ValueError) as error:
            logger.warning("a raw channel began badly: %s", error)
            return
        with contextlib.suppress(OSError), contextlib.closing(memory):
            try:
                with service.raw(
                    str(arguments["name"]),
                    writable=bool(arguments.get("writable")),
                    lease=arguments.get("lease"),
                    caller=Caller(timeout=float(arguments.get("timeout", 30.0))),
                ) as volume:
                    _answer(sock, volume.size, int(volume.id))
                    _serve(sock, volume, memory)
            except errors.ThinpoolError as error:
                _refuse(sock, error)


def _open(sock: socket.socket) -> tuple[dict[str, Any], mmap.mmap]:
    """Read the hello and map the client's memory."""
    sock.settimeout(10.0)
    hello, fds, _, _ = socket.recv_fds(sock, protocol.RAW_HELLO.size, 1)
    try:
        if len(hello) < protocol.RAW_HELLO.size:
            hello += receive(sock, protocol.RAW_HELLO.size - len(hello))
        _, version, length, size = protocol.RAW_HELLO.unpack(hello)
        if version != protocol.VERSION or length > protocol.RAW_JSON_MAX:
            raise ValueError(f"version {version}, {length} bytes")
        if not fds or not 0 < size <= protocol.RAW_CHUNK_MAX:
            raise ValueError(f"{len(fds)} descriptors, {size} bytes of memory")
        arguments = json.loads(receive(sock, length))
        if not fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError("the memory is not sealed against shrinking")
        memory = mmap.mmap(fds[0], size)
    finally:
        for descriptor in fds:
            os.close(descriptor)
    sock.settimeout(None)
    return arguments, memory


def _serve(sock: socket.socket, volume: VolumeIO, memory: mmap.mmap) -> None:
    while True:
        try:
            request = receive(sock, protocol.RAW_REQUEST.size)
        except ConnectionError:
            return
        operation, _, offset, length = protocol.RAW_REQUEST.unpack(request)
        try:
            first, second = _do(volume, memory, operation, offset, length)
        except errors.ThinpoolError as error:
            _refuse(sock, error)
        else:
            _answer(sock, first, second)


def _do(
    volume: VolumeIO, memory: mmap.mmap, operation: int, offset: int, length: int
) -> tuple[int, int]:
    if operation in {protocol.RAW_READ, protocol.RAW_WRITE} and length > len(memory):
        raise errors.UsageError("more bytes than the memory holds", what="length", value=length)
    match operation:
        case protocol.RAW_READ:
            with memoryview(memory) as view, view[:length] as part:
                volume.read_into(offset, part)
        case protocol.RAW_WRITE:
            with memoryview(memory) as view, view[:length] as part:
                volume.write(offset, part)
        case protocol.RAW_ZERO:
            volume.zero(offset, length)
        case protocol.RAW_DISCARD:
            volume.discard(offset, length)
        case protocol.RAW_FLUSH:
            volume.flush()
        case protocol.RAW_NEXT_DATA:
            return volume.next_data(offset) or (volume.size, volume.size)
        case _:
            raise errors.UsageError(
                f"there is no raw operation {operation}", what="operation", value=operation
            )
    return 0, 0


def _answer(sock: socket.socket, first: int, second: int) -> None:
    sock.sendall(protocol.RAW_REPLY.pack(0, 0, first, second))


def _refuse(sock: socket.socket, error: errors.ThinpoolError) -> None:
    document = json.dumps(protocol.error_to_json(error)).encode()
    sock.sendall(protocol.RAW_REPLY.pack(-1, len(document), 0, 0) + document)
