"""The C core's inner loops against what this machine can do: C code calling C code.

Allocator: beside a linear scan over the same bitmap. CRC-32C: of metadata blocks in the cache,
beside the speed at which memory is copied. Lookups: in random order in a device of a million
mappings, from the volume's cache, through the path that a write takes, and in the btree.
"""

from __future__ import annotations

import re
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from thinpool.bench import programs

if TYPE_CHECKING:
    from thinpool.bench.context import Context
    from thinpool.bench.results import Parameter

_CRC_LINE: Final = re.compile(r"^(\S+) +4096 bytes: +([0-9.]+) ns, +([0-9.]+) GB/s", re.MULTILINE)
_MAPPING_LINE: Final = re.compile(r"^(lookup .*|map .*): +([0-9.]+) M/s", re.MULTILINE)
_COPIED: Final = 256 << 20
_SUBJECTS: Final = {
    "lookup from the cache": "thinpool's cache",
    "map and unmap a 4 KiB write": "thinpool's write path, locks included",
    "lookup in the btree": "thinpool's btree",
}
LIMIT: Final = "copying memory"


def run(context: Context) -> None:
    """Measure."""
    for name, measure, needs in (
        ("CRC-32C of 4096 bytes", _crc, 10),
        ("allocator", _allocator, 40),
        ("lookups in a million mappings", _lookups, 40),
    ):
        with context.case(name, needs=needs) as go:
            if go:
                context.try_peer(f"thinpool: {name}", partial(measure, context))


def _crc(context: Context) -> None:
    found = context.results
    for _ in range(context.options.repetitions):
        for name, _, gigabytes in _CRC_LINE.findall(programs.run("bench_crc32c")):
            subject = "thinpool, as it chooses" if name == "tp_crc32c" else f"thinpool, {name}"
            found.add("crc32c", subject, "rate", "GB/s", float(gigabytes), block=4096)
        found.add("crc32c", LIMIT, "rate", "GB/s", _copy_rate(), block=4096)


def _copy_rate() -> float:
    """GB/s of a copy of memory that no cache holds, bytes counted once."""
    source = bytearray(_COPIED)
    target = memoryview(bytearray(_COPIED))
    begun = time.perf_counter()
    target[:] = source
    return _COPIED / (time.perf_counter() - begun) / 1e9


def _allocator(context: Context) -> None:
    """The program itself repeats each case seven times and gives medians; it is run twice."""
    blocks = context.size(1 << 24, 1 << 17)
    for repetition in range(min(2, context.options.repetitions)):
        text = programs.run("bench_allocator", str(blocks), str(repetition + 1))
        for line in text.splitlines():
            layout, percent, want, ours, length, scan, scan_length = line.split("\t")
            parameters: dict[str, Parameter] = {
                "layout": layout,
                "full": int(percent),
                "want": int(want),
            }
            for subject, took, got in (
                ("thinpool", ours, length),
                ("linear scan of the bitmap", scan, scan_length),
            ):
                a_block = float(took) / float(got) * 1e-9
                context.results.add("allocate", subject, "a block", "s", a_block, **parameters)
                context.results.add("allocate", subject, "got", "blocks", float(got), **parameters)
    context.results.note(
        f"allocator: {blocks} blocks; medians of seven rounds within the program, for "
        f"{min(2, context.options.repetitions)} seeds"
    )


def _lookups(context: Context) -> None:
    """The program itself takes the best of five rounds."""
    mappings = context.size(1_000_000, 20_000)
    for _ in range(min(3, context.options.repetitions)):
        for name, millions in _MAPPING_LINE.findall(programs.run("bench_mapping", str(mappings))):
            context.results.add(
                "lookup", _SUBJECTS[name], "rate", "1/s", float(millions) * 1e6, mappings=mappings
            )
    context.results.note(
        "lookups: the best of five rounds within the program, which is run "
        f"{min(3, context.options.repetitions)} times"
    )
