"""Giving back an ext4's journal: what real tools and the kernel say of it afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from thinpool.format.checksum import crc32c
from thinpool.host import loop, mounts
from thinpool.store.ext4journal import release_journal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20
POOL_BLOCK = 64 << 10
SIZE = 256 * MIB

pytestmark = [pytest.mark.root, pytest.mark.loop, pytest.mark.ext4]


class FileVolume:
    """A file as a volume: what was discarded reads as zeros, what was written is remembered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.discarded: list[tuple[int, int]] = []
        self.written: list[tuple[int, int]] = []
        self.reads = 0

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def _put(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def write(self, offset: int, data: bytes) -> None:
        self.written.append((offset, len(data)))
        self._put(offset, data)

    def discard(self, offset: int, length: int) -> None:
        assert offset % POOL_BLOCK == 0
        assert length % POOL_BLOCK == 0
        self.discarded.append((offset, length))
        self._put(offset, bytes(length))


def some_seed() -> int:
    seed = random.randrange(1 << 32)
    sys.stdout.write(f"seed {seed}\n")
    return seed


def journal_superblock(path: Path) -> bytearray:
    done = subprocess.run(["debugfs", "-R", "cat <8>", path], capture_output=True, check=True)
    return bytearray(done.stdout[:1024])


def journal_begins(path: Path) -> int:
    done = subprocess.run(["debugfs", "-R", "blocks <8>", path], capture_output=True, check=True)
    return int(done.stdout.split()[0]) * 4096


def fsck(path: Path) -> None:
    done = subprocess.run(["e2fsck", "-fn", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def mounted(path: Path, folder: Path, *options: str) -> Iterator[None]:
    device = loop.attach(path)
    try:
        mounts.mount(device.path, str(folder), "ext4", options)
        try:
            yield
        finally:
            mounts.unmount(str(folder))
    finally:
        loop.detach(device)


def write_and_sync(path: Path, folder: Path, seed: int) -> dict[str, bytes]:
    """Files written and synced one by one through a mount; everything that is there afterwards."""
    generator = random.Random(seed)
    with mounted(path, folder):
        for number in range(60):
            with (folder / f"{seed}-{number}").open("wb") as file:
                file.write(generator.randbytes(generator.randrange(1, 20_000)))
                file.flush()
                os.fsync(file.fileno())
        return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}


def read_all(path: Path, folder: Path) -> dict[str, bytes]:
    with mounted(path, folder):
        return contents(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "mnt"
    made.mkdir()
    return made


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    make(path)
    return path


def make(path: Path, *options: str) -> None:
    with path.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-b", "4096", *options, path], check=True)


def test_a_used_journal_is_given_back_and_the_next_mount_begins_at_its_first_block(disk, folder):
    seed = some_seed()
    before = write_and_sync(disk, folder, seed)
    (head,) = struct.unpack_from(">I", journal_superblock(disk), 0x58)
    volume = FileVolume(disk)
    released = release_journal(volume, block_size=POOL_BLOCK)
    journal = journal_begins(disk)
    size = 4096 * struct.unpack_from(">I", journal_superblock(disk), 0x10)[0]
    assert size - 3 * POOL_BLOCK <= released < size
    assert all(journal < begin < begin + length <= journal + size
               for begin, length in volume.discarded)  # fmt: skip
    assert volume.written == ([(journal, 1024)] if head > 1 else []), "Linux 6.3 goes on at a head"
    assert struct.unpack_from(">I", journal_superblock(disk), 0x58) == (0,)
    fsck(disk)
    assert read_all(disk, folder) == before
    after = write_and_sync(disk, folder, seed + 1)
    assert before.items() <= after.items()
    fsck(disk)
    log = FileVolume(disk).read(journal + 4096, 4)
    assert log == struct.pack(">I", 0xC03B3998), "a transaction begins in the first block"


@pytest.mark.parametrize("half", ["the log alone", "the superblock alone"])
def test_a_crash_in_between_leaves_a_filesystem_in_order(disk, folder, half):
    seed = some_seed()
    before = write_and_sync(disk, folder, seed)
    volume = FileVolume(disk)
    if half == "the log alone":
        volume.write = lambda offset, data: None  # type: ignore[method-assign]
    else:
        volume.discard = lambda offset, length: None  # type: ignore[method-assign]
    release_journal(volume, block_size=POOL_BLOCK)
    fsck(disk)
    assert read_all(disk, folder) == before
    after = write_and_sync(disk, folder, seed + 1)
    assert before.items() <= after.items()
    fsck(disk)


def test_a_crash_after_it_replays_the_new_log_and_nothing_of_the_old(disk, folder, tmp_path):
    """The device is copied while mounted, after fsyncs: what a power cut leaves."""
    seed = some_seed()
    before = write_and_sync(disk, folder, seed)
    release_journal(FileVolume(disk), block_size=POOL_BLOCK)
    copy = tmp_path / "copy"
    with mounted(disk, folder, "commit=300"):
        for number in range(20):
            with (folder / f"late-{number}").open("wb") as file:
                file.write(b"late" * 100)
                file.flush()
                os.fsync(file.fileno())
        shutil.copyfile(disk, copy)
    (start,) = struct.unpack_from(">I", journal_superblock(copy), 0x1C)
    assert start == 1, "there is a log to be replayed, and it begins at the journal's beginning"
    volume = FileVolume(copy)
    assert release_journal(volume, block_size=POOL_BLOCK) == 0, "not a log that is needed"
    assert not volume.discarded
    found = read_all(copy, folder)
    assert before.items() <= found.items()
    assert {f"late-{number}" for number in range(20)} <= found.keys()
    fsck(copy)


def seal(superblock: bytearray) -> bytearray:
    superblock[0xFC:0x100] = bytes(4)
    superblock[0xFC:0x100] = struct.pack(">I", crc32c(superblock))
    return superblock


def change(disk: Path, offset: int, value: int, *, good_checksum: bool = True) -> None:
    superblock = journal_superblock(disk)
    struct.pack_into(">I", superblock, offset, value)
    FileVolume(disk).write(journal_begins(disk), seal(superblock) if good_checksum else superblock)


STRANGE: dict[str, Callable[[Path], None]] = {
    "a log to replay": lambda disk: change(disk, 0x1C, 7),
    "an error": lambda disk: change(disk, 0x20, 5),
    "a wrong checksum": lambda disk: change(disk, 0x58, 9, good_checksum=False),
    "asynchronous commits": lambda disk: change(disk, 0x28, 0x12 | 0x4),
    "fast commits": lambda disk: change(disk, 0x28, 0x12 | 0x20),
    "another length": lambda disk: change(disk, 0x10, 2047),
    "another block size": lambda disk: change(disk, 0xC, 2048),
    "another magic": lambda disk: change(disk, 0x0, 0xC03B3999),
    "a journal of version 1": lambda disk: change(disk, 0x4, 3),
    "the filesystem wants recovery": lambda disk: subprocess.run(
        ["debugfs", "-w", "-R", "feature needs_recovery", disk], capture_output=True, check=True
    ),
    "an unknown feature": lambda disk: subprocess.run(
        ["debugfs", "-w", "-R", "feature FEATURE_I23", disk], capture_output=True, check=True
    ),
    "no journal": lambda disk: make(disk, "-O", "^has_journal"),
    "ext3": lambda disk: make(disk, "-t", "ext3"),
    "zeros": lambda disk: disk.write_bytes(bytes(MIB)),
    "a cut": lambda disk: os.truncate(disk, 2 * MIB),
    "xfs": lambda disk: (
        os.truncate(disk, 512 * MIB),
        subprocess.run(["mkfs.xfs", "-q", "-f", disk], check=True),
    ),
}


@pytest.mark.parametrize("how", STRANGE)
def test_what_is_not_understood_is_left_alone(disk, folder, how):
    write_and_sync(disk, folder, 1)
    STRANGE[how](disk)
    volume = FileVolume(disk)
    assert release_journal(volume, block_size=POOL_BLOCK) == 0
    assert not volume.discarded
    assert not volume.written


def test_extents_that_lead_in_circles_end(disk):
    """The journal's extent tree is made of one node that names itself."""
    table = subprocess.run(
        ["debugfs", "-R", "imap <8>", disk], capture_output=True, text=True, check=True
    ).stdout
    block, offset = table.split("located at block ")[1].split(", offset ")
    node_block = journal_begins(disk) // 4096 + 1
    inode = int(block) * 4096 + int(offset, 16)
    entry = struct.pack("<IIHH", 0, node_block, 0, 0)
    volume = FileVolume(disk)
    volume._put(inode + 0x28, struct.pack("<HHHHI", 0xF30A, 1, 4, 5, 0) + entry)
    for depth_of_itself in (4, 3, 2, 1):
        node = struct.pack("<HHHHI", 0xF30A, 340, 340, depth_of_itself, 0) + entry * 340
        volume._put(node_block * 4096, node)
        assert release_journal(volume, block_size=POOL_BLOCK) == 0
    assert volume.reads < 400
    assert not volume.discarded


def test_small_blocks(disk, folder):
    make(disk, "-b", "1024")
    before = write_and_sync(disk, folder, 1)
    assert release_journal(FileVolume(disk), block_size=POOL_BLOCK) > 0
    fsck(disk)
    assert read_all(disk, folder) == before


def test_blocks_larger_than_the_journal_are_left_alone(disk, folder):
    write_and_sync(disk, folder, 1)
    volume = FileVolume(disk)
    assert release_journal(volume, block_size=64 * MIB) == 0
    fsck(disk)
