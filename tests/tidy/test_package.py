"""What a source archive holds, and what the scripts say where they cannot go on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NOBODY = 65534


def tracked_files() -> set[str]:
    """Files that git knows; skips outside a checkout."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={REPOSITORY}", "ls-files", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(filter(None, listed.stdout.split("\0")))


def test_source_archive_holds_every_tracked_file(tmp_path: Path) -> None:
    pytest.importorskip("mesonpy", reason="meson-python is not installed here")
    wanted = tracked_files()
    result = subprocess.run(
        [sys.executable, "-c", "import mesonpy, sys; mesonpy.build_sdist(sys.argv[1])", tmp_path],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    committed = {name for name in wanted if (REPOSITORY / name).exists()}
    assert not committed - held


@pytest.mark.parametrize("script", sorted(REPOSITORY.glob("tools/*.sh")), ids=lambda p: p.name)
def test_script_is_posix_shell(script: Path) -> None:
    result = subprocess.run(["sh", "-n", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.root
def test_demo_says_what_is_missing_without_root() -> None:
    readable = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", "test", "-r", "tools/demo.sh"]
    if subprocess.run(readable, cwd=REPOSITORY, check=False).returncode:
        pytest.skip(f"nobody may not read {REPOSITORY}")
    result = subprocess.run(
        ["setpriv", f"--reuid={NOBODY}", "--clear-groups", "sh", "tools/demo.sh"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 8
    assert "you are not root" in result.stderr
    for promise in ("installs", "writes", "needs", "takes", "never the default root"):
        assert promise in result.stdout
