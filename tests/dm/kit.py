"""Pools of the kernel's for tests: made of files, opened in this process, or in one that dies."""

import os
import signal
import traceback
from contextlib import contextmanager
from pathlib import Path

from tests.store import pools
from tests.store.pools import MIB
from thinpool.check import check_metadata
from thinpool.dm import names
from thinpool.dm.client import DeviceMapper
from thinpool.host import loop
from thinpool.store.catalogue import DELETING
from thinpool.store.crashpoint import arm
from thinpool.store.dmdevices import DmDevices
from thinpool.store.opening import open_dm_pool
from thinpool.store.poolfile import read_config
from thinpool.store.service import PoolService


def make_pool(root, name="p", *, metadata_size=2 * MIB, **settings):
    """Files and a pool.json of the kernel engine, as create-pool leaves them."""
    return pools.make_pool(root, name, metadata_size=metadata_size, engine="dm", **settings)


@contextmanager
def opened(root, name="p"):
    """The service of a pool, started, in this process."""
    config = read_config(root, name)
    with open_dm_pool(config) as found:
        service = PoolService(
            root,
            config,
            found.pool,
            metadata=found.metadata,
            data=found.data,
            devices=DmDevices.maker(found.pool),
        )
        try:
            service.start()
            yield service
        finally:
            service.close()


def dies(root, work, *, step, opening=False, name="p"):
    """Open the pool in a process of its own, and work on it until it dies at a step.

    Args:
        root: of the pools.
        work: what is done with the service.
        step: where it dies.
        opening: it may die there while the pool is opened.
        name: the pool's.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if opening:
                arm(step)
            with opened(root, name) as service:
                arm(step)
                work(service)
            code = 3  # it came to an end without the step
        except BaseException:  # noqa: BLE001 - said, and the process ends
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), (
        f"did not die at {step}: exit {os.waitstatus_to_exitcode(status)}"
    )
    assert os.WTERMSIG(status) == signal.SIGKILL


def dm_devices(config):
    """The dm devices of a pool, by name."""
    with DeviceMapper() as mapper:
        return {entry.name for entry in mapper.devices(uuid_prefix=names.prefix_of(config.uuid))}


def suspended(config):
    """Those of them that are suspended."""
    with DeviceMapper() as mapper:
        return {
            entry.name
            for entry in mapper.devices(uuid_prefix=names.prefix_of(config.uuid))
            if mapper.info(entry.name).suspended
        }


def loops(config):
    """The loop devices over a pool's files."""
    return [device.path for path in (config.data, config.metadata) for device in loop.find(path)]


def assert_nothing_left(config):
    """The kernel has nothing of a pool that is closed."""
    assert dm_devices(config) == set()
    assert loops(config) == []
    assert not list(Path("/dev/mapper").glob(f"*{config.uuid}*"))


def assert_agrees(service):
    """Names, ids and devices are one to one, nothing is under way, and the metadata is clean."""
    catalogue, pool, config = service._catalogue, service._pool, service.config
    assert catalogue.intent() is None
    assert not catalogue.records(DELETING)
    assert {record.id for record in catalogue.records()} == {info.id for info in pool.volumes()}
    assert int(catalogue.get("transaction_id")) == pool.status().transaction_id
    assert suspended(config) == set()
    active = {activation.id for activation in catalogue.activations()}
    wanted = {names.volume_name(config.uuid, each) for each in active}
    assert dm_devices(config) == wanted | {names.pool_name(config.uuid)}
    assert len(loops(config)) == 2
    links = {catalogue.by_id(each).name for each in active}
    assert set(service._devices._run.device_links(config.name)) == links
    for volume_id in active:
        device = service._devices.find(catalogue.by_id(volume_id))
        assert Path(device.path).stat().st_rdev == device.device_number
    with pool.quiet():
        report = check_metadata(service.metadata_device)
    assert report.clean, report
    in_pool = {info.id: info.mapped_blocks for info in pool.volumes()}
    pool._read_known()  # with nothing active that writes, what was remembered is what is there
    assert {info.id: info.mapped_blocks for info in pool.volumes()} == in_pool
