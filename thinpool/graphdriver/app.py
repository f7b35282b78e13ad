"""The plugin's HTTP side: Docker's graph-driver calls over a unix socket.

Calls block (they mount, and ask the pool's server), so they run in threads; calls for one layer one
after the other, for different layers at once. Tars stream both ways through a small buffer: who
reads slowly holds up who writes.

Errors are HTTP 200 with ``{"Err": …}``, as Docker wants them, but for what has no JSON answer: a
request that is no request, and Diff, whose errors need another status (and, once the tar has
begun, an end of the connection without the last chunk).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from thinpool import errors
from thinpool.graphdriver import changes
from thinpool.graphdriver.fields import Fields, parse_document, parse_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from thinpool.graphdriver.layers import Layers

logger = logging.getLogger(__name__)

CONTENT_TYPE: Final = "application/vnd.docker.plugins.v1.2+json"
BODY_MAX: Final = 1 << 20
_CALLS: Final = 32
_STREAMS: Final = 32
_PIECE: Final = 256 << 10
_OK: Final = 200
_BAD: Final = 400
_FORBIDDEN: Final = 403
_UNKNOWN: Final = 404
_FAILED: Final = 500

Answer = dict[str, Any]


class LayerLocks:
    """One lock a layer, kept while somebody has or wants it. Of one event loop."""

    def __init__(self) -> None:
        """None yet."""
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @contextlib.asynccontextmanager
    async def hold(self, layer: str) -> AsyncIterator[None]:
        """Wait for a layer, and hold it."""
        lock, users = self._locks.get(layer, (asyncio.Lock(), 0))
        self._locks[layer] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[layer]
            if users == 1:
                del self._locks[layer]
            else:
                self._locks[layer] = (lock, users - 1)


class BodySource:
    """A request's body, read by a thread. See ``oci.streams.Source``."""

    def __init__(self, request: web.Request, loop: asyncio.AbstractEventLoop) -> None:
        """Nothing is read yet."""
        self._content = request.content
        self._loop = loop

    def read(self, size: int, /) -> bytes:
        """At least one and at most ``size`` bytes; none at the end.

        Raises:
            ArchiveError: the client broke off.
        """
        wanted = self._content.read(min(size, _PIECE))
        try:
            return asyncio.run_coroutine_threadsafe(wanted, self._loop).result()
        except Exception as cause:
            raise errors.ArchiveError(
                "the layer's tar was cut off: the client ended the request", member="layer"
            ) from cause


