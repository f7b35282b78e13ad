"""The volumes that a server has open for raw I/O, shared by everything in it that uses them.

The engine opens a volume once. Raw readers and one raw writer share that one handle; readers of an
active volume share the one that is served as a file, which has its own writer: the device.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thinpool import errors
from thinpool.engine import BlockDevice
from thinpool.store.devices import EXTERNAL_ORIGIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from thinpool.engine import PoolBackend, VolumeIO
    from thinpool.model import VolumeId
    from thinpool.store.catalogue import Record
    from thinpool.store.devices import Devices


@dataclass(slots=True)
class _Shared:
    volume: VolumeIO
    owned: bool
    users: int = 0
    writer: str | None = None
    origin: BlockDevice | None = None

    def close(self) -> None:
        """Let go of what is its own."""
        if self.owned:
            self.volume.close()
        if self.origin is not None:
            self.origin.close()


class OpenVolumes:
    """The open volumes of one pool. Thread-safe."""

    def __init__(self, pool: PoolBackend, devices: Devices, *, read_only: bool) -> None:
        """None is open."""
        self._pool = pool
        self._devices = devices
        self._read_only = read_only
        self._lock = threading.Lock()
        self._open: dict[VolumeId, _Shared] = {}

    def acquire(self, record: Record, *, writer: str | None) -> VolumeIO:
        """Open it, or share it.

        Args:
            record: of the volume.
            writer: what writes, for messages; None for a reader.

        Raises:
            BusyError: somebody else writes.
            ReadOnlyError: it is sealed.
        """
        sealed = record.read_only or self._read_only
        if writer is not None and sealed:
            raise errors.ReadOnlyError(
                f"{record.name} is read-only: make a snapshot of it to write to", name=record.name
            )
        with self._lock:
            shared = self._open.get(record.id)
            if shared is None:
                shared = self._open[record.id] = self._open_one(record, sealed=sealed)
            elif writer is not None and shared.writer is not None:
                raise errors.BusyError(
                    f"{record.name} is in use by {shared.writer}", holder=shared.writer
                )
            shared.users += 1
            if writer is not None:
                shared.writer = writer
            return shared.volume

    def _open_one(self, record: Record, *, sealed: bool) -> _Shared:
        active = self._devices.open_active(record)
        if active is not None:
            volume, owned = active
            return _Shared(volume=volume, owned=owned)
        external = record.labels.get(EXTERNAL_ORIGIN)
        if external is None:
            volume = self._pool.open_volume(record.id, size=record.size, read_only=sealed)
            return _Shared(volume=volume, owned=True)
        with ExitStack() as undo:
            origin = undo.enter_context(BlockDevice.open_file(external, read_only=True))
            volume = self._pool.open_volume(
                record.id, size=record.size, read_only=sealed, origin=origin
            )
            undo.pop_all()
        return _Shared(volume=volume, owned=True, origin=origin)

    def release(self, volume_id: VolumeId, *, writer: str | None) -> None:
        """Undo acquire."""
        with self._lock:
            shared = self._open[volume_id]
            shared.users -= 1
            if writer is not None:
                shared.writer = None
            if shared.users == 0:
                del self._open[volume_id]
                shared.close()

    @contextmanager
    def using(self, record: Record, *, writer: str | None = None) -> Iterator[VolumeIO]:
        """Acquire for a while."""
        volume = self.acquire(record, writer=writer)
        try:
            yield volume
        finally:
            self.release(record.id, writer=writer)

    def find(self, volume_id: VolumeId) -> VolumeIO | None:
        """The handle, if it is open."""
        with self._lock:
            shared = self._open.get(volume_id)
            return shared.volume if shared else None

    def users(self, volume_id: VolumeId) -> int:
        """How many share it."""
        with self._lock:
            shared = self._open.get(volume_id)
            return shared.users if shared else 0

    def writer(self, volume_id: VolumeId) -> str | None:
        """What writes to it."""
        with self._lock:
            shared = self._open.get(volume_id)
            return shared.writer if shared else None

    def __len__(self) -> int:
        """How many are open."""
        with self._lock:
            return len(self._open)

    def close(self) -> None:
        """Close all of them, users or not: the server ends."""
        with self._lock:
            for shared in self._open.values():
                shared.close()
            self._open.clear()
