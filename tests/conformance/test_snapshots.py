"""Snapshots: what is shared, what is not, and under writes."""

from __future__ import annotations

import threading

import pytest

from tests.conformance.driver import BLOCK, SECTOR, pattern
from thinpool import errors


@pytest.mark.parametrize("active", [False, True], ids=["inactive", "active"])
def test_a_snapshot_has_what_its_origin_had(driver, active):
    driver.make()
    driver.create(0)
    for block in range(8):
        driver.put(0, block, block)
    if not active:
        driver.close_volume(0)
    driver.snapshot(1, origin=0)
    assert driver.used() == 8, "nothing is copied"
    assert driver.mapped(1) == 8
    assert all(driver.holds(1, block, block) for block in range(8))
    assert driver.holds(1, 8, None)


def test_writes_to_either_side_stay_there(driver):
    driver.make()
    driver.create(0)
    for block in range(6):
        driver.put(0, block, block)
    driver.snapshot(1, origin=0)
    driver.put(0, 0, 100)
    driver.put(1, 1, 101)
    driver.put(0, 7, 102)
    assert [driver.holds(0, 0, 100), driver.holds(1, 0, 0)] == [True, True]
    assert [driver.holds(0, 1, 1), driver.holds(1, 1, 101)] == [True, True]
    assert [driver.holds(0, 7, 102), driver.holds(1, 7, None)] == [True, True]
    assert all(driver.holds(each, block, block) for each in (0, 1) for block in range(2, 6))
    assert driver.used() == 9
    where = driver.check()
    assert {b for b in range(6) if where[0][b] == where[1][b]} == {2, 3, 4, 5}


def test_a_partial_write_keeps_the_rest_of_a_shared_block(driver):
    driver.make()
    driver.create(0)
    driver.put(0, 0, 1)
    driver.snapshot(1, origin=0)
    driver.volume(1).write(3 * SECTOR + 7, b"changed")
    expected = bytearray(pattern(1))
    expected[3 * SECTOR + 7 : 3 * SECTOR + 14] = b"changed"
    assert driver.volume(1).read(0, BLOCK) == bytes(expected)
    assert driver.holds(0, 0, 1)


def test_snapshots_of_snapshots(driver):
    driver.make()
    driver.create(0)
    for depth in range(8):
        driver.put(depth, 0, depth)
        driver.put(depth, depth + 1, 100 + depth)
        driver.snapshot(depth + 1, origin=depth)
    driver.reopen()
    for depth in range(8):
        assert driver.holds(depth, 0, depth)
        assert all(driver.holds(depth, each + 1, 100 + each) for each in range(depth + 1))
        assert driver.holds(depth, depth + 2, None)
    assert driver.holds(8, 0, 7)


def test_lots_of_snapshots_of_one_volume(driver):
    driver.make()
    driver.create(0)
    driver.put(0, 0, 1)
    for each in range(1, 101):
        driver.snapshot(each, origin=0)
    assert driver.used() == 1
    where = driver.check()
    assert where == dict.fromkeys(range(101), where[0])
    assert driver.holds(100, 0, 1)


def test_lots_of_recursive_snapshots(driver):
    driver.make()
    driver.create(0)
    driver.put(0, 0, 1)
    for each in range(1, 101):
        driver.snapshot(each, origin=each - 1)
    driver.put(50, 0, 2)
    assert driver.used() == 2
    assert driver.holds(49, 0, 1)
    assert driver.holds(51, 0, 1)
    assert driver.holds(50, 0, 2)


def test_many_snapshots_with_changes_between_them(driver):
    driver.make()
    driver.create(0)
    for each in range(1, 13):
        driver.put(0, each % 4, each)
        driver.snapshot(each, origin=0)
    for each in range(1, 13):
        for block in range(4):
            last = max((n for n in range(1, each + 1) if n % 4 == block), default=None)
            assert driver.holds(each, block, last), (each, block)
    assert driver.used() == 12


