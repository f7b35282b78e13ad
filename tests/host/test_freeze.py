"""Frozen filesystems: how long, where, and which never."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from thinpool.host import filesystems, freeze, loop, mounts
from thinpool.host.freeze import FreezeGuard, FreezeState, devices_below, thaw_recorded

MIB = 1 << 20
GIB = 1 << 30
REPOSITORY = str(Path(freeze.__file__).parents[2])
pytestmark = [pytest.mark.loop, pytest.mark.root]


@pytest.fixture(params=["ext4", "xfs"])
def mounted(request, sparse, directory, require):
    require(request.param)
    path = sparse(512 * MIB)
    filesystems.make_filesystem(path, request.param, block_size=64 << 10)
    device = loop.attach(path)
    mounts.mount(device.path, directory, request.param)
    yield device
    for found in mounts_at(directory):
        thaw_by_hand(found)
        mounts.unmount(found)
    # Another test that has just left the mount namespace may have it mounted for a moment.
    loop.detach(device, timeout=30)


def mounts_at(path):
    return [path] if os.path.ismount(path) else []


def thaw_by_hand(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, freeze._FITHAW, 0)
    except OSError:
        pass
    finally:
        os.close(fd)


class Writer:
    """A thread that writes one file, and says when it is done."""

    def __init__(self, directory: str) -> None:
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.run, args=(Path(directory) / "written",))
        self.thread.start()

    def run(self, path: Path) -> None:
        path.write_text("x")
        self.done.set()


def test_writers_wait_while_frozen_and_go_on_after(mounted, directory):
    with FreezeGuard(protect=["/"]) as guard:
        frozen = guard.freeze(mounted.device)
        assert frozen.state is FreezeState.FROZEN
        assert frozen.mounts == (f"mounted on {directory}",)
        writer = Writer(directory)
        assert not writer.done.wait(0.2)
        assert guard.thaw(mounted.device) is True
        assert writer.done.wait(5)
        writer.thread.join()
        assert guard.thaw(mounted.device) is False


def test_what_is_copied_while_frozen_is_clean(mounted, directory, work):
    stop = threading.Event()

    def write():
        n = 0
        while not stop.is_set():
            (Path(directory) / f"f{n % 50}").write_bytes(os.urandom(5000))
            n += 1

    thread = threading.Thread(target=write)
    thread.start()
    copy = str(work / "copy")
    try:
        time.sleep(0.1)
        with FreezeGuard(protect=["/"], bound=60) as guard:
            assert guard.freeze(mounted.device).state is FreezeState.FROZEN
            subprocess.run(["cp", "--sparse=always", mounted.backing_file, copy], check=True)
            assert guard.thaw(mounted.device) is True
    finally:
        stop.set()
        thread.join()
    if filesystems.fs_type(copy) == "xfs":
        # A frozen xfs keeps its log to be replayed, by design; what it says then is whole.
        device = loop.attach(copy)
        filesystems.replay_journal(device.path)
        loop.detach(device)
        command = ["xfs_repair", "-n", copy]
    else:
        command = ["e2fsck", "-fn", copy]
        found = filesystems.read_superblock(copy)
        assert found is not None
        assert not found.needs_recovery
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_freeze_ends_by_itself_and_says_so(mounted, directory):
    with FreezeGuard(protect=["/"], bound=0.3) as guard:
        started = time.monotonic()
        assert guard.freeze(mounted.device).state is FreezeState.FROZEN
        writer = Writer(directory)
        assert writer.done.wait(5)
        assert 0.2 < time.monotonic() - started < 2
        writer.thread.join()
        assert guard.thaw(mounted.device) is False


def test_closing_the_guard_thaws(mounted, directory):
    guard = FreezeGuard(protect=["/"])
    assert guard.freeze(mounted.device).state is FreezeState.FROZEN
    again = guard.freeze(mounted.device)
    assert again.state is FreezeState.FAILED
    guard.close()
    (Path(directory) / "file").write_text("x")
    assert guard.freeze(mounted.device).state is FreezeState.FROZEN, "it can be used again"
    guard.close()


def test_a_freeze_that_takes_too_long_is_given_up_and_undone(mounted, directory, monkeypatch):
    real = fcntl.ioctl
    released = threading.Event()

    def slow(fd, request, *arguments):
        if request == freeze._FIFREEZE:
            released.wait(10)
        return real(fd, request, *arguments)

    monkeypatch.setattr(freeze.fcntl, "ioctl", slow)
    with FreezeGuard(protect=["/"], bound=0.2) as guard:
        outcome = guard.freeze(mounted.device)
        assert outcome.state is FreezeState.FAILED
        assert "0.2 s" in (outcome.reason or "")
        released.set()  # it comes after all, and is undone
        writer = Writer(directory)
        assert writer.done.wait(5)
        writer.thread.join()
        deadline = time.monotonic() + 5
        while guard._holds and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not guard._holds


def test_frozen_by_somebody_else_is_not_ours_to_thaw(mounted, directory):
    fd = os.open(directory, os.O_RDONLY)
    fcntl.ioctl(fd, freeze._FIFREEZE, 0)
    try:
        with FreezeGuard(protect=["/"]) as guard:
            outcome = guard.freeze(mounted.device)
            assert outcome.state is FreezeState.FAILED
            assert "somebody else" in (outcome.reason or "")
        writer = Writer(directory)
        assert not writer.done.wait(0.2)
    finally:
        fcntl.ioctl(fd, freeze._FITHAW, 0)
        os.close(fd)
    writer.thread.join()


def test_what_is_not_mounted_needs_no_freeze(sparse):
    device = loop.attach(sparse())
    try:
        with FreezeGuard(protect=["/"]) as guard:
            assert guard.freeze(device.device).state is FreezeState.NOT_MOUNTED
    finally:
        loop.detach(device)


def test_a_mount_in_another_namespace_is_frozen_too(mounted, directory, tmp_path):
    child = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", 'echo; read x; echo data > "$0/file"; echo', directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    child.stdout.readline()
    mounts.unmount(directory)
    with FreezeGuard(protect=["/"]) as guard:
        frozen = guard.freeze(mounted.device)
        assert frozen.state is FreezeState.FROZEN
        assert str(child.pid) in frozen.mounts[0]
        child.stdin.write(b"\n")
        child.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)
        assert guard.thaw(mounted.device) is True
    child.communicate()
    assert child.returncode == 0


def test_what_holds_the_pools_own_files_is_never_frozen(mounted, directory, work):
    """Directly, and through a loop device whose file is on it."""
    pool = Path(directory) / "pool" / "data"
    with FreezeGuard(protect=[pool]) as guard:
        outcome = guard.freeze(mounted.device)
        assert outcome.state is FreezeState.REFUSED
        assert directory in (outcome.reason or "")
    inner_file = Path(directory) / "inner"
    with inner_file.open("wb") as file:
        file.truncate(64 * MIB)
    filesystems.make_filesystem(inner_file, "ext4", block_size=64 << 10)
    inner = loop.attach(inner_file)
    place = work / "inner"
    place.mkdir()
    mounts.mount(inner.path, str(place), "ext4")
    try:
        assert {inner.device, mounted.device} <= devices_below([str(place / "not-yet" / "data")])
        with FreezeGuard(protect=[place / "not-yet" / "data"]) as guard:
            assert guard.freeze(mounted.device).state is FreezeState.REFUSED
            assert guard.freeze(inner.device).state is FreezeState.REFUSED
    finally:
        mounts.unmount(str(place))
        loop.detach(inner)


def test_files_on_an_overlay_count_for_what_its_upper_directory_is_on(mounted, directory, work):
    if "overlay" not in Path("/proc/filesystems").read_text():
        pytest.skip("this kernel has no overlay")
    for name in ("upper", "work"):
        (Path(directory) / name).mkdir()
    (work / "merged").mkdir()
    (work / "lower").mkdir()
    options = f"lowerdir={work}/lower,upperdir={directory}/upper,workdir={directory}/work"
    mounts.mount("overlay", str(work / "merged"), "overlay", [options])
    try:
        assert mounted.device in devices_below([str(work / "merged" / "data")])
    finally:
        mounts.unmount(str(work / "merged"))


def test_what_a_killed_process_left_frozen_is_thawed_by_the_next(mounted, directory, tmp_path):
    record = tmp_path / "frozen"
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            (
                "import sys, pathlib\nfrom thinpool.host.freeze import FreezeGuard\n"
                "g = FreezeGuard(protect=['/'], bound=60, record=pathlib.Path(sys.argv[2]))\n"
                "print(g.freeze(int(sys.argv[1])).state, flush=True); input()"
            ),
            str(mounted.device),
            str(record),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": REPOSITORY},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"frozen\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    writer = Writer(directory)
    assert not writer.done.wait(0.2)
    (record / "1:1").write_text("{")  # a note cut short
    assert thaw_recorded(record) == [f"mounted on {directory}"]
    assert writer.done.wait(5)
    writer.thread.join()
    assert list(record.iterdir()) == []
    assert thaw_recorded(record) == []


def test_notes_go_with_the_freeze(mounted, tmp_path):
    record = tmp_path / "frozen"
    with FreezeGuard(protect=["/"], record=record) as guard:
        assert guard.freeze(mounted.device).state is FreezeState.FROZEN
        assert len(list(record.iterdir())) == 1
        guard.thaw(mounted.device)
        assert list(record.iterdir()) == []
