"""The client against a real kernel: devices come, change, go, and refusals say why."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from thinpool import errors
from thinpool.dm import (
    UUID_PREFIX,
    DeviceEvents,
    DeviceMapper,
    DeviceMonitor,
    ErrorTarget,
    FlakeyTarget,
    LinearTarget,
    OtherTarget,
    ThinPool,
    ThinPoolMode,
    ThinPoolTarget,
    ThinTarget,
    UdevMode,
    ZeroTarget,
    device_mapper,
    device_text,
    nodes,
    udev,
)
from thinpool.host import loop

pytestmark = [pytest.mark.dm, pytest.mark.loop]

SECTOR = 512
BLOCK = 128
DATA_SECTORS = 16 * BLOCK
THIN_SECTORS = 64 * BLOCK


@pytest.fixture
def dm():
    with DeviceMapper() as client:
        yield client


@pytest.fixture
def disk(tmp_path):
    """Makes block devices of so many sectors, all zeros."""
    attached = []

    def make(sectors):
        path = tmp_path / f"disk{len(attached)}"
        with path.open("wb") as file:
            file.truncate(sectors * SECTOR)
        attached.append(loop.attach(path, direct_io=False))  # tests run on any filesystem
        return attached[-1].path

    yield make
    for device in attached:
        loop.detach(device)


@pytest.fixture
def prefix(dm, disk):  # the disks go after the devices that stand on them
    """What the names of a test's devices begin with; those that it leaves are removed."""
    value = f"tpt-{secrets.token_hex(4)}-"
    yield value
    # Newest first: what is on top goes before what it stands on.
    for entry in sorted(dm.devices(name_prefix=value), key=lambda entry: -entry.number):
        with contextlib.suppress(errors.NotFoundError):
            if dm.info(entry.name).suspended:
                dm.resume(entry.name)
        dm.remove(entry.name)
    left = [entry.name for entry in Path(nodes.DIRECTORY).iterdir()]
    assert not [name for name in left if name.startswith(value)]


class Pool:
    """A pool of a test and its two disks."""

    def __init__(self, dm, prefix, disk, **changes):
        self.dm, self.name = dm, f"{prefix}pool"
        self.target = ThinPoolTarget(
            **{
                "length": DATA_SECTORS,
                "metadata": disk(4096),
                "data": disk(DATA_SECTORS),
                "block_sectors": BLOCK,
                **changes,
            }
        )
        self.info = dm.activate(self.name, [self.target], uuid=f"{UUID_PREFIX}{self.name}")
        self.pool = ThinPool(dm, self.name)

    def thin(self, number, **changes):
        return ThinTarget(
            **{"length": THIN_SECTORS, "pool": self.info.path, "id": number, **changes}
        )


@pytest.fixture
def pool(dm, prefix, disk):
    return Pool(dm, prefix, disk)


@contextlib.contextmanager
def child_holding(path, *, flags="os.O_RDONLY"):
    """A process that has a device open."""
    opening = f"import os, sys; fd = os.open({path!r}, {flags})"
    code = f"{opening}; print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-P", "-S", "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout.readline() == "held\n"
        yield child


def write(path, data, offset=0):
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- the kernel -------------------------------------------------------------------------


def test_the_version_and_the_targets_are_told(dm):
    assert dm.version >= (4, 0, 0)
    assert dm.target_version("thin-pool") >= (1, 0, 0)
    assert dm.target_version("no-such-target") is None
    assert dm.target_versions()["thin"] == dm.target_version("thin")
    assert device_mapper() is None


def test_a_closed_client_says_so():
    client = DeviceMapper()
    client.close()
    client.close()
    with pytest.raises(errors.ClosedError):
        client.devices()


def test_an_ordinary_user_is_refused_and_told_what_it_takes(dm):
    os.seteuid(65534)
    try:
        with pytest.raises(errors.NotPermittedError, match="root") as caught:
            DeviceMapper()
    finally:
        os.seteuid(0)
    assert caught.value.operation == "device-mapper"


# ---- devices ----------------------------------------------------------------------------


