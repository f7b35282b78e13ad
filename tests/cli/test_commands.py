"""Every command: what it asks of the API, its answer in text and in JSON, and what it refuses."""

from __future__ import annotations

import re
import sys
from importlib import util
from pathlib import Path
from unittest.mock import ANY, call

import pytest

from thinpool.cli.app import COMMANDS
from thinpool.errors import AlreadyExistsError, UnsupportedHostError

_spec = util.spec_from_file_location("cli_shapes", Path(__file__).with_name("shapes.py"))
shapes = util.module_from_spec(_spec)
_spec.loader.exec_module(shapes)

GIB = 1 << 30
POOL_DEFAULTS = {
    "size": None,
    "metadata_size": None,
    "data": None,
    "metadata": None,
    "block_size": 65536,
    "engine": "auto",
    "base_size": 10 * GIB,
    "base_fs": "ext4",
    "mkfs_options": (),
    "zero": True,
    "when_full": "queue",
    "min_free": 10.0,
    "force": False,
    "progress": None,
}
IMPORT_DEFAULTS = {
    "parent": None,
    "size": None,
    "ref": None,
    "platform": None,
    "progress": None,
    "note": ANY,
}
SNAPSHOT_DEFAULTS = {"read_only": False, "size": None, "activate": False, "mount": None}
ACTIVATE_DEFAULTS = {"read_only": False, "persist": False, "owner": None, "mode": None}

