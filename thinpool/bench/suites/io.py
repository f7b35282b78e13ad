"""fio through the engine and through what does the same or less.

Mapped: every block was written before. First write: 4 KiB each into a data block that has none yet,
at random; beside it one at a time, from four processes, and 128 KiB in order. Break sharing: the
same into blocks that are shared with an origin. No flush is asked for on either side. CPU time is
that of the whole host, fio's own included, which is the same for all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from thinpool.bench import fio
from thinpool.bench.context import in_turns
from thinpool.bench.fio import Job
from thinpool.bench.targets import (
    BLOCK,
    GIB,
    KIB,
    MIB,
    AgedThinpool,
    Kernel,
    Null,
    PlainLoop,
    Qemu,
    RawFile,
    Reflink,
    Target,
    Thinpool,
)
from thinpool.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from thinpool.bench.context import Context
    from thinpool.bench.workplace import Workplace

SEQUENTIAL: Final = 128 * KIB
QEMU_FORMATS: Final = ((64 * KIB, False), (128 * KIB, True), (2 * MIB, False))
"""Cluster sizes, and whether with subclusters, of which the faster one is measured."""


def run(context: Context) -> None:
    """Measure."""
    fio.check_fio()
    size = context.size(GIB, 16 * MIB)
    region = context.size(512 * MIB, 8 * MIB)
    long, short = context.size(0.8, 0.1), context.size(0.4, 0.1)
    with context.place.part("mapped") as place:
        devices = _mapped(context, place, size)
        for depth in (32, 1):
            for op in ("randread", "randwrite"):
                who = devices if op == "randread" else _without_backing(devices)
                _steady(context, who, Job(rw=op, depth=depth, seconds=long))
        _first(context, region)
        _steady(context, _without_backing(devices), *context.size(_rest(short), _rest(short)[::3]))


_BACKING: Final = f"{Qemu.name}, backing file"


def _without_backing(devices: dict[str, str]) -> dict[str, str]:
    return {name: device for name, device in devices.items() if name != _BACKING}


def _mapped(context: Context, place: Workplace, size: int) -> dict[str, str]:
    """Devices of one size whose blocks are all there, by subject."""
    makers: dict[str, Callable[[], str]] = {
        RawFile.name: lambda: RawFile(place).mapped(size),
        PlainLoop.name: lambda: PlainLoop(place).mapped(size),
        Null.name: lambda: Null(place).mapped(size),
        Thinpool.name: lambda: Thinpool(place, size=size + 64 * MIB).mapped(size),
        Kernel.name: lambda: Kernel(place, size=size + 64 * MIB).mapped(size),
        Qemu.name: lambda: Qemu(place).mapped(size),
        _BACKING: lambda: Qemu(place).shared(size),
        Reflink.name: lambda: Reflink(place, size=2 * size).mapped(size),
    }
    devices = {}
    for name, make in makers.items():
        context.say(f"{name}: {format_size(size)} written")
        device = context.try_peer(name, make)
        if device is not None:
            devices[name] = device
    return devices


def _rest(seconds: float) -> list[Job]:
    """Four jobs at once, and sequential I/O."""
    found = [
        Job(rw=op, depth=depth, jobs=4, seconds=seconds)
        for depth in (32, 1)
        for op in ("randread", "randwrite")
    ]
    return found + [
        Job(rw=op, block=SEQUENTIAL, depth=depth, jobs=jobs, seconds=seconds)
        for jobs in (1, 4)
        for depth in (32, 1)
        for op in ("read", "write")
    ]


def _steady(context: Context, devices: dict[str, str], *jobs: Job) -> None:
    """Jobs, one after another, on every device in turn."""
    turn = sum(job.seconds + 0.1 for job in jobs) + 0.5
    needs = len(devices) * context.options.repetitions * turn
    with context.case(f"mapped, {'; '.join(str(job) for job in jobs)}", needs=needs) as go:
        if not go:
            return
        for repetition, name in in_turns(list(devices), context.options.repetitions):
            for job, outcome in zip(
                jobs, fio.run(devices[name], *jobs, seed=repetition), strict=True
            ):
                _keep(context, "mapped", name, job, outcome)


def _first(context: Context, region: int) -> None:
    """First writes, and breaking sharing, each repetition on a new device."""
    jobs = _first_jobs(region)
    for case, kinds in (
        ("first write", (Thinpool, AgedThinpool, Kernel, Qemu, PlainLoop)),
        ("break sharing", (Thinpool, AgedThinpool, Kernel, Qemu, Reflink)),
    ):
        with (
            context.place.part("first") as place,
            context.case(f"{case}, {'; '.join(str(job) for job in jobs)}", needs=120) as go,
        ):
            if not go:
                continue
            targets = list(_new_targets(context, place, kinds, case, jobs))
            for repetition, target in in_turns(targets, context.options.repetitions):
                outcomes = _once(target, case, _those_for(target, jobs), seed=repetition)
                for job, outcome in zip(jobs, outcomes, strict=False):
                    _keep(context, case, target.name, job, outcome)


def _first_jobs(region: int) -> list[Job]:
    """Each in a part of the device of its own: the one that has marks, then the others."""
    eighth = region // 8
    first = Job(rw="randwrite", depth=32, count=region // BLOCK // 2, align=BLOCK, size=region)
    found = [first]
    for job in (
        Job(rw="randwrite", count=eighth // BLOCK // 2, align=BLOCK, size=eighth),
        Job(rw="randwrite", depth=32, jobs=4, count=eighth // BLOCK // 2, align=BLOCK, size=eighth),
        *(
            Job(
                rw="write",
                block=SEQUENTIAL,
                depth=depth,
                jobs=jobs,
                count=eighth // SEQUENTIAL // jobs,
                align=SEQUENTIAL,
                size=eighth // jobs,
            )
            for jobs in (1, 4)
            for depth in (32, 1)
        ),
    ):
        found.append(replace(job, offset=found[-1].end))
    return found


def _those_for(target: Target, jobs: list[Job]) -> list[Job]:
    """An aged pool takes long to make, and is made for the first job only."""
    return jobs[:1] if isinstance(target, AgedThinpool) else jobs


def _once(target: Target, case: str, jobs: list[Job], *, seed: int) -> list[fio.Outcome]:
    """On one new device; the first alone, so that its processors' time can be told."""
    size = jobs[-1].end
    device = target.unmapped(size) if case == "first write" else target.shared(size)
    outcomes = fio.run(device, jobs[0], seed=seed)
    if jobs[1:]:
        outcomes += fio.run(device, *jobs[1:], seed=seed)
    target.take_down()
    return outcomes


