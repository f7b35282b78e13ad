"""Handles on pools, volumes and devices: contents, ownership, misuse."""

import errno
import gc
import os
import select
import threading
import time
import warnings

import pytest

from thinpool import errors
from thinpool._native import ffi
from thinpool.engine import (
    BlockDevice,
    Change,
    ChangeKind,
    FaultDevice,
    FaultKind,
    FaultOp,
    LogDevice,
    LogKind,
    Pool,
    PoolMode,
    PoolOptions,
    PoolStatus,
    flush_when_due,
    format_pool,
)
from thinpool.engine.pool import _INFO, _STATUS
from thinpool.model import VolumeId

BLOCK = 64 << 10
GIB = 1 << 30


@pytest.fixture
def devices():
    with BlockDevice.open_memory(8 << 20) as metadata, BlockDevice.open_memory(256 * BLOCK) as data:
        format_pool(metadata, block_size=BLOCK, data_blocks=256)
        yield metadata, data


@pytest.fixture
def pool(devices):
    with Pool.open(*devices, PoolOptions(commit_interval_ms=0)) as pool:
        yield pool


def create(pool, number, origin=None):
    tid = pool.status().transaction_id
    kind = ChangeKind.CREATE if origin is None else ChangeKind.SNAPSHOT
    pool.apply([Change(kind=kind, id=number, origin=origin)], expected=tid, new=tid + 1)


def test_volume_reads_back_what_was_written_and_zeros_elsewhere(pool):
    create(pool, VolumeId(3))
    with pool.open_volume(3, size=GIB) as volume:
        volume.write(BLOCK - 7, b"0123456789")
        assert volume.read(BLOCK - 8, 12) == b"\0" + b"0123456789" + b"\0"
        buffer = bytearray(b"x" * 4)
        volume.read_into(BLOCK - 7, buffer)
        assert buffer == b"0123"
        assert volume.next_data(0) == (0, 2 * BLOCK)
        assert volume.next_data(2 * BLOCK) is None
        assert volume.lookup(0) is not None
        assert volume.lookup(9) is None
        volume.zero(0, 2 * BLOCK)
        assert volume.next_data(0) is None
    assert pool.volume_info(3).mapped_blocks == 0


def test_snapshot_keeps_what_the_origin_had(pool):
    create(pool, 0)
    with pool.open_volume(0, size=GIB) as origin:
        origin.write(0, b"before")
        create(pool, 1, origin=0)
        origin.write(0, b"after!")
        with pool.open_volume(1, size=GIB, read_only=True) as snapshot:
            assert snapshot.read(0, 6) == b"before"
            with pytest.raises(errors.ReadOnlyError):
                snapshot.write(0, b"x")
    assert [info.id for info in pool.volumes()] == [0, 1]


def test_apply_refuses_another_transaction_id(pool):
    with pytest.raises(errors.TransactionIdError) as caught:
        pool.apply([Change(kind=ChangeKind.CREATE, id=0)], expected=7, new=8)
    assert (caught.value.found, caught.value.wanted) == (0, 7)
    assert list(pool.volumes()) == []


def test_listing_is_complete_beyond_one_batch(pool):
    changes = [Change(kind=ChangeKind.CREATE, id=VolumeId(number)) for number in range(1100)]
    for begin in range(0, 1100, 275):
        tid = pool.status().transaction_id
        pool.apply(changes[begin : begin + 275], expected=tid, new=tid + 1)
    assert [info.id for info in pool.volumes()] == list(range(1100))


def test_readers_buffer_must_be_writable(pool):
    create(pool, 0)
    with pool.open_volume(0, size=GIB) as volume, pytest.raises(BufferError):
        volume.read_into(0, b"read-only")


def test_volume_opened_twice_is_busy(pool):
    create(pool, 0)
    with pool.open_volume(0, size=GIB), pytest.raises(errors.BusyError):
        pool.open_volume(0, size=GIB)


def test_pool_with_open_volumes_stays_open(devices):
    pool = Pool.open(*devices)
    create(pool, 0)
    volume = pool.open_volume(0, size=GIB)
    with pytest.raises(errors.BusyError):
        pool.close()
    assert not pool.closed
    volume.write(0, b"still works")
    volume.close()
    pool.close()
    pool.close()
    assert pool.closed
    with pytest.raises(errors.ClosedError):
        pool.status()


def test_device_under_a_pool_stays_open(devices):
    with Pool.open(*devices):
        for device in devices:
            with pytest.raises(errors.BusyError):
                device.close()