def test_a_device_is_there_when_activate_returns(dm, prefix, disk):
    below = disk(64)
    write(below, b"content", 16 * SECTOR)
    info = dm.activate(
        f"{prefix}a",
        [LinearTarget(length=8, device=below, offset=16), ZeroTarget(start=8, length=8)],
        uuid=f"{UUID_PREFIX}{prefix}a",
    )
    assert info.path == f"/dev/mapper/{prefix}a"
    assert os.stat(info.path).st_rdev == info.number
    assert (info.live, info.suspended, info.target_count) == (True, False, 2)
    with open(info.path, "rb") as file:
        assert file.read() == b"content".ljust(16 * SECTOR, b"\0")
    assert dm.deps(info.name) == (os.stat(below).st_rdev,)
    number = device_text(os.stat(below).st_rdev)
    assert dm.table(info.name) == (
        LinearTarget(length=8, device=number, offset=16),
        ZeroTarget(start=8, length=8),
    )
    assert dm.remove(info.name)
    assert dm.find(info.name) is None
    assert not os.path.lexists(info.path)


EVERY_MODE = pytest.mark.parametrize(
    "mode",
    [
        UdevMode.NONE,
        pytest.param(UdevMode.COOKIES, marks=pytest.mark.udev),
        pytest.param(UdevMode.EVENTS, marks=pytest.mark.udev),
    ],
)


@EVERY_MODE
def test_every_way_of_waiting_gives_a_node_and_leaves_none(prefix, mode):
    with DeviceMapper(udev_mode=mode) as dm:
        for _ in range(5):  # the number is the same each time, and udevd still busy with the last
            info = dm.activate(f"{prefix}a", [ZeroTarget(length=8)], uuid=f"{UUID_PREFIX}{prefix}")
            assert os.stat(info.path).st_rdev == info.number
            renamed = dm.rename(info.name, f"{prefix}b")
            assert os.stat(renamed.path).st_rdev == info.number
            assert not os.path.lexists(info.path)
            dm.remove(renamed.name)
            assert not os.path.lexists(renamed.path)


@EVERY_MODE
def test_threads_do_not_disturb_each_other(prefix, mode):
    def cycles(number):
        for _ in range(3):
            name = f"{prefix}{number}"
            info = dm.activate(name, [ZeroTarget(length=8 * number)], uuid=f"{UUID_PREFIX}{name}")
            assert os.stat(info.path).st_rdev == info.number
            with open(info.path, "rb") as file:
                assert len(file.read()) == 8 * number * SECTOR
            dm.remove(name, timeout=30)
            assert not os.path.lexists(info.path)

    with DeviceMapper(udev_mode=mode) as dm, ThreadPoolExecutor(4) as threads:
        list(threads.map(cycles, range(1, 5)))


def test_a_stale_node_is_replaced(dm, prefix):
    path = nodes.path_of(f"{prefix}a")
    os.mknod(path, 0o600 | 0o060000, os.makedev(253, 4242))
    info = dm.activate(f"{prefix}a", [ZeroTarget(length=8)])
    assert os.stat(path).st_rdev == info.number


def test_names_and_uuids_are_unique(dm, prefix):
    dm.create(f"{prefix}a", uuid=f"{prefix}u")
    with pytest.raises(errors.AlreadyExistsError, match="name") as caught:
        dm.create(f"{prefix}a")
    assert caught.value.existing == f"{prefix}a"
    assert (caught.value.command, caught.value.device) == ("DEV_CREATE", f"{prefix}a")
    with pytest.raises(errors.AlreadyExistsError, match="uuid") as caught:
        dm.create(f"{prefix}b", uuid=f"{prefix}u")
    assert caught.value.existing == f"{prefix}a"
    dm.create(f"{prefix}c")
    with pytest.raises(errors.AlreadyExistsError) as caught:
        dm.rename(f"{prefix}c", f"{prefix}a")
    assert caught.value.existing == f"{prefix}a"


def test_a_uuid_is_given_once(dm, prefix):
    dm.create(f"{prefix}a")
    assert dm.set_uuid(f"{prefix}a", f"{prefix}u").uuid == f"{prefix}u"
    with pytest.raises(errors.DeviceMapperError) as caught:
        dm.set_uuid(f"{prefix}a", f"{prefix}v")
    assert caught.value.command == "DEV_RENAME"
    assert dm.info(f"{prefix}a").uuid == f"{prefix}u"