CALLS = [
    ("create-pool p --size 100G", call.create_pool("p", **POOL_DEFAULTS | {"size": 100 * GIB})),
    (
        (
            "create-pool p --data /dev/a --metadata /dev/b --metadata-size 1G --block-size 128K "
            "--engine user --base-size 1.5G --base-fs xfs --mkfs-option=-i "
            "--mkfs-option=maxpct=5 --no-zero --when-full error --min-free 5% --force"
        ),
        call.create_pool(
            "p",
            size=None,
            metadata_size=GIB,
            data=Path("/dev/a"),
            metadata=Path("/dev/b"),
            block_size=131072,
            engine="user",
            base_size=3 * GIB // 2,
            base_fs="xfs",
            mkfs_options=("-i", "maxpct=5"),
            zero=False,
            when_full="error",
            min_free=5.0,
            force=True,
            progress=None,
        ),
    ),
    (
        "attach-pool p --data d --metadata m",
        call.attach_pool("p", data=Path("d"), metadata=Path("m"), engine="auto", read_only=False),
    ),
    (
        "attach-pool p --data d --metadata m --engine user --read-only",
        call.attach_pool("p", data=Path("d"), metadata=Path("m"), engine="user", read_only=True),
    ),
    ("detach-pool p", call.detach_pool("p")),
    ("pools", call.pools()),
    ("status p", call.status("p")),
    (
        "set p when-full=error low-water=1G",
        call.set("p", {"when-full": "error", "low-water": "1G"}),
    ),
    ("extend-pool p", call.extend_pool("p", data_size=None, metadata_size=None)),
    (
        "extend-pool p --data-size 200G --metadata-size 2G",
        call.extend_pool("p", data_size=200 * GIB, metadata_size=2 * GIB),
    ),
    ("remove-pool p --yes", call.remove_pool("p")),
    (
        "create p/v --size 1G",
        call.create("p/v", size=GIB, fs=None, mkfs_options=(), external_origin=None),
    ),
    (
        "create p/v --size 1G --fs xfs --mkfs-option a",
        call.create("p/v", size=GIB, fs="xfs", mkfs_options=("a",), external_origin=None),
    ),
    (
        "create p/v --external-origin /dev/x",
        call.create("p/v", size=None, fs=None, mkfs_options=(), external_origin=Path("/dev/x")),
    ),
    (
        "import p/i /some/a.tar",
        call.import_image("p/i", Path("/some/a.tar"), **IMPORT_DEFAULTS),
    ),
    ("import p/i -", call.import_image("p/i", "-", **IMPORT_DEFAULTS)),
    (
        "import p/i dir --parent p/base --size 20G --ref v2 --platform linux/arm64",
        call.import_image(
            "p/i",
            Path("dir"),
            parent="p/base",
            size=20 * GIB,
            ref="v2",
            platform="linux/arm64",
            progress=None,
            note=ANY,
        ),
    ),
    ("snapshot p/a p/b", call.snapshot("p/a", "p/b", **SNAPSHOT_DEFAULTS)),
    (
        "snapshot p/a p/b --read-only --size 20G --activate --mount /mnt",
        call.snapshot(
            "p/a", "p/b", read_only=True, size=20 * GIB, activate=True, mount=Path("/mnt")
        ),
    ),
    ("commit p/c p/i", call.commit("p/c", "p/i")),
    ("activate p/v", call.activate("p/v", **ACTIVATE_DEFAULTS)),
    (
        "activate p/v --read-only --persist --owner 1000:100 --mode 0660",
        call.activate("p/v", read_only=True, persist=True, owner=(1000, 100), mode=0o660),
    ),
    ("deactivate p/v", call.deactivate("p/v", deferred=False)),
    ("deactivate p/v --deferred", call.deactivate("p/v", deferred=True)),
    ("resume", call.resume(None)),
    ("resume p", call.resume("p")),
    ("mount p/v /mnt", call.mount("p/v", Path("/mnt"), read_only=False, options=())),
    (
        "mount p/v /mnt --read-only -o noatime,dev -o discard",
        call.mount("p/v", Path("/mnt"), read_only=True, options=("noatime", "dev", "discard")),
    ),
    ("umount p/v", call.umount("p/v")),
    ("list", call.list(None, exclusive=False)),
    ("list p --tree --exclusive", call.list("p", exclusive=True)),
    ("remove p/v", call.remove(["p/v"], deactivate=False, deferred=False, dry_run=False)),
    ("remove p/v --deferred", call.remove(["p/v"], deactivate=False, deferred=True, dry_run=False)),
    (
        "remove p/v p/w --deactivate --dry-run",
        call.remove(["p/v", "p/w"], deactivate=True, deferred=False, dry_run=True),
    ),
    ("rename p/v w", call.rename("p/v", "w")),
    ("rename p/v p/w", call.rename("p/v", "p/w")),
    ("resize p/v 20G", call.resize("p/v", 20 * GIB, device_only=False)),
    ("resize p/v 20G --device-only", call.resize("p/v", 20 * GIB, device_only=True)),
    ("trim p/v", call.trim("p/v")),
    ("diff p/a p/b", call.diff("p/a", "p/b", progress=None)),
    ("delta p/a p/b", call.delta("p/a", "p/b")),
    ("export p/v -o f", call.export("p/v", Path("f"), raw=False, progress=None)),
    ("export p/v -o f --raw", call.export("p/v", Path("f"), raw=True, progress=None)),
    ("check p", call.check("p", metadata=None, progress=None)),
    ("check --metadata m", call.check(None, metadata=Path("m"), progress=None)),
    ("dump p", call.dump("p", ANY, metadata=None)),
    ("dump --metadata m", call.dump(None, ANY, metadata=Path("m"))),
    ("doctor", call.doctor(None)),
    ("doctor p", call.doctor("p")),
    (
        "install --units /u --rules /r",
        call.install_units(units=Path("/u"), rules=Path("/r")),
    ),
]
STREAMS = {"dump", "completion"}
LATER = {"restore", "repair"}
SERVERS = {"serve"}
BENCHES = {"bench"}  # tests/bench runs it


def test_every_command_is_tested():
    assert {line.split()[0] for line, _ in CALLS} | (
        LATER | SERVERS | BENCHES | {"completion"}
    ) == set(COMMANDS)
    assert set(shapes.SHAPES) | STREAMS | LATER | SERVERS | BENCHES == set(COMMANDS)


@pytest.mark.parametrize(("line", "expected"), CALLS, ids=[line for line, _ in CALLS])
def test_command_asks_the_api_once_and_confirms(thinpool, line, expected):
    result = thinpool(*line.split())
    assert thinpool.api.mock_calls == [expected]
    assert result.code == 0
    assert result.stderr == ""
    if line.split()[0] not in STREAMS:
        assert result.stdout.endswith("\n")
        assert not result.stdout.startswith("{")


