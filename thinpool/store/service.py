"""Everything that can be done with an open pool, once: the one owner of its catalogue and engine.

Its callers translate (HTTP, tests); it decides. Every change of the pool goes through `_apply`,
which writes the intent, changes the pool and records the result; reconcile mends what a crash
leaves between these.

Locks, in this order: a volume's, then the pool's. The pool's is held for one transaction of the
pool and the catalogue, never while a filesystem is frozen for longer than that, never while a
device is made.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from thinpool import errors
from thinpool.engine import SECTOR, Change, ChangeKind, PoolMode
from thinpool.model import (
    Activation,
    Consistency,
    Finding,
    Kind,
    PoolStatus,
    Removal,
    Volume,
    format_time,
    parse_time,
)
from thinpool.names import parse_volume_name
from thinpool.store import care, poolfile, space
from thinpool.store.catalogue import (
    BUILDING,
    DELETING,
    MISSING,
    READY,
    Catalogue,
    Intent,
    Record,
)
from thinpool.store.crashpoint import reached
from thinpool.store.devices import Device, Devices
from thinpool.store.locks import TimedLock, VolumeLocks
from thinpool.store.namescopy import copy_path, read_copy, write_copy
from thinpool.store.reconcile import FINDINGS, reconcile
from thinpool.store.volumes import OpenVolumes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from thinpool import engine
    from thinpool.engine import BlockDevice, PoolBackend
    from thinpool.host.mountinfo import NamespaceMount
    from thinpool.model import VolumeId
    from thinpool.store.devices import Served
    from thinpool.store.poolfile import PoolConfig

logger = logging.getLogger(__name__)

LEASE_GRACE_S: Final = 20.0
"""For clients to find the successor of a server that died."""
BROKEN_LEASE_GRACE_S: Final = 2.0
"""For a client whose connection ended though this server lives: it is hardly coming back."""
SIZE_MAX: Final = 1 << 50
_BIG_DELETE_BLOCKS: Final = 1 << 17
_TICK_S: Final = 0.25
_PUNCH_BLOCKS: Final = 256
_EXTEND_EVERY_S: Final = 1.0
_DEFAULT_TIMEOUT_S: Final = 30.0
_HIDDEN: Final = "."
HELD_KEY: Final = "metadata_snapshot"


class Freezer(Protocol):
    """Freezes filesystems through somebody who thaws them whatever happens to us."""

    def frozen(
        self, mounts: Sequence[NamespaceMount]
    ) -> AbstractContextManager[Callable[[], bool]]:
        """Freeze the filesystem that has these mounts while the context lasts.

        Yields:
            A function that says whether it has been frozen all the time so far.
        """
        ...


def _yes() -> bool:
    return True


def _no() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks.

    Attributes:
        request: the id of the request, the same when it is asked again.
        timeout: seconds to wait for locks.
    """

    request: str | None = None
    timeout: float = _DEFAULT_TIMEOUT_S


ANYONE: Final = Caller()


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


