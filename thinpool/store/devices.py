"""From a volume to a block device: a file of the FUSE server, a loop device over it, a stable link.

Three things record an activation: the catalogue, the table of files that workers hand on, and the
loop device itself. They are written in this order on the way up and in the reverse on the way
down, so whatever a crash leaves is seen by comparing them, and taken down.

Thread-safe for different volumes; the caller holds the volume's lock.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

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
        file: in the FUSE mount.
    """

    path: str
    node: str
    number: str
    file: str

    @property
    def device_number(self) -> int:
        """As the kernel counts."""
        major, minor = self.number.split(":")
        return os.makedev(int(major), int(minor))


class Devices:
    """The block devices of one pool.

    Args:
        root: of the pools.
        pool: its name.
        catalogue: where activations are recorded.
        served: the files; None where this host or this user can have none.
    """

    def __init__(self, root: Path, pool: str, catalogue: Catalogue, served: Served | None) -> None:
        """Nothing is made yet."""
        self._pool = pool
        self._catalogue = catalogue
        self._served = served
        self._run = RunDirectory.of_root(root)

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

    # ---- what is there ----------------------------------------------------------------------

    def find(self, record: Record) -> Device | None:
        """The device of an active volume."""
        activation = self._catalogue.activation(record.id)
        if activation is None or activation.loop is None or self._served is None:
            return None
        return self._device(record, activation.loop, self._served)

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

    def _device(self, record: Record, number: int, served: Served) -> Device:
        link = self._run.device_link(self._pool, record.name)
        node = f"/dev/loop{number}"
        return Device(
            path=str(link) if link is not None else node,
            node=node,
            number=f"{loop.LOOP_MAJOR}:{number}",
            file=str(served.path(record.id)),
        )

    # ---- up ---------------------------------------------------------------------------------

    def attach(
        self,
        record: Record,
        *,
        read_only: bool,
        by_mount: bool,
        owner: tuple[int, int] | None,
        mode: int | None,
    ) -> Device:
        """Make the device of a volume that is not open. On failure nothing of it is left."""
        served = self.require(record)
        activation = ActivationRecord(
            id=record.id,
            read_only=read_only,
            generation=self._catalogue.next_generation(),
            loop=None,
            sequence=None,
            by_mount=by_mount,
            settings={"owner": owner, "mode": mode},
        )
        with contextlib.ExitStack() as undo:
            self._catalogue.put_activation(activation)
            undo.callback(self._catalogue.delete_activation, record.id)
            file = served.add(
                record.id, size=record.size, read_only=read_only, generation=activation.generation
            )
            undo.callback(served.remove, record.id)
            device = loop.attach(file, read_only=read_only)
            undo.callback(loop.detach, device)
            activation = replace(activation, loop=device.number, sequence=device.sequence)
            self._catalogue.put_activation(activation)
            if owner is not None or mode is not None:
                user, group = owner if owner is not None else (None, None)
                set_node_access(
                    device.path,
                    owner=user,
                    group=group,
                    mode=mode if mode is not None else _DEFAULT_MODE,
                )
            self._run.link_device(self._pool, record.name, device.path)
            undo.pop_all()
        return self._device(record, device.number, served)

    # ---- down -------------------------------------------------------------------------------

    def detach(self, record: Record) -> None:
        """Take the device down.

        Raises:
            BusyError: it is mounted or open; everything stays.
        """
        activation = self._catalogue.activation(record.id)
        if activation is None:
            return
        standing = self._standing(activation)
        if standing is not None:
            loop.detach(standing)
        self._run.unlink_device(self._pool, record.name)
        if self._served is not None:
            with contextlib.suppress(errors.NotFoundError):
                self._served.remove(record.id)
        self._catalogue.delete_activation(record.id)

    def _standing(self, activation: ActivationRecord) -> loop.LoopDevice | None:
        """The loop device, if it is still the one that was attached."""
        if activation.loop is None:
            return None
        found = loop.describe_number(activation.loop)
        if found is None or (activation.sequence and found.sequence != activation.sequence):
            return None
        return found

    # ---- after a crash ----------------------------------------------------------------------

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
            self._catalogue.delete_activation(activation.id)
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

    def _restore_links(self, whole: set[VolumeId]) -> None:
        wanted = {}
        for volume_id in whole:
            record = self._catalogue.by_id(volume_id)
            activation = self._catalogue.activation(volume_id)
            if record is not None and activation is not None:
                wanted[record.name] = f"/dev/loop{activation.loop}"
        present = self._run.device_links(self._pool)
        for name in present.keys() - wanted.keys():
            self._run.unlink_device(self._pool, name)
        for name, node in wanted.items():
            if present.get(name) != node:
                self._run.link_device(self._pool, name, node)

    # ---- changes ----------------------------------------------------------------------------

    def renamed(self, old: str, record: Record) -> None:
        """Let the link follow a new name."""
        activation = self._catalogue.activation(record.id)
        if activation is not None and activation.loop is not None:
            self._run.link_device(self._pool, record.name, f"/dev/loop{activation.loop}")
            self._run.unlink_device(self._pool, old)

    def resized(self, record: Record) -> None:
        """Let the device follow the volume's size."""
        activation = self._catalogue.activation(record.id)
        if activation is not None and activation.loop is not None:
            loop.set_capacity(f"/dev/loop{activation.loop}")

    def forget(self) -> None:
        """Drop what links are left: the server ends."""
        self._run.forget_pool(self._pool)
