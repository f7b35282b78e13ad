"""Each race of the data path, with the interleaving forced: one operation is held in the device.

INV-05: nothing is reused before the transaction that freed it is durable.
INV-09: a block that a request has resolved is neither freed, nor moved, nor reused under it.
INV-10, INV-11, INV-12 and INV-14 likewise: a test each.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

import pytest

from tests.core.judges import contents, our_check, thin_check
from thinpool.engine import (
    BlockDevice,
    Change,
    ChangeKind,
    FaultDevice,
    FaultKind,
    FaultOp,
    Pool,
    PoolOptions,
    format_pool,
)
from thinpool.errors import DataSpaceError
from thinpool.model import VolumeId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 64 * 1024
SECTOR = 512
BLOCKS = 6
SIZE = BLOCKS * BLOCK
PATIENCE = 10.0
A_WHILE = 0.15  # what is to wait must still be waiting after this


class Rig:
    """A pool whose data device holds operations on demand."""

    def __init__(self, data_blocks: int = 64) -> None:
        self.metadata = BlockDevice.open_memory(256 * 4096)
        self.memory = BlockDevice.open_memory(data_blocks * BLOCK)
        format_pool(self.metadata, block_size=BLOCK, data_blocks=data_blocks)
        self.data = FaultDevice.over(self.memory)
        options = PoolOptions(commit_interval_ms=0, error_if_no_space=True)
        self.pool = Pool.open(self.metadata, self.data, options)
        self.executor = ThreadPoolExecutor(8)
        self.pool.create_volume(VolumeId(1))
        self.volume = self.pool.open_volume(VolumeId(1), size=SIZE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.data.clear()
        self.data.release()
        self.executor.shutdown()
        self.volume.close()
        if kind is None:
            self.pool.commit()
            image = contents(self.metadata)
            assert our_check(image).clean
            thin_check(image)
            self.pool.close()
        else:
            self.pool.abandon()
        self.data.close()
        self.memory.close()
        self.metadata.close()

    def held(self, operation: FaultOp, call: Callable[[], object]) -> Future:
        """Start a call and return once its next operation of the kind is held."""
        already = self.data.held
        self.data.add(FaultKind.HOLD, operation)
        future = self.executor.submit(call)
        until = time.monotonic() + PATIENCE
        while self.data.held == already:
            assert time.monotonic() < until, "the operation never came"
            time.sleep(0.001)
        self.data.clear()
        return future

    def start(self, call: Callable[[], object]) -> Future:
        return self.executor.submit(call)

    def release(self) -> None:
        self.data.release()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        yield rig


def assert_waits(future: Future) -> None:
    time.sleep(A_WHILE)
    assert not future.done()


def snapshot(rig: Rig, id_: int) -> None:
    transaction = rig.pool.status().transaction_id
    change = Change(kind=ChangeKind.SNAPSHOT, id=VolumeId(id_), origin=VolumeId(1))
    rig.pool.apply([change], expected=transaction, new=transaction + 1)


def read_volume(rig: Rig, id_: int) -> bytes:
    with rig.pool.open_volume(VolumeId(id_), size=SIZE) as volume:
        return volume.read(0, SIZE)


def test_a_snapshot_waits_for_an_overwrite_in_flight_and_holds_it(rig: Rig) -> None:
    rig.volume.write(0, b"a" * BLOCK)
    write = rig.held(FaultOp.WRITE, lambda: rig.volume.write(0, b"b" * BLOCK))
    snap = rig.start(lambda: snapshot(rig, 2))
    assert_waits(snap)
    rig.release()
    write.result(PATIENCE)
    snap.result(PATIENCE)
    rig.volume.write(0, b"c" * BLOCK)
    assert read_volume(rig, 2)[:BLOCK] == b"b" * BLOCK


def test_a_write_that_comes_during_a_snapshot_is_not_in_it(rig: Rig) -> None:
    """The snapshot waits for one write; another that comes meanwhile waits for the snapshot."""
    rig.volume.write(0, b"a" * 2 * BLOCK)
    write = rig.held(FaultOp.WRITE, lambda: rig.volume.write(0, b"b" * BLOCK))
    snap = rig.start(lambda: snapshot(rig, 2))
    assert_waits(snap)
    late = rig.start(lambda: rig.volume.write(BLOCK, b"late" * (BLOCK // 4)))
    assert_waits(late)
    rig.release()
    for future in (write, snap, late):
        future.result(PATIENCE)
    assert read_volume(rig, 2)[: 2 * BLOCK] == b"b" * BLOCK + b"a" * BLOCK
    assert rig.volume.read(BLOCK, 4) == b"late"


def test_a_discard_waits_for_a_write_that_has_resolved_the_block(rig: Rig) -> None:
    rig.volume.write(0, b"a" * BLOCK)
    write = rig.held(FaultOp.WRITE, lambda: rig.volume.write(0, b"b" * BLOCK))
    discard = rig.start(lambda: rig.volume.discard(0, BLOCK))
    assert_waits(discard)
    rig.release()
    write.result(PATIENCE)
    discard.result(PATIENCE)
    assert rig.volume.read(0, BLOCK) == bytes(BLOCK)


def test_a_discard_waits_for_a_read_that_has_resolved_the_block(rig: Rig) -> None:
    rig.volume.write(0, b"a" * BLOCK)
    read = rig.held(FaultOp.READ, lambda: rig.volume.read(0, BLOCK))
    discard = rig.start(lambda: rig.volume.discard(0, BLOCK))
    assert_waits(discard)
    rig.release()
    assert read.result(PATIENCE) == b"a" * BLOCK
    discard.result(PATIENCE)


def test_two_first_writes_of_one_block_allocate_one_block(rig: Rig) -> None:
    used = rig.pool.status().data_blocks_used
    first = rig.held(FaultOp.WRITE, lambda: rig.volume.write(0, b"1" * SECTOR))
    second = rig.start(lambda: rig.volume.write(SECTOR, b"2" * SECTOR))
    assert_waits(second)
    rig.release()
    first.result(PATIENCE)
    second.result(PATIENCE)
    assert rig.volume.read(0, 3 * SECTOR) == b"1" * SECTOR + b"2" * SECTOR + bytes(SECTOR)
    assert rig.pool.status().data_blocks_used == used + 1


def test_a_read_during_a_first_write_sees_zeros_or_the_data(rig: Rig) -> None:
    write = rig.held(FaultOp.WRITE, lambda: rig.volume.write(0, b"1" * SECTOR))
    read = rig.start(lambda: rig.volume.read(0, BLOCK))
    time.sleep(A_WHILE)
    rig.release()
    write.result(PATIENCE)
    assert read.result(PATIENCE)[:SECTOR] in (bytes(SECTOR), b"1" * SECTOR)
    assert rig.volume.read(0, SECTOR) == b"1" * SECTOR


def test_breaking_sharing_twice_at_once_copies_once(rig: Rig) -> None:
    rig.volume.write(0, b"old" + bytes(BLOCK - 3))
    snapshot(rig, 2)
    broke = rig.pool.status().broke_sharing
    first = rig.held(FaultOp.READ, lambda: rig.volume.write(SECTOR, b"1" * SECTOR))
    second = rig.start(lambda: rig.volume.write(2 * SECTOR, b"2" * SECTOR))
    assert_waits(second)
    rig.release()
    first.result(PATIENCE)
    second.result(PATIENCE)
    assert rig.pool.status().broke_sharing == broke + 1
    found = rig.volume.read(0, 3 * SECTOR)
    assert found[:3] == b"old"
    assert found[SECTOR:] == b"1" * SECTOR + b"2" * SECTOR
    assert read_volume(rig, 2)[SECTOR:BLOCK] == bytes(BLOCK - SECTOR)


def test_first_writes_go_on_while_a_commit_is_being_written(rig: Rig) -> None:
    rig.volume.write(0, b"a" * SECTOR)
    commit = rig.held(FaultOp.FLUSH, rig.pool.commit)
    rig.start(lambda: rig.volume.write(BLOCK, b"b" * SECTOR)).result(PATIENCE)
    assert not commit.done()
    rig.release()
    commit.result(PATIENCE)
    assert rig.pool.status().dirty
    rig.pool.commit()
    assert not rig.pool.status().dirty


def test_what_is_freed_while_a_commit_is_written_waits_for_the_next_commit() -> None:
    """The commit being written still refers to it: a crash after it would show the new owner."""
    with Rig(data_blocks=2) as rig:
        rig.volume.write(0, b"a" * 2 * BLOCK)
        commit = rig.held(FaultOp.FLUSH, rig.pool.commit)
        rig.volume.discard(0, BLOCK)
        write = rig.start(lambda: rig.volume.write(2 * BLOCK, b"n" * BLOCK))
        assert_waits(write)  # it needs the commit after this one
        commits = rig.pool.status().commits
        rig.release()
        commit.result(PATIENCE)
        write.result(PATIENCE)
        assert rig.pool.status().commits >= commits + 2


def test_a_block_freed_in_the_open_transaction_is_not_reused_before_a_commit() -> None:
    with Rig(data_blocks=1) as rig:
        rig.volume.write(0, b"a" * BLOCK)
        rig.pool.commit()
        commits = rig.pool.status().commits
        rig.volume.discard(0, BLOCK)
        rig.volume.write(BLOCK, b"b" * BLOCK)
        assert rig.pool.status().commits == commits + 1
        with pytest.raises(DataSpaceError):
            rig.volume.write(2 * BLOCK, b"c")


def test_a_block_whose_host_space_is_being_returned_is_not_allocated() -> None:
    with Rig(data_blocks=2) as rig:
        rig.volume.write(0, b"a" * 2 * BLOCK)
        rig.pool.commit()
        rig.volume.discard(0, BLOCK)
        rig.pool.commit()
        punch = rig.held(FaultOp.PUNCH, lambda: rig.pool.punch_some(16))
        write = rig.start(lambda: rig.volume.write(2 * BLOCK, b"b" * BLOCK))
        assert_waits(write)
        rig.release()
        punch.result(PATIENCE)
        write.result(PATIENCE)
        assert rig.volume.read(2 * BLOCK, BLOCK) == b"b" * BLOCK


def test_a_partial_first_write_over_a_used_block_shows_no_stale_byte() -> None:
    """The block was someone else's and was not punched: what is not written reads as zeros."""
    with Rig(data_blocks=1) as rig:
        rig.volume.write(0, b"s" * BLOCK)
        rig.pool.commit()
        rig.volume.discard(0, BLOCK)
        rig.pool.commit()
        rig.volume.write(BLOCK + 3 * SECTOR + 7, b"mine")
        content = rig.volume.read(BLOCK, BLOCK)
        assert content == bytes(3 * SECTOR + 7) + b"mine" + bytes(BLOCK - 3 * SECTOR - 11)
