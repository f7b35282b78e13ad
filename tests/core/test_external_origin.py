"""A volume over an external origin: a read-only device that shows where nothing is mapped.

INV-12, INV-13.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.core.judges import contents, our_check, thin_check
from thinpool.engine import (
    BlockDevice,
    FaultDevice,
    FaultKind,
    FaultOp,
    Pool,
    PoolOptions,
    format_pool,
)
from thinpool.errors import StorageIOError
from thinpool.model import VolumeId

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KIB = 1024
BLOCK = 64 * KIB
BLOCKS = 10
SIZE = BLOCKS * BLOCK
THIN = VolumeId(1)


@pytest.fixture
def pool() -> Iterator[Pool]:
    metadata = BlockDevice.open_memory(160 * 4096)
    data = BlockDevice.open_memory(60 * BLOCK)
    format_pool(metadata, block_size=BLOCK, data_blocks=60)
    with Pool.open(metadata, data, PoolOptions(commit_interval_ms=0)) as opened:
        opened.create_volume(THIN)
        yield opened
    written = contents(metadata)  # closing committed it
    assert our_check(written).clean
    thin_check(written)
    data.close()
    metadata.close()


def origin_of(size: int, seed: int = 7) -> tuple[BlockDevice, bytes]:
    content = random.Random(seed).randbytes(size)
    device = BlockDevice.open_memory(size)
    device.write(0, content)
    return device, content


def over(content: bytes, size: int) -> bytearray:
    """What a fresh volume of that size reads as."""
    return bytearray(content[:size].ljust(size, b"\0"))


ORIGIN_SIZES = {
    "equal": SIZE,
    "smaller": 4 * BLOCK,
    "larger": SIZE + 3 * BLOCK,
    "fractional tail": 4 * BLOCK + 5 * 512,
}


@pytest.mark.parametrize("size", ORIGIN_SIZES.values(), ids=ORIGIN_SIZES.keys())
def test_reads_come_from_the_origin_and_zeros_beyond_its_end(pool: Pool, size: int) -> None:
    origin, content = origin_of(size)
    with origin, pool.open_volume(THIN, size=SIZE, origin=origin) as volume:
        assert volume.read(0, SIZE) == over(content, SIZE)
        edge = min(size, SIZE)
        at = max(edge - 700, 0)
        assert volume.read(at, min(1400, SIZE - at)) == over(content, SIZE)[at : at + 1400]
    assert pool.volume_info(THIN).mapped_blocks == 0


@pytest.mark.parametrize("size", ORIGIN_SIZES.values(), ids=ORIGIN_SIZES.keys())
@pytest.mark.parametrize("zero", [True, False], ids=["zeroing", "no zeroing"])
def test_first_writes_take_the_rest_of_the_block_from_the_origin(size: int, zero: bool) -> None:  # noqa: FBT001 - parametrised
    metadata = BlockDevice.open_memory(160 * 4096)
    data = BlockDevice.open_memory(60 * BLOCK)
    data.write(0, b"\xee" * (60 * BLOCK))  # what was there before must never show
    format_pool(metadata, block_size=BLOCK, data_blocks=60)
    origin, content = origin_of(size)
    expected = over(content, SIZE)
    options = PoolOptions(commit_interval_ms=0, zero=zero)
    with metadata, data, origin, Pool.open(metadata, data, options) as pool:
        pool.create_volume(THIN)
        with pool.open_volume(THIN, size=SIZE, origin=origin) as volume:
            whole_origin_blocks = -(-size // BLOCK)
            for block in range(min(whole_origin_blocks, BLOCKS)):
                at = block * BLOCK + 1000
                volume.write(at, b"w" * 100)
                expected[at : at + 100] = b"w" * 100
            assert volume.read(0, SIZE) == expected
        # Copied, not looked through: without the origin it is still there.
        with pool.open_volume(THIN, size=SIZE) as volume:
            mapped = min(whole_origin_blocks, BLOCKS) * BLOCK
            assert volume.read(0, mapped) == expected[:mapped]


def test_zeros_are_zeros_and_a_discard_shows_the_origin_again(pool: Pool) -> None:
    origin, content = origin_of(6 * BLOCK + 512)
    expected = over(content, SIZE)
    with origin, pool.open_volume(THIN, size=SIZE, origin=origin) as volume:
        volume.write(0, b"x" * SIZE)
        volume.discard(BLOCK, 2 * BLOCK)
        assert volume.read(BLOCK, 2 * BLOCK) == content[BLOCK : 3 * BLOCK]
        volume.zero(BLOCK + 512, 7 * BLOCK)
        assert volume.read(BLOCK, 512) == content[BLOCK : BLOCK + 512]
        assert not any(volume.read(BLOCK + 512, 7 * BLOCK))
        volume.discard(0, SIZE)
        assert volume.read(0, SIZE) == expected
        assert pool.volume_info(THIN).mapped_blocks == 0
        volume.zero(0, SIZE)
        assert not any(volume.read(0, SIZE))
        # Zeros are written only where the origin would show.
        assert pool.volume_info(THIN).mapped_blocks == 7


def test_a_snapshot_without_the_origin_has_what_was_mapped_and_zeros(pool: Pool) -> None:
    origin, content = origin_of(SIZE)
    with origin, pool.open_volume(THIN, size=SIZE, origin=origin) as volume:
        volume.write(BLOCK + 5, b"mine")
        pool.create_snapshot(VolumeId(2), origin=THIN)
        volume.write(BLOCK + 5, b"late")
        with pool.open_volume(VolumeId(2), size=SIZE) as alone:
            assert not any(alone.read(0, BLOCK))
            assert alone.read(BLOCK, 9) == content[BLOCK : BLOCK + 5] + b"mine"
        with pool.open_volume(VolumeId(2), size=SIZE, origin=origin) as both:
            expected = bytearray(content)
            expected[BLOCK + 5 : BLOCK + 9] = b"mine"
            assert both.read(0, SIZE) == expected


def test_next_data_counts_what_the_origin_has(pool: Pool) -> None:
    origin, _ = origin_of(2 * BLOCK + 512)
    with origin, pool.open_volume(THIN, size=SIZE, origin=origin) as volume:
        volume.write(7 * BLOCK, b"x")
        assert volume.next_data(0) == (0, 2 * BLOCK + 512)
        assert volume.next_data(BLOCK + 3) == (BLOCK + 3, 2 * BLOCK + 512)
        assert volume.next_data(2 * BLOCK + 512) == (7 * BLOCK, 8 * BLOCK)
        assert volume.next_data(8 * BLOCK) is None


def test_an_origin_that_fails_is_an_error_and_maps_nothing(pool: Pool) -> None:
    below, content = origin_of(SIZE)
    with below:
        origin = FaultDevice.over(below)
        with origin, pool.open_volume(THIN, size=SIZE, origin=origin) as volume:
            origin.add(FaultKind.ERROR, FaultOp.READ, count=2)
            with pytest.raises(StorageIOError):
                volume.read(0, 512)
            with pytest.raises(StorageIOError):
                volume.write(3, b"part of a block")
            assert pool.volume_info(THIN).mapped_blocks == 0
            assert volume.read(0, SIZE) == content


def test_a_file_with_a_tail(pool: Pool, tmp_path: Path) -> None:
    """As users have them: a file opened for direct I/O, read at any offset."""
    path = tmp_path / "origin"
    content = random.Random(3).randbytes(3 * BLOCK + 4096)
    path.write_bytes(content)
    with (
        BlockDevice.open_file(path, read_only=True) as origin,
        pool.open_volume(THIN, size=SIZE, origin=origin) as volume,
    ):
        assert volume.read(3 * BLOCK - 77, 9000) == over(content, SIZE)[3 * BLOCK - 77 :][:9000]


@pytest.mark.parametrize("size", ORIGIN_SIZES.values(), ids=ORIGIN_SIZES.keys())
def test_a_model_of_it(pool: Pool, size: int, seed: int) -> None:
    chance = random.Random(seed)
    origin, content = origin_of(size, seed)
    bare = over(content, SIZE)
    model = bytearray(bare)
    with origin:
        volume = pool.open_volume(THIN, size=SIZE, origin=origin)
        for step in range(150):
            unit = chance.choice((1, 512, 4096, BLOCK))
            offset = chance.randrange(SIZE // unit) * unit
            length = min(chance.randint(1, 2 * BLOCK // unit + 1) * unit, SIZE - offset)
            match chance.choice(("write", "write", "zero", "discard", "snapshot", "reopen")):
                case "write":
                    written = chance.randbytes(length)
                    volume.write(offset, written)
                    model[offset : offset + length] = written
                case "zero":
                    volume.zero(offset, length)
                    model[offset : offset + length] = bytes(length)
                case "discard":
                    volume.discard(offset, length)
                    begin = -(-offset // BLOCK) * BLOCK
                    end = (offset + length) // BLOCK * BLOCK
                    if begin < end:
                        model[begin:end] = bare[begin:end]
                case "snapshot" if step % 3 == 0:
                    other = VolumeId(1000 + step)
                    pool.create_snapshot(other, origin=THIN)
                    with pool.open_volume(other, size=SIZE, origin=origin) as snapshot:
                        assert snapshot.read(0, SIZE) == model
                    if step % 2:
                        pool.delete_volume(other)
                case "reopen":
                    volume.close()
                    volume = pool.open_volume(THIN, size=SIZE, origin=origin)
            offset = chance.randrange(SIZE)
            assert volume.read(offset, SIZE - offset) == model[offset:], step
        volume.close()
