"""fio: what it is asked, and what its answer means."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinpool.errors import ThinpoolError, UnsupportedHostError
from thinpool.host.programs import find_program

if TYPE_CHECKING:
    from thinpool.bench.results import Parameter

_CPU_FIELDS_BUSY = (0, 1, 2, 5, 6)
"""user, nice, system, irq and softirq of /proc/stat's first line (proc(5)), in ticks of 10 ms."""
_TICKS_A_SECOND = 100
_RAMP_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is done to a device, with direct I/O through libaio.

    Attributes:
        rw: randread, randwrite, read or write.
        block: bytes of each request.
        depth: requests at once of each job.
        jobs: processes.
        seconds: for so long; or
        count: so many requests of a job, each at a multiple of ``align`` that was not used before.
        align: bytes.
        offset: where in the device the part begins that is used.
        size: of that part, bytes for each process, one part behind the other; 0 for all of the
            device.
    """

    rw: str
    block: int = 4096
    depth: int = 1
    jobs: int = 1
    seconds: float = 1.0
    count: int = 0
    align: int = 0
    offset: int = 0
    size: int = 0

    @property
    def end(self) -> int:
        """Behind the last part, bytes."""
        return self.offset + self.jobs * self.size

    @property
    def parameters(self) -> dict[str, Parameter]:
        """What tells its series from others."""
        return {"op": self.rw, "block": self.block, "depth": self.depth, "jobs": self.jobs}

    def __str__(self) -> str:
        """In a few words."""
        jobs = f", {self.jobs} jobs" if self.jobs > 1 else ""
        return f"{self.rw} {self.block // 1024} KiB, depth {self.depth}{jobs}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it.

    Attributes:
        iops: requests a second, all jobs.
        mean, p50, p99, p999: seconds from submission to completion.
        cpu: seconds of the whole host's processors a request: fio, the kernel and all servers;
            None where jobs ran one after another and it cannot be told whose they were.
    """

    iops: float
    mean: float
    p50: float
    p99: float
    p999: float
    cpu: float | None

    def metrics(self) -> dict[str, tuple[str, float]]:
        """By name, with units."""
        found = {
            "iops": ("1/s", self.iops),
            "mean": ("s", self.mean),
            "p50": ("s", self.p50),
            "p99": ("s", self.p99),
            "p99.9": ("s", self.p999),
        }
        return found if self.cpu is None else {**found, "cpu": ("s", self.cpu)}


def check_fio() -> str:
    """The program's path.

    Raises:
        UnsupportedHostError: it is not installed.
    """
    path = find_program("fio")
    if path is None:
        raise UnsupportedHostError(
            "fio is not installed; on Debian, the package fio brings it", missing="fio"
        )
    return path


def run(device: str, *jobs: Job, seed: int) -> list[Outcome]:
    """Run jobs one after another on a device or file that exists.

    Raises:
        ThinpoolError: fio failed, or did another number of requests than it was asked for.
    """
    command = [
        check_fio(),
        f"--filename={device}",
        "--ioengine=libaio",
        "--direct=1",
        "--disk_util=0",
        "--group_reporting",
        f"--randseed={seed + 1}",
        "--percentile_list=50:99:99.9",
        "--output-format=json",
    ]
    for number, job in enumerate(jobs):
        command += [f"--name=job{number}", "--stonewall", *_options(job)]
    before = busy_seconds()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd="/",
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    busy = busy_seconds() - before
    if done.returncode:
        raise ThinpoolError(f"fio on {device} failed: {' '.join(done.stderr.split())[:300]}")
    found = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    if len(found) != len(jobs):
        raise ThinpoolError(f"fio on {device} reported {len(found)} jobs of {len(jobs)}")
    return [
        _outcome(device, job, each, busy=busy if len(jobs) == 1 else None)
        for job, each in zip(jobs, found, strict=True)
    ]


def _options(job: Job) -> list[str]:
    options = [
        f"--rw={job.rw}",
        f"--bs={job.block}",
        f"--iodepth={job.depth}",
        f"--numjobs={job.jobs}",
    ]
    if job.size:
        options += [f"--offset={job.offset}", f"--size={job.size}"]
        if job.jobs > 1:
            options.append(f"--offset_increment={job.size}")
    if job.count:
        return [*options, f"--number_ios={job.count}", f"--blockalign={job.align}"]
    return [
        *options,
        "--norandommap",
        "--time_based",
        f"--runtime={job.seconds * 1000:.0f}ms",
        f"--ramp_time={_RAMP_SECONDS * 1000:.0f}ms",
    ]


def _outcome(device: str, job: Job, found: dict[str, Any], *, busy: float | None) -> Outcome:
    side = found["read" if "read" in job.rw else "write"]
    ios = int(side["total_ios"])
    if job.count and ios != job.count * job.jobs:
        raise ThinpoolError(f"fio on {device} did {ios} requests in place of {job.count}")
    # Of a ramp only the rest is counted, but its work was done too.
    share = 1 + (0 if job.count else _RAMP_SECONDS / job.seconds)
    percentiles = side["clat_ns"]["percentile"]
    return Outcome(
        iops=side["iops"],
        mean=side["clat_ns"]["mean"] / 1e9,
        p50=percentiles["50.000000"] / 1e9,
        p99=percentiles["99.000000"] / 1e9,
        p999=percentiles["99.900000"] / 1e9,
        cpu=None if busy is None else busy / max(1, ios * share),
    )


def busy_seconds() -> float:
    """Seconds that the host's processors worked since it booted."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(fields[index]) for index in _CPU_FIELDS_BUSY) / _TICKS_A_SECOND
