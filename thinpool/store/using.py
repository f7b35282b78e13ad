"""Using volumes: as block devices, and raw."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from thinpool import errors
from thinpool.engine import PoolMode
from thinpool.model import Activation, Resumed, Volume
from thinpool.store.catalogue import READY, PersistentRecord
from thinpool.store.core import ANYONE, LEAVING, Caller, PoolCore
from thinpool.store.devices import EXTERNAL_ORIGIN, Wanted
from thinpool.store.ext4journal import release_journal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from thinpool import engine
    from thinpool.store.catalogue import Record
    from thinpool.store.devices import Device

_ROOM = 16
"""Free data blocks without which nothing is written that could as well not be."""

logger = logging.getLogger(__name__)


class Using(PoolCore):
    """What makes devices of volumes, and opens them."""

    # ---- devices ----------------------------------------------------------------------------

    def activate(
        self,
        name: str,
        *,
        read_only: bool = False,
        by_mount: bool = False,
        persist: bool = False,
        owner: tuple[int, int] | None = None,
        mode: int | None = None,
        lease: str | None = None,
        caller: Caller = ANYONE,
    ) -> Activation:
        """Make a block device of a volume; of an active one, answer what it is.

        Args:
            name: of the volume.
            read_only: a device that takes no writes.
            by_mount: mount asks, so the last umount takes it down.
            persist: resume() brings it back after a reboot.
            owner: who owns the node.
            mode: of the node.
            lease: that the volume is built under.
            caller: who asks.
        """
        record = self._present(name, lease=lease)
        with self._locks.hold(record.id, operation="activate", timeout=caller.timeout):
            record = self._present(name, lease=lease)
            read_only = self._sealed(record, read_only)
            if self._is_active(record):
                device = self._stands_as(record, read_only=read_only)
                if persist:
                    self._persist(record, read_only=read_only, owner=owner, mode=mode)
                return _activation(self._volume(record), device, already=True)
            self._refuse_in_use(record)
            wanted = self._wanted(record, read_only, by_mount=by_mount, owner=owner, mode=mode)
            device = self._devices.attach(record, wanted)
            if persist:
                self._persist(record, read_only=read_only, owner=owner, mode=mode)
        # What was made just now is mounted nowhere: looking would cost more than making it.
        return _activation(self._volume(record, mounts={}), device, already=False)

    def activate_many(
        self,
        names: Sequence[str],
        *,
        read_only: bool = False,
        by_mount: bool = False,
        owner: tuple[int, int] | None = None,
        mode: int | None = None,
        caller: Caller = ANYONE,
    ) -> list[Activation]:
        """Make block devices of several volumes, all or none; those that are active stay so.

        Returns:
            One for each name, in their order.
        """
        records = {name: self._present(name) for name in names}
        ids = [record.id for record in records.values()]
        with self._locks.hold(*ids, operation="activate", timeout=caller.timeout):
            records = {name: self._present(name) for name in names}
            active = {record.id for record in records.values() if self._is_active(record)}
            idle = [record for record in records.values() if record.id not in active]
            standing = [record for record in records.values() if record.id in active]
            devices = {
                record.id: self._stands_as(record, read_only=self._sealed(record, read_only))
                for record in standing
            }
            for record in idle:
                self._refuse_in_use(record)
            made = self._devices.attach_all(
                [
                    (
                        record,
                        self._wanted(record, read_only, by_mount=by_mount, owner=owner, mode=mode),
                    )
                    for record in idle
                ]
            )
            devices.update(zip((record.id for record in idle), made, strict=True))
        where = self._devices.all_mounts() if standing else {}
        volumes = self._describe_all(list(records.values()), mounts=where)
        found = {
            volume.name: _activation(volume, devices[volume.id], already=volume.id in active)
            for volume in volumes
        }
        return [found[name] for name in names]

    def _sealed(self, record: Record, read_only: bool) -> bool:  # noqa: FBT001 - the only question
        """Whether an activation of it is read-only, asked for or not."""
        return read_only or record.read_only or self._config.read_only

    def _wanted(
        self,
        record: Record,
        read_only: bool,  # noqa: FBT001 - as above
        *,
        by_mount: bool,
        owner: tuple[int, int] | None,
        mode: int | None,
    ) -> Wanted:
        return Wanted(
            read_only=self._sealed(record, read_only),
            by_mount=by_mount,
            owner=owner,
            mode=mode,
            origin=record.labels.get(EXTERNAL_ORIGIN),
        )

    def _stands_as(self, record: Record, *, read_only: bool) -> Device:
        """The device of an active volume; BusyError where it is active the other way."""
        existing = self._catalogue.activation(record.id)
        device = self._devices.find(record)
        if existing is None or device is None:
            raise errors.BusyError(f"{record.name} is being activated", holder=None)
        if existing.read_only != read_only:
            have, want = (
                ("read-only", "writable") if existing.read_only else ("writable", "read-only")
            )
            raise errors.BusyError(
                f"{record.name} is active {have} and was asked for {want}: deactivate it first",
                holder=device.path,
                device=device.path,
            )
        if existing.settings.get(LEAVING):  # it is wanted again
            self._devices.keep(record)
            settings = {**existing.settings, LEAVING: False}
            self._catalogue.put_activations([replace(existing, settings=settings)])
        return device

    def _is_active(self, record: Record) -> bool:
        """Whether it has a device; one that was to go when its users let go may have gone."""
        activation = self._catalogue.activation(record.id)
        if activation is None:
            return False
        if activation.settings.get(LEAVING):
            return not self._devices.detach(record, deferred=True)
        return True

    def _persist(
        self,
        record: Record,
        *,
        read_only: bool,
        owner: tuple[int, int] | None,
        mode: int | None,
    ) -> None:
        settings = {"owner": owner, "mode": mode}
        self._catalogue.put_persistent(
            PersistentRecord(id=record.id, read_only=read_only, settings=settings)
        )

    def resume(self) -> Resumed:
        """Activate what was activated to persist, and is not active, as after a reboot."""
        activations = []
        failures = []
        for wanted in self._catalogue.persistent():
            record = self._catalogue.by_id(wanted.id)
            if record is None or record.state != READY:
                continue
            owner = wanted.settings.get("owner")
            try:
                activations.append(
                    self.activate(
                        record.name,
                        read_only=wanted.read_only,
                        persist=True,
                        owner=(owner[0], owner[1]) if owner is not None else None,
                        mode=wanted.settings.get("mode"),
                    )
                )
            except errors.ThinpoolError as error:
                logger.warning("%s could not be activated: %s", record.name, error.message)
                failures.append(error)
        return Resumed(activations=tuple(activations), failures=tuple(failures))

    def deactivate(
        self,
        name: str,
        *,
        if_by_mount: bool = False,
        deferred: bool = False,
        lease: str | None = None,
        caller: Caller = ANYONE,
    ) -> Volume:
        """Take the device down; fine when there is none. It does not come back after a reboot.

        Args:
            name: of the volume.
            if_by_mount: only when mount had activated it.
            deferred: one that is in use goes when its last user lets go of it.
            lease: that it is built under.
            caller: who asks.
        """
        record = self._find(name, lease=lease)
        with self._locks.hold(record.id, operation="deactivate", timeout=caller.timeout):
            activation = self._catalogue.activation(record.id)
            if not if_by_mount:
                self._catalogue.delete_persistent(record.id)
            if activation is not None and (activation.by_mount or not if_by_mount):
                gone = self._deactivate(record, deferred=deferred)
                if gone and not activation.read_only:
                    self._release_journal(record)
        return self._volume(record)

    def _release_journal(self, record: Record) -> None:
        """Give back the space of the journal of what was unmounted, if it is an ext4's.

        Not where a volume is opened through another device of the kernel's: that would cost more
        than it brings. Not in a pool that is full, where a write would wait for space.
        """
        status = self._pool.status()
        room = status.data_blocks_total - status.data_blocks_used
        if not self._pool.opens_in_process or status.mode is not PoolMode.RW or room < _ROOM:
            return
        try:
            with self._volumes.using(record, writer="deactivate") as volume:
                release_journal(volume, block_size=self._config.block_size)
        except errors.ThinpoolError as error:
            logger.info("the journal of %s stays as it is: %s", record.name, error.message)

    # ---- raw --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def raw(
        self,
        name: str,
        *,
        writable: bool,
        lease: str | None = None,
        caller: Caller = ANYONE,
    ) -> Iterator[engine.VolumeIO]:
        """A volume open for raw reading, or for writing beside nobody else."""
        record = self._present(name, lease=lease)
        writer = "a raw writer" if writable else None
        with self._locks.hold(record.id, operation="open", timeout=caller.timeout):
            record = self._present(name, lease=lease)
            if writable and self._catalogue.activation(record.id) is not None:
                raise errors.BusyError(
                    f"{name} is active: write to its device, or deactivate it first",
                    holder="its device",
                )
            volume = self._volumes.acquire(record, writer=writer)
        try:
            yield volume
        finally:
            self._volumes.release(record.id, writer=writer)


def _activation(volume: Volume, device: Device, *, already: bool) -> Activation:
    return Activation(
        volume=volume,
        device=device.path,
        number=device.number,
        file=device.file,
        already_active=already,
    )
