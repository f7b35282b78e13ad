"""Who maps which data block: what belongs to one volume alone, what a removal would free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from thinpool.model import VolumeId
    from thinpool.store.service import PoolService


class Mappings(Protocol):
    """Reads the mappings of a pool in use."""

    def exclusive(self, service: PoolService) -> dict[VolumeId, int]:
        """Bytes that each volume alone refers to."""
        ...

    def freed(self, service: PoolService, ids: Sequence[VolumeId]) -> int:
        """Bytes that nothing refers to once these volumes are gone."""
        ...


def exclusive_blocks(runs: Iterable[tuple[int, int, int]]) -> dict[int, int]:
    """How many data blocks each device alone maps.

    Args:
        runs: (device, first data block, length); one device maps a data block once at most.
    """
    alone: dict[int, int] = {}
    count = owner = last = 0
    for position, step, device in _events(runs):
        if count == 1:
            alone[owner] = alone.get(owner, 0) + position - last
        last = position
        count += step
        owner += step * device  # the sum of those who map it: the owner, where there is one
    return alone


def freed_blocks(runs: Iterable[tuple[int, int, int]], devices: frozenset[int]) -> int:
    """How many data blocks only these devices map, together.

    Args:
        runs: as of exclusive_blocks.
        devices: to be removed.
    """
    freed = others = ours = last = 0
    for position, step, device in _events(runs):
        if ours and not others:
            freed += position - last
        last = position
        if device in devices:
            ours += step
        else:
            others += step
    return freed


def _events(runs: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Where runs begin and end, in order: (data block, +1 or -1, device)."""
    events = []
    for device, begin, length in runs:
        events.append((begin, 1, device))
        events.append((begin + length, -1, device))
    events.sort()
    return events
