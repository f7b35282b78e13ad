"""What a server asks of the kernel for its own process.

Each is best effort: hosts differ in what they allow, and a server works without any of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Final

_PR_SET_NAME: Final = 15
_PR_SET_IO_FLUSHER: Final = 57
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4
_OOM_SCORE: Final = -900


def protect(name: str, *, io_flusher: bool) -> list[str]:
    """Keep this process alive and out of the way of its own volumes.

    Args:
        name: shown by ps.
        io_flusher: it serves block devices, so its allocations must not wait for them.

    Returns:
        What the host did not allow.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    refused = []
    libc.prctl(_PR_SET_NAME, ctypes.c_char_p(name[:15].encode()), 0, 0, 0)
    if io_flusher and libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        refused.append("PR_SET_IO_FLUSHER")
    # What is touched stays in memory: a page fault could wait for one of our own volumes.
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        refused.append("mlockall")
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    except OSError:
        refused.append("oom_score_adj")
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("0")
    return refused


def log(text: str) -> None:
    """One line an event, for the journal; never fails."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