def _new_targets(
    context: Context,
    place: Workplace,
    kinds: Iterable[type[Target]],
    case: str,
    jobs: list[Job],
) -> Iterable[Target]:
    """What can give new devices, each having room for all repetitions."""
    room = (context.options.repetitions + 2) * jobs[-1].end
    for kind in kinds:

        def make(kind: type[Target] = kind) -> Target:
            if kind is Thinpool:
                return Thinpool(place, size=room)
            if kind is Kernel:
                return Kernel(place, size=room)
            if kind is AgedThinpool:
                return AgedThinpool(place, size=jobs[0].end)
            if kind is Reflink:
                return Reflink(place, size=room)
            if kind is Qemu:
                return _tuned(context, place, case, jobs[:1])
            return kind(place)

        context.say(f"{case}: making {kind.name} ready")
        target = context.try_peer(kind.name, make)
        if target is not None:
            yield target


def _tuned(context: Context, place: Workplace, case: str, jobs: list[Job]) -> Qemu:
    """qemu-storage-daemon with the format that is fastest here."""
    best: tuple[float, Qemu, str] | None = None
    for cluster, extended in context.size(QEMU_FORMATS, QEMU_FORMATS[:2]):
        target = Qemu(place, cluster=cluster, extended=extended)
        with place.part("trial") as trial:
            trying = Qemu(trial, cluster=cluster, extended=extended)
            found = _once(trying, case, jobs, seed=99)[0].iops
        name = f"{format_size(cluster)} clusters{' with subclusters' if extended else ''}"
        context.results.note(f"{case}, qcow2 with {name}, tried once: {found:.0f}/s")
        if best is None or found > best[0]:
            best = found, target, name
    if best is None:
        raise RuntimeError("no formats")
    context.results.note(f"{case}: qemu-storage-daemon was measured with {best[2]}")
    return best[1]


def _keep(context: Context, case: str, subject: str, job: Job, outcome: fio.Outcome) -> None:
    for metric, (unit, value) in outcome.metrics().items():
        context.results.add(case, subject, metric, unit, value, **job.parameters)
