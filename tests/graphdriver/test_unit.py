"""The unit that runs a driver: as documented, and one that systemd takes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from thinpool.graphdriver.serve import serving
from thinpool.graphdriver.unit import unit

REPOSITORY = Path(__file__).resolve().parents[2]


def printed(*arguments):
    return subprocess.run(
        [sys.executable, "-P", "-m", "thinpool", *arguments, "--print-unit"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def test_it_is_the_documented_one(monkeypatch):
    documented = re.findall(
        r"```ini\n(.*?)```", (REPOSITORY / "docs/docker.md").read_text(), re.DOTALL
    )
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(shutil, "which", lambda _: None)
    what = serving("docker", None, None)
    assert documented == [unit(what, root=None, default_socket=what.socket)]


def test_command_prints_it_with_what_it_was_given(tmp_path):
    root = tmp_path / "a root"
    said = printed("--root", str(root), "serve", "graphdriver", "p", "--name", "n",
                   "--socket", "/run/100%/s")  # fmt: skip
    (line,) = [each for each in said.splitlines() if each.startswith("ExecStart=")]
    assert line.endswith(f'--root "{root}" serve graphdriver p --name n --socket "/run/100%%/s"')
    assert "Before=docker.service" in said
    assert not root.exists()


def test_systemd_takes_it(tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze on this host")
    text = printed("serve", "graphdriver", "p")
    path = tmp_path / "thinpool-docker.service"
    path.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", text))
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(path)], capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if "thinpool-docker" in line]
    assert said == []
