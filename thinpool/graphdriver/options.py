"""``--storage-opt`` of dockerd: the devicemapper driver's options, each honoured or answered.

Written ``thinpool.NAME=VALUE``; ``dm.NAME=VALUE`` is taken too, so that an old daemon.json works.
What belongs to the making of a pool cannot be changed from here, and is refused by naming the
command that does it. docs/docker.md has the table.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from thinpool import errors
from thinpool.graphdriver.fields import parse_docker_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PREFIXES: Final = ("thinpool.", "dm.")
_TRUE: Final = frozenset({"true", "1", "t", "yes"})
_FALSE: Final = frozenset({"false", "0", "f", "no"})

_AT_CREATION: Final[Mapping[str, str]] = {
    "mkfsarg": "the base's filesystem is made with the pool: create-pool --mkfs-option",
    "loopdatasize": "the data's size is the pool's: create-pool --size, extend-pool --data-size",
    "loopmetadatasize": "the metadata's size is the pool's: create-pool --metadata-size, "
    "extend-pool --metadata-size",
    "datadev": "the data device is the pool's: create-pool --data",
    "metadatadev": "the metadata device is the pool's: create-pool --metadata",
    "thinpooldev": "the pool is the one that is served: serve graphdriver POOL; "
    "attach-pool adopts one that was made elsewhere",
    "blocksize": "the block size is the pool's: create-pool --block-size",
    "directlvm_device": "no LVM is needed: create-pool --data takes the device",
    "directlvm_device_force": "no LVM is needed: create-pool --force overwrites a device",
    "thinp_percent": "sizes are given, not shares of a volume group: create-pool --size",
    "thinp_metapercent": "sizes are given, not shares of a volume group: "
    "create-pool --metadata-size",
}
"""What a running driver cannot set, and what does."""

_WITHOUT_MEANING: Final = frozenset({"override_udev_sync_check", "libdm_log_level"})
"""There is no libdm here and nothing waits for udev: accepted, and nothing follows."""

_POOL_SETTINGS: Final[Mapping[str, str]] = {
    "min_free_space": "min-free",
    "thinp_autoextend_threshold": "autoextend-threshold",
    "thinp_autoextend_percent": "autoextend-percent",
    "low_water": "low-water",
    "when_full": "when-full",
}
"""What is a setting of the pool, by its key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What dockerd asked for at Init.

    Attributes:
        base_size: bytes of a layer without a parent; None for the base's.
        mount_options: added when a layer is mounted.
        deferred_removal: a layer in use is unmounted lazily, and its device taken down later.
        deferred_deletion: a layer in use is removed later.
    """

    base_size: int | None = None
    mount_options: tuple[str, ...] = ()
    deferred_removal: bool = True
    deferred_deletion: bool = True

    def to_json(self) -> dict[str, Any]:
        """As it is kept."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The inverse."""
        return cls(
            base_size=document.get("base_size"),
            mount_options=tuple(document.get("mount_options", ())),
            deferred_removal=document.get("deferred_removal", True),
            deferred_deletion=document.get("deferred_deletion", True),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Options taken apart.

    Attributes:
        options: the driver's own.
        settings: of the pool, as ``Thinpool.set`` takes them.
        filesystem: which the base is said to have; None where nothing is said.
    """

    options: Options
    settings: dict[str, str]
    filesystem: str | None


def parse_options(given: Sequence[str]) -> Asked:
    """Read ``key=value`` options; of one that comes twice the last counts.

    Raises:
        UsageError: one that is not known, cannot be set from here, or has no such value.
    """
    values: dict[str, Any] = {}
    settings: dict[str, str] = {}
    filesystem: str | None = None
    for option in given:
        key, equals, value = option.partition("=")
        name = _name(key.strip())
        value = value.strip()
        if not equals or not value:
            raise errors.UsageError(f"{option!r:.80}: write {key}=VALUE", what=key)
        if name in _POOL_SETTINGS:
            settings[_POOL_SETTINGS[name]] = value
        elif name == "fs":
            filesystem = value
        else:
            values.update(_own(name, key, value))
    return Asked(options=Options(**values), settings=settings, filesystem=filesystem)


def _name(key: str) -> str:
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    raise errors.UsageError(
        f"{key!r:.60} is no option of thinpool: they are written thinpool.NAME", what=key
    )


def _own(name: str, key: str, value: str) -> dict[str, Any]:
    """A field of Options for one that is the driver's."""
    match name:
        case "basesize":
            return {"base_size": parse_docker_size(value)}
        case "mountopt":
            return {"mount_options": (value,)}
        case "use_deferred_removal":
            return {"deferred_removal": _truth(key, value)}
        case "use_deferred_deletion":
            return {"deferred_deletion": _truth(key, value)}
        case "blkdiscard" | "xfs_nospace_max_retries":
            _refuse_other(name, key, value)
        case _ if name in _AT_CREATION:
            raise errors.UsageError(f"{key}: {_AT_CREATION[name]}", what=key)
        case _ if name not in _WITHOUT_MEANING:
            raise errors.UsageError(f"{key!r:.60}: there is no such option", what=key)
    return {}


def _refuse_other(name: str, key: str, value: str) -> None:
    """What has one value here: others are refused."""
    if name == "blkdiscard" and not _truth(key, value):
        raise errors.UsageError(
            f"{key}=false: what a removed layer used is always given back, in the background, so "
            "that it delays nobody",
            what=key,
        )
    if name == "xfs_nospace_max_retries" and value != "0":
        raise errors.UsageError(
            f"{key}={value}: it is always 0 here; the pool itself waits for space before xfs "
            "hears of it (when_full=queue)",
            what=key,
        )


def _truth(key: str, value: str) -> bool:
    lower = value.lower()
    if lower in _TRUE:
        return True
    if lower in _FALSE:
        return False
    raise errors.UsageError(f"{key} is true or false, not {value!r:.40}", what=key)
