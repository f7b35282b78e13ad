"""What a pool does, whichever engine drives it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType

    from thinpool.engine.bdev import BlockDevice
    from thinpool.model import VolumeId

SECTOR = 512
METADATA_BLOCK = 4096
VOLUME_ID_MAX = (1 << 24) - 1


class PoolMode(IntEnum):
    """What a pool can do at present."""

    RW = 0
    OUT_OF_DATA_SPACE = 1
    RO = 2
    FAIL = 3


class DiscardMode(IntEnum):
    """What becomes of discards."""

    PASSDOWN = 0
    NO_PASSDOWN = 1
    IGNORE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """How a pool is opened.

    Attributes:
        zero: new blocks read as zeros wherever they were not written.
        error_if_no_space: writes fail at once when data space is out, else they wait.
        no_space_timeout_ms: so long; 0 for ever.
        discard_mode: what becomes of discards.
        read_only: never write.
        commit_interval_ms: of commits that nobody asked for; 0 for none.
        low_water_blocks: free data blocks below which low_water_reached is set.
        cache_bytes: of clean metadata blocks in memory.
    """

    zero: bool = True
    error_if_no_space: bool = False
    no_space_timeout_ms: int = 60_000
    discard_mode: DiscardMode = DiscardMode.PASSDOWN
    read_only: bool = False
    commit_interval_ms: int = 1000
    low_water_blocks: int = 0
    cache_bytes: int = 0


class PoolStatus(NamedTuple):
    """A pool's state and counters; blocks are data blocks unless the name says metadata.

    In the order of struct tp_pool_status.
    """

    mode: PoolMode
    needs_check: bool
    transaction_id: int
    time: int
    data_block_size: int
    data_blocks_total: int
    data_blocks_used: int
    metadata_blocks_total: int
    metadata_blocks_used: int
    metadata_blocks_reserve: int
    held_root: int
    nr_volumes: int
    commits: int
    data_flushes: int
    metadata_flushes: int
    provisioned: int
    broke_sharing: int
    discarded: int
    punch_backlog: int
    low_water_reached: bool
    dirty: bool
    replayed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeInfo:
    """What the pool's metadata knows of a thin volume; its size is not among it."""

    id: VolumeId
    creation_time: int
    snapshotted_time: int
    open: bool
    mapped_blocks: int
    transaction_id: int


class ChangeKind(IntEnum):
    """What a change does."""

    CREATE = 1
    SNAPSHOT = 2
    DELETE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One step of a transaction; ``origin`` is a snapshot's."""

    kind: ChangeKind
    id: VolumeId
    origin: VolumeId | None = None


class VolumeIO(Protocol):
    """An open thin volume. Offsets and lengths are bytes of any alignment."""

    @property
    def id(self) -> VolumeId:
        """Of the thin device."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def resize(self, size: int) -> None:
        """Set the size."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Read."""
        ...

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer."""
        ...

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write."""
        ...

    def discard(self, offset: int, length: int) -> None:
        """Unmap whole blocks, leave partial ends."""
        ...

    def zero(self, offset: int, length: int) -> None:
        """Make it read as zeros, unmapping whole blocks."""
        ...

    def flush(self) -> None:
        """Make everything acknowledged before durable."""
        ...

    def next_data(self, offset: int) -> tuple[int, int] | None:
        """The next mapped stretch, None when there is none."""
        ...

    def close(self) -> None:
        """Let go."""
        ...


class Awaited(Protocol):
    """Something that happens meanwhile, and whatever comes of it, happens soon once started."""

    def start(self) -> None:
        """Let it begin."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable from when it has happened."""
        ...

    def wait(self) -> None:
        """Until it has happened."""
        ...


class PoolBackend(Protocol):
    """An open pool. Thread-safe; every method may block."""

    @property
    def atomic(self) -> bool:
        """A crash during apply leaves all of it or nothing.

        Else each change and the transaction id are commits of their own, in this order.
        """
        ...

    @property
    def opens_in_process(self) -> bool:
        """A volume is opened for raw I/O by no more than a call, not by another device."""
        ...

    def status(self) -> PoolStatus:
        """State and counters."""
        ...

    def apply(
        self,
        changes: Sequence[Change],
        *,
        expected: int,
        new: int,
        after: Awaited | None = None,
    ) -> None:
        """Make all changes or none, together with the transaction id. Durable on return.

        Args:
            changes: in their order.
            expected: the transaction id before.
            new: and after.
            after: is started, and nothing becomes durable before it has happened.

        Raises:
            TransactionIdError: the pool's is not the expected one.
            AlreadyExistsError, NotFoundError, BusyError: of a volume.
            MetadataSpaceError, ReadOnlyError: the pool cannot.
        """
        ...

    def commit(self) -> None:
        """Make everything acknowledged before durable."""
        ...

    def quiet(self) -> AbstractContextManager[None]:
        """Metadata on disk that is committed, and does not change while no volume is written."""
        ...

    def volumes(self) -> Iterator[VolumeInfo]:
        """All thin volumes in the order of their ids."""
        ...

    def mapped_blocks(self) -> dict[VolumeId, int]:
        """How many blocks each volume maps, by id, in the order of their ids; quick for many."""
        ...

    def has_volume(self, volume_id: VolumeId) -> bool:
        """Whether there is one of an id."""
        ...

    def volume_info(self, volume_id: VolumeId) -> VolumeInfo:
        """One of them."""
        ...

    def open_volume(
        self,
        volume_id: VolumeId,
        *,
        size: int,
        read_only: bool = False,
        origin: BlockDevice | None = None,
    ) -> VolumeIO:
        """Open one; twice is BusyError. Where nothing is mapped it reads as the external origin."""
        ...

    def resize_data(self, blocks: int) -> None:
        """Grow the data to so many blocks."""
        ...

    def resize_metadata(self) -> None:
        """Grow the metadata to its device's size."""
        ...

    def reserve_metadata_snapshot(self) -> None:
        """Hold the present metadata for readers beside us."""
        ...

    def release_metadata_snapshot(self) -> None:
        """Let it go."""
        ...

    def clear_needs_check(self) -> None:
        """Say that it was checked."""
        ...

    def set_when_full(self, *, error: bool, timeout_ms: int) -> None:
        """What writes do when data space is out."""
        ...

    def set_low_water(self, blocks: int) -> None:
        """Free data blocks below which low_water_reached is set."""
        ...

    def punch_some(self, max_blocks: int) -> int:
        """Return the host space of so many freed blocks; how many are left to do."""
        ...

    def on_event(self, callback: Callable[[], None]) -> None:
        """Have a function called when the mode or low water changes, where the pool announces it.

        It is called in a thread of the pool's, until that is closed. A pool that announces nothing
        has to be looked at now and then.
        """
        ...

    def wait_event(self, sequence: int, *, timeout_ms: int) -> int:
        """Wait until the mode, low water or the set of volumes changes; the new sequence."""
        ...

    @property
    def closed(self) -> bool:
        """It was closed."""
        ...

    def close(self) -> None:
        """Commit and let go."""
        ...

    def __enter__(self) -> Self:
        """The pool itself."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        ...
