"""After a power cut at any point the pool opens, checks clean and holds what was flushed."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

import pytest

from tests.core.crash import Image, crash_images
from tests.core.judges import contents, our_check, thin_check
from thinpool.engine import (
    BlockDevice,
    Change,
    ChangeKind,
    LogDevice,
    LogKind,
    Pool,
    PoolOptions,
    format_pool,
)
from thinpool.errors import DataSpaceError
from thinpool.model import VolumeId

KIB = 1024
BLOCK = 64 * KIB
DATA_BLOCKS = 40
METADATA_BLOCKS = 96
VOLUME = 10 * BLOCK
SECTOR = 512
OPTIONS = PoolOptions(commit_interval_ms=0, error_if_no_space=True)
# Images of one seed and seeds: more than 10,000 in all. A soak asks for more.
SEEDS = int(os.environ.get("THINPOOL_CRASH_SEEDS", "8"))
OPERATIONS = int(os.environ.get("THINPOOL_CRASH_OPERATIONS", "360"))
JUDGE_EVERY = 20  # thin_check is a process: on every n-th image; our own checker sees them all
IMAGES_MIN = 1250  # of one seed


@dataclass
class Version:
    """What a volume held after one acknowledged operation."""

    step: int
    data: bytes


@dataclass
class History:
    """Every acknowledged state of every volume, and when it was certain to be durable."""

    versions: dict[int, list[Version]] = field(default_factory=dict)
    born: dict[int, int] = field(default_factory=dict)
    dead: dict[int, int] = field(default_factory=dict)

    def now(self, volume: int) -> bytearray:
        return bytearray(self.versions[volume][-1].data)

    def add(self, volume: int, step: int, data: bytes) -> None:
        self.versions.setdefault(volume, []).append(Version(step, bytes(data)))


class Run:
    """One seeded run of mixed work on logged devices."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.metadata = BlockDevice.open_memory(METADATA_BLOCKS * 4096)
        self.data = BlockDevice.open_memory(DATA_BLOCKS * BLOCK)
        format_pool(self.metadata, block_size=BLOCK, data_blocks=DATA_BLOCKS)
        self.start = (contents(self.metadata), contents(self.data))
        self.metadata_log = LogDevice.over(self.metadata, device_number=0)
        self.data_log = LogDevice.over(self.data, order=self.metadata_log, device_number=1)
        self.history = History()
        self.handles: dict = {}
        self.next_id = 1
        self.transaction_id = 0
        self.flushed: dict[int, dict[int, int]] = {}  # step -> volume -> its certain step

    def work(self, operations: int) -> None:
        with Pool.open(self.metadata_log, self.data_log, OPTIONS) as pool:
            self.pool = pool
            for step in range(1, operations + 1):
                self.step = step
                self.one()
                # Numbers of the marks tell a position of the log which steps were acknowledged.
                self.metadata_log.mark(step)
            for handle in self.handles.values():
                handle.close()

    def one(self) -> None:
        alive = sorted(self.handles)
        choice = self.random.random()
        if not alive or (choice < 0.04 and len(alive) < 5):
            self.apply(Change(kind=ChangeKind.CREATE, id=VolumeId(self.next_id)), bytes(VOLUME))
        elif choice < 0.12 and len(alive) < 5:
            origin = self.random.choice(alive)
            change = Change(
                kind=ChangeKind.SNAPSHOT, id=VolumeId(self.next_id), origin=VolumeId(origin)
            )
            self.apply(change, bytes(self.history.now(origin)))
        elif choice < 0.16 and len(alive) > 2:
            self.delete(self.random.choice(alive))
        elif choice < 0.70:
            self.write(self.random.choice(alive))
        elif choice < 0.80:
            self.zero(self.random.choice(alive))
        elif choice < 0.95:
            volume = self.random.choice(alive)
            self.handles[volume].flush()
            # A flush speaks for its own volume, as a disk's does.
            certain = dict(self.flushed[max(self.flushed)])
            certain[volume] = self.history.versions[volume][-1].step
            self.flushed[self.step] = certain
        else:
            self.pool.punch_some(8)

    def everything_certain(self) -> None:
        self.flushed[self.step] = {
            volume: versions[-1].step for volume, versions in self.history.versions.items()
        }

    def apply(self, change: Change, data: bytes) -> None:
        self.pool.apply([change], expected=self.transaction_id, new=self.transaction_id + 1)
        self.transaction_id += 1
        self.history.add(change.id, self.step, data)
        self.history.born[change.id] = self.step
        self.handles[change.id] = self.pool.open_volume(change.id, size=VOLUME)
        self.next_id += 1
        self.everything_certain()

    def delete(self, volume: int) -> None:
        self.handles.pop(volume).close()
        self.pool.apply(
            [Change(kind=ChangeKind.DELETE, id=VolumeId(volume))],
            expected=self.transaction_id,
            new=self.transaction_id + 1,
        )
        self.transaction_id += 1
        self.history.dead[volume] = self.step
        self.everything_certain()

    def range(self) -> tuple[int, int]:
        offset = self.random.randrange(VOLUME // SECTOR) * SECTOR
        length = self.random.choice((SECTOR, 8 * SECTOR, BLOCK, 3 * SECTOR, 2 * BLOCK))
        return offset, min(length, VOLUME - offset)

    def write(self, volume: int) -> None:
        offset, length = self.range()
        tag = f"{volume}.{self.step}.".encode()
        data = (tag * (SECTOR // len(tag) + 1))[:SECTOR] * (length // SECTOR)
        now = self.history.now(volume)
        try:
            self.handles[volume].write(offset, data)
            now[offset : offset + length] = data
        except DataSpaceError:  # a part of it may be written
            now = bytearray(self.handles[volume].read(0, VOLUME))
        self.history.add(volume, self.step, now)

    def zero(self, volume: int) -> None:
        offset, length = self.range()
        now = self.history.now(volume)
        try:
            self.handles[volume].zero(offset, length)
            now[offset : offset + length] = bytes(length)
        except DataSpaceError:
            now = bytearray(self.handles[volume].read(0, VOLUME))
        self.history.add(volume, self.step, now)


def acknowledged_before(log: list, position: int) -> int:
    """The last step that was acknowledged before a position of the log."""
    step = 0
    for entry in log[:position]:
        if entry.kind is LogKind.MARK:
            step = entry.offset
    return step


def allowed(run: Run, volume: int, certain: int, until: int) -> list[bytes]:
    """Contents that may be there: the certain one and everything acknowledged or begun after."""
    versions = run.history.versions[volume]
    first = max((i for i, v in enumerate(versions) if v.step <= certain), default=0)
    return [v.data for v in versions[first:] if v.step <= until] or [versions[first].data]


def verify_volume(found: bytes, candidates: list[bytes], where: str) -> None:
    if found in candidates:
        return
    for offset in range(0, VOLUME, SECTOR):
        sector = found[offset : offset + SECTOR]
        if not any(candidate[offset : offset + SECTOR] == sector for candidate in candidates):
            wanted = candidates[0][offset : offset + 16]
            pytest.fail(f"{where}: at {offset} stands {sector[:16]!r}, wanted {wanted!r} or later")


def verify(run: Run, log: list, image: Image, number: int) -> None:
    where = f"image {number} at {image.position} ({image.how})"
    step = acknowledged_before(log, image.position)
    certain_at = max((s for s in run.flushed if s <= step), default=0)
    certain = run.flushed.get(certain_at, {})
    metadata, data = image.devices
    report = our_check(metadata)
    assert report.clean, f"{where}: {report.faults}"
    if number % JUDGE_EVERY == 0:
        thin_check(bytes(metadata))
    with BlockDevice.open_memory(len(metadata)) as m, BlockDevice.open_memory(len(data)) as d:
        # The devices of every image are new: nothing of an earlier one shines through.
        m.write(0, metadata)
        d.write(0, data)
        with Pool.open(m, d, OPTIONS) as pool:
            found = {info.id for info in pool.volumes()}
            # The step in flight may or may not have happened.
            for volume, born in run.history.born.items():
                dead = run.history.dead.get(volume, 1 << 60)
                if born <= step and dead > step + 1:
                    assert volume in found, f"{where}: volume {volume} is gone"
                if born > step + 1 or dead <= step:
                    assert volume not in found, f"{where}: volume {volume} should not be"
            for volume in found:
                with pool.open_volume(volume, size=VOLUME) as handle:
                    content = handle.read(0, VOLUME)
                candidates = allowed(run, volume, certain.get(volume, 0), step + 1)
                verify_volume(content, candidates, f"{where}, volume {volume}")


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_crash_image_opens_checks_clean_and_holds_what_was_flushed(seed: int) -> None:
    """INV-01, INV-02, INV-03, INV-04, INV-05, INV-06, INV-08."""
    print(f"seed {seed}")  # noqa: T201 - a failure must say it
    run = Run(seed)
    run.work(OPERATIONS)
    log = list(run.metadata_log)
    for device in (run.data_log, run.metadata_log, run.data, run.metadata):
        device.close()
    number = 0
    images = crash_images(run.start, log, random.Random(seed), samples=7)
    for number, image in enumerate(images, 1):
        verify(run, log, image, number)
    print(f"{number} images of {len(log)} entries")  # noqa: T201 - a failure must say it
    assert number >= IMAGES_MIN
