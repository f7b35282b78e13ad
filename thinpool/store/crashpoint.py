"""Named places at which a test lets the process die as by SIGKILL.

``THINPOOL_CRASH_AT=STEP`` dies there each time; ``STEP:FILE`` only while FILE exists, and removes
it first, so that the successor lives.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

VARIABLE = "THINPOOL_CRASH_AT"


def reached(step: str) -> None:
    """Die here when the environment asks for it."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    name, _, marker = wanted.partition(":")
    if name != step:
        return
    if marker:
        try:
            Path(marker).unlink()
        except FileNotFoundError:
            return
    os.kill(os.getpid(), signal.SIGKILL)
