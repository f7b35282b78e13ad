"""The kernel's engine: a pool as a thin-pool target, driven through device-mapper.

What the pool's metadata knows of its volumes is kept in memory. Nothing but this object changes
that set while it is open, and what a volume without a device maps cannot change. It is read from
disk while nobody writes there: before the kernel has the pool, or with the pool suspended.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Final, Self

from thinpool import errors
from thinpool.check.reader import MetadataReader
from thinpool.dm.changes import Changes
from thinpool.dm.status import ThinPoolMode
from thinpool.dm.thins import SECTOR, ThinDevice
from thinpool.dm.volume import DmVolume, Mappings
from thinpool.engine import Pool
from thinpool.engine.backend import PoolOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from thinpool.engine import BlockDevice
    from thinpool.model import VolumeId


_EVENT_MS: Final = 3_600_000


class DmPool(Changes):
    """A pool of the kernel's; implements PoolBackend. Thread-safe."""

    atomic: Final = False
    opens_in_process: Final = False
    """A change and the transaction id are two commits."""

    # ---- events -----------------------------------------------------------------------------

    def on_event(self, callback: Callable[[], None]) -> None:
        """Have a function called when the mode or low water changes, until the pool is closed.

        Crossing the low-water mark raises no uevent: the device's event number is waited for.
        """

        def watch() -> None:
            sequence = 0
            with contextlib.suppress(errors.ClosedError):
                while True:
                    found = self.wait_event(sequence, timeout_ms=_EVENT_MS)
                    if found != sequence:
                        sequence = found
                        callback()

        threading.Thread(target=watch, name="dm-events", daemon=True).start()

    # ---- growth and settings ----------------------------------------------------------------

    def resize_data(self, blocks: int) -> None:
        """Grow the data to so many blocks; the device below has them already.

        Raises:
            UsageError: fewer than there are.
            NeedsCheckError: such a pool does not grow.
        """
        with self._lock:
            block = self._target.block_sectors
            if blocks * block < self._target.length:
                raise errors.UsageError(
                    f"a pool cannot shrink: it has {self._target.length // block} blocks, "
                    f"{blocks} were asked for",
                    what="data size",
                    value=blocks * block * SECTOR,
                )
            self._require_whole(self._kernel_status(commit=False))
            self._require_data(blocks)
            self._reload(replace(self._target, length=blocks * block))

    def resize_metadata(self) -> None:
        """Grow the metadata to its device's size."""
        with self._lock:
            self._require_whole(self._kernel_status(commit=False))
            self._metadata.block_size()
            self._reload(self._target)

    def set_when_full(self, *, error: bool, timeout_ms: int) -> None:  # noqa: ARG002 - see below
        """What writes do when data space is out.

        How long they wait is one setting for all pools of the kernel (the module parameter
        ``no_space_timeout`` of dm_thin_pool): it is left alone.
        """
        with self._lock:
            self._settle_target(replace(self._target, error_if_no_space=error))

    def set_low_water(self, blocks: int) -> None:
        """Free data blocks at which an event is raised."""
        with self._lock:
            self._settle_target(replace(self._target, low_water_blocks=blocks))

    def clear_needs_check(self) -> None:
        """Say that it was checked: takes the pool from the kernel for a moment.

        Raises:
            BusyError: a volume has a device.
        """
        with self._lock:
            for device in self._thins:
                raise errors.BusyError(
                    f"pool {self._label}: {device.node} is active: deactivate it first",
                    holder=device.node,
                )
            self._mapper.remove(self._name)
            try:
                options = PoolOptions(commit_interval_ms=0)
                with Pool.open(self._metadata.device, self._data.device, options) as pool:
                    pool.clear_needs_check()
            finally:
                self._bring_up()

    def punch_some(self, max_blocks: int) -> int:  # noqa: ARG002 - the kernel does it
        """Nothing is ever left to do: the kernel passes discards down as they come."""
        return 0

    # ---- mappings ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reader(self) -> Iterator[MetadataReader]:
        """The present metadata, for a moment."""
        with self._lock, self._reading:
            status = self._kernel_status(commit=False)
            if status is None or status.mode is ThinPoolMode.RO:
                with MetadataReader(self._metadata.device) as reader:  # nobody writes it
                    yield reader
                return
            if status.held_root is not None:
                with self.quiet(), MetadataReader(self._metadata.device) as reader:
                    yield reader
                return
            self._pool.reserve_metadata_snap()
            try:
                device = self._metadata.device
                with MetadataReader(device, use_metadata_snapshot=True) as reader:
                    yield reader
            finally:
                self._pool.release_metadata_snap()

    def _mappings(self, volume_id: VolumeId) -> Mappings:
        block = self._target.block_sectors * SECTOR
        begins: list[int] = []
        ends: list[int] = []
        with self._reader() as reader:
            for run in reader.runs(volume_id):
                begin, end = run.begin * block, (run.begin + run.length) * block
                if ends and ends[-1] == begin:
                    ends[-1] = end
                else:
                    begins.append(begin)
                    ends.append(end)
        return Mappings(begins=begins, ends=ends, taken=monotonic())

    # ---- devices ----------------------------------------------------------------------------

    def thin(self, volume_id: VolumeId) -> ThinDevice | None:
        """A volume's device, if it has one."""
        with self._lock:
            return self._thins.get(volume_id)

    def thins(self) -> list[ThinDevice]:
        """All of them, those that are open for raw I/O included."""
        with self._lock:
            return list(self._thins)

    def make_device(
        self, volume_id: VolumeId, *, size: int, read_only: bool, origin: str | None = None
    ) -> ThinDevice:
        """Make a volume's block device. On failure nothing of it is left.

        Args:
            volume_id: of the volume.
            size: bytes.
            read_only: it takes no writes.
            origin: the external origin: a block device, as tables take one.

        Raises:
            BusyError: it has one.
            NotFoundError: the pool has no such volume.
        """
        with self._lock:
            self._require(volume_id)
            return self._thins.make(
                volume_id,
                size=size,
                read_only=read_only or self._options.read_only,
                origin=origin,
            )

    def remove_device(self, volume_id: VolumeId, *, deferred: bool = False) -> bool:
        """Remove a volume's block device; fine when there is none.

        Args:
            volume_id: of the volume.
            deferred: one that is in use goes when its last user lets go of it.

        Returns:
            Whether it is gone.

        Raises:
            BusyError: it is in use; it stays.
        """
        with self._lock:
            self._note_mapped(volume_id)
            return self._thins.remove(volume_id, deferred=deferred)

    def keep_device(self, volume_id: VolumeId) -> None:
        """Let a block device stay whose removal was deferred.

        Raises:
            BusyError: it is going, or gone.
        """
        with self._lock:
            self._thins.keep(volume_id)

    def resize_device(self, volume_id: VolumeId, size: int) -> None:
        """Let a volume's block device have another size, under its users."""
        with self._lock:
            self._thins.resize(volume_id, size)

    def open_volume(
        self,
        volume_id: VolumeId,
        *,
        size: int,
        read_only: bool = False,
        origin: BlockDevice | None = None,
    ) -> DmVolume:
        """Open one for raw I/O, through a block device of its own; twice is BusyError.

        Args:
            volume_id: which.
            size: bytes, a multiple of 512.
            read_only: refuse writes.
            origin: the external origin, opened from a block device: the kernel is given its path.
        """
        below = None if origin is None else origin.name
        with self._lock:
            device = self.make_device(volume_id, size=size, read_only=read_only, origin=below)
            try:
                volume = self._volume(device, closed=lambda: self._close_raw(volume_id))
            except BaseException:
                self.remove_device(volume_id)
                raise
            self._raw.add(volume_id)
        return volume

    def reader_of(self, device: ThinDevice) -> DmVolume:
        """Read a volume through the block device that it has; closing leaves the device."""
        return self._volume(replace(device, read_only=True), closed=lambda: None)

    def _volume(self, device: ThinDevice, *, closed: Callable[[], None]) -> DmVolume:
        return DmVolume(
            device.id,
            device.node,
            size=device.size,
            block_size=self._target.block_sectors * SECTOR,
            read_only=device.read_only,
            unmapped_is_zero=device.origin is None,
            mappings=lambda: self._mappings(device.id),
            resize=lambda size: self.resize_device(device.id, size),
            closed=closed,
        )

    def _close_raw(self, volume_id: VolumeId) -> None:
        with self._lock:
            self._raw.discard(volume_id)
            if not self._closed:
                self.remove_device(volume_id)

    def __enter__(self) -> Self:
        """The pool itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()
