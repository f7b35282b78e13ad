"""Volumes: made with a filesystem, snapshotted, mounted, resized, trimmed."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, TypeVarTuple

from thinpool import errors
from thinpool.api.session import Session, refuse_taken
from thinpool.api.workbench import Finished, Workbench
from thinpool.host import filesystems, mountinfo, mounts
from thinpool.host.failures import failure
from thinpool.model import Activation, Mounted, Removal, Resumed, Trim, Volume
from thinpool.names import parse_ref, same_pool
from thinpool.store import poolfile
from thinpool.store.devices import EXTERNAL_ORIGIN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from thinpool.server.client import PoolClient

logger = logging.getLogger(__name__)

_MOUNT_THREADS: Final = 8

_Given = TypeVarTuple("_Given")
_Made = TypeVar("_Made")


def create(
    session: Session,
    volume: str,
    *,
    size: int | None,
    fs: str | None,
    mkfs_options: Sequence[str],
    labels: Mapping[str, str],
    origin: Path | str | None,
) -> Volume:
    """Make a volume."""
    client, ref = session.of(volume)
    if origin is not None:
        if fs is not None:
            raise errors.UsageError(
                "a filesystem is made on an empty volume, not over an external origin", what="fs"
            )
        where, bytes_of_origin = external_origin(origin)
        labels = {**labels, EXTERNAL_ORIGIN: where}
        size = bytes_of_origin if size is None else size
    if size is None:
        raise errors.UsageError("how large shall the volume be? Give --size", what="size")
    if fs is None:
        if mkfs_options:
            raise errors.UsageError("--mkfs-option needs --fs", what="mkfs-option")
        arguments = {"name": ref.name, "size": size, "labels": dict(labels)}
        return Volume.from_json(client.call("create", arguments))
    filesystems.check_fs_type(fs)
    refuse_taken(client, ref)
    with Workbench(client) as bench:
        made = bench.create(size=size, kind="volume")
        bench.make_filesystem(made, fs, mkfs_options)
        finished = Finished(
            volume=made,
            publish_as=ref.name,
            kind="volume",
            read_only=False,
            labels=labels,
            filesystem=fs,
        )
        return bench.publish(finished)[0]


def snapshot(
    session: Session,
    source: str,
    target: str,
    *,
    read_only: bool,
    size: int | None,
    labels: Mapping[str, str],
) -> Volume:
    """Make a snapshot."""
    client, ref = session.of(source)
    new = parse_ref(target)
    same_pool(ref, new)
    plain = {"source": ref.name, "target": new.name, "size": size, "labels": dict(labels)}
    if size is None and not read_only:
        return Volume.from_json(client.call("snapshot", plain))
    origin = Volume.from_json(client.call("get", {"name": ref.name}))
    grows = size is not None and size > origin.size and origin.filesystem is not None
    if not grows and not read_only:
        return Volume.from_json(client.call("snapshot", plain))
    refuse_taken(client, new)
    kind = "image" if read_only else ("volume" if origin.kind == "volume" else "container")
    with Workbench(client) as bench:
        made = bench.snapshot(ref.name, kind=kind, size=size)  # type: ignore[arg-type] # a Kind
        if grows:
            bench.grow_filesystem(made)
        elif read_only:
            bench.settle(made)
        finished = Finished(
            volume=made,
            publish_as=new.name,
            kind=made.kind,
            read_only=read_only,
            labels=labels,
            filesystem=origin.filesystem,
        )
        return bench.publish(finished)[0]


def snapshot_many(
    session: Session,
    source: str,
    targets: Sequence[str],
    *,
    activate: bool,
    directories: Sequence[Path | str] | None,
    labels: Mapping[str, str],
) -> list[Volume]:
    """Make several snapshots, and devices and mounts of them; all or none."""
    client, ref = session.of(source)
    names = []
    for target in targets:
        new = parse_ref(target)
        same_pool(ref, new)
        names.append(new.name)
    places = None if directories is None else _mount_points_for(names, directories)
    arguments = {"source": ref.name, "targets": names, "labels": dict(labels)}
    made = [Volume.from_json(each) for each in client.call("snapshot_many", arguments)]
    try:
        if places is not None:
            mounted = _mount_all(client, names, places, read_only=False, options=(), fresh=True)
            return [each.volume for each in mounted]
        if activate:
            return [each.volume for each in activate_many(client, names)]
    except BaseException:
        with contextlib.suppress(errors.ThinpoolError):
            client.call("remove", {"names": names, "deactivate": True})
        raise
    return made


def activate_many(
    client: PoolClient, names: Sequence[str], *, read_only: bool = False, by_mount: bool = False
) -> list[Activation]:
    """Make several block devices, all or none."""
    arguments = {"names": list(names), "read_only": read_only, "by_mount": by_mount}
    return [Activation.from_json(each) for each in client.call("activate_many", arguments)]


def activate(
    client: PoolClient,
    name: str,
    *,
    read_only: bool,
    by_mount: bool = False,
    persist: bool = False,
    owner: tuple[int, int] | None = None,
    mode: int | None = None,
) -> Activation:
    """Make a block device."""
    arguments = {
        "name": name,
        "read_only": read_only,
        "by_mount": by_mount,
        "persist": persist,
        "owner": list(owner) if owner is not None else None,
        "mode": mode,
    }
    return Activation.from_json(client.call("activate", arguments))


# ---- mounts -----------------------------------------------------------------------------------


def check_mount_point(directory: Path | str) -> str:
    """The real path of a directory to mount on.

    Raises:
        NotFoundError: it is not there, or no directory.
    """
    target = os.path.realpath(directory)
    if not Path(target).is_dir():
        raise errors.NotFoundError(f"{directory} is no directory", path=str(directory))
    return target


def _mount_points_for(names: Sequence[str], directories: Sequence[Path | str]) -> list[str]:
    """The real path of a directory for each volume."""
    places = [check_mount_point(each) for each in directories]
    if len(places) != len(names) or len(set(places)) != len(places):
        raise errors.UsageError(
            f"{len(names)} volumes need as many directories to mount on, each another: "
            f"{len(set(places))} were given",
            what="mount",
            value=len(places),
        )
    return places


def mount(
    session: Session,
    volume: str,
    directory: Path,
    *,
    read_only: bool,
    options: Iterable[str],
) -> Mounted:
    """Activate and mount."""
    client, ref = session.of(volume)
    target = check_mount_point(directory)
    chosen = list(options)
    found = Volume.from_json(client.call("get", {"name": ref.name}))
    wants_read_only = read_only or found.read_only or "ro" in mounts.split_options(chosen)
    activation = _device_for_mount(client, found, read_only=wants_read_only)
    try:
        there = _mount_table() if activation.already_active else {}
        return _mount_active(activation, target, chosen, read_only=wants_read_only, there=there)
    except BaseException:
        _deactivate_new(client, [activation])
        raise


def mount_many(
    session: Session,
    directories: Mapping[str, Path | str],
    *,
    read_only: bool,
    options: Iterable[str],
) -> list[Mounted]:
    """Activate and mount several, all or none."""
    client, _, names = session.of_all(list(directories))
    places = _mount_points_for(names, list(directories.values()))
    return _mount_all(client, names, places, read_only=read_only, options=options)


def _mount_all(
    client: PoolClient,
    names: Sequence[str],
    places: Sequence[str],
    *,
    read_only: bool,
    options: Iterable[str],
    fresh: bool = False,
) -> list[Mounted]:
    """Activate all in one call, and mount them side by side: a mount waits more than it works."""
    chosen = list(options)
    read_only = read_only or "ro" in mounts.split_options(chosen)
    activations = activate_many(client, names, read_only=read_only, by_mount=True)
    there = _mount_table() if any(each.already_active for each in activations) else {}
    done: list[Mounted] = []

    def mount_one(activation: Activation, target: str) -> Mounted:
        mounted = _mount_active(
            activation, target, chosen, read_only=read_only, there=there, fresh=fresh
        )
        done.append(mounted)
        return mounted

    try:
        return _side_by_side(mount_one, list(zip(activations, places, strict=True)))
    except BaseException:
        for mounted in done:
            if not mounted.already_mounted:
                with contextlib.suppress(errors.ThinpoolError):
                    mounts.unmount(mounted.directory)
        _deactivate_new(client, activations)
        raise


def _side_by_side(
    work: Callable[[*_Given], _Made], arguments: Sequence[tuple[*_Given]]
) -> list[_Made]:
    """Call a function with each of the arguments, in threads; the first error, after all ended."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - few commands need it

    with ThreadPoolExecutor(_MOUNT_THREADS) as threads:
        waiting = [threads.submit(work, *each) for each in arguments]
    return [each.result() for each in waiting]


