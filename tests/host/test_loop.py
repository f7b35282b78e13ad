"""Loop devices over plain files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from thinpool import errors
from thinpool.host import loop, mounts

pytestmark = [pytest.mark.loop, pytest.mark.root]

MIB = 1 << 20


def test_an_attached_device_is_what_was_asked_for(sparse):
    path = sparse(8 * MIB)
    device = loop.attach(path)
    try:
        assert device.backing_file == path
        assert device.direct_io
        assert not device.autoclear
        assert not device.read_only
        assert os.stat(device.path).st_rdev == device.device
        with open(device.path, "rb") as file:
            assert file.seek(0, os.SEEK_END) == 8 * MIB
        queue = Path(f"/sys/block/loop{device.number}/queue")
        assert (queue / "logical_block_size").read_text().strip() == "512"
    finally:
        assert loop.detach(device)
    now = loop.describe_number(device.number)
    assert now is None or now.backing_file != device.backing_file  # another's already


def test_what_is_written_to_the_device_is_in_the_file(sparse):
    path = sparse(MIB)
    device = loop.attach(path, offset=4096, size_limit=512 * 1024)
    try:
        assert (device.offset, device.size_limit) == (4096, 512 * 1024)
        fd = os.open(device.path, os.O_RDWR)
        try:
            assert os.lseek(fd, 0, os.SEEK_END) == 512 * 1024
            os.pwrite(fd, b"x" * 512, 512)
            os.fsync(fd)
        finally:
            os.close(fd)
    finally:
        loop.detach(device)
    assert Path(path).read_bytes()[4096 + 512 : 4096 + 1024] == b"x" * 512


def test_a_read_only_device_takes_no_writes(sparse):
    path = sparse()
    os.chmod(path, 0o400)
    device = loop.attach(path, read_only=True)
    try:
        assert device.read_only
        before = Path(path).read_bytes()
        with (
            pytest.raises(OSError, match=r"not permitted|Read-only|denied"),
            open(device.path, "r+b", buffering=0) as disk,
        ):
            disk.write(b"x" * 4096)
        assert Path(path).read_bytes() == before
    finally:
        loop.detach(device)


def test_detach_is_repeatable_and_never_takes_a_successor_down(sparse):
    first = loop.attach(sparse(name="a"))
    assert loop.detach(first) is True
    assert loop.detach(first) is False
    second = loop.attach(sparse(name="b"))
    try:
        assert second.number == first.number, "the number is expected to be reused"
        assert loop.detach(first) is False
        assert loop.describe_number(second.number) == second
    finally:
        assert loop.detach(second.path) is True
    assert loop.detach(second.path) is False


def test_detach_of_a_mounted_device_names_the_mount(formatted, directory):
    device = loop.attach(formatted())
    mounts.mount(device.path, directory, "ext4")
    try:
        with pytest.raises(errors.BusyError) as caught:
            loop.detach(device, timeout=0.05)
        assert directory in caught.value.holder
        assert loop.describe_number(device.number) == device, "it stays, without auto-clear"
    finally:
        mounts.unmount(directory)
        loop.detach(device)


def test_detach_of_an_open_device_names_the_process_and_keeps_it(sparse):
    device = loop.attach(sparse())
    reader = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; f=open(sys.argv[1]); print(flush=True); input()",
            device.path,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert reader.stdout is not None
    reader.stdout.readline()
    try:
        with pytest.raises(errors.BusyError) as caught:
            loop.detach(device, timeout=0.05)
        assert f"process {reader.pid}" in caught.value.holder
        assert loop.describe_number(device.number) == device
    finally:
        reader.communicate(b"\n")
    assert loop.describe_number(device.number) == device, "it outlives its last user"
    assert loop.detach(device)


def test_detach_waits_for_one_who_only_looks(sparse):
    device = loop.attach(sparse())
    fd = os.open(device.path, os.O_RDONLY)
    timer = threading.Timer(0.2, os.close, (fd,))
    timer.start()
    assert loop.detach(device)
    timer.join()


def test_a_file_without_direct_io_is_refused_and_nothing_stays(sparse, formatted, directory):
    """A filesystem with 4 KiB sectors below can't do direct I/O in units of 512 bytes."""
    below = loop.attach(sparse(320 * MIB), sector_size=4096)
    try:
        subprocess.run(["mkfs.ext4", "-q", below.path], check=True)
        mounts.mount(below.path, directory, "ext4")
        path = Path(directory) / "disk"
        path.write_bytes(bytes(MIB))
        with pytest.raises(errors.UnsupportedHostError) as caught:
            loop.attach(path)
        assert caught.value.missing == "direct I/O"
        assert loop.find(path) == []
        device = loop.attach(path, sector_size=4096)
        assert device.direct_io
        loop.detach(device)
        mounts.unmount(directory)
    finally:
        loop.detach(below)


def test_files_that_cannot_be_disks_are_typed_errors(work, sparse):
    with pytest.raises(errors.NotFoundError):
        loop.attach(work / "absent")
    with pytest.raises((errors.UsageError, errors.ThinpoolError)):
        loop.attach(work)
    with pytest.raises(errors.UsageError):
        loop.attach("/dev/null")
    with pytest.raises(errors.UsageError):
        loop.attach(sparse(), offset=100)
    with pytest.raises(errors.UsageError):
        loop.detach("/dev/null")
    with pytest.raises(errors.NotFoundError):
        loop.detach(str(work / "absent"))


def test_find_goes_by_the_file_not_its_name(sparse, work):
    path = sparse()
    os.link(path, work / "other-name")
    device = loop.attach(path)
    try:
        assert loop.find(path) == [device]
        assert loop.find(work / "other-name") == [device]
        assert loop.find_below(work) == [device]
        os.rename(path, work / "deleted")
        os.unlink(work / "deleted")
        os.unlink(work / "other-name")
        sparse()  # a new file of the same name is another file
        assert loop.find(path) == []
        shown = loop.describe_number(device.number)
        assert shown is not None
        assert shown.deleted
    finally:
        loop.detach(device)


def test_the_device_follows_a_grown_file(sparse):
    path = sparse(8 * MIB)
    device = loop.attach(path)
    try:
        os.truncate(path, 24 * MIB)
        assert loop.set_capacity(device) == 24 * MIB
    finally:
        loop.detach(device)


def test_discard_reaches_the_file_even_if_an_earlier_user_turned_it_off(sparse):
    path = sparse(4 * MIB)
    Path(path).write_bytes(b"x" * 4 * MIB)
    device = loop.attach(path)
    Path(f"/sys/block/loop{device.number}/queue/discard_max_bytes").write_text("0")
    loop.detach(device)
    device = loop.attach(path)
    try:
        subprocess.run(["blkdiscard", device.path], check=True)
    finally:
        loop.detach(device)
    assert os.stat(path).st_blocks == 0


def test_many_are_attached_at_once_by_threads_and_another_process(sparse):
    paths = [sparse(MIB, f"disk{n}") for n in range(24)]
    child = (
        "import sys; from thinpool.host import loop\n"
        "for path in sys.argv[1:]: print(loop.attach(path).number, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", child, *paths[12:]],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(loop.__file__).parents[2])},
    ) as other:
        with ThreadPoolExecutor(4) as threads:
            devices = list(threads.map(loop.attach, paths[:12]))
        out, _ = other.communicate()
    numbers = [device.number for device in devices] + [int(line) for line in out.split()]
    assert len(set(numbers)) == 24
    for path in paths:
        (device,) = loop.find(path)
        assert device.backing_file == path
        assert loop.detach(device)
