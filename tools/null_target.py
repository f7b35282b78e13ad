"""Serve a raw file through the FUSE server with the mapping layer taken out, until it is killed.

What a pool's volume costs is measured against this: python tools/null_target.py FILE MOUNTPOINT
makes MOUNTPOINT/id-1. It says "ready" on standard output, ends on SIGTERM or SIGINT and unmounts.

With --pool METADATA --size BYTES, FILE becomes the data of a new pool with one volume of that size,
and that is served: the same server with the mapping layer put in.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import threading
from pathlib import Path

from thinpool.engine import BlockDevice, Pool, Volume, format_pool
from thinpool.host import mounts
from thinpool.model import VolumeId
from thinpool.server.fuse_mount import open_connection
from thinpool.server.fuse_server import FuseOptions, FuseServer, slots_size

BLOCK_SIZE = 64 << 10
VOLUME = VolumeId(1)


def new_pool(
    stack: contextlib.ExitStack, data_path: Path, metadata_path: Path, size: int
) -> tuple[Pool, Volume]:
    """A pool with room for one volume of that size and the volume."""
    blocks = size // BLOCK_SIZE
    metadata = stack.enter_context(BlockDevice.open_file(metadata_path, create_size=64 << 20))
    BlockDevice.open_file(data_path, create_size=blocks * BLOCK_SIZE).close()
    data = stack.enter_context(BlockDevice.open_file(data_path, direct=True))
    format_pool(metadata, block_size=BLOCK_SIZE, data_blocks=blocks)
    pool = stack.enter_context(Pool.open(metadata, data))
    pool.create_volume(VOLUME)
    return pool, stack.enter_context(pool.open_volume(VOLUME, size=size))


def main() -> None:
    """Mount, serve, unmount."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("mount_point", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-io-uring", action="store_true")
    parser.add_argument("--pool", type=Path, metavar="METADATA", help="serve a volume instead")
    parser.add_argument("--size", type=int, help="of that volume, bytes")
    arguments = parser.parse_args()

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    connection = open_connection(
        arguments.mount_point.resolve(), source="null", descriptors=arguments.threads
    )
    memory = os.memfd_create("slots")
    os.ftruncate(memory, slots_size())
    with contextlib.ExitStack() as stack:
        pool = volume = None
        if arguments.pool:
            pool, volume = new_pool(stack, arguments.file, arguments.pool, arguments.size)
        server = stack.enter_context(
            FuseServer(
                pool,
                fuse_fds=connection.fds,
                slots_fd=memory,
                slots_bytes=slots_size(),
                options=FuseOptions(io_uring=not arguments.no_io_uring),
            )
        )
        if volume is None:
            server.add_linear(VOLUME, arguments.file)
        else:
            server.add_file(volume, generation=1)
        thread = threading.Thread(target=server.run)
        thread.start()
        print("ready", flush=True)
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
        mounts.unmount(connection.mount_point, lazy=True)
        server.stop()
        thread.join()
        counters = server.statistics()
        print(json.dumps({name: getattr(counters, name) for name in counters.__slots__}))
    for fd in connection.fds:
        os.close(fd)


if __name__ == "__main__":
    main()
