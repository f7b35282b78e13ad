"""Full is a state: of the pool, and of the filesystem that holds the pool's files."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.system.conftest import MIB, remove_all
from thinpool import Thinpool, errors
from thinpool.host import loop, mounts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.root,
    pytest.mark.loop,
    pytest.mark.ext4,
    pytest.mark.xdist_group("system"),
]
BLOCK = 64 * 1024


@pytest.fixture
def small_host(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of its own, 160 MiB, for a root."""
    image = tmp_path / "host.img"
    with image.open("wb") as file:
        file.truncate(160 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    place = tmp_path / "host"
    place.mkdir()
    device = loop.attach(image)
    try:
        mounts.mount(device.path, place, "ext4")
        try:
            yield place
        finally:
            unmount_patiently(place)
    finally:
        loop.detach(device)


def unmount_patiently(place: Path) -> None:
    """Once the servers of the pools that were there have ended."""
    until = time.monotonic() + 20
    while True:
        try:
            mounts.unmount(place)
        except errors.BusyError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
        else:
            return


def block_content(number: int) -> bytes:
    return (b"%d " % number * (BLOCK // 2))[:BLOCK]


def fill(volume, *, start: int = 0) -> int:
    """Write blocks until there is no space; how many were written."""
    count = start
    try:
        while True:
            volume.write(count * BLOCK, block_content(count))
            count += 1
    except errors.NoSpaceError:
        return count


def verify(volume, count: int) -> None:
    for block in range(count):
        wanted = block_content(block)
        assert volume.read(block * BLOCK, len(wanted)) == wanted


def test_a_full_host_is_out_of_data_space_and_not_an_io_error(small_host: Path) -> None:
    api = Thinpool(small_host / "r", timeout=30)
    filler = small_host / "filler"
    try:
        filler.write_bytes(bytes(80 * MIB))
        api.create_pool("p", size=1024 * MIB, base_size=0, min_free=0.0, when_full="error")
        api.create("p/v", size=512 * MIB)
        with api.open("p/v", writable=True) as volume:
            written = fill(volume)
            assert 10 * MIB < written * BLOCK < 80 * MIB
            status = api.status("p")
            assert status.mode == "out_of_data_space"
            assert not status.needs_check
            verify(volume, written)
            filler.unlink()
            volume.write(written * BLOCK, block_content(written))
            assert api.status("p").mode == "rw"
            volume.flush()
            verify(volume, written + 1)
        assert api.check("p").clean
    finally:
        filler.unlink(missing_ok=True)
        remove_all(api)


def test_writes_that_queue_go_on_when_the_host_has_space_again(small_host: Path) -> None:
    api = Thinpool(small_host / "r", timeout=30)
    filler = small_host / "filler"
    blocks = 48 * MIB // BLOCK
    try:
        filler.write_bytes(bytes(90 * MIB))
        api.create_pool("p", size=1024 * MIB, base_size=0, min_free=0.0, when_full="queue")
        api.create("p/v", size=512 * MIB)
        done = threading.Event()

        def writer() -> None:
            with api.open("p/v", writable=True) as volume:
                for block in range(blocks):
                    volume.write(block * BLOCK, block_content(block))
                volume.flush()
            done.set()

        thread = threading.Thread(target=writer)
        thread.start()
        until = time.monotonic() + 30
        while api.status("p").mode != "out_of_data_space":
            assert time.monotonic() < until
            time.sleep(0.1)
        assert not done.wait(1.0)
        filler.unlink()
        thread.join(60)
        assert done.is_set()
        with api.open("p/v") as volume:
            verify(volume, blocks)
        assert api.status("p").mode == "rw"
        assert api.check("p").clean
    finally:
        filler.unlink(missing_ok=True)
        remove_all(api)


def test_a_full_pool_errors_and_takes_writes_again_once_it_is_extended(api) -> None:
    api.create_pool("p", size=16 * MIB, base_size=0, min_free=0.0, when_full="error")
    api.create("p/v", size=64 * MIB)
    with api.open("p/v", writable=True) as volume:
        written = fill(volume)
        assert written == 16 * MIB // BLOCK
        status = api.status("p")
        assert status.mode == "out_of_data_space"
        assert status.data.used == status.data.total == 16 * MIB
        api.extend_pool("p", data_size=24 * MIB)
        assert api.status("p").mode == "rw"
        assert fill(volume, start=written) == 24 * MIB // BLOCK
        verify(volume, 24 * MIB // BLOCK)
    api.remove(["p/v"])
    assert api.status("p").data.used == 0
    assert api.status("p").mode == "rw"
    assert api.check("p").clean


@pytest.mark.fuse
def test_an_import_that_fills_the_pool_says_so_and_leaves_nothing(api, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "big").write_bytes(os.urandom(48 * MIB))
    api.create_pool("p", size=32 * MIB, base_size=256 * MIB, min_free=0.0, when_full="error")
    before = api.status("p").data.used
    with pytest.raises(errors.DataSpaceError):
        api.import_image("p/image", source)
    assert [volume.name for volume in api.list("p")] == ["base"]
    assert api.status("p").data.used == before
    assert api.status("p").mode == "rw"
    assert api.check("p").clean


@pytest.mark.fuse
def test_a_pool_too_small_for_its_base_is_not_made_and_the_error_says_full(api) -> None:
    with pytest.raises(errors.DataSpaceError):
        api.create_pool("p", size=BLOCK, base_size=256 * MIB, min_free=0.0)
    assert api.pools() == []


def test_unmounting_in_a_full_pool_that_queues_does_not_wait(api, tmp_path):
    """What the last unmount tidies up it leaves alone then."""
    directory = tmp_path / "mnt"
    directory.mkdir()
    api.create_pool("p", size=96 * MIB, base_size=512 * MIB, min_free=0.0, when_full="queue")
    api.snapshot("p/base", "p/c", mount=directory)
    with (directory / "file").open("wb") as file:
        file.write(os.urandom(4 * MIB))
        os.fsync(file.fileno())
    api.create("p/v", size=128 * MIB)
    free = (api.status("p").data.total - api.status("p").data.used) // BLOCK
    with api.open("p/v", writable=True) as handle:
        for block in range(free - 4):
            handle.write(block * BLOCK, block_content(block))
        handle.flush()
        begun = time.monotonic()
        api.umount("p/c")
        assert time.monotonic() - begun < 10
    assert api.status("p").mode == "rw"
    api.remove(["p/v"])
    api.mount("p/c", directory)
    assert (directory / "file").stat().st_size == 4 * MIB
    api.umount("p/c")
