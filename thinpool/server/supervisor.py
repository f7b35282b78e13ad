"""A pool's supervisor: keeps what must outlive its worker, and does as little as can be.

It holds the lock on the metadata, the FUSE descriptors, three pieces of shared memory and the
listening socket; starts a worker on them; starts the next one when that dies. It also freezes
filesystems for its worker, because a worker that dies must not leave one frozen.

    python -m thinpool.server.supervisor --root R --pool P [--detach]

With --detach it goes to the background; the command then prints one JSON object when clients are
answered, {"pid": N}, or why that cannot be, {"error": {...}}, and exits with 0 or 1. Log lines go
to ROOT/pools/POOL/server.log then.

Only its own death takes the files down. Its successor finds the mount and the loop devices that
were left, ends the connection, and takes them away.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from thinpool import errors
from thinpool.host import loop, mountinfo, mounts
from thinpool.host.rundir import RunDirectory, run_directory
from thinpool.server import control, process
from thinpool.server.fuse_mount import FuseConnection, open_connection
from thinpool.server.shm import REDO_BYTES, TABLE_BYTES, create_memory
from thinpool.store.poolfile import SOCKET, PoolConfig, pool_directory, read_config

if TYPE_CHECKING:
    from collections.abc import Iterator

PID_FILE: Final = "supervisor.pid"
LOG_FILE: Final = "server.log"
DATA_THREADS: Final = 2

_BACKLOG: Final = 128
_LOG_BYTES: Final = 1 << 20
_MAX_FAILURES: Final = 50
"""Workers in a row that died before they served; then the server gives up."""
_MAX_FIRST_FAILURES: Final = 3
"""The same, of a server that never served: nobody waits for it yet but who started it."""
_MAX_REFUSALS: Final = 3
"""Workers in a row that could not open the pool, of a server that had served before."""
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
_RELEASE_SECONDS: Final = 20.0
_STOP_SECONDS: Final = 30.0


# ---- what a dead server left --------------------------------------------------------------------


def clear_stale(mount_point: Path) -> list[str]:
    """Take down what a server that is gone left at its mount point.

    Returns:
        What was found, one line each.
    """
    found = []
    # First the connection: whoever waits for an answer gets an error, so nothing below blocks.
    for mount in mounts.fuse_mounts(str(mount_point)):
        found.append(f"FUSE connection {mount.connection} at {mount.mount_point} ended")
        with contextlib.suppress(errors.ThinpoolError):
            mounts.abort_fuse(mount.connection)
    found += release_devices(mount_point, lazy=True)
    for mount in mounts.fuse_mounts(str(mount_point)):
        with contextlib.suppress(errors.ThinpoolError):
            mounts.unmount(mount.mount_point, lazy=True)
    return found


def release_devices(mount_point: Path, *, lazy: bool) -> list[str]:
    """Unmount and detach the loop devices over files of a mount.

    Args:
        mount_point: of the FUSE mount.
        lazy: also those that are in use, which end when they are no longer used.
    """
    found = []
    for device in loop.find_below(mount_point):
        for entry in reversed(mountinfo.own_mounts()):
            if entry.device == device.device:
                found.append(f"{entry.mount_point} unmounted")
                with contextlib.suppress(errors.ThinpoolError):
                    mounts.unmount(entry.mount_point, lazy=lazy, timeout=2)
        found.append(f"{device.path} over {device.backing_file} detached")
        with contextlib.suppress(errors.ThinpoolError):
            loop.detach(device, timeout=1)
    return found


# ---- freezing -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Freeze:
    """A filesystem that is frozen, or about to be. One thread sees it through."""

    number: int
    fd: int
    worker: socket.socket
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Freeze, wait for thaw or the time to be over, thaw."""
        deadline = time.monotonic() + control.FREEZE_SECONDS
        code = 0
        try:
            control.freeze(self.fd)
        except OSError as error:
            code = error.errno or errno.EIO
        control.send(self.worker, {"op": "frozen", "id": self.number, "errno": code})
        if code:
            os.close(self.fd)
        else:
            self._wait_and_thaw(deadline)
        self.worker.close()

    def _wait_and_thaw(self, deadline: float) -> None:
        expired = not self.over.wait(max(0.0, deadline - time.monotonic()))
        control.thaw(self.fd)
        control.send(self.worker, {"op": "thawed", "id": self.number, "expired": expired})
        if expired:
            process.log("supervisor: a filesystem was thawed because its time was over")


