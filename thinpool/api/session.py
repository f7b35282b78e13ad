"""What the operations of the API share: the root, and a client of each pool's server."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import struct
import threading
from typing import TYPE_CHECKING, Any, Final

from thinpool import errors
from thinpool.names import VolumeName, parse_ref, same_pool
from thinpool.server.client import PoolClient, locked
from thinpool.store import poolfile

if TYPE_CHECKING:
    from pathlib import Path

    from thinpool.names import PoolName, VolumeRef

CREATION_LOCK: Final = "creating.lock"
_BLKDISCARD: Final = 0x1277
_ENDS: Final = 1 << 20


class Session:
    """One root's clients. Thread-safe.

    Args:
        root: of the pools.
        timeout: seconds to wait for locks.
    """

    def __init__(self, root: Path, *, timeout: float) -> None:
        """Nothing is opened."""
        self.root: Final = root
        self.timeout: Final = timeout
        self._lock = threading.Lock()
        self._clients: dict[str, PoolClient] = {}

    def client(self, pool: str) -> PoolClient:
        """The client of a pool that is whole.

        Raises:
            NotFoundError: there is none of that name.
            BusyError: it is being made.
        """
        with self._lock:
            client = self._clients.get(pool)
            if client is None:
                client = PoolClient(self.root, pool, timeout=self.timeout)
                self._clients[pool] = client
        if not client.is_whole():
            self.drop_unfinished(pool)
        return client

    def forget(self, pool: str) -> None:
        """Close a pool's client."""
        with self._lock:
            client = self._clients.pop(pool, None)
        if client is not None:
            client.close()

    def close(self) -> None:
        """Close every client."""
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()

    def of(self, volume: str) -> tuple[PoolClient, VolumeRef]:
        """The client of a volume's pool, and the volume's name in parts."""
        ref = parse_ref(volume)
        return self.client(ref.pool), ref

    def of_all(self, volumes: list[str]) -> tuple[PoolClient, PoolName, list[VolumeName]]:
        """The client of the one pool that all these volumes are in.

        Raises:
            UsageError: none are given, or they are in different pools.
        """
        if not volumes:
            raise errors.UsageError("no volume is given", what="volumes")
        refs = [parse_ref(volume) for volume in volumes]
        for ref in refs[1:]:
            same_pool(refs[0], ref)
        return self.client(refs[0].pool), refs[0].pool, [ref.name for ref in refs]

    def drop_unfinished(self, pool: str) -> None:
        """Remove what a creation that died has left; it is nobody's.

        Raises:
            BusyError: the creation is under way.
            NotFoundError: when it was removed.
        """
        directory = poolfile.pool_directory(self.root, pool)
        config = poolfile.read_config(self.root, pool)
        try:
            with locked(directory / CREATION_LOCK, timeout=0, what="creation"):
                client = PoolClient(self.root, pool, timeout=self.timeout)
                client.allow_unfinished = True
                client.stop_server()
                remove_directory(directory, config)
        except errors.TimeoutError_ as cause:
            raise errors.BusyError(
                f"pool {pool} is being made by another process", holder=None, pool=pool
            ) from cause
        raise errors.NotFoundError(
            f"there is no pool {pool} under {self.root}: its creation was interrupted, and what "
            "it had made is removed now",
            pool=pool,
            root=str(self.root),
        )


def remove_directory(
    directory: Path, config: poolfile.PoolConfig, *, keep_data: bool = False
) -> None:
    """Remove a pool's directory; what it has elsewhere stays, empty unless its data is kept."""
    if not config.owns_files:
        empty(config.metadata)
        if not keep_data:
            empty(config.data)
    # First what makes it a pool, so that an interrupted removal is no half pool.
    (directory / poolfile.FILE).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def empty(path: str) -> None:
    """Empty a file or device that was given by path, and keep its size.

    A file reads as zeros afterwards. A device is discarded, which may leave what it held; its first
    and last bytes, where formats have their marks, are zeroed in any case.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, size)
        else:
            with contextlib.suppress(OSError):
                fcntl.ioctl(descriptor, _BLKDISCARD, struct.pack("=QQ", 0, size))
            for offset in (0, max(size - _ENDS, 0)):
                os.pwrite(descriptor, bytes(min(_ENDS, size)), offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing_volume(client: PoolClient, name: str) -> dict[str, Any] | None:
    """The volume that has a name, as JSON; None when it is free."""
    try:
        found: dict[str, Any] = client.call("get", {"name": name})
    except errors.NotFoundError:
        return None
    return found


def refuse_taken(client: PoolClient, ref: VolumeRef) -> None:
    """See that a name is free before much work is done under it.

    Raises:
        AlreadyExistsError: ``existing`` is what has it.
    """
    found = existing_volume(client, ref.name)
    if found is not None:
        raise errors.AlreadyExistsError(f"{ref} exists already", existing=found)
