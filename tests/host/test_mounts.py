"""Mounts of real filesystems."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from thinpool import errors
from thinpool.host import loop, mountinfo, mounts, syscalls
from thinpool.host.mounts import MountAttribute

REPOSITORY = str(Path(mounts.__file__).parents[2])


@pytest.fixture
def _devices(require):
    require("root", "loop", "ext4")


@pytest.fixture
def device(_devices, formatted):
    attached = loop.attach(formatted())
    yield attached
    loop.detach(attached)


@pytest.fixture(params=["new", "classic"])
def api(request, monkeypatch):
    """Both ways to mount: the new mount API, and mount(2) where the kernel lacks it."""
    if request.param == "classic":

        def absent(fstype):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(syscalls, "fsopen", absent)
    return request.param


def test_options_are_told_apart_and_the_later_wins():
    parsed = mounts.parse_options(["nodev,nosuid", "dev,noatime,data=ordered", 'context="a,b"'])
    assert parsed.attributes == MountAttribute.NOSUID | MountAttribute.NOATIME
    assert parsed.filesystem == ("data=ordered", 'context="a,b"')
    assert not parsed.read_only
    assert mounts.parse_options(["ro", "rw"]).read_only is False
    assert mounts.parse_options(["rw"], read_only=True).read_only is True
    assert mounts.parse_options(["strictatime,noatime"]).attributes == MountAttribute.NOATIME
    assert mounts.parse_options(["noatime,relatime"]).attributes == MountAttribute(0)


@pytest.mark.parametrize("option", ["bind", "remount", "shared", "loop"])
def test_options_that_would_do_something_else_are_refused(option):
    with pytest.raises(errors.UsageError):
        mounts.parse_options([f"noatime,{option}"])


def test_mount_and_unmount(device, directory, api):
    mounts.mount(device.path, directory, "ext4", ["nodev,nosuid,noatime,errors=continue"])
    entry = mountinfo.mount_at(directory)
    assert entry is not None
    assert entry.device == device.device
    assert {"nodev", "nosuid", "noatime"} <= set(entry.options.split(","))
    assert mounts.unmount(directory) is True
    assert mounts.unmount(directory) is False
    assert mountinfo.mount_at(directory) is None


def test_a_link_to_the_directory_is_followed(device, directory, work, api):
    (work / "link").symlink_to(directory)
    mounts.mount(device.path, str(work / "link"), "ext4")
    found = mountinfo.mount_at(str(work / "link"))
    assert found is not None
    assert found.mount_point == directory
    mounts.unmount(directory)


def test_a_device_that_is_mounted_otherwise_is_busy_and_says_where(device, directory, work, api):
    mounts.mount(device.path, directory, "ext4", read_only=True)
    (work / "other").mkdir()
    with pytest.raises(errors.BusyError) as caught:
        mounts.mount(device.path, str(work / "other"), "ext4")
    assert directory in caught.value.holder
    mounts.unmount(directory)


def test_an_error_of_the_body_leaves_a_detached_mount_as_it_is(device):
    with (
        pytest.raises(OSError, match="made up") as caught,
        mounts.detached_mount(device.path, "ext4"),
    ):
        raise OSError(errno.EIO, "made up")
    assert caught.value.errno == errno.EIO
    assert loop.detach(device)


def test_a_read_only_mount_writes_nothing(device, directory, api):
    mounts.mount(device.path, directory, "ext4", read_only=True)
    entry = mountinfo.mount_at(directory)
    assert entry is not None
    assert "ro" in entry.options.split(",")
    assert "ro" in entry.super_options.split(",")
    with pytest.raises(OSError, match="Read-only"):
        (Path(directory) / "x").write_text("x")
    mounts.unmount(directory)


def test_a_busy_mount_names_its_user(device, directory):
    mounts.mount(device.path, directory, "ext4")
    user = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        cwd=directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert user.stdout is not None
    user.stdout.readline()
    with pytest.raises(errors.BusyError) as caught:
        mounts.unmount(directory, timeout=0.05)
    assert f"process {user.pid}" in caught.value.holder
    user.communicate(b"\n")
    mounts.unmount(directory)


def test_a_mount_below_is_named(device, directory):
    mounts.mount(device.path, directory, "ext4")
    below = Path(directory) / "below"
    below.mkdir()
    mounts.mount("none", str(below), "tmpfs", ["size=64k"])
    with pytest.raises(errors.BusyError) as caught:
        mounts.unmount(directory, timeout=0.05)
    assert str(below) in caught.value.holder
    mounts.unmount(str(below))
    mounts.unmount(directory)


def test_refusals_are_typed(device, directory, sparse, api):
    with pytest.raises(errors.NotFoundError):
        mounts.mount("/dev/absent", directory, "ext4")
    with pytest.raises(errors.NotFoundError):
        mounts.mount(device.path, directory + "/absent", "ext4")
    with pytest.raises(errors.NotFoundError):
        mounts.mount(device.path, directory, "nosuchfs")
    with pytest.raises(errors.StorageIOError) as caught:
        mounts.mount(device.path, directory, "ext4", ["nosuchoption"])
    assert caught.value.errno == errno.EINVAL
    blank = loop.attach(sparse(name="blank"))
    try:
        with pytest.raises(errors.StorageIOError):
            mounts.mount(blank.path, directory, "ext4")
    finally:
        loop.detach(blank)
    assert mountinfo.mount_at(directory) is None


def test_a_detached_mount_is_nowhere_and_writes_back(device, api):
    with mounts.detached_mount(device.path, "ext4", ["nodev"]) as root:
        assert all(entry.device != device.device for entry in mountinfo.own_mounts())
        fd = os.open("file", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=root)
        os.write(fd, b"hello")
        os.close(fd)
        assert os.stat("..", dir_fd=root).st_ino == os.fstat(root).st_ino
        with pytest.raises(errors.BusyError):
            loop.detach(device, timeout=0.05)
    with mounts.detached_mount(device.path, "ext4", read_only=True) as root:
        fd = os.open("file", os.O_RDONLY, dir_fd=root)
        assert os.read(fd, 10) == b"hello"
        os.close(fd)


def test_a_detached_mount_ends_with_a_killed_process(device, api):
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            (
                "import sys\nfrom thinpool.host import mounts\n"
                "with mounts.detached_mount(sys.argv[1], 'ext4'):\n print(flush=True); input()"
            ),
            device.path,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": REPOSITORY},
    )
    assert child.stdout is not None
    assert child.stdin is not None
    child.stdout.readline()
    with pytest.raises(errors.BusyError) as caught:
        loop.detach(device, timeout=0.05)
    assert f"process {child.pid}" in caught.value.holder
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    child.stdin.close()
    assert loop.detach(device)


def test_mounts_in_other_namespaces_are_found_and_named(device, directory):
    child = subprocess.Popen(
        [
            "unshare",
            "-m",
            "sh",
            "-c",
            'mount "$0" "$1" && echo && read x && umount "$1"',
            device.path,
            directory,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    (found,) = mountinfo.mounts_of_device(device.device)
    assert found.foreign
    assert os.stat(found.reachable_path).st_dev == device.device
    with pytest.raises(errors.BusyError) as caught:
        loop.detach(device, timeout=0.05)
    assert f"{directory} in the namespace of process {found.pid}" in caught.value.holder
    child.communicate(b"\n")
    assert mountinfo.mounts_of_device(device.device) == []


@pytest.fixture
def dead_fuse(require, directory):
    """A FUSE mount whose server answers nothing."""
    require("root", "fuse")
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    mounts.mount(
        "dead", directory, "fuse", [f"fd={fd},rootmode=40000,user_id=0,group_id=0", "nodev"]
    )
    yield directory
    os.close(fd)
    mounts.unmount(directory, lazy=True)


def test_a_fuse_server_that_hangs_is_found_and_aborted(dead_fuse):
    (found,) = mounts.fuse_mounts(dead_fuse)
    waiter = subprocess.Popen(
        ["stat", dead_fuse], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with pytest.raises(subprocess.TimeoutExpired):
        waiter.wait(0.3)
    assert (mounts.waiting_requests(found.connection) or 0) >= 1
    assert mounts.abort_fuse(found.connection) is True
    assert waiter.wait(5) != 0
    assert mounts.unmount(dead_fuse, lazy=True)
    assert mounts.fuse_mounts(dead_fuse) == []
    # Its number may be another's already, of a test that runs beside this one.
    assert not mounts.waiting_requests(found.connection)
