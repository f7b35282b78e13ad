"""What outlives this process: Get counts, layers being filled or to be removed, options.

What can be seen elsewhere is not kept here: which layers there are, their parents and sizes are in
the pool's catalogue, what is mounted is in the mount table. Counts are of one boot, since mounts
are. Counts survive a crash of this process; the rest survives a power cut too.

Thread-safe: one connection under one lock.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS gets (id TEXT PRIMARY KEY, count INTEGER NOT NULL);
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
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        path.chmod(0o600)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
        if self.setting("boot") != boot:
            self._run("DELETE FROM gets")
            self.keep("boot", boot)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

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

    def add(self, layer: str) -> None:
        """One Get more."""
        sql = "INSERT INTO gets VALUES (?, 1) ON CONFLICT (id) DO UPDATE SET count = count + 1"
        self._run(sql, layer)

    def take(self, layer: str) -> int:
        """One Get less, never below none; returns how many are left."""
        self._run("UPDATE gets SET count = count - 1 WHERE id = ? AND count > 0", layer)
        return self.count(layer)

    def forget(self, layer: str) -> None:
        """A layer has no Gets any more."""
        self._run("DELETE FROM gets WHERE id = ?", layer)

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
