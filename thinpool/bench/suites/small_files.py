"""Where file-level copy-on-write is said to win: many small files, and many readers of the same.

Small files: in a new container, cold, every file of the image is appended to, as many are created,
and every file of the image is deleted; each step ends with the filesystem written back, which is
when it is ``durable``. Readers: containers of one image read all its files one after another;
``memory`` is what that took from the host's free memory.
"""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from thinpool.bench.context import in_turns
from thinpool.bench.stores import MIB, Store, make_stores
from thinpool.bench.workplace import drop_caches, sync_filesystem
from thinpool.errors import ThinpoolError
from thinpool.units import KIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from thinpool.bench.context import Context

FILES: Final = 10_000
A_FOLDER: Final = 100
SMALL: Final = 4 * KIB
SHARED: Final = 64 * KIB
APPENDED: Final = b"a line more\n"
READERS: Final = 10
SLOW: Final = 3
"""Repetitions of what runs in userspace."""


def run(context: Context) -> None:
    """Measure."""
    count = context.size(FILES, 100)
    shared = context.size(1_000, 20)

    def ready(name: str, make: Callable[[], Store]) -> Store | None:
        context.say(f"making {name} ready")
        return context.try_peer(name, make)

    stores = make_stores(context.place, size=context.size(512, 64) * MIB, ready=ready)
    for store in stores:
        store.make_image("small", partial(_fill, count=count, size=SMALL))
        store.make_image("shared", partial(_fill, count=shared, size=SHARED))
    quick = [store for store in stores if "fuse" not in store.name]
    slow = [store for store in stores if "fuse" in store.name]
    _small(context, quick, count, needs=100)
    sharing = [store for store in quick if not store.copies_at_creation]
    readers = context.size(READERS, 3)
    with context.case(f"{readers} containers read the same {shared} files", needs=60) as go:
        if go:
            for _, store in in_turns(sharing, context.options.repetitions):
                took, memory = _read_shared(store, shared, readers)
                context.results.add("shared reads", store.name, "time", "s", took, readers=readers)
                context.results.add(
                    "shared reads", store.name, "memory", "bytes", memory, readers=readers
                )
    _small(context, slow, count, needs=40, most=SLOW)


def _small(
    context: Context, stores: Sequence[Store], count: int, *, needs: float, most: int | None = None
) -> None:
    names = ", ".join(store.name for store in stores)
    with context.case(f"{count} small files in {names}", needs=needs) as go:
        if not go:
            return
        repetitions = context.options.repetitions
        if most is not None and repetitions > most:
            repetitions = most
            context.results.note(f"{most} repetitions of {names}")
        for _, store in in_turns(stores, repetitions):
            for step, (acknowledged, durable) in _steps(store, count):
                context.results.add(
                    step, store.name, "acknowledged", "s", acknowledged, files=count, state="cold"
                )
                context.results.add(
                    step, store.name, "durable", "s", durable, files=count, state="cold"
                )
            context.save()


def _fill(folder: Path, *, count: int, size: int) -> None:
    for name in _names(count):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(size))
    sync_filesystem(folder)


def _names(count: int) -> Iterator[str]:
    """Of files, a hundred a folder."""
    for number in range(count):
        yield f"{number // A_FOLDER:03}/{number % A_FOLDER:02}"


def _steps(store: Store, count: int) -> Iterator[tuple[str, tuple[float, float]]]:
    """The three steps in one new container."""
    with store.container("small") as folder:
        files = [str(folder / name) for name in _names(count)]
        sync_filesystem(folder)
        drop_caches()
        yield "append", _timed(store, folder, partial(_append, files))
        _expect(all(os.stat(f).st_size == SMALL + len(APPENDED) for f in files[::97]), store)  # noqa: PTH116
        data = os.urandom(SMALL)
        made = [f"{file}.new" for file in files]
        yield "create", _timed(store, folder, partial(_create, made, data))
        _expect(all(os.stat(f).st_size == SMALL for f in made[::97]), store)  # noqa: PTH116
        yield "delete", _timed(store, folder, partial(_delete, files))
        _expect(not any(map(os.path.lexists, files[::97])), store)
        _expect(all(map(os.path.lexists, made[::97])), store)


def _timed(store: Store, folder: Path, work: Callable[[], None]) -> tuple[float, float]:
    begun = time.perf_counter()
    work()
    acknowledged = time.perf_counter() - begun
    store.write_back(folder)
    return acknowledged, time.perf_counter() - begun


def _append(files: Sequence[str]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, APPENDED)
        os.close(descriptor)


def _create(files: Sequence[str], data: bytes) -> None:
    for file in files:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(descriptor, data)
        os.close(descriptor)


def _delete(files: Sequence[str]) -> None:
    for file in files:
        os.unlink(file)  # noqa: PTH108 - the call that is measured


def _read_shared(store: Store, count: int, readers: int) -> tuple[float, float]:
    """Seconds that all containers took together, and bytes of memory that it took."""
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(store.container("shared")) for _ in range(readers)]
        drop_caches()
        before = _free_memory()
        read = 0
        begun = time.perf_counter()
        for folder in folders:
            for name in _names(count):
                read += len((folder / name).read_bytes())
        took = time.perf_counter() - begun
        memory = before - _free_memory()
    _expect(read == readers * count * SHARED, store)
    return took, float(memory)


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemFree:"):
            return int(line.split()[1]) * KIB
    raise ThinpoolError("/proc/meminfo has no MemFree")


def _expect(holds: bool, store: Store) -> None:  # noqa: FBT001 - reads as a sentence
    if not holds:
        raise ThinpoolError(f"the benchmark itself is wrong: {store.name} has other sizes")
