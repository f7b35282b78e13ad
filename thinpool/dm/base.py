"""What a pool of the kernel's stands on: its devices, its table, its state, and its end."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Self

from thinpool import errors
from thinpool.check.reader import MetadataReader
from thinpool.dm import names
from thinpool.dm.backing import Backing, open_backing
from thinpool.dm.client import DeviceMapper
from thinpool.dm.events import DeviceEvents
from thinpool.dm.pool import ThinPool
from thinpool.dm.status import ThinPoolMode, ThinPoolStatus
from thinpool.dm.targets import ThinPoolTarget, device_text
from thinpool.dm.thins import SECTOR, ThinDevices, nothing
from thinpool.engine.backend import (
    DiscardMode,
    PoolMode,
    PoolOptions,
    PoolStatus,
    VolumeInfo,
)
from thinpool.model import VolumeId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from thinpool.check.reader import SuperblockFacts

_RESERVE_MAX: Final = 4096
_RESERVE_PART: Final = 10
MODES: Final = {
    ThinPoolMode.RW: PoolMode.RW,
    ThinPoolMode.OUT_OF_DATA_SPACE: PoolMode.OUT_OF_DATA_SPACE,
    ThinPoolMode.RO: PoolMode.RO,
}
WORKS: Final = frozenset({PoolMode.RW, PoolMode.OUT_OF_DATA_SPACE})
_DEFAULT_OPTIONS: Final = PoolOptions()


@dataclass(slots=True)
class _Known:
    """What the metadata says of the volumes."""

    volumes: dict[VolumeId, VolumeInfo]
    time: int
    stale: set[VolumeId]


class PoolBase:
    """An open pool of the kernel's; DmPool is its public face. Thread-safe."""

    def __init__(
        self,
        mapper: DeviceMapper,
        *,
        name: str,
        uuid: str,
        metadata: Backing,
        data: Backing,
        options: PoolOptions,
        step: Callable[[str], None],
    ) -> None:
        """Use open instead."""
        self._mapper = mapper
        self._label = name
        self._uuid = uuid
        self._name = names.pool_name(uuid)
        self._pool = ThinPool(mapper, self._name)
        self._metadata = metadata
        self._data = data
        self._options = options
        self._step = step
        self._lock = threading.RLock()
        self._reading = threading.Lock()
        self._closed = False
        self._events: DeviceEvents | None = None
        self._events_lock = threading.Lock()
        self._raw: set[VolumeId] = set()
        self._known = _Known({}, 0, set())
        self._target: ThinPoolTarget
        self._thins: ThinDevices

    # ---- opening ----------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        metadata: str,
        data: str,
        options: PoolOptions = _DEFAULT_OPTIONS,
        *,
        name: str,
        uuid: str,
        step: Callable[[str], None] = nothing,
    ) -> Self:
        """Open a pool: bring it up, or take over what a predecessor left in the kernel.

        Args:
            metadata: path of the metadata file or device.
            data: likewise.
            options: how. The time that writes wait for space is the kernel's own setting.
            name: the pool's, for messages.
            uuid: the pool's; its devices are found by it.
            step: told each step by name, so that a test can stop there.

        Raises:
            UnsupportedHostError: no device-mapper, no thin-pool target, no loop devices.
            NotPermittedError: this user may not.
            NotFoundError: a file or device is gone.
            BusyError: something else holds one of them.
            CorruptMetadataError: it is no pool, or a damaged one.
        """
        with contextlib.ExitStack() as undo:
            mapper = DeviceMapper()
            undo.callback(mapper.close)
            require_targets(mapper)
            dm_name = names.pool_name(uuid)
            used = _stands_on(mapper, dm_name)
            first = open_backing(metadata, pool=name, used=used)
            undo.callback(first.close)
            if first.number not in used:
                undo.callback(_let_go, first)
            second = open_backing(data, pool=name, used=used)
            undo.callback(second.close)
            if second.number not in used:
                undo.callback(_let_go, second)
            if used and set(used) != {first.number, second.number}:
                raise errors.BusyError(
                    f"pool {name}: the device {dm_name} stands on "
                    f"{' and '.join(map(device_text, used))}, which are not {metadata} and {data}: "
                    f"take it down first with 'dmsetup remove {dm_name}'",
                    holder=dm_name,
                    device=dm_name,
                )
            pool = cls(
                mapper,
                name=name,
                uuid=uuid,
                metadata=first,
                data=second,
                options=options,
                step=step,
            )
            if used:
                pool._take_over()
            else:
                pool._bring_up()
            undo.pop_all()
        return pool

    def _bring_up(self) -> None:
        """Give the kernel a pool that it does not have."""
        # The kernel formats metadata whose first block is zeros: never ours to let happen.
        facts = self._read_known()
        self._target = self._wanted(facts.data_block_size, facts.nr_data_blocks)
        self._require_data(facts.nr_data_blocks)
        self._metadata.block_size()
        self._mapper.create(self._name, uuid=names.pool_uuid(self._uuid))
        try:
            self._step("pool-created")
            self._load(self._target)
            self._step("pool-loaded")
            self._mapper.resume(self._name)
            self._step("pool-resumed")
            self._find_thins()
        except BaseException:
            with contextlib.suppress(errors.ThinpoolError):
                self._mapper.remove(self._name)
            raise

    def _take_over(self) -> None:
        """Adopt a pool that a predecessor gave to the kernel."""
        state = self._mapper.info(self._name)
        if state.inactive:
            self._mapper.clear(self._name)
        target = self._mapper.table(self._name)[0]
        if not isinstance(target, ThinPoolTarget):
            raise errors.BusyError(
                f"the device {self._name} is no thin pool: 'dmsetup table {self._name}' shows "
                "what it is",
                holder=self._name,
                device=self._name,
            )
        self._target = target
        if state.suspended:
            self._mapper.resume(self._name)
        self._find_thins()  # resumes those that are suspended
        with self.quiet():
            self._read_known()
        wanted = self._wanted(target.block_sectors, target.length // target.block_sectors)
        self._settle_target(wanted)

    def _find_thins(self) -> None:
        state = self._mapper.info(self._name)
        self._thins = ThinDevices(
            self._mapper, self._uuid, device_text(state.number), step=self._step
        )

    def _wanted(self, block_sectors: int, blocks: int) -> ThinPoolTarget:
        options = self._options
        return ThinPoolTarget(
            length=block_sectors * blocks,
            metadata=self._metadata.text,
            data=self._data.text,
            block_sectors=block_sectors,
            low_water_blocks=options.low_water_blocks,
            skip_block_zeroing=not options.zero,
            ignore_discard=options.discard_mode is DiscardMode.IGNORE,
            no_discard_passdown=options.discard_mode is DiscardMode.NO_PASSDOWN,
            read_only=options.read_only,
            error_if_no_space=options.error_if_no_space,
        )

    def _require_data(self, blocks: int) -> None:
        have = self._data.block_size()
        block = self._target.block_sectors * SECTOR
        if have // block < blocks:
            raise errors.CorruptMetadataError(
                f"pool {self._label}: {self._data.path} has {have} bytes, the pool's metadata "
                f"counts {blocks} blocks of {block}: the device was cut short, or belongs to "
                "another pool",
                path=self._data.path,
                found=have,
                wanted=blocks * block,
            )

    def _read_known(self) -> SuperblockFacts:
        """Read the metadata that is on disk; nobody may write it meanwhile."""
        with MetadataReader(self._metadata.device) as reader:
            facts = reader.superblock
            self._known = _Known(
                {
                    VolumeId(each.id): VolumeInfo(
                        id=VolumeId(each.id),
                        creation_time=each.creation_time,
                        snapshotted_time=each.snapshotted_time,
                        open=False,
                        mapped_blocks=each.mapped_blocks,
                        transaction_id=each.transaction_id,
                    )
                    for each in reader.devices()
                },
                facts.time,
                set(),
            )
        return facts

    # ---- the pool's table -------------------------------------------------------------------

    def _load(self, target: ThinPoolTarget) -> None:
        try:
            self._mapper.load(self._name, [target])
        except errors.BusyError as cause:
            raise self._with_paths(cause, "take that down first") from cause
        except errors.CorruptMetadataError as cause:
            advice = f"'thinpool check --metadata {self._metadata.path}' says what is wrong"
            raise self._with_paths(cause, advice) from cause

    def _with_paths(self, cause: errors.ThinpoolError, advice: str) -> errors.ThinpoolError:
        """The kernel's refusal, with the names that the pool's owner knows."""
        return type(cause)(
            f"pool {self._label} on {self._metadata.path} and {self._data.path}: "
            f"{cause.message}; {advice}",
            **{**cause.attributes, "path": self._metadata.path},
        )

    def _reload(self, target: ThinPoolTarget) -> None:
        """Put another table in the place of the present one, under the volumes' users."""
        # Without a flush: writes that wait for space would hold it for ever.
        self._mapper.reload(self._name, [target], noflush=True, skip_lockfs=True)
        self._target = target

    def _settle_target(self, wanted: ThinPoolTarget) -> None:
        # Whether discards are taken at all cannot change while the pool is up.
        wanted = replace(wanted, ignore_discard=self._target.ignore_discard)
        if wanted != self._target:
            self._reload(wanted)

    # ---- state ------------------------------------------------------------------------------

    @property
    def metadata(self) -> Backing:
        """What the metadata is on."""
        return self._metadata

    @property
    def data(self) -> Backing:
        """What the data is on."""
        return self._data

    @property
    def device(self) -> str:
        """The pool's dm device."""
        return self._name

    def _kernel_status(self, *, commit: bool) -> ThinPoolStatus | None:
        """None of a pool that failed."""
        if self._closed:
            raise errors.ClosedError(f"pool {self._label} was closed", pool=self._label)
        try:
            return self._pool.status(noflush=not commit)
        except errors.PoolFailedError:
            return None

    def status(self) -> PoolStatus:
        """State and counters."""
        found = self._kernel_status(commit=False)
        if found is not None and found.mode is ThinPoolMode.OUT_OF_DATA_SPACE:
            # What was freed since counts when something commits, and nothing may do so by itself.
            found = self._kernel_status(commit=True)
        if found is None:
            blocks = self._target.length // self._target.block_sectors
            return self._described(mode=PoolMode.FAIL, data_blocks=(0, blocks))
        total = found.total_metadata_blocks
        reserve = min(_RESERVE_MAX, total // _RESERVE_PART)
        used = found.used_metadata_blocks
        return self._described(
            mode=MODES[found.mode],
            needs_check=found.needs_check,
            transaction_id=found.transaction_id,
            data_blocks=(found.used_data_blocks, found.total_data_blocks),
            # The kernel counts its reserve as used, up to the total.
            metadata_blocks=(used if used >= total else max(used - reserve, 0), total),
            reserve=reserve,
            held_root=found.held_root or 0,
        )

    def _described(
        self,
        *,
        mode: PoolMode,
        needs_check: bool = False,
        transaction_id: int = 0,
        data_blocks: tuple[int, int],
        metadata_blocks: tuple[int, int] = (0, 0),
        reserve: int = 0,
        held_root: int = 0,
    ) -> PoolStatus:
        """What the kernel does not count is 0."""
        used, total = data_blocks
        return PoolStatus(
            mode=mode,
            needs_check=needs_check,
            transaction_id=transaction_id,
            time=self._known.time,
            data_block_size=self._target.block_sectors * SECTOR,
            data_blocks_total=total,
            data_blocks_used=used,
            metadata_blocks_total=metadata_blocks[1],
            metadata_blocks_used=metadata_blocks[0],
            metadata_blocks_reserve=reserve,
            held_root=held_root,
            nr_volumes=len(self._known.volumes),
            low_water_reached=total - used <= self._target.low_water_blocks,
            commits=0,
            data_flushes=0,
            metadata_flushes=0,
            provisioned=0,
            broke_sharing=0,
            discarded=0,
            punch_backlog=0,
            dirty=False,
            replayed=0,
        )

    def commit(self) -> None:
        """Make everything acknowledged before durable."""
        self._require_whole(self._kernel_status(commit=True))

    def _require_whole(self, status: ThinPoolStatus | None) -> ThinPoolStatus:
        """A pool that did not roll back.

        Raises:
            PoolFailedError, NeedsCheckError: it did.
        """
        if status is None:
            raise errors.PoolFailedError(
                f"pool {self._label}: the kernel gave up its metadata {self._metadata.path}: "
                "deactivate its volumes, look at the device, and check the pool",
                device=self._name,
                path=self._metadata.path,
            )
        if status.needs_check:
            raise errors.NeedsCheckError(
                f"pool {self._label}: a write to the metadata {self._metadata.path} failed and "
                f"what was not committed is lost: run 'thinpool check {self._label}'",
                device=self._name,
                path=self._metadata.path,
            )
        return status

    def wait_event(self, sequence: int, *, timeout_ms: int) -> int:
        """Wait until the mode or low water changes; the new sequence.

        The kernel says both by the device's event number alone. ClosedError when it is closed
        meanwhile.
        """
        with self._events_lock:
            if self._closed:
                raise errors.ClosedError(f"pool {self._label} was closed", pool=self._label)
            if self._events is None:
                self._events = DeviceEvents()
            try:
                found = self._events.wait(self._name, sequence, timeout=timeout_ms / 1000)
            except (errors.InterruptedError_, errors.NotFoundError) as cause:
                raise errors.ClosedError(
                    f"pool {self._label} was closed", pool=self._label
                ) from cause
        return sequence if found is None else found

    # ---- readers of the metadata ------------------------------------------------------------

    def reserve_metadata_snapshot(self) -> None:
        """Hold the present metadata for readers beside us."""
        with self._reading:
            self._pool.reserve_metadata_snap()

    def release_metadata_snapshot(self) -> None:
        """Let it go."""
        with self._reading:
            self._pool.release_metadata_snap()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Metadata on disk that is committed and does not change: the pool is suspended.

        Writes to its volumes wait. If this process dies meanwhile, its successor resumes it.
        """
        with self._lock, self._mapper.suspended(self._name, noflush=True, skip_lockfs=True):
            self._step("pool-quiet")
            yield

    # ---- closing ----------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """It was closed."""
        return self._closed

    def close(self) -> None:
        """Let go. Without a volume's device, the pool is taken from the kernel, loops with it.

        With one, all of it stays and works on, and the next open takes it over.
        """
        with self._lock:
            if self._closed:
                return
            for volume_id in list(self._raw):
                with contextlib.suppress(errors.ThinpoolError):
                    self._thins.remove(volume_id)
            try:
                if not len(self._thins):
                    self._take_down()
            finally:
                self._abandon()

    def _take_down(self) -> None:
        self._mapper.remove(self._name)
        self._step("pool-removed")
        self._data.let_go()
        self._metadata.let_go()

    def _abandon(self) -> None:
        self._closed = True
        events = self._events
        if events is not None:
            events.cancel()
            with self._events_lock:
                events.close()
        self._data.close()
        self._metadata.close()
        self._mapper.close()

    def abandon(self) -> None:
        """Let go of everything as it is: what the death of the process leaves."""
        with self._lock:
            if not self._closed:
                self._abandon()


def _let_go(backing: Backing) -> None:
    with contextlib.suppress(errors.ThinpoolError):
        backing.let_go()


def require_targets(mapper: DeviceMapper) -> None:
    """See that the kernel has thin pools; it loads the module when asked.

    Raises:
        UnsupportedHostError: it has not.
    """
    if mapper.target_version("thin-pool") is None:
        raise errors.UnsupportedHostError(
            "this kernel's device-mapper has no thin-pool target: load the module dm-thin-pool, "
            "or use the user engine",
            missing="dm-thin-pool",
        )


def _stands_on(mapper: DeviceMapper, name: str) -> tuple[int, ...]:
    """The devices under a pool that the kernel has; one without a table is half made and goes."""
    try:
        state = mapper.info(name)
    except errors.NotFoundError:
        return ()
    if not state.live:
        mapper.remove(name)
        return ()
    return tuple(mapper.deps(name))
