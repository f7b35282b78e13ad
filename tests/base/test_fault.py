"""Each kind of scripted fault does what it says, when it says, and nothing else."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from thinpool._native import ffi, lib

KIB = 1024
SIZE = 64 * KIB
ALL = lib.TP_FAULT_READ | lib.TP_FAULT_WRITE | lib.TP_FAULT_FLUSH | lib.TP_FAULT_PUNCH


@pytest.fixture
def below(opener):
    """What is below holds 'o' (for old) everywhere."""
    device = opener.memory(SIZE)
    device.write(0, b"o" * SIZE)
    return device


@pytest.fixture
def fault(opener, below):
    return opener.fault(below)


def test_without_rules_everything_passes(fault, below):
    fault.write(0, b"n" * 4096)
    fault.punch(8192, 4096)
    fault.flush()
    assert fault.read(0, 4096) == b"n" * 4096
    assert below.read(0, 12288) == b"n" * 4096 + b"o" * 4096 + bytes(4096)
    assert fault.size == below.size
    assert fault.next_data(8192) == below.next_data(8192) == (12288, SIZE)
    assert (fault.operations, fault.fired) == (4, 0)


@pytest.mark.parametrize(
    ("op", "operation"),
    [
        (lib.TP_FAULT_READ, lambda device: device.read(0, 4096)),
        (lib.TP_FAULT_WRITE, lambda device: device.write(0, b"n" * 4096)),
        (lib.TP_FAULT_PUNCH, lambda device: device.punch(0, 4096)),
        (lib.TP_FAULT_FLUSH, lambda device: device.flush()),
    ],
)
def test_an_error_fails_one_operation_and_does_nothing(fault, below, core_error, op, operation):
    fault.add(op, lib.TP_FAULT_ERROR, errno=errno.ENOSPC)
    with pytest.raises(core_error) as caught:
        operation(fault)
    assert caught.value.status == lib.TP_E_IO
    assert caught.value.errno == errno.ENOSPC
    assert below.read(0, SIZE) == b"o" * SIZE
    operation(fault)
    assert (fault.operations, fault.fired) == (2, 1)


def test_an_error_without_an_errno_is_an_io_error(fault, core_error):
    fault.add(ALL, lib.TP_FAULT_ERROR)
    with pytest.raises(core_error) as caught:
        fault.flush()
    assert caught.value.errno == errno.EIO


def test_a_rule_waits_for_its_nth_operation_and_fires_as_often_as_asked(fault, core_error):
    fault.add(lib.TP_FAULT_WRITE, lib.TP_FAULT_ERROR, nth=3, count=2)
    outcomes = []
    for _ in range(6):
        fault.read(0, 16)  # of another kind: does not count
        try:
            fault.write(0, b"n" * 16)
        except core_error:
            outcomes.append("failed")
        else:
            outcomes.append("done")
    assert outcomes == ["done", "done", "failed", "failed", "done", "done"]


def test_a_rule_without_a_count_fires_until_it_is_cleared(fault, core_error):
    fault.add(lib.TP_FAULT_READ, lib.TP_FAULT_ERROR, count=0)
    for _ in range(5):
        with pytest.raises(core_error):
            fault.read(0, 16)
    fault.clear()
    assert fault.read(0, 16) == b"o" * 16
    assert fault.fired == 5


@pytest.mark.parametrize(
    ("offset", "length", "hit"),
    [(0, 4096, False), (0, 4097, True), (8191, 1, True), (8192, 4096, False), (5000, 10, True)],
)
def test_a_rule_acts_on_what_touches_its_range(fault, core_error, offset, length, hit):
    fault.add(lib.TP_FAULT_READ, lib.TP_FAULT_ERROR, within=(4096, 8192))
    if hit:
        with pytest.raises(core_error):
            fault.read(offset, length)
    else:
        fault.read(offset, length)


def test_the_first_rule_that_is_due_acts_and_the_others_stay_due(fault, core_error):
    fault.add(lib.TP_FAULT_WRITE, lib.TP_FAULT_ERROR, errno=errno.EIO, nth=2)
    fault.add(lib.TP_FAULT_WRITE, lib.TP_FAULT_ERROR, errno=errno.ENOSPC, nth=2)
    fault.write(0, b"n")
    found = []
    for _ in range(2):
        with pytest.raises(core_error) as caught:
            fault.write(0, b"n")
        found.append(caught.value.errno)
    assert found == [errno.EIO, errno.ENOSPC]
    fault.write(0, b"n")


@pytest.mark.parametrize("torn", [0, 1, 512, 1000, 4095, 4096, 9999])
@pytest.mark.parametrize("kind", ["memory", "direct"])
def test_a_torn_write_leaves_its_first_bytes(opener, tmp_path, core_error, kind, torn):
    if kind == "memory":
        below = opener.memory(SIZE)
    else:
        flags = lib.TP_BDEV_CREATE | lib.TP_BDEV_DIRECT
        below = opener.file(tmp_path / "device", flags, SIZE)
    below.write(0, b"o" * SIZE)
    fault = opener.fault(below)
    fault.add(lib.TP_FAULT_WRITE, lib.TP_FAULT_TORN, arg=torn)
    with pytest.raises(core_error) as caught:
        fault.write(8192, b"n" * 4096)
    assert caught.value.status == lib.TP_E_IO
    kept = min(torn, 4096)
    assert below.read(8192, 4096) == b"n" * kept + b"o" * (4096 - kept)
    assert below.read(0, 8192) == b"o" * 8192
    assert below.read(12288, SIZE - 12288) == b"o" * (SIZE - 12288)


def test_a_torn_punch_leaves_its_first_bytes(fault, below, core_error):
    fault.add(lib.TP_FAULT_PUNCH, lib.TP_FAULT_TORN, arg=1000)
    with pytest.raises(core_error):
        fault.punch(4096, 4096)
    assert below.read(0, 12288) == b"o" * 4096 + bytes(1000) + b"o" * (8192 - 1000)


def test_a_dropped_flush_is_acknowledged_and_not_passed_on(opener, below):
    log = opener.log(below)
    fault = opener.fault(log)
    fault.add(lib.TP_FAULT_FLUSH, lib.TP_FAULT_DROP_FLUSH)
    fault.flush()
    assert log.count == 0
    fault.flush()
    assert log.count == 1


def test_a_misdirected_write_lands_elsewhere(fault, below):
    fault.add(lib.TP_FAULT_WRITE, lib.TP_FAULT_MISDIRECT, arg=4096)
    fault.write(0, b"n" * 512)
    assert below.read(0, 8192) == b"o" * 4096 + b"n" * 512 + b"o" * 3584


def test_a_misdirected_read_goes_backwards_too(fault, below):
    below.write(0, b"n" * 512)
    fault.add(lib.TP_FAULT_READ, lib.TP_FAULT_MISDIRECT, arg=2**64 - 4096)
    assert fault.read(4096, 512) == b"n" * 512


def test_a_flipped_bit_of_a_write_reaches_the_device_and_not_the_buffer(fault, below):
    data = b"\0" * 1024
    fault.add(lib.TP_FAULT_WRITE, lib.TP_FAULT_BIT_FLIP, arg=8 * 100 + 3)
    fault.write(0, data)
    assert below.read(0, 1024) == b"\0" * 100 + b"\x08" + b"\0" * 923
    assert data == b"\0" * 1024


def test_a_flipped_bit_of_a_read_leaves_the_device_alone(fault, below):
    fault.add(lib.TP_FAULT_READ, lib.TP_FAULT_BIT_FLIP, arg=8 * 1024 + 1)  # modulo the transfer
    assert fault.read(0, 1024) == bytes([ord("o") ^ 2]) + b"o" * 1023
    assert below.read(0, 1024) == b"o" * 1024


@pytest.mark.parametrize("operation", ["write", "punch"])
def test_a_lost_write_is_acknowledged_and_not_done(fault, below, operation):
    fault.add(lib.TP_FAULT_WRITE | lib.TP_FAULT_PUNCH, lib.TP_FAULT_LOST_WRITE)
    if operation == "write":
        fault.write(0, b"n" * 512)
    else:
        fault.punch(0, 512)
    assert below.read(0, SIZE) == b"o" * SIZE
    assert fault.fired == 1


@pytest.mark.parametrize(
    "rule",
    [
        (0, lib.TP_FAULT_ERROR, (0, 1), 1),
        (16, lib.TP_FAULT_ERROR, (0, 1), 1),
        (lib.TP_FAULT_READ, lib.TP_FAULT_TORN, (0, 1), 1),
        (lib.TP_FAULT_WRITE, lib.TP_FAULT_DROP_FLUSH, (0, 1), 1),
        (lib.TP_FAULT_FLUSH, lib.TP_FAULT_MISDIRECT, (0, 1), 1),
        (lib.TP_FAULT_PUNCH, lib.TP_FAULT_BIT_FLIP, (0, 1), 1),
        (lib.TP_FAULT_READ, lib.TP_FAULT_LOST_WRITE, (0, 1), 1),
        (lib.TP_FAULT_READ, 99, (0, 1), 1),
        (lib.TP_FAULT_READ, lib.TP_FAULT_ERROR, (1, 1), 1),
        (lib.TP_FAULT_READ, lib.TP_FAULT_ERROR, (0, 1), 0),
    ],
)
def test_a_rule_that_cannot_be_is_refused(fault, core_error, rule):
    ops, kind, within, nth = rule
    with pytest.raises(core_error) as caught:
        fault.add(ops, kind, within=within, nth=nth)
    assert caught.value.status == lib.TP_E_INVALID
    fault.read(0, 1)
    assert fault.fired == 0


def test_a_held_operation_waits_for_the_release_and_then_goes_on(fault, below):
    fault.add(lib.TP_FAULT_WRITE, lib.TP_FAULT_HOLD)
    writer = threading.Thread(target=fault.write, args=(0, b"n" * 512))
    writer.start()
    deadline = time.monotonic() + 30
    while not lib.tp_bdev_fault_held(fault.ptr) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert lib.tp_bdev_fault_held(fault.ptr) == 1
    fault.write(512, b"m" * 512)  # the rule fired once: others pass it by
    assert below.read(0, 1024) == b"o" * 512 + b"m" * 512
    lib.tp_bdev_fault_release(fault.ptr)
    writer.join()
    assert below.read(0, 1024) == b"n" * 512 + b"m" * 512
    assert lib.tp_bdev_fault_held(fault.ptr) == 0


def test_a_device_of_another_kind_takes_no_rules(below):
    err = ffi.new("struct tp_error *")
    status = lib.tp_bdev_fault_add(below.ptr, ALL, lib.TP_FAULT_ERROR, 0, 1, 1, 1, 0, 0, err)
    assert status == lib.TP_E_INVALID
    lib.tp_bdev_fault_clear(below.ptr)
    assert lib.tp_bdev_fault_operations(below.ptr) == 0
    assert lib.tp_bdev_fault_fired(below.ptr) == 0
    lib.tp_bdev_fault_release(below.ptr)
    assert lib.tp_bdev_fault_held(below.ptr) == 0
