"""How much only certain devices map: what removing them would free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thinpool._native import ffi, lib
from thinpool.check.source import opened
from thinpool.engine.status import check as check_status
from thinpool.engine.status import new_error

if TYPE_CHECKING:
    from collections.abc import Collection

    from thinpool.check.source import Source


def exclusive_blocks(
    source: Source, ids: Collection[int], *, use_metadata_snapshot: bool = False
) -> int:
    """Data blocks that removing this whole set of devices would free. Reads every mapping.

    A metadata snapshot that is held keeps what it maps: such blocks are not counted, unless it is
    itself what is read.

    Args:
        source: the metadata device, or its path.
        ids: the devices, each once.
        use_metadata_snapshot: read the held one: of a pool in use.

    Raises:
        NotFoundError: there is no such device, or no metadata snapshot.
        CorruptMetadataError: the metadata cannot be followed; check says more.
    """
    blocks = ffi.new("uint64_t *")
    with opened(source) as device, device.in_call() as (pointer, err):
        wanted = ffi.new("uint64_t[]", list(ids))
        status = lib.tp_exclusive(pointer, use_metadata_snapshot, wanted, len(ids), blocks, err)
        check_status(status, err, path=device.name)
    return int(blocks[0])


def exclusive_blocks_each(
    source: Source, ids: Collection[int], *, use_metadata_snapshot: bool = False
) -> dict[int, int]:
    """Data blocks that each device alone maps, by its id. One pass over every mapping for all.

    Args and raises: as exclusive_blocks.
    """
    err = new_error()
    order = list(ids)
    blocks = ffi.new("uint64_t[]", max(len(order), 1))
    with opened(source) as device, device.in_call() as (pointer, _):
        wanted = ffi.new("uint64_t[]", order)
        status = lib.tp_exclusive_each(
            pointer, use_metadata_snapshot, wanted, len(order), blocks, err
        )
        check_status(status, err, path=device.name)
    return {device_id: int(blocks[index]) for index, device_id in enumerate(order)}
