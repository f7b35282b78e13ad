"""What the conformance suite drives: a pool of either engine, its devices in the test's hands.

A test sees a ``PoolBackend`` and what stands below it: growing the devices, breaking them, looking
at what is on them. What differs between the engines is here and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.core.judges import have_thin_tools, our_check, thin_check, thin_dump
from thinpool import errors
from thinpool.check.reader import MetadataReader
from thinpool.dm import DeviceMapper, FlakeyTarget, LinearTarget
from thinpool.dm.engine import DmPool
from thinpool.engine import BlockDevice, Pool, PoolOptions, format_pool
from thinpool.engine.backend import Change, ChangeKind, PoolMode
from thinpool.engine.bdev import FOR_EVER, FaultDevice, FaultKind, FaultOp
from thinpool.host import loop
from thinpool.model import VolumeId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from thinpool.dm import Target
    from thinpool.engine.backend import PoolBackend, PoolStatus, VolumeIO

KIB = 1 << 10
MIB = 1 << 20
MD = 4096
SECTOR = 512
BLOCK = 64 * KIB
OPTIONS = PoolOptions(error_if_no_space=True)

Dump = dict[int, dict[int, int]]


def pattern(number: int, length: int = BLOCK) -> bytes:
    """Bytes that tell which write they are of, and where in it."""
    word = f"{number:07d}.".encode()
    return (word * (-(-length // len(word))))[:length]


class Driver(ABC):
    """A pool under test. ``make`` it first; what is open when the test ends is closed."""

    engine: str
    pool: PoolBackend
    METADATA_FULL: tuple[type[errors.ThinpoolError], ...]
    """What says that metadata is out."""
    AFTER_METADATA_FULL: frozenset[str] = frozenset()
    """Kinds of faults that running out of metadata may leave."""

    def __init__(self, folder: Path) -> None:
        self.metadata_path = folder / "metadata"
        self.data_path = folder / "data"
        self.block = BLOCK
        self.options = OPTIONS
        self.is_open = False
        self.healthy = True  # a test that damages the pool for good says that it did
        self.tolerated: frozenset[str] = frozenset()  # severities of faults
        self._volumes: dict[int, VolumeIO] = {}
        self._crashes: list[Crash] = []

    # ---- making and opening -----------------------------------------------------------------

    def make(
        self,
        *,
        data_blocks: int = 64,
        metadata_blocks: int = 256,
        block: int = BLOCK,
        breakable: bool = False,
        **options: Any,
    ) -> PoolBackend:
        """Format and open a pool of its own files.

        Args:
            data_blocks: of the data device.
            metadata_blocks: of the metadata device.
            block: bytes of a data block.
            breakable: ``break_metadata`` will be used.
            options: of PoolOptions.
        """
        self.block = block
        for path, size in (
            (self.data_path, data_blocks * block),
            (self.metadata_path, metadata_blocks * MD),
        ):
            BlockDevice.open_file(path, create_size=size).close()
        with BlockDevice.open_file(self.metadata_path) as metadata:
            format_pool(metadata, block_size=block, data_blocks=data_blocks)
        self.set_up_devices(breakable=breakable)
        return self.open(**options)

    def open(self, **options: Any) -> PoolBackend:
        """Open it; options that are not given are those of the last time."""
        self.options = replace(self.options, **options)
        self.pool = self.open_pool(self.options)
        self.is_open = True
        return self.pool

    def close(self) -> None:
        """Close it, volumes first."""
        for volume_id in list(self._volumes):
            self.close_volume(volume_id)
        if self.is_open:
            self.is_open = False
            try:
                self.pool.close()
            except errors.NeedsCheckError:
                if self.healthy:  # else it says what the test knows
                    raise

    def reopen(self, **options: Any) -> PoolBackend:
        """Close it and open it again."""
        self.close()
        return self.open(**options)

    def finish(self) -> None:
        """Close what a test left open, and judge what it left on disk."""
        try:
            for crash in self._crashes:
                crash.close()
            self.close()
        finally:
            self.take_down_devices()
        if self.healthy and self.metadata_path.exists():
            judge(self.metadata_path.read_bytes(), self.tolerated)

    @abstractmethod
    def set_up_devices(self, *, breakable: bool) -> None: ...

    @abstractmethod
    def take_down_devices(self) -> None: ...

    @abstractmethod
    def open_pool(self, options: PoolOptions) -> PoolBackend: ...

    # ---- changes ----------------------------------------------------------------------------

    def apply(self, *changes: Change) -> None:
        """All of them with one transaction id."""
        now = self.pool.status().transaction_id
        self.pool.apply(changes, expected=now, new=now + 1)

    def create(self, *volume_ids: int) -> None:
        self.apply(*(Change(kind=ChangeKind.CREATE, id=VolumeId(each)) for each in volume_ids))

    def snapshot(self, volume_id: int, *, origin: int) -> None:
        self.apply(
            Change(kind=ChangeKind.SNAPSHOT, id=VolumeId(volume_id), origin=VolumeId(origin))
        )

    def delete(self, *volume_ids: int) -> None:
        for volume_id in volume_ids:
            self.close_volume(volume_id)
        self.apply(*(Change(kind=ChangeKind.DELETE, id=VolumeId(each)) for each in volume_ids))

    # ---- volumes ----------------------------------------------------------------------------

    def volume(self, volume_id: int, blocks: int = 16) -> VolumeIO:
        """An open volume; the same one until it is closed."""
        if volume_id not in self._volumes:
            self._volumes[volume_id] = self.pool.open_volume(
                VolumeId(volume_id), size=blocks * self.block
            )
        return self._volumes[volume_id]

    def new(self, volume_id: int, blocks: int = 16) -> VolumeIO:
        """A new volume, open."""
        self.create(volume_id)
        return self.volume(volume_id, blocks)

    def close_volume(self, volume_id: int) -> None:
        if (volume := self._volumes.pop(volume_id, None)) is not None:
            volume.close()

    def put(self, volume_id: int, block: int, number: int) -> None:
        """Write a whole block with a pattern."""
        self.volume(volume_id).write(block * self.block, pattern(number, self.block))

    def holds(self, volume_id: int, block: int, number: int | None) -> bool:
        """Whether a block has a pattern, or zeros for None."""
        found = self.volume(volume_id).read(block * self.block, self.block)
        return found == (bytes(self.block) if number is None else pattern(number, self.block))

    # ---- looking ----------------------------------------------------------------------------

    def status(self) -> PoolStatus:
        """After a commit, so that counters are exact."""
        self.pool.commit()
        return self.pool.status()

    def used(self) -> int:
        return self.status().data_blocks_used

    def mapped(self, volume_id: int) -> int:
        return self.pool.volume_info(VolumeId(volume_id)).mapped_blocks

    def ids(self) -> list[int]:
        return [info.id for info in self.pool.volumes()]

    def metadata_image(self) -> bytes:
        """The committed metadata."""
        if not self.is_open or self.pool.status().mode in {PoolMode.RO, PoolMode.FAIL}:
            return self.read_metadata()  # nobody writes it
        self.pool.commit()
        with self.pool.quiet():
            return self.read_metadata()

    def read_metadata(self) -> bytes:
        """The metadata device as it is."""
        return self.metadata_path.read_bytes()

    def check(self) -> Dump:
        """Let every judge look at the metadata; where each block of each volume is."""
        return judge(self.metadata_image(), self.tolerated)

    def crashed(self) -> Crash:
        """What a power cut now would leave, opened by the user engine; closed with this."""
        folder = self.data_path.parent / f"crash-{len(self._crashes)}"
        folder.mkdir()
        for path in (self.metadata_path, self.data_path):
            shutil.copyfile(path, folder / path.name)
        judge((folder / self.metadata_path.name).read_bytes())
        self._crashes.append(Crash(folder / self.metadata_path.name, folder / self.data_path.name))
        return self._crashes[-1]

    def is_hole(self, data_block: int) -> bool:
        """Whether a data block takes no space of the file."""
        begin = data_block * self.block
        with self.data_path.open("rb") as file:
            try:
                return os.lseek(file.fileno(), begin, os.SEEK_DATA) >= begin + self.block
            except OSError:  # nothing behind it
                return True

    def return_space(self) -> None:
        """Have all freed space given back to the file."""
        self.pool.commit()
        while self.pool.punch_some(1000):
            pass

    def check_and_clear(self) -> None:
        """What its owner does after metadata ran out: check it, and say so if need be."""
        self.check()
        if self.pool.status().needs_check:
            for volume_id in list(self._volumes):
                self.close_volume(volume_id)
            self.pool.clear_needs_check()

    # ---- what stands below ------------------------------------------------------------------

    def grow_data_device(self, blocks: int) -> None:
        os.truncate(self.data_path, blocks * self.block)

    def grow_metadata_device(self, blocks: int) -> None:
        os.truncate(self.metadata_path, blocks * MD)

    @abstractmethod
    def second_on_the_same_files(self) -> None:
        """Open another pool on this one's files."""

    @abstractmethod
    def origin_device(self, path: Path) -> BlockDevice:
        """A file as an external origin, as this engine takes one."""

    @abstractmethod
    def break_metadata(self) -> None:
        """From now on every write of metadata but the superblock's fails."""

    @abstractmethod
    def mend_metadata(self) -> None:
        """No longer."""

    @abstractmethod
    def set_no_space_timeout(self, seconds: int) -> None:
        """How long writes wait for space, where they do."""

    # ---- things at once ---------------------------------------------------------------------

    @contextlib.contextmanager
    def meanwhile(self, work: Callable[[], object]) -> Iterator[Work]:
        """Work in a thread of its own; it is waited for, and its error raised, at the end."""
        worker = Work(work)
        worker.start()
        try:
            yield worker
        except BaseException:
            with contextlib.suppress(Exception):  # a write that waits must not wait for ever
                self.pool.set_when_full(error=True, timeout_ms=0)
            raise
        finally:
            worker.join(120)
        assert not worker.is_alive()
        if worker.error is not None:
            raise worker.error