def test_space_is_that_of_what_differs(driver):
    driver.make()
    driver.create(0)
    for block in range(10):
        driver.put(0, block, block)
    driver.snapshot(1, origin=0)
    assert driver.used() == 10
    driver.put(1, 0, 50)
    assert driver.used() == 11
    driver.delete(0)
    assert driver.used() == 10
    driver.delete(1)
    assert driver.used() == 0


def test_reference_counts_of_a_tree_of_snapshots(driver):
    """Whatever is deleted first, the rest has its data, and at last all space is free."""
    driver.make()
    driver.create(0)
    for block in range(4):
        driver.put(0, block, block)
    family = {1: 0, 2: 0, 3: 1, 4: 1, 5: 3}
    for child, parent in family.items():
        driver.snapshot(child, origin=parent)
        driver.put(child, child % 4, 10 * child)
    for gone in (1, 0, 3, 5, 2):
        left = set(driver.ids()) - {gone}
        driver.delete(gone)
        driver.check()
        for each in left:
            if each:
                assert driver.holds(each, each % 4, 10 * each)
    assert driver.holds(4, 0, 40)
    assert driver.holds(4, 1, 10)
    assert driver.holds(4, 2, 2)
    assert driver.used() == 4
    driver.delete(4)
    assert driver.used() == 0


def test_duplicates_are_refused_and_change_nothing(driver):
    driver.make()
    driver.create(0)
    driver.put(0, 0, 1)
    driver.snapshot(1, origin=0)
    driver.put(1, 0, 2)
    before = driver.check()
    with pytest.raises(errors.AlreadyExistsError):
        driver.create(0)
    with pytest.raises(errors.AlreadyExistsError):
        driver.snapshot(1, origin=0)
    with pytest.raises(errors.AlreadyExistsError):
        driver.snapshot(0, origin=0)
    assert driver.check() == before
    assert driver.holds(1, 0, 2)


def test_a_snapshot_of_what_is_not_there_is_refused(driver):
    driver.make()
    driver.create(0)
    with pytest.raises(errors.NotFoundError):
        driver.snapshot(1, origin=5)
    assert driver.ids() == [0]


def test_a_broken_block_is_copied_once(driver):
    driver.make()
    driver.create(0)
    driver.put(0, 0, 1)
    driver.snapshot(1, origin=0)
    for number in range(5):
        driver.put(0, 0, 10 + number)
    assert driver.used() == 2


def test_snapshots_under_parallel_writes_are_of_one_moment(driver):
    """A writer counts up through the blocks in order: a snapshot is a moment of that."""
    driver.make(data_blocks=256)
    volume = driver.new(0, blocks=8)
    done = threading.Event()

    def write() -> None:
        round_ = 0
        while not done.is_set():
            round_ += 1
            for block in range(8):
                volume.write(block * BLOCK, round_.to_bytes(8, "little") * (SECTOR // 8))

    with driver.meanwhile(write):
        for each in range(1, 11):
            driver.snapshot(each, origin=0)
        done.set()
    last = 0
    for each in range(1, 11):
        snapshot = driver.volume(each, blocks=8)
        rounds = [int.from_bytes(snapshot.read(block * BLOCK, 8), "little") for block in range(8)]
        assert rounds == sorted(rounds, reverse=True), "a later block was written before"
        assert rounds[0] - rounds[-1] <= 1
        assert rounds[-1] >= last, "snapshots do not go back"
        last = rounds[-1]
        driver.close_volume(each)
    driver.check()


def test_parallel_writes_to_volumes_that_share(driver):
    driver.make(data_blocks=128)
    driver.create(0)
    for block in range(16):
        driver.put(0, block, block)
    for each in range(1, 5):
        driver.snapshot(each, origin=0)
    volumes = [driver.volume(each) for each in range(5)]

    def writer(number: int):
        def write() -> None:
            for block in range(0, 16, 2):
                volumes[number].write(block * BLOCK, pattern(1000 * number + block))

        return write

    threads = [threading.Thread(target=writer(number)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    for number in range(5):
        for block in range(16):
            changed = number and block % 2 == 0
            assert driver.holds(number, block, 1000 * number + block if changed else block)
    assert driver.used() == 16 + 4 * 8
