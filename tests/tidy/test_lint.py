"""The linters, run as tests so that one summary speaks for everything.

They are the pinned tools of the ``dev`` extra. One that is not installed skips its test; in CI
they all are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run_tool(*command: str) -> None:
    """A tool from the environment of pytest, over the checkout; what it says is the failure."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which(command[0], path=path)
    if program is None:
        pytest.skip(f"no {command[0]} here: pip install '.[dev]'")
    result = subprocess.run(
        [program, *command[1:]],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"


def test_ruff_finds_nothing() -> None:
    run_tool("ruff", "check", "--output-format", "concise", ".")


def test_python_is_formatted() -> None:
    run_tool("ruff", "format", "--check", ".")


def test_mypy_strict_finds_nothing() -> None:
    run_tool("mypy")


def test_c_is_formatted() -> None:
    files = sorted(str(path) for path in REPOSITORY.glob("csrc/**/*.[ch]"))
    run_tool("clang-format", "--dry-run", "--Werror", *files)
