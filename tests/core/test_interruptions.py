"""What other requests, a killed worker and short space meet in the middle of a change."""

from __future__ import annotations

import mmap
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.core.judges import contents, our_check
from thinpool.engine import (
    BlockDevice,
    Change,
    ChangeKind,
    FaultDevice,
    FaultKind,
    FaultOp,
    Pool,
    PoolMode,
    PoolOptions,
    format_pool,
)
from thinpool.engine.bdev import FOR_EVER
from thinpool.errors import (
    BusyError,
    DataSpaceError,
    MetadataSpaceError,
    NotFoundError,
    StorageIOError,
)
from thinpool.model import VolumeId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 64 * 1024
MD = 4096
SECTOR = 512
PATIENCE = 20.0
A_WHILE = 0.15
OPTIONS = PoolOptions(commit_interval_ms=0, error_if_no_space=True)
# Where nothing is read back in full, a first write need not fill its block.
THIN = PoolOptions(commit_interval_ms=0, error_if_no_space=True, zero=False)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def devices(
    stack: ExitStack, *, metadata_blocks: int = 256, data_blocks: int = 64
) -> tuple[FaultDevice, FaultDevice]:
    """Metadata and data of a formatted pool, with faults in front of them."""
    below = [BlockDevice.open_memory(metadata_blocks * MD)]
    below.append(BlockDevice.open_memory(data_blocks * BLOCK))
    format_pool(below[0], block_size=BLOCK, data_blocks=data_blocks)
    both = []
    for device in below:
        stack.callback(device.close)
        fault = FaultDevice.over(device)
        stack.callback(fault.close)
        both.append(fault)
    return both[0], both[1]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def until_held(device: FaultDevice, future: Future[None]) -> None:
    """A future's next operation is held, or there was none any more."""
    until(lambda: bool(device.held) or future.done())


def executor(stack: ExitStack, *faults: FaultDevice, threads: int = 8) -> ThreadPoolExecutor:
    """Threads that end even if a test leaves an operation held."""
    pool = stack.enter_context(ThreadPoolExecutor(threads))

    def let_go() -> None:
        for fault in faults:
            fault.clear()
            fault.release()

    stack.callback(let_go)
    return pool


def change(kind: ChangeKind, id_: int, origin: int | None = None) -> Change:
    return Change(kind=kind, id=VolumeId(id_), origin=None if origin is None else VolumeId(origin))


def write_blocks(pool: Pool, id_: int, blocks: range) -> None:
    with pool.open_volume(VolumeId(id_), size=(blocks.stop + 1) * BLOCK) as volume:
        for block in blocks:
            volume.write(block * BLOCK, b"x" * SECTOR)


def test_a_worker_killed_within_a_series_leaves_all_of_it_or_none(stack: ExitStack) -> None:
    """INV-08, INV-20: between two changes of a series the log shows neither."""
    metadata, data = devices(stack)
    with Pool.open(metadata, data, OPTIONS) as pool:
        pool.apply([change(ChangeKind.CREATE, 1), change(ChangeKind.CREATE, 2)], expected=0, new=1)
        write_blocks(pool, 1, range(3))
        write_blocks(pool, 2, range(3))
    series = [change(ChangeKind.DELETE, 1), change(ChangeKind.DELETE, 2)]
    before = contents(metadata)
    seen = set()
    for nth in range(1, 64):
        metadata.write(0, before)
        redo = mmap.mmap(-1, 64 * 1024)
        with ExitStack() as each:
            pool = Pool.open(metadata, data, OPTIONS, redo_memory=redo)
            each.callback(pool.abandon)
            threads = executor(each, metadata)
            metadata.add(FaultKind.HOLD, FaultOp.READ, nth=nth)
            future = threads.submit(pool.apply, series, expected=1, new=2)
            until_held(metadata, future)
            done = future.done()
            if not done:  # a worker that is killed now leaves the last commit and the log
                left = mmap.mmap(-1, len(redo))
                left[:] = redo[:]
                memory = each.enter_context(BlockDevice.open_memory(len(before)))
                memory.write(0, before)
                with Pool.open(memory, data, OPTIONS, redo_memory=left) as successor:
                    seen.add((successor.status().transaction_id, len(list(successor.volumes()))))
                assert our_check(contents(memory)).clean
            metadata.clear()
            metadata.release()
            future.result(PATIENCE)
        if done:
            break
    assert nth > 3  # it was held within the series
    assert seen == {(1, 2)}


