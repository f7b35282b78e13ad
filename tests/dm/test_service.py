"""What a pool of the kernel's does beyond a single change: space, users, reboots, origins."""

import contextlib
import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.dm.kit import (
    assert_agrees,
    assert_nothing_left,
    dm_devices,
    loops,
    make_pool,
    opened,
)
from tests.store.pools import BLOCK, MIB
from thinpool import errors
from thinpool.dm import names
from thinpool.dm.client import DeviceMapper
from thinpool.dm.engine import DmPool
from thinpool.engine import Change, ChangeKind, PoolMode
from thinpool.host import loop
from thinpool.store.opening import open_dm_pool, open_pool
from thinpool.store.poolfile import read_config, write_config
from thinpool.store.service import PoolService

pytestmark = [pytest.mark.dm, pytest.mark.loop]


def eventually(holds, seconds=60):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


@pytest.fixture
def config(tmp_path):
    found = make_pool(tmp_path)
    yield found
    assert_nothing_left(found)


# ---- space --------------------------------------------------------------------------------------


def test_pool_grows_when_the_kernel_says_low_water(tmp_path, monkeypatch):
    config = make_pool(
        tmp_path, data_blocks=32, autoextend_threshold=50.0, autoextend_percent=100.0
    )
    # The round of every second is not what grows it.
    monkeypatch.setattr("thinpool.store.service._REST_S", 3600.0)
    with opened(tmp_path) as service:
        service.create("a", size=4 * MIB)
        device = service.activate("a").device
        with Path(device).open("r+b", buffering=0) as disk:
            disk.write(os.urandom(17 * BLOCK))
            os.fsync(disk.fileno())
        eventually(lambda: service.status().data.total >= 64 * BLOCK)
        assert Path(config.data).stat().st_size >= 64 * BLOCK
        service.deactivate("a")
        assert_agrees(service)


def test_write_that_waits_for_space_goes_on_when_the_pool_grows(tmp_path):
    make_pool(tmp_path, data_blocks=16)
    with opened(tmp_path) as service:
        service.create("a", size=4 * MIB)
        device = service.activate("a").device
        contents = os.urandom(24 * BLOCK)

        def write():
            descriptor = os.open(device, os.O_WRONLY)
            try:
                os.write(descriptor, contents)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

        writer = threading.Thread(target=write)
        writer.start()
        eventually(lambda: service.status().mode == "out_of_data_space")
        with pytest.raises(errors.DataSpaceError):
            service.create("b", size=MIB)
        service.extend(data_size=64 * BLOCK, metadata_size=4 * MIB)
        writer.join(60)
        assert not writer.is_alive()
        status = service.status()
        assert (status.mode, status.data.total) == ("rw", 64 * BLOCK)
        assert status.metadata.total == 4 * MIB
        with service.raw("a", writable=False) as volume:
            assert volume.read(0, len(contents)) == contents
        service.deactivate("a")
        assert_agrees(service)


def test_settings_reach_the_kernel(config, tmp_path):
    with opened(tmp_path) as service, DeviceMapper() as mapper:
        (target,) = mapper.table(names.pool_name(config.uuid))
        assert not target.error_if_no_space
        service.configure({"when_full": "error", "low_water": 3 * BLOCK})
        (target,) = mapper.table(names.pool_name(config.uuid))
        assert target.error_if_no_space
        assert target.low_water_blocks == 3


# ---- users --------------------------------------------------------------------------------------


def test_device_in_use_goes_when_its_last_user_does(config, tmp_path):
    with opened(tmp_path) as service:
        service.create("a", size=MIB)
        device = service.activate("a").device
        with Path(device).open("rb"):
            with pytest.raises(errors.BusyError) as caught:
                service.deactivate("a")
            assert str(os.getpid()) in caught.value.holder
            assert service.deactivate("a", deferred=True).device == device
            # It is wanted again: it stays, and so does who has it open.
            assert service.activate("a").already_active
            service.deactivate("a", deferred=True)
        eventually(lambda: not Path(device).is_symlink())
        assert service.get("a").device is None
        assert_agrees(service)


