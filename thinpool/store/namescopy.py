"""The copy of the catalogue beside the metadata file, so that losing the catalogue loses no names.

Sizes stand nowhere but in the catalogue, so this copy is what another host, or doctor, needs with
the pool's two files. It names the transaction it belongs to; an older one is still worth having.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from thinpool.store.catalogue import READY, Record
from thinpool.store.poolfile import write_atomically

if TYPE_CHECKING:
    from thinpool.model import VolumeId
    from thinpool.store.catalogue import Catalogue
    from thinpool.store.poolfile import PoolConfig

SCHEMA: Final = 1
SUFFIX: Final = ".names.json"


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


def write_copy(path: Path, catalogue: Catalogue, config: PoolConfig) -> None:
    """Replace the copy."""
    records = catalogue.records(READY)
    names = {record.id: record.name for record in records}
    document = {
        "schema": SCHEMA,
        "pool": config.name,
        "uuid": config.uuid,
        "transaction_id": int(catalogue.get("transaction_id") or 0),
        "volumes": [
            {
                "id": record.id,
                "name": record.name,
                "kind": record.kind,
                "parent": names.get(record.parent) if record.parent is not None else None,
                "size": record.size,
                "read_only": record.read_only,
                "created": record.created,
                "filesystem": record.filesystem,
                "consistency": record.consistency,
                "labels": record.labels,
            }
            for record in records
        ],
    }
    write_atomically(path, json.dumps(document, indent=1).encode() + b"\n", durable=False)


def read_copy(path: Path) -> tuple[dict[str, Any], dict[VolumeId, Record]] | None:
    """The document and its records by id; None where there is none that can be read."""
    try:
        document = json.loads(path.read_bytes())
        ids = {entry["name"]: entry["id"] for entry in document["volumes"]}
        records = {}
        for entry in document["volumes"]:
            parent = entry["parent"]
            values = {**entry, "parent": ids.get(parent) if parent is not None else None}
            record = Record(**values)
            records[record.id] = record
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return document, records
