"""Images of every shape arrive as the same layers; layers that are there are not read again."""

from __future__ import annotations

import io
import os
import threading
from typing import TYPE_CHECKING

import pytest

from tests.oci import images
from tests.oci.tarbuild import Tar
from tests.oci.targets import DirectoryTarget
from tests.oci.trees import state
from thinpool.errors import ArchiveError, DataSpaceError, NoSpaceError
from thinpool.oci.archive import chain_id, open_source
from thinpool.oci.importer import import_image

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = [
    Tar().dir(b"etc/").file(b"etc/one", b"1" * 3000).file(b"etc/two", b"2").end(),
    Tar().file(b"etc/.wh.two").file(b"etc/three", b"3").symlink(b"link", b"etc").end(),
    Tar().dir(b"new/").file(b"new/file", b"n" * 100_000).end(),
]


def chains(layers: list[bytes], parent: str | None = None) -> list[str]:
    found = []
    for layer in layers:
        parent = chain_id(parent, images.digest(layer))
        found.append(parent)
    return found


def load(source, target, **options):
    choice = {key: options.pop(key) for key in ("ref", "platform") if key in options}
    with open_source(source, **choice) as image:
        return import_image(image, target, **options)


def test_chain_ids_are_those_of_the_specification():
    """The example computed with sha256sum: chain(a,b) = sha256("a b")."""
    first = "sha256:" + "a" * 64
    second = "sha256:" + "b" * 64
    assert chain_id(None, first) == first
    assert chain_id(first, second) == images.digest(f"{first} {second}".encode())


SHAPES = {
    "docker": lambda: images.docker(LAYERS),
    "docker-gzip": lambda: images.docker(LAYERS, compression="gzip"),
    "docker-blobs": lambda: images.docker_with_blobs(LAYERS),
    "oci": lambda: images.oci(LAYERS),
    "oci-gzip": lambda: images.oci(LAYERS, "gzip"),
    "oci-zstd": lambda: images.oci(LAYERS, "zstd"),
}