class Crash:
    """A copy of a pool's files as they were at a moment, open in the user engine."""

    def __init__(self, metadata: Path, data: Path) -> None:
        self._devices = [BlockDevice.open_file(metadata), BlockDevice.open_file(data)]
        self.pool = Pool.open(*self._devices, PoolOptions(commit_interval_ms=0))

    def read(self, volume_id: int, block: int, size: int = BLOCK) -> bytes:
        """One block of one volume."""
        with self.pool.open_volume(VolumeId(volume_id), size=(block + 1) * size) as volume:
            return volume.read(block * size, size)

    def close(self) -> None:
        self.pool.close()
        for device in self._devices:
            device.close()


class Work(threading.Thread):
    """A thread that keeps its error; ``stop`` is for it to look at."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.error: BaseException | None = None
        self.stop = threading.Event()

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self.error = error

    def waits(self, seconds: float = 0.5) -> bool:
        """Whether it is still at it after a while."""
        self.join(seconds)
        return self.is_alive()


def judge(image: bytes, tolerated: frozenset[str] = frozenset()) -> Dump:
    """Our checker, thin_check, and both dumps, which agree; the mappings."""
    report = our_check(image)
    assert report.clean or {fault.severity for fault in report.faults} <= tolerated, report.faults
    thin_check(image)
    found: Dump = {}
    with BlockDevice.open_memory(len(image)) as device:
        device.write(0, image)
        with MetadataReader(device) as reader:
            for details in reader.devices():
                blocks = found.setdefault(details.id, {})
                for run in reader.runs(details.id):
                    for i in range(run.length):
                        blocks[run.begin + i] = run.data_begin + i
                assert len(blocks) == details.mapped_blocks
    if have_thin_tools():
        assert thin_dump(image) == found
    return found


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for what another thread or the kernel does soon."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


class UserDriver(Driver):
    """The user engine, in this process."""

    engine = "user"
    METADATA_FULL = (errors.MetadataSpaceError,)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._breakable = False
        self._faults: FaultDevice | None = None
        self._devices: list[BlockDevice] = []

    def set_up_devices(self, *, breakable: bool) -> None:
        self._breakable = breakable

    def take_down_devices(self) -> None:
        pass

    def open_pool(self, options: PoolOptions) -> PoolBackend:
        with contextlib.ExitStack() as undo:
            metadata = BlockDevice.open_file(self.metadata_path, exclusive=True)
            undo.callback(metadata.close)
            data = BlockDevice.open_file(self.data_path, exclusive=True)
            undo.callback(data.close)
            top = metadata
            if self._breakable:
                top = self._faults = FaultDevice.over(metadata)
                undo.callback(top.close)
            pool = Pool.open(top, data, options)
            undo.pop_all()
        self._devices = [top, metadata, data]
        return pool

    def close(self) -> None:
        super().close()
        for device in dict.fromkeys(self._devices):
            device.close()
        self._devices = []

    def second_on_the_same_files(self) -> None:
        self.open_pool(self.options)

    def grow_data_device(self, blocks: int) -> None:
        self._devices[-1].resize(blocks * self.block)

    def grow_metadata_device(self, blocks: int) -> None:
        self._devices[-2].resize(blocks * MD)

    def origin_device(self, path: Path) -> BlockDevice:
        return BlockDevice.open_file(path, read_only=True)

    def break_metadata(self) -> None:
        assert self._faults is not None
        self._faults.add(FaultKind.ERROR, FaultOp.WRITE, begin=MD, count=FOR_EVER)

    def mend_metadata(self) -> None:
        assert self._faults is not None
        self._faults.clear()

    def set_no_space_timeout(self, seconds: int) -> None:
        self.options = replace(self.options, no_space_timeout_ms=seconds * 1000)


class DmDriver(Driver):
    """The kernel's engine, over loop devices; breakable metadata is on a device of its own."""

    engine = "dm"
    # A write that needs metadata fails like one that needs data, or finds the pool read-only.
    METADATA_FULL = (
        errors.MetadataSpaceError, errors.NoSpaceError, errors.ReadOnlyError,
        errors.NeedsCheckError, errors.StorageIOError,
    )  # fmt: skip
    # The transaction is aborted; the block that its last write had taken may be lost.
    AFTER_METADATA_FULL = frozenset({"note", "leak"})
    TIMEOUT = Path("/sys/module/dm_thin_pool/parameters/no_space_timeout")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.mapper = DeviceMapper()
        self.uuid = str(uuid.uuid4())
        self._below: loop.LoopDevice | None = None
        self._name = f"tpt-{self.uuid[:8]}"
        self._timeout: str | None = None
        self._loops: list[loop.LoopDevice] = []

    def set_up_devices(self, *, breakable: bool) -> None:
        if breakable:
            self._below = loop.attach(str(self.metadata_path), direct_io=False)
            self._loops.append(self._below)
            self.mapper.activate(self._name, self._table(broken=False))

    def _table(self, *, broken: bool) -> list[Target]:
        assert self._below is not None
        sectors = self.metadata_path.stat().st_size // SECTOR
        first, path = MD // SECTOR, self._below.path
        if not broken:
            return [LinearTarget(length=sectors, device=path)]
        return [
            LinearTarget(length=first, device=path),
            FlakeyTarget(
                start=first, length=sectors - first, device=path, offset=first,
                up_seconds=0, down_seconds=100_000, features=("error_writes",),
            ),
        ]  # fmt: skip

    def take_down_devices(self) -> None:
        if self._timeout is not None:
            self.TIMEOUT.write_text(self._timeout)
        if self._below is not None:
            self.mapper.remove(self._name)
        for device in self._loops:
            loop.detach(device)
        self.mapper.close()

    def open_pool(self, options: PoolOptions) -> PoolBackend:
        metadata = str(self.metadata_path)
        if self._below is not None:
            metadata = f"/dev/mapper/{self._name}"
        return DmPool.open(
            metadata, str(self.data_path), options, name="conformance", uuid=self.uuid
        )

    def read_metadata(self) -> bytes:
        if self._below is None or not self.is_open:
            return super().read_metadata()
        with BlockDevice.open_file(self._below.path, read_only=True, direct=True) as device:
            return device.read(0, device.size)

    def second_on_the_same_files(self) -> None:
        DmPool.open(
            str(self.metadata_path), str(self.data_path), name="second", uuid=str(uuid.uuid4())
        )

    def origin_device(self, path: Path) -> BlockDevice:
        device = loop.attach(str(path), direct_io=False)
        self._loops.append(device)
        return BlockDevice.open_file(device.path, read_only=True)

    def break_metadata(self) -> None:
        self.mapper.reload(self._name, self._table(broken=True))

    def mend_metadata(self) -> None:
        self.mapper.reload(self._name, self._table(broken=False))

    def set_no_space_timeout(self, seconds: int) -> None:
        if self._timeout is None:
            self._timeout = self.TIMEOUT.read_text()
        self.TIMEOUT.write_text(str(seconds))


DRIVERS = {"user": UserDriver, "dm": DmDriver}
