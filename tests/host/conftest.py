"""Sparse files, loop devices and mounts that are taken down whatever the test did."""

from __future__ import annotations

import contextlib
import subprocess
from typing import TYPE_CHECKING

import pytest

from thinpool.host import loop, mounts
from thinpool.host.mountinfo import own_mounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A directory; what is mounted or attached below it when the test ends goes with it."""
    yield tmp_path
    prefix = f"{tmp_path}/"
    for entry in reversed(own_mounts()):
        if entry.mount_point.startswith(prefix):
            mounts.unmount(entry.mount_point, lazy=True)
    for device in loop.find_below(tmp_path):
        with contextlib.suppress(Exception):
            loop.detach(device)


@pytest.fixture
def sparse(work: Path) -> Callable[..., str]:
    """Makes sparse files."""

    def make(size: int = 64 * MIB, name: str = "disk") -> str:
        path = work / name
        with path.open("wb") as file:
            file.truncate(size)
        return str(path)

    return make


@pytest.fixture
def formatted(sparse: Callable[..., str]) -> Callable[..., str]:
    """Makes files with a filesystem that the distribution's own defaults describe."""

    def make(fstype: str = "ext4", size: int = 320 * MIB, name: str = "disk") -> str:
        path = sparse(size, name)
        subprocess.run([f"mkfs.{fstype}", "-q", path], check=True, capture_output=True)
        return path

    return make


@pytest.fixture
def directory(work: Path) -> str:
    """An empty directory to mount on."""
    path = work / "mnt"
    path.mkdir()
    return str(path)
