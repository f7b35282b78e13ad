"""Benchmarks as people run them: the command, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 120


class Bench:
    """Runs ``thinpool bench`` with a folder for its work and one for its results."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.work.mkdir()
        self.output = folder / "out"

    def command(self, *arguments: str) -> list[str]:
        return [
            *(sys.executable, "-P", "-m", "thinpool", "bench", *arguments),
            *("--directory", str(self.work), "--output", str(self.output)),
        ]

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def results(self) -> Any:
        return json.loads((self.output / "results.json").read_text())

    def wait_for_a_series(self, child: subprocess.Popen[str], suite: str) -> None:
        """Until the results on disk hold a measured value."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and child.poll() is None:
            try:
                if self.results()["suites"][suite]["results"]:
                    return
            except (FileNotFoundError, KeyError):
                pass
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        pytest.fail(f"nothing was measured: {child.communicate()}")


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)
