"""Tests that run in a guest are reported as what they are, and none is forgotten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.kernel_vm, pytest.mark.timeout(600)]

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
REPOSITORY = CONFTEST.parents[1]

SORTS = """
import os, pytest, warnings
from pathlib import Path
pytestmark = pytest.mark.dm

def test_passes(require, tmp_path):
    require("dm")
    assert os.environ["KERNEL_RUN"] and tmp_path.is_relative_to("/run/scratch")

@pytest.mark.parametrize("value", ["a b", "c@d", "e[f]"])
def test_with(value): assert value != "c@d"

def test_skips(): pytest.skip("for this reason")

def test_breaks_in_setup(there_is_no_such_fixture): pass

def test_not_selected(): raise AssertionError

@pytest.mark.udev
def test_udev(): assert Path("/run/udev/control").exists()
"""

DIES = """
import pytest
pytestmark = pytest.mark.dm
def test_first(): pass
def test_stops_the_machine():
    with open("/proc/sysrq-trigger", "w") as file: file.write("b")
    import time; time.sleep(60)
def test_last(): pass
"""

HERE = "def test_here(): pass\n"


def run_session(folder: Path, *arguments: str) -> str:
    """A pytest session of its own in a folder with our conftest; its output."""
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "pytest.ini").write_text(
        "[pytest]\naddopts = --import-mode=importlib --strict-markers\nmarkers =\n"
        "  dm: d\n  udev: u\n  xdist_group: x\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "-vv", "-p", "no:cacheprovider",
         f"--basetemp={folder / 'base'}", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "THINPOOL_KERNEL_DIR": os.environ.get("THINPOOL_KERNEL_DIR")
            or str(REPOSITORY / "build/kernel"),
            "THINPOOL_REQUIRE": "",
        },
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.fixture(autouse=True)
def _no_device_mapper_here() -> None:
    if Path("/sys/module/dm_thin_pool").exists():
        pytest.skip("this kernel has device-mapper: its tests run directly")


def test_every_outcome_in_the_guest_is_the_outcome_here(tmp_path: Path) -> None:
    (tmp_path / "test_sorts.py").write_text(SORTS)
    (tmp_path / "test_here.py").write_text(HERE)
    output = run_session(tmp_path, "-n", "2", "--dist", "loadgroup", "-k", "not not_selected")
    assert "device-mapper tests run in a Debian kernel under QEMU" in output
    assert "5 passed, 1 skipped, 1 error" in output.replace("1 failed, ", "")
    assert "1 failed" in output
    assert "FAILED test_sorts.py::test_with[c@d]" in output
    assert "ERROR test_sorts.py::test_breaks_in_setup" in output
    assert "fixture 'there_is_no_such_fixture' not found" in output
    assert "for this reason" in output
    folder = tmp_path.name
    assert f"guest-{folder}: 6 of 6 tests ran" in output, "once, for the two workers"
    assert output.count(f"guest-{folder}: ") == 1
    assert f"guest-{folder}-udev: 1 of 1 tests ran" in output


def test_what_a_machine_that_ended_did_not_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "test_dies.py").write_text(DIES)
    output = run_session(tmp_path, "-p", "no:xdist")
    assert "1 passed, 2 errors" in output
    assert "ERROR test_dies.py::test_stops_the_machine" in output
    assert "ERROR test_dies.py::test_last" in output
    assert "the guest (status 125) did not run this test to its end" in output
