"""Space of the host's that is taken ahead: what it holds, what is returned, and when."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.core.judges import contents, our_check, thin_check
from thinpool.engine import BlockDevice, FaultDevice, Pool, PoolOptions, Volume, format_pool
from thinpool.errors import ThinpoolError
from thinpool.model import VolumeId

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK = 64 * 1024
PAGE = 4096
DATA_BLOCKS = 2048
ROW = 300  # first writes, so many that space is taken ahead
FEW = 20
PATIENCE = 15.0

pytestmark = pytest.mark.sparse


@contextmanager
def pool_on(folder: Path, *, direct: bool = True, **options: object) -> Iterator[Pool]:
    """A pool on files; made if it is not there. Left as by a crash when the block raises."""
    metadata, data = folder / "metadata", folder / "data"
    make = not data.exists()
    try:
        with (
            BlockDevice.open_file(metadata, create_size=1 << 20 if make else None) as below,
            BlockDevice.open_file(
                data, direct=direct, create_size=DATA_BLOCKS * BLOCK if make else None
            ) as file,
        ):
            if make:
                format_pool(below, block_size=BLOCK, data_blocks=DATA_BLOCKS)
            with Pool.open(below, file, PoolOptions(**options)) as pool:
                yield pool
    except ThinpoolError as error:
        if direct and "direct" in str(error):
            pytest.skip(f"no direct I/O here: {error}")
        raise


def held(folder: Path) -> int:
    """Data blocks that the host's filesystem counts."""
    return (folder / "data").stat().st_blocks * 512 // BLOCK


@contextmanager
def volume_of(pool: Pool, number: int = 1) -> Iterator[Volume]:
    if number not in {each.id for each in pool.volumes()}:
        pool.create_volume(VolumeId(number))
    with pool.open_volume(VolumeId(number), size=DATA_BLOCKS * BLOCK) as volume:
        yield volume


def first_writes(volume: Volume, blocks: list[int]) -> dict[int, bytes]:
    """A page into each block, by several threads; what the blocks hold then."""

    def one(block: int) -> tuple[int, bytes]:
        page = random.Random(block).randbytes(PAGE)
        at = block % (BLOCK // PAGE) * PAGE
        volume.write(block * BLOCK + at, page)
        return block, bytes(at) + page + bytes(BLOCK - at - PAGE)

    with ThreadPoolExecutor(8) as threads:
        return dict(threads.map(one, blocks))


def assert_holds(volume: Volume, model: dict[int, bytes]) -> None:
    for block, wanted in model.items():
        assert volume.read(block * BLOCK, BLOCK) == wanted, block


def settled(folder: Path, most: int) -> int:
    until = time.monotonic() + PATIENCE
    while held(folder) > most and time.monotonic() < until:
        time.sleep(0.05)
    return held(folder)


@pytest.mark.parametrize("direct", [False, True])
def test_what_was_taken_ahead_is_returned_at_rest(tmp_path: Path, *, direct: bool) -> None:
    """And what was written stays, zeros around it included."""
    blocks = random.Random(1).sample(range(DATA_BLOCKS), ROW)
    with pool_on(tmp_path, direct=direct, commit_interval_ms=50) as pool, volume_of(pool) as volume:
        model = first_writes(volume, blocks)
        assert settled(tmp_path, ROW) <= ROW
        assert_holds(volume, model)
        # Again, with holes behind: the row goes on where it ended.
        more = [block for block in range(DATA_BLOCKS) if block not in model][:ROW]
        model |= first_writes(volume, more)
        assert settled(tmp_path, 2 * ROW) <= 2 * ROW
        assert_holds(volume, model)
        pool.commit()
        image = contents(pool.metadata)
    assert our_check(image).clean
    thin_check(image)


def test_a_row_of_first_writes_takes_space_ahead_and_a_close_returns_it(tmp_path: Path) -> None:
    with pool_on(tmp_path, commit_interval_ms=0) as pool:
        with volume_of(pool) as volume:
            model = first_writes(volume, list(range(ROW)))
        # More than what was mapped, whole: nothing else gives a block more than its page.
        assert held(tmp_path) > ROW // 2
        before = held(tmp_path)
    assert held(tmp_path) < before
    assert held(tmp_path) <= ROW
    with pool_on(tmp_path) as pool, volume_of(pool) as volume:
        assert_holds(volume, model)


def test_a_few_first_writes_take_none(tmp_path: Path) -> None:
    with pool_on(tmp_path, commit_interval_ms=0) as pool, volume_of(pool) as volume:
        first_writes(volume, list(range(FEW)))
        assert held(tmp_path) <= FEW * PAGE // BLOCK + 1


def test_a_crash_leaves_it_to_the_next_first_writes(tmp_path: Path) -> None:
    """Unused space reads as zeros, so it counts as a hole when the pool is opened again."""
    pool: Pool
    with (
        BlockDevice.open_memory(1 << 20) as metadata,
        BlockDevice.open_file(tmp_path / "data", create_size=DATA_BLOCKS * BLOCK) as data,
    ):
        format_pool(metadata, block_size=BLOCK, data_blocks=DATA_BLOCKS)
        pool = Pool.open(metadata, data, PoolOptions(commit_interval_ms=0))
        with volume_of(pool) as volume:
            pool.commit()
            model = first_writes(volume, list(range(ROW)))
            pool.commit()
        pool.abandon()
        left = held(tmp_path)
        assert left > ROW // 2
        with Pool.open(metadata, data, PoolOptions(commit_interval_ms=0)) as again:
            with volume_of(again, 2) as volume:
                other = first_writes(volume, list(range(ROW, 2 * ROW)))
                assert_holds(volume, other)
            with volume_of(again) as volume:
                assert_holds(volume, model)


def test_scattered_holes_are_written_without(tmp_path: Path) -> None:
    """Free blocks one by one, each a hole of its own."""
    with pool_on(tmp_path, commit_interval_ms=0) as pool, volume_of(pool) as volume:
        volume.write(0, bytes([7]) * (DATA_BLOCKS * BLOCK))
        holes = list(range(0, DATA_BLOCKS, 3))
        for block in holes:
            volume.discard(block * BLOCK, BLOCK)
        pool.commit()
        while pool.punch_some(DATA_BLOCKS):
            pass
        before = held(tmp_path)
        model = first_writes(volume, holes)
        assert_holds(volume, model)
        assert volume.read(BLOCK, BLOCK) == bytes([7]) * BLOCK
        # Nothing but what was written.
        assert held(tmp_path) <= before + len(holes) * PAGE // BLOCK + 1


def test_behind_a_fault_device_too(tmp_path: Path) -> None:
    """The crash and fault tests run with it: it passes what goes in front of the file."""
    with (
        BlockDevice.open_memory(1 << 20) as metadata,
        BlockDevice.open_file(tmp_path / "data", create_size=DATA_BLOCKS * BLOCK) as file,
        FaultDevice.over(file) as data,
    ):
        format_pool(metadata, block_size=BLOCK, data_blocks=DATA_BLOCKS)
        with (
            Pool.open(metadata, data, PoolOptions(commit_interval_ms=0)) as pool,
            volume_of(pool) as volume,
        ):
            model = first_writes(volume, list(range(ROW)))
            assert held(tmp_path) > ROW // 2
            assert_holds(volume, model)