def test_device_that_went_is_made_anew_when_it_is_wanted_again(config, tmp_path, monkeypatch):
    monkeypatch.setattr("thinpool.store.service._REST_S", 3600.0)  # nobody has noticed
    with opened(tmp_path) as service:
        service.create("a", size=MIB)
        with Path(service.activate("a").device).open("rb"):
            service.deactivate("a", deferred=True)
        again = service.activate("a")
        assert not again.already_active
        assert Path(again.device).is_block_device()
        assert_agrees(service)
        service.deactivate("a")


def test_removed_while_in_use_has_no_name_at_once_and_goes_later(config, tmp_path):
    with opened(tmp_path) as service:
        service.create("a", size=MIB)
        device = service.activate("a").device
        with Path(device).open("r+b") as disk:
            disk.write(b"still here")
            disk.flush()
            removal = service.remove(["a"], deferred=True)
            assert [each.name for each in removal.removed] == ["a"]
            assert service.volumes() == []
            service.create("a", size=2 * MIB)  # the name is free
            disk.seek(0)
            assert disk.read(10) == b"still here"
        eventually(lambda: len(list(service._pool.volumes())) == 1)
        assert_agrees(service)


def test_deferred_removal_is_finished_by_the_next_server(config, tmp_path):
    with contextlib.ExitStack() as user:
        with opened(tmp_path) as service:
            service.create("a", size=MIB)
            user.enter_context(Path(service.activate("a").device).open("rb"))
            service.remove(["a"], deferred=True)
            assert service.busy
        assert dm_devices(config)
    with opened(tmp_path) as service:
        eventually(lambda: not list(service._pool.volumes()))
        assert_agrees(service)


# ---- reboots ------------------------------------------------------------------------------------


def test_what_persists_is_active_again_after_a_reboot(config, tmp_path):
    with opened(tmp_path) as service:
        for name in ("a", "b", "c"):
            service.create(name, size=MIB)
        service.activate("a", persist=True, owner=(7, 8), mode=0o640)
        service.activate("b")
        service.activate("b", persist=True)  # of what is active already
        service.activate("c", persist=True)
        service.deactivate("c")
        # A reboot: the kernel forgets, the disk does not.
        for thin in service._pool.thins():
            service._pool.remove_device(thin.id)
    assert_nothing_left(config)
    with opened(tmp_path) as service:
        assert not any(each.device for each in service.volumes())
        resumed = service.resume()
        assert {each.volume.name for each in resumed.activations} == {"a", "b"}
        assert resumed.failures == ()
        node = Path(service.get("a").device).stat()
        assert (node.st_uid, node.st_gid, node.st_mode & 0o777) == (7, 8, 0o640)
        assert all(each.already_active for each in service.resume().activations)
        assert_agrees(service)
        service.deactivate("a")
        service.deactivate("b")
        assert service.resume().activations == ()


# ---- external origins ---------------------------------------------------------------------------


def test_volume_over_an_external_origin_and_its_snapshots_read_it(config, tmp_path):
    image = tmp_path / "origin"
    contents = os.urandom(3 * BLOCK)
    image.write_bytes(contents)
    origin = loop.attach(image, direct_io=False)
    try:
        with opened(tmp_path) as service:
            labels = {"external-origin": origin.path}
            service.create("a", size=4 * BLOCK, labels=labels)
            with service.raw("a", writable=True) as volume:
                assert volume.read(0, 4 * BLOCK) == contents + bytes(BLOCK)
                volume.write(BLOCK + 5, b"written")
                volume.zero(2 * BLOCK, BLOCK)
            service.snapshot("a", "s")
            wanted = bytearray(contents[: 2 * BLOCK] + bytes(2 * BLOCK))
            wanted[BLOCK + 5 : BLOCK + 12] = b"written"
            for name in ("a", "s"):
                with Path(service.activate(name).device).open("rb") as disk:
                    assert disk.read() == wanted
                service.deactivate(name)
            assert image.read_bytes() == contents
    finally:
        loop.detach(origin)


