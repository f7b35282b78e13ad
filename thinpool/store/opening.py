"""Opening a pool's devices and its engine as pool.json says. For its server, and offline tools."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from thinpool import errors
from thinpool.engine import BlockDevice, DiscardMode, Pool, PoolOptions
from thinpool.store import poolfile
from thinpool.store.crashpoint import reached

if TYPE_CHECKING:
    import mmap
    from types import TracebackType

    from thinpool.dm.engine import DmPool
    from thinpool.engine import PoolBackend
    from thinpool.store.poolfile import PoolConfig


Pool_co = TypeVar("Pool_co", bound="PoolBackend", covariant=True)


@dataclass(slots=True)
class OpenPool(Generic[Pool_co]):
    """A pool and the two devices under it, closed together."""

    pool: Pool_co
    metadata: BlockDevice
    data: BlockDevice

    def close(self) -> None:
        """Commit, and close all three."""
        try:
            self.pool.close()
        finally:
            if self.pool.closed:
                self.data.close()
                self.metadata.close()

    def __enter__(self) -> Self:
        """This."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def pool_options(config: PoolConfig, *, data_size: int) -> PoolOptions:
    """How the engine opens a pool."""
    return PoolOptions(
        zero=config.zero,
        # A pool in the making has nobody who could make room: its base does not fit.
        error_if_no_space=config.when_full == "error" or config.state == poolfile.CREATING,
        no_space_timeout_ms=config.no_space_timeout_ms,
        discard_mode=DiscardMode.PASSDOWN,
        read_only=config.read_only,
        low_water_blocks=config.event_bytes(data_size) // config.block_size,
    )


def open_dm_pool(config: PoolConfig) -> OpenPool[DmPool]:
    """Give a pool to the kernel, or take over what a predecessor gave it.

    Raises:
        UnsupportedHostError, NotPermittedError: no device-mapper here, or not for this user.
        NotFoundError: a file or device is gone.
        BusyError: something else has it.
        CorruptMetadataError: it is no pool, or a damaged one.
    """
    from thinpool.dm.engine import DmPool  # noqa: PLC0415 - for pools of this engine alone

    options = pool_options(config, data_size=size_of(config.data))
    pool = DmPool.open(
        config.metadata,
        config.data,
        options,
        name=config.name,
        uuid=config.uuid,
        step=reached,
    )
    return OpenPool(pool=pool, metadata=pool.metadata.device, data=pool.data.device)


def size_of(path: str) -> int:
    """Bytes of a file or device; 0 where it is gone, which whoever opens it then says."""
    try:
        with Path(path).open("rb") as file:
            return file.seek(0, os.SEEK_END)
    except OSError:
        return 0


def open_pool(
    config: PoolConfig,
    *,
    redo_memory: mmap.mmap | None = None,
    exclusive: bool = False,
) -> OpenPool[Pool]:
    """Open a pool of the user engine.

    Args:
        config: pool.json.
        redo_memory: shared memory of the redo log; None for an open without a successor.
        exclusive: lock the metadata here; the server's supervisor has done so already.

    Raises:
        NotFoundError: a file or device is gone.
        BusyError: somebody else has it.
        CorruptMetadataError: it is no pool, or a damaged one.
    """
    for path in (config.metadata, config.data):
        if not os.path.exists(path):  # noqa: PTH110 - the path is a string here
            raise errors.device_gone(config.name, path)
    with ExitStack() as stack:
        metadata = stack.enter_context(
            BlockDevice.open_file(config.metadata, read_only=config.read_only, exclusive=exclusive)
        )
        data = stack.enter_context(
            BlockDevice.open_file(
                config.data,
                read_only=config.read_only,
                direct=can_be_direct(config.data),
                shared_lock=redo_memory is not None,
            )
        )
        pool = stack.enter_context(
            Pool.open(
                metadata,
                data,
                pool_options(config, data_size=data.size),
                redo_memory=redo_memory,
            )
        )
        stack.pop_all()
    return OpenPool(pool=pool, metadata=metadata, data=data)


def can_be_direct(path: str) -> bool:
    """The host takes O_DIRECT here; tmpfs and some network filesystems do not."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def is_block_device(path: str) -> bool:
    """Rather than a file."""
    return stat.S_ISBLK(os.stat(path).st_mode)  # noqa: PTH116 - the path is a string here
