"""The client of a pool's server: light, so that a command starts fast.

A server that does not run is started. One that is replaced in the middle of a request is waited
for, and the request is asked again under its old name, which the server recognises.

Thread-safe: each call has a connection of its own from a small stack of idle ones.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from thinpool.server import http, protocol
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


class _Connection:
    """A connection to a server."""

    def __init__(self, directory: Path, *, timeout: float | None) -> None:
        """It is made when it is first needed."""
        self._directory = directory
        self._timeout = timeout
        self._stream: http.Stream | None = None
        self._poll = select.poll()
        self.is_reusable = False
        """The last answer was read to its end, and another may follow."""

    def connect(self) -> http.Stream:
        """Connect, unless that was done.

        Raises:
            OSError: there is no server.
        """
        if self._stream is None:
            self._stream = http.Stream(connect(self._directory, timeout=self._timeout))
            self._poll.register(self._stream.sock, select.POLLIN)
        return self._stream

    def documents(
        self, operation: str, body: bytes, fields: Mapping[str, str] | None = None
    ) -> Iterator[Json]:
        """Ask, and the JSON documents of the answer: one, or one a line.

        Raises:
            OSError: the connection broke off, or the server ends.
        """
        self.is_reusable = False
        stream = self.connect()
        given = {"Content-Type": protocol.JSON_TYPE, **(fields or {})}
        stream.sock.sendall(http.request("POST", f"{protocol.PREFIX}/{operation}", body, given))
        head = stream.head()
        if head is None:
            raise ConnectionResetError("the server closed the connection")
        status = http.parse_status(head)
        kind = head.fields.get("content-type", "").partition(";")[0].strip()
        if status == protocol.ENDING or kind not in {protocol.STREAM_TYPE, protocol.JSON_TYPE}:
            raise ConnectionResetError(f"the server ends, or is none: {status}")
        if kind == protocol.JSON_TYPE:
            length = head.length(largest=sys.maxsize)
            if length is None:
                raise http.MalformedError("an answer without a length")
            document = json.loads(str(stream.exactly(length), "utf-8"))
            self.is_reusable = not head.is_last
            yield document
            return
        for line in stream.lines():
            if line.strip():
                yield json.loads(line)

    @property
    def is_quiet(self) -> bool:
        """It can be used again: nothing has come on it, not even its end."""
        if self._stream is None or self._stream.has_more:
            return False
        return not self._poll.poll(0)

    def end(self) -> None:
        """Let whoever reads from it see its end."""
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go."""
        if self._stream is not None:
            self._stream.sock.close()


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
        self._config_path = str(self._directory / poolfile.FILE)
        self._whole: tuple[int, ...] | None = None
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

    def is_whole(self) -> bool:
        """Whether the pool's creation has come to its end.

        It stays so: a pool.json that was seen to say it is not read again, only looked at. One of
        another pool of the same name is another file.

        Raises:
            NotFoundError: there is no such pool.
        """
        try:
            found = os.stat(self._config_path)  # noqa: PTH116 - every call comes by, as a string
        except OSError:
            seen = None
        else:
            seen = (found.st_ino, found.st_ctime_ns, found.st_size)
            if seen == self._whole:
                return True
        is_whole = self.config().state == poolfile.READY
        self._whole = seen if is_whole else None
        return is_whole

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
        fields = {
            protocol.REQUEST_HEADER: os.urandom(16).hex(),
            protocol.TIMEOUT_HEADER: f"{self._timeout:g}",
        }
        deadline: float | None = None
        while True:
            connection = self._take()
            chunks = _Counted(chunk)
            try:
                documents = connection.documents(operation, body, fields)
                return self._answer(documents, progress, chunks)
            except OSError as cause:
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
            finally:
                self._give(connection)
            time.sleep(_RETRY_PAUSE_S)

    def _answer(
        self,
        documents: Iterator[Json],
        progress: Callable[[Json], None] | None,
        chunk: Callable[[bytes], None],
    ) -> Any:  # noqa: ANN401 - JSON
        for document in documents:
            if "progress" in document:
                if progress is not None:
                    progress(document["progress"])
            elif "chunk" in document:
                chunk(document["chunk"].encode())
            else:
                return _result(document)
        raise ConnectionResetError("an answer without its end")

    def _no_answer(self, operation: str) -> errors.ThinpoolError:
        return errors.ServerError(
            f"the server of pool {self._pool} does not answer '{operation}'", pool=self._pool
        )

    def _take(self) -> _Connection:
        with self._lock:
            while self._idle:
                connection = self._idle.pop()
                if connection.is_quiet:
                    return connection
                connection.close()
        connection = _Connection(self._directory, timeout=_IO_PATIENCE_S)
        try:
            connection.connect()
        except OSError:
            self.ensure_server()
        return connection

    def _give(self, connection: _Connection) -> None:
        if not connection.is_reusable:
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
            with contextlib.suppress(OSError):
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
            for document in connection.documents("shutdown", b"{}"):
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
            except OSError:
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
            for document in connection.documents("lease", body):
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
        if self._connection is not None:
            self._connection.end()
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


def _result(document: Json) -> Any:  # noqa: ANN401 - JSON
    if "error" in document:
        raise protocol.error_from_json(document["error"])
    return document.get("result")


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
