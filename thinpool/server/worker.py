"""A pool's worker: the data plane first, then the program that answers clients.

Started by the supervisor alone, with everything inherited that outlives it. It may be killed at
any time. Its exit code says what next: EXIT_DONE ends the server, any other has it replaced.

What is imported here is on the way to answering requests that wait since the last worker died, so
the program of the clients is imported when the data plane runs.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import mmap
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.host.failures import failure
from thinpool.server import control, process
from thinpool.server.context import ServedVolumes, Stop, WorkerContext
from thinpool.server.fuse_server import FuseServer, slots_size
from thinpool.server.shm import REDO_BYTES, ServedTable
from thinpool.store.dmdevices import DmDevices
from thinpool.store.opening import OpenPool, open_dm_pool, open_pool
from thinpool.store.poolfile import PoolConfig, read_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from thinpool.dm.engine import DmPool
    from thinpool.engine import Pool
    from thinpool.store.devices import DeviceMaker

DEFAULT_LINGER: Final = 30.0
_STOP_SECONDS: Final = 10.0
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 10.0


def wait_for_last_io(path: str) -> None:
    """Wait until no worker before this one has I/O in flight on the data.

    Its descriptor holds a shared lock that ends when the kernel has finished the last I/O of it,
    io_uring's included, however the process died.

    Raises:
        NotFoundError, NotPermittedError, StorageIOError: ``path``: the data cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as cause:
        raise failure(cause, f"cannot open the pool's data {path}", path=path) from cause
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)


class DataPlane:
    """The open pool and its FUSE server, running in a thread.

    Args:
        config: pool.json.
        fuse_fds: of the connection; empty where there is no FUSE.
        slots_fd: memory of its requests.
        redo_fd: memory of the redo log.
        table_fd: memory of the served volumes.
        mount_point: where the files are.
    """

    devices: DeviceMaker | None = None

    def __init__(
        self,
        config: PoolConfig,
        *,
        fuse_fds: list[int],
        slots_fd: int,
        redo_fd: int,
        table_fd: int,
        mount_point: Path | None,
    ) -> None:
        """Open the pool, replay what is not committed, bring the files back, answer."""
        self._redo = mmap.mmap(redo_fd, REDO_BYTES)
        self._table = ServedTable(table_fd)
        self.disconnected = False
        self.opened: OpenPool[Pool] = open_pool(config, redo_memory=self._redo)
        self.server: FuseServer | None = None
        if fuse_fds:
            if not os.fstat(slots_fd).st_size:
                os.ftruncate(slots_fd, slots_size())
            self.server = FuseServer(
                self.opened.pool,
                fuse_fds=fuse_fds,
                slots_fd=slots_fd,
                slots_bytes=os.fstat(slots_fd).st_size,
            )
        self.served = ServedVolumes(self.opened.pool, self.server, self._table, mount_point)
        self._thread = threading.Thread(target=self._run, name="fuse")
        self._on_disconnect: Callable[[], None] = lambda: None
        if self.server is not None:
            self._thread.start()

    def _run(self) -> None:
        assert self.server is not None  # noqa: S101 - the thread is started only then
        if not self.server.run():
            self.disconnected = True
            self._on_disconnect()

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Have a function called when the kernel ends the connection, or has done so."""
        self._on_disconnect = callback
        if self.disconnected:
            callback()

    def close(self) -> None:
        """Answer what was read, close everything, commit. What was not read waits."""
        # At once, should what follows take too long: nobody may keep the log after this.
        with contextlib.suppress(errors.ThinpoolError):
            self.opened.pool.commit()
        if self.server is not None:
            self.server.stop()
            self._thread.join()
            self.server.close()
        self.served.close()
        self.opened.close()
        self._table.close()
        self._redo.close()


class KernelPlane:
    """The open pool of the kernel's. Its data plane is the kernel, and outlives this process.

    Args:
        config: pool.json.
    """

    served = None
    server = None
    disconnected = False

    def __init__(self, config: PoolConfig) -> None:
        """Give the pool to the kernel, or take over what a predecessor gave it."""
        self.opened: OpenPool[DmPool] = open_dm_pool(config)
        self.devices: DeviceMaker = DmDevices.maker(self.opened.pool)

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Nothing ends it but this process."""

    def close(self) -> None:
        """Take the pool from the kernel, unless a volume of it has a device."""
        try:
            self.opened.close()
        except errors.ThinpoolError as error:
            process.log(f"worker: the pool stays with the kernel: {error.message}")


def _program(name: str) -> Callable[[WorkerContext], None]:
    import importlib  # noqa: PLC0415 - after the data plane runs

    module, function = name.split(":")
    found: Callable[[WorkerContext], None] = getattr(importlib.import_module(module), function)
    return found


