"""HTTP/1.1 over a connected socket, as far as a pool's server and its clients need it.

Bodies have a length, answers may also come in chunks; nothing else of HTTP's framing is read. Each
message is written with one system call, and read with one where it came whole. Both sides import
this, and so does every command, so it imports next to nothing.

A `Stream` is one thread's at a time.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Mapping

HEAD_MAX: Final = 32 << 10
"""Bytes of a message's head."""
_AT_ONCE: Final = 256
_READ_BYTES: Final = 64 << 10
_END_OF_HEAD: Final = b"\r\n\r\n"

_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    411: "Length Required",
    413: "Content Too Large",
    423: "Locked",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    507: "Insufficient Storage",
}


class MalformedError(ConnectionError):
    """The other side speaks no HTTP that we read; the connection is of no more use.

    Attributes:
        status: that a server answers with.
    """

    def __init__(self, message: str, *, status: int = 400) -> None:
        """Say what was read."""
        super().__init__(message)
        self.status: Final = status


class Head:
    """The first line and the fields of a message.

    Attributes:
        first: the request's line, or the status line.
        fields: by their names in lower case; of several of one name, the last.
    """

    __slots__ = ("fields", "first")

    def __init__(self, raw: bytes) -> None:
        """Take it apart.

        Raises:
            MalformedError: a field without a name.
        """
        first, *lines = raw.decode("latin-1").split("\r\n")
        self.first = first
        self.fields: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise MalformedError(f"a field of the head is none: {line[:80]!r}")
            self.fields[name.lower()] = value.strip()

    def length(self, *, largest: int) -> int | None:
        """Bytes of the body; None where the head does not say.

        Raises:
            MalformedError: no number, or more than the largest.
        """
        text = self.fields.get("content-length")
        if text is None:
            return None
        if not text.isascii() or not text.isdigit():
            raise MalformedError(f"the body's length is no number: {text[:80]!r}")
        if len(text) > len(str(largest)) or int(text) > largest:
            raise MalformedError(f"the body has {text[:20]} bytes, {largest} can be", status=413)
        return int(text)

    @property
    def is_chunked(self) -> bool:
        """The body comes in chunks."""
        return self.fields.get("transfer-encoding", "").lower() == "chunked"

    @property
    def is_last(self) -> bool:
        """The sender closes the connection after this message."""
        return self.fields.get("connection", "").lower() == "close"


class Stream:
    """Reads messages from a socket, whose timeout is the socket's owner's to set."""

    def __init__(self, sock: socket.socket) -> None:
        """Nothing is read yet."""
        self.sock: Final = sock
        self._buffer = b""

    @property
    def has_more(self) -> bool:
        """Bytes of a next message were read already."""
        return bool(self._buffer)

    def _more(self) -> None:
        data = self.sock.recv(_READ_BYTES)
        if not data:
            raise ConnectionResetError("the connection ended in the middle of a message")
        self._buffer = self._buffer + data if self._buffer else data

    def head(self) -> Head | None:
        """The next message's head; None when the connection ended before it.

        Raises:
            MalformedError: it is longer than HEAD_MAX, or none.
        """
        if not self._buffer:
            self._buffer = self.sock.recv(_READ_BYTES)
            if not self._buffer:
                return None
        while (end := self._buffer.find(_END_OF_HEAD)) < 0:
            if len(self._buffer) > HEAD_MAX:
                raise MalformedError(f"a head of more than {HEAD_MAX} bytes", status=431)
            self._more()
        raw, self._buffer = self._buffer[:end], self._buffer[end + len(_END_OF_HEAD) :]
        return Head(raw)

    def exactly(self, length: int) -> bytes:
        """So many bytes."""
        have = self._buffer
        if len(have) >= length:
            self._buffer = have[length:]
            return have[:length]
        self._buffer = b""
        whole = bytearray(length)
        whole[: len(have)] = have
        done = len(have)
        with memoryview(whole) as view:
            while done < length:
                got = self.sock.recv_into(view[done:])
                if not got:
                    raise ConnectionResetError("the connection ended in the middle of a message")
                done += got
        return bytes(whole)

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            if len(self._buffer) > HEAD_MAX:
                raise MalformedError(f"a line of more than {HEAD_MAX} bytes")
            self._more()
        line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
        return line

    def chunks(self) -> Iterator[bytes]:
        """The chunks of a body that comes so, to its end."""
        while True:
            line = self._line().partition(b";")[0].strip()
            try:
                length = int(line, 16)
            except ValueError as cause:
                raise MalformedError(f"a chunk's length is no number: {line[:80]!r}") from cause
            if length < 0:
                raise MalformedError(f"a chunk has no {length} bytes")
            if not length:
                while self._line():
                    pass  # what follows the last chunk says nothing to us
                return
            yield self.exactly(length)
            if self._line():
                raise MalformedError("a chunk is longer than it says")

    def lines(self) -> Iterator[bytes]:
        """The lines of a body that comes in chunks, wherever these begin and end."""
        left = b""
        for chunk in self.chunks():
            *whole, left = (left + chunk).split(b"\n")
            yield from whole
        if left:
            yield left


def request(method: str, path: str, body: bytes, fields: Mapping[str, str]) -> bytes:
    """A request, as it is written."""
    lines = [f"{method} {path} HTTP/1.1", "Host: thinpool", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join(lines).encode("latin-1") + _END_OF_HEAD + body


def encoded(document: Any) -> bytes:  # noqa: ANN401 - JSON
    """A document as it is sent.

    A long list some elements at a time: the encoder keeps the interpreter from all other threads.
    """
    found = document.get("result") if isinstance(document, dict) and len(document) == 1 else None
    if not isinstance(found, list) or len(found) <= _AT_ONCE:
        return json.dumps(document).encode()
    parts = [
        json.dumps(found[first : first + _AT_ONCE])[1:-1]
        for first in range(0, len(found), _AT_ONCE)
    ]
    return f'{{"result": [{", ".join(parts)}]}}'.encode()


def response(status: int, document: Any, content_type: str, *, last: bool = False) -> bytes:  # noqa: ANN401 - JSON
    """An answer of one JSON document; the connection's last one closes it."""
    body = encoded(document)
    lines = [
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}",
        f"Content-Type: {content_type}; charset=utf-8",
        f"Content-Length: {len(body)}",
    ]
    if last:
        lines.append("Connection: close")
    return "\r\n".join(lines).encode("latin-1") + _END_OF_HEAD + body


def chunked_response(content_type: str) -> bytes:
    """The head of an answer that comes in chunks and ends the connection."""
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n"
        "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    )
    return head.encode("latin-1")


def chunk(data: bytes) -> bytes:
    """One chunk; of no bytes, the last."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def parse_status(head: Head) -> int:
    """The status of an answer.

    Raises:
        MalformedError: it is none.
    """
    version, _, rest = head.first.partition(" ")
    code = rest[:3]
    if not version.startswith("HTTP/1.") or not (code.isascii() and code.isdigit()):
        raise MalformedError(f"the answer is no HTTP: {head.first[:80]!r}")
    return int(code)
