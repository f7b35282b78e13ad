"""Volumes as files in a real FUSE mount."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fuse.conftest import BLOCK, MIB, Server, attached
from thinpool.host import syscalls

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

pytestmark = pytest.mark.fuse

KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 1, 2, 8, 16


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    import ctypes  # noqa: PLC0415

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    if libc.fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def sync(directory: Path) -> None:
    """That filesystem alone: a global sync would wait for whatever else this host does."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    syscalls.syncfs(fd)
    os.close(fd)


def names_in(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def opened(path: Path, flags: int = os.O_RDWR) -> int:
    return os.open(path, flags | os.O_CLOEXEC)


def test_unwritten_volume_reads_as_zeros_and_writes_come_back(server: Server) -> None:
    path = server.volume(1, 8 * MIB)
    assert path.stat().st_size == 8 * MIB
    assert path.stat().st_mode == 0o100600
    with path.open("r+b", buffering=0) as file:
        assert file.read(3 * MIB) == bytes(3 * MIB)
        file.seek(BLOCK - 5)
        file.write(b"across two blocks")
        file.seek(0)
        found = file.read(2 * BLOCK)
    wanted = bytearray(2 * BLOCK)
    wanted[BLOCK - 5 : BLOCK + 12] = b"across two blocks"
    assert found == bytes(wanted)
    assert path.stat().st_blocks * 512 == 2 * BLOCK


def test_random_work_equals_a_plain_model(server: Server, rng: random.Random) -> None:
    size = 2 * MIB
    model = bytearray(size)
    fd = opened(server.volume(1, size))
    try:
        for _ in range(400):
            align = rng.choice([1, 512, 4096])
            offset = rng.randrange(0, size, align)
            length = min(rng.choice([1, align, 4096, BLOCK, 3 * BLOCK, MIB]), size - offset)
            what = rng.choice(["read", "write", "punch", "zero"])
            if what == "read":
                assert os.pread(fd, length, offset) == model[offset : offset + length]
            elif what == "write":
                data = rng.randbytes(length)
                assert os.pwrite(fd, data, offset) == length
                model[offset : offset + length] = data
            else:
                mode = KEEP_SIZE | (PUNCH_HOLE if what == "punch" else ZERO_RANGE)
                fallocate(fd, mode, offset, length)
                model[offset : offset + length] = bytes(length)
        assert os.pread(fd, size, 0) == model
    finally:
        os.close(fd)


def test_the_end_of_the_file_is_a_disks(server: Server) -> None:
    size = MIB + 512
    fd = opened(server.volume(1, size))
    try:
        assert os.pread(fd, 4096, size - 512) == bytes(512)
        assert os.pread(fd, 4096, size + 4096) == b""
        assert os.pwrite(fd, b"x" * 4096, size - 512) == 512
        with pytest.raises(OSError, match="No space left") as caught:
            os.pwrite(fd, b"x", size)
        assert caught.value.errno == errno.ENOSPC
        for change in (0, size - 1, size + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, change)
        os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            os.fchmod(fd, 0o666)
        os.utime(fd)
        assert os.fstat(fd).st_size == size
    finally:
        os.close(fd)


def test_fallocate_modes(server: Server) -> None:
    fd = opened(server.volume(1, MIB))
    try:
        os.pwrite(fd, b"\xaa" * MIB, 0)
        fallocate(fd, 0, 0, MIB)
        fallocate(fd, KEEP_SIZE, 0, MIB)
        with pytest.raises(OSError, match="not supported"):
            fallocate(fd, 0, 0, MIB + 1)
        with pytest.raises(OSError, match="not supported"):
            fallocate(fd, COLLAPSE, 0, BLOCK)
        # What ext4's lazy initialisation sends on a loop device.
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 536576, 1839104)
        assert os.pread(fd, MIB, 0) == b"\xaa" * 536576 + bytes(MIB - 536576)
        used = server.ask("info")["used"]
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, MIB)
        assert server.ask("info")["used"] < used
    finally:
        os.close(fd)


