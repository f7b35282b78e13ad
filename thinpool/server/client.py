"""The client of a pool's server: light, so that a command starts fast.

A server that does not run is started. One that is replaced in the middle of a request is waited
for, and the request is asked again under its old name, which the server recognises.

Thread-safe: each call has a connection of its own from a small stack of idle ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Final, Self

from thinpool import errors
from thinpool.host import units
from thinpool.server import protocol
from thinpool.server.control import error_from_wire
from thinpool.server.raw import VolumeHandle
from thinpool.store import poolfile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from thinpool.store.poolfile import PoolConfig

__all__ = ["Lease", "PoolClient", "VolumeHandle"]

_START_S: Final = 60.0
"""A server that takes longer to start does not."""
_STARTED_S: Final = 15.0
"""How long another client may take to start it, whatever the timeout for locks is."""
_RETRY_PAUSE_S: Final = 0.02
_BUSY_PAUSE_S: Final = 0.2
_IO_PATIENCE_S: Final = 600.0
_START_LOCK: Final = "start.lock"

Json = dict[str, Any]


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket whose path may be longer than sun_path."""

    def __init__(self, directory: Path, *, timeout: float | None) -> None:
        super().__init__("thinpool", timeout=timeout)
        self._directory = directory

    def connect(self) -> None:
        """Through the directory's descriptor, which keeps the path short."""
        self.sock = connect(self._directory, timeout=self.timeout)


def connect(directory: Path, *, timeout: float | None) -> socket.socket:
    """A connection to the server of the pool in a directory.

    Raises:
        ConnectionError, FileNotFoundError: there is no server.
    """
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(timeout)
            sock.connect(f"/proc/self/fd/{descriptor}/{poolfile.SOCKET}")
        except BaseException:
            sock.close()
            raise
    finally:
        os.close(descriptor)
    return sock


class _Counted:
    """Passes chunks on, and knows whether any came: such an answer cannot be asked for again."""

    def __init__(self, chunk: Callable[[bytes], None] | None) -> None:
        self.count = 0
        self._chunk = chunk

    def __call__(self, data: bytes) -> None:
        self.count += 1
        if self._chunk is not None:
            self._chunk(data)


