"""Layer semantics: whiteouts in any order, merges, replacements, rights, a full target."""

from __future__ import annotations

import itertools
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require
from tests.oci.tarbuild import Tar, extract, header, padded
from tests.oci.trees import state
from thinpool.errors import ArchiveError, NoSpaceError, NotPermittedError, ThinpoolError
from thinpool.oci.extract import Extractor, clean
from thinpool.oci.streams import IteratorSource


@pytest.fixture
def root(tmp_path) -> Path:
    """A lower layer."""
    top = tmp_path / "root"
    lower = Tar().dir(b"d/").dir(b"d/sub/").file(b"d/one", b"lower").file(b"d/two", b"lower")
    lower.file(b"d/sub/three", b"lower").file(b"top", b"lower").symlink(b"l", b"d")
    lower.dir(b"other").file(b"other/x", b"lower")
    top.mkdir()
    extract(top, lower.end())
    return top


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def names(root: Path) -> set[str]:
    return {os.fsdecode(name) for name in state(root) if name}


LOWER = {"d", "d/sub", "d/one", "d/two", "d/sub/three", "top", "l", "other", "other/x"}


def test_names_are_cleaned_as_docker_cleans_them():
    """Lexically, before links are looked at."""
    assert clean(b"a/b") == b"a/b"
    assert clean(b"/a//b/./c/") == b"a/b/c"
    assert clean(b"./") == b""
    assert clean(b"a/../b") == b"b"
    assert clean(b"...") == b"..."
    assert clean(b".a/..b/c..") == b".a/..b/c.."
    for climbing in (b"..", b"../a", b"/..", b"a/../..", b"./../a", b"a/b/../../../c"):
        assert clean(climbing) is None


def test_whiteout_hides_a_file_and_a_tree(root):
    """With everything below; what is not there is not missed."""
    tar = Tar().file(b"d/.wh.one").file(b".wh.other").file(b"d/.wh.missing").file(b"no/.wh.dir")
    result = extract(root, tar.end())
    assert names(root) == LOWER - {"d/one", "other", "other/x"}
    assert result.whiteouts == 3


def test_whiteout_hides_a_link_and_not_what_it_points_to(root):
    """The name is not followed."""
    extract(root, Tar().file(b".wh.l").end())
    assert names(root) == LOWER - {"l"}


def test_whiteout_through_a_link_works_inside_the_root(root):
    """A parent that is a link is followed, as in a chroot."""
    extract(root, Tar().file(b"l/.wh.one").end())
    assert names(root) == LOWER - {"d/one"}


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_opaque_hides_the_lower_layers_whatever_the_order(root, order):
    """The marker first, in the middle or last: what the layer itself brings stays."""
    members = [
        lambda tar: tar.file(b"d/.wh..wh..opq"),
        lambda tar: tar.file(b"d/new", b"upper"),
        lambda tar: tar.file(b"d/sub/fresh", b"upper"),
        lambda tar: tar.file(b"d/one", b"upper"),
    ]
    tar = Tar().dir(b"d/")
    for at in order:
        members[at](tar)
    extract(root, tar.end())
    assert names(root) == {
        "d", "d/new", "d/sub", "d/sub/fresh", "d/one", "top", "l", "other", "other/x",
    }  # fmt: skip
    assert (root / "d/one").read_bytes() == b"upper"


@pytest.mark.parametrize("first", [True, False])
def test_whiteout_of_a_name_that_the_layer_brings_too(root, first):
    """It hides the lower one only (OCI layer.md), a directory's lower content included."""
    tar = Tar()
    if first:
        tar.file(b".wh.d").file(b".wh.top")
    tar.dir(b"d/").file(b"d/mine", b"upper").file(b"top", b"upper")
    if not first:
        tar.file(b".wh.d").file(b".wh.top")
    extract(root, tar.end())
    assert names(root) == {"d", "d/mine", "top", "l", "other", "other/x"}
    assert (root / "top").read_bytes() == b"upper"


def test_whiteout_keeps_what_the_layer_put_below_without_naming_the_directory(root):
    """A parent that only the path of a member implies."""
    extract(root, Tar().file(b"d/sub/mine", b"upper").file(b".wh.d").end())
    assert names(root) == {"d", "d/sub", "d/sub/mine", "top", "l", "other", "other/x"}


def test_opaque_root_empties_the_lower_layers(root):
    """The marker at the top."""
    extract(root, Tar().file(b"mine").file(b".wh..wh..opq").file(b"mine2").end())
    assert names(root) == {"mine", "mine2"}


def test_opaque_of_a_link_clears_where_it_leads_inside_the_root(root):
    """Through a parent that is a link, like any member."""
    extract(root, Tar().file(b"l/.wh..wh..opq").end())
    assert names(root) == {"d", "top", "l", "other", "other/x"}


