"""A pool with a real server, whose program is tests/fuse/plain_program.py."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from thinpool.engine import BlockDevice, format_pool
from thinpool.host import loop, mounts
from thinpool.host.rundir import run_directory
from thinpool.store.poolfile import PoolConfig, new_uuid, pool_directory, read_config, write_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
BLOCK = 64 << 10
MIB = 1 << 20


class Server:
    """One pool's server, started as a child of the test."""

    def __init__(self, root: Path, pool: str) -> None:
        self.root = root
        self.pool = pool
        self.config = read_config(root, pool)
        self.directory = pool_directory(root, pool)
        self.mount_point = run_directory(root) / "fuse" / self.config.uuid
        self.generation = 0
        self.extra: list[str] = []
        self.child: subprocess.Popen[bytes] | None = None
        self.log = self.directory / "server.log"

    def command(self) -> list[str]:
        return [
            sys.executable, "-m", "thinpool.server.supervisor", "--root", str(self.root),
            "--pool", self.pool, "--program", "plain_program:serve", *self.extra,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        # An empty part would be the working directory, with sources and no extension in it.
        path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        return {**os.environ, "PYTHONPATH": path}

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                self.command(), env=self.environment(), stdout=log, stderr=log
            )
        self.ask("info")

    def ask(self, op: str, *, timeout: float = 60, **arguments: Any) -> Any:
        """One command, repeated while workers are replaced: they are all repeatable or fail."""
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(OSError, EOFError):
                return self.ask_once(op, timeout=timeout, **arguments)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{op}: {self.log.read_text()}")
            if self.child is not None and self.child.poll() is not None:
                raise AssertionError(f"{op}: the server ended: {self.log.read_text()}")
            time.sleep(0.02)

    def ask_once(self, op: str, *, timeout: float = 60, **arguments: Any) -> Any:
        with socket.socket(socket.AF_UNIX) as end:
            end.settimeout(timeout)
            end.connect(str(self.directory / "server.sock"))
            end.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
            with end.makefile("rb") as lines:
                line = lines.readline()
            if not line:
                raise EOFError
            reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"{reply['error']}: {reply['message']}")
        return reply["result"]

    def volume(self, volume_id: int, size: int, **options: Any) -> Path:
        """A new volume and its file."""
        self.ask("create", id=volume_id)
        return self.add(volume_id, size, **options)

    def add(self, volume_id: int, size: int, **options: Any) -> Path:
        self.generation += 1
        options.setdefault("generation", self.generation)
        return Path(self.ask("add", id=volume_id, size=size, **options))

    def worker_pid(self) -> int:
        return int(self.ask("info")["pid"])

    def current_worker(self) -> int | None:
        """The child of the supervisor, whether it serves already or not."""
        assert self.child is not None
        children = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children")
        found = children.read_text().split()
        return int(found[0]) if found else None

    def kill_worker(self, number: int = signal.SIGKILL) -> None:
        if (pid := self.current_worker()) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> int:
        if self.child is None:
            return 0
        self.child.terminate()
        code = self.child.wait(timeout=60)
        self.child = None
        return code

    def check(self) -> None:
        """The pool's metadata, by a judge of another house where there is one."""
        if shutil.which("thin_check"):
            result = subprocess.run(
                ["thin_check", self.config.metadata],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert result.returncode == 0, result.stdout + result.stderr


def make_pool(root: Path, name: str, *, data_size: int) -> Server:
    directory = pool_directory(root, name)
    directory.mkdir(parents=True, mode=0o700)
    config = PoolConfig(
        name=name, uuid=new_uuid(), block_size=BLOCK, data=str(directory / "data"),
        metadata=str(directory / "metadata"), owns_files=True, created="2026-01-01T00:00:00Z",
    )  # fmt: skip
    with BlockDevice.open_file(config.metadata, create_size=16 * MIB) as metadata:
        format_pool(metadata, block_size=BLOCK, data_blocks=data_size // BLOCK)
    BlockDevice.open_file(config.data, create_size=data_size).close()
    write_config(root, config)
    return Server(root, name)


@pytest.fixture
def root() -> Iterator[Path]:
    """Short, since it ends up in a socket's path, and on a filesystem that takes O_DIRECT."""
    with tempfile.TemporaryDirectory(prefix="tpf-", dir="/var/tmp") as folder:
        yield Path(folder).resolve()


@pytest.fixture
def new_server(root: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(name: str = "p", *, data_size: int = 256 * MIB) -> Server:
        server = make_pool(root, name, data_size=data_size)
        servers.append(server)
        server.start()
        return server

    yield make
    for server in servers:
        if server.child is not None and server.child.poll() is None:
            server.stop()
        for device in loop.find_below(server.mount_point):
            loop.detach(device)
        for mount in mounts.fuse_mounts(str(server.mount_point)):
            mounts.abort_fuse(mount.connection)
            mounts.unmount(mount.mount_point, lazy=True)


@pytest.fixture
def server(new_server: Callable[..., Server]) -> Server:
    return new_server()


@contextlib.contextmanager
def attached(path: Path) -> Iterator[loop.LoopDevice]:
    device = loop.attach(path)
    try:
        yield device
    finally:
        loop.detach(device, timeout=10)


@contextlib.contextmanager
def mounted(device: str, directory: Path, fstype: str) -> Iterator[Path]:
    directory.mkdir(exist_ok=True)
    mounts.mount(device, str(directory), fstype)
    try:
        yield directory
    finally:
        mounts.unmount(str(directory), timeout=30)
