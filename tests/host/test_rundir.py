"""Names in the run directory."""

from __future__ import annotations

import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from thinpool import errors
from thinpool.host import loop, rundir
from thinpool.host.rundir import RunDirectory


@pytest.fixture
def roots(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    base = tmp_path / "run"
    return [RunDirectory(base=base, root=str(tmp_path / name)) for name in ("one", "two")]


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("THINPOOL_RUN", "/somewhere")
    assert str(rundir.run_directory("/root")) == "/somewhere"
    monkeypatch.delenv("THINPOOL_RUN")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert str(rundir.run_directory("/r")) == "/run/thinpool"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert str(rundir.run_directory("/r")) == "/r/run"
    assert RunDirectory.of_root(tmp_path / "x" / "..").root == str(tmp_path)


def test_links_come_change_and_go(roots):
    run, _ = roots
    link = run.link_device("pool", "guest", "/dev/loop7")
    assert link == run.base / "dev" / "pool" / "guest"
    assert os.readlink(link) == "/dev/loop7"
    run.link_device("pool", "guest", "/dev/loop8")
    assert run.device_link("pool", "guest") == link
    assert run.device_links("pool") == {"guest": "/dev/loop8"}
    assert run.unlink_device("pool", "guest") is True
    assert run.unlink_device("pool", "guest") is False
    assert run.device_link("pool", "guest") is None
    assert list((run.base / "dev").iterdir()) == [], "the claim went with the last link"


def test_two_roots_with_a_pool_of_one_name_do_not_meet(roots):
    one, two = roots
    digest = hashlib.sha256(two.root.encode()).hexdigest()[:8]
    one.link_device("pool", "guest", "/dev/loop1")
    link = two.link_device("pool", "guest", "/dev/loop2")
    assert link == two.base / "dev" / f"pool@{digest}" / "guest"
    assert one.device_links("pool") == {"guest": "/dev/loop1"}
    assert two.device_links("pool") == {"guest": "/dev/loop2"}
    one.unlink_device("pool", "guest")
    assert two.link_device("pool", "other", "/dev/loop3").parent == link.parent, "names stay put"
    assert two.forget_pool("pool") == 2
    assert two.link_device("pool", "guest", "/dev/loop2").parent.name == "pool"


def test_a_claim_of_a_root_that_is_gone_binds_nobody(roots, tmp_path):
    one, two = roots
    one.link_device("pool", "guest", "/dev/loop1")
    (tmp_path / "one").rmdir()
    assert two.link_device("pool", "mine", "/dev/loop2").parent.name == "pool"
    assert two.device_links("pool") == {"mine": "/dev/loop2"}


def test_links_are_made_by_many_at_once(roots):
    one, two = roots
    with ThreadPoolExecutor(8) as threads:
        for run in (one, two):
            list(threads.map(lambda n, r=run: r.link_device("pool", f"g{n}", "/dev/x"), range(32)))
        assert len(one.device_links("pool")) == len(two.device_links("pool")) == 32
        jobs = [
            threads.submit(run.unlink_device, "pool", f"g{n}") for n in range(32) for run in roots
        ]
        assert all(job.result() for job in jobs)
    assert list((one.base / "dev").iterdir()) == []


def test_directories_are_reachable_whatever_the_umask(roots):
    run, _ = roots
    before = os.umask(0o077)
    try:
        fuse = run.fuse_directory("some-uuid")
        link = run.link_device("pool", "guest", "/dev/loop1")
    finally:
        os.umask(before)
    assert stat.S_IMODE(link.parent.stat().st_mode) == 0o755
    assert stat.S_IMODE(run.base.stat().st_mode) == 0o755
    assert stat.S_IMODE(fuse.parent.stat().st_mode) == 0o711
    assert run.fuse_directory("some-uuid") == fuse


def test_a_run_directory_that_cannot_be_is_typed(tmp_path):
    (tmp_path / "file").touch()
    run = RunDirectory(base=tmp_path / "file" / "run", root=str(tmp_path))
    with pytest.raises(errors.ThinpoolError):
        run.link_device("pool", "guest", "/dev/loop1")


def test_rights_to_a_device_end_with_it(sparse, require):
    require("root", "loop")
    device = loop.attach(sparse())
    before = rundir.set_node_access(device.path, owner=1234, group=4321, mode=0o660)
    assert before.owner == 0
    assert rundir.node_access(device.path) == rundir.NodeAccess(owner=1234, group=4321, mode=0o660)
    loop.detach(device)
    after = rundir.node_access(device.path)
    assert (after.owner, after.group, after.mode & 0o007) == (0, 0, 0)

    os.chown(device.path, 1234, -1)  # left behind by a detach of somebody else
    device = loop.attach(sparse(name="other"))
    assert rundir.node_access(device.path).owner == 0
    loop.detach(device)


def test_rights_are_given_to_block_devices_only(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(errors.UsageError):
        rundir.set_node_access(str(tmp_path / "file"), mode=0o600)
    with pytest.raises(errors.UsageError):
        rundir.set_node_access("/dev/null", mode=0o1777)
    with pytest.raises(errors.NotFoundError):
        rundir.set_node_access(str(tmp_path / "absent"), mode=0o600)
