"""The marks: what was promised, what a run found, and whether that is reached.

A mark is a ratio of medians of one run wherever it compares, so that it holds on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from thinpool.bench import figures
from thinpool.units import GIB, KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from thinpool.bench.results import Report

OURS: Final = "thinpool"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One mark in the light of a run.

    Attributes:
        what: is measured.
        mark: that is to be reached, as text.
        figure: that was found, as text; empty where it was not measured.
        reached: None where it was not measured, or there is nothing to reach.
    """

    what: str
    mark: str
    figure: str
    reached: bool | None

    @property
    def word(self) -> str:
        """For a table."""
        if not self.figure:
            return "not measured"
        return {True: "reached", False: "NOT REACHED", None: "shown"}[self.reached]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One bound.

    Attributes:
        what: is measured.
        find: the figure; None where it was not measured.
        least: the figure must be at least that; or
        most: at most that; with neither it is only shown.
        unit: of the figure; ``x`` for a ratio.
    """

    what: str
    find: Callable[[Report], float | None]
    least: float | None = None
    most: float | None = None
    unit: str = "x"

    def judge(self, report: Report) -> Verdict:
        """Look it up."""
        mark = ""
        if self.least is not None:
            mark = f"at least {self._text(self.least)}"
        elif self.most is not None:
            mark = f"at most {self._text(self.most)}"
        found = self.find(report)
        if found is None:
            return Verdict(what=self.what, mark=mark, figure="", reached=None)
        reached = None
        if self.least is not None:
            reached = found >= self.least
        elif self.most is not None:
            reached = found <= self.most
        return Verdict(what=self.what, mark=mark, figure=self._text(found), reached=reached)

    def _text(self, number: float) -> str:
        return figures.digits(number) if self.unit == "x" else figures.value(number, self.unit)


def ratio(above: float | None, below: float | None) -> float | None:
    """Of two figures that were both measured."""
    return None if above is None or not below else above / below


# ---- edits ----------------------------------------------------------------------------------

_EXT4: Final = "overlay2 on ext4"
_XFS: Final = "overlay2 on xfs (reflink)"
_BTRFS: Final = "btrfs snapshot"


def _edit(report: Report, subject: str, size: int, state: str = "cold") -> float | None:
    return report.median(
        "edits", "edit", subject, "durable", size=size, length=4 * KIB, places=1, state=state
    )


def _faster(peer: str, size: int, state: str = "cold") -> Callable[[Report], float | None]:
    """How many times faster than a peer."""
    return lambda report: ratio(_edit(report, peer, size, state), _edit(report, OURS, size, state))


def _growth(report: Report) -> float | None:
    return ratio(_edit(report, OURS, 4 * GIB), _edit(report, OURS, MIB))


def _break_even(report: Report) -> float | None:
    """The most edited places of a GiB at which we are still faster than a whole copy."""
    last = None
    for series in report.series("edits", "edit", size=GIB, length=4 * KIB, state="cold"):
        places = int(series.parameters["places"])
        if series.subject != OURS or series.metric != "durable" or "share" in series.parameters:
            continue
        peer = report.median(
            "edits", "edit", _EXT4, "durable", size=GIB, length=4 * KIB, places=places, state="cold"
        )
        if peer is not None and series.median <= peer:
            last = max(last or 0, places)
    return last


# ---- io -------------------------------------------------------------------------------------

_NULL: Final = "null target"
_LOOP: Final = "loop on a raw file"
_QEMU: Final = "qemu-storage-daemon"
_AGED: Final = "thinpool, pool 90 % full"


def _io_ratio(
    peer: str,
    op: str,
    *,
    metric: str = "iops",
    depth: int = 32,
    case: str = "mapped",
    ours: str = OURS,
) -> Callable[[Report], float | None]:
    def find(report: Report) -> float | None:
        mine, others = (
            report.median("io", case, who, metric, op=op, block=4 * KIB, depth=depth, jobs=1)
            for who in (ours, peer)
        )
        return ratio(mine, others)

    return find


# ---- the other suites -------------------------------------------------------------------------

_STEPS: Final = ("append", "create", "delete")


def _small_files(step: str) -> Callable[[Report], float | None]:
    """Our speed over overlay2's on ext4."""
    return lambda report: ratio(
        report.median("small-files", step, _EXT4, "durable"),
        report.median("small-files", step, OURS, "durable"),
    )


def _create(how: str, snapshots: int = 10) -> Callable[[Report], float | None]:
    return lambda report: report.median(
        "snapshots", "create", OURS, "time", how=how, snapshots=snapshots
    )


def _many_snapshots(how: str) -> Callable[[Report], float | None]:
    return lambda report: ratio(_create(how, 100_000)(report), _create(how, 10)(report))