def test_aufs_entries_are_skipped(root):
    """Docker writes none any more, old archives have them."""
    tar = Tar().dir(b".wh..wh.plnk").file(b".wh..wh.aufs").file(b".wh..wh.plnk/1.2", b"x")
    with pytest.raises(ArchiveError):
        extract(root, tar.end())
    extract(root, Tar().dir(b".wh..wh.plnk").file(b".wh..wh.aufs").end())
    assert names(root) == LOWER


def test_without_whiteouts_the_names_are_names(root):
    """A plain directory's files."""
    extract(root, Tar().file(b".wh.d").file(b"d/.wh..wh..opq").dir(b".wh.x").file(
        b".wh.x/y").end(), whiteouts=False)  # fmt: skip
    assert names(root) == LOWER | {".wh.d", "d/.wh..wh..opq", ".wh.x", ".wh.x/y"}


def test_directory_over_directory_merges_and_takes_the_new_metadata(root):
    """Attributes of the lower one go, its entries stay."""
    os.setxattr(root / "d", "user.old", b"1")
    tar = Tar().pax({b"SCHILY.xattr.user.new": b"2"}).dir(b"d", mode=0o1700, mtime=1234)
    extract(root, tar.end())
    assert names(root) == LOWER
    status = (root / "d").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o1700, 1234)
    assert os.listxattr(root / "d") == ["user.new"]


def test_each_type_replaces_each_other(root):
    """What stays is the last, whole trees go."""
    extract(root, Tar().file(b"d", b"file now").dir(b"top").file(b"top/x").dir(b"l").end())
    assert (root / "d").read_bytes() == b"file now"
    assert names(root) == {"d", "top", "top/x", "l", "other", "other/x"}
    assert not (root / "l").is_symlink()


def test_member_through_a_link_of_the_lower_layer(root):
    """Lib -> usr/lib: what is put into lib is in usr/lib."""
    extract(root, Tar().file(b"l/new", b"x").dir(b"l/newdir").end())
    assert (root / "d/new").read_bytes() == b"x"
    assert (root / "l").is_symlink()


def test_absolute_links_lead_from_the_root(root):
    """As for a process inside."""
    tar = Tar().symlink(b"abs", b"/d/sub").symlink(b"climb", b"../../../../d").file(b"abs/x", b"1")
    extract(root, tar.file(b"climb/y", b"2").end())
    assert (root / "d/sub/x").read_bytes() == b"1"
    assert (root / "d/y").read_bytes() == b"2"


def test_hard_link_to_a_file_of_the_lower_layer(root):
    """One inode; later data under the new name does not change the old one."""
    extract(root, Tar().link(b"again", b"d/one").end())
    assert (root / "again").stat().st_ino == (root / "d/one").stat().st_ino
    extract(root, Tar().file(b"again", b"new").end())
    assert (root / "d/one").read_bytes() == b"lower"


def test_what_is_mounted_in_the_root_is_not_emptied(root):
    """An opaque marker stops there with an error."""
    require("root")
    subprocess.run(["/bin/mount", "-t", "tmpfs", "none", root / "d/sub"], check=True)
    try:
        (root / "d/sub/inside").write_bytes(b"stays")
        for tar in (Tar().file(b".wh.d"), Tar().file(b"d/.wh..wh..opq"), Tar().file(b"d", b"x"),
                    Tar().file(b"d/sub/x")):  # fmt: skip
            with pytest.raises(ThinpoolError):
                extract(root, tar.end())
        assert [path.name for path in (root / "d/sub").iterdir()] == ["inside"]
    finally:
        subprocess.run(["/bin/umount", root / "d/sub"], check=True)


def test_hard_link_over_what_is_there_and_over_itself(root):
    """Replaces another entry, is content where both names are the file already."""
    extract(root, Tar().link(b"top", b"d/one").end())
    assert (root / "top").read_bytes() == b"lower"
    assert (root / "top").stat().st_nlink == 2
    extract(root, Tar().link(b"top", b"d/one").end())
    assert (root / "top").stat().st_nlink == 2


def test_metadata_of_a_hard_links_member_is_every_names(root):
    """As Docker and containerd have it; a capability stays where the owner does."""
    require("root")
    (root / "d/one").chmod(0o600)
    tar = Tar().link(b"again", b"d/one", mode=0o4711, uid=7, gid=8, mtime=99)
    extract(root, tar.symlink(b"s", b"nowhere", mtime=5).link(b"t", b"s", uid=9, mtime=6).end())
    found = (root / "d/one").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o4711, 7, 8)
    assert found.st_mtime == 99
    assert (root / "s").lstat().st_uid == 9
    assert (root / "s").lstat().st_mtime == 5
    capability = bytes.fromhex("0000000200040000000000000000000000000000")
    os.setxattr(root / "d/one", "security.capability", capability)
    extract(root, Tar().link(b"third", b"d/one", mode=0o711, uid=7, gid=8).end())
    assert os.getxattr(root / "third", "security.capability") == capability


