"""What the host can do; the probes agree with what then works."""

from __future__ import annotations

import os

import pytest

from thinpool.host import capabilities, loop


def test_every_probe_answers_with_a_reason_or_none(tmp_path):
    found = capabilities.probe_all(tmp_path)
    assert [item.name for item in found[: len(capabilities.PROBES)]] == list(capabilities.PROBES)
    for item in found:
        assert item.available == (item.reason is None)
        assert item.reason != ""


def test_root_is_told(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert capabilities.root() == "not root"


def test_direct_io_is_tried_on_files_and_directories(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    assert (capabilities.direct_io(path) is None) == (capabilities.direct_io(tmp_path) is None)
    reason = capabilities.direct_io("/proc/version")
    assert reason is not None
    assert "/proc/version" in reason
    assert capabilities.direct_io(tmp_path / "absent") is not None


def test_hole_punching_leaves_nothing(tmp_path):
    capabilities.hole_punching(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert capabilities.hole_punching("/proc") is not None


def test_loop_is_told_without_attaching_anything(require):
    require("loop")
    before = loop.list_all()
    assert capabilities.loop() is None
    assert loop.list_all() == before


@pytest.mark.parametrize("name", ["fuse", "mount", "loop"])
def test_an_ordinary_user_is_told_why_not(name):
    if os.geteuid() == 0:
        assert capabilities.PROBES["root"]() is None
        return
    reason = capabilities.PROBES[name]()
    assert reason is None or reason
