"""What supervisor and worker say to each other.

A sequenced-packet socket carries one JSON object a message, some with a descriptor. It also tells
each that the other is gone: nothing but these two processes has its ends.

Worker to supervisor: ``answering`` (the data plane runs), ``serving`` (clients are answered too),
``failed`` with ``error``, ``freeze`` with ``id`` and a descriptor, ``thaw`` with ``id``.
Supervisor to worker: ``frozen`` with ``id`` and ``errno`` (0 for success), ``thawed`` with ``id``
and ``expired``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

from thinpool.errors import ServerError, TimeoutError_, by_kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from thinpool.errors import ThinpoolError

FREEZE_SECONDS: Final = 5.0
"""How long a filesystem stays frozen at most."""

_MESSAGE_BYTES: Final = 1 << 16

DEFAULT_PROGRAM: Final = "thinpool.server.app:serve"
"""What a worker runs for its clients, ``module:function``."""

# What a worker's exit code tells its supervisor; any other means that it died.
EXIT_DONE: Final = 0
EXIT_REPLACE: Final = 75
EXIT_DISCONNECTED: Final = 76


def error_to_wire(error: ThinpoolError) -> dict[str, Any]:
    """An error as JSON."""
    return {"kind": error.kind, "message": error.message, "attributes": error.attributes}


def error_from_wire(found: dict[str, Any]) -> ThinpoolError:
    """The error again."""
    cls = by_kind().get(str(found["kind"]), ServerError)
    return cls(str(found["message"]), **found["attributes"])


def send(end: socket.socket, message: dict[str, Any], *fds: int) -> bool:
    """Send one message; False when the other side is gone."""
    data = json.dumps(message, default=str).encode()
    try:
        socket.send_fds(end, [data], list(fds), socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def receive(end: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next message and its descriptors; None when the other side is gone."""
    try:
        data, fds, _, _ = socket.recv_fds(end, _MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return None
    if not data:
        return None
    message: dict[str, Any] = json.loads(data)
    return message, fds


class SupervisorLink:
    """The worker's end. Thread-safe.

    Args:
        end: the socket.
        on_loss: called in a thread of its own when the supervisor is gone, after everything that
            was frozen through this link was thawed.
    """

    def __init__(self, end: socket.socket, on_loss: Callable[[], None]) -> None:
        """Start listening."""
        self._end = end
        self._on_loss = on_loss
        self._changed = threading.Condition()
        self._answers: dict[int, int] = {}
        self._frozen: dict[int, int] = {}
        self._expired: set[int] = set()
        self._next = 1
        self._lost = False
        threading.Thread(target=self._listen, name="supervisor", daemon=True).start()

    def answering(self) -> None:
        """Say that the data plane runs: volumes that are served are answered."""
        send(self._end, {"op": "answering"})

    def serving(self) -> None:
        """Say that clients are answered from now on."""
        send(self._end, {"op": "serving"})

    def failed(self, error: ThinpoolError) -> None:
        """Say why this worker ends."""
        send(self._end, {"op": "failed", "error": error_to_wire(error)})

    @contextlib.contextmanager
    def frozen(self, directory_fd: int) -> Iterator[Callable[[], bool]]:
        """Freeze the filesystem of an open directory for the time of a ``with`` statement.

        The supervisor freezes it, and thaws it after FREEZE_SECONDS or when this process dies.

        Args:
            directory_fd: on that filesystem; may be closed when this returns.

        Yields:
            A function that says whether it has been frozen all the time so far.

        Raises:
            OSError: the kernel's refusal (EOPNOTSUPP, EBUSY where it is frozen already, EPERM).
            TimeoutError_: it could not be frozen in time; it is thawed as soon as it is.
        """
        with self._changed:
            number = self._next
            self._next += 1
            self._frozen[number] = os.dup(directory_fd)
        try:
            self._freeze(number, directory_fd)
            yield lambda: number not in self._expired and not self._lost
        finally:
            send(self._end, {"op": "thaw", "id": number})
            with self._changed:
                os.close(self._frozen.pop(number))
                self._expired.discard(number)
                self._answers.pop(number, None)

    def _freeze(self, number: int, directory_fd: int) -> None:
        if not send(self._end, {"op": "freeze", "id": number}, directory_fd):
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
        with self._changed:
            self._changed.wait_for(
                lambda: number in self._answers or self._lost, timeout=FREEZE_SECONDS
            )
            if number not in self._answers:
                raise TimeoutError_(
                    f"a filesystem could not be frozen within {FREEZE_SECONDS:.0f} s",
                    timeout=FREEZE_SECONDS,
                )
            code = self._answers[number]
        if code:
            raise OSError(code, os.strerror(code))

    def _listen(self) -> None:
        while (received := receive(self._end)) is not None:
            message, _ = received
            with self._changed:
                if message["op"] == "frozen":
                    self._answers[message["id"]] = message["errno"]
                elif message["op"] == "thawed" and message["expired"]:
                    self._expired.add(message["id"])
                self._changed.notify_all()
        with self._changed:
            self._lost = True
            left = [os.dup(fd) for fd in self._frozen.values()]
            self._changed.notify_all()
        for fd in left:
            thaw(fd)
        self._on_loss()


_FIFREEZE: Final = 0xC0045877
_FITHAW: Final = 0xC0045878


def freeze(fd: int) -> None:
    """FIFREEZE; OSError. Waits for writeback, so it may take long."""
    fcntl.ioctl(fd, _FIFREEZE, 0)


def thaw(fd: int) -> None:
    """FITHAW; fine where nothing is frozen. Closes the descriptor."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _FITHAW, 0)
    os.close(fd)
