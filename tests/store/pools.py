"""What tests of the store begin with, on either engine: a pool's files, and rows of volumes."""

from contextlib import contextmanager

from thinpool.engine import BlockDevice, format_pool
from thinpool.model import VolumeId
from thinpool.store import poolfile
from thinpool.store.catalogue import Record
from thinpool.store.opening import open_pool
from thinpool.store.poolfile import PoolConfig, pool_directory, read_config, write_config
from thinpool.store.service import PoolService

BLOCK = 64 << 10
MIB = 1 << 20


def make_pool(root, name="p", *, data_blocks=256, metadata_size=8 * MIB, engine="user", **settings):
    """Files and a pool.json, as create-pool leaves them."""
    directory = pool_directory(root, name)
    directory.mkdir(parents=True)
    data, metadata = directory / "data", directory / "metadata"
    BlockDevice.open_file(data, create_size=data_blocks * BLOCK).close()
    with BlockDevice.open_file(metadata, create_size=metadata_size) as device:
        format_pool(device, block_size=BLOCK, data_blocks=data_blocks)
    config = PoolConfig(
        name=name,
        uuid=poolfile.new_uuid(),
        engine=engine,
        block_size=BLOCK,
        data=str(data),
        metadata=str(metadata),
        owns_files=True,
        created="2026-11-21T12:00:00Z",
        **{"min_free": 0.0, **settings},
    )
    write_config(root, config)
    return config


@contextmanager
def opened(root, name="p", *, served=None, freezer=None):
    """The service of a pool, started, in this process."""
    config = read_config(root, name)
    with open_pool(config, exclusive=True) as found:
        service = PoolService(
            root,
            config,
            found.pool,
            metadata=found.metadata,
            data=found.data,
            served=served,
            freezer=freezer,
        )
        try:
            service.start()
            yield service
        finally:
            service.close()


def record(number, name=None, **values):
    """A volume's row, with what a test does not care about filled in."""
    return Record(
        **{
            "id": VolumeId(number),
            "name": name or f"v{number}",
            "kind": "volume",
            "parent": None,
            "size": MIB,
            "read_only": False,
            "created": "2026-11-21T12:00:00Z",
            **values,
        }
    )
