"""Reading a pool's mappings while it is in use: check, dump, delta, who owns what.

Where nothing uses the pool, its live metadata is read, whole, and nothing changes it meanwhile.
Else a metadata snapshot is: it cannot change, and says nothing of the space maps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thinpool.check import (
    DeltaKind,
    check_metadata,
    dump_metadata,
    exclusive_blocks,
    exclusive_blocks_each,
)
from thinpool.check import delta as delta_ranges
from thinpool.model import CheckReport, Delta, DeltaRange, Progress, VolumeId

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from thinpool.store.core import PoolCore


def exclusive(service: PoolCore, ids: Sequence[VolumeId]) -> dict[VolumeId, int]:
    """Bytes that each volume alone refers to."""
    with service.stable_metadata() as snapshot:
        found = exclusive_blocks_each(service.metadata_device, ids, use_metadata_snapshot=snapshot)
    return {VolumeId(each): blocks * service.config.block_size for each, blocks in found.items()}


def freed(service: PoolCore, ids: Sequence[VolumeId]) -> int:
    """Bytes that nothing refers to once these volumes are gone."""
    with service.stable_metadata() as snapshot:
        blocks = exclusive_blocks(service.metadata_device, ids, use_metadata_snapshot=snapshot)
    return blocks * service.config.block_size


def delta(service: PoolCore, left: str, right: str, *, lease: str | None = None) -> Delta:
    """Where two volumes do not share their blocks."""
    first, second = service.ids(left, right, lease=lease)
    block = service.config.block_size
    with service.stable_metadata() as snapshot:
        ranges = tuple(
            DeltaRange(begin=each.begin * block, length=each.length * block, change=each.kind.value)
            for each in delta_ranges(
                service.metadata_device, first, second, use_metadata_snapshot=snapshot
            )
            if each.kind is not DeltaKind.SAME
        )
    pool = service.config.name
    return Delta(left=f"{pool}/{left}", right=f"{pool}/{right}", block_size=block, ranges=ranges)


def check(service: PoolCore, *, progress: Callable[[Progress], None] | None = None) -> CheckReport:
    """Check the metadata."""

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(
                Progress(operation="check", step="metadata", done=done, total=total, unit="blocks")
            )

    with service.stable_metadata() as snapshot:
        return check_metadata(
            service.metadata_device,
            pool=service.config.name,
            use_metadata_snapshot=snapshot,
            nr_data_blocks=None if snapshot else service.data_blocks,
            progress=tell,
        )


def dump(service: PoolCore, write: Callable[[str], None]) -> None:
    """Write the metadata as thin-provisioning-tools' XML."""
    with service.stable_metadata() as snapshot:
        for text in dump_metadata(service.metadata_device, use_metadata_snapshot=snapshot):
            write(text)
