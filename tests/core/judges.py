"""Independent opinions on metadata: Debian's thin_check and thin_dump."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from thinpool.check import check_metadata
from thinpool.engine import BlockDevice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from thinpool.model import CheckReport

MD = 4096


@contextmanager
def metadata_file(metadata: bytes) -> Iterator[Path]:
    """A file that the tools can open with O_DIRECT, gone afterwards."""
    descriptor, name = tempfile.mkstemp(prefix="thinpool-judge-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(metadata)
        yield Path(name)
    finally:
        Path(name).unlink()


def have_thin_tools() -> bool:
    return shutil.which("thin_check") is not None


def our_check(metadata: bytes | bytearray) -> CheckReport:
    """Our own checker's report, which shares no code with the engine."""
    with BlockDevice.open_memory(len(metadata)) as device:
        device.write(0, metadata)
        return check_metadata(device)


def thin_check(metadata: bytes) -> None:
    """Assert that thin_check finds nothing.

    Where the tool is missing and not required, the rest of the test still means something.
    """
    if not have_thin_tools():
        assert "thin_tools" not in os.environ.get("THINPOOL_REQUIRE", "").split(",")
        return
    with metadata_file(metadata) as path:
        done = subprocess.run(
            ["thin_check", str(path)], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr


def thin_dump(metadata: bytes) -> dict[int, dict[int, int]]:
    """Device id -> virtual block -> data block, as thin_dump sees it."""
    with metadata_file(metadata) as path:
        done = subprocess.run(["thin_dump", str(path)], capture_output=True, text=True, check=True)
    devices: dict[int, dict[int, int]] = {}
    for device in ET.fromstring(done.stdout).iter("device"):  # noqa: S314 - our own tool's output
        blocks = devices.setdefault(int(device.attrib["dev_id"]), {})
        for mapping in device:
            a = mapping.attrib
            if mapping.tag == "single_mapping":
                blocks[int(a["origin_block"])] = int(a["data_block"])
            else:
                for i in range(int(a["length"])):
                    blocks[int(a["origin_begin"]) + i] = int(a["data_begin"]) + i
        assert len(blocks) == int(device.attrib["mapped_blocks"])
    return devices


def contents(device: BlockDevice) -> bytes:
    return device.read(0, device.size)
