"""A pool on disks that lose power, from session to session: boot, verify, work, stop, examine.

Subclasses say who drives the kernel's pool: dmsetup, or our engine dm with its store.
"""

from __future__ import annotations

import hashlib
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.core.judges import our_check, thin_check
from tests.kernel import journal, machine
from tests.kernel.powercut import PowerCutDisks
from tests.kernel.trees import Script, read_tree
from tests.kernel.world import MIB, SECTOR, quoted

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from thinpool import Thinpool
    from thinpool.model import CheckReport

SIZES = {"ext4": 96 * MIB, "xfs": 304 * MIB}
POOL_SIZE = 512 * MIB
VOLUMES_MOST = 5
WRITERS = 3
OPERATIONS = 40
MANAGEMENT = 7
WORK_MOST = 500  # requests of the disks after which a session ends at the latest
EARLY = 0.15  # of the sessions end before everything is up
SESSION_S = 200.0


@dataclass
class Alive:
    """A volume as it certainly was when the session began, and what its writer was told to do."""

    name: str
    filesystem: str
    id: int | None = None
    files: journal.Files = field(default_factory=dict)
    operations: list[journal.Operation] = field(default_factory=list)
    acknowledged: int = 0

    @property
    def sectors(self) -> int:
        return SIZES[self.filesystem] // SECTOR


@dataclass
class Born:
    """A snapshot of this session: how far its origin's writer was before, and after it was made."""

    origin: Alive
    certain: int
    possible: int | None = None  # None: it is not certain to be there


@dataclass(frozen=True)
class Word:
    """Something that was said, and how many requests the disks had taken when it was heard."""

    position: int
    text: str


@dataclass(frozen=True)
class Outcome:
    """What was certain and possible at one point.

    Attributes:
        volumes: with what was acknowledged.
        born: snapshots that were begun.
        removing: volumes whose removal was begun, and not said to be done.
    """

    volumes: dict[str, Alive]
    born: dict[str, Born]
    removing: set[str]


class Session:
    """What was done from one boot to the next stop."""

    def __init__(self, volumes: Mapping[str, Alive]) -> None:
        self.volumes = volumes
        self.words: list[Word] = []

    def said(self, text: str) -> bool:
        return any(word.text == text for word in self.words)

    def outcome(self, position: int | None = None) -> Outcome:
        """At a point of the log; None: at its end."""
        volumes = {
            name: Alive(name, volume.filesystem, volume.id, volume.files, volume.operations)
            for name, volume in self.volumes.items()
        }
        found = Outcome(volumes, {}, set())
        for word in self.words:
            if position is not None and word.position > position:
                break
            match word.text.split():
                case ["ack", name, number]:
                    volumes[name].acknowledged = int(number)
                case ["snapshot", origin, name]:
                    found.born[name] = Born(volumes[origin], volumes[origin].acknowledged)
                case ["snapshotted", name]:
                    found.born[name].possible = found.born[name].origin.acknowledged + 1
                case ["remove", name]:
                    found.removing.add(name)
                case ["removed", name]:
                    found.removing.discard(name)
                    volumes.pop(name)
        return found