def test_pool_that_was_closed_has_committed_and_one_abandoned_has_not(devices):
    with Pool.open(*devices, PoolOptions(commit_interval_ms=0)) as pool:
        pool.create_volume(1)
    pool = Pool.open(*devices, PoolOptions(commit_interval_ms=0))
    pool.create_volume(2)
    pool.abandon()
    with Pool.open(*devices) as pool:
        assert [info.id for info in pool.volumes()] == [1]


def test_forgotten_handle_warns_and_commits_nothing(devices):
    pool = Pool.open(*devices, PoolOptions(commit_interval_ms=0))
    pool.create_volume(1)
    volume = pool.open_volume(1, size=GIB)
    for forget, message in (
        ("volume", "volume 1 was never closed"),
        ("pool", "the pool was never closed"),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if forget == "volume":
                del volume
            else:
                del pool
            gc.collect()
        assert [str(each.message) for each in caught] == [message]
        del caught  # a recorded warning keeps its source
    for device in devices:
        device._users = 0  # the forgotten pool never gave them back
    with Pool.open(*devices) as pool:
        assert list(pool.volumes()) == []


def test_handle_is_refused_in_a_forked_child(pool):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            pool.status()
        except errors.ClosedError as error:
            status = 0 if "fork" in error.message else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert pool.status().mode is PoolMode.RW


def test_close_waits_for_calls_in_other_threads(devices):
    pool = Pool.open(*devices)
    sequence = pool.wait_event(0, timeout_ms=0)
    returned = []

    def wait():
        pool.wait_event(sequence, timeout_ms=400)
        returned.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    while pool._calls == 0:
        time.sleep(0.001)
    pool.close()
    thread.join()
    assert pool.closed
    assert len(returned) == 1


def test_failed_metadata_write_turns_the_pool_read_only():
    with (
        BlockDevice.open_memory(4 << 20) as below,
        BlockDevice.open_memory(64 * BLOCK) as data,
        FaultDevice.over(below) as metadata,
    ):
        format_pool(metadata, block_size=BLOCK, data_blocks=64)
        pool = Pool.open(metadata, data, PoolOptions(commit_interval_ms=0))
        create(pool, 0)
        metadata.add(FaultKind.ERROR, FaultOp.FLUSH, host_errno=errno.EIO)
        with pytest.raises(errors.ThinpoolError):
            create(pool, 1)
        assert metadata.fired == 1
        assert pool.status().mode in {PoolMode.RO, PoolMode.FAIL}
        with pytest.raises(errors.ThinpoolError):
            create(pool, 2)
        with pytest.raises(errors.NeedsCheckError):
            pool.close()
        assert pool.closed


def test_full_host_is_a_state_that_ends_with_the_next_write_that_fits():
    with (
        BlockDevice.open_memory(4 << 20) as metadata,
        BlockDevice.open_memory(64 * BLOCK) as below,
        FaultDevice.over(below) as data,
    ):
        format_pool(metadata, block_size=BLOCK, data_blocks=64)
        with Pool.open(metadata, data, PoolOptions(error_if_no_space=True)) as pool:
            create(pool, 0)
            with pool.open_volume(0, size=GIB) as volume:
                data.add(FaultKind.ERROR, FaultOp.WRITE, count=0, host_errno=errno.ENOSPC)
                with pytest.raises(errors.DataSpaceError):
                    volume.write(0, b"x" * (4 * BLOCK))
                assert pool.status().mode is PoolMode.OUT_OF_DATA_SPACE
                data.clear()
                volume.write(0, b"y" * (4 * BLOCK))
                assert pool.status().mode is PoolMode.RW
                assert volume.read(0, 4 * BLOCK) == b"y" * (4 * BLOCK)


def test_log_records_writes_with_their_payload():
    with BlockDevice.open_memory(1 << 20) as below, LogDevice.over(below) as log:
        log.write(4096, b"x" * 512)
        log.flush()
        log.mark(9)
        entries = list(log)
    assert [entry.kind for entry in entries] == [LogKind.WRITE, LogKind.FLUSH, LogKind.MARK]
    assert (entries[0].offset, entries[0].payload) == (4096, b"x" * 512)
    assert entries[2].offset == 9


def test_file_locked_by_another_open_is_busy(tmp_path):
    path = tmp_path / "metadata"
    with (
        BlockDevice.open_file(path, create_size=1 << 20, exclusive=True),
        pytest.raises(errors.BusyError),
    ):
        BlockDevice.open_file(path, exclusive=True)
    with pytest.raises(errors.ThinpoolError) as caught:
        BlockDevice.open_file(path, create_size=1 << 20)
    assert str(path) in caught.value.message


def test_file_that_is_missing_is_not_found(tmp_path):
    with pytest.raises(errors.NotFoundError) as caught:
        BlockDevice.open_file(tmp_path / "nothing")
    assert caught.value.path == str(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("fill", "kind"), [(b"\0", errors.CorruptMetadataError), (b"\xa5", errors.CorruptMetadataError)]
)
def test_metadata_that_is_none_is_refused(fill, kind):
    with (
        BlockDevice.open_memory(4 << 20) as metadata,
        BlockDevice.open_memory(64 * BLOCK) as data,
    ):
        metadata.write(0, fill * 4096)
        with pytest.raises(kind):
            Pool.open(metadata, data)


def test_status_is_read_field_by_field_as_the_core_has_it(devices):
    """Every field at once: the struct has no gaps, and the order is that of PoolStatus."""
    assert _STATUS.size == ffi.sizeof("struct tp_pool_status")
    raw = ffi.new("struct tp_pool_status *")
    names = [name for name, _ in ffi.typeof("struct tp_pool_status").fields]
    assert names == list(PoolStatus._fields)
    for value, name in enumerate(names, start=1):
        setattr(raw, name, value)
    assert _STATUS.unpack(ffi.buffer(raw)) == tuple(range(1, len(names) + 1))
    metadata, data = devices
    with Pool.open(metadata, data) as pool:
        pool.create_volume(VolumeId(3))
        found = pool.status()
    assert (found.mode, found.needs_check, found.dirty) == (PoolMode.RW, False, True)
    assert (found.data_block_size, found.data_blocks_total, found.nr_volumes) == (BLOCK, 256, 1)


def test_all_volumes_are_told_as_each_is_by_itself(tmp_path):
    """Of more than one batch, and with values that differ in every field."""
    assert _INFO.size == ffi.sizeof("struct tp_volume_info")
    fields = ("id", "creation_time", "snapshotted_time", "open", "mapped_blocks", "transaction_id")
    found = [ffi.offsetof("struct tp_volume_info", name) for name in fields]
    assert found == [0, 4, 8, 12, 16, 24]
    with (
        BlockDevice.open_file(tmp_path / "m", create_size=8 << 20) as metadata,
        BlockDevice.open_file(tmp_path / "d", create_size=16 * BLOCK) as data,
    ):
        format_pool(metadata, block_size=BLOCK, data_blocks=16)
        with Pool.open(metadata, data) as pool:
            pool.create_volume(VolumeId(3))
            with pool.open_volume(VolumeId(3), size=16 * BLOCK) as volume:
                volume.write(0, bytes(5 * BLOCK))
                for first in range(10, 2110, 700):
                    changes = [
                        Change(kind=ChangeKind.SNAPSHOT, id=VolumeId(each), origin=VolumeId(3))
                        for each in range(first, first + 700)
                    ]
                    now = pool.status().transaction_id
                    pool.apply(changes, expected=now, new=now + 1)
                    volume.write((5 + first // 700) * BLOCK, b"x")
                infos = list(pool.volumes())
                assert len(infos) == 2101
                assert infos == [pool.volume_info(each.id) for each in infos]
                assert pool.mapped_blocks() == {each.id: each.mapped_blocks for each in infos}
                assert len({each.mapped_blocks for each in infos}) > 2
                assert pool.has_volume(VolumeId(3))
                assert not pool.has_volume(VolumeId(4))


def test_flush_beside_says_when_it_is_done_when_it_failed_and_when_it_ends(tmp_path):
    due, ended = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
    with (tmp_path / "f").open("wb") as file:
        file.write(b"x")
        file.flush()
        os.eventfd_write(due, 1)
        flush_when_due(file.fileno(), due=due, ended=-1)
        seen = []

        def beside():
            try:
                flush_when_due(file.fileno(), due=due, ended=ended)
            except errors.ClosedError as error:
                seen.append(error)

        thread = threading.Thread(target=beside)
        thread.start()
        for _ in range(3):
            os.eventfd_write(due, 1)
            assert select.select([ended], [], [], 10)[0]
            assert os.eventfd_read(ended) == 1
        os.eventfd_write(due, 2)
        thread.join(10)
        assert len(seen) == 1
    ends = os.pipe()
    os.eventfd_write(due, 1)
    with pytest.raises(errors.StorageIOError) as caught:
        flush_when_due(ends[0], due=due, ended=ended)
    assert caught.value.attributes["errno"] == errno.EINVAL
    assert not select.select([ended], [], [], 0)[0]
    for each in (*ends, due, ended):
        os.close(each)
