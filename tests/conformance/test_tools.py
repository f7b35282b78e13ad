"""Pools that went through thin_dump and thin_restore, and filesystems on volumes."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.conformance.driver import MIB, judge

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.thin_tools
def test_a_pool_works_on_after_dump_and_restore(driver):
    driver.make()
    driver.create(0)
    for block in range(8):
        driver.put(0, block, block)
    driver.snapshot(1, origin=0)
    driver.put(0, 2, 100)
    driver.volume(1).discard(0, driver.block)
    driver.close()
    before = driver.check()
    xml = driver.metadata_path.with_suffix(".xml")
    xml.write_bytes(
        subprocess.run(["thin_dump", driver.metadata_path], capture_output=True, check=True).stdout
    )
    driver.metadata_path.write_bytes(bytes(driver.metadata_path.stat().st_size))
    subprocess.run(
        ["thin_restore", "-i", xml, "-o", driver.metadata_path], capture_output=True, check=True
    )
    again = subprocess.run(
        ["thin_dump", driver.metadata_path], capture_output=True, check=True
    ).stdout
    assert again == xml.read_bytes()
    assert judge(driver.metadata_path.read_bytes()) == before
    driver.open()
    assert driver.holds(0, 2, 100)
    assert driver.holds(1, 2, 2)
    assert driver.holds(1, 0, None)
    driver.put(1, 9, 9)
    driver.snapshot(2, origin=1)
    driver.delete(0)
    assert driver.holds(2, 9, 9)


@pytest.mark.dm
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_filesystems_on_volumes(dm, kind, tmp_path, require):
    """Made, filled, snapshotted while mounted, changed on both sides, trimmed."""
    require(kind)
    size = 512 * MIB if kind == "xfs" else 64 * MIB
    dm.make(data_blocks=2048, metadata_blocks=512)
    dm.create(0)
    node = dm.pool.make_device(0, size=size, read_only=False).node
    subprocess.run(["mkfs", "-t", kind, "-q", node], check=True, capture_output=True)
    origin, snapshot = tmp_path / "origin", tmp_path / "snapshot"
    origin.mkdir()
    snapshot.mkdir()
    content = os.urandom(MIB)
    mount(node, origin)
    try:
        (origin / "kept").write_bytes(content)
        (origin / "gone").write_bytes(os.urandom(4 * MIB))
        dm.snapshot(1, origin=0)  # device-mapper freezes what is mounted on the origin
        (origin / "kept").write_bytes(b"changed")
        (origin / "gone").unlink()
        other = dm.pool.make_device(1, size=size, read_only=False).node
        mount(other, snapshot, *(["-o", "nouuid"] if kind == "xfs" else []))
        try:
            assert (snapshot / "kept").read_bytes() == content
            assert (snapshot / "gone").stat().st_size == 4 * MIB
            (snapshot / "new").write_bytes(content)
        finally:
            subprocess.run(["umount", snapshot], check=True)
        assert (origin / "kept").read_bytes() == b"changed"
        assert not (origin / "new").exists()
        dm.pool.remove_device(1)
        dm.delete(1)
        os.sync()
        before = dm.used()
        subprocess.run(["fstrim", origin], check=True, capture_output=True)
        assert dm.used() < before
    finally:
        subprocess.run(["umount", origin], check=True)
    program = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}[kind]
    subprocess.run([*program, node], check=True, capture_output=True)
    dm.pool.remove_device(0)
    dm.check()


def mount(node: str, target: Path, *options: str) -> None:
    subprocess.run(["mount", *options, node, target], check=True)