class Lane(ABC):
    """One pool and the disks it is on.

    Args:
        folder: to work in.
        random_: chooses all.
    """

    disk_names: tuple[str, ...] = ("metadata", "data")

    def __init__(self, folder: Path, random_: random.Random) -> None:
        self.folder = folder
        self.random = random_
        self.volumes: dict[str, Alive] = {}
        self.names = 0
        self.leaks = 0
        self.images = 0
        for name in ("payloads", "lists", "images", "first"):
            (folder / name).mkdir()
        self.disks = PowerCutDisks(folder, self.first_disks())

    # ---- what a subclass says -----------------------------------------------------------------

    @abstractmethod
    def first_disks(self) -> dict[str, Path]:
        """A pool of ours with an ext4 and an xfs volume; fills in self.volumes."""

    @abstractmethod
    def bring_up(self, script: Script) -> None:
        """Lines that make the volumes' devices; device NAME of guest.sh tells each."""

    @abstractmethod
    def snapshot(self, script: Script, origin: Alive, name: str) -> None:
        """Lines that make a snapshot of an active volume."""

    @abstractmethod
    def use_for_a_while(self, script: Script, origin: Alive, name: str) -> None:
        """Lines that activate a snapshot, read from it, and deactivate it."""

    @abstractmethod
    def remove(self, script: Script, volume: Alive) -> None:
        """Lines that deactivate and remove a volume; they say when the removal begins."""

    @abstractmethod
    def opened_here(
        self, folder: Path, images: Mapping[str, Path], expected: Outcome
    ) -> AbstractContextManager[tuple[Thinpool, dict[str, str]]]:
        """Open what a stop left with our engine; name in the model -> POOL/NAME here."""

    # ---- a session ----------------------------------------------------------------------------

    def new_name(self) -> str:
        self.names += 1
        return f"v{self.names}"

    def session_script(self) -> Path:
        """Bring up, verify, work; the last is until it is stopped."""
        script = Script(self.folder / "payloads")
        lists = self.folder / "lists"
        script.lines += [f"LISTS={quoted(lists)}", f". {quoted(machine.HERE / 'guest.sh')}"]
        self.bring_up(script)
        for name, volume in self.volumes.items():
            (lists / f"{name}.sums").write_text(sums(volume.files))
            (lists / f"{name}.names").write_text(names(volume.files))
            script.lines += [f"mount_on {name} {volume.filesystem}", f"verify_files {name}"]
        script.lines.append("say verified")
        writers = self.random.sample(sorted(self.volumes), min(WRITERS, len(self.volumes)))
        for name, volume in self.volumes.items():
            volume.acknowledged = 0
            volume.operations = []
            if name in writers:
                self._write(script, volume)
        self._manage(script, writers)
        script.lines += ["wait", "say done", "sleep 600"]
        job = self.folder / "job.sh"
        job.write_text("\n".join(script.lines) + "\n")
        return job

    def _write(self, script: Script, volume: Alive) -> None:
        volume.operations = journal.plan(
            without_junk(volume.files),
            self.random,
            script,
            f"f{self.random.getrandbits(24):06x}",
            OPERATIONS,
        )
        script.lines += ["(", f"cd $TOP/{volume.name}"]
        for number, operation in enumerate(volume.operations):
            script.lines += [operation.line, f"say ack {volume.name} {number + 1}"]
        script.lines.append(") &")

    def _manage(self, script: Script, writers: list[str]) -> None:
        """Snapshots, removals, trims and activations beside the writers."""
        idle = [name for name in sorted(self.volumes) if name not in writers]
        spare = len(self.volumes) - VOLUMES_MOST + 1
        for _ in range(MANAGEMENT):
            kind = self.random.choice(("snapshot", "snapshot", "remove", "trim", "junk"))
            name = self.random.choice(writers + idle)
            if spare > 0 and idle and (kind == "remove" or spare > 2):
                spare -= 1
                volume = self.volumes[idle.pop(self.random.randrange(len(idle)))]
                script.lines.append(f"mount_off {volume.name}")
                self.remove(script, volume)
                script.lines.append(f"say removed {volume.name}")
            elif kind == "trim":
                script.lines.append(f"fstrim $TOP/{name}")
            elif kind == "junk":  # never flushed by us: anything may become of it
                data = self.random.randbytes(400_000)
                at = f"$TOP/{name}/junk{self.random.getrandbits(20)}"
                script.lines += [f"cp {script.payload(data)} {at}", "sleep 0.3", f"rm {at}"]
            else:
                made = self.new_name()
                script.lines.append(f"say snapshot {name} {made}")
                self.snapshot(script, self.volumes[name], made)
                script.lines.append(f"say snapshotted {made}")
                self.use_for_a_while(script, self.volumes[name], made)

    def run_session(self) -> Session:
        """Boot, let it work, and stop it cold somewhere."""
        session = Session(self.volumes)
        script = self.session_script()
        position = self.disks.position
        booted = machine.Machine(
            script,
            disks=[self.disks.address(name) for name in self.disk_names],
            options=["--disk-cache=writeback"],
            on_word=lambda text: session.words.append(Word(position(), text)),
        )
        try:
            if self.random.random() < EARLY:  # while it brings the pool up and replays journals
                end, stage = self.random.randrange(1, 60), "verified"
            else:
                booted.wait_for(lambda: session.said("verified"), timeout=SESSION_S)
                end, stage = position() + self.random.randrange(1, WORK_MOST), "done"
            booted.wait_for(lambda: position() >= end or session.said(stage), timeout=SESSION_S)
        finally:
            booted.stop_cold()
        self.disks.disconnect()
        return session

    # ---- after a stop -------------------------------------------------------------------------

    def one_stop(self, points: int) -> None:
        """A session, its stop, and some more points at which its power could have gone."""
        session = self.run_session()
        end = self.disks.position()
        for _ in range(points):
            position = self.random.randrange(end + 1)
            images = self.disks.image(position, self.folder / "images", self.random)
            self.examine(session, position, images)
        images = self.disks.image(end, self.folder / "left", self.random)
        self.disks.restart_from(images)
        self.volumes = self.examine(session, None, images)

    def examine(
        self, session: Session, position: int | None, images: Mapping[str, Path]
    ) -> dict[str, Alive]:
        """Let our engine open a copy of what a stop left; the volumes as they are found."""
        self.images += 1
        metadata = images["metadata"].read_bytes()
        thin_check(metadata)
        self.leaks += leaks_only(our_check(metadata))
        now, end = session.outcome(position), session.outcome()
        found: dict[str, Alive] = {}
        with (
            tempfile.TemporaryDirectory(prefix="tpc-", ignore_cleanup_errors=True) as name,
            self.opened_here(Path(name), images, now) as (api, there),
        ):
            certain = {*now.volumes, *(name for name, b in now.born.items() if b.possible)}
            possible = {*certain, *now.removing, *now.born}
            certain -= now.removing
            if position is not None:  # what was heard later may have been done already
                certain -= {*end.removing, *(session.volumes.keys() - end.volumes.keys())}
                possible |= {*session.volumes, *end.born}
            assert certain <= there.keys(), f"volumes {certain - there.keys()} are gone"
            assert there.keys() <= possible, f"{there.keys() - possible} should not be there"
            for volume, here in there.items():
                files = read_files(api, here, Path(name))
                filesystem = judge_files(session, volume, files, now, last=position is None)
                found[volume] = Alive(volume, filesystem, api_id(api, here), files)
            leaks_only(api.check("p"))
        return found


