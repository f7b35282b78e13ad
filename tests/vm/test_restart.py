"""A machine is restarted: systemd brings back what was activated to persist, on either engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernel import machine

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.kernel_vm,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("restart"),
]
HERE = Path(__file__).resolve().parent
BOOT_SECONDS = 400.0


def boot(disk: Path, job: str) -> list[str]:
    """Run a job under systemd; the lines that it printed."""
    return machine.run(
        HERE / "systemd.sh",
        disks=[disk],
        options=["--udev", "--mem=3000"],
        environment={"JOB": str(HERE / job), "PYTHON": sys.executable},
        timeout=BOOT_SECONDS,
    ).splitlines()


def test_volumes_that_persist_are_there_after_a_restart(
    require: Callable[..., None], tmp_path: Path
) -> None:
    require("systemd")
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(1 << 30)
    before = boot(disk, "before_restart.sh")
    assert before[-1] == "job: success", "\n".join(before)
    assert before.count("active") == 2
    after = boot(disk, "after_restart.sh")
    assert after[-1] == "job: success", "\n".join(after)
    assert after.count("active") == 3
    for engine in ("user", "dm"):
        assert f"written on {engine}" in after
    assert any(line.startswith("/dev/loop") for line in after)
    assert any(line.startswith("/dev/mapper/thinpool-") for line in after)
