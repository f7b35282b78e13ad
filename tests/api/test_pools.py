"""Pools: made, refused, adopted, full, grown, gone; what is refused changes nothing."""

import hashlib
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from thinpool import Thinpool, errors
from thinpool.engine import BlockDevice
from thinpool.server.client import PoolClient
from thinpool.store import poolfile

MIB = 1 << 20
GIB = 1 << 30
BLOCK = 64 << 10
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def tree(root):
    """Everything under a root, with sizes: what must be the same after a refusal."""
    return {
        str(path.relative_to(root)): path.stat().st_size
        for path in root.rglob("*")
        if path.is_file() and path.suffix not in {".log", ".lock"}
    }


# ---- making -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "kind"),
    [
        ("-p", {}, errors.UsageError),
        (".p", {}, errors.UsageError),
        ("p/q", {}, errors.UsageError),
        ("p" * 129, {}, errors.UsageError),
        ("../p", {}, errors.UsageError),
        ("p", {"size": None}, errors.UsageError),
        ("p", {"size": 0}, errors.UsageError),
        ("p", {"size": 64 * MIB + 512}, errors.UsageError),
        ("p", {"size": 1 << 60}, errors.UsageError),
        ("p", {"block_size": 4096}, errors.UsageError),
        ("p", {"block_size": 96 << 10}, errors.UsageError),
        ("p", {"block_size": 2 * GIB, "size": 4 * GIB}, errors.UsageError),
        ("p", {"metadata_size": MIB}, errors.UsageError),
        ("p", {"metadata_size": 17 * GIB}, errors.UsageError),
        ("p", {"metadata_size": 8 * MIB + 1}, errors.UsageError),
        ("p", {"data": "only"}, errors.UsageError),
        ("p", {"base_fs": "ntfs"}, errors.UsageError),
        ("p", {"base_size": 1000}, errors.UsageError),
        ("p", {"base_size": 1024}, errors.UsageError),
        ("p", {"mkfs_options": ["--no-such-option"]}, errors.ThinpoolError),
        ("p", {"min_free": 100}, errors.UsageError),
        ("p", {"when_full": "panic"}, errors.UsageError),
        ("p", {"engine": "zfs"}, errors.UsageError),
    ],
)
def test_pool_that_cannot_be_is_refused_and_leaves_nothing(api, root, name, arguments, kind):
    with pytest.raises(kind):
        api.create_pool(name, **{"size": 64 * MIB, "base_size": 32 * MIB, **arguments})
    assert tree(root) == {}
    assert api.pools() == []


def test_second_pool_of_a_name_gets_the_first_one_in_its_error(api, pool):
    with pytest.raises(errors.AlreadyExistsError) as caught:
        api.create_pool("p", size=64 * MIB)
    assert caught.value.existing["uuid"] == pool.uuid


def test_pool_that_the_host_cannot_hold_full_warns(api):
    status = api.create_pool("p", size=8 << 40, base_size=0)
    assert any("cannot hold" in warning for warning in status.warnings)
    assert status.data.host_free < status.data.total


@pytest.mark.parametrize("which", ["data", "metadata"])
def test_file_that_carries_something_is_refused_and_kept(api, root, which):
    paths = {"data": root / "d", "metadata": root / "m"}
    for path in paths.values():
        path.write_bytes(bytes(64 * MIB))
    with paths[which].open("r+b") as file:
        file.seek(1024 + 0x38)
        file.write(b"\x53\xef")
    before = {path: path.read_bytes() for path in paths.values()}
    with pytest.raises(errors.ForeignDataError) as caught:
        api.create_pool("p", **paths, base_size=0)
    assert caught.value.path == str(paths[which])
    assert caught.value.carries.startswith("ext")
    assert {path: path.read_bytes() for path in paths.values()} == before
    assert api.create_pool("p", **paths, base_size=0, force=True).data.total == 64 * MIB


def test_files_of_one_pool_are_not_given_to_another(api, root):
    paths = {"data": root / "d", "metadata": root / "m"}
    api.create_pool("p", **paths, size=64 * MIB, base_size=0)
    for operation in (
        lambda: api.create_pool("q", **paths, size=64 * MIB, base_size=0, force=True),
        lambda: api.attach_pool("q", **paths),
    ):
        with pytest.raises(errors.AlreadyExistsError):
            operation()
    api.remove_pool("p")
    assert (root / "m").read_bytes()[:4096] == bytes(4096)
    assert api.create_pool("q", **paths, base_size=0).pool == "q"


