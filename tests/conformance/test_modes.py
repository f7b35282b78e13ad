"""Read-only pools, failed commits, and pools that need a check."""

from __future__ import annotations

import pytest

from tests.conformance.driver import BLOCK, pattern
from thinpool import errors
from thinpool.engine.backend import PoolMode

REFUSALS = (errors.ReadOnlyError, errors.NeedsCheckError, errors.PoolFailedError)


def read_only(driver):
    driver.make()
    driver.create(0)
    for block in range(4):
        driver.put(0, block, block)
    before = (driver.metadata_path.read_bytes(), driver.data_path.read_bytes())
    driver.close()
    before = (driver.metadata_path.read_bytes(), driver.data_path.read_bytes())
    driver.open(read_only=True)
    return before


def test_a_read_only_pool_reads_what_is_mapped_and_what_is_not(driver):
    read_only(driver)
    assert driver.pool.status().mode is PoolMode.RO
    assert all(driver.holds(0, block, block) for block in range(4))
    assert driver.holds(0, 5, None)


def test_a_read_only_pool_takes_no_writes(driver):
    before = read_only(driver)
    for block in (0, 9):
        with pytest.raises((*REFUSALS, errors.StorageIOError)):
            driver.volume(0).write(block * BLOCK, pattern(99))
    driver.close()
    assert (driver.metadata_path.read_bytes(), driver.data_path.read_bytes()) == before


def test_a_read_only_pool_takes_no_changes(driver):
    before = read_only(driver)
    for change in (
        lambda: driver.create(1),
        lambda: driver.snapshot(1, origin=0),
        lambda: driver.delete(0),
        driver.pool.reserve_metadata_snapshot,
    ):
        with pytest.raises(REFUSALS):
            change()
    assert driver.ids() == [0]
    driver.close()
    assert (driver.metadata_path.read_bytes(), driver.data_path.read_bytes()) == before


def test_a_pool_that_was_read_only_is_opened_for_writing_again(driver):
    read_only(driver)
    driver.reopen(read_only=False)
    driver.put(0, 9, 9)
    assert driver.holds(0, 9, 9)
    assert driver.status().mode is PoolMode.RW


def failed(driver):
    """A pool whose commit failed; volume 0 has a committed block, and one that is lost."""
    driver.make(breakable=True, commit_interval_ms=0)
    driver.healthy = False  # at the end: what is lost here may have left a flag or a leak
    driver.create(0)
    driver.put(0, 0, 1)
    driver.volume(0).flush()
    driver.break_metadata()
    with pytest.raises(errors.ThinpoolError):
        driver.create(1)


def test_a_failed_commit_makes_the_pool_read_only_and_need_a_check(driver):
    failed(driver)
    status = driver.pool.status()
    assert status.mode is PoolMode.RO
    assert status.needs_check
    with pytest.raises((*REFUSALS, errors.StorageIOError)):
        driver.volume(0).write(5 * BLOCK, pattern(5))
    with pytest.raises(REFUSALS):
        driver.create(2)
    assert driver.holds(0, 0, 1), "what was committed can be read"


def test_a_pool_that_needs_a_check_still_does_after_reopening(driver):
    failed(driver)
    driver.mend_metadata()
    driver.reopen()
    status = driver.pool.status()
    assert status.needs_check
    assert status.mode is PoolMode.RO
    with pytest.raises(REFUSALS):
        driver.create(2)
    assert driver.holds(0, 0, 1)
    assert driver.ids() == [0]


def test_growing_does_not_mend_a_pool_that_needs_a_check(driver):
    failed(driver)
    driver.mend_metadata()
    driver.grow_data_device(128)
    with pytest.raises(REFUSALS):
        driver.pool.resize_data(128)
    assert driver.pool.status().data_blocks_total == 64


def test_a_pool_that_was_checked_works_again(driver):
    failed(driver)
    driver.mend_metadata()
    driver.reopen()
    driver.check()
    for volume_id in (0, 1):
        driver.close_volume(volume_id)
    driver.pool.clear_needs_check()
    assert not driver.pool.status().needs_check
    driver.reopen()
    assert driver.status().mode is PoolMode.RW
    assert driver.holds(0, 0, 1)
    driver.put(0, 1, 3)
    driver.create(7)
    assert driver.holds(0, 1, 3)
