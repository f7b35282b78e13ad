"""Named places at which a test lets the process die as by SIGKILL.

``THINPOOL_CRASH_AT=STEP`` dies there each time; ``STEP:FILE`` only while FILE exists, and removes
it first, so that the successor lives.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

VARIABLE = "THINPOOL_CRASH_AT"


# Read once: every change of a pool comes by several of these.
_wanted = os.environ.get(VARIABLE, "")


def arm(step: str) -> None:
    """Die from now on as if the environment had asked for it."""
    global _wanted  # noqa: PLW0603 - of the process, as its environment is
    _wanted = step


def is_armed(step: str) -> bool:
    """Whether the process is to die there."""
    return _wanted.partition(":")[0] == step


def reached(step: str) -> None:
    """Die here when that was asked for."""
    if not _wanted:
        return
    name, _, marker = _wanted.partition(":")
    if name != step:
        return
    if marker:
        try:
            Path(marker).unlink()
        except FileNotFoundError:
            return
    os.kill(os.getpid(), signal.SIGKILL)
