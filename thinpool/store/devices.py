"""From a volume to a block device with a stable link, whichever engine makes it.

Of the user engine: a file of the FUSE server, and a loop device over it. Three things record an
activation: the catalogue, the table of files that workers hand on, and the loop device itself. They
are written in this order on the way up and in the reverse on the way down, so whatever a crash
leaves is seen by comparing them, and taken down. The kernel's volumes are in
``thinpool.store.dmdevices``.

Thread-safe for different volumes; the caller holds the volume's lock.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

from thinpool import errors
from thinpool.host import loop, mountinfo
from thinpool.host.rundir import RunDirectory, set_node_access
from thinpool.store.catalogue import ActivationRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from thinpool.engine import VolumeIO
    from thinpool.model import VolumeId
    from thinpool.store.catalogue import Catalogue, Record

_DEFAULT_MODE = 0o660

EXTERNAL_ORIGIN: Final = "external-origin"
"""The label of volumes that have one: the block device that is read where nothing is mapped."""


class ServedFile(Protocol):
    """One entry of the table of files."""

    @property
    def id(self) -> VolumeId:
        """Of the volume."""
        ...


class Served(Protocol):
    """Serves volumes as files; what it serves is brought back after a crash of this process."""

    def path(self, volume_id: VolumeId) -> Path:
        """Of a volume's file; UnsupportedHostError where there can be none."""
        ...

    def add(
        self, volume_id: VolumeId, *, size: int, read_only: bool = False, generation: int
    ) -> Path:
        """Open a volume and serve it."""
        ...

    def remove(self, volume_id: VolumeId) -> None:
        """Take the file away once its requests are answered, and close the volume."""
        ...

    def resize(self, volume_id: VolumeId, size: int) -> None:
        """Change the size of a served volume."""
        ...

    def volume(self, volume_id: VolumeId) -> VolumeIO | None:
        """The open volume; None when it is not served."""
        ...

    def entries(self) -> Sequence[ServedFile]:
        """What is served."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An active volume.

    Attributes:
        path: the stable link; ``node``: where it points now.
        number: ``major:minor``.
        file: in the FUSE mount; None of the kernel's.
    """

    path: str
    node: str
    number: str
    file: str | None

    @property
    def device_number(self) -> int:
        """As the kernel counts."""
        major, minor = self.number.split(":")
        return os.makedev(int(major), int(minor))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How a volume is to be activated.

    Attributes:
        read_only: it takes no writes.
        by_mount: mount asks, so the last umount takes it down.
        owner, mode: who may use the node.
        origin: the external origin below it, a block device's path.
    """

    read_only: bool
    by_mount: bool = False
    owner: tuple[int, int] | None = None
    mode: int | None = None
    origin: str | None = None


class DeviceMaker(Protocol):
    """Makes the devices of a pool whose catalogue is open."""

    def __call__(self, root: Path, pool: str, catalogue: Catalogue) -> Devices:
        """Of a pool under a root."""
        ...


class Devices(ABC):
    """The block devices of one pool.

    Args:
        root: of the pools.
        pool: its name.
        catalogue: where activations are recorded.
    """

    reads_origins: ClassVar[bool] = False
    """A volume may have an external origin."""

    suspends: ClassVar[bool] = False
    """The engine itself brings an active origin to rest, its filesystem too, for a snapshot."""

    def __init__(self, root: Path, pool: str, catalogue: Catalogue) -> None:
        """Nothing is made yet."""
        self._pool = pool
        self._catalogue = catalogue
        self._run = RunDirectory.of_root(root)

    # ---- what each engine does its own way --------------------------------------------------

    @abstractmethod
    def find(self, record: Record) -> Device | None:
        """The device of an active volume."""

    @abstractmethod
    def attach(self, record: Record, wanted: Wanted) -> Device:
        """Make the device of a volume that is not open. On failure nothing of it is left."""

    def attach_all(self, wanted: Sequence[tuple[Record, Wanted]]) -> list[Device]:
        """The same for several, in their order: all or none."""
        made = []
        with contextlib.ExitStack() as undo:
            for record, how in wanted:
                made.append(self.attach(record, how))
                undo.callback(self.detach, record)
            undo.pop_all()
        return made

    @abstractmethod
    def detach(self, record: Record, *, deferred: bool = False) -> bool:
        """Take the device down.

        Args:
            record: of the volume.
            deferred: one that is in use goes when its last user lets go of it.

        Returns:
            Whether it is gone.

        Raises:
            BusyError: it is mounted or open; everything stays.
        """

    @abstractmethod
    def keep(self, record: Record) -> None:
        """Let a device stay that was to go when its last user lets go of it.

        Raises:
            BusyError: it is going.
        """

    @abstractmethod
    def open_active(self, record: Record) -> tuple[VolumeIO, bool] | None:
        """An active volume for reading beside its device; None when it is not active.

        Returns:
            The volume, and whether whoever gets it closes it.
        """

    @abstractmethod
    def resize(self, record: Record, size: int) -> bool:
        """Let an active volume have another size; False when it is not active."""

    @abstractmethod
    def resized(self, record: Record) -> None:
        """Let the device follow the volume's size, which is recorded by now."""

    @abstractmethod
    def sweep(self) -> None:
        """Take down what no activation tells of, so that the catalogue can be mended."""

    @abstractmethod
    def restore(self) -> list[str]:
        """Take down what is only half there; what was whole works again by now.

        Returns:
            The names of volumes that are not active any more.
        """

    @abstractmethod
    def _node(self, activation: ActivationRecord) -> str | None:
        """Where the link of an active volume leads."""

    # ---- what is the same -------------------------------------------------------------------

    def find_all(self, records: Sequence[Record]) -> dict[VolumeId, Device]:
        """The devices of those that are active, by id."""
        active = self._catalogue.activations_of([record.id for record in records])
        found = {record.id: self.find(record) for record in records if record.id in active}
        return {volume_id: device for volume_id, device in found.items() if device is not None}

    def mounts(self, device: Device) -> list[mountinfo.NamespaceMount]:
        """Where it is mounted, in every namespace that can be seen."""
        return mountinfo.mounts_of_device(device.device_number, source=device.node)

    def all_mounts(self) -> dict[int, list[str]]:
        """Mount points by device number, in every namespace, read once; empty if none is active."""
        found: dict[int, list[str]] = {}
        if not self._catalogue.activations():
            return found
        for _, pid in mountinfo.namespaces():
            try:
                table = Path(f"/proc/{pid}/mountinfo").read_bytes()
            except OSError:
                continue  # ended meanwhile
            for entry in mountinfo.parse_mountinfo(table):
                found.setdefault(entry.device, []).append(entry.mount_point)
        return found

    def _activation(self, record: Record, wanted: Wanted, generation: int) -> ActivationRecord:
        """The record of a device that is about to be made."""
        return ActivationRecord(
            id=record.id,
            read_only=wanted.read_only,
            generation=generation,
            loop=None,
            sequence=None,
            by_mount=wanted.by_mount,
            settings={"owner": wanted.owner, "mode": wanted.mode},
        )

    def unlink(self, record: Record) -> None:
        """Take the link of a volume away, whose device stays for those that have it open."""
        self._run.unlink_device(self._pool, record.name)

    def _hand_out(self, record: Record, node: str, wanted: Wanted) -> None:
        """Let its owner use a node, and a link lead to it."""
        self._open_node(node, wanted)
        self._run.link_device(self._pool, record.name, node)

    def _open_node(self, node: str, wanted: Wanted) -> None:
        if wanted.owner is not None or wanted.mode is not None:
            user, group = wanted.owner if wanted.owner is not None else (None, None)
            mode = wanted.mode if wanted.mode is not None else _DEFAULT_MODE
            set_node_access(node, owner=user, group=group, mode=mode)

    def _link(self, record: Record, node: str) -> str:
        """The stable path; the node itself where a link could not be."""
        link = self._run.device_link(self._pool, record.name)
        return str(link) if link is not None else node

    def _restore_links(self, whole: set[VolumeId]) -> None:
        wanted = {}
        for volume_id in whole:
            record = self._catalogue.by_id(volume_id)
            activation = self._catalogue.activation(volume_id)
            node = self._node(activation) if activation is not None else None
            if record is not None and node is not None:
                wanted[record.name] = node
        present = self._run.device_links(self._pool)
        for name in present.keys() - wanted.keys():
            self._run.unlink_device(self._pool, name)
        for name, node in wanted.items():
            if present.get(name) != node:
                self._run.link_device(self._pool, name, node)

    def renamed(self, old: str, record: Record) -> None:
        """Let the link follow a new name."""
        activation = self._catalogue.activation(record.id)
        node = self._node(activation) if activation is not None else None
        if node is not None:
            self._run.link_device(self._pool, record.name, node)
            self._run.unlink_device(self._pool, old)

    def forget(self) -> None:
        """Drop what links are left: the server ends."""
        self._run.forget_pool(self._pool)


