"""tools/demo.sh, with a smaller file and this host's own tree, to its end and cut short."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.root,
    pytest.mark.fuse,
    pytest.mark.loop,
    pytest.mark.ext4,
    pytest.mark.overlay,
    pytest.mark.thin_tools,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        Path(sys.prefix) != REPOSITORY / ".venv",
        reason="not run from the checkout's own .venv, which the demonstration would make anew",
    ),
]


@pytest.fixture
def demo(tmp_path: Path):
    """Starts the demonstration in a folder of this test's; ends it if the test does not."""
    started: list[subprocess.Popen[str]] = []
    # A server's socket has a short path only in a short folder.
    work = tmp_path / "demo"

    def start() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            ["sh", "tools/demo.sh"],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "THINPOOL_DEMO_DIR": str(work),
                "THINPOOL_DEMO_CACHE": str(tmp_path / "cache"),
                "THINPOOL_DEMO_FILE_MIB": "64",
                "THINPOOL_DEMO_HOST_TREE": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process, work

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)


def left_of(work: Path) -> list[str]:
    """Mounts and loop devices that lie in a folder."""
    mounts = [
        line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {work}/" in line
    ]
    loops = [
        path.read_text().strip()
        for path in Path("/sys/block").glob("loop*/loop/backing_file")
        if path.read_text().startswith(f"{work}/")
    ]
    return mounts + loops


def test_demo_ends_with_nothing_left_and_twice_in_a_row(demo) -> None:
    for _ in range(2):
        process, work = demo()
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output
        assert output.rstrip().endswith("0 mounts, 0 loop devices, 0 processes left")
        assert "thin_check found nothing" in output
        assert output.count(", as written") == 2
        assert re.search(r"^\$ kill -9 \d+", output, re.MULTILINE)
        assert not work.exists()
        assert not left_of(work)


@pytest.mark.parametrize("moment", ["thinpool commit", "three containers", "dd if="])
def test_demo_that_is_interrupted_takes_everything_down(demo, moment: str) -> None:
    process, work = demo()
    seen = ""
    for line in process.stdout:
        seen += line
        if moment in line:
            break
    else:
        pytest.fail(f"it never came to {moment!r}:\n{seen}")
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "taking down what was made" in rest
    assert not left_of(work), rest
    assert not work.exists(), rest
