"""Snapshots: one after another, 100 at once, and in pools that hold many already.

In the transaction: the engine's call alone, on a pool that is open in this process. Durable: with
the commit. API and command line: durable, through the pool's server. Pools with many snapshots are
made by the engine and adopted, as pools from elsewhere are.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final

from thinpool.bench.context import in_turns
from thinpool.bench.workplace import Workplace, unmount
from thinpool.engine import BlockDevice, Change, ChangeKind, Pool, format_pool
from thinpool.errors import UnsupportedHostError
from thinpool.host import filesystems, loop, mounts
from thinpool.host.programs import find_program, run_program
from thinpool.model import VolumeId
from thinpool.units import GIB, KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from thinpool.api import Thinpool
    from thinpool.bench.context import Context

POPULATIONS: Final = (10, 1_000, 10_000, 100_000)
QUICK_POPULATIONS: Final = (10, 50)
AT_ONCE: Final = 100
BLOCK: Final = 64 * KIB
VOLUME_SIZE: Final = 64 * MIB
ORIGIN: Final = VolumeId(1)
ORIGIN_NAME: Final = "bench/base"
_CREATES: Final = 20
_BATCH: Final = 1_000
_THREADS: Final = 16
OURS: Final = "thinpool"
PROCESSES: Final = "four dmsetup processes"
PLAIN: Final = "plain files under loop devices"
STEPS: Final = ("create", "activate", "mount", "unmount", "deactivate", "remove")


def run(context: Context) -> None:
    """Measure."""
    populations = context.size(POPULATIONS, QUICK_POPULATIONS)
    image = context.place.folder / "ext4"
    with image.open("wb") as file:
        file.truncate(VOLUME_SIZE)
    filesystems.make_filesystem(image, "ext4", block_size=BLOCK)
    for count in populations:
        with (
            context.place.part("pool") as place,
            context.case(f"{count} snapshots in the pool, the engine", needs=5) as go,
        ):
            if go:
                _populated(context, place, image, count)
    with context.place.part("at-once") as place, context.case("100 at once", needs=30) as go:
        if go:
            _at_once(context, place, image)
    with context.place.part("api") as place:
        api = _pool(place)
        made = 0
        for count in populations:
            with context.case(
                f"{count} snapshots in the pool, the API", needs=3 + count / 1500
            ) as go:
                if go:
                    _populate(api, made, count)
                    made = count
                    _through_api(context, api, place.folder / "mnt", count)


# ---- the engine -------------------------------------------------------------------------------


def _populated(context: Context, place: Workplace, image: Path, count: int) -> None:
    """Make a pool with an origin and so many snapshots, and measure one more."""
    with _engine_pool(place.folder) as pool:
        _write_origin(pool, image)
        made = 0
        while made < count:
            batch = min(_BATCH, count - made)
            pool.apply(
                [_snapshot(VolumeId(2 + made + index)) for index in range(batch)],
                expected=0,
                new=0,
            )
            made += batch
            pool.commit()
        following = 2 + count
        for _ in range(context.options.repetitions):
            times = []
            for _ in range(_CREATES):
                begun = time.perf_counter()
                pool.create_snapshot(VolumeId(following), origin=ORIGIN)
                times.append(time.perf_counter() - begun)
                following += 1
            _add(context, "create", OURS, statistics.median(times), count, how="in the transaction")
            pool.commit()
            begun = time.perf_counter()
            pool.create_snapshot(VolumeId(following), origin=ORIGIN)
            pool.commit()
            following += 1
            took = time.perf_counter() - begun
            _add(context, "create", OURS, took, count, how="engine, durable")
            begun = time.perf_counter()
            for _ in range(AT_ONCE):
                pool.create_snapshot(VolumeId(following), origin=ORIGIN)
                following += 1
            pool.commit()
            took = time.perf_counter() - begun
            _add(context, "create", OURS, took, count, how="engine, 100 in one commit")
        while following > 2 + count:
            following -= 1
            pool.delete_volume(VolumeId(following))
        pool.commit()


def _snapshot(volume: VolumeId) -> Change:
    return Change(kind=ChangeKind.SNAPSHOT, id=volume, origin=ORIGIN)


@contextlib.contextmanager
def _engine_pool(folder: Path) -> Iterator[Pool]:
    """A new pool on two files of a folder."""
    blocks = 16 * VOLUME_SIZE // BLOCK
    with (
        BlockDevice.open_file(folder / "metadata", create_size=64 * MIB) as metadata,
        BlockDevice.open_file(folder / "data", create_size=blocks * BLOCK) as data,
    ):
        format_pool(metadata, block_size=BLOCK, data_blocks=blocks)
        with Pool.open(metadata, data) as pool:
            yield pool


def _write_origin(pool: Pool, image: Path) -> None:
    pool.create_volume(ORIGIN)
    with pool.open_volume(ORIGIN, size=VOLUME_SIZE) as volume, image.open("rb") as file:
        for offset in range(0, VOLUME_SIZE, MIB):
            data = file.read(MIB)
            if any(data):
                volume.write(offset, data)
        volume.flush()


# ---- the API, the command line, and other people's processes ------------------------------------


def _pool(place: Workplace) -> Thinpool:
    """A pool whose base has ext4."""
    api = place.thinpool()
    api.create_pool(
        "bench",
        size=GIB,
        metadata_size=256 * MIB,
        base_size=VOLUME_SIZE,
        min_free=0,
        engine="user",
    )
    return api


def _populate(api: Thinpool, have: int, want: int) -> None:
    for first in range(have, want, _BATCH):
        api.snapshot_many(
            ORIGIN_NAME, [f"bench/many-{n}" for n in range(first, min(want, first + _BATCH))]
        )


def _through_api(context: Context, api: Thinpool, target: Path, count: int) -> None:
    """Make one more, and take one through its life, again and again."""
    target.mkdir(exist_ok=True)
    ways: dict[str, Callable[[str], float]] = {"API, durable": partial(_by_api, api)}
    if count == POPULATIONS[0]:
        ways["command line, durable"] = partial(_by_command, api.root)
        processes = context.try_peer(PROCESSES, _dmsetup)
        if processes is not None:
            ways[PROCESSES] = processes
            context.results.note(
                f"{PROCESSES}: suspend, message, resume, create, as others run them; here they "
                "name devices that do not exist and fail at once, so it is the least they can cost"
            )
    for repetition, (how, way) in in_turns(list(ways.items()), context.options.repetitions):
        name = f"bench/s{repetition}-{len(how)}"
        took = way(name)
        if how == PROCESSES:
            _add(context, "create", PROCESSES, took, count, how="processes, a lower bound")
        else:
            _add(context, "create", OURS, took, count, how=how)
            api.remove([name])
    for repetition in range(context.options.repetitions):
        name = f"bench/life-{repetition}"
        steps: tuple[Callable[[], object], ...] = (
            partial(api.snapshot, ORIGIN_NAME, name),
            partial(api.activate, name),
            partial(api.mount, name, target),
            partial(api.umount, name),
            partial(api.deactivate, name),
            partial(api.remove, [name]),
        )
        for step, work in zip(STEPS, steps, strict=True):
            context.results.add("life", OURS, step, "s", _timed(work), snapshots=count)


def _by_api(api: Thinpool, name: str) -> float:
    return _timed(partial(api.snapshot, ORIGIN_NAME, name))


def _by_command(root: Path, name: str) -> float:
    command = [sys.executable, "-P", "-m", "thinpool", "--root", str(root), "--quiet"]

    def work() -> None:
        subprocess.run(
            [*command, "snapshot", ORIGIN_NAME, name],
            check=True,
            capture_output=True,
            timeout=60,
        )

    return _timed(work)


def _dmsetup() -> Callable[[str], float]:
    """The four processes with which others take a snapshot of an active volume."""
    program = find_program("dmsetup")
    if program is None:
        raise UnsupportedHostError(
            "dmsetup is not installed; on Debian, the package dmsetup brings it", missing="dmsetup"
        )
    nowhere = "thinpool-bench-no-such-device"

    def work() -> None:
        for arguments in (
            ["suspend", nowhere],
            ["message", nowhere, "0", "create_snap 1 0"],
            ["resume", nowhere],
            ["create", nowhere, "--table", f"0 1 thin /dev/mapper/{nowhere} 1"],
        ):
            subprocess.run([program, *arguments], check=False, capture_output=True, timeout=60)

    return lambda _: _timed(work)


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _add(context: Context, case: str, subject: str, took: float, count: int, *, how: str) -> None:
    context.results.add(case, subject, "time", "s", took, snapshots=count, how=how)


# ---- 100 at once ----------------------------------------------------------------------------


def _at_once(context: Context, place: Workplace, image: Path) -> None:
    """Create, activate and mount a hundred: ours in threads and in one call, and plain files."""
    api = _pool(place)
    count = context.size(AT_ONCE, 8)
    folders = [place.new_folder("m") for _ in range(count)]
    files = [place.folder / f"plain-{index}" for index in range(count)]
    for file in files:
        # Holes stay holes: a copy that takes no space, as a snapshot takes none.
        run_program("cp", ["--sparse=always", str(image), str(file)], package="coreutils")
    names = [f"bench/c{index}" for index in range(count)]
    subjects: dict[str, Callable[[], None]] = {
        f"{OURS}, {_THREADS} threads": partial(_ours_in_threads, api, names, folders),
        f"{OURS}, one call": partial(_ours_in_one_call, api, names, folders),
        PLAIN: partial(_plain, files, folders),
    }
    for _, (name, work) in in_turns(list(subjects.items()), context.options.repetitions):
        try:
            took = _timed(work)
            _expect_mounted(folders)
        finally:
            if name == PLAIN:
                gone = _timed(partial(_take_down, place, folders))
            else:
                gone = _timed(partial(api.remove, names, deactivate=True))
        context.results.add("100 at once", name, "create to mount", "s", took)
        context.results.add("100 at once", name, "unmount to remove", "s", gone)


def _ours_in_threads(api: Thinpool, names: list[str], folders: list[Path]) -> None:
    with ThreadPoolExecutor(_THREADS) as threads:
        for done in [
            threads.submit(api.snapshot, ORIGIN_NAME, name, mount=folder)
            for name, folder in zip(names, folders, strict=True)
        ]:
            done.result()


def _ours_in_one_call(api: Thinpool, names: list[str], folders: list[Path]) -> None:
    api.snapshot_many(ORIGIN_NAME, names, mount=folders)


def _plain(files: list[Path], folders: list[Path]) -> None:
    for file, folder in zip(files, folders, strict=True):
        mounts.mount(loop.attach(file).path, str(folder), "ext4")


def _take_down(place: Workplace, folders: list[Path]) -> None:
    """Of what is there, should it have been interrupted half way."""
    for folder in folders:
        unmount(folder)
    for device in loop.find_below(place.folder):
        if device.backing_file.startswith(str(place.folder / "plain-")):
            loop.detach(device)


def _expect_mounted(folders: list[Path]) -> None:
    for folder in folders:
        if not os.path.ismount(folder):
            raise RuntimeError(f"{folder} is no mount point")