def test_a_minor_number_may_be_asked_for(dm, prefix):
    info = dm.create(f"{prefix}a", minor=4321)
    assert os.minor(info.number) == 4321
    with pytest.raises(errors.BusyError, match="4321"):
        dm.create(f"{prefix}b", minor=4321)


def test_what_is_not_there_is_not_found(dm, prefix):
    name = f"{prefix}none"
    for act in (
        dm.info, dm.resume, dm.suspend, dm.clear, dm.table, dm.status, dm.deps, dm.remove,
        dm.cancel_deferred_remove,
        lambda name: dm.rename(name, f"{prefix}x"),
        lambda name: dm.load(name, [ZeroTarget(length=8)]),
        lambda name: dm.wait_event(name, 0, timeout=1),
    ):  # fmt: skip
        with pytest.raises(errors.NotFoundError, match=name) as caught:
            act(name)
        assert caught.value.device == name
        assert caught.value.errno


def test_many_devices_and_long_tables_are_listed_whole(dm, prefix):
    names = [f"{prefix}{number:03}-".ljust(120, "x") for number in range(60)]
    for name in names:
        dm.create(name, uuid=name)
    assert sorted(entry.name for entry in dm.devices(name_prefix=prefix)) == names
    assert {entry.uuid for entry in dm.devices(uuid_prefix=prefix)} == set(names)
    assert len(dm.devices(uuid_prefix=f"{prefix}01")) == 10
    table = [ZeroTarget(start=8 * number, length=8) for number in range(300)]
    dm.load(names[0], table)
    assert dm.table(names[0], inactive=True) == tuple(table)
    assert dm.table(names[0]) == ()
    dm.resume(names[0])
    assert dm.table(names[0]) == tuple(table)


def test_a_cleared_table_is_gone(dm, prefix):
    dm.activate(f"{prefix}a", [ZeroTarget(length=8)])
    assert dm.load(f"{prefix}a", [ErrorTarget(length=8)]).inactive
    assert not dm.clear(f"{prefix}a").inactive
    dm.resume(f"{prefix}a")
    assert dm.table(f"{prefix}a") == (ZeroTarget(length=8),)


def test_io_waits_while_a_device_is_suspended(dm, prefix):
    info = dm.activate(f"{prefix}a", [ZeroTarget(length=8)])
    done = threading.Event()

    def read():
        with open(info.path, "rb") as file:
            file.read(512)
        done.set()

    reader = threading.Thread(target=read)
    with dm.suspended(info.name) as state:
        assert state.suspended
        reader.start()
        assert not done.wait(0.3)
    reader.join(10)
    assert done.is_set()
    assert not dm.info(info.name).suspended


def test_a_read_only_device_takes_no_writes(dm, prefix):
    info = dm.activate(f"{prefix}a", [ZeroTarget(length=8)], read_only=True)
    assert info.read_only
    with pytest.raises(PermissionError):
        write(info.path, b"x")


def test_reload_changes_a_live_device(dm, prefix):
    dm.activate(f"{prefix}a", [ZeroTarget(length=8)])
    info = dm.reload(f"{prefix}a", [ErrorTarget(length=16)])
    assert (info.live, info.suspended) == (True, False)
    assert dm.table(f"{prefix}a") == (ErrorTarget(length=16),)


# ---- refused tables ---------------------------------------------------------------------


def refused(dm, prefix, target, kind, match):
    """Activation fails so, and leaves nothing."""
    with pytest.raises(kind, match=match) as caught:
        dm.activate(f"{prefix}refused", [target])
    error = caught.value
    assert (error.command, error.device) == ("TABLE_LOAD", f"{prefix}refused")
    assert error.errno
    assert dm.find(f"{prefix}refused") is None
    return error


def test_a_table_that_the_kernel_refuses_is_explained_by_its_log(dm, prefix, disk):
    target = OtherTarget(length=8, type_name="linear", words=(disk(64), "no-number"))
    error = refused(dm, prefix, target, errors.DeviceMapperError, "the kernel's log says")
    assert any("linear" in line for line in error.log)


