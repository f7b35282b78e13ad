"""What a block device promises: contents, ranges, holes, sizes, locks and honest errors."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time

import pytest

from thinpool._native import ffi, lib

KIB = 1024
MIB = 1024 * KIB
CLOCK_REALTIME_COARSE = 5  # linux/time.h: what a file's times are taken from


@pytest.fixture(params=["buffered", "direct", "memory"])
def device(request, opener, tmp_path):
    """A device of 1 MiB of zeros, of each kind."""
    if request.param == "memory":
        return opener.memory(MIB)
    return open_file(request.param, opener, tmp_path)


@pytest.fixture(params=["buffered", "direct"])
def file_device(request, opener, tmp_path):
    return open_file(request.param, opener, tmp_path)


def open_file(kind, opener, tmp_path):
    flags = lib.TP_BDEV_CREATE | (lib.TP_BDEV_DIRECT if kind == "direct" else 0)
    return opener.file(tmp_path / "device", flags, MIB)


def test_a_new_device_reads_as_zeros(device):
    assert device.size == MIB
    assert device.read(0, MIB) == bytes(MIB)


def test_random_writes_and_punches_read_back_as_a_bytearray_model(device, rng):
    model = bytearray(MIB)
    step = device.io_align
    for _ in range(300):
        begin = rng.randrange(0, MIB // step) * step
        length = min(rng.choice([1, 2, 7, 64, 300]) * (step if step > 1 else 97), MIB - begin)
        if rng.random() < 0.25 and device.can_punch:
            device.punch(begin, length)
            model[begin : begin + length] = bytes(length)
        else:
            data = rng.randbytes(length)
            device.write(begin, data)
            model[begin : begin + length] = data
    assert device.read(0, MIB) == model


@pytest.mark.parametrize("misalignment", [0, 1, 3, 8, 511])
def test_a_buffer_of_any_memory_alignment_is_taken(device, misalignment):
    data = random.Random(misalignment).randbytes(600 * KIB)
    room = ffi.new("unsigned char[]", len(data) + 8192)
    base = int(ffi.cast("uintptr_t", room))
    at = room + (-base % 4096) + misalignment
    ffi.memmove(at, data, len(data))
    err = ffi.new("struct tp_error *")
    assert lib.tp_bdev_write(device.ptr, 4096, at, len(data), err) == 0
    ffi.memmove(at, bytes(len(data)), len(data))
    assert lib.tp_bdev_read(device.ptr, 4096, at, len(data), err) == 0
    assert bytes(ffi.buffer(at, len(data))) == data
    assert device.read(4096, len(data)) == data


@pytest.mark.parametrize(
    ("offset", "length"),
    [(MIB, 4096), (MIB - 4096, 8192), (2**64 - 4096, 4096), (2**63, 2**20), (4096, MIB)],
)
def test_nothing_past_the_end_is_touched(device, core_error, offset, length):
    for operation in (
        lambda: device.read(offset, length),
        lambda: device.write(offset, bytes(length)),
        lambda: device.punch(offset, length),
    ):
        with pytest.raises(core_error) as caught:
            operation()
        assert caught.value.status == lib.TP_E_OUT_OF_RANGE
    assert device.size == MIB


def test_an_operation_of_no_bytes_does_nothing(device):
    device.write(0, b"")
    device.punch(MIB, 0)
    assert device.read(MIB, 0) == b""


def test_direct_io_refuses_what_does_not_fit_its_alignment(opener, tmp_path, core_error):
    device = open_file("direct", opener, tmp_path)
    assert device.io_align in (512, 4096)
    for operation in (
        lambda: device.read(1, device.io_align),
        lambda: device.write(0, b"x"),
        lambda: device.punch(0, device.io_align + 1),
        lambda: device.resize(device.io_align + 1),
    ):
        with pytest.raises(core_error) as caught:
            operation()
        assert caught.value.status == lib.TP_E_ALIGNMENT


def test_punch_returns_the_space_and_reads_as_zeros(device, tmp_path):
    assert device.can_punch
    device.write(0, b"\xff" * MIB)
    device.flush()
    step = device.io_align
    device.punch(64 * KIB + step, 512 * KIB)
    assert device.read(0, 64 * KIB + step) == b"\xff" * (64 * KIB + step)
    assert device.read(64 * KIB + step, 512 * KIB) == bytes(512 * KIB)
    rest = 64 * KIB + step + 512 * KIB
    assert device.read(rest, MIB - rest) == b"\xff" * (MIB - rest)
    assert device.size == MIB
    if (tmp_path / "device").exists():
        assert (tmp_path / "device").stat().st_blocks * 512 <= 520 * KIB


def test_next_data_finds_what_was_written_and_nothing_else(device):
    assert device.next_data(0) == (MIB, MIB)
    device.write(256 * KIB, b"a" * 64 * KIB)
    device.write(MIB - 4096, b"b" * 4096)
    device.flush()
    assert device.next_data(0) == (256 * KIB, 320 * KIB)
    assert device.next_data(260 * KIB) == (260 * KIB, 320 * KIB)
    assert device.next_data(320 * KIB) == (MIB - 4096, MIB)
    assert device.next_data(MIB) == (MIB, MIB)
    device.punch(256 * KIB, 64 * KIB)
    assert device.next_data(0) == (MIB - 4096, MIB)


def test_next_data_past_the_end_is_an_error(device, core_error):
    with pytest.raises(core_error) as caught:
        device.next_data(MIB + 1)
    assert caught.value.status == lib.TP_E_OUT_OF_RANGE


def test_what_a_shrink_cut_off_comes_back_as_zeros(device):
    device.write(0, b"z" * MIB)
    device.resize(512 * KIB - device.io_align)
    assert device.size == 512 * KIB - device.io_align
    device.flush()
    device.resize(2 * MIB)
    assert device.size == 2 * MIB
    kept = 512 * KIB - device.io_align
    assert device.read(0, kept) == b"z" * kept
    assert device.read(kept, 2 * MIB - kept) == bytes(2 * MIB - kept)
    device.flush()


def test_resize_to_nothing_takes_the_size_the_file_has_now(file_device, tmp_path):
    os.truncate(tmp_path / "device", 3 * MIB)
    assert file_device.size == MIB
    file_device.resize(0)
    assert file_device.size == 3 * MIB


def test_create_refuses_a_path_that_is_taken_and_leaves_it_alone(opener, tmp_path, core_error):
    (tmp_path / "device").write_bytes(b"mine")
    with pytest.raises(core_error) as caught:
        open_file("buffered", opener, tmp_path)
    assert caught.value.status == lib.TP_E_NOT_EMPTY
    assert (tmp_path / "device").read_bytes() == b"mine"


def test_a_create_that_fails_leaves_no_file(opener, tmp_path, core_error):
    with pytest.raises(core_error) as caught:
        opener.file(tmp_path / "device", lib.TP_BDEV_CREATE, 2**62)
    assert caught.value.status == lib.TP_E_IO
    assert caught.value.errno == errno.EFBIG
    assert not (tmp_path / "device").exists()


def test_a_created_file_is_its_owners_alone(opener, tmp_path):
    open_file("buffered", opener, tmp_path)
    assert (tmp_path / "device").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("what", ["missing", "directory", "fifo", "loop"])
def test_what_is_no_file_cannot_be_opened(opener, tmp_path, core_error, what):
    path = tmp_path / what
    expected = {"missing": errno.ENOENT, "directory": errno.EISDIR, "fifo": 0, "loop": errno.ELOOP}
    if what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path)
    with pytest.raises(core_error) as caught:
        opener.file(path)
    assert caught.value.status == lib.TP_E_OPEN
    assert caught.value.errno == expected[what]


@pytest.mark.parametrize(
    "flags",
    [
        64,
        lib.TP_BDEV_CREATE | lib.TP_BDEV_READ_ONLY,
        lib.TP_BDEV_EXCLUSIVE | lib.TP_BDEV_SHARED_LOCK,
    ],
)
def test_flags_that_cannot_be_are_refused(opener, tmp_path, core_error, flags):
    with pytest.raises(core_error) as caught:
        opener.file(tmp_path / "device", flags, MIB)
    assert caught.value.status == lib.TP_E_INVALID
    assert not (tmp_path / "device").exists()


def test_a_read_only_device_refuses_every_change(opener, tmp_path, core_error):
    (tmp_path / "device").write_bytes(b"a" * MIB)
    device = opener.file(tmp_path / "device", lib.TP_BDEV_READ_ONLY)
    assert device.read(0, MIB) == b"a" * MIB
    for operation in (
        lambda: device.write(0, b"b"),
        lambda: device.punch(0, 4096),
        lambda: device.resize(4096),
    ):
        with pytest.raises(core_error) as caught:
            operation()
        assert caught.value.status == lib.TP_E_READ_ONLY
    device.flush()
    assert (tmp_path / "device").read_bytes() == b"a" * MIB


def test_an_exclusive_device_keeps_every_other_lock_out(opener, tmp_path, core_error):
    first = opener.file(tmp_path / "device", lib.TP_BDEV_CREATE | lib.TP_BDEV_EXCLUSIVE, MIB)
    for flags in (lib.TP_BDEV_EXCLUSIVE, lib.TP_BDEV_SHARED_LOCK):
        with pytest.raises(core_error) as caught:
            opener.file(tmp_path / "device", flags)
        assert caught.value.status == lib.TP_E_BUSY
    first.close()
    opener.file(tmp_path / "device", lib.TP_BDEV_EXCLUSIVE)


def test_shared_locks_stand_together_and_keep_an_exclusive_one_out(opener, tmp_path, core_error):
    (tmp_path / "device").write_bytes(bytes(MIB))
    first = opener.file(tmp_path / "device", lib.TP_BDEV_SHARED_LOCK)
    second = opener.file(tmp_path / "device", lib.TP_BDEV_SHARED_LOCK)
    first.close()
    with pytest.raises(core_error) as caught:
        opener.file(tmp_path / "device", lib.TP_BDEV_EXCLUSIVE)
    assert caught.value.status == lib.TP_E_BUSY
    second.close()
    opener.file(tmp_path / "device", lib.TP_BDEV_EXCLUSIVE)


def test_a_lock_ends_with_the_process_that_held_it(opener, tmp_path, core_error):
    (tmp_path / "device").write_bytes(bytes(MIB))
    program = (
        "import sys\n"
        "from thinpool._native import ffi, lib\n"
        "out = ffi.new('struct tp_bdev **')\n"
        "path = sys.argv[1].encode()\n"
        "assert lib.tp_bdev_file_open(path, lib.TP_BDEV_EXCLUSIVE, 0, out, ffi.NULL) == 0\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "device")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(core_error) as caught:
            opener.file(tmp_path / "device", lib.TP_BDEV_EXCLUSIVE)
        assert caught.value.status == lib.TP_E_BUSY
        holder.kill()
    opener.file(tmp_path / "device", lib.TP_BDEV_EXCLUSIVE)


def test_a_read_of_a_truncated_file_fails_and_says_where_it_ends(file_device, tmp_path, core_error):
    file_device.write(0, b"x" * MIB)
    os.truncate(tmp_path / "device", 512 * KIB)
    assert file_device.read(0, 512 * KIB) == b"x" * 512 * KIB
    with pytest.raises(core_error) as caught:
        file_device.read(508 * KIB, 8 * KIB)
    assert caught.value.status == lib.TP_E_IO
    assert caught.value.errno == 0
    assert (caught.value.found, caught.value.wanted) == (4096, 8192)


def test_a_flush_of_a_truncated_file_fails_for_good(file_device, tmp_path, core_error):
    os.truncate(tmp_path / "device", 512 * KIB)
    for _ in range(2):
        with pytest.raises(core_error) as caught:
            file_device.flush()
        assert caught.value.status == lib.TP_E_IO
        os.truncate(tmp_path / "device", MIB)


def test_a_flush_of_a_removed_file_fails_but_its_data_can_still_be_read(
    file_device, tmp_path, core_error
):
    file_device.write(0, b"k" * 4096)
    file_device.flush()
    (tmp_path / "device").unlink()
    with pytest.raises(core_error) as caught:
        file_device.flush()
    assert caught.value.status == lib.TP_E_IO
    assert caught.value.errno == errno.ENOENT
    assert file_device.read(0, 4096) == b"k" * 4096


def test_a_file_that_never_had_a_name_flushes(opener, tmp_path):
    fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
    try:
        os.truncate(fd, MIB)
        device = opener.file(f"/proc/self/fd/{fd}")
        device.write(0, b"t" * 4096)
        device.flush()
    finally:
        os.close(fd)


def test_a_direct_device_shows_no_tail_that_it_cannot_reach(opener, tmp_path):
    (tmp_path / "device").write_bytes(bytes(MIB + 100))
    device = opener.file(tmp_path / "device", lib.TP_BDEV_DIRECT)
    assert device.size == MIB
    assert opener.file(tmp_path / "device").size == MIB + 100


@pytest.fixture
def small_filesystem(tmp_path, require):
    """A mounted filesystem with room for 1 MiB."""
    require("root")
    where = tmp_path / "small"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", where]
    subprocess.run(command, check=True)
    yield where
    subprocess.run(["umount", where], check=True)


@pytest.fixture
def filesystem_without_direct_io(tmp_path, require):
    require("root")
    where = tmp_path / "ram"
    where.mkdir()
    command = ["mount", "-t", "ramfs", "ramfs", where]
    subprocess.run(command, check=True)
    yield where
    subprocess.run(["umount", where], check=True)


def test_direct_io_is_refused_where_there_is_none_and_no_file_is_left(
    filesystem_without_direct_io, opener, core_error
):
    path = filesystem_without_direct_io / "device"
    with pytest.raises(core_error) as caught:
        opener.file(path, lib.TP_BDEV_CREATE | lib.TP_BDEV_DIRECT, MIB)
    assert caught.value.status == lib.TP_E_NOT_SUPPORTED
    assert not path.exists()
    opener.file(path, lib.TP_BDEV_CREATE, MIB).close()
    with pytest.raises(core_error) as caught:
        opener.file(path, lib.TP_BDEV_DIRECT)
    assert caught.value.status == lib.TP_E_NOT_SUPPORTED


def test_a_full_host_is_told_by_its_errno(small_filesystem, opener, core_error):
    device = opener.file(small_filesystem / "device", lib.TP_BDEV_CREATE, 4 * MIB)
    device.write(0, b"f" * 512 * KIB)
    with pytest.raises(core_error) as caught:
        device.write(512 * KIB, b"f" * MIB)
    assert caught.value.status == lib.TP_E_IO
    assert caught.value.errno == errno.ENOSPC
    device.punch(0, 512 * KIB)
    device.write(MIB, b"g" * 256 * KIB)
    assert device.read(MIB, 256 * KIB) == b"g" * 256 * KIB
    device.close()


def test_a_flush_does_not_ask_for_the_times_of_a_file(file_device, tmp_path):
    """Where it did, Linux 6.13 and later would give the file a new one with the next write."""
    for _ in range(100):
        time.sleep(0.012)  # a tick of the coarse clock, at 100 Hz too
        before = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
        file_device.write(0, bytes(4096))
        file_device.flush()
        file_device.write(0, bytes(4096))
        tick = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
        # Others who ask for times of theirs in that tick make ours finer, too.
        if before == tick == (tmp_path / "device").stat().st_mtime_ns:
            return
    pytest.fail("each write after a flush had a time of its own")