@pytest.mark.parametrize("form", ["tar", "tar.gz", "tar.zst", "directory", "pipe", "pipe.gz"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_image(shape, form, tmp_path):
    """Three layers with a whiteout, in each kind of archive and each way to hold it."""
    files = SHAPES[shape]()
    source: Path | int = tmp_path / "source"
    writer = None
    if form == "directory":
        images.as_directory(files, source)
    else:
        data = images.as_tar(files)
        compression = {"tar.gz": "gzip", "pipe.gz": "gzip", "tar.zst": "zstd"}.get(form, "plain")
        data = images.compress(data, compression)
        if form.startswith("pipe"):
            source, end = os.pipe()

            def write() -> None:
                with os.fdopen(end, "wb") as pipe:
                    pipe.write(data)

            writer = threading.Thread(target=write)
            writer.start()
        else:
            source.write_bytes(data)
    target = DirectoryTarget(tmp_path / "target")
    image = load(source, target)
    if writer is not None:
        writer.join()
        os.close(source)
    assert [layer.chain_id for layer in image.layers] == chains(LAYERS)
    assert image.chain_id == chains(LAYERS)[-1]
    assert image.config["config"]["Cmd"] == ["/bin/sh"]
    top = target.place(image.chain_id)
    assert {name for name in state(top) if name} == {
        b"etc", b"etc/one", b"etc/three", b"link", b"new", b"new/file",
    }  # fmt: skip
    assert (top / "new/file").read_bytes() == b"n" * 100_000
    assert target.unfinished() == []
    assert [call[0] for call in target.calls] == ["begin", "seal"] * 3


@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
@pytest.mark.parametrize("pipe", [False, True])
def test_plain_tar_becomes_one_layer(compression, pipe, tmp_path):
    """Its diffID is that of the uncompressed bytes, known only at the end."""
    data = images.compress(LAYERS[0], compression)
    source: Path | int = tmp_path / "layer"
    if pipe:
        source, end = os.pipe()
        os.write(end, data)
        os.close(end)
    else:
        source.write_bytes(data)
    target = DirectoryTarget(tmp_path / "target")
    image = load(source, target)
    if pipe:
        os.close(source)
    assert image.chain_id == images.digest(LAYERS[0])
    assert image.config is None
    assert target.calls[0] == ("begin", None, None)
    assert (target.place(image.chain_id) / "etc/one").read_bytes() == b"1" * 3000


def test_second_import_reads_no_layer(tmp_path):
    """The layers are found by chainID, from the top."""
    archive = tmp_path / "image.tar"
    archive.write_bytes(images.as_tar(images.docker(LAYERS)))
    target = DirectoryTarget(tmp_path / "target")
    first = load(archive, target)
    target.calls.clear()
    second = load(archive, target)
    assert target.calls == []
    assert second.chain_id == first.chain_id
    assert all(layer.extracted is None for layer in second.layers)


def test_common_lower_layers_are_shared(tmp_path):
    """Only the layer that differs is made, on the shared one."""
    target = DirectoryTarget(tmp_path / "target")
    one, two = tmp_path / "one.tar", tmp_path / "two.tar"
    one.write_bytes(images.as_tar(images.docker(LAYERS[:2])))
    two.write_bytes(images.as_tar(images.oci([LAYERS[0], LAYERS[2]], "zstd")))
    load(one, target)
    target.calls.clear()
    load(two, target)
    below = images.digest(LAYERS[0])
    made = chain_id(below, images.digest(LAYERS[2]))
    assert target.calls == [
        ("begin", below, made),
        ("seal", made, images.digest(LAYERS[2])),
    ]


def test_lower_layer_that_was_deleted_does_not_matter_when_the_upper_is_there(tmp_path):
    """A stack is whole without images of its parts."""
    archive = tmp_path / "image.tar"
    archive.write_bytes(images.as_tar(images.docker(LAYERS)))
    target = DirectoryTarget(tmp_path / "target")
    load(archive, target)
    target.place(chains(LAYERS)[0]).rename(tmp_path / "elsewhere")
    target.calls.clear()
    load(archive, target)
    assert target.calls == []


def test_tar_that_is_there_already_is_dropped_after_reading(tmp_path):
    """What a plain tar is shows only at its end."""
    archive = tmp_path / "layer.tar"
    archive.write_bytes(LAYERS[0])
    target = DirectoryTarget(tmp_path / "target")
    first = load(archive, target)
    target.calls.clear()
    again = load(archive, target)
    assert again.chain_id == first.chain_id
    assert target.calls == [("begin", None, None), ("abort",)]
    assert target.unfinished() == []


def test_parent_is_below_the_lowest_layer(tmp_path):
    """ChainIDs go on from the parent's."""
    target = DirectoryTarget(tmp_path / "target")
    low, high = tmp_path / "low.tar", tmp_path / "high.tar"
    low.write_bytes(LAYERS[0])
    high.write_bytes(LAYERS[1])
    parent = load(low, target).chain_id
    image = load(high, target, parent=parent)
    assert image.chain_id == chains(LAYERS[:2])[-1]
    assert sorted(path.name for path in (target.place(image.chain_id) / "etc").iterdir()) == [
        "one", "three",
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["etc/one", "seal"])
def test_failed_layer_is_dropped_and_those_below_stay(where, tmp_path):
    """A wrong digest in the second layer, or a target that fills up when it is sealed."""
    bad = images.docker(LAYERS[:2])
    archive = tmp_path / "image.tar"
    target = DirectoryTarget(tmp_path / "target")
    expected: type[Exception] = ArchiveError
    if where == "seal":
        target.seal_error = OSError(28, "No space left on device")
        expected = NoSpaceError
    else:
        layer_files = [name for name in bad if name.endswith("layer.tar")]
        name = next(name for name in layer_files if bad[name] == LAYERS[1])
        bad[name] = LAYERS[2]
    archive.write_bytes(images.as_tar(bad))
    with pytest.raises(expected):
        load(archive, target)
    assert target.unfinished() == []
    assert target.calls[-1] == ("abort",)
    sealed = [] if where == "seal" else [images.digest(LAYERS[0])]
    assert [path.name.replace("-", ":") for path in target.root.iterdir()] == sealed


def test_error_of_the_target_keeps_its_type(tmp_path):
    """A pool that is full says so in its own words."""
    archive = tmp_path / "layer.tar"
    archive.write_bytes(LAYERS[0])
    target = DirectoryTarget(tmp_path / "target")
    target.seal_error = DataSpaceError("full", used=1, total=1)
    with pytest.raises(DataSpaceError):
        load(archive, target)
    assert target.unfinished() == []


def test_interrupt_drops_the_layer(tmp_path):
    """Ctrl-C in the middle of the second layer."""
    archive = tmp_path / "image.tar"
    archive.write_bytes(images.as_tar(images.docker(LAYERS)))
    target = DirectoryTarget(tmp_path / "target")

    def progress(now) -> None:
        if now.step == "layer 2 of 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(archive, target, progress=progress)
    assert target.unfinished() == []
    assert len(list(target.root.iterdir())) == 1


def test_progress_rises_to_the_total(tmp_path):
    """In bytes as stored, whatever the compression."""
    archive = tmp_path / "image.tar"
    big = Tar().file(b"big", os.urandom(5_000_000)).end()
    archive.write_bytes(images.as_tar(images.oci([LAYERS[0], big], "gzip")))
    seen = []
    load(archive, DirectoryTarget(tmp_path / "target"), progress=seen.append)
    done = [now.done for now in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total
    assert len(done) > 4
    assert {now.step for now in seen} == {"layer 1 of 2", "layer 2 of 2"}


def test_directory_is_imported_as_it_is(tmp_path):
    """Names like whiteouts are names, links between files stay, the digest is that of its tar."""
    source = tmp_path / "source"
    (source / "a/b").mkdir(parents=True)
    (source / "a/file").write_bytes(b"x")
    os.link(source / "a/file", source / "a/b/again")
    (source / "a/.wh.file").write_bytes(b"not a whiteout")
    (source / "manifest.json").write_text("{}")
    os.utime(source / "a", ns=(0, 1_500_000_000_123_456_789))
    target = DirectoryTarget(tmp_path / "target")
    image = load(source, target)
    assert state(target.place(image.chain_id)) == state(source)
    assert load(source, target).chain_id == image.chain_id


def test_image_without_layers_is_the_parent(tmp_path):
    """FROM scratch with labels only."""
    archive = tmp_path / "image.tar"
    archive.write_bytes(images.as_tar(images.oci([])))
    target = DirectoryTarget(tmp_path / "target")
    image = load(archive, target)
    assert image.chain_id is None
    assert image.layers == ()


def test_descriptor_stays_the_callers(tmp_path):
    """A source given as a descriptor is not closed, and is read from where it stands."""
    path = tmp_path / "file"
    path.write_bytes(b"skip" + LAYERS[0])
    with path.open("rb") as file:
        file.seek(4)
        image = load(file.fileno(), DirectoryTarget(tmp_path / "target"))
        assert image.chain_id == images.digest(LAYERS[0])
        assert file.seek(0, io.SEEK_SET) == 0
