"""Measure 4 KiB random I/O at depth 32 through FUSE and loop: plain loop, null target, thinpool.

    python tools/bench_fuse.py --directory DIR [--repetitions 5] [--seconds 4] [--size 1G]

Each target is a loop device with direct I/O over a file of the same size on the same disk: a raw
file (plain), the same through the FUSE server without a mapping layer (null), and a volume of a
pool whose blocks are all mapped (thinpool). The targets take turns within each repetition. Printed
are medians, their spread, and the ratios that the marks are about. Needs root and fio.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from thinpool.host import loop
from thinpool.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

TOOLS = Path(__file__).resolve().parent
MARKS = [("null", "plain", 0.55, 0.55), ("thinpool", "null", 0.80, 0.80),
         ("thinpool", "plain", 0.70, 0.55)]  # fmt: skip


def fill(path: Path, size: int) -> None:
    """A file whose every block is written: no unwritten extents, no holes, nothing cached."""
    chunk = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(chunk)
        os.fsync(file.fileno())
        # Pages that stay would make direct writes slower, and of the plain file only.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def served(folder: Path, *arguments: str) -> Iterator[str]:
    """The path of a file that tools/null_target.py serves."""
    mount_point = folder / "mount"
    mount_point.mkdir(parents=True)
    child = subprocess.Popen(
        [sys.executable, str(TOOLS / "null_target.py"), *arguments, str(mount_point)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None  # noqa: S101 - it is a pipe
    try:
        if child.stdout.readline() != "ready\n":
            raise SystemExit("the server did not start")
        yield str(mount_point / "id-1")
    finally:
        child.terminate()
        child.wait()
        child.stdout.close()


@contextlib.contextmanager
def attached(path: str) -> Iterator[str]:
    """A loop device with direct I/O over a file."""
    device = loop.attach(path)
    try:
        yield device.path
    finally:
        loop.detach(device)


def run_fio(device: str, rw: str, *, seconds: float, depth: int, block: str) -> dict[str, float]:
    """IOPS and latencies in microseconds."""
    fio = shutil.which("fio")
    if fio is None:
        raise SystemExit("fio is missing")
    result = subprocess.run(
        [fio, "--name=x", f"--filename={device}", f"--rw={rw}", f"--bs={block}", "--direct=1",
         f"--iodepth={depth}", "--ioengine=libaio", "--time_based", f"--runtime={seconds}",
         "--ramp_time=0.5", "--norandommap", "--randseed=1", "--output-format=json"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    job = json.loads(result.stdout)["jobs"][0]["read" if "read" in rw else "write"]
    percentiles = job["clat_ns"]["percentile"]
    return {
        "iops": job["iops"],
        "mean_us": job["clat_ns"]["mean"] / 1000,
        "p99_us": percentiles["99.000000"] / 1000,
        "p99.9_us": percentiles["99.900000"] / 1000,
    }


def report(results: dict[tuple[str, str], list[dict[str, float]]], targets: list[str]) -> None:
    """A table, then ratios against the marks."""
    medians: dict[tuple[str, str], float] = {}
    print(f"{'target':<10}{'op':<11}{'median/s':>10}{'min':>10}{'max':>10}{'p99 us':>9}")
    for (target, rw), runs in results.items():
        iops = [run["iops"] for run in runs]
        medians[target, rw] = statistics.median(iops)
        p99 = statistics.median(run["p99_us"] for run in runs)
        print(
            f"{target:<10}{rw:<11}{medians[target, rw]:>10.0f}{min(iops):>10.0f}"
            f"{max(iops):>10.0f}{p99:>9.0f}"
        )
    for target, against, read_mark, write_mark in MARKS:
        for rw, mark in (("randread", read_mark), ("randwrite", write_mark)):
            if target in targets and against in targets and (target, rw) in medians:
                ratio = medians[target, rw] / medians[against, rw]
                verdict = "reached" if ratio >= mark else "MISSED"
                print(f"{target}/{against} {rw}: {ratio:.2f} (mark {mark:.2f} {verdict})")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--size", default="1G")
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--block", default="4k")
    parser.add_argument("--threads", default="2", help="data threads of the FUSE server")
    parser.add_argument("--targets", default="plain,null,thinpool")
    parser.add_argument("--operations", default="randread,randwrite")
    parser.add_argument("--json", type=Path, help="write every run here")
    arguments = parser.parse_args()
    targets = arguments.targets.split(",")
    size = parse_size(arguments.size)

    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.directory))
        ).resolve()
        devices: dict[str, str] = {}
        common = ["--threads", arguments.threads]
        for target in targets:
            path = folder / target / "data"
            path.parent.mkdir()
            if target != "thinpool":
                fill(path, size)
            if target == "plain":
                file = str(path)
            elif target == "null":
                file = stack.enter_context(served(path.parent, *common, str(path)))
            else:
                pool = ["--pool", str(path.parent / "metadata"), "--size", str(size)]
                file = stack.enter_context(served(path.parent, *common, *pool, str(path)))
            devices[target] = stack.enter_context(attached(file))
        if "thinpool" in targets:
            fill(Path(devices["thinpool"]), size)
        results: dict[tuple[str, str], list[dict[str, float]]] = {}
        for repetition in range(arguments.repetitions):
            for rw in arguments.operations.split(","):
                # Turned round each time: whoever comes first must not always be the same.
                turn = repetition % len(targets)
                for target in targets[turn:] + targets[:turn]:
                    run = run_fio(devices[target], rw, seconds=arguments.seconds,
                                  depth=arguments.depth, block=arguments.block)  # fmt: skip
                    results.setdefault((target, rw), []).append(run)
        report(dict(sorted(results.items(), key=lambda item: item[0][1])), targets)
        if arguments.json:
            shown = [{"target": t, "op": rw, "runs": runs} for (t, rw), runs in results.items()]
            arguments.json.write_text(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
