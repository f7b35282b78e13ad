"""Discards: what is unmapped, what is given back, what others keep."""

from __future__ import annotations

import random
import threading

import pytest

from tests.conformance.driver import BLOCK, SECTOR, pattern
from thinpool import errors
from thinpool.engine import DiscardMode


def filled(driver, blocks=8, **options):
    driver.make(**options)
    driver.create(0)
    for block in range(blocks):
        driver.put(0, block, block)
    return driver.volume(0)


def test_of_an_empty_volume_changes_nothing(driver):
    driver.make()
    volume = driver.new(0)
    volume.discard(0, volume.size)
    assert driver.used() == 0
    assert driver.check() == {0: {}}


def test_of_a_single_block_unmaps_it(driver):
    volume = filled(driver)
    volume.discard(3 * BLOCK, BLOCK)
    assert driver.used() == 7
    assert driver.mapped(0) == 7
    assert driver.holds(0, 3, None)
    assert set(driver.check()[0]) == set(range(8)) - {3}


def test_of_a_fully_provisioned_volume_unmaps_all(driver):
    driver.make(data_blocks=64)
    volume = driver.new(0, blocks=64)
    volume.write(0, pattern(1, 64 * BLOCK))
    assert driver.used() == 64
    volume.discard(0, volume.size)
    assert driver.used() == 0
    assert volume.read(0, volume.size) == bytes(volume.size)


def test_of_a_part_of_a_block_leaves_it(driver):
    volume = filled(driver)
    for offset, length in (
        (0, SECTOR),
        (BLOCK + SECTOR, BLOCK - SECTOR),
        (3 * BLOCK - SECTOR, 1024),
    ):
        volume.discard(offset, length)
    assert driver.used() == 8
    assert all(driver.holds(0, block, block) for block in range(8))


@pytest.mark.parametrize(
    ("lower", "upper", "whole"),
    [(0, 0, {2, 3, 4}), (8, 0, {3, 4}), (0, 8, {2, 3, 4}), (8, 8, {3, 4}), (127, 1, {3, 4})],
)
def test_of_a_range_unmaps_its_whole_blocks_only(driver, lower, upper, whole):
    """Sectors into the first block, and into the one behind the last."""
    volume = filled(driver)
    begin, end = 2 * BLOCK + lower * SECTOR, 5 * BLOCK + upper * SECTOR
    volume.discard(begin, end - begin)
    for block in range(8):
        assert driver.holds(0, block, None if block in whole else block)
    assert driver.used() == 8 - len(whole)


@pytest.mark.parametrize("neighbours", ["both", "left", "right", "none"])
def test_of_a_range_beside_what_is_not_mapped(driver, neighbours):
    driver.make()
    driver.create(0)
    for block in range(3, 6):
        driver.put(0, block, block)
    if neighbours in {"both", "left"}:
        driver.put(0, 2, 2)
    if neighbours in {"both", "right"}:
        driver.put(0, 6, 6)
    driver.volume(0).discard(3 * BLOCK, 3 * BLOCK)
    left = {2} if neighbours in {"both", "left"} else set()
    right = {6} if neighbours in {"both", "right"} else set()
    assert set(driver.check()[0]) == left | right


def test_twice_is_as_once(driver):
    volume = filled(driver)
    for _ in range(3):
        volume.discard(2 * BLOCK, 2 * BLOCK)
        assert driver.used() == 6


def test_of_alternate_blocks(driver):
    volume = filled(driver, blocks=16)
    for block in range(0, 16, 2):
        volume.discard(block * BLOCK, BLOCK)
    for block in range(16):
        assert driver.holds(0, block, block if block % 2 else None)
    assert driver.used() == 8


def test_of_a_fragmented_volume(driver):
    driver.make()
    driver.create(0)
    order = list(range(16))
    random.Random(3).shuffle(order)
    for block in order:
        driver.put(0, block, block)
    driver.volume(0).discard(0, 16 * BLOCK)
    assert driver.used() == 0


