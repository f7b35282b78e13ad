"""ROOT/pools/POOL and its pool.json: where a pool's bytes are, and its settings.

The file is replaced whole, so that a reader sees the old or the new one. It holds what must be
known before the pool can be opened; names and sizes stand in the catalogue.
"""

from __future__ import annotations

import json
import os
import uuid
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final, Self

from thinpool import errors
from thinpool.names import parse_pool_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCHEMA: Final = 1
FILE: Final = "pool.json"
CATALOGUE: Final = "catalogue.db"
SOCKET: Final = "server.sock"
DIRECTORY_MODE: Final = 0o700

CREATING: Final = "creating"
READY: Final = "ready"

DEFAULT_TIMEOUT_MS: Final = 60_000
_LOW_WATER_DIVISOR: Final = 20
_PERCENT: Final = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """pool.json.

    Attributes:
        name: the pool's; the directory has the same.
        uuid: made with the pool.
        engine: ``user`` or ``dm``.
        block_size: of data, bytes.
        data: absolute path of the data file or device.
        metadata: absolute path of the metadata.
        owns_files: both were made under the root and go with the pool.
        state: ``creating`` until its base is sealed; a pool that stays so is removed.
        created: RFC 3339.
        zero: new blocks are zeroed.
        when_full: ``queue`` or ``error``.
        no_space_timeout_ms: how long ``queue`` waits.
        min_free: percent.
        low_water: bytes; None for a twentieth of the data.
        autoextend_threshold: percent used at which a file-backed pool grows; 0 for never.
        autoextend_percent: by how much of what it has.
        read_only: never written.
    """

    name: str
    uuid: str
    engine: str = "user"
    block_size: int
    data: str
    metadata: str
    owns_files: bool
    state: str = READY
    created: str
    zero: bool = True
    when_full: str = "queue"
    no_space_timeout_ms: int = DEFAULT_TIMEOUT_MS
    min_free: float = 10.0
    low_water: int | None = None
    autoextend_threshold: float = 0.0
    autoextend_percent: float = 20.0
    read_only: bool = False

    def low_water_bytes(self, total: int) -> int:
        """What low water is, of so many bytes of data."""
        return self.low_water if self.low_water is not None else total // _LOW_WATER_DIVISOR

    def event_bytes(self, total: int) -> int:
        """Free bytes of data at which the pool says so: low water, or when it is to grow."""
        if self.autoextend_threshold <= 0:
            return self.low_water_bytes(total)
        threshold = int(total * (_PERCENT - self.autoextend_threshold) / _PERCENT)
        return max(self.low_water_bytes(total), threshold)

    def changed(self, **values: Any) -> Self:  # noqa: ANN401 - each field's own type
        """A copy with other values."""
        return replace(self, **values)


def pools_directory(root: Path) -> Path:
    """ROOT/pools."""
    return root / "pools"


def pool_directory(root: Path, name: str) -> Path:
    """ROOT/pools/POOL, the name being checked first."""
    return pools_directory(root) / parse_pool_name(name)


def new_uuid() -> str:
    """For a new pool."""
    return str(uuid.uuid4())


def read_config(root: Path, name: str) -> PoolConfig:
    """Read a pool's pool.json.

    Raises:
        NotFoundError: there is no such pool under the root.
        CorruptMetadataError: the file is not what it should be.
    """
    path = pool_directory(root, name) / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise errors.NotFoundError(
            f"there is no pool {name} under {root}", pool=name, root=str(root)
        ) from None
    except PermissionError as cause:
        raise errors.NotPermittedError(
            f"pool {name} belongs to another user: {path}", operation="open", path=str(path)
        ) from cause
    try:
        data = json.loads(text)
        known = {f.name: data[f.name] for f in fields(PoolConfig) if f.name in data}
        config = PoolConfig(**known)
    except (ValueError, TypeError) as cause:
        raise errors.CorruptMetadataError(
            f"{path} cannot be read: {cause}", path=str(path)
        ) from cause
    if config.name != name:  # the directory was renamed by hand: the directory's name counts
        config = config.changed(name=name)
    return config


def write_config(root: Path, config: PoolConfig) -> None:
    """Replace a pool's pool.json, durably."""
    directory = pool_directory(root, config.name)
    document = {"schema": SCHEMA, **asdict(config)}
    write_atomically(directory / FILE, json.dumps(document, indent=2).encode() + b"\n")


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace a file so that a reader, and a crash, see the old or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:
        with _directory(path.parent) as descriptor:
            os.fsync(descriptor)


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def list_pools(root: Path) -> list[str]:
    """The names of the pools under a root, sorted."""
    directory = pools_directory(root)
    try:
        entries = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
    except FileNotFoundError:
        return []
    return [
        name for name in entries if not name.startswith(".") and (directory / name / FILE).exists()
    ]