def test_zeros_become_holes_where_asked_for(root, rng):
    """Wherever they begin and end; the content is the same."""
    for number in range(30):
        parts = [rng.choice([bytes, rng.randbytes])(rng.randrange(20_000)) for _ in range(6)]
        data = b"".join(parts)
        made = extract(root, Tar().file(b"f%d" % number, data).end(), holes=True)
        assert (root / f"f{number}").read_bytes() == data
        assert made.bytes_written == len(data)
    extract(root, Tar().file(b"zeros", bytes(1 << 20)).file(b"e", b"").end(), holes=True)
    found = (root / "zeros").stat()
    assert (found.st_size, found.st_blocks) == (1 << 20, 0)


def test_implied_directories_have_a_plain_mode(root):
    """0755 whatever the umask."""
    before = os.umask(0o077)
    try:
        extract(root, Tar().file(b"p/q/r/file").end())
    finally:
        os.umask(before)
    for name in ("p", "p/q", "p/q/r"):
        assert stat.S_IMODE((root / name).stat().st_mode) == 0o755


def test_times_of_directories_are_set_after_their_files(root):
    """Also of one that later members change, and of the root."""
    tar = Tar().dir(b"./", mtime=11).dir(b"a", mtime=22).dir(b"a/b", mtime=33)
    tar.file(b"a/b/c", mtime=44).file(b"a/d").file(b".wh.top").link(b"a/e", b"a/d")
    extract(root, tar.end())
    for name, mtime in (("", 11), ("a", 22), ("a/b", 33), ("a/b/c", 44)):
        assert (root / name).stat().st_mtime == mtime


def test_default_acl_reaches_no_file_that_a_layer_brings(root):
    """It is set when everything is in place, and not inherited by what a later layer brings."""
    acl = bytes.fromhex(
        "0200000001000700ffffffff02000700e803000004000500ffffffff10000700ffffffff20000500ffffffff"
    )
    try:
        os.setxattr(root / "d", "system.posix_acl_default", acl)
        os.removexattr(root / "d", "system.posix_acl_default")
    except OSError as error:
        pytest.skip(f"no ACLs here: {error.strerror}")
    tar = Tar().pax({b"SCHILY.xattr.system.posix_acl_default": acl}).dir(b"acl").file(b"acl/file")
    extract(root, tar.end())
    assert os.getxattr(root / "acl", "system.posix_acl_default") == acl
    assert os.listxattr(root / "acl/file") == []
    upper = Tar().file(b"acl/new", mode=0o640).dir(b"acl/dir", mode=0o750)
    upper.add(b"acl/fifo", kind=b"6", mode=0o620).symlink(b"acl/link", b"x")
    extract(root, upper.end())
    for name, mode in (("new", 0o640), ("dir", 0o750), ("fifo", 0o620)):
        assert os.listxattr(root / "acl" / name) == []
        assert stat.S_IMODE((root / "acl" / name).stat().st_mode) == mode


def test_foreign_security_labels_are_noted_and_left_out(root):
    """SELinux's on a host without it; a capability is no such label."""
    tar = Tar().pax({b"SCHILY.xattr.security.nosuchmodule": b"x"}).file(b"f", b"1")
    try:
        os.setxattr(root / "top", "security.nosuchmodule", b"x")
    except OSError:
        result = extract(root, tar.end())
        assert len(result.notes) == 1
    else:  # a filesystem that takes any
        assert extract(root, tar.end()).notes == ()
    assert (root / "f").read_bytes() == b"1"


def test_attributes_of_other_systems_are_noted_and_left_out(root):
    """A Mac's."""
    tar = Tar().pax({b"SCHILY.xattr.com.apple.provenance": b"x"}).file(b"f", b"1")
    result = extract(root, tar.end())
    assert len(result.notes) == 1
    assert "com.apple.provenance" in result.notes[0]
    assert os.listxattr(root / "f") == []


def test_attribute_that_cannot_be_set_is_an_error_or_a_note(root):
    """user.* on a symbolic link, which no Linux filesystem takes."""
    tar = Tar().pax({b"SCHILY.xattr.user.x": b"1"}).symlink(b"s", b"t").end()
    with pytest.raises(NotPermittedError) as caught:
        extract(root, tar)
    assert caught.value.attribute == "user.x"
    result = extract(root, tar, best_effort_xattrs=True)
    assert len(result.notes) == 1
    assert (root / "s").is_symlink()