# ---- the supervisor -----------------------------------------------------------------------------


class Supervisor:
    """Runs one pool's server until it is no longer used.

    Args:
        root: of the pools.
        pool: its name.
        program: what the worker runs, ``module:function``.
        files: serve volumes as files, where this host can.
    """

    def __init__(
        self, root: Path, pool: str, *, program: str = control.DEFAULT_PROGRAM, files: bool = True
    ) -> None:
        """Find out about the pool; nothing is taken yet."""
        self._root = root
        self._program = program
        self._files = files
        self._config: PoolConfig = read_config(root, pool)
        self._kernel = self._config.engine == "dm"
        self._directory = pool_directory(root, pool)
        self._mount_point = (run_directory(root) / "fuse" / self._config.uuid).absolute()
        self._undo = contextlib.ExitStack()
        self._fuse: FuseConnection | None = None
        self._fuse_fds = contextlib.ExitStack()
        self._freezes: dict[int, _Freeze] = {}
        self._stopping = False
        self._released = threading.Event()
        self._given_up: errors.ThinpoolError | None = None
        self._report_fd: int | None = None
        self._answering = False
        self._serving = False
        self._ever_served = False
        self._refusal: errors.ThinpoolError | None = None
        self._signal_read, self._signal_write = -1, -1

    # ---- taking hold ------------------------------------------------------------------------

    def open(self) -> None:
        """Take everything that workers need.

        Raises:
            BusyError: another server, or somebody else, has the pool.
            ThinpoolError: as the host says.
        """
        self._lock(self._config.metadata)
        if _is_block_device(self._config.data) and not self._kernel:
            self._lock(self._config.data, only_claim=True)
        for line in clear_stale(self._mount_point):
            process.log(f"supervisor: left by a server that died: {line}")
        self._listen()
        self._mount()
        self._slots = self._memory("slots", 0)  # a worker knows its size
        self._redo = self._memory("redo", REDO_BYTES)
        self._table = self._memory("table", TABLE_BYTES)
        pid_file = self._directory / PID_FILE
        pid_file.write_text(f"{os.getpid()}\n")
        self._undo.callback(pid_file.unlink, missing_ok=True)

    def _lock(self, path: str, *, only_claim: bool = False) -> None:
        """For as long as this process lives; a block device is claimed against mounts and dm."""
        flags = os.O_RDONLY if self._config.read_only else os.O_RDWR
        if _is_block_device(path) and not self._kernel:
            flags |= os.O_EXCL  # the kernel claims those of its pools itself
        holder = f"pool {self._config.name}: {path} is in use"
        try:
            fd = os.open(path, flags | os.O_CLOEXEC)
            self._undo.callback(os.close, fd)
            # A worker locks the data itself; its claim by O_EXCL is here.
            if not only_claim:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError as error:
            raise errors.device_gone(self._config.name, path) from error
        except PermissionError as error:
            raise errors.NotPermittedError(
                f"pool {self._config.name}: this user may not open {path}",
                operation="open",
                path=path,
            ) from error
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EBUSY):
                raise errors.BusyError(
                    holder, path=path, holder=_pid_in(self._directory)
                ) from error
            raise errors.StorageIOError(
                f"{path}: {error.strerror}", errno=error.errno, path=path
            ) from error

    def _memory(self, name: str, size: int) -> int:
        fd = create_memory(name, size)
        self._undo.callback(os.close, fd)
        return fd

    def _listen(self) -> None:
        path = self._directory / SOCKET
        # Ours alone, since the lock is: a socket that is there was left by a dead server.
        path.unlink(missing_ok=True)
        listen = self._undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            _bind(listen, path)
        except OSError as error:
            raise errors.StorageIOError(
                f"cannot listen on {path}: {error.strerror}", errno=error.errno, path=str(path)
            ) from error
        self._undo.callback(path.unlink, missing_ok=True)
        path.chmod(0o600)
        listen.listen(_BACKLOG)
        self._listening = listen

    def _mount(self) -> None:
        """Where this host or this user cannot, the server works without files."""
        if self._kernel:
            return  # its volumes are devices of the kernel's
        if not self._files or os.geteuid() != 0 or not Path("/dev/fuse").exists():
            process.log("supervisor: no FUSE here: volumes cannot be activated")
            return
        try:
            RunDirectory.of_root(self._root).fuse_directory(self._config.uuid)
            connection = open_connection(
                self._mount_point, source=f"thinpool:{self._config.name}", descriptors=DATA_THREADS
            )
        except (errors.ThinpoolError, OSError) as error:
            process.log(f"supervisor: no FUSE here, volumes cannot be activated: {error}")
            return
        self._fuse = connection
        for fd in connection.fds:
            self._fuse_fds.callback(os.close, fd)

    def _unmount(self) -> None:
        self._fuse_fds.close()
        if self._fuse is not None:
            for line in clear_stale(self._mount_point):
                process.log(f"supervisor: {line}")
            with contextlib.suppress(OSError):
                self._mount_point.rmdir()
        self._fuse = None

    def close(self) -> None:
        """Take the mount down and let go of everything; then say why, if it was given up."""
        self._unmount()
        self._undo.close()
        if self._given_up is not None:
            self._report({"error": control.error_to_wire(self._given_up)})

    # ---- running ----------------------------------------------------------------------------

    def run(self, *, report_fd: int | None = None) -> int:
        """Keep workers on the pool until one ends by itself. The exit code.

        Args:
            report_fd: told, once, that clients are answered or why they are not.
        """
        self._report_fd = report_fd
        with self._signals():
            failures = hopeless = 0
            restarted = False
            while True:
                self._answering = self._serving = False
                self._refusal = None
                code = self._run_worker(restarted=restarted)
                if code == control.EXIT_DONE or self._released.is_set():
                    return 0
                if code == control.EXIT_DISCONNECTED:
                    process.log("supervisor: the FUSE connection was ended from outside")
                    self._rebuild()
                    continue
                process.log(f"supervisor: the worker {_describe(code)}")
                restarted = True
                done_well = self._serving or code == control.EXIT_REPLACE
                failures = 0 if done_well else failures + 1
                hopeless = 0 if done_well or self._helps() else hopeless + 1
                if self._gives_up(hopeless):
                    return 1
                if failures:
                    self._pause(min(_FIRST_PAUSE * 2 ** (failures - 1), _LONGEST_PAUSE))

    def _helps(self) -> bool:
        """Whether the last worker answered for volumes, though it had not come to clients yet."""
        return self._answering and self._ever_served and self._refusal is None

    def _gives_up(self, failures: int) -> bool:
        allowed = _MAX_FAILURES if self._ever_served else _MAX_FIRST_FAILURES
        if self._refusal is not None:
            allowed = _MAX_REFUSALS if self._ever_served else 1
        if failures < allowed:
            return False
        error = self._refusal or errors.ServerError(
            f"the server of pool {self._config.name} does not start; see "
            f"{self._directory / LOG_FILE}",
            pool=self._config.name,
        )
        process.log(f"supervisor: giving up: {error.message}")
        self._given_up = error
        return True

    def _rebuild(self) -> None:
        """A connection that is gone cannot come back: begin again with a new one."""
        self._unmount()
        os.ftruncate(self._slots, 0)
        os.ftruncate(self._table, 0)
        os.ftruncate(self._table, TABLE_BYTES)
        self._mount()

    def _report(self, message: dict[str, object]) -> None:
        if self._report_fd is not None:
            with contextlib.suppress(OSError):
                os.write(self._report_fd, json.dumps(message, default=str).encode() + b"\n")
                os.close(self._report_fd)
            self._report_fd = None

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals wake the loop through a pipe; handlers do nothing else."""
        self._signal_read, self._signal_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        before = signal.set_wakeup_fd(self._signal_write, warn_on_full_buffer=False)
        caught = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)
        handlers = {number: signal.signal(number, lambda *_: None) for number in caught}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
            os.close(self._signal_read)
            os.close(self._signal_write)

    def _command(self, control_fd: int, *, restarted: bool) -> tuple[list[str], list[int]]:
        fuse = list(self._fuse.fds) if self._fuse is not None else []
        fds = {
            "control": control_fd,
            "listen": self._listening.fileno(),
            "slots": self._slots,
            "redo": self._redo,
            "table": self._table,
        }
        command = [sys.executable, "-P", "-m", "thinpool.server.worker", "--root", str(self._root),
                   "--pool", self._config.name, "--program", self._program]  # fmt: skip
        for name, fd in fds.items():
            command += [f"--{name}-fd", str(fd)]
        if fuse:
            command += ["--fuse-fds", ",".join(map(str, fuse))]
            command += ["--mount-point", str(self._mount_point)]
        if restarted:
            command.append("--restarted")
        return command, [*fds.values(), *fuse]

    def _run_worker(self, *, restarted: bool) -> int:
        """One worker from start to end; its exit code, negative for a signal."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                command, fds = self._command(theirs.fileno(), restarted=restarted)
                try:
                    worker = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)
                except OSError as error:
                    process.log(f"supervisor: cannot start a worker: {error.strerror}")
                    return 1
            code = self._attend(worker, ours)
            self._thaw_all()
        return code

    def _attend(self, worker: subprocess.Popen[bytes], link: socket.socket) -> int:
        kill_at: float | None = None
        talking = True
        while True:
            if self._released.is_set() and kill_at is None:
                worker.terminate()
                kill_at = time.monotonic() + _STOP_SECONDS
            wait = None
            if kill_at is not None:
                wait = max(0.0, kill_at - time.monotonic())
                if not wait:
                    worker.kill()
                    wait = 1.0
            watched = [self._signal_read, link.fileno()] if talking else [self._signal_read]
            readable, _, _ = select.select(watched, [], [], wait)
            if link.fileno() in readable:
                talking = self._listen_to(link)
            if self._signal_read in readable:
                self._take_signals()
            code = worker.poll()
            if code is not None:
                return code

    def _take_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while taken := os.read(self._signal_read, 64):
                if signal.SIGTERM in taken or signal.SIGINT in taken:
                    self._stop()

    def _stop(self) -> None:
        """Take the devices down while a worker still answers what is written back to them.

        In a thread: an unmount waits for workers, which the main loop must go on replacing.
        """
        if self._stopping:
            return
        self._stopping = True

        def release() -> None:
            release_devices(self._mount_point, lazy=False)
            over.set()

        def wait() -> None:
            if not over.wait(_RELEASE_SECONDS):
                process.log("supervisor: a mount could not be taken down in time")
            self._released.set()
            with contextlib.suppress(OSError):
                os.write(self._signal_write, b"\0")

        over = threading.Event()
        for work in (release, wait):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def _pause(self, seconds: float) -> None:
        select.select([self._signal_read], [], [], seconds)
        self._take_signals()

    def _listen_to(self, link: socket.socket) -> bool:
        """Take one message; False when the worker closed its end."""
        try:
            received = control.receive(link)
            if received is None:
                return False
            self._take_message(*received, link)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            # Whatever it is, it is the worker's fault and no reason to take the files down.
            process.log(f"supervisor: a message of the worker: {type(error).__name__}: {error}")
        return True

    def _take_message(self, message: dict[str, Any], fds: list[int], link: socket.socket) -> None:
        if message["op"] == "answering":
            self._answering = True
        elif message["op"] == "serving":
            self._serving = self._ever_served = True
            self._report({"pid": os.getpid()})
        elif message["op"] == "failed":
            self._refusal = control.error_from_wire(message["error"])
        elif message["op"] == "freeze" and fds:
            self._start_freeze(int(message["id"]), fds.pop(), link)
        elif message["op"] == "thaw":
            found = self._freezes.pop(int(message["id"]), None)
            if found is not None:
                found.over.set()
        for fd in fds:
            os.close(fd)

    # ---- freezing ---------------------------------------------------------------------------

    def _holds_the_pool(self, fd: int) -> bool:
        """Whether that filesystem holds the pool's own files: freezing it would freeze us."""
        device = os.fstat(fd).st_dev
        paths = (self._config.data, self._config.metadata, self._directory)
        return any(os.stat(path).st_dev == device for path in paths)  # noqa: PTH116 - some are str

    def _start_freeze(self, number: int, fd: int, link: socket.socket) -> None:
        try:
            refused = self._holds_the_pool(fd)
        except OSError:
            refused = True
        if refused:
            os.close(fd)
            control.send(link, {"op": "frozen", "id": number, "errno": errno.EBUSY})
            return
        freeze = _Freeze(number, fd, link.dup())
        threading.Thread(target=freeze.run, name="freeze", daemon=True).start()
        self._freezes[number] = freeze

    def _thaw_all(self) -> None:
        for freeze in self._freezes.values():
            freeze.over.set()
        self._freezes.clear()


