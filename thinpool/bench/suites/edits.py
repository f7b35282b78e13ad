"""Edits of a large file that lives in an image, first touched in a new container.

Measured are open, the writes, and fsync: ``acknowledged`` ends when the last write has returned,
``durable`` when fsync has. Making the container is not part of either. ``added`` are the bytes in
use on the disk below before and after, everything written back.

Cold: the host's caches are dropped once the container is there. Warm: the file was read through it.
"""

from __future__ import annotations

import os
import random
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from thinpool.bench.context import in_turns
from thinpool.bench.stores import GIB, MIB, Store, make_stores
from thinpool.bench.workplace import drop_caches, write_file
from thinpool.errors import ThinpoolError
from thinpool.units import KIB, format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from thinpool.bench.context import Context
    from thinpool.bench.results import Parameter

FILE: Final = "file"
PLACES: Final = (2, 10, 100, 1_000, 10_000)
SIZES: Final = (MIB, 16 * MIB, 256 * MIB, GIB, 4 * GIB)
QUICK_SIZES: Final = (MIB, 8 * MIB)
_DISKS: Final = 4
SLOW_COPIES: Final = 3
"""Repetitions where a whole file of 4 GiB is copied by anyone but overlay2."""


def run(context: Context) -> None:
    """Measure."""
    sizes = _that_fit(context, context.size(SIZES, QUICK_SIZES))
    large = min(context.size(GIB, 8 * MIB), sizes[-1])
    middle = min(context.size(256 * MIB, 8 * MIB), sizes[-1])

    def ready(name: str, make: Callable[[], Store]) -> Store | None:
        context.say(f"making {name} ready")
        return context.try_peer(name, make)

    stores = make_stores(context.place, size=sum(sizes), ready=ready)
    _make_images(context, stores, sizes)
    context.results.note(
        "unionfs-fuse stands in for AUFS, which current kernels do not carry: it too copies a file "
        "whole before its first change"
    )
    context.results.note("vfs copies when the container is made, which its times do not include")

    some = [s for s in stores if not s.copies_at_creation and "fuse" not in s.name]
    _case(context, stores, MIB, KIB * 4, needs=10)
    for size in sizes[1:]:
        _case(context, stores, size, KIB * 4, needs=35 * size / GIB)
    curve = [s for s in some if s.name != "xfs reflink copy"]
    for count in context.size(PLACES, PLACES[:2]):
        _case(context, curve, large, KIB * 4, places=count, needs=25)
    _case(context, some, large, KIB * 4, warm=True, needs=30)
    for length in (64 * KIB, MIB):
        _case(context, stores, middle, length, needs=20)
        _case(context, some, large, length, needs=30)
    for size, who in ((middle, stores), (large, some)):
        _scattered(context, who, size, needs=30)
    _case(context, stores, middle, KIB * 4, warm=True, needs=20)
    for size in sizes:
        if size < middle:
            _larger_edits(context, stores, size, needs=5)
        elif size > large:
            _larger_edits(context, some, size, needs=100)


def _make_images(context: Context, stores: Sequence[Store], sizes: Sequence[int]) -> None:
    for size in sizes:
        for store in stores:
            context.say(f"an image with a file of {format_size(size)} in {store.name}")
            store.make_image(_image(size), partial(_fill, size=size))


def _larger_edits(context: Context, stores: Sequence[Store], size: int, *, needs: float) -> None:
    """At the ends of the range of sizes: last, as the middle says most of it."""
    for length in (64 * KIB, MIB):
        _case(context, stores, size, length, needs=needs)
    _scattered(context, stores, size, needs=needs)


def _scattered(context: Context, stores: Sequence[Store], size: int, *, needs: float) -> None:
    """4 KiB at each of so many places that 1 % of the file is edited."""
    places = size // 100 // (4 * KIB)
    _case(context, stores, size, KIB * 4, places=places, share="1 %", needs=needs)