def test_a_write_waits_for_blocks_whose_host_space_is_being_returned(stack: ExitStack) -> None:
    """INV-17: they are free, so a pool that does not queue must not say that it is full."""
    metadata, data = devices(stack, data_blocks=2)
    with Pool.open(metadata, data, OPTIONS) as pool:
        pool.create_volume(VolumeId(1))
        with pool.open_volume(VolumeId(1), size=8 * BLOCK) as volume, ExitStack() as each:
            threads = executor(each, data)
            volume.write(0, b"a" * 2 * BLOCK)
            pool.commit()
            volume.discard(0, 2 * BLOCK)
            pool.commit()
            data.add(FaultKind.HOLD, FaultOp.PUNCH)
            punch = threads.submit(pool.punch_some, 16)
            until(lambda: bool(data.held))
            write = threads.submit(volume.write, 2 * BLOCK, b"b" * BLOCK)
            time.sleep(A_WHILE)
            assert not write.done()
            data.release()
            punch.result(PATIENCE)
            write.result(PATIENCE)
            assert volume.read(2 * BLOCK, BLOCK) == b"b" * BLOCK
            assert pool.status().mode is PoolMode.RW


def test_many_writers_at_the_end_of_the_metadata_leave_the_pool_writable(stack: ExitStack) -> None:
    """INV-17: each had room when it began; together they must not run into the reserve."""
    writers = 60
    metadata, data = devices(stack, metadata_blocks=200, data_blocks=40_000)
    with Pool.open(metadata, data, THIN) as pool:
        pool.create_volume(VolumeId(1))
        write_blocks(pool, 1, range(writers * 170))
        pool.apply([change(ChangeKind.SNAPSHOT, 2, 1)], expected=0, new=1)
        pool.create_volume(VolumeId(3))
        pool.commit()
        # Until a commit would be needed by the next one.
        with pool.open_volume(VolumeId(3), size=1 << 40) as volume:
            i = 0
            while True:
                status = pool.status()
                free = status.metadata_blocks_total - status.metadata_blocks_used
                if free < 56:
                    break
                volume.write(i * BLOCK, b"x" * SECTOR)
                i += 1
        pool.commit()
        with pool.open_volume(VolumeId(1), size=1 << 40) as volume, ExitStack() as each:
            threads = executor(each, data, threads=writers)
            data.add(FaultKind.HOLD, FaultOp.WRITE, count=writers)
            futures: list[Future[None]] = [
                threads.submit(volume.write, k * 170 * BLOCK, b"y" * SECTOR) for k in range(writers)
            ]
            until(lambda: data.held + sum(f.done() for f in futures) == writers)
            data.clear()
            data.release()
            for future in futures:
                try:
                    future.result(PATIENCE)
                except MetadataSpaceError:
                    continue
            status = pool.status()
            assert not status.needs_check
            assert status.mode is PoolMode.RW
    assert our_check(contents(metadata)).clean


def crowded(
    stack: ExitStack, *, metadata_blocks: int = 500, data_blocks: int = 60_000
) -> tuple[FaultDevice, FaultDevice]:
    """Four volumes that share all blocks and no leaf, in metadata that is full."""
    mapped, leaf = 10_000, 126
    metadata, data = devices(stack, metadata_blocks=metadata_blocks, data_blocks=data_blocks)
    with Pool.open(metadata, data, THIN) as pool:
        pool.create_volume(VolumeId(1))
        write_blocks(pool, 1, range(mapped))
        for id_ in (2, 3, 4):
            pool.create_snapshot(VolumeId(id_), origin=VolumeId(1))
        for id_ in (2, 3, 4):
            with pool.open_volume(VolumeId(id_), size=mapped * BLOCK) as volume:
                for block in range(0, mapped, leaf):
                    volume.write(block * BLOCK, b"y" * SECTOR)
        pool.create_volume(VolumeId(5))
        with pytest.raises(MetadataSpaceError):
            write_blocks(pool, 5, range(data_blocks))
    return metadata, data


def test_every_volume_can_be_deleted_when_the_metadata_is_full(stack: ExitStack) -> None:
    """INV-17: also one whose blocks are each counted in another place of the space map."""
    metadata, data = crowded(stack)
    with Pool.open(metadata, data, THIN) as pool:
        for id_ in (2, 3, 1, 4, 5):
            pool.delete_volume(VolumeId(id_))
            assert not pool.status().needs_check
        pool.commit()
        assert pool.status().data_blocks_used == 0
    assert our_check(contents(metadata)).clean


