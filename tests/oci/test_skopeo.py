"""An independent reader and writer of image archives: what skopeo makes is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from tests.oci import images
from tests.oci.tarbuild import Tar
from tests.oci.targets import DirectoryTarget
from thinpool.oci.archive import open_source
from thinpool.oci.importer import import_image

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = [
    Tar().dir(b"etc/").file(b"etc/one", b"1" * 3000).file(b"etc/two", b"2").end(),
    Tar().file(b"etc/.wh.two").file(b"etc/three", b"3" * 100_000).end(),
    Tar().file(b"etc/four", b"4").end(),
]


def skopeo(*arguments: str) -> str:
    """Run it without a policy of the host."""
    require("skopeo")
    command = [shutil.which("skopeo"), "--insecure-policy", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


DOCKER = "docker-archive:{}/x.tar:example:v1"  # to which it converts no zstd layers


@pytest.mark.parametrize(
    ("form", "compression"),
    [
        (DOCKER, "plain"), (DOCKER, "gzip"),
        *((form, how) for form in ("oci-archive:{}/x.tar:v1", "oci:{}/x:v1")
          for how in ("plain", "gzip", "zstd")),
    ],
)  # fmt: skip
def test_what_skopeo_writes_is_imported(form, compression, tmp_path):
    """From a layout that we make, which is thereby read by it too."""
    layout = images.as_directory(images.oci(LAYERS, compression), tmp_path / "layout")
    skopeo("copy", f"oci:{layout}:latest", form.format(tmp_path))
    made = tmp_path / ("x" if form.startswith("oci:") else "x.tar")
    target = DirectoryTarget(tmp_path / "target")
    with open_source(made, ref="v1") as source:
        image = import_image(source, target)
    assert [layer.diff_id for layer in image.layers] == [images.digest(one) for one in LAYERS]
    etc = target.place(image.chain_id) / "etc"
    assert sorted(path.name for path in etc.iterdir()) == ["four", "one", "three"]
    assert image.config["config"]["Cmd"] == ["/bin/sh"]


@pytest.mark.parametrize("builder", [images.docker, images.docker_with_blobs])
def test_skopeo_reads_our_docker_archives(builder, tmp_path):
    """So that the fixtures of the other tests are what they say."""
    archive: Path = tmp_path / "x.tar"
    archive.write_bytes(images.as_tar(builder(LAYERS)))
    skopeo("copy", f"docker-archive:{archive}", f"dir:{tmp_path}/dir")
    manifest = json.loads((tmp_path / "dir/manifest.json").read_text())
    assert len(manifest["layers"]) == len(LAYERS)