def test_seeks_and_statfs_show_what_is_mapped(server: Server) -> None:
    path = server.volume(1, 4 * MIB)
    fd = opened(path)
    try:
        with pytest.raises(OSError, match="No such device"):
            os.lseek(fd, 0, os.SEEK_DATA)
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
        os.pwrite(fd, b"x", MIB + 7)
        os.pwrite(fd, b"x", 4 * MIB - 1)
        assert os.lseek(fd, 0, os.SEEK_DATA) == MIB
        assert os.lseek(fd, MIB, os.SEEK_HOLE) == MIB + BLOCK
        assert os.lseek(fd, MIB + BLOCK, os.SEEK_DATA) == 4 * MIB - BLOCK
        assert os.lseek(fd, 4 * MIB - BLOCK, os.SEEK_HOLE) == 4 * MIB
    finally:
        os.close(fd)
    found = os.statvfs(path)
    assert found.f_bsize == BLOCK
    assert found.f_blocks == 256 * MIB // BLOCK
    assert found.f_bfree == found.f_blocks - 2


def test_read_only_file_refuses_to_be_written(server: Server) -> None:
    path = server.volume(1, MIB, read_only=True)
    with pytest.raises(OSError, match="Read-only") as caught:
        opened(path)
    assert caught.value.errno == errno.EROFS
    fd = opened(path, os.O_RDONLY)
    assert os.pread(fd, 10, 0) == bytes(10)
    os.close(fd)


def test_directory_lists_what_is_served_and_nothing_can_be_made_there(server: Server) -> None:
    for number in (3, 1, 12):
        server.volume(number, MIB)
    assert names_in(server.mount_point) == ["id-1", "id-12", "id-3"]
    server.ask("remove", id=1)
    assert names_in(server.mount_point) == ["id-12", "id-3"]
    assert not (server.mount_point / "id-1").exists()
    for name in ("id-01", "id-", "id-3x", "x", "id-99999999999"):
        assert not (server.mount_point / name).exists()
    for refused in (
        (server.mount_point / "new").touch,
        (server.mount_point / "id-3").unlink,
        lambda: (server.mount_point / "id-3").rename(server.mount_point / "id-4"),
        (server.mount_point / "sub").mkdir,
        lambda: (server.mount_point / "link").symlink_to("id-3"),
    ):
        with pytest.raises(PermissionError):
            refused()


def test_hundreds_of_files_are_listed_once_each(server: Server) -> None:
    numbers = [*range(300), 4095, 4096, 70000]
    for number in numbers:
        server.volume(number, MIB)
    assert names_in(server.mount_point) == sorted(f"id-{n}" for n in numbers)


def test_handle_of_an_earlier_activation_is_refused(server: Server) -> None:
    fd = opened(server.volume(1, MIB))
    try:
        os.pwrite(fd, b"before", 0)
        server.ask("remove", id=1)
        with pytest.raises(OSError, match=r"error|[Ss]tale"):
            os.pwrite(fd, b"gone", 0)
        server.add(1, MIB)
        with pytest.raises(OSError, match=r"[Ss]tale") as caught:
            os.pwrite(fd, b"stale", 0)
        assert caught.value.errno == errno.ESTALE
    finally:
        os.close(fd)
    assert (server.mount_point / "id-1").read_bytes()[:6] == b"before"


def test_resize_is_seen_at_once(server: Server) -> None:
    path = server.volume(1, MIB)
    assert path.stat().st_size == MIB
    server.ask("resize", id=1, size=3 * MIB)
    assert path.stat().st_size == 3 * MIB
    with path.open("r+b", buffering=0) as file:
        file.seek(2 * MIB)
        assert file.write(b"x" * 4096) == 4096


