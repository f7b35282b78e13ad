"""The copy of the catalogue beside the metadata file, so that losing the catalogue loses no names.

Sizes stand nowhere but in the catalogue, so this copy is what another host, or doctor, needs with
the pool's two files. It names the transaction it belongs to; an older one is still worth having.

    metadata.names.json           every volume, one JSON document
    metadata.names.json.changes   what changed since, a JSON document a line

Writing everything at each change would cost a pool of 100,000 names a second each time. So changes
are appended to a file beside, which is begun anew, and everything written again, when it has become
as long as the copy itself, and when the server ends. The first line of that file says to which copy
it belongs; one that belongs to another, and a last line that is cut short, are passed over.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from thinpool.store.catalogue import READY, Record
from thinpool.store.poolfile import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from thinpool.model import VolumeId
    from thinpool.store.catalogue import Catalogue
    from thinpool.store.poolfile import PoolConfig

SCHEMA: Final = 1
SUFFIX: Final = ".names.json"
CHANGES_SUFFIX: Final = ".changes"
_AT_ONCE: Final = 256
_CHANGES_BYTES: Final = 64 << 10
"""The changes may always become so long, however few names there are."""


def copy_path(config: PoolConfig, directory: Path) -> Path:
    """Where it is written: beside a metadata file that is written too, else in the pool's own."""
    metadata = Path(config.metadata)
    if config.read_only or metadata.is_block_device():
        return directory / f"metadata{SUFFIX}"
    return _beside(metadata)


def find_copy(config: PoolConfig, directory: Path) -> Path:
    """Where it is read from: the pool's own if there is one, else beside the metadata."""
    own = copy_path(config, directory)
    return own if own.exists() else _beside(Path(config.metadata))


def _beside(metadata: Path) -> Path:
    return metadata.with_name(metadata.name + SUFFIX)


def changes_path(copy: Path) -> Path:
    """Where the changes since a copy stand."""
    return copy.with_name(copy.name + CHANGES_SUFFIX)


class NamesCopy:
    """Keeps the copy up to date. Not thread-safe.

    Args:
        path: of the copy.
        catalogue: what is copied.
    """

    def __init__(self, path: Path, catalogue: Catalogue) -> None:
        """Nothing is written yet; the first time everything is."""
        self._path = path
        self._catalogue = catalogue
        self._token: str | None = None
        self._copy_bytes = 0
        self._changes_bytes = 0

    def write(self, config: PoolConfig, *, whole: bool = False) -> None:
        """Write what changed since the last time.

        Args:
            config: of the pool.
            whole: have everything in the one document, and no changes beside.

        Raises:
            OSError: the host's; the next time everything is written.
        """
        token, self._token = self._token, None
        changed = self._catalogue.take_changed()
        longest = max(_CHANGES_BYTES, self._copy_bytes)
        if token is None or self._changes_bytes > longest or (whole and self._changes_bytes):
            token = secrets.token_hex(8)
            self._write_whole(config, token)
        elif changed:
            self._append(token, changed)
        self._token = token

    def _write_whole(self, config: PoolConfig, token: str) -> None:
        records = self._catalogue.records(READY)
        names = {record.id: record.name for record in records}
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "pool": config.name,
            "uuid": config.uuid,
            "transaction_id": self._transaction_id(),
            "copy": token,
            "volumes": [
                _entry(record, names.get(record.parent) if record.parent is not None else None)
                for record in records
            ],
        }
        # Some at a time: the encoder keeps the interpreter, and requests would wait for all of it.
        # Not indented: that would be done by Python, beside whoever waits for an answer.
        entries = document.pop("volumes")
        parts = [
            json.dumps(entries[first : first + _AT_ONCE])[1:-1]
            for first in range(0, len(entries), _AT_ONCE)
        ]
        head = json.dumps(document)[:-1]
        data = f'{head}, "volumes": [{", ".join(parts)}]}}\n'.encode()
        write_atomically(self._path, data, durable=False)
        self._copy_bytes, self._changes_bytes = len(data), 0
        with contextlib.suppress(FileNotFoundError):
            changes_path(self._path).unlink()

    def _append(self, token: str, changed: Sequence[VolumeId]) -> None:
        put, drop = [], []
        for volume_id in changed:
            record = self._catalogue.by_id(volume_id)
            if record is None or record.state != READY:
                drop.append(volume_id)
                continue
            parent = self._catalogue.by_id(record.parent) if record.parent is not None else None
            there = parent is not None and parent.state == READY
            put.append(_entry(record, parent.name if parent is not None and there else None))
        line = {"transaction_id": self._transaction_id(), "put": put, "drop": drop}
        data = json.dumps(line).encode() + b"\n"
        if not self._changes_bytes:
            data = json.dumps({"copy": token}).encode() + b"\n" + data
        begin = os.O_APPEND if self._changes_bytes else os.O_TRUNC
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | begin
        with os.fdopen(os.open(changes_path(self._path), flags, 0o600), "wb") as file:
            file.write(data)
        self._changes_bytes += len(data)

    def _transaction_id(self) -> int:
        return int(self._catalogue.get("transaction_id") or 0)


def _entry(record: Record, parent: str | None) -> dict[str, Any]:
    return {
        "id": record.id,
        "name": record.name,
        "kind": record.kind,
        "parent": parent,
        "parent_id": record.parent if parent is not None else None,
        "size": record.size,
        "read_only": record.read_only,
        "created": record.created,
        "filesystem": record.filesystem,
        "consistency": record.consistency,
        "labels": record.labels,
    }


def read_copy(path: Path) -> tuple[dict[str, Any], dict[VolumeId, Record]] | None:
    """The document and its records by id; None where there is none that can be read."""
    try:
        document = json.loads(path.read_bytes())
        entries = {entry["id"]: entry for entry in document["volumes"]}
        for line in _changes(path, document.get("copy")):
            document["transaction_id"] = line["transaction_id"]
            entries.update((entry["id"], entry) for entry in line["put"])
            for volume_id in line["drop"]:
                entries.pop(volume_id, None)
        ids = {entry["name"]: volume_id for volume_id, entry in entries.items()}
        records = {}
        for entry in entries.values():
            # A parent that has another name since then is known by its id.
            values = {key: value for key, value in entry.items() if key != "parent_id"}
            parent = entry.get("parent_id", ids.get(entry["parent"]))
            record = Record(**{**values, "parent": parent if parent in entries else None})
            records[record.id] = record
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return document, records


def _changes(path: Path, token: str | None) -> Iterator[dict[str, Any]]:
    """The changes since the copy of a token, as far as they are whole."""
    try:
        lines = changes_path(path).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    for number, line in enumerate(lines):
        try:
            document = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or (number == 0 and document.get("copy") != token):
            return
        if number:
            yield document
