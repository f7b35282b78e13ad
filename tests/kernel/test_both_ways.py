"""One pool, in turn in the hands of the user engine here and of a real kernel in a machine.

Each side finds every file as the other left it, changes what it likes and hands it back. Each hand
over is judged by thin_check and by our own checker. Neither side tells the other what it did: both
run the same scripts, and a model of the files says what must be there.

In every other round the kernel is driven by dmsetup, behind the back of our store, which finds new
and missing volumes afterwards. In the rounds between it is driven by engine dm with the same store:
the disk with the root is mounted there, and names and sizes are kept.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.core.judges import our_check, thin_check
from tests.kernel import machine
from tests.kernel.mounting import unmount
from tests.kernel.trees import Script
from tests.kernel.world import BLOCK, MIB, SECTOR, Held, change_raw, lists_for_guest, quoted
from tests.system.conftest import fsck, remove_all
from thinpool import Thinpool

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
ROUNDS = int(os.environ.get("THINPOOL_BOTH_WAYS_ROUNDS", "10"))
SIZES = {"ext4": 192 * MIB, "xfs": 304 * MIB}
DISK_SIZE = 2048 * MIB
RAW_SIZE = 4 * MIB
VOLUMES_MOST = 9
FEATURES = ([], ["skip_block_zeroing"], ["no_discard_passdown"], ["error_if_no_space"])


@dataclass
class World:
    """The pool, its volumes and the model of them."""

    api: Thinpool
    folder: Path
    random: random.Random
    held: dict[str, Held] = field(default_factory=dict)
    names: int = 0
    unit_there: int = SECTOR
    base: int = -1

    def __post_init__(self) -> None:
        for name in ("payloads", "lists", "mnt", "store"):
            (self.folder / name).mkdir()
        with self.disk.open("wb") as file:
            file.truncate(DISK_SIZE)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.disk], check=True)
        self.mount_store()
        self.api.create_pool(
            "p", size=1024 * MIB, metadata_size=8 * MIB, base_size=SIZES["ext4"], base_fs="ext4"
        )
        status = self.api.status("p")
        self.data, self.metadata = Path(status.data.path), Path(status.metadata.path)

    @property
    def disk(self) -> Path:
        """With the root of our pools on it."""
        return self.folder / "disk"

    @property
    def store(self) -> Path:
        """Where it is mounted, here and there."""
        return self.folder / "store"

    def mount_store(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.disk, self.store], check=True)

    def script(self) -> Script:
        return Script(self.folder / "payloads")

    def new_name(self) -> str:
        self.names += 1
        return f"v{self.names}"

    def pick(self, *, filesystem: bool) -> Held:
        return self.random.choice(
            [v for _, v in sorted(self.held.items()) if (v.filesystem is not None) == filesystem]
        )

    def parent(self) -> Held:
        """What the next snapshot is of: soon three deep, then anything."""
        return self.random.choice(
            sorted(self.held.values(), key=lambda v: (-(v.depth % 4), v.name))[:4]
        )

    def expendable(self) -> Held | None:
        """What may be deleted: never the last of its kind, and only when there are many."""
        if len(self.held) < VOLUMES_MOST:
            return None
        kinds = [v.filesystem for v in self.held.values()]
        several = [v for v in self.held.values() if kinds.count(v.filesystem) > 1]
        return self.random.choice(sorted(several, key=lambda v: v.name))

    # ---- our side -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Two filesystems, a raw volume, snapshots three deep of each, and a deleted one."""
        self.api.snapshot("p/base", "p/e")
        self.base = next(volume.id for volume in self.api.list("p") if volume.name == "base")
        self.api.create("p/x", size=SIZES["xfs"], fs="xfs")
        self.api.create("p/r", size=RAW_SIZE)
        for name, filesystem in (("e", "ext4"), ("x", "xfs"), ("r", None)):
            self.hold(name, filesystem)
        for name in ("e", "x", "r"):
            volume = self.held[name]
            self.change_here(volume, 12)
            for _ in range(3):
                volume = self.snapshot_here(volume)
                self.change_here(volume, 5)
        doomed = self.snapshot_here(self.held["x"])
        self.change_here(doomed, 5)
        self.remove_here(doomed)

    def hold(self, name: str, filesystem: str | None) -> None:
        volume = next(v for v in self.api.list("p") if v.name == name)
        self.held[name] = Held(name, volume.id, volume.size, filesystem,
                               raw=bytearray(0 if filesystem else volume.size))  # fmt: skip

    def snapshot_here(self, origin: Held) -> Held:
        name = self.new_name()
        made = self.api.snapshot(f"p/{origin.name}", f"p/{name}")
        self.held[name] = origin.snapshot(name, made.id)
        return self.held[name]

    def remove_here(self, volume: Held) -> None:
        self.api.remove([f"p/{volume.name}"])
        del self.held[volume.name]

    def change_here(self, volume: Held, steps: int) -> None:
        script = self.script()
        if volume.filesystem is None:
            device = self.api.activate(f"p/{volume.name}").device
            change_raw(volume, self.random, script, quoted(device), steps, whole=False)
            self.run_here(script, self.folder)
            self.api.deactivate(f"p/{volume.name}")
            return
        directory = self.folder / "mnt"
        self.api.mount(f"p/{volume.name}", directory)
        volume.tree.change(self.random, script, steps)
        self.run_here(script, directory)
        self.api.umount(f"p/{volume.name}")
        if self.random.random() < 0.5:
            self.api.trim(f"p/{volume.name}")

    @staticmethod
    def run_here(script: Script, directory: Path) -> None:
        lines = "\n".join(["set -eu", "umask 022", *script.lines])
        done = subprocess.run(
            ["sh"], input=lines, text=True, cwd=directory, capture_output=True, check=False,
            timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def verify_here(self) -> None:
        for volume in self.held.values():
            activation = self.api.activate(f"p/{volume.name}", read_only=True)
            if volume.filesystem is None:
                assert Path(activation.device).read_bytes() == volume.raw, volume.name
            else:
                fsck(activation.device, volume.filesystem)
                self.api.mount(f"p/{volume.name}", self.folder / "mnt", read_only=True)
                volume.tree.verify(self.folder / "mnt")
                self.api.umount(f"p/{volume.name}")
            self.api.deactivate(f"p/{volume.name}")

    def work_here(self) -> None:
        for _ in range(2):
            self.change_here(self.pick(filesystem=True), 6)
        self.change_here(self.pick(filesystem=False), 6)
        if (volume := self.expendable()) is not None:
            self.remove_here(volume)
        self.change_here(self.snapshot_here(self.parent()), 4)

    def let_go(self) -> None:
        """Nothing of ours has the pool's files open from here on."""
        report = self.api.check("p")
        assert report.clean, report
        self.api._session.client("p").stop_server()
        self.judge()

    def judge(self) -> None:
        metadata = self.metadata.read_bytes()
        thin_check(metadata)
        report = our_check(metadata)
        assert report.clean, report

    # ---- the kernel's side --------------------------------------------------------------------

    def guest_script(self) -> Script:
        lists = self.folder / "lists"
        lists_for_guest(lists, self.held.values())
        script = self.script()
        script.lines += [f"LISTS={quoted(lists)}", f". {quoted(machine.HERE / 'guest.sh')}"]
        return script

    def run_there(self, script: Script, *disks: Path) -> None:
        job = self.folder / "job.sh"
        job.write_text("\n".join(script.lines) + "\n")
        machine.run(job, disks=disks)

    @staticmethod
    def verify_there(script: Script, volumes: Iterable[Held]) -> None:
        for volume in volumes:
            if volume.filesystem is None:
                script.lines.append(f"cmp $(device {volume.name}) $LISTS/{volume.name}.raw")
            else:
                script.lines += [
                    f"mount_on {volume.name} {volume.filesystem} ro",
                    f"verify_tree {volume.name}",
                    f"mount_off {volume.name}",
                ]

    def turn_of_engine_dm(self) -> None:
        """Let our engine dm have the same root there: verify all, change some."""
        unmount(self.store)
        self.unit_there = SECTOR
        before = list(self.held.values())
        script = self.guest_script()
        expected = self.folder / "expected.json"
        expected.write_text(json.dumps({"base": self.base, **{v.name: v.id for v in before}}))
        script.lines += [
            quoted("mount", "-t", "ext4", "/dev/vda", self.store),
            quoted("store_on", self.api.root),
            "ask engine dm",
            quoted("ask", "expect", expected),
            *(f"ask activate {volume.name}" for volume in before),
        ]
        self.verify_there(script, before)
        for volume in (self.pick(filesystem=True), self.pick(filesystem=False)):
            self.change_there(volume, script, 6)
        if (doomed := self.expendable()) is not None:
            script.lines += [f"ask deactivate {doomed.name}", f"ask remove {doomed.name}"]
            del self.held[doomed.name]
        for _ in range(2):
            origin = self.parent()
            child = origin.snapshot(self.new_name(), -1)
            self.held[child.name] = child
            script.lines += [
                f"ask snapshot {origin.name} {child.name}",
                f"ask activate {child.name}",
            ]
            self.change_there(child, script, 4)
            self.change_there(origin, script, 3)
        script.lines += [f"ask deactivate {name}" for name in self.held]
        script.lines += ["ask check", "ask stop", "exec 8>&-; wait", quoted("umount", self.store)]
        self.run_there(script, self.disk)
        self.mount_store()
        self.judge()
        self.api.set("p", {"engine": "user"})
        ids = {volume.name: volume.id for volume in self.api.list("p")}
        assert ids.keys() == {"base", *self.held}
        for held in self.held.values():
            assert held.id in (-1, ids[held.name])
            held.id = ids[held.name]

    def turn_of_dmsetup(self, round_: int) -> None:
        """Verify all, change some, in a machine; then tell the catalogue which names are meant."""
        before = list(self.held.values())
        script = self.guest_script()
        features = FEATURES[round_ % len(FEATURES)]
        # Where new blocks are not zeroed, what was not written is anything: whole blocks only.
        self.unit_there = BLOCK if "skip_block_zeroing" in features else SECTOR
        script.lines.append(quoted("pool_on", *features))
        thins = [f"{volume.name} {volume.id} {volume.size // SECTOR}" for volume in before]
        script.lines.append(quoted("thins_on", *thins))
        self.verify_there(script, before)
        made, deleted = self.kernel_changes(script)
        active = {volume.name for volume in [*before, *made]} - deleted
        script.lines += [quoted("dmsetup", "remove", *sorted(active)), "pool_off"]
        self.run_there(script, self.metadata, self.data)
        self.judge()
        self.settle_names(made, deleted)

    def kernel_changes(self, script: Script) -> tuple[list[Held], set[str]]:
        made: list[Held] = []
        deleted: set[str] = set()
        for _ in range(2):
            self.change_there(self.pick(filesystem=True), script, 6)
        self.change_there(self.pick(filesystem=False), script, 6)
        if (volume := self.expendable()) is not None:
            script.lines += [f"dmsetup remove {volume.name}", f"message delete {volume.id}"]
            deleted.add(volume.name)
            del self.held[volume.name]
        for _ in range(2):
            origin = self.parent()
            id_ = max(volume.id for volume in self.held.values()) + self.random.randrange(1, 40)
            child = origin.snapshot(self.new_name(), id_)
            script.lines += [
                f"snapshot {origin.name} {origin.id} {id_}",
                quoted("thin_on", child.name, id_, child.size // SECTOR),
            ]
            self.held[child.name] = child
            made.append(child)
            self.change_there(child, script, 4)
            self.change_there(origin, script, 3)
        return made, deleted

    def change_there(self, volume: Held, script: Script, steps: int) -> None:
        if volume.filesystem is None:
            device = f"$(device {volume.name})"
            change_raw(volume, self.random, script, device, steps, whole=True, unit=self.unit_there)
            return
        script.lines += [f"mount_on {volume.name} {volume.filesystem}", f"( cd $TOP/{volume.name}"]
        volume.tree.change(self.random, script, steps)
        script.lines.append(")")
        if self.random.random() < 0.5:
            script.lines.append(f"sync; fstrim $TOP/{volume.name}")
        script.lines.append(f"mount_off {volume.name}")

    def settle_names(self, made: list[Held], deleted: set[str]) -> None:
        """What the kernel made has no name yet, what it deleted still has one."""
        for volume in self.api.list("p"):
            match = next((held for held in made if held.id == volume.id), None)
            if match is not None:
                assert volume.name == f"id-{volume.id}"
                assert volume.filesystem == match.filesystem
                if match.filesystem is None:  # nothing on it tells its size
                    self.api.resize(str(volume), match.size, device_only=True)
                else:
                    assert volume.size == match.size
                self.api.rename(str(volume), match.name)
        for name in deleted:
            self.api.remove([f"p/{name}"])
        found = {volume.name: volume.id for volume in self.api.list("p") if volume.name != "base"}
        assert found == {volume.name: volume.id for volume in self.held.values()}


@pytest.fixture
def world(seed: int) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="tpk-", ignore_cleanup_errors=True) as path:
        folder = Path(path)
        api = Thinpool(folder / "store" / "root", timeout=60)
        try:
            yield World(api=api, folder=folder, random=random.Random(seed))
        finally:
            if (folder / "store").is_mount():
                remove_all(api)
                unmount(folder / "store")
            api.close()


@pytest.mark.timeout(900)
def test_a_pool_moves_between_our_engine_and_the_kernel(world: World) -> None:
    world.begin()
    for round_ in range(ROUNDS):
        print(f"round {round_}")  # noqa: T201 - pytest shows it when the test fails
        world.let_go()
        if round_ % 2:
            world.turn_of_engine_dm()
        else:
            world.turn_of_dmsetup(round_ // 2)
        world.verify_here()
        world.work_here()
    world.verify_here()
    assert world.api.check("p").clean
