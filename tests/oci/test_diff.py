"""Changes between trees, and the layer that they make."""

from __future__ import annotations

import io
import os
import random
import shutil
import stat
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from tests.oci.tarbuild import extract
from tests.oci.test_extract_fidelity import zoo
from tests.oci.trees import state
from thinpool.oci import diff
from thinpool.oci.diff import iter_changes, iter_layer

if TYPE_CHECKING:
    from pathlib import Path


def opened(*roots: Path) -> list[int]:
    return [os.open(root, os.O_RDONLY) for root in roots]


def changes(before: Path, after: Path, **options) -> list[tuple]:
    fds = opened(before, after)
    try:
        found = list(iter_changes(*fds, **options))
    finally:
        for fd in fds:
            os.close(fd)
    return [(change.kind, change.path.decode(), change.reasons) for change in found]


def layer(before: Path, after: Path, **options) -> bytes:
    fds = opened(before, after)
    try:
        return b"".join(iter_layer(*fds, **options))
    finally:
        for fd in fds:
            os.close(fd)


def copy(source: Path, to: Path) -> Path:
    subprocess.run(["/bin/cp", "-a", source, to], check=True)
    return to


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    before = tmp_path / "before"
    for name in ("a/b/c", "a/empty", "d"):
        (before / name).mkdir(parents=True)
    for name in ("a/b/c/file", "a/one", "d/two", "top"):
        (before / name).write_bytes(name.encode() * 100)
    (before / "link").symlink_to("a")
    return before, copy(before, tmp_path / "after")


def test_equal_trees_have_no_changes(pair):
    """A copy differs in inode numbers and ctimes only."""
    assert changes(*pair) == []


def test_changes_are_named_in_order_with_reasons(pair):
    """One of each."""
    before, after = pair
    (after / "a/b/c/file").write_bytes(b"shorter")
    (after / "a/new").mkdir()
    (after / "a/new/inside").write_bytes(b"12345")
    (after / "a/empty").rmdir()
    shutil.rmtree(after / "d")
    (after / "link").unlink()
    (after / "link").symlink_to("b")
    os.utime(after / "link", ns=(0, (before / "link").lstat().st_mtime_ns), follow_symlinks=False)
    (after / "top").chmod(0o600)
    assert changes(before, after) == [
        ("modified", "a/b/c/file", ("mtime", "size", "content")),
        ("deleted", "a/empty", ()),
        ("added", "a/new", ()),
        ("added", "a/new/inside", ()),
        ("deleted", "d", ()),
        ("modified", "link", ("target",)),
        ("modified", "top", ("mode",)),
    ]
    named = changes(before, after, parents=True)
    assert [path for _, path, _ in named] == [
        "a", "a/b", "a/b/c", "a/b/c/file", "a/empty", "a/new", "a/new/inside", "d", "link", "top",
    ]  # fmt: skip
    assert ("modified", "a/b/c", ("entries",)) in named


def test_same_size_and_mtime_do_not_hide_a_change(pair):
    """Anybody may set an mtime."""
    before, after = pair
    path = after / "d/two"
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert changes(before, after) == [("modified", "d/two", ("content",))]


def test_directory_that_becomes_a_file_and_the_reverse(pair):
    """Modified, with what is new below."""
    before, after = pair
    shutil.rmtree(after / "a")
    (after / "a").write_bytes(b"now a file")
    (after / "top").unlink()
    (after / "top").mkdir()
    (after / "top/x").write_bytes(b"")
    assert changes(before, after) == [
        ("modified", "a", ("type",)),
        ("modified", "top", ("type",)),
        ("added", "top/x", ()),
    ]


def test_sizes_of_what_is_deleted_include_what_was_in_it(pair):
    """Bytes of all files below."""
    before, after = pair
    shutil.rmtree(after / "a")
    fds = opened(before, after)
    (change,) = iter_changes(*fds)
    for fd in fds:
        os.close(fd)
    assert (change.kind, change.path, change.size) == ("deleted", b"a", 1000 + 500)
    assert change.type == stat.S_IFDIR


def test_attributes_alone_are_a_change(pair):
    """Extended attributes and owners."""
    before, after = pair
    os.setxattr(after / "top", "user.x", b"1")
    expected = [("modified", "top", ("xattrs",))]
    if os.geteuid() == 0:
        os.chown(after / "d", 5, 6)
        expected.insert(0, ("modified", "d", ("owner",)))
    assert changes(before, after) == expected


