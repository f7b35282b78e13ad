"""Real filesystems on activated volumes, under random work, discards and snapshots."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from tests.core.judges import thin_check
from tests.system.conftest import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    MIB,
    fallocate,
    fsck,
)

pytestmark = [
    pytest.mark.root,
    pytest.mark.fuse,
    pytest.mark.loop,
    pytest.mark.ext4,
    pytest.mark.xfs,
    pytest.mark.xdist_group("system"),
]
FILE_MAX = 6 * MIB
OPERATIONS = int(os.environ.get("THINPOOL_FSX_OPERATIONS", "1500"))


class RandomFile:
    """One file and what it should hold."""

    def __init__(self, path: Path, random_: random.Random) -> None:
        self.path = path
        self.random = random_
        self.model = bytearray()
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def range(self) -> tuple[int, int]:
        offset = self.random.randrange(FILE_MAX)
        return offset, min(self.random.choice((1, 511, 4096, 70_000, 300_000)), FILE_MAX - offset)

    def one(self) -> None:
        self.random.choice(
            (self.write, self.write, self.write, self.read, self.read, self.punch, self.truncate,
             self.sync, self.forget_cache)
        )()  # fmt: skip

    def write(self) -> None:
        offset, length = self.range()
        data = self.random.randbytes(length)
        assert os.pwrite(self.descriptor, data, offset) == length
        self.grow(offset + length)
        self.model[offset : offset + length] = data

    def grow(self, size: int) -> None:
        self.model.extend(bytes(max(0, size - len(self.model))))

    def read(self) -> None:
        offset, length = self.range()
        assert os.pread(self.descriptor, length, offset) == self.model[offset : offset + length]

    def punch(self) -> None:
        offset, length = self.range()
        fallocate(self.descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
        end = min(offset + length, len(self.model))
        if offset < end:
            self.model[offset:end] = bytes(end - offset)

    def truncate(self) -> None:
        size = self.random.randrange(FILE_MAX)
        os.ftruncate(self.descriptor, size)
        del self.model[size:]
        self.grow(size)

    def sync(self) -> None:
        os.fsync(self.descriptor)

    def forget_cache(self) -> None:
        os.fsync(self.descriptor)
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def verify(self) -> None:
        assert self.path.read_bytes() == self.model


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("seed", range(2))
def test_random_work_with_verification(api, directory: Path, kind: str, seed: int) -> None:
    """fsx-like: writes, reads, punches, truncations and syncs of files equal a model."""
    print(f"seed {seed}")  # noqa: T201 - a failure must say it
    random_ = random.Random(seed)
    api.create_pool("p", size=1024 * MIB, base_size=512 * MIB, base_fs=kind)
    api.snapshot("p/base", "p/c", mount=directory)
    files = [RandomFile(directory / f"file{i}", random_) for i in range(3)]
    for step in range(OPERATIONS):
        random_.choice(files).one()
        if step == OPERATIONS // 2:
            api.snapshot("p/c", "p/half")  # from here on everything is shared
    for file in files:
        os.close(file.descriptor)
    api.umount("p/c")
    device = api.activate("p/c").device
    fsck(device, kind)
    api.mount("p/c", directory)
    for file in files:
        file.verify()
    api.umount("p/c")
    api.deactivate("p/c")
    assert api.check("p").clean


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_fstrim_returns_space_to_the_pool_and_to_the_host(api, directory: Path, kind: str) -> None:
    size = 96 * MIB
    api.create_pool("p", size=1024 * MIB, base_size=512 * MIB, base_fs=kind)
    api.snapshot("p/base", "p/c", mount=directory)
    before = api.status("p").data.used
    (directory / "big").write_bytes(os.urandom(size))
    os.sync()
    data = Path(api.status("p").data.path)
    full, host_full = api.status("p").data.used, data.stat().st_blocks * 512
    assert full - before >= size
    (directory / "big").unlink()
    os.sync()
    api.trim("p/c")
    until = time.monotonic() + 20
    while time.monotonic() < until:
        left = api.status("p").data.used - before
        returned = host_full - data.stat().st_blocks * 512
        if left <= 8 * MIB and returned >= size * 9 // 10:
            break
        time.sleep(0.1)
    assert left <= 8 * MIB
    assert returned >= size * 9 // 10


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_snapshot_of_a_mounted_volume_under_writes_mounts_cleanly(  # noqa: C901 - one story
    api, directory: Path, tmp_path: Path, kind: str
) -> None:
    """What was synced before the snapshot is in it, whole, while writers never stop."""
    api.create_pool("p", size=2048 * MIB, base_size=512 * MIB, base_fs=kind)
    api.snapshot("p/base", "p/c", mount=directory)
    stop = threading.Event()
    synced: list[dict[int, int]] = [{}, {}]
    failures: list[BaseException] = []

    def writer(number: int) -> None:
        random_ = random.Random(number)
        count = 0
        try:
            while not stop.is_set():
                name = count % 40
                content = f"{number}.{count}.".encode() * random_.randrange(1, 4000)
                with (directory / f"{number}-{name}").open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                synced[number][name] = count
                count += 1
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            failures.append(error)

    threads = [threading.Thread(target=writer, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    place = tmp_path / "snapshot"
    place.mkdir()
    try:
        for i in range(5):
            time.sleep(0.3)
            before = [dict(each) for each in synced]
            taken = api.snapshot("p/c", f"p/s{i}")
            assert taken.consistency == "frozen"
            device = api.activate(f"p/s{i}").device
            api.mount(f"p/s{i}", place)
            for number, names in enumerate(before):
                for name, count in names.items():
                    content = (place / f"{number}-{name}").read_bytes()
                    # It may have been written again since, and be caught half way: then it is
                    # empty or of a later round, never a mixture of an older one.
                    found = int(content.split(b".", 2)[1]) if content else None
                    assert found is None or found >= count
            api.umount(f"p/s{i}")
            fsck(device, kind)
            api.deactivate(f"p/s{i}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    api.umount("p/c")
    metadata = Path(api.status("p").metadata.path)
    assert api.check("p").clean
    for volume in api.list("p"):
        if volume.device is not None:
            api.deactivate(str(volume))
    thin_check(metadata.read_bytes())


def test_the_last_umount_gives_back_the_journal(api, directory: Path):
    """And what was written is there, to the next mount and to a clone."""
    api.create_pool("p", size=1024 * MIB, base_size=512 * MIB)
    block = api.status("p").block_size
    api.snapshot("p/base", "p/c", mount=directory)
    for number in range(100):
        with (directory / str(number)).open("wb") as file:
            file.write(str(number).encode() * 500)
            os.fsync(file.fileno())
    mounted = api.status("p").data.used
    api.umount("p/c")
    given = mounted - api.status("p").data.used
    assert given >= 10 * block, "100 transactions of at least 8 KiB, in whole blocks"
    api.commit("p/c", "p/i")
    api.snapshot("p/i", "p/d", mount=directory)
    before = api.status("p").data.used
    with (directory / "0").open("r+b") as file:
        file.write(b"edit")
        os.fsync(file.fileno())
    assert api.status("p").data.used - before <= 2 * block, "its data, and the journal's first"
    assert (directory / "99").read_bytes() == b"99" * 500
    api.umount("p/d")
    device = api.activate("p/d", read_only=True).device
    fsck(device, "ext4")
    api.deactivate("p/d")
    assert api.check("p").clean
