"""Edit 4 KiB, with fsync, of a small and a large file of an image, first touched by containers.

    python tools/bench_edit.py --root DIR [--repetitions 9] [--large 1G]

Makes a pool in DIR, an image with a file of 1 MiB and one of the large size, and for each
repetition two new containers, one for each file, in alternating order. Printed are the median
times until fsync returned, and the bytes that the edit added to the pool. The containers' start is
not measured, and neither file is in the page cache. Needs root.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path

from thinpool import Thinpool
from thinpool.units import parse_size

MIB = 1 << 20
SMALL = MIB


def write_random(path: Path, size: int) -> None:
    """A file of incompressible bytes."""
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())


def edit(path: Path) -> float:
    """Milliseconds until 4 KiB in the middle are durable."""
    offset = path.stat().st_size // 2
    data = os.urandom(4096)
    began = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, data, offset)
    os.fsync(descriptor)
    os.close(descriptor)
    return (time.perf_counter() - began) * 1000


def measure(api: Thinpool, name: str, mount: Path, which: str) -> tuple[float, int]:
    """Time, and bytes added, in a container of its own."""
    api.snapshot("bench/image", f"bench/{name}", mount=mount)
    (mount / which).stat()
    os.sync()
    before = api.status("bench").data.used
    took = edit(mount / which)
    added = api.status("bench").data.used - before
    api.umount(f"bench/{name}")
    api.remove([f"bench/{name}"])
    return took, added


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--large", default="1G")
    arguments = parser.parse_args()
    large = parse_size(arguments.large)
    mount = arguments.root / "mnt"
    mount.mkdir(parents=True)
    with Thinpool(arguments.root / "root", timeout=120) as api:
        api.create_pool("bench", size=4 * large + (1 << 30), base_size=2 * large + 512 * MIB)
        try:
            api.snapshot("bench/base", "bench/build", mount=mount)
            write_random(mount / "small", SMALL)
            write_random(mount / "large", large)
            api.umount("bench/build")
            api.commit("bench/build", "bench/image")
            results: dict[str, list[tuple[float, int]]] = {"small": [], "large": []}
            for i in range(arguments.repetitions):
                for which in ("small", "large") if i % 2 else ("large", "small"):
                    results[which].append(measure(api, f"{which}{i}", mount, which))
            for which, size in (("small", SMALL), ("large", large)):
                times = [took for took, _ in results[which]]
                added = statistics.median(added for _, added in results[which])
                print(
                    f"{size // MIB:>6} MiB: median {statistics.median(times):7.2f} ms "
                    f"({min(times):.2f} to {max(times):.2f}), {added / 1024:.0f} KiB added"
                )
            medians = [statistics.median(t for t, _ in results[w]) for w in ("large", "small")]
            print(f"large/small: {medians[0] / medians[1]:.2f}")
        finally:
            for volume in api.list("bench"):
                if volume.mounts:
                    api.umount(str(volume))
            api.remove_pool("bench")
    shutil.rmtree(arguments.root)


if __name__ == "__main__":
    main()
