"""Metadata snapshots."""

from __future__ import annotations

import pytest

from tests.conformance.driver import judge
from thinpool import errors
from thinpool.check.reader import MetadataReader
from thinpool.engine import BlockDevice


def held_dump(driver):
    """What the metadata snapshot says, read beside the running pool."""
    image = driver.metadata_image()
    with BlockDevice.open_memory(len(image)) as device:
        device.write(0, image)
        with MetadataReader(device, use_metadata_snapshot=True) as reader:
            return {
                details.id: {
                    run.begin + i: run.data_begin + i
                    for run in reader.runs(details.id)
                    for i in range(run.length)
                }
                for details in reader.devices()
            }


def test_a_new_pool_holds_none(driver):
    driver.make()
    assert driver.pool.status().held_root == 0


def test_holding_and_releasing_on_an_empty_pool(driver):
    driver.make()
    for _ in range(5):
        driver.pool.reserve_metadata_snapshot()
        assert driver.pool.status().held_root
        driver.check()
        driver.pool.release_metadata_snapshot()
        assert driver.pool.status().held_root == 0
        driver.check()


def test_one_cannot_be_held_twice(driver):
    driver.make()
    driver.create(0)
    driver.pool.reserve_metadata_snapshot()
    root = driver.pool.status().held_root
    with pytest.raises(errors.BusyError):
        driver.pool.reserve_metadata_snapshot()
    assert driver.pool.status().held_root == root


def test_one_cannot_be_released_twice(driver):
    driver.make()
    driver.pool.reserve_metadata_snapshot()
    driver.pool.release_metadata_snapshot()
    with pytest.raises(errors.NotFoundError):
        driver.pool.release_metadata_snapshot()
    driver.create(0)
    assert driver.ids() == [0]


def test_it_says_what_was_while_the_pool_goes_on(driver):
    driver.make()
    driver.create(0)
    for block in range(4):
        driver.put(0, block, block)
    driver.snapshot(1, origin=0)
    was = driver.check()
    driver.pool.reserve_metadata_snapshot()
    for block in range(4):
        driver.put(0, block + 2, 100 + block)
    driver.delete(1)
    driver.create(2)
    driver.put(2, 0, 50)
    assert held_dump(driver) == was
    assert driver.check() != was
    driver.pool.release_metadata_snapshot()
    driver.check()


def test_what_was_deleted_keeps_its_space_until_the_release(driver):
    driver.make()
    driver.create(0)
    for block in range(8):
        driver.put(0, block, block)
    driver.pool.reserve_metadata_snapshot()
    driver.delete(0)
    assert driver.used() == 8
    driver.pool.release_metadata_snapshot()
    assert driver.used() == 0


def test_it_is_kept_over_a_reopen(driver):
    driver.make()
    driver.create(0)
    driver.put(0, 0, 1)
    driver.pool.reserve_metadata_snapshot()
    root = driver.pool.status().held_root
    driver.put(0, 1, 2)
    driver.reopen()
    assert driver.pool.status().held_root == root
    assert set(held_dump(driver)[0]) == {0}
    driver.pool.release_metadata_snapshot()


def test_many_cycles_with_changes_leave_nothing_behind(driver):
    driver.make()
    driver.create(0)
    for number in range(20):
        driver.pool.reserve_metadata_snapshot()
        driver.put(0, number % 8, number)
        assert len(held_dump(driver)[0]) == min(number, 8)
        driver.pool.release_metadata_snapshot()
    used = driver.status().metadata_blocks_used
    driver.close()
    judge(driver.metadata_path.read_bytes())
    driver.open()
    assert driver.status().metadata_blocks_used <= used
