"""The marks: what was promised, what a run found, and whether that is reached.

A mark is a ratio of medians of one run wherever it compares, so that it holds on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
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


def _edit(report: Report, subject: str, size: int) -> float | None:
    return report.median(
        "edits", "edit", subject, "durable", size=size, length=4 * KIB, places=1, state="cold"
    )


def _faster(peer: str, size: int) -> Callable[[Report], float | None]:
    """How many times faster than a peer."""
    return lambda report: ratio(_edit(report, peer, size), _edit(report, OURS, size))


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
)


def judge(report: Report) -> list[Verdict]:
    """Every mark, in order."""
    return [mark.judge(report) for mark in MARKS]
