"""The user engine: pools and volumes of the C core."""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING, Any, Final, Self

from thinpool._native import ffi, lib
from thinpool.engine.backend import (
    Change,
    PoolMode,
    PoolOptions,
    PoolStatus,
    VolumeInfo,
)
from thinpool.engine.handle import Handle
from thinpool.engine.status import check
from thinpool.errors import NotFoundError
from thinpool.model import VolumeId

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator, Sequence

    from thinpool.engine.backend import Awaited
    from thinpool.engine.bdev import BlockDevice

_LIST_BATCH = 1024
_INFO: Final = struct.Struct("=IIIIQQ")
"""struct tp_volume_info, whose fields leave no gaps: tests/engine holds them equal."""
_STATUS: Final = struct.Struct("=2IQ2I14Q2IQ")
"""struct tp_pool_status, likewise."""
_MODES: Final = tuple(PoolMode)
_DEFAULT_OPTIONS = PoolOptions()


def format_pool(
    metadata: BlockDevice, *, block_size: int, data_blocks: int, force: bool = False
) -> None:
    """Write an empty pool; durable on return.

    Args:
        metadata: its first block must be zeros unless ``force``.
        block_size: of data, bytes.
        data_blocks: how many.
        force: overwrite what is there.

    Raises:
        ForeignDataError: it carries something.
        UsageError: a size that cannot be.
    """
    with metadata.in_call() as (pointer, err):
        status = lib.tp_pool_format(pointer, block_size, data_blocks, int(force), err)
        check(status, err, path=metadata.name)


