"""Block devices to be measured: thinpool's, and those that do the same or less.

Each target can give a device whose blocks are all there (``mapped``); some also one of which
nothing was written yet (``unmapped``), and one that shares all its blocks with another
(``shared``). All are loop devices with direct I/O, but for the file itself.
"""

from __future__ import annotations

import fcntl
import os
import random
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from thinpool import dm
from thinpool.bench.null_target import FILE
from thinpool.bench.workplace import Workplace, make_disk, wait_for_mount, write_file
from thinpool.errors import ThinpoolError, UnsupportedHostError
from thinpool.host.programs import find_program, run_program

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

_FICLONE: Final = 0x40049409
KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
BLOCK: Final = 64 * KIB
_BLKDISCARD: Final = 0x1277
_XFS_BLOCK: Final = 4096
_READY_SECONDS: Final = 10.0
_SETTLE_SECONDS: Final = 20.0
_SETTLE_PAUSE: Final = 0.3


class Target:
    """One kind of device.

    Attributes:
        name: of the subject.
        place: what it makes is undone with it.
    """

    name: str

    def __init__(self, place: Workplace) -> None:
        """Make nothing yet."""
        self.place: Final = place

    def mapped(self, size: int) -> str:
        """A device whose every block was written."""
        raise NotImplementedError

    def unmapped(self, size: int) -> str:
        """A new device of which nothing was written."""
        raise NotImplementedError

    def shared(self, size: int) -> str:
        """A new device that shares every block with one that was written."""
        raise NotImplementedError

    def take_down(self) -> None:
        """Make room after a device was measured, where that matters."""


class RawFile(Target):
    """A file of the host, without a loop device."""

    name = "file, no loop"

    def mapped(self, size: int) -> str:
        """A file that was written."""
        path = self.place.new_folder("file") / "data"
        write_file(path, size)
        return str(path)


class PlainLoop(Target):
    """A loop device over a file of the host."""

    name = "loop on a raw file"

    def mapped(self, size: int) -> str:
        """Over a file that was written."""
        path = self.place.new_folder("plain") / "data"
        write_file(path, size)
        return self.place.loop_device(path)

    def unmapped(self, size: int) -> str:
        """Over a sparse file."""
        return self.place.loop_device(_sparse(self.place.new_folder("plain") / "data", size))


class Null(Target):
    """thinpool's FUSE server with the mapping layer taken out, under a loop device."""

    name = "null target"

    def mapped(self, size: int) -> str:
        """Over a file that was written."""
        folder = self.place.new_folder("null")
        write_file(folder / "data", size)
        (folder / "mnt").mkdir()
        log = folder / "log"
        child = self.place.start(
            sys.executable,
            ["-P", "-m", "thinpool.bench.null_target", str(folder / "data"), str(folder / "mnt")],
            package="python3",
            log=log,
        )
        _wait(child, log, lambda: "ready" in log.read_text(), "the null target")
        return self.place.loop_device(folder / "mnt" / FILE)


class Thinpool(Target):
    """A volume of a pool, activated: the user engine's.

    Attributes:
        engine: of the pool.
    """

    name = "thinpool"
    engine = "user"

    def __init__(self, place: Workplace, *, size: int) -> None:
        """Make a pool.

        Args:
            place: it is undone with it.
            size: bytes of data.
        """
        super().__init__(place)
        self.api: Final = place.thinpool()
        self.api.create_pool("bench", size=size, base_size=0, min_free=0, engine=self.engine)
        self._count = 0

    def mapped(self, size: int) -> str:
        """A volume that was written."""
        device = self.unmapped(size)
        fill(device, size)
        return device

    def unmapped(self, size: int) -> str:
        """A new volume."""
        name = self._name()
        self.api.create(name, size=size)
        return self._activated(name)

    def shared(self, size: int) -> str:
        """A snapshot of a volume that was written once."""
        if not any(str(volume) == "bench/origin" for volume in self.api.list("bench")):
            self.api.create("bench/origin", size=size)
            fill(self._activated("bench/origin"), size)
            self.api.deactivate("bench/origin")
        name = self._name()
        self.api.snapshot("bench/origin", name)
        return self._activated(name)

    def _name(self) -> str:
        self._count += 1
        return f"bench/v{self._count}"

    def _activated(self, name: str) -> str:
        device = self.api.activate(name).device
        if device is None:
            raise ThinpoolError(f"{name} was activated without a device", volume=name)
        return os.path.realpath(device)