def test_a_volume_that_is_being_emptied_cannot_be_opened_or_copied(stack: ExitStack) -> None:
    """A big delete works in several transactions: nobody may see or keep a half of it."""
    # With so many bitmaps that the reserve does not hold a copy of all.
    metadata, data = crowded(stack, metadata_blocks=1100, data_blocks=300 * 16_320)
    with Pool.open(metadata, data, THIN) as pool:
        with ExitStack() as each:
            threads = executor(each, metadata, data)
            metadata.add(FaultKind.HOLD, FaultOp.FLUSH)
            delete = threads.submit(pool.delete_volume, VolumeId(2))
            until_held(metadata, delete)
            assert not delete.done(), "it was not done in steps"
            with pytest.raises(BusyError):
                pool.open_volume(VolumeId(2), size=BLOCK)
            with pytest.raises(BusyError):
                pool.delete_volume(VolumeId(2))
            copy = threads.submit(pool.create_snapshot, VolumeId(9), origin=VolumeId(2))
            time.sleep(A_WHILE)
            metadata.clear()
            metadata.release()
            with pytest.raises((BusyError, NotFoundError, MetadataSpaceError)):
                copy.result(PATIENCE)
            delete.result(PATIENCE)
        assert [info.id for info in pool.volumes()] == [1, 3, 4, 5]
    assert our_check(contents(metadata)).clean


def test_a_volume_that_a_series_copies_and_deletes_is_not_emptied_first(stack: ExitStack) -> None:
    """The copy is all that remains of it."""
    metadata, data = crowded(stack)
    with Pool.open(metadata, data, THIN) as pool:
        pool.delete_volume(VolumeId(5))
        pool.commit()
        mapped = pool.volume_info(VolumeId(1)).mapped_blocks
        pool.apply(
            [change(ChangeKind.SNAPSHOT, 9, 1), change(ChangeKind.DELETE, 1)], expected=0, new=1
        )
        assert pool.volume_info(VolumeId(9)).mapped_blocks == mapped
    assert our_check(contents(metadata)).clean


def test_clearing_needs_check_brings_back_the_commits_that_nobody_asks_for(
    stack: ExitStack,
) -> None:
    """INV-15: a pool that was opened read-only commits every second once it is writable."""
    metadata, data = devices(stack)
    with Pool.open(metadata, data, OPTIONS) as pool:
        pool.create_volume(VolumeId(1))
        pool.commit()
        metadata.add(FaultKind.ERROR, FaultOp.FLUSH)
        pool.create_volume(VolumeId(2))
        with pytest.raises(StorageIOError):
            pool.commit()
        metadata.clear()
        pool.abandon()
    with Pool.open(metadata, data, PoolOptions(commit_interval_ms=50)) as pool:
        assert pool.status().needs_check
        pool.clear_needs_check()
        write_blocks(pool, 1, range(1))
        until(lambda: not pool.status().dirty)


def test_writes_in_place_do_not_put_off_the_end_of_waiting_for_the_host(stack: ExitStack) -> None:
    """INV-17: they succeed on a host that is full, and say nothing of its space."""
    metadata, data = devices(stack)
    options = PoolOptions(commit_interval_ms=0, no_space_timeout_ms=300)
    with Pool.open(metadata, data, options) as pool:
        pool.create_volume(VolumeId(1))
        with pool.open_volume(VolumeId(1), size=8 * BLOCK) as volume, ExitStack() as each:
            threads = executor(each, data)
            volume.write(0, b"a" * BLOCK)
            data.add(FaultKind.ERROR, FaultOp.WRITE, begin=BLOCK, host_errno=28, count=FOR_EVER)
            each.callback(pool.set_when_full, error=True, timeout_ms=1)
            waiting = threads.submit(volume.write, BLOCK, b"b" * BLOCK)
            until(lambda: pool.status().mode is PoolMode.OUT_OF_DATA_SPACE)
            end = time.monotonic() + 3
            while time.monotonic() < end and not waiting.done():
                volume.write(0, b"c" * SECTOR)
                assert pool.status().mode is PoolMode.OUT_OF_DATA_SPACE
            with pytest.raises(DataSpaceError):
                waiting.result(0)
            data.clear()
            volume.write(BLOCK, b"d" * BLOCK)
            assert pool.status().mode is PoolMode.RW
