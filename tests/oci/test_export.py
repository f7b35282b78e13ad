"""What export writes comes back equal, through our reader and others', and is always the same."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import socket
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from tests.oci.tarbuild import extract
from tests.oci.test_extract_fidelity import zoo
from tests.oci.trees import state
from thinpool.errors import StorageIOError
from thinpool.oci.export import iter_tar
from thinpool.oci.tree import clear_directory

if TYPE_CHECKING:
    from pathlib import Path


def export(root: Path, **options) -> bytes:
    fd = os.open(root, os.O_RDONLY)
    try:
        return b"".join(iter_tar(fd, **options))
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("zoo") / "root"
    zoo(root)
    return root


@pytest.mark.parametrize("sparse", [True, False])
def test_round_trip_gives_an_equal_tree(original, tmp_path, sparse):
    """Every attribute of every entry; holes stay holes where they are kept."""
    root = tmp_path / "root"
    root.mkdir()
    extract(root, export(original, sparse=sparse))
    assert state(root) == state(original)
    if sparse:
        assert (root / "all-hole").stat().st_blocks == 0
        assert (root / "sparse").stat().st_blocks <= (original / "sparse").stat().st_blocks


def test_round_trip_gives_the_same_bytes(original, tmp_path):
    """The digest of a tree does not depend on where it lies."""
    root = tmp_path / "root"
    root.mkdir()
    first = export(original)
    extract(root, first)
    assert hashlib.sha256(export(root)).hexdigest() == hashlib.sha256(first).hexdigest()


@pytest.mark.parametrize("sparse", [True, False])
def test_gnu_tar_reads_it(original, tmp_path, sparse):
    """Everything but attributes that it is not asked for."""
    require("root")  # it sets attributes after the mode, which others may not on a file of 0400
    program = shutil.which("tar")
    if program is None:
        pytest.skip("no tar on this host")
    root = tmp_path / "root"
    root.mkdir()
    done = subprocess.run(
        [program, "-C", root, "--numeric-owner", "--warning=no-timestamp",
         "--xattrs", "--xattrs-include=*", "-xpf", "-"],
        input=export(original, sparse=sparse), check=False, capture_output=True,
    )  # fmt: skip
    assert done.stderr == b""
    assert done.returncode == 0
    wanted, found = state(original), state(root)
    for tree in (wanted, found):  # a link's own attributes are beyond it
        for entry in tree.values():
            if "target" in entry:
                del entry["xattrs"]
    assert found == wanted


def test_python_reads_it(original):
    """Names, types and contents, sparse files expanded."""
    with tarfile.open(fileobj=io.BytesIO(export(original))) as archive:
        members = {os.fsencode(member.name): member for member in archive}
        wanted = state(original)
        assert {name.removeprefix(b"./").removeprefix(b".") for name in members} == set(wanted)
        for name in (b"sparse", b"all-hole", b"dir/large"):
            file = archive.extractfile(members[name])
            assert file is not None
            assert hashlib.file_digest(file, "sha256").hexdigest() == wanted[name]["content"]


def test_order_of_creation_does_not_show(tmp_path):
    """Two trees made in different order give the same bytes."""
    names = [f"f{at}" for at in range(50)]
    digests = []
    for order in (names, names[::-1]):
        root = tmp_path / order[0]
        root.mkdir()
        for name in order:
            (root / name).write_text(name)
            os.utime(root / name, ns=(1, 1))
        os.utime(root, ns=(1, 1))
        digests.append(hashlib.sha256(export(root)).hexdigest())
    assert digests[0] == digests[1]


def test_socket_is_left_out_with_a_note(tmp_path):
    """And so is nothing else."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "sock"))
    (tmp_path / "file").write_bytes(b"")
    notes: list[str] = []
    with tarfile.open(fileobj=io.BytesIO(export(tmp_path, note=notes.append))) as archive:
        assert archive.getnames() == [".", "file"]
    assert notes == ["sock: a socket, left out"]


def test_what_is_mounted_inside_is_left_out(tmp_path):
    """One filesystem only; the mount point stays as an empty directory."""
    require("root")
    (tmp_path / "mnt").mkdir()
    subprocess.run(["/bin/mount", "-t", "tmpfs", "none", tmp_path / "mnt"], check=True)
    try:
        (tmp_path / "mnt/inside").write_bytes(b"")
        notes: list[str] = []
        with tarfile.open(fileobj=io.BytesIO(export(tmp_path, note=notes.append))) as archive:
            assert archive.getnames() == [".", "mnt"]
        assert len(notes) == 1
    finally:
        subprocess.run(["/bin/umount", tmp_path / "mnt"], check=True)


def test_tree_deeper_than_path_max(tmp_path):
    """A thousand levels of long names: no recursion, no path from the root."""
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d" * 100, dir_fd=fd)
        inner = os.open("d" * 100, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    data = export(tmp_path)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert len(archive.getmembers()) == 301
        assert len(archive.getmembers()[-1].name) == 300 * 101 - 1
    fd = os.open(tmp_path, os.O_RDONLY)
    assert clear_directory(fd) is False
    os.close(fd)
    assert list(tmp_path.iterdir()) == []


def test_many_segments_stay_within_what_readers_take(tmp_path, monkeypatch):
    """More holes than a map may name: neighbours are joined, the content stays."""
    monkeypatch.setattr("thinpool.oci.export._SEGMENTS_MAX", 16)
    path = tmp_path / "source/file"
    path.parent.mkdir()
    with path.open("wb") as file:
        for at in range(101):
            file.seek(at * 65536)
            file.write(b"%d" % at)
        file.truncate(120 * 65536)
    data = export(path.parent)
    root = tmp_path / "root"
    root.mkdir()
    extract(root, data)
    assert state(root) == state(path.parent)


def test_file_that_shrinks_is_an_error(tmp_path):
    """A tree in use may change; what was promised in the header cannot be kept then."""
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x" * 2_000_000)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        pieces = iter_tar(fd)
        next(pieces)
        os.truncate(tmp_path / "file", 10)
        with pytest.raises(StorageIOError):
            list(pieces)
    finally:
        os.close(fd)
