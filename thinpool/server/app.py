"""The control plane of a pool's worker: HTTP and JSON on the socket that its supervisor keeps.

Connections are accepted here and handed to aiohttp, or to a raw channel when they begin so. Every
operation runs in a thread: the loop itself never blocks. The worker ends when nothing has used it
for a while and nothing is active, open or being built.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from thinpool import errors
from thinpool.host.mountinfo import open_mount
from thinpool.server import protocol
from thinpool.server.operations import OPERATIONS, STREAMS, Arguments
from thinpool.server.rawserver import serve_channel
from thinpool.store.core import Caller
from thinpool.store.service import PoolService

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from thinpool.host.mountinfo import NamespaceMount
    from thinpool.server.context import WorkerContext
    from thinpool.server.control import SupervisorLink

logger = logging.getLogger(__name__)

_TICK_S: Final = 0.1
_THREADS: Final = 32
_END_S: Final = 5.0
_FIRST_BYTES_S: Final = 30.0

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
        self,
        service: PoolService,
        listener: socket.socket,
        *,
        linger: float,
        stopping: asyncio.Event,
    ) -> None:
        """Nothing is accepted yet."""
        self._service = service
        self._listener = listener
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="operation")
        self._channels: dict[socket.socket, threading.Thread] = {}
        self._in_use = 0
        self._used_at = time.monotonic()
        self._stop = stopping
        self._finished = asyncio.Event()
        self._used = asyncio.Event()
        self._linger = linger
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- running ----------------------------------------------------------------------------

    async def run(self, serving: Callable[[], None]) -> None:
        """Serve until the end of use, or until told to stop.

        Args:
            serving: called when clients are answered.
        """
        application = web.Application(
            client_max_size=protocol.MAX_BODY, middlewares=[self._refuse_when_ending]
        )
        application.add_routes(
            [
                web.get(f"{protocol.PREFIX}/hello", self._hello),
                web.post(f"{protocol.PREFIX}/lease", self._lease),
                web.post(f"{protocol.PREFIX}/shutdown", self._shutdown),
                web.post(f"{protocol.PREFIX}/{{operation}}", self._operation),
            ]
        )
        runner = web.AppRunner(
            application, access_log=None, handle_signals=False, keepalive_timeout=3600.0
        )
        await runner.setup()
        self._listener.setblocking(False)  # noqa: FBT003 - the method takes it by position only
        server = runner.server
        if server is None:
            raise errors.ServerError("aiohttp has set nothing up")
        accepting = asyncio.create_task(self._accept(server))
        serving()
        try:
            await self._until_unused()
        finally:
            self._finished.set()
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
            await asyncio.to_thread(self._end_channels)
            for task in list(self._tasks):
                task.cancel()
            await runner.cleanup()
            self._threads.shutdown(wait=True)

    def _end_channels(self) -> None:
        """Their clients open them again with the next server."""
        channels = dict(self._channels)
        for connection in channels:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)  # what was read is answered
        for thread in channels.values():
            thread.join(_END_S)

    async def _until_unused(self) -> None:
        """Looks once in a linger time; while volumes are active and nothing else, not at all."""
        ends: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(event.wait()) for event in (self._stop, self._finished)
        ]
        while not self._ending:
            unused = time.monotonic() - self._used_at
            if self._in_use or unused < self._linger:
                left = self._linger if self._in_use else self._linger - unused
                await asyncio.wait(
                    ends, timeout=max(left, _TICK_S), return_when=asyncio.FIRST_COMPLETED
                )
                continue
            used_at = self._used_at
            self._used.clear()
            if await self._blocking(lambda: self._service.busy):
                if await self._blocking(lambda: self._service.busy_until_asked):
                    await self._until_used(ends)
                self._used_at = time.monotonic()
            elif not self._in_use and self._used_at == used_at:
                # Nothing came in between: from here on requests are sent to the next server.
                self._finished.set()
        for each in ends:
            each.cancel()

    async def _until_used(self, ends: Sequence[asyncio.Future[Any]]) -> None:
        used: asyncio.Future[Any] = asyncio.ensure_future(self._used.wait())
        await asyncio.wait([*ends, used], return_when=asyncio.FIRST_COMPLETED)
        used.cancel()

    @property
    def _ending(self) -> bool:
        return self._stop.is_set() or self._finished.is_set()

    def _blocking(self, function: Callable[[], Any]) -> Awaitable[Any]:
        return asyncio.get_running_loop().run_in_executor(self._threads, function)

    @contextlib.contextmanager
    def _using(self) -> Any:  # noqa: ANN401 - a generator of nothing
        self._in_use += 1
        try:
            yield
        finally:
            self._in_use -= 1
            self._used_at = time.monotonic()
            self._used.set()

    # ---- connections ------------------------------------------------------------------------

    async def _accept(self, server: web.Server) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                logger.warning("accepting a connection: %s", error)
                await asyncio.sleep(_TICK_S)
                continue
            task = asyncio.create_task(self._begin(connection, server))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _begin(self, connection: socket.socket, server: web.Server) -> None:
        """See what a connection is, by its first bytes, and hand it on."""
        loop = asyncio.get_running_loop()
        with self._using():
            try:
                first = await asyncio.wait_for(_peek(connection), _FIRST_BYTES_S)
            except (OSError, TimeoutError):
                first = b""
            if not first or self._ending:
                connection.close()
            elif first == protocol.RAW_MAGIC:
                connection.setblocking(True)  # noqa: FBT003 - as above
                await self._channel(connection)
            else:
                await loop.connect_accepted_socket(server, connection)

    async def _channel(self, connection: socket.socket) -> None:
        """Serve a raw channel in a thread of its own, until its client or this server ends it."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def work() -> None:
            try:
                serve_channel(connection, self._service)
            finally:
                with contextlib.suppress(RuntimeError):  # the loop ended before
                    loop.call_soon_threadsafe(ended.set)

        thread = threading.Thread(target=work, name="raw", daemon=True)
        self._channels[connection] = thread
        thread.start()
        try:
            await ended.wait()
        finally:
            self._channels.pop(connection, None)

    # ---- requests ---------------------------------------------------------------------------

    @web.middleware
    async def _refuse_when_ending(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        if self._ending:
            response = web.Response(status=protocol.ENDING)
            response.force_close()
            return response
        return await handler(request)

    async def _hello(self, _: web.Request) -> web.Response:
        with self._using():
            config = self._service.config
            return web.json_response(
                {
                    "result": {
                        "versions": [protocol.VERSION],
                        "pool": config.name,
                        "uuid": config.uuid,
                        "pid": os.getpid(),
                    }
                }
            )

    async def _operation(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["operation"]
        with self._using():
            try:
                arguments = Arguments(await _body(request))
                caller = _caller(request)
                if name in STREAMS:
                    return await self._stream(request, name, arguments, caller)
                operation = OPERATIONS.get(name)
                if operation is None:
                    raise errors.NotFoundError(  # noqa: TRY301 - one way to answer errors
                        f"there is no operation {name}", operation=name
                    )
                result = await self._blocking(lambda: operation(self._service, arguments, caller))
                return web.json_response({"result": result})
            except errors.ThinpoolError as error:
                return web.json_response(
                    {"error": protocol.error_to_json(error)}, status=protocol.http_status(error)
                )
            except Exception as error:
                logger.exception("operation %s", name)
                return web.json_response({"error": _bug(error)}, status=500)

    async def _stream(
        self, request: web.Request, name: str, arguments: Arguments, caller: Caller
    ) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Json | None] = asyncio.Queue()
        slots = asyncio.Semaphore(16)

        def tell(document: Json) -> None:
            """From the operation's thread; waits for a client that reads slowly."""
            asyncio.run_coroutine_threadsafe(slots.acquire(), loop).result()
            loop.call_soon_threadsafe(queue.put_nowait, document)

        def work() -> None:
            try:
                last: Json = {"result": STREAMS[name](self._service, arguments, caller, tell)}
            except errors.ThinpoolError as error:
                last = {"error": protocol.error_to_json(error)}
            except Exception as error:
                logger.exception("operation %s", name)
                last = {"error": _bug(error)}
            loop.call_soon_threadsafe(queue.put_nowait, last)
            loop.call_soon_threadsafe(queue.put_nowait, None)

        response = _stream_response()
        await response.prepare(request)
        working = loop.run_in_executor(self._threads, work)
        gone = False
        while (document := await queue.get()) is not None:
            slots.release()
            if not gone:
                try:
                    await response.write(_line(document))
                except (OSError, RuntimeError):
                    gone = True  # the operation ends on its own time
        await working
        return response

    async def _lease(self, request: web.Request) -> web.StreamResponse:
        """Hold a lease for as long as the client reads."""
        body = await _body(request)
        lease = str(body.get("lease", ""))
        if not lease or not lease.isalnum():
            error = errors.UsageError("a lease's name is letters and digits", what="lease")
            return web.json_response({"error": protocol.error_to_json(error)}, status=400)
        response = _stream_response()
        with self._using():
            self._service.open_lease(lease)
            try:
                await response.prepare(request)
                while not self._ending and request.transport is not None:
                    await response.write(_line({"lease": lease}))
                    await asyncio.sleep(protocol.LEASE_BEAT_S)
            except (OSError, RuntimeError):
                pass  # the client is gone
            finally:
                self._service.suspend_lease(lease)
        return response

    async def _shutdown(self, _: web.Request) -> web.Response:
        with self._using():
            try:
                if await self._blocking(lambda: self._service.busy):
                    config = self._service.config
                    raise errors.BusyError(  # noqa: TRY301 - one way to answer errors
                        f"pool {config.name} is in use: deactivate what is active, close what "
                        "is open",
                        holder=None,
                        pool=config.name,
                    )
            except errors.ThinpoolError as error:
                return web.json_response(
                    {"error": protocol.error_to_json(error)}, status=protocol.http_status(error)
                )
            except Exception as error:
                if not self._ending:
                    logger.exception("shutdown")
                    return web.json_response({"error": _bug(error)}, status=500)
            self._finished.set()
            return web.json_response({"result": {}})


async def serve(context: WorkerContext) -> None:
    """Serve a pool until it is not used any more, or is told to stop."""
    service = await asyncio.to_thread(make_service, context)
    try:
        app = App(service, context.listen, linger=context.linger, stopping=context.stopping)
        await app.run(context.link.serving)
    finally:
        await asyncio.to_thread(service.close)


async def _peek(connection: socket.socket) -> bytes:
    """The first four bytes without taking them; empty when there are none to come."""
    loop = asyncio.get_running_loop()
    connection.setblocking(False)  # noqa: FBT003 - as above
    while True:
        readable = asyncio.Event()
        loop.add_reader(connection, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(connection)
        try:
            first = connection.recv(len(protocol.RAW_MAGIC), socket.MSG_PEEK)
        except BlockingIOError:
            continue
        if not first or len(first) == len(protocol.RAW_MAGIC):
            return first
        await asyncio.sleep(_TICK_S)  # a few bytes, the others are to come


async def _body(request: web.Request) -> Json:
    raw = await request.read()
    if not raw:
        return {}
    try:
        document = json.loads(raw)
    except ValueError as cause:
        raise errors.UsageError(f"the body is no JSON: {cause}", what="body") from cause
    if not isinstance(document, dict):
        raise errors.UsageError("the body is no JSON object", what="body")
    return document


def _caller(request: web.Request) -> Caller:
    try:
        timeout = float(request.headers.get(protocol.TIMEOUT_HEADER, "30"))
    except ValueError as cause:
        raise errors.UsageError("the timeout is no number", what="timeout") from cause
    return Caller(request=request.headers.get(protocol.REQUEST_HEADER), timeout=timeout)


def _stream_response() -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": protocol.STREAM_TYPE})
    response.enable_chunked_encoding()
    return response


def _line(document: Json) -> bytes:
    return json.dumps(document).encode() + b"\n"


def _bug(error: Exception) -> Json:
    return protocol.error_to_json(
        errors.ServerError(f"internal error, please report it: {type(error).__name__}: {error}")
    )
