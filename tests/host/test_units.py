"""Systemd units: what is written is valid, and is used for its root alone."""

import os
import shutil
import subprocess

import pytest

from thinpool.host import units


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    """A host whose systemd is a script that notes what it was asked."""
    runs = tmp_path / "systemd-runs"
    runs.mkdir()
    asked = tmp_path / "asked"
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\ntest ! -e {tmp_path}/refuse\n')
    program.chmod(0o755)
    monkeypatch.setattr(units, "_RUNS", str(runs))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return tmp_path, asked


def test_units_are_valid(require, tmp_path):
    require("systemd")
    analyze = shutil.which("systemd-analyze")
    units.install("/srv/100% thin", directory=str(tmp_path))
    shutil.copy(tmp_path / units.SERVER_UNIT, tmp_path / "thinpool@p.service")
    for name in (units.POOLS_UNIT, "thinpool@p.service"):
        done = subprocess.run(
            [analyze, "verify", "--man=no", tmp_path / name],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert name not in done.stderr, done.stderr


def test_unit_serves_the_pools_of_its_root_alone(systemd):
    directory, asked = systemd
    where = str(directory)
    assert units.server_unit("/srv/thin", "p", directory=where) is None
    units.install("/srv/thin", directory=where)
    assert units.server_unit("/srv/other", "p", directory=where) is None
    unit = units.server_unit("/srv/thin", "my.pool-1", directory=where)
    assert unit == "thinpool@my.pool-1.service"
    assert units.start(unit, timeout=10)
    assert asked.read_text() == "--no-ask-password start thinpool@my.pool-1.service\n"


def test_unit_that_does_not_start_is_said(systemd):
    directory, _ = systemd
    (directory / "refuse").touch()
    assert not units.start("thinpool@p.service", timeout=10)


def test_unit_is_not_used_where_systemd_does_not_run(systemd, monkeypatch):
    directory, _ = systemd
    units.install("/srv/thin", directory=str(directory))
    monkeypatch.setattr(units, "_RUNS", str(directory / "nothing"))
    assert units.server_unit("/srv/thin", "p", directory=str(directory)) is None
