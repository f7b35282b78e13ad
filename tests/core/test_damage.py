"""Damaged metadata: the engine says which block, and never makes anything up."""

from __future__ import annotations

import pytest

from tests.core.judges import MD
from thinpool.engine import BlockDevice, Change, ChangeKind, Pool, PoolOptions, format_pool
from thinpool.errors import CorruptMetadataError, ThinpoolError
from thinpool.model import VolumeId

BLOCK = 64 << 10
DATA_BLOCKS = 4096
VOLUMES = 3
# Far apart, so that the mapping tree has several leaves.
WRITTEN = [index * 3 for index in range(400)]
SIZE = (WRITTEN[-1] + 1) * BLOCK


@pytest.fixture(scope="module")
def healthy() -> tuple[bytes, bytes]:
    """Metadata and data of a pool with three volumes, one a snapshot of another."""
    with (
        BlockDevice.open_memory(512 * MD) as metadata,
        BlockDevice.open_memory(DATA_BLOCKS * BLOCK) as data,
    ):
        format_pool(metadata, block_size=BLOCK, data_blocks=DATA_BLOCKS)
        with Pool.open(metadata, data, PoolOptions(commit_interval_ms=0)) as pool:
            for number, origin in ((0, None), (1, None), (2, VolumeId(0))):
                kind = ChangeKind.CREATE if origin is None else ChangeKind.SNAPSHOT
                pool.apply(
                    [Change(kind=kind, id=VolumeId(number), origin=origin)],
                    expected=number,
                    new=number + 1,
                )
                if origin is None:
                    with pool.open_volume(VolumeId(number), size=SIZE) as volume:
                        for block in WRITTEN:
                            volume.write(block * BLOCK, marker(number, block))
        return metadata.read(0, metadata.size), data.read(0, data.size)


def marker(volume: int, block: int) -> bytes:
    return f"{volume}:{block}".encode().ljust(16, b".")


def expected(volume: int, block: int) -> bytes:
    return marker(0 if volume == 2 else volume, block)


def read_everything(metadata: bytes, contents: BlockDevice) -> list[ThinpoolError]:
    """Open, list and read all; what was refused. What was answered must be right."""
    refused: list[ThinpoolError] = []
    with BlockDevice.open_memory(len(metadata)) as device:
        device.write(0, metadata)
        try:
            pool = Pool.open(device, contents, PoolOptions(commit_interval_ms=0, read_only=True))
        except ThinpoolError as error:
            return [error]
        try:
            for number in range(VOLUMES):
                try:
                    with pool.open_volume(VolumeId(number), size=SIZE) as volume:
                        for block in WRITTEN:
                            found = volume.read(block * BLOCK, 16)
                            assert found == expected(number, block)
                except ThinpoolError as error:
                    refused.append(error)
        finally:
            pool.abandon()
    return refused


def used_blocks(metadata: bytes) -> list[int]:
    """Those that hold something; some of them of an earlier transaction."""
    zeros = bytes(MD)
    return [at for at in range(len(metadata) // MD) if metadata[at * MD :][:MD] != zeros]


@pytest.mark.parametrize("damage", ["bit", "elsewhere", "zeros"])
def test_damaged_block_is_named_and_nothing_wrong_is_read(healthy, rng, damage) -> None:
    """INV-07: whatever block is damaged, however; also one that is whole but in another's place."""
    metadata, data = healthy
    with BlockDevice.open_memory(len(data)) as contents:
        contents.write(0, data)
        assert read_everything(metadata, contents) == []
        blocks = used_blocks(metadata)
        noticed = 0
        for block in blocks:
            broken = bytearray(metadata)
            if damage == "bit":
                bit = rng.randrange(MD * 8)
                broken[block * MD + bit // 8] ^= 1 << (bit % 8)
            elif damage == "elsewhere":
                other = rng.choice([each for each in blocks if each != block])
                broken[block * MD : (block + 1) * MD] = metadata[other * MD : (other + 1) * MD]
            else:
                broken[block * MD : (block + 1) * MD] = bytes(MD)
            refused = read_everything(bytes(broken), contents)
            noticed += bool(refused)
            for error in refused:
                assert isinstance(error, CorruptMetadataError), error
                if "block" in error.attributes and error.block is not None:
                    assert error.block == block, error
        # The superblock, space maps, both trees and every leaf; not what no tree refers to.
        assert noticed >= 8