@pytest.mark.loop
def test_snapshots_of_one_filesystem_are_compared_without_reading(tmp_path, monkeypatch):
    """Two block-level copies of an ext4: what changed since is read and found, nothing else."""
    require("loop", "ext4")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run([shutil.which("mkfs.ext4"), "-q", "-F", image], check=True)
    mounts = [tmp_path / "one", tmp_path / "two"]
    for mount in mounts:
        mount.mkdir()
    mount_program, umount = "/bin/mount", "/bin/umount"
    subprocess.run([mount_program, "-o", "loop", image, mounts[0]], check=True)
    try:
        for at in range(200):
            (mounts[0] / f"file{at}").write_bytes(b"%d" % at * 1000)
    finally:
        subprocess.run([umount, mounts[0]], check=True)
    second = tmp_path / "second"
    shutil.copyfile(image, second)
    mounted = []
    try:
        for path, mount in zip((image, second), mounts, strict=True):
            subprocess.run([mount_program, "-o", "loop", path, mount], check=True)
            mounted.append(mount)
        target = mounts[1] / "file7"
        status = target.stat()
        with target.open("r+b") as file:
            file.write(b"changed")
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        (mounts[1] / "file8").touch()
        os.utime(mounts[1] / "file8", ns=(0, (mounts[0] / "file8").stat().st_mtime_ns))
        (mounts[1] / "file9").unlink()
        wanted = [("modified", "file7", ("content",)), ("deleted", "file9", ())]
        assert changes(*mounts) == wanted
        compared = []
        equal = diff._equal_content
        monkeypatch.setattr(
            diff, "_equal_content", lambda *fds: compared.append(fds) or equal(*fds)
        )
        assert changes(*mounts, related=True) == wanted
        assert len(compared) == 2  # file7 and file8, whose ctimes differ
        compared.clear()
        assert changes(*mounts, related=True, parted_ns=0) == wanted
        assert len(compared) == 199
    finally:
        for mount in mounted:
            subprocess.run([umount, mount], check=True)


@pytest.mark.parametrize("seed", range(8))
def test_layer_turns_the_first_tree_into_the_second(seed, tmp_path):
    """Random edits of a rich tree, seeded; applied to a copy they give the edited tree."""
    require("root")  # some directories end up with modes that keep others out
    before = tmp_path / "before"
    zoo(before)
    after = copy(before, tmp_path / "after")
    edit(after, random.Random(seed))
    again = copy(before, tmp_path / "again")
    extract(again, layer(before, after))
    assert without_links(state(again)) == without_links(state(after))


def without_links(tree: dict) -> dict:
    """A new name for an unchanged file is a copy in a layer; an unchanged directory's mtime."""
    for entry in tree.values():
        entry.pop("same as", None)
    tree[b""].pop("mtime")
    return tree


def editable(root: Path) -> list[Path]:
    """What is no link and has a path that can be used whole (rglob fails on a longer one)."""
    found = (
        root / folder / name
        for folder, folders, files in os.walk(root)
        for name in [*folders, *files]
        if len(os.fsencode(folder)) + len(os.fsencode(name)) < 4000
    )
    return sorted(path for path in found if not path.is_symlink())


def edit(root: Path, rng: random.Random) -> None:
    for at in range(30):
        path = rng.choice(editable(root))
        action = rng.randrange(6)
        if action == 0:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif action == 1 and path.is_file():
            path.write_bytes(os.urandom(rng.randrange(5000)))
        elif action == 2 and path.is_dir():
            (path / f"new{at}").mkdir()
            (path / f"new{at}" / "file").write_bytes(b"new")
        elif action == 3:
            path.chmod(rng.choice([0o600, 0o755, 0o4711]))
        elif action == 4:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            path.mkdir()
            (path / "was something else").write_bytes(b"")
        elif action == 5 and path.is_dir():
            shutil.rmtree(path)
            path.symlink_to("elsewhere")


def test_layer_names_directories_above_a_change_once(pair):
    """So that their metadata stays when the layer is applied elsewhere."""
    before, after = pair
    (after / "a/b/c/file").unlink()
    (after / "a/b/c/other").write_bytes(b"")
    with tarfile.open(fileobj=io.BytesIO(layer(before, after))) as archive:
        assert archive.getnames() == ["a", "a/b", "a/b/c", "a/b/c/.wh.file", "a/b/c/other"]


def test_names_reserved_for_whiteouts_are_left_out_with_a_note(pair):
    """A layer cannot carry them."""
    before, after = pair
    (after / ".wh.top").write_bytes(b"")
    (after / "a/.wh.dir").mkdir()
    (after / "a/.wh.dir/x").write_bytes(b"")
    notes: list[str] = []
    data = layer(before, after, note=notes.append)
    assert len(notes) == 2
    extract(before, data)
    assert (before / "top").exists()
    assert not (before / "a/.wh.dir").exists()


def test_walk_deeper_than_path_max(tmp_path):
    """One change at the bottom of 300 levels of long names."""
    roots = [tmp_path / "one", tmp_path / "two"]
    for content, root in enumerate(roots):
        root.mkdir()
        fd = os.open(root, os.O_RDONLY)
        for _ in range(100):
            os.mkdir("d" * 100, dir_fd=fd)
            inner = os.open("d" * 100, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = inner
        file = os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        os.write(file, b"%d" % content)
        os.close(file)
        os.close(fd)
    found = changes(*roots, parents=True)
    assert len(found) == 101
    assert found[-1][2][-1] == "content"
    for root in roots:
        subprocess.run(["/bin/rm", "-rf", root], check=True)
