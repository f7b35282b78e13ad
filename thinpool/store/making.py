"""Making volumes: empty, as snapshots, hidden under a lease and published."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

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
from thinpool.store.leases import Leases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from thinpool.model import VolumeId
    from thinpool.store.devices import Device

logger = logging.getLogger(__name__)


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
        with self._lock.hold(timeout=caller.timeout):
            if (done := self._done_before(caller)) is not None:
                return self._repeat(done)
            record = self._new_record(
                name,
                kind=kind,
                parent=None,
                size=size,
                read_only=False,
                filesystem=filesystem,
                labels=labels,
                lease=lease,
            )
            space.guard(self._config, self._pool.status())
            change = Change(kind=ChangeKind.CREATE, id=record.id)
            self._apply("create", [change], insert=[record], request=caller.request)
        return self._volume(record)

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
        with contextlib.ExitStack() as stack:
            origin = self._present(source, lease=lease)
            stack.enter_context(
                self._locks.hold(origin.id, operation="snapshot", timeout=caller.timeout)
            )
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
            space.guard(self._config, self._pool.status())
            self._refuse_taken(target)
            stack.enter_context(self._lock.hold(timeout=caller.timeout))
            consistency, still = stack.enter_context(self._quiet(origin))
            record = self._new_record(
                target,
                kind=kind or _kind_of_snapshot(origin, read_only=read_only),
                parent=origin.id,
                size=size or origin.size,
                read_only=read_only,
                filesystem=origin.filesystem,
                labels=labels,
                lease=lease,
                consistency=consistency if still() else "crash",
            )
            change = Change(kind=ChangeKind.SNAPSHOT, id=record.id, origin=origin.id)
            self._apply("snapshot", [change], insert=[record], request=caller.request)
            if record.consistency != "crash" and not still():  # thawed before it was done
                record = self._catalogue.update(record, consistency="crash")
        return self._volume(record)

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

    def _new_record(
        self,
        name: str | None,
        *,
        kind: Kind,
        parent: VolumeId | None,
        size: int,
        read_only: bool,
        filesystem: str | None,
        labels: Mapping[str, str] | None,
        lease: str | None,
        consistency: Consistency | None = None,
    ) -> Record:
        """A row for something new. Call with the pool's lock held."""
        if name is None and lease is None:
            raise errors.UsageError("what has no name needs a lease", what="name")
        self._refuse_taken(name)
        volume_id = self._free_id()
        hidden = lease is not None
        return Record(
            id=volume_id,
            name=name if name is not None and not hidden else f"{HIDDEN}{lease}.{volume_id}",
            kind=kind,
            parent=parent,
            size=size,
            read_only=read_only,
            created=format_time(datetime.now(UTC)),
            filesystem=filesystem,
            consistency=consistency,
            labels=dict(labels or {}),
            state=BUILDING if hidden else READY,
            lease=lease,
        )

    def _free_id(self) -> VolumeId:
        """An id that neither the catalogue nor the pool has."""
        taken: set[int] = set()
        while True:
            candidate = self._catalogue.free_id(taken=frozenset(taken))
            try:
                self._pool.volume_info(candidate)
            except errors.NotFoundError:
                return candidate
            taken.add(candidate)

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
                            labels=dict(item.labels),
                            filesystem=item.filesystem,
                            state=READY,
                            lease=None,
                        )
                    )
                if caller.request is not None:
                    self._catalogue.put_request(
                        caller.request, "publish", [record.id for record in records]
                    )
            self._copy_due.set()
        return [self._volume(record) for record in records]

    def seal(self, name: str, *, lease: str, caller: Caller = ANYONE) -> Volume:
        """Make what is being built read-only before it has a name, so that it can be a parent."""
        with self._lock.hold(timeout=caller.timeout):
            record = self._find(name, lease=lease)
            self._refuse_in_use(record)
            return self._volume(self._catalogue.update(record, read_only=True))


def _kind_of_snapshot(origin: Record, *, read_only: bool) -> Kind:
    if read_only:
        return "image"
    return "volume" if origin.kind == "volume" else "container"
