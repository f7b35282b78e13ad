"""A kernel with device-mapper: in a machine of tools/kernel-run, on disks that we keep."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import thinpool

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PROGRAM = REPOSITORY / "tools" / "kernel-run"
GUEST_TIMEOUT = 280.0


def command(
    script: Path,
    *,
    disks: Sequence[Path | str],
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    timeout: float = GUEST_TIMEOUT,
) -> list[str]:
    """How to run a shell script in a machine; $KR_DISK0 and on are its disks."""
    found = [sys.executable, str(PROGRAM), f"--timeout={timeout}", "--cwd=/", *options]
    found += [f"--disk={disk}" for disk in disks]
    # What is tested here: the checkout has no built extension where thinpool is installed.
    installed = Path(thinpool.__file__).parents[1]
    told = {"HERE": HERE, "PYTHONPATH": installed, "PYTHONSAFEPATH": "1", **(environment or {})}
    found += [f"--env={name}={value}" for name, value in told.items()]
    return [*found, "--", "sh", str(script)]


def run(
    script: Path,
    *,
    disks: Sequence[Path | str],
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    timeout: float = GUEST_TIMEOUT,
) -> str:
    """Run a shell script in a machine and assert that it succeeds; what it printed."""
    done = subprocess.run(
        command(script, disks=disks, options=options, environment=environment, timeout=timeout),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout + 30,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Machine:
    """A machine that is watched while it runs, and can be stopped cold.

    The guest's shell says something by ``say WORDS`` (guest.sh), which is on its console before the
    next command begins.

    Args:
        script: what it runs.
        disks: its disks.
        options: of tools/kernel-run.
        on_word: called with each thing that is said, soon after.
    """

    def __init__(
        self,
        script: Path,
        *,
        disks: Sequence[Path | str],
        options: Sequence[str] = (),
        on_word: Callable[[str], None],
    ) -> None:
        self._on_word = on_word
        self._console = script.with_suffix(".console")
        self._console.unlink(missing_ok=True)
        self._read = 0
        self._rest = ""
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the machine
        self._process = subprocess.Popen(
            command(
                script,
                disks=disks,
                options=[*options, f"--console={self._console}", "--append=printk.devkmsg=on"],
            ),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )

    def listen(self) -> bool:
        """Take in what was said since; whether the machine still runs."""
        runs = self._process.poll() is None
        if self._console.exists():
            with self._console.open(errors="replace") as file:
                file.seek(self._read)
                text = file.read()
                self._read = file.tell()
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                if found := re.search(r"\] tp: (.*?)\r?$", line):
                    self._on_word(found[1])
        return runs

    def stop_cold(self) -> None:
        """Kill QEMU, as a power cut does, and take in the last that was said."""
        for pid in children(self._process.pid):
            os.kill(pid, signal.SIGKILL)
        self._process.wait(timeout=60)
        self.listen()
        self._output.close()

    def said(self) -> str:
        """Output and console, for people."""
        self._output.seek(0)
        tail = self._console.read_text(errors="replace") if self._console.exists() else ""
        return f"exit {self._process.poll()}\n{self._output.read()}\n{tail[-6000:]}"

    def wait_for(self, reached: Callable[[], bool], *, timeout: float) -> None:
        """Listen until something is so; fail when the machine ends or the time is up before."""
        deadline = time.monotonic() + timeout
        while not reached():
            assert self.listen(), f"the machine ended by itself: {self.said()}"
            assert time.monotonic() < deadline, f"not there within {timeout} s: {self.said()}"
            time.sleep(0.01)


def children(pid: int) -> list[int]:
    """The processes that one started and that have not been waited for; of an ended one, none."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(word) for word in text.split()]
