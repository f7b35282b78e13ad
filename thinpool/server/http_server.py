"""Answers HTTP on a listening socket with threads that each do one request from end to end.

All threads wait in one epoll set, for the listening socket and for every connection that is idle;
the kernel wakes one of them for what comes. It reads the request, does it and answers it: nothing
is handed from thread to thread, and an idle connection costs no thread. There are as many threads
as requests were ever done at once, up to a limit. At rest none of them wakes.

A connection belongs to the thread that was woken for it until that arms it again (EPOLLONESHOT).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from thinpool.server import http, protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

_THREADS: Final = 32
_SPARE: Final = 2
"""Threads that wait from the beginning."""
_PATIENCE_S: Final = 30
"""For the rest of a message that has begun."""
_PAUSE_S: Final = 0.1
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(slots=True)
class _Connection:
    stream: http.Stream
    fresh: bool = True
    taken: bool = False

    @property
    def sock(self) -> socket.socket:
        return self.stream.sock


@dataclass(slots=True)
class Request:
    """One request.

    Attributes:
        method, path: of its line.
        fields: of its head, by names in lower case.
        body: all of it.
        connection: that it came on.
        last: the connection closes after the answer.
        answered: so it is, or is being.
    """

    method: str
    path: str
    fields: Mapping[str, str]
    body: bytes
    connection: _Connection
    last: bool
    answered: bool = False

    def answer(self, document: Any, *, status: int = 200, last: bool = False) -> None:  # noqa: ANN401 - JSON
        """Answer it.

        Args:
            document: JSON.
            status: of the answer.
            last: the connection closes after it.

        Raises:
            OSError: the client is gone.
        """
        self.answered = True
        self.last = self.last or last
        self.connection.sock.sendall(
            http.response(status, document, protocol.JSON_TYPE, last=self.last)
        )
        # The client goes first where both are on one processor: what is done behind an answer, a
        # record of what was made, would keep it waiting there.
        os.sched_yield()

    def begin_stream(self) -> socket.socket:
        """Answer it with chunks that the caller writes; the connection closes after them."""
        self.answered = self.last = True
        self.connection.sock.sendall(http.chunked_response(protocol.STREAM_TYPE))
        return self.connection.sock

    def take(self) -> socket.socket:
        """Have the connection for oneself, to answer and to close it in a thread of one's own."""
        self.connection.taken = True
        return self.connection.sock


