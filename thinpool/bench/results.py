"""What was measured, as a document that is on disk after every case.

A series is one metric of one subject in one case: its values are the repetitions in the order in
which they were made. Units are in the metric's name or ``unit``; times are seconds, sizes bytes.
The document's shape is ``SCHEMA``; fields may be added, none is renamed within a schema.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from thinpool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Parameter = int | float | str

SCHEMA: Final = 1
RUNNING: Final = "running"
COMPLETE: Final = "complete"
INTERRUPTED: Final = "interrupted"
FAILED: Final = "failed"
SKIPPED: Final = "skipped"


@dataclass(slots=True, kw_only=True)
class Series:
    """Repetitions of one measurement.

    Attributes:
        case: what was done.
        subject: who did it: thinpool or a peer.
        metric: what was measured, such as ``durable``.
        unit: ``s``, ``bytes``, ``1/s`` and the like.
        parameters: sizes, depths, cold or warm.
        values: one each repetition.
    """

    case: str
    subject: str
    metric: str
    unit: str
    parameters: dict[str, Parameter] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle of the repetitions."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third; the only value twice where there is one."""
        if len(self.values) < 2:  # noqa: PLR2004 - a pair
            return self.values[0], self.values[0]
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third

    def to_json(self) -> dict[str, Any]:
        """With what a reader would compute from the values."""
        first, third = self.quartiles
        return {
            "case": self.case,
            "subject": self.subject,
            "parameters": self.parameters,
            "metric": self.metric,
            "unit": self.unit,
            "values": self.values,
            "median": self.median,
            "min": min(self.values),
            "q1": first,
            "q3": third,
            "max": max(self.values),
        }


@dataclass(slots=True, kw_only=True)
class SuiteResults:
    """What one suite found.

    Attributes:
        state: running, complete, interrupted, failed or skipped.
        begun: UTC, ISO 8601.
        seconds: it took.
        skipped: peers or cases that this host lacks something for: subject, why.
        left_out: cases that the time did not suffice for: case, why.
        notes: what a reader has to know about how it was measured.
    """

    state: str = RUNNING
    begun: str = ""
    seconds: float = 0.0
    series: list[Series] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(  # noqa: D417 - the parameters are any
        self,
        case: str,
        subject: str,
        metric: str,
        unit: str,
        value: float,
        /,
        **parameters: Parameter,
    ) -> None:
        """Add one repetition's value to its series.

        Args:
            case, subject, metric, unit: of the series.
            value: what was measured.
        """
        found = self.find(case, subject, metric, **parameters)
        if found is None:
            found = Series(
                case=case, subject=subject, metric=metric, unit=unit, parameters=parameters
            )
            self.series.append(found)
        found.values.append(value)

    def find(
        self, case: str, subject: str, metric: str, /, **parameters: Parameter
    ) -> Series | None:
        """The series with exactly these parameters."""
        for each in self.series:
            if (each.case, each.subject, each.metric) == (case, subject, metric) and (
                each.parameters == parameters
            ):
                return each
        return None

    def note(self, text: str) -> None:
        """Keep a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def skip(self, subject: str, why: str) -> None:
        """Name what is not measured, once."""
        if (subject, why) not in self.skipped:
            self.skipped.append((subject, why))

    def to_json(self) -> dict[str, Any]:
        """As in the document."""
        return {
            "state": self.state,
            "begun": self.begun,
            "seconds": round(self.seconds, 3),
            "skipped": [{"subject": subject, "why": why} for subject, why in self.skipped],
            "left_out": [{"case": case, "why": why} for case, why in self.left_out],
            "notes": self.notes,
            "results": [series.to_json() for series in self.series],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read it again; the computed fields are computed again."""
        return cls(
            state=data["state"],
            begun=data["begun"],
            seconds=data["seconds"],
            skipped=[(each["subject"], each["why"]) for each in data["skipped"]],
            left_out=[(each["case"], each["why"]) for each in data["left_out"]],
            notes=list(data["notes"]),
            series=[
                Series(
                    case=each["case"],
                    subject=each["subject"],
                    metric=each["metric"],
                    unit=each["unit"],
                    parameters=dict(each["parameters"]),
                    values=list(each["values"]),
                )
                for each in data["results"]
            ],
        )


@dataclass(slots=True, kw_only=True)
class Report:
    """One run.

    Attributes:
        command: that made it.
        machine: what it ran on, by name.
        begun, ended: UTC, ISO 8601; ended is None while it runs.
        quick: small sizes, to see that it works: no figure of it means anything.
        repetitions: asked for.
        state: running, complete, interrupted or failed.
        suites: by name, in the order in which they ran.
    """

    command: str
    machine: dict[str, str]
    begun: str
    quick: bool
    repetitions: int
    ended: str | None = None
    state: str = RUNNING
    suites: dict[str, SuiteResults] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return {
            "schema": SCHEMA,
            "command": self.command,
            "machine": self.machine,
            "begun": self.begun,
            "ended": self.ended,
            "state": self.state,
            "quick": self.quick,
            "repetitions": self.repetitions,
            "suites": {name: suite.to_json() for name, suite in self.suites.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read it again.

        Raises:
            UsageError: another schema.
        """
        if data.get("schema") != SCHEMA:
            raise UsageError(
                f"results of schema {data.get('schema')!r}; this version reads {SCHEMA}",
                what="results",
            )
        return cls(
            command=data["command"],
            machine=dict(data["machine"]),
            begun=data["begun"],
            ended=data["ended"],
            state=data["state"],
            quick=data["quick"],
            repetitions=data["repetitions"],
            suites={name: SuiteResults.from_json(each) for name, each in data["suites"].items()},
        )

    def write(self, path: Path) -> None:
        """Put it on disk whole, or leave what was there."""
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        os.replace(beside, path)  # noqa: PTH105 - says that it replaces

    # ---- reading --------------------------------------------------------------------------

    def series(self, suite: str, case: str | None = None, **wanted: Parameter) -> Iterator[Series]:
        """Series of a suite whose parameters include those wanted; none if it did not run."""
        found = self.suites.get(suite)
        for each in found.series if found else ():
            if (case is None or each.case == case) and all(
                each.parameters.get(key) == value for key, value in wanted.items()
            ):
                yield each

    def median(
        self, suite: str, case: str, subject: str, metric: str, **wanted: Parameter
    ) -> float | None:
        """A median, or None where it was not measured."""
        for each in self.series(suite, case, **wanted):
            if each.subject == subject and each.metric == metric:
                return each.median
        return None


def read(path: Path) -> Report:
    """A report from its file."""
    return Report.from_json(json.loads(path.read_text()))
