"""What our device-mapper devices are called, so that a successor finds what its predecessor made.

A pool of uuid U is the device ``thinpool-U-pool`` with the dm uuid ``THINPOOL-U-pool``; its volume
17 is ``thinpool-U-17`` with ``THINPOOL-U-17``. A pool's name is unique in its root only and can
change; its uuid is what both kinds are found by.
"""

from __future__ import annotations

from typing import Final

from thinpool.model import VolumeId

NAME_PREFIX: Final = "thinpool-"
UUID_PREFIX: Final = "THINPOOL-"
_POOL: Final = "pool"


def pool_name(uuid: str) -> str:
    """The pool's device."""
    return f"{NAME_PREFIX}{uuid}-{_POOL}"


def pool_uuid(uuid: str) -> str:
    """The pool's dm uuid."""
    return f"{UUID_PREFIX}{uuid}-{_POOL}"


def volume_name(uuid: str, volume_id: int) -> str:
    """A volume's device."""
    return f"{NAME_PREFIX}{uuid}-{volume_id}"


def volume_uuid(uuid: str, volume_id: int) -> str:
    """A volume's dm uuid."""
    return f"{UUID_PREFIX}{uuid}-{volume_id}"


def prefix_of(uuid: str) -> str:
    """What the dm uuids of a pool and of all its volumes begin with."""
    return f"{UUID_PREFIX}{uuid}-"


def volume_of(uuid: str, dm_uuid: str) -> VolumeId | None:
    """Which volume of a pool a dm uuid names; None for the pool itself, and for all others'."""
    rest = dm_uuid.removeprefix(prefix_of(uuid))
    if rest == dm_uuid or not (rest.isascii() and rest.isdigit()):
        return None
    return VolumeId(int(rest))