def _is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)  # noqa: PTH116 - the path is a string here
    except OSError:
        return False


def _pid_in(directory: Path) -> int | None:
    try:
        return int((directory / PID_FILE).read_text())
    except (OSError, ValueError):
        return None


def _bind(listen: socket.socket, path: Path) -> None:
    """Bind, through the directory's name in /proc where the path is too long for an address."""
    try:
        listen.bind(str(path))
    except OSError as error:
        if "AF_UNIX path too long" not in str(error):
            raise
        directory = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
        try:
            listen.bind(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)


def _describe(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}, starting another"
    return f"ended with {code}, starting another"


# ---- starting -----------------------------------------------------------------------------------


def _detach(directory: Path) -> int:
    """Go to the background; returns the descriptor to report on. The parent prints the report."""
    read, write = os.pipe2(os.O_CLOEXEC)
    if os.fork():
        os.close(write)
        _wait_and_exit(read)
    os.close(read)
    os.setsid()
    if os.fork():
        os._exit(0)
    _rotate(directory / LOG_FILE)
    log = os.open(
        directory / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
    )
    nothing = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.close(nothing)
    # Workers are started from here, with the same modules.
    named = os.environ.get("PYTHONPATH")
    if named:
        parts = [os.path.abspath(part) for part in named.split(os.pathsep) if part]  # noqa: PTH100
        os.environ["PYTHONPATH"] = os.pathsep.join(parts)
    os.chdir("/")
    return write