def test_of_random_sectors(driver, rng):
    volume = filled(driver, blocks=16)
    gone: set[int] = set()
    for _ in range(60):
        begin = rng.randrange(16 * BLOCK // SECTOR)
        end = min(16 * BLOCK // SECTOR, begin + rng.randrange(1, 600))
        volume.discard(begin * SECTOR, (end - begin) * SECTOR)
        gone |= set(range(-(-begin // 128), end // 128))
    for block in range(16):
        assert driver.holds(0, block, None if block in gone else block)
    assert driver.used() == 16 - len(gone)


def test_what_was_discarded_reads_as_zeros_when_written_in_part(driver):
    volume = filled(driver)
    volume.discard(2 * BLOCK, BLOCK)
    volume.write(2 * BLOCK + 1024, b"x")
    assert volume.read(2 * BLOCK, BLOCK) == (bytes(1024) + b"x").ljust(BLOCK, b"\0")


def test_past_the_end_is_refused(driver):
    volume = filled(driver)
    for offset, length in ((volume.size, BLOCK), (volume.size - BLOCK, 2 * BLOCK)):
        with pytest.raises(errors.UsageError):
            volume.discard(offset, length)
    assert driver.used() == 8


def test_of_an_origin_does_not_reach_its_snapshot(driver):
    volume = filled(driver)
    driver.snapshot(1, origin=0)
    volume.discard(0, 8 * BLOCK)
    assert driver.mapped(0) == 0
    assert driver.used() == 8
    assert all(driver.holds(1, block, block) for block in range(8))
    assert all(driver.holds(0, block, None) for block in range(8))
    driver.check()


def test_passdown_gives_the_space_back(driver):
    volume = filled(driver)
    place = driver.check()[0][3]
    assert not driver.is_hole(place)
    volume.discard(3 * BLOCK, BLOCK)
    driver.return_space()
    assert driver.is_hole(place)


def test_no_passdown_keeps_the_space(driver):
    volume = filled(driver, discard_mode=DiscardMode.NO_PASSDOWN)
    place = driver.check()[0][3]
    volume.discard(3 * BLOCK, BLOCK)
    driver.return_space()
    assert driver.used() == 7
    assert not driver.is_hole(place)


def test_passdown_can_be_switched_at_the_next_opening(driver):
    filled(driver)
    where = driver.check()[0]
    driver.reopen(discard_mode=DiscardMode.NO_PASSDOWN)
    driver.volume(0).discard(0, BLOCK)
    driver.return_space()
    assert not driver.is_hole(where[0])
    driver.reopen(discard_mode=DiscardMode.PASSDOWN)
    driver.volume(0).discard(BLOCK, BLOCK)
    driver.return_space()
    assert driver.is_hole(where[1])
    assert driver.used() == 6


def test_of_a_shared_block_is_not_passed_down(driver):
    volume = filled(driver)
    place = driver.check()[0][3]
    driver.snapshot(1, origin=0)
    volume.discard(3 * BLOCK, BLOCK)
    driver.return_space()
    assert not driver.is_hole(place)
    assert driver.holds(1, 3, 3)


def test_of_a_block_that_was_shared_is_passed_down(driver):
    filled(driver)
    place = driver.check()[0][3]
    driver.snapshot(1, origin=0)
    driver.delete(1)
    driver.volume(0).discard(3 * BLOCK, BLOCK)
    driver.return_space()
    assert driver.used() == 7
    assert driver.is_hole(place)


def test_the_last_of_those_that_shared_gives_the_space_back(driver):
    filled(driver)
    place = driver.check()[0][3]
    driver.snapshot(1, origin=0)
    driver.volume(0).discard(3 * BLOCK, BLOCK)
    driver.volume(1).discard(3 * BLOCK, BLOCK)
    driver.return_space()
    assert driver.used() == 7
    assert driver.is_hole(place)


def test_ignored_discards_change_nothing(driver):
    volume = filled(driver, discard_mode=DiscardMode.IGNORE)
    try:
        volume.discard(3 * BLOCK, BLOCK)
    except errors.UnsupportedHostError:
        assert driver.engine == "dm", "the kernel's volumes say that they take none"
    assert driver.used() == 8
    assert driver.holds(0, 3, 3)


def test_a_flush_makes_a_discard_last(driver):
    volume = filled(driver, commit_interval_ms=0)
    volume.flush()
    volume.discard(3 * BLOCK, BLOCK)
    volume.write(9 * BLOCK, pattern(9))
    volume.flush()
    driver.pool.commit()
    found = driver.crashed()
    assert found.read(0, 3) == bytes(BLOCK)
    assert found.read(0, 9) == pattern(9)


def test_with_io_in_the_background(driver):
    volume = filled(driver, blocks=16, data_blocks=64)
    done = threading.Event()

    def write() -> None:
        number = 0
        while not done.is_set() or number < 2:
            number += 1
            for block in range(8, 16):
                volume.write(block * BLOCK, pattern(block))

    with driver.meanwhile(write):
        for _ in range(10):
            for block in range(8):
                volume.discard(block * BLOCK, BLOCK)
                volume.write(block * BLOCK, pattern(100 + block))
        volume.discard(0, 4 * BLOCK)
        done.set()
    for block in range(16):
        expected = None if block < 4 else 100 + block if block < 8 else block
        assert driver.holds(0, block, expected)
    assert driver.used() == 12


def test_makes_room_when_space_was_out(driver):
    volume = filled(driver, blocks=8, data_blocks=8)
    with pytest.raises(errors.NoSpaceError):
        volume.write(9 * BLOCK, pattern(9))
    volume.discard(0, 2 * BLOCK)
    driver.status()
    volume.write(9 * BLOCK, pattern(9))
    assert driver.holds(0, 9, 9)
    assert driver.used() == 7


def test_then_deleting_the_volume_gives_the_rest_back(driver):
    volume = filled(driver)
    volume.discard(0, 3 * BLOCK)
    driver.delete(0)
    assert driver.used() == 0
    assert driver.check() == {}


def test_zeroing_reads_as_zeros_at_the_ends_too(driver):
    """Not the kernel's discard: partial ends are zeroed, whole blocks are unmapped."""
    volume = filled(driver)
    driver.snapshot(1, origin=0)
    volume.zero(BLOCK + 1024, 2 * BLOCK)
    expected = bytearray(b"".join(pattern(block) for block in range(8)))
    expected[BLOCK + 1024 : 3 * BLOCK + 1024] = bytes(2 * BLOCK)
    assert volume.read(0, 8 * BLOCK) == bytes(expected)
    assert all(driver.holds(1, block, block) for block in range(8))
    assert driver.mapped(0) == 7
