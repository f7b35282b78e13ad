"""From a volume to a block device: a file of the FUSE server, a loop device over it, a stable link.

Links stand in RUN/dev/POOL; where another root has a pool of that name, in RUN/dev/POOL@HASH. A
link is replaced by rename, so a path never misses while it should be there.

Thread-safe for different volumes; the caller holds the volume's lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from thinpool import errors
from thinpool.host import loop, mountinfo
from thinpool.store.catalogue import ActivationRecord

if TYPE_CHECKING:
    from thinpool.engine import Volume
    from thinpool.model import VolumeId
    from thinpool.store.catalogue import Catalogue, Record

_CLAIM: Final = ".root"
_HASH_DIGITS: Final = 8
_DEFAULT_MODE: Final = 0o660


class Exporter(Protocol):
    """Serves volumes as files named ``id-N`` under a directory."""

    def add_file(self, volume: Volume, *, read_only: bool = False, generation: int) -> None:
        """Serve one."""
        ...

    def remove_file(self, file_id: VolumeId) -> None:
        """Take it out, once its requests are answered."""
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


def run_directory(root: Path) -> Path:
    """RUN: /run/thinpool for root (or ``$THINPOOL_RUN``), ROOT/run for others."""
    named = os.environ.get("THINPOOL_RUN")
    if named:
        return Path(named)
    return Path("/run/thinpool") if os.geteuid() == 0 else root / "run"


def link_directory(root: Path, pool: str) -> Path:
    """Where a pool's device links stand; claims it for this root."""
    base = run_directory(root) / "dev"
    mine = str(root.resolve())
    wanted = base / pool
    wanted.mkdir(parents=True, exist_ok=True)
    claim = wanted / _CLAIM
    try:
        descriptor = os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        if claim.read_text(encoding="utf-8") in {mine, ""}:
            return wanted
        digest = hashlib.sha256(mine.encode()).hexdigest()[:_HASH_DIGITS]
        other = base / f"{pool}@{digest}"
        other.mkdir(parents=True, exist_ok=True)
        return other
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(mine)
    return wanted