def test_external_origin_that_is_gone_is_named(config, tmp_path):
    with opened(tmp_path) as service:
        service.create("a", size=MIB, labels={"external-origin": "/dev/no-such-disk"})
        with pytest.raises(errors.NotFoundError, match="/dev/no-such-disk"):
            service.activate("a")
        assert_agrees(service)


# ---- the other engine ---------------------------------------------------------------------------


def test_pool_goes_from_engine_to_engine_with_its_names(tmp_path):
    config = make_pool(tmp_path)
    with opened(tmp_path) as service:
        service.create("a", size=MIB)
        with service.raw("a", writable=True) as volume:
            volume.write(0, b"by the kernel")
    write_config(tmp_path, config.changed(engine="user"))
    with open_pool(config, exclusive=True) as found:
        service = PoolService(
            tmp_path, config, found.pool, metadata=found.metadata, data=found.data
        )
        service.start()
        try:
            with service.raw("a", writable=True) as volume:
                assert volume.read(0, 13) == b"by the kernel"
                volume.write(0, b"by the user's")
                volume.flush()
            service.snapshot("a", "s")
        finally:
            service.close()
    write_config(tmp_path, config)
    with opened(tmp_path) as service:
        assert {each.name for each in service.volumes()} == {"a", "s"}
        with service.raw("s", writable=False) as volume:
            assert volume.read(0, 13) == b"by the user's"
        assert_agrees(service)
    assert_nothing_left(config)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [-1, 1])
def test_pool_whose_transaction_id_is_another_is_told_of(config, tmp_path, by):
    with opened(tmp_path) as service:
        service.create("a", size=MIB)
        service.create("b", size=MIB)
        number = service._pool.status().transaction_id
        change = Change(kind=ChangeKind.CREATE, id=9)
        with pytest.raises(errors.TransactionIdError) as caught:
            service._pool.apply([change], expected=number + by, new=number + by + 1)
        assert (caught.value.found, caught.value.wanted) == (number, number + by)
        assert caught.value.device == names.pool_name(config.uuid)
        assert "thinpool doctor p" in caught.value.message
        service._pool._pool.set_transaction_id(number, number + by)
    with opened(tmp_path) as service:
        found = {each.subject: each for each in service.doctor()}
        assert "transaction id" in found or by == 1
        assert {each.name for each in service.volumes()} == {"a", "b"}
        service.create("c", size=MIB)
        assert_agrees(service)


@pytest.mark.parametrize("which", ["data", "metadata"])
def test_missing_file_is_named(config, tmp_path, which):
    path = Path(getattr(config, which))
    path.rename(path.with_suffix(".away"))
    try:
        with pytest.raises(errors.NotFoundError) as caught, opened(tmp_path):
            pass
        assert caught.value.path == str(path)
        assert "detach-pool p" in caught.value.message
    finally:
        path.with_suffix(".away").rename(path)
    assert_nothing_left(config)


def test_metadata_that_another_pool_has_is_named_with_the_pool(config, tmp_path):
    with opened(tmp_path) as service:
        service.create("a", size=MIB)
        device = loops(config)[1]
        number = Path(device).stat().st_rdev
        with pytest.raises(errors.BusyError) as caught:
            DmPool.open(device, device, name="q", uuid="another")
        assert device in caught.value.message
        assert os.major(number) == 7
        with pytest.raises(errors.BusyError) as caught:
            DmPool.open(config.metadata, config.data, name="q", uuid="another")
        assert config.metadata in caught.value.message
        assert caught.value.holder
        assert_agrees(service)


