"""Results as parts of documents: written by a command, so that no figure is typed by hand.

A document has ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->`` on lines of their own; what is
between them is replaced. What is not between such lines is people's.
"""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Final

from thinpool.bench import figures, machine
from thinpool.bench.marks import judge
from thinpool.bench.plots import PLOTS
from thinpool.bench.report import grouped
from thinpool.errors import UsageError
from thinpool.units import GIB, KIB, MIB, format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from thinpool.bench.marks import Verdict
    from thinpool.bench.results import Report, Series

PLOT_FOLDER: Final = "plots"
_NOTHING_APART: Final = "Nothing since the whole run."
_EDIT_SIZES: Final = (MIB, GIB, 4 * GIB)
_OPS: Final = (
    ("mapped", "randread", "read"),
    ("mapped", "randwrite", "write"),
    ("first write", "randwrite", "first write"),
    ("break sharing", "randwrite", "break sharing"),
)


def write(report: Report, *, results: Path, repository: Path) -> list[Path]:
    """Write docs/benchmarks.md, the README's part, and the plots.

    What was measured apart before this run is taken out.

    Args:
        report: the run.
        results: the folder that has its plots.
        repository: a checkout.

    Returns:
        The files that were written.

    Raises:
        UsageError: a quick run, or a document without the lines.
    """
    _refuse_quick(report)
    docs = repository / "docs"
    plots = docs / PLOT_FOLDER
    plots.mkdir(exist_ok=True)
    written = []
    for name in PLOTS:
        source = results / f"{name}.svg"
        if source.exists():
            shutil.copyfile(source, plots / source.name)
            written.append(plots / source.name)
    shown = [path.stem for path in written]
    page = docs / "benchmarks.md"
    parts = {"run": _run(report), "marks": _marks(report), "results": _results(report, shown)}
    replace(page, {**parts, "apart": _NOTHING_APART})
    readme = repository / "README.md"
    replace(readme, {"benchmarks": _readme(report, shown)})
    return [page, readme, *written]


def write_apart(report: Report, *, repository: Path) -> Path:
    """Write a run of some suites beside the whole run of another time: into docs/benchmarks.md.

    Args:
        report: the run.
        repository: a checkout.

    Returns:
        The page.

    Raises:
        UsageError: a quick run, or a page without the lines.
    """
    _refuse_quick(report)
    page = repository / "docs" / "benchmarks.md"
    measured = [verdict for verdict in judge(report) if verdict.figure]
    parts = [_run(report), _marks_table(measured), _results(report, [])]
    replace(page, {"apart": "\n\n".join(parts)})
    return page


def _refuse_quick(report: Report) -> None:
    if report.quick:
        raise UsageError("a quick run's figures mean nothing: they go into no document", what="run")


def replace(path: Path, parts: dict[str, str]) -> None:
    """Put new text between a document's lines.

    Raises:
        UsageError: it has no such lines, or has them twice.
    """
    text = path.read_text()
    for name, new in parts.items():
        pattern = re.compile(
            rf"(?<=<!-- begin: {name} -->\n).*?(?=<!-- end: {name} -->\n)", re.DOTALL
        )
        pieces = pattern.split(text)
        count = len(pieces) - 1
        text = f"{new.strip()}\n".join(pieces)
        if count != 1:
            raise UsageError(f"{path} has the lines of {name!r} {count} times", what=name)
    path.write_text(text)


def _run(report: Report) -> str:
    """Where the figures are from."""
    text = (
        f"`{report.command}` on {machine.in_a_line(report.machine)}; begun {report.begun}, "
        f"{report.state}."
    )
    took = ", ".join(f"{name} {suite.seconds:.0f} s" for name, suite in report.suites.items())
    return f"{text}\nTime taken: {took}."


def _marks(report: Report) -> str:
    verdicts = judge(report)
    counted = [verdict.reached for verdict in verdicts if verdict.reached is not None]
    table = _marks_table(verdicts)
    return f"{sum(counted)} of {len(counted)} marks with a bound are reached.\n\n{table}"


