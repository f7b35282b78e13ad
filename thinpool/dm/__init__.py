"""Device-mapper: the kernel's interface spoken directly, its devices, targets and events.

    with DeviceMapper() as dm:
        pool = ThinPoolTarget(length=sectors, metadata="/dev/vda", data="/dev/vdb",
                              block_sectors=128)
        dm.activate("tp-pool", [pool], uuid=UUID_PREFIX + "pool-1")
        ThinPool(dm, "tp-pool").create_thin(1)
        thin = ThinTarget(length=1 << 21, pool="/dev/mapper/tp-pool", id=1)
        print(dm.activate("tp-1", [thin], uuid=UUID_PREFIX + "1").path)

Knows nothing of stores and catalogues. Units are the kernel's: sectors of 512 bytes.
"""

from __future__ import annotations

from thinpool.dm.abi import DeviceEntry
from thinpool.dm.client import REMOVE_SECONDS, UUID_PREFIX, DeviceInfo, DeviceMapper
from thinpool.dm.cookies import UdevFlags
from thinpool.dm.events import DeviceEvent, DeviceEvents, DeviceMonitor
from thinpool.dm.nodes import path_of
from thinpool.dm.pool import ThinPool
from thinpool.dm.probe import device_mapper
from thinpool.dm.refusals import device_number, pool_over
from thinpool.dm.status import (
    DiscardPolicy,
    Failure,
    TargetStatus,
    ThinPoolMode,
    ThinPoolStatus,
    ThinStatus,
)
from thinpool.dm.targets import (
    DelayTarget,
    ErrorTarget,
    FlakeyTarget,
    LinearTarget,
    OtherTarget,
    Target,
    ThinPoolTarget,
    ThinTarget,
    ZeroTarget,
    device_text,
)
from thinpool.dm.udev import UdevMode

__all__ = [
    "REMOVE_SECONDS",
    "UUID_PREFIX",
    "DelayTarget",
    "DeviceEntry",
    "DeviceEvent",
    "DeviceEvents",
    "DeviceInfo",
    "DeviceMapper",
    "DeviceMonitor",
    "DiscardPolicy",
    "ErrorTarget",
    "Failure",
    "FlakeyTarget",
    "LinearTarget",
    "OtherTarget",
    "Target",
    "TargetStatus",
    "ThinPool",
    "ThinPoolMode",
    "ThinPoolStatus",
    "ThinPoolTarget",
    "ThinStatus",
    "ThinTarget",
    "UdevFlags",
    "UdevMode",
    "ZeroTarget",
    "device_mapper",
    "device_number",
    "device_text",
    "path_of",
    "pool_over",
]
