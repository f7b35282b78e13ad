"""Ending what a dead server left: its FUSE mount, the loop devices over it, what is mounted there.

The order matters. First the connection is aborted, so that nobody waits any more, this process
included; then the filesystems on its devices are unmounted; then the devices are detached, while
the kernel still shows their files by the mount's path; the FUSE mount goes last.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from thinpool import errors
from thinpool.host import loop, mounts
from thinpool.host.mountinfo import mounts_of_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleared:
    """What was found and ended.

    Attributes:
        connections: FUSE connections aborted.
        unmounted: mount points of this namespace, of volumes and of the server.
        detached: loop devices.
        waiting: devices that others still hold, and by whom; each goes when they let go.
    """

    connections: tuple[int, ...]
    unmounted: tuple[str, ...]
    detached: tuple[str, ...]
    waiting: tuple[str, ...]


def clear_dead_server(mount_point: str | os.PathLike[str]) -> Cleared:
    """Clear everything over a FUSE mount whose server is known to be dead. Repeatable.

    Args:
        mount_point: of the FUSE mount, named without symbolic links. What is mounted at or
            below it is taken for the dead server's.

    Raises:
        NotPermittedError: this user may not.
    """
    where = os.path.abspath(mount_point)
    found = mounts.fuse_mounts(where)
    connections = [mount.connection for mount in found if mounts.abort_fuse(mount.connection)]
    unmounted: list[str] = []
    detached: list[str] = []
    waiting: list[str] = []
    for device in loop.find_below(where):
        unmounted += [
            mount.entry.mount_point
            for mount in mounts_of_device(device.device, source=device.path)
            if not mount.foreign and _end_mount(mount.entry.mount_point)
        ]
        try:
            if loop.detach(device):
                detached.append(device.path)
        except errors.BusyError as busy:
            loop.detach_when_unused(device)
            waiting.append(busy.message)
    unmounted += [
        mount.mount_point
        for mount in reversed(found)
        if mounts.unmount(mount.mount_point, lazy=True)
    ]
    return Cleared(
        connections=tuple(connections),
        unmounted=tuple(unmounted),
        detached=tuple(detached),
        waiting=tuple(waiting),
    )


def _end_mount(mount_point: str) -> bool:
    """Unmount what can't be used any more, whether somebody still sits in it or not."""
    try:
        return mounts.unmount(mount_point, timeout=0)
    except errors.ThinpoolError:
        return mounts.unmount(mount_point, lazy=True)