def _marks_table(verdicts: Iterable[Verdict]) -> str:
    rows = [(each.what, each.mark, each.figure, _strong(each.word)) for each in verdicts]
    return _table(("", "mark", "now", ""), rows)


def _strong(word: str) -> str:
    return f"**{word.lower()}**" if word.isupper() else word


def _results(report: Report, plots: Sequence[str]) -> str:
    """Every table of every suite."""
    parts = [f"![{name}]({PLOT_FOLDER}/{name}.svg)" for name in plots]
    for name, suite in report.suites.items():
        parts.append(f"### {name}")
        if suite.state != "complete":
            parts.append(f"This suite's state: {suite.state}.")
        for title, rows in grouped(suite.series):
            parts.append(f"{title}\n\n{_series_table(rows)}")
        told = [f"- skipped: {subject}: {why}" for subject, why in suite.skipped]
        told += [f"- left out: {case}: {why}" for case, why in suite.left_out]
        told += [f"- {note}" for note in suite.notes]
        if told:
            parts.append("\n".join(told))
    return "\n\n".join(parts)


def _series_table(rows: Sequence[Series]) -> str:
    metrics = list(dict.fromkeys(series.metric for series in rows))
    lines = []
    for subject in dict.fromkeys(series.subject for series in rows):
        cells = {
            series.metric: figures.spread(series) for series in rows if series.subject == subject
        }
        lines.append((subject, *(cells.get(metric, "") for metric in metrics)))
    return _table(("", *metrics), lines)


def _readme(report: Report, plots: Sequence[str]) -> str:
    """The two tables that say most, and two plots."""
    parts = []
    edits = _edit_rows(report)
    if edits:
        parts.append(
            "A 4 KiB edit with fsync of a file of an image, first touch in a new container, cold; "
            "median time until durable, and bytes added for the largest:\n\n"
            + _table(
                ("", *(format_size(size) for size in _EDIT_SIZES), "made", "added"),
                edits,
            )
        )
    rates = _rate_rows(report)
    if rates:
        parts.append(
            "4 KiB random I/O at depth 32 through a loop device, a second:\n\n"
            + _table(("", *(title for _, _, title in _OPS)), rates)
        )
    verdicts = judge(report)
    counted = [verdict.reached for verdict in verdicts if verdict.reached is not None]
    parts.extend(
        f"![{name}](docs/{PLOT_FOLDER}/{name}.svg)"
        for name in ("edit-by-size", "io-rates")
        if name in plots
    )
    parts.append(
        f"`{report.command}` on {machine.in_a_line(report.machine)}. All on loop devices over the "
        f"same disk. {sum(counted)} of {len(counted)} marks are reached; "
        "[docs/benchmarks.md](docs/benchmarks.md) has each, all figures with their spread, and "
        "how they were measured."
    )
    return "\n\n".join(parts)


def _edit_rows(report: Report) -> list[tuple[str, ...]]:
    found: dict[str, dict[str, str]] = {}
    for series in report.series("edits", "edit", length=4 * KIB, places=1, state="cold"):
        size = int(series.parameters["size"])
        text = figures.value(series.median, series.unit)
        cells = found.setdefault(series.subject, {})
        if series.metric == "durable":
            cells[format_size(size)] = text
        if series.metric in {"made", "added_with_container"} and size == max(_EDIT_SIZES):
            cells[series.metric] = text
    columns = (*(format_size(size) for size in _EDIT_SIZES), "made", "added_with_container")
    return [
        (subject, *(cells.get(column, "") for column in columns))
        for subject, cells in found.items()
    ]


def _rate_rows(report: Report) -> list[tuple[str, ...]]:
    found: dict[str, dict[str, str]] = {}
    for case, op, title in _OPS:
        for series in report.series("io", case, op=op, block=4 * KIB, depth=32, jobs=1):
            if series.metric == "iops":
                found.setdefault(series.subject, {})[title] = figures.rate(series.median)
    return [
        (subject, *(cells.get(title, "") for _, _, title in _OPS))
        for subject, cells in found.items()
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
