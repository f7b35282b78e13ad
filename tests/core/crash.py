"""Crash images from a log of writes, by the rules of a disk with a volatile cache.

What a device was given before its last completed flush is on it. Of what came after, any subset
may be, in any order, and the last of a torn write's sectors may be missing; punches count as
writes of zeros. An image is the content of both devices at one point of the common order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thinpool.engine import LogKind

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

    from thinpool.engine import LogEntry

SECTOR = 512
EXHAUSTIVE_WRITES = 6  # up to so many unflushed writes, every subset is tried


@dataclass(frozen=True, kw_only=True)
class Image:
    """What a crash leaves."""

    position: int  # entries of the log before the crash
    how: str
    devices: tuple[bytearray, ...]


def _apply(target: bytearray, entry: LogEntry, sectors: int | None = None) -> None:
    data = entry.payload if entry.kind is LogKind.WRITE else bytes(entry.length)
    if sectors is not None:
        data = data[: sectors * SECTOR]
    target[entry.offset : entry.offset + len(data)] = data


def _choices(
    volatile: Sequence[LogEntry], random_: random.Random, samples: int
) -> Iterator[tuple[str, list[tuple[LogEntry, int | None]]]]:
    """Subsets of the unflushed writes, each with how many sectors of it arrived (None: all)."""
    n = len(volatile)
    yield "all", [(entry, None) for entry in volatile]
    if not n:
        return
    yield "none", []
    if n <= EXHAUSTIVE_WRITES:
        masks = list(range(1, (1 << n) - 1))
        random_.shuffle(masks)
        masks = masks[:samples]
    else:
        masks = [random_.getrandbits(n) for _ in range(samples)]
    for mask in masks:
        chosen = [entry for i, entry in enumerate(volatile) if mask >> i & 1]
        if random_.random() < 0.5:  # arrives in another order: overlapping writes may swap
            random_.shuffle(chosen)
        yield f"subset {mask:x} of {n}", [(entry, None) for entry in chosen]
    for _ in range(max(1, samples // 3)):
        torn = random_.randrange(n)
        keep = random_.randrange(1, max(2, volatile[torn].length // SECTOR))
        chosen_torn: list[tuple[LogEntry, int | None]] = [
            (entry, keep if i == torn else None)
            for i, entry in enumerate(volatile)
            if i == torn or random_.random() < 0.5
        ]
        yield f"torn {torn} of {n} after {keep} sectors", chosen_torn


def crash_images(
    start: Sequence[bytes],
    log: Sequence[LogEntry],
    random_: random.Random,
    *,
    samples: int,
    every: int = 1,
) -> Iterator[Image]:
    """Images at every flush of the log, and at seeded points between flushes.

    Args:
        start: contents of the devices before the first entry.
        log: the entries of all devices in their one order.
        random_: seeded.
        samples: random subsets at each point.
        every: use every n-th flush only.
    """
    durable = [bytearray(content) for content in start]
    volatile: list[list[LogEntry]] = [[] for _ in start]
    flushes = 0
    for position, entry in enumerate(log):
        if entry.kind is LogKind.MARK:
            continue
        is_flush = entry.kind is LogKind.FLUSH
        here = False
        if is_flush:
            flushes += 1
            here = flushes % every == 0
        elif random_.random() < 0.05:
            here = True
        if here:
            # Before the flush completes: everything unflushed may still be missing.
            for how, chosen in _choices(
                [(e) for per_device in volatile for e in per_device], random_, samples
            ):
                devices = tuple(bytearray(content) for content in durable)
                for each, sectors in chosen:
                    _apply(devices[each.device], each, sectors)
                yield Image(position=position, how=how, devices=devices)
        if is_flush:
            for each in volatile[entry.device]:
                _apply(durable[entry.device], each)
            volatile[entry.device].clear()
        else:
            volatile[entry.device].append(entry)
    yield Image(position=len(log), how="durable only", devices=tuple(map(bytearray, durable)))
