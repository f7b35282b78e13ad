"""Metadata images for the checker's tests."""

from __future__ import annotations

import lzma
import subprocess
from pathlib import Path

import pytest

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
IMAGES = sorted(
    path.relative_to(FIXTURES).as_posix()
    for path in FIXTURES.rglob("*.xz")
    if path.name.endswith((".bin.xz", ".meta.xz"))
)


@pytest.fixture
def unpack(tmp_path: Path):
    """Unpack a fixture's metadata and give its path."""

    def unpack_one(name: str) -> Path:
        path = tmp_path / Path(name).name.removesuffix(".xz")
        path.write_bytes(lzma.decompress((FIXTURES / name).read_bytes()))
        return path

    return unpack_one


def judge(program: str, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    """Run one of thin-provisioning-tools' programs."""
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