@pytest.mark.parametrize(
    ("line", "expected"),
    [each for each in CALLS if each[0].split()[0] not in STREAMS],
    ids=[line for line, _ in CALLS if line.split()[0] not in STREAMS],
)
@pytest.mark.parametrize("before", [True, False])
def test_json_answer_has_its_shape(thinpool, line, expected, before):
    words = line.split()
    result = thinpool(*(["--json", *words] if before else [*words, "--json"]))
    assert result.code == 0
    assert result.stderr == ""
    assert shapes.problems(result.document, shapes.SHAPES[words[0]]) == []
    assert thinpool.api.mock_calls == [expected]


def test_several_snapshots_are_asked_for_at_once(thinpool, tmp_path):
    result = thinpool("snapshot", "p/a", "p/c", "p/d", "--activate", "--json")
    assert thinpool.api.mock_calls == [call.snapshot_many("p/a", ("p/c", "p/d"), activate=True)]
    wanted = {"schema": {1}, "volumes": [shapes.VOLUME]}
    assert shapes.problems(result.document, wanted) == []
    assert [each["name"] for each in result.document["volumes"]] == ["c", "d"]
    assert thinpool("snapshot", "p/a", "p/c", "p/d").stdout.count("\n") == 2


def test_several_snapshots_are_mounted_on_directories_of_their_names(thinpool, tmp_path):
    (tmp_path / "c").mkdir()
    made = ("snapshot", "p/a", "p/c", "p/d", "--mount-each", str(tmp_path))
    assert thinpool(*made).code == 0
    directories = [tmp_path / "c", tmp_path / "d"]
    assert thinpool.api.mock_calls == [call.snapshot_many("p/a", ("p/c", "p/d"), mount=directories)]
    assert all(each.is_dir() for each in directories)
    (tmp_path / "d").rmdir()
    thinpool.api.snapshot_many.side_effect = AlreadyExistsError("p/d is there", existing=None)
    assert thinpool(*made).code == 4
    assert sorted(tmp_path.iterdir()) == [tmp_path / "c"], "only what was made for it goes"
    nowhere = tmp_path / "c" / "nowhere"
    assert thinpool(*made[:-1], str(nowhere)).code == 3


@pytest.mark.parametrize("option", ["--read-only", "--size=1G", "--mount=/mnt"])
def test_what_is_for_one_snapshot_is_refused_for_several(thinpool, option):
    result = thinpool("snapshot", "p/a", "p/c", "p/d", option)
    assert result.code == 2
    assert option.split("=")[0] in result.stderr
    assert thinpool.api.mock_calls == []


@pytest.mark.parametrize(
    "line", ["dump p", "dump --metadata m", "export p/v", "export p/v -o -", "completion bash"]
)
def test_streams_refuse_json(thinpool, line):
    result = thinpool(*line.split(), "--json")
    assert result.code == 2
    assert result.document["error"]["type"] == "usage"
    assert thinpool.connected == 0


