"""The benchmarks at tiny sizes: that they run, say what they skip, and leave nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from thinpool import Thinpool
from thinpool.bench import runner, stores
from thinpool.bench.context import Options
from thinpool.bench.suites import SUITES
from thinpool.errors import UnsupportedHostError
from thinpool.host import loop

FIELDS = {
    *("case", "subject", "parameters", "metric", "unit"),
    *("values", "median", "min", "q1", "q3", "max"),
}
NEEDS = {
    "edits": ("ext4",),
    "io": ("fio",),
    "core": ("bench_programs",),
    "metadata": ("bench_programs",),
    "small-files": ("ext4",),
    "snapshots": ("ext4",),
}


def test_list_names_every_suite(bench):
    shown = bench.run("--list").stdout
    assert [line.split()[0] for line in shown.splitlines()] == list(SUITES)
    document = json.loads(bench.run("--list", "--json").stdout)
    assert [each["name"] for each in document["suites"]] == list(SUITES)


def test_unknown_suite_is_wrong_usage(bench):
    done = bench.run("nonsense")
    assert done.returncode == 2
    assert "there is no suite 'nonsense'" in done.stderr
    assert not bench.output.exists()


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_quick_run_measures_and_leaves_nothing(bench, require, suite):
    require("root", "fuse", "loop", *NEEDS.get(suite, ()))
    done = bench.run(suite, "--quick", "--repetitions", "1")
    assert done.returncode == 0, done.stderr
    assert f"== {suite}: complete" in done.stdout
    assert "The marks" in done.stdout
    document = bench.results()
    assert (document["schema"], document["state"], document["quick"]) == (1, "complete", True)
    assert document["ended"] is not None
    found = document["suites"][suite]
    assert found["results"], "something was measured"
    for series in found["results"]:
        assert set(series) == FIELDS
        assert series["values"]
        assert series["min"] <= series["q1"] <= series["median"] <= series["q3"] <= series["max"]
    assert any(series["subject"].startswith("thinpool") for series in found["results"])
    assert list(bench.work.iterdir()) == []
    assert loop.find_below(bench.work) == []


@pytest.mark.slow
def test_interrupted_run_keeps_what_it_has_and_takes_everything_down(bench, require):
    require("root", "fuse", "loop", "ext4")
    child = bench.start("edits", "--quick", "--repetitions", "1000", "--peers", "overlay2 on ext4")
    bench.wait_for_a_series(child, "edits")
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode == 130
    document = bench.results()
    assert document["state"] == "interrupted"
    assert document["suites"]["edits"]["state"] == "interrupted"
    assert document["suites"]["edits"]["results"][0]["values"]
    assert list(bench.work.iterdir()) == []
    assert loop.find_below(bench.work) == []


@pytest.mark.slow
def test_next_run_clears_what_a_killed_one_left(bench, require):
    require("root", "fuse", "loop", "ext4")
    child = bench.start("edits", "--quick", "--repetitions", "1000", "--peers", "overlay2 on ext4")
    bench.wait_for_a_series(child, "edits")
    child.kill()
    child.communicate(timeout=60)
    assert len(list(bench.work.glob("thinpool-bench-*"))) == 1
    program = "from thinpool.bench.workplace import clear_leftovers as c; import pathlib, sys; "
    subprocess.run(
        [sys.executable, "-P", "-c", program + "print(c(pathlib.Path(sys.argv[1])))", bench.work],
        check=True,
        timeout=60,
    )
    assert list(bench.work.iterdir()) == []
    assert loop.find_below(bench.work) == []


def test_store_whose_program_is_missing_says_which_package_brings_it(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "find_program", lambda name: None)
    with pytest.raises(UnsupportedHostError, match="the package unionfs-fuse brings it"):
        stores.FuseOverlay(None, tmp_path, "unionfs")


def test_suite_that_needs_root_is_skipped_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 65534)
    said = []
    plan = runner.Plan(
        suites=["edits"],
        options=Options(quick=True, repetitions=1),
        directory=tmp_path,
        output=tmp_path / "out",
        command="thinpool bench edits",
    )
    found = runner.run(plan, say=said.append).suites["edits"]
    assert (found.state, found.series) == ("skipped", [])
    assert "needs root" in found.skipped[0][1]


@pytest.mark.slow
def test_a_run_keeps_no_volume_busy(bench, require, tmp_path, monkeypatch):
    """It works in a mount namespace of its own, which begins with a copy of everything mounted."""
    require("root", "fuse", "loop", "ext4")
    folder = tmp_path / "mnt"
    folder.mkdir()
    monkeypatch.setenv("THINPOOL_LINGER", "1")
    with Thinpool(tmp_path / "root", timeout=20) as api:
        api.create_pool("p", size=256 << 20, base_size=128 << 20)
        api.snapshot("p/base", "p/c", mount=folder)
        child = bench.start("server", "--quick", "--repetitions", "1")
        try:
            bench.wait_for_a_series(child, "server")
            assert not api.umount("p/c").mounts
            api.deactivate("p/c")
        finally:
            child.send_signal(signal.SIGINT)
            child.communicate(timeout=60)
            api.remove_pool("p")