class HttpServer:
    """Serves a listening socket.

    Args:
        listener: connections wait in it; it stays open.
        handle: answers a request, in any thread; what it raises ends the connection.
        raw: takes a connection that begins with RAW_MAGIC, and closes it; returns at once.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        handle: Callable[[Request], None],
        raw: Callable[[socket.socket], None],
    ) -> None:
        """Nothing is accepted yet."""
        self._listener = listener
        self._handle = handle
        self._raw = raw
        self._epoll = select.epoll()
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._connections: dict[int, _Connection] = {}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._waiting = 0
        self._is_ending = False

    def start(self) -> None:
        """Accept and answer from now on."""
        self._listener.settimeout(0)
        self._epoll.register(self._ended, select.EPOLLIN)
        self._epoll.register(self._listener, select.EPOLLIN | select.EPOLLONESHOT)
        for _ in range(_SPARE):
            self._add_thread()

    def end(self, *, seconds: float) -> None:
        """Take no more; connections that are idle close, and each other after its answer.

        Args:
            seconds: for what is being done. What takes longer is left alone: nobody is answered.
        """
        with self._lock:
            self._is_ending = True
            threads = list(self._threads)
        os.eventfd_write(self._ended, 1)
        deadline = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        if any(thread.is_alive() for thread in threads):
            for connection in list(self._connections.values()):
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            return  # whoever is still at it has the rest
        for connection in list(self._connections.values()):
            self._close(connection)
        self._epoll.close()
        os.close(self._ended)

    # ---- threads ----------------------------------------------------------------------------

    def _add_thread(self) -> None:
        """Let one more wait."""
        with self._lock:
            if self._is_ending or len(self._threads) >= _THREADS:
                return
            number = len(self._threads)
            thread = threading.Thread(target=self._work, name=f"operation-{number}", daemon=True)
            self._threads.append(thread)
            self._waiting += 1
        thread.start()

    def _work(self) -> None:
        while True:
            [(fd, _)] = self._epoll.poll(maxevents=1)
            if fd == self._ended:
                return
            with self._lock:
                self._waiting -= 1
                alone = not self._waiting
            if alone:
                self._add_thread()
            try:
                if fd == self._listener.fileno():
                    self._accept()
                else:
                    self._serve(self._connections[fd])
            finally:
                with self._lock:
                    self._waiting += 1

    # ---- connections ------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            while True:
                sock, _ = self._listener.accept()
                # Blocks, but not for ever in the middle of a message.
                sock.settimeout(None)
                _set_patience(sock, _PATIENCE_S)
                self._connections[sock.fileno()] = _Connection(http.Stream(sock))
                self._epoll.register(sock, select.EPOLLIN | select.EPOLLONESHOT)
        except BlockingIOError:
            pass
        except OSError as error:
            logger.warning("accepting a connection: %s", error)
            time.sleep(_PAUSE_S)
        self._arm(self._listener)

    def _arm(self, sock: socket.socket) -> None:
        self._epoll.modify(sock, select.EPOLLIN | select.EPOLLONESHOT)

    def _serve(self, connection: _Connection) -> None:
        """Do what a connection asks for that has become readable."""
        try:
            goes_on = self._answer_all(connection)
        except http.MalformedError as error:
            goes_on = False
            with contextlib.suppress(OSError):
                document = {"error": {"type": "UsageError", "message": str(error)}}
                connection.sock.sendall(
                    http.response(error.status, document, protocol.JSON_TYPE, last=True)
                )
        except OSError:
            goes_on = False  # the client is gone
        except Exception:
            logger.exception("a request")
            goes_on = False
        if connection.taken:
            return
        if goes_on and not self._is_ending:
            self._arm(connection.sock)
        else:
            self._close(connection)

    def _answer_all(self, connection: _Connection) -> bool:
        """Answer what was sent; whether more can come."""
        if connection.fresh:
            first = _peek(connection.sock)
            if first == protocol.RAW_MAGIC:
                self._let_go(connection)
                self._raw(connection.sock)
                return False
            connection.fresh = False
        while True:
            request = self._read(connection)
            if request is None:
                return False
            self._handle(request)
            if connection.taken:
                self._let_go(connection)
                return False
            if request.last or not request.answered:
                return False
            if not connection.stream.has_more:
                return True

    def _read(self, connection: _Connection) -> Request | None:
        head = connection.stream.head()
        if head is None:
            return None
        words = head.first.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):  # noqa: PLR2004 - of a request's line
            raise http.MalformedError(f"the request's line is none: {head.first[:80]!r}")
        if "transfer-encoding" in head.fields:
            raise http.MalformedError("a request's body has to have a length", status=411)
        length = head.length(largest=protocol.MAX_BODY) or 0
        if length and head.fields.get("expect", "").lower() == "100-continue":
            connection.sock.sendall(_CONTINUE)
        return Request(
            method=words[0],
            path=words[1],
            fields=head.fields,
            body=connection.stream.exactly(length),
            connection=connection,
            last=head.is_last or words[2] == "HTTP/1.0",
        )

    def _let_go(self, connection: _Connection) -> None:
        connection.taken = True
        _set_patience(connection.sock, 0)
        self._epoll.unregister(connection.sock)
        del self._connections[connection.sock.fileno()]

    def _close(self, connection: _Connection) -> None:
        del self._connections[connection.sock.fileno()]
        connection.sock.close()


def _set_patience(sock: socket.socket, seconds: int) -> None:
    """How long a read waits: in the kernel, which costs no system call more. 0: for ever."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))


def _peek(sock: socket.socket) -> bytes:
    """The first four bytes without taking them; fewer when no more will come."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        first = sock.recv(len(protocol.RAW_MAGIC), socket.MSG_PEEK)
        enough = len(first) == len(protocol.RAW_MAGIC) or not protocol.RAW_MAGIC.startswith(first)
        if not first or enough or time.monotonic() > deadline:
            return first
        time.sleep(_PAUSE_S)  # a few bytes, the others are to come
