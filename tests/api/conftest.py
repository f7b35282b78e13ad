"""Pools behind real servers."""

import contextlib
import tempfile
from pathlib import Path

import pytest

from thinpool import Thinpool, errors

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def root():
    """A short path: it holds sockets, and other users may have to reach it."""
    with tempfile.TemporaryDirectory(prefix="tpa-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture
def api(root):
    """The API on an empty root; every pool that a test leaves is removed."""
    found = Thinpool(root, timeout=20)
    yield found
    for status in found.pools():
        with contextlib.suppress(errors.ThinpoolError):
            volumes = found.list(status.pool)
            for volume in volumes:
                if volume.device is not None:
                    found.umount(str(volume))
                    found.deactivate(str(volume))
            found.remove_pool(status.pool)


@pytest.fixture
def pool(api):
    """A pool without a base."""
    return api.create_pool("p", size=256 * MIB, base_size=0, min_free=0.0)
