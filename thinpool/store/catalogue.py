"""The catalogue of one pool, in SQLite: names, kinds, lineage, sizes, seals; and its intents.

One process holds it at a time: the pool's server. Everything durable about a volume but its
mappings stands here, sizes included, which the pool's metadata does not know.

Invariants:
- At most one intent is open. It is made durable before the pool is changed, in the log of intents
  (`thinpool.store.intentlog`) or, where it is too long for that, in a table here; so the pool's
  transaction id says which side of the change a crash fell on.
- Each intent in the log has a number, and what is settled is recorded with its result: up to which
  number. A power cut may take results, the last ones first. Then several intents stand, each but
  the last settled before the next was written.
- ``name`` is unique; what is being built or removed has a name that nobody can type.
- Every write is one transaction, durable on return (WAL with synchronous=FULL), but for those of
  activations, which a power cut ends in any case, and of results, whose intents are durable.
- Writing needs no new space of the host's disk, which the pool's data may have filled: the log is
  made long enough at open and begun anew before its end, and the file holds free pages. So what
  fills the disk can always be removed.

What is asked for again and again is kept in memory, a bounded part of it: nobody else writes here.

Thread-safe: one connection behind one lock.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from thinpool import errors
from thinpool.engine import VOLUME_ID_MAX, Change, ChangeKind
from thinpool.model import Consistency, Kind, VolumeId
from thinpool.store import intentlog
from thinpool.store.beside import Beside, Flushing
from thinpool.store.crashpoint import reached

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

logger = logging.getLogger(__name__)

VERSION: Final = 3
REQUEST_AGE_S: Final = 600.0
_CHECKPOINT_PAGES: Final = 64
"""The log is begun anew after so many, 256 KiB."""
_RESERVE_BYTES: Final = 512 << 10

_IDS_AT_ONCE: Final = 64
_KNOWN_MAX: Final = 256
"""Rows of volumes that are kept in memory."""
_REQUESTS_MAX: Final = 4096
"""Names of requests in the table that are kept in memory; of more, none are."""
_NAMES_MAX: Final = 8192
"""Names of volumes that are kept in memory; of half as many in the table or more, none are."""
_LOG: Final = "intent_log"
_SETTLED: Final = "settled"
_TRANSACTION: Final = "transaction_id"
_NEXT: Final = "next_id"

READY: Final = "ready"
BUILDING: Final = "building"
DELETING: Final = "deleting"
MISSING: Final = "missing"

_TABLES: Final = """
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;
CREATE TABLE volumes (
    id INTEGER PRIMARY KEY CHECK (id BETWEEN 0 AND 16777215),
    name TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL CHECK (kind IN ('base', 'image', 'container', 'volume')),
    parent INTEGER REFERENCES volumes (id) ON DELETE SET NULL,
    size INTEGER NOT NULL CHECK (size > 0 AND size % 512 = 0),
    read_only INTEGER NOT NULL,
    created TEXT NOT NULL,
    filesystem TEXT,
    consistency TEXT,
    labels TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('ready', 'building', 'deleting', 'missing')),
    lease TEXT
) STRICT;
CREATE INDEX volumes_by_parent ON volumes (parent);
CREATE INDEX volumes_by_state ON volumes (state) WHERE state <> 'ready';
CREATE TABLE activations (
    id INTEGER PRIMARY KEY REFERENCES volumes (id) ON DELETE RESTRICT,
    read_only INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    loop INTEGER,
    sequence INTEGER,
    by_mount INTEGER NOT NULL,
    settings TEXT NOT NULL
) STRICT;
CREATE TABLE intents (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    operation TEXT NOT NULL,
    expected INTEGER NOT NULL,
    new INTEGER NOT NULL,
    changes TEXT NOT NULL,
    result TEXT NOT NULL
) STRICT;
CREATE TABLE requests (
    request TEXT PRIMARY KEY,
    operation TEXT NOT NULL,
    ids TEXT NOT NULL,
    made REAL NOT NULL
) STRICT;
"""

_CHANGED: Final = """
CREATE TEMP TABLE changed (id INTEGER NOT NULL);
CREATE TEMP TRIGGER volume_inserted AFTER INSERT ON main.volumes
BEGIN INSERT INTO changed VALUES (new.id); END;
CREATE TEMP TRIGGER volume_updated AFTER UPDATE ON main.volumes
BEGIN INSERT INTO changed VALUES (new.id); END;
CREATE TEMP TRIGGER volume_deleted AFTER DELETE ON main.volumes
BEGIN INSERT INTO changed VALUES (old.id); END;
"""
"""Which rows changed since that was asked last. In memory, and undone with what is undone."""


_PERSISTENT_SINCE: Final = 2
_SINCE_2: Final = """
CREATE TABLE persistent (
    id INTEGER PRIMARY KEY REFERENCES volumes (id) ON DELETE CASCADE,
    read_only INTEGER NOT NULL,
    settings TEXT NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A row of volumes."""

    id: VolumeId
    name: str
    kind: Kind
    parent: VolumeId | None
    size: int
    read_only: bool
    created: str
    filesystem: str | None = None
    consistency: Consistency | None = None
    labels: dict[str, str] = field(default_factory=dict)
    state: str = READY
    lease: str | None = None

    def row(self) -> dict[str, Any]:
        """As SQLite takes it, and as an intent keeps it."""
        return {
            "id": self.id,
            "name": self.name,
            "kind": self.kind,
            "parent": self.parent,
            "size": self.size,
            "read_only": int(self.read_only),
            "created": self.created,
            "filesystem": self.filesystem,
            "consistency": self.consistency,
            "labels": json.dumps(self.labels, sort_keys=True) if self.labels else "{}",
            "state": self.state,
            "lease": self.lease,
        }


def _record(row: sqlite3.Row | dict[str, Any]) -> Record:
    return Record(
        id=VolumeId(row["id"]),
        name=row["name"],
        kind=row["kind"],
        parent=VolumeId(row["parent"]) if row["parent"] is not None else None,
        size=row["size"],
        read_only=bool(row["read_only"]),
        created=row["created"],
        filesystem=row["filesystem"],
        consistency=row["consistency"],
        labels=json.loads(row["labels"]),
        state=row["state"],
        lease=row["lease"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRecord:
    """A row of activations: what a successor of the server has to bring back.

    Attributes:
        id: of the volume.
        read_only: so activated.
        generation: differs between activations of one volume.
        loop: number of its loop device.
        sequence: of that disk.
        by_mount: mount activated it, so the last umount deactivates it.
        settings: owner and mode of the device node.
    """

    id: VolumeId
    read_only: bool
    generation: int
    loop: int | None
    sequence: int | None
    by_mount: bool
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistentRecord:
    """A row of persistent: a volume that is to be active again after a reboot.

    Attributes:
        id: of the volume.
        read_only: so activated.
        settings: owner and mode of the device node.
    """

    id: VolumeId
    read_only: bool
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """A change of the pool that was decided.

    Attributes:
        operation: its name.
        expected: the pool's transaction id before.
        new: the id after.
        changes: what is applied to the pool.
        insert: rows to write when it was.
        delete: ids of rows to delete when it was.
        request: the client's id of the request, for one that asks again.
    """

    operation: str
    expected: int
    new: int
    changes: tuple[Change, ...]
    insert: tuple[Record, ...] = ()
    delete: tuple[VolumeId, ...] = ()
    request: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Standing:
    """An intent without a result.

    Attributes:
        intent: it.
        number: in the log; None of one that is not there.
        made: seconds since the epoch.
        in_table: it stands there too, or there alone.
    """

    intent: Intent
    number: int | None
    made: float
    in_table: bool = False


@dataclass(frozen=True, slots=True)
class _Done:
    """A request that was done, and stands nowhere yet but in the log of intents."""

    operation: str
    ids: tuple[int, ...]
    made: float


class Catalogue:
    """One pool's catalogue. Thread-safe."""

    def __init__(self, path: Path | str) -> None:
        """Open it, or make it.

        Raises:
            CorruptMetadataError: the file is no catalogue, or is damaged.
            UnsupportedFormatError: a later program made it.
        """
        self.path = str(path)
        self._lock = threading.RLock()
        self._depth = 0
        self._is_flushing = True
        self._known: dict[int, Record] = {}
        self._ids: dict[str, int] = {}
        self._meta: dict[str, str | None] = {}
        self._active: dict[int, ActivationRecord] | None = None
        self._done: dict[str, _Done] = {}
        self._gap: tuple[int, int] | None = None
        """Ids of which no row is, as far as that was looked for."""
        self._beside = Beside("intents")
        self._due: Intent | None = None
        try:
            self._db = sqlite3.connect(
                self.path, isolation_level=None, check_same_thread=False, timeout=10.0
            )
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                self.is_new = True
                self._db.executescript(
                    f"BEGIN IMMEDIATE;{_TABLES}{_SINCE_2}PRAGMA user_version = {VERSION};COMMIT;"
                )
            elif version > VERSION:
                raise errors.UnsupportedFormatError(
                    f"{self.path} was made by a later version of thinpool: "
                    f"its schema is {version}, this program knows {VERSION}",
                    path=self.path,
                    found=version,
                    wanted=VERSION,
                )
            else:
                self.is_new = False
                if version < VERSION:
                    since = _SINCE_2 if version < _PERSISTENT_SINCE else ""
                    self._db.executescript(
                        f"BEGIN IMMEDIATE;{since}PRAGMA user_version = {VERSION};COMMIT;"
                    )
            self._db.execute("CREATE INDEX IF NOT EXISTS requests_by_age ON requests (made)")
            self._db.execute("PRAGMA temp_store = MEMORY")
            self._db.executescript(_CHANGED)
            self._reserve()
        except sqlite3.Error as cause:
            raise errors.CorruptMetadataError(
                f"the catalogue {self.path} cannot be used: {cause}; move it away, and "
                "thinpool rebuilds it from the pool and the copy of the names beside it",
                path=self.path,
            ) from cause
        rows = self._rows("SELECT request FROM requests LIMIT ?", (_REQUESTS_MAX + 1,))
        self._requests: set[str] | None = None
        if len(rows) <= _REQUESTS_MAX:
            self._requests = {row["request"] for row in rows}
        self._maybe_taken = self._all_names()
        """Each name that a row has, and others that rows had; None where they are too many."""
        self._log = self._open_log()
        self._standing = self._find_standing()
        self._number = int(self.get(_SETTLED) or 0)
        if self._log is not None:
            self._number = max([self._number, *(each.sequence for each in self._log.entries)])
            self._log.forget()

    def _all_names(self) -> set[str] | None:
        rows = self._rows("SELECT name FROM volumes LIMIT ?", (_NAMES_MAX // 2,))
        return {row["name"] for row in rows} if len(rows) < _NAMES_MAX // 2 else None

    def _note_name(self, name: str) -> None:
        """Know that a row is about to have it."""
        if self._maybe_taken is not None:
            self._maybe_taken.add(name)
            if len(self._maybe_taken) > _NAMES_MAX:
                self._maybe_taken = self._all_names()
                if self._maybe_taken is not None:
                    self._maybe_taken.add(name)

    def _open_log(self) -> intentlog.IntentLog | None:
        """The log of intents; None where a full disk has no space for a new one."""
        token = self.get(_LOG)
        if token is None:
            token = os.urandom(intentlog.TOKEN_BYTES).hex()
            self.put(_LOG, token)
        path = Path(self.path + intentlog.SUFFIX)
        try:
            return intentlog.IntentLog(path, bytes.fromhex(token))
        except errors.HostSpaceError:
            return None

    def _find_standing(self) -> list[_Standing]:
        """What has no result, in the order in which it was decided."""
        standing = [
            _Standing(intent=_intent_of(row), number=None, made=time.time(), in_table=True)
            for row in self._rows("SELECT * FROM intents")
        ]
        settled = int(self.get(_SETTLED) or 0)
        old = time.time() - REQUEST_AGE_S
        for entry in self._log.entries if self._log is not None else ():
            if entry.sequence > settled:
                intent = _intent_of(json.loads(entry.payload))
                standing.append(_Standing(intent=intent, number=entry.sequence, made=entry.made))
            elif entry.made > old:
                self._remember(_intent_of(json.loads(entry.payload)), entry.made)
        return standing

    def _remember(self, intent: Intent, made: float) -> None:
        """Know a request that was done as long as the log keeps its intent."""
        if intent.request is not None:
            ids = tuple(record.id for record in intent.insert)
            self._done[intent.request] = _Done(intent.operation, ids, made)

    def _reserve(self) -> None:
        """Let the log and the file have space to write in; best effort on a disk that is full."""
        try:
            self._db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
            # Replaced where a server died between these two.
            self._db.execute(
                "INSERT OR REPLACE INTO meta VALUES ('reserve', ?)", ("x" * _RESERVE_BYTES,)
            )
            self._db.execute("DELETE FROM meta WHERE key = 'reserve'")
            self._db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_FULL"):
                raise

    # ---- transactions -----------------------------------------------------------------------

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction, durable at its end; rolled back by an exception. Nests.

        Args:
            durable: survives a power cut. Without, it survives this process, and a power cut
                takes it only with everything that came after it: for what describes devices and
                processes, which a power cut ends. Within another transaction, that one decides.
        """
        with self._lock:
            self._record_due()
            if self._depth:
                self._depth += 1
                try:
                    yield self._db
                finally:
                    self._depth -= 1
                return
            try:
                self._flush_commits(durable)
                self._db.execute("BEGIN IMMEDIATE")
                self._depth = 1
                try:
                    yield self._db
                except BaseException:
                    self._roll_back()
                    raise
                self._commit()
            except sqlite3.Error as cause:
                raise self._failure(cause) from cause
            finally:
                self._depth = 0

    def _flush_commits(self, wanted: bool) -> None:  # noqa: FBT001 - as a switch has it
        """Have the log flushed at commits from now on, or, in WAL mode, by the next that is."""
        if wanted != self._is_flushing:
            self._db.execute(f"PRAGMA synchronous = {'FULL' if wanted else 'NORMAL'}")
            self._is_flushing = wanted

    def _commit(self) -> None:
        try:
            self._db.execute("COMMIT")
        except sqlite3.Error:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        self._forget_all()
        if self._db.in_transaction:  # SQLite has rolled back some failures by itself
            self._db.execute("ROLLBACK")

    def _failure(self, cause: sqlite3.Error) -> errors.ThinpoolError:
        """The typed error of a failure of SQLite."""
        name = getattr(cause, "sqlite_errorname", "")
        text = f"the catalogue {self.path} cannot be written: {cause}"
        if name.startswith("SQLITE_FULL"):
            return errors.HostSpaceError(
                f"{text}: free some of the filesystem that holds it", path=self.path
            )
        if name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN")):
            return errors.StorageIOError(text, path=self.path)
        if name.startswith(("SQLITE_READONLY", "SQLITE_PERM")):
            return errors.NotPermittedError(text, operation="write", path=self.path)
        if name.startswith("SQLITE_BUSY"):
            return errors.BusyError(text, holder=None, path=self.path)
        return errors.CorruptMetadataError(text, path=self.path)

    def _rows(self, sql: str, values: Sequence[object] = ()) -> list[sqlite3.Row]:
        try:
            with self._lock:
                with contextlib.suppress(errors.ThinpoolError):  # whoever writes hears of it
                    self._record_due()
                return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as cause:
            raise self._failure(cause) from cause

    def _forget_all(self) -> None:
        """What is known of the rows may not be so."""
        self._known.clear()
        self._ids.clear()
        self._meta.clear()
        self._active = None
        self._gap = None

    def _know(self, record: Record) -> Record:
        with self._lock:
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
                self._ids.clear()
            self._known[record.id] = record
            self._ids[record.name] = record.id
        return record

    def _forget(self, volume_id: int) -> None:
        record = self._known.pop(volume_id, None)
        if record is not None:
            self._ids.pop(record.name, None)

    # ---- meta -------------------------------------------------------------------------------

    def get(self, key: str) -> str | None:
        """A value of the meta table."""
        with self._lock:
            if key not in self._meta:
                rows = self._rows("SELECT value FROM meta WHERE key = ?", (key,))
                self._meta[key] = rows[0]["value"] if rows else None
            return self._meta[key]

    def put(self, key: str, value: str) -> None:
        """Set one."""
        self._put_all({key: value}, durable=True)

    def _put_all(self, values: Mapping[str, str], *, durable: bool) -> None:
        places = ", ".join("(?, ?)" for _ in values)
        given = [each for pair in values.items() for each in pair]
        with self.transaction(durable=durable) as db:
            db.execute(
                f"INSERT INTO meta VALUES {places} "  # noqa: S608 - places alone
                "ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                given,
            )
            self._meta.update(values)

    # ---- volumes ----------------------------------------------------------------------------

    def find(self, name: str) -> Record | None:
        """By name, whatever its state."""
        with self._lock:
            if (volume_id := self._ids.get(name)) is not None:
                return self._known[volume_id]
            if (
                self._due is None
                and self._maybe_taken is not None
                and name not in self._maybe_taken
            ):
                return None
            rows = self._rows("SELECT * FROM volumes WHERE name = ?", (name,))
            return self._know(_record(rows[0])) if rows else None

    def by_id(self, volume_id: int) -> Record | None:
        """By id."""
        with self._lock:
            if (known := self._known.get(volume_id)) is not None:
                return known
            rows = self._rows("SELECT * FROM volumes WHERE id = ?", (volume_id,))
            return self._know(_record(rows[0])) if rows else None

    def records(self, *states: str) -> list[Record]:
        """All of some states (of all states when none is given), in the order of their ids."""
        where, values = _of_states(states)
        rows = self._rows(f"SELECT * FROM volumes WHERE {where} ORDER BY id", values)  # noqa: S608 - text of our own
        return [_record(row) for row in rows]

    def rows(self) -> list[sqlite3.Row]:
        """All as they stand in the table, labels as JSON, in the order of their ids."""
        return self._rows("SELECT * FROM volumes ORDER BY id")

    def states(self) -> dict[VolumeId, str]:
        """The states of all, by their ids and in their order."""
        rows = self._rows("SELECT id, state FROM volumes ORDER BY id")
        return {VolumeId(row["id"]): row["state"] for row in rows}

    def count(self, *states: str) -> int:
        """How many are in some states."""
        if READY in states:  # the many: those of the few other states are counted instead
            others = {BUILDING, DELETING, MISSING}.difference(states)
            everything = self._rows("SELECT count(*) AS n FROM volumes")[0]["n"]
            return int(everything) - (self.count(*sorted(others)) if others else 0)
        where, values = _of_states(states)
        rows = self._rows(f"SELECT count(*) AS n FROM volumes WHERE {where}", values)  # noqa: S608 - text of our own
        return int(rows[0]["n"])

    def take_changed(self) -> list[VolumeId]:
        """The ids of the rows that were added, changed or dropped since this was asked last."""
        with self.transaction(durable=False) as db:
            found = [VolumeId(row["id"]) for row in db.execute("SELECT DISTINCT id FROM changed")]
            db.execute("DELETE FROM changed")
        return found

    def by_label(self, key: str, value: str) -> list[Record]:
        """Ready ones with a label."""
        rows = self._rows(
            "SELECT volumes.* FROM volumes, json_each(volumes.labels) AS label "
            "WHERE label.key = ? AND label.value = ? AND state = 'ready' ORDER BY id",
            (key, value),
        )
        return [_record(row) for row in rows]

    def by_lease(self, lease: str) -> list[Record]:
        """What is being built under a lease, youngest first."""
        rows = self._rows("SELECT * FROM volumes WHERE lease = ? ORDER BY id DESC", (lease,))
        return [_record(row) for row in rows]

    def insert(self, record: Record) -> None:
        """Add a row."""
        row = record.row()
        columns = ", ".join(row)
        places = ", ".join(f":{name}" for name in row)
        with self.transaction() as db:
            self._note_name(record.name)
            if self._gap is not None and self._gap[0] <= record.id <= self._gap[1]:
                self._gap = (record.id + 1, self._gap[1])
            db.execute(f"INSERT INTO volumes ({columns}) VALUES ({places})", row)  # noqa: S608 - names of our own

    def update(self, record: Record, **values: Any) -> Record:  # noqa: ANN401 - each column's own type
        """Change a row; the new record."""
        changed = replace(record, **values)
        row = changed.row()
        assignments = ", ".join(f"{name} = :{name}" for name in row if name != "id")
        with self.transaction() as db:
            self._note_name(changed.name)
            self._forget(record.id)
            db.execute(f"UPDATE volumes SET {assignments} WHERE id = :id", row)  # noqa: S608 - as above
        return changed

    def delete(self, volume_id: int) -> None:
        """Drop a row; its children have no parent then."""
        with self.transaction() as db:
            for known in [each for each in self._known.values() if each.parent == volume_id]:
                self._forget(known.id)  # it has no parent from now on
            self._forget(volume_id)
            db.execute("DELETE FROM volumes WHERE id = ?", (volume_id,))

    def free_ids(self) -> Iterator[VolumeId]:
        """Ids that no row has: from the next after the last one given on, then from the first.

        Looked for as they are taken, so one costs the same whatever else there is.

        Raises:
            LimitError: at the end, when all 2^24 are in use or were taken.
        """
        start = int(self.get(_NEXT) or 0)
        with self._lock:
            known = self._gap
        if known is not None and known[0] <= start <= known[1]:
            yield from map(VolumeId, range(start, known[1] + 1))
            behind = known[1] + 1
        else:
            behind = start
        for first, last in ((behind, VOLUME_ID_MAX), (0, start - 1)):
            yield from self._gaps(first, last)
        raise errors.LimitError("all 16777216 device ids of the pool are in use")

    def _gaps(self, first: int, last: int) -> Iterator[VolumeId]:
        while first <= last:
            rows = self._rows(
                "SELECT id FROM volumes WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?",
                (first, last, _IDS_AT_ONCE),
            )
            for row in rows:
                yield from self._free_from(first, row["id"] - 1)
                first = row["id"] + 1
            if len(rows) < _IDS_AT_ONCE:
                yield from self._free_from(first, last)
                return

    def _free_from(self, first: int, last: int) -> Iterator[VolumeId]:
        if first <= last:
            self._gap = (first, last)
        yield from map(VolumeId, range(first, last + 1))

    # ---- activations ------------------------------------------------------------------------

    def activations(self) -> list[ActivationRecord]:
        """All of them."""
        with self._lock:
            return list(self._all_active().values())

    def _all_active(self) -> dict[int, ActivationRecord]:
        """By id, in the order of their ids."""
        if self._active is None:
            rows = self._rows("SELECT * FROM activations ORDER BY id")
            self._active = {row["id"]: _activation(row) for row in rows}
        return self._active

    def activation(self, volume_id: int) -> ActivationRecord | None:
        """One volume's."""
        with self._lock:
            return self._all_active().get(volume_id)

    def activations_of(self, ids: Sequence[int]) -> dict[int, ActivationRecord]:
        """Those of some volumes, by id."""
        with self._lock:
            active = self._all_active()
            return {each: active[each] for each in ids if each in active}

    def put_activations(self, records: Sequence[ActivationRecord]) -> None:
        """Add or replace some, in one transaction that no power cut need survive."""
        with self.transaction(durable=False) as db:
            self._active = None
            db.executemany(
                "INSERT OR REPLACE INTO activations VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        record.id,
                        int(record.read_only),
                        record.generation,
                        record.loop,
                        record.sequence,
                        int(record.by_mount),
                        json.dumps(record.settings),
                    )
                    for record in records
                ],
            )

    def delete_activations(self, ids: Sequence[int]) -> None:
        """Drop some, likewise."""
        with self.transaction(durable=False) as db:
            self._active = None
            db.executemany("DELETE FROM activations WHERE id = ?", [(each,) for each in ids])

    def next_generations(self, count: int) -> range:
        """Numbers that no activation had before, since the last power cut at least."""
        with self.transaction(durable=False):
            first = int(self.get("generation") or 0) + 1
            self._put_all({"generation": str(first + count - 1)}, durable=False)
            return range(first, first + count)

    # ---- what persists ----------------------------------------------------------------------

    def persistent(self) -> list[PersistentRecord]:
        """What is to be active again after a reboot."""
        return [
            PersistentRecord(
                id=VolumeId(row["id"]),
                read_only=bool(row["read_only"]),
                settings=json.loads(row["settings"]),
            )
            for row in self._rows("SELECT * FROM persistent ORDER BY id")
        ]

    def put_persistent(self, record: PersistentRecord) -> None:
        """Add or replace one."""
        with self.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO persistent VALUES (?, ?, ?)",
                (record.id, int(record.read_only), json.dumps(record.settings)),
            )

    def delete_persistent(self, volume_id: int) -> None:
        """Drop one, if there is one."""
        if self._rows("SELECT id FROM persistent WHERE id = ?", (volume_id,)):
            with self.transaction() as db:
                db.execute("DELETE FROM persistent WHERE id = ?", (volume_id,))

    # ---- intents ----------------------------------------------------------------------------

    def intent(self) -> Intent | None:
        """The open one; of several that a power cut left standing, the first."""
        with self._lock:
            self._record_due()
            return self._standing[0].intent if self._standing else None

    def intents(self) -> list[Intent]:
        """All that stand, in the order in which they were decided."""
        with self._lock:
            self._record_due()
            return [each.intent for each in self._standing]

    def write_intent(self, intent: Intent) -> None:
        """Record what is about to be done to the pool. Durable on return.

        Raises:
            BusyError: another one is open.
            HostSpaceError, StorageIOError: the host's. What cannot be said to have been written
                is one that was not done, should it be found.
        """
        flushing = self.begin_intent(intent)
        if flushing is not None:
            flushing.wait()
            if not flushing.result:
                self._drop_unflushed()

    def _drop_unflushed(self) -> None:
        self.drop_intent()
        raise errors.StorageIOError(
            f"the catalogue {self.path} cannot be written: an intent could not be flushed",
            path=self.path,
        )

    def begin_intent(self, intent: Intent) -> Flushing | None:
        """Record what is about to be done to the pool. Survives this process on return.

        Returns:
            What makes it durable meanwhile, once it is started: the caller waits for it before it
            records a result, and lets nothing become durable before it. Its result is whether that
            worked. None where it is durable on return.

        Raises:
            BusyError, HostSpaceError, StorageIOError: as write_intent.
        """
        document = _document_of(intent)
        with self._lock:
            self._record_due()
            if self._standing:
                raise errors.BusyError(
                    f"'{self._standing[0].intent.operation}' is under way", holder=None
                )
            made = time.time()
            payload = json.dumps(document).encode()
            if self._log is None or not self._log.takes(payload):
                self._write_to_table(document)
                self._standing.append(
                    _Standing(intent=intent, number=None, made=made, in_table=True)
                )
                return None
            log = self._log
            if not log.has_room(payload):
                self._empty_log()
                reached("log-emptied")
            self._number += 1
            log.append(intentlog.Entry(self._number, made, payload))
            self._standing.append(_Standing(intent=intent, number=self._number, made=made))
            return self._beside.prepare(
                log.fileno(), lambda error: self._leave_log(log, document, error)
            )

    def _write_to_table(self, document: Mapping[str, Any]) -> None:
        with self.transaction() as db:
            db.execute(
                "INSERT INTO intents VALUES (1, :operation, :expected, :new, :changes, :result)",
                document,
            )

    def _leave_log(
        self, log: intentlog.IntentLog, document: Mapping[str, Any], reason: errors.ThinpoolError
    ) -> bool:
        """In the thread beside, when a flush failed. Whether the intent is durable in the table."""
        logger.warning("the log of intents %s: %s: it is used no more", log.path, reason.message)
        log.close()
        try:
            with self._lock:
                self._log = None
                self._write_to_table(document)
                self._standing[0] = replace(self._standing[0], in_table=True)
        except errors.ThinpoolError as error:
            logger.warning("%s", error.message)
            return False
        return True

    def _empty_log(self) -> None:
        """Make durable here what the log of intents tells, so that it may be written over."""
        with self.transaction() as db:
            self._drop_old_requests(db)
            self._add_requests(self._done)
            db.executemany(
                "INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?)",
                [
                    (request, done.operation, json.dumps(done.ids), done.made)
                    for request, done in self._done.items()
                ],
            )
            self._put_all({_SETTLED: str(self._number)}, durable=True)
        self._done.clear()

    def complete_intent(self, intent: Intent, *, durable: bool = False) -> None:
        """Record that the open one was done, with its result, in one transaction.

        Unless it is to be durable, a power cut may take it: the intent stands again then, the pool
        is at its new transaction or a later one, and the next open records the result. What is
        written durably later takes it along to the disk.
        """
        with self._lock:
            standing = self._standing[0]
            with self.transaction(durable=durable) as db:
                for volume_id in intent.delete:
                    self.delete(volume_id)
                for record in intent.insert:
                    parent = record.parent
                    if parent is not None and self.by_id(parent) is None:
                        parent = None
                    self.insert(record if parent == record.parent else replace(record, parent=None))
                values = {_TRANSACTION: str(intent.new)}
                if intent.insert:
                    values[_NEXT] = str(intent.insert[-1].id + 1)
                if standing.number is not None:
                    values[_SETTLED] = str(standing.number)
                if standing.in_table:
                    db.execute("DELETE FROM intents")
                    if intent.request is not None:
                        ids = [record.id for record in intent.insert]
                        self.put_request(intent.request, intent.operation, ids)
                self._put_all(values, durable=durable)
            if not standing.in_table:
                self._remember(intent, standing.made)
            del self._standing[0]

    def leave_result(self, intent: Intent) -> None:
        """Record the result of the open one, which is durable and was done, before anything else.

        That is, when settle is called, or when something is asked for that is not known in memory.
        """
        with self._lock:
            self._due = intent

    def settle(self) -> bool:
        """Record the result that was left for later; whether there was one.

        Raises:
            ThinpoolError: it could not be written. It stays left for later.
        """
        with self._lock:
            return self._record_due()

    def _record_due(self) -> bool:
        intent, self._due = self._due, None
        if intent is None:
            return False
        try:
            self.complete_intent(intent)
        except BaseException:
            self._due = intent
            raise
        return True

    def drop_intent(self) -> None:
        """Record that the open one was not done."""
        with self._lock:
            standing = self._standing[0]
            with self.transaction() as db:
                if standing.in_table:
                    db.execute("DELETE FROM intents")
                if standing.number is not None:
                    self._put_all({_SETTLED: str(standing.number)}, durable=True)
            del self._standing[0]

    # ---- requests ---------------------------------------------------------------------------

    def put_request(self, request: str, operation: str, ids: Sequence[int]) -> None:
        """Remember that a request was done, and which volumes came of it."""
        now = time.time()
        with self.transaction() as db:
            self._drop_old_requests(db)
            self._add_requests([request])
            db.execute(
                "INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?)",
                (request, operation, json.dumps(list(ids)), now),
            )

    def _add_requests(self, requests: Iterable[str]) -> None:
        """Before they are written: what is not among these was not."""
        if self._requests is not None:
            self._requests.update(requests)
            if len(self._requests) > _REQUESTS_MAX:
                self._requests = None

    def _drop_old_requests(self, db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM requests WHERE made < ?", (time.time() - REQUEST_AGE_S,))

    def request(self, request: str) -> list[VolumeId] | None:
        """The volumes that came of a request; None when it was not done."""
        with self._lock:
            self._record_due()
            if (done := self._done.get(request)) is not None:
                return [VolumeId(each) for each in done.ids]
            if self._requests is not None and request not in self._requests:
                return None
        rows = self._rows("SELECT ids FROM requests WHERE request = ?", (request,))
        return [VolumeId(each) for each in json.loads(rows[0]["ids"])] if rows else None

    # ---- closing ----------------------------------------------------------------------------

    def close(self) -> None:
        """Let go."""
        with self._lock:
            with contextlib.suppress(errors.ThinpoolError):  # its intent stands
                self._record_due()
            self._db.close()
            self._beside.close()
            if self._log is not None:
                self._log.close()

    def __enter__(self) -> Self:
        """The catalogue itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def _document_of(intent: Intent) -> dict[str, Any]:
    """As it is written down."""
    result = {
        "insert": [record.row() for record in intent.insert],
        "delete": intent.delete,
        "request": intent.request,
    }
    return {
        "operation": intent.operation,
        "expected": intent.expected,
        "new": intent.new,
        "changes": json.dumps([(int(each.kind), each.id, each.origin) for each in intent.changes]),
        "result": json.dumps(result),
    }


def _intent_of(document: Mapping[str, Any] | sqlite3.Row) -> Intent:
    """From what was written down."""
    result = json.loads(document["result"])
    return Intent(
        operation=document["operation"],
        expected=document["expected"],
        new=document["new"],
        changes=tuple(
            Change(kind=ChangeKind(kind), id=VolumeId(volume_id), origin=origin)
            for kind, volume_id, origin in json.loads(document["changes"])
        ),
        insert=tuple(_record(each) for each in result["insert"]),
        delete=tuple(VolumeId(each) for each in result["delete"]),
        request=result["request"],
    )


def _of_states(states: Sequence[str]) -> tuple[str, Sequence[str]]:
    """A condition and its values; all rows when no state is given."""
    if not states:
        return "1", ()
    places = ", ".join("?" for _ in states)
    if READY in states:
        return f"state IN ({places})", states
    # Said in the words of the index volumes_by_state, which SQLite uses then.
    return f"state <> 'ready' AND state IN ({places})", states


def _activation(row: sqlite3.Row) -> ActivationRecord:
    return ActivationRecord(
        id=VolumeId(row["id"]),
        read_only=bool(row["read_only"]),
        generation=row["generation"],
        loop=row["loop"],
        sequence=row["sequence"],
        by_mount=bool(row["by_mount"]),
        settings=json.loads(row["settings"]),
    )
