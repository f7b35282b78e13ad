"""New volumes and first writes."""

from __future__ import annotations

import pytest

from tests.conformance.driver import BLOCK, KIB, MIB, SECTOR, pattern
from thinpool import errors
from thinpool.engine import BlockDevice, format_pool


def test_a_new_volume_reads_as_zeros_and_maps_nothing(driver):
    driver.make()
    volume = driver.new(0)
    assert volume.read(0, volume.size) == bytes(volume.size)
    assert driver.used() == 0
    assert driver.check() == {0: {}}


def test_a_first_write_maps_one_block_and_the_rest_of_it_reads_as_zeros(driver):
    driver.make()
    driver.close()
    driver.data_path.write_bytes(pattern(666, 64 * BLOCK))
    driver.open()
    volume = driver.new(0)
    volume.write(3 * BLOCK + 5 * SECTOR, b"new" * 100)
    around = volume.read(3 * BLOCK, BLOCK)
    assert around == (bytes(5 * SECTOR) + b"new" * 100).ljust(BLOCK, b"\0")
    assert driver.used() == 1
    assert driver.mapped(0) == 1
    assert set(driver.check()[0]) == {3}


def test_a_volume_keeps_everything_over_a_reopen(driver):
    driver.make()
    driver.create(0)
    for block in range(16):
        driver.put(0, block, 100 + block)
    driver.reopen()
    assert all(driver.holds(0, block, 100 + block) for block in range(16))
    assert driver.mapped(0) == 16


def test_overwriting_maps_nothing_new(driver):
    driver.make()
    driver.create(0)
    for number in range(3):
        for block in range(8):
            driver.put(0, block, number)
    assert driver.used() == 8
    assert all(driver.holds(0, block, 2) for block in range(8))


def test_volumes_do_not_see_each_other(driver):
    driver.make()
    driver.create(0, 1, 2)
    for volume in range(3):
        for block in range(4):
            driver.put(volume, block, volume * 10 + block)
    driver.reopen()
    for volume in range(3):
        assert all(driver.holds(volume, block, volume * 10 + block) for block in range(4))
    where = driver.check()
    places = [place for volume in where.values() for place in volume.values()]
    assert len(set(places)) == 12, "no data block has two owners"


def test_lots_of_empty_volumes(driver):
    driver.make(metadata_blocks=512)
    driver.create(*range(300))
    assert driver.ids() == list(range(300))
    assert driver.check() == {each: {} for each in range(300)}
    driver.reopen()
    assert driver.ids() == list(range(300))


def test_the_largest_id_is_taken_and_a_larger_one_is_not(driver):
    driver.make()
    driver.create((1 << 24) - 1)
    with pytest.raises((errors.UsageError, errors.LimitError)):
        driver.create(1 << 24)
    assert driver.ids() == [(1 << 24) - 1]
    driver.volume((1 << 24) - 1).write(0, b"x")


@pytest.mark.parametrize("block", [192 * KIB, 1 * MIB], ids=["192K", "1M"])
def test_other_block_sizes_work(driver, block):
    driver.make(block=block, data_blocks=8)
    volume = driver.new(0, blocks=4)
    volume.write(block + SECTOR, b"abc")
    driver.snapshot(1, origin=0)
    volume.write(block, b"d")
    assert driver.volume(1, blocks=4).read(block, SECTOR + 3) == bytes(SECTOR) + b"abc"
    assert volume.read(block, SECTOR + 3) == b"d" + bytes(SECTOR - 1) + b"abc"
    assert driver.used() == 2


def test_the_largest_block_size_works(driver):
    block = 1 << 30
    driver.make(block=block, data_blocks=2, zero=False)
    volume = driver.new(0, blocks=2)
    volume.write(block + (5 << 20), pattern(1))
    assert volume.read(block + (5 << 20), BLOCK) == pattern(1)
    assert driver.used() == 1


@pytest.mark.parametrize(
    "block", [32 * KIB, 100 * KIB, (1 << 30) + BLOCK], ids=["32K", "100K", "1G+64K"]
)
def test_block_sizes_that_cannot_be_are_refused(block):
    """One test for both engines: whatever the engine, pools are made by format_pool."""
    with BlockDevice.open_memory(MIB) as metadata:
        with pytest.raises(errors.UsageError):
            format_pool(metadata, block_size=block, data_blocks=16)
        assert metadata.read(0, 4096) == bytes(4096)


def test_a_metadata_device_that_is_too_small_is_refused():
    with BlockDevice.open_memory(4096) as metadata, pytest.raises(errors.ThinpoolError):
        format_pool(metadata, block_size=BLOCK, data_blocks=16)


def test_a_pool_that_nobody_uses_is_not_written(driver):
    driver.make()
    before = driver.metadata_path.read_bytes()
    driver.pool.status()
    driver.reopen()
    assert driver.metadata_path.read_bytes() == before


def test_a_flush_commits_what_was_written(driver):
    """What is on the devices right after the flush opens and has it, whatever comes later."""
    driver.make(commit_interval_ms=0)
    volume = driver.new(0)
    volume.write(0, pattern(7))
    volume.flush()
    found = driver.crashed()
    assert found.read(0, 0) == pattern(7)
    driver.snapshot(1, origin=0)
    volume.write(0, pattern(8))
    volume.flush()
    found = driver.crashed()
    assert found.read(0, 0) == pattern(8)
    assert found.read(1, 0) == pattern(7)


def test_without_zeroing_whole_writes_are_whole(driver):
    driver.make(zero=False)
    driver.create(0)
    driver.put(0, 2, 5)
    assert driver.holds(0, 2, 5)
    assert driver.holds(0, 1, None)
    assert driver.mapped(0) == 1


def test_a_volume_larger_than_the_pool_takes_what_there_is(driver):
    driver.make(data_blocks=8)
    volume = driver.new(0, blocks=1 << 20)
    volume.write((1 << 20) * BLOCK - BLOCK, pattern(1))
    assert volume.read((1 << 20) * BLOCK - BLOCK, BLOCK) == pattern(1)
    assert set(driver.check()[0]) == {(1 << 20) - 1}
