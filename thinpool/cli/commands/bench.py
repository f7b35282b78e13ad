"""The benchmarks."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from thinpool.cli import exits
from thinpool.cli.command import command
from thinpool.cli.params import SECONDS
from thinpool.errors import UsageError

if TYPE_CHECKING:
    from thinpool.cli.session import Session

REPETITIONS: Final = 7
QUICK_REPETITIONS: Final = 2


@command(
    "bench",
    exits={
        exits.DONE: "everything that this host can run was run; marks may not be reached",
        exits.FAILED: "a suite failed; what was measured is kept",
        exits.INTERRUPTED: "interrupted; what was measured is kept, and everything is taken down",
    },
    examples=[
        ("thinpool bench", "Everything, 40 minutes; as root on a host that is at rest:"),
        ("thinpool bench edits --directory /mnt/disk", "One suite, on another disk:"),
        ("thinpool bench --quick", "See that it works; no figure of it means anything:"),
    ],
)
@click.argument("suites", nargs=-1, metavar="[SUITE]...")
@click.option("--list", "list_", is_flag=True, help="Say which suites there are, and end.")
@click.option("--quick", is_flag=True, help="Tiny sizes and short runs: only whether it works.")
@click.option(
    "--repetitions",
    type=click.IntRange(1, 1000),
    metavar="N",
    help=f"Of every measurement ({REPETITIONS}; {QUICK_REPETITIONS} with --quick); medians and "
    "their spread are shown.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("bench-results"),
    show_default=True,
    metavar="DIR",
    help="The folder that takes results.json and the plots.",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="Where to work: its disk is the one that is measured. The folder for temporary files.",
)
@click.option(
    "--peers",
    metavar="NAME,...",
    help="Only peers whose names contain one of these; 'none' for thinpool alone.",
)
@click.option(
    "--time-budget",
    type=SECONDS,
    metavar="S",
    help="Seconds for all suites together. Cases that do not fit are named and left out.",
)
@click.option(
    "--continue",
    "resume",
    is_flag=True,
    help="Keep what the output folder has of suites that are not run now.",
)
@click.option("--show", is_flag=True, help="Measure nothing: show what the output folder has.")
@click.pass_obj
def bench(
    session: Session,
    *,
    suites: tuple[str, ...],
    list_: bool,
    quick: bool,
    repetitions: int | None,
    output: Path,
    directory: Path | None,
    peers: str | None,
    time_budget: float | None,
    resume: bool,
    show: bool,
) -> int:
    """Measure thinpool beside its peers, on this machine.

    Every comparison has the same disk below and the same durability on both sides; subjects take
    turns. Peers that are not installed are named and skipped: 'make bench-setup' in a checkout
    installs them. What is measured is on disk after every case, so that a run that is interrupted
    keeps what it has. Nothing else of it stays: it works in a folder of its own, which goes.

    Most suites need root. Standard output gets the tables, the marks last; with --json, what
    results.json holds.
    """
    from thinpool.bench.suites import SUITES

    if list_:
        session.answer(
            lambda: {
                "schema": 1,
                "suites": [
                    {"name": each.name, "summary": each.summary, "root": each.root}
                    for each in SUITES.values()
                ],
            },
            lambda: "\n".join(f"{each.name:<12} {each.summary}" for each in SUITES.values()),
        )
        return exits.DONE
    for name in suites:
        if name not in SUITES:
            raise UsageError(
                f"there is no suite {name[:40]!r}; there are {', '.join(SUITES)}",
                what="SUITE",
                value=name,
            )

    from thinpool.bench import plots, report, results, runner
    from thinpool.bench.context import Options

    plan = runner.Plan(
        suites=suites or tuple(SUITES),
        options=Options(
            quick=quick,
            repetitions=repetitions or (QUICK_REPETITIONS if quick else REPETITIONS),
            peers=None if peers is None else tuple(filter(None, peers.split(","))),
            seconds=time_budget,
        ),
        directory=directory or Path(tempfile.gettempdir()),
        output=output,
        command=_as_typed(suites, quick=quick, repetitions=repetitions, peers=peers),
        resume=resume,
    )
    if show:
        found = results.read(plan.file)
    else:
        try:
            found = runner.run(plan, say=session.note)
        finally:
            if plan.file.exists():
                session.note(f"results: {plan.file}")
    for problem in plots.draw(found, output):
        session.note(problem)
    session.answer(
        found.to_json, lambda: report.render(found, color=sys.stdout.isatty() and not _no_color())
    )
    return exits.FAILED if found.state == results.FAILED else exits.DONE


def _as_typed(
    suites: tuple[str, ...], *, quick: bool, repetitions: int | None, peers: str | None
) -> str:
    """The command that makes the same figures elsewhere: without one's own folders."""
    words = ["thinpool", "bench", *suites]
    if quick:
        words.append("--quick")
    if repetitions is not None:
        words += ["--repetitions", str(repetitions)]
    if peers is not None:
        words += ["--peers", peers]
    return shlex.join(words)


def _no_color() -> bool:
    import os

    return bool(os.environ.get("NO_COLOR"))


COMMANDS: Final = {str(bench.name): bench}
