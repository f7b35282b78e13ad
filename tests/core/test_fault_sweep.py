"""Fail the Nth operation of a fixed scenario, for every N: never a wrong byte.

The outcome is success or a typed error with the pool read-only.

INV-15, INV-16: a failed flush or metadata write is never retried into success.
"""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING

import pytest

from tests.core.judges import contents, our_check, thin_check
from thinpool.engine import (
    BlockDevice,
    Change,
    ChangeKind,
    FaultDevice,
    FaultKind,
    FaultOp,
    Pool,
    PoolMode,
    PoolOptions,
    format_pool,
)
from thinpool.errors import ThinpoolError
from thinpool.model import VolumeId

if TYPE_CHECKING:
    from thinpool.engine import Volume

BLOCK = 64 * 1024
DATA_BLOCKS = 40
METADATA_BLOCKS = 128
SIZE = 8 * BLOCK
OPTIONS = PoolOptions(commit_interval_ms=0, error_if_no_space=True)
JUDGE_EVERY = 25


class Scenario:
    """The same steps every time, with what they were told kept beside what they did."""

    def __init__(self) -> None:
        self.random = random.Random(4711)
        self.metadata = BlockDevice.open_memory(METADATA_BLOCKS * 4096)
        self.data = BlockDevice.open_memory(DATA_BLOCKS * BLOCK)
        format_pool(self.metadata, block_size=BLOCK, data_blocks=DATA_BLOCKS)
        self.faults = {
            "metadata": FaultDevice.over(self.metadata),
            "data": FaultDevice.over(self.data),
        }
        self.now: dict[int, bytearray] = {}
        # What a volume may hold after a crash: the flushed state, or any later one.
        self.possible: dict[int, list[bytes]] = {}
        self.certainly_gone: set[int] = set()
        self.maybe: set[int] = set()  # a create or delete that failed: either is right
        self.errors: list[ThinpoolError] = []
        self.transaction_id = 0

    def run(self) -> None:
        """All steps; an error ends the step, not the scenario."""
        try:
            pool = Pool.open(self.faults["metadata"], self.faults["data"], OPTIONS)
        except ThinpoolError as error:
            self.errors.append(error)
            return
        self.pool = pool
        self.handles: dict[int, Volume] = {}
        for step in (
            lambda: self.change(ChangeKind.CREATE, 1),
            lambda: self.writes(1, 12),
            lambda: self.flush(1),
            lambda: self.change(ChangeKind.SNAPSHOT, 2, 1),
            lambda: self.writes(1, 8),
            lambda: self.writes(2, 8),
            lambda: self.flush(2),
            lambda: self.zeros(1, 5),
            lambda: self.change(ChangeKind.SNAPSHOT, 3, 2),
            lambda: self.writes(3, 6),
            lambda: self.flush(1),
            self.punch,
            lambda: self.drop(2),
            lambda: self.writes(3, 6),
            lambda: self.flush(3),
            self.punch,
            self.reads,
        ):
            self.attempt(step)
        self.attempt(self.reads)
        self.mode = self.pool.status().mode
        self.errors_before_close = len(self.errors)
        for handle in self.handles.values():
            handle.close()
        try:
            pool.close()
            for volume, data in self.now.items():
                if volume not in self.maybe:
                    self.possible[volume] = [bytes(data)]
        except ThinpoolError as error:
            self.errors.append(error)

    def attempt(self, step) -> None:
        try:
            step()
        except ThinpoolError as error:
            self.errors.append(error)

    def change(self, kind: ChangeKind, volume: int, origin: int | None = None) -> None:
        if origin is not None and origin not in self.handles:
            return
        self.maybe.add(volume)
        data = bytearray(self.now[origin]) if origin is not None else bytearray(SIZE)
        change = Change(
            kind=kind, id=VolumeId(volume), origin=None if origin is None else VolumeId(origin)
        )
        self.now[volume] = data
        self.possible[volume] = [bytes(data)]
        self.pool.apply([change], expected=self.transaction_id, new=self.transaction_id + 1)
        self.transaction_id += 1
        self.maybe.discard(volume)
        for each in self.handles:
            self.possible[each] = [bytes(self.now[each])]
        self.handles[volume] = self.pool.open_volume(VolumeId(volume), size=SIZE)

    def drop(self, volume: int) -> None:
        if volume not in self.handles:
            return
        self.handles.pop(volume).close()
        self.maybe.add(volume)
        self.pool.apply(
            [Change(kind=ChangeKind.DELETE, id=VolumeId(volume))],
            expected=self.transaction_id,
            new=self.transaction_id + 1,
        )
        self.transaction_id += 1
        self.maybe.discard(volume)
        self.certainly_gone.add(volume)

    def draw(self) -> tuple[int, int]:
        offset = self.random.randrange(SIZE // 512) * 512
        return offset, min(self.random.choice((512, 4096, BLOCK, 100_352)), SIZE - offset)

    def writes(self, volume: int, count: int) -> None:
        for _ in range(count):
            offset, length = self.draw()
            self.store(volume, offset, self.random.randbytes(length), zero=False)

    def zeros(self, volume: int, count: int) -> None:
        for _ in range(count):
            offset, length = self.draw()
            self.store(volume, offset, bytes(length), zero=True)

    def store(self, volume: int, offset: int, data: bytes, *, zero: bool) -> None:
        if volume not in self.handles:
            return
        wanted = bytearray(self.now[volume])
        wanted[offset : offset + len(data)] = data
        self.possible[volume].append(bytes(wanted))
        try:
            if zero:
                self.handles[volume].zero(offset, len(data))
            else:
                self.handles[volume].write(offset, data)
        except ThinpoolError as error:
            self.errors.append(error)
            # A part of it may have been written; which part is learnt by reading, if that works.
            try:
                wanted = bytearray(self.handles[volume].read(0, SIZE))
            except ThinpoolError:
                wanted = None
            if wanted is None:
                self.handles.pop(volume).close()
                self.maybe.add(volume)
                return
            for sector in range(0, SIZE, 512):
                found = wanted[sector : sector + 512]
                old = self.now[volume][sector : sector + 512]
                new = self.possible[volume][-1][sector : sector + 512]
                assert found in (old, new), f"volume {volume} at {sector} is neither old nor new"
            self.possible[volume].append(bytes(wanted))
        self.now[volume] = wanted

    def flush(self, volume: int) -> None:
        if volume not in self.handles:
            return
        self.handles[volume].flush()
        self.possible[volume] = [bytes(self.now[volume])]

    def punch(self) -> None:
        self.pool.punch_some(100)

    def reads(self) -> None:
        for volume, handle in self.handles.items():
            assert handle.read(0, SIZE) == self.now[volume], f"volume {volume} reads wrong"

    def verify_after_reopen(self) -> None:
        """On the devices themselves, without faults: opens, is sound, holds what was flushed."""
        report = our_check(contents(self.metadata))
        assert not [f for f in report.faults if f.severity == "fatal"], report.faults
        with Pool.open(self.metadata, self.data, OPTIONS) as pool:
            if pool.status().needs_check:
                pool.clear_needs_check()
            found = {info.id for info in pool.volumes()}
            for volume, possible in self.possible.items():
                if volume in self.certainly_gone:
                    assert volume not in found
                elif volume not in self.maybe:
                    assert volume in found
                    with pool.open_volume(VolumeId(volume), size=SIZE) as handle:
                        self.verify_content(volume, handle.read(0, SIZE), possible)
            pool.commit()

    def verify_content(self, volume: int, content: bytes, possible: list[bytes]) -> None:
        for sector in range(0, SIZE, 512):
            piece = content[sector : sector + 512]
            assert any(p[sector : sector + 512] == piece for p in possible), (
                f"volume {volume} at {sector} holds {piece[:16]!r} after a reopen"
            )

    def close(self) -> None:
        for device in (*self.faults.values(), self.metadata, self.data):
            device.close()


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize(
    ("device", "op", "kind"),
    [
        ("metadata", FaultOp.READ, FaultKind.ERROR),
        ("metadata", FaultOp.WRITE, FaultKind.ERROR),
        ("metadata", FaultOp.WRITE, FaultKind.TORN),
        ("metadata", FaultOp.FLUSH, FaultKind.ERROR),
        ("data", FaultOp.READ, FaultKind.ERROR),
        ("data", FaultOp.WRITE, FaultKind.ERROR),
        ("data", FaultOp.WRITE, FaultKind.TORN),
        ("data", FaultOp.FLUSH, FaultKind.ERROR),
        ("data", FaultOp.PUNCH, FaultKind.ERROR),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_failing_the_nth_operation_never_gives_a_wrong_byte(
    device: str,
    op: FaultOp,
    kind: FaultKind,
    forever: bool,  # noqa: FBT001 - a parameter
) -> None:
    fired = 0
    nth = 0
    while True:
        nth += 1
        scenario = Scenario()
        fault = scenario.faults[device]
        fault.add(kind, op, nth=nth, count=0 if forever else 1, host_errno=errno.EIO, arg=512)
        scenario.run()
        done = fault.fired == 0
        if not done:
            fired += 1
            if op is FaultOp.FLUSH or (device == "metadata" and op is FaultOp.WRITE):
                assert scenario.errors
                if scenario.errors_before_close:
                    assert scenario.mode in (PoolMode.RO, PoolMode.FAIL)
        else:
            assert not scenario.errors
        scenario.verify_after_reopen()
        if nth % JUDGE_EVERY == 0:
            thin_check(contents(scenario.metadata))
        scenario.close()
        if done:
            break
    print(f"{fired} faults of {op.name} on {device}")  # noqa: T201 - a failure must say it
    assert fired > 0
