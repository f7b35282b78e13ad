"""What differs between two devices of one metadata."""

from __future__ import annotations

import struct
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from thinpool._native import ffi, lib
from thinpool.check.source import NOTHING, opened
from thinpool.engine.handle import Handle
from thinpool.engine.status import check as check_status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from thinpool.check.source import Source
    from thinpool.engine.bdev import BlockDevice

BATCH: Final = 512
RUN: Final = struct.Struct("=4Q2I")
"""``struct tp_delta_run``, read as a whole: five fields through cffi take five times as long."""


class DeltaKind(Enum):
    """How a range of virtual blocks stands in the two devices."""

    SAME = "same"
    DIFFERENT = "different"
    LEFT_ONLY = "left_only"
    RIGHT_ONLY = "right_only"


_KINDS = {
    lib.TP_DELTA_SAME: DeltaKind.SAME,
    lib.TP_DELTA_DIFFERENT: DeltaKind.DIFFERENT,
    lib.TP_DELTA_LEFT_ONLY: DeltaKind.LEFT_ONLY,
    lib.TP_DELTA_RIGHT_ONLY: DeltaKind.RIGHT_ONLY,
}


class DeltaRange(NamedTuple):
    """Neighbouring virtual blocks of one kind.

    A tuple, since there may be millions, and a frozen dataclass takes four times as long to make.

    Attributes:
        kind: how they stand in the two devices.
        begin: first virtual block.
        length: blocks.
        left_data_begin: the left one's data block of the first; None where it has none.
        right_data_begin: likewise.
    """

    kind: DeltaKind
    begin: int
    length: int
    left_data_begin: int | None
    right_data_begin: int | None


class _Delta(Handle):
    """One ``struct tp_delta``."""

    def __init__(self, device: BlockDevice, **options: int) -> None:
        made = ffi.new("struct tp_delta **")
        self._path = device.name
        with device.in_call() as (pointer, err):
            wanted = ffi.new("struct tp_delta_options *", options)
            check_status(lib.tp_delta_open(pointer, wanted, made, err), err, path=self._path)
        super().__init__(made[0], lib.tp_delta_close, above=(device,), what="a delta")

    def _free(self, pointer: Any) -> None:  # noqa: ANN401 - cffi's data has no type
        lib.tp_delta_close(pointer)

    def ranges(self) -> Iterator[DeltaRange]:
        """All, in key order."""
        batch = ffi.new("struct tp_delta_run[]", BATCH)
        count = ffi.new("size_t *")
        while True:
            with self.in_call() as (pointer, err):
                status = lib.tp_delta_next(pointer, batch, BATCH, count, err)
                check_status(status, err, path=self._path)
            if count[0] == 0:
                return
            runs = RUN.iter_unpack(ffi.buffer(batch, count[0] * RUN.size))
            for begin, length, left, right, kind, _ in runs:
                yield DeltaRange(
                    _KINDS[kind],
                    begin,
                    length,
                    None if left == NOTHING else left,
                    None if right == NOTHING else right,
                )


def delta(
    source: Source,
    left: int,
    right: int,
    *,
    use_metadata_snapshot: bool = False,
    same: bool = False,
    by_data_block: bool = False,
    threads: int = 2,
) -> Iterator[DeltaRange]:
    """Ranges of virtual blocks in which two devices differ, in order.

    Data blocks are compared, times are not. Subtrees that both share are not even read, unless
    ``same`` asks for them.

    Args:
        source: the metadata device, or its path.
        left: a device id.
        right: another.
        use_metadata_snapshot: read the held one: of a pool in use.
        same: give the ranges that are the same, too.
        by_data_block: end a range where its data blocks are no neighbours, so that each can be
            copied in one go.
        threads: of the C core.

    Raises:
        NotFoundError: there is no such device, or no metadata snapshot.
        CorruptMetadataError: the metadata cannot be followed; check says more.
    """
    with (
        opened(source) as device,
        _Delta(
            device,
            left=left,
            right=right,
            use_metadata_snapshot=use_metadata_snapshot,
            with_same=same,
            by_data_block=by_data_block,
            nr_threads=threads,
        ) as handle,
    ):
        yield from handle.ranges()
