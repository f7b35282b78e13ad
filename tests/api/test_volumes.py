"""Volumes as devices and mounts, by an administrator: through server, FUSE and loop."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from thinpool import Thinpool, errors
from thinpool.host import loop
from thinpool.host.mountinfo import own_mounts

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.loop, pytest.mark.ext4]
MIB = 1 << 20


@pytest.fixture
def based(api):
    return api.create_pool("p", size=512 * MIB, base_size=128 * MIB)


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def test_base_is_an_empty_filesystem_that_maps_little(api, based, directory):
    (base,) = api.list("p")
    assert (base.name, base.kind, base.read_only, base.filesystem) == ("base", "base", True, "ext4")
    assert base.mapped <= 8 * MIB
    mounted = api.mount("p/base", directory)
    assert list(directory.iterdir()) == []
    assert directory.stat().st_mode & 0o777 == 0o755
    assert mounted.volume.mounts == (str(directory),)
    with pytest.raises(OSError, match="Read-only"):
        (directory / "x").touch()
    assert api.umount("p/base").device is None


def test_snapshot_of_a_mounted_filesystem_is_frozen_and_clean(api, based, directory):
    api.snapshot("p/base", "p/c", mount=directory)
    (directory / "file").write_bytes(b"x" * 300_000)
    taken = api.snapshot("p/c", "p/then")
    assert taken.consistency == "frozen"
    (directory / "file").unlink()
    api.umount("p/c")
    device = api.activate("p/then").device
    subprocess.run(["e2fsck", "-fn", device], check=True, capture_output=True)
    api.mount("p/then", directory)
    assert (directory / "file").read_bytes() == b"x" * 300_000
    assert api.umount("p/then").device is not None  # activate made it, so umount leaves it
    api.deactivate("p/then")
    assert api.check("p").clean


def test_everything_can_be_repeated(api, based, directory):
    api.snapshot("p/base", "p/c")
    first, second = api.activate("p/c"), api.activate("p/c")
    assert (first.already_active, second.already_active) == (False, True)
    assert first.device == second.device
    assert Path(first.device).resolve().is_block_device()
    assert Path(first.device).stat().st_rdev == os.makedev(*map(int, first.number.split(":")))
    with pytest.raises(errors.BusyError):
        api.activate("p/c", read_only=True)
    assert not api.mount("p/c", directory).already_mounted
    assert api.mount("p/c", directory).already_mounted
    with pytest.raises(errors.BusyError):
        api.deactivate("p/c")
    for _ in range(2):
        api.umount("p/c")
    for _ in range(2):
        assert api.deactivate("p/c").device is None
    assert not Path(first.device).is_symlink()


@pytest.fixture
def directories(tmp_path):
    paths = [tmp_path / f"m{n}" for n in range(5)]
    for path in paths:
        path.mkdir()
    return paths


def mounted_below(path):
    return [each.mount_point for each in own_mounts() if each.mount_point.startswith(str(path))]


def test_several_are_made_and_mounted_at_once(api, based, tmp_path, directories):
    names = [f"p/c{n}" for n in range(5)]
    made = api.snapshot_many("p/base", names, mount=directories)
    assert [str(volume) for volume in made] == names
    for volume, directory in zip(made, directories, strict=True):
        assert volume.mounts == (str(directory),)
        (directory / "own").write_text(volume.name)
        assert Path(volume.device).resolve().is_block_device()
    for volume, directory in zip(made, directories, strict=True):
        assert [each.name for each in directory.iterdir()] == ["own"]
        assert (directory / "own").read_text() == volume.name
        assert api.list("p")[volume.id].device == volume.device
    again = api.mount_many(dict(zip(names, directories, strict=True)))
    assert all(each.already_mounted for each in again)
    active = api.activate_many(names)
    assert [each.device for each in active] == [volume.device for volume in made]
    assert all(each.already_active for each in active)
    assert [each.volume.mounts for each in active] == [(str(each),) for each in directories]
    api.remove(names, deactivate=True)
    assert mounted_below(tmp_path) == []
    assert [volume.name for volume in api.list("p")] == ["base"]


def test_activating_several_takes_all_or_none(api, based):
    names = [f"p/c{n}" for n in range(4)]
    api.snapshot_many("p/base", names)
    with api.open("p/c2", writable=True):
        with pytest.raises(errors.BusyError):
            api.activate_many(names)
        assert all(volume.device is None for volume in api.list("p"))
    api.activate("p/c1", read_only=True)
    with pytest.raises(errors.BusyError):
        api.activate_many(names)
    assert [volume.name for volume in api.list("p") if volume.device] == ["c1"]
    api.deactivate("p/c1")
    found = api.activate_many([*names, "p/base"])
    assert len({each.number for each in found}) == 5
    assert [each.already_active for each in found] == [False] * 5
    assert loop.describe_number(int(found[4].number.split(":")[1])).read_only


def test_one_that_cannot_be_mounted_leaves_nothing(api, based, tmp_path, directories):
    before = api.list("p")
    api.create("p/raw", size=64 * MIB)
    with pytest.raises(errors.UsageError):
        api.snapshot_many("p/raw", [f"p/c{n}" for n in range(5)], mount=directories)
    with pytest.raises(errors.UsageError, match="each another"):
        api.snapshot_many("p/base", ["p/c0", "p/c1"], mount=[directories[0]] * 2)
    with pytest.raises(errors.NotFoundError):
        api.snapshot_many("p/base", ["p/c0"], mount=[tmp_path / "nowhere"])
    with pytest.raises(errors.UsageError):
        api.mount_many({"p/base": directories[0], "p/raw": directories[1]})
    assert mounted_below(tmp_path) == []
    api.remove(["p/raw"])
    assert api.list("p") == before


@pytest.mark.xfs
def test_a_filesystem_that_somebody_made_over_the_known_one_is_found(api, based, directories):
    api.create("p/c", size=400 * MIB, fs="ext4")
    device = api.activate("p/c").device
    subprocess.run(["mkfs.xfs", "-qf", device], check=True)
    api.deactivate("p/c")
    made = api.snapshot_many("p/c", ["p/d", "p/e"], mount=directories[:2])
    assert [volume.mounts for volume in made] == [(str(each),) for each in directories[:2]]


def test_owner_and_mode_of_a_device(api, based):
    api.snapshot("p/base", "p/c")
    found = api.activate("p/c", owner=(12, 34), mode=0o640)
    status = Path(found.device).stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (12, 34, 0o640)
    api.deactivate("p/c")


def test_rename_of_an_active_volume_moves_its_device(api, based):
    api.snapshot("p/base", "p/c")
    old = api.activate("p/c").device
    new = api.rename("p/c", "p/d").device
    assert Path(new).name == "d"
    assert not Path(old).is_symlink()
    assert Path(new).resolve().is_block_device()
    api.deactivate("p/d")


def test_volume_grows_while_it_is_active(api, based):
    api.create("p/v", size=8 * MIB)
    device = api.activate("p/v").device
    api.resize("p/v", 24 * MIB)
    with Path(device).open("rb") as file:
        assert file.seek(0, os.SEEK_END) == 24 * MIB
    with Path(device).open("r+b") as file:
        file.seek(20 * MIB)
        file.write(b"beyond")
    api.deactivate("p/v")
    with api.open("p/v") as handle:
        assert handle.read(20 * MIB, 6) == b"beyond"
    with pytest.raises(errors.UsageError):
        api.resize("p/base", 64 * MIB + 1)


def test_filesystem_grows_with_its_volume(api, based, directory):
    api.snapshot("p/base", "p/c", size=256 * MIB)
    api.mount("p/c", directory)
    found = os.statvfs(directory)
    assert found.f_blocks * found.f_frsize > 200 * MIB
    api.umount("p/c")
    with pytest.raises(errors.UsageError):
        api.resize("p/c", 128 * MIB)
    assert api.resize("p/c", 384 * MIB).size == 384 * MIB
    api.mount("p/c", directory)
    found = os.statvfs(directory)
    assert found.f_blocks * found.f_frsize > 300 * MIB
    api.umount("p/c")


def test_trim_returns_the_space_of_deleted_files(api, based, directory):
    api.snapshot("p/base", "p/c", mount=directory)
    (directory / "big").write_bytes(os.urandom(30 * MIB))
    os.sync()
    (directory / "big").unlink()
    assert api.trim("p/c").trimmed >= 28 * MIB
    api.umount("p/c")
    assert api.check("p").clean


def test_removal_refuses_what_is_active_and_removes_nothing_then(api, based, directory):
    api.snapshot("p/base", "p/a")
    api.snapshot("p/base", "p/b", mount=directory)
    with pytest.raises(errors.BusyError) as caught:
        api.remove(["p/a", "p/b"])
    assert str(directory) in caught.value.message
    assert {volume.name for volume in api.list("p")} == {"base", "a", "b"}
    removal = api.remove(["p/a", "p/b"], deactivate=True)
    assert [volume.name for volume in removal.removed] == ["a", "b"]
    assert {volume.name for volume in api.list("p")} == {"base"}


def test_import_export_and_diff_agree(api, based, tmp_path):
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "name").write_text("thin")
    (tree / "link").symlink_to("etc/name")
    archive = tmp_path / "tree.tar"
    with tarfile.open(archive, "w") as file:
        file.add(tree, ".")
    steps = []
    image = api.import_image("p/image", archive, progress=steps.append)
    assert (image.kind, image.read_only, image.parent) == ("image", True, "base")
    assert steps
    again = api.import_image("p/again", archive)
    assert again.labels["chain-id"] == image.labels["chain-id"]
    assert again.parent == "image"
    with pytest.raises(errors.AlreadyExistsError) as caught:
        api.import_image("p/image", archive)
    assert caught.value.existing["name"] == "image"
    assert [(each.path, each.change) for each in api.diff("p/base", "p/image")] == [
        ("etc", "added"),
        ("etc/name", "added"),
        ("link", "added"),
    ]
    output = io.BytesIO()
    api.export("p/image", output)
    with tarfile.open(fileobj=io.BytesIO(output.getvalue())) as file:
        assert {name.removeprefix("./") for name in file.getnames()} == {
            ".",
            "etc",
            "etc/name",
            "link",
        }
    assert {volume.name for volume in api.list("p")} == {"base", "image", "again"}


def test_broken_import_leaves_nothing(api, based, tmp_path):
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as file:
        member = tarfile.TarInfo("../escaped")
        member.size = 4
        file.addfile(member, io.BytesIO(b"evil"))
    before = api.status("p")
    with pytest.raises(errors.ArchiveError):
        api.import_image("p/image", archive)
    after = api.status("p")
    assert (after.volumes, after.data.used) == (before.volumes, before.data.used)
    assert {volume.name for volume in api.list("p")} == {"base"}
    assert not loop.find_below(Path(os.environ["THINPOOL_RUN"]) / "fuse")


def test_two_roots_have_pools_of_one_name(api, based, tmp_path):
    other = Thinpool(tmp_path / "other", timeout=20)
    other.create_pool("p", size=64 * MIB, base_size=0)
    other.create("p/v", size=MIB)
    api.create("p/v", size=MIB)
    mine, theirs = api.activate("p/v"), other.activate("p/v")
    try:
        assert mine.device != theirs.device
        assert mine.number != theirs.number
        assert "@" in theirs.device
    finally:
        other.deactivate("p/v")
        api.deactivate("p/v")
        other.remove_pool("p")


def test_detached_pool_is_attached_again_with_its_names(api, based, directory):
    api.snapshot("p/base", "p/c", mount=directory)
    (directory / "kept").touch()
    api.umount("p/c")
    status = api.status("p")
    api.detach_pool("p")
    assert api.pools() == []
    attached = api.attach_pool("q", data=status.data.path, metadata=status.metadata.path)
    assert (attached.volumes, attached.transaction_id) == (2, status.transaction_id)
    assert {volume.name for volume in api.list("q")} == {"base", "c"}
    api.mount("q/c", directory)
    assert (directory / "kept").exists()
    api.umount("q/c")
    api.detach_pool("q")
    for suffix in ("", ".names.json"):
        Path(status.metadata.path + suffix).unlink(missing_ok=True)
    Path(status.data.path).unlink()
