"""The probes and the leak check that every other test leans on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).resolve().parent.parent / "conftest.py"
# For what the conftest imports of its neighbours.
PYTHONPATH = f"{CONFTEST.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


def run_session(folder: Path, test_body: str, *arguments: str, **environment: str) -> str:
    """A pytest session of its own, with our conftest and one test file; its output."""
    conftest = CONFTEST.read_text()
    impatient = conftest.replace("LEAK_WAIT_SECONDS = 15.0", "LEAK_WAIT_SECONDS = 0.5")
    assert impatient != conftest
    (folder / "conftest.py").write_text(impatient)
    (folder / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n  fuse: f\n  loop: l\n  root: r\n  thin_tools: t\n"
    )
    (folder / "test_it.py").write_text(test_body)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", "--import-mode=importlib",
         f"--basetemp={folder / 'base'}", *arguments, "test_it.py"],
        cwd=folder, env={**os.environ, "PYTHONPATH": PYTHONPATH, **environment},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return result.stdout + result.stderr


NEEDS_PROGRAM_THAT_IS_MISSING = """
import pytest
@pytest.mark.thin_tools
def test_it(): pass
"""


def test_missing_capability_skips_and_says_why(tmp_path: Path) -> None:
    output = run_session(
        tmp_path,
        NEEDS_PROGRAM_THAT_IS_MISSING,
        PATH=str(Path(sys.executable).parent),
        THINPOOL_REQUIRE="",
    )
    assert "1 skipped" in output
    assert "needs thin_tools: no thin_check, thin_dump, thin_restore on this host" in output


def test_required_capability_that_is_missing_fails(tmp_path: Path) -> None:
    output = run_session(
        tmp_path,
        NEEDS_PROGRAM_THAT_IS_MISSING,
        PATH=str(Path(sys.executable).parent),
        THINPOOL_REQUIRE="thin_tools",
    )
    assert "1 error" in output or "1 failed" in output
    assert "THINPOOL_REQUIRE wants thin_tools" in output


def test_unknown_name_in_required_list_stops_the_session(tmp_path: Path) -> None:
    output = run_session(tmp_path, "def test_it(): pass", THINPOOL_REQUIRE="fuse,floop")
    assert "THINPOOL_REQUIRE names floop" in output
    assert "passed" not in output


def test_requiring_an_unknown_capability_fails_the_test(tmp_path: Path) -> None:
    output = run_session(tmp_path, "def test_it(require): require('floop')", THINPOOL_REQUIRE="")
    assert "1 failed" in output
    assert "no such capability" in output


def test_process_left_behind_fails_the_session_and_is_ended(tmp_path: Path) -> None:
    body = """
import subprocess
from pathlib import Path
def test_it():
    child = subprocess.Popen(["sleep", "600"])
    Path("pid").write_text(str(child.pid))
"""
    output = run_session(tmp_path, body, "-W", "ignore::ResourceWarning", THINPOOL_REQUIRE="")
    pid = int((tmp_path / "pid").read_text())
    assert "left behind by this session" in output
    assert f"process {pid}: sleep 600" in output
    command = Path(f"/proc/{pid}/cmdline")
    assert not command.exists() or not command.read_bytes()  # ended; perhaps not yet reaped


def test_seed_is_shown_on_failure_and_the_same_each_time(tmp_path: Path) -> None:
    body = "def test_it(seed, rng): assert rng.random() > 2"
    first = run_session(tmp_path, body, THINPOOL_SEED="7")
    again = run_session(tmp_path, body, THINPOOL_SEED="7")
    other = run_session(tmp_path, body, THINPOOL_SEED="8")

    def shown(output: str) -> str:
        return next(
            line for line in output.splitlines() if line.startswith("seed ") and "(" in line
        )

    assert shown(first) == shown(again)
    assert shown(first) != shown(other)
