"""What a pool's server program is given by its worker."""

from __future__ import annotations

import os
import select
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thinpool import errors
from thinpool.server.shm import ServedTable, ServedVolume

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from thinpool.engine import Pool, PoolBackend, Volume
    from thinpool.model import VolumeId
    from thinpool.server.control import SupervisorLink
    from thinpool.server.fuse_server import FuseServer
    from thinpool.store.devices import DeviceMaker
    from thinpool.store.opening import OpenPool
    from thinpool.store.poolfile import PoolConfig


class ServedVolumes:
    """The volumes that have files in the FUSE mount. Thread-safe; every method may block.

    What is added here is brought back by a successor of this worker before its program runs, so a
    program compares ``entries()`` with its catalogue when it starts: the catalogue may be one step
    ahead or behind.

    Args:
        pool: whose volumes.
        server: that serves them; None on a host where it cannot.
        table: in shared memory.
        mount_point: where the files are.
    """

    def __init__(
        self,
        pool: Pool,
        server: FuseServer | None,
        table: ServedTable,
        mount_point: Path | None,
    ) -> None:
        """Bring back what the table names."""
        self._pool = pool
        self._server = server
        self._table = table
        self._mount_point = mount_point
        self._lock = threading.Lock()
        self._volumes: dict[int, Volume] = {}
        self._leaving: set[int] = set()
        self.lost: list[tuple[ServedVolume, errors.ThinpoolError]] = []
        """Those of the table that could not be brought back, and why."""
        for entry in table.entries():
            self._restore(entry)

    def _restore(self, entry: ServedVolume) -> None:
        try:
            self._serve(entry)
        except errors.ThinpoolError as error:
            self._table.remove(entry.id)
            self.lost.append((entry, error))

    def _serve(self, entry: ServedVolume) -> None:
        if self._server is None:
            raise errors.UnsupportedHostError(
                "volumes cannot be activated here: this server has no FUSE mount", missing="fuse"
            )
        volume = self._pool.open_volume(entry.id, size=entry.size, read_only=entry.read_only)
        try:
            self._server.add_file(volume, read_only=entry.read_only, generation=entry.generation)
        except BaseException:
            volume.close()
            raise
        self._volumes[entry.id] = volume

    def path(self, volume_id: VolumeId) -> Path:
        """Where the file of a volume is while it is served.

        Raises:
            UnsupportedHostError: this server has no FUSE mount.
        """
        if self._mount_point is None:
            raise errors.UnsupportedHostError(
                "volumes cannot be activated here: this server has no FUSE mount", missing="fuse"
            )
        return self._mount_point / f"id-{volume_id}"

    def add(
        self, volume_id: VolumeId, *, size: int, read_only: bool = False, generation: int
    ) -> Path:
        """Open a volume and serve it.

        Args:
            volume_id: of the volume; nobody else may have it open.
            size: bytes.
            read_only: refuse writes.
            generation: a number that no earlier activation of the volume had.

        Returns:
            The path of its file.

        Raises:
            AlreadyExistsError: it is served.
            BusyError: it is open.
            NotFoundError: the pool has no such volume.
            UnsupportedHostError: this server has no FUSE mount.
        """
        path = self.path(volume_id)
        entry = ServedVolume(id=volume_id, size=size, read_only=read_only, generation=generation)
        with self._lock:
            # First the table: whoever sees the file must find it again after a restart.
            self._table.add(entry)
            try:
                self._serve(entry)
            except BaseException:
                self._table.remove(volume_id)
                raise
        return path

    def remove(self, volume_id: VolumeId) -> None:
        """Take the file away, wait for its requests, close the volume.

        Raises:
            NotFoundError: it is not served.
        """
        with self._lock:
            volume = self._volumes.get(volume_id)
            if volume is None or self._server is None or volume_id in self._leaving:
                raise errors.NotFoundError(f"volume {volume_id} is not served", volume_id=volume_id)
            self._leaving.add(volume_id)
        try:
            # Without the lock: its writes may wait for space, and that is nobody else's matter.
            self._server.remove_file(volume_id)
            with self._lock:
                self._table.remove(volume_id)
                del self._volumes[volume_id]
            volume.close()
        finally:
            self._leaving.discard(volume_id)

    def resize(self, volume_id: VolumeId, size: int) -> None:
        """Change the size of a served volume; a loop device over it has to be told.

        Raises:
            NotFoundError: it is not served.
            UsageError: no multiple of 512.
        """
        with self._lock:
            volume = self._volumes.get(volume_id)
            if volume is None:
                raise errors.NotFoundError(f"volume {volume_id} is not served", volume_id=volume_id)
            volume.resize(size)
            self._table.resize(volume_id, size)

    def volume(self, volume_id: VolumeId) -> Volume | None:
        """The open volume, for raw I/O beside its file; None when it is not served."""
        return self._volumes.get(volume_id)

    def entries(self) -> list[ServedVolume]:
        """What is served, by id."""
        with self._lock:
            return self._table.entries()

    def close(self) -> None:
        """Close the volumes; the table keeps them for a successor. The server is closed before."""
        with self._lock:
            for volume in self._volumes.values():
                volume.close()
            self._volumes.clear()


class Stop:
    """Tells once that all shall end. Set from anywhere, signal handlers too; waited for by many.

    Kept open as long as the process lives: what sets it may come late.
    """

    def __init__(self) -> None:
        """Not yet."""
        # Not an Event: its lock may be held where a signal handler comes in between.
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self) -> None:
        """Tell."""
        os.eventfd_write(self._event, 1)

    def is_set(self) -> bool:
        """Whether that was told."""
        return self.wait(0)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is told, or so long; whether it was."""
        poll = select.poll()
        poll.register(self._event, select.POLLIN)
        return bool(poll.poll(seconds * 1000 if seconds is not None else None))

    def fileno(self) -> int:
        """Readable from when it is told."""
        return self._event


@dataclass(slots=True, kw_only=True)
class WorkerContext:
    """Everything that a pool's server program works with.

    The program is ``def serve(context: WorkerContext) -> None``. It accepts clients on
    ``listen``, calls ``link.serving()`` when it does, and returns when ``stopping`` is set or when
    the pool was not used for ``linger`` seconds; the worker then closes the pool.

    Attributes:
        root: of the pools.
        config: pool.json.
        listen: a listening unix socket; connections wait in it while workers are replaced.
        opened: the open pool, and the devices under it.
        served: its volumes that have files; None of the kernel's pools, which need none.
        server: the FUSE server; None where there is no FUSE.
        devices: makes its volumes' block devices; None for loop devices over files.
        link: to the supervisor: freezing, and saying what happens.
        linger: seconds.
        restarted: a worker before this one died.
        stopping: set when the worker shall end.
    """

    root: Path
    config: PoolConfig
    listen: socket.socket
    opened: OpenPool[PoolBackend]
    served: ServedVolumes | None
    server: FuseServer | None
    devices: DeviceMaker | None
    link: SupervisorLink
    linger: float
    restarted: bool
    stopping: Stop

    @property
    def pool(self) -> PoolBackend:
        """The open pool."""
        return self.opened.pool
