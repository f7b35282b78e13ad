"""The plugin's process: one a driver and pool, on one unix socket, until it is told to end.

It may be killed at any time: layers stay mounted, their devices are the pool's server's, and the
next start goes on from the pool's catalogue, the mount table and the state file. A clean end
(SIGTERM, SIGINT) answers what is being asked first, and leaves the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiohttp import web

from thinpool import errors
from thinpool.api.session import Session
from thinpool.graphdriver.app import Plugin
from thinpool.graphdriver.layers import Layers
from thinpool.graphdriver.places import Places
from thinpool.graphdriver.state import State
from thinpool.host.rundir import run_directory
from thinpool.names import parse_pool_name, parse_volume_name
from thinpool.server.client import locked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from thinpool.api import Thinpool

logger = logging.getLogger(__name__)

DEFAULT_NAME: Final = "thinpool"
SOCKETS: Final = Path("/run/docker/plugins")
_BACKLOG: Final = 1024
_END_S: Final = 60.0
_PATH_MAX: Final = 107


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What is served.

    Attributes:
        pool: the pool's name.
        name: the driver's, as dockerd's ``--storage-driver`` has it.
        socket: where.
    """

    pool: str
    name: str
    socket: Path


def serving(pool: str, name: str | None, path: Path | None) -> Serving:
    """Check names and fill in defaults.

    Raises:
        UsageError: a name or a path that cannot be.
    """
    parse_pool_name(pool)
    chosen = parse_volume_name(name or DEFAULT_NAME)
    where = path or SOCKETS / f"{chosen}.sock"
    if len(os.fsencode(where)) > _PATH_MAX:
        raise errors.UsageError(f"{where} is too long for a socket", what="socket")
    return Serving(pool=pool, name=chosen, socket=where.absolute())


def serve(api: Thinpool, what: Serving, *, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        api: of the pools.
        what: see ``serving``.
        ready: called when the socket takes requests.

    Raises:
        NotFoundError: there is no such pool.
        NotPermittedError: not root.
        BusyError: another process serves this driver.
    """
    if os.geteuid() != 0:
        raise errors.NotPermittedError(
            "a graph driver mounts layers for dockerd, which root may do", operation="mount"
        )
    session = Session(api.root, timeout=api.timeout)
    pool = api.status(what.pool)
    kept = session.client(what.pool).directory / f"graphdriver-{what.name}"
    kept.mkdir(mode=0o700, exist_ok=True)
    place = Path(run_directory(api.root)) / "graphdriver" / f"{what.name}-{pool.uuid}"
    with locked(kept / "lock", timeout=api.timeout, what=f"driver {what.name}"):
        state = State(kept / "state.db")
        with contextlib.closing(state):
            places = Places(place)
            layers = Layers(api, session, what.pool, driver=what.name, state=state, places=places)
            with contextlib.closing(layers):
                layers.recover()
                with _listening(what.socket) as listener:
                    asyncio.run(_serve(layers, listener, ready))
            places.leave()


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """A socket of mode 0600 at a path; what a killed process left there is replaced."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise errors.AlreadyExistsError(f"{path} is no socket", existing=str(path))
    # Bound under another name and renamed, so that the path never leads to a socket nobody has
    # and is never open to others.
    fresh = path.with_name(f".{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        mask = os.umask(0o177)
        try:
            listener.bind(str(fresh))
        finally:
            os.umask(mask)
        listener.listen(_BACKLOG)
        fresh.replace(path)
        yield listener
    finally:
        listener.close()
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


async def _serve(layers: Layers, listener: socket.socket, ready: Callable[[], None]) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, ended.set)
    runner = web.AppRunner(Plugin(layers).app(), access_log=None, shutdown_timeout=_END_S)
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        _tell_systemd("READY=1")
        ready()
        await ended.wait()
        _tell_systemd("STOPPING=1")
    finally:
        await runner.cleanup()


def _tell_systemd(text: str) -> None:
    """sd_notify(3), where a service manager wants to know."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
    ):
        sock.sendto(text.encode(), address)
