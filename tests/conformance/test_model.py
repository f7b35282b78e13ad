"""Random sequences of operations over either engine, compared with a model in memory.

The user engine alone has a larger one, tests/core/test_model.py. This one is small enough for a
guest, and its last test compares what the two engines make of the same sequence.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from tests.conformance.driver import BLOCK, DRIVERS, SECTOR, Driver
from thinpool import errors

if TYPE_CHECKING:
    from tests.conformance.driver import Dump

VOLUME_BLOCKS = 12
SIZE = VOLUME_BLOCKS * BLOCK
VOLUMES_MAX = 6
DATA_BLOCKS = 40
STEPS = 60


@dataclass
class Model:
    """Volumes as bytes, and a run of operations on a driver that keeps to it."""

    driver: Driver
    rng: random.Random
    zeroing: bool = True
    volumes: dict[int, bytearray] = field(default_factory=dict)
    next_id: int = 0
    held: bool = False
    blocks: int = DATA_BLOCKS
    done: list[str] = field(default_factory=list)

    def run(self, steps: int) -> None:
        self.driver.make(data_blocks=DATA_BLOCKS, metadata_blocks=512)
        operations = {
            self.create: 3, self.snapshot: 5, self.delete: 2, self.write: 14, self.discard: 5,
            self.zero: 4 if self.zeroing else 0, self.read: 5, self.flush: 2, self.reopen: 1,
            self.hold: 1, self.grow: 1,
        }  # fmt: skip
        self.create()
        for _ in range(steps):
            (operation,) = self.rng.choices(list(operations), list(operations.values()))
            self.done.append(operation.__name__)
            operation()
        self.everything_is_there()
        self.driver.reopen()
        self.everything_is_there()

    def pick(self) -> int | None:
        return self.rng.choice(sorted(self.volumes)) if self.volumes else None

    def range(self) -> tuple[int, int]:
        unit = self.rng.choice((SECTOR, 8 * SECTOR, BLOCK, BLOCK))
        offset = self.rng.randrange(SIZE // unit) * unit
        length = self.rng.randint(1, max(1, 3 * BLOCK // unit)) * unit
        return offset, min(length, SIZE - offset)

    def create(self) -> None:
        if len(self.volumes) < VOLUMES_MAX:
            self.driver.create(self.next_id)
            self.volumes[self.next_id] = bytearray(SIZE)
            self.next_id += 1

    def snapshot(self) -> None:
        origin = self.pick()
        if origin is not None and len(self.volumes) < VOLUMES_MAX:
            self.driver.snapshot(self.next_id, origin=origin)
            self.volumes[self.next_id] = bytearray(self.volumes[origin])
            self.next_id += 1

    def delete(self) -> None:
        volume = self.pick()
        if volume is not None and len(self.volumes) > 1:
            self.driver.delete(volume)
            del self.volumes[volume]

    def write(self) -> None:
        volume = self.pick()
        if volume is None:
            return
        offset, length = self.range()
        self.change(volume, offset, self.rng.randbytes(8) * (length // 8), zero=False)

    def zero(self) -> None:
        volume = self.pick()
        if volume is not None:
            offset, length = self.range()
            self.change(volume, offset, bytes(length), zero=True)

    def change(self, volume: int, offset: int, data: bytes, *, zero: bool) -> None:
        handle = self.driver.volume(volume, VOLUME_BLOCKS)
        model = self.volumes[volume]
        try:
            if zero:
                handle.zero(offset, len(data))
            else:
                handle.write(offset, data)
        except errors.NoSpaceError:
            # Some of it may have been written before the space ran out.
            found = handle.read(offset, len(data))
            old = model[offset : offset + len(data)]
            for at in range(0, len(data), SECTOR):
                sector = found[at : at + SECTOR]
                assert sector in (data[at : at + SECTOR], bytes(old[at : at + SECTOR]))
            data = found
        model[offset : offset + len(data)] = data

    def discard(self) -> None:
        volume = self.pick()
        if volume is None:
            return
        offset, length = self.range()
        self.driver.volume(volume, VOLUME_BLOCKS).discard(offset, length)
        begin, end = -(-offset // BLOCK) * BLOCK, (offset + length) // BLOCK * BLOCK
        if begin < end:
            self.volumes[volume][begin:end] = bytes(end - begin)
        self.driver.pool.commit()  # so that either engine counts the same blocks as free

    def read(self) -> None:
        volume = self.pick()
        if volume is not None:
            offset, length = self.range()
            found = self.driver.volume(volume, VOLUME_BLOCKS).read(offset, length)
            assert found == self.volumes[volume][offset : offset + length]

    def flush(self) -> None:
        volume = self.pick()
        if volume is not None:
            self.driver.volume(volume, VOLUME_BLOCKS).flush()

    def reopen(self) -> None:
        self.driver.reopen()

    def hold(self) -> None:
        if self.held:
            self.driver.pool.release_metadata_snapshot()
        else:
            self.driver.pool.reserve_metadata_snapshot()
        self.held = not self.held

    def grow(self) -> None:
        if self.blocks < DATA_BLOCKS + 24:
            self.blocks += 4
            self.driver.grow_data_device(self.blocks)
            self.driver.pool.resize_data(self.blocks)

    def everything_is_there(self) -> None:
        assert self.driver.ids() == sorted(self.volumes)
        for volume, data in self.volumes.items():
            assert self.driver.volume(volume, VOLUME_BLOCKS).read(0, SIZE) == data, volume

    def dump_agrees(self) -> Dump:
        """What the dump says of each volume, read from the data device, is the model."""
        self.driver.close()
        where = self.driver.check()
        content = self.driver.data_path.read_bytes()
        assert set(where) == set(self.volumes)
        for volume, data in self.volumes.items():
            found = bytearray(SIZE)
            for block, place in where[volume].items():
                at, lies = block * BLOCK, place * BLOCK
                found[at : at + BLOCK] = content[lies : lies + BLOCK]
            assert found == data, volume
        return where


@pytest.mark.parametrize("number", range(4))
def test_a_pool_is_what_the_model_is(driver, seed, number):
    model = Model(driver, random.Random(f"{seed}-{number}"))
    try:
        model.run(STEPS)
        model.dump_agrees()
    except BaseException:
        print("operations:", " ".join(model.done))  # noqa: T201 - shown with the failure
        raise


def sharing(where: Dump) -> set[frozenset[tuple[int, int]]]:
    """Which blocks of which volumes are one data block, wherever that lies."""
    owners: dict[int, set[tuple[int, int]]] = {}
    for volume, blocks in where.items():
        for block, place in blocks.items():
            owners.setdefault(place, set()).add((volume, block))
    return {frozenset(each) for each in owners.values()}


@pytest.mark.dm
@pytest.mark.parametrize("number", range(2))
def test_both_engines_make_the_same_of_one_sequence(seed, number, tmp_path):
    """The same volumes, mappings and sharing; only where blocks lie is each engine's own."""
    dumps = []
    for engine, make in DRIVERS.items():
        (tmp_path / engine).mkdir()
        driver = make(tmp_path / engine)
        try:
            # Zeroing a part of a block that is not mapped maps it in one engine only.
            model = Model(driver, random.Random(f"{seed}-{number}"), zeroing=False)
            model.run(STEPS)
            dumps.append(model.dump_agrees())
        finally:
            driver.finish()
    user, kernel = dumps
    assert user.keys() == kernel.keys()
    assert sharing(user) == sharing(kernel)
