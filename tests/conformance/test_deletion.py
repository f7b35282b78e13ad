"""Deleting volumes."""

from __future__ import annotations

import threading

import pytest

from tests.conformance.driver import BLOCK, pattern
from thinpool import errors


def test_an_id_that_is_used_again_begins_empty(driver):
    driver.make()
    for number in range(8):
        driver.create(0)
        assert driver.holds(0, 0, None)
        driver.put(0, 0, number)
        assert driver.holds(0, 0, number)
        driver.delete(0)
    assert driver.used() == 0


def test_many_are_made_and_then_deleted(driver):
    driver.make()
    driver.create(*range(100))
    driver.delete(*range(100))
    assert driver.ids() == []
    assert driver.check() == {}


def test_rolling_creation_and_deletion(driver):
    driver.make()
    for each in range(40):
        driver.create(each)
        driver.put(each, 0, each)
        if each >= 5:
            driver.delete(each - 5)
    assert driver.ids() == list(range(35, 40))
    assert all(driver.holds(each, 0, each) for each in range(35, 40))
    assert driver.used() == 5


def test_a_fully_provisioned_volume_gives_all_its_space_back(driver):
    driver.make(data_blocks=32)
    driver.create(0)
    driver.volume(0, blocks=32).write(0, pattern(1, 32 * BLOCK))
    assert driver.used() == 32
    driver.delete(0)
    assert driver.used() == 0
    driver.create(1)
    driver.volume(1, blocks=32).write(0, pattern(2, 32 * BLOCK))
    assert driver.volume(1).read(0, 32 * BLOCK) == pattern(2, 32 * BLOCK)


def test_an_unknown_volume_cannot_be_deleted(driver):
    driver.make()
    driver.create(0)
    before = driver.pool.status().transaction_id
    with pytest.raises(errors.NotFoundError):
        driver.delete(7)
    assert driver.pool.status().transaction_id == before
    assert driver.ids() == [0]


def test_an_active_volume_cannot_be_deleted(driver):
    from thinpool.engine.backend import Change, ChangeKind  # noqa: PLC0415

    driver.make()
    driver.create(0)
    driver.put(0, 0, 1)
    with pytest.raises(errors.BusyError):
        driver.apply(Change(kind=ChangeKind.DELETE, id=0))
    assert driver.holds(0, 0, 1)
    driver.close_volume(0)
    driver.delete(0)
    assert driver.ids() == []


def test_deleting_while_io_goes_on_elsewhere(driver):
    driver.make(data_blocks=128)
    driver.create(0)
    for block in range(16):
        driver.put(0, block, block)
    for each in range(1, 9):
        driver.snapshot(each, origin=0)
    volume = driver.volume(0)
    done = threading.Event()
    rounds = []

    def write() -> None:
        number = 0
        while not done.is_set() or number < 2:
            number += 1
            for block in range(16):
                volume.write(block * BLOCK, pattern(1000 * number + block))
        rounds.append(number)

    with driver.meanwhile(write):
        for each in range(1, 9):
            driver.delete(each)
        done.set()
    assert all(driver.holds(0, block, 1000 * rounds[0] + block) for block in range(16))
    assert driver.used() == 16
    driver.check()


def test_deleting_makes_room_when_space_was_out(driver):
    driver.make(data_blocks=8)
    driver.create(0, 1)
    for block in range(8):
        driver.put(0, block, block)
    with pytest.raises(errors.NoSpaceError):
        driver.put(1, 0, 1)
    driver.delete(0)
    driver.put(1, 0, 2)
    assert driver.holds(1, 0, 2)
    assert driver.used() == 1


def test_a_deleted_origin_leaves_its_snapshots(driver):
    driver.make()
    driver.create(0)
    for block in range(4):
        driver.put(0, block, block)
    driver.snapshot(1, origin=0)
    driver.delete(0)
    driver.reopen()
    assert all(driver.holds(1, block, block) for block in range(4))
