"""Record what a kernel answers, for test_records.py.

    python tests/dm/record.py > tests/dm/recorded.json

Run as root where there is a device-mapper and no device of its yet. The devices it makes are fixed,
so the answers are too, but for device numbers and versions.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from thinpool.dm import (
    UUID_PREFIX,
    DeviceMapper,
    ErrorTarget,
    LinearTarget,
    ThinPool,
    ThinPoolTarget,
    ThinTarget,
    ZeroTarget,
)
from thinpool.dm.abi import MESSAGE, Command, Flag
from thinpool.host import loop

NAMES = ["tpr-pool", "tpr-thin", "tpr-mixed", "tpr-bare"]


def record(dm: DeviceMapper) -> dict[str, object]:
    """Each answer as hex, up to the bytes that the kernel says it used."""
    control = dm._control
    asked = {
        "version": (Command.VERSION, {}),
        "list": (Command.LIST_DEVICES, {"flags": Flag.UUID}),
        "list_plain": (Command.LIST_DEVICES, {}),
        "status_pool": (Command.TABLE_STATUS, {"name": "tpr-pool", "flags": Flag.NOFLUSH}),
        "table_pool": (Command.TABLE_STATUS, {"name": "tpr-pool", "flags": Flag.STATUS_TABLE}),
        "table_mixed": (Command.TABLE_STATUS, {"name": "tpr-mixed", "flags": Flag.STATUS_TABLE}),
        "status_thin": (Command.TABLE_STATUS, {"name": "tpr-thin", "flags": Flag.NOFLUSH}),
        "deps_pool": (Command.TABLE_DEPS, {"name": "tpr-pool"}),
        "deps_bare": (Command.TABLE_DEPS, {"name": "tpr-bare"}),
        "info_bare": (Command.DEV_STATUS, {"name": "tpr-bare"}),
        "info_mixed": (Command.DEV_STATUS, {"name": "tpr-mixed"}),
        "versions": (Command.LIST_VERSIONS, {}),
        "version_thin": (Command.GET_TARGET_VERSION, {"name": "thin"}),
        "message_stats": (
            Command.TARGET_MSG,
            {"name": "tpr-mixed", "payload": MESSAGE.pack(0) + b"@stats_list\0"},
        ),
    }
    answers: dict[str, object] = {"kernel": os.uname().release}
    for label, (command, arguments) in asked.items():
        header, buffer = control.call(command, **arguments)
        answers[label] = bytes(buffer[: max(header.data_size, 312)]).hex()
    return answers


def main() -> None:
    """Make the devices, record, take them down."""
    with tempfile.TemporaryDirectory() as folder, DeviceMapper() as dm:
        attached = []
        try:
            for name, size in (("metadata", 4 << 20), ("data", 16 << 20)):
                path = Path(folder) / name
                with path.open("wb") as file:
                    file.truncate(size)
                attached.append(loop.attach(path, direct_io=False))
            metadata, data = (device.path for device in attached)
            pool = ThinPoolTarget(
                length=32768, metadata=metadata, data=data, block_sectors=128, low_water_blocks=4,
                skip_block_zeroing=True,
            )  # fmt: skip
            path = dm.activate("tpr-pool", [pool], uuid=UUID_PREFIX + "pool").path
            ThinPool(dm, "tpr-pool").create_thin(7)
            dm.activate("tpr-thin", [ThinTarget(length=2048, pool=path, id=7)], uuid="X-thin")
            dm.activate(
                "tpr-mixed",
                [
                    ZeroTarget(length=8),
                    LinearTarget(start=8, length=16, device=data, offset=64),
                    ErrorTarget(start=24, length=8),
                ],
                read_only=True,
            )
            dm.create("tpr-bare")
            dm.message("tpr-mixed", "@stats_create - 8")
            json.dump(record(dm), sys.stdout, indent=1)
            print()  # noqa: T201 - a program that prints
        finally:
            for name in reversed(NAMES):
                if dm.find(name) is not None:
                    dm.remove(name)
            for device in attached:
                loop.detach(device)


if __name__ == "__main__":
    main()
