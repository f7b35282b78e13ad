"""Making volumes: empty, as snapshots, hidden under a lease and published."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.engine import Change, ChangeKind
from thinpool.model import (
    Consistency,
    Kind,
    Volume,
    format_time,
)
from thinpool.names import parse_volume_name
from thinpool.store import space
from thinpool.store.catalogue import (
    BUILDING,
    READY,
    Record,
)
from thinpool.store.core import ANYONE, HIDDEN, Caller
from thinpool.store.devices import EXTERNAL_ORIGIN
from thinpool.store.leases import Leases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from thinpool.model import VolumeId
    from thinpool.store.devices import Device

logger = logging.getLogger(__name__)

SNAPSHOTS_MAX: Final = 1000
"""Of one transaction: its intent is one row, and the redo log takes them as one group."""


def _yes() -> bool:
    return True


def _no() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What becomes of something built under a lease.

    Attributes:
        name: its hidden name.
        publish_as: its name from now on.
        kind: likewise.
        read_only: seal it.
        labels: replace those it has.
        filesystem: what is on it.
    """

    name: str
    publish_as: str
    kind: Kind
    read_only: bool
    labels: Mapping[str, str]
    filesystem: str | None


class Making(Leases):
    """What makes volumes."""

    # ---- making -----------------------------------------------------------------------------

    def create(
        self,
        name: str | None,
        *,
        size: int,
        kind: Kind = "volume",
        filesystem: str | None = None,
        labels: Mapping[str, str] | None = None,
        lease: str | None = None,
        caller: Caller = ANYONE,
    ) -> Volume:
        """Make an empty volume; hidden, under a lease, when it has no name yet."""
        self._check_size(size)
        self._check_lease(lease)
        self._check_origin(name, labels or {})
        with self._lock.hold(timeout=caller.timeout):
            if (done := self._done_before(caller)) is not None:
                return self._repeat(done)
            self._refuse_taken(name)
            [record] = self._new_records(
                [name],
                kind=kind,
                parent=None,
                size=size,
                read_only=False,
                filesystem=filesystem,
                labels=labels,
                lease=lease,
            )
            status = self._pool.status()
            space.guard(self._config, status)
            change = Change(kind=ChangeKind.CREATE, id=record.id)
            self._apply(
                "create",
                [change],
                insert=[record],
                request=caller.request,
                status=status,
                later=caller.settles,
            )
        return self._volume(record)

    def _check_origin(self, name: str | None, labels: Mapping[str, str]) -> None:
        origin = labels.get(EXTERNAL_ORIGIN)
        if origin is not None and not self._devices.reads_origins:
            raise errors.UnsupportedHostError(
                f"{name or 'a volume'} over {origin}: devices of the user engine have no external "
                "origin; a pool of the dm engine has them",
                missing="external origins",
                path=origin,
            )

    def snapshot(
        self,
        source: str,
        target: str | None,
        *,
        kind: Kind | None = None,
        read_only: bool = False,
        size: int | None = None,
        labels: Mapping[str, str] | None = None,
        lease: str | None = None,
        caller: Caller = ANYONE,
    ) -> Volume:
        """Make a snapshot of anything, frozen for the instant where it is mounted here.

        Args:
            source: its name.
            target: the new name; None for one that is built under the lease.
            kind: an image when read-only, a container of anything that is not a volume, else
                a volume.
            read_only: seal it.
            size: larger than the source's, or the same.
            labels: kept with it.
            lease: that it is built under; a named one appears when it is published.
            caller: who asks.
        """
        self._check_lease(lease)
        origin = self._present(source, lease=lease)
        with self._locks.hold(origin.id, operation="snapshot", timeout=caller.timeout):
            origin = self._present(source, lease=lease)
            if (done := self._done_before(caller)) is not None:
                return self._repeat(done)
            if size is not None:
                self._check_size(size)
                if size < origin.size:
                    raise errors.UsageError(
                        f"a snapshot cannot be smaller than {source}, which has {origin.size} "
                        f"bytes: {size} were asked for",
                        what="size",
                        value=size,
                        smallest=origin.size,
                    )
            records = self._take(
                origin,
                [target],
                kind=kind or _kind_of_snapshot(origin, read_only=read_only),
                read_only=read_only,
                size=size or origin.size,
                labels=labels,
                lease=lease,
                caller=caller,
            )
        return self._volume(records[0])

    def snapshot_many(
        self,
        source: str,
        targets: Sequence[str],
        *,
        labels: Mapping[str, str] | None = None,
        caller: Caller = ANYONE,
    ) -> list[Volume]:
        """Make several snapshots of one instant in one transaction: all or none.

        Args:
            source: its name.
            targets: the new names, SNAPSHOTS_MAX at most.
            labels: kept with each.
            caller: who asks.

        Returns:
            The snapshots, in the order of their names' asking; durable.

        Raises:
            UsageError: none, too many, or the same name twice.
            AlreadyExistsError: one of the names is taken.
        """
        if not 0 < len(targets) <= SNAPSHOTS_MAX or len(set(targets)) != len(targets):
            raise errors.UsageError(
                f"{len(targets)} names were given, {len(set(targets))} different ones: "
                f"1 to {SNAPSHOTS_MAX}, each once, can be snapshotted to at a time",
                what="targets",
                value=len(targets),
            )
        origin = self._present(source)
        with self._locks.hold(origin.id, operation="snapshot", timeout=caller.timeout):
            origin = self._present(source)
            if (done := self._done_before(caller)) is not None:
                return [self._repeat([each]) for each in done]
            records = self._take(
                origin,
                targets,
                kind=_kind_of_snapshot(origin, read_only=False),
                read_only=False,
                size=origin.size,
                labels=labels,
                lease=None,
                caller=caller,
            )
        return self._describe_all(records)

    def _take(
        self,
        origin: Record,
        targets: Sequence[str | None],
        *,
        kind: Kind,
        read_only: bool,
        size: int,
        labels: Mapping[str, str] | None,
        lease: str | None,
        caller: Caller,
    ) -> list[Record]:
        """Snapshot an origin whose lock is held, in one transaction."""
        with self._lock.hold(timeout=caller.timeout):
            status = self._pool.status()
            space.guard(self._config, status)
            for target in targets:
                self._refuse_taken(target)
            with self._quiet(origin) as (consistency, still):
                how = consistency if still() else "crash"
                records = self._new_records(
                    targets,
                    kind=kind,
                    parent=origin.id,
                    size=size,
                    read_only=read_only,
                    filesystem=origin.filesystem,
                    labels=_over_the_same(origin, labels or {}),
                    lease=lease,
                    consistency=how,
                )
                changes = [
                    Change(kind=ChangeKind.SNAPSHOT, id=record.id, origin=origin.id)
                    for record in records
                ]
                self._apply(
                    "snapshot",
                    changes,
                    insert=records,
                    request=caller.request,
                    status=status,
                    later=caller.settles,
                )
                if how != "crash" and not still():  # thawed before it was done
                    with self._catalogue.transaction():
                        records = [
                            self._catalogue.update(record, consistency="crash")
                            for record in records
                        ]
        return records

    @contextlib.contextmanager
    def _quiet(self, origin: Record) -> Iterator[tuple[Consistency, Callable[[], bool]]]:
        """Bring a volume's users to rest while it is snapshotted, as far as that can be.

        Yields:
            How the snapshot is taken, and whether that still holds.
        """
        device = self._devices.find(origin)
        activation = self._catalogue.activation(origin.id)
        if device is None or activation is None:
            # A raw writer's acknowledged writes are drained by the pool itself.
            writes = self._volumes.writer(origin.id) is not None
            yield ("crash" if writes else "quiescent"), _yes
            return
        if activation.read_only:
            yield "quiescent", _yes
            return
        if self._devices.suspends:
            yield self._suspended(origin, device), _yes
            return
        mounts = self._devices.mounts(device)
        writable = [mount for mount in mounts if not mount.entry.read_only]
        if not writable or self._freezer is None or self._holds_pool(device):
            yield "crash", _yes
            return
        with contextlib.ExitStack() as stack:
            try:
                still = stack.enter_context(self._freezer.frozen(writable))
            except (OSError, errors.ThinpoolError) as error:
                logger.warning("%s could not be frozen: %s", origin.name, error)
                still = _no
            yield ("frozen" if still() else "crash"), still

    def _suspended(self, origin: Record, device: Device) -> Consistency:
        """How a snapshot is taken of an origin that the engine suspends meanwhile.

        Raises:
            BusyError: the pool's own files lie on it, so they would wait for each other for ever.
        """
        if self._holds_pool(device):
            raise errors.BusyError(
                f"{origin.name} holds the files of pool {self._config.name} itself, so it cannot "
                "be brought to rest for a snapshot: move them to another filesystem",
                holder=device.path,
                name=origin.name,
            )
        mounts = self._devices.mounts(device)
        return "frozen" if any(not mount.entry.read_only for mount in mounts) else "crash"

    def _holds_pool(self, device: Device) -> bool:
        """Whether the pool's own files lie on a filesystem on this device: never freeze that."""
        number = device.device_number
        for path in (self._directory, Path(self._config.data), Path(self._config.metadata)):
            with contextlib.suppress(OSError):
                if path.stat().st_dev == number:
                    return True
        return False

    def _new_records(
        self,
        names: Sequence[str | None],
        *,
        kind: Kind,
        parent: VolumeId | None,
        size: int,
        read_only: bool,
        filesystem: str | None,
        labels: Mapping[str, str] | None,
        lease: str | None,
        consistency: Consistency | None = None,
    ) -> list[Record]:
        """Rows for something new under names that are free. Call with the pool's lock held."""
        if lease is None and None in names:
            raise errors.UsageError("what has no name needs a lease", what="name")
        hidden = lease is not None
        created = format_time(datetime.now(UTC))
        return [
            Record(
                id=volume_id,
                name=name if name is not None and not hidden else f"{HIDDEN}{lease}.{volume_id}",
                kind=kind,
                parent=parent,
                size=size,
                read_only=read_only,
                created=created,
                filesystem=filesystem,
                consistency=consistency,
                labels=dict(labels or {}),
                state=BUILDING if hidden else READY,
                lease=lease,
            )
            for name, volume_id in zip(names, self._free_ids(len(names)), strict=True)
        ]

    def _free_ids(self, count: int) -> list[VolumeId]:
        """Ids that neither the catalogue nor the pool has."""
        found: list[VolumeId] = []
        for candidate in self._catalogue.free_ids():
            if not self._pool.has_volume(candidate):
                found.append(candidate)
                if len(found) == count:
                    break
        return found

    def publish(
        self, items: Sequence[Publication], *, lease: str, caller: Caller = ANYONE
    ) -> list[Volume]:
        """Give names to what was built under a lease, all or none, and let it outlive the lease.

        Raises:
            AlreadyExistsError: a name was taken meanwhile.
            BusyError: one of them is still active and is to be sealed.
        """
        for item in items:
            parse_volume_name(item.publish_as)
        with self._lock.hold(timeout=caller.timeout):
            if (done := self._done_before(caller)) is not None:
                return [self._repeat([each]) for each in done]
            records = []
            with self._catalogue.transaction():
                for item in items:
                    record = self._find(item.name, lease=lease)
                    self._refuse_taken(item.publish_as)
                    if item.read_only:
                        self._refuse_in_use(record)
                    records.append(
                        self._catalogue.update(
                            record,
                            name=item.publish_as,
                            kind=item.kind,
                            read_only=item.read_only,
                            labels=_over_the_same(record, item.labels),
                            filesystem=item.filesystem,
                            state=READY,
                            lease=None,
                        )
                    )
                if caller.request is not None:
                    self._catalogue.put_request(
                        caller.request, "publish", [record.id for record in records]
                    )
            self._names_changed()
        return [self._volume(record) for record in records]

    def seal(self, name: str, *, lease: str, caller: Caller = ANYONE) -> Volume:
        """Make what is being built read-only before it has a name, so that it can be a parent."""
        with self._lock.hold(timeout=caller.timeout):
            record = self._find(name, lease=lease)
            self._refuse_in_use(record)
            return self._volume(self._catalogue.update(record, read_only=True))


def _over_the_same(origin: Record, labels: Mapping[str, str]) -> dict[str, str]:
    """A snapshot's labels: without its origin's external one it would read zeros there."""
    external = origin.labels.get(EXTERNAL_ORIGIN)
    kept = {key: value for key, value in labels.items() if key != EXTERNAL_ORIGIN}
    return kept if external is None else {**kept, EXTERNAL_ORIGIN: external}


def _kind_of_snapshot(origin: Record, *, read_only: bool) -> Kind:
    if read_only:
        return "image"
    return "volume" if origin.kind == "volume" else "container"
