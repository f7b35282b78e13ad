"""The tab key: commands, options, pools and volumes, without a server, in three shells."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path):
    for pool, names in {"p": ["base", "debian", "c1"], "prod": ["base"], "q": []}.items():
        directory = tmp_path / "pools" / pool
        directory.mkdir(parents=True)
        volumes = [{"name": name} for name in names]
        (directory / "metadata.names.json").write_text(json.dumps({"volumes": volumes}))
    (tmp_path / "pools" / ".hidden").mkdir()
    (tmp_path / "pools" / "a file").touch()
    return tmp_path


def complete(root: Path, words: str, shell: str = "bash") -> list[str]:
    """What a shell would propose for the last word of a line."""
    typed = words.split(" ")
    environment = os.environ | {
        "_THINPOOL_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": typed[-1] if shell == "fish" else str(len(typed) - 1),
        "THINPOOL_ROOT": str(root),
    }
    result = subprocess.run(
        [sys.executable, "-m", "thinpool"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert result.stderr == ""
    lines = result.stdout.split("\n")[:-1]
    if shell == "bash":
        return [line.split(",", 1)[1] for line in lines]
    if shell == "zsh":
        return lines[1::3]
    return [line.split(",", 1)[1].split("\t")[0] for line in lines if line]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("words", "proposed"),
    [
        ("thinpool crea", ["create-pool", "create"]),
        ("thinpool create-pool p --siz", ["--size"]),
        ("thinpool create-pool p --when-full ", ["queue", "error"]),
        ("thinpool status p", ["p", "prod"]),
        ("thinpool status --root /nowhere p", []),
        ("thinpool activate p/", ["p/base", "p/c1", "p/debian"]),
        ("thinpool activate p/d", ["p/debian"]),
        ("thinpool activate pro", ["prod/base"]),
        ("thinpool activate q/", []),
        ("thinpool remove p/base p/c", ["p/c1"]),
        ("thinpool --root /nowhere --js", ["--json"]),
        ("thinpool list --tr", ["--tree"]),
        ("thinpool completion ", ["bash", "fish", "zsh"]),
    ],
)
def test_it_proposes(root, shell, words, proposed):
    assert sorted(complete(root, words, shell)) == sorted(proposed)


def test_it_proposes_the_settings(root):
    assert "when-full=" in complete(root, "thinpool set p ")


def test_damaged_or_strange_names_beside_a_pool_are_passed_over(root):
    (root / "pools" / "p" / "metadata.names.json").write_text("{")
    (root / "pools" / "q" / "metadata.names.json").write_text('{"volumes": [{"name": "$(x)"}, {}]}')
    assert complete(root, "thinpool activate ") == ["prod/base"]


def test_changes_since_the_copy_are_proposed_too(root):
    copy = root / "pools" / "q" / "metadata.names.json"
    volumes = [{"id": number, "name": name} for number, name in enumerate(["one", "two"])]
    copy.write_text(json.dumps({"copy": "t", "volumes": volumes}))
    changes = copy.with_name(copy.name + ".changes")
    lines = [{"copy": "t"}, {"put": [{"id": 2, "name": "three"}], "drop": [0]}]
    changes.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"put": [{"na')
    assert sorted(complete(root, "thinpool activate q/")) == ["q/three", "q/two"]
    changes.write_text(changes.read_text().replace('"t"', '"u"'))
    assert sorted(complete(root, "thinpool activate q/")) == ["q/one", "q/two"]


def test_names_stand_beside_metadata_that_is_elsewhere(root, tmp_path):
    (root / "pools" / "q" / "metadata.names.json").unlink()
    (root / "pools" / "q" / "pool.json").write_text(json.dumps({"metadata": str(root / "m")}))
    (root / "m.names.json").write_text(json.dumps({"volumes": [{"name": "far"}]}))
    assert complete(root, "thinpool activate q/") == ["q/far"]


def test_a_broken_file_of_defaults_breaks_no_completion(root, tmp_path, monkeypatch):
    (tmp_path / "thinpool.toml").write_text("rot = ")
    monkeypatch.setenv("THINPOOL_CONFIG", str(tmp_path / "thinpool.toml"))
    assert complete(root, "thinpool status q") == ["q"]
    assert complete(root, "thinpool lis") == ["list"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(thinpool, shell):
    result = thinpool("completion", shell)
    assert result.code == 0
    assert f"_THINPOOL_COMPLETE={shell}_complete" in result.stdout
    program = shutil.which(shell)
    if program:
        check = subprocess.run(
            [program, "-n"], input=result.stdout, text=True, capture_output=True, check=False
        )
        assert check.returncode == 0, check.stderr


def test_bash_completes_with_the_script(root, tmp_path):
    program = tmp_path / "bin" / "thinpool"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m thinpool "$@"\n')
    program.chmod(0o755)
    script = """
        eval "$(thinpool completion bash)"
        COMP_WORDS=(thinpool activate p/d) COMP_CWORD=2
        _thinpool_completion thinpool
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    result = subprocess.run(
        ["/bin/bash", "--norc", "-c", script],
        env=os.environ
        | {"THINPOOL_ROOT": str(root), "PATH": f"{program.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (result.stdout, result.stderr) == ("p/debian\n", "")
