"""The control plane of a pool's worker: HTTP and JSON on the socket that its supervisor keeps.

Every operation is done by the thread that reads its request (`thinpool.server.http_server`); raw
channels and leases have threads of their own. The worker ends when nothing has used it for a while
and nothing is active, open or being built.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import select
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from thinpool import errors
from thinpool.host.mountinfo import open_mount
from thinpool.server import http, protocol
from thinpool.server.http_server import HttpServer, Request
from thinpool.server.operations import OPERATIONS, STREAMS, Arguments
from thinpool.server.rawserver import serve_channel
from thinpool.store.core import Caller
from thinpool.store.service import PoolService

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from thinpool.host.mountinfo import NamespaceMount
    from thinpool.server.context import Stop, WorkerContext
    from thinpool.server.control import SupervisorLink

logger = logging.getLogger(__name__)

_TICK_S: Final = 0.1
_SWITCH_S: Final = 0.0005
_CHANNEL_END_S: Final = 5.0
_END_S: Final = 10.0
"""For what is being done when the server is told to stop."""

Json = dict[str, Any]


class LinkFreezer:
    """Freezes through the supervisor, which thaws when this process dies."""

    def __init__(self, link: SupervisorLink) -> None:
        """Nothing is frozen."""
        self._link = link

    @contextlib.contextmanager
    def frozen(self, mounts: Sequence[NamespaceMount]) -> Iterator[Callable[[], bool]]:
        """Freeze the filesystem that has these mounts, reached through one that can be."""
        descriptor = _open_one(mounts)
        with contextlib.ExitStack() as stack:
            try:
                still = stack.enter_context(self._link.frozen(descriptor))
            finally:
                os.close(descriptor)
            yield still


def _open_one(mounts: Sequence[NamespaceMount]) -> int:
    reason: errors.ThinpoolError | OSError | None = None
    for mount in mounts:
        try:
            return open_mount(mount)
        except (OSError, errors.ThinpoolError) as error:
            reason = error
    raise reason or OSError("no mount")


def make_service(context: WorkerContext) -> PoolService:
    """The service of a worker, started."""
    service = PoolService(
        context.root,
        context.config,
        context.opened.pool,
        metadata=context.opened.metadata,
        data=context.opened.data,
        served=context.served if context.server is not None else None,
        devices=context.devices,
        freezer=LinkFreezer(context.link),
    )
    try:
        service.start()
    except BaseException:
        service.close()
        raise
    return service


class App:
    """Serves one pool's operations on a listening socket."""

    def __init__(
        self, service: PoolService, listener: socket.socket, *, linger: float, stopping: Stop
    ) -> None:
        """Nothing is accepted yet."""
        self._service = service
        self._http = HttpServer(listener, handle=self._handle, raw=self._channel)
        self._linger = linger
        self._stopping = stopping
        self._lock = threading.Lock()
        self._in_use = 0
        self._used_at = time.monotonic()
        self._ending = False
        self._resting = False
        self._changed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Wakes the main thread when it rests, or when all is to end."""
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Ends leases."""
        self._channels: dict[socket.socket, threading.Thread] = {}

    # ---- running ----------------------------------------------------------------------------

    def run(self, serving: Callable[[], None]) -> None:
        """Serve until the end of use, or until told to stop.

        Args:
            serving: called when clients are answered.
        """
        self._http.start()
        serving()
        try:
            self._until_unused()
        finally:
            with self._lock:
                self._ending = True
            os.eventfd_write(self._ended, 1)
            self._end_channels()
            self._http.end(seconds=_END_S)

    def _end_channels(self) -> None:
        """Their clients open them again with the next server."""
        channels = dict(self._channels)
        for connection in channels:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)  # what was read is answered
        deadline = time.monotonic() + _CHANNEL_END_S
        for thread in channels.values():
            thread.join(max(deadline - time.monotonic(), 0))

    def _until_unused(self) -> None:
        """Looks once in a linger time; while volumes are active and nothing else, not at all."""
        while not self._ending and not self._stopping.is_set():
            with self._lock:
                in_use, used_at = self._in_use, self._used_at
            unused = time.monotonic() - used_at
            if in_use or unused < self._linger:
                left = self._linger if in_use else self._linger - unused
                self._wait(max(left, _TICK_S))
            elif self._service.busy:
                if self._service.busy_until_asked:
                    self._rest(used_at)
                with self._lock:
                    self._used_at = time.monotonic()
            else:
                with self._lock:
                    # Nothing came in between: from here on requests are sent to the next server.
                    self._ending = not self._in_use and self._used_at == used_at

    def _rest(self, used_at: float) -> None:
        """Wait until the pool was used again."""
        with self._lock:
            self._resting = not self._in_use and self._used_at == used_at
            if not self._resting:
                return
        self._wait(None)

    def _wait(self, seconds: float | None) -> None:
        """Until something changes, or so long."""
        poll = select.poll()
        poll.register(self._stopping, select.POLLIN)
        poll.register(self._changed, select.POLLIN)
        poll.poll(seconds * 1000 if seconds is not None else None)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._changed)

    def _begin_use(self) -> bool:
        """The pool is used from now on; False when this server ends, and nothing may be begun."""
        with self._lock:
            if self._ending:
                return False
            self._in_use += 1
            return True

    def _end_use(self) -> None:
        with self._lock:
            self._in_use -= 1
            self._used_at = time.monotonic()
            woken, self._resting = self._resting, False
        if woken:
            os.eventfd_write(self._changed, 1)

    # ---- what has threads of its own --------------------------------------------------------

    def _in_thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Use the pool in a thread of its own, begun by the caller."""

        def run() -> None:
            try:
                work()
            except Exception:
                logger.exception("%s", name)
            finally:
                self._end_use()

        return threading.Thread(target=run, name=name, daemon=True)

    def _channel(self, connection: socket.socket) -> None:
        """Serve a raw channel until its client or this server ends it."""

        def work() -> None:
            try:
                serve_channel(connection, self._service)
            finally:
                self._channels.pop(connection, None)

        if not self._begin_use():
            connection.close()
            return
        thread = self._in_thread("raw", work)
        self._channels[connection] = thread
        thread.start()

    def _lease(self, request: Request) -> None:
        """Hold a lease for as long as the client reads."""
        lease = str(_body(request.body).get("lease", ""))
        if not lease or not lease.isalnum():
            raise errors.UsageError("a lease's name is letters and digits", what="lease")
        with self._lock:
            self._in_use += 1  # beside the request's own: it ends soon where this server does
        connection = request.take()
        self._in_thread("lease", lambda: self._hold(connection, lease)).start()

    def _hold(self, connection: socket.socket, lease: str) -> None:
        beat = http.chunk(_line({"lease": lease}))
        poll = select.poll()
        poll.register(connection, select.POLLIN | select.POLLRDHUP)
        poll.register(self._ended, select.POLLIN)
        with connection:
            self._service.open_lease(lease)
            try:
                connection.sendall(http.chunked_response(protocol.STREAM_TYPE))
                connection.sendall(beat)
                while not poll.poll(protocol.LEASE_BEAT_S * 1000):
                    connection.sendall(beat)
            except OSError:
                pass  # the client is gone
            finally:
                self._service.suspend_lease(lease)

    # ---- requests ---------------------------------------------------------------------------

    def _handle(self, request: Request) -> None:
        """Answer a request, unless this server ends."""
        if not self._begin_use():
            _send_on(request)
            return
        try:
            self._answer(request)
        finally:
            try:
                self._service.settle()
            except errors.ThinpoolError as error:
                logger.warning("a result is not recorded yet: %s", error.message)
            finally:
                self._end_use()

    def _answer(self, request: Request) -> None:
        try:
            result = self._result(request)
        except errors.ThinpoolError as error:
            document = {"error": protocol.error_to_json(error)}
            request.answer(document, status=protocol.http_status(error))
        except Exception as error:
            logger.exception("%s", request.path)
            request.answer({"error": _bug(error)}, status=500)
        else:
            if result is not _ANSWERED:
                request.answer({"result": result})

    def _result(self, request: Request) -> Any:  # noqa: ANN401 - JSON
        """Do what is asked for; _ANSWERED where that was answered already."""
        prefix, _, name = request.path.rpartition("/")
        if prefix != protocol.PREFIX:
            raise errors.NotFoundError(f"there is no {request.path}", operation=request.path)
        if name == "hello":
            return self._hello()
        if request.method != "POST":
            raise errors.UsageError(f"{name} is asked for with POST", what="method")
        operation = OPERATIONS.get(name)
        if operation is not None:
            return operation(self._service, Arguments(_body(request.body)), _caller(request.fields))
        if name in STREAMS:
            self._stream(request, name)
        elif name == "lease":
            self._lease(request)
        elif name == "shutdown":
            return self._shutdown()
        else:
            raise errors.NotFoundError(f"there is no operation {name}", operation=name)
        return _ANSWERED

    def _hello(self) -> Json:
        config = self._service.config
        return {
            "versions": [protocol.VERSION],
            "pool": config.name,
            "uuid": config.uuid,
            "pid": os.getpid(),
        }

    def _stream(self, request: Request, name: str) -> None:
        """Answer with a document now and then, and the result or the error as the last."""
        arguments, caller = Arguments(_body(request.body)), _caller(request.fields)
        connection = request.begin_stream()
        gone = False

        def tell(document: Json) -> None:
            """Waits for a client that reads slowly; of one that is gone, ends on its own time."""
            nonlocal gone
            if not gone:
                try:
                    connection.sendall(http.chunk(_line(document)))
                except OSError:
                    gone = True

        try:
            last: Json = {"result": STREAMS[name](self._service, arguments, caller, tell)}
        except errors.ThinpoolError as error:
            last = {"error": protocol.error_to_json(error)}
        except Exception as error:
            logger.exception("operation %s", name)
            last = {"error": _bug(error)}
        tell(last)
        if not gone:
            with contextlib.suppress(OSError):
                connection.sendall(http.chunk(b""))

    def _shutdown(self) -> Json:
        if self._service.busy:
            config = self._service.config
            raise errors.BusyError(
                f"pool {config.name} is in use: deactivate what is active, close what is open",
                holder=None,
                pool=config.name,
            )
        with self._lock:
            self._ending = True
        os.eventfd_write(self._changed, 1)
        return {}


_ANSWERED: Final = object()


def serve(context: WorkerContext) -> None:
    """Serve a pool until it is not used any more, or is told to stop."""
    with context.listen:
        service = make_service(context)
        # Whoever copies a hundred thousand names lets requests in between soon.
        sys.setswitchinterval(_SWITCH_S)
        # What is there now stays: collections need not look at it again.
        gc.collect()
        gc.freeze()
        try:
            app = App(service, context.listen, linger=context.linger, stopping=context.stopping)
            app.run(context.link.serving)
        finally:
            service.close()


def _send_on(request: Request) -> None:
    """Nothing was done: the client asks the next server."""
    request.answer({}, status=protocol.ENDING, last=True)


def _body(raw: bytes) -> Json:
    if not raw:
        return {}
    try:
        document = json.loads(str(raw, "utf-8"))
    except ValueError as cause:
        raise errors.UsageError(f"the body is no JSON: {cause}", what="body") from cause
    if not isinstance(document, dict):
        raise errors.UsageError("the body is no JSON object", what="body")
    return document


def _caller(fields: Mapping[str, str]) -> Caller:
    try:
        timeout = float(fields.get(_TIMEOUT_FIELD, "30"))
    except ValueError as cause:
        raise errors.UsageError("the timeout is no number", what="timeout") from cause
    return Caller(request=fields.get(_REQUEST_FIELD), timeout=timeout, settles=True)


_TIMEOUT_FIELD: Final = protocol.TIMEOUT_HEADER.lower()
_REQUEST_FIELD: Final = protocol.REQUEST_HEADER.lower()


def _line(document: Json) -> bytes:
    return json.dumps(document).encode() + b"\n"


def _bug(error: Exception) -> Json:
    return protocol.error_to_json(
        errors.ServerError(f"internal error, please report it: {type(error).__name__}: {error}")
    )
