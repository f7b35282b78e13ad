"""A machine that works on a pool is stopped cold, again and again, on disks that lose their caches.

Each session boots, brings up the pool, finds every file as our engine read it from the same disks,
and works: writers on several volumes at once, each operation fsynced before it is acknowledged, and
beside them snapshots, removals, trims, activations. At a random request of the disks QEMU is
killed. Then our engine opens what is left; the next session, which is the next boot of the kernel,
goes on with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernel.cold import Alive, Lane, Outcome, make_first_pool
from tests.kernel.mounting import unmount
from tests.kernel.world import MIB, quoted
from tests.system.conftest import remove_all
from thinpool import Thinpool
from thinpool.store import poolfile
from thinpool.store.catalogue import READY, Catalogue
from thinpool.store.opening import open_pool

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
STOPS = int(os.environ.get("THINPOOL_COLD_STOPS", "5"))
STORE_SIZE = 48 * MIB
POINTS = int(os.environ.get("THINPOOL_COLD_STOP_POINTS", "2"))  # more power cuts of each session


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


class StoreLane(Lane):
    """The kernel's pool behind our engine dm: a server, its catalogue on a third disk.

    What is certain of names is certain of the store: it is opened by the user engine after each
    stop, and by engine dm in the next session, and both must find the same volumes.
    """

    disk_names = ("metadata", "data", "store")

    def first_disks(self) -> dict[str, Path]:
        root = self.folder / "root"
        with Thinpool(root, timeout=60) as api:
            for volume in make_first_pool(api):
                self.volumes[volume.name] = volume
            status = api.status("p")
            api._session.client("p").stop_server()
        first = self.folder / "first"
        found = {
            "metadata": Path(status.metadata.path).rename(first / "metadata"),
            "data": Path(status.data.path).rename(first / "data"),
            "store": first / "store",
        }
        move_pool(root, metadata=Path("/dev/vda"), data=Path("/dev/vdb"), engine="dm")
        subprocess.run(
            ["mkfs.ext4", "-q", "-d", root, found["store"], str(STORE_SIZE // 1024)], check=True
        )
        return found

    def bring_up(self, script: Script) -> None:
        ids = {volume.name: volume.id for volume in self.volumes.values()}
        (self.folder / "expected.json").write_text(json.dumps(ids))
        script.lines += [
            "mkdir /run/store; mount -t ext4 $KR_DISK2 /run/store",
            "store_on /run/store",
            quoted("ask", "expect", self.folder / "expected.json"),
        ]
        script.lines += [f"ask activate {name}" for name in self.volumes]
        # What the last session had made is gone with its kernel, and nothing was made for nobody.
        script.lines.append(
            f"[ $(PATH=$PROGRAMS dmsetup ls --target thin | wc -l) = {len(self.volumes)} ]"
        )

    def snapshot(self, script: Script, origin: Alive, name: str) -> None:
        script.lines.append(f"ask snapshot {origin.name} {name}")

    def use_for_a_while(self, script: Script, origin: Alive, name: str) -> None:
        script.lines += [
            f"ask activate {name}",
            f"dd if=$(device {name}) of=/dev/null bs=64K count=4 status=none",
            f"ask deactivate {name}",
        ]

    def remove(self, script: Script, volume: Alive) -> None:
        script.lines += [
            f"ask deactivate {volume.name}",
            f"say remove {volume.name}",
            f"ask remove {volume.name}",
        ]

    @contextlib.contextmanager
    def opened_here(
        self, folder: Path, images: Mapping[str, Path], expected: Outcome
    ) -> Iterator[tuple[Thinpool, dict[str, str]]]:
        root = folder / "store"
        root.mkdir()
        subprocess.run(["mount", "-o", "loop", images["store"], root], check=True)
        try:
            move_pool(root, metadata=images["metadata"], data=images["data"], engine="user")
            with Thinpool(root, timeout=60) as api:
                try:
                    wrong = [each for each in api.doctor("p").pools["p"] if each.state == "wrong"]
                    assert not wrong, wrong
                    yield api, {volume.name: str(volume) for volume in api.list("p")}
                    self.assert_agrees(root, api)
                finally:
                    let_go(api)
        finally:
            unmount(root)

    @staticmethod
    def assert_agrees(root: Path, api: Thinpool) -> None:
        """Names and ids are one to one, and nothing is under way."""
        api._session.client("p").stop_server()
        config = poolfile.read_config(root, "p")
        catalogue = Catalogue(poolfile.pool_directory(root, "p") / "catalogue.db")
        try:
            with open_pool(config, exclusive=True) as opened:
                in_pool = {info.id for info in opened.pool.volumes()}
                transaction_id = opened.pool.status().transaction_id
            assert catalogue.intent() is None
            assert {record.id for record in catalogue.records(READY)} == in_pool
            assert len(catalogue.records()) == len(in_pool)
            assert int(catalogue.get("transaction_id") or 0) == transaction_id
            assert not list(catalogue.activations())
        finally:
            catalogue.close()


def move_pool(root: Path, *, metadata: Path, data: Path, engine: str) -> None:
    """The same pool, where its disks have other names, for an engine to open."""
    config = poolfile.read_config(root, "p")
    changed = dataclasses.replace(
        config, metadata=str(metadata), data=str(data), engine=engine, owns_files=False
    )
    poolfile.write_config(root, changed)


def let_go(api: Thinpool) -> None:
    """Deactivate all and end the server."""
    for volume in api.list("p"):
        if volume.device is not None:
            api.umount(str(volume))
            api.deactivate(str(volume))
    api._session.client("p").stop_server()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", [DmsetupLane, StoreLane], ids=["dmsetup", "store"])
def test_a_machine_stopped_cold_loses_nothing_that_was_fsynced(
    kind: type[Lane], tmp_path: Path, seed: int
) -> None:
    """A failure leaves NAME.base, the disks after the last stop, and job.sh in its folder."""
    lane = kind(tmp_path, random.Random(seed))
    with lane.disks:
        for stop in range(STOPS):
            lane.one_stop(POINTS)
            print(f"stop {stop}: {lane.images} images, {lane.leaks} leaks")  # noqa: T201
    assert lane.images == STOPS * (POINTS + 1)
