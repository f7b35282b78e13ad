"""Metadata that others wrote, legal or not: every request ends, in success or a typed error."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest

from tests.check.builder import Builder
from tests.check.defects import DEFECTS
from thinpool.engine import BlockDevice, Change, ChangeKind, Pool, PoolMode, PoolOptions
from thinpool.errors import AlreadyExistsError, CorruptMetadataError, ThinpoolError
from thinpool.model import VolumeId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.check.builder import Image

BLOCK = 64 * 1024
SECTOR = 512
SIZE = 4096 * BLOCK
OPTIONS = PoolOptions(commit_interval_ms=0, error_if_no_space=True, zero=False)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def opened(stack: ExitStack, image: Image) -> Pool:
    metadata = stack.enter_context(BlockDevice.open_memory(len(image.data)))
    metadata.write(0, bytes(image.data))
    data = stack.enter_context(BlockDevice.open_memory(8192 * BLOCK))
    pool = Pool.open(metadata, data, OPTIONS)
    stack.callback(pool.abandon)
    return pool


def try_all(pool: Pool, id_: int, *, writes: bool) -> None:
    """Read, write, copy, discard and delete one device, whatever each of these says."""
    with suppress(ThinpoolError), pool.open_volume(VolumeId(id_), size=SIZE) as volume:
        for block in range(0, 1200, 7):
            with suppress(ThinpoolError):
                volume.read(block * BLOCK, SECTOR)
            if writes:
                with suppress(ThinpoolError):
                    volume.write(block * BLOCK, b"w" * SECTOR)
        with suppress(ThinpoolError):
            pool.create_snapshot(VolumeId(1000 + id_), origin=VolumeId(id_))
        for block in range(1200):
            with suppress(ThinpoolError):
                volume.discard(block * BLOCK, BLOCK)
    with suppress(ThinpoolError):
        pool.commit()
    with suppress(ThinpoolError):
        pool.delete_volume(VolumeId(id_))
    with suppress(ThinpoolError):
        pool.commit()


@pytest.mark.parametrize("writes", [True, False], ids=["write", "discard"])
@pytest.mark.parametrize("name", sorted(DEFECTS))
def test_no_defect_of_the_metadata_ends_the_process(
    stack: ExitStack, name: str, *, writes: bool
) -> None:
    """INV-16: also when it is written to as if nothing were wrong."""
    with suppress(ThinpoolError):
        pool = opened(stack, DEFECTS[name].make())
        for id_ in (1, 2):
            try_all(pool, id_, writes=writes)
        with suppress(ThinpoolError):
            pool.release_metadata_snapshot()
        assert pool.status().mode in (PoolMode.RW, PoolMode.RO)


def halves() -> Image:
    builder = Builder(time=0)
    return builder.device(1, builder.tree({})).device(2, builder.tree({})).finish()


def without_mappings() -> Image:
    image = halves()
    return image.drop_entry(image.facts.data_mapping_root, 0)


def without_details() -> Image:
    image = halves()
    return image.drop_entry(image.facts.device_details_root, 0)


@pytest.mark.parametrize("make", [without_mappings, without_details])
@pytest.mark.parametrize("kind", list(ChangeKind))
def test_a_device_in_one_tree_only_is_refused_and_the_pool_goes_on(
    stack: ExitStack, make: Callable[[], Image], kind: ChangeKind
) -> None:
    pool = opened(stack, make())
    origin = VolumeId(2) if kind is ChangeKind.SNAPSHOT else None
    with pytest.raises(ThinpoolError) as caught:
        pool.apply([Change(kind=kind, id=VolumeId(1), origin=origin)], expected=1, new=2)
    if make is without_mappings:
        assert isinstance(caught.value, CorruptMetadataError)
    elif kind is not ChangeKind.DELETE:
        assert isinstance(caught.value, AlreadyExistsError)
    pool.apply([Change(kind=ChangeKind.CREATE, id=VolumeId(3))], expected=1, new=2)
    assert not pool.status().needs_check


def test_a_time_that_no_mapping_can_hold_makes_the_pool_read_only(stack: ExitStack) -> None:
    """It would run over into the number of the data block."""
    builder = Builder(time=1 << 24)
    pool = opened(stack, builder.device(1, builder.tree({0: (0, 0)})).finish())
    assert pool.status().mode is PoolMode.RO
    with pytest.raises(ThinpoolError):
        pool.clear_needs_check()
    with pool.open_volume(VolumeId(1), size=SIZE) as volume, pytest.raises(ThinpoolError):
        volume.write(5 * BLOCK, b"x" * SECTOR)


def test_a_node_that_counts_as_free_is_not_its_own_copy(stack: ExitStack) -> None:
    """INV-07: all else would be allocated over it."""
    builder = Builder()
    root = builder.tree({block: (block, 1) for block in range(200)})
    image = builder.device(1, root).finish()
    image.pair("metadata", root, 0)
    pool = opened(stack, image)
    with pool.open_volume(VolumeId(1), size=SIZE) as volume, pytest.raises(CorruptMetadataError):
        volume.write(300 * BLOCK, b"x" * SECTOR)


def test_a_pool_with_bits_past_the_end_of_its_last_bitmap_grows(stack: ExitStack) -> None:
    """The format says nothing of them, and others may have left them set."""
    builder = Builder(data_blocks=1000)
    image = builder.device(1, builder.tree({0: (0, 1)})).finish()
    for block in range(1000, 1100):
        image.pair("data", block, 1)
    pool = opened(stack, image)
    pool.resize_data(1200)
    with pool.open_volume(VolumeId(1), size=SIZE) as volume:
        for block in range(1, 1200):
            volume.write(block * BLOCK, b"x" * SECTOR)
    pool.commit()
    assert pool.status().data_blocks_used == 1200
