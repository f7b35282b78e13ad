"""How much room the host has for files that may grow."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thinpool.host.failures import failure

if TYPE_CHECKING:
    from collections.abc import Mapping

_SECTOR = 512
"""st_blocks counts these, whatever the filesystem (stat(2))."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A filesystem that could not hold its sparse files if they were written full.

    Attributes:
        paths: the files concerned.
        needed: bytes they could still come to need.
        free: bytes an ordinary user may still write there.
    """

    paths: tuple[str, ...]
    needed: int
    free: int


def host_free(path: str | os.PathLike[str]) -> int:
    """Bytes an ordinary user may still write to the filesystem of a path.

    The path itself need not be there yet, nor its parents.

    Raises:
        NotPermittedError, StorageIOError: it can't be asked.
    """
    place = _existing(path)
    try:
        found = os.statvfs(place)
    except OSError as cause:
        raise failure(cause, f"cannot ask for the free space of {place}", path=place) from cause
    return found.f_bavail * found.f_frsize


def allocated(path: str | os.PathLike[str]) -> int:
    """Bytes a file really takes; 0 for one that isn't there."""
    try:
        return os.stat(path).st_blocks * _SECTOR
    except FileNotFoundError:
        return 0


def shortages(files: Mapping[str, int]) -> list[Shortage]:
    """The filesystems that couldn't hold all their files at full size.

    Args:
        files: by path, the bytes each may grow to; what a file takes already is counted.
    """
    by_filesystem: dict[int, list[str]] = {}
    for path in files:
        by_filesystem.setdefault(os.stat(_existing(path)).st_dev, []).append(path)
    found = []
    for paths in by_filesystem.values():
        needed = sum(max(0, files[path] - allocated(path)) for path in paths)
        free = host_free(paths[0])
        if needed > free:
            found.append(Shortage(paths=tuple(paths), needed=needed, free=free))
    return found


def _existing(path: str | os.PathLike[str]) -> str:
    """The path, or the nearest of its parents that is there."""
    place = os.path.abspath(path)
    while not os.path.exists(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    return place
