"""The bitmap allocator of the C core: which blocks of a device can be handed out now."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from thinpool._native import ffi, lib
from thinpool.engine.handle import Handle
from thinpool.engine.status import check
from thinpool.errors import NoMemoryError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BLOCKS_MAX = 1 << 40


class Allocator(Handle):
    """In memory. A block is allocatable, used, or pending: freed since the last commit.

    Thread-safe: a lock stands before the core's allocator, which has none. On failure nothing has
    changed. Use the calls for runs and batches: each call costs a fraction of a microsecond, a
    block within one some nanoseconds.

    Args:
        nr_blocks: how many there are, all allocatable; at most BLOCKS_MAX.

    Raises:
        UsageError: fewer than 0 or more than BLOCKS_MAX.
        NoMemoryError: two bits a block are too much for this host.
    """

    def __init__(self, nr_blocks: int) -> None:
        """Make one."""
        if not 0 <= nr_blocks <= BLOCKS_MAX:
            raise UsageError(f"an allocator has 0 to {BLOCKS_MAX} blocks, not {nr_blocks}")
        pointer = lib.tp_allocator_create(nr_blocks)
        if pointer == ffi.NULL:
            raise NoMemoryError(f"no allocator of {nr_blocks} blocks can be had")
        super().__init__(pointer, lib.tp_allocator_destroy, what=f"allocator of {nr_blocks} blocks")
        self._lock = threading.Lock()

    def _free(self, pointer: Any) -> None:  # noqa: ANN401 - cffi's data has no type
        lib.tp_allocator_destroy(pointer)

    @contextmanager
    def _alone(self) -> Iterator[Any]:
        with self._lock, self.in_call() as (pointer, _):
            yield pointer

    def __len__(self) -> int:
        """How many blocks there are."""
        with self._alone() as pointer:
            return int(lib.tp_allocator_nr_blocks(pointer))

    def __bool__(self) -> bool:
        """An allocator of no blocks is one too."""
        return True

    @property
    def free_blocks(self) -> int:
        """How many can be allocated now."""
        with self._alone() as pointer:
            return int(lib.tp_allocator_nr_free(pointer))

    @property
    def pending_blocks(self) -> int:
        """How many were freed since the last commit."""
        with self._alone() as pointer:
            return int(lib.tp_allocator_nr_pending(pointer))

    def resize(self, nr_blocks: int) -> None:
        """Add allocatable blocks at the end.

        Raises:
            UsageError: fewer than there are, or more than BLOCKS_MAX.
        """
        with self._alone() as pointer:
            check(lib.tp_allocator_resize(pointer, nr_blocks))

    def allocate(self) -> int:
        """One block, next-fit with wrap-around.

        Raises:
            DataSpaceError: none is allocatable.
        """
        block = ffi.new("uint64_t *")
        with self._alone() as pointer:
            check(lib.tp_allocator_alloc(pointer, block))
        return int(block[0])

    def allocate_run(self, want: int) -> range:
        """A run of neighbours, of 1 to ``want`` blocks: as long as a bounded search finds.

        Raises:
            DataSpaceError: none is allocatable.
            UsageError: want is 0.
        """
        begin, length = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        with self._alone() as pointer:
            check(lib.tp_allocator_alloc_run(pointer, want, begin, length))
        return range(begin[0], begin[0] + length[0])

    def allocate_batch(self, count: int) -> list[int]:
        """Single blocks in one call; fewer than asked for when space ends.

        Raises:
            DataSpaceError: none is allocatable.
        """
        blocks, got = ffi.new("uint64_t[]", count), ffi.new("size_t *")
        with self._alone() as pointer:
            check(lib.tp_allocator_alloc_batch(pointer, count, blocks, got))
        return ffi.unpack(blocks, got[0]) if got[0] else []

    def take(self, begin: int, length: int = 1) -> None:
        """Use a given run.

        Raises:
            BusyError: not every block of it is allocatable.
            UsageError: it reaches past the end.
        """
        with self._alone() as pointer:
            check(lib.tp_allocator_take(pointer, begin, length))

    def untake(self, begin: int, length: int = 1) -> None:
        """Make used blocks allocatable at once: for what the last commit does not refer to.

        Raises:
            UsageError: not every block of it is used.
        """
        with self._alone() as pointer:
            check(lib.tp_allocator_untake(pointer, begin, length))

    def free(self, begin: int, length: int = 1) -> None:
        """Give used blocks back; they are allocatable after the next commit.

        Raises:
            UsageError: not every block of it is used.
        """
        with self._alone() as pointer:
            check(lib.tp_allocator_free(pointer, begin, length))

    def free_batch(self, blocks: Sequence[int]) -> None:
        """Give single blocks back in one call.

        Raises:
            UsageError: one is not used, or stands there twice.
        """
        with self._alone() as pointer:
            check(lib.tp_allocator_free_batch(pointer, list(blocks), len(blocks)))

    def commit(self) -> None:
        """Everything freed so far becomes allocatable."""
        with self._alone() as pointer:
            lib.tp_allocator_commit(pointer)

    def is_free(self, block: int) -> bool:
        """Whether it is allocatable."""
        with self._alone() as pointer:
            return bool(lib.tp_allocator_is_free(pointer, block))

    def free_runs(self) -> Iterator[range]:
        """The runs of allocatable blocks in order; what changes meanwhile may be seen or not."""
        begin, length = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        at = 0
        while True:
            with self._alone() as pointer:
                if lib.tp_allocator_next_free_run(pointer, at, begin, length):
                    return
            at = begin[0] + length[0]
            yield range(begin[0], at)
