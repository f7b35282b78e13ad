"""Unmounting a disk on which a server of ours has just worked."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

ENOUGH_S = 20


def unmount(directory: Path) -> None:
    """As soon as the server's processes have ended, which let go of the pool a little before."""
    deadline = time.monotonic() + ENOUGH_S
    while subprocess.run(["umount", directory], check=False, stderr=subprocess.DEVNULL).returncode:
        assert time.monotonic() < deadline, f"{directory} stays busy"
        time.sleep(0.05)
