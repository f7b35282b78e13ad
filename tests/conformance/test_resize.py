"""Growing a pool's data and metadata."""

from __future__ import annotations

import threading

import pytest

from tests.conformance.driver import BLOCK, pattern
from thinpool import errors
from thinpool.engine.backend import PoolMode


def test_data_grows_without_io(driver):
    driver.make(data_blocks=8)
    driver.create(0)
    for block in range(8):
        driver.put(0, block, block)
    driver.grow_data_device(40)
    driver.pool.resize_data(40)
    assert driver.status().data_blocks_total == 40
    for block in range(8, 16):
        driver.put(0, block, block)
    driver.reopen()
    assert driver.status().data_blocks_total == 40
    assert all(driver.holds(0, block, block) for block in range(16))


def test_data_grows_many_times(driver):
    driver.make(data_blocks=4)
    driver.create(0)
    for blocks in range(5, 17):
        driver.grow_data_device(blocks)
        driver.pool.resize_data(blocks)
        driver.volume(0).write((blocks - 5) * BLOCK, pattern(blocks))
    assert driver.status().data_blocks_total == 16
    assert driver.used() == 12


def test_data_grows_under_io(driver):
    driver.make(data_blocks=16)
    volume = driver.new(0, blocks=512)
    done = threading.Event()
    written = []

    def write() -> None:
        block = 0
        while not done.is_set() or not block:
            try:
                volume.write(block * BLOCK, pattern(block))
            except errors.NoSpaceError:
                continue
            written.append(block)
            block += 1
            if block == 500:
                return

    with driver.meanwhile(write):
        for blocks in range(32, 129, 16):
            driver.grow_data_device(blocks)
            driver.pool.resize_data(blocks)
        done.set()
    assert driver.status().data_blocks_total == 128
    for block in written:
        assert volume.read(block * BLOCK, BLOCK) == pattern(block)
    driver.check()


def test_more_space_is_not_used_before_it_is_asked_for(driver):
    driver.make(data_blocks=4)
    volume = driver.new(0)
    driver.grow_data_device(32)
    volume.write(0, pattern(0, 4 * BLOCK))
    with pytest.raises(errors.NoSpaceError):
        volume.write(4 * BLOCK, pattern(4))
    assert driver.status().data_blocks_total == 4
    driver.reopen()
    assert driver.status().data_blocks_total == 4


def test_a_pool_does_not_shrink(driver):
    driver.make(data_blocks=16)
    driver.create(0)
    driver.put(0, 0, 1)
    with pytest.raises(errors.ThinpoolError):
        driver.pool.resize_data(8)
    assert driver.status().data_blocks_total == 16
    driver.put(0, 1, 2)
    assert driver.holds(0, 0, 1)


def test_more_than_the_device_has_is_refused(driver):
    driver.make(data_blocks=8)
    driver.create(0)
    with pytest.raises(errors.ThinpoolError):
        driver.pool.resize_data(16)
    assert driver.status().data_blocks_total == 8
    driver.put(0, 0, 1)
    assert driver.holds(0, 0, 1)


def test_data_smaller_than_the_pool_is_refused_at_opening(driver):
    driver.make(data_blocks=16)
    driver.create(0)
    driver.close()
    with driver.data_path.open("r+b") as file:
        file.truncate(8 * BLOCK)
    with pytest.raises(errors.ThinpoolError):
        driver.open()
    with driver.data_path.open("r+b") as file:
        file.truncate(16 * BLOCK)
    driver.open()
    assert driver.ids() == [0]


def test_metadata_grows_without_io(driver):
    driver.make(metadata_blocks=64)
    driver.create(0)
    driver.put(0, 0, 1)
    driver.grow_metadata_device(1024)
    driver.pool.resize_metadata()
    assert driver.status().metadata_blocks_total == 1024
    driver.reopen()
    assert driver.status().metadata_blocks_total == 1024
    assert driver.holds(0, 0, 1)


def test_metadata_grows_past_a_bitmap(driver):
    """More blocks than one bitmap of the space map holds, in steps."""
    driver.make(metadata_blocks=64)
    driver.create(0)
    for blocks in (16_321, 17_000):
        driver.grow_metadata_device(blocks)
        driver.pool.resize_metadata()
        driver.put(0, 0, blocks)
        assert driver.status().metadata_blocks_total == blocks
        driver.check()


def test_metadata_grows_under_io(driver):
    driver.make(metadata_blocks=64, data_blocks=256)
    volume = driver.new(0, blocks=256)
    done = threading.Event()
    written = []

    def write() -> None:
        while (not done.is_set() or not written) and len(written) < 200:
            block = len(written)
            volume.write(block * BLOCK, pattern(block))
            written.append(block)

    with driver.meanwhile(write):
        for blocks in range(128, 1025, 128):
            driver.grow_metadata_device(blocks)
            driver.pool.resize_metadata()
        done.set()
    for block in written:
        assert volume.read(block * BLOCK, BLOCK) == pattern(block)
    assert driver.status().metadata_blocks_total == 1024
    driver.check()


def exhaust(driver):
    """Make snapshots that each change something until metadata is out; the error that said so."""
    driver.make(metadata_blocks=128, data_blocks=256)
    driver.tolerated = driver.AFTER_METADATA_FULL
    driver.create(0)
    for number in range(1, 400):
        try:
            driver.put(0, 0, number)
            driver.snapshot(number, origin=0)
        except errors.ThinpoolError as error:
            return error
    raise AssertionError("400 volumes in 128 metadata blocks")


def test_exhausting_the_metadata_is_a_state_and_loses_nothing(driver):
    error = exhaust(driver)
    assert isinstance(error, driver.METADATA_FULL), repr(error)
    last = max(driver.ids())
    assert last > 3
    assert driver.holds(last, 0, last)
    driver.check()
    driver.close()
    driver.check()
    driver.open()
    assert driver.holds(last, 0, last)


def test_metadata_that_was_exhausted_grows_and_works_again(driver):
    exhaust(driver)
    driver.check_and_clear()
    driver.grow_metadata_device(1024)
    driver.pool.resize_metadata()
    assert driver.status().mode is PoolMode.RW
    driver.create(1000)
    driver.put(1000, 0, 1)
    assert driver.holds(1000, 0, 1)


def test_volumes_can_be_removed_after_exhausting_and_growing(driver):
    exhaust(driver)
    driver.check_and_clear()
    driver.grow_metadata_device(1024)
    driver.pool.resize_metadata()
    gone = driver.ids()
    driver.delete(*gone)
    assert driver.ids() == []
    assert driver.used() <= (1 if driver.tolerated else 0)
