"""Answers for people: tables, trees, reports."""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from datetime import UTC, datetime, timedelta

from thinpool import model
from thinpool.cli import text


def volumes(*triples):
    start = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
    ids = itertools.count(1)
    return [
        model.Volume(
            pool="p",
            name=name,
            id=model.VolumeId(next(ids)),
            kind=kind,
            parent=parent,
            size=10 << 30,
            mapped=(index + 1) << 20,
            exclusive=None,
            read_only=kind in ("base", "image"),
            created=start + timedelta(minutes=index),
        )
        for index, (name, kind, parent) in enumerate(triples)
    ]


FAMILY = volumes(
    ("base", "base", None),
    ("debian", "image", "base"),
    ("c1", "container", "debian"),
    ("app", "image", "debian"),
    ("c2", "container", "app"),
    ("data", "volume", None),
    ("orphan", "container", "gone"),
)


def test_list_is_a_table_in_order_of_creation():
    lines = text.volume_table(FAMILY, exclusive=False, tree=False).splitlines()
    assert lines[0].split() == ["NAME", "KIND", "PARENT", "SIZE", "MAPPED", "CREATED", "DEVICE"]
    assert [line.split()[0] for line in lines[1:]] == [f"p/{each.name}" for each in FAMILY]
    assert lines[2].split() == (
        ["p/debian", "image", "base", "10", "GiB", "2", "MiB", "2026-11-21", "12:01:00Z", "-"]
    )
    assert all(line == line.rstrip() for line in lines)


def test_a_table_never_cuts_a_name():
    long = "x" * 128
    drawn = text.volume_table(volumes((long, "volume", long)), exclusive=True, tree=False)
    assert f"p/{long}" in drawn.splitlines()[1]
    assert len(drawn.splitlines()) == 2


def test_exclusive_is_a_column_when_asked():
    one = dataclasses.replace(FAMILY[0], exclusive=65536)
    drawn = text.volume_table([one, FAMILY[1]], exclusive=True, tree=False)
    assert "EXCLUSIVE" in drawn
    assert "64 KiB" in drawn.splitlines()[1]


def test_tree_shows_each_below_its_parent_and_orphans_at_the_top():
    lines = text.volume_table(FAMILY, exclusive=False, tree=True).splitlines()
    names = [re.split(r"  +(?=base|image|container|volume)", line)[0] for line in lines[1:]]
    assert names == [
        "p/base",
        "└── debian",
        "    ├── c1",
        "    └── app",
        "        └── c2",
        "p/data",
        "p/orphan",
    ]
    assert "PARENT" not in lines[0]


def test_tree_of_a_long_chain_is_drawn():
    chain = volumes(*((f"v{n}", "volume", f"v{n - 1}" if n else None) for n in range(1500)))
    lines = text.volume_table(chain, exclusive=False, tree=True).splitlines()
    assert len(lines) == 1501
    assert lines[-1].strip().startswith("└── v1499")


def test_tree_keeps_pools_apart():
    other = [dataclasses.replace(each, pool="q") for each in FAMILY[:2]]
    lines = text.volume_table([*FAMILY[:2], *other], exclusive=False, tree=True).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "p/base",
        "└── debian",
        "q/base",
        "└── debian",
    ]


def test_an_empty_list_prints_nothing(thinpool):
    thinpool.api.list.return_value = []
    thinpool.api.pools.return_value = []
    assert thinpool("list").stdout == ""
    assert thinpool("pools").stdout == ""
    assert thinpool("list", "--json").document == {"schema": 1, "volumes": []}
    assert thinpool("pools", "--json").document == {"schema": 1, "pools": []}


def fault(severity, **changes):
    values = {
        "type": "checksum",
        "severity": severity,
        "structure": "mapping-tree",
        "block": 12,
        "device_id": None,
        "message": "found 1, wanted 2",
    }
    return model.Fault(**values | changes)


def test_check_prints_every_fault_and_exits_with_7(thinpool):
    faults = (
        fault("fatal"),
        fault("leak", type="leaked", structure="data-space-map", block=None, message="3 blocks"),
        fault("note", device_id=4),
        fault("note", block=None),
    )
    thinpool.api.check.return_value = model.CheckReport(
        pool="p", clean=False, transaction_id=9, faults=faults
    )
    result = thinpool("check", "p")
    assert result.code == 7
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "fatal mapping-tree block 12: found 1, wanted 2 [checksum]",
        "leak  data-space-map: 3 blocks [leaked]",
        "note  mapping-tree block 12 device 4: found 1, wanted 2 [checksum]",
        "note  mapping-tree: found 1, wanted 2 [checksum]",
        "p: NOT CLEAN (1 fatal, 1 leak, 2 notes), transaction id 9",
    ]
    assert thinpool("check", "p", "--json").code == 7


