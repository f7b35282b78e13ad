"""A device is pulled out from under a pool that is at work."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.system.conftest import MIB, remove_all
from thinpool import Thinpool, errors
from thinpool.host import loop

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.root, pytest.mark.loop, pytest.mark.xdist_group("system")]
BLOCK = 64 * 1024


class Device:
    """A loop device that ends at 0 when it is pulled out, as the kernel leaves a lost disk."""

    def __init__(self, backing: Path) -> None:
        self._backing = backing
        with backing.open("wb") as file:
            file.truncate(64 * MIB)
        self._loop = loop.attach(backing)
        self.path = self._loop.path

    def pull(self) -> None:
        os.truncate(self._backing, 0)
        loop.set_capacity(self._loop)

    def close(self) -> None:
        loop.detach(self._loop)


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[dict[str, Device]]:
    found = {name: Device(tmp_path / name) for name in ("data", "metadata")}
    yield found
    for device in found.values():
        device.close()


@pytest.fixture
def api(tmp_path: Path, devices: dict[str, Device]) -> Iterator[Thinpool]:
    """A pool whose full data space would let writes wait for a minute, and a volume in it."""
    found = Thinpool(tmp_path / "r", timeout=30)
    found.create_pool(
        "p",
        data=devices["data"].path,
        metadata=devices["metadata"].path,
        engine="user",
        base_size=0,
        min_free=0.0,
        when_full="queue",
    )
    found.create("p/v", size=32 * MIB)
    yield found
    remove_all(found)


def test_lost_data_is_an_error_and_no_full_pool(api: Thinpool, devices: dict[str, Device]) -> None:
    with api.open("p/v", writable=True) as volume:
        volume.write(0, b"k" * BLOCK)
        volume.flush()
        devices["data"].pull()
        began = time.monotonic()
        for offset in (0, 8 * BLOCK):
            with pytest.raises(errors.StorageIOError):
                volume.write(offset, b"n" * BLOCK)
        assert time.monotonic() - began < 10
        assert api.status("p").mode == "rw"
        assert not any("full" in warning for warning in api.status("p").warnings)
        with pytest.raises(errors.StorageIOError):
            volume.flush()
    with pytest.raises(errors.ThinpoolError):
        api.snapshot("p/v", "p/s")
    assert [volume.name for volume in api.list("p")] == ["v"]


def test_a_snapshot_without_data_to_flush_sees_that_the_data_is_gone(
    api: Thinpool, devices: dict[str, Device]
) -> None:
    with api.open("p/v", writable=True) as volume:
        volume.write(0, b"k" * BLOCK)
        volume.flush()
    api.snapshot("p/v", "p/s")
    devices["data"].pull()
    with pytest.raises(errors.StorageIOError, match="gone or became smaller"):
        api.snapshot("p/v", "p/t")
    assert sorted(volume.name for volume in api.list("p")) == ["s", "v"]
    assert api.status("p").needs_check


def test_status_names_a_device_that_is_gone(tmp_path: Path) -> None:
    api = Thinpool(tmp_path / "r", timeout=30)
    try:
        pool = api.create_pool("p", size=64 * MIB, base_size=0, min_free=0.0)
        assert not pool.warnings
        data = Path(pool.data.path)
        away = data.rename(data.with_suffix(".away"))
        assert f"{pool.data.path} is gone: bring it back" in api.status("p").warnings
        away.rename(data)
        assert not api.status("p").warnings
    finally:
        remove_all(api)


def test_lost_metadata_leaves_the_pool_read_only(api: Thinpool, devices: dict[str, Device]) -> None:
    with api.open("p/v", writable=True) as volume:
        volume.write(0, b"k" * BLOCK)
        volume.flush()
        devices["metadata"].pull()
        volume.write(BLOCK, b"n" * BLOCK)
        with pytest.raises(errors.ThinpoolError):
            volume.flush()
        assert volume.read(0, BLOCK) == b"k" * BLOCK
    assert api.status("p").mode == "ro"
    with pytest.raises(errors.NeedsCheckError):
        api.snapshot("p/v", "p/s")