class Worker:
    """One run of the worker."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Take what was inherited; none of it is for programs that are started here."""
        for name in ("control", "listen", "slots", "redo", "table"):
            _keep(getattr(arguments, f"{name}_fd"))
        for fd in arguments.fuse_fds:
            _keep(fd)
        self._arguments = arguments
        self._stopping = Stop()
        self.link = control.SupervisorLink(
            socket.socket(fileno=arguments.control_fd), self._supervisor_is_gone
        )

    def run(self) -> int:
        """Serve; the exit code."""
        arguments = self._arguments
        started = time.monotonic()
        try:
            config = read_config(arguments.root, arguments.pool)
            plane = self._open(config)
        except errors.ThinpoolError as error:
            self.link.failed(error)
            process.log(f"worker: {error.message}")
            return 1
        self.link.answering()
        if isinstance(plane, DataPlane):
            if arguments.restarted:
                process.log(_taken_over(plane, time.monotonic() - started))
            for entry, reason in plane.served.lost:
                process.log(f"worker: volume {entry.id} is no longer served: {reason.message}")
        try:
            code = self._serve_until_done(plane, config)
        finally:
            with _last_resort(_STOP_SECONDS):
                plane.close()
        return code

    def _open(self, config: PoolConfig) -> DataPlane | KernelPlane:
        if config.engine == "dm":
            return KernelPlane(config)
        arguments = self._arguments
        wait_for_last_io(config.data)
        return DataPlane(
            config,
            fuse_fds=arguments.fuse_fds,
            slots_fd=arguments.slots_fd,
            redo_fd=arguments.redo_fd,
            table_fd=arguments.table_fd,
            mount_point=arguments.mount_point,
        )

    def _serve_until_done(self, plane: DataPlane | KernelPlane, config: PoolConfig) -> int:
        """Run the program, again if need be; the exit code.

        A program that fails (a catalogue that cannot be written since the host's disk is full,
        say) must not take down the volumes that are served: it is tried again beside them.
        """
        pause = _FIRST_PAUSE
        while True:
            try:
                by_itself = self._serve_clients(plane, config)
            except Exception as error:
                if self._stopping.is_set() or plane.disconnected or not _serves(plane):
                    if isinstance(error, errors.ThinpoolError):
                        self.link.failed(error)
                    raise
                process.log(f"worker: {type(error).__name__}: {error}: trying again")
                self._stopping.wait(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
                continue
            if plane.disconnected:
                return control.EXIT_DISCONNECTED
            # With volumes served it cannot be done; whatever it thinks, they need a successor.
            done = by_itself and not _serves(plane)
            return control.EXIT_DONE if done else control.EXIT_REPLACE

    def _serve_clients(self, plane: DataPlane | KernelPlane, config: PoolConfig) -> bool:
        """Run the program; whether it ended by itself, the pool being no longer used."""
        stopping = self._stopping
        with _on_signals(stopping.set):
            plane.on_disconnect(stopping.set)
            context = WorkerContext(
                root=self._arguments.root,
                config=config,
                listen=socket.socket(fileno=os.dup(self._arguments.listen_fd)),
                opened=plane.opened,
                served=plane.served,
                server=plane.server,
                devices=plane.devices,
                link=self.link,
                linger=float(os.environ.get("THINPOOL_LINGER", DEFAULT_LINGER)),
                restarted=self._arguments.restarted,
                stopping=stopping,
            )
            _program(self._arguments.program)(context)
            return not stopping.is_set()

    def _supervisor_is_gone(self) -> None:
        """End in order, if that can be done soon: nobody keeps the log of what is not committed."""
        process.log("worker: the supervisor is gone, ending")
        self._stopping.set()
        time.sleep(_STOP_SECONDS)
        os._exit(1)


@contextlib.contextmanager
def _on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Have a function called when this process is told to end."""
    before = {
        number: signal.signal(number, lambda *_: stop())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serves(plane: DataPlane | KernelPlane) -> bool:
    """Whether volumes would stop working without a worker."""
    return plane.served is not None and bool(plane.served.entries())


def _taken_over(plane: DataPlane, seconds: float) -> str:
    replayed = plane.opened.pool.status().replayed
    answered = plane.server.statistics().replays if plane.server is not None else 0
    return (
        f"worker: took over in {seconds * 1000:.0f} ms: {replayed} records replayed, "
        f"{answered} open requests taken up"
    )


@contextlib.contextmanager
def _last_resort(seconds: float) -> Iterator[None]:
    """End the process hard after a while.

    Writes that wait for space must not keep a server from ending: they are answered by a
    successor, or fail with the mount.
    """
    timer = threading.Timer(seconds, os._exit, (control.EXIT_REPLACE,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _keep(fd: int) -> None:
    if fd >= 0:
        os.set_inheritable(fd, False)  # noqa: FBT003 - it takes no keyword


def _fds(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line that the supervisor makes."""
    parser = argparse.ArgumentParser(prog="thinpool.server.worker")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--program", default=control.DEFAULT_PROGRAM)
    parser.add_argument("--mount-point", type=Path)
    parser.add_argument("--fuse-fds", type=_fds, default=[])
    parser.add_argument("--restarted", action="store_true")
    for name in ("control", "listen", "slots", "redo", "table"):
        parser.add_argument(f"--{name}-fd", type=int, required=name != "slots", default=-1)
    return parser.parse_args(arguments)


def main() -> int:
    """Run one worker."""
    arguments = parse()
    process.protect(f"tp:{arguments.pool}", io_flusher=True)
    return Worker(arguments).run()


if __name__ == "__main__":
    raise SystemExit(main())
