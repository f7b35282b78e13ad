"""What outlives this process: Get counts, layers being filled or to be removed, options.

What can be seen elsewhere is not kept here: which layers there are, their parents and sizes are in
the pool's catalogue, what is mounted is in the mount table. Counts are of one boot, since mounts
are. Counts survive a crash of this process; the rest survives a power cut too.

A count that was changed and whose answer is not out yet is *open*. dockerd sends a call again when
its answer does not come, so a Get or Put of a layer that finds one of its kind *lost* (the process
that counted it died, or the client went away) is that one come again, and counts nothing. Where the
truth cannot be known a layer is held too long: one unmounted under a container breaks it.

At an Init the counts are those of a dockerd that is gone. One hold stays of each, for a container
that runs on (the new dockerd ends it with a Put that had no Get); those that the new one never
names are *inherited*.

Thread-safe: one connection under one lock.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
PATIENCE_S: Final = 30.0
"""dockerd repeats a call after 1, 2, 4 and 8 s."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS gets (id TEXT PRIMARY KEY, count INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS inherited (id TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS answers (
    ticket INTEGER PRIMARY KEY, id TEXT NOT NULL, call TEXT NOT NULL, lost INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS filling (id TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS trash (name TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class State:
    """One driver's state.

    Args:
        path: of the database; made when it is not there.
    """

    def __init__(self, path: Path) -> None:
        """Open it, and forget counts of an earlier boot."""
        self._lock = threading.RLock()
        self._lost_at = 0.0
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        path.chmod(0o600)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
        if self.setting("boot") != boot:
            for table in ("gets", "inherited", "answers"):
                self._run(f"DELETE FROM {table}")  # noqa: S608 - own names
            self.keep("boot", boot)
        self.lose()  # what an earlier process had not answered

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it or nothing."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:  # noqa: ANN401 - SQL
        """Within a transaction."""
        return self._db.execute(sql, values).fetchall()

    def _run(self, sql: str, *values: Any, durable: bool = False) -> list[tuple[Any, ...]]:  # noqa: ANN401 - SQL
        with self._lock:
            if durable:
                self._db.execute("PRAGMA synchronous=FULL")
            try:
                return self._db.execute(sql, values).fetchall()
            finally:
                if durable:
                    self._db.execute("PRAGMA synchronous=NORMAL")

    # ---- counts -----------------------------------------------------------------------------

    def count(self, layer: str) -> int:
        """How many Gets a layer has had that no Put has ended."""
        found = self._run("SELECT count FROM gets WHERE id = ?", layer)
        return int(found[0][0]) if found else 0

    def add(self, layer: str) -> int:
        """One Get more; returns a ticket for ``answered`` or ``lose``."""
        with self._transaction():
            ticket = self._reopen(layer, "get")
            if ticket is None:
                self._rows("DELETE FROM inherited WHERE id = ?", layer)
                self._rows(
                    "INSERT INTO gets VALUES (?, 1) "
                    "ON CONFLICT (id) DO UPDATE SET count = count + 1",
                    layer,
                )
                ticket = self._open(layer, "get")
        return ticket

    def take(self, layer: str) -> int:
        """One Get less, never below none; returns a ticket."""
        with self._transaction():
            ticket = self._reopen(layer, "put")
            if ticket is None:
                self._rows("DELETE FROM inherited WHERE id = ?", layer)
                self._rows("UPDATE gets SET count = count - 1 WHERE id = ? AND count > 0", layer)
                ticket = self._open(layer, "put")
        return ticket

    def _reopen(self, layer: str, call: str) -> int | None:
        """The ticket of a call that was lost and comes again."""
        found = self._rows(
            "UPDATE answers SET lost = 0 WHERE ticket = (SELECT ticket FROM answers "
            "WHERE id = ? AND call = ? AND lost LIMIT 1) RETURNING ticket",
            layer,
            call,
        )
        return int(found[0][0]) if found else None

    def _open(self, layer: str, call: str) -> int:
        sql = "INSERT INTO answers (id, call, lost) VALUES (?, ?, 0) RETURNING ticket"
        return int(self._rows(sql, layer, call)[0][0])

    def answered(self, ticket: int) -> None:
        """The answer to a Get or a Put is out."""
        self._run("DELETE FROM answers WHERE ticket = ?", ticket)

    def lose(self, ticket: int | None = None) -> None:
        """The answer to this one, or to every one, cannot go out any more."""
        if ticket is None:
            self._run("UPDATE answers SET lost = 1")
        else:
            self._run("UPDATE answers SET lost = 1 WHERE ticket = ?", ticket)
        self._lost_at = time.monotonic()

    def expire(self) -> None:
        """End the wait for lost calls to come again, when dockerd does not try any more."""
        if time.monotonic() >= self._lost_at + PATIENCE_S:
            self._run("DELETE FROM answers WHERE lost")

    def inherit(self) -> None:
        """What is counted now is of a dockerd that is gone."""
        with self._transaction():
            self._rows("DELETE FROM answers")
            self._rows("UPDATE gets SET count = 1 WHERE count > 1")
            self._rows("INSERT OR IGNORE INTO inherited SELECT id FROM gets WHERE count > 0")

    def inherited(self) -> set[str]:
        """Layers that a dockerd that is gone had got, and that this one has not named."""
        return {str(row[0]) for row in self._run("SELECT id FROM inherited")}

    def forget(self, layer: str) -> None:
        """A layer has no Gets any more."""
        with self._transaction():
            for table in ("gets", "inherited", "answers"):
                self._rows(f"DELETE FROM {table} WHERE id = ?", layer)  # noqa: S608 - own names

    def counted(self) -> dict[str, int]:
        """Every layer with Gets."""
        return {str(i): int(n) for i, n in self._run("SELECT * FROM gets WHERE count > 0")}

    # ---- unfinished work --------------------------------------------------------------------

    def begin_filling(self, layer: str) -> None:
        """A layer is incomplete from now on: when this process dies, the next one removes it."""
        self._run("INSERT OR IGNORE INTO filling VALUES (?)", layer, durable=True)

    def end_filling(self, layer: str) -> None:
        """It is whole, or gone."""
        self._run("DELETE FROM filling WHERE id = ?", layer)

    def is_filling(self, layer: str) -> bool:
        """Whether it is incomplete."""
        return bool(self._run("SELECT 1 FROM filling WHERE id = ?", layer))

    def filling(self) -> list[str]:
        """Layers that are incomplete."""
        return [str(row[0]) for row in self._run("SELECT id FROM filling")]

    def begin_removal(self, name: str) -> None:
        """A volume of this name, if there is one, is to be removed when it is not in use."""
        self._run("INSERT OR IGNORE INTO trash VALUES (?)", name, durable=True)

    def end_removal(self, name: str) -> None:
        """It is gone."""
        self._run("DELETE FROM trash WHERE name = ?", name)

    def trash(self) -> list[str]:
        """Volumes that wait for their removal."""
        return [str(row[0]) for row in self._run("SELECT name FROM trash")]

    # ---- settings ---------------------------------------------------------------------------

    def setting(self, key: str) -> str | None:
        """What was kept under a key."""
        found = self._run("SELECT value FROM settings WHERE key = ?", key)
        return str(found[0][0]) if found else None

    def keep(self, key: str, value: str) -> None:
        """Keep a text under a key."""
        self._run("INSERT OR REPLACE INTO settings VALUES (?, ?)", key, value, durable=True)

    def document(self, key: str) -> dict[str, Any]:
        """A JSON object that was kept; empty when there is none."""
        text = self.setting(key)
        return dict(json.loads(text)) if text else {}

    def keep_document(self, key: str, document: Mapping[str, Any]) -> None:
        """Keep a JSON object."""
        self.keep(key, json.dumps(document))
