"""Using volumes: as block devices, and raw."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from thinpool import errors
from thinpool.model import (
    Activation,
    Volume,
)
from thinpool.store.core import ANYONE, Caller, PoolCore
from thinpool.store.devices import EXTERNAL_ORIGIN, Wanted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from thinpool import engine
    from thinpool.store.catalogue import (
        Record,
    )
    from thinpool.store.devices import Device

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
        owner: tuple[int, int] | None = None,
        mode: int | None = None,
        lease: str | None = None,
        caller: Caller = ANYONE,
    ) -> Activation:
        """Make a block device of a volume; of an active one, answer what it is."""
        record = self._present(name, lease=lease)
        with self._locks.hold(record.id, operation="activate", timeout=caller.timeout):
            record = self._present(name, lease=lease)
            read_only = read_only or record.read_only or self._config.read_only
            existing = self._catalogue.activation(record.id)
            if existing is not None:
                return self._already_active(record, read_only=read_only)
            self._refuse_in_use(record)
            wanted = Wanted(
                read_only=read_only,
                by_mount=by_mount,
                owner=owner,
                mode=mode,
                origin=record.labels.get(EXTERNAL_ORIGIN),
            )
            device = self._devices.attach(record, wanted)
        return self._activation(record, device, already=False)

    def _already_active(self, record: Record, *, read_only: bool) -> Activation:
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
        return self._activation(record, device, already=True)

    def _activation(self, record: Record, device: Device, *, already: bool) -> Activation:
        return Activation(
            volume=self._volume(record),
            device=device.path,
            number=device.number,
            file=device.file,
            already_active=already,
        )

    def deactivate(
        self,
        name: str,
        *,
        if_by_mount: bool = False,
        lease: str | None = None,
        caller: Caller = ANYONE,
    ) -> Volume:
        """Take the device down; fine when there is none.

        Args:
            name: of the volume.
            if_by_mount: only when mount had activated it.
            lease: that it is built under.
            caller: who asks.
        """
        record = self._find(name, lease=lease)
        with self._locks.hold(record.id, operation="deactivate", timeout=caller.timeout):
            activation = self._catalogue.activation(record.id)
            if activation is not None and (activation.by_mount or not if_by_mount):
                self._deactivate(record)
        return self._volume(record)

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
