"""The README's commands, run as they stand, and their output compared with what is shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()
SESSIONS = re.findall(r"<!-- run -->\n```console\n(.*?)```", README, re.DOTALL)


def commands_and_output(session: str) -> list[tuple[str, str]]:
    """Each command with its continuation lines, and the lines shown below it."""
    steps: list[tuple[list[str], list[str]]] = []
    for line in session.splitlines():
        if line.startswith("$ "):
            steps.append(([line[2:]], []))
        elif line.startswith("> ") and not steps[-1][1]:
            steps[-1][0].append(line[2:])
        else:
            steps[-1][1].append(line)
    return [("\n".join(command), "\n".join(output)) for command, output in steps]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda text: text.splitlines()[1][2:])
def test_session_in_the_readme_shows_what_happens(session: str, tmp_path: Path) -> None:
    steps = commands_and_output(session)
    script = "\n".join(f"{command}\necho '<<end>>'" for command, _ in steps)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    # As if installed: the interpreter that runs this, and its thinpool.
    for name, arguments in (("python3", ""), ("thinpool", "-P -m thinpool")):
        program = binaries / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        program.chmod(0o755)
    result = subprocess.run(
        ["sh", "-eu", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    shown = [output.strip() for _, output in steps]
    found = [part.strip() for part in result.stdout.split("<<end>>")][: len(steps)]
    assert found == shown


def test_readme_has_sessions_and_stays_short() -> None:
    assert SESSIONS
    assert len(README.splitlines()) < 200
