"""Value of the details tree: what the pool keeps of a device."""

from __future__ import annotations

from dataclasses import dataclass

from thinpool.format.record import Record, u32, u64


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """One device. Its size is not among them: it stands in the table only."""

    mapped_blocks: int
    transaction_id: int
    creation_time: int
    snapshotted_time: int


DEVICE_DETAILS = Record(
    "device_details",
    "Device details",
    Details,
    u64("mapped_blocks", "blocks", "Entries of the device's tree."),
    u64("transaction_id", "", "The pool's when the device was made."),
    u32("creation_time", "snapshots", "The pool's time then."),
    u32(
        "snapshotted_time",
        "snapshots",
        "The pool's time at its last snapshot: mappings of an earlier time may be shared.",
    ),
)