def _deactivate_new(client: PoolClient, activations: Sequence[Activation]) -> None:
    """Undo what was activated to be mounted."""
    for activation in activations:
        if not activation.already_active:
            with contextlib.suppress(errors.ThinpoolError):
                client.call("deactivate", {"name": activation.volume.name, "if_by_mount": True})


def _mount_table() -> dict[str, int]:
    """What device is on each mount point of this namespace."""
    return {entry.mount_point: entry.device for entry in mountinfo.own_mounts()}


def _mount_active(
    activation: Activation,
    target: str,
    options: list[str],
    *,
    read_only: bool,
    there: Mapping[str, int],
    fresh: bool = False,
) -> Mounted:
    """Mount a volume that is active, unless it is mounted there already."""
    device, volume = activation.device or "", activation.volume
    on = there.get(target)
    already = activation.already_active and on is not None and on == _device_number(device)
    if not already:
        sealed = read_only or volume.read_only
        known = fresh and not activation.already_active
        _mount(device, target, options, read_only=sealed, volume=volume, known=known)
    where = tuple(sorted({*volume.mounts, target}))
    return Mounted(
        volume=replace(volume, mounts=where),
        device=device,
        directory=target,
        already_mounted=already,
    )


def _device_for_mount(client: PoolClient, volume: Volume, *, read_only: bool) -> Activation:
    """Its device; one that is active writable serves a read-only mount too."""
    try:
        return activate(client, volume.name, read_only=read_only, by_mount=True)
    except errors.BusyError:
        if not read_only or volume.device is None:
            raise
        return activate(client, volume.name, read_only=False, by_mount=True)


