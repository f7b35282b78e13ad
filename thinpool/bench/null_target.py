"""Serve a raw file through the FUSE server with the mapping layer taken out, until it is killed.

What a pool's volume costs is measured against this: ``python -P -m thinpool.bench.null_target FILE
MOUNTPOINT`` makes MOUNTPOINT/id-1. It says "ready" on standard output, ends on SIGTERM or SIGINT,
unmounts, and prints the server's counters.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from pathlib import Path

from thinpool.host import mounts
from thinpool.model import VolumeId
from thinpool.server.fuse_mount import open_connection
from thinpool.server.fuse_server import FuseOptions, FuseServer, slots_size
from thinpool.server.supervisor import DATA_THREADS

VOLUME = VolumeId(1)
FILE = "id-1"


def main() -> None:
    """Mount, serve, unmount."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("mount_point", type=Path)
    parser.add_argument("--threads", type=int, default=DATA_THREADS)
    arguments = parser.parse_args()

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    connection = open_connection(
        arguments.mount_point.resolve(), source="null", descriptors=arguments.threads
    )
    memory = os.memfd_create("slots")
    os.ftruncate(memory, slots_size())
    with FuseServer(
        None,
        fuse_fds=connection.fds,
        slots_fd=memory,
        slots_bytes=slots_size(),
        options=FuseOptions(),
    ) as server:
        server.add_linear(VOLUME, arguments.file)
        thread = threading.Thread(target=server.run)
        thread.start()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
        mounts.unmount(connection.mount_point, lazy=True)
        server.stop()
        thread.join()
        counters = server.statistics()
        shown = {name: getattr(counters, name) for name in counters.__slots__}
        sys.stdout.write(json.dumps(shown) + "\n")
    for fd in connection.fds:
        os.close(fd)


if __name__ == "__main__":
    main()