@pytest.mark.loop
def test_loop_device_does_direct_io_and_passes_discards(server: Server) -> None:
    path = server.volume(1, 16 * MIB)
    with attached(path) as device:
        queue = Path(f"/sys/block/loop{device.number}/queue")
        assert device.direct_io
        assert Path(f"/sys/block/loop{device.number}/loop/dio").read_text().strip() == "1"
        assert (queue / "logical_block_size").read_text().strip() == "512"
        assert int((queue / "discard_granularity").read_text()) == BLOCK
        fd = os.open(device.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            buffer = mmap.mmap(-1, MIB)
            buffer.write(b"\x55" * MIB)
            assert os.pwritev(fd, [buffer], 0) == MIB
            before = server.ask("info")
            assert before["used"] == MIB // BLOCK
            blkdiscard = 0x1277
            fcntl.ioctl(fd, blkdiscard, struct.pack("=QQ", 0, MIB // 2))
            assert server.ask("info")["used"] == MIB // BLOCK // 2
            # Zero-outs of any alignment, through the block layer.
            blkzeroout = 0x127F
            fcntl.ioctl(fd, blkzeroout, struct.pack("=QQ", MIB // 2 + 512, 1024))
            assert os.preadv(fd, [buffer], 0) == MIB
            wanted = bytearray(b"\x55" * MIB)
            wanted[: MIB // 2] = bytes(MIB // 2)
            wanted[MIB // 2 + 512 : MIB // 2 + 1536] = bytes(1024)
            assert buffer[:] == wanted
        finally:
            os.close(fd)
    assert server.ask("info")["statistics"]["fast"] > 0


@pytest.mark.loop
def test_filesystems_make_check_and_trim(server: Server, tmp_path: Path, require: object) -> None:
    require("ext4")  # type: ignore[operator]
    path = server.volume(1, 64 * MIB)
    with attached(path) as device:
        subprocess.run(["mkfs.ext4", "-q", device.path], check=True)
        syscalls.mount(device.path, str(tmp_path), "ext4", 0, "")
        try:
            (tmp_path / "file").write_bytes(os.urandom(20 * MIB))
            sync(tmp_path)
            full = server.ask("info")["used"]
            (tmp_path / "file").unlink()
            sync(tmp_path)  # ext4 frees blocks when the journal has it
            subprocess.run(["fstrim", str(tmp_path)], check=True)
            assert server.ask("info")["used"] <= full - 15 * MIB // BLOCK
        finally:
            syscalls.umount2(str(tmp_path), 0)
        subprocess.run(["e2fsck", "-fn", device.path], check=True, capture_output=True)


def test_flush_covers_what_was_written(server: Server) -> None:
    fd = opened(server.volume(1, MIB))
    try:
        os.pwrite(fd, b"x" * 4096, 0)
        before = server.ask("info")["statistics"]
        os.fsync(fd)
        os.fdatasync(fd)
        after = server.ask("info")["statistics"]
        assert after["flushes"] == before["flushes"] + 2
    finally:
        os.close(fd)


@pytest.mark.loop
def test_full_pool_holds_writes_and_nothing_else(new_server: Callable[..., Server]) -> None:
    """INV-17."""
    server = new_server("p", data_size=MIB)
    blocks = MIB // BLOCK
    # Through a loop device: it writes asynchronously. A plain pwrite() would hold the inode's lock
    # in the kernel, which fsync() and fallocate() want too.
    with attached(server.volume(1, 2 * MIB)) as device:
        fd = os.open(device.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)

        def write(block: int, value: int) -> None:
            with mmap.mmap(-1, BLOCK) as buffer:
                buffer.write(bytes([value]) * BLOCK)
                assert os.pwritev(fd, [buffer], block * BLOCK) == BLOCK

        def first_byte(block: int) -> int:
            with mmap.mmap(-1, BLOCK) as buffer:
                assert os.preadv(fd, [buffer], block * BLOCK) == BLOCK
                assert buffer[:] == buffer[:1] * BLOCK
                return buffer[0]

        try:
            for block in range(blocks):
                write(block, 0x11)
            # More than there are threads for writes.
            extra = range(blocks, blocks + 12)
            waiting = [threading.Thread(target=write, args=(block, 0x22)) for block in extra]
            for thread in waiting:
                thread.start()
            waiting[0].join(0.3)
            assert all(thread.is_alive() for thread in waiting)
            assert first_byte(0) == 0x11
            assert first_byte(2 * blocks - 1) == 0
            write(0, 0x33)
            os.fsync(fd)
            assert os.statvfs(server.mount_point).f_bfree == 0
            server.kill_worker()
            assert first_byte(0) == 0x33
            assert all(thread.is_alive() for thread in waiting)
            blkdiscard = 0x1277
            fcntl.ioctl(fd, blkdiscard, struct.pack("=QQ", 0, MIB - 2 * BLOCK))
            for thread in waiting:
                thread.join(20)
                assert not thread.is_alive()
            assert {first_byte(block) for block in extra} == {0x22}
        finally:
            os.close(fd)


def test_two_pools_at_once(new_server: Callable[..., Server]) -> None:
    first, second = new_server("a"), new_server("b")
    one, two = first.volume(1, MIB), second.volume(1, MIB)
    assert one != two
    with one.open("r+b", buffering=0) as a, two.open("r+b", buffering=0) as b:
        a.write(b"first")
        b.write(b"second")
    assert one.read_bytes()[:6] == b"first\0"
    assert two.read_bytes()[:6] == b"second"
    first.kill_worker()
    assert two.read_bytes()[:6] == b"second"
    assert one.read_bytes()[:6] == b"first\0"
    assert first.stop() == 0
    assert two.read_bytes()[:6] == b"second"
