"""Running the filesystems' own tools: from the system's directories only, never from PATH."""

from __future__ import annotations

import os
import subprocess
from typing import Final

from thinpool import errors

SYSTEM_DIRECTORIES: Final = (
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
    "/usr/local/sbin",
    "/run/current-system/sw/bin",
)
_TIMEOUT_SECONDS: Final = 3600.0
_LAST_LINES: Final = 3
_ENVIRONMENT: Final = {
    "PATH": ":".join(SYSTEM_DIRECTORIES),
    "LC_ALL": "C",
    # Nothing of the host's mke2fs.conf: the same filesystem on every host.
    "MKE2FS_CONFIG": "/dev/null",
}


def find_program(name: str) -> str | None:
    """The absolute path of a system program, or None."""
    for directory in SYSTEM_DIRECTORIES:
        path = os.path.join(directory, name)
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    return None


def run_program(
    name: str,
    arguments: list[str],
    *,
    package: str,
    script: str | None = None,
    accepted: frozenset[int] = frozenset({0}),
) -> str:
    """Run a system program; returns what it printed, both streams.

    Args:
        name: the program, without directory.
        arguments: passed as they are, no shell.
        package: the Debian package that brings it, for the error.
        script: fed to its standard input.
        accepted: exit codes that are no failure.

    Raises:
        UnsupportedHostError: it isn't installed; ``missing``.
        ThinpoolError: it failed; ``program``, ``code``, ``output`` (its end).
    """
    path = find_program(name)
    if path is None:
        raise errors.UnsupportedHostError(
            f"{name} is not installed; on Debian, the package {package} brings it", missing=name
        )
    try:
        done = subprocess.run(
            [path, *arguments],
            input="" if script is None else script,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=_ENVIRONMENT,
            cwd="/",
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as cause:
        raise errors.ThinpoolError(
            f"{name} did not end within {_TIMEOUT_SECONDS:g} s and was killed",
            program=name,
            code=None,
            output="",
        ) from cause
    if done.returncode not in accepted:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        said = "; ".join(lines[:_LAST_LINES])
        raise errors.ThinpoolError(
            f"{name} failed ({done.returncode}): {said}",
            program=name,
            code=done.returncode,
            output=done.stdout,
        )
    return done.stdout
