"""Runs suites one after another, and keeps what they find on disk, whatever happens."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from thinpool.bench import machine, results
from thinpool.bench.context import Context, Options
from thinpool.bench.results import Report, SuiteResults
from thinpool.bench.suites import SUITES
from thinpool.bench.workplace import workplace
from thinpool.errors import NotFoundError, ThinpoolError
from thinpool.model import format_time

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from thinpool.bench.suites import Suite
    from thinpool.bench.workplace import Workplace

RESULTS: Final = "results.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run, and where.

    Attributes:
        suites: names, in order.
        options: how; ``seconds`` is the time of all suites together, None for each one's own.
        directory: whose disk is measured.
        output: the folder that takes the results.
        command: that asked for it.
        resume: keep what another run left there of suites that are not run now.
    """

    suites: Sequence[str]
    options: Options
    directory: Path
    output: Path
    command: str
    resume: bool = False

    @property
    def file(self) -> Path:
        """The results."""
        return self.output / RESULTS


def run(plan: Plan, *, say: Callable[[str], None]) -> Report:
    """Run every suite; one that fails leaves the others to be run.

    Args:
        plan: what and where.
        say: told what is being done.

    Returns:
        What was found; ``plan.file`` has it too, and has it after every case.

    Raises:
        KeyboardInterrupt: as it came; the file has what there was.
        NotFoundError: no such directory.
    """
    if not plan.directory.is_dir():
        raise NotFoundError(f"there is no directory {plan.directory} to work in")
    plan.output.mkdir(parents=True, exist_ok=True)
    report = Report(
        command=plan.command,
        machine=machine.describe(plan.directory),
        begun=format_time(datetime.now(UTC)),
        quick=plan.options.quick,
        repetitions=plan.options.repetitions,
    )
    if plan.resume and plan.file.exists():
        report.suites.update(results.read(plan.file).suites)
    try:
        with workplace(plan.directory) as place:
            for name in plan.suites:
                _run_suite(SUITES[name], place, report, plan, say)
    except BaseException:
        report.state = results.INTERRUPTED
        report.write(plan.file)
        raise
    states = {suite.state for suite in report.suites.values()}
    report.state = next(
        (s for s in (results.FAILED, results.INTERRUPTED) if s in states), results.COMPLETE
    )
    report.ended = format_time(datetime.now(UTC))
    report.write(plan.file)
    return report


def _run_suite(
    suite: Suite, place: Workplace, report: Report, plan: Plan, say: Callable[[str], None]
) -> None:
    """One suite, in a part of the workplace of its own."""
    found = report.suites[suite.name] = SuiteResults(begun=format_time(datetime.now(UTC)))
    if suite.root and os.geteuid() != 0:
        found.state = results.SKIPPED
        found.skip("the suite", "it needs root: it mounts and makes devices")
        return
    seconds = suite.seconds
    if plan.options.seconds is not None:
        whole = sum(SUITES[name].seconds for name in plan.suites)
        seconds = plan.options.seconds * suite.seconds / whole
    begun = time.monotonic()

    def save() -> None:
        found.seconds = time.monotonic() - begun
        report.write(plan.file)

    try:
        with place.part(suite.name) as part:
            suite.run(
                Context(
                    part,
                    found,
                    replace(plan.options, seconds=seconds),
                    save=save,
                    say=lambda text: say(f"{suite.name}: {text}"),
                )
            )
        found.state = results.COMPLETE
    except (ThinpoolError, OSError) as error:
        found.state = results.FAILED
        found.note(f"it failed: {error}")
        say(f"{suite.name}: failed: {error}")
    except BaseException:
        found.state = results.INTERRUPTED
        raise
    finally:
        save()
