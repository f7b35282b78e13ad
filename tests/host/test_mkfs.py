"""Filesystems made for being cloned: what they map, what mounting a clone adds."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from thinpool import errors
from thinpool.host import filesystems, loop, mountinfo, mounts
from thinpool.host.signatures import carries, data_ranges

MIB = 1 << 20
GIB = 1 << 30
BOTH = pytest.mark.parametrize("fstype", ["ext4", "xfs"])
BLOCKS = pytest.mark.parametrize("block_size", [64 << 10, MIB])

FRESH_LIMIT = {
    ("ext4", 64 << 10): MIB,
    ("ext4", MIB): 12 * MIB,
    ("xfs", 64 << 10): MIB // 2,
    ("xfs", MIB): 5 * MIB,
}
"""Bytes that a fresh base of 10 GiB maps at most."""
CLONE_LIMIT = {("ext4", 64 << 10): 1, ("ext4", MIB): 1, ("xfs", 64 << 10): 36, ("xfs", MIB): 5}
"""Blocks that the first mount and umount of a clone maps at most."""


def blocks_with_data(path, size):
    with Path(path).open("rb") as file:
        os.fsync(file.fileno())
        return {
            block
            for start, end in data_ranges(file.fileno())
            for block in range(start // size, -(-end // size))
        }


def changed_blocks(before, after, size):
    """Pool blocks with a 4 KiB unit that is new in the second file or differs from the first."""
    old, new = blocks_with_data(before, 4096), blocks_with_data(after, 4096)
    changed = new - old
    with Path(before).open("rb") as one, Path(after).open("rb") as other:
        for unit in new & old:
            at = unit * 4096
            if os.pread(one.fileno(), 4096, at) != os.pread(other.fileno(), 4096, at):
                changed.add(unit)
    return {unit * 4096 // size for unit in changed}


def check_clean(fstype, path):
    command = ["e2fsck", "-fn"] if fstype == "ext4" else ["xfs_repair", "-n"]
    done = subprocess.run([*command, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def volume(sparse, require):
    """Makes a file with a filesystem of ours."""
    require("ext4", "xfs", "sparse")

    def make(fstype, size=10 * GIB, block_size=64 << 10, name="base"):
        path = sparse(size, name)
        filesystems.make_filesystem(path, fstype, block_size=block_size)
        return path

    return make


@BOTH
@BLOCKS
def test_a_fresh_base_maps_little(volume, fstype, block_size):
    path = volume(fstype, block_size=block_size)
    mapped = len(blocks_with_data(path, block_size)) * block_size
    assert 0 < mapped <= FRESH_LIMIT[fstype, block_size]
    check_clean(fstype, path)


@BOTH
@BLOCKS
@pytest.mark.loop
@pytest.mark.root
def test_mount_and_umount_of_a_clone_map_little(volume, work, directory, fstype, block_size):
    base = volume(fstype, block_size=block_size)
    clone = str(work / "clone")
    subprocess.run(["cp", "--sparse=always", base, clone], check=True)
    device = loop.attach(clone)
    mounts.mount(device.path, directory, fstype, filesystems.default_options(fstype))
    mounts.unmount(directory)
    loop.detach(device)
    assert len(changed_blocks(base, clone, block_size)) <= CLONE_LIMIT[fstype, block_size]


@BOTH
def test_the_root_is_empty_and_open_to_all(volume, fstype, require):
    require("root", "loop")
    device = loop.attach(volume(fstype))
    try:
        with mounts.detached_mount(device.path, fstype) as root:
            assert os.listdir(root) == []
            assert os.fstat(root).st_mode & 0o7777 == 0o755
            assert os.fstat(root).st_uid == 0
    finally:
        loop.detach(device)


@BOTH
def test_a_filesystem_on_a_device_is_like_one_on_a_file(sparse, fstype, require):
    require("root", "loop", "ext4", "xfs")
    path = sparse(GIB)
    device = loop.attach(path)
    try:
        made = filesystems.make_filesystem(device.path, fstype, block_size=64 << 10)
        assert made.size == GIB
        assert made.fstype == fstype
        assert filesystems.fs_type(device.path) == fstype
    finally:
        loop.detach(device)
    assert carries(path) == fstype
    assert len(blocks_with_data(path, 64 << 10)) < 24


@BOTH
def test_superblocks_tell_the_size(volume, fstype):
    path = volume(fstype, size=3 * GIB)
    found = filesystems.read_superblock(path)
    assert found is not None
    assert found.size == 3 * GIB
    assert found.block_size == 4096
    assert len(set(found.uuid)) > 1


@BOTH
def test_volumes_are_mounted_safely_and_snapshots_beside_their_origin(
    volume, work, directory, fstype, require
):
    require("root", "loop")
    base = volume(fstype, size=GIB)
    snapshot = str(work / "snapshot")
    subprocess.run(["cp", "--sparse=always", base, snapshot], check=True)
    place = work / "other"
    place.mkdir()
    one, other = loop.attach(base), loop.attach(snapshot)
    try:
        assert filesystems.mount_volume(one.path, directory) == fstype
        assert filesystems.mount_volume(other.path, str(place), options=["dev,noatime"]) == fstype
        first, second = mountinfo.mount_at(directory), mountinfo.mount_at(str(place))
        assert first is not None
        assert second is not None
        assert {"nodev", "nosuid"} <= set(first.options.split(","))
        assert {"nosuid", "noatime"} <= set(second.options.split(","))
        assert "nodev" not in second.options.split(",")
        retries = Path(f"/sys/fs/xfs/loop{one.number}/error/metadata/ENOSPC/max_retries")
        if fstype == "xfs" and retries.exists():  # not where /sys is another namespace's
            assert retries.read_text().strip() == "0"
        mounts.unmount(str(place))
        filesystems.mount_volume(other.path, str(place), read_only=True)
    finally:
        mounts.unmount(str(place))
        mounts.unmount(directory)
        loop.detach(other)
        loop.detach(one)


def test_a_volume_without_a_filesystem_is_not_mounted(sparse, directory, require):
    require("root", "loop")
    device = loop.attach(sparse())
    try:
        with pytest.raises(errors.UsageError):
            filesystems.mount_volume(device.path, directory)
    finally:
        loop.detach(device)


def test_no_filesystem_no_superblock(sparse):
    path = sparse()
    assert filesystems.read_superblock(path) is None
    assert filesystems.fs_type(path) is None


@BOTH
def test_two_bases_have_different_uuids(volume, fstype):
    one = filesystems.read_superblock(volume(fstype, size=GIB, name="one"))
    other = filesystems.read_superblock(volume(fstype, size=GIB, name="other"))
    assert one is not None
    assert other is not None
    assert one.uuid != other.uuid


@pytest.mark.parametrize("size", [2 * MIB, 5 * MIB, 63 * MIB, 65 * MIB, 300 * MIB, GIB + 4096])
def test_ext4_of_any_size_is_clean(volume, size):
    check_clean("ext4", volume("ext4", size=size, block_size=MIB))


@pytest.mark.parametrize("block_size", [64 << 10, 192 << 10, 16 * MIB, 1 << 30])
def test_any_pool_block_size_is_taken(volume, block_size):
    for fstype in ("ext4", "xfs"):
        path = volume(fstype, size=2 * GIB, block_size=block_size, name=f"{fstype}-{block_size}")
        check_clean(fstype, path)


def test_too_small_and_unknown_filesystems_are_usage_errors(sparse):
    path = sparse(MIB)
    for fstype in ("ext4", "xfs"):
        with pytest.raises(errors.UsageError):
            filesystems.make_filesystem(path, fstype, block_size=64 << 10)
    assert carries(path) is None
    with pytest.raises(errors.UsageError):
        filesystems.check_fs_type("vfat")
    assert filesystems.check_fs_type("xfs") == "xfs"


def test_more_options_join_ours_and_win():
    ext4 = filesystems.merge_options(
        "ext4",
        ["-q", "-O", "none,extent,64bit", "-E", "stride=16,nodiscard"],
        ["-O ^64bit,quota", "-Estride=4", "-m", "1", "-L 'two words'"],
    )
    assert ext4 == [
        *("-q", "-O", "none,extent,^64bit,quota", "-E", "nodiscard,stride=4"),
        *("-m", "1", "-L", "two words"),
    ]
    xfs = filesystems.merge_options("xfs", ["-d", "agcount=2,su=65536,sw=1"], ["-d", "sunit=8"])
    assert xfs == ["-d", "agcount=2,sunit=8"]
    assert filesystems.merge_options("xfs", [], ["-n size=8192"]) == ["-n", "size=8192"]


@pytest.mark.parametrize(
    ("fstype", "options"),
    [
        ("ext4", ["-O ^metadata_csum,quota", "-E", "stride=4,stripe_width=4", "-m 1"]),
        ("ext4", ["-J size=4", "-L", "label"]),
        ("xfs", ["-d agcount=4", "-l size=80m", "-m reflink=0", "-L label"]),
        ("xfs", ["-d", "noalign", "-i size=1024"]),
    ],
)
def test_more_options_make_a_clean_filesystem(sparse, fstype, options, require):
    require(fstype)
    path = sparse(GIB)
    filesystems.make_filesystem(path, fstype, block_size=64 << 10, options=options)
    check_clean(fstype, path)
    assert (b"label" in Path(path).read_bytes()[:2048]) == ("label" in " ".join(options))


def test_bad_options_are_answered_with_mkfss_own_words(sparse, require):
    require("ext4")
    with pytest.raises(errors.ThinpoolError) as caught:
        filesystems.make_filesystem(sparse(), "ext4", block_size=64 << 10, options=["-Z"])
    assert caught.value.program == "mkfs.ext4"
    assert "Z" in caught.value.output


@BOTH
@pytest.mark.parametrize("mounted", [False, True])
def test_a_filesystem_grows_with_its_device(volume, directory, fstype, mounted, require):
    require("root", "loop")
    path = volume(fstype, size=GIB)
    device = loop.attach(path)
    try:
        with mounts.detached_mount(device.path, fstype) as root:
            fd = os.open("file", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=root)
            os.write(fd, b"x" * 100_000)
            os.close(fd)
        os.truncate(path, 3 * GIB)
        loop.set_capacity(device)
        if mounted:
            mounts.mount(device.path, directory, fstype)
            try:
                filesystems.grow(device.path)
            except errors.NotPermittedError as error:
                assert fstype == "ext4"
                assert "CAP_SYS_RESOURCE" in error.message  # noqa: PT017
                pytest.skip("no CAP_SYS_RESOURCE here to grow a mounted ext4")
            finally:
                mounts.unmount(directory)
        else:
            filesystems.grow(device.path)
        filesystems.grow(device.path)  # again: nothing to do
        found = filesystems.read_superblock(device.path)
        assert found is not None
        assert found.size == 3 * GIB
        check_clean(fstype, device.path)
        with mounts.detached_mount(device.path, fstype, read_only=True) as root:
            assert os.listdir(root) == ["file"]
            assert os.stat("file", dir_fd=root).st_size == 100_000
    finally:
        mounts.unmount(directory)
        loop.detach(device)


def test_what_cannot_grow_is_a_usage_error(sparse):
    with pytest.raises(errors.UsageError):
        filesystems.grow(sparse())


@BOTH
@pytest.mark.parametrize("mounted", [False, True])
def test_trim_gives_space_back(volume, directory, fstype, mounted, require):
    require("root", "loop")
    path = volume(fstype, size=GIB)
    device = loop.attach(path)
    try:
        mounts.mount(device.path, directory, fstype)
        (Path(directory) / "big").write_bytes(os.urandom(32 * MIB))
        os.sync()
        (Path(directory) / "big").unlink()
        if not mounted:
            mounts.unmount(directory)
        before = os.stat(path).st_blocks * 512
        assert filesystems.trim_device(device.path).discarded >= 32 * MIB
        if mounted:
            assert filesystems.trim(directory).discarded >= 0
            mounts.unmount(directory)
        assert os.stat(path).st_blocks * 512 <= before - 30 * MIB
    finally:
        mounts.unmount(directory)
        loop.detach(device)


def test_trim_of_what_cannot_is_typed(tmp_path, require):
    require("root")
    with pytest.raises(errors.ThinpoolError):
        filesystems.trim("/proc")


@BOTH
def test_a_cut_off_filesystem_is_replayed_once_and_then_reads_without_writing(
    volume, work, directory, fstype, require
):
    require("root", "loop")
    path = volume(fstype, size=GIB)
    device = loop.attach(path)
    cut = str(work / "cut")
    mounts.mount(device.path, directory, fstype)
    (Path(directory) / "file").write_text("there")
    fd = os.open(directory, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    subprocess.run(["cp", "--sparse=always", path, cut], check=True)  # as a power cut leaves it
    mounts.unmount(directory)
    loop.detach(device)

    device = loop.attach(cut, read_only=True)
    try:
        with pytest.raises(errors.ReadOnlyError):
            filesystems.mount_volume(device.path, directory, read_only=True)
    finally:
        loop.detach(device)
    device = loop.attach(cut)
    try:
        if fstype == "ext4":
            found = filesystems.read_superblock(device.path)
            assert found is not None
            assert found.needs_recovery
        filesystems.replay_journal(device.path)
        check_clean(fstype, device.path)
    finally:
        loop.detach(device)
    kept = str(work / "kept")
    subprocess.run(["cp", "--sparse=always", cut, kept], check=True)
    device = loop.attach(cut, read_only=True)
    try:
        options = filesystems.private_options(fstype)
        with mounts.detached_mount(device.path, fstype, options, read_only=True) as root:
            assert os.listdir(root) == ["file"]
    finally:
        loop.detach(device)
    assert changed_blocks(kept, cut, 4096) == set()


@pytest.mark.parametrize("size", [64 * MIB, 200 * MIB, GIB, 10 * GIB, 100 * GIB])
@pytest.mark.parametrize("options", [[], ["-i", "4096"], ["-N 5000"]], ids=str)
def test_the_journal_begins_with_a_block_of_the_pool(sparse, size, options):
    """So a first fsync writes one block of the journal."""
    path = sparse(size)
    filesystems.make_filesystem(path, "ext4", block_size=64 << 10, options=options)
    check_clean("ext4", path)
    first = journal_block(path, 0)
    assert first * 4096 % (64 << 10) == 0
    assert journal_block(path, 15) == first + 15


def journal_block(path, number):
    command = ["debugfs", "-R", f"bmap <8> {number}", path]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_options_that_move_the_journal_are_obeyed(sparse):
    path = sparse(GIB)
    filesystems.make_filesystem(
        path, "ext4", block_size=64 << 10, options=["-b 1024", "-E resize=2000000"]
    )
    check_clean("ext4", path)
    assert filesystems.read_superblock(path).block_size == 1024