def test_many_parents_stay_within_the_limit_of_open_files(root):
    """More directories than are kept open, back and forth."""
    tar = Tar()
    for turn in range(3):
        for at in range(300):
            tar.file(b"many/%d/%d/f%d" % (at, at, turn), b"%d" % at)
    before = open_descriptors()
    extract(root, tar.end())
    assert open_descriptors() == before
    assert (root / "many/299/299/f2").read_bytes() == b"299"


def test_descriptors_are_closed_after_an_error(root):
    """Whatever the member was."""
    before = open_descriptors()
    bad = (
        Tar().file(b"a/b/c").file(b"top/x"),
        Tar().file(b"a/b", b"x" * 100, size=10**6),
        Tar().dir(b"a").file(b"../x"),
        Tar().dir(b"a", uid=0xFFFF_FFFF),
        Tar().pax({b"SCHILY.xattr.": b""}).file(b"f"),
        Tar().link(b"a/b/c/d", b"e/f/g"),
    )
    for tar in bad:
        with pytest.raises((ArchiveError, NotPermittedError)):
            extract(root, tar.end())
    assert open_descriptors() == before


def test_huge_file_by_its_headers(root):
    """More than 8 GiB: base 256 and PAX sizes, as a sparse file so that it costs nothing."""
    size = 20 << 30
    lines = padded(b"1\n%d\n3\n" % (size - 3))
    records = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.name": b"big",
               b"GNU.sparse.realsize": b"%d" % size}  # fmt: skip
    extract(root, Tar().pax(records).file(b"x", lines + b"end").end())
    with (root / "big").open("rb") as file:
        assert file.seek(-3, os.SEEK_END) == size - 3
        assert file.read() == b"end"
    assert (root / "big").stat().st_blocks <= 16


@pytest.mark.parametrize("pax", [True, False])
def test_nine_gibibytes_stream_through(pax, tmp_path):
    """A plain file beyond the octal size field, to a filesystem that is full before its end."""
    require("root")
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=8m", "none", mount], check=True)
    try:
        size = 9 << 30
        start = Tar()
        if pax:
            start.pax({b"size": b"%d" % size})
        start.raw(header(b"big", size=0 if pax else size))
        zeros = bytes(1 << 20)
        pieces = itertools.chain([start.out.getvalue()], itertools.repeat(zeros, 9 << 10))
        fd = os.open(mount, os.O_RDONLY)
        try:
            with pytest.raises(NoSpaceError) as caught:
                Extractor(fd).apply(IteratorSource(pieces))
        finally:
            os.close(fd)
        assert caught.value.member == "big"
        assert (mount / "big").stat().st_size > 7 << 20
    finally:
        subprocess.run(["/bin/umount", mount], check=True)


def test_full_of_inodes_is_no_space_too(tmp_path):
    """ENOSPC from a create."""
    require("root")
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "nr_inodes=20", "none", mount], check=True)
    try:
        tar = Tar()
        for at in range(50):
            tar.file(b"f%d" % at)
        with pytest.raises(NoSpaceError):
            extract(mount, tar.end())
    finally:
        subprocess.run(["/bin/umount", mount], check=True)


@pytest.mark.parametrize("kind", ["owner", "device", "ignored"])
def test_without_root_owners_and_devices_are_an_error_unless_told_otherwise(tmp_path, kind):
    """A typed one, never silence."""
    require("root")
    root = tmp_path / "root"
    root.mkdir()
    tar = Tar().dir(b"d", uid=65534, gid=65534, mode=0o500).file(b"d/f", b"x", uid=65534, gid=65534)
    tar.dir(b"d/e", uid=65534, gid=65534, mode=0o000).file(b"d/e/g", b"", uid=65534, gid=65534)
    if kind == "owner":
        tar.file(b"owned", uid=1)
    elif kind == "device":
        tar.add(b"device", kind=b"3", device=(1, 3), uid=65534, gid=65534)
    else:
        tar.file(b"owned", uid=1).add(b"device", kind=b"3", device=(1, 3)).dir(b"d2", uid=3)
    data = tar.end()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.chown(root, 65534, 65534)
            fd = os.open(root, os.O_RDONLY)
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            try:
                result = Extractor(fd, ignore_ownership=kind == "ignored").apply(
                    IteratorSource(iter((data,)))
                )
                status = 10 + len(result.notes)
            except NotPermittedError as error:
                status = {"chown": 1, "unpack": 2}[error.operation]
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    expected = {"owner": 1, "device": 2, "ignored": 11}[kind]
    assert os.waitstatus_to_exitcode(status) == expected
    assert (root / "d/f").read_bytes() == b"x"
    assert (root / "d/e/g").exists()
    if kind == "ignored":
        assert stat.S_IMODE((root / "d").stat().st_mode) == 0o500
        assert stat.S_IMODE((root / "d/e").stat().st_mode) == 0
        assert (root / "owned").stat().st_uid == 65534
        assert not (root / "device").exists()
