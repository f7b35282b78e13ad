"""The user engine: pools, volumes and block devices of the C core, as typed Python handles."""

from __future__ import annotations

from thinpool.engine.allocator import Allocator
from thinpool.engine.backend import (
    METADATA_BLOCK,
    SECTOR,
    VOLUME_ID_MAX,
    Change,
    ChangeKind,
    DiscardMode,
    PoolBackend,
    PoolMode,
    PoolOptions,
    PoolStatus,
    VolumeInfo,
    VolumeIO,
)
from thinpool.engine.bdev import (
    BlockDevice,
    FaultDevice,
    FaultKind,
    FaultOp,
    LogDevice,
    LogEntry,
    LogKind,
)
from thinpool.engine.flush import flush_when_due
from thinpool.engine.pool import Pool, Volume, format_pool

__all__ = [
    "METADATA_BLOCK",
    "SECTOR",
    "VOLUME_ID_MAX",
    "Allocator",
    "BlockDevice",
    "Change",
    "ChangeKind",
    "DiscardMode",
    "FaultDevice",
    "FaultKind",
    "FaultOp",
    "LogDevice",
    "LogEntry",
    "LogKind",
    "Pool",
    "PoolBackend",
    "PoolMode",
    "PoolOptions",
    "PoolStatus",
    "Volume",
    "VolumeIO",
    "VolumeInfo",
    "flush_when_due",
    "format_pool",
]