class LoopDevices(Devices):
    """The user engine's: loop devices over the files that a server serves.

    Args:
        root: of the pools.
        pool: its name.
        catalogue: where activations are recorded.
        served: the files; None where this host or this user can have none.
    """

    def __init__(self, root: Path, pool: str, catalogue: Catalogue, served: Served | None) -> None:
        """Nothing is made yet."""
        super().__init__(root, pool, catalogue)
        self._served = served

    @classmethod
    def maker(cls, served: Served | None) -> DeviceMaker:
        """For a pool whose catalogue is not open yet."""

        def make(root: Path, pool: str, catalogue: Catalogue) -> Devices:
            return cls(root, pool, catalogue, served)

        return make

    def require(self, record: Record) -> Served:
        """What serves files.

        Raises:
            UnsupportedHostError: nothing does here.
        """
        if self._served is None:
            raise errors.UnsupportedHostError(
                "volumes cannot be activated or mounted here: that needs FUSE, loop devices and "
                "the right to mount; run as root on a host that has them, or read and write "
                "volumes through the API",
                missing="fuse",
            )
        self._served.path(record.id)
        return self._served

    def find(self, record: Record) -> Device | None:
        """The device of an active volume."""
        activation = self._catalogue.activation(record.id)
        if activation is None or activation.loop is None or self._served is None:
            return None
        return self._device(record, activation.loop, self._served)

    def find_all(self, records: Sequence[Record]) -> dict[VolumeId, Device]:
        """The devices of those that are active, by id; activations and links are read once."""
        served = self._served
        if served is None:
            return {}
        found = self._catalogue.activations_of([record.id for record in records])
        active = [
            (record, number)
            for record in records
            if (activation := found.get(record.id)) is not None
            and (number := activation.loop) is not None
        ]
        if not active:
            return {}
        links = self._run.find_links(self._pool, [record.name for record, _ in active])
        return {
            record.id: self._device_at(record, number, served, links.get(record.name))
            for record, number in active
        }

    def _device(self, record: Record, number: int, served: Served) -> Device:
        link = self._run.device_link(self._pool, record.name)
        return self._device_at(record, number, served, link)

    def _device_at(self, record: Record, number: int, served: Served, link: Path | None) -> Device:
        node = f"/dev/loop{number}"
        return Device(
            path=str(link) if link is not None else node,
            node=node,
            number=f"{loop.LOOP_MAJOR}:{number}",
            file=str(served.path(record.id)),
        )

    def _node(self, activation: ActivationRecord) -> str | None:
        return None if activation.loop is None else f"/dev/loop{activation.loop}"

    def open_active(self, record: Record) -> tuple[VolumeIO, bool] | None:
        """The volume that is served; it stays open."""
        volume = self._served.volume(record.id) if self._served is not None else None
        return None if volume is None else (volume, False)

    # ---- up ---------------------------------------------------------------------------------

    def attach(self, record: Record, wanted: Wanted) -> Device:
        """Make the device of a volume that is not open. On failure nothing of it is left."""
        return self.attach_all([(record, wanted)])[0]

    def attach_all(self, wanted: Sequence[tuple[Record, Wanted]]) -> list[Device]:
        """Make the devices of several: all or none, their activations in two transactions."""
        for record, how in wanted:
            self.require(record)
            if how.origin is not None:
                raise errors.UnsupportedHostError(
                    f"{record.name} has an external origin, which the user engine does not read: "
                    "use a pool of the dm engine",
                    missing="external origins",
                    name=record.name,
                )
        generations = self._catalogue.next_generations(len(wanted))
        planned = [
            self._activation(record, how, generation)
            for (record, how), generation in zip(wanted, generations, strict=True)
        ]
        with contextlib.ExitStack() as undo:
            self._catalogue.put_activations(planned)
            undo.callback(self._catalogue.delete_activations, [each.id for each in planned])
            made = [
                self._attach_one(record, how, activation.generation, undo=undo)
                for (record, how), activation in zip(wanted, planned, strict=True)
            ]
            self._catalogue.put_activations(
                [
                    replace(activation, loop=device.number, sequence=device.sequence)
                    for activation, device in zip(planned, made, strict=True)
                ]
            )
            nodes = {
                record.name: device.path for (record, _), device in zip(wanted, made, strict=True)
            }
            links = self._run.link_devices(self._pool, nodes)
            undo.pop_all()
        return [
            self._device_at(record, device.number, self.require(record), links[record.name])
            for (record, _), device in zip(wanted, made, strict=True)
        ]

    def _attach_one(
        self, record: Record, wanted: Wanted, generation: int, *, undo: contextlib.ExitStack
    ) -> loop.LoopDevice:
        served = self.require(record)
        file = served.add(
            record.id, size=record.size, read_only=wanted.read_only, generation=generation
        )
        undo.callback(served.remove, record.id)
        device = loop.attach(file, read_only=wanted.read_only)
        undo.callback(loop.detach, device)
        self._open_node(device.path, wanted)
        return device

    # ---- down -------------------------------------------------------------------------------

    def detach(self, record: Record, *, deferred: bool = False) -> bool:
        """Take the device down; one that is in use has to be let go of first."""
        activation = self._catalogue.activation(record.id)
        if activation is None:
            return True
        standing = self._standing(activation)
        if standing is not None:
            try:
                loop.detach(standing)
            except errors.BusyError:
                if deferred:
                    return False
                raise
        self._run.unlink_device(self._pool, record.name)
        if self._served is not None:
            with contextlib.suppress(errors.NotFoundError):
                self._served.remove(record.id)
        self._catalogue.delete_activations([record.id])
        return True

    def keep(self, record: Record) -> None:
        """Nothing: it is a server that tries to take it down, not the kernel."""

    def _standing(self, activation: ActivationRecord) -> loop.LoopDevice | None:
        """The loop device, if it is still the one that was attached."""
        if activation.loop is None:
            return None
        found = loop.describe_number(activation.loop)
        if found is None or (activation.sequence and found.sequence != activation.sequence):
            return None
        return found

    # ---- after a crash ----------------------------------------------------------------------

    def sweep(self) -> None:
        """Nothing: files and devices that no activation tells of are in nobody's way."""

    def restore(self) -> list[str]:
        """Take down what is only half there; what was whole is served again by now.

        Returns:
            The names of volumes that are not active any more.
        """
        served = {entry.id for entry in self._served.entries()} if self._served else set()
        lost = []
        whole: set[VolumeId] = set()
        for activation in self._catalogue.activations():
            if activation.id in served and self._standing(activation) is not None:
                whole.add(activation.id)
                continue
            record = self._catalogue.by_id(activation.id)
            dead = self._standing(activation)
            if dead is not None:  # its file is gone: whoever still has it open gets errors
                with contextlib.suppress(errors.BusyError):
                    loop.detach(dead)
            if record is not None:
                self._run.unlink_device(self._pool, record.name)
                lost.append(record.name)
            self._catalogue.delete_activations([activation.id])
        for volume_id in served - whole:
            self._take_down_file(volume_id)
        self._restore_links(whole)
        return lost

    def _take_down_file(self, volume_id: VolumeId) -> None:
        if self._served is None:
            return
        for device in loop.find(self._served.path(volume_id)):
            with contextlib.suppress(errors.BusyError):
                loop.detach(device)
        self._served.remove(volume_id)

    # ---- changes ----------------------------------------------------------------------------

    def resize(self, record: Record, size: int) -> bool:
        """Let the file of an active volume have another size."""
        if self._served is None or self._catalogue.activation(record.id) is None:
            return False
        self._served.resize(record.id, size)
        return True

    def resized(self, record: Record) -> None:
        """Let the device follow the volume's size."""
        activation = self._catalogue.activation(record.id)
        if activation is not None and activation.loop is not None:
            loop.set_capacity(f"/dev/loop{activation.loop}")
