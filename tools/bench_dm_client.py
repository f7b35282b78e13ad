"""Compare our device-mapper client with one dmsetup process a step, on the kernel that runs.

    python tools/bench_dm_client.py --metadata /dev/vda --data /dev/vdb [--repetitions 30]

Both devices are overwritten. One volume is snapshotted, the snapshot activated, deactivated and
deleted; by turns by our client and by dmsetup, in one run on one pool. Our side is measured within
this process, as its users are: programs that stay. Starting Python is not in it. Each side waits
for udevd where that runs. Printed are medians, spreads, the medians of each step, and the ratio;
the exit status is 1 when ours takes more than a fifth of dmsetup's time. Needs root.

Where udevd runs, most of the time on both sides is its own, of which two processes an activation
are a cookie's. With our udev rules we need none; --cookies uses them all the same.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from thinpool.dm import (
    UUID_PREFIX,
    DeviceMapper,
    ThinPool,
    ThinPoolTarget,
    ThinTarget,
    UdevMode,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MARK = 0.2
DMSETUP = shutil.which("dmsetup") or "/sbin/dmsetup"
SECTOR = 512
BLOCK_SECTORS = 128
VOLUME_SECTORS = 1 << 21
POOL = "thinpool-bench"
SNAPSHOT = "thinpool-bench-snapshot"
ORIGIN_ID, SNAPSHOT_ID = 0, 1

Steps = dict[str, "Callable[[], object]"]


def dmsetup(*arguments: str) -> None:
    """One process, as a script would start it."""
    subprocess.run([DMSETUP, *arguments], check=True, stdout=subprocess.DEVNULL)


def steps_of_ours(dm: DeviceMapper, pool_path: str) -> Steps:
    """The sequence by our client."""
    pool = ThinPool(dm, POOL)
    thin = ThinTarget(length=VOLUME_SECTORS, pool=pool_path, id=SNAPSHOT_ID)
    return {
        "snapshot": lambda: pool.create_snap(SNAPSHOT_ID, origin=ORIGIN_ID),
        "activate": lambda: dm.activate(SNAPSHOT, [thin], uuid=UUID_PREFIX + SNAPSHOT),
        "deactivate": lambda: dm.remove(SNAPSHOT),
        "delete": lambda: pool.delete(SNAPSHOT_ID),
    }


def steps_of_dmsetup(pool_path: str) -> Steps:
    """The same by dmsetup."""
    table = f"0 {VOLUME_SECTORS} thin {pool_path} {SNAPSHOT_ID}"
    uuid = UUID_PREFIX + SNAPSHOT
    return {
        "snapshot": lambda: dmsetup("message", POOL, "0", f"create_snap {SNAPSHOT_ID} {ORIGIN_ID}"),
        "activate": lambda: dmsetup("create", SNAPSHOT, "--uuid", uuid, "--table", table),
        "deactivate": lambda: dmsetup("remove", SNAPSHOT),
        "delete": lambda: dmsetup("message", POOL, "0", f"delete {SNAPSHOT_ID}"),
    }


def measure(steps: Steps) -> list[float]:
    """Seconds of each step, once through; the device is there between activate and deactivate."""
    taken = []
    for name, step in steps.items():
        began = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began)
        if name == "activate" and not Path(f"/dev/mapper/{SNAPSHOT}").is_block_device():
            raise SystemExit(f"/dev/mapper/{SNAPSHOT} is not there after activation")
    return taken


def report(label: str, runs: Sequence[Sequence[float]], names: Sequence[str]) -> float:
    """Print one side's line; its median of the whole, seconds."""
    totals = sorted(sum(run) for run in runs)
    median = statistics.median(totals)
    steps = ", ".join(
        f"{name} {statistics.median(run[i] for run in runs) * 1e3:.2f}"
        for i, name in enumerate(names)
    )
    spread = f"{totals[0] * 1e3:.1f} to {totals[-1] * 1e3:.1f}"
    print(f"{label:8} {median * 1e3:8.2f} ms  ({spread}; {steps})")
    return median


def sectors_of(device: str) -> int:
    """Of a block device."""
    with Path(device).open("rb") as file:
        return file.seek(0, os.SEEK_END) // SECTOR


def run(dm: DeviceMapper, pool_path: str, repetitions: int, *, profile: bool) -> int:
    """Measure by turns; 0 where the mark is met."""
    sides = {"ours": steps_of_ours(dm, pool_path), "dmsetup": steps_of_dmsetup(pool_path)}
    runs: dict[str, list[list[float]]] = {name: [] for name in sides}
    for steps in sides.values():  # modules, caches and pages are not what is compared
        measure(steps)
    for _ in range(repetitions):
        for name, steps in sides.items():
            runs[name].append(measure(steps))
    if profile:
        profiler = cProfile.Profile()
        profiler.runcall(lambda: [measure(sides["ours"]) for _ in range(repetitions)])
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    names = list(sides["ours"])
    print(f"{os.uname().release}, udev: {dm.udev_mode.value}, {repetitions} repetitions, medians")
    medians = [report(label, runs[label], names) for label in sides]
    ratio = medians[0] / medians[1]
    print(f"ratio    {ratio:8.3f}     (mark: at most {MARK})")
    return 0 if ratio <= MARK else 1


def main() -> int:
    """Make the pool, measure, take it down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--metadata", required=True, help="a block device; overwritten")
    parser.add_argument("--data", required=True, help="a block device; overwritten")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--cookies", action="store_true", help="wait for udev by its cookies")
    parser.add_argument("--profile", action="store_true", help="show where our time goes")
    options = parser.parse_args()
    with Path(options.metadata).open("r+b") as file:
        file.write(bytes(4096))  # no superblock: the kernel makes a new pool
    target = ThinPoolTarget(
        length=sectors_of(options.data),
        metadata=options.metadata,
        data=options.data,
        block_sectors=BLOCK_SECTORS,
    )
    mode = UdevMode.COOKIES if options.cookies else None
    with DeviceMapper(udev_mode=mode) as dm:
        pool = dm.activate(POOL, [target], uuid=UUID_PREFIX + POOL)
        try:
            ThinPool(dm, POOL).create_thin(ORIGIN_ID)
            return run(dm, pool.path, options.repetitions, profile=options.profile)
        finally:
            if dm.find(SNAPSHOT) is not None:
                dm.remove(SNAPSHOT)
            dm.remove(POOL)


if __name__ == "__main__":
    sys.exit(main())
