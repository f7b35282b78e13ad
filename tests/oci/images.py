"""Builders of image archives: docker save, old and new, and OCI layouts, right or wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from tests.oci.tarbuild import Tar

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
REF = "org.opencontainers.image.ref.name"


def digest(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def compress(data: bytes, how: str) -> bytes:
    if how == "gzip":
        return gzip.compress(data, 1, mtime=0)
    if how == "zstd":
        return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data)
    return data


def config_of(layers: list[bytes], **fields: Any) -> dict[str, Any]:
    return {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"], "Labels": {"made": "here"}},
        "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
        **fields,
    }


@dataclass
class Layout:
    """An OCI layout as a dict of files."""

    files: dict[str, bytes] = field(default_factory=dict)
    manifests: list[dict[str, Any]] = field(default_factory=list)
    algorithm: str = "sha256"

    def blob(self, data: bytes, media_type: str, **fields: Any) -> dict[str, Any]:
        name = digest(data, self.algorithm)
        self.files["blobs/" + name.replace(":", "/")] = data
        return {"mediaType": media_type, "digest": name, "size": len(data), **fields}

    def image(
        self, layers: list[bytes], *, compression: str = "plain", **config: Any
    ) -> dict[str, Any]:
        """Add an image; returns its manifest's descriptor."""
        suffix = "" if compression == "plain" else f"+{compression}"
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.blob(json.dumps(config_of(layers, **config)).encode(), CONFIG),
            "layers": [self.blob(compress(one, compression), LAYER + suffix) for one in layers],
        }
        return self.blob(json.dumps(manifest).encode(), MANIFEST)

    def index(self, manifests: list[dict[str, Any]]) -> dict[str, Any]:
        body = {"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}
        return self.blob(json.dumps(body).encode(), INDEX)

    def finish(self) -> dict[str, bytes]:
        self.files.setdefault("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        body = {"schemaVersion": 2, "mediaType": INDEX, "manifests": self.manifests}
        self.files.setdefault("index.json", json.dumps(body).encode())
        return self.files


def oci(layers: list[bytes], compression: str = "plain", **config: Any) -> dict[str, bytes]:
    """The files of a layout of one image."""
    layout = Layout()
    descriptor = layout.image(layers, compression=compression, **config)
    layout.manifests.append({**descriptor, "annotations": {REF: "latest"}})
    return layout.finish()


def docker(
    layers: list[bytes],
    *,
    tags: tuple[str, ...] = ("example:latest",),
    compression: str = "plain",
    **config: Any,
) -> dict[str, bytes]:
    """The files of what docker save before version 25 writes."""
    body = json.dumps(config_of(layers, **config)).encode()
    config_name = digest(body)[7:] + ".json"
    files = {}
    names = []
    for at, layer in enumerate(layers):
        folder = hashlib.sha256(b"%d" % at + layer).hexdigest()
        files[f"{folder}/VERSION"] = b"1.0"
        files[f"{folder}/json"] = b"{}"
        files[f"{folder}/layer.tar"] = compress(layer, compression)
        names.append(f"{folder}/layer.tar")
    files[config_name] = body
    manifest = [{"Config": config_name, "RepoTags": list(tags), "Layers": names}]
    files["manifest.json"] = json.dumps(manifest).encode()
    files["repositories"] = b"{}"
    return files


def docker_with_blobs(layers: list[bytes], tag: str = "example:latest") -> dict[str, bytes]:
    """What docker save writes since version 25: an OCI layout that manifest.json describes too."""
    layout = Layout()
    descriptor = layout.image(layers)
    layout.manifests.append(
        {**descriptor, "annotations": {"io.containerd.image.name": "docker.io/library/" + tag,
                                       REF: tag.partition(":")[2]}}
    )  # fmt: skip
    files = layout.finish()
    config = json.loads(files["blobs/" + descriptor["digest"].replace(":", "/")])["config"]
    files["manifest.json"] = json.dumps(
        [
            {
                "Config": "blobs/" + config["digest"].replace(":", "/"),
                "RepoTags": [tag],
                "Layers": ["blobs/" + digest(layer).replace(":", "/") for layer in layers],
            }
        ]
    ).encode()
    return files


def as_tar(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    """The archive of these files, with directories, in order of their names."""
    tar = Tar()
    made: set[str] = set()
    for name in sorted([*files, *(links or {})]):
        for parent in reversed(Path(name).parents):
            if str(parent) != "." and str(parent) not in made:
                made.add(str(parent))
                tar.dir(str(parent).encode() + b"/")
        if links and name in links:
            tar.symlink(name.encode(), links[name].encode())
        else:
            tar.file(name.encode(), files[name])
    return tar.end()


def as_directory(files: dict[str, bytes], root: Path) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root
