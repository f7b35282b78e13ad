"""Volumes: made with a filesystem, snapshotted, mounted, resized, trimmed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinpool import errors
from thinpool.api.session import Session, refuse_taken
from thinpool.api.workbench import Finished, Workbench
from thinpool.host import filesystems, mountinfo, mounts
from thinpool.model import Activation, Mounted, Removal, Trim, Volume
from thinpool.names import parse_ref, same_pool

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from thinpool.server.client import PoolClient


def create(
    session: Session,
    volume: str,
    *,
    size: int,
    fs: str | None,
    mkfs_options: Sequence[str],
    labels: Mapping[str, str],
) -> Volume:
    """Make a volume."""
    client, ref = session.of(volume)
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
    origin = Volume.from_json(client.call("get", {"name": ref.name}))
    grows = size is not None and size > origin.size and origin.filesystem is not None
    if not grows and not read_only:
        arguments = {
            "source": ref.name,
            "target": new.name,
            "size": size,
            "labels": dict(labels),
        }
        return Volume.from_json(client.call("snapshot", arguments))
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


def activate(
    client: PoolClient,
    name: str,
    *,
    read_only: bool,
    by_mount: bool = False,
    owner: tuple[int, int] | None = None,
    mode: int | None = None,
) -> Activation:
    """Make a block device."""
    arguments = {
        "name": name,
        "read_only": read_only,
        "by_mount": by_mount,
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
    device = activation.device or ""
    try:
        number = os.stat(device).st_rdev  # noqa: PTH116 - a device's path
        there = mountinfo.mount_at(target)
        already = there is not None and there.device == number
        if not already:
            _mount(device, target, chosen, read_only=wants_read_only, volume=volume)
    except BaseException:
        if not activation.already_active:
            with contextlib.suppress(errors.ThinpoolError):
                client.call("deactivate", {"name": ref.name, "if_by_mount": True})
        raise
    return Mounted(
        volume=Volume.from_json(client.call("get", {"name": ref.name})),
        device=device,
        directory=target,
        already_mounted=already,
    )


def check_directory(directory: Path) -> str:
    """The real path of a directory to mount on.

    Raises:
        NotFoundError: it is none.
    """
    target = os.path.realpath(directory)
    if not Path(target).is_dir():
        raise errors.NotFoundError(f"{directory} is no directory", path=str(directory))
    return target


def _device_for_mount(client: PoolClient, volume: Volume, *, read_only: bool) -> Activation:
    """Its device; one that is active writable serves a read-only mount too."""
    try:
        return activate(client, volume.name, read_only=read_only, by_mount=True)
    except errors.BusyError:
        if not read_only or volume.device is None:
            raise
        return activate(client, volume.name, read_only=False, by_mount=True)


def _mount(device: str, target: str, options: list[str], *, read_only: bool, volume: str) -> None:
    kind = filesystems.fs_type(device)
    if kind is None:
        raise errors.UsageError(
            f"{volume} carries no filesystem that can be mounted", what="volume", value=volume
        )
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


def _mount_points(device: str) -> list[str]:
    """Where a device is mounted in this namespace, the last mount first."""
    try:
        number = os.stat(device).st_rdev  # noqa: PTH116 - a device's path
    except FileNotFoundError:
        return []
    return [
        entry.mount_point for entry in reversed(mountinfo.own_mounts()) if entry.device == number
    ]


# ---- changes ----------------------------------------------------------------------------------


def remove(session: Session, volumes: Sequence[str], *, deactivate: bool, dry_run: bool) -> Removal:
    """Remove volumes."""
    client, _, names = session.of_all(list(volumes))
    if deactivate and not dry_run:
        for name in names:
            found = Volume.from_json(client.call("get", {"name": name}))
            if found.device is not None:
                for target in _mount_points(found.device):
                    mounts.unmount(target)
    arguments = {"names": names, "deactivate": deactivate, "dry_run": dry_run}
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