def _against_processes(report: Report) -> float | None:
    others = report.median("snapshots", "create", "four dmsetup processes", "time", snapshots=10)
    return ratio(others, _create("API, durable")(report))


def _at_once(report: Report) -> float | None:
    """The faster of the two ways that there are."""
    found = [
        series.median
        for series in report.series("snapshots", "100 at once")
        if series.subject.startswith(OURS) and series.metric == "create to mount"
    ]
    return min(found, default=None)


def _allocate(
    full: int, *, want: int = 1, layout: str | None = None
) -> Callable[[Report], float | None]:
    """A block, seconds, in the worse layout where none is named."""

    def find(report: Report) -> float | None:
        found = [
            series.median
            for series in report.series("core", "allocate", full=full, want=want)
            if series.subject == OURS
            and series.metric == "a block"
            and layout in {None, series.parameters["layout"]}
        ]
        return max(found, default=None)

    return find


def _run_length(report: Report) -> float | None:
    return report.median("core", "allocate", OURS, "got", layout="fragmented", full=50, want=64)


def _crc(name: str) -> Callable[[Report], float | None]:
    return lambda report: report.median("core", "crc32c", f"thinpool, {name}", "rate")


def _lookup(name: str) -> Callable[[Report], float | None]:
    return lambda report: report.median("core", "lookup", name, "rate")


def _checker(case: str, **parameters: str | int) -> Callable[[Report], float | None]:
    """How many times faster than the tool that does the same."""

    def find(report: Report) -> float | None:
        theirs = [
            series.median
            for series in report.series("metadata", case, **parameters)
            if series.metric == "time" and series.subject.startswith("thin_")
        ]
        mine = report.median("metadata", case, OURS, "time", **parameters)
        return ratio(theirs[0], mine) if theirs else None

    return find


def _server(case: str, metric: str, **parameters: str) -> Callable[[Report], float | None]:
    return lambda report: report.median("server", case, OURS, metric, **parameters)


