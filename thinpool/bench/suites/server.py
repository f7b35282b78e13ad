"""The pool's server: flushes that it asks the host for, at rest, and removing many large volumes.

Flushes are counted by the engine's own counters of what it asked its two devices for. At rest:
memory is the proportional set of all its processes (PSS); wake-ups are context switches of all
their threads. Removing: until the pool counts the blocks as free again, and the rate at which the
host's filesystem then gets the space back, in the background.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from thinpool.bench.targets import fill
from thinpool.engine import BlockDevice, Pool, Volume, format_pool
from thinpool.errors import ThinpoolError
from thinpool.model import VolumeId
from thinpool.units import GIB, KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from thinpool.bench.context import Context

OURS: Final = "thinpool"
BLOCK: Final = 64 * KIB
VOLUMES: Final = 100
REMOVED: Final = 20
WAITERS: Final = 8
_SETTLE_SECONDS: Final = 3.0
_QUIET_SECONDS: Final = 10.0
_RETURN_SECONDS: Final = 120.0
_PAUSE: Final = 0.02
_STILL: Final = 50
"""Pauses without a change after which the host has all its space back."""


def run(context: Context) -> None:
    """Measure."""
    with context.case("flushes", needs=5) as go:
        if go:
            _flushes(context)
    with context.case(f"the server at rest with {VOLUMES} volumes active", needs=25) as go:
        if go:
            _at_rest(context)
    size = context.size(GIB, 4 * MIB)
    times = min(context.options.repetitions, context.size(2, 1))
    with context.case(f"removing {REMOVED} volumes of {size // MIB} MiB", needs=60) as go:
        if go:
            for _ in range(times):
                _removal(context, size)
            context.results.note(f"removing: {times} repetitions, all blocks mapped and written")


# ---- flushes ----------------------------------------------------------------------------------


def _flushes(context: Context) -> None:
    """Host flushes a volume's flush takes: nothing mapped since, one commit, and many who wait."""
    folder = context.place.new_folder("flushes")
    blocks = 4096
    with (
        BlockDevice.open_file(folder / "metadata", create_size=16 * MIB) as metadata,
        BlockDevice.open_file(folder / "data", create_size=blocks * BLOCK) as data,
    ):
        format_pool(metadata, block_size=BLOCK, data_blocks=blocks)
        with Pool.open(metadata, data) as pool:
            pool.create_volume(VolumeId(1))
            with pool.open_volume(VolumeId(1), size=blocks * BLOCK) as volume:
                volume.write(0, bytes(BLOCK))
                volume.flush()
                following = 1
                for _ in range(context.options.repetitions):
                    before = _counted(pool)
                    volume.write(0, b"again")
                    volume.flush()
                    _keep(context, "nothing mapped", _counted(pool) - before)
                    before = _counted(pool)
                    volume.write(following * BLOCK, b"new")
                    volume.flush()
                    _keep(context, "a commit", _counted(pool) - before)
                    following += 1
                    for _ in range(WAITERS):
                        volume.write(following * BLOCK, b"new")
                        following += 1
                    before = _counted(pool)
                    _flush_together(volume)
                    _keep(context, f"{WAITERS} who wait for one commit", _counted(pool) - before)


def _flush_together(volume: Volume) -> None:
    ready = threading.Barrier(WAITERS)

    def flush() -> None:
        ready.wait()
        volume.flush()

    threads = [threading.Thread(target=flush) for _ in range(WAITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _counted(pool: Pool) -> int:
    status = pool.status()
    return status.data_flushes + status.metadata_flushes


def _keep(context: Context, what: str, count: int) -> None:
    context.results.add("flush", OURS, "host flushes", "", float(count), what=what)


# ---- at rest ----------------------------------------------------------------------------------


def _at_rest(context: Context) -> None:
    count = context.size(VOLUMES, 5)
    with context.place.part("rest") as place:
        api = place.thinpool()
        api.create_pool("bench", size=GIB, base_size=0, min_free=0, engine="user")
        api.create("bench/origin", size=64 * MIB)
        for index in range(count):
            api.snapshot("bench/origin", f"bench/v{index}", activate=True)
        seconds = context.size(_QUIET_SECONDS, 1.0)
        time.sleep(context.size(_SETTLE_SECONDS, 1.5))
        for _ in range(context.size(min(2, context.options.repetitions), 1)):
            processes = list(_servers(api.root))
            if not processes:
                raise ThinpoolError("the pool's server was not found among the processes")
            before = _switches(processes)
            time.sleep(seconds)
            woken = _switches(processes) - before
            memory = sum(_pss(process) for process in processes)
            parameters = {"volumes": count, "processes": len(processes)}
            context.results.add("at rest", OURS, "memory", "bytes", memory, **parameters)
            context.results.add("at rest", OURS, "wake-ups", "1/s", woken / seconds, **parameters)


def _servers(root: Path) -> Iterator[Path]:
    """The processes in /proc whose command line names a root: supervisor and worker."""
    wanted = os.fsencode(str(root))
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it ended
            if wanted in command:
                yield entry


def _pss(process: Path) -> int:
    for line in (process / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * KIB
    raise ThinpoolError(f"{process}/smaps_rollup has no Pss")


def _switches(processes: list[Path]) -> int:
    """Context switches of all threads, voluntary or not."""
    total = 0
    for process in processes:
        for task in (process / "task").iterdir():
            for line in (task / "status").read_text().splitlines():
                if "ctxt_switches" in line:
                    total += int(line.split()[1])
    return total


# ---- removing ---------------------------------------------------------------------------------


def _removal(context: Context, size: int) -> None:
    with context.place.part("removal") as place:
        api = place.thinpool()
        api.create_pool("bench", size=(REMOVED + 1) * size, base_size=0, min_free=0, engine="user")
        names = [f"bench/v{index}" for index in range(REMOVED)]
        for name in names:
            api.create(name, size=size)
            device = api.activate(name).device
            if device is None:
                raise ThinpoolError(f"{name} was activated without a device", volume=name)
            fill(os.path.realpath(device), size)
            api.deactivate(name)
        status = api.status("bench")
        data = Path(status.data.path)
        if status.data.used < REMOVED * size:
            raise ThinpoolError(f"only {status.data.used} bytes are mapped")
        parameters = {"volumes": REMOVED, "size": size}
        taken = data.stat().st_blocks * 512
        context.results.add(
            "removal", OURS, "mapped", "bytes", float(status.data.used), **parameters
        )
        begun = time.perf_counter()
        api.remove(names)
        while api.status("bench").data.used:
            time.sleep(_PAUSE)
        took = time.perf_counter() - begun
        context.results.add("removal", OURS, "allocatable", "s", took, **parameters)
        last, left, still = begun, taken, 0
        while still < _STILL and time.perf_counter() - begun < _RETURN_SECONDS:
            time.sleep(_PAUSE)
            now = data.stat().st_blocks * 512
            if now != left:
                last, left, still = time.perf_counter(), now, 0
            elif left < taken:  # a busy host may not have begun yet
                still += 1
        context.results.add("removal", OURS, "returned", "bytes", float(taken - left), **parameters)
        if left < taken:
            context.results.add(
                *("removal", OURS, "return rate", "bytes/s", (taken - left) / (last - begun)),
                **parameters,
            )
