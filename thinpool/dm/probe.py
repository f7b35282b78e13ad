"""Whether this host has what the kernel engine needs, tried and not guessed from versions."""

from __future__ import annotations

from thinpool import errors
from thinpool.dm.client import DeviceMapper

TARGETS = ("thin-pool", "thin")


def device_mapper() -> str | None:
    """Why this process cannot make thin pools with the kernel; None where it can.

    Loads the modules, where the kernel has them and this user may.
    """
    try:
        with DeviceMapper() as dm:
            missing = [kind for kind in TARGETS if dm.target_version(kind) is None]
    except errors.ThinpoolError as error:
        return error.message
    if missing:
        return f"device-mapper has no {missing[0]} target: load the module dm-thin-pool"
    return None