MARKS: Final = (
    Mark(
        what="4 KiB edit, 1 GiB: faster than overlay2 on ext4", find=_faster(_EXT4, GIB), least=100
    ),
    Mark(
        what="4 KiB edit, 4 GiB: faster than overlay2 on ext4",
        find=_faster(_EXT4, 4 * GIB),
        least=400,
    ),
    Mark(what="4 KiB edit: time for 4 GiB over time for 1 MiB", find=_growth, most=1.2),
    Mark(
        what="4 KiB edit, 1 GiB: speed over overlay2 on xfs with reflink",
        find=_faster(_XFS, GIB),
        least=0.4,
    ),
    Mark(what="4 KiB edit, 1 GiB: speed over btrfs", find=_faster(_BTRFS, GIB), least=0.6),
    Mark(
        what="4 KiB edit, 1 GiB, warm: speed over overlay2 on xfs with reflink",
        find=_faster(_XFS, GIB, "warm"),
    ),
    Mark(what="4 KiB edit, 1 GiB, warm: speed over btrfs", find=_faster(_BTRFS, GIB, "warm")),
    Mark(
        what="places edited in 1 GiB up to which we beat overlay2 on ext4",
        find=_break_even,
        unit="",
    ),
    *(
        Mark(
            what=f"{op} 4 KiB, depth 32: over the null target", find=_io_ratio(_NULL, op), least=0.9
        )
        for op in ("randread", "randwrite")
    ),
    Mark(
        what="randread 4 KiB, depth 32: over a plain loop device",
        find=_io_ratio(_LOOP, "randread"),
        least=0.7,
    ),
    Mark(
        what="randwrite 4 KiB, depth 32: over a plain loop device (stretch 0.70)",
        find=_io_ratio(_LOOP, "randwrite"),
        least=0.55,
    ),
    Mark(
        what="randread 4 KiB, depth 32: over qemu-storage-daemon",
        find=_io_ratio(_QEMU, "randread"),
        least=1.5,
    ),
    Mark(
        what="randwrite 4 KiB, depth 32: over qemu-storage-daemon",
        find=_io_ratio(_QEMU, "randwrite"),
        least=2,
    ),
    Mark(
        what="randread 4 KiB, depth 1: latency over qemu-storage-daemon's",
        find=_io_ratio(_QEMU, "randread", metric="mean", depth=1),
        most=0.6,
    ),
    Mark(
        what="randwrite 4 KiB, depth 1: latency over qemu-storage-daemon's",
        find=_io_ratio(_QEMU, "randwrite", metric="mean", depth=1),
        most=0.8,
    ),
    *(
        Mark(
            what=f"{case}, 4 KiB, depth 32{', pool 90 % full' if ours == _AGED else ''}: "
            "over qemu-storage-daemon",
            find=_io_ratio(_QEMU, "randwrite", case=case, ours=ours),
            least=2,
        )
        for case in ("first write", "break sharing")
        for ours in (OURS, _AGED)
    ),
    *(
        Mark(
            what=f"10,000 small files, {step}: speed over overlay2 on ext4",
            find=_small_files(step),
            least=0.8,
        )
        for step in _STEPS
    ),
    Mark(
        what="host flushes for a flush where nothing was mapped",
        find=_server("flush", "host flushes", what="nothing mapped"),
        most=1,
        unit="",
    ),
    Mark(
        what="host flushes for a commit",
        find=_server("flush", "host flushes", what="a commit"),
        most=3,
        unit="",
    ),
    Mark(
        what="host flushes for 8 who wait for one commit at once",
        find=_server("flush", "host flushes", what="8 who wait for one commit"),
        unit="",
    ),
    Mark(
        what="snapshot create, in the transaction",
        find=_create("in the transaction"),
        most=100e-6,
        unit="s",
    ),
    *(
        Mark(what=f"snapshot create, {how}", find=_create(how), unit="s")
        for how in (
            "engine, durable",
            "API, durable",
            "command line, durable",
            "engine, 100 in one commit",
        )
    ),
    *(
        Mark(
            what=f"snapshot create, {how}: with 100,000 in the pool over with 10",
            find=_many_snapshots(how),
            most=1.5,
        )
        for how in ("in the transaction", "engine, durable", "API, durable")
    ),
    Mark(
        what="snapshot create, API, durable: faster than four dmsetup processes",
        find=_against_processes,
        least=5,
    ),
    Mark(what="100 at once: create, activate and mount", find=_at_once, most=0.3, unit="s"),
    Mark(what="allocate one block, 50 % full", find=_allocate(50), most=3e-9, unit="s"),
    Mark(what="allocate one block, 99 % full", find=_allocate(99), most=12e-9, unit="s"),
    Mark(
        what="allocate runs of 64 in long stretches, 50 % full: a block",
        find=_allocate(50, want=64, layout="stretches"),
        most=1e-9,
        unit="s",
    ),
    Mark(
        what="allocate runs of 64 in fragments, 50 % full: blocks got",
        find=_run_length,
        unit="blocks",
    ),
    Mark(what="CRC-32C of 4 KiB, SSE4.2", find=_crc("sse4.2"), least=15, unit="GB/s"),
    Mark(what="CRC-32C of 4 KiB, AVX-512", find=_crc("avx512"), least=40, unit="GB/s"),
    Mark(
        what="mapping lookups, random, from the cache",
        find=_lookup("thinpool's cache"),
        least=15e6,
        unit="1/s",
    ),
    Mark(
        what="mapping lookups, random, in the btree",
        find=_lookup("thinpool's btree"),
        unit="1/s",
    ),
    Mark(
        what="check of 4 million mappings: faster than thin_check",
        find=_checker("check", mappings=4_000_000),
        least=20,
    ),
    Mark(
        what="check of 4 million mappings: memory above the interpreter",
        find=lambda report: report.median("metadata", "check", OURS, "memory", mappings=4_000_000),
        most=64 * MIB,
        unit="bytes",
    ),
    *(
        Mark(
            what=f"delta at 1 % ({kind}) of a million: faster than thin_delta",
            find=_checker("delta", mappings=1_000_000, changed=kind),
            least=100 if kind == "clustered" else None,
        )
        for kind in (
            "clustered",
            "scattered",
            "in one stretch",
            "in ten stretches",
            "in stretches of ten blocks",
        )
    ),
    Mark(
        what="removing 20 volumes of 1 GiB: blocks allocatable again",
        find=_server("removal", "allocatable"),
        most=0.4,
        unit="s",
    ),
    Mark(
        what="removing 20 volumes of 1 GiB: mapped",
        find=_server("removal", "mapped"),
        unit="bytes",
    ),
    Mark(
        what="removing 20 volumes of 1 GiB: space returned to the host",
        find=_server("removal", "return rate"),
        unit="bytes/s",
    ),
    Mark(
        what="the server at rest, 100 volumes active: memory",
        find=_server("at rest", "memory"),
        most=64 * MIB,
        unit="bytes",
    ),
    Mark(
        what="the server at rest, 100 volumes active: wake-ups a second",
        find=_server("at rest", "wake-ups"),
        most=0,
        unit="1/s",
    ),
)


def judge(report: Report) -> list[Verdict]:
    """Every mark, in order; of a quick run nothing is reached or missed."""
    verdicts = [mark.judge(report) for mark in MARKS]
    return [replace(each, reached=None) for each in verdicts] if report.quick else verdicts