def _that_fit(context: Context, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of which all images and two whole copies fit on the disk; others are named."""
    found = os.statvfs(context.place.folder)
    free = found.f_bavail * found.f_frsize
    while len(sizes) > 1 and _DISKS * sum(sizes) + 2 * sizes[-1] + 2 * GIB > free:
        context.results.left_out.append(
            (f"files of {format_size(sizes[-1])}", f"only {format_size(free)} are free to work in")
        )
        sizes = sizes[:-1]
    return sizes


def _image(size: int) -> str:
    return f"file-{size}"


def _fill(folder: Path, *, size: int) -> None:
    write_file(folder / FILE, size)


def _case(
    context: Context,
    stores: Sequence[Store],
    size: int,
    length: int,
    *,
    places: int = 1,
    share: str = "",
    warm: bool = False,
    needs: float,
) -> None:
    """Edit in every store in turn.

    Args:
        context: the run.
        stores: where.
        size: of the file, bytes.
        length: of each edit.
        places: how many edits before the one fsync.
        share: of the file that they are, where that is what was asked for.
        warm: read the file first.
        needs: seconds, roughly.
    """
    state = "warm" if warm else "cold"
    many = f"{share} scattered, {places}" if share else str(places)
    name = f"{many} edit(s) of {format_size(length)} in {format_size(size)}, {state}"
    parameters: dict[str, Parameter] = {
        "size": size,
        "length": length,
        "places": places,
        "state": state,
    }
    if share:
        parameters["share"] = share
    if any(context.results.find("edit", s.name, "durable", **parameters) for s in stores):
        return  # quick sizes coincide
    with context.case(name, needs=needs) as go:
        if not go:
            return
        for repetition, store in in_turns(stores, context.options.repetitions):
            slow = store.copies_at_creation or "fuse" in store.name
            if size > GIB and slow and repetition >= SLOW_COPIES:
                context.results.note(
                    f"{SLOW_COPIES} repetitions of copies of {format_size(size)} but overlay2's"
                )
                continue
            found = measure(
                store, size, length, places=places, warm=warm, seed=repetition * 100_003 + places
            )
            for metric, value in found.items():
                unit = "bytes" if metric.startswith("added") else "s"
                context.results.add("edit", store.name, metric, unit, value, **parameters)
            context.save()


def measure(
    store: Store, size: int, length: int, *, places: int, warm: bool, seed: int
) -> dict[str, float]:
    """Edit in a new container.

    Returns:
        Seconds ``made``, ``acknowledged``, ``durable``; bytes ``added`` by the edit, and
        ``added_with_container``.

    Raises:
        ThinpoolError: a size or a byte is not what it has to be.
    """
    offsets = random.Random(seed).sample(range(size // length), places)  # noqa: S311 - a seed
    data = os.urandom(length)
    first = store.used()
    begun = time.perf_counter()
    with store.container(_image(size)) as folder:
        made = time.perf_counter() - begun
        path = folder / FILE
        _expect(path.stat().st_size == size, f"{store.name}: the file has another size")
        if warm:
            with path.open("rb", buffering=0) as file:
                while file.read(MIB):
                    pass
        before = store.used()
        if not warm:
            drop_caches()
        acknowledged, durable = edit(path, [each * length for each in offsets], data)
        after = store.used()
        _verify(path, size, [each * length for each in offsets], data)
    if store.copies:
        _expect(after - before >= size, f"{store.name}: it did not copy {size} bytes")
    elif store.copies_at_creation:
        _expect(before - first >= size, f"{store.name}: it did not copy {size} bytes")
    else:
        most = places * (length + (1 << 18)) + (4 << 20)
        _expect(after - before <= most, f"{store.name}: {after - before} bytes for {places} edits")
    return {
        "made": made,
        "acknowledged": acknowledged,
        "durable": durable,
        "added": float(after - before),
        "added_with_container": float(after - first),
    }


def edit(path: Path, offsets: Sequence[int], data: bytes) -> tuple[float, float]:
    """Write at each offset, then fsync: seconds until acknowledged, and until durable."""
    begun = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for offset in offsets:
            os.pwrite(descriptor, data, offset)
        acknowledged = time.perf_counter() - begun
        os.fsync(descriptor)
        return acknowledged, time.perf_counter() - begun
    finally:
        os.close(descriptor)


def _verify(path: Path, size: int, offsets: Sequence[int], data: bytes) -> None:
    with path.open("rb", buffering=0) as file:
        _expect(os.fstat(file.fileno()).st_size == size, f"{path}: the size changed")
        for offset in (*offsets[:8], *offsets[-8:]):
            found = os.pread(file.fileno(), len(data), offset)
            _expect(found == data, f"{path}: other bytes at {offset}")


def _expect(holds: bool, otherwise: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not holds:
        raise ThinpoolError(f"the benchmark itself is wrong: {otherwise}")