def gone(api):
    try:
        api.status("p")
    except errors.NotFoundError:
        return True
    except errors.BusyError:
        return False
    raise AssertionError("half a pool answers")


@pytest.mark.parametrize("is_known", [False, True], ids=["unknown", "known from before"])
def test_creation_that_was_killed_is_swept_away(api, root, is_known):
    if is_known:  # a whole one, which somebody else removes
        api.create_pool("p", size=64 * MIB, base_size=0)
        assert api.create("p/a", size=MIB).name == "a"
        other = Thinpool(root, timeout=20)
        other.remove(["p/a"])
        other.remove_pool("p")
    script = f"""
import os, signal
from thinpool import Thinpool
from thinpool.api.workbench import Workbench
def die(*_):
    print("now", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
Workbench.make_filesystem = die
Thinpool({str(root)!r}).create_pool("p", size=64 << 20, base_size=32 << 20)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "now\n"
    assert (root / "pools" / "p" / "pool.json").exists()
    deadline = time.monotonic() + 30
    while not gone(api):  # its server removes what was built, then it can be stopped
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert tree(root) == {}
    assert api.create_pool("p", size=64 * MIB, base_size=32 * MIB).volumes == 1


def test_root_and_files_may_be_named_from_where_one_stands(root, monkeypatch):
    monkeypatch.chdir(root)
    api = Thinpool("here", timeout=20)
    assert api.create_pool("p", size=16 * MIB, base_size=0).data.path.startswith(str(root))
    api.create_pool("q", size=16 * MIB, base_size=0, data="d", metadata="m")
    monkeypatch.chdir("/")
    for name in ("p", "q"):
        api.create(f"{name}/v", size=MIB)
        api.remove_pool(name)
    assert (root / "d").exists()


# ---- adopting ---------------------------------------------------------------------------------


def unpack(name, directory):
    """A kernel's pool: its two files and its notes."""
    source = FIXTURES / "kernel-pools"
    metadata, data = directory / f"{name}.meta", directory / f"{name}.data"
    metadata.write_bytes(lzma.decompress((source / f"{name}.meta.xz").read_bytes()))
    with (source / f"{name}.data.zst").open("rb") as packed, data.open("wb") as file:
        zstandard.ZstdDecompressor().copy_stream(packed, file)
    notes = json.loads((source / f"{name}.json").read_text())
    file_size = notes["nr_data_blocks"] * BLOCK
    os.truncate(data, max(file_size, data.stat().st_size))
    return {"data": data, "metadata": metadata}, notes


@pytest.mark.parametrize("name", ["simple", "snaps", "metasnap"])
@pytest.mark.parametrize("read_only", [False, True])
def test_pool_of_the_kernel_is_adopted(api, root, name, read_only):
    paths, notes = unpack(name, root)
    before = hashlib.sha256(paths["metadata"].read_bytes()).hexdigest()
    status = api.attach_pool("k", **paths, read_only=read_only)
    assert status.data.total == notes["nr_data_blocks"] * BLOCK
    volumes = {volume.id: volume for volume in api.list("k")}
    assert {volume.name for volume in volumes.values()} == {f"id-{each}" for each in volumes}
    assert api.check("k").clean
    for identity, device in notes["devices"].items():
        if device.get("fs"):
            found = volumes[int(identity)]
            assert (found.filesystem, found.size) == (
                device["fs"],
                device["virtual_sectors"] * 512,
            )
    if read_only:
        with pytest.raises(errors.ReadOnlyError):
            api.create("k/new", size=MIB)
        api.detach_pool("k")
        assert hashlib.sha256(paths["metadata"].read_bytes()).hexdigest() == before
        assert {path.name for path in root.glob(f"{name}*")} == {f"{name}.meta", f"{name}.data"}
    else:
        api.snapshot(f"k/id-{min(volumes)}", "k/new")
        assert api.check("k").clean


