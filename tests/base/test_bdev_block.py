"""Real block devices (loop devices over a file) keep the same promises as files."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest

from thinpool._native import lib

KIB = 1024
MIB = 1024 * KIB

pytestmark = pytest.mark.loop


def losetup(*arguments):
    command = ["losetup", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(params=[512, 4096])
def sector_size(request):
    return request.param


@pytest.fixture
def loop(tmp_path, sector_size):
    """The path of a loop device of 1 MiB; what opens it must be closed before."""
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xff" * MIB)
    path = losetup("--find", "--show", "--sector-size", str(sector_size), str(backing))
    yield path
    losetup("--detach", path)


@pytest.fixture
def opener_of(loop, opener):
    """Opened devices are closed before the loop device goes."""

    def opened(flags):
        return opener.file(loop, flags)

    yield opened
    for device in reversed(opener.opened):
        device.close()


@pytest.fixture(params=["buffered", "direct"])
def device(request, opener_of):
    return opener_of(lib.TP_BDEV_DIRECT if request.param == "direct" else 0)


def test_size_and_alignment_are_the_devices(opener_of, sector_size):
    assert opener_of(0).io_align == 1
    direct = opener_of(lib.TP_BDEV_DIRECT)
    assert direct.size == MIB
    assert direct.io_align == sector_size


def test_writes_read_back_and_survive_a_flush(device, rng):
    data = rng.randbytes(64 * KIB)
    device.write(128 * KIB, data)
    device.flush()
    assert device.read(128 * KIB, 64 * KIB) == data
    assert device.read(0, 4096) == b"\xff" * 4096


def test_punch_reads_as_zeros_and_returns_the_space(device, tmp_path):
    assert device.can_punch
    device.punch(0, 512 * KIB)
    device.flush()
    assert device.read(0, MIB) == bytes(512 * KIB) + b"\xff" * 512 * KIB
    assert (tmp_path / "backing").stat().st_blocks * 512 <= 520 * KIB


@pytest.mark.parametrize(("begin", "length"), [(1, 3), (100, 20000), (511, 2), (4096, 4097)])
def test_a_buffered_punch_of_any_range_zeroes_just_that(opener_of, begin, length):
    device = opener_of(0)
    device.punch(begin, length)
    device.flush()
    rest = MIB - begin - length
    assert device.read(0, MIB) == b"\xff" * begin + bytes(length) + b"\xff" * rest


def test_a_device_that_cannot_tell_says_that_all_is_data(device):
    assert device.next_data(4096) == (4096, MIB)


def test_an_exclusive_device_is_refused_while_another_has_it(opener_of, loop, core_error):
    first = opener_of(lib.TP_BDEV_EXCLUSIVE)
    with pytest.raises(core_error) as caught:
        opener_of(lib.TP_BDEV_EXCLUSIVE)
    assert caught.value.status == lib.TP_E_BUSY
    first.close()
    fd = os.open(loop, os.O_RDWR | os.O_EXCL)  # as a mount has it
    try:
        with pytest.raises(core_error) as caught:
            opener_of(lib.TP_BDEV_EXCLUSIVE)
    finally:
        os.close(fd)
    assert caught.value.status == lib.TP_E_BUSY
    assert caught.value.errno == errno.EBUSY


def test_a_block_device_cannot_be_created(opener_of, core_error):
    with pytest.raises(core_error) as caught:
        opener_of(lib.TP_BDEV_CREATE)
    assert caught.value.status == lib.TP_E_NOT_EMPTY


def test_a_grown_device_is_taken_at_its_new_size(device, loop, tmp_path, core_error):
    with pytest.raises(core_error) as caught:
        device.resize(2 * MIB)
    assert caught.value.status == lib.TP_E_OUT_OF_RANGE
    os.truncate(tmp_path / "backing", 2 * MIB)
    losetup("--set-capacity", loop)
    assert device.size == MIB
    device.resize(0)
    assert device.size == 2 * MIB
    device.write(2 * MIB - 4096, b"e" * 4096)
    device.resize(MIB)
    assert device.size == MIB


@pytest.fixture
def shrink(loop, tmp_path):
    """Cuts the loop device short while it is open, to 0 as one that is pulled out is."""

    def shrunk(size):
        os.truncate(tmp_path / "backing", size)
        losetup("--set-capacity", loop)

    return shrunk


@pytest.mark.parametrize("left", [0, 512 * KIB])
def test_a_write_past_what_is_left_of_a_device_is_no_full_disk(device, shrink, core_error, left):
    shrink(left)
    with pytest.raises(core_error) as caught:
        device.write(768 * KIB, bytes(64 * KIB))
    assert caught.value.status == lib.TP_E_IO
    assert caught.value.errno == errno.ENODEV
    assert "gone or became smaller" in str(caught.value)


@pytest.mark.parametrize("left", [0, 512 * KIB])
def test_a_flush_of_a_device_cut_short_fails_for_good(device, shrink, core_error, left):
    device.flush()
    shrink(left)
    with pytest.raises(core_error) as caught:
        device.flush()
    assert (caught.value.found, caught.value.wanted) == (left, MIB)
    shrink(MIB)
    with pytest.raises(core_error) as again:
        device.flush()
    assert again.value.status == lib.TP_E_IO
    assert again.value.errno == errno.ENODEV


def test_a_device_that_grew_flushes(device, shrink):
    shrink(2 * MIB)
    device.write(0, b"g" * 4096)
    device.flush()
    assert device.read(0, 4096) == b"g" * 4096