class Pool(Handle):
    """An open pool; implements PoolBackend. Thread-safe."""

    atomic: Final = True
    """A change and the transaction id are one commit."""
    opens_in_process: Final = True

    def __init__(
        self,
        pointer: Any,  # noqa: ANN401 - cffi's data has no type
        *,
        metadata: BlockDevice,
        data: BlockDevice,
        keep: object,
    ) -> None:
        """Use open instead."""
        super().__init__(pointer, lib.tp_pool_abandon, above=(metadata, data), what="the pool")
        self.metadata = metadata
        self.data = data
        self._keep = keep

    @classmethod
    def open(
        cls,
        metadata: BlockDevice,
        data: BlockDevice,
        options: PoolOptions = _DEFAULT_OPTIONS,
        *,
        redo_memory: mmap.mmap | None = None,
    ) -> Self:
        """Open a pool on its two devices, which stay open until it is closed.

        Args:
            metadata: the metadata device.
            data: the data device.
            options: how.
            redo_memory: shared memory that holds the redo log; what it holds is replayed onto the
                last commit.

        Raises:
            CorruptMetadataError: or one of its kinds.
        """
        settings = ffi.new("struct tp_pool_options *")
        settings.skip_block_zeroing = int(not options.zero)
        settings.error_if_no_space = int(options.error_if_no_space)
        settings.no_space_timeout_ms = options.no_space_timeout_ms
        settings.discard_mode = int(options.discard_mode)
        settings.read_only = int(options.read_only)
        settings.commit_interval_ms = options.commit_interval_ms
        settings.low_water_blocks = options.low_water_blocks
        settings.cache_bytes = options.cache_bytes
        redo = None
        if redo_memory is not None:
            redo = ffi.from_buffer("unsigned char[]", redo_memory, require_writable=True)
            settings.redo_memory = redo
            settings.redo_size = len(redo)
        opened = ffi.new("struct tp_pool **")
        with metadata.in_call() as (metadata_pointer, err), data.in_call() as (data_pointer, _):
            status = lib.tp_pool_open(metadata_pointer, data_pointer, settings, opened, err)
            check(status, err, path=metadata.name)
        return cls(opened[0], metadata=metadata, data=data, keep=redo)

    def _free(self, pointer: Any) -> None:  # noqa: ANN401 - cffi's data has no type
        err = ffi.new("struct tp_error *")
        try:
            check(lib.tp_pool_close(pointer, err), err)
        finally:
            if err.status != lib.TP_E_BUSY:
                self._drop_redo()

    def _drop_redo(self) -> None:
        keep, self._keep = self._keep, None
        if keep is not None:
            ffi.release(keep)

    def abandon(self) -> None:
        """Let go without a commit: what a crash leaves."""
        pointer = self._take()
        if pointer is not None:
            self._finish(pointer, lib.tp_pool_abandon)
            self._drop_redo()

    def status(self) -> PoolStatus:
        """State and counters."""
        found = ffi.new("struct tp_pool_status *")
        with self.in_call() as (pointer, _):
            lib.tp_pool_get_status(pointer, found)
        mode, needs_check, *counters, low_water, dirty, replayed = _STATUS.unpack(ffi.buffer(found))
        return PoolStatus._make(
            (_MODES[mode], bool(needs_check), *counters, bool(low_water), bool(dirty), replayed)
        )

    def commit(self) -> None:
        """Make everything acknowledged before the call durable."""
        with self.in_call() as (pointer, err):
            check(lib.tp_pool_commit(pointer, err), err)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Metadata on disk that is committed, and does not change while no volume is written."""
        self.commit()
        yield

    def on_event(self, callback: Callable[[], None]) -> None:
        """Nothing: whoever looks at the status now and then sees the same."""

    def wait_event(self, sequence: int, *, timeout_ms: int) -> int:
        """Wait until the mode, low water or the set of volumes changes; the new sequence."""
        seen = ffi.new("uint64_t *", sequence)
        with self.in_call() as (pointer, _):
            check(lib.tp_pool_wait_event(pointer, seen, timeout_ms))
        return int(seen[0])

    def apply(
        self,
        changes: Sequence[Change],
        *,
        expected: int,
        new: int,
        after: Awaited | None = None,
    ) -> None:
        """Make all changes or none, together with the transaction id. Durable on return."""
        after_fd = after.fileno() if after is not None else -1
        array = ffi.new("struct tp_change[]", len(changes))
        for each, change in zip(array, changes, strict=True):
            each.kind = int(change.kind)
            each.id = change.id
            each.origin = change.origin if change.origin is not None else 0
        with self.in_call() as (pointer, err):
            if after is not None:
                after.start()
            status = lib.tp_pool_apply(pointer, array, len(changes), expected, new, after_fd, err)
            check(status, err)

    def create_volume(self, volume_id: VolumeId) -> None:
        """Make an empty volume; durable after a commit."""
        with self.in_call() as (pointer, err):
            check(lib.tp_volume_create(pointer, volume_id, err), err, volume_id=volume_id)

    def create_snapshot(self, volume_id: VolumeId, *, origin: VolumeId) -> None:
        """Make a volume that shares every mapping of an origin; durable after a commit."""
        with self.in_call() as (pointer, err):
            status = lib.tp_snapshot_create(pointer, volume_id, origin, err)
            check(status, err, volume_id=volume_id, origin=origin)

    def delete_volume(self, volume_id: VolumeId) -> None:
        """Delete a volume; durable after a commit."""
        with self.in_call() as (pointer, err):
            check(lib.tp_volume_delete(pointer, volume_id, err), err, volume_id=volume_id)

    def set_transaction_id(self, *, expected: int, new: int) -> None:
        """Set the transaction id; durable after a commit."""
        with self.in_call() as (pointer, err):
            check(lib.tp_pool_set_transaction_id(pointer, expected, new, err), err)

    def resize_data(self, blocks: int) -> None:
        """Grow the data to so many blocks."""
        with self.in_call() as (pointer, err):
            check(lib.tp_pool_resize_data(pointer, blocks, err), err)

    def resize_metadata(self) -> None:
        """Grow the metadata to its device's size."""
        with self.in_call() as (pointer, err):
            check(lib.tp_pool_resize_metadata(pointer, err), err)

    def reserve_metadata_snapshot(self) -> None:
        """Hold the present metadata for readers beside us."""
        with self.in_call() as (pointer, err):
            check(lib.tp_pool_reserve_metadata_snapshot(pointer, err), err)

    def release_metadata_snapshot(self) -> None:
        """Let it go."""
        with self.in_call() as (pointer, err):
            check(lib.tp_pool_release_metadata_snapshot(pointer, err), err)

    def clear_needs_check(self) -> None:
        """Say that it was checked."""
        with self.in_call() as (pointer, err):
            check(lib.tp_pool_clear_needs_check(pointer, err), err)

    def set_when_full(self, *, error: bool, timeout_ms: int) -> None:
        """What writes do when data space is out."""
        with self.in_call() as (pointer, _):
            check(lib.tp_pool_set_when_full(pointer, int(error), timeout_ms))

    def set_low_water(self, blocks: int) -> None:
        """Free data blocks below which low_water_reached is set."""
        with self.in_call() as (pointer, _):
            check(lib.tp_pool_set_low_water(pointer, blocks))

    def punch_some(self, max_blocks: int) -> int:
        """Return the host space of so many freed blocks; how many are left to do."""
        left = ffi.new("uint64_t *")
        with self.in_call() as (pointer, err):
            check(lib.tp_pool_punch_some(pointer, max_blocks, left, err), err)
        return int(left[0])

    def volumes(self) -> Iterator[VolumeInfo]:
        """All volumes in the order of their ids."""
        for batch in self._infos():
            for volume_id, created, snapshotted, is_open, mapped, transaction_id in batch:
                yield VolumeInfo(
                    id=VolumeId(volume_id),
                    creation_time=created,
                    snapshotted_time=snapshotted,
                    open=bool(is_open),
                    mapped_blocks=mapped,
                    transaction_id=transaction_id,
                )

    def mapped_blocks(self) -> dict[VolumeId, int]:
        """How many blocks each volume maps, by id, in the order of their ids; quick for many."""
        return {VolumeId(each[0]): each[4] for batch in self._infos() for each in batch}

    def _infos(self) -> Iterator[list[tuple[int, ...]]]:
        """The fields of struct tp_volume_info of all volumes, some at a time."""
        infos = ffi.new("struct tp_volume_info[]", _LIST_BATCH)
        count = ffi.new("size_t *")
        first = 0
        while True:
            with self.in_call() as (pointer, err):
                status = lib.tp_pool_list_volumes(pointer, first, infos, _LIST_BATCH, count, err)
                check(status, err)
            batch = list(_INFO.iter_unpack(ffi.buffer(infos, count[0] * _INFO.size)))
            yield batch
            if count[0] < _LIST_BATCH:
                return
            first = batch[-1][0] + 1

    def has_volume(self, volume_id: VolumeId) -> bool:
        """Whether there is one of an id."""
        info = ffi.new("struct tp_volume_info *")
        with self.in_call() as (pointer, err):
            status = lib.tp_pool_get_volume_info(pointer, volume_id, info, err)
            if status == lib.TP_E_VOLUME_NOT_FOUND:
                return False
            check(status, err, volume_id=volume_id)
        return True

    def volume_info(self, volume_id: VolumeId) -> VolumeInfo:
        """What the metadata knows of one volume."""
        info = ffi.new("struct tp_volume_info *")
        with self.in_call() as (pointer, err):
            status = lib.tp_pool_get_volume_info(pointer, volume_id, info, err)
            check(status, err, volume_id=volume_id)
        return _volume_info(info)

    def open_volume(
        self,
        volume_id: VolumeId,
        *,
        size: int,
        read_only: bool = False,
        origin: BlockDevice | None = None,
    ) -> Volume:
        """Open a volume; its size and its external origin are the caller's to know.

        Args:
            volume_id: which.
            size: bytes, a multiple of 512.
            read_only: refuse writes.
            origin: the external origin: nobody may write it. Where nothing is mapped the volume
                reads as this device, and as zeros beyond its end; a discard lets it show again.
                It stays open until the volume is closed.

        Raises:
            BusyError: it is open.
            NotFoundError: there is none.
        """
        opened = ffi.new("struct tp_volume **")
        with contextlib.ExitStack() as stack:
            pointer, err = stack.enter_context(self.in_call())
            below = stack.enter_context(origin.in_call())[0] if origin is not None else ffi.NULL
            status = lib.tp_volume_open(
                pointer, volume_id, size, int(read_only), below, opened, err
            )
            check(status, err, volume_id=volume_id)
            return Volume(opened[0], pool=self, volume_id=volume_id, origin=origin)


