"""Defaults from the file: what they change, what wins over them, and what is refused."""

from __future__ import annotations

import pytest


@pytest.fixture
def toml(tmp_path, monkeypatch):
    path = tmp_path / "thinpool.toml"
    monkeypatch.setenv("THINPOOL_CONFIG", str(path))
    return path


def test_root_and_timeout(thinpool, toml, monkeypatch):
    toml.write_text('root = "/srv/pools"\ntimeout = 60\n')
    thinpool("list")
    assert thinpool.options == {"root": "/srv/pools", "timeout": 60.0}
    thinpool("list", "--root", "/r", "--timeout", "1")
    assert thinpool.options == {"root": "/r", "timeout": 1.0}
    monkeypatch.setenv("THINPOOL_ROOT", "/from-environment")
    thinpool("list")
    assert thinpool.options == {"root": None, "timeout": 60.0}


def test_a_command_takes_its_defaults_and_the_command_line_wins(thinpool, toml):
    toml.write_text(
        '[create-pool]\nsize = "1T"\nblock-size = "128K"\nbase-size = 1073741824\n'
        'base-fs = "xfs"\nno-zero = true\nmkfs-option = ["-i", "maxpct=5"]\nmin-free = "5%"\n'
        "[snapshot]\nactivate = true\n"
    )
    thinpool("create-pool", "p", "--base-fs", "ext4")
    asked = thinpool.api.create_pool.call_args.kwargs
    assert asked["size"] == 1 << 40
    assert asked["block_size"] == 131072
    assert asked["base_size"] == 1 << 30
    assert asked["base_fs"] == "ext4"
    assert asked["zero"] is False
    assert asked["mkfs_options"] == ("-i", "maxpct=5")
    assert asked["min_free"] == 5.0
    thinpool("snapshot", "p/a", "p/b")
    assert thinpool.api.snapshot.call_args.kwargs["activate"] is True
    thinpool("create", "p/v", "--size", "1G")
    assert thinpool.api.create.call_args.kwargs["size"] == 1 << 30


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rot = '/r'", "'rot' is neither root, timeout nor a command"),
        ("root = 7", "'root' has to be a path"),
        ("root = ''", "'root' has to be a path"),
        ("timeout = '30'", "'timeout' has to be a number"),
        ("timeout = true", "'timeout' has to be a number"),
        ("timeout = -1", "'timeout' has to be a number"),
        ("list = 1", "'list' has to be a table"),
        ("[creat-pool]\nsize = '1G'", "'creat-pool' is neither"),
        ("[create]\nsiz = '1G'", "'[create] siz' is not an option of create"),
        ("[create]\njson = true", "'[create] json' is not an option of create"),
        ("[create]\nsize = '1X'", "--size '1X' has the unknown unit"),
        ("[create]\nsize = [1]", "'[create] size' has to be a text or a number"),
        ("[create]\nsize = true", "'[create] size' has to be a text or a number"),
        ("[snapshot]\nactivate = 'yes'", "has to be true or false"),
        ("root = ", "Invalid value"),
        ("a\x00b", ""),
    ],
)
def test_what_it_gets_wrong_is_said_and_nothing_is_done(thinpool, toml, text, says):
    toml.write_text(text)
    if "snapshot" in text:
        result = thinpool("snapshot", "p/v", "p/w")
    else:
        result = thinpool("create", "p/v", *([] if "1X" in text else ["--size", "1G"]))
    assert result.code == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert thinpool.connected == 0


def test_one_text_is_enough_for_an_option_that_may_be_given_again(thinpool, toml):
    toml.write_text("[mount]\no = 'noatime'\n[create]\nmkfs-option = '-i'\nsize = 1024\n")
    assert thinpool("mount", "p/v", "/mnt").code == 2
    toml.write_text("[create]\nmkfs-option = '-i'\nsize = 1024\n")
    thinpool("create", "p/v")
    assert thinpool.api.create.call_args.kwargs["mkfs_options"] == ("-i",)
    assert thinpool.api.create.call_args.kwargs["size"] == 1024


def test_a_file_that_is_no_text_is_wrong_usage(thinpool, toml):
    toml.write_bytes(b"root = '\xff'")
    assert thinpool("list").code == 2


def test_help_works_whatever_it_says(thinpool, toml):
    toml.write_text("rot = 1")
    assert thinpool("--help").code == 0
