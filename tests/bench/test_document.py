"""Figures go into documents by a command, between lines that say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.test_results import a_report, edits
from thinpool.bench import document, plots
from thinpool.errors import UsageError
from thinpool.units import GIB, KIB, MIB

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path):
    """The two documents as they are."""
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md"):
        (tmp_path / name).write_text((REPOSITORY / name).read_text())
    return tmp_path


def test_figures_replace_figures_and_nothing_else(checkout, tmp_path):
    report = a_report(edits=edits(thinpool=[0.002], overlay2_on_ext4=[1.5]))
    before = (checkout / "docs/benchmarks.md").read_text()
    written = document.write(report, results=tmp_path, repository=checkout)
    assert written[:2] == [checkout / "docs/benchmarks.md", checkout / "README.md"]
    page = (checkout / "docs/benchmarks.md").read_text()
    assert (
        "| 4 KiB edit, 1 GiB: faster than overlay2 on ext4 | at least 100 | 750 | reached |" in page
    )
    assert "| thinpool | 2.00 ms |" in page
    assert page.partition("<!-- begin: run -->")[0] == before.partition("<!-- begin: run -->")[0]
    assert "| overlay2 on ext4 |  | 1.50 s |" in (checkout / "README.md").read_text()
    again = document.write(report, results=tmp_path, repository=checkout)
    assert again == written
    assert (checkout / "docs/benchmarks.md").read_text() == page


def test_a_run_of_some_suites_goes_beside_the_whole_one(checkout, tmp_path):
    page = checkout / "docs/benchmarks.md"
    before = page.read_text()
    report = a_report(edits=edits(thinpool=[0.002], overlay2_on_ext4=[1.5]))
    assert document.write_apart(report, repository=checkout) == page
    head, begin, rest = page.read_text().partition("<!-- begin: apart -->\n")
    apart, end, tail = rest.partition("<!-- end: apart -->\n")
    assert head + begin == before.partition(begin)[0] + begin
    assert end + tail == end + before.partition(end)[2]
    assert "at least 100 | 750 | reached |" in apart
    assert "not measured" not in apart
    assert "| thinpool | 2.00 ms |" in apart
    document.write(report, results=tmp_path, repository=checkout)
    assert "<!-- begin: apart -->\nNothing since the whole run.\n<!-- end" in page.read_text()
    report.quick = True
    with pytest.raises(UsageError, match="mean nothing"):
        document.write_apart(report, repository=checkout)


def test_quick_run_goes_into_no_document(checkout, tmp_path):
    report = a_report()
    report.quick = True
    with pytest.raises(UsageError, match="mean nothing"):
        document.write(report, results=tmp_path, repository=checkout)


def test_document_without_the_lines_is_refused(tmp_path):
    (tmp_path / "a.md").write_text("nothing\n")
    with pytest.raises(UsageError, match="'run' 0 times"):
        document.replace(tmp_path / "a.md", {"run": "x"})


def test_plots_are_drawn_where_there_are_figures(tmp_path):
    pytest.importorskip("matplotlib")
    found = edits(thinpool=[0.002, 0.003])
    for size in (MIB, 4 * GIB):
        found.add(
            *("edit", "thinpool", "durable", "s", 0.002),
            size=size,
            length=4 * KIB,
            places=1,
            state="cold",
        )
    assert plots.draw(a_report(edits=found), tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["edit-by-size.svg"]
    first = (tmp_path / "edit-by-size.svg").read_bytes()
    plots.draw(a_report(edits=found), tmp_path)
    assert (tmp_path / "edit-by-size.svg").read_bytes() == first, "no dates, no random names"
