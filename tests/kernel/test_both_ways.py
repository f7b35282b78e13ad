"""One pool, in turn in the hands of the user engine here and of a real kernel in a machine.

Each side finds every file as the other left it, changes what it likes and hands it back. Each hand
over is judged by thin_check and by our own checker. Neither side tells the other what it did: both
run the same scripts, and a model of the files says what must be there.
"""

from __future__ import annotations

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
from tests.kernel.trees import Script
from tests.kernel.world import BLOCK, MIB, SECTOR, Held, change_raw, lists_for_guest, quoted
from tests.system.conftest import fsck, remove_all
from thinpool import Thinpool

if TYPE_CHECKING:
    from collections.abc import Iterator

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

    def __post_init__(self) -> None:
        for name in ("payloads", "lists", "mnt"):
            (self.folder / name).mkdir()
        self.api.create_pool(
            "p", size=1024 * MIB, metadata_size=8 * MIB, base_size=SIZES["ext4"], base_fs="ext4"
        )
        status = self.api.status("p")
        self.data, self.metadata = Path(status.data.path), Path(status.metadata.path)

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

    def kernel_turn(self, round_: int) -> None:
        """Verify all, change some, in a machine; then tell the catalogue which names are meant."""
        lists = self.folder / "lists"
        before = list(self.held.values())
        lists_for_guest(lists, before)
        script = self.script()
        features = FEATURES[round_ % len(FEATURES)]
        # Where new blocks are not zeroed, what was not written is anything: whole blocks only.
        self.unit_there = BLOCK if "skip_block_zeroing" in features else SECTOR
        script.lines += [
            f"LISTS={quoted(lists)}",
            f". {quoted(machine.HERE / 'guest.sh')}",
            quoted("pool_on", *features),
        ]
        thins = [f"{volume.name} {volume.id} {volume.size // SECTOR}" for volume in before]
        script.lines.append(quoted("thins_on", *thins))
        for volume in before:
            if volume.filesystem is None:
                script.lines.append(f"cmp /dev/mapper/{volume.name} $LISTS/{volume.name}.raw")
            else:
                script.lines += [
                    f"mount_on {volume.name} {volume.filesystem} ro",
                    f"verify_tree {volume.name}",
                    f"mount_off {volume.name}",
                ]
        made, deleted = self.kernel_changes(script)
        active = {volume.name for volume in [*before, *made]} - deleted
        script.lines += [quoted("dmsetup", "remove", *sorted(active)), "pool_off"]
        job = self.folder / "job.sh"
        job.write_text("\n".join(script.lines) + "\n")
        machine.run(job, disks=[self.metadata, self.data])
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
            device = f"/dev/mapper/{volume.name}"
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
        api = Thinpool(folder / "root", timeout=60)
        try:
            yield World(api=api, folder=folder, random=random.Random(seed))
        finally:
            remove_all(api)
            api.close()


@pytest.mark.timeout(900)
def test_a_pool_moves_between_our_engine_and_the_kernel(world: World) -> None:
    world.begin()
    for round_ in range(ROUNDS):
        print(f"round {round_}")  # noqa: T201 - pytest shows it when the test fails
        world.let_go()
        world.kernel_turn(round_)
        world.verify_here()
        world.work_here()
    world.verify_here()
    assert world.api.check("p").clean
