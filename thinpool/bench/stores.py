"""Ways to give a container its own view of an image: thinpool and those who work on files.

A store keeps images, each a folder with one file or with many small ones, and makes containers of
them: a folder that shows the image's files and may be written. Making one is not what is measured,
but for vfs, which copies then.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Final

from thinpool.bench import workplace
from thinpool.bench.workplace import Workplace, sync_filesystem
from thinpool.errors import UnsupportedHostError
from thinpool.host.programs import find_program, run_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_FICLONE: Final = 0x40049409
GIB: Final = 1 << 30
MIB: Final = 1 << 20

Fill = "Callable[[Path], None]"


class Store(ABC):
    """One way.

    Attributes:
        name: of the subject.
        copies: an edit copies the whole file first.
        copies_at_creation: making a container copies the whole file.
        reserved: a minimum of what it adds when it copies is the file's size.
    """

    name: str
    copies: bool = False
    copies_at_creation: bool = False

    @abstractmethod
    def make_image(self, image: str, fill: Callable[[Path], None]) -> None:
        """Make an image, its files written by a function into a folder."""

    @abstractmethod
    def container(self, image: str) -> contextlib.AbstractContextManager[Path]:
        """A new container: the folder that shows its files. It is removed afterwards."""

    def write_back(self, folder: Path) -> None:
        """Make everything in a container durable."""
        sync_filesystem(folder)

    @abstractmethod
    def used(self) -> int:
        """Bytes in use on the disk below, everything written back first."""


class Thinpool(Store):
    """A volume with ext4, a snapshot of the image's volume."""

    name = "thinpool"

    def __init__(self, place: Workplace, *, size: int) -> None:
        """Make a pool whose base has room for the largest image."""
        self._api = place.thinpool()
        self._place = place
        base = size + max(size // 8, 256 * MIB)
        self._api.create_pool(
            "bench", size=4 * base + GIB, base_size=base, min_free=0, engine="user"
        )
        self._count = 0

    def make_image(self, image: str, fill: Callable[[Path], None]) -> None:
        """Write it into a snapshot of the base, and seal that."""
        folder = self._place.new_folder("build")
        self._api.snapshot("bench/base", f"bench/{image}-build", mount=folder)
        fill(folder)
        self._api.umount(f"bench/{image}-build")
        self._api.commit(f"bench/{image}-build", f"bench/{image}")

    @contextlib.contextmanager
    def container(self, image: str) -> Iterator[Path]:
        """A snapshot, mounted."""
        self._count += 1
        name = f"bench/c{self._count}"
        folder = self._place.new_folder("container")
        self._api.snapshot(f"bench/{image}", name, mount=folder)
        try:
            yield folder
        finally:
            self._api.umount(name)
            self._api.remove([name])

    def used(self) -> int:
        """Data blocks of the pool."""
        for volume in self._api.list("bench"):
            for mount in volume.mounts:
                sync_filesystem(Path(mount))
        return self._api.status("bench").data.used


class OnDisk(Store):
    """What lies in a filesystem of the kernel's on a loop device.

    Attributes:
        disk: its mount point.
    """

    def __init__(self, place: Workplace, disk: Path, name: str) -> None:
        """Use a mounted filesystem, which others may use too."""
        self.place: Final = place
        self.disk: Final = disk
        self.name = name
        self._count = 0

    def image(self, image: str) -> Path:
        """Where an image is; shared by the stores of one disk."""
        return self.disk / "images" / image

    def make_image(self, image: str, fill: Callable[[Path], None]) -> None:
        """Write it, unless another store of this disk did."""
        folder = self.image(image)
        if not folder.exists():
            folder.mkdir(parents=True)
            fill(folder)
            sync_filesystem(folder)

    @contextlib.contextmanager
    def own_folder(self) -> Iterator[Path]:
        """A folder on the disk for one container."""
        self._count += 1
        kind = "".join(letter if letter.isalnum() else "-" for letter in self.name)
        folder = self.disk / f"{kind}-{self._count}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def used(self) -> int:
        """Blocks of the filesystem, its own tables included."""
        sync_filesystem(self.disk)
        found = os.statvfs(self.disk)
        return (found.f_blocks - found.f_bfree) * found.f_frsize


class Overlay(OnDisk):
    """overlay2: the kernel's overlayfs, which copies a file up before it is first written."""

    copies = True

    def __init__(self, place: Workplace, disk: Path, name: str, *, reflink: bool) -> None:
        """On a filesystem with or without shared extents."""
        super().__init__(place, disk, name)
        self.copies = not reflink

    @contextlib.contextmanager
    def container(self, image: str) -> Iterator[Path]:
        """An overlay over the image."""
        with self.own_folder() as folder, self.place.part("overlay") as place:
            (folder / "upper").mkdir()
            (folder / "work").mkdir()
            yield place.mount(
                "overlay",
                place.folder / "mnt",
                "overlay",
                [
                    f"lowerdir={self.image(image)}",
                    f"upperdir={folder / 'upper'}",
                    f"workdir={folder / 'work'}",
                ],
            )


class FuseOverlay(OnDisk):
    """fuse-overlayfs or unionfs-fuse: the same in userspace."""

    copies = True

    def __init__(self, place: Workplace, disk: Path, program: str) -> None:
        """Use one of the two programs.

        Raises:
            UnsupportedHostError: it is not installed.
        """
        self._program = program
        self._package = "unionfs-fuse" if program == "unionfs" else program
        if find_program(program) is None:
            raise UnsupportedHostError(
                f"{program} is not installed; on Debian, the package {self._package} brings it",
                missing=program,
            )
        super().__init__(place, disk, self._package)

    def write_back(self, folder: Path) -> None:
        """Of the disk, too: FUSE passes no syncfs on."""
        sync_filesystem(folder)
        sync_filesystem(self.disk)

    @contextlib.contextmanager
    def container(self, image: str) -> Iterator[Path]:
        """Its filesystem over the image."""
        with self.own_folder() as folder, self.place.part(self._program) as place:
            upper, target, log = folder / "upper", place.folder / "mnt", place.folder / "log"
            for each in (upper, folder / "work", target):
                each.mkdir()
            if self._program == "unionfs":
                arguments = ["-f", "-o", "cow,noinitgroups", f"{upper}=RW:{self.image(image)}=RO"]
            else:
                options = f"lowerdir={self.image(image)},upperdir={upper},workdir={folder / 'work'}"
                arguments = ["-f", "-o", options]
            child = place.start(
                self._program, [*arguments, str(target)], package=self._package, log=log
            )
            workplace.wait_for_mount(child, target, log)
            place.stack.callback(workplace.unmount, target)
            yield target


class Copies(OnDisk):
    """vfs: a whole copy of the image, made with the container."""

    copies_at_creation = True

    @contextlib.contextmanager
    def container(self, image: str) -> Iterator[Path]:
        """The copy; durable, as any container's files are before they are used."""
        with self.own_folder() as folder:
            for path, folders, files in os.walk(self.image(image)):
                here = folder / Path(path).relative_to(self.image(image))
                for name in folders:
                    (here / name).mkdir()
                for name in files:
                    self.copy(Path(path) / name, here / name)
            sync_filesystem(folder)
            yield folder

    def copy(self, source: Path, target: Path) -> None:
        """Every byte of it, read and written."""
        with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as copy:
            while chunk := file.read(MIB):
                copy.write(chunk)


class Reflinks(Copies):
    """A copy of each file that shares its extents (FICLONE), made with the container."""

    copies_at_creation = False

    def copy(self, source: Path, target: Path) -> None:
        """Share every extent."""
        with source.open("rb") as file, target.open("wb") as copy:
            fcntl.ioctl(copy, _FICLONE, file.fileno())


class Btrfs(OnDisk):
    """A snapshot of a subvolume."""

    def make_image(self, image: str, fill: Callable[[Path], None]) -> None:
        """Write it into a subvolume."""
        folder = self.image(image)
        folder.parent.mkdir(parents=True, exist_ok=True)
        run_program("btrfs", ["subvolume", "create", str(folder)], package="btrfs-progs")
        fill(folder)
        sync_filesystem(folder)

    @contextlib.contextmanager
    def container(self, image: str) -> Iterator[Path]:
        """The snapshot."""
        self._count += 1
        folder = self.disk / f"snapshot-{self._count}"
        run_program(
            "btrfs",
            ["subvolume", "snapshot", str(self.image(image)), str(folder)],
            package="btrfs-progs",
        )
        try:
            yield folder
        finally:
            run_program("btrfs", ["subvolume", "delete", "-c", str(folder)], package="btrfs-progs")


def make_stores(
    place: Workplace,
    *,
    size: int,
    ready: Callable[[str, Callable[[], Store]], Store | None],
) -> list[Store]:
    """Every store that this host can have.

    Args:
        place: they are undone with it.
        size: bytes of all images together; each disk has room for a whole copy beside them.
        ready: is given each name and what makes the store; answers None to leave it out.

    Returns:
        The stores, thinpool first.
    """
    disks: dict[str, Path] = {}
    room = 2 * size + size // 4 + GIB

    def disk(fstype: str) -> Path:
        if fstype not in disks:
            disks[fstype] = workplace.make_disk(place, fstype, room)
        return disks[fstype]

    def overlay(fstype: str, name: str) -> Store:
        return Overlay(place, disk(fstype), name, reflink=fstype == "xfs")

    makers: dict[str, Callable[[], Store]] = {
        "thinpool": lambda: Thinpool(place, size=size),
        "overlay2 on ext4": lambda: overlay("ext4", "overlay2 on ext4"),
        "overlay2 on xfs (reflink)": lambda: overlay("xfs", "overlay2 on xfs (reflink)"),
        "btrfs snapshot": lambda: Btrfs(place, disk("btrfs"), "btrfs snapshot"),
        "xfs reflink copy": lambda: Reflinks(place, disk("xfs"), "xfs reflink copy"),
        "vfs (whole copy)": lambda: Copies(place, disk("ext4"), "vfs (whole copy)"),
        "fuse-overlayfs": lambda: FuseOverlay(place, disk("ext4"), "fuse-overlayfs"),
        "unionfs-fuse": lambda: FuseOverlay(place, disk("ext4"), "unionfs"),
    }
    made = (ready(name, maker) for name, maker in makers.items())
    return [store for store in made if store is not None]