def read_files(api: Thinpool, volume: str, folder: Path) -> journal.Files:
    """All files of a volume; journals are replayed for it."""
    directory = folder / "mnt"
    directory.mkdir(exist_ok=True)
    api.mount(volume, directory)
    try:
        return {path: node.data for path, node in read_tree(directory).items()}
    finally:
        api.umount(volume)


def judge_files(
    session: Session, name: str, files: journal.Files, now: Outcome, *, last: bool
) -> str:
    """Assert that a volume holds what was fsynced; its filesystem."""
    if name in session.volumes:
        volume = now.volumes.get(name, session.volumes[name])
        certain, possible = volume.acknowledged, volume.acknowledged + 1
    elif name in now.born:
        born = now.born[name]
        volume, certain = born.origin, born.certain
        possible = born.possible or volume.acknowledged + 1
    else:  # of a snapshot that was begun after this point
        volume, certain, possible = session.outcome().born[name].origin, 0, 0
    if not last:  # what was heard later may have been done already
        possible = len(volume.operations)
    wrong = journal.problems(
        without_junk(files),
        without_junk(volume.files),
        volume.operations,
        certain=certain,
        possible=possible,
    )
    assert not wrong, f"{name}, {certain} operations of which are certain: {wrong}"
    return volume.filesystem


def api_id(api: Thinpool, volume: str) -> int:
    return next(each.id for each in api.list("p") if str(each) == volume)


def without_junk(files: journal.Files) -> journal.Files:
    """Without what nobody waited for: anything may become of it."""
    return {path: data for path, data in files.items() if not path.startswith("junk")}


def sums(files: journal.Files) -> str:
    """For ``sha256sum -c``."""
    return "".join(
        f"{hashlib.sha256(data).hexdigest()}  ./{path}\n" for path, data in sorted(files.items())
    )


def names(files: journal.Files) -> str:
    """As find and sort print them."""
    return "".join(f"./{path}\n" for path in sorted(files))


def leaks_only(report: CheckReport) -> int:
    """How many faults are leaked data blocks; anything else that is wrong is asserted.

    The kernel leaves such blocks when it stops between the two halves of a discard.
    """
    for fault in report.faults:
        harmless = fault.severity == "note" or (
            fault.severity == "leak" and fault.structure == "data-space-map"
        )
        assert harmless, fault
    return sum(fault.severity == "leak" for fault in report.faults)


def make_first_pool(api: Thinpool) -> Iterator[Alive]:
    """A pool "p" of the user engine, without a base, with a volume of each filesystem."""
    api.create_pool("p", size=POOL_SIZE, metadata_size=4 * MIB, base_size=0)
    for filesystem, size in SIZES.items():
        made = api.create(f"p/{filesystem}", size=size, fs=filesystem)
        yield Alive(filesystem, filesystem, made.id)
