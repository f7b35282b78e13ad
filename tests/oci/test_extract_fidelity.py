"""What GNU tar writes is unpacked as GNU tar unpacks it, in each of its formats."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require
from tests.oci.tarbuild import extract
from tests.oci.trees import state


def tar(*arguments: str | Path, given: bytes | None = None) -> bytes:
    """Run GNU tar; returns its standard output."""
    program = shutil.which("tar")
    if program is None:
        pytest.skip("no tar on this host")
    done = subprocess.run([program, *arguments], check=True, capture_output=True, input=given)
    return done.stdout


def zoo(root: Path) -> None:
    """A tree with everything that a filesystem holds and a tar can carry."""
    root.mkdir()
    for name in ("dir", "dir/sub", "empty"):
        (root / name).mkdir()
    (root / "file").write_bytes(b"hello")
    (root / "dir/large").write_bytes(os.urandom(1_000_003))
    (root / "dir/sub/zero").write_bytes(b"")
    (root / ("n" * 255)).write_bytes(b"long name")
    deep = root
    for _ in range(20):
        deep /= "d" * 40
        deep.mkdir()
    (deep / "deep").write_bytes(b"deep")
    (deep / "link").symlink_to("x" * 300)
    os.link(deep / "deep", deep / "deep2")
    os.link(root / "file", root / "dir/hard")
    (root / "relative").symlink_to("dir/sub")
    (root / "absolute").symlink_to("/etc/passwd")
    (root / "dangling").symlink_to("../../nowhere")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe-not-utf8")).write_bytes(b"raw")
    (root / "new\nline").write_bytes(b"newline")
    os.mkfifo(root / "fifo", 0o640)
    with (root / "sparse").open("wb") as file:
        for at in range(64):
            file.seek(at * 1_000_000)
            file.write(b"%d" % at * 100)
        file.truncate(100_000_000)
    with (root / "all-hole").open("wb") as file:
        file.truncate(5_000_000)
    (root / "setuid").write_bytes(b"#!")
    (root / "setuid").chmod(0o6755)
    (root / "empty").chmod(0o1777)
    os.setxattr(root / "file", b"user.note", b"\0binary\n=\xff")
    (root / "file").chmod(0o400)
    os.setxattr(root / "dir", b"user.on.dir", b"x" * 1000)
    if os.geteuid() == 0:
        os.mknod(root / "char", 0o620 | stat.S_IFCHR, os.makedev(5, 300))
        os.mknod(root / "block", 0o660 | stat.S_IFBLK, os.makedev(259, 1000))
        os.setxattr(root / "setuid", b"security.capability", CAPABILITY)
        os.setxattr(root / "dir/sub", b"trusted.thing", b"t")
        os.setxattr(root / "relative", b"trusted.on.link", b"l", follow_symlinks=False)
        os.chown(root / "dir/large", 1234, 4_000_000_000)
        os.chown(root / "absolute", 7, 8, follow_symlinks=False)
    os.utime(root / "dir/large", ns=(1, 1_234_567_890_123_456_789))
    os.utime(root / "dir", ns=(1, 999_999_999_999_999_999))
    os.utime(root / "fifo", ns=(1, -5_000_000_000))
    os.utime(root, ns=(1, 1_111_111_111_000_000_000))


CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service=ep


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("zoo") / "root"
    zoo(root)
    return root


def without(tree: dict, *fields: str) -> dict:
    return {
        name: {key: value for key, value in entry.items() if key not in fields}
        for name, entry in tree.items()
    }


@pytest.mark.parametrize(
    "sparse", [(), ("--sparse-version=0.0",), ("--sparse-version=0.1",), ("--sparse-version=1.0",)]
)
def test_pax_archive_comes_out_equal(original, tmp_path, sparse):
    """Every attribute of every entry, nanoseconds and extended attributes included."""
    data = tar(
        "-C", original, "--format=posix", "--xattrs", "--xattrs-include=*", "--numeric-owner",
        *(("--sparse", *sparse) if sparse else ()), "-cf", "-", ".",
    )  # fmt: skip
    root = tmp_path / "root"
    root.mkdir()
    extract(root, data)
    assert state(root) == state(original)
    if sparse:
        assert (root / "sparse").stat().st_blocks <= (original / "sparse").stat().st_blocks
        assert (root / "all-hole").stat().st_blocks == 0


@pytest.mark.parametrize("sparse", [False, True])
def test_gnu_archive_comes_out_equal(original, tmp_path, sparse):
    """The old GNU format: long names, base-256 numbers, its own sparse files; whole seconds."""
    data = tar(
        "-C", original, "--format=gnu", "--numeric-owner", *(("--sparse",) if sparse else ()),
        "-cf", "-", ".",
    )  # fmt: skip
    root = tmp_path / "root"
    root.mkdir()
    extract(root, data)
    wanted = without(state(original), "xattrs")
    for entry in wanted.values():
        entry["mtime"] = entry["mtime"] // 1_000_000_000 * 1_000_000_000
    assert without(state(root), "xattrs") == wanted
    if sparse:
        assert (root / "sparse").stat().st_blocks <= (original / "sparse").stat().st_blocks


def test_ustar_and_v7_archives_come_out_equal(tmp_path):
    """Prefixes of ustar, directories of V7."""
    source = tmp_path / "source"
    deep = source / ("a" * 80) / ("b" * 60)
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"x" * 700)
    (source / "short").mkdir()
    (source / "short/file").write_bytes(b"y")
    for form, names in (("ustar", ["."]), ("v7", ["short"])):
        root = tmp_path / form
        root.mkdir()
        extract(root, tar("-C", source, f"--format={form}", "-cf", "-", *names))
        again = tmp_path / f"{form}-by-tar"
        again.mkdir()
        data = tar("-C", source, f"--format={form}", "-cf", "-", *names)
        tar("-C", again, "-xpf", "-", given=data)
        wanted, found = state(again), state(root)
        if form == "v7":  # the root is not in it
            del wanted[b""], found[b""]
        assert found == wanted


def test_what_comes_out_is_what_gnu_tar_unpacks(original, tmp_path):
    """The same bytes given to both."""
    data = tar("-C", original, "--format=posix", "--numeric-owner", "-cf", "-", ".")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    extract(ours, data)
    tar("-C", theirs, "--numeric-owner", "-xpf", "-", given=data)
    assert state(ours) == state(theirs)


def test_setuid_and_capability_survive_the_change_of_owner(tmp_path):
    """Chown takes both away, so they are set after it."""
    require("root")
    source = tmp_path / "source"
    source.mkdir()
    (source / "program").write_bytes(b"#!")
    os.chown(source / "program", 1000, 1000)
    (source / "program").chmod(0o6755)
    os.setxattr(source / "program", b"security.capability", CAPABILITY)
    root = tmp_path / "root"
    root.mkdir()
    extract(root, tar("-C", source, "--format=posix", "--xattrs", "--xattrs-include=*",
                      "-cf", "-", "."))  # fmt: skip
    assert os.getxattr(root / "program", b"security.capability") == CAPABILITY
    assert (root / "program").stat().st_mode == stat.S_IFREG | 0o6755
    assert (root / "program").stat().st_uid == 1000


def test_umask_changes_nothing(original, tmp_path):
    """Modes come from the archive alone."""
    data = tar("-C", original, "--format=posix", "--numeric-owner", "-cf", "-", ".")
    before = os.umask(0o077)
    try:
        root = tmp_path / "root"
        root.mkdir()
        extract(root, data)
    finally:
        os.umask(before)
    assert without(state(root), "xattrs") == without(state(original), "xattrs")


def test_sockets_are_not_in_what_gnu_tar_writes(tmp_path):
    """A socket in the source is left out by tar itself; nothing of ours stumbles."""
    source = tmp_path / "s"
    source.mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(source / "sock"))
    (source / "file").write_bytes(b"1")
    root = tmp_path / "root"
    root.mkdir()
    extract(root, tar("-C", source, "-cf", "-", "."))
    assert [path.name for path in root.iterdir()] == ["file"]
