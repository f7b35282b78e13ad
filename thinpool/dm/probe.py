"""Whether this host has what the kernel engine needs, tried and not guessed from versions."""

from __future__ import annotations

import os
from dataclasses import dataclass

from thinpool import errors
from thinpool.dm import udev
from thinpool.dm.client import DeviceMapper

TARGETS = ("thin-pool", "thin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was found.

    Attributes:
        reason: why the kernel engine cannot be used here; None where it can.
        interface: version of the ioctl interface; None where there is none for us.
        target: version of the thin-pool target; None where there is none.
    """

    reason: str | None
    interface: tuple[int, int, int] | None = None
    target: tuple[int, int, int] | None = None


def probe() -> Probe:
    """Try it: opens the control device, and loads the modules where this user may."""
    try:
        with DeviceMapper() as dm:
            versions = {kind: dm.target_version(kind) for kind in TARGETS}
            interface = dm.version
    except errors.ThinpoolError as error:
        return Probe(reason=error.message)
    reasons = [
        f"device-mapper has no {kind} target: load the module dm-thin-pool"
        for kind, version in versions.items()
        if version is None
    ]
    return Probe(
        reason=reasons[0] if reasons else None,
        interface=interface,
        target=versions["thin-pool"],
    )


def device_mapper() -> str | None:
    """Why this process cannot make thin pools with the kernel; None where it can."""
    return probe().reason


def udev_rules() -> str | None:
    """Why udevd may look into guests' devices; None where it is kept from it, or doesn't run."""
    if not udev.is_running():
        return None
    present = udev.rules_file(udev.OWN_RULES, masked=True)
    if present is None:
        return None if os.access("/run/udev", os.W_OK) else "they cannot be put under /run/udev"
    if os.path.realpath(present) == os.devnull:
        return f"{present} is masked: host tools may probe guests' devices"
    try:
        with open(present, "rb") as theirs, open(udev.RULES_PATH, "rb") as ours:
            same = theirs.read() == ours.read()
    except OSError as error:
        return f"{present}: {os.strerror(error.errno or 0)}"
    return None if same else f"{present} is of another version of thinpool"
