"""What a dead server leaves is ended, whoever still waits for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from thinpool.bench.workplace import without_loops
from thinpool.host import filesystems, loop, mountinfo, mounts
from thinpool.host.leftovers import clear_dead_server
from thinpool.host.signatures import carries

pytestmark = [pytest.mark.fuse, pytest.mark.loop, pytest.mark.root]

MIB = 1 << 20
SERVER = str(Path(__file__).with_name("tiny_fuse.py"))


class Served:
    """A FUSE mount with its server, a loop device over its file, a filesystem mounted on that."""

    def __init__(self, work: Path, backing: str) -> None:
        self.fuse_directory = str(work / "fuse")
        self.mount_point = str(work / "guest")
        for path in (self.fuse_directory, self.mount_point):
            Path(path).mkdir()
        # Kept open: the connection outlives the server, as when a child of it holds on.
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = [f"fd={self.fd},rootmode=40000,user_id=0,group_id=0"]
        mounts.mount("tiny", self.fuse_directory, "fuse", options)
        self.server = subprocess.Popen(
            [sys.executable, SERVER, str(self.fd), backing], pass_fds=[self.fd]
        )
        self.device = loop.attach(Path(self.fuse_directory) / "id-1")
        mounts.mount(self.device.path, self.mount_point, "ext4")

    def kill(self) -> None:
        self.server.kill()
        self.server.wait()


@pytest.fixture
def served(work, sparse):
    backing = sparse(64 * MIB)
    filesystems.make_filesystem(backing, "ext4", block_size=64 << 10)
    found = Served(work, backing)
    yield found
    found.kill()
    clear_dead_server(found.fuse_directory)
    os.close(found.fd)


def is_gone(device: loop.LoopDevice) -> bool:
    """Detached; its number may be another's already, of a test that runs beside this one."""
    now = loop.describe_number(device.number)
    return now is None or now.backing_file != device.backing_file


def test_everything_over_a_dead_server_is_cleared(served):
    guest = Path(served.mount_point)
    (guest / "file").write_text("x" * 4096)
    served.kill()
    (guest / "lost").write_text("y" * 4096)
    stuck = subprocess.Popen(["sync", "-f", guest], stderr=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        stuck.wait(0.2)
    sitting = subprocess.Popen(["sleep", "60"], cwd=guest)
    try:
        cleared = clear_dead_server(served.fuse_directory)
    finally:
        sitting.kill()
        sitting.wait()
    stuck.wait(10)
    assert len(cleared.connections) == 1
    assert served.mount_point in cleared.unmounted
    assert served.fuse_directory in cleared.unmounted
    assert mountinfo.mount_at(served.mount_point) is None
    assert mountinfo.mount_at(served.fuse_directory) is None
    # Who still sat in it held the device; it went when they did.
    assert (served.device.path in cleared.detached) != bool(cleared.waiting)
    assert is_gone(served.device)
    again = clear_dead_server(served.fuse_directory)
    assert (again.unmounted, again.detached, again.waiting) == ((), (), ())


def test_a_mount_in_another_namespace_is_named_and_goes_with_it(served):
    child = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", "echo; read x"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    served.kill()
    cleared = clear_dead_server(served.fuse_directory)
    (message,) = cleared.waiting
    assert str(child.pid) in message
    assert cleared.detached == ()
    child.communicate(b"\n")
    assert is_gone(served.device)


def test_a_btrfs_is_made_beside_a_dead_server(served, sparse):
    """mkfs.btrfs by itself fails then, whatever it is asked to make one of."""
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("no mkfs.btrfs")
    served.kill()
    os.close(served.fd)
    served.fd = os.open(os.devnull, os.O_RDONLY)
    disk = sparse(320 * MIB, "btrfs")
    command = ["mkfs.btrfs", "-q", "-f", disk]
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0
    subprocess.run(without_loops(*command), check=True, capture_output=True)
    assert carries(disk) == "btrfs"
    assert mountinfo.mount_at(served.mount_point) is not None, "outside it stays mounted"


def test_where_nothing_is_nothing_is_done(work):
    cleared = clear_dead_server(work)
    assert cleared.connections == ()
    assert cleared.unmounted == ()
