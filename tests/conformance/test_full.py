"""Out of data space: by error, by waiting, by waiting too long; and out of it again."""

from __future__ import annotations

import time

import pytest

from tests.conformance.driver import BLOCK, pattern, until
from thinpool import errors
from thinpool.engine.backend import PoolMode


def full(driver, **options):
    """A pool of 8 blocks that are all taken by volume 0."""
    driver.make(data_blocks=8, **options)
    driver.create(0)
    for block in range(8):
        driver.put(0, block, block)
    return driver.volume(0)


def grow(driver, blocks):
    driver.grow_data_device(blocks)
    driver.pool.resize_data(blocks)


def test_error_a_write_that_needs_space_fails_at_once(driver):
    volume = full(driver)
    begin = time.monotonic()
    with pytest.raises(errors.NoSpaceError):
        volume.write(9 * BLOCK, pattern(9))
    assert time.monotonic() - begin < 20
    assert driver.pool.status().mode is PoolMode.OUT_OF_DATA_SPACE
    assert driver.used() == 8
    assert driver.holds(0, 9, None)


def test_error_filling_a_volume_in_one_write_gives_what_there_is(driver):
    driver.make(data_blocks=8)
    volume = driver.new(0, blocks=16)
    with pytest.raises(errors.NoSpaceError):
        volume.write(0, pattern(1, 16 * BLOCK))
    found = volume.read(0, 16 * BLOCK)
    whole = pattern(1, 16 * BLOCK)
    written = [b for b in range(16) if found[b * BLOCK :][:BLOCK] == whole[b * BLOCK :][:BLOCK]]
    assert len(written) <= 8
    for block in set(range(16)) - set(written):
        assert found[block * BLOCK :][:BLOCK] == bytes(BLOCK)


@pytest.mark.parametrize("error", [True, False], ids=["error", "queue"])
def test_what_is_there_stays_usable(driver, error):
    """Reads, overwrites of what is not shared, snapshots, deletions."""
    volume = full(driver, error_if_no_space=error)
    if error:
        with pytest.raises(errors.NoSpaceError):
            volume.write(9 * BLOCK, pattern(9))
    else:
        driver.set_no_space_timeout(0)
    assert all(driver.holds(0, block, block) for block in range(8))
    driver.put(0, 0, 100)
    volume.flush()
    assert driver.holds(0, 0, 100)
    driver.snapshot(1, origin=0)
    assert driver.holds(1, 0, 100)
    driver.create(2)
    driver.delete(1, 2)
    assert driver.ids() == [0]


def test_error_growth_lets_writes_go_on(driver):
    volume = full(driver)
    with pytest.raises(errors.NoSpaceError):
        volume.write(9 * BLOCK, pattern(9))
    grow(driver, 16)
    until(lambda: driver.pool.status().mode is PoolMode.RW)
    volume.write(9 * BLOCK, pattern(9))
    assert driver.holds(0, 9, 9)
    assert driver.used() == 9


def test_error_breaking_sharing_needs_space_too(driver):
    volume = full(driver)
    driver.snapshot(1, origin=0)
    with pytest.raises(errors.NoSpaceError):
        volume.write(0, pattern(100))
    assert driver.holds(0, 0, 0)
    assert driver.holds(1, 0, 0)
    driver.delete(1)
    volume.discard(7 * BLOCK, BLOCK)
    driver.status()
    volume.write(0, pattern(100))
    assert driver.holds(0, 0, 100)
    assert driver.used() == 7


def test_queue_a_write_waits_until_the_pool_grows(driver):
    driver.set_no_space_timeout(60)
    volume = full(driver, error_if_no_space=False)
    with driver.meanwhile(lambda: volume.write(9 * BLOCK, pattern(9))) as writer:
        assert writer.waits()
        assert driver.pool.status().mode is PoolMode.OUT_OF_DATA_SPACE
        volume.write(3 * BLOCK, pattern(103))
        assert driver.holds(0, 3, 103), "what has its space goes on meanwhile"
        grow(driver, 16)
    assert driver.holds(0, 9, 9)
    assert driver.used() == 9
    assert driver.status().mode is PoolMode.RW


def test_queue_a_deletion_lets_it_go_on(driver):
    driver.set_no_space_timeout(60)
    driver.make(data_blocks=8, error_if_no_space=False)
    driver.create(0, 1)
    for block in range(8):
        driver.put(0, block, block)
    driver.close_volume(0)
    volume = driver.volume(1)
    with driver.meanwhile(lambda: volume.write(0, pattern(9))) as writer:
        assert writer.waits()
        driver.delete(0)
        driver.status()
    assert driver.holds(1, 0, 9)
    assert driver.used() == 1


def test_queue_a_write_that_waits_too_long_fails(driver):
    driver.set_no_space_timeout(2)
    volume = full(driver, error_if_no_space=False, no_space_timeout_ms=2000)
    begin = time.monotonic()
    with pytest.raises(errors.NoSpaceError):
        volume.write(9 * BLOCK, pattern(9))
    assert 1.0 < time.monotonic() - begin < 60
    with pytest.raises(errors.NoSpaceError):
        volume.write(9 * BLOCK, pattern(9))
    assert all(driver.holds(0, block, block) for block in range(8))
    grow(driver, 16)
    until(lambda: driver.status().mode is PoolMode.RW)
    volume.write(9 * BLOCK, pattern(9))
    assert driver.holds(0, 9, 9)


def test_the_setting_can_change_while_a_write_waits(driver):
    driver.set_no_space_timeout(60)
    volume = full(driver, error_if_no_space=False)
    failed = []

    def write() -> None:
        try:
            volume.write(9 * BLOCK, pattern(9))
        except errors.NoSpaceError:
            failed.append(True)

    with driver.meanwhile(write) as writer:
        assert writer.waits()
        driver.pool.set_when_full(error=True, timeout_ms=0)
    assert failed
    assert driver.holds(0, 9, None)


def test_low_water_is_told_by_an_event(driver):
    driver.make(data_blocks=8, low_water_blocks=4)
    driver.create(0)
    driver.put(0, 0, 0)
    before = driver.pool.wait_event(0, timeout_ms=0)
    assert not driver.pool.status().low_water_reached
    for block in range(1, 6):
        driver.put(0, block, block)
    assert driver.pool.wait_event(before, timeout_ms=20_000) != before
    assert driver.pool.status().low_water_reached
    assert driver.pool.status().mode is PoolMode.RW
