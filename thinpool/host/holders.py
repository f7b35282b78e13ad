"""Who keeps a block device busy: mounts in any namespace, open files, devices stacked on it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from thinpool.host import syscalls
from thinpool.host.mountinfo import mounts_of_device, process_ids

_SHOWN_MAX: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """One reason why a device is in use.

    Attributes:
        how: ``mount``, ``open`` (a process has the device or a file on it open), ``stacked``.
        pid: the process, where it is one; ``name``: its command.
        where: the mount point, the open file, the device on top.
    """

    how: Literal["mount", "open", "stacked"]
    pid: int | None
    name: str | None
    where: str

    def __str__(self) -> str:
        """For people."""
        who = "" if self.pid is None else f" by process {self.pid} ({self.name})"
        if self.how == "mount":
            return self.where
        if self.how == "stacked":
            return f"used by the device {self.where}"
        return f"{self.where} is open{who}"


def find_holders(device: int, *, path: str | None = None) -> list[Holder]:
    """Everything found to hold a block device; mounts first.

    An empty list doesn't mean that it is free: a mount namespace without a process, or a
    process this user may not look into, is not seen.

    Args:
        device: its device number.
        path: its path, for filesystems that don't show the number.
    """
    holders = [
        Holder(how="mount", pid=mount.pid, name=_name(mount.pid), where=mount.describe())
        for mount in mounts_of_device(device, source=path)
    ]
    stacked = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/holders")
    if stacked.is_dir():
        holders += [
            Holder(how="stacked", pid=None, name=None, where=f"/dev/{entry.name}")
            for entry in sorted(stacked.iterdir())
        ]
    for pid in process_ids():
        holders += _open_files(pid, device)
    return holders


def describe(holders: list[Holder]) -> str | None:
    """Holders in one line, the first few of many, or None where none was found."""
    said = list(dict.fromkeys(str(holder) for holder in holders))
    if len(said) > _SHOWN_MAX:
        said[_SHOWN_MAX:] = [f"and {len(said) - _SHOWN_MAX} more"]
    return "; ".join(said) or None


def _open_files(pid: int, device: int) -> list[Holder]:
    directory = f"/proc/{pid}"
    try:
        numbers = os.listdir(f"{directory}/fd")
    except OSError:
        return []  # ended, or not ours to look into
    found = []
    for entry in ("cwd", "root", "exe", *(f"fd/{number}" for number in numbers)):
        link = f"{directory}/{entry}"
        try:
            file = syscalls.statx(link)
            if device in (file.device, file.rdev):
                where = os.readlink(link)
                found.append(Holder(how="open", pid=pid, name=_name(pid), where=where))
        except OSError:
            continue  # closed meanwhile
    return found


def _name(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return None
