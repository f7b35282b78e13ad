"""An independent reader of metadata: check it, dump it, say what differs between two devices.

It shares no code with the engine that writes pools, so that it can judge it, and it takes any
metadata, damaged or hostile: a path or an open block device. Nothing is ever written. A pool that
is in use is read through its metadata snapshot (``use_metadata_snapshot=True``), which cannot
change until it is released.
"""

from __future__ import annotations

from thinpool.check.delta import DeltaKind, DeltaRange, delta
from thinpool.check.dump import dump_metadata
from thinpool.check.exclusive import exclusive_blocks, exclusive_blocks_each
from thinpool.check.reader import DeviceDetails, MetadataReader, Run, SuperblockFacts
from thinpool.check.report import check_metadata

__all__ = [
    "DeltaKind",
    "DeltaRange",
    "DeviceDetails",
    "MetadataReader",
    "Run",
    "SuperblockFacts",
    "check_metadata",
    "delta",
    "dump_metadata",
    "exclusive_blocks",
    "exclusive_blocks_each",
]
