"""Print what an allocation costs, beside a plain linear scan over the same bitmap.

One block at a time and runs of 64, at 0, 50, 90, 95 and 99 % full, where the used blocks are
scattered ("fragmented") and where they lie in stretches. The times are of C code calling C code
(csrc/tests/bench_allocator.c, built here with meson); the last lines are the batch call as Python
makes it. A run may be shorter than wanted where there is none so long: the length is what was got.

Usage: bench_allocator.py [--blocks N] [--seed N] [--build DIRECTORY]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BATCH = 4096
BATCH_SECONDS = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case, as the C program prints it; times in ns a call, lengths in blocks a call."""

    layout: str
    percent: int
    want: int
    ns: float
    length: float
    scan_ns: float
    scan_length: float

    @classmethod
    def parse(cls, line: str) -> Row:
        """From the tab-separated fields."""
        layout, percent, want, *numbers = line.split("\t")
        ns, length, scan_ns, scan_length = map(float, numbers)
        return cls(
            layout=layout,
            percent=int(percent),
            want=int(want),
            ns=ns,
            length=length,
            scan_ns=scan_ns,
            scan_length=scan_length,
        )


def build_program(directory: Path) -> Path:
    """The C program, built if it is not up to date."""
    meson = [sys.executable, "-m", "mesonbuild.mesonmain"]
    if not (directory / "build.ninja").exists():
        subprocess.run(
            [*meson, "setup", directory, REPOSITORY], check=True, stdout=subprocess.DEVNULL
        )
    subprocess.run(
        [*meson, "compile", "-C", directory, "bench_allocator"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return directory / "csrc/tests/bench_allocator"


def processor() -> str:
    """Its name, where the kernel gives one."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


def print_header(blocks: int, seed: int) -> None:
    """What was measured and where, and the head of the table."""
    print(f"{blocks} blocks, seed {seed}, {processor()}")
    print(f"{'':24}{'allocator':^34}{'linear scan':^37}")
    print(
        f"{'layout':12}{'full':>5}{'want':>6} "
        + f"{'ns/call':>14}{'blocks':>8}{'ns/block':>14} " * 2
    )


def print_row(row: Row) -> None:
    """One line of the table."""
    print(
        f"{row.layout:12}{row.percent:>4}%{row.want:>6} "
        f"{row.ns:14.1f}{row.length:8.1f}{row.ns / row.length:14.2f} "
        f"{row.scan_ns:14.1f}{row.scan_length:8.1f}{row.scan_ns / row.scan_length:14.2f}"
    )


def print_batches(blocks: int) -> None:
    """The batch call through cffi, on an empty allocator that starts over when it is full."""
    try:
        from thinpool._native import ffi, lib  # noqa: PLC0415 - the table needs no installation
    except ImportError:
        print("from Python: thinpool is not installed here")
        return
    room, got = ffi.new("uint64_t[]", BATCH), ffi.new("size_t *")
    allocator = ffi.gc(lib.tp_allocator_create(blocks), lib.tp_allocator_destroy)
    batches = 0
    begin = time.perf_counter()
    while (took := time.perf_counter() - begin) < BATCH_SECONDS:
        if lib.tp_allocator_alloc_batch(allocator, BATCH, room, got):
            lib.tp_allocator_free(allocator, 0, blocks)
            lib.tp_allocator_commit(allocator)
        else:
            batches += 1
    print(f"from Python: {took / batches / BATCH * 1e9:.2f} ns a block, {BATCH} blocks a call")


def main() -> None:
    """Build, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=1 << 24, help="1 TiB of 64 KiB blocks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--build", type=Path, default=REPOSITORY / "build/normal")
    options = parser.parse_args()
    program = build_program(options.build)
    print_header(options.blocks, options.seed)
    command = [program, str(options.blocks), str(options.seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print_row(Row.parse(line.rstrip("\n")))
    if process.returncode:
        sys.exit(process.returncode)
    print_batches(options.blocks)


if __name__ == "__main__":
    main()
