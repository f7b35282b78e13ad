"""Many threads on one pool: every byte verified, every count recounted afterwards."""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

import pytest

from tests.core.judges import contents, our_check, thin_check
from thinpool.engine import (
    BlockDevice,
    Change,
    ChangeKind,
    Pool,
    PoolMode,
    PoolOptions,
    Volume,
    format_pool,
)
from thinpool.errors import DataSpaceError, StorageIOError
from thinpool.model import VolumeId

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BLOCK = 64 * 1024
SECTOR = 512
OPTIONS = PoolOptions(commit_interval_ms=20, error_if_no_space=True)
SECONDS = 4.0


class Rig:
    """A pool in memory, with background commits."""

    def __init__(self, data_blocks: int = 1200, metadata_blocks: int = 1024) -> None:
        self.metadata = BlockDevice.open_memory(metadata_blocks * 4096)
        self.data = BlockDevice.open_memory(data_blocks * BLOCK)
        format_pool(self.metadata, block_size=BLOCK, data_blocks=data_blocks)
        self.redo = mmap.mmap(-1, 256 * 1024)
        self.open()

    def open(self) -> None:
        self.pool = Pool.open(self.metadata, self.data, OPTIONS, redo_memory=self.redo)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.pool.abandon()
            return
        self.pool.commit()
        image = contents(self.metadata)
        self.pool.close()
        report = our_check(image)
        assert report.clean, report.faults
        thin_check(image)
        self.metadata.close()
        self.data.close()


def in_threads(*functions) -> None:
    with ThreadPoolExecutor(len(functions)) as executor:
        for future in [executor.submit(function) for function in functions]:
            future.result()