def test_check_with_notes_alone_is_clean(thinpool):
    thinpool.api.check.return_value = model.CheckReport(
        pool=None, clean=True, transaction_id=None, faults=(fault("note"),)
    )
    result = thinpool("check", "--metadata", "/m")
    assert result.code == 0
    assert result.stdout.splitlines()[-1] == "/m: clean (1 note), transaction id unknown"


def test_a_severity_that_is_not_known_is_told(thinpool):
    thinpool.api.check.return_value = model.CheckReport(
        pool="p", clean=True, transaction_id=1, faults=(fault("odd"),)
    )
    assert "1 of a severity that this version does not know" in thinpool("check", "p").stdout


def test_status_says_how_full_it_is(thinpool):
    lines = dict(
        line.split(":", 1) for line in thinpool("status", "p").stdout.splitlines() if ":" in line
    )
    assert lines["data"].strip() == (
        "1 GiB of 100 GiB (1.0%) in /r/pools/p/data, 5 B free on the host"
    )
    assert lines["mode"].strip() == "rw"


def test_pools_shows_what_needs_check(thinpool):
    assert "ro, needs check" in thinpool("pools").stdout


def test_a_crash_consistent_snapshot_says_so(thinpool):
    made = thinpool.api.snapshot.return_value
    thinpool.api.snapshot.return_value = dataclasses.replace(made, consistency="crash")
    result = thinpool("snapshot", "p/a", "p/c")
    assert result.stdout == "p/c: container of p/i, 10 GiB\n"
    assert "crash-consistent" in result.stderr
    thinpool.api.snapshot.return_value = dataclasses.replace(made, consistency="frozen")
    assert thinpool("snapshot", "p/a", "p/c").stderr == ""


def test_an_active_snapshot_prints_its_device_alone(thinpool):
    made = thinpool.api.snapshot.return_value
    thinpool.api.snapshot.return_value = dataclasses.replace(made, device="/run/d/p/c")
    assert thinpool("snapshot", "p/a", "p/c", "--activate").stdout == "/run/d/p/c\n"
    assert thinpool("snapshot", "p/a", "p/c", "--activate", "--quiet").stdout == "/run/d/p/c\n"


def test_diff_and_delta_are_lines(thinpool):
    thinpool.api.diff.return_value = [
        model.FileChange(path="a", change="added"),
        model.FileChange(path="b c", change="modified"),
        model.FileChange(path="d\n\x1b[31m\udcff", change="deleted"),
    ]
    assert thinpool("diff", "p/a", "p/b").stdout == ("A /a\nM /b c\nD /d\\n\\x1b[31m\\xff\n")
    paths = [each["path"] for each in thinpool("diff", "p/a", "p/b", "--json").document["changes"]]
    assert paths == ["a", "b c", "d\n\x1b[31m\udcff"]
    assert thinpool("delta", "p/a", "p/b").stdout == "0 131072 different\n"


def test_no_difference_prints_nothing(thinpool):
    thinpool.api.diff.return_value = []
    assert thinpool("diff", "p/a", "p/b").stdout == ""


def test_doctor_names_the_remedy_and_exits_with_7_when_a_pool_is_wrong(thinpool):
    result = thinpool("doctor")
    assert result.code == 0
    assert "missing" in result.stdout
    assert "-> modprobe" in result.stdout
    report = thinpool.api.doctor.return_value
    wrong = model.Finding(subject="p", state="wrong", message="bad", remedy="thinpool check p")
    thinpool.api.doctor.return_value = dataclasses.replace(report, pools={"p": (wrong,)})
    result = thinpool("doctor", "p")
    assert result.code == 7
    assert "-> thinpool check p" in result.stdout


def test_remove_says_what_it_freed(thinpool):
    assert thinpool("remove", "p/v").stdout == "removed p/v, freed 128 KiB\n"
    assert thinpool("remove", "p/v", "--dry-run").stdout == "would remove p/v, freeing 128 KiB\n"
    assert thinpool("remove", "p/v", "--dry-run", "--quiet").stdout != ""


def test_a_table_of_many_rows_is_drawn_at_once():
    many = volumes(*((f"v{n}", "volume", None) for n in range(20000)))
    began = time.process_time()
    assert len(text.volume_table(many, exclusive=False, tree=True).splitlines()) == 20001
    assert time.process_time() - began < 5
