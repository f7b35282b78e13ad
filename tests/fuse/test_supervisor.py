"""Workers that die, supervisors that die, and what is left by them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fuse.conftest import MIB, Server, attached, make_pool, mounted
from thinpool.host import loop, mounts

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

pytestmark = pytest.mark.fuse

KILLS = 20


def wait_until(condition: Callable[[], bool], *, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.02)


def test_requests_wait_while_a_worker_is_replaced(server: Server) -> None:
    path = server.volume(1, MIB)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(fd, b"kept", 0)
        first = server.worker_pid()
        server.kill_worker()
        began = time.monotonic()
        assert os.pread(fd, 4, 0) == b"kept"
        took = time.monotonic() - began
    finally:
        os.close(fd)
    info = server.ask("info")
    assert info["pid"] != first
    assert info["restarted"]
    assert info["served"] == [1]
    # The first write was acknowledged and not committed: the log in memory kept it.
    assert info["replayed"] >= 1
    assert took < 5


def test_replaced_by_sigterm_without_loss(server: Server) -> None:
    path = server.volume(1, MIB)
    with path.open("r+b", buffering=0) as file:
        file.write(b"kept")
        first = server.worker_pid()
        server.kill_worker(signal.SIGTERM)
        wait_until(lambda: server.worker_pid() != first)
        file.seek(0)
        assert file.read(4) == b"kept"


def test_volumes_are_served_while_the_program_cannot_start(server: Server) -> None:
    path = server.volume(1, MIB)
    server.ask("fail")
    with path.open("r+b", buffering=0) as file:
        file.write(b"kept")
        for _ in range(6):
            server.kill_worker()
            file.seek(0)
            assert file.read(4) == b"kept"
            wait_until(lambda: server.log.read_text().endswith("trying again\n"))
    (server.root / "fail").unlink()
    assert server.ask("info")["served"] == [1]
    assert "trying again" in server.log.read_text()


def test_program_that_cannot_start_is_reported(root: Path) -> None:
    server = make_pool(root, "p", data_size=16 * MIB)
    (root / "fail").touch()
    result = subprocess.run(
        [*server.command(), "--detach"], env=server.environment(), capture_output=True,
        check=False, timeout=30,
    )  # fmt: skip
    assert json.loads(result.stdout)["error"]["kind"] == "host_space"


def test_program_that_ends_beside_served_volumes_is_replaced(server: Server) -> None:
    path = server.volume(1, MIB)
    first = server.worker_pid()
    with contextlib.suppress(EOFError):
        server.ask_once("end")
    wait_until(lambda: server.worker_pid() != first)
    assert path.read_bytes() == bytes(MIB)


def test_server_ends_when_its_program_does(server: Server) -> None:
    server.volume(1, MIB)
    server.ask("remove", id=1)
    with contextlib.suppress(EOFError):
        server.ask_once("end")
    assert server.child is not None
    assert server.child.wait(timeout=30) == 0
    assert not mounts.fuse_mounts(str(server.mount_point))
    assert not server.mount_point.exists()
    assert not (server.directory / "server.sock").exists()
    assert not (server.directory / "supervisor.pid").exists()
    server.check()


@pytest.mark.loop
def test_stop_takes_mounts_and_devices_down_in_order(server: Server, tmp_path: Path) -> None:
    path = server.volume(1, 32 * MIB)
    device = loop.attach(path)
    subprocess.run(["mkfs.ext4", "-q", device.path], check=True)
    mounts.mount(device.path, str(tmp_path), "ext4")
    (tmp_path / "file").write_bytes(b"kept" * 1000)
    assert server.stop() == 0
    assert not loop.find_below(server.mount_point)
    assert not tmp_path.is_mount()
    server.check()
    # Nothing was cut off: what was only in the page cache came to the volume.
    server.start()
    path = server.add(1, 32 * MIB)
    with attached(path) as again, mounted(again.path, tmp_path, "ext4"):
        assert (tmp_path / "file").read_bytes() == b"kept" * 1000


@pytest.mark.loop
def test_kills_under_verified_work_lose_nothing(
    server: Server, tmp_path: Path, rng: random.Random, require: Callable[..., None]
) -> None:
    """INV-18, INV-20, INV-21: what was acknowledged is there, what was open is answered."""
    require("fio", "ext4")
    path = server.volume(1, 192 * MIB)
    with attached(path) as device:
        subprocess.run(["mkfs.ext4", "-q", device.path], check=True)
        with mounted(device.path, tmp_path, "ext4"):
            worked = work_under_kills(server, tmp_path, rng, kills=KILLS)
        assert worked.returncode == 0, worked.stdout
        subprocess.run(["e2fsck", "-fn", device.path], check=True, capture_output=True)
    assert Path(f"/sys/block/loop{device.number}").exists()
    server.ask("remove", id=1)
    assert server.stop() == 0
    server.check()


def work_under_kills(
    server: Server, directory: Path, rng: random.Random, *, kills: int
) -> subprocess.CompletedProcess[str]:
    """Fio writes and verifies, again and again, until the worker was killed so many times."""
    results: list[subprocess.CompletedProcess[str]] = []
    enough = threading.Event()

    def work() -> None:
        while not enough.is_set():
            results.append(run_fio(directory, rng.randrange(1 << 30)))
            if results[-1].returncode:
                break

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(kills):
        if not thread.is_alive():
            break
        time.sleep(rng.uniform(0.02, 0.6))
        server.kill_worker()
    enough.set()
    thread.join()
    return results[-1]


def run_fio(directory: Path, seed: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["fio", "--name=w", f"--directory={directory}", "--size=24M", "--rw=randrw",
         "--bsrange=512-64k", "--bs_unaligned=0", "--blockalign=512", "--ioengine=libaio",
         "--iodepth=16", "--direct=1", "--verify=crc32c", "--verify_fatal=1", "--fsync=64",
         "--numjobs=2", f"--randseed={seed}", "--verify_backlog=128",
         "--verify_state_save=0"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.loop
def test_stop_finishes_although_the_worker_dies_meanwhile(server: Server, tmp_path: Path) -> None:
    path = server.volume(1, 64 * MIB)
    device = loop.attach(path)
    subprocess.run(["mkfs.ext4", "-q", device.path], check=True)
    mounts.mount(device.path, str(tmp_path), "ext4")
    data = os.urandom(30 * MIB)
    (tmp_path / "file").write_bytes(data)  # in the page cache: the unmount writes it back
    server.child.terminate()
    server.kill_worker()
    assert server.child.wait(timeout=60) == 0
    assert not tmp_path.is_mount()
    assert not loop.find_below(server.mount_point)
    server.check()
    server.start()
    path = server.add(1, 64 * MIB)
    with attached(path) as again, mounted(again.path, tmp_path, "ext4"):
        assert (tmp_path / "file").read_bytes() == data


def test_without_fuse_a_server_works_but_activates_nothing(root: Path) -> None:
    server = make_pool(root, "p", data_size=16 * MIB)
    server.extra = ["--no-fuse"]
    server.start()
    server.ask("create", id=1)
    with pytest.raises(RuntimeError, match="unsupported_host: volumes cannot be activated"):
        server.add(1, MIB)
    server.kill_worker()
    assert server.ask("info")["restarted"]
    assert not mounts.fuse_mounts(str(server.mount_point))
    assert server.stop() == 0
    server.check()


def test_second_server_is_busy(server: Server) -> None:
    """INV-22."""
    result = subprocess.run(
        server.command(), env=server.environment(), capture_output=True, check=False, timeout=30
    )
    assert result.returncode == 1
    error = json.loads(result.stdout)["error"]
    assert error["kind"] == "busy"
    assert error["attributes"]["holder"] == server.child.pid
    assert server.ask("info")["pid"]


def test_pool_that_cannot_be_opened_is_reported(root: Path) -> None:
    server = make_pool(root, "p", data_size=16 * MIB)
    with Path(server.config.metadata).open("r+b") as file:
        file.write(b"\xff" * 4096)
    result = subprocess.run(
        [*server.command(), "--detach"], env=server.environment(), capture_output=True,
        check=False, timeout=30,
    )  # fmt: skip
    assert result.returncode == 1
    assert json.loads(result.stdout)["error"]["kind"] in {"corrupt", "checksum"}
    assert not mounts.fuse_mounts(str(server.mount_point))


def test_detached_server_reports_and_lives_on(root: Path) -> None:
    server = make_pool(root, "p", data_size=16 * MIB)
    result = subprocess.run(
        [*server.command(), "--detach"], env=server.environment(), capture_output=True,
        check=True, timeout=30,
    )  # fmt: skip
    pid = json.loads(result.stdout)["pid"]
    assert os.getsid(pid) != os.getsid(0)
    assert server.ask("info")["served"] == []
    assert (server.directory / "supervisor.pid").read_text() == f"{pid}\n"
    with contextlib.suppress(EOFError):
        server.ask_once("end")
    wait_until(lambda: not (server.directory / "server.sock").exists())


@pytest.mark.loop
def test_what_a_killed_supervisor_left_is_cleared(server: Server, tmp_path: Path) -> None:
    path = server.volume(1, 32 * MIB)
    device = loop.attach(path)
    subprocess.run(["mkfs.ext4", "-q", device.path], check=True)
    mounts.mount(device.path, str(tmp_path), "ext4")
    worker = server.worker_pid()
    fd = os.open(device.path, os.O_RDWR | os.O_CLOEXEC)
    os.pwrite(fd, b"acknowledged", 16 * MIB)
    os.fsync(fd)
    os.close(fd)

    server.child.kill()
    server.child.wait()
    wait_until(lambda: not alive(worker))
    server.start()
    assert not tmp_path.is_mount()
    assert not loop.find_below(server.mount_point)
    assert len(mounts.fuse_mounts(str(server.mount_point))) == 1
    assert "left by a server that died" in server.log.read_text()
    # Its worker ended in order, and what was flushed is there anyway.
    path = server.add(1, 32 * MIB)
    with path.open("rb", buffering=0) as file:
        file.seek(16 * MIB)
        assert file.read(12) == b"acknowledged"
    server.ask("remove", id=1)
    assert server.stop() == 0
    server.check()


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_connection_ended_from_outside_is_made_anew(server: Server) -> None:
    server.volume(1, MIB)
    (mount,) = mounts.fuse_mounts(str(server.mount_point))
    mounts.abort_fuse(mount.connection)
    wait_until(lambda: "ended from outside" in server.log.read_text())
    assert server.ask("info")["served"] == []
    assert server.add(1, MIB).read_bytes() == bytes(MIB)


# ---- freezing -----------------------------------------------------------------------------------


@pytest.fixture
def ext4(server: Server, tmp_path: Path, require: Callable[..., None]) -> object:
    require("loop", "ext4")
    path = server.volume(1, 32 * MIB)
    with attached(path) as device:
        subprocess.run(["mkfs.ext4", "-q", device.path], check=True)
        with mounted(device.path, tmp_path, "ext4"):
            yield tmp_path


def write_in_thread(path: Path) -> threading.Thread:
    thread = threading.Thread(target=path.write_bytes, args=(b"x",))
    thread.start()
    return thread


def test_writes_wait_while_frozen_and_go_on_after(server: Server, ext4: Path) -> None:
    frozen = threading.Thread(
        target=lambda: results.append(server.ask_once("freeze", path=str(ext4), seconds=0.5))
    )
    results: list[bool] = []
    frozen.start()
    time.sleep(0.25)
    writer = write_in_thread(ext4 / "file")
    writer.join(0.1)
    assert writer.is_alive()
    frozen.join()
    writer.join(5)
    assert not writer.is_alive()
    assert results == [True]


def test_frozen_filesystem_is_thawed_when_the_worker_dies(server: Server, ext4: Path) -> None:
    def freeze() -> None:
        with contextlib.suppress(OSError, EOFError):
            server.ask_once("freeze", path=str(ext4), seconds=60)

    frozen = threading.Thread(target=freeze)
    frozen.start()
    time.sleep(0.25)
    writer = write_in_thread(ext4 / "file")
    writer.join(0.1)
    assert writer.is_alive()
    began = time.monotonic()
    server.kill_worker()
    writer.join(4)
    assert not writer.is_alive()
    assert time.monotonic() - began < 4
    frozen.join()


def test_freeze_ends_after_its_time_and_says_so(server: Server, ext4: Path) -> None:
    assert server.ask("freeze", path=str(ext4), seconds=5.5) is False
    writer = write_in_thread(ext4 / "file")
    writer.join(5)
    assert not writer.is_alive()


def test_filesystem_that_holds_the_pool_is_never_frozen(server: Server) -> None:
    with pytest.raises(RuntimeError, match="Device or resource busy"):
        server.ask("freeze", path=str(server.directory), seconds=1)
    (server.directory / "still").write_bytes(b"writable")


# ---- at rest ------------------------------------------------------------------------------------


def test_server_at_rest_is_small_and_sleeps(server: Server) -> None:
    paths = [server.volume(number, 64 * MIB) for number in range(100)]
    for path in paths[:8]:
        with path.open("r+b", buffering=0) as file:
            file.write(os.urandom(MIB))
    pids = [server.child.pid, server.worker_pid()]
    time.sleep(3)  # a commit, and memory given back
    assert sum(resident(pid) for pid in pids) <= 64 * MIB
    before = [switches(pid) for pid in pids]
    time.sleep(3)
    # Nothing wakes by itself.
    assert [switches(pid) for pid in pids] == before


def resident(pid: int) -> int:
    """Its own memory and what it shares with nobody else; libraries are counted by their share."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise AssertionError


def switches(pid: int) -> int:
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith(("voluntary_ctxt", "nonvoluntary_ctxt")):
                total += int(line.split()[1])
    return total
