"""From a volume of the kernel's pool to its block device: a dm device, and a stable link.

Two things record an activation: the catalogue, and the dm device itself, which outlives its server.
The catalogue is written first on the way up and last on the way down, so a device without a record
is half made, or is one that a server had open for raw I/O when it died, and goes; a record without
a device is dropped, as after a reboot.

Thread-safe for different volumes; the caller holds the volume's lock.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, ClassVar

from thinpool import errors
from thinpool.host.failures import failure
from thinpool.store.crashpoint import reached
from thinpool.store.devices import Device, Devices, Wanted

if TYPE_CHECKING:
    from pathlib import Path

    from thinpool.dm.engine import DmPool
    from thinpool.dm.thins import ThinDevice
    from thinpool.engine import VolumeIO
    from thinpool.store.catalogue import ActivationRecord, Catalogue, Record
    from thinpool.store.devices import DeviceMaker

logger = logging.getLogger(__name__)


class DmDevices(Devices):
    """The block devices of one pool of the kernel's.

    Args:
        root: of the pools.
        pool: its name.
        catalogue: where activations are recorded.
        kernel: the open pool.
    """

    reads_origins: ClassVar[bool] = True
    suspends: ClassVar[bool] = True

    def __init__(self, root: Path, pool: str, catalogue: Catalogue, kernel: DmPool) -> None:
        """Nothing is made yet."""
        super().__init__(root, pool, catalogue)
        self._kernel = kernel

    @classmethod
    def maker(cls, kernel: DmPool) -> DeviceMaker:
        """For a pool whose catalogue is not open yet."""

        def make(root: Path, pool: str, catalogue: Catalogue) -> Devices:
            return cls(root, pool, catalogue, kernel)

        return make

    # ---- what is there ----------------------------------------------------------------------

    def find(self, record: Record) -> Device | None:
        """The device of an active volume."""
        if self._catalogue.activation(record.id) is None:
            return None
        thin = self._kernel.thin(record.id)
        return None if thin is None else self._device(record, thin)

    def _device(self, record: Record, thin: ThinDevice) -> Device:
        return Device(
            path=self._link(record, thin.node),
            node=thin.node,
            number=f"{os.major(thin.number)}:{os.minor(thin.number)}",
            file=None,
        )

    def _node(self, activation: ActivationRecord) -> str | None:
        thin = self._kernel.thin(activation.id)
        return None if thin is None else thin.node

    def open_active(self, record: Record) -> tuple[VolumeIO, bool] | None:
        """A reader of the device; closing it leaves the device."""
        thin = self._kernel.thin(record.id)
        if thin is None or self._catalogue.activation(record.id) is None:
            return None
        return self._kernel.reader_of(thin), True

    # ---- up and down ------------------------------------------------------------------------

    def attach(self, record: Record, wanted: Wanted) -> Device:
        """Make the device of a volume that is not open. On failure nothing of it is left."""
        origin = None if wanted.origin is None else _block_device(wanted.origin, record)
        with contextlib.ExitStack() as undo:
            [generation] = self._catalogue.next_generations(1)
            self._catalogue.put_activations([self._activation(record, wanted, generation)])
            undo.callback(self._catalogue.delete_activations, [record.id])
            reached("activation-recorded")
            thin = self._kernel.make_device(
                record.id, size=record.size, read_only=wanted.read_only, origin=origin
            )
            undo.callback(self._kernel.remove_device, record.id)
            self._hand_out(record, thin.node, wanted)
            reached("device-linked")
            undo.pop_all()
        return self._device(record, thin)

    def detach(self, record: Record, *, deferred: bool = False) -> bool:
        """Take the device down, or let it go when its last user has."""
        if self._catalogue.activation(record.id) is None:
            return True
        if not self._kernel.remove_device(record.id, deferred=deferred):
            return False
        reached("device-removed")
        self._run.unlink_device(self._pool, record.name)
        self._catalogue.delete_activations([record.id])
        reached("deactivation-recorded")
        return True

    def keep(self, record: Record) -> None:
        """Let a device stay that was to go when its last user lets go of it."""
        self._kernel.keep_device(record.id)

    # ---- after a crash ----------------------------------------------------------------------

    def sweep(self) -> None:
        """Remove devices that no activation tells of."""
        active = {activation.id for activation in self._catalogue.activations()}
        for thin in self._kernel.thins():
            if thin.id in active:
                continue
            try:
                self._kernel.remove_device(thin.id)
            except errors.BusyError as error:
                logger.warning("left by a server that died: %s", error.message)

    def restore(self) -> list[str]:
        """Drop activations whose device is gone; let devices have their volumes' sizes."""
        lost = []
        whole = set()
        for activation in self._catalogue.activations():
            record = self._catalogue.by_id(activation.id)
            thin = self._kernel.thin(activation.id)
            if record is not None and thin is not None:
                whole.add(activation.id)
                if thin.size != record.size:
                    self._kernel.resize_device(record.id, record.size)
                continue
            if record is not None:
                lost.append(record.name)
            self._catalogue.delete_activations([activation.id])
        self._restore_links(whole)
        return lost

    # ---- changes ----------------------------------------------------------------------------

    def resize(self, record: Record, size: int) -> bool:
        """Let the device of an active volume have another size, under its users."""
        if self._kernel.thin(record.id) is None or self._catalogue.activation(record.id) is None:
            return False
        self._kernel.resize_device(record.id, size)
        return True

    def resized(self, record: Record) -> None:
        """Nothing more: the device had its size before the catalogue."""


def _block_device(path: str, record: Record) -> str:
    """As tables take it.

    Raises:
        NotFoundError: it is gone.
        UsageError: it is no block device.
    """
    from thinpool.dm.refusals import device_number  # noqa: PLC0415 - for this alone
    from thinpool.dm.targets import device_text  # noqa: PLC0415 - likewise

    try:
        os.stat(path)  # noqa: PTH116 - a device's path
    except OSError as cause:
        raise failure(
            cause, f"cannot activate {record.name} over its external origin {path}", path=path
        ) from cause
    number = device_number(path)
    if number is None:
        raise errors.UsageError(
            f"the external origin of {record.name} is a block device, and {path} is none",
            what="external origin",
            value=path,
        )
    return device_text(number)
