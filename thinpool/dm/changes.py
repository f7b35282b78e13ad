"""A pool's volumes and their changes: messages, and then the transaction id.

Each message is committed by the kernel by itself, so a change and its transaction id are two
commits; what a crash leaves between them is mended by ``thinpool.store.reconcile``. A message that
succeeded is not yet committed: the kernel does not say whether the commit after it went well. So
the pool's status is read after every change, and a pool that has rolled back is told by its mode.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from thinpool import errors
from thinpool.dm.base import MODES, WORKS, PoolBase
from thinpool.engine.backend import Change, ChangeKind, VolumeInfo
from thinpool.model import VolumeId

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from thinpool.engine.backend import Awaited


class Changes(PoolBase):
    """What lists and changes the set of volumes."""

    # ---- volumes ----------------------------------------------------------------------------

    def volumes(self) -> Iterator[VolumeInfo]:
        """All thin volumes in the order of their ids."""
        with self._lock:
            self._refresh()
            found = [self._info(self._known.volumes[each]) for each in sorted(self._known.volumes)]
        return iter(found)

    def mapped_blocks(self) -> dict[VolumeId, int]:
        """How many blocks each volume maps, by id, in the order of their ids."""
        return {info.id: info.mapped_blocks for info in self.volumes()}

    def has_volume(self, volume_id: VolumeId) -> bool:
        """Whether there is one of an id."""
        with self._lock:
            return volume_id in self._known.volumes

    def volume_info(self, volume_id: VolumeId) -> VolumeInfo:
        """One of them."""
        with self._lock:
            if volume_id in self._known.stale:
                self._refresh()
            return self._info(self._require(volume_id))

    def _require(self, volume_id: VolumeId) -> VolumeInfo:
        found = self._known.volumes.get(volume_id)
        if found is None:
            raise errors.NotFoundError(
                f"pool {self._label} has no volume {volume_id}", volume_id=volume_id
            )
        return found

    def _info(self, known: VolumeInfo) -> VolumeInfo:
        if self._thins.get(known.id) is None:
            return known
        sectors = self._thins.mapped_sectors(known.id)
        if sectors is None:
            self._known.stale.add(known.id)
            return known
        blocks = sectors // self._target.block_sectors
        return replace(known, open=True, mapped_blocks=blocks)

    def _refresh(self) -> None:
        """Read again what volumes map whose devices went without our seeing it."""
        if self._known.stale:
            with self.quiet():
                self._read_known()

    def _note_mapped(self, volume_id: VolumeId) -> None:
        """Remember what a volume maps, which has a device that goes, or is at rest."""
        known = self._known.volumes.get(volume_id)
        if known is None or self._thins.get(volume_id) is None:
            return
        sectors = self._thins.mapped_sectors(volume_id)
        if sectors is None:  # it went without our seeing it, or its pool failed
            self._known.stale.add(volume_id)
            return
        self._known.volumes[volume_id] = replace(
            known, mapped_blocks=sectors // self._target.block_sectors
        )

    # ---- changes ----------------------------------------------------------------------------

    def apply(
        self,
        changes: Sequence[Change],
        *,
        expected: int,
        new: int,
        after: Awaited | None = None,
    ) -> None:
        """Make all changes, then set the transaction id. Durable on return.

        What an error comes after is taken back, deletions aside; what a crash comes after is not.
        Each change is a commit of the kernel's, so all wait for what they come after.

        Raises:
            TransactionIdError: the pool's is not the expected one.
            AlreadyExistsError, NotFoundError, BusyError: of a volume.
            MetadataSpaceError, ReadOnlyError, NeedsCheckError: the pool cannot.
        """
        with self._lock:
            self._require_ready(expected)
            self._refuse_what_cannot_be(changes)
            if after is not None:
                after.wait()
            done: list[Change] = []
            instants: dict[VolumeId, VolumeId] = {}
            try:
                for change in changes:
                    self._make(change, expected, instants)
                    done.append(change)
                    self._step("message-sent")
                self._set_transaction_id(expected, new)
                self._step("transaction-set")
                self._require_committed(new)
            except errors.ThinpoolError:
                self._take_back(done, new)
                raise

    def _require_ready(self, expected: int) -> None:
        status = self._require_whole(self._kernel_status(commit=False))
        if status.transaction_id != expected:
            raise self._wrong_transaction_id(status.transaction_id, expected)
        if MODES[status.mode] not in WORKS:
            raise self._read_only()

    def _wrong_transaction_id(self, found: int, wanted: int) -> errors.TransactionIdError:
        return errors.TransactionIdError(
            f"pool {self._label}: the device {self._name} is at transaction {found}, and {wanted} "
            "was expected: something else changed it, or other metadata was put in its place; "
            f"'thinpool doctor {self._label}' compares its volumes with their names",
            found=found,
            wanted=wanted,
            device=self._name,
        )

    def _read_only(self) -> errors.ReadOnlyError:
        return errors.ReadOnlyError(
            f"pool {self._label} is read-only: the device {self._name} takes no changes",
            pool=self._label,
            device=self._name,
        )

    def _refuse_what_cannot_be(self, changes: Sequence[Change]) -> None:
        """Find out before anything is done what can be."""
        there = set(self._known.volumes)
        for change in changes:
            if change.kind is ChangeKind.DELETE:
                if change.id not in there:
                    self._require(change.id)
                device = self._thins.get(change.id)
                if device is not None:
                    raise errors.BusyError(
                        f"volume {change.id} has a device: {device.node}",
                        holder=device.node,
                        volume_id=change.id,
                    )
                there.discard(change.id)
                continue
            if change.id in there:
                raise errors.AlreadyExistsError(
                    f"pool {self._label} has a volume {change.id} already",
                    existing=change.id,
                    volume_id=change.id,
                )
            if change.kind is ChangeKind.SNAPSHOT and change.origin not in there:
                self._require(VolumeId(-1 if change.origin is None else change.origin))
            there.add(change.id)

    def _make(
        self, change: Change, transaction_id: int, instants: dict[VolumeId, VolumeId]
    ) -> None:
        if change.kind is ChangeKind.CREATE:
            self._pool.create_thin(change.id)
            self._remember(change.id, transaction_id, mapped=0)
        elif change.kind is ChangeKind.DELETE:
            self._pool.delete(change.id)
            self._known.volumes.pop(change.id, None)
            self._known.stale.discard(change.id)
        else:
            origin = VolumeId(-1 if change.origin is None else change.origin)
            # Several snapshots of one origin are of one instant: it is brought to rest for the
            # first, and the others are taken of that, which nobody writes.
            self._snapshot(change.id, instants.get(origin, origin), transaction_id)
            instants.setdefault(origin, change.id)

    def _snapshot(self, volume_id: VolumeId, source: VolumeId, transaction_id: int) -> None:
        with self._thins.suspended(source):
            # Suspended, so that what it maps does not change meanwhile.
            self._note_mapped(source)
            self._pool.create_snap(volume_id, origin=source)
            self._step("snapshot-made")
        self._known.time += 1
        mapped = self._known.volumes[source].mapped_blocks
        if source in self._known.stale:
            self._known.stale.add(volume_id)
        self._remember(volume_id, transaction_id, mapped=mapped)
        self._known.volumes[source] = replace(
            self._known.volumes[source], snapshotted_time=self._known.time
        )

    def _remember(self, volume_id: VolumeId, transaction_id: int, *, mapped: int) -> None:
        self._known.volumes[volume_id] = VolumeInfo(
            id=volume_id,
            creation_time=self._known.time,
            snapshotted_time=self._known.time,
            open=False,
            mapped_blocks=mapped,
            transaction_id=transaction_id,
        )

    def _set_transaction_id(self, expected: int, new: int) -> None:
        try:
            self._pool.set_transaction_id(expected, new)
        except errors.TransactionIdError as cause:
            raise self._wrong_transaction_id(cause.found, expected) from cause

    def _require_committed(self, new: int) -> None:
        status = self._require_whole(self._kernel_status(commit=True))
        if MODES[status.mode] not in WORKS:
            raise self._read_only()
        if status.transaction_id != new:
            raise self._wrong_transaction_id(status.transaction_id, new)

    def _take_back(self, done: Sequence[Change], new: int) -> None:
        """Undo what came before an error, as far as the pool still takes changes."""
        with contextlib.suppress(errors.ThinpoolError):
            status = self._kernel_status(commit=False)
            works = status is not None and MODES[status.mode] in WORKS
            if status is not None and works and status.transaction_id != new:
                for change in reversed(done):
                    if change.kind is not ChangeKind.DELETE:
                        self._pool.delete(change.id)
        with contextlib.suppress(errors.ThinpoolError), self.quiet():
            self._read_known()
