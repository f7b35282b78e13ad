"""The C core's own benchmark programs, which are built beside it and not installed.

They stand in ``$THINPOOL_BENCH_PROGRAMS``, or in the build folder of a checkout: ``make
bench-setup`` puts them into build/release.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

from thinpool.errors import ThinpoolError, UnsupportedHostError

VARIABLE: Final = "THINPOOL_BENCH_PROGRAMS"
_CHECKOUT: Final = Path(__file__).resolve().parents[2]
_BUILDS: Final = ("build/release", "build/normal")
_SECONDS: Final = 300


def find(name: str) -> str:
    """A program's path.

    Raises:
        UnsupportedHostError: it was not built.
    """
    folders = [_CHECKOUT / build / "csrc/tests" for build in _BUILDS]
    if named := os.environ.get(VARIABLE):
        folders.insert(0, Path(named))
    for folder in folders:
        if os.access(folder / name, os.X_OK):
            return str(folder / name)
    raise UnsupportedHostError(
        f"{name} was not built: 'make bench-setup' in a checkout builds it, and ${VARIABLE} may "
        "name its folder",
        missing=name,
    )


def run(name: str, *arguments: str) -> str:
    """What a program prints.

    Raises:
        UnsupportedHostError: it was not built.
        ThinpoolError: it failed.
    """
    done = subprocess.run(
        [find(name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=_SECONDS,
        cwd="/",
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    if done.returncode:
        raise ThinpoolError(f"{name} failed ({done.returncode}): {done.stderr.strip()[:300]}")
    return done.stdout