def _mount(
    device: str, target: str, options: list[str], *, read_only: bool, volume: Volume, known: bool
) -> None:
    """Mount a device; one that is known to hold what its volume says need not be read first."""
    if known and volume.filesystem is not None:
        try:
            _mount_as(volume.filesystem, device, target, options, read_only=read_only)
        except errors.ThinpoolError:  # somebody has made another on what it is a snapshot of
            logger.debug("%s is no %s: looking", volume, volume.filesystem)
        else:
            return
    kind = filesystems.fs_type(device)
    if kind is None:
        raise errors.UsageError(
            f"{volume} carries no filesystem that can be mounted", what="volume", value=str(volume)
        )
    _mount_as(kind, device, target, options, read_only=read_only)


def _mount_as(kind: str, device: str, target: str, options: list[str], *, read_only: bool) -> None:
    wanted = [*filesystems.default_options(kind), *options]
    mounts.mount(device, target, kind, wanted, read_only=read_only)


def umount(session: Session, volume: str, directory: Path | None) -> Volume:
    """Unmount, and deactivate what mount had activated."""
    client, ref = session.of(volume)
    found = Volume.from_json(client.call("get", {"name": ref.name}))
    if found.device is not None:
        for target in _mount_points(found.device):
            if directory is None or target == os.path.realpath(directory):
                mounts.unmount(target)
        if not _mount_points(found.device):
            with contextlib.suppress(errors.BusyError):  # mounted in another namespace, or open
                arguments = {"name": ref.name, "if_by_mount": True}
                return Volume.from_json(client.call("deactivate", arguments))
    return Volume.from_json(client.call("get", {"name": ref.name}))


def _unmount_all(devices: Sequence[str]) -> None:
    """Unmount these devices wherever they are mounted in this namespace, side by side."""
    numbers = {_device_number(device) for device in devices} - {None}
    by_device: dict[int, list[str]] = {}
    for entry in reversed(mountinfo.own_mounts() if numbers else []):
        if entry.device in numbers:
            by_device.setdefault(entry.device, []).append(entry.mount_point)

    def unmount(targets: list[str]) -> None:
        for target in targets:
            mounts.unmount(target)

    _side_by_side(unmount, [(targets,) for targets in by_device.values()])


