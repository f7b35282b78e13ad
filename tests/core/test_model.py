"""A Hypothesis state machine: a plain Python model equals the pool, whatever is done to it.

INV-06, INV-12, INV-13, INV-20.
"""

from __future__ import annotations

import mmap
from typing import Any

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.core.judges import contents, have_thin_tools, our_check, thin_check, thin_dump
from thinpool.engine import BlockDevice, DiscardMode, Pool, PoolOptions, Volume, format_pool
from thinpool.errors import DataSpaceError
from thinpool.model import VolumeId

KIB = 1024
SECTOR = 512
VOLUME_BLOCKS = 12
VOLUMES_MAX = 6


class PoolMachine(RuleBasedStateMachine):
    """Volumes are bytearrays, a snapshot is a copy, a crash goes back to the last commit.

    With a redo log (what the pool's server has) a crash loses nothing at all.
    """

    block_size = 64 * KIB
    data_blocks = 60
    metadata_blocks = 160

    @initialize(redo=st.booleans(), direct_discard=st.booleans())
    def make(self, redo: bool, direct_discard: bool) -> None:  # noqa: FBT001 - hypothesis passes it
        self.metadata = BlockDevice.open_memory(self.metadata_blocks * 4096)
        self.data = BlockDevice.open_memory(self.data_blocks * self.block_size)
        format_pool(self.metadata, block_size=self.block_size, data_blocks=self.data_blocks)
        self.redo = mmap.mmap(-1, 64 * KIB) if redo else None
        mode = DiscardMode.PASSDOWN if direct_discard else DiscardMode.NO_PASSDOWN
        self.options = PoolOptions(
            commit_interval_ms=0, error_if_no_space=True, discard_mode=mode, cache_bytes=64 * KIB
        )
        self.size = VOLUME_BLOCKS * self.block_size - 3 * SECTOR  # a partial last block
        self.model: dict[int, bytearray] = {}
        self.committed: dict[int, bytes] = {}
        self.handles: dict[int, Volume] = {}
        self.next_id = 0
        self.reopen_pool()

    def reopen_pool(self) -> None:
        self.pool = Pool.open(self.metadata, self.data, self.options, redo_memory=self.redo)

    def commit_model(self) -> None:
        self.committed = {volume: bytes(data) for volume, data in self.model.items()}

    def handle(self, volume: int) -> Volume:
        if volume not in self.handles:
            self.handles[volume] = self.pool.open_volume(VolumeId(volume), size=self.size)
        return self.handles[volume]

    def close_handles(self) -> None:
        for handle in self.handles.values():
            handle.close()
        self.handles.clear()

    def pick(self, data: Any) -> int:
        return int(data.draw(st.sampled_from(sorted(self.model))))

    def draw_range(self, data: Any) -> tuple[int, int]:
        unit = data.draw(st.sampled_from((1, SECTOR, 8 * SECTOR, self.block_size)))
        offset = data.draw(st.integers(0, (self.size - 1) // unit)) * unit
        length = data.draw(st.integers(1, 3 * max(1, self.block_size // unit))) * unit
        return offset, min(length, self.size - offset)

    # ---- rules --------------------------------------------------------------------------------

    @precondition(lambda self: len(self.model) < VOLUMES_MAX)
    @rule()
    def create(self) -> None:
        self.pool.create_volume(VolumeId(self.next_id))
        self.model[self.next_id] = bytearray(self.size)
        self.next_id += 1

    @precondition(lambda self: 0 < len(self.model) < VOLUMES_MAX)
    @rule(data=st.data())
    def snapshot(self, data: Any) -> None:
        origin = self.pick(data)
        self.pool.create_snapshot(VolumeId(self.next_id), origin=VolumeId(origin))
        self.model[self.next_id] = bytearray(self.model[origin])
        self.next_id += 1

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        volume = self.pick(data)
        if volume in self.handles:
            self.handles.pop(volume).close()
        self.pool.delete_volume(VolumeId(volume))
        del self.model[volume]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), byte=st.integers(1, 255))
    def write(self, data: Any, byte: int) -> None:
        volume = self.pick(data)
        offset, length = self.draw_range(data)
        written = bytes([byte]) * length
        try:
            self.handle(volume).write(offset, written)
        except DataSpaceError:
            # Some of its blocks may have been written before the space ran out.
            found = self.handle(volume).read(offset, length)
            old = bytes(self.model[volume][offset : offset + length])
            assert all(new in (byte, before) for new, before in zip(found, old, strict=True))
            written = found
        self.model[volume][offset : offset + length] = written

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def read(self, data: Any) -> None:
        volume = self.pick(data)
        offset, length = self.draw_range(data)
        assert (
            self.handle(volume).read(offset, length) == self.model[volume][offset : offset + length]
        )

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def zero(self, data: Any) -> None:
        volume = self.pick(data)
        offset, length = self.draw_range(data)
        try:
            self.handle(volume).zero(offset, length)
        except DataSpaceError:
            found = self.handle(volume).read(offset, length)
            old = bytes(self.model[volume][offset : offset + length])
            assert all(new in (0, before) for new, before in zip(found, old, strict=True))
            self.model[volume][offset : offset + length] = found
        else:
            self.model[volume][offset : offset + length] = bytes(length)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def discard(self, data: Any) -> None:
        """Whole blocks read as zeros, partial ends stay."""
        volume = self.pick(data)
        offset, length = self.draw_range(data)
        self.handle(volume).discard(offset, length)
        begin = -(-offset // self.block_size) * self.block_size
        end = (offset + length) // self.block_size * self.block_size
        if offset + length == self.size:
            end = self.size
        if begin < end:
            self.model[volume][begin:end] = bytes(end - begin)

    @rule()
    def commit(self) -> None:
        self.pool.commit()
        self.commit_model()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def flush(self, data: Any) -> None:
        self.handle(self.pick(data)).flush()
        # A flush that committed made everything durable, one that did not changed no mapping.
        if not self.pool.status().dirty:
            self.commit_model()

    @rule()
    def punch(self) -> None:
        self.pool.punch_some(1000)

    @rule(held=st.booleans())
    def metadata_snapshot(self, held: bool) -> None:  # noqa: FBT001 - hypothesis passes it
        assume(held != bool(self.pool.status().held_root))
        if held:
            self.pool.reserve_metadata_snapshot()
        else:
            self.pool.release_metadata_snapshot()
        self.commit_model()

    @rule()
    def grow_data(self) -> None:
        blocks = self.pool.status().data_blocks_total
        assume(blocks < self.data_blocks + 16)
        self.data.resize((blocks + 4) * self.block_size)
        self.pool.resize_data(blocks + 4)
        self.commit_model()

    @rule()
    def reopen(self) -> None:
        self.close_handles()
        self.pool.close()
        self.commit_model()
        self.reopen_pool()
        self.everything_reads_as_the_model()

    @rule()
    def crash(self) -> None:
        self.close_handles()
        self.pool.abandon()
        if self.redo is None:
            # Overwrites in place may have reached the disk: only what a commit covers is sure,
            # and what was written in place since is there too.
            self.reopen_pool()
            survivors = {info.id for info in self.pool.volumes()}
            assert survivors == set(self.committed)
            self.model = {v: bytearray(self.handle(v).read(0, self.size)) for v in survivors}
        else:
            self.reopen_pool()
        self.everything_reads_as_the_model()

    # ---- what always holds --------------------------------------------------------------------

    def everything_reads_as_the_model(self) -> None:
        for volume, data in self.model.items():
            assert self.handle(volume).read(0, self.size) == data

    @invariant()
    def metadata_is_sound(self) -> None:
        if not hasattr(self, "pool"):
            return
        status = self.pool.status()
        assert status.nr_volumes == len(self.model)
        if status.dirty:
            return
        image = contents(self.metadata)
        report = our_check(image)
        assert report.clean, report.faults

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.everything_reads_as_the_model()
        self.pool.commit()
        image = contents(self.metadata)
        report = our_check(image)
        assert report.clean, report.faults
        thin_check(image)
        if have_thin_tools():
            self.dump_agrees(thin_dump(image))
        self.close_handles()
        self.pool.close()
        self.metadata.close()
        self.data.close()

    def dump_agrees(self, dumped: dict[int, dict[int, int]]) -> None:
        """What thin_dump says of every volume, read from the data device, is the model."""
        assert set(dumped) == set(self.model)
        for volume, blocks in dumped.items():
            content = bytearray(VOLUME_BLOCKS * self.block_size)
            for virtual, block in blocks.items():
                at = virtual * self.block_size
                content[at : at + self.block_size] = self.data.read(
                    block * self.block_size, self.block_size
                )
            assert content[: self.size] == self.model[volume]


class LargeBlockMachine(PoolMachine):
    """The same with data blocks of 1 MiB."""

    block_size = 1024 * KIB
    data_blocks = 40


TestPoolOf64KiBBlocks = PoolMachine.TestCase
TestPoolOf64KiBBlocks.settings = settings(deadline=None, stateful_step_count=40)
TestPoolOf1MiBBlocks = LargeBlockMachine.TestCase
TestPoolOf1MiBBlocks.settings = settings(deadline=None, stateful_step_count=25, max_examples=15)

pytestmark = pytest.mark.timeout(900)