class AgedThinpool(Thinpool):
    """The same, in a pool that is 90 % full and whose free blocks are scattered one by one."""

    name = "thinpool, pool 90 % full"

    def __init__(self, place: Workplace, *, size: int) -> None:
        """Make a pool, fill it, and free every tenth block or so.

        Args:
            place: it is undone with it.
            size: bytes of the devices; so much is free, and ten times as much is all.
        """
        super().__init__(place, size=10 * size)
        self._active: str | None = None
        self.shared(size)
        self.take_down()
        self.api.create("bench/old", size=9 * size)
        device = self._activated("bench/old")
        fill(device, 9 * size)
        blocks = random.Random(1).sample(range(9 * size // BLOCK), size // BLOCK)  # noqa: S311
        with Path(device).open("r+b", buffering=0) as file:
            for block in blocks:
                fcntl.ioctl(file, _BLKDISCARD, struct.pack("QQ", block * BLOCK, BLOCK))
            os.fsync(file.fileno())
        self.settle()

    def take_down(self) -> None:
        """Remove the last device made, so that as much is free as before."""
        if self._active is not None:
            self.api.remove([self._active], deactivate=True)
            self._active = None
            self.settle()

    def settle(self) -> None:
        """Wait until the pool has returned what was freed to the host."""
        data = self.api.status("bench").data.path
        deadline = time.monotonic() + _SETTLE_SECONDS
        before = -1
        while (now := os.stat(data).st_blocks) != before and time.monotonic() < deadline:  # noqa: PTH116
            before = now
            time.sleep(_SETTLE_PAUSE)

    def _activated(self, name: str) -> str:
        if name not in {"bench/origin", "bench/old"}:
            self._active = name
        return super()._activated(name)


class Kernel(Thinpool):
    """The kernel's dm-thin, driven by thinpool; its two devices are loop devices over files."""

    name = "dm-thin of the kernel"
    engine = "dm"

    def __init__(self, place: Workplace, *, size: int) -> None:
        """Make a pool.

        Args:
            place: it is undone with it.
            size: bytes of data.

        Raises:
            UnsupportedHostError: this kernel has no device-mapper, or no thin target.
        """
        missing = dm.device_mapper()
        if missing is not None:
            raise UnsupportedHostError(missing, missing="device-mapper")
        super().__init__(place, size=size)


class Reflink(Target):
    """A loop device over a file on xfs that shares its extents with another (FICLONE).

    The xfs is on a loop device itself: the host's filesystem may know no reflinks.
    """

    name = "loop on a reflink copy"

    def __init__(self, place: Workplace, *, size: int) -> None:
        """Make the filesystem.

        Args:
            place: it is undone with it.
            size: bytes of all files together.
        """
        super().__init__(place)
        self._disk = make_disk(place, "xfs", size + GIB)
        self._count = 0

    def mapped(self, size: int) -> str:
        """A copy whose sharing is broken everywhere."""
        device = self.shared(size)
        fill(device, size)
        return device

    def shared(self, size: int) -> str:
        """A new copy."""
        origin = self._disk / "origin"
        if not origin.exists():
            write_file(origin, size)
        self._count += 1
        copy = self._disk / f"copy-{self._count}"
        with origin.open("rb") as file, copy.open("wb") as clone:
            fcntl.ioctl(clone, _FICLONE, file.fileno())
            os.fsync(clone.fileno())
        # xfs writes shared extents in units of its own blocks only.
        return self.place.loop_device(copy, sector=_XFS_BLOCK)


class Qemu(Target):
    """qemu-storage-daemon's FUSE export of a qcow2 image, under a loop device.

    Tuned: io_uring, direct I/O, lazy refcounts, an L2 cache that covers the image.
    """

    name = "qemu-storage-daemon"

    def __init__(
        self, place: Workplace, *, cluster: int = 64 * KIB, extended: bool = False
    ) -> None:
        """Choose the format.

        Args:
            place: it is undone with it.
            cluster: bytes of qcow2's clusters.
            extended: L2 entries with 32 subclusters, the unit of copying on write.

        Raises:
            UnsupportedHostError: it is not installed.
        """
        super().__init__(place)
        self._cluster = cluster
        self._extended = extended
        self._origin: Path | None = None
        for program in ("qemu-storage-daemon", "qemu-img"):
            if find_program(program) is None:
                raise UnsupportedHostError(
                    f"{program} is not installed; on Debian, qemu-system-common and qemu-utils "
                    "bring it",
                    missing=program,
                )

    def mapped(self, size: int) -> str:
        """An image that was written."""
        device = self.unmapped(size)
        fill(device, size)
        return device

    def unmapped(self, size: int) -> str:
        """A new image without a backing file."""
        return self._export(size, None)

    def shared(self, size: int) -> str:
        """A new image whose backing file is a raw one that was written."""
        if self._origin is None:
            self._origin = self.place.new_folder("backing") / "data"
            write_file(self._origin, size)
        return self._export(size, self._origin)

    def _export(self, size: int, backing: Path | None) -> str:
        folder = self.place.new_folder("qemu")
        image, target, log = folder / "qcow2", folder / "export", folder / "log"
        target.touch()
        options = f"cluster_size={self._cluster},lazy_refcounts=on"
        options += ",extended_l2=on" if self._extended else ""
        below = [] if backing is None else ["-b", str(backing), "-F", "raw"]
        run_program(
            "qemu-img",
            ["create", "-q", "-f", "qcow2", "-o", options, *below, str(image), str(size)],
            package="qemu-utils",
        )
        entry = 16 if self._extended else 8
        l2_cache = max(MIB, 2 * size // self._cluster * entry)
        fast = "cache.direct=on,aio=io_uring"
        arguments = [
            "--blockdev",
            f"driver=file,node-name=file,filename={image},{fast},discard=unmap",
        ]
        disk = f"driver=qcow2,node-name=disk,file=file,l2-cache-size={l2_cache},discard=unmap"
        if backing is not None:
            arguments += [
                "--blockdev",
                f"driver=file,node-name=low,filename={backing},{fast},read-only=on",
                "--blockdev",
                "driver=raw,node-name=backing,file=low,read-only=on",
            ]
            disk += ",backing=backing"
        arguments += ["--blockdev", disk]
        arguments += [
            "--export",
            f"type=fuse,id=export,node-name=disk,mountpoint={target},writable=on",
        ]
        child = self.place.start(
            "qemu-storage-daemon", arguments, package="qemu-system-common", log=log
        )
        wait_for_mount(child, target, log)
        return self.place.loop_device(target)


def fill(device: str, size: int) -> None:
    """Write every block of a device, durable, past the page cache's pages."""
    write_file(Path(device), size)


def _sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def _wait(child: subprocess.Popen[bytes], log: Path, ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not ready():
        if child.poll() is not None or time.monotonic() > deadline:
            said = " ".join(log.read_text(errors="replace").split())[-300:]
            raise ThinpoolError(f"{what} did not start: {said}")
        time.sleep(0.01)