@pytest.mark.parametrize("name", ["simple", "snaps", "metasnap"])
def test_contents_that_the_kernel_wrote_are_read(api, root, name):
    paths, notes = unpack(name, root)
    api.attach_pool("k", **paths)
    for identity, device in notes["devices"].items():
        digest = hashlib.sha256()
        with api.open(f"k/id-{identity}") as handle:
            for offset in range(0, handle.size, MIB):
                digest.update(handle.read(offset, min(MIB, handle.size - offset)))
            missing = device["virtual_sectors"] * 512 - handle.size  # past the last mapping
        while missing > 0:
            digest.update(bytes(min(missing, MIB)))
            missing -= MIB
        assert digest.hexdigest() == device["sha256"], identity


def damage_zeros(data):
    data[:] = bytes(len(data))


def damage_magic(data):
    data[32] ^= 0xFF


def damage_checksum(data):
    data[100] ^= 0xFF


def damage_short(data):
    del data[5 * 4096 :]


@pytest.mark.parametrize("damage", [damage_zeros, damage_magic, damage_checksum, damage_short])
def test_metadata_that_is_damaged_is_refused_and_kept(api, root, damage):
    paths, _ = unpack("snaps", root)
    data = bytearray(paths["metadata"].read_bytes())
    damage(data)
    paths["metadata"].write_bytes(data)
    with pytest.raises(errors.CorruptMetadataError) as caught:
        api.attach_pool("k", **paths)
    assert str(paths["metadata"]) in caught.value.message
    assert paths["metadata"].read_bytes() == data
    assert api.pools() == []
    assert not api.check(metadata=paths["metadata"]).clean if damage is not damage_zeros else True


def test_pool_that_thin_restore_made_is_attached_and_grows(api, root, require):
    require("sparse")
    metadata, data = root / "m", root / "d"
    packed = (FIXTURES / "restored" / "small.bin.xz").read_bytes()
    metadata.write_bytes(lzma.decompress(packed))
    with data.open("wb") as file:
        file.truncate(64 * GIB)
    status = api.attach_pool("r", data=data, metadata=metadata)
    grown = api.extend_pool(
        "r",
        data_size=status.data.total + 100 * status.block_size,
        metadata_size=status.metadata.total + 8 * MIB,
    )
    assert grown.data.total == status.data.total + 100 * status.block_size
    assert grown.metadata.total == status.metadata.total + 8 * MIB
    assert api.check("r").clean
    api.create("r/new", size=MIB)
    assert api.check("r").clean


def test_missing_files_are_not_found(api, root):
    (root / "d").touch()
    with pytest.raises(errors.NotFoundError):
        api.attach_pool("k", data=root / "d", metadata=root / "nothing")
    assert api.pools() == []


# ---- in trouble -------------------------------------------------------------------------------


def test_pool_whose_file_was_removed_says_so_and_can_be_forgotten(api, pool, root):
    PoolClient(root, "p", timeout=20).stop_server()
    Path(pool.data.path).unlink()
    with pytest.raises(errors.NotFoundError) as caught:
        api.list("p")
    assert caught.value.path == pool.data.path
    (failed,) = api.pools()
    assert (failed.mode, failed.error["type"]) == ("fail", "not_found")
    report = api.doctor("p")
    assert not report.healthy
    assert report.pools["p"][0].remedy == "thinpool detach-pool p"
    api.remove_pool("p")
    assert api.pools() == []


def test_metadata_that_was_damaged_is_reported_by_check(api, pool, root):
    api.create("p/v", size=MIB)
    PoolClient(root, "p", timeout=20).stop_server()
    with Path(pool.metadata.path).open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    with pytest.raises(errors.CorruptMetadataError):
        api.status("p")
    report = api.check("p")
    assert not report.clean
    assert any(fault.structure == "superblock" for fault in report.faults)


def test_full_pool_is_a_state_and_ends_when_it_grows(api, root):
    api.create_pool("p", size=4 * MIB, base_size=0, when_full="error", min_free=0.0)
    api.create("p/v", size=64 * MIB)
    with api.open("p/v", writable=True) as handle:
        with pytest.raises(errors.DataSpaceError):
            handle.write(0, b"x" * (8 * MIB))
        status = api.status("p")
        assert status.mode == "out_of_data_space"
        assert any("full" in warning for warning in status.warnings)
        api.extend_pool("p", data_size=32 * MIB)
        assert api.status("p").mode == "rw"
        handle.write(0, b"x" * (8 * MIB))
        handle.flush()
    api.remove(["p/v"])
    assert api.status("p").data.used == 0
    assert api.check("p").clean


