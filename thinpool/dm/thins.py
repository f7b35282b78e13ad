"""The dm devices of one pool's volumes: making, finding again, suspending, resizing, removing.

A device outlives the process that made it. What a successor finds is judged by its table alone:
one without is half made and goes; one that is suspended belonged to a snapshot that was being taken
and is resumed; a table that was loaded and never resumed is dropped.

Not thread-safe: the pool's lock is held by the caller.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.dm import names
from thinpool.dm.status import ThinStatus
from thinpool.dm.targets import ThinTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from thinpool.dm.client import DeviceMapper
    from thinpool.model import VolumeId

SECTOR: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinDevice:
    """A volume's block device.

    Attributes:
        id: of the volume.
        name: of the dm device; ``node``: its path.
        number: device number.
        size: bytes.
        read_only: it takes no writes.
        origin: device number of the external origin; None for none.
    """

    id: VolumeId
    name: str
    node: str
    number: int
    size: int
    read_only: bool
    origin: str | None


def nothing(_: str) -> None:
    """The hook of those who do not test."""


class ThinDevices:
    """The devices of one pool's volumes.

    Args:
        mapper: the client.
        uuid: of the pool.
        pool: its device, as tables take it.
        step: told each step by name, so that a test can stop there.
    """

    def __init__(
        self, mapper: DeviceMapper, uuid: str, pool: str, *, step: Callable[[str], None]
    ) -> None:
        """Find what is there, and mend what is half there."""
        self._mapper = mapper
        self._uuid = uuid
        self._pool = pool
        self._step = step
        self._there: dict[VolumeId, ThinDevice] = {}
        for entry in mapper.devices(uuid_prefix=names.prefix_of(uuid)):
            volume_id = names.volume_of(uuid, entry.uuid or "")
            if volume_id is not None:
                self._adopt(volume_id, entry.name)

    def _adopt(self, volume_id: VolumeId, name: str) -> None:
        state = self._mapper.info(name)
        if not state.live:
            self._mapper.remove(name)
            return
        if state.inactive:
            self._mapper.clear(name)
        if state.suspended:
            self._mapper.resume(name)
        target = self._mapper.table(name)[0]
        if not isinstance(target, ThinTarget):
            raise errors.BusyError(
                f"the device {name} is no thin volume: 'dmsetup table {name}' shows what it is",
                holder=name,
                device=name,
            )
        self._there[volume_id] = ThinDevice(
            id=volume_id,
            name=name,
            node=state.path,
            number=state.number,
            size=target.length * SECTOR,
            read_only=state.read_only,
            origin=target.origin,
        )

    # ---- looking ----------------------------------------------------------------------------

    def get(self, volume_id: VolumeId) -> ThinDevice | None:
        """A volume's device, if it has one."""
        return self._there.get(volume_id)

    def __iter__(self) -> Iterator[ThinDevice]:
        """All of them."""
        return iter(list(self._there.values()))

    def __len__(self) -> int:
        """How many there are."""
        return len(self._there)

    def mapped_sectors(self, volume_id: VolumeId) -> int | None:
        """What a volume maps, as its device says; None where it has no device, or a failed one."""
        device = self._there.get(volume_id)
        if device is None:
            return None
        try:
            found = self._mapper.status(device.name)[0].value
        except errors.NotFoundError:  # a deferred removal came to its end
            del self._there[volume_id]
            return None
        return found.mapped_sectors if isinstance(found, ThinStatus) else None

    # ---- up and down ------------------------------------------------------------------------

    def make(
        self, volume_id: VolumeId, *, size: int, read_only: bool, origin: str | None = None
    ) -> ThinDevice:
        """Make a device. On failure nothing of it is left.

        Raises:
            BusyError: there is one.
            NotFoundError: the pool has no such volume.
        """
        if volume_id in self._there:
            raise errors.BusyError(
                f"volume {volume_id} has a device: {self._there[volume_id].node}",
                holder=self._there[volume_id].node,
                volume_id=volume_id,
            )
        name = names.volume_name(self._uuid, volume_id)
        target = self._target(volume_id, size, origin)
        self._mapper.create(name, uuid=names.volume_uuid(self._uuid, volume_id))
        try:
            self._step("device-created")
            self._mapper.load(name, [target], read_only=read_only)
            self._step("table-loaded")
            state = self._mapper.resume(name)
            self._step("device-resumed")
        except BaseException:
            with contextlib.suppress(errors.ThinpoolError):
                self._mapper.remove(name)
            raise
        made = ThinDevice(
            id=volume_id,
            name=name,
            node=state.path,
            number=state.number,
            size=size,
            read_only=read_only,
            origin=origin,
        )
        self._there[volume_id] = made
        return made

    def _target(self, volume_id: VolumeId, size: int, origin: str | None) -> ThinTarget:
        return ThinTarget(length=size // SECTOR, pool=self._pool, id=volume_id, origin=origin)

    def remove(self, volume_id: VolumeId, *, deferred: bool = False) -> bool:
        """Remove a device; fine when there is none.

        Args:
            volume_id: of the volume.
            deferred: one that is in use goes when its last user lets go of it.

        Returns:
            Whether it is gone by now.

        Raises:
            BusyError: it is in use; it stays.
        """
        device = self._there.get(volume_id)
        if device is None:
            return True
        try:
            gone = self._mapper.remove(device.name, deferred=deferred)
        except errors.NotFoundError:
            gone = True
        if gone:
            del self._there[volume_id]
        return gone

    def keep(self, volume_id: VolumeId) -> None:
        """Let a device stay whose removal was deferred.

        Raises:
            BusyError: it is going, or gone.
        """
        device = self._there[volume_id]
        try:
            if self._mapper.info(device.name).deferred_remove:
                self._mapper.cancel_deferred_remove(device.name)
        except errors.NotFoundError as cause:
            raise errors.BusyError(
                f"the device {device.name} is going: ask again when it is gone",
                holder=device.name,
                device=device.name,
            ) from cause

    def resize(self, volume_id: VolumeId, size: int) -> None:
        """Let a device have another size, under its users."""
        device = self._there[volume_id]
        target = self._target(volume_id, size, device.origin)
        self._mapper.reload(device.name, [target], read_only=device.read_only)
        self._there[volume_id] = replace(device, size=size)

    @contextlib.contextmanager
    def suspended(self, volume_id: VolumeId) -> Iterator[None]:
        """Bring a device's users to rest: what is acknowledged is in the pool, the rest waits.

        A filesystem on it is frozen, so that it is clean. One that somebody else has frozen is at
        rest already. The device is resumed whatever happens; if this process dies, by its
        successor.
        """
        device = self._there.get(volume_id)
        if device is None or device.read_only:
            yield
            return
        try:
            self._mapper.suspend(device.name)
        except errors.BusyError:
            self._mapper.suspend(device.name, skip_lockfs=True)
        try:
            self._step("origin-suspended")
            yield
        finally:
            self._mapper.resume(device.name)
        self._step("origin-resumed")

    @property
    def pool(self) -> str:
        """The pool's device, as tables take it."""
        return self._pool
