"""The server dies between any two steps on a pool of the kernel's (INV-24)."""

import subprocess
import time
from pathlib import Path

import pytest

from tests.dm.kit import (
    assert_agrees,
    assert_nothing_left,
    dies,
    dm_devices,
    make_pool,
    opened,
    suspended,
)
from tests.store.pools import BLOCK, MIB
from thinpool.dm import names
from thinpool.store.core import Caller

pytestmark = [pytest.mark.dm, pytest.mark.loop]

CHANGE = ["before-intent", "intent-written", "message-sent", "transaction-set", "applied"]
CHANGE += ["recorded"]
SNAPSHOT = ["origin-suspended", "snapshot-made", "origin-resumed", *CHANGE]
ACTIVATE = ["activation-recorded", "device-created", "table-loaded", "device-resumed"]
ACTIVATE += ["device-linked"]
BEFORE_IT_IS_DONE = {"before-intent", "intent-written", "message-sent", "origin-suspended"}
BEFORE_IT_IS_DONE |= {"snapshot-made", "origin-resumed"}
REQUEST = Caller(request="r1")


@pytest.fixture
def pool(tmp_path):
    """Volumes a, active, and b, a snapshot of it; b is inactive."""
    config = make_pool(tmp_path)
    with opened(tmp_path) as service:
        service.create("a", size=MIB)
        with service.raw("a", writable=True) as volume:
            volume.write(BLOCK - 3, b"contents of a")
        service.snapshot("a", "b")
        service.activate("a")
    yield tmp_path, config
    with opened(tmp_path) as service:
        for each in service.volumes():
            service.deactivate(each.name)
    assert_nothing_left(config)


def run(*command):
    subprocess.run(command, check=True, timeout=120)


def listed(service):
    return {volume.name for volume in service.volumes()}


def assert_a_reads(service, name="a"):
    with service.raw(name, writable=False) as volume:
        assert volume.read(BLOCK - 3, 13) == b"contents of a"


def create(service):
    return service.create("new", size=MIB, caller=REQUEST)


def snapshot_of_active(service):
    return service.snapshot("a", "new", caller=REQUEST)


def snapshot_of_inactive(service):
    return service.snapshot("b", "new", caller=REQUEST)