def test_file_under_somebody_elses_mount_is_not_taken(config, tmp_path):
    device = loop.attach(config.data)
    where = tmp_path / "mnt"
    where.mkdir()
    subprocess.run(["mkfs.ext4", "-q", device.path], check=True, timeout=120)
    subprocess.run(["mount", device.path, where], check=True, timeout=120)
    try:
        with pytest.raises(errors.BusyError) as caught, opened(tmp_path):
            pass
        assert str(where) in caught.value.holder
        assert config.data in caught.value.message
    finally:
        subprocess.run(["umount", where], check=True, timeout=120)
        loop.detach(device)


def test_metadata_of_zeros_is_never_formatted(config, tmp_path):
    path = Path(config.metadata)
    before = path.read_bytes()
    path.write_bytes(bytes(len(before)))
    with pytest.raises(errors.CorruptMetadataError) as caught, opened(tmp_path):
        pass
    assert caught.value.path == str(path)
    assert path.read_bytes() == bytes(len(before))
    assert_nothing_left(config)


def test_data_that_was_cut_short_is_refused(config, tmp_path):
    os.truncate(config.data, 10 * BLOCK)
    with pytest.raises(errors.CorruptMetadataError, match="cut short") as caught, opened(tmp_path):
        pass
    assert caught.value.path == config.data
    assert_nothing_left(config)


def test_user_without_rights_is_told(config):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            open_dm_pool(config)
        except errors.NotPermittedError as error:
            code = 0 if "/dev/mapper/control" in error.message else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# ---- looking ------------------------------------------------------------------------------------


def test_check_delta_and_exclusive_of_a_pool_in_use_read_a_metadata_snapshot(config, tmp_path):
    from thinpool.store import care  # noqa: PLC0415 - for this alone

    with opened(tmp_path) as service:
        service.create("a", size=MIB)
        service.activate("a")
        node = service.get("a").device
        Path(node).write_bytes(os.urandom(4 * BLOCK))
        service.snapshot("a", "s")
        with Path(node).open("r+b") as disk:
            disk.seek(BLOCK)
            disk.write(os.urandom(BLOCK))
            os.fsync(disk.fileno())
        assert care.check(service).clean
        ranges = [(each.begin, each.length) for each in care.delta(service, "a", "s").ranges]
        assert ranges == [(BLOCK, BLOCK)]
        exclusive = {each.name: each.exclusive for each in service.volumes(exclusive=True)}
        assert exclusive == {"a": BLOCK, "s": BLOCK}
        assert service._pool.status().held_root == 0
        service.deactivate("a")
        assert care.check(service).clean


def test_status_says_what_the_kernel_says(config, tmp_path):
    with opened(tmp_path) as service:
        status = service.status()
        assert (status.engine, status.mode, status.needs_check) == ("dm", "rw", False)
        assert service._pool.status().mode is PoolMode.RW
        assert json.loads(json.dumps(status.to_json()))["data"]["total"] == 256 * BLOCK
    assert read_config(tmp_path, "p").engine == "dm"


def test_many_snapshots_of_an_active_volume_are_of_one_instant(config, tmp_path):
    with opened(tmp_path) as service:
        service.create("a", size=MIB)
        node = service.activate("a").device
        stop = threading.Event()

        def count():
            """Write one number to two places, the first before the second."""
            number = 0
            with Path(node).open("r+b", buffering=0) as disk:
                while not stop.is_set():
                    number += 1
                    for offset in (0, 8 * BLOCK):
                        disk.seek(offset)
                        disk.write(number.to_bytes(512, "little"))
                        os.fsync(disk.fileno())

        writer = threading.Thread(target=count)
        writer.start()
        try:
            targets = [f"s{each}" for each in range(5)]
            service.snapshot_many("a", targets)
        finally:
            stop.set()
            writer.join()
        found = set()
        for name in targets:
            with service.raw(name, writable=False) as volume:
                first = int.from_bytes(volume.read(0, 512), "little")
                second = int.from_bytes(volume.read(8 * BLOCK, 512), "little")
            assert first - second in {0, 1}
            found.add((first, second))
        assert len(found) == 1
        service.deactivate("a")
        assert_agrees(service)
