"""Results as tables for people."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from thinpool.bench import figures, machine
from thinpool.bench.marks import judge

if TYPE_CHECKING:
    from collections.abc import Iterator

    from thinpool.bench.results import Report, Series, SuiteResults


def render(report: Report, *, width: int = 200, color: bool = False) -> str:
    """Everything: a table a case, what was skipped, and the marks."""
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=color, no_color=not color)
    console.print(machine.in_a_line(report.machine), highlight=False)
    if report.quick:
        console.print("quick: sizes too small for any figure to mean anything", highlight=False)
    for name, suite in report.suites.items():
        _suite(console, name, suite)
    _marks(console, report)
    return text.getvalue()


def _suite(console: Console, name: str, suite: SuiteResults) -> None:
    console.print(f"\n== {name}: {suite.state}, {suite.seconds:.0f} s", highlight=False)
    for title, rows in grouped(suite.series):
        console.print(f"\n{title}", highlight=False, soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD)
        metrics = list(dict.fromkeys(series.metric for series in rows))
        table.add_column("", no_wrap=True)
        for metric in metrics:
            table.add_column(metric, justify="right", no_wrap=True)
        for subject in dict.fromkeys(series.subject for series in rows):
            cells = {
                series.metric: figures.spread(series)
                for series in rows
                if series.subject == subject
            }
            table.add_row(subject, *(cells.get(metric, "") for metric in metrics))
        console.print(table, highlight=False)
    for subject, why in suite.skipped:
        console.print(f"skipped: {subject}: {why}", highlight=False, soft_wrap=True)
    for case, why in suite.left_out:
        console.print(f"left out: {case}: {why}", highlight=False, soft_wrap=True)
    for note in suite.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def grouped(found: list[Series]) -> Iterator[tuple[str, list[Series]]]:
    """Series of one case with the same parameters, under a title."""
    groups: dict[str, list[Series]] = {}
    for series in found:
        title = ", ".join(filter(None, (series.case, figures.parameters(series.parameters))))
        groups.setdefault(title, []).append(series)
    for title, rows in groups.items():
        counts = sorted({len(series.values) for series in rows})
        many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        yield f"{title}: median (least..greatest) of {many}", rows


def _marks(console: Console, report: Report) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="The marks", title_justify="left", title_style="")
    table.add_column("", overflow="fold")
    table.add_column("mark", overflow="fold")
    table.add_column("now", overflow="fold")
    table.add_column("")
    for verdict in judge(report):
        table.add_row(verdict.what, verdict.mark, verdict.figure, verdict.word)
    console.print(table, highlight=False)