def _volume_info(info: Any) -> VolumeInfo:  # noqa: ANN401 - cffi's data has no type
    return VolumeInfo(
        id=VolumeId(int(info.id)),
        creation_time=int(info.creation_time),
        snapshotted_time=int(info.snapshotted_time),
        open=bool(info.open),
        mapped_blocks=int(info.mapped_blocks),
        transaction_id=int(info.transaction_id),
    )


class Volume(Handle):
    """An open volume; implements VolumeIO. Thread-safe; offsets and lengths of any alignment."""

    def __init__(
        self,
        pointer: Any,  # noqa: ANN401 - cffi's data has no type
        *,
        pool: Pool,
        volume_id: VolumeId,
        origin: BlockDevice | None = None,
    ) -> None:
        """Use Pool.open_volume instead."""
        above: tuple[Handle, ...] = (pool,) if origin is None else (pool, origin)
        super().__init__(pointer, lib.tp_volume_close, above=above, what=f"volume {volume_id}")
        self._id = volume_id

    def _free(self, pointer: Any) -> None:  # noqa: ANN401 - as above
        lib.tp_volume_close(pointer)

    @property
    def id(self) -> VolumeId:
        """Of the thin device."""
        return self._id

    @property
    def size(self) -> int:
        """Bytes."""
        with self.in_call() as (pointer, _):
            return int(lib.tp_volume_size(pointer))

    def resize(self, size: int) -> None:
        """Set the size; what lies past a smaller one is unmapped."""
        with self.in_call() as (pointer, err):
            check(lib.tp_volume_resize(pointer, size, err), err)

    def read(self, offset: int, length: int) -> bytes:
        """Read; what was never written is zeros."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer."""
        with (
            self.in_call() as (pointer, err),
            ffi.from_buffer("unsigned char[]", buffer, require_writable=True) as data,
        ):
            check(lib.tp_volume_read(pointer, offset, data, len(data), err), err)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write; survives power loss after the next flush."""
        with (
            self.in_call() as (pointer, err),
            ffi.from_buffer("unsigned char[]", data) as source,
        ):
            check(lib.tp_volume_write(pointer, offset, source, len(source), err), err)

    def discard(self, offset: int, length: int) -> None:
        """Unmap whole blocks and leave partial ends: the kernel's discard."""
        with self.in_call() as (pointer, err):
            check(lib.tp_volume_discard(pointer, offset, length, err), err)

    def zero(self, offset: int, length: int) -> None:
        """Unmap whole blocks and zero partial ends: all of it reads as zeros afterwards."""
        with self.in_call() as (pointer, err):
            check(lib.tp_volume_zero(pointer, offset, length, err), err)

    def flush(self) -> None:
        """Everything acknowledged before the call survives power loss on return."""
        with self.in_call() as (pointer, err):
            check(lib.tp_volume_flush(pointer, err), err)

    def next_data(self, offset: int) -> tuple[int, int] | None:
        """The next mapped stretch (begin, end) at or after offset; None when there is none."""
        begin = ffi.new("uint64_t *")
        end = ffi.new("uint64_t *")
        with self.in_call() as (pointer, err):
            try:
                check(lib.tp_volume_next_data(pointer, offset, begin, end, err), err)
            except NotFoundError:
                return None
        return int(begin[0]), int(end[0])

    def lookup(self, block: int) -> tuple[int, bool] | None:
        """One block's data block and whether it is shared; None when it is unmapped."""
        data_block = ffi.new("uint64_t *")
        shared = ffi.new("uint32_t *")
        with self.in_call() as (pointer, err):
            try:
                check(lib.tp_volume_lookup(pointer, block, data_block, shared, err), err)
            except NotFoundError:
                return None
        return int(data_block[0]), bool(shared[0])