def _rotate(path: Path) -> None:
    """Keep one old log, so that a server started every minute fills no disk."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > _LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))


def _wait_and_exit(read: int) -> None:
    with os.fdopen(read, "rb") as pipe:
        line = pipe.read()
    if not line:
        error = errors.ServerError("the server ended before it answered")
        line = json.dumps({"error": control.error_to_wire(error)}).encode() + b"\n"
    os.write(1, line)
    os._exit(1 if "error" in json.loads(line) else 0)


def main() -> int:
    """Run the server of one pool."""
    parser = argparse.ArgumentParser(prog="thinpool.server.supervisor", description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--program", default=control.DEFAULT_PROGRAM)
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("--no-fuse", action="store_true", help="serve no files")
    arguments = parser.parse_args()
    report: int | None = None
    root = arguments.root.absolute()
    try:
        # Before anything is taken, so that no lock or mount is the parent's.
        directory = pool_directory(root, arguments.pool)
        if arguments.detach and directory.is_dir():
            report = _detach(directory)
        supervisor = Supervisor(
            root, arguments.pool, program=arguments.program, files=not arguments.no_fuse
        )
        try:
            supervisor.open()
            process.protect(f"tps:{arguments.pool}", io_flusher=False)
            return supervisor.run(report_fd=report)
        finally:
            supervisor.close()
    except errors.ThinpoolError as error:
        process.log(f"supervisor: {error.message}")
        wire = json.dumps({"error": control.error_to_wire(error)}, default=str).encode() + b"\n"
        os.write(report if report is not None else 1, wire)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
