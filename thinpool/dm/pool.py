"""A pool's messages as methods, and its status and its volumes' as values.

The kernel acknowledges a message even when the commit behind it failed, so each method looks at
the pool's status afterwards: when it returns, the change is committed, or was superseded.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from thinpool import errors
from thinpool.dm.status import Failure, ThinPoolMode, ThinPoolStatus, ThinStatus
from thinpool.dm.targets import THIN_ID_MAX

if TYPE_CHECKING:
    from thinpool.dm.client import DeviceMapper


class ThinPool:
    """A live thin-pool device, by its name."""

    def __init__(self, dm: DeviceMapper, name: str) -> None:
        """Name it; nothing is asked of the kernel yet."""
        self._dm = dm
        self.name = name

    def status(self, *, noflush: bool = True) -> ThinPoolStatus:
        """The pool's state.

        Args:
            noflush: without it the pool commits first.

        Raises:
            NotFoundError: no such device.
            PoolFailedError: it gave up; remove it, check its metadata, make it anew.
            DeviceMapperError: the device is no pool.
        """
        for target in self._dm.status(self.name, noflush=noflush):
            if isinstance(target.value, ThinPoolStatus):
                return target.value
            if isinstance(target.value, Failure):
                raise errors.PoolFailedError(
                    f"the pool {self.name} answers {target.value.value!r}: it has given up its"
                    " metadata; end it, check the metadata, then activate it again",
                    device=self.name,
                )
        raise errors.DeviceMapperError(
            f"the device {self.name} is no pool", command="TABLE_STATUS", device=self.name, errno=0
        )

    def create_thin(self, thin_id: int) -> None:
        """Make a thin volume in which nothing is mapped. Committed on return.

        Raises:
            UsageError: the id doesn't fit 24 bits.
            AlreadyExistsError: the id is taken.
            MetadataSpaceError, ReadOnlyError, NeedsCheckError, PoolFailedError: the pool can't.
        """
        _check_id(thin_id)
        self._send(f"create_thin {thin_id}", thin_id=thin_id)

    def create_snap(self, thin_id: int, *, origin: int) -> None:
        """Make a thin volume that shares everything with its origin. Committed on return.

        Where the origin is active, the caller suspends it around this: else writes that are
        under way may or may not be in the snapshot.

        Raises:
            UsageError: an id doesn't fit 24 bits.
            AlreadyExistsError: the id is taken.
            NotFoundError: no such origin.
            MetadataSpaceError, ReadOnlyError, NeedsCheckError, PoolFailedError: the pool can't.
        """
        _check_id(thin_id)
        _check_id(origin)
        self._send(f"create_snap {thin_id} {origin}", thin_id=thin_id, missing=origin)

    def delete(self, thin_id: int) -> None:
        """Delete a thin volume. Committed on return; no discards are sent for its blocks.

        Raises:
            UsageError: the id doesn't fit 24 bits.
            NotFoundError: no such volume.
            BusyError: it is active.
            ReadOnlyError, NeedsCheckError, PoolFailedError: the pool can't.
        """
        _check_id(thin_id)
        self._send(f"delete {thin_id}", thin_id=thin_id, missing=thin_id)

    def set_transaction_id(self, old: int, new: int) -> None:
        """Set userland's transaction id, if it is ``old`` now. Committed on return.

        Raises:
            TransactionIdError: it is another; ``found``, ``wanted``.
            ReadOnlyError, NeedsCheckError, PoolFailedError: the pool can't.
        """
        try:
            self._send(f"set_transaction_id {old} {new}")
        except errors.DeviceMapperError as error:
            found = self.status().transaction_id
            if error.attributes.get("errno") != errno.EINVAL or found == old:
                raise
            message = f"the transaction id of the pool {self.name} is {found}, expected was {old}"
            raise errors.TransactionIdError(
                message, found=found, wanted=old, **_carried(error)
            ) from error

    def reserve_metadata_snap(self) -> int:
        """Hold the committed metadata for readers beside the pool.

        Returns:
            The metadata block with its superblock; it stays unchanged until the release.

        Raises:
            BusyError: one is held.
            MetadataSpaceError, ReadOnlyError, NeedsCheckError, PoolFailedError: the pool can't.
        """
        status = self._send("reserve_metadata_snap")
        if status.held_root is None:
            message = f"the pool {self.name} took the message and holds no metadata snapshot"
            raise errors.DeviceMapperError(
                message, command="TARGET_MSG", device=self.name, errno=0, log=()
            )
        return status.held_root

    def release_metadata_snap(self) -> None:
        """Let the metadata snapshot go.

        Raises:
            NotFoundError: none is held.
            ReadOnlyError, NeedsCheckError, PoolFailedError: the pool can't.
        """
        try:
            self._send("release_metadata_snap")
        except errors.DeviceMapperError as error:
            if error.attributes.get("errno") != errno.EINVAL:
                raise
            message = f"the pool {self.name} holds no metadata snapshot"
            raise errors.NotFoundError(message, **_carried(error)) from error

    def thin_status(self, name: str) -> ThinStatus:
        """The state of an active thin volume, by its device's name.

        Raises:
            NotFoundError: no such device.
            PoolFailedError: its pool gave up.
            DeviceMapperError: the device is no thin volume.
        """
        for target in self._dm.status(name):
            if isinstance(target.value, ThinStatus):
                return target.value
            if isinstance(target.value, Failure):
                raise errors.PoolFailedError(
                    f"the volume {name} answers {target.value.value!r}: its pool has given up",
                    device=name,
                )
        raise errors.DeviceMapperError(
            f"the device {name} is no thin volume",
            command="TABLE_STATUS", device=name, errno=0,
        )  # fmt: skip

    def _send(
        self, text: str, *, thin_id: int | None = None, missing: int | None = None
    ) -> ThinPoolStatus:
        """Send a message, and see that the pool still commits."""
        try:
            self._dm.message(self.name, text)
        except errors.ThinpoolError as error:
            raise self._refused(error, text, thin_id, missing) from error
        status = self.status()
        if status.mode is ThinPoolMode.RO:
            raise self._read_only(status, f"the message {text!r} was lost")
        return status

    def _refused(
        self, error: errors.ThinpoolError, text: str, thin_id: int | None, missing: int | None
    ) -> errors.ThinpoolError:
        carried = _carried(error)
        number = error.attributes.get("errno")
        where = f"in the pool {self.name}"
        if number == errno.EOPNOTSUPP:
            return self._read_only(self.status(), f"it refuses the message {text!r}", **carried)
        if number == errno.EEXIST:
            message = f"{where} a thin device {thin_id} exists already"
            return errors.AlreadyExistsError(message, existing=thin_id, **carried)
        if number == errno.ENODATA:
            message = f"{where} there is no thin device {missing}"
            return errors.NotFoundError(message, **carried)
        if number == errno.EBUSY:
            message = (
                f"the pool {self.name} holds a metadata snapshot already: release it first"
                if thin_id is None
                else f"the thin device {thin_id} {where} is active: deactivate it first"
            )
            return errors.BusyError(message, holder=None, **carried)
        if number == errno.ENOSPC:
            message = f"the metadata of the pool {self.name} is full: remove volumes, or grow it"
            return errors.MetadataSpaceError(message, **carried)
        return error

    def _read_only(
        self, status: ThinPoolStatus, what: str, **carried: object
    ) -> errors.ThinpoolError:
        attributes = {"device": self.name, **carried}
        if status.needs_check:
            message = f"the pool {self.name} is read-only and needs a check: {what}"
            return errors.NeedsCheckError(message, **attributes)
        return errors.ReadOnlyError(f"the pool {self.name} is read-only: {what}", **attributes)


def _check_id(thin_id: int) -> None:
    if not 0 <= thin_id <= THIN_ID_MAX:
        raise errors.UsageError(f"thin device id {thin_id}: 0 to {THIN_ID_MAX}")


def _carried(error: errors.ThinpoolError) -> dict[str, object]:
    return {key: error.attributes.get(key) for key in ("command", "device", "errno", "log")}
