"""What files and devices carry; needs no root."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess

import pytest

from thinpool import errors
from thinpool.bench.workplace import without_loops
from thinpool.host import loop, mounts
from thinpool.host.signatures import carries, data_ranges, refuse_foreign

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
    return path


def write(path, at, data):
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        file.write(data)


def test_nothing_is_carried_by_what_is_absent_empty_or_zero(disk, tmp_path):
    assert carries(disk) is None
    assert carries(tmp_path / "absent") is None
    (tmp_path / "empty").touch()
    assert carries(tmp_path / "empty") is None
    (tmp_path / "zeros").write_bytes(bytes(3 * MIB + 17))
    assert carries(tmp_path / "zeros") is None


@pytest.mark.parametrize("at", [0, 4 * MIB + 13, 8 * MIB - 1])
def test_a_single_byte_anywhere_in_a_file_is_data(disk, at):
    write(disk, at, b"\1")
    assert carries(disk) == "data"


@pytest.mark.parametrize(
    ("at", "magic", "name"),
    [
        (32, struct.pack("<Q", 27022010), "dm-thin metadata"),
        (0, b"LUKS\xba\xbe\0\2", "LUKS"),
        (512, b"LABELONE" + bytes(16) + b"LVM2 001", "LVM physical volume"),
        (4086, b"SWAPSPACE2", "swap"),
        (65600, b"_BHRfS_M", "btrfs"),
        (4096, bytes.fromhex("fc4e2ba9"), "Linux RAID member"),
        (8 * MIB - 65536, bytes.fromhex("fc4e2ba9"), "Linux RAID member"),
        (128 * 1024, struct.pack("<Q", 0x00BAB10C), "zfs"),
        (32769, b"CD001", "ISO 9660"),
        (0, b"QFI\xfb", "qcow2"),
        (-512, b"EFI PART", "GPT partition table"),
        (510, b"\x55\xaa", "data"),
    ],
)
def test_marks_are_named(disk, at, magic, name):
    write(disk, at, magic)
    assert carries(disk) == name


def test_a_partition_table_is_named(disk):
    write(disk, 446, struct.pack("<BBBBBBBBII", 0x80, 0, 2, 0, 0x83, 0, 0, 0, 2048, 4096))
    write(disk, 510, b"\x55\xaa")
    assert carries(disk) == "MBR partition table"


@pytest.mark.parametrize(
    ("program", "arguments", "name"),
    [
        ("mkfs.ext4", ["-q", "-F"], "ext4"),
        ("mkfs.ext2", ["-q", "-F"], "ext2"),
        ("mkfs.xfs", ["-q", "-f"], "xfs"),
        ("mkfs.btrfs", ["-q", "-f"], "btrfs"),
        ("mkswap", [], "swap"),
    ],
)
def test_what_real_tools_make_is_named(disk, program, arguments, name):
    if shutil.which(program) is None:
        pytest.skip(f"no {program}")
    os.truncate(disk, 512 * MIB)
    command = [program, *arguments, disk]
    if program == "mkfs.btrfs" and os.geteuid() == 0:  # it minds what other loop devices lie on
        command = without_loops(program, *arguments, str(disk))
    subprocess.run(command, check=True, capture_output=True)
    assert carries(disk) == name


def test_foreign_is_refused_unless_forced(disk):
    refuse_foreign(disk)
    write(disk, 0, b"XFSB")
    with pytest.raises(errors.ForeignDataError) as caught:
        refuse_foreign(disk)
    assert caught.value.carries == "xfs"
    assert caught.value.path == str(disk)
    refuse_foreign(disk, force=True)


def test_what_is_no_disk_is_a_usage_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/null"):
        with pytest.raises(errors.UsageError):
            carries(path)


def test_holes_are_not_data(disk, require):
    require("sparse")
    write(disk, 4 * MIB, b"x")
    with disk.open("rb") as file:
        ranges = list(data_ranges(file.fileno()))
    assert len(ranges) == 1
    assert ranges[0][0] <= 4 * MIB < ranges[0][1]


def test_a_file_below_a_loop_device_is_refused_even_when_forced(require, sparse):
    require("root", "loop")
    path = sparse()
    device = loop.attach(path)
    try:
        with pytest.raises(errors.BusyError) as caught:
            refuse_foreign(path, force=True)
        assert caught.value.holder == device.path
    finally:
        loop.detach(device)


def test_a_mounted_device_is_refused_even_when_forced(require, formatted, directory):
    require("root", "loop", "ext4")
    device = loop.attach(formatted())
    mounts.mount(device.path, directory, "ext4")
    try:
        with pytest.raises(errors.BusyError) as caught:
            refuse_foreign(device.path, force=True)
        assert directory in caught.value.holder
    finally:
        mounts.unmount(directory)
        loop.detach(device)
