"""check and delta against thin_check and thin_delta on the same metadata.

Ours is the API call in a process that has imported it; theirs is the process. Both read past the
page cache. thin_check 0.9 checks no counts of data blocks, ours does, and names each fault.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from thinpool.bench import programs
from thinpool.bench.context import in_turns
from thinpool.bench.workplace import drop_caches
from thinpool.errors import ThinpoolError, UnsupportedHostError
from thinpool.host.programs import find_program, run_program

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from thinpool.bench.context import Context

DEVICES: Final = 8
THREADS: Final = 2
OURS: Final = "thinpool"
CHANGED: Final = {
    "clustered": "clustered",
    "scattered": "scattered",
    "in one stretch": "stretches-{all}",
    "in ten stretches": "stretches-{tenth}",
    "in stretches of ten blocks": "stretches-10",
}
"""What the 1 % are called, and what the program that makes them calls it."""
_CALLS: Final = 3
"""In one process, of which the middle one counts: none finds a page of another in memory."""
_SECONDS: Final = 300

# Prints seconds of each call, and bytes of memory at its highest above what was there before.
# 5 to clear_refs forgets the peak so far (proc(5)): that of the parent, before it was replaced.
_CHILD: Final = """
import json, re, sys, time
from thinpool.check import check_metadata, delta
from thinpool.engine import BlockDevice
what, path, times, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def memory(name):
    with open("/proc/self/status") as file:
        return int(re.search(name + r":\\s+(\\d+)", file.read())[1]) * 1024
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before, took, found = memory("VmRSS"), [], 0
for _ in range(times):
    begun = time.perf_counter()
    with BlockDevice.open_file(path, read_only=True, direct=True) as device:
        if what == "check":
            report = check_metadata(device, threads=threads)
            found = report.mappings if report.clean else -1
        else:
            found = sum(each.length for each in delta(device, 1, 2, threads=threads))
    took.append(time.perf_counter() - begun)
json.dump({"took": took, "memory": memory("VmHWM") - before, "found": found}, sys.stdout)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One side.

    Attributes:
        name: of it.
        run: seconds, and bytes of memory above what was there before; checks what it found.
    """

    name: str
    run: Callable[[], tuple[float, float]]


def run(context: Context) -> None:
    """Measure."""
    mappings = context.size(4_000_000, 40_000)
    million = context.size(1_000_000, 20_000)
    with context.case(f"check of {mappings} mappings in {DEVICES} devices", needs=40) as go:
        if go:
            path = _made(context, "fragmented", DEVICES, mappings)
            if path is not None:
                subjects = [
                    _ours("check", path, mappings),
                    _theirs(context, "thin_check", [str(path)], path),
                ]
                _measure(context, "check", subjects, mappings=mappings, devices=DEVICES)
    for changed, kind in CHANGED.items():
        with context.case(f"delta of {million} mappings, 1 % {changed}", needs=12) as go:
            if go:
                path = _made(
                    context,
                    kind.format(all=million // 100, tenth=million // 1000),
                    million,
                    million // 100,
                )
                if path is not None:
                    arguments = ["--thin1", "1", "--thin2", "2", str(path)]
                    subjects = [
                        _ours("delta", path, million // 100),
                        _theirs(context, "thin_delta", arguments, path),
                    ]
                    _measure(context, "delta", subjects, mappings=million, changed=changed)
    context.results.note(
        f"check and delta: {THREADS} threads, O_DIRECT on both sides, the host's caches dropped "
        "before each; thin_check 0.9 checks no counts of data blocks, ours does"
    )
    context.results.note(
        "delta: the 1 % lie in stretches of 100 blocks (clustered), one by one (scattered), where "
        "hardly a subtree is shared, or as it says"
    )


def _made(context: Context, *arguments: str | int) -> Path | None:
    """Metadata of that kind, judged by thin_check where there is one."""
    path = context.place.folder / "-".join(str(each) for each in arguments)

    def make() -> Path:
        programs.run("bench_metadata", str(path), *(str(each) for each in arguments))
        if find_program("thin_check") is not None:
            run_program("thin_check", ["-q", str(path)], package="thin-provisioning-tools")
        return path

    return context.try_peer("thinpool: metadata to measure with", make)


def _measure(
    context: Context, case: str, subjects: list[Subject | None], **parameters: int | str
) -> None:
    there = [subject for subject in subjects if subject is not None]
    for _, subject in in_turns(there, context.options.repetitions):
        took, memory = subject.run()
        context.results.add(case, subject.name, "time", "s", took, **parameters)
        context.results.add(case, subject.name, "memory", "bytes", memory, **parameters)


def _ours(what: str, path: Path, expected: int) -> Subject:
    def run() -> tuple[float, float]:
        _forget(path)
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD, what, str(path), str(_CALLS), str(THREADS)],
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
        if done.returncode:
            raise ThinpoolError(f"{what} failed: {done.stderr.strip()[-300:]}")
        answer = json.loads(done.stdout)
        if answer["found"] != expected:
            raise ThinpoolError(f"{what} found {answer['found']} in place of {expected}")
        return statistics.median(answer["took"]), float(answer["memory"])

    return Subject(name=OURS, run=run)


def _theirs(context: Context, program: str, arguments: list[str], path: Path) -> Subject | None:
    def make() -> Subject:
        found = find_program(program)
        if found is None:
            raise UnsupportedHostError(
                f"{program} is not installed; on Debian, the package thin-provisioning-tools "
                "brings it",
                missing=program,
            )
        version = run_program(program, ["-V"], package="thin-provisioning-tools").split()[0]

        def run() -> tuple[float, float]:
            _forget(path)
            begun = time.perf_counter()
            child = subprocess.Popen(
                [found, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                _, status, usage = os.wait4(child.pid, 0)
            except BaseException:
                child.kill()
                child.wait()
                raise
            child.returncode = os.waitstatus_to_exitcode(status)
            took = time.perf_counter() - begun
            if child.returncode:
                raise ThinpoolError(f"{program} failed ({child.returncode})")
            return took, usage.ru_maxrss * 1024.0

        return Subject(name=f"{program} {version}", run=run)

    return context.try_peer(program, make)


def _forget(path: Path) -> None:
    """Let no page of it stay in memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if os.geteuid() == 0:
        drop_caches()
