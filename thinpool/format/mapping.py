"""Value of a device's tree: where a virtual block lies."""

from __future__ import annotations

from dataclasses import dataclass

from thinpool.format.limits import DATA_BLOCKS_MAX, TIME_MAX
from thinpool.format.record import Record, u64

TIME_BITS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingValue:
    """Data block and time in one number."""

    block_time: int

    @classmethod
    def of(cls, *, data_block: int, time: int) -> MappingValue:
        """Pack.

        Raises:
            ValueError: one of them does not fit.
        """
        if not 0 <= data_block < DATA_BLOCKS_MAX or not 0 <= time <= TIME_MAX:
            raise ValueError(f"data block {data_block} at time {time} does not fit a mapping")
        return cls(block_time=data_block << TIME_BITS | time)

    @property
    def data_block(self) -> int:
        """The data block."""
        return self.block_time >> TIME_BITS

    @property
    def time(self) -> int:
        """The pool's time when it was mapped."""
        return self.block_time & TIME_MAX


MAPPING = Record(
    "mapping",
    "Mapping value",
    MappingValue,
    u64("block_time", "", "Data block in the upper 40 bits, time in the lower 24."),
)
