"""The write log holds what was done, in one order, and can do it again."""

from __future__ import annotations

import threading

import pytest

from thinpool._native import ffi, lib
from thinpool.engine import BlockDevice, LogDevice

KIB = 1024
SIZE = 256 * KIB
WRITE, FLUSH, PUNCH, MARK = (
    lib.TP_LOG_WRITE,
    lib.TP_LOG_FLUSH,
    lib.TP_LOG_PUNCH,
    lib.TP_LOG_MARK,
)


@pytest.fixture
def log(opener):
    return opener.log(opener.memory(SIZE), number=7)


def entries(log):
    return [log.entry(index) for index in range(log.count)]


def test_every_change_is_recorded_in_order_and_passed_on(log):
    log.write(0, b"a" * 512)
    log.punch(4096, 8192)
    log.flush()
    log.mark(41)
    log.read(0, 512)
    log.write(512, b"b")
    assert entries(log) == [
        (WRITE, 7, 0, 512),
        (PUNCH, 7, 4096, 8192),
        (FLUSH, 7, 2, 0),
        (MARK, 7, 41, 0),
        (WRITE, 7, 512, 1),
    ]
    assert log.payload(0) == b"a" * 512
    assert log.payload(4) == b"b"
    assert log.read(0, 514) == b"a" * 512 + b"b\0"


def test_past_the_end_of_the_log_there_is_nothing(log):
    out = ffi.new("struct tp_log_entry *")
    assert lib.tp_bdev_log_entry(log.ptr, 0, out) == lib.TP_E_OUT_OF_RANGE
    assert lib.tp_bdev_log_payload(log.ptr, 0, ffi.new("char[1]")) == lib.TP_E_OUT_OF_RANGE


def test_only_a_write_has_a_payload(log):
    log.flush()
    assert lib.tp_bdev_log_payload(log.ptr, 0, ffi.new("char[1]")) == lib.TP_E_INVALID


def test_devices_that_share_an_order_share_the_log(opener):
    first = opener.log(opener.memory(SIZE), number=1)
    second = opener.log(opener.memory(SIZE), order=first, number=2)
    first.write(0, b"a")
    second.write(1, b"b")
    first.flush()
    second.flush()
    expected = [(WRITE, 1, 0, 1), (WRITE, 2, 1, 1), (FLUSH, 1, 2, 0), (FLUSH, 2, 3, 0)]
    assert entries(first) == entries(second) == expected
    first.close()
    assert entries(second) == expected
    assert second.payload(0) == b"a"


def test_an_order_must_be_a_log(opener, core_error):
    memory = opener.memory(SIZE)
    with pytest.raises(core_error) as caught:
        opener.log(memory, order=memory)
    assert caught.value.status == lib.TP_E_INVALID


def test_what_failed_is_not_in_the_log(opener, core_error):
    fault = opener.fault(opener.memory(SIZE))
    log = opener.log(fault)
    ops = lib.TP_FAULT_WRITE | lib.TP_FAULT_FLUSH | lib.TP_FAULT_PUNCH
    fault.add(ops, lib.TP_FAULT_ERROR, count=3)
    for operation in (lambda: log.write(0, b"a"), log.flush, lambda: log.punch(0, 1)):
        with pytest.raises(core_error):
            operation()
    assert log.count == 0
    log.write(0, b"b")
    assert entries(log) == [(WRITE, 0, 0, 1)]


def test_a_replay_of_the_whole_log_makes_the_device_again(opener, log, rng):
    """Random work on two devices of one order; each is rebuilt from the log, and cut anywhere."""
    other = opener.log(opener.memory(SIZE), order=log, number=8)
    history = []
    for _ in range(200):
        device = rng.choice([log, other])
        begin = rng.randrange(SIZE)
        length = rng.randrange(1, min(9000, SIZE - begin) + 1)
        what = rng.random()
        if what < 0.7:
            device.write(begin, rng.randbytes(length))
        elif what < 0.9:
            device.punch(begin, length)
        else:
            device.flush()
        history.append(log.read(0, SIZE))
    assert log.count == len(history)
    cut = rng.randrange(1, len(history))
    image = opener.memory(SIZE)
    log.replay(0, cut, 7, image)
    assert image.read(0, SIZE) == history[cut - 1]
    log.replay(cut, log.count, 7, image)
    assert image.read(0, SIZE) == log.read(0, SIZE)
    image_of_other = opener.memory(SIZE)
    log.replay(0, log.count, 8, image_of_other)
    assert image_of_other.read(0, SIZE) == other.read(0, SIZE)


def test_the_engines_log_replays_too():
    with (
        BlockDevice.open_memory(SIZE) as below,
        LogDevice.over(below, device_number=3) as log,
        BlockDevice.open_memory(SIZE) as image,
    ):
        log.write(0, b"first")
        log.flush()
        log.write(0, b"other")
        assert [entry.offset for entry in log] == [0, 1, 0]
        log.replay(image, begin=0, end=2, device_number=3)
        assert image.read(0, 5) == b"first"
        log.replay(image, begin=2, end=3, device_number=4)
        assert image.read(0, 5) == b"first"
        log.replay(image, begin=2, end=3, device_number=3)
        assert image.read(0, 5) == b"other"


def test_a_replay_past_the_end_fails(opener, log, core_error):
    with pytest.raises(core_error) as caught:
        log.replay(0, 1, 7, opener.memory(SIZE))
    assert caught.value.status == lib.TP_E_OUT_OF_RANGE


def test_a_flush_covers_only_what_had_completed_when_it_began(log):
    """Writers and flushers at once: what a thread flushed, its own flush entry covers."""
    nr_threads, nr_writes = 4, 150
    failures = []

    def work(number):
        try:
            for count in range(nr_writes):
                data = bytes([number]) + count.to_bytes(2, "little")
                log.write(number * 4096 + count * 8, data)
                log.flush()
                log.mark(number * 1000 + count)
        except Exception as error:  # noqa: BLE001 - shown by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(nr_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    found = entries(log)
    assert len(found) == nr_threads * nr_writes * 3
    written = {}
    covered = 0
    for index, (kind, _, offset, _) in enumerate(found):
        if kind == WRITE:
            number, count = offset // 4096, offset % 4096 // 8
            assert log.payload(index) == bytes([number]) + count.to_bytes(2, "little")
            written[number * 1000 + count] = index
        elif kind == FLUSH:
            assert offset <= index
            covered = max(covered, offset)
        else:
            assert written[offset] < covered
    assert len(written) == nr_threads * nr_writes
