"""Layers on xfs: found by a walk, grown, and never held below their image's size."""

from __future__ import annotations

import os

import pytest

from tests.graphdriver.kit import GIB, RefusedError, a_driver

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.loop, pytest.mark.xfs]


@pytest.fixture(scope="module")
def xfs(require):
    require("root", "fuse", "loop", "xfs")
    with a_driver(base_fs="xfs") as found:
        found.layer("image", **{"etc": None, "etc/a": b"a", "etc/b": b"b"})
        yield found
        found.remove("image")


CHANGED = [("/etc", "M"), ("/etc/a", "M"), ("/etc/b", "D"), ("/new", "A")]


@pytest.mark.parametrize("mounted", [True, False])
def test_changes_and_diff(xfs, mounted):
    xfs.create("one", "image")
    where = xfs.get("one")
    (where / "etc/a").write_text("changed")
    (where / "etc/b").unlink()
    (where / "new").write_text("new")
    if not mounted:
        xfs.put("one")
    assert xfs.changes("one", "image") == CHANGED
    assert xfs.size("one", "image") == len("changed") + len("new")
    xfs.create("two", "image")
    xfs.apply("two", "image", xfs.diff("one", "image"))
    assert (xfs.get("two") / "etc/a").read_text() == "changed"
    assert xfs.changes("two", "image") == CHANGED
    for layer in ("two", "one"):
        xfs.remove(layer)


def test_larger_size_is_given_and_a_smaller_one_refused(xfs):
    xfs.create("large", "image", "2G")
    space = os.statvfs(xfs.get("large"))
    assert space.f_blocks * space.f_frsize > 1.8 * GIB
    xfs.remove("large")
    with pytest.raises(RefusedError, match="needs ext4"):
        xfs.create("small", "image", "512M")
    assert not xfs.exists("small")