class Devices:
    """The block devices of one pool.

    Args:
        root: of the pools.
        pool: its name.
        catalogue: where activations are recorded.
        exporter: None where this host or this user can have no files.
        directory: the FUSE mount.
    """

    def __init__(
        self,
        root: Path,
        pool: str,
        catalogue: Catalogue,
        exporter: Exporter | None,
        directory: Path | None,
    ) -> None:
        """Nothing is made yet."""
        self._root = root
        self._pool = pool
        self._catalogue = catalogue
        self._exporter = exporter
        self._directory = directory

    def require(self) -> tuple[Exporter, Path]:
        """The exporter and its directory.

        Raises:
            UnsupportedHostError: there is none here.
        """
        if self._exporter is None or self._directory is None:
            raise errors.UnsupportedHostError(
                "block devices need FUSE and loop devices, and the right to mount: run as root "
                "on a host that has them, or read and write the volume through the API",
                missing="fuse",
            )
        return self._exporter, self._directory

    # ---- what is there ----------------------------------------------------------------------

    def find(self, record: Record) -> Device | None:
        """The device of an active volume."""
        activation = self._catalogue.activation(record.id)
        if activation is None or activation.loop is None or self._directory is None:
            return None
        return self._device(record, activation.loop)

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

    def _file(self, volume_id: VolumeId) -> Path:
        _, directory = self.require()
        return directory / f"id-{volume_id}"

    def _device(self, record: Record, number: int) -> Device:
        return Device(
            path=str(link_directory(self._root, self._pool) / record.name),
            node=f"/dev/loop{number}",
            number=f"{loop.LOOP_MAJOR}:{number}",
            file=str(self._file(record.id)),
        )

    # ---- up ---------------------------------------------------------------------------------

    def attach(
        self,
        record: Record,
        volume: Volume,
        *,
        read_only: bool,
        by_mount: bool,
        owner: tuple[int, int] | None,
        mode: int | None,
    ) -> Device:
        """Make the device of an open volume. On failure nothing of it is left."""
        exporter, _ = self.require()
        generation = self._catalogue.next_generation()
        activation = ActivationRecord(
            id=record.id,
            read_only=read_only,
            generation=generation,
            loop=None,
            sequence=None,
            by_mount=by_mount,
            settings={"owner": owner, "mode": mode},
        )
        with contextlib.ExitStack() as undo:
            # Recorded before anything is made: a successor takes down what has no loop device yet.
            self._catalogue.put_activation(activation)
            undo.callback(self._catalogue.delete_activation, record.id)
            exporter.add_file(volume, read_only=read_only, generation=generation)
            undo.callback(exporter.remove_file, record.id)
            device = loop.attach(self._file(record.id), read_only=read_only)
            undo.callback(loop.detach, device)
            activation = replace(activation, loop=device.number, sequence=device.sequence)
            self._catalogue.put_activation(activation)
            if owner is not None:
                os.chown(device.path, *owner)
            os.chmod(device.path, mode if mode is not None else _DEFAULT_MODE)  # noqa: PTH101 - a device node
            self._link(record)
            undo.pop_all()
        return self._device(record, device.number)

    def restore(self, record: Record, volume: Volume, activation: ActivationRecord) -> None:
        """Serve again what a dead predecessor served; its loop device still stands."""
        exporter, _ = self.require()
        exporter.add_file(volume, read_only=activation.read_only, generation=activation.generation)
        self._link(record)

    def _link(self, record: Record) -> None:
        activation = self._catalogue.activation(record.id)
        if activation is None or activation.loop is None:
            return
        directory = link_directory(self._root, self._pool)
        temporary = directory / f".{record.name}.new"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(f"/dev/loop{activation.loop}")
        temporary.replace(directory / record.name)

    # ---- down -------------------------------------------------------------------------------

    def detach(self, record: Record) -> None:
        """Take the device down.

        Raises:
            BusyError: it is mounted or open; everything stays.
        """
        exporter, _ = self.require()
        activation = self._catalogue.activation(record.id)
        if activation is None:
            return
        if activation.loop is not None:
            standing = self._standing(activation)
            if standing is not None:
                _restore_node(standing.path)
                loop.detach(standing)
        self.unlink(record.name)
        with contextlib.suppress(errors.NotFoundError):
            exporter.remove_file(record.id)
        self._catalogue.delete_activation(record.id)

    def _standing(self, activation: ActivationRecord) -> loop.LoopDevice | None:
        """The loop device, if it is still the one that was attached."""
        if activation.loop is None:
            return None
        found = loop.describe_number(activation.loop)
        if found is None or (activation.sequence and found.sequence != activation.sequence):
            return None
        return found

    def stands(self, activation: ActivationRecord) -> bool:
        """The device of an activation is still there."""
        return self._standing(activation) is not None

    def unlink(self, name: str) -> None:
        """Drop a link."""
        (link_directory(self._root, self._pool) / name).unlink(missing_ok=True)

    def relink(self, old: str, record: Record) -> None:
        """Follow a new name."""
        self._link(record)
        self.unlink(old)

    def resized(self, record: Record) -> None:
        """Let the device follow the volume's size."""
        activation = self._catalogue.activation(record.id)
        if activation is not None and activation.loop is not None:
            loop.set_capacity(f"/dev/loop{activation.loop}")

    def clear_links(self) -> None:
        """Drop every link: at the start of a server that has no predecessor, and at its end."""
        directory = link_directory(self._root, self._pool)
        for entry in directory.iterdir():
            if entry.is_symlink():
                entry.unlink(missing_ok=True)
        (directory / _CLAIM).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            directory.rmdir()


def _restore_node(path: str) -> None:
    """As udev makes it: the number serves somebody else next."""
    import grp  # noqa: PLC0415 - only where a device is taken down

    try:
        group = grp.getgrnam("disk").gr_gid
    except KeyError:
        group = 0
    with contextlib.suppress(OSError):
        os.chown(path, 0, group)
        os.chmod(path, _DEFAULT_MODE)  # noqa: PTH101 - a device node