def test_streams_go_to_standard_output(thinpool):
    def dump(pool, output, *, metadata):
        output.write(b"<superblock/>\n")

    def export(volume, output, *, raw, progress):
        output.write(b"tar")

    thinpool.api.dump.side_effect = dump
    thinpool.api.export.side_effect = export
    assert thinpool("dump", "p").stdout == "<superblock/>\n"
    result = thinpool("export", "p/v")
    sys.stdout.buffer.flush()
    assert (result.code, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "line",
    [
        "restore p",
        "restore --metadata m --from x.xml",
        "repair p --commit",
        "repair",
        "serve snapshotter p",
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_what_is_not_there_yet_says_so(thinpool, line, as_json):
    result = thinpool(*line.split(), *(["--json"] if as_json else []))
    assert result.code == 9
    assert thinpool.connected == 0
    if as_json:
        assert result.document["error"]["type"] == "not_there_yet"
    else:
        assert result.stdout == ""
        assert "not there yet" in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "method"),
    [
        ("create-pool p --size 1G --engine dm", "create_pool"),
        ("attach-pool p --data d --metadata m --engine dm", "attach_pool"),
    ],
)
def test_what_the_host_lacks_is_said_by_the_api(thinpool, line, method):
    error = UnsupportedHostError("this kernel has no device-mapper", missing="device-mapper")
    getattr(thinpool.api, method).side_effect = error
    result = thinpool(*line.split())
    assert result.code == 8
    assert result.stderr == f"thinpool {line.split()[0]}: {error.message}\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("bogus", "there is no command 'bogus'"),
        ("snapshto p/a p/b", "did you mean snapshot"),
        ("create p/v", "missing option '--size'"),
        ("create p --size 1G", "write POOL/NAME"),
        ("create p/v --size 0", "--size 0 bytes is too small"),
        ("create p/v --size 10X", "--size '10X' has the unknown unit 'X'"),
        ("create p/v --size -1G", "--size '-1G' is negative"),
        ("create p/v --size 10GB", "write G or GiB"),
        ("create p/v --size 1G --fs btrfs", "'btrfs' is not one of"),
        ("create p/v --size 1G --sise 2G", "--sise"),
        ("create p/.v --size 1G", "starts with '.'"),
        ("create p/-v --size 1G", "starts with '-'"),
        ("create ../v --size 1G", "starts with '.'"),
        (f"create p/{'x' * 129} --size 1G", "at most 128"),
        ("create-pool a/b --size 1G", "is not the name of a pool"),
        ("create-pool p --size 1G --block-size 96K", "the next are 64K and 128K"),
        ("create-pool p --size 1G --block-size 32K", "at least 64K"),
        ("create-pool p --size 1G --block-size 2G", "at most 1G"),
        ("create-pool p --size 1G --min-free 101%", "at most 100%"),
        ("create-pool p --size 1G --when-full panic", "'panic' is not one of"),
        ("create-pool p --size 1G --engine lvm", "'lvm' is not one of"),
        ("set p", "KEY=VALUE"),
        ("set p when-full", "is not KEY=VALUE"),
        ("set p =error", "is not KEY=VALUE"),
        ("set p min-free=", "is not KEY=VALUE"),
        ("set p min-free=1% min-free=2%", "'min-free' is given twice"),
        ("activate p/v --owner root", "is not UID:GID"),
        ("activate p/v --owner 1:4294967295", "is not UID:GID"),
        ("activate p/v --mode 888", "is not a mode"),
        ("activate p/v --mode 4755", "is not a mode"),
        ("rename p/v -w", "-w"),
        ("rename p/v .w", "starts with '.'"),
        ("remove", "missing argument"),
        ("resize p/v", "missing argument"),
        ("resize p/v 1.0000001K", "not a whole number"),
        ("check", "a POOL or --metadata FILE"),
        ("check p --metadata m", "a POOL or --metadata FILE"),
        ("dump", "a POOL or --metadata FILE"),
        ("list p q", "unexpected extra argument"),
        ("completion csh", "'csh' is not one of"),
        ("list --timeout soon", "is not a number of seconds"),
        ("list --timeout nan", "is not a number of seconds"),
        ("list --timeout -1", "is not a number of seconds"),
        ("list -v --quiet", "exclude each other"),
        ("--quiet list -v", "exclude each other"),
        ("--root= list", "--root is empty"),
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_wrong_usage_is_2_and_asks_nothing_of_the_api(thinpool, line, says, as_json):
    result = thinpool(*line.split(), *(["--json"] if as_json else []))
    assert result.code == 2
    assert thinpool.connected == 0
    if as_json:
        assert shapes.problems(result.document, shapes.ERROR) == []
        assert result.document["error"]["type"] == "usage"
        assert says in result.document["error"]["message"]
        assert result.stderr == ""
    else:
        assert result.stdout == ""
        assert says in result.stderr
        assert result.stderr.startswith("thinpool")
        assert result.stderr.count("\n") == 1


def test_no_command_shows_the_help_and_is_wrong_usage(thinpool):
    result = thinpool()
    assert result.code == 2
    assert "create-pool" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_names_everything(thinpool, name):
    result = thinpool(*([name] if name else []), "--help")
    assert result.code == 0
    assert result.stderr == ""
    assert "Global options:" in result.stdout
    assert "--json" in result.stdout
    shown = re.sub(r"(NAME|TO|VALUE|NAME,|\[(ARGS|ARGUMENTS|SUITE)\])\.\.\.", "", result.stdout)
    assert "..." not in shown, "a summary is cut"
    if name and name not in LATER:
        assert f"$ thinpool {name}" in result.stdout or f"thinpool {name} " in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 100
