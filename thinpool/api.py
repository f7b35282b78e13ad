"""The operations, typed: what the command line does, as methods with the same names and errors.

Every method is a client of the pool's server, which is started when it does not run; nothing here
opens a pool's metadata or its catalogue. Pools are named ``POOL`` and everything in them
``POOL/NAME``. Sizes are bytes. A method may be called from several threads.

What needs the caller's own mount namespace or reads the caller's files (mount, umount, import,
export, diff, mkfs) runs here, in the calling process; when that dies half way, the server removes
what was unfinished.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from thinpool.model import (
        Activation,
        CheckReport,
        Delta,
        DoctorReport,
        Exported,
        FileChange,
        Mounted,
        PoolStatus,
        Progress,
        Removal,
        Trim,
        Volume,
    )
    from thinpool.server.client import VolumeHandle

GIB: Final = 1 << 30
DEFAULT_TIMEOUT_S: Final = 30.0
DEFAULT_BLOCK_SIZE: Final = 64 << 10
DEFAULT_BASE_SIZE: Final = 10 * GIB
DEFAULT_MIN_FREE_PERCENT: Final = 10.0


def default_root() -> Path:
    """``$THINPOOL_ROOT``, else /var/lib/thinpool for root, else below ``$XDG_DATA_HOME``."""
    named = os.environ.get("THINPOOL_ROOT")
    if named:
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/thinpool")
    data_home = os.environ.get("XDG_DATA_HOME")
    return (Path(data_home) if data_home else Path.home() / ".local" / "share") / "thinpool"


class Thinpool:
    """The pools under one root.

    Args:
        root: the directory that holds them; default_root() when None.
        timeout: seconds to wait for a lock, or for a server that starts, before BusyError.
    """

    def __init__(
        self, root: Path | str | None = None, *, timeout: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """Nothing is opened or made yet."""
        self.root: Final = Path(root) if root is not None else default_root()
        self.timeout: Final = timeout

    # ---- pools ----------------------------------------------------------------------------

    def create_pool(
        self,
        pool: str,
        *,
        size: int | None = None,
        metadata_size: int | None = None,
        data: Path | str | None = None,
        metadata: Path | str | None = None,
        block_size: int = DEFAULT_BLOCK_SIZE,
        engine: str = "auto",
        base_size: int = DEFAULT_BASE_SIZE,
        base_fs: str = "ext4",
        mkfs_options: Sequence[str] = (),
        zero: bool = True,
        when_full: str = "queue",
        min_free: float = DEFAULT_MIN_FREE_PERCENT,
        force: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> PoolStatus:
        """Make a pool, and its base device with an empty filesystem.

        Args:
            pool: its name.
            size: of the data; of a device that was given, its own size when None.
            metadata_size: chosen by the data's size when None.
            data: a file or device for the data; a sparse file under the root when None.
            metadata: likewise; given with ``data`` or not at all.
            block_size: of a data block: 64 KiB to 1 GiB in steps of 64 KiB.
            engine: ``auto``, ``user`` or ``dm``.
            base_size: of the base device; 0 for a pool without one.
            base_fs: ``ext4`` or ``xfs``.
            mkfs_options: added to mkfs's command line.
            zero: new blocks read as zeros wherever they were not written.
            when_full: ``queue`` (writes wait for space, 60 s) or ``error``.
            min_free: percent of data and of metadata below which nothing new is made.
            force: overwrite what the files or devices carry.
            progress: told how far it is.

        Returns:
            The pool's status; ``warnings`` say where the host's disk could not hold it full.

        Raises:
            UsageError: a name, a size or a block size that cannot be.
            AlreadyExistsError: the name is taken; ``existing`` is that pool's status.
            ForeignDataError: a file or device carries something already.
            BusyError: a file or device is in use.
            NotThereYetError: the dm engine.
        """
        raise NotImplementedError

    def attach_pool(
        self,
        pool: str,
        *,
        data: Path | str,
        metadata: Path | str,
        engine: str = "auto",
        read_only: bool = False,
    ) -> PoolStatus:
        """Adopt an existing dm-thin pool; its volumes are named ``id-N`` where no name is known.

        Raises:
            AlreadyExistsError: the name is taken.
            BusyError: the pool is in use.
            CorruptMetadataError: it does not check.
        """
        raise NotImplementedError

    def detach_pool(self, pool: str) -> None:
        """Forget a pool and touch none of its bytes.

        Raises:
            BusyError: something is active in it.
        """
        raise NotImplementedError

    def pools(self) -> list[PoolStatus]:
        """Every pool under the root; one that cannot be opened has mode ``fail`` and ``error``."""
        raise NotImplementedError

    def status(self, pool: str) -> PoolStatus:
        """A pool's state."""
        raise NotImplementedError

    def set(self, pool: str, settings: Mapping[str, str]) -> PoolStatus:
        """Change settings, all or none.

        Args:
            pool: its name.
            settings: ``when-full``: queue or error; ``min-free``, ``autoextend-threshold``,
                ``autoextend-percent``: percents such as ``10%``; ``low-water``: a size or a
                percent.

        Raises:
            UsageError: an unknown key, or a value that cannot be.
        """
        raise NotImplementedError

    def extend_pool(
        self, pool: str, *, data_size: int | None = None, metadata_size: int | None = None
    ) -> PoolStatus:
        """Grow a pool online to the given sizes; with neither, to what its devices have by now.

        Raises:
            UsageError: smaller than it is.
        """
        raise NotImplementedError

    def remove_pool(self, pool: str) -> None:
        """Remove a pool: its names, and its files where they are under the root.

        Data and metadata that were given as paths lose the superblock, so that they are empty.

        Raises:
            BusyError: something is active in it.
        """
        raise NotImplementedError

    # ---- volumes --------------------------------------------------------------------------

    def create(
        self,
        volume: str,
        *,
        size: int,
        fs: str | None = None,
        mkfs_options: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
    ) -> Volume:
        """Make an empty thin volume, with a filesystem if asked.

        Raises:
            AlreadyExistsError: ``existing`` is the volume that has the name.
            NoSpaceError: less than min-free is left.
        """
        raise NotImplementedError

    def snapshot(
        self,
        source: str,
        target: str,
        *,
        read_only: bool = False,
        size: int | None = None,
        activate: bool = False,
        mount: Path | str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Volume:
        """Make a snapshot of anything, active or not.

        Args:
            source: what to snapshot.
            target: the new name, in the same pool.
            read_only: seal it.
            size: larger than the source's: it is grown, its filesystem too.
            activate: activate it.
            mount: mount it there, which activates it.
            labels: kept with it.

        Returns:
            The snapshot. Its ``consistency`` says how it was taken.
        """
        raise NotImplementedError

    def commit(
        self, container: str, image: str, *, labels: Mapping[str, str] | None = None
    ) -> Volume:
        """Make a read-only snapshot of a container, as an image."""
        raise NotImplementedError

    def import_image(
        self,
        image: str,
        source: Path | str | BinaryIO,
        *,
        parent: str | None = None,
        size: int | None = None,
        ref: str | None = None,
        platform: str | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Volume:
        """Import a tar, a directory, or a ``docker save`` or OCI-layout archive.

        Args:
            image: the name of the result.
            source: where it is; ``-`` is standard input.
            parent: of the lowest of its layers; the pool's base when None.
            size: of the image; the parent's when None.
            ref: which image of an archive that holds several.
            platform: ``linux/arm64`` and the like, likewise.
            progress: told how far it is.

        Raises:
            ArchiveError: cut short, a wrong digest, or a member that tries to escape.
            AlreadyExistsError: the name is taken by something else.
        """
        raise NotImplementedError

    def activate(
        self,
        volume: str,
        *,
        read_only: bool = False,
        persist: bool = False,
        owner: tuple[int, int] | None = None,
        mode: int | None = None,
    ) -> Activation:
        """Make a block device of a volume; of an active one, answer what it is.

        Raises:
            BusyError: it is active writable and was asked for read-only, or is open otherwise.
            UnsupportedHostError: no FUSE or no loop devices here.
            NotThereYetError: persist.
        """
        raise NotImplementedError

    def deactivate(self, volume: str) -> Volume:
        """Take the block device down; fine when there is none.

        Raises:
            BusyError: it is mounted or open.
        """
        raise NotImplementedError

    def mount(
        self,
        volume: str,
        directory: Path | str,
        *,
        read_only: bool = False,
        options: Iterable[str] = (),
    ) -> Mounted:
        """Activate a volume and mount its filesystem, nodev and nosuid unless the options ask."""
        raise NotImplementedError

    def umount(self, volume: str, directory: Path | str | None = None) -> Volume:
        """Unmount it (everywhere, or there), and deactivate what mount had activated."""
        raise NotImplementedError

    def list(self, pool: str | None = None, *, exclusive: bool = False) -> list[Volume]:
        """What a pool holds, or every pool.

        Args:
            pool: its name.
            exclusive: fill in ``exclusive``, which reads the mappings.
        """
        raise NotImplementedError

    def remove(
        self, volumes: Sequence[str], *, deactivate: bool = False, dry_run: bool = False
    ) -> Removal:
        """Remove volumes, all or none; snapshots of them live on.

        Args:
            volumes: ``POOL/NAME``, all in one pool.
            deactivate: unmount and deactivate what is active.
            dry_run: only say what it would free.

        Raises:
            BusyError: one of them is active.
            NotFoundError: one of them does not exist.
        """
        raise NotImplementedError

    def rename(self, volume: str, name: str) -> Volume:
        """Give it another name, ``NAME`` or ``POOL/NAME``; an active one's device path follows."""
        raise NotImplementedError

    def resize(self, volume: str, size: int, *, device_only: bool = False) -> Volume:
        """Set a volume's size; its filesystem grows with it unless ``device_only``.

        Raises:
            UsageError: smaller than its filesystem, or not a multiple of 512.
            ReadOnlyError: it is sealed.
        """
        raise NotImplementedError

    def trim(self, volume: str) -> Trim:
        """Give back the blocks that its filesystem does not use."""
        raise NotImplementedError

    def diff(
        self, first: str, second: str, *, progress: Callable[[Progress], None] | None = None
    ) -> Sequence[FileChange]:
        """Which files differ, from the first to the second."""
        raise NotImplementedError

    def delta(self, first: str, second: str) -> Delta:
        """Where two volumes do not share their blocks."""
        raise NotImplementedError

    def export(
        self,
        volume: str,
        output: Path | str | BinaryIO,
        *,
        raw: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> Exported:
        """Write a volume's filesystem as a tar, or the device itself.

        Args:
            volume: active or not; what is exported is a snapshot of it.
            output: a file, ``-`` for standard output, or an open binary stream.
            raw: the device; sparse where the output can be.
            progress: told how far it is.
        """
        raise NotImplementedError

    # ---- care -----------------------------------------------------------------------------

    def check(
        self,
        pool: str | None = None,
        *,
        metadata: Path | str | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> CheckReport:
        """Check a pool, live through a metadata snapshot, or a bare metadata device. Reads only."""
        raise NotImplementedError

    def dump(
        self,
        pool: str | None = None,
        output: IO[bytes] | None = None,
        *,
        metadata: Path | str | None = None,
    ) -> None:
        """Write a pool's metadata as thin-provisioning-tools' XML to a stream (standard output)."""
        raise NotImplementedError

    def doctor(self, pool: str | None = None) -> DoctorReport:
        """What this host can do, and what is wrong with a pool (or all) and what mends it."""
        raise NotImplementedError

    # ---- raw ------------------------------------------------------------------------------

    def open(self, volume: str, *, writable: bool = False) -> VolumeHandle:
        """Read and write a volume without a mount, a device or privileges.

        Returns:
            A handle, a context manager: read, read_into, write, zero, discard, flush, next_data.

        Raises:
            BusyError: writable, and it is active or open for writing elsewhere.
            ReadOnlyError: writable, and it is sealed.
        """
        raise NotImplementedError
