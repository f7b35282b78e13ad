"""Kill a pool's worker again and again under verified work on mounted ext4 and xfs.

    python tests/fuse/soak_kill.py [--kills 200] [--seed 1] [--directory /var/tmp]

Each filesystem has fio writing and verifying blocks, and a thread that writes files of known
contents, syncs, renames, deletes and reads them back; snapshots are taken and fstrim runs in
between. No error may reach the filesystems, no byte may be lost, and the pool's metadata must check
clean. Exit code 0 is a pass. The seed decides when the kills come and what is written.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fuse.conftest import BLOCK, MIB, Server, attached, make_pool, mounted

if TYPE_CHECKING:
    from collections.abc import Callable

VOLUME_SIZE = 512 * MIB
SNAPSHOTS_KEPT = 4
FILES_MAX = 100
MAKE = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q", "-K"]}
CHECK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}


@dataclass(slots=True)
class Outcome:
    """What the workers saw."""

    faults: list[str] = field(default_factory=list)
    rounds: int = 0
    files: int = 0
    snapshots: int = 0
    replayed: int = 0
    taken_up: int = 0


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(command), capture_output=True, text=True, check=False, timeout=600)


class Files:
    """Files of known contents; every one is read back, through the device, before it goes."""

    def __init__(self, directory: Path, seed: int, outcome: Outcome) -> None:
        self._directory = directory
        self._rng = random.Random(seed)
        self._outcome = outcome
        self._digests: dict[str, str] = {}
        self._next = 0

    def step(self) -> None:
        what = self._rng.random()
        if len(self._digests) < 5 or (what < 0.5 and len(self._digests) < FILES_MAX):
            self._write()
        elif what < 0.7:
            self._verify(self._rng.choice(list(self._digests)))
        else:
            name = self._rng.choice(list(self._digests))
            self._verify(name)
            (self._directory / name).unlink()
            del self._digests[name]

    def _write(self) -> None:
        data = self._rng.randbytes(self._rng.choice([100, 4096, 70_000, 1 << 20]))
        name = f"f{self._next}"
        self._next += 1
        path = self._directory / f"{name}.new"
        with path.open("wb") as file:
            file.write(data)
            if self._rng.random() < 0.5:
                file.flush()
                os.fsync(file.fileno())
        path.rename(self._directory / name)
        self._digests[name] = hashlib.sha256(data).hexdigest()
        self._outcome.files += 1

    def _verify(self, name: str) -> None:
        with (self._directory / name).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = hashlib.sha256(file.read()).hexdigest()
        if found != self._digests[name]:
            self._outcome.faults.append(f"{self._directory / name}: other contents")

    def verify_all(self) -> None:
        for name in self._digests:
            self._verify(name)


def fio(directory: Path, seed: int) -> subprocess.CompletedProcess[str]:
    return run(
        "fio", "--name=w", f"--directory={directory}", "--size=24M", "--rw=randrw",
        "--bsrange=512-128k", "--blockalign=512", "--ioengine=libaio", "--iodepth=16",
        "--direct=1", "--verify=crc32c", "--verify_fatal=1", "--fsync=64", "--numjobs=2",
        f"--randseed={seed}", "--verify_backlog=128", "--verify_state_save=0",
    )  # fmt: skip


class Work:
    """Threads that work on each filesystem until they are told to stop, or see a fault."""

    def __init__(
        self, server: Server, places: dict[str, Path], seed: int, outcome: Outcome
    ) -> None:
        self._server = server
        self._places = list(places.values())
        self._outcome = outcome
        self.enough = threading.Event()
        rng = random.Random(seed)
        jobs: list[Callable[[], None]] = [self._disturb]
        for place in self._places:
            jobs.append(partial(self._write_blocks, place, rng.randrange(1 << 30)))
            jobs.append(partial(self._write_files, Files(place, rng.randrange(1 << 30), outcome)))
        self._threads = [threading.Thread(target=self._guarded, args=(job,)) for job in jobs]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.enough.set()
        for thread in self._threads:
            thread.join()

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a fault
            self._fault(f"{type(error).__name__}: {error}")

    def _fault(self, text: str) -> None:
        self._outcome.faults.append(text)
        self.enough.set()

    def _write_blocks(self, place: Path, seed: int) -> None:
        while not self.enough.is_set():
            result = fio(place, seed)
            self._outcome.rounds += 1
            seed += 1
            if result.returncode:
                self._fault(f"fio on {place}: {result.stdout}{result.stderr}")

    def _write_files(self, files: Files) -> None:
        while not self.enough.is_set():
            files.step()
        files.verify_all()

    def _disturb(self) -> None:
        number = 100
        while not self.enough.wait(1.0):
            with contextlib.suppress(RuntimeError):  # done by a worker that died before it said so
                origin = 1 + number % len(self._places)
                self._server.ask("snapshot", id=number, origin=origin)
            with contextlib.suppress(RuntimeError):  # likewise, or never made
                # Nothing is to run full here, however long it takes.
                self._server.ask("delete", id=number - SNAPSHOTS_KEPT)
            number += 1
            self._outcome.snapshots += 1
            for place in self._places:
                result = run("fstrim", str(place))
                if result.returncode:
                    self._fault(f"fstrim {place}: {result.stderr}")


def soak(folder: Path, *, kills: int, seed: int, kinds: tuple[str, ...]) -> Outcome:
    """Do it all; the outcome's faults are empty when nothing went wrong."""
    outcome = Outcome()
    rng = random.Random(seed)
    server = make_pool(folder / "root", "soak", data_size=8 * VOLUME_SIZE)
    server.start()
    try:
        with contextlib.ExitStack() as stack:
            devices, places = {}, {}
            for number, kind in enumerate(kinds, 1):
                path = server.volume(number, VOLUME_SIZE)
                devices[kind] = stack.enter_context(attached(path)).path
                subprocess.run([*MAKE[kind], devices[kind]], check=True, stdin=subprocess.DEVNULL)
            with contextlib.ExitStack() as mounts:
                for kind, device in devices.items():
                    places[kind] = mounts.enter_context(mounted(device, folder / kind, kind))
                with Work(server, places, rng.randrange(1 << 30), outcome) as work:
                    for _ in range(kills):
                        if work.enough.wait(rng.uniform(0.02, 1.0)):
                            break
                        server.kill_worker()
            for kind, device in devices.items():
                result = run(*CHECK[kind], device)
                if result.returncode:
                    outcome.faults.append(f"{kind}: {result.stdout}{result.stderr}")
        statistics = server.ask("info")
        if statistics["used"] > 8 * VOLUME_SIZE // BLOCK:
            outcome.faults.append("more blocks used than there are")
    finally:
        code = server.stop()
        if code:
            outcome.faults.append(f"the server ended with {code}: {server.log.read_text()}")
    server.check()
    _count_what_was_taken_over(server, outcome)
    return outcome


def _count_what_was_taken_over(server: Server, outcome: Outcome) -> None:
    for line in server.log.read_text().splitlines():
        if found := re.search(r"(\d+) records replayed, (\d+) open requests", line):
            outcome.replayed += int(found[1])
            outcome.taken_up += int(found[2])


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", default="/var/tmp")  # noqa: S108
    parser.add_argument("--filesystems", default="ext4,xfs")
    arguments = parser.parse_args()
    kinds = tuple(arguments.filesystems.split(","))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tps-", dir=arguments.directory) as folder:
        os.environ.setdefault("THINPOOL_RUN", f"{folder}/run")
        outcome = soak(
            Path(folder).resolve(), kills=arguments.kills, seed=arguments.seed, kinds=kinds
        )
    took = time.monotonic() - began
    print(  # noqa: T201 - a program
        f"seed {arguments.seed}: {arguments.kills} kills in {took:.0f} s, {outcome.rounds} fio "
        f"runs, {outcome.files} files, {outcome.snapshots} snapshots, {outcome.replayed} records "
        f"replayed, {outcome.taken_up} requests taken up, {len(outcome.faults)} faults"
    )
    for fault in outcome.faults:
        print(fault)  # noqa: T201 - as above
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
