"""Results, their document, the order of subjects, and the marks."""

from __future__ import annotations

import json

import pytest

from thinpool.bench import figures, marks, report, results
from thinpool.bench.context import Context, Options, in_turns
from thinpool.bench.results import Report, SuiteResults
from thinpool.errors import UnsupportedHostError, UsageError
from thinpool.units import GIB, KIB

MACHINE = {
    "processor": "P",
    "cores": "2",
    "memory": "1 GiB",
    "kernel": "6",
    "system": "S",
    "disk": "ext4 on vda",
}


def a_report(**suites: SuiteResults) -> Report:
    return Report(
        command="thinpool bench",
        machine=MACHINE,
        begun="2026-01-01T00:00:00Z",
        quick=False,
        repetitions=3,
        suites=dict(suites),
    )


def edits(**seconds: list[float]) -> SuiteResults:
    """4 KiB edits of 1 GiB, by subject; underscores stand for blanks."""
    found = SuiteResults()
    for subject, values in seconds.items():
        for value in values:
            found.add(
                *("edit", subject.replace("_", " "), "durable", "s", value),
                size=GIB,
                length=4 * KIB,
                places=1,
                state="cold",
            )
    return found


def context(found: SuiteResults, options: Options, saved: list[int]) -> Context:
    return Context(None, found, options, save=lambda: saved.append(1), say=lambda _: None)


def test_document_survives_a_round_trip(tmp_path):
    before = a_report(edits=edits(thinpool=[3.0, 1.0, 2.0]))
    before.suites["edits"].skip("btrfs", "no btrfs")
    before.suites["edits"].left_out.append(("a case", "no time"))
    before.suites["edits"].note("mind the gap")
    before.write(tmp_path / "results.json")
    assert results.read(tmp_path / "results.json") == before
    shown = json.loads((tmp_path / "results.json").read_text())["suites"]["edits"]["results"][0]
    assert (shown["median"], shown["min"], shown["max"]) == (2.0, 1.0, 3.0)
    assert (shown["q1"], shown["q3"]) == (1.5, 2.5)
    assert shown["values"] == [3.0, 1.0, 2.0], "in the order in which they were made"
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


def test_another_schema_is_refused():
    with pytest.raises(UsageError, match="schema 99"):
        Report.from_json({"schema": 99})


def test_each_subject_comes_first_in_turn():
    order = [name for _, name in in_turns("abc", 3)]
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert list(in_turns((), 3)) == []


def test_mark_is_judged_by_medians_of_one_run():
    judged = {
        verdict.what: verdict
        for verdict in marks.judge(
            a_report(edits=edits(thinpool=[0.01, 0.01, 9.0], overlay2_on_ext4=[1.5, 2.0, 1.0]))
        )
    }
    found = judged["4 KiB edit, 1 GiB: faster than overlay2 on ext4"]
    assert (found.figure, found.reached, found.word) == ("150", True, "reached")
    other = judged["4 KiB edit, 1 GiB: speed over btrfs"]
    assert (other.figure, other.reached, other.word) == ("", None, "not measured")


def test_mark_that_is_not_reached_says_so():
    judged = marks.judge(a_report(edits=edits(thinpool=[0.1], overlay2_on_ext4=[1.0])))
    found = next(verdict for verdict in judged if "1 GiB: faster than overlay2" in verdict.what)
    assert (found.reached, found.word) == (False, "NOT REACHED")
    assert "NOT REACHED" in report.render(
        a_report(edits=edits(thinpool=[0.1], overlay2_on_ext4=[1.0]))
    )


def test_every_mark_names_what_it_measures_once():
    names = [mark.what for mark in marks.MARKS]
    assert len(set(names)) == len(names)


def test_case_that_does_not_fit_is_named_and_left_out():
    found, saved = SuiteResults(), []
    limited = context(found, Options(seconds=5), saved)
    with limited.case("long", needs=10) as go:
        assert not go
    with limited.case("short", needs=1) as go:
        assert go
    assert [case for case, _ in found.left_out] == ["long"]
    assert saved == [1]


def test_peer_that_is_missing_is_named_and_skipped():
    found = SuiteResults()

    def make():
        raise UnsupportedHostError("nobody is not installed", missing="nobody")

    assert context(found, Options(), []).try_peer("nobody", make) is None
    assert found.skipped == [("nobody", "nobody is not installed")]


def test_peers_are_chosen_by_parts_of_their_names():
    options = Options(peers=("xfs",))
    assert options.wants("overlay2 on xfs (reflink)")
    assert options.wants("thinpool, pool 90 % full")
    assert not options.wants("btrfs snapshot")


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (0.00123, "s", "1.23 ms"),
        (12.34, "s", "12.3 s"),
        (4e-9, "s", "4.00 ns"),
        (46_100, "1/s", "46.1 k/s"),
        (65536, "bytes", "64 KiB"),
        (-65536, "bytes", "-64 KiB"),
    ],
)
def test_values_have_three_digits_and_a_unit(number, unit, text):
    assert figures.value(number, unit) == text
