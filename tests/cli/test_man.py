"""The manual pages: fresh, complete, and accepted by groff."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from thinpool.cli.app import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = REPOSITORY / "docs" / "man"


def test_pages_are_fresh():
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "gen_man.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_each_command_has_a_page():
    assert {page.name for page in PAGES.iterdir()} == {
        "thinpool.8",
        *(f"thinpool-{name}.8" for name in COMMANDS),
    }


def test_groff_has_nothing_to_say():
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("no groff on this host")
    for page in PAGES.iterdir():
        result = subprocess.run(
            [groff, "-man", "-ww", "-Tascii", "-z", str(page)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (result.returncode, result.stderr) == (0, ""), page.name
