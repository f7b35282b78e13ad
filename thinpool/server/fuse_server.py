"""The C core's FUSE server, as a handle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from thinpool._native import ffi, lib
from thinpool.engine.handle import Handle
from thinpool.engine.status import check, new_error
from thinpool.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from thinpool.engine import Pool, Volume
    from thinpool.model import VolumeId

DEFAULT_SLOTS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseOptions:
    """How requests are served; 0 stands for the default of the C core's header."""

    write_threads: int = 0
    copy_threads: int = 0
    read_threads: int = 0
    zero_threads: int = 0
    flush_threads: int = 0
    max_background: int = 0
    trim_ms: int = 0
    block_size: int = 0
    io_uring: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseStatistics:
    """Counters since the server was made; bytes where the name says so."""

    requests: int
    fast: int
    slow: int
    retried: int
    replays: int
    flushes: int
    flush_calls: int
    errors: int
    lost_replies: int
    read_bytes: int
    written_bytes: int
    zeroed_bytes: int
    in_flight: int
    files: int


def slots_size(slots: int = DEFAULT_SLOTS) -> int:
    """Bytes of shared memory for so many requests at once."""
    return int(lib.tp_fuse_slots_size(slots))


class FuseServer(Handle):
    """Serves volumes as files ``id-N`` on a connection that its supervisor keeps. Thread-safe.

    Args:
        pool: whose volumes are served; None: linear files only.
        fuse_fds: descriptors on one connection, one for each data thread.
        slots_fd: a memfd of ``slots_bytes`` bytes; what a dead predecessor left open in it is
            answered by ``run``.
        slots_bytes: its size, from slots_size().

    Raises:
        UsageError: the memory has another layout.
    """

    def __init__(
        self,
        pool: Pool | None,
        *,
        fuse_fds: Sequence[int],
        slots_fd: int,
        slots_bytes: int,
        options: FuseOptions = FuseOptions(),
    ) -> None:
        """Make a server; it serves nothing before run()."""
        made = ffi.new("struct tp_fuse_server **")
        given = ffi.new("struct tp_fuse_options *")
        for kind in ("write", "copy", "read", "zero", "flush"):
            setattr(given, f"{kind}_threads", getattr(options, f"{kind}_threads"))
        given.max_background = options.max_background
        given.trim_ms = options.trim_ms
        given.block_size = options.block_size
        given.no_io_uring = int(not options.io_uring)
        err = new_error()
        status = lib.tp_fuse_server_create(
            ffi.NULL if pool is None else pool.pointer,
            list(fuse_fds),
            len(fuse_fds),
            slots_fd,
            slots_bytes,
            given,
            made,
            err,
        )
        check(status, err)
        super().__init__(
            made[0],
            lib.tp_fuse_server_destroy,
            above=() if pool is None else (pool,),
            what="the FUSE server",
        )
        self._volumes: dict[int, Volume] = {}

    def _free(self, pointer: Any) -> None:  # noqa: ANN401 - cffi's data has no type
        lib.tp_fuse_server_destroy(pointer)
        for volume in self._volumes.values():
            volume.drop_user()
        self._volumes.clear()

    def add_file(self, volume: Volume, *, read_only: bool = False, generation: int) -> None:
        """Serve a volume, which must stay open until remove_file returned.

        Args:
            volume: open.
            read_only: refuse to open it for writing.
            generation: differs between activations of one volume, and is the same in every
                successor of this server.

        Raises:
            AlreadyExistsError: it is served.
        """
        with self.in_call() as (pointer, err):
            status = lib.tp_fuse_server_add_file(
                pointer, volume.pointer, int(read_only), generation, err
            )
            check(status, err)
        volume.add_user()
        self._volumes[int(volume.id)] = volume

    def add_linear(
        self, file_id: int, path: Path | str, *, read_only: bool = False, generation: int = 1
    ) -> None:
        """Serve a raw file as it is: the null target of comparisons.

        Raises:
            AlreadyExistsError: the id is served.
            NotFoundError, NotPermittedError, StorageIOError: as the host says.
        """
        with self.in_call() as (pointer, err):
            status = lib.tp_fuse_server_add_linear(
                pointer, file_id, str(path).encode(), int(read_only), generation, err
            )
            check(status, err, path=str(path))

    def remove_file(self, file_id: VolumeId | int) -> None:
        """Take a file out; when this returns its requests are answered.

        Raises:
            NotFoundError: it is not served.
        """
        with self.in_call() as (pointer, err):
            check(lib.tp_fuse_server_remove_file(pointer, int(file_id), err), err)
        volume = self._volumes.pop(int(file_id), None)
        if volume is not None:
            volume.drop_user()

    def run(self) -> bool:
        """Serve in this thread until stop().

        Returns:
            False when the kernel ended the connection instead.
        """
        with self.in_call() as (pointer, err):
            try:
                check(lib.tp_fuse_server_run(pointer, err), err)
            except ClosedError:
                return False
            return True

    def stop(self) -> None:
        """Read no more requests, answer those that were read, end run()."""
        with self.in_call() as (pointer, _):
            lib.tp_fuse_server_stop(pointer)

    def statistics(self) -> FuseStatistics:
        """The counters."""
        found = ffi.new("struct tp_fuse_statistics *")
        with self.in_call() as (pointer, _):
            lib.tp_fuse_server_get_statistics(pointer, found)
        return FuseStatistics(
            **{name: int(getattr(found, name)) for name in FuseStatistics.__dataclass_fields__}
        )