def test_a_missing_target_is_named(dm, prefix):
    target = OtherTarget(length=8, type_name="no-such")
    error = refused(dm, prefix, target, errors.UnsupportedHostError, "load the module dm-no-such")
    assert error.missing == "no-such target"


def test_missing_devices_are_named(dm, prefix, tmp_path):
    gone = LinearTarget(length=8, device="/dev/no-such-device")
    refused(dm, prefix, gone, errors.NotFoundError, "/dev/no-such-device")
    refused(dm, prefix, LinearTarget(length=8, device="259:4242"), errors.NotFoundError, "259:4242")
    file = tmp_path / "file"
    file.touch()
    target = LinearTarget(length=8, device=str(file))
    refused(dm, prefix, target, errors.UsageError, "no block device")


def test_a_metadata_device_that_another_pool_has_is_said(dm, prefix, pool):
    error = refused(dm, prefix, pool.target, errors.BusyError, f"the pool {pool.name} has")
    assert error.holder == f"the pool {pool.name}"


def test_a_device_that_a_process_holds_is_said_with_the_process(dm, prefix, disk):
    path = disk(64)
    with child_holding(path, flags="os.O_RDWR | os.O_EXCL") as child:
        target = LinearTarget(length=8, device=path)
        error = refused(dm, prefix, target, errors.BusyError, f"process {child.pid}")
        assert str(child.pid) in error.holder


def test_metadata_that_is_none_is_said(dm, prefix, disk):
    junk, data = disk(4096), disk(DATA_SECTORS)
    write(junk, b"\xa5" * 4096)
    target = ThinPoolTarget(length=DATA_SECTORS, metadata=junk, data=data, block_sectors=BLOCK)
    error = refused(dm, prefix, target, errors.CorruptMetadataError, junk)
    assert error.log
    empty = disk(4096)
    target = ThinPoolTarget(
        length=DATA_SECTORS, metadata=empty, data=data, block_sectors=BLOCK, read_only=True
    )
    refused(dm, prefix, target, errors.NotFoundError, "holds no pool")


def test_a_thin_device_that_is_not_there_is_said(dm, prefix, pool):
    refused(dm, prefix, pool.thin(9), errors.NotFoundError, "no thin device 9")


def test_a_pool_that_would_shrink_goes_on_as_it_was(dm, pool):
    smaller = ThinPoolTarget(
        length=DATA_SECTORS // 2, metadata=pool.target.metadata, data=pool.target.data,
        block_sectors=BLOCK,
    )  # fmt: skip
    before = dm.table(pool.name)
    with pytest.raises(errors.DeviceMapperError, match="too small") as caught:
        dm.reload(pool.name, [smaller])
    assert caught.value.command == "DEV_SUSPEND"
    assert dm.table(pool.name) == before
    assert not dm.info(pool.name).suspended
    pool.pool.create_thin(1)


# ---- pools ------------------------------------------------------------------------------


def test_messages_do_what_they_say(dm, prefix, pool):
    thin = pool.pool
    thin.create_thin(1)
    info = dm.activate(f"{prefix}1", [pool.thin(1)])
    write(info.path, b"x" * BLOCK * SECTOR)
    assert thin.thin_status(info.name).mapped_sectors == BLOCK
    with dm.suspended(info.name):
        thin.create_snap(2, origin=1)
    snapshot = dm.activate(f"{prefix}2", [pool.thin(2)])
    with open(snapshot.path, "rb") as file:
        assert file.read(BLOCK * SECTOR + 1) == b"x" * BLOCK * SECTOR + b"\0"
    assert thin.status(noflush=False).used_data_blocks == 1
    thin.set_transaction_id(0, 7)
    held = thin.reserve_metadata_snap()
    assert thin.status().held_root == held
    assert thin.status().transaction_id == 7
    thin.release_metadata_snap()
    assert thin.status().held_root is None
    dm.remove(snapshot.name)
    thin.delete(2)
    with pytest.raises(errors.NotFoundError):
        dm.activate(f"{prefix}2", [pool.thin(2)])


