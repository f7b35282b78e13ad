"""A machine that works on a pool is stopped cold, again and again, on disks that lose their caches.

Each session boots, brings up the pool, finds every file as our engine read it from the same disks,
and works: writers on several volumes at once, each operation fsynced before it is acknowledged, and
beside them snapshots, removals, trims, activations. At a random request of the disks QEMU is
killed. Then our engine opens what is left; the next session, which is the next boot of the kernel,
goes on with it.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernel.cold import Alive, Lane, Outcome, make_first_pool
from tests.kernel.world import quoted
from tests.system.conftest import remove_all
from thinpool import Thinpool

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.kernel.trees import Script

pytestmark = [
    pytest.mark.root,
    pytest.mark.fuse,
    pytest.mark.loop,
    pytest.mark.ext4,
    pytest.mark.xfs,
    pytest.mark.thin_tools,
    pytest.mark.kernel_vm,
    pytest.mark.xdist_group("kernel-vm"),
]
STOPS = int(os.environ.get("THINPOOL_COLD_STOPS", "8"))
POINTS = int(os.environ.get("THINPOOL_COLD_STOP_POINTS", "4"))  # more power cuts of each session


class DmsetupLane(Lane):
    """The kernel's pool, driven by dmsetup; a volume's name stands for its id and nowhere else."""

    def first_disks(self) -> dict[str, Path]:
        with Thinpool(self.folder / "root", timeout=60) as api:
            for volume in make_first_pool(api):
                self.volumes[volume.name] = volume
            status = api.status("p")
            api._session.client("p").stop_server()
        self.ids = {volume.id: volume.name for volume in self.volumes.values()}
        first = self.folder / "first"
        return {
            "metadata": Path(status.metadata.path).rename(first / "metadata"),
            "data": Path(status.data.path).rename(first / "data"),
        }

    def bring_up(self, script: Script) -> None:
        thins = [f"{volume.name} {volume.id} {volume.sectors}" for volume in self.volumes.values()]
        script.lines += ["pool_on", quoted("thins_on", *thins)]

    def snapshot(self, script: Script, origin: Alive, name: str) -> None:
        id_ = max(self.ids) + 1
        self.ids[id_] = name
        script.lines.append(f"snapshot {origin.name} {origin.id} {id_}")

    def use_for_a_while(self, script: Script, origin: Alive, name: str) -> None:
        id_ = next(id_ for id_, each in self.ids.items() if each == name)
        script.lines += [
            f"thin_on {name} {id_} {origin.sectors}",
            f"dd if=/dev/mapper/{name} of=/dev/null bs=64K count=4 status=none",
            f"dmsetup remove {name}",
        ]

    def remove(self, script: Script, volume: Alive) -> None:
        script.lines += [
            f"dmsetup remove {volume.name}",
            f"say remove {volume.name}",
            f"message delete {volume.id}",
        ]

    @contextlib.contextmanager
    def opened_here(
        self, folder: Path, images: Mapping[str, Path], expected: Outcome
    ) -> Iterator[tuple[Thinpool, dict[str, str]]]:
        with Thinpool(folder / "root", timeout=60) as api:
            try:
                api.attach_pool("p", data=images["data"], metadata=images["metadata"])
                yield api, {self.ids[volume.id]: str(volume) for volume in api.list("p")}
            finally:
                remove_all(api)
                for status in api.pools():
                    api.detach_pool(status.pool)


def stops(kind: type[Lane], seed: int) -> None:
    with tempfile.TemporaryDirectory(prefix="tpk-", ignore_cleanup_errors=True) as path:
        lane = kind(Path(path), random.Random(seed))
        with lane.disks:
            for stop in range(STOPS):
                lane.one_stop(POINTS)
                print(f"stop {stop}: {lane.images} images, {lane.leaks} leaks")  # noqa: T201
        assert lane.images == STOPS * (POINTS + 1)


@pytest.mark.timeout(3600)
def test_a_machine_stopped_cold_loses_nothing_that_was_fsynced(seed: int) -> None:
    stops(DmsetupLane, seed)
