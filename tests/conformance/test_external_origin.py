"""Volumes over a read-only device that is not of the pool."""

from __future__ import annotations

import pytest

from tests.conformance.driver import BLOCK, SECTOR, pattern
from thinpool.model import VolumeId

SIZE = 8 * BLOCK


@pytest.fixture
def over(driver, tmp_path):
    """Open volume 0 over an origin of so many bytes; the origin's content."""
    opened = []

    def open_over(length):
        content = pattern(77, length)
        path = tmp_path / "origin"
        path.write_bytes(content)
        device = driver.origin_device(path)
        opened.append(device)
        driver.make()
        driver.create(0)
        volume = driver.pool.open_volume(VolumeId(0), size=SIZE, origin=device)
        opened.append(volume)
        return volume, content.ljust(SIZE, b"\0")[:SIZE]

    yield open_over
    for each in reversed(opened):
        each.close()
    assert (tmp_path / "origin").read_bytes()[:64] == pattern(77, 64)


LENGTHS = {
    "equal": SIZE,
    "smaller": 3 * BLOCK,
    "bigger": 12 * BLOCK,
    "fractional tail": 3 * BLOCK + 17 * SECTOR,
}


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_what_is_not_mapped_reads_as_the_origin(driver, over, length):
    volume, content = over(length)
    assert volume.read(0, SIZE) == content
    assert driver.used() == 0


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_a_first_write_takes_the_rest_of_the_block_from_the_origin(driver, over, length):
    volume, content = over(length)
    expected = bytearray(content)
    for block in (0, 3, 7):
        at = block * BLOCK + 20 * SECTOR
        volume.write(at, b"changed!" * 64)
        expected[at : at + SECTOR] = b"changed!" * 64
    assert volume.read(0, SIZE) == bytes(expected)
    assert driver.used() == 3


def test_a_whole_write_hides_the_origin_and_a_discard_shows_it(driver, over):
    volume, content = over(SIZE)
    volume.write(2 * BLOCK, pattern(5))
    assert volume.read(2 * BLOCK, BLOCK) == pattern(5)
    volume.discard(2 * BLOCK, BLOCK)
    assert volume.read(0, SIZE) == content
    assert driver.used() == 0


def test_a_snapshot_without_the_origin_has_what_was_written(driver, over):
    volume, _ = over(SIZE)
    volume.write(BLOCK, pattern(5))
    driver.snapshot(1, origin=0)
    assert driver.holds(1, 1, 5)
    assert driver.holds(1, 0, None)


def test_zeroing_hides_the_origin(driver, over):
    volume, content = over(SIZE)
    volume.zero(BLOCK + SECTOR, 2 * BLOCK)
    expected = bytearray(content)
    expected[BLOCK + SECTOR : 3 * BLOCK + SECTOR] = bytes(2 * BLOCK)
    assert volume.read(0, SIZE) == bytes(expected)