def _device_number(device: str) -> int | None:
    try:
        return os.stat(device).st_rdev  # noqa: PTH116 - a device's path
    except FileNotFoundError:
        return None


def _mount_points(device: str) -> list[str]:
    """Where a device is mounted in this namespace, the last mount first."""
    number = _device_number(device)
    return [
        entry.mount_point for entry in reversed(mountinfo.own_mounts()) if entry.device == number
    ]


# ---- changes ----------------------------------------------------------------------------------


def resume(session: Session, pool: str | None) -> Resumed:
    """Activate what was activated to persist."""
    names = [pool] if pool is not None else poolfile.list_pools(session.root)
    activations: list[Activation] = []
    failures: list[errors.ThinpoolError] = []
    for name in names:
        try:
            found = Resumed.from_json(session.client(name).call("resume"))
        except errors.ThinpoolError as error:
            if pool is not None:
                raise
            failures.append(error)
            continue
        activations += found.activations
        failures += found.failures
    return Resumed(activations=tuple(activations), failures=tuple(failures))


def external_origin(path: Path | str) -> tuple[str, int]:
    """The absolute path of a block device that is to be an external origin, and its bytes.

    Raises:
        NotFoundError, NotPermittedError: it cannot be read.
        UsageError: it is no block device.
    """
    where = os.path.abspath(path)  # noqa: PTH100 - a link stays, what it leads to may change
    try:
        with Path(where).open("rb") as device:
            size = device.seek(0, os.SEEK_END)
            is_device = stat.S_ISBLK(os.fstat(device.fileno()).st_mode)
    except OSError as cause:
        raise failure(cause, f"cannot read the external origin {where}", path=where) from cause
    if not is_device:
        raise errors.UsageError(
            f"an external origin is a block device, and {where} is none",
            what="external origin",
            value=where,
        )
    return where, size


def remove(
    session: Session,
    volumes: Sequence[str],
    *,
    deactivate: bool,
    deferred: bool,
    dry_run: bool,
) -> Removal:
    """Remove volumes."""
    client, _, names = session.of_all(list(volumes))
    if deactivate and not dry_run:
        found = [Volume.from_json(each) for each in client.call("get_many", {"names": names})]
        _unmount_all([each.device for each in found if each.device is not None])
    arguments = {
        "names": names,
        "deactivate": deactivate,
        "deferred": deferred,
        "dry_run": dry_run,
    }
    return Removal.from_json(client.call("remove", arguments))


@contextlib.contextmanager
def _for_a_while(client: PoolClient, volume: Volume) -> Iterator[str]:
    """The device of a volume, made if there is none, and taken down then."""
    if volume.device is not None:
        yield volume.device
        return
    activation = activate(client, volume.name, read_only=False)
    if activation.device is None:
        raise errors.UnsupportedHostError(f"{volume} has no device here", missing="loop")
    try:
        yield activation.device
    finally:
        if not activation.already_active:
            client.call("deactivate", {"name": volume.name})


def resize(session: Session, volume: str, size: int, *, device_only: bool) -> Volume:
    """Set a size."""
    client, ref = session.of(volume)
    found = Volume.from_json(client.call("get", {"name": ref.name}))
    arguments: dict[str, Any] = {"name": ref.name, "size": size, "device_only": device_only}
    if device_only or found.filesystem is None or size < found.size or found.read_only:
        return Volume.from_json(client.call("resize", arguments))
    with _for_a_while(client, found) as device:  # first: without one there is no growing
        client.call("resize", arguments)
        filesystems.grow(os.path.realpath(device))
    return Volume.from_json(client.call("get", {"name": ref.name}))


def trim(session: Session, volume: str) -> Trim:
    """Give back what its filesystem does not use."""
    client, ref = session.of(volume)
    before = Volume.from_json(client.call("get", {"name": ref.name}))
    if before.read_only:
        raise errors.ReadOnlyError(f"{volume} is read-only", name=ref.name)
    with _for_a_while(client, before) as device:
        filesystems.trim_device(os.path.realpath(device))
    after = Volume.from_json(client.call("get", {"name": ref.name}))
    return Trim(volume=after, trimmed=max(before.mapped - after.mapped, 0))
