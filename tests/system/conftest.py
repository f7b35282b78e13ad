"""Whole pools on this host: server, FUSE, loop devices and real filesystems."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from thinpool import Thinpool, errors

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(descriptor, mode, offset, length):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def fsck(device: str, kind: str) -> None:
    """Assert that a filesystem that is not mounted is whole."""
    command = ["xfs_repair", "-n", device] if kind == "xfs" else ["e2fsck", "-fn", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def remove_all(api: Thinpool) -> None:
    for status in api.pools():
        with contextlib.suppress(errors.ThinpoolError):
            for volume in api.list(status.pool):
                if volume.device is not None:
                    api.umount(str(volume))
                    api.deactivate(str(volume))
            api.remove_pool(status.pool)


@pytest.fixture
def api() -> Iterator[Thinpool]:
    with tempfile.TemporaryDirectory(prefix="tps-", ignore_cleanup_errors=True) as path:
        found = Thinpool(Path(path), timeout=60)
        yield found
        remove_all(found)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path