class PoolService:
    """The operations of one open pool. Thread-safe.

    Args:
        root: of the pools.
        config: pool.json.
        pool: the open pool.
        metadata: the device under it, for readers of mappings and for growth.
        data: likewise.
        served: serves volumes as files; None where that cannot be.
        freezer: None where nothing can be frozen.
    """

    def __init__(
        self,
        root: Path,
        config: PoolConfig,
        pool: PoolBackend,
        *,
        metadata: BlockDevice,
        data: BlockDevice,
        served: Served | None = None,
        freezer: Freezer | None = None,
    ) -> None:
        """Open the catalogue; start() does the rest."""
        self._root = root
        self._config = config
        self._pool = pool
        self._metadata = metadata
        self._data = data
        self._served = served
        self._freezer = freezer
        self._directory = poolfile.pool_directory(root, config.name)
        self._catalogue = Catalogue(self._directory / poolfile.CATALOGUE)
        self._volumes = OpenVolumes(pool, served, read_only=config.read_only)
        self._devices = Devices(root, config.name, self._catalogue, served)
        self._lock = TimedLock(f"pool {config.name}")
        self._locks = VolumeLocks()
        self._stop = threading.Event()
        self._copy_due = threading.Event()
        self._background: threading.Thread | None = None
        self._leases: dict[str, float] = {}
        self._readers = 0
        self._lease_lock = threading.Lock()
        self.findings: list[Finding] = []

    # ---- start and end ----------------------------------------------------------------------

    def start(self) -> None:
        """Mend what was left; what was active is served again already."""
        known = read_copy(copy_path(self._config, self._directory))
        names = known[1] if known is not None and self._is_ours(known[0]) else {}
        self.findings = reconcile(self._catalogue, self._pool, known=names)
        for finding in self.findings:
            logger.warning("reconciled %s: %s", finding.subject, finding.message)
        self._drop_stale_metadata_snapshot()
        for name in self._devices.restore():
            logger.warning("%s is not active any more", name)
        now = time.monotonic()
        with self._lease_lock:
            for record in self._catalogue.records(BUILDING):
                self._leases[record.lease or ""] = now + LEASE_GRACE_S
        self._background = threading.Thread(target=self._work, name="store", daemon=True)
        self._background.start()
        self._copy_due.set()

    def _is_ours(self, document: Mapping[str, Any]) -> bool:
        """A copy of names belongs to this pool, or to one that was attached under another uuid."""
        return bool(document.get("uuid") == self._config.uuid or self._catalogue.is_new)

    def close(self) -> None:
        """End the background work and close the catalogue. The pool stays the caller's."""
        self._stop.set()
        self._copy_due.set()
        if self._background is not None:
            self._background.join()
        self._write_copy()
        if not self._catalogue.activations():
            self._devices.forget()
        self._volumes.close()
        self._catalogue.close()

    @property
    def busy(self) -> bool:
        """Something is active or open or being built: the server must not end."""
        with self._lease_lock:
            leased = bool(self._leases)
        return leased or len(self._volumes) > 0 or bool(self._catalogue.activations())

    @property
    def config(self) -> PoolConfig:
        """pool.json as it is now."""
        return self._config

    # ---- the background ---------------------------------------------------------------------

    def _work(self) -> None:
        extend_at = 0.0
        while not self._stop.is_set():
            if self._copy_due.wait(_TICK_S):
                self._copy_due.clear()
                if self._stop.wait(_TICK_S):  # changes come in bursts: one copy for all
                    break
                self._write_copy()
            now = time.monotonic()
            self._safely("returning space to the host", self._punch)
            self._safely("unfinished work of ended clients", self._expire_leases)
            if now >= extend_at:
                extend_at = now + _EXTEND_EVERY_S
                self._safely("growing the pool", self._autoextend)
                self._safely("unfinished removals", self._finish_removals)

    def _safely(self, what: str, step: Callable[[], None]) -> None:
        """The background goes on whatever one step meets; the next round tries again."""
        try:
            step()
        except errors.ThinpoolError as error:
            logger.warning("%s: %s", what, error.message)
        except Exception:
            logger.exception("%s", what)

    def _write_copy(self) -> None:
        try:
            write_copy(copy_path(self._config, self._directory), self._catalogue, self._config)
        except OSError as error:
            logger.warning("the copy of the names could not be written: %s", error)

    def _punch(self) -> None:
        if self._pool.status().punch_backlog:
            self._pool.punch_some(_PUNCH_BLOCKS)

    def _autoextend(self) -> None:
        with self._lock.hold(timeout=_DEFAULT_TIMEOUT_S):
            data, metadata = space.autoextend(
                self._config, self._pool, data=self._data, metadata=self._metadata
            )
        if data is not None or metadata is not None:
            logger.info("grew the pool: data %s, metadata %s", data, metadata)
            self._apply_low_water()

    def _apply_low_water(self) -> None:
        status = self._pool.status()
        total = status.data_blocks_total * status.data_block_size
        blocks = self._config.low_water_bytes(total) // status.data_block_size
        self._pool.set_low_water(blocks)

    def _finish_removals(self) -> None:
        for found in self._catalogue.records(DELETING):
            with self._lock.hold(timeout=_DEFAULT_TIMEOUT_S):
                record = self._catalogue.by_id(found.id)
                if record is None or record.state != DELETING:
                    continue  # somebody else was faster
                if self._volumes.users(record.id) == 0:
                    self._delete_now([record], request=None)

    # ---- leases -----------------------------------------------------------------------------

    def open_lease(self, lease: str) -> None:
        """What is built under this lease lives while it is open."""
        with self._lease_lock:
            self._leases[lease] = float("inf")

    def suspend_lease(self, lease: str) -> None:
        """The connection broke: the client has a while to come back."""
        with self._lease_lock:
            if lease in self._leases:
                self._leases[lease] = time.monotonic() + BROKEN_LEASE_GRACE_S

    def close_lease(self, lease: str) -> None:
        """Remove what is still unfinished under it."""
        with self._lease_lock:
            self._leases.pop(lease, None)
        self._clean_lease(lease)

    def _expire_leases(self) -> None:
        now = time.monotonic()
        with self._lease_lock:
            over = [lease for lease, until in self._leases.items() if until < now]
        for lease in over:
            logger.info("lease %s ended without its client: cleaning up", lease)
            self._clean_lease(lease)
            with self._lease_lock:
                self._leases.pop(lease, None)
        with self._lease_lock:
            held = set(self._leases)
        for record in self._catalogue.records(BUILDING):
            if record.lease not in held:
                self._clean(record)  # it was in use when its lease ended

    def _clean_lease(self, lease: str) -> None:
        for record in self._catalogue.by_lease(lease):
            try:
                self._clean(record)
            except errors.BusyError as error:
                logger.info("%s; it is removed when it is not", error.message)

    def _clean(self, found: Record) -> None:
        """Remove what was being built, unless it was published meanwhile."""
        with self._locks.hold(found.id, operation="clean-up", timeout=_DEFAULT_TIMEOUT_S):
            record = self._catalogue.by_id(found.id)
            if record is None or record.state != BUILDING:
                return
            self._refuse_in_use(record, but_device=True)
            self._deactivate(record)
            with self._lock.hold(timeout=_DEFAULT_TIMEOUT_S):
                record = self._catalogue.by_id(found.id)
                if record is not None and record.state == BUILDING:
                    self._delete_now([record], request=None)

    def _check_lease(self, lease: str | None) -> None:
        if lease is None:
            return
        with self._lease_lock:
            if lease not in self._leases:
                raise errors.NotFoundError(
                    "the lease ended: what was built under it is gone", lease=lease
                )

    # ---- looking ----------------------------------------------------------------------------

    def status(self) -> PoolStatus:
        """The pool's status."""
        records = self._catalogue.records(READY, MISSING)
        return space.describe(
            self._config,
            self._pool.status(),
            volumes=len(records),
            active=len(self._catalogue.activations()),
            server_pid=os.getpid(),
        )

    def volumes(self, *, exclusive: bool = False) -> list[Volume]:
        """Every volume."""
        records = self._catalogue.records(READY, MISSING)
        mapped = {info.id: info.mapped_blocks for info in self._pool.volumes()}
        mounts = self._devices.all_mounts()
        there = [record.id for record in records if record.state != MISSING]
        alone = care.exclusive(self, there) if exclusive else {}
        names = {record.id: record.name for record in self._catalogue.records()}
        return [
            self._describe(
                record,
                mapped=mapped.get(record.id, 0),
                names=names,
                mounts=mounts,
                exclusive=alone.get(record.id, 0) if exclusive else None,
            )
            for record in records
        ]

    def get(self, name: str) -> Volume:
        """One volume.

        Raises:
            NotFoundError: there is none of that name.
        """
        return self._volume(self._find(name))

    def by_label(self, key: str, value: str) -> list[Volume]:
        """Volumes with a label."""
        return [self._volume(record) for record in self._catalogue.by_label(key, value)]

    def _find(self, name: str, *, lease: str | None = None) -> Record:
        """A record by name: a ready one, or one that is built under the caller's lease."""
        record = self._catalogue.find(name)
        if record is not None and (
            record.state in {READY, MISSING}
            or (record.state == BUILDING and lease is not None and record.lease == lease)
        ):
            return record
        raise errors.NotFoundError(
            f"there is no {name} in pool {self._config.name}", pool=self._config.name, name=name
        )

    def _present(self, name: str, *, lease: str | None = None) -> Record:
        """A record whose device is there."""
        record = self._find(name, lease=lease)
        if record.state == MISSING:
            raise errors.NotFoundError(
                f"{name} has lost its device {record.id}: pool {self._config.name} has none of "
                f"that id any more; 'thinpool remove {self._config.name}/{name}' forgets the name",
                pool=self._config.name,
                name=name,
            )
        return record

    def _volume(self, record: Record) -> Volume:
        mapped = 0
        with contextlib.suppress(errors.NotFoundError):
            mapped = self._pool.volume_info(record.id).mapped_blocks
        names: dict[VolumeId, str] = {}
        if record.parent is not None:
            parent = self._catalogue.by_id(record.parent)
            if parent is not None:
                names[parent.id] = parent.name
        return self._describe(record, mapped=mapped, names=names, mounts=None)

    def _describe(
        self,
        record: Record,
        *,
        mapped: int,
        names: Mapping[VolumeId, str],
        mounts: Mapping[int, Sequence[str]] | None,
        exclusive: int | None = None,
    ) -> Volume:
        parent = names.get(record.parent) if record.parent is not None else None
        device = self._devices.find(record)
        where: Sequence[str] = ()
        if device is not None and mounts is not None:
            where = mounts.get(device.device_number, ())
        elif device is not None:
            where = [mount.entry.mount_point for mount in self._devices.mounts(device)]
        return Volume(
            pool=self._config.name,
            name=record.name,
            id=record.id,
            kind=record.kind,
            parent=None if parent is not None and parent.startswith(_HIDDEN) else parent,
            size=record.size,
            mapped=mapped * self._config.block_size,
            exclusive=exclusive,
            read_only=record.read_only,
            created=parse_time(record.created),
            device=device.path if device is not None else None,
            mounts=tuple(sorted(set(where))),
            filesystem=record.filesystem,
            consistency=record.consistency,
            labels=record.labels,
            state=record.state if record.state == MISSING else READY,
        )

    # ---- the one way to change the pool -----------------------------------------------------

    def _apply(
        self,
        operation: str,
        changes: Sequence[Change],
        *,
        insert: Sequence[Record] = (),
        delete: Sequence[VolumeId] = (),
        request: str | None,
    ) -> None:
        """Intent, change, result. Call with the pool's lock held."""
        left = self._catalogue.intent()
        if left is not None:
            reconcile(self._catalogue, self._pool)
        expected = self._pool.status().transaction_id
        intent = Intent(
            operation=operation,
            expected=expected,
            new=expected + 1,
            changes=tuple(changes),
            insert=tuple(insert),
            delete=tuple(delete),
            request=request,
        )
        reached("before-intent")
        self._catalogue.write_intent(intent)
        reached("intent-written")
        try:
            self._pool.apply(changes, expected=expected, new=intent.new)
        except BaseException:
            # A pool that takes no more changes may have written the commit or not: the intent
            # stays, and the next open tells.
            if self._pool.status().mode in {PoolMode.RW, PoolMode.OUT_OF_DATA_SPACE}:
                self._catalogue.drop_intent()
            raise
        reached("applied")
        self._catalogue.complete_intent(intent)
        reached("recorded")
        self._copy_due.set()

    def _done_before(self, caller: Caller) -> list[VolumeId] | None:
        return self._catalogue.request(caller.request) if caller.request is not None else None

    def _repeat(self, done: Sequence[VolumeId]) -> Volume:
        record = self._catalogue.by_id(done[0]) if done else None
        if record is None:
            raise errors.NotFoundError("what this request made was removed meanwhile")
        return self._volume(record)

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
            name=name if name is not None and not hidden else f"{_HIDDEN}{lease}.{volume_id}",
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

    def _refuse_taken(self, name: str | None) -> None:
        if name is None:
            return
        existing = self._catalogue.find(parse_volume_name(name))
        if existing is not None:
            raise errors.AlreadyExistsError(
                f"{self._config.name}/{name} exists already",
                existing=self._volume(existing).to_json(),
            )

    def _check_size(self, size: int) -> None:
        if size <= 0 or size % SECTOR or size > SIZE_MAX:
            raise errors.UsageError(
                f"a volume cannot have {size} bytes: multiples of {SECTOR} up to {SIZE_MAX} can be",
                what="size",
                value=size,
                smallest=SECTOR,
                largest=SIZE_MAX,
            )

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

    # ---- changing ---------------------------------------------------------------------------

    def rename(self, name: str, new: str, *, caller: Caller = ANYONE) -> Volume:
        """Give it another name; an active one's device path follows."""
        parse_volume_name(new)
        record = self._find(name) if self._done_before(caller) is None else self._find(new)
        with self._locks.hold(record.id, operation="rename", timeout=caller.timeout):
            with self._lock.hold(timeout=caller.timeout):
                if (done := self._done_before(caller)) is not None:
                    return self._repeat(done)
                record = self._find(name)
                if new == name:
                    return self._volume(record)
                self._refuse_taken(new)
                with self._catalogue.transaction():
                    record = self._catalogue.update(record, name=new)
                    if caller.request is not None:
                        self._catalogue.put_request(caller.request, "rename", [record.id])
                self._copy_due.set()
            if self._catalogue.activation(record.id) is not None:
                self._devices.renamed(name, record)
        return self._volume(record)

    def label(
        self, name: str, labels: Mapping[str, str | None], *, caller: Caller = ANYONE
    ) -> Volume:
        """Set labels; None drops one."""
        with self._lock.hold(timeout=caller.timeout):
            record = self._find(name)
            merged: dict[str, str | None] = {**record.labels, **labels}
            kept = {key: value for key, value in merged.items() if value is not None}
            record = self._catalogue.update(record, labels=kept)
            self._copy_due.set()
        return self._volume(record)

    def resize(
        self,
        name: str,
        size: int,
        *,
        device_only: bool = False,
        lease: str | None = None,
        caller: Caller = ANYONE,
    ) -> Volume:
        """Set the size of the device. What lies past a smaller size is gone.

        Raises:
            UsageError: smaller, though it carries a filesystem.
            BusyError: smaller, though it is active or open.
            ReadOnlyError: it is sealed.
        """
        self._check_size(size)
        record = self._present(name, lease=lease)
        with self._locks.hold(record.id, operation="resize", timeout=caller.timeout):
            record = self._present(name, lease=lease)
            if record.size == size:
                return self._volume(record)
            if record.read_only or self._config.read_only:
                raise errors.ReadOnlyError(f"{name} is read-only", name=name)
            if size < record.size:
                self._shrink(record, size, device_only=device_only)
            self._resize_open(record, size)
            record = self._catalogue.update(record, size=size)
            self._devices.resized(record)
            self._copy_due.set()
        return self._volume(record)

    def _resize_open(self, record: Record, size: int) -> None:
        if self._catalogue.activation(record.id) is not None and self._served is not None:
            self._served.resize(record.id, size)
            return
        handle = self._volumes.find(record.id)
        if handle is not None:
            handle.resize(size)

    def _shrink(self, record: Record, size: int, *, device_only: bool) -> None:
        if record.filesystem is not None and not device_only:
            raise errors.UsageError(
                f"{record.name} carries {record.filesystem}, which is not made smaller: "
                f"{size} bytes were asked for, it has {record.size}",
                what="size",
                value=size,
                smallest=record.size,
            )
        self._refuse_in_use(record)
        # Unmapped first: growing it again must not show what was there.
        with self._volumes.using(record, writer="resize") as volume:
            volume.zero(size, record.size - size)
            volume.flush()

    def configure(self, values: Mapping[str, Any], *, caller: Caller = ANYONE) -> PoolStatus:
        """Change settings that were checked already: fields of PoolConfig."""
        with self._lock.hold(timeout=caller.timeout):
            config = self._config.changed(**values)
            poolfile.write_config(self._root, config)
            self._config = config
            self._pool.set_when_full(
                error=config.when_full == "error", timeout_ms=config.no_space_timeout_ms
            )
            self._apply_low_water()
        return self.status()

    def extend(
        self,
        *,
        data_size: int | None,
        metadata_size: int | None,
        caller: Caller = ANYONE,
    ) -> PoolStatus:
        """Grow the pool."""
        if self._config.read_only:
            raise errors.ReadOnlyError(
                f"pool {self._config.name} is attached read-only", pool=self._config.name
            )
        with self._lock.hold(timeout=caller.timeout):
            space.extend(
                self._config,
                self._pool,
                data=self._data,
                metadata=self._metadata,
                data_size=data_size,
                metadata_size=metadata_size,
            )
            self._apply_low_water()
        return self.status()

    # ---- removing ---------------------------------------------------------------------------

    def remove(
        self,
        names: Sequence[str],
        *,
        deactivate: bool = False,
        dry_run: bool = False,
        caller: Caller = ANYONE,
    ) -> Removal:
        """Remove volumes, all or none."""
        if self._done_before(caller) is not None:
            return Removal(removed=(), freed=0, dry_run=False)
        records = [self._find(name) for name in dict.fromkeys(names)]
        if dry_run:
            freed = care.freed(self, [record.id for record in records if record.state != MISSING])
            return Removal(
                removed=tuple(self._volume(record) for record in records),
                freed=freed,
                dry_run=True,
            )
        ids = [record.id for record in records]
        with self._locks.hold(*ids, operation="remove", timeout=caller.timeout):
            records = [self._find(name) for name in dict.fromkeys(names)]
            for record in records:
                self._refuse_in_use(record, but_device=deactivate)
            if deactivate:
                for record in records:
                    self._deactivate(record)
            volumes = tuple(self._volume(record) for record in records)
            with self._lock.hold(timeout=caller.timeout):
                before = self._pool.status().data_blocks_used
                self._delete_now(records, request=caller.request)
                after = self._pool.status().data_blocks_used
        freed = max(before - after, 0) * self._config.block_size
        return Removal(removed=volumes, freed=freed, dry_run=False)

    def _refuse_in_use(self, record: Record, *, but_device: bool = False) -> None:
        """Raise BusyError for what is active or open; what is only active passes but_device."""
        device = self._devices.find(record)
        if device is not None and not but_device:
            mounts = self._devices.mounts(device)
            where = mounts[0].describe() if mounts else f"active as {device.path}"
            raise errors.BusyError(
                f"{record.name} is {where}: take it down first",
                holder=where,
                name=record.name,
                device=device.path,
            )
        users = self._volumes.users(record.id)
        if users:
            raise errors.BusyError(
                f"{record.name} is open: {users} raw readers or writers use it",
                holder=self._volumes.writer(record.id),
                name=record.name,
            )

    def _delete_now(self, records: Sequence[Record], *, request: str | None) -> None:
        """Delete what nobody uses. The names go at once or not at all, whatever comes between."""
        with self._lock.hold(timeout=_DEFAULT_TIMEOUT_S):
            gone = [record for record in records if record.state == MISSING]
            there = [record for record in records if record.state != MISSING]
            if there and (self._config.read_only or not self._can_change):
                raise errors.ReadOnlyError(
                    f"pool {self._config.name} is read-only", pool=self._config.name
                )
            mapped = sum(self._pool.volume_info(record.id).mapped_blocks for record in there)
            big = mapped > _BIG_DELETE_BLOCKS
            if gone or big:
                # A big one is emptied in several transactions of the pool. Once that has begun
                # there is no way back, so the decision is recorded before.
                there = self._decide_removal(gone, there, request=request)
                request = None
            if not big and there:
                self._apply(
                    "remove",
                    [Change(kind=ChangeKind.DELETE, id=record.id) for record in there],
                    delete=[record.id for record in there],
                    request=request,
                )
                return
            for record in there:
                self._apply(
                    "remove",
                    [Change(kind=ChangeKind.DELETE, id=record.id)],
                    delete=[record.id],
                    request=None,
                )

    @property
    def _can_change(self) -> bool:
        return self._pool.status().mode in {PoolMode.RW, PoolMode.OUT_OF_DATA_SPACE}

    def _decide_removal(
        self, gone: Sequence[Record], there: Sequence[Record], *, request: str | None
    ) -> list[Record]:
        with self._catalogue.transaction():
            for record in gone:
                self._catalogue.delete(record.id)
            marked = [
                self._catalogue.update(
                    record, name=f"{_HIDDEN}removed.{record.id}", state=DELETING, lease=None
                )
                for record in there
            ]
            if request is not None:
                self._catalogue.put_request(request, "remove", [])
        reached("removal-decided")
        self._copy_due.set()
        return marked

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
            device = self._devices.attach(
                record, read_only=read_only, by_mount=by_mount, owner=owner, mode=mode
            )
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

    def _deactivate(self, record: Record) -> None:
        activation = self._catalogue.activation(record.id)
        if activation is None:
            return
        self._refuse_in_use(record, but_device=True)
        self._devices.detach(record)

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

    # ---- readers of mappings ----------------------------------------------------------------

    @contextlib.contextmanager
    def stable_metadata(self, *, timeout: float = _DEFAULT_TIMEOUT_S) -> Iterator[bool]:
        """Metadata on disk that does not change while it is read.

        Yields:
            Whether it is a metadata snapshot; else the live metadata, because nothing uses the
            pool for as long.
        """
        with self._lock.hold(timeout=timeout):
            if len(self._volumes) == 0 and not self._catalogue.activations():
                self._pool.commit()
                yield False
                return
            self._hold_metadata_snapshot()
        try:
            yield True
        finally:
            self._release_metadata_snapshot()

    def _hold_metadata_snapshot(self) -> None:
        """Shared by all who read at the same time; call with the pool's lock held."""
        if self._readers == 0:
            self._catalogue.put(HELD_KEY, "1")
            self._pool.reserve_metadata_snapshot()
        self._readers += 1

    def _release_metadata_snapshot(self) -> None:
        with self._lock.hold(timeout=_DEFAULT_TIMEOUT_S):
            self._readers -= 1
            if self._readers == 0:
                self._pool.release_metadata_snapshot()
                self._catalogue.put(HELD_KEY, "0")

    def _drop_stale_metadata_snapshot(self) -> None:
        """One that a reader of ours held when its server died; never somebody else's."""
        if self._catalogue.get(HELD_KEY) == "1":
            with contextlib.suppress(errors.NotFoundError):
                self._pool.release_metadata_snapshot()
            self._catalogue.put(HELD_KEY, "0")

    def ids(self, *names: str) -> list[VolumeId]:
        """The ids of volumes that are there."""
        return [self._present(name).id for name in names]

    @property
    def metadata_device(self) -> BlockDevice:
        """Under the pool."""
        return self._metadata

    @property
    def data_blocks(self) -> int:
        """How many the pool has."""
        return self._pool.status().data_blocks_total

    # ---- care -------------------------------------------------------------------------------

    def doctor(self) -> list[Finding]:
        """What was mended at the start, and what is wrong with names now."""
        recorded = json.loads(self._catalogue.get(FINDINGS) or "[]")
        found = [Finding.from_json(each) for each in recorded if each["state"] == "wrong"]
        found = [each for each in found if each.subject in {"transaction id", "intent"}]
        found.extend(each for each in self.findings if each.state == "note")
        pool = self._config.name
        found.extend(
            Finding(
                subject=record.name,
                state="wrong",
                message=f"the pool has no device {record.id} any more",
                remedy=f"thinpool remove {pool}/{record.name}",
            )
            for record in self._catalogue.records(MISSING)
        )
        status = self.status()
        found.extend(
            Finding(subject=pool, state="wrong", message=warning) for warning in status.warnings
        )
        return [
            replace(each, remedy=each.remedy and each.remedy.replace("POOL/", f"{pool}/"))
            for each in found
        ]

    def acknowledge(self) -> None:
        """Forget what was found at earlier starts."""
        self._catalogue.put(FINDINGS, "[]")

    def finish_creation(self) -> PoolStatus:
        """The pool is whole: what was made with it is sealed."""
        return self.configure({"state": poolfile.READY})


def _kind_of_snapshot(origin: Record, *, read_only: bool) -> Kind:
    if read_only:
        return "image"
    return "volume" if origin.kind == "volume" else "container"
