"""What a refusal of the kernel means: an errno, the table that was refused, and the log."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from thinpool import errors
from thinpool.dm import abi
from thinpool.dm.control import as_kind, failure
from thinpool.dm.targets import Target, ThinPoolTarget, ThinTarget, device_text
from thinpool.host.holders import describe, find_holders

if TYPE_CHECKING:
    from collections.abc import Sequence

    from thinpool.dm.client import DeviceMapper


def of_device(command: abi.Command, name: str, cause: OSError, said: str) -> errors.ThinpoolError:
    """A command on a device failed."""
    number = cause.errno or 0
    if number == errno.ENXIO:
        return as_kind(errors.NotFoundError, command, name, number, f"{said}: there is none")
    return failure(command, name, number, said)


def of_table(
    dm: DeviceMapper,
    name: str,
    targets: Sequence[Target],
    cause: OSError,
    log: tuple[str, ...],
) -> errors.ThinpoolError:
    """A table was refused."""
    command, number = abi.Command.TABLE_LOAD, cause.errno or 0
    said = f"the kernel refuses the table of the device {name}"
    if dm.find(name) is None:
        return of_device(command, name, cause, said)
    why = _missing_target(dm, targets) or _missing_device(targets)
    if why is not None:
        kind, reason, missing = why
        return as_kind(kind, command, name, number, f"{said}: {reason}", log=log, missing=missing)
    found = _of_pool(dm, targets, number) or _of_thin(targets, number) or _held(targets, number)
    if found is None:
        return as_kind(_general(number), command, name, number, said + _quoted(log), log=log)
    kind, reason, holder = found
    attributes: dict[str, object] = {"log": log}
    if holder is not None:
        attributes["holder"] = holder
    return as_kind(kind, command, name, number, f"{said}: {reason}", **attributes)


def of_resume(name: str, cause: OSError, log: tuple[str, ...]) -> errors.ThinpoolError:
    """A table could not go live."""
    command, number = abi.Command.DEV_SUSPEND, cause.errno or 0
    if number == errno.ENXIO:
        return of_device(command, name, cause, f"cannot resume the device {name}")
    said = f"cannot resume the device {name}{_quoted(log)}"
    return as_kind(_general(number), command, name, number, said, log=log)


def of_message(name: str, text: str, cause: OSError, log: tuple[str, ...]) -> errors.ThinpoolError:
    """A message was refused."""
    command, number = abi.Command.TARGET_MSG, cause.errno or 0
    said = f"the device {name} refuses the message {text!r}{_quoted(log)}"
    if number == errno.ENXIO:
        return of_device(command, name, cause, said)
    if number == errno.EOPNOTSUPP:
        return as_kind(errors.ReadOnlyError, command, name, number, said, log=log)
    return failure(command, name, number, said, log=log)


_Missing = tuple[type[errors.ThinpoolError], str, str]


def _general(number: int) -> type[errors.ThinpoolError]:
    """For what has no better name: only errnos that mean the same everywhere."""
    kinds: dict[int, type[errors.ThinpoolError]] = {
        errno.ENOMEM: errors.NoMemoryError,
        errno.EIO: errors.StorageIOError,
        errno.EACCES: errors.NotPermittedError,
        errno.EBUSY: errors.BusyError,
    }
    return kinds.get(number, errors.DeviceMapperError)


def _quoted(log: tuple[str, ...]) -> str:
    return f": the kernel's log says: {'; '.join(log)}" if log else ""


def _missing_target(dm: DeviceMapper, targets: Sequence[Target]) -> _Missing | None:
    for kind in dict.fromkeys(target.line().type for target in targets):
        if dm.target_version(kind) is None:
            module = {"thin": "dm-thin-pool"}.get(kind, f"dm-{kind}")
            reason = f"it has no {kind} target: load the module {module}"
            return errors.UnsupportedHostError, reason, f"{kind} target"
    return None


def _missing_device(targets: Sequence[Target]) -> _Missing | None:
    for device in (device for target in targets for device in target.devices()):
        number = device_number(device)
        if number is None:
            try:
                os.stat(device)
            except OSError as error:
                reason = f"{device}: {os.strerror(error.errno or 0)}"
                return errors.NotFoundError, reason, device
            return errors.UsageError, f"{device} is no block device", device
        if not os.path.exists(f"/sys/dev/block/{device_text(number)}"):
            return errors.NotFoundError, f"{device}: there is no such device", device
    return None


_Found = tuple[type[errors.ThinpoolError], str, str | None]


def _of_pool(dm: DeviceMapper, targets: Sequence[Target], number: int) -> _Found | None:
    for target in targets:
        if not isinstance(target, ThinPoolTarget):
            continue
        device = target.metadata
        if number == errno.EBUSY and (other := pool_over(dm, device)) is not None:
            reason = f"the pool {other} has the metadata device {device}; use that pool, or end it"
            return errors.BusyError, reason, f"the pool {other}"
        if number in (errno.EILSEQ, errno.ENOTBLK):
            reason = f"{device} holds no pool's metadata, or damaged: check it, or repair it"
            return errors.CorruptMetadataError, reason, None
        if number == errno.EPERM and target.read_only:
            reason = f"{device} holds no pool, and read-only none is made"
            return errors.NotFoundError, reason, None
    return None


def _of_thin(targets: Sequence[Target], number: int) -> _Found | None:
    for target in targets:
        if isinstance(target, ThinTarget) and number == errno.ENODATA:
            reason = f"the pool {target.pool} has no thin device {target.id}"
            return errors.NotFoundError, reason, None
    return None


def _held(targets: Sequence[Target], number: int) -> _Found | None:
    """A device of the table is held by somebody."""
    if number != errno.EBUSY:
        return None
    for device in (device for target in targets for device in target.devices()):
        held = device_number(device)
        holder = None if held is None else describe(find_holders(held, path=device))
        if holder is not None:
            return errors.BusyError, f"{device} is in use: {holder}", holder
    return None


def device_number(device: str) -> int | None:
    """The number of a table's device argument, a path or ``major:minor``; None for none."""
    major, colon, minor = device.partition(":")
    if colon and major.isdecimal() and minor.isdecimal():
        return os.makedev(int(major), int(minor))
    try:
        found = os.stat(device)
    except OSError:
        return None
    return found.st_rdev if stat.S_ISBLK(found.st_mode) else None


def pool_over(dm: DeviceMapper, metadata: str) -> str | None:
    """The name of the device-mapper pool that has a metadata device; None for none."""
    wanted = device_number(metadata)
    if wanted is None:
        return None
    for entry in dm.devices():
        try:
            tables = (dm.table(entry.name), dm.table(entry.name, inactive=True))
        except errors.NotFoundError:
            continue
        for target in (target for table in tables for target in table):
            if isinstance(target, ThinPoolTarget) and device_number(target.metadata) == wanted:
                return entry.name
    return None
