"""Image archives that are cut, lie, point elsewhere or hold several images."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import require
from tests.oci import images
from tests.oci.tarbuild import Tar
from tests.oci.targets import DirectoryTarget
from tests.oci.trees import state
from thinpool.errors import (
    ArchiveError,
    HostSpaceError,
    NotFoundError,
    ThinpoolError,
    UsageError,
)
from thinpool.oci.archive import Platform, open_source
from thinpool.oci.importer import import_image

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ONE = Tar().dir(b"etc/").file(b"etc/one", b"1" * 700).end()
TWO = Tar().file(b"etc/two", b"2" * 700).end()


def load(source, target: DirectoryTarget, **options):
    with open_source(source, **options) as image:
        return import_image(image, target)


def refused(files: dict[str, bytes], tmp_path: Path, links: dict[str, str] | None = None):
    """Both as a tar and as a directory these files are an error, and leave nothing behind."""
    errors = []
    canary = tmp_path / "canary"
    canary.mkdir(exist_ok=True)
    (canary / "layer.tar").write_bytes(ONE)
    before = state(canary)
    archive = tmp_path / "archive.tar"
    archive.write_bytes(images.as_tar(files, links))
    sources: list[Path] = [archive]
    if all("\0" not in name and not name.startswith("..") for name in files):
        directory = images.as_directory(files, tmp_path / "directory")
        for name, to in (links or {}).items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).symlink_to(to)
        sources.append(directory)
    for at, source in enumerate(sources):
        target = DirectoryTarget(tmp_path / f"target{at}")
        with pytest.raises(ThinpoolError) as caught:
            load(source, target)
        assert target.unfinished() == []
        assert [call[0] for call in target.calls if call[0] == "seal"] == [] or (
            len(target.calls) > 1
        )
        errors.append(caught.value)
    assert state(canary) == before
    return errors


# ---- cut short -------------------------------------------------------------------------------

BUILDERS: dict[str, Callable[[], dict[str, bytes]]] = {
    "docker": lambda: images.docker([ONE, TWO]),
    "docker-blobs": lambda: images.docker_with_blobs([ONE, TWO]),
    "oci-gzip": lambda: images.oci([ONE, TWO], "gzip"),
    "oci-zstd": lambda: images.oci([ONE, TWO], "zstd"),
}


@pytest.mark.parametrize("builder", BUILDERS)
def test_archive_cut_anywhere_is_an_error(builder, tmp_path):
    """Every 97th byte, from a file; nothing is sealed that was not verified."""
    data = images.as_tar(BUILDERS[builder]())
    path = tmp_path / "cut.tar"
    for size in range(len(data) - 1, 0, -97):
        path.write_bytes(data[:size])
        target = DirectoryTarget(tmp_path / "target")
        with pytest.raises(ArchiveError) as caught:
            load(path, target)
        assert caught.value.member
        assert target.calls == []


@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
def test_archive_cut_in_a_pipe_is_an_error(compression, tmp_path):
    """Where it cannot be looked at twice."""
    data = images.compress(images.as_tar(images.docker([ONE, TWO])), compression)
    step = max(1, len(data) // 40)
    for size in range(len(data) - 1, 0, -step):
        read, write = os.pipe()
        writer = threading.Thread(target=feed, args=(write, data[:size]))
        writer.start()
        try:
            with pytest.raises(ArchiveError):
                load(read, DirectoryTarget(tmp_path / "target"))
        finally:
            os.close(read)
            writer.join()
    assert list((tmp_path / "target").iterdir()) == []


def feed(fd: int, data: bytes) -> None:
    try:
        with os.fdopen(fd, "wb") as pipe:
            pipe.write(data)
    except BrokenPipeError:
        return


@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
def test_plain_tar_cut_anywhere_is_an_error(compression, tmp_path):
    """Nothing but the end mark says that a tar is whole."""
    data = images.compress(ONE, compression)
    path = tmp_path / "cut"
    for size in range(len(data) - 1, -1, -13):
        path.write_bytes(data[:size])
        target = DirectoryTarget(tmp_path / "target")
        with pytest.raises(ArchiveError):
            load(path, target)
        assert target.unfinished() == []


# ---- digests and sizes -----------------------------------------------------------------------


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_file_with_a_flipped_bit_is_an_error_or_means_the_same(builder, tmp_path):
    """Manifests, configs, layers: what is used is verified."""
    files = BUILDERS[builder]()
    used = 0
    for name in files:
        if name.endswith(("VERSION", "/json")) or name == "repositories":
            continue  # of Docker before 1.10, not read
        for at in {0, len(files[name]) // 2, len(files[name]) - 1}:
            bent = dict(files)
            raw = bytearray(files[name])
            raw[at] ^= 0x01
            bent[name] = bytes(raw)
            archive = tmp_path / "bent.tar"
            archive.write_bytes(images.as_tar(bent))
            target = DirectoryTarget(tmp_path / f"target-{used}")
            try:
                image = load(archive, target)
            except ThinpoolError:
                assert target.unfinished() == []
            else:
                assert [layer.diff_id for layer in image.layers] == [
                    images.digest(ONE), images.digest(TWO),
                ]  # fmt: skip
            used += 1
    assert used > 10


def test_wrong_digest_names_the_blob_and_both_digests(tmp_path):
    """So that one knows what to fetch again."""
    files = images.oci([ONE], "gzip")
    name = next(name for name in files if files[name].startswith(b"\x1f\x8b"))
    other = gzip.compress(ONE, 1, mtime=5)
    assert len(other) == len(files[name])
    files[name] = other
    error = refused(files, tmp_path)[0]
    assert error.member == name
    assert error.wanted == "sha256:" + name.rpartition("/")[2]
    assert error.found == images.digest(other)


def test_wrong_size_is_an_error(tmp_path):
    """Even if the digest is right."""
    layout = images.Layout()
    descriptor = layout.image([ONE])
    name = "blobs/" + descriptor["digest"].replace(":", "/")
    manifest = json.loads(layout.files.pop(name))
    manifest["layers"][0]["size"] += 1
    layout.manifests = [layout.blob(json.dumps(manifest).encode(), images.MANIFEST)]
    assert "bytes" in refused(layout.finish(), tmp_path)[0].message


def test_wrong_diff_id_is_an_error_after_a_right_digest(tmp_path):
    """The config promises another layer than the manifest brings."""
    files = images.oci([ONE], "gzip", rootfs={"type": "layers", "diff_ids": [images.digest(TWO)]})
    error = refused(files, tmp_path)[0]
    assert (error.found, error.wanted) == (images.digest(ONE), images.digest(TWO))


def test_sha512_is_verified_too(tmp_path):
    """The other registered algorithm."""
    layout = images.Layout(algorithm="sha512")
    layout.manifests = [layout.image([ONE], compression="zstd")]
    files = layout.finish()
    archive = tmp_path / "image.tar"
    archive.write_bytes(images.as_tar(files))
    load(archive, DirectoryTarget(tmp_path / "target"))
    for name, data in files.items():
        if data.startswith(b"\x28\xb5"):
            files[name] = images.compress(TWO, "zstd").ljust(len(data), b"\0")[: len(data)]
    refused(files, tmp_path)


# ---- JSON ------------------------------------------------------------------------------------

ABSURD: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{]",
    "not text": b"\xff\xfe\x00",
    "a number": b"5",
    "null": b"null",
    "a string": b'"x"',
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "a long number": b"[" + b"9" * 10_000 + b"]",
    "an empty list": b"[]",
    "an empty object": b"{}",
    "a list of numbers": b"[1,2]",
    "a list of lists": b"[[]]",
    "a list of null": b"[null]",
    "ten MiB": b" " * (10 << 20),
}


@pytest.mark.parametrize("absurd", ABSURD)
@pytest.mark.parametrize("which", ["manifest.json", "index.json", "oci-layout", "config", "image"])
def test_absurd_json_is_a_clear_error(absurd, which, tmp_path):
    """In each of the files that are JSON."""
    if which == "manifest.json":
        files = images.docker([ONE])
        files["manifest.json"] = ABSURD[absurd]
    elif which in {"index.json", "oci-layout"}:
        files = images.oci([ONE])
        files[which] = ABSURD[absurd]
    else:
        layout = images.Layout()
        manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "config": layout.blob(ABSURD[absurd], images.CONFIG),
            "layers": [layout.blob(ONE, images.LAYER)],
        }
        body = json.dumps(manifest).encode() if which == "config" else ABSURD[absurd]
        layout.manifests = [layout.blob(body, images.MANIFEST)]
        files = layout.finish()
    for error in refused(files, tmp_path):
        assert error.kind in {"archive", "not_found"}


FIELDS: list[tuple[str, Any]] = [
    ("layers", None), ("layers", {}), ("layers", "x"), ("layers", [None]), ("layers", [1]),
    ("layers", [{}]), ("layers", []), ("config", None), ("config", []), ("config", {}),
    ("layers", [{"mediaType": images.LAYER, "digest": 5, "size": 1}]),
    ("layers", [{"mediaType": images.LAYER, "digest": "sha256:xyz", "size": 1}]),
    ("layers", [{"mediaType": images.LAYER, "digest": "md5:" + "0" * 32, "size": 1}]),
    ("layers", [{"mediaType": images.LAYER, "digest": "sha256:../../../etc/passwd", "size": 1}]),
    ("layers", [{"mediaType": images.LAYER, "digest": "sha256:" + "0" * 64, "size": 1}]),
    ("layers", [{"mediaType": images.LAYER, "digest": "sha256:" + "0" * 64, "size": -1}]),
    ("layers", [{"mediaType": images.LAYER, "digest": "sha256:" + "0" * 64, "size": "1"}]),
    ("layers", [{"mediaType": images.LAYER, "digest": "sha256:" + "0" * 64, "size": True}]),
    ("layers", [{"mediaType": images.LAYER, "digest": "sha256:" + "0" * 64, "size": 1.5}]),
    ("layers", [{"mediaType": 7, "digest": "sha256:" + "0" * 64, "size": 1}]),
    ("layers", [{"mediaType": images.LAYER, "digest": "sha256:" + "0" * 64, "size": 10**400}]),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(FIELDS)))
def test_manifest_fields_of_wrong_types(case, tmp_path):
    """Each a clear error, never a traceback of ours."""
    layout = images.Layout()
    descriptor = layout.image([ONE])
    name = "blobs/" + descriptor["digest"].replace(":", "/")
    manifest = json.loads(layout.files.pop(name))
    key, value = FIELDS[case]
    manifest[key] = value
    layout.manifests = [layout.blob(json.dumps(manifest).encode(), images.MANIFEST)]
    for error in refused(layout.finish(), tmp_path):
        assert isinstance(error, ArchiveError)


DOCKER_FIELDS: list[tuple[str, Any]] = [
    ("Config", None), ("Config", 5), ("Config", ""), ("Config", "../../etc/passwd"),
    ("Config", "missing.json"), ("Config", "a\0b"), ("Layers", None), ("Layers", "x"),
    ("Layers", [5]), ("Layers", ["../../canary/layer.tar"]), ("Layers", ["missing/layer.tar"]),
    ("Layers", []), ("Layers", ["/"]), ("RepoTags", "x"), ("RepoTags", [5]), ("Layers", [""]),
    ("Config", "/etc/passwd"), ("Config", "\ud800"), ("Layers", ["\udc80/layer.tar"]),
    ("RepoTags", ["\ud800:x"]),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(DOCKER_FIELDS)))
def test_docker_manifest_fields_of_wrong_types(case, tmp_path):
    """Names that lead out of the archive among them."""
    files = images.docker([ONE])
    manifest = json.loads(files["manifest.json"])
    key, value = DOCKER_FIELDS[case]
    manifest[0][key] = value
    files["manifest.json"] = json.dumps(manifest).encode()
    for error in refused(files, tmp_path):
        assert isinstance(error, ArchiveError)


@pytest.mark.parametrize(
    "rootfs",
    [None, [], {}, {"type": "layers"}, {"type": "other", "diff_ids": [images.digest(ONE)]},
     {"type": "layers", "diff_ids": "x"}, {"type": "layers", "diff_ids": [5]},
     {"type": "layers", "diff_ids": ["sha256:0"]}, {"type": "layers", "diff_ids": []},
     {"type": "layers", "diff_ids": [images.digest(ONE)] * 2}],
)  # fmt: skip
def test_config_that_does_not_fit_its_layers(rootfs, tmp_path):
    """As many diffIDs as layers, and each a digest."""
    for files in (images.docker([ONE], rootfs=rootfs), images.oci([ONE], rootfs=rootfs)):
        for error in refused(files, tmp_path):
            assert isinstance(error, ArchiveError)


@pytest.mark.parametrize(
    "media_type",
    ["application/vnd.oci.image.layer.v1.tar+encrypted",
     "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
     "application/vnd.oci.image.layer.v1.tar+bzip2", "application/octet-stream", "",
     "application/vnd.in-toto+json"],
)  # fmt: skip
def test_layers_of_unknown_types(media_type, tmp_path):
    """Encrypted ones among them."""
    layout = images.Layout()
    manifest = {
        "config": layout.blob(json.dumps(images.config_of([ONE])).encode(), images.CONFIG),
        "layers": [layout.blob(ONE, media_type)],
    }
    layout.manifests = [layout.blob(json.dumps(manifest).encode(), images.MANIFEST)]
    assert "supported" in refused(layout.finish(), tmp_path)[0].message


def test_artifact_is_no_image(tmp_path):
    """A config of another type: a chart, a signature."""
    layout = images.Layout()
    manifest = {
        "config": layout.blob(b"{}", "application/vnd.oci.empty.v1+json"),
        "layers": [layout.blob(b"x", "text/plain")],
    }
    layout.manifests = [layout.blob(json.dumps(manifest).encode(), images.MANIFEST)]
    assert "no image" in refused(layout.finish(), tmp_path)[0].message


def test_missing_blob_and_foreign_layer(tmp_path):
    """What is to be fetched from elsewhere is said to be."""
    for urls in ([], ["https://example.com/layer"]):
        layout = images.Layout()
        layer = layout.blob(ONE, "application/vnd.docker.image.rootfs.foreign.diff.tar", urls=urls)
        manifest = {
            "config": layout.blob(json.dumps(images.config_of([ONE])).encode(), images.CONFIG),
            "layers": [layer],
        }
        layout.manifests = [layout.blob(json.dumps(manifest).encode(), images.MANIFEST)]
        files = layout.finish()
        del files["blobs/" + layer["digest"].replace(":", "/")]
        where = tmp_path / str(len(urls))
        where.mkdir()
        message = refused(files, where)[0].message
        assert "missing" in message
        assert ("elsewhere" in message) == bool(urls)


def test_archive_without_its_manifest(tmp_path):
    """And what Docker before 1.10 wrote."""
    files = images.docker([ONE])
    del files["manifest.json"]
    assert "manifest.json" in refused(files, tmp_path)[0].message


@pytest.mark.parametrize(
    "data",
    [b"BZh91AY&SY" + b"x" * 600, b"\xfd7zXZ\0" + b"x" * 600, b"PK\x03\x04" + b"x" * 600,
     b"#!/bin/sh\n" * 100, b"\x7fELF" * 300, b"x", b""],
)  # fmt: skip
def test_what_is_no_archive_is_said_to_be_none(data, tmp_path):
    """By content, whatever the name."""
    path = tmp_path / "image.tar"
    path.write_bytes(data)
    with pytest.raises(ArchiveError):
        load(path, DirectoryTarget(tmp_path / "target"))


def test_what_does_not_exist_is_not_found(tmp_path):
    """With the path."""
    with pytest.raises(NotFoundError):
        open_source(tmp_path / "nothing")


# ---- links in the archive ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "to", ["/etc/hostname", "../../canary/layer.tar", "../../../x", "layer.tar", "nowhere", ".."]
)
def test_layer_that_is_a_link_out_of_the_archive(to, tmp_path):
    """Absolute, climbing, to itself, to nothing."""
    files = images.docker([ONE])
    name = next(name for name in files if name.endswith("layer.tar"))
    del files[name]
    for error in refused(files, tmp_path, {name: to}):
        assert isinstance(error, ArchiveError)


def test_layer_that_links_to_another_is_that_one(tmp_path):
    """Old docker save did so with layers that are equal."""
    files = images.docker([ONE, TWO, ONE])
    first, last = (
        name for name in json.loads(files["manifest.json"])[0]["Layers"] if files[name] == ONE
    )
    del files[last]
    archive = tmp_path / "image.tar"
    archive.write_bytes(images.as_tar(files, {last: f"../{first}"}))
    image = load(archive, DirectoryTarget(tmp_path / "target"))
    assert [layer.diff_id for layer in image.layers] == [
        images.digest(layer) for layer in (ONE, TWO, ONE)
    ]


def test_fifo_in_a_directory_is_not_waited_for(tmp_path):
    """Where a blob should be."""
    files = images.oci([ONE])
    directory = images.as_directory(files, tmp_path / "layout")
    blob = next((directory / "blobs/sha256").glob(images.digest(ONE)[7:]))
    blob.unlink()
    os.mkfifo(blob)
    with pytest.raises(ArchiveError):
        load(directory, DirectoryTarget(tmp_path / "target"))


def test_duplicate_entries_of_the_archive_the_last_counts(tmp_path):
    """As any tar reader has it: the digest decides in the end."""
    files = images.docker([ONE])
    name = next(name for name in files if name.endswith("layer.tar"))
    data = images.as_tar(files)[:-1024] + Tar().file(name.encode(), TWO).end()
    archive = tmp_path / "image.tar"
    archive.write_bytes(data)
    with pytest.raises(ArchiveError):
        load(archive, DirectoryTarget(tmp_path / "target"))


# ---- choosing --------------------------------------------------------------------------------


def multi(tmp_path: Path) -> Path:
    """An index of one name for two platforms, and another image, as a layout."""
    layout = images.Layout()
    arm = layout.image([TWO], architecture="arm64", variant="v8")
    amd = layout.image([ONE])
    platforms = ({"os": "linux", "architecture": "arm64", "variant": "v8"},
                 {"os": "linux", "architecture": "amd64"})  # fmt: skip
    attestation = {**layout.image([]), "annotations": {"vnd.docker.reference.type": "x"},
                   "platform": {"os": "unknown", "architecture": "unknown"}}  # fmt: skip
    index = layout.index(
        [{**one, "platform": where} for one, where in zip((arm, amd), platforms, strict=True)]
        + [attestation]
    )
    outer = layout.index([index])
    other = layout.image([ONE, TWO])
    layout.manifests = [
        {**outer, "annotations": {images.REF: "v1"}},
        {**other, "annotations": {"io.containerd.image.name": "docker.io/library/other:v2"}},
    ]
    path = tmp_path / "multi.tar"
    path.write_bytes(images.as_tar(layout.finish()))
    return path


@pytest.mark.parametrize(
    ("ref", "platform", "wanted"),
    [
        ("v1", "linux/amd64", [ONE]), ("v1", "linux/arm64", [TWO]),
        ("v1", "linux/arm64/v8", [TWO]), ("v1", "linux/aarch64", [TWO]),
        ("v2", None, [ONE, TWO]), ("other:v2", None, [ONE, TWO]),
        ("docker.io/library/other:v2", None, [ONE, TWO]), (None, "linux/arm64", [TWO]),
    ],
)  # fmt: skip
def test_image_is_chosen_by_name_and_platform(ref, platform, wanted, tmp_path):
    """Through nested indexes, attestations left aside."""
    image = load(multi(tmp_path), DirectoryTarget(tmp_path / "t"), ref=ref, platform=platform)
    assert [layer.diff_id for layer in image.layers] == [images.digest(one) for one in wanted]


def test_host_platform_decides_where_nothing_is_asked(tmp_path, monkeypatch):
    """Of one name for several platforms."""
    for machine, wanted in (("x86_64", ONE), ("aarch64", TWO)):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        image = load(multi(tmp_path), DirectoryTarget(tmp_path / machine), ref="v1")
        assert image.layers[0].diff_id == images.digest(wanted)


def test_several_images_without_a_choice_are_listed(tmp_path):
    """A usage error that names them."""
    with pytest.raises(UsageError) as caught:
        load(multi(tmp_path), DirectoryTarget(tmp_path / "t"), platform="linux/amd64")
    assert "v1" in caught.value.message
    assert "other:v2" in caught.value.message


@pytest.mark.parametrize(
    ("ref", "platform", "error"),
    [("v9", None, NotFoundError), ("v1", "linux/s390x", NotFoundError),
     ("v1", "windows/amd64", NotFoundError), ("v1", "linux/arm64/v9", NotFoundError),
     ("v1", "nonsense", UsageError), ("v1", "a/b/c/d", UsageError), ("v1", "", UsageError)],
)  # fmt: skip
def test_choice_that_is_not_there(ref, platform, error, tmp_path):
    """Not found, with what there is; no platform at all is wrong usage."""
    with pytest.raises(error):
        load(multi(tmp_path), DirectoryTarget(tmp_path / "t"), ref=ref, platform=platform)


def test_docker_archive_of_several_images(tmp_path):
    """By RepoTags; one of them without a choice is a question."""
    files = images.docker([ONE], tags=("one:latest", "example.com/x/one:v3"))
    second = images.docker([TWO], tags=("two:v2",), author="second")
    manifest = json.loads(files["manifest.json"]) + json.loads(second["manifest.json"])
    files = {**second, **files, "manifest.json": json.dumps(manifest).encode()}
    path = tmp_path / "two.tar"
    path.write_bytes(images.as_tar(files))
    refs = {
        "one": ONE, "one:latest": ONE, "v3": ONE, "example.com/x/one:v3": ONE, "two:v2": TWO,
        "docker.io/library/two:v2": TWO,
    }  # fmt: skip
    for ref, wanted in refs.items():
        target = DirectoryTarget(tmp_path / hashlib.sha256(ref.encode()).hexdigest())
        assert load(path, target, ref=ref).chain_id == images.digest(wanted)
    with pytest.raises(UsageError):
        load(path, DirectoryTarget(tmp_path / "t"))
    with pytest.raises(NotFoundError):
        load(path, DirectoryTarget(tmp_path / "t"), ref="two")


def test_choice_where_there_is_none(tmp_path):
    """--ref of a plain tar or a directory."""
    path = tmp_path / "plain.tar"
    path.write_bytes(ONE)
    for source in (path, tmp_path):
        for options in ({"ref": "x"}, {"platform": "linux/amd64"}):
            with pytest.raises(UsageError):
                open_source(source, **options)


def test_platforms_match_as_containerd_has_it():
    """No variant asked for is any; arm64 is v8."""
    arm = Platform.parse("linux/arm64")
    assert Platform.parse("linux/arm64/v8").matches(arm)
    assert arm.matches(Platform.parse("Linux/AArch64/v8"))
    assert not Platform.parse("linux/arm/v6").matches(Platform.parse("linux/arm/v7"))
    assert str(Platform.parse("linux/arm/v7")) == "linux/arm/v7"


# ---- what is an image archive ------------------------------------------------------------------


def test_root_filesystem_with_a_manifest_json_is_a_root_filesystem(tmp_path):
    """A web application's, not an image's."""
    rootfs = Tar().file(b"manifest.json", b'{"name": "app"}').dir(b"bin").file(b"index.json", b"{}")
    path = tmp_path / "rootfs.tar"
    path.write_bytes(rootfs.end())
    target = DirectoryTarget(tmp_path / "target")
    image = load(path, target)
    assert (target.place(image.chain_id) / "manifest.json").exists()


def test_layer_may_lack_its_end_mark_where_a_digest_vouches(tmp_path):
    """Some builders leave it out."""
    short = ONE[:-1024]
    path = tmp_path / "image.tar"
    path.write_bytes(images.as_tar(images.oci([short], "gzip")))
    image = load(path, DirectoryTarget(tmp_path / "target"))
    assert image.chain_id == images.digest(short)


def test_pipe_that_holds_an_image_is_kept_where_asked(tmp_path):
    """And a full place for it is said to be."""
    require("root")
    mount = tmp_path / "spool"
    mount.mkdir()
    data = images.as_tar(images.docker([Tar().file(b"big", os.urandom(3 << 20)).end()]))
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=1m", "none", mount], check=True)
    try:
        read, write = os.pipe()
        writer = threading.Thread(target=feed, args=(write, data))
        writer.start()
        try:
            with pytest.raises(HostSpaceError) as caught:
                open_source(read, spool_directory=mount)
            assert caught.value.path == str(mount)
        finally:
            os.close(read)
            writer.join()
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["/bin/umount", mount], check=True)


def test_closing_leaves_no_descriptor(tmp_path):
    """Also after errors."""
    descriptors = os.listdir("/proc/self/fd")  # noqa: PTH208 - a count
    before = len(descriptors)
    for files in (images.docker([ONE]), images.oci([TWO], "gzip")):
        source = images.as_directory(
            files, tmp_path / hashlib.sha256(repr(files).encode()).hexdigest()
        )
        load(source, DirectoryTarget(tmp_path / "target"))
        (source / "manifest.json").unlink(missing_ok=True)
        (source / "index.json").unlink(missing_ok=True)
        with pytest.raises(ArchiveError):
            load(source, DirectoryTarget(tmp_path / "target"))
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - a count
