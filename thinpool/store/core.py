"""What every operation on an open pool stands on: finding, describing, and the one way to change.

Every change of the pool goes through `_apply`, which writes the intent, changes the pool and
records the result; reconcile mends what a crash leaves between these.

Locks, in this order: a volume's, then the pool's. The pool's is held for one transaction of the
pool and the catalogue, never while a device is made.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from thinpool import errors
from thinpool.engine import SECTOR, Change, ChangeKind, PoolMode
from thinpool.model import (
    Finding,
    PoolStatus,
    Volume,
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
from thinpool.store.devices import LoopDevices
from thinpool.store.locks import TimedLock, VolumeLocks
from thinpool.store.reconcile import reconcile, settle_intent
from thinpool.store.volumes import OpenVolumes

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from thinpool import engine
    from thinpool.engine import BlockDevice, PoolBackend
    from thinpool.host.mountinfo import NamespaceMount
    from thinpool.model import VolumeId
    from thinpool.store.devices import Device, DeviceMaker, Served
    from thinpool.store.poolfile import PoolConfig

logger = logging.getLogger(__name__)

SIZE_MAX: Final = 1 << 50
_BIG_DELETE_BLOCKS: Final = 1 << 17
DEFAULT_TIMEOUT_S: Final = 30.0
HIDDEN: Final = "."
HELD_KEY: Final = "metadata_snapshot"
_LISTED: Final = frozenset({READY, MISSING})
LEAVING: Final = "leaving"
"""A setting of activations whose device goes when its last user lets go of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks.

    Attributes:
        request: the id of the request, the same when it is asked again.
        timeout: seconds to wait for locks.
        settles: calls PoolService.settle when it has been answered, so that what is durable by
            then need not wait for its record.
    """

    request: str | None = None
    timeout: float = DEFAULT_TIMEOUT_S
    settles: bool = False


ANYONE: Final = Caller()


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


class PoolCore:
    """One open pool with its catalogue. Thread-safe.

    Args:
        root: of the pools.
        config: pool.json.
        pool: the open pool.
        metadata: the device under it, for readers of mappings and for growth.
        data: likewise.
        served: serves volumes as files; None where that cannot be.
        devices: makes block devices of volumes; None for loop devices over those files.
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
        devices: DeviceMaker | None = None,
        freezer: Freezer | None = None,
    ) -> None:
        """Open the catalogue; start() does the rest."""
        self._root = root
        self._config = config
        self._pool = pool
        self._metadata = metadata
        self._data = data
        self._freezer = freezer
        self._directory = poolfile.pool_directory(root, config.name)
        self._catalogue = Catalogue(self._directory / poolfile.CATALOGUE)
        if devices is None:
            devices = LoopDevices.maker(served)
        self._devices = devices(root, config.name, self._catalogue)
        self._volumes = OpenVolumes(pool, self._devices, read_only=config.read_only)
        self._lock = TimedLock(f"pool {config.name}")
        self._locks = VolumeLocks()
        self._stop = threading.Event()
        self._copy_due = threading.Event()
        self._wake = threading.Event()
        self._background: threading.Thread | None = None
        self._leases: dict[str, float] = {}
        self._readers = 0
        self._said: dict[str, str] = {}
        self._lease_lock = threading.Lock()
        self.findings: list[Finding] = []

    # ---- state ------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Something is active or open or being built: the server must not end."""
        with self._lease_lock:
            leased = bool(self._leases)
        return leased or len(self._volumes) > 0 or bool(self._catalogue.activations())

    @property
    def busy_until_asked(self) -> bool:
        """Volumes are active, and stay so until somebody asks for something."""
        with self._lease_lock:
            leased = bool(self._leases)
        return not leased and len(self._volumes) == 0 and bool(self._catalogue.activations())

    @property
    def config(self) -> PoolConfig:
        """pool.json as it is now."""
        return self._config

    # ---- looking ----------------------------------------------------------------------------

    def status(self) -> PoolStatus:
        """The pool's status."""
        return space.describe(
            self._config,
            self._pool.status(),
            volumes=self._catalogue.count(READY, MISSING),
            active=len(self._catalogue.activations()),
            server_pid=os.getpid(),
        )

    def volumes(self, *, exclusive: bool = False) -> list[Volume]:
        """Every volume."""
        everything = self._catalogue.records()
        names = {record.id: record.name for record in everything}
        records = [record for record in everything if record.state in {READY, MISSING}]
        mapped = self._pool.mapped_blocks()
        devices = self._devices.find_all(records)
        mounts = self._devices.all_mounts() if devices else {}
        there = [record.id for record in records if record.state != MISSING]
        alone = care.exclusive(self, there) if exclusive else {}
        return [
            self._describe(
                record,
                mapped=mapped.get(record.id, 0),
                names=names,
                device=devices.get(record.id),
                mounts=mounts,
                exclusive=alone.get(record.id, 0) if exclusive else None,
            )
            for record in records
        ]

    def documents(self) -> list[dict[str, Any]]:
        """Every volume as ``Volume.to_json`` has it; of a hundred thousand, in good time."""
        rows = self._catalogue.rows()
        names = {row["id"]: row["name"] for row in rows}
        mapped = self._pool.mapped_blocks()
        found = [self._catalogue.by_id(each.id) for each in self._catalogue.activations()]
        active = [record for record in found if record is not None]
        mounts = self._devices.all_mounts() if active else {}
        described = {
            volume.id: volume.to_json() for volume in self._describe_all(active, mounts=mounts)
        }
        return [
            described.get(row["id"]) or self._document(row, names=names, mapped=mapped)
            for row in rows
            if row["state"] in _LISTED
        ]

    def _document(
        self, row: sqlite3.Row, *, names: Mapping[int, str], mapped: Mapping[VolumeId, int]
    ) -> dict[str, Any]:
        """Describe a volume that is not active."""
        parent = names.get(row["parent"])
        return {
            "pool": self._config.name,
            "name": row["name"],
            "id": row["id"],
            "kind": row["kind"],
            "parent": None if parent is not None and parent.startswith(HIDDEN) else parent,
            "size": row["size"],
            "mapped": mapped.get(row["id"], 0) * self._config.block_size,
            "exclusive": None,
            "read_only": bool(row["read_only"]),
            "created": row["created"],
            "device": None,
            "mounts": [],
            "filesystem": row["filesystem"],
            "consistency": row["consistency"],
            "labels": json.loads(row["labels"]),
            "state": row["state"],
        }

    def get(self, name: str) -> Volume:
        """One volume.

        Raises:
            NotFoundError: there is none of that name.
        """
        return self._volume(self._find(name))

    def get_many(self, names: Sequence[str]) -> list[Volume]:
        """Several, in their order; mounts are looked up once for all.

        Raises:
            NotFoundError: there is none of one of the names.
        """
        records = [self._find(name) for name in names]
        return self._describe_all(records, mounts=self._devices.all_mounts())

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

    def _volume(
        self, record: Record, *, mounts: Mapping[int, Sequence[str]] | None = None
    ) -> Volume:
        """Describe one; where it is mounted is looked up in every namespace unless it is given."""
        return self._describe_all([record], mounts=mounts)[0]

    def _describe_all(
        self, records: Sequence[Record], *, mounts: Mapping[int, Sequence[str]] | None = None
    ) -> list[Volume]:
        """Describe some."""
        names: dict[VolumeId, str] = {}
        for parent in {record.parent for record in records if record.parent is not None}:
            found = self._catalogue.by_id(parent)
            if found is not None:
                names[parent] = found.name
        devices = self._devices.find_all(records)
        described = []
        for record in records:
            mapped = 0
            with contextlib.suppress(errors.NotFoundError):
                mapped = self._pool.volume_info(record.id).mapped_blocks
            described.append(
                self._describe(
                    record,
                    mapped=mapped,
                    names=names,
                    device=devices.get(record.id),
                    mounts=mounts,
                )
            )
        return described

    def _describe(
        self,
        record: Record,
        *,
        mapped: int,
        names: Mapping[VolumeId, str],
        device: Device | None,
        mounts: Mapping[int, Sequence[str]] | None,
        exclusive: int | None = None,
    ) -> Volume:
        parent = names.get(record.parent) if record.parent is not None else None
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
            parent=None if parent is not None and parent.startswith(HIDDEN) else parent,
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

    # ---- the one way to change the pool -----------------------------------------------------

    def _apply(
        self,
        operation: str,
        changes: Sequence[Change],
        *,
        insert: Sequence[Record] = (),
        delete: Sequence[VolumeId] = (),
        request: str | None,
        status: engine.PoolStatus | None = None,
        later: bool = False,
    ) -> None:
        """Intent, change, result. Call with the pool's lock held.

        Args:
            operation: its name.
            changes: of the pool.
            insert: rows to write when they are done.
            delete: ids of rows to delete then.
            request: what asked for it.
            status: of the pool, where it was asked for since the lock is held.
            later: the result is recorded with settle, or when it is first needed.
        """
        if self._catalogue.intent() is not None:
            reconcile(self._catalogue, self._pool)
            status = None
        expected = (status or self._pool.status()).transaction_id
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
        flushing = self._catalogue.begin_intent(intent)
        reached("intent-written")
        try:
            try:
                self._pool.apply(changes, expected=expected, new=intent.new, after=flushing)
            finally:
                if flushing is not None:
                    flushing.wait()
        except BaseException:
            # A pool that takes no more changes may have written the commit or not: the intent
            # stays, and the next open tells.
            if self._can_change:
                settle_intent(self._catalogue, self._pool)
            raise
        reached("applied")
        # An intent that could not be made durable leaves it to the result.
        is_safe = flushing is None or flushing.result
        if later and is_safe:
            self._catalogue.leave_result(intent)
            self._copy_due.set()
            return
        self._catalogue.complete_intent(intent, durable=not is_safe)
        reached("recorded")
        self._names_changed()

    def settle(self) -> None:
        """Record what was answered before it was recorded."""
        reached("answered")
        self._catalogue.settle()
        if self._copy_due.is_set():
            self._wake.set()

    def _apply_low_water(self) -> None:
        status = self._pool.status()
        total = status.data_blocks_total * status.data_block_size
        blocks = self._config.event_bytes(total) // status.data_block_size
        self._pool.set_low_water(blocks)

    def _names_changed(self) -> None:
        """Have the background copy the names."""
        self._copy_due.set()
        self._wake.set()

    def _done_before(self, caller: Caller) -> list[VolumeId] | None:
        return self._catalogue.request(caller.request) if caller.request is not None else None

    def _repeat(self, done: Sequence[VolumeId]) -> Volume:
        record = self._catalogue.by_id(done[0]) if done else None
        if record is None:
            raise errors.NotFoundError("what this request made was removed meanwhile")
        return self._volume(record)

    def _delete_now(self, records: Sequence[Record], *, request: str | None) -> None:
        """Delete what nobody uses. The names go at once or not at all, whatever comes between."""
        with self._lock.hold(timeout=DEFAULT_TIMEOUT_S):
            gone = [record for record in records if record.state == MISSING]
            there = [record for record in records if record.state != MISSING]
            if there and (self._config.read_only or not self._can_change):
                raise errors.ReadOnlyError(
                    f"pool {self._config.name} is read-only", pool=self._config.name
                )
            mapped = sum(self._pool.volume_info(record.id).mapped_blocks for record in there)
            big = mapped > _BIG_DELETE_BLOCKS or not self._pool.atomic
            if gone or big:
                # Several transactions of the pool: a big one is emptied in steps, and the kernel
                # commits each deletion by itself. Once that has begun there is no way back, so
                # the decision is recorded before.
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
                    record, name=f"{HIDDEN}removed.{record.id}", state=DELETING, lease=None
                )
                for record in there
            ]
            if request is not None:
                self._catalogue.put_request(request, "remove", [])
        reached("removal-decided")
        self._names_changed()
        return marked

    # ---- taking down ------------------------------------------------------------------------

    def _deactivate(self, record: Record, *, deferred: bool = False) -> bool:
        """Take a device down, or have it go later; whether it is gone."""
        activation = self._catalogue.activation(record.id)
        if activation is None:
            return True
        self._refuse_in_use(record, but_device=True)
        if self._devices.detach(record, deferred=deferred):
            return True
        settings = {**activation.settings, LEAVING: True}
        self._catalogue.put_activations([replace(activation, settings=settings)])
        self._wake.set()
        return False

    # ---- readers of mappings ----------------------------------------------------------------

    @contextlib.contextmanager
    def stable_metadata(self, *, timeout: float = DEFAULT_TIMEOUT_S) -> Iterator[bool]:
        """Metadata on disk that does not change while it is read.

        Yields:
            Whether it is a metadata snapshot; else the live metadata, because nothing uses the
            pool for as long.
        """
        with self._lock.hold(timeout=timeout):
            if self._config.read_only or not self._can_change:
                yield False  # nobody writes it
                return
            if len(self._volumes) == 0 and not self._catalogue.activations():
                with self._pool.quiet():
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
            with contextlib.suppress(errors.HostSpaceError):  # a crash then leaves it to doctor
                self._catalogue.put(HELD_KEY, "1")
            self._pool.reserve_metadata_snapshot()
        self._readers += 1

    def _release_metadata_snapshot(self) -> None:
        with self._lock.hold(timeout=DEFAULT_TIMEOUT_S):
            self._readers -= 1
            if self._readers == 0:
                self._pool.release_metadata_snapshot()
                with contextlib.suppress(errors.HostSpaceError):
                    self._catalogue.put(HELD_KEY, "0")

    def _drop_stale_metadata_snapshot(self) -> None:
        """One that a reader of ours held when its server died; never somebody else's."""
        if self._catalogue.get(HELD_KEY) == "1":
            with contextlib.suppress(errors.NotFoundError):
                self._pool.release_metadata_snapshot()
            self._catalogue.put(HELD_KEY, "0")

    def ids(self, *names: str, lease: str | None = None) -> list[VolumeId]:
        """The ids of volumes that are there, or built under a lease."""
        return [self._present(name, lease=lease).id for name in names]

    @property
    def metadata_device(self) -> BlockDevice:
        """Under the pool."""
        return self._metadata

    @property
    def data_blocks(self) -> int:
        """How many the pool has."""
        return self._pool.status().data_blocks_total