def fill(tag: bytes, length: int) -> bytes:
    return (tag * (length // len(tag) + 1))[:length]


def test_concurrent_first_writes_to_one_block_allocate_one_block() -> None:
    """Each thread writes its own sector of the same new blocks."""
    threads = 8
    blocks = 200
    with Rig() as rig:
        rig.pool.create_volume(VolumeId(1))
        with rig.pool.open_volume(VolumeId(1), size=blocks * BLOCK) as volume:
            barrier = threading.Barrier(threads)

            def writer(number: int) -> None:
                for block in range(blocks):
                    barrier.wait()
                    offset = block * BLOCK + number * SECTOR
                    volume.write(offset, fill(b"%d.%d " % (number, block), SECTOR))

            in_threads(*(lambda n=n: writer(n) for n in range(threads)))
            assert rig.pool.volume_info(VolumeId(1)).mapped_blocks == blocks
            for block in range(blocks):
                content = volume.read(block * BLOCK, BLOCK)
                for number in range(threads):
                    piece = content[number * SECTOR : (number + 1) * SECTOR]
                    assert piece == fill(b"%d.%d " % (number, block), SECTOR)
                assert not any(content[threads * SECTOR :])
        assert rig.pool.status().data_blocks_used == blocks


def test_concurrent_writes_to_one_shared_block_break_sharing_once() -> None:
    blocks = 120
    threads = 4
    with Rig() as rig:
        rig.pool.create_volume(VolumeId(1))
        with rig.pool.open_volume(VolumeId(1), size=blocks * BLOCK) as origin:
            for block in range(blocks):
                origin.write(block * BLOCK, fill(b"origin %d " % block, BLOCK))
            rig.pool.create_snapshot(VolumeId(2), origin=VolumeId(1))
            with rig.pool.open_volume(VolumeId(2), size=blocks * BLOCK) as snapshot:
                barrier = threading.Barrier(2 * threads)

                def writer(volume: Volume, number: int) -> None:
                    for block in range(blocks):
                        barrier.wait()
                        volume.write(block * BLOCK + number * SECTOR, fill(b"new", SECTOR))

                in_threads(
                    *(
                        lambda v=v, n=n: writer(v, n)
                        for v in (origin, snapshot)
                        for n in range(threads)
                    )
                )
                for volume in (origin, snapshot):
                    for block in range(blocks):
                        content = volume.read(block * BLOCK, BLOCK)
                        assert content[: threads * SECTOR] == fill(b"new", SECTOR) * threads
                        wanted = fill(b"origin %d " % block, BLOCK)
                        assert content[threads * SECTOR :] == wanted[threads * SECTOR :]
        # What both had shared is free again: the origin's blocks and the snapshot's are left.
        rig.pool.commit()
        assert rig.pool.status().data_blocks_used == 2 * blocks


def test_a_snapshot_under_parallel_writes_is_one_instant() -> None:
    """Each writer counts up in its own block and its twin, in that order.

    At any instant a twin is at most one behind; a snapshot that mixed instants would show a twin
    ahead of its block, or further behind.
    """
    writers = 4
    with Rig() as rig:
        rig.pool.create_volume(VolumeId(1))
        size = 2 * writers * BLOCK
        with rig.pool.open_volume(VolumeId(1), size=size) as volume:
            stop = threading.Event()

            def writer(number: int) -> None:
                count = 0
                while not stop.is_set():
                    count += 1
                    stamp = count.to_bytes(8, "little") * (SECTOR // 8)
                    volume.write(2 * number * BLOCK, stamp)
                    volume.write((2 * number + 1) * BLOCK + 8 * SECTOR, stamp)

            def snapshots() -> None:
                try:
                    transaction = rig.pool.status().transaction_id
                    for id_ in range(100, 180):
                        change = Change(
                            kind=ChangeKind.SNAPSHOT, id=VolumeId(id_), origin=VolumeId(1)
                        )
                        rig.pool.apply([change], expected=transaction, new=transaction + 1)
                        transaction += 1
                        with rig.pool.open_volume(VolumeId(id_), size=size) as snapshot:
                            first = snapshot.read(0, size)
                            for number in range(writers):
                                at = 2 * number * BLOCK
                                block = int.from_bytes(first[at : at + 8], "little")
                                at += BLOCK + 8 * SECTOR
                                twin = int.from_bytes(first[at : at + 8], "little")
                                assert block - 1 <= twin <= block, (id_, number, block, twin)
                            assert snapshot.read(0, size) == first
                        if id_ >= 110:
                            rig.pool.delete_volume(VolumeId(id_ - 10))
                finally:
                    stop.set()

            in_threads(snapshots, *(lambda n=n: writer(n) for n in range(writers)))


@pytest.mark.parametrize("seed", range(3))
def test_mixed_work_in_many_threads_keeps_every_byte(  # noqa: C901, PLR0915 - one story, told once
    seed: int,
) -> None:
    """Each thread owns a stripe of sectors in every block of every volume, and verifies it.

    Discards and snapshots take blocks away under the writers; commits and punches run beside.
    """
    print(f"seed {seed}")  # noqa: T201 - a failure must say it
    threads = 4
    blocks = 40
    stripe = BLOCK // threads
    with Rig(data_blocks=900) as rig:
        volumes: dict[int, Volume] = {}
        for id_ in (1, 2, 3):
            rig.pool.create_volume(VolumeId(id_))
            volumes[id_] = rig.pool.open_volume(VolumeId(id_), size=blocks * BLOCK)
        until = time.monotonic() + SECONDS

        def worker(number: int) -> None:
            random_ = random.Random(f"{seed} {number}")
            model = {id_: bytearray(blocks * stripe) for id_ in volumes}
            count = 0
            while time.monotonic() < until:
                count += 1
                id_ = random_.choice(list(volumes))
                block = random_.randrange(blocks)
                at = random_.randrange(stripe // SECTOR) * SECTOR
                length = min(random_.choice((SECTOR, 8 * SECTOR, 24 * SECTOR)), stripe - at)
                offset = block * BLOCK + number * stripe + at
                kept = block * stripe + at
                kind = random_.random()
                if kind < 0.5:
                    data = fill(b"%d.%d." % (number, count), length)
                    try:
                        volumes[id_].write(offset, data)
                        model[id_][kept : kept + length] = data
                    except DataSpaceError:
                        model[id_][kept : kept + length] = volumes[id_].read(offset, length)
                elif kind < 0.6:
                    try:
                        volumes[id_].zero(offset, length)
                        model[id_][kept : kept + length] = bytes(length)
                    except DataSpaceError:
                        model[id_][kept : kept + length] = volumes[id_].read(offset, length)
                elif kind < 0.65:
                    volumes[id_].flush()
                else:
                    found = volumes[id_].read(offset, length)
                    assert found == model[id_][kept : kept + length], (id_, block, at)
            for id_, data in model.items():
                for block in range(blocks):
                    found = volumes[id_].read(block * BLOCK + number * stripe, stripe)
                    assert found == data[block * stripe : (block + 1) * stripe]

        def upheaval() -> None:
            random_ = random.Random(f"{seed} upheaval")
            alive: list[int] = []
            next_id = 1000
            while time.monotonic() < until:
                if len(alive) < 6:
                    origin = random_.choice(list(volumes))
                    rig.pool.create_snapshot(VolumeId(next_id), origin=VolumeId(origin))
                    alive.append(next_id)
                    next_id += 1
                else:
                    rig.pool.delete_volume(VolumeId(alive.pop(random_.randrange(len(alive)))))
                rig.pool.punch_some(64)
                time.sleep(0.005)
            for id_ in alive:
                rig.pool.delete_volume(VolumeId(id_))

        in_threads(upheaval, *(lambda n=n: worker(n) for n in range(threads)))
        for volume in volumes.values():
            volume.close()


def test_a_flush_where_no_mapping_changed_costs_one_host_flush_and_a_commit_three() -> None:
    with Rig() as rig:
        rig.pool.create_volume(VolumeId(1))
        rig.pool.commit()
        with rig.pool.open_volume(VolumeId(1), size=BLOCK) as volume:
            volume.write(0, b"first")
            before = rig.pool.status()
            volume.flush()
            between = rig.pool.status()
            volume.write(0, b"again")
            volume.flush()
            after = rig.pool.status()
    flushes = lambda s: s.data_flushes + s.metadata_flushes  # noqa: E731
    assert flushes(between) - flushes(before) <= 3
    assert flushes(after) - flushes(between) == 1


def test_a_commit_flushes_the_data_where_something_was_done_to_it() -> None:
    """INV-03: whatever was written or punched since the last commit's flush, and only then."""

    def flushed(work: Callable[[], object]) -> int:
        before = pool.status()
        work()
        pool.commit()
        after = pool.status()
        assert after.commits > before.commits
        return after.data_flushes - before.data_flushes

    metadata = BlockDevice.open_memory(128 * 4096)
    data = BlockDevice.open_memory(40 * BLOCK)
    format_pool(metadata, block_size=BLOCK, data_blocks=40)
    # Nobody commits or punches in the background.
    with metadata, data, Pool.open(metadata, data, PoolOptions(commit_interval_ms=0)) as pool:
        # What a predecessor wrote last is known to nobody.
        assert flushed(lambda: pool.create_volume(VolumeId(1))) == 1
        assert flushed(lambda: pool.create_volume(VolumeId(2))) == 0
        with pool.open_volume(VolumeId(1), size=2 * BLOCK) as volume:
            assert flushed(lambda: volume.write(0, b"first")) == 1
            assert flushed(lambda: pool.create_snapshot(VolumeId(3), origin=VolumeId(1))) == 0
            assert flushed(lambda: volume.write(0, b"copied")) == 1

            def over_a_mapping() -> None:
                volume.write(0, b"again")
                pool.create_volume(VolumeId(4))

            assert flushed(over_a_mapping) == 1
            # A flush of its own covers it too, but was not the commit's.
            volume.write(0, b"once more")
            volume.flush()
            assert flushed(lambda: pool.create_volume(VolumeId(5))) == 1
            assert flushed(lambda: pool.create_volume(VolumeId(6))) == 0
            assert flushed(lambda: volume.discard(0, 2 * BLOCK)) == 0

            def punch() -> None:
                assert pool.punch_some(1 << 20) == 0
                pool.create_volume(VolumeId(7))

            assert flushed(punch) == 1
        assert flushed(lambda: pool.delete_volume(VolumeId(2))) == 0


@pytest.mark.parametrize("gone", ["m", "d"])
@pytest.mark.parametrize("how", ["removed", "cut"])
def test_a_commit_that_flushes_both_devices_sees_that_one_is_gone(
    tmp_path: Path, how: str, gone: str
) -> None:
    """Both are flushed at once."""
    size = {"m": 1 << 20, "d": 40 * BLOCK}
    with (
        BlockDevice.open_file(tmp_path / "m", create_size=size["m"]) as metadata,
        BlockDevice.open_file(tmp_path / "d", create_size=size["d"]) as data,
    ):
        format_pool(metadata, block_size=BLOCK, data_blocks=40)
        pool = Pool.open(metadata, data, PoolOptions(commit_interval_ms=0))
        pool.create_volume(VolumeId(1))
        with pool.open_volume(VolumeId(1), size=2 * BLOCK) as volume:
            volume.write(0, b"first")
            pool.commit()
            before = pool.status()
            volume.write(BLOCK, b"second")
            if how == "removed":
                (tmp_path / gone).unlink()
            else:
                os.truncate(tmp_path / gone, size[gone] - BLOCK)
            with pytest.raises(StorageIOError, match=r"removed or replaced|truncated"):
                pool.commit()
        status = pool.status()
        assert (status.mode, status.commits) == (PoolMode.RO, before.commits)
        pool.abandon()


@pytest.mark.parametrize("how", ["removed", "cut"])
def test_a_commit_without_a_data_flush_sees_that_the_data_is_gone(tmp_path: Path, how: str) -> None:
    """It promises again what earlier commits promised."""
    with (
        BlockDevice.open_file(tmp_path / "m", create_size=1 << 20) as metadata,
        BlockDevice.open_file(tmp_path / "d", create_size=40 * BLOCK) as data,
    ):
        format_pool(metadata, block_size=BLOCK, data_blocks=40)
        pool = Pool.open(metadata, data, PoolOptions(commit_interval_ms=0))
        pool.create_volume(VolumeId(1))
        pool.commit()
        before = pool.status().data_flushes
        if how == "removed":
            (tmp_path / "d").unlink()
        else:
            os.truncate(tmp_path / "d", 39 * BLOCK)
        pool.create_snapshot(VolumeId(2), origin=VolumeId(1))
        with pytest.raises(StorageIOError, match=r"removed or replaced|truncated"):
            pool.commit()
        status = pool.status()
        assert (status.mode, status.data_flushes) == (PoolMode.RO, before)
        pool.abandon()


def test_everyone_who_waits_for_a_flush_shares_it(tmp_path: Path) -> None:
    """On real files, whose flush takes as long as it takes others to ask for one."""
    threads = 16
    rounds = 20
    with (
        BlockDevice.open_file(tmp_path / "m", create_size=1 << 20) as metadata,
        BlockDevice.open_file(tmp_path / "d", create_size=threads * BLOCK) as data,
    ):
        format_pool(metadata, block_size=BLOCK, data_blocks=threads)
        with Pool.open(metadata, data, OPTIONS) as pool:
            pool.create_volume(VolumeId(1))
            with pool.open_volume(VolumeId(1), size=threads * BLOCK) as volume:
                barrier = threading.Barrier(threads)
                before = pool.status()

                def flusher(number: int) -> None:
                    for i in range(rounds):
                        volume.write(number * BLOCK, b"%d" % i)
                        barrier.wait()
                        volume.flush()

                in_threads(*(lambda n=n: flusher(n) for n in range(threads)))
                after = pool.status()
    # Were none shared, there would be one for each thread in each round.
    assert after.data_flushes - before.data_flushes < threads * rounds / 2