@pytest.mark.parametrize(
    ("make", "step"),
    [
        *((create, step) for step in CHANGE),
        *((snapshot_of_active, step) for step in SNAPSHOT),
        (snapshot_of_inactive, "message-sent"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_what_was_made_is_there_or_not_and_can_be_asked_for_again(pool, make, step):
    root, config = pool
    dies(root, make, step=step)
    left_suspended = suspended(config)
    assert bool(left_suspended) == (step in {"origin-suspended", "snapshot-made"})
    with opened(root) as service:
        assert_agrees(service)
        assert ("new" in listed(service)) == (step not in BEFORE_IT_IS_DONE)
        assert make(service).name == "new"
        assert listed(service) == {"a", "b", "new"}
        assert_agrees(service)
        assert_a_reads(service)
        if make is not create:
            assert_a_reads(service, "new")


def test_filesystem_under_a_snapshot_that_died_works_again_after_the_start(pool, tmp_path):
    root, _ = pool
    with opened(root) as service:
        device = service.get("a").device
    run("mkfs.ext4", "-q", device)
    where = tmp_path / "mnt"
    where.mkdir()
    run("mount", device, where)
    try:
        (where / "before").write_text("x")
        dies(root, snapshot_of_active, step="snapshot-made")
        with opened(root) as service:
            (where / "after").write_text("y")  # would wait for ever on a frozen one
            volume = snapshot_of_active(service)
            assert volume.consistency == "frozen"
            assert_agrees(service)
    finally:
        run("umount", where)


@pytest.mark.parametrize("step", ["removal-decided", *CHANGE])
def test_removing_takes_all_of_a_set_or_none(pool, step):
    root, _ = pool
    with opened(root) as service:
        service.snapshot("b", "c")
    dies(root, lambda service: service.remove(["b", "c"], caller=REQUEST), step=step)
    with opened(root) as service:
        # The names go in one step; what is left of the devices goes in the background.
        deadline = time.monotonic() + 60
        while service._catalogue.records("deleting") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert_agrees(service)
        assert listed(service) == {"a"}
        service.remove(["b", "c"], caller=REQUEST)
        assert listed(service) == {"a"}
        assert_a_reads(service)


@pytest.mark.parametrize(
    ("first", "second"), [("message-sent", "intent-undone"), ("snapshot-made", "intent-undone")]
)
def test_death_while_mending_is_mended(pool, first, second):
    root, _ = pool
    dies(root, snapshot_of_active, step=first)
    dies(root, lambda _: None, step=second, opening=True)
    with opened(root) as service:
        assert_agrees(service)
        assert listed(service) == {"a", "b"}


def test_death_while_finishing_a_removal_is_mended(pool):
    root, _ = pool
    dies(root, lambda service: service.remove(["b"]), step="message-sent")
    dies(root, lambda _: None, step="intent-finished", opening=True)
    with opened(root) as service:
        assert_agrees(service)
        assert listed(service) == {"a"}


@pytest.mark.parametrize("step", ACTIVATE)
def test_activation_is_whole_or_gone(pool, step):
    root, config = pool
    dies(root, lambda service: service.activate("b"), step=step)
    with opened(root) as service:
        assert_agrees(service)
        whole = step in {"device-resumed", "device-linked"}
        assert (service.get("b").device is not None) == whole
        again = service.activate("b")
        assert again.already_active == whole
        with Path(again.device).open("rb") as device:
            device.seek(BLOCK - 3)
            assert device.read(13) == b"contents of a"
        assert names.volume_name(config.uuid, again.volume.id) in dm_devices(config)
        assert_agrees(service)


@pytest.mark.parametrize("step", ["device-removed", "deactivation-recorded"])
def test_deactivation_is_done_after_the_start(pool, step):
    root, _ = pool
    dies(root, lambda service: service.deactivate("a"), step=step)
    with opened(root) as service:
        assert_agrees(service)
        assert service.get("a").device is None


def test_device_that_was_open_for_raw_io_goes_after_a_death(pool):
    root, _ = pool

    def write(service):
        with service.raw("b", writable=True) as volume:
            volume.write(0, b"x")
            service.create("new", size=MIB)

    dies(root, write, step="intent-written")
    with opened(root) as service:
        assert_agrees(service)
        assert listed(service) == {"a", "b"}


@pytest.mark.parametrize("step", ["pool-created", "pool-loaded", "pool-resumed", "pool-removed"])
def test_pool_is_brought_up_after_a_death_while_it_was_or_went_down(tmp_path, step):
    config = make_pool(tmp_path)
    with opened(tmp_path) as service:
        service.create("a", size=MIB)
    assert_nothing_left(config)
    dies(tmp_path, lambda _: None, step=step, opening=True)
    with opened(tmp_path) as service:
        assert_agrees(service)
        assert listed(service) == {"a"}
    assert_nothing_left(config)


def test_pool_suspended_by_a_dead_reader_works_again(pool):
    root, config = pool

    def read(service):
        with service._pool.quiet():
            pass

    dies(root, read, step="pool-quiet")
    assert names.pool_name(config.uuid) in suspended(config)
    with opened(root) as service:
        assert_agrees(service)
        assert_a_reads(service)


def test_volume_that_somebody_else_made_meanwhile_is_kept(pool):
    """An intent's id that was made at another transaction is a stranger's, not a half of ours."""
    root, config = pool
    dies(root, create, step="intent-written")
    with opened(root) as service:
        assert listed(service) == {"a", "b"}
    with opened(root) as service:
        pool = service._pool
        number = pool.status().transaction_id
        pool._pool.create_thin(77)
        pool._pool.set_transaction_id(number, number + 1)
    with opened(root) as service:
        assert listed(service) == {"a", "b", "id-77"}
        assert any(found.subject == "transaction id" for found in service.findings)
        assert_agrees(service)
        service.remove(["id-77"])
    assert config.engine == "dm"
