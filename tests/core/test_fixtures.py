"""Pools made by a real kernel open, read as their notes say, and take changes."""

from __future__ import annotations

import hashlib
import json
import lzma
import random
from pathlib import Path
from typing import Any, Self

import pytest
import zstandard

from tests.core.judges import contents, thin_check, thin_dump
from thinpool.engine import BlockDevice, Pool, PoolOptions
from thinpool.model import VolumeId

POOLS = Path(__file__).parents[1] / "fixtures" / "kernel-pools"
RESTORED = Path(__file__).parents[1] / "fixtures" / "restored"
OPTIONS = PoolOptions(commit_interval_ms=0, error_if_no_space=True)

KERNEL_POOLS = ("simple", "snaps", "metasnap")
GROWN_BLOCKS = 48


class KernelPool:
    """One fixture, unpacked into memory."""

    def __init__(self, name: str) -> None:
        self.notes: dict[str, Any] = json.loads((POOLS / f"{name}.json").read_text())
        metadata = lzma.decompress((POOLS / f"{name}.meta.xz").read_bytes())
        reader = zstandard.ZstdDecompressor().stream_reader(
            (POOLS / f"{name}.data.zst").read_bytes()
        )
        data = reader.read()
        block = self.notes["block_size_sectors"] * 512
        self.metadata = BlockDevice.open_memory(len(metadata))
        self.metadata.write(0, metadata)
        self.data = BlockDevice.open_memory(self.notes["nr_data_blocks"] * block)
        self.data.write(0, data)
        self.sizes = {
            int(id_): device["virtual_sectors"] * 512
            for id_, device in self.notes["devices"].items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.metadata.close()
        self.data.close()

    def open(self) -> Pool:
        return Pool.open(self.metadata, self.data, OPTIONS)

    def digests(self, pool: Pool) -> dict[int, str]:
        found = {}
        for id_, size in self.sizes.items():
            with pool.open_volume(VolumeId(id_), size=size) as volume:
                digest = hashlib.sha256()
                for offset in range(0, size, 1 << 20):
                    digest.update(volume.read(offset, min(1 << 20, size - offset)))
            found[id_] = digest.hexdigest()
        return found

    def wanted(self) -> dict[int, str]:
        return {int(id_): device["sha256"] for id_, device in self.notes["devices"].items()}


@pytest.mark.parametrize("name", KERNEL_POOLS)
def test_a_kernel_pool_reads_as_the_kernel_wrote_it(name: str) -> None:
    with KernelPool(name) as fixture, fixture.open() as pool:
        status = pool.status()
        assert status.transaction_id == fixture.notes.get("transaction_id", 0)
        assert not status.needs_check
        assert {info.id for info in pool.volumes()} == set(fixture.sizes)
        for id_, device in fixture.notes["devices"].items():
            if "mapped_blocks" in device:
                mapped = pool.volume_info(VolumeId(int(id_))).mapped_blocks
                assert mapped == device["mapped_blocks"]
        assert fixture.digests(pool) == fixture.wanted()


@pytest.mark.parametrize("name", KERNEL_POOLS)
@pytest.mark.parametrize("seed", range(3))
def test_a_kernel_pool_takes_changes_and_stays_sound(name: str, seed: int) -> None:
    """Writes, snapshots, discards and a delete on top; what was not touched keeps its digest."""
    print(f"seed {seed}")  # noqa: T201 - a failure must say it
    with KernelPool(name) as fixture:
        change_and_verify(fixture, random.Random(seed))


def change_and_verify(fixture: KernelPool, random_: random.Random) -> None:
    victim = max(fixture.sizes)
    size = fixture.sizes[victim]
    with fixture.open() as pool:
        pool.create_snapshot(VolumeId(1000), origin=VolumeId(victim))
        with (
            pool.open_volume(VolumeId(1000), size=size) as snapshot,
            pool.open_volume(VolumeId(victim), size=size) as origin,
        ):
            expected = {1000: bytearray(snapshot.read(0, size)), victim: None}
            expected[victim] = bytearray(expected[1000])
            for _ in range(120):
                id_, volume = random_.choice([(1000, snapshot), (victim, origin)])
                offset = random_.randrange(size // 512) * 512
                length = min(random_.choice((512, 4096, 200_192)), size - offset)
                if random_.random() < 0.3:
                    volume.zero(offset, length)
                    expected[id_][offset : offset + length] = bytes(length)
                else:
                    data = random_.randbytes(length)
                    volume.write(offset, data)
                    expected[id_][offset : offset + length] = data
            assert snapshot.read(0, size) == expected[1000]
            assert origin.read(0, size) == expected[victim]
        wanted = fixture.wanted() | {victim: hashlib.sha256(expected[victim]).hexdigest()}
        assert fixture.digests(pool) == wanted
        pool.delete_volume(VolumeId(1000))
        pool.commit()
        thin_check(contents(fixture.metadata))
    with fixture.open() as pool:
        assert fixture.digests(pool) == wanted


def test_a_held_metadata_snapshot_of_the_kernel_survives_changes_and_is_released() -> None:
    with KernelPool("metasnap") as fixture, fixture.open() as pool:
        assert pool.status().held_root == 37
        with pool.open_volume(VolumeId(0), size=fixture.sizes[0]) as volume:
            volume.write(0, b"changed" * 1000)
            volume.zero(1 << 20, 1 << 20)
        pool.commit()
        thin_check(contents(fixture.metadata))
        pool.release_metadata_snapshot()
        assert pool.status().held_root == 0
        thin_check(contents(fixture.metadata))


@pytest.mark.parametrize("path", sorted(RESTORED.glob("*.bin.xz")), ids=lambda p: p.name)
def test_a_pool_made_by_thin_restore_opens_and_its_hidden_end_is_found_when_it_grows(
    path: Path,
) -> None:
    """thin_restore 0.9 writes a free count that hides the last bitmap once the pool grows."""
    metadata_bytes = lzma.decompress(path.read_bytes())
    metadata = BlockDevice.open_memory(len(metadata_bytes))
    metadata.write(0, metadata_bytes)
    block = int.from_bytes(metadata_bytes[0x150:0x154], "little") * 512
    blocks = int.from_bytes(metadata_bytes[0x40:0x48], "little")
    data = BlockDevice.open_memory((blocks + GROWN_BLOCKS) * block)
    with metadata, data, Pool.open(metadata, data, OPTIONS) as pool:
        if pool.status().needs_check:
            pool.clear_needs_check()
        used = pool.status().data_blocks_used
        pool.resize_data(blocks + GROWN_BLOCKS)
        free = blocks + GROWN_BLOCKS - used
        count = min(free, GROWN_BLOCKS + 8)
        pool.create_volume(VolumeId(4000))
        with pool.open_volume(VolumeId(4000), size=count * block) as volume:
            for i in range(count):
                volume.write(i * block, b"%d" % i)
            for i in range(count):
                assert volume.read(i * block, 16) == (b"%d" % i).ljust(16, b"\0")
        pool.commit()
        assert pool.status().data_blocks_used == used + count
        image = contents(metadata)
    thin_check(image)
    assert len(thin_dump(image)[4000]) == count