class Plugin:
    """The calls, over the layers of one pool.

    Args:
        layers: what is called.
    """

    def __init__(self, layers: Layers) -> None:
        """Nothing runs yet."""
        self._layers = layers
        self._locks = LayerLocks()
        self._calls = ThreadPoolExecutor(_CALLS, thread_name_prefix="call")
        self._streams = ThreadPoolExecutor(_STREAMS, thread_name_prefix="stream")

    def app(self) -> web.Application:
        """The application; its clean-up ends the threads."""
        app = web.Application(client_max_size=BODY_MAX, middlewares=[_guard])
        calls: dict[str, Callable[[Fields], Awaitable[Answer]]] = {
            "/Plugin.Activate": self._activate,
            "/GraphDriver.Init": self._init,
            "/GraphDriver.Capabilities": self._capabilities,
            "/GraphDriver.Status": self._status,
            "/GraphDriver.GetMetadata": self._metadata,
            "/GraphDriver.Create": self._create,
            "/GraphDriver.CreateReadWrite": self._create,
            "/GraphDriver.Remove": self._remove,
            "/GraphDriver.Exists": self._exists,
            "/GraphDriver.Cleanup": self._cleanup,
            "/GraphDriver.Changes": self._changes,
            "/GraphDriver.DiffSize": self._diff_size,
        }
        for path, call in calls.items():
            app.router.add_post(path, _json(call))
        app.router.add_post("/GraphDriver.Get", self._counted(self._get, close_first=True))
        app.router.add_post("/GraphDriver.Put", self._counted(self._put, close_first=False))
        app.router.add_post("/GraphDriver.Diff", self._diff)
        app.router.add_post("/GraphDriver.ApplyDiff", self._apply_diff)
        app.on_cleanup.append(self._end)
        return app

    async def _end(self, _: web.Application) -> None:
        await asyncio.to_thread(self._calls.shutdown)
        await asyncio.to_thread(self._streams.shutdown)

    async def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401 - whatever it returns
        """Run a call to its end, also when the client does not wait for it."""
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._calls, function, *arguments))

    async def _locked(self, layer: str, function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401 - as above
        """Run a call for a layer when no other one for it runs."""

        async def work() -> Any:  # noqa: ANN401 - as above
            async with self._locks.hold(layer):
                return await self._run(function, *arguments)

        return await asyncio.shield(asyncio.ensure_future(work()))

    # ---- calls with a JSON answer -----------------------------------------------------------

    async def _activate(self, _: Fields) -> Answer:
        return {"Implements": ["GraphDriver"]}

    async def _init(self, fields: Fields) -> Answer:
        maps = bool(fields.entries("UIDMaps") or fields.entries("GIDMaps"))
        options = fields.texts("Opts")
        await self._run(lambda: self._layers.init(options, maps=maps))
        return {}

    async def _capabilities(self, _: Fields) -> Answer:
        return {"Capabilities": {}}

    async def _status(self, _: Fields) -> Answer:
        return {"Status": await self._run(self._layers.status)}

    async def _metadata(self, fields: Fields) -> Answer:
        return {"Metadata": await self._run(self._layers.metadata, fields.id())}

    async def _create(self, fields: Fields) -> Answer:
        layer, parent, size = fields.id(), fields.optional_id("Parent"), fields.size()
        await self._locked(layer, self._layers.create, layer, parent, size)
        return {}

    async def _remove(self, fields: Fields) -> Answer:
        layer = fields.id()
        await self._locked(layer, self._layers.remove, layer)
        return {}

    async def _get(self, fields: Fields) -> tuple[Answer, int]:
        layer, label = fields.id(), fields.text("MountLabel")
        where, ticket = await self._locked(layer, self._layers.get, layer, label)
        return {"Dir": where}, ticket

    async def _put(self, fields: Fields) -> tuple[Answer, int]:
        layer = fields.id()
        return {}, await self._locked(layer, self._layers.put, layer)

    def _counted(
        self, call: Callable[[Fields], Awaitable[tuple[Answer, int]]], *, close_first: bool
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """A call that changes a count: whether its answer went out is kept.

        Args:
            call: returns the answer and its ticket.
            close_first: close the ticket before the answer goes out, not after. Killed between the
                two, a call whose ticket is closed counts twice when it comes again, and one whose
                ticket is open makes the next of its kind count nothing. A Get closes first and a
                Put last: then a layer is held too long, and never let go under a container.
        """

        async def handle(request: web.Request) -> web.StreamResponse:
            ticket = None

            async def counting(fields: Fields) -> Answer:
                nonlocal ticket
                document, ticket = await call(fields)
                return document

            response = await _json(counting)(request)
            if ticket is None:
                return response
            lost = True
            try:
                if request.transport is not None and not request.transport.is_closing():
                    if close_first:
                        await self._run(lambda: self._layers.answered(ticket, lost=False))
                    await response.prepare(request)
                    await response.write_eof()
                    lost = False
            finally:
                if lost or not close_first:
                    await self._run(lambda: self._layers.answered(ticket, lost=lost))
            return response

        return handle

    async def _exists(self, fields: Fields) -> Answer:
        return {"Exists": await self._run(self._layers.exists, fields.id())}

    async def _cleanup(self, _: Fields) -> Answer:
        await self._run(self._layers.disown)
        for layer in await self._run(self._layers.unheld):  # those with a Get are live-restore's
            await self._locked(layer, self._layers.leave_unheld, layer)
        await self._run(self._layers.tidy)
        return {}

    async def _changes(self, fields: Fields) -> Answer:
        layer, parent = fields.id(), fields.optional_id("Parent")
        return {"Changes": await self._run(changes.changes, self._layers, layer, parent)}

    async def _diff_size(self, fields: Fields) -> Answer:
        layer, parent = fields.id(), fields.optional_id("Parent")
        return {"Size": await self._run(changes.diff_size, self._layers, layer, parent)}

    # ---- tars -------------------------------------------------------------------------------

    async def _apply_diff(self, request: web.Request) -> web.StreamResponse:
        """A layer's tar as the body; id and parent in the query."""
        loop = asyncio.get_running_loop()
        try:
            layer = parse_id(request.query.get("id", ""))
            parent = request.query.get("parent") or None
            if parent is not None:
                parse_id(parent)
            source = BodySource(request, loop)
            async with self._locks.hold(layer):
                size = await asyncio.shield(
                    loop.run_in_executor(self._streams, self._layers.apply, layer, parent, source)
                )
        except (errors.ThinpoolError, OSError) as error:
            # What is left of the body is not read: the connection ends with the answer.
            response = _failure(error, status=_OK)
            response.force_close()
            return response
        return _answer({"Size": size})

    async def _diff(self, request: web.Request) -> web.StreamResponse:
        """A layer's tar as the answer."""
        loop = asyncio.get_running_loop()

        def step(pieces: Iterator[bytes]) -> bytes:
            return next(pieces, b"")

        try:
            fields = parse_document(await request.read())
            layer, parent = fields.id(), fields.optional_id("Parent")
        except errors.ThinpoolError as error:
            return _failure(error, status=_BAD)
        pieces = changes.diff(self._layers, layer, parent)
        try:
            try:
                piece = await loop.run_in_executor(self._streams, step, pieces)
            except (errors.ThinpoolError, OSError) as error:
                missing = isinstance(error, errors.NotFoundError)
                return _failure(error, status=_UNKNOWN if missing else _FAILED)
            response = web.StreamResponse(headers={"Content-Type": "application/x-tar"})
            response.enable_chunked_encoding()
            await response.prepare(request)
            try:
                while piece:
                    await response.write(piece)
                    piece = await loop.run_in_executor(self._streams, step, pieces)
                await response.write_eof()
            except (errors.ThinpoolError, OSError) as error:
                if not isinstance(error, ConnectionError):
                    logger.warning("Diff of %s: %s", layer, changes.error_text(error))
                _break_off(request)
            return response
        finally:
            await asyncio.shield(loop.run_in_executor(self._streams, _close, pieces))


def _close(pieces: Any) -> None:  # noqa: ANN401 - a generator
    pieces.close()


def _break_off(request: web.Request) -> None:
    """End the connection, so that the client knows that the answer is not whole."""
    if request.transport is not None:
        request.transport.abort()


# ---- every request ------------------------------------------------------------------------


def _answer(document: Answer, *, status: int = _OK) -> web.Response:
    """A JSON document that ends in a newline."""
    # Names of files are bytes; what is not UTF-8 in them comes as lone surrogates, escaped.
    body = json.dumps(document).encode() + b"\n"
    return web.Response(body=body, status=status, headers={"Content-Type": CONTENT_TYPE})


def _failure(error: BaseException, *, status: int) -> web.Response:
    return _answer({"Err": changes.error_text(error)}, status=status)


def _json(
    call: Callable[[Fields], Awaitable[Answer]],
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """A call whose fields come as JSON and whose answer is JSON."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            fields = parse_document(await request.read())
        except errors.ThinpoolError as error:
            return _failure(error, status=_BAD)
        try:
            return _answer(await call(fields))
        except (errors.ThinpoolError, OSError) as error:
            logger.info("%s: %s", request.path, changes.error_text(error))
            return _failure(error, status=_OK)

    return handle


@web.middleware
async def _guard(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Only root and the driver's own user are answered; whatever happens is an answer."""
    if not _is_trusted(request):
        return _answer({"Err": "only root may ask"}, status=_FORBIDDEN)
    try:
        return await handler(request)
    except web.HTTPException as error:
        said = f"{request.path[:100]}: {error.reason}"
        if isinstance(error, web.HTTPRequestEntityTooLarge):
            said = f"the request is larger than {BODY_MAX} bytes"
        return _answer({"Err": said}, status=error.status)
    except ConnectionError:  # the request was cut off: nobody is there to read this
        return _answer({"Err": "the request was cut off"}, status=_BAD)
    except errors.ThinpoolError as error:
        return _failure(error, status=_FAILED)
    except Exception as error:
        logger.exception("%s", request.path)
        return _failure(error, status=_FAILED)


def _is_trusted(request: web.Request) -> bool:
    """Whether the peer is root or this user (SO_PEERCRED)."""
    sock = request.get_extra_info("socket")
    if sock is None:
        return False
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return user in (0, os.geteuid())