def test_refused_messages_are_typed(dm, prefix, pool):
    thin = pool.pool
    thin.create_thin(1)
    dm.activate(f"{prefix}1", [pool.thin(1)])
    for act, kind, attribute, value in (
        (lambda: thin.create_thin(1), errors.AlreadyExistsError, "existing", 1),
        (lambda: thin.create_snap(1, origin=1), errors.AlreadyExistsError, "existing", 1),
        (lambda: thin.create_snap(2, origin=9), errors.NotFoundError, "errno", 61),
        (lambda: thin.delete(9), errors.NotFoundError, "errno", 61),
        (lambda: thin.delete(1), errors.BusyError, "errno", 16),
        (lambda: thin.set_transaction_id(3, 4), errors.TransactionIdError, "found", 0),
        (thin.release_metadata_snap, errors.NotFoundError, "errno", 22),
        (lambda: dm.message(pool.name, "nonsense"), errors.DeviceMapperError, "errno", 22),
    ):
        with pytest.raises(kind, match=pool.name) as caught:
            act()
        assert getattr(caught.value, attribute) == value
        assert (caught.value.command, caught.value.device) == ("TARGET_MSG", pool.name)
    thin.reserve_metadata_snap()
    with pytest.raises(errors.BusyError, match="release it first"):
        thin.reserve_metadata_snap()
    for act in (lambda: thin.create_thin(1 << 24), lambda: thin.delete(-1)):
        with pytest.raises(errors.UsageError):
            act()


def test_device_mapper_itself_answers_messages(dm, prefix):
    dm.activate(f"{prefix}a", [ZeroTarget(length=8)])
    assert dm.message(f"{prefix}a", "@stats_create - 8") == "0"
    assert dm.message(f"{prefix}a", "@stats_list").startswith("0: 0+8")


def test_modes_and_features_are_seen(dm, prefix, pool):
    pool.pool.create_thin(1)
    plain = pool.pool.status()
    assert (plain.mode, plain.needs_check, plain.error_if_no_space) == (
        ThinPoolMode.RW, False, False
    )  # fmt: skip
    changed = ThinPoolTarget(
        length=DATA_SECTORS, metadata=pool.target.metadata, data=pool.target.data,
        block_sectors=BLOCK, skip_block_zeroing=True, error_if_no_space=True,
        no_discard_passdown=True,
    )  # fmt: skip
    dm.reload(pool.name, [changed])
    assert dm.table(pool.name)[0].features() == changed.features()
    assert pool.pool.status().error_if_no_space is True
    assert pool.pool.status().discard.value == "no_discard_passdown"
    info = dm.activate(f"{prefix}1", [pool.thin(1)])
    with pytest.raises(OSError, match=r"No space|Input/output"):  # write or fsync
        write(info.path, bytes((DATA_SECTORS + BLOCK) * SECTOR))
    assert pool.pool.status(noflush=False).mode is ThinPoolMode.OUT_OF_DATA_SPACE
    dm.remove(info.name)
    dm.reload(pool.name, [OtherTarget(
        length=DATA_SECTORS, type_name="thin-pool",
        words=(pool.target.metadata, pool.target.data, str(BLOCK), "0", "1", "read_only"),
    )])  # fmt: skip
    assert pool.pool.status().mode is ThinPoolMode.RO
    with pytest.raises(errors.ReadOnlyError, match=pool.name):
        pool.pool.create_thin(2)


def test_a_message_whose_commit_failed_is_no_success(dm, prefix, disk, require):
    """The kernel answers 0 there."""
    if dm.target_version("flakey") is None:
        pytest.skip("the kernel has no flakey target")
    below = disk(4096)
    name = f"{prefix}0-metadata"
    metadata = dm.activate(name, [LinearTarget(length=4096, device=below)])
    pool = Pool(dm, prefix, disk, metadata=metadata.path)
    pool.pool.create_thin(1)
    failing = FlakeyTarget(
        length=4096, device=below, up_seconds=0, down_seconds=3600, features=("error_writes",)
    )
    dm.reload(name, [failing], noflush=True, skip_lockfs=True)
    with pytest.raises((errors.NeedsCheckError, errors.PoolFailedError), match=pool.name):
        pool.pool.create_thin(2)
    with pytest.raises((errors.NeedsCheckError, errors.PoolFailedError, errors.ReadOnlyError)):
        pool.pool.create_thin(3)
    dm.remove(pool.name)
    dm.remove(name)


