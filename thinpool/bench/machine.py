"""What a run ran on, as a reader of its figures needs it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from thinpool.host.mountinfo import mount_of, own_mounts
from thinpool.units import format_size


def describe(directory: Path) -> dict[str, str]:
    """Processor, memory, kernel, system and the disk below a directory."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": format_size(pages),
        "kernel": platform.release(),
        "system": _system(),
        "disk": _disk(directory),
    }


def in_a_line(machine: dict[str, str]) -> str:
    """The same for people."""
    return (
        f"{machine['cores']} cores ({machine['processor']}), {machine['memory']} of memory, "
        f"Linux {machine['kernel']}, {machine['system']}, {machine['disk']}"
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "unknown system"


def _disk(directory: Path) -> str:
    """The filesystem and the device that hold it."""
    entry = mount_of(str(directory.resolve()), own_mounts())
    if entry is None:
        return "unknown filesystem"
    name = Path(entry.source).name
    rotational = Path(f"/sys/block/{name}/queue/rotational")
    kind = ""
    if rotational.exists():
        kind = ", rotating" if rotational.read_text().strip() == "1" else ", not rotating"
    return f"{entry.fstype} on {name}{kind}"