class PoolClient:
    """A client of one pool's server.

    Args:
        root: of the pools.
        pool: its name.
        timeout: seconds to wait for locks and for a server that starts.
    """

    def __init__(self, root: Path, pool: str, *, timeout: float) -> None:
        """Nothing is asked yet."""
        self._root = root
        self._pool = pool
        self._timeout = timeout
        self._directory = poolfile.pool_directory(root, pool)
        self.allow_unfinished = False
        """It is this client's user who makes the pool."""
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._idle)

    @property
    def directory(self) -> Path:
        """ROOT/pools/POOL."""
        return self._directory

    def config(self) -> PoolConfig:
        """pool.json.

        Raises:
            NotFoundError: there is no such pool.
        """
        return poolfile.read_config(self._root, self._pool)

    # ---- asking -----------------------------------------------------------------------------

    def call(self, operation: str, arguments: Mapping[str, Any] | None = None) -> Any:  # noqa: ANN401 - JSON
        """Ask for an operation.

        Raises:
            ThinpoolError: the server's answer, as the type that it raised.
            ServerError: no server could be started.
        """
        return self.stream(operation, arguments, progress=None)

    def stream(
        self,
        operation: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        progress: Callable[[Json], None] | None,
        chunk: Callable[[bytes], None] | None = None,
    ) -> Any:  # noqa: ANN401 - JSON
        """Ask for an operation that tells how far it is, or that answers text in chunks."""
        body = json.dumps(dict(arguments or {})).encode()
        headers = {
            "Content-Type": protocol.JSON_TYPE,
            protocol.REQUEST_HEADER: secrets.token_hex(16),
            protocol.TIMEOUT_HEADER: f"{self._timeout:g}",
        }
        deadline: float | None = None
        while True:
            connection = self._take()
            chunks = _Counted(chunk)
            try:
                connection.request("POST", f"{protocol.PREFIX}/{operation}", body, headers)
                return self._answer(connection, progress, chunks)
            except (OSError, http.client.HTTPException) as cause:
                connection.close()
                if isinstance(cause, TimeoutError):
                    raise self._no_answer(operation) from cause
                if deadline is None:
                    deadline = time.monotonic() + max(self._timeout, _START_S)
                if time.monotonic() > deadline or chunks.count:
                    raise errors.ServerError(
                        f"the server of pool {self._pool} broke off: see "
                        f"{self._directory / 'server.log'}",
                        pool=self._pool,
                    ) from cause
                time.sleep(_RETRY_PAUSE_S)

    def _answer(
        self,
        connection: _Connection,
        progress: Callable[[Json], None] | None,
        chunk: Callable[[bytes], None],
    ) -> Any:  # noqa: ANN401 - JSON
        response = connection.getresponse()
        for document in _documents(response):
            if "progress" in document:
                if progress is not None:
                    progress(document["progress"])
            elif "chunk" in document:
                chunk(document["chunk"].encode())
            else:
                self._give(connection, response)
                return _result(document)
        raise http.client.IncompleteRead(b"")

    def _no_answer(self, operation: str) -> errors.ThinpoolError:
        return errors.ServerError(
            f"the server of pool {self._pool} does not answer '{operation}'", pool=self._pool
        )

    def _take(self) -> _Connection:
        with self._lock:
            while self._idle:
                connection = self._idle.pop()
                if _is_quiet(connection):
                    return connection
                connection.close()
        self.ensure_server()
        return _Connection(self._directory, timeout=_IO_PATIENCE_S)

    def _give(self, connection: _Connection, response: http.client.HTTPResponse) -> None:
        if response.read() or response.will_close:
            connection.close()
            return
        with self._lock:
            self._idle.append(connection)

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            _close_all(self._idle)

    # ---- the server -------------------------------------------------------------------------

    def is_running(self) -> bool:
        """Somebody listens."""
        try:
            connect(self._directory, timeout=1.0).close()
        except OSError:
            return False
        return True

    def ensure_server(self) -> None:
        """Start the server if nobody listens.

        Raises:
            NotFoundError: there is no such pool.
            BusyError: another process holds the pool's files, or it is being made.
            ServerError: it does not start.
            ThinpoolError: what keeps the pool from being opened.
        """
        if self.is_running():
            return
        config = self.config()
        with locked(
            self._directory / _START_LOCK, timeout=max(self._timeout, _STARTED_S), what="a start"
        ):
            if self.is_running():
                return
            if config.state != poolfile.READY and not self.allow_unfinished:
                raise errors.BusyError(
                    f"pool {config.name} is being made by another process",
                    holder=None,
                    pool=config.name,
                )
            self._start()

    def _start(self) -> None:
        """Run a supervisor; it goes to the background and says when its worker answers.

        Where systemd has a unit for it, systemd does. Where that fails, what keeps the server from
        starting is said by one that is started here.
        """
        unit = units.server_unit(str(self._root.absolute()), self._pool)
        if unit is not None and units.start(unit, timeout=max(self._timeout, _START_S)):
            return
        command = [sys.executable, "-P", "-m", "thinpool.server.supervisor", "--detach"]
        command += ["--root", str(self._root.absolute()), "--pool", self._pool]
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                started = subprocess.run(
                    command,
                    check=False,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    timeout=max(self._timeout, _START_S),
                )
                document = json.loads(started.stdout)
            except (ValueError, subprocess.TimeoutExpired):
                document = None
            if document is None:
                raise errors.ServerError(
                    f"the server of pool {self._pool} does not start: see "
                    f"{self._directory / 'server.log'}",
                    pool=self._pool,
                )
            if "error" not in document:
                return
            error = error_from_wire(document["error"])
            # The last server lets go of the pool while this one starts; others do not.
            if not isinstance(error, errors.BusyError) or time.monotonic() >= deadline:
                raise error
            time.sleep(_BUSY_PAUSE_S)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """End the server, if one runs, wait until it let go of the pool, and keep others out.

        Raises:
            BusyError: something is active or open; the server goes on.
        """
        with locked(
            self._directory / _START_LOCK, timeout=max(self._timeout, _START_S), what="a start"
        ):
            self._shut_down()
            yield

    def stop_server(self) -> None:
        """End the server, if one runs, and wait until it let go of the pool.

        Raises:
            BusyError: something is active or open; the server goes on.
        """
        with self.stopped():
            pass

    def _shut_down(self) -> None:
        self.close()
        deadline = time.monotonic() + max(self._timeout, _START_S)
        while self.is_running():
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._ask_to_end()
            if time.monotonic() > deadline:
                raise errors.TimeoutError_(
                    f"the server of pool {self._pool} does not end", timeout=self._timeout
                )
            time.sleep(_RETRY_PAUSE_S)

    def _ask_to_end(self) -> None:
        """Once, on a connection of its own; whoever else starts a server is kept out meanwhile."""
        connection = _Connection(self._directory, timeout=self._timeout)
        try:
            connection.request("POST", f"{protocol.PREFIX}/shutdown", b"{}")
            for document in _documents(connection.getresponse()):
                _result(document)
        finally:
            connection.close()

    # ---- what lasts -------------------------------------------------------------------------

    def lease(self) -> Lease:
        """A lease: what is built under it goes with it, unless it is published."""
        return Lease(self, self._directory, self._timeout)

    def open(self, name: str, *, writable: bool, lease: str | None = None) -> VolumeHandle:
        """Open a volume for raw I/O."""
        return VolumeHandle(
            self._raw_channel, name, writable=writable, lease=lease, timeout=self._timeout
        )

    def _raw_channel(self) -> socket.socket:
        deadline = time.monotonic() + max(self._timeout, _START_S)
        while True:
            self.ensure_server()
            try:
                return connect(self._directory, timeout=None)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_PAUSE_S)


