"""The operations, typed: what the command line does, as methods with the same names and errors.

Every method is a client of the pool's server, which is started when it does not run; nothing here
opens a pool's metadata or its catalogue. Pools are named ``POOL`` and everything in them
``POOL/NAME``. Sizes are bytes. A method may be called from several threads.

What needs the caller's own mount namespace or reads the caller's files (mount, umount, import,
export, diff, mkfs) runs here, in the calling process; when that dies half way, the server removes
what was unfinished.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Final, Self

from thinpool import errors
from thinpool.names import parse_ref

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from thinpool.api.session import Session
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
        Resumed,
        Trim,
        Volume,
    )
    from thinpool.server.raw import VolumeHandle

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
        # Servers stand elsewhere: what is relative to us would be something else to them.
        self.root: Final = (Path(root) if root is not None else default_root()).absolute()
        self.timeout: Final = timeout
        self._session_made: Session | None = None

    @property
    def _session(self) -> Session:
        """Made when first needed: what only names things imports nothing of it."""
        if self._session_made is None:
            from thinpool.api.session import Session

            self._session_made = Session(self.root, timeout=self.timeout)
        return self._session_made

    def close(self) -> None:
        """Close idle connections to servers. The API can be used again."""
        if self._session_made is not None:
            self._session_made.close()

    def __enter__(self) -> Self:
        """The API itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _call(self, volume: str, operation: str, **arguments: Any) -> Any:  # noqa: ANN401 - JSON
        client, ref = self._session.of(volume)
        return client.call(operation, {"name": ref.name, **arguments})

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
            UnsupportedHostError, NotPermittedError: the dm engine was asked for, and the kernel
                lacks it, or this user may not.
        """
        from thinpool.api import pools

        plan = pools.PoolPlan(
            name=pool,
            size=size,
            metadata_size=metadata_size,
            data=Path(data) if data is not None else None,
            metadata=Path(metadata) if metadata is not None else None,
            block_size=block_size,
            engine=engine,
            base_size=base_size,
            base_fs=base_fs,
            mkfs_options=tuple(mkfs_options),
            zero=zero,
            when_full=when_full,
            min_free=min_free,
            force=force,
            progress=progress,
        )
        return pools.create_pool(self._session, plan)

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
        from thinpool.api import pools

        return pools.attach_pool(
            self._session,
            pool,
            data=Path(data),
            metadata=Path(metadata),
            engine=engine,
            read_only=read_only,
        )

    def detach_pool(self, pool: str) -> None:
        """Forget a pool and touch none of its bytes.

        Raises:
            BusyError: something is active in it.
        """
        from thinpool.api import pools

        pools.detach_pool(self._session, pool)

    def pools(self) -> list[PoolStatus]:
        """Every pool under the root; one that cannot be opened has mode ``fail`` and ``error``."""
        from thinpool.api import pools

        return pools.pools(self._session)

    def status(self, pool: str) -> PoolStatus:
        """A pool's state."""
        from thinpool.model import PoolStatus

        return PoolStatus.from_json(self._session.client(pool).call("status"))

    def set(self, pool: str, settings: Mapping[str, str]) -> PoolStatus:
        """Change settings, all or none.

        Args:
            pool: its name.
            settings: ``when-full``: queue or error; ``min-free``, ``autoextend-threshold``,
                ``autoextend-percent``: percents such as ``10%``; ``low-water``: a size or a
                percent; ``engine``: user, dm or auto, for a pool of which nothing is active.

        Raises:
            UsageError: an unknown key, or a value that cannot be.
        """
        from thinpool.api import pools
        from thinpool.api import settings as known

        others = {key: text for key, text in settings.items() if key != known.ENGINE}
        values = known.parse_settings(others, total=lambda: self.status(pool).data.total)
        if known.ENGINE in settings:
            pools.change_engine(self._session, pool, settings[known.ENGINE])
        return _pool_status(self._session.client(pool).call("configure", {"values": values}))

    def extend_pool(
        self, pool: str, *, data_size: int | None = None, metadata_size: int | None = None
    ) -> PoolStatus:
        """Grow a pool online to the given sizes; with neither, to what its devices have by now.

        Raises:
            UsageError: smaller than it is.
        """
        arguments = {"data_size": data_size, "metadata_size": metadata_size}
        return _pool_status(self._session.client(pool).call("extend", arguments))

    def remove_pool(self, pool: str) -> None:
        """Remove a pool: its names, and its files where they are under the root.

        Data and metadata that were given as paths stay, empty.

        Raises:
            BusyError: something is active in it.
        """
        from thinpool.api import pools

        pools.remove_pool(self._session, pool)

    # ---- volumes --------------------------------------------------------------------------

    def create(
        self,
        volume: str,
        *,
        size: int | None = None,
        fs: str | None = None,
        mkfs_options: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
        external_origin: Path | str | None = None,
    ) -> Volume:
        """Make an empty thin volume, with a filesystem if asked.

        Args:
            volume: its name.
            size: bytes; the external origin's when None.
            fs: ``ext4`` or ``xfs``.
            mkfs_options: added to mkfs's command line.
            labels: kept with it.
            external_origin: a block device that is read where nothing was written, and that nobody
                writes from now on. Its snapshots are over the same.

        Raises:
            AlreadyExistsError: ``existing`` is the volume that has the name.
            NoSpaceError: less than min-free is left.
            UnsupportedHostError: an external origin, and the pool is the user engine's.
        """
        from thinpool.api import volumes

        return volumes.create(
            self._session,
            volume,
            size=size,
            fs=fs,
            mkfs_options=mkfs_options,
            labels=labels or {},
            origin=external_origin,
        )

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
        from thinpool.api import volumes

        if mount is not None:
            volumes.check_mount_point(mount)
        made = volumes.snapshot(
            self._session, source, target, read_only=read_only, size=size, labels=labels or {}
        )
        try:
            if mount is not None:
                return self.mount(target, mount).volume
            if activate:
                return self.activate(target).volume
        except BaseException:
            with contextlib.suppress(errors.ThinpoolError):
                self.remove([target], deactivate=True)  # asked for as one: nothing stays of it
            raise
        return made

    def snapshot_many(
        self,
        source: str,
        targets: Sequence[str],
        *,
        activate: bool = False,
        mount: Sequence[Path | str] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> list[Volume]:
        """Make several snapshots of one instant in one commit of the pool: all or none.

        Args:
            source: what to snapshot.
            targets: the new names, in the same pool; 1,000 at most.
            activate: activate them.
            mount: mount each on its own of these directories, which activates them; as many, in
                the order of the targets.
            labels: kept with each.

        Returns:
            The snapshots in the order of the targets, durable. Where activating or mounting one
            fails, none stays.

        Raises:
            UsageError: a name or a directory twice, too many, or another number of directories.
            AlreadyExistsError: one of the names is taken.
            NoSpaceError: less than min-free is left.
        """
        from thinpool.api import volumes

        return volumes.snapshot_many(
            self._session,
            source,
            targets,
            activate=activate,
            directories=mount,
            labels=labels or {},
        )

    def commit(
        self, container: str, image: str, *, labels: Mapping[str, str] | None = None
    ) -> Volume:
        """Make a read-only snapshot of a container, as an image."""
        return self.snapshot(container, image, read_only=True, labels=labels)

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
        note: Callable[[str], None] | None = None,
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
            note: told what was left out, such as an attribute that no filesystem here keeps, a
                line each.

        Raises:
            ArchiveError: cut short, a wrong digest, or a member that tries to escape.
            AlreadyExistsError: the name is taken by something else.
        """
        from thinpool.api import images

        return images.import_image(
            self._session,
            image,
            source,
            parent=parent,
            size=size,
            ref=ref,
            platform=platform,
            progress=progress,
            note=note,
        )

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
        """
        from thinpool.api import volumes

        client, ref = self._session.of(volume)
        return volumes.activate(
            client, ref.name, read_only=read_only, persist=persist, owner=owner, mode=mode
        )

    def activate_many(self, volumes: Sequence[str], *, read_only: bool = False) -> list[Activation]:
        """Make block devices of several volumes of one pool: all or none.

        Returns:
            One for each, in their order; those that were active say so.

        Raises:
            BusyError, UnsupportedHostError: as ``activate``.
        """
        from thinpool.api import volumes as volume_operations

        client, _, names = self._session.of_all(list(volumes))
        return volume_operations.activate_many(client, names, read_only=read_only)

    def deactivate(self, volume: str, *, deferred: bool = False) -> Volume:
        """Take the block device down; fine when there is none. It no longer persists.

        Args:
            volume: its name.
            deferred: one that is in use goes when its last user lets go of it.

        Raises:
            BusyError: it is mounted or open.
        """
        return _volume(self._call(volume, "deactivate", deferred=deferred))

    def resume(self, pool: str | None = None) -> Resumed:
        """Activate what was activated to persist and is not active, as after a reboot.

        Args:
            pool: its name; every pool under the root when None.

        Returns:
            What is active, and why other volumes or pools are not.
        """
        from thinpool.api import volumes

        return volumes.resume(self._session, pool)

    def mount(
        self,
        volume: str,
        directory: Path | str,
        *,
        read_only: bool = False,
        options: Iterable[str] = (),
    ) -> Mounted:
        """Activate a volume and mount its filesystem, nodev and nosuid unless the options ask."""
        from thinpool.api import volumes

        return volumes.mount(
            self._session, volume, Path(directory), read_only=read_only, options=options
        )

    def mount_many(
        self,
        directories: Mapping[str, Path | str],
        *,
        read_only: bool = False,
        options: Iterable[str] = (),
    ) -> list[Mounted]:
        """Activate several volumes of one pool and mount each on its directory: all or none.

        Args:
            directories: where each volume goes, by ``POOL/NAME``.
            read_only: mount them so, on read-only devices.
            options: of all mounts.
        """
        from thinpool.api import volumes

        return volumes.mount_many(self._session, directories, read_only=read_only, options=options)

    def umount(self, volume: str, directory: Path | str | None = None) -> Volume:
        """Unmount it (everywhere, or there), and deactivate what mount had activated."""
        from thinpool.api import volumes

        return volumes.umount(
            self._session, volume, Path(directory) if directory is not None else None
        )

    def list(self, pool: str | None = None, *, exclusive: bool = False) -> list[Volume]:
        """What a pool holds, or every pool.

        Args:
            pool: its name.
            exclusive: fill in ``exclusive``, which reads the mappings.
        """
        from thinpool.store import poolfile

        names = [pool] if pool is not None else poolfile.list_pools(self.root)
        return [
            _volume(each)
            for name in names
            for each in self._session.client(name).call("list", {"exclusive": exclusive})
        ]

    def remove(
        self,
        volumes: Sequence[str],
        *,
        deactivate: bool = False,
        deferred: bool = False,
        dry_run: bool = False,
    ) -> Removal:
        """Remove volumes, all or none; snapshots of them live on.

        Args:
            volumes: ``POOL/NAME``, all in one pool.
            deactivate: unmount and deactivate what is active.
            deferred: also what is in use: names go now, each device and its space when its last
                user lets go of it.
            dry_run: only say what it would free.

        Raises:
            BusyError: one of them is active.
            NotFoundError: one of them does not exist.
        """
        from thinpool.api import volumes as volume_operations

        return volume_operations.remove(
            self._session, volumes, deactivate=deactivate, deferred=deferred, dry_run=dry_run
        )

    def rename(self, volume: str, name: str) -> Volume:
        """Give it another name, ``NAME`` or ``POOL/NAME``; an active one's device path follows."""
        if "/" in name:
            new = parse_ref(name)
            if new.pool != parse_ref(volume).pool:
                raise errors.UsageError(
                    f"{volume} stays in its pool: {name} is in another", what="name", value=name
                )
            name = new.name
        return _volume(self._call(volume, "rename", new=name))

    def resize(self, volume: str, size: int, *, device_only: bool = False) -> Volume:
        """Set a volume's size; its filesystem grows with it unless ``device_only``.

        Raises:
            UsageError: smaller than its filesystem, or not a multiple of 512.
            ReadOnlyError: it is sealed.
        """
        from thinpool.api import volumes

        return volumes.resize(self._session, volume, size, device_only=device_only)

    def trim(self, volume: str) -> Trim:
        """Give back the blocks that its filesystem does not use."""
        from thinpool.api import volumes

        return volumes.trim(self._session, volume)

    def diff(
        self, first: str, second: str, *, progress: Callable[[Progress], None] | None = None
    ) -> Sequence[FileChange]:
        """Which files differ, from the first to the second."""
        from thinpool.api import images

        return images.diff(self._session, first, second, progress=progress)

    def delta(self, first: str, second: str) -> Delta:
        """Where two volumes do not share their blocks."""
        from thinpool.model import Delta

        client, _, names = self._session.of_all([first, second])
        return Delta.from_json(client.call("delta", {"left": names[0], "right": names[1]}))

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
        from thinpool.api import images

        return images.export(self._session, volume, output, raw=raw, progress=progress)

    # ---- care -----------------------------------------------------------------------------

    def check(
        self,
        pool: str | None = None,
        *,
        metadata: Path | str | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> CheckReport:
        """Check a pool, live through a metadata snapshot, or a bare metadata device. Reads only."""
        from thinpool.api import care

        path = Path(metadata) if metadata is not None else None
        return care.check(self._session, pool, metadata=path, progress=progress)

    def dump(
        self,
        pool: str | None = None,
        output: IO[bytes] | None = None,
        *,
        metadata: Path | str | None = None,
    ) -> None:
        """Write a pool's metadata as thin-provisioning-tools' XML to a stream (standard output)."""
        from thinpool.api import care

        path = Path(metadata) if metadata is not None else None
        care.dump(self._session, pool, output, metadata=path)

    def doctor(self, pool: str | None = None) -> DoctorReport:
        """What this host can do, and what is wrong with a pool (or all) and what mends it."""
        from thinpool.api import care

        return care.doctor(self._session, pool)

    def install_units(
        self, *, units: Path | str | None = None, rules: Path | str | None = None
    ) -> Sequence[str]:
        """Write the systemd units and udev rules of this root; returns their paths.

        Args:
            units: the directory of the units, /etc/systemd/system when None.
            rules: the directory of the rules, /etc/udev/rules.d when None.

        Raises:
            NotPermittedError, NotFoundError: a directory cannot be written.
        """
        from thinpool.api import care

        return care.install_units(
            self.root,
            units=Path(units) if units is not None else None,
            rules=Path(rules) if rules is not None else None,
        )

    # ---- raw ------------------------------------------------------------------------------

    def open(self, volume: str, *, writable: bool = False) -> VolumeHandle:
        """Read and write a volume without a mount, a device or privileges.

        Returns:
            A handle, a context manager: read, read_into, write, zero, discard, flush, next_data.

        Raises:
            BusyError: writable, and it is active or open for writing elsewhere.
            ReadOnlyError: writable, and it is sealed.
        """
        client, ref = self._session.of(volume)
        return client.open(ref.name, writable=writable)


def _volume(answer: Any) -> Volume:  # noqa: ANN401 - JSON
    from thinpool.model import Volume

    return Volume.from_json(answer)


def _pool_status(answer: Any) -> PoolStatus:  # noqa: ANN401 - JSON
    from thinpool.model import PoolStatus

    return PoolStatus.from_json(answer)
