"""What the operations answer: frozen values, and the JSON shapes that other programs rely on.

The shapes are a contract: within a schema no field is renamed, retyped or left out, and what is
not known is null. Fields may be added, so readers skip what they do not know, and tolerate enum
values that they do not know. Sizes are bytes; times are UTC.

Knows nothing of servers, stores or terminals.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal, NewType, Self

from thinpool.errors import ThinpoolError, by_kind

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMA: Final = 1
"""The version of every shape here."""

VolumeId = NewType("VolumeId", int)
"""A thin device's id in the pool's metadata: 24 bits."""

Json = dict[str, Any]

Kind = Literal["base", "image", "container", "volume"]
KINDS: Final[tuple[Kind, ...]] = ("base", "image", "container", "volume")

Consistency = Literal["frozen", "quiescent", "crash"]
"""How a snapshot was taken.

``frozen``: of a mounted filesystem, frozen for the instant. ``quiescent``: nothing used the origin.
``crash``: what a disk would hold after a power cut, because it was in use and could not be frozen.
"""


def format_time(when: datetime) -> str:
    """RFC 3339 with ``Z``, whole seconds."""
    # Not strftime, which asks the locale for each part.
    return when.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="seconds") + "Z"


def parse_time(text: str) -> datetime:
    """The inverse of format_time."""
    return datetime.fromisoformat(text)


def _known(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that a document holds; the others were added after us."""
    # Not fields(): that makes a tuple anew at each call, and lists are long.
    return {name: data[name] for name in cls.__dataclass_fields__ if name in data}


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A base, an image, a container or a volume: ``V`` of the shapes.

    Attributes:
        pool: the pool's name.
        name: its name in the pool.
        id: the thin device's id.
        kind: base, image, container or volume.
        parent: the name of what it was made from; None for none, or when that is gone.
        size: bytes.
        mapped: bytes of data blocks it refers to, shared ones included.
        exclusive: bytes that nothing else in the pool refers to; None unless asked for.
        read_only: sealed.
        created: when it was made.
        device: the block device's stable path while active.
        mounts: where it is mounted, as this host's server sees it.
        filesystem: ext4, xfs, or None where none is known of.
        consistency: of a snapshot, how it was taken.
        labels: what importers and front ends keep with it: chain-id, ref.
        state: ``ready``; ``missing`` when the pool has no such device any more.
    """

    pool: str
    name: str
    id: VolumeId
    kind: Kind
    parent: str | None
    size: int
    mapped: int
    exclusive: int | None
    read_only: bool
    created: datetime
    device: str | None = None
    mounts: tuple[str, ...] = ()
    filesystem: str | None = None
    consistency: Consistency | None = None
    labels: dict[str, str] = field(default_factory=dict)
    state: str = "ready"

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.pool}/{self.name}"

    def to_json(self) -> Json:
        """``V`` of the shapes."""
        return {
            "pool": self.pool,
            "name": self.name,
            "id": self.id,
            "kind": self.kind,
            "parent": self.parent,
            "size": self.size,
            "mapped": self.mapped,
            "exclusive": self.exclusive,
            "read_only": self.read_only,
            "created": format_time(self.created),
            "device": self.device,
            "mounts": list(self.mounts),
            "filesystem": self.filesystem,
            "consistency": self.consistency,
            "labels": dict(self.labels),
            "state": self.state,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read ``V``."""
        known = _known(cls, data)
        known["created"] = parse_time(known["created"])
        known["mounts"] = tuple(known.get("mounts", ()))
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """What activate answers.

    Attributes:
        volume: as it is now.
        device: the stable path, a link to the block device; None where this host can make none.
        number: ``major:minor`` of the block device; None as above.
        file: the volume as a file in the pool's FUSE mount, for QEMU and the like.
        already_active: nothing had to be done.
    """

    volume: Volume
    device: str | None
    number: str | None
    file: str | None
    already_active: bool

    def to_json(self) -> Json:
        """The shape of ``activate``."""
        return {
            "schema": SCHEMA,
            "volume": self.volume.to_json(),
            "device": self.device,
            "number": self.number,
            "file": self.file,
            "already_active": self.already_active,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the shape of ``activate``."""
        known = _known(cls, data)
        known["volume"] = Volume.from_json(known["volume"])
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """What resume answers.

    Attributes:
        activations: what is active now of what was activated to persist.
        failures: why others are not.
    """

    activations: tuple[Activation, ...]
    failures: tuple[ThinpoolError, ...]

    def to_json(self) -> Json:
        """The shape of ``resume``."""
        return {
            "schema": SCHEMA,
            "activations": [each.to_json() for each in self.activations],
            "failures": [
                {**each.attributes, "type": each.kind, "message": each.message}
                for each in self.failures
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the shape of ``resume``."""
        kinds = by_kind()
        failures = []
        for each in data["failures"]:
            rest = {key: value for key, value in each.items() if key not in {"type", "message"}}
            failures.append(kinds.get(each["type"], ThinpoolError)(each["message"], **rest))
        return cls(
            activations=tuple(Activation.from_json(each) for each in data["activations"]),
            failures=tuple(failures),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mounted:
    """What mount answers.

    Attributes:
        volume: as it is now.
        device: the block device mounted.
        directory: where.
        already_mounted: nothing had to be done.
    """

    volume: Volume
    device: str
    directory: str
    already_mounted: bool

    def to_json(self) -> Json:
        """The shape of ``mount``."""
        return {
            "schema": SCHEMA,
            "volume": self.volume.to_json(),
            "device": self.device,
            "directory": self.directory,
            "already_mounted": self.already_mounted,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpace:
    """The data half of a pool's status.

    Attributes:
        path: the file or device.
        used: bytes allocated.
        total: bytes.
        low_water: free bytes below which the pool warns and extends itself.
        host_free: free bytes of the filesystem that holds the file; None for a device.
    """

    path: str
    used: int
    total: int
    low_water: int
    host_free: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataSpace:
    """The metadata half of a pool's status, in bytes."""

    path: str
    used: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """What status answers.

    Attributes:
        pool: its name.
        uuid: made with it, kept beside it.
        engine: user or dm.
        mode: rw, ro, out_of_data_space or fail.
        needs_check: read-only until it was checked.
        transaction_id: the metadata's.
        block_size: of a data block, bytes.
        data: data space.
        metadata: metadata space.
        when_full: queue or error.
        volumes: how many it holds.
        active: how many of them are active.
        min_free: percent of space below which nothing new is made.
        autoextend_threshold: percent used at which a file-backed pool grows; 0 for never.
        autoextend_percent: by how much.
        zero: new blocks are zeroed.
        read_only: attached read-only.
        server_pid: the process that serves it.
        warnings: what deserves attention now, a sentence each.
        error: what keeps the pool from being opened, for ``mode`` fail.
    """

    pool: str
    uuid: str
    engine: str
    mode: str
    needs_check: bool
    transaction_id: int
    block_size: int
    data: DataSpace
    metadata: MetadataSpace
    when_full: str
    volumes: int
    active: int
    min_free: float = 0.0
    autoextend_threshold: float = 0.0
    autoextend_percent: float = 0.0
    zero: bool = True
    read_only: bool = False
    server_pid: int | None = None
    warnings: tuple[str, ...] = ()
    error: Json | None = None

    def to_json(self) -> Json:
        """The shape of ``status``."""
        return {
            "schema": SCHEMA,
            "pool": self.pool,
            "uuid": self.uuid,
            "engine": self.engine,
            "mode": self.mode,
            "needs_check": self.needs_check,
            "transaction_id": self.transaction_id,
            "block_size": self.block_size,
            "data": {
                "path": self.data.path,
                "used": self.data.used,
                "total": self.data.total,
                "low_water": self.data.low_water,
                "host_free": self.data.host_free,
            },
            "metadata": {
                "path": self.metadata.path,
                "used": self.metadata.used,
                "total": self.metadata.total,
            },
            "when_full": self.when_full,
            "volumes": self.volumes,
            "active": self.active,
            "min_free": self.min_free,
            "autoextend_threshold": self.autoextend_threshold,
            "autoextend_percent": self.autoextend_percent,
            "zero": self.zero,
            "read_only": self.read_only,
            "server_pid": self.server_pid,
            "warnings": list(self.warnings),
            "error": self.error,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the shape of ``status``."""
        known = _known(cls, data)
        known["data"] = DataSpace(**_known(DataSpace, known["data"]))
        known["metadata"] = MetadataSpace(**_known(MetadataSpace, known["metadata"]))
        known["warnings"] = tuple(known.get("warnings", ()))
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What remove answers.

    Attributes:
        removed: the volumes, as they were; what would be removed in a dry run.
        freed: bytes that removing the whole set gives back to the pool.
        dry_run: nothing was done.
    """

    removed: tuple[Volume, ...]
    freed: int
    dry_run: bool

    def to_json(self) -> Json:
        """The shape of ``remove``."""
        return {
            "schema": SCHEMA,
            "removed": [volume.to_json() for volume in self.removed],
            "freed": self.freed,
            "dry_run": self.dry_run,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the shape of ``remove``."""
        known = _known(cls, data)
        known["removed"] = tuple(Volume.from_json(volume) for volume in known["removed"])
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trim:
    """What trim answers: bytes that the volume mapped before and does not map now."""

    volume: Volume
    trimmed: int

    def to_json(self) -> Json:
        """The shape of ``trim``."""
        return {"schema": SCHEMA, "volume": self.volume.to_json(), "trimmed": self.trimmed}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaRange:
    """A stretch of a delta.

    Attributes:
        begin: bytes from the start of the volumes.
        length: bytes.
        change: ``left_only`` (mapped in the first alone), ``right_only``, or ``different``.
    """

    begin: int
    length: int
    change: str

    def to_json(self) -> Json:
        """One element of ``ranges``."""
        return {"begin": self.begin, "length": self.length, "change": self.change}


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What delta answers: where two volumes do not share their blocks."""

    left: str
    right: str
    block_size: int
    ranges: tuple[DeltaRange, ...]

    def to_json(self) -> Json:
        """The shape of ``delta``."""
        return {
            "schema": SCHEMA,
            "left": self.left,
            "right": self.right,
            "block_size": self.block_size,
            "ranges": [each.to_json() for each in self.ranges],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the shape of ``delta``."""
        known = _known(cls, data)
        known["ranges"] = tuple(DeltaRange(**_known(DeltaRange, each)) for each in known["ranges"])
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChange:
    """One line of diff.

    Attributes:
        path: from the root of the filesystem, without a leading slash, as UTF-8 with
            surrogateescape.
        change: ``added``, ``modified`` or ``deleted``.
    """

    path: str
    change: str

    def to_json(self) -> Json:
        """One element of ``changes``."""
        return {"path": self.path, "change": self.change}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What export answers: bytes written to the output, holes of a sparse file not counted."""

    volume: Volume
    output: str | None
    written: int

    def to_json(self) -> Json:
        """The shape of ``export``."""
        return {
            "schema": SCHEMA,
            "volume": self.volume.to_json(),
            "output": self.output,
            "written": self.written,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that check found.

    Attributes:
        type: the stable name of the defect.
        severity: fatal, leak or note.
        structure: where: superblock, device-tree, details-tree, data-space-map, ...
        block: the metadata block concerned.
        device_id: the thin device concerned.
        message: for people.
        data_block: the (first) data block concerned.
        length: so many neighbouring blocks have the same fault.
        found: the number that stands there.
        wanted: the number that should.
    """

    type: str
    severity: str
    structure: str
    block: int | None
    device_id: int | None
    message: str
    data_block: int | None = None
    length: int = 1
    found: int | None = None
    wanted: int | None = None

    def to_json(self) -> Json:
        """One element of ``faults``."""
        return {
            "type": self.type,
            "severity": self.severity,
            "structure": self.structure,
            "block": self.block,
            "device_id": self.device_id,
            "message": self.message,
            "data_block": self.data_block,
            "length": self.length,
            "found": self.found,
            "wanted": self.wanted,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What check answers.

    Attributes:
        pool: its name; None for a bare metadata device.
        clean: no fault is fatal or a leak.
        transaction_id: the superblock's; None where that cannot be read.
        faults: everything found.
        needs_check: the pool is read-only until this is cleared; None as transaction_id.
        devices: how many there are.
        mappings: of all devices, shared ones as often as they are mapped.
        leaked_data_blocks: counted and used by nothing.
        leaked_metadata_blocks: likewise.
        omitted: faults past the most that are kept.
    """

    pool: str | None
    clean: bool
    transaction_id: int | None
    faults: tuple[Fault, ...]
    needs_check: bool | None = None
    devices: int = 0
    mappings: int = 0
    leaked_data_blocks: int = 0
    leaked_metadata_blocks: int = 0
    omitted: int = 0

    def to_json(self) -> Json:
        """The shape of ``check``."""
        return {
            "schema": SCHEMA,
            "pool": self.pool,
            "clean": self.clean,
            "transaction_id": self.transaction_id,
            "faults": [fault.to_json() for fault in self.faults],
            "needs_check": self.needs_check,
            "devices": self.devices,
            "mappings": self.mappings,
            "leaked_data_blocks": self.leaked_data_blocks,
            "leaked_metadata_blocks": self.leaked_metadata_blocks,
            "omitted": self.omitted,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the shape of ``check``."""
        known = _known(cls, data)
        known["faults"] = tuple(Fault(**_known(Fault, fault)) for fault in known["faults"])
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of doctor.

    Attributes:
        subject: what was looked at: dm, fuse, loop, udev, a pool, a volume.
        state: ``ok``, ``note``, ``missing`` (this host lacks it) or ``wrong``.
        message: for people.
        remedy: the command that mends it; None where nothing needs mending.
    """

    subject: str
    state: str
    message: str
    remedy: str | None = None

    def to_json(self) -> Json:
        """One element of ``host`` or ``pool``."""
        return {
            "subject": self.subject,
            "state": self.state,
            "message": self.message,
            "remedy": self.remedy,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read one element."""
        return cls(**_known(cls, data))


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """What doctor answers.

    Attributes:
        host: what this host can do.
        pools: by name, what is wrong with each pool and its names.
    """

    host: tuple[Finding, ...]
    pools: dict[str, tuple[Finding, ...]]

    @property
    def healthy(self) -> bool:
        """Nothing is wrong with any pool; what the host lacks does not count."""
        return all(each.state != "wrong" for found in self.pools.values() for each in found)

    def to_json(self) -> Json:
        """The shape of ``doctor``."""
        return {
            "schema": SCHEMA,
            "healthy": self.healthy,
            "host": [finding.to_json() for finding in self.host],
            "pools": {
                name: [finding.to_json() for finding in found] for name, found in self.pools.items()
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far an operation is.

    Attributes:
        operation: import, export, check, create-pool.
        step: what it does now, for people: ``layer 2 of 5``.
        done: in ``unit``.
        total: in ``unit``; None where it is not known.
        unit: ``bytes``, ``blocks`` or ``entries``.
    """

    operation: str
    step: str
    done: int
    total: int | None
    unit: str = "bytes"

    def to_json(self) -> Json:
        """As it goes over the wire."""
        return {
            "operation": self.operation,
            "step": self.step,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read it from the wire."""
        return cls(**_known(cls, data))