def test_a_pool_that_gave_up_says_so(dm, prefix, disk):
    below = disk(4096)
    name = f"{prefix}0-metadata"
    metadata = dm.activate(name, [LinearTarget(length=4096, device=below)])
    pool = Pool(dm, prefix, disk, metadata=metadata.path)
    pool.pool.create_thin(1)
    thin = dm.activate(f"{prefix}1", [pool.thin(1)])
    dm.reload(name, [ErrorTarget(length=4096)], noflush=True, skip_lockfs=True)
    with pytest.raises(errors.PoolFailedError, match=pool.name):
        pool.pool.create_thin(2)
    with pytest.raises(errors.PoolFailedError, match="check the metadata"):
        pool.pool.status()
    with pytest.raises(errors.PoolFailedError):
        pool.pool.thin_status(thin.name)
    for each in (thin.name, pool.name, name):
        dm.remove(each)


# ---- removal ----------------------------------------------------------------------------


def test_removal_waits_for_who_looks_for_a_moment(dm, prefix):
    info = dm.activate(f"{prefix}a", [ZeroTarget(length=8)])
    fd = os.open(info.path, os.O_RDONLY)
    threading.Timer(0.2, os.close, [fd]).start()
    assert dm.remove(info.name, timeout=30)
    assert dm.find(info.name) is None


def test_a_device_in_use_is_busy_with_its_holder(dm, prefix):
    info = dm.activate(f"{prefix}a", [ZeroTarget(length=8)])
    with child_holding(info.path) as child:
        with pytest.raises(errors.BusyError, match=info.name) as caught:
            dm.remove(info.name, timeout=0.1)
        assert f"process {child.pid}" in caught.value.holder
        assert caught.value.command == "DEV_REMOVE"
    assert dm.remove(info.name)


def test_a_device_below_another_or_mounted_is_busy_at_once(dm, prefix, require, disk, tmp_path):
    require("ext4")
    below = dm.activate(f"{prefix}a", [LinearTarget(length=16384, device=disk(16384))])
    dm.activate(f"{prefix}b", [LinearTarget(length=16384, device=below.path)])
    began = time.monotonic()
    with pytest.raises(errors.BusyError, match="used by the device /dev/dm-"):
        dm.remove(below.name, timeout=60)
    subprocess.run(["mkfs.ext4", "-q", nodes.path_of(f"{prefix}b")], check=True)
    subprocess.run(["mount", nodes.path_of(f"{prefix}b"), str(tmp_path)], check=True)
    try:
        with pytest.raises(errors.BusyError, match=f"mounted on {tmp_path}"):
            dm.remove(f"{prefix}b", timeout=60)
        assert time.monotonic() - began < 30
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_deferred_removal_and_its_cancelling(dm, prefix):
    info = dm.activate(f"{prefix}a", [ZeroTarget(length=8)])
    fd = os.open(info.path, os.O_RDONLY)
    try:
        assert dm.remove(info.name, deferred=True) is False
        assert dm.info(info.name).deferred_remove
        dm.cancel_deferred_remove(info.name)
        assert not dm.info(info.name).deferred_remove
        assert os.stat(info.path).st_rdev == info.number
        assert dm.remove(info.name, deferred=True) is False
    finally:
        os.close(fd)
    deadline = time.monotonic() + 10
    while dm.find(info.name) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    idle = dm.activate(f"{prefix}b", [ZeroTarget(length=8)])
    assert dm.remove(idle.name, deferred=True) is True


# ---- events -----------------------------------------------------------------------------