class Lease:
    """Keeps what is being built alive, over every replacement of the server, until it is closed."""

    def __init__(self, client: PoolClient, directory: Path, timeout: float) -> None:
        """Open it; it is known to the server on return."""
        self.id: Final = secrets.token_hex(12)
        self._client = client
        self._directory = directory
        self._timeout = timeout
        self._ended = threading.Event()
        self._known = threading.Event()
        self._failed: errors.ThinpoolError | None = None
        self._connection: _Connection | None = None
        self._thread = threading.Thread(target=self._keep, name="thinpool-lease", daemon=True)
        self._thread.start()
        self._known.wait()
        if self._failed is not None:
            raise self._failed

    def _keep(self) -> None:
        while not self._ended.is_set():
            try:
                self._client.ensure_server()
                self._hold()
            except (OSError, http.client.HTTPException):
                time.sleep(_RETRY_PAUSE_S)
            except errors.ThinpoolError as error:
                self._failed = error
                break
        self._known.set()

    def _hold(self) -> None:
        connection = _Connection(self._directory, timeout=_IO_PATIENCE_S)
        self._connection = connection
        try:
            body = json.dumps({"lease": self.id}).encode()
            connection.request(
                "POST", f"{protocol.PREFIX}/lease", body, {"Content-Type": protocol.JSON_TYPE}
            )
            response = connection.getresponse()
            for document in _documents(response):
                if "error" in document:
                    raise protocol.error_from_json(document["error"])
                self._known.set()
        finally:
            connection.close()

    def close(self) -> None:
        """End it: the server removes what was not published."""
        if self._ended.is_set():
            return
        self._ended.set()
        with contextlib.suppress(errors.ServerError):
            self._client.call("close_lease", {"lease": self.id})
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=self._timeout)

    def __enter__(self) -> Self:
        """The lease itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def _close_all(idle: list[_Connection]) -> None:
    while idle:
        idle.pop().close()


def _documents(response: http.client.HTTPResponse) -> Iterator[Json]:
    """The JSON documents of a reply: one, or one a line."""
    kind = response.headers.get_content_type()
    if response.status == protocol.ENDING or kind not in {
        protocol.STREAM_TYPE,
        protocol.JSON_TYPE,
    }:
        raise http.client.HTTPException(f"the server ends, or is none: {response.status}")
    if kind == protocol.JSON_TYPE:
        yield json.loads(response.read())
        return
    while line := response.readline():
        if line.strip():
            yield json.loads(line)


def _result(document: Json) -> Any:  # noqa: ANN401 - JSON
    if "error" in document:
        raise protocol.error_from_json(document["error"])
    return document.get("result")


def _is_quiet(connection: _Connection) -> bool:
    """An idle connection that can be used: nothing has come on it, not even its end."""
    if connection.sock is None:
        return False
    return not select.select([connection.sock], [], [], 0)[0]


@contextlib.contextmanager
def locked(path: Path, *, timeout: float, what: str) -> Iterator[None]:
    """Hold a lock file.

    Raises:
        TimeoutError_: another process held it for so long.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + timeout
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise errors.TimeoutError_(
                        f"another process holds {path} for {what}: waited {timeout:g} s",
                        timeout=timeout,
                        path=str(path),
                    ) from None
                time.sleep(_RETRY_PAUSE_S)
        yield
    finally:
        os.close(descriptor)