def test_nothing_new_is_made_below_min_free(api):
    api.create_pool("p", size=4 * MIB, base_size=0, min_free=50)
    api.create("p/v", size=64 * MIB)
    with api.open("p/v", writable=True) as handle:
        handle.write(0, b"x" * (2 * MIB + BLOCK))
    for operation in (
        lambda: api.create("p/w", size=MIB),
        lambda: api.snapshot("p/v", "p/w"),
    ):
        with pytest.raises(errors.DataSpaceError) as caught:
            operation()
        assert caught.value.total == 4 * MIB
    api.set("p", {"min-free": "10%"})
    api.snapshot("p/v", "p/w")


def test_pool_in_files_grows_by_itself(api):
    api.create_pool("p", size=4 * MIB, base_size=0, min_free=0.0)
    api.set("p", {"autoextend-threshold": "50%", "autoextend-percent": "100"})
    api.create("p/v", size=64 * MIB)
    with api.open("p/v", writable=True) as handle:
        for step in range(24):  # while it is full, writes wait for it to grow
            handle.write(step * MIB, b"y" * MIB)
    assert api.status("p").data.total >= 32 * MIB
    assert api.check("p").clean


def test_settings_are_changed_all_or_none_and_stay(api, pool, root):
    with pytest.raises(errors.UsageError):
        api.set("p", {"when-full": "error", "colour": "red"})
    assert api.status("p").when_full == "queue"
    api.set("p", {"when-full": "error", "low-water": "25%", "min-free": "5"})
    PoolClient(root, "p", timeout=20).stop_server()
    status = Thinpool(root).status("p")
    assert (status.when_full, status.min_free) == ("error", 5.0)
    assert status.data.low_water == 64 * MIB
    with pytest.raises(errors.UsageError):
        api.extend_pool("p", data_size=128 * MIB)


def test_removed_volumes_give_their_space_to_the_host(api, pool, require):
    require("sparse")
    api.create("p/v", size=64 * MIB)
    with api.open("p/v", writable=True) as handle:
        handle.write(0, os.urandom(48 * MIB))
        handle.flush()
    data = Path(pool.data.path)
    assert data.stat().st_blocks * 512 >= 48 * MIB
    api.remove(["p/v"])
    deadline = time.monotonic() + 20
    while data.stat().st_blocks * 512 > 2 * MIB:
        assert time.monotonic() < deadline, data.stat().st_blocks * 512
        time.sleep(0.1)


def fill_metadata(api):
    """Make volumes until there is no room for one more; those that were made."""
    made = []
    while True:
        try:
            api.create(f"p/v{len(made)}", size=MIB)
        except errors.MetadataSpaceError:
            return made
        made.append(f"p/v{len(made)}")


def test_metadata_space_that_is_full_still_lets_things_be_removed(api):
    api.create_pool("p", size=64 * MIB, base_size=0, metadata_size=2 * MIB, min_free=0.0)
    made = fill_metadata(api)
    assert len(made) > 50
    removal = api.remove(made[:30])
    assert len(removal.removed) == 30
    api.create("p/again", size=MIB)
    assert api.check("p").clean


def test_foreign_holder_of_the_metadata_is_named(api, root):
    paths = {"data": root / "d", "metadata": root / "m"}
    api.create_pool("p", **paths, size=64 * MIB, base_size=0)
    api.detach_pool("p")
    with (
        BlockDevice.open_file(paths["metadata"], exclusive=True),
        pytest.raises(errors.BusyError) as caught,
    ):
        api.attach_pool("p", **paths)
    assert str(paths["metadata"]) in caught.value.message
    api.attach_pool("p", **paths)


def test_pool_of_engine_dm_is_taken_over_where_the_kernel_has_no_device_mapper(
    api, root, monkeypatch
):
    """It was carried here from a host that has: nothing of it can be in use by this kernel."""

    def no_device_mapper():
        raise errors.UnsupportedHostError("this kernel has no device-mapper", missing="dm")

    api.create_pool("p", size=64 * MIB, base_size=0, engine="user")
    api.create("p/a", size=MIB)
    api._session.client("p").stop_server()
    poolfile.write_config(root, poolfile.read_config(root, "p").changed(engine="dm"))
    monkeypatch.setattr("thinpool.dm.client.DeviceMapper", no_device_mapper)
    assert api.set("p", {"engine": "user"}).engine == "user"
    assert [volume.name for volume in api.list("p")] == ["a"]