def test_crossing_low_water_ends_a_wait(dm, prefix, disk):
    pool = Pool(dm, prefix, disk, low_water_blocks=4)
    pool.pool.create_thin(1)
    info = dm.activate(f"{prefix}1", [pool.thin(1)])
    number = dm.info(pool.name).event_nr
    seen = []
    with DeviceEvents() as events:
        waiter = threading.Thread(
            target=lambda: seen.append(events.wait(pool.name, number, timeout=60))
        )
        waiter.start()
        write(info.path, bytes(11 * BLOCK * SECTOR))
        assert dm.wait_event(pool.name, number, timeout=0.2) is None
        write(info.path, bytes(3 * BLOCK * SECTOR), offset=11 * BLOCK * SECTOR)
        waiter.join(60)
    assert seen == [dm.info(pool.name).event_nr]
    assert seen[0] != number


def test_a_wait_is_cancelled_from_another_thread(dm, prefix):
    info = dm.activate(f"{prefix}a", [ZeroTarget(length=8)])
    with DeviceEvents() as events:
        threading.Timer(0.1, events.cancel).start()
        with pytest.raises(errors.InterruptedError_):
            events.wait(info.name, info.event_nr, timeout=60)
        assert events.wait(info.name, info.event_nr, timeout=0.05) is None
        events.cancel()
        with pytest.raises(errors.InterruptedError_):
            events.wait(info.name, info.event_nr, timeout=60)


def test_a_device_that_ends_ends_the_wait(dm, prefix):
    info = dm.activate(f"{prefix}a", [ZeroTarget(length=8)])
    with DeviceEvents() as events:
        remover = threading.Timer(0.1, dm.remove, [info.name])
        remover.start()
        with pytest.raises(errors.NotFoundError, match=info.name):
            events.wait(info.name, info.event_nr, timeout=60)
        remover.join()  # the device's node goes after the device


def test_events_of_the_kernel_are_heard(dm, prefix):
    with DeviceMonitor("kernel") as monitor:
        info = dm.activate(f"{prefix}a", [ZeroTarget(length=8)])
        seen = []
        while "change" not in seen:
            event = monitor.next_event(30)
            assert event is not None
            if event.number == info.number:
                seen.append(event.action)
    assert seen[-1] == "change"


@pytest.mark.udev
def test_nobody_probes_a_guests_device(prefix, disk, require):
    """With cookies alone, whose flags udevd keeps; and with our rules, whoever raises the event."""
    require("ext4")
    udevadm = shutil.which("udevadm")

    def properties(dm):
        name = f"{prefix}a"
        target = LinearTarget(length=16384, device=disk(16384))
        info = dm.activate(name, [target], uuid=f"{UUID_PREFIX}{name}")
        subprocess.run(["mkfs.ext4", "-q", "-L", "guest", info.path], check=True)
        for arguments in (["trigger", "--action=change", f"/dev/dm-{os.minor(info.number)}"],
                          ["settle"]):  # fmt: skip
            subprocess.run([udevadm, *arguments], check=True)
        said = subprocess.run(
            [udevadm, "info", "-q", "property", info.path],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        dm.remove(name)
        return dict(line.split("=", 1) for line in said.splitlines())

    rules = Path("/run/udev/rules.d") / udev.OWN_RULES
    rules.unlink(missing_ok=True)
    subprocess.run([udevadm, "control", "--reload"], check=True)
    with DeviceMapper(udev_mode=UdevMode.COOKIES) as dm:
        found = properties(dm)
    assert not rules.exists()
    assert found["DM_UDEV_DISABLE_OTHER_RULES_FLAG"] == "1"
    assert not [key for key in found if key.startswith("ID_FS")]
    assert not Path("/dev/disk/by-label/guest").exists()
    with DeviceMapper() as dm:
        found = properties(dm)
        assert dm.udev_mode is UdevMode.EVENTS
    assert rules.exists()
    assert found["UDISKS_IGNORE"] == "1"
    assert found["DEVLINKS"] == f"/dev/mapper/{prefix}a"
    assert not [key for key in found if key.startswith("ID_FS")]
    with DeviceMapper(udev_mode=UdevMode.NONE) as dm:  # no flags of ours with the event
        found = properties(dm)
    assert found["DM_UDEV_DISABLE_OTHER_RULES_FLAG"] == "1"
    assert not [key for key in found if key.startswith("ID_FS")]
