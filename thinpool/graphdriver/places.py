"""Where layers are mounted: a folder that mount namespaces of containers do not keep busy.

* The inner folder is a shared mount: a namespace that was copied with it (every container begins
  with one, and one that binds the host's root with rslave keeps it) sees a layer go when it is
  unmounted here, and does not hold it.
* The outer folder is an unbindable mount: what binds the host's root gets no copy of it at all.
  Linux 6.17 and later forget that in copied namespaces, hence the inner one.
* What still holds a layer (a private copy, an open file) delays only its device's end.
* Mode 0700: only root gets to what is below, set-uid programs of images included.

Thread-safe for different layers.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.host import filesystems, mountinfo, mounts, syscalls

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MS_BIND: Final = 0x1000
_MS_UNBINDABLE: Final = 0x20000
_MS_SHARED: Final = 0x100000
_INNER: Final = "mnt"
_BUSY_S: Final = 0.5


class Places:
    """The mount points of one driver's layers.

    Args:
        directory: made when it is not there.
    """

    def __init__(self, directory: Path) -> None:
        """Make the folders mounts of their own."""
        inner = directory / _INNER
        inner.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        self._outer: Final = os.path.realpath(directory)
        self._directory: Final = os.path.realpath(inner)
        if mountinfo.mount_at(self._directory) is None:
            for path in (self._outer, self._directory):
                syscalls.mount(path, path, "", _MS_BIND, "")
        syscalls.mount("none", self._directory, "", _MS_SHARED, "")
        # Last: nothing can be bound from below an unbindable mount.
        syscalls.mount("none", self._outer, "", _MS_UNBINDABLE, "")

    def path(self, layer: str) -> str:
        """Where a layer is mounted, if it is."""
        return os.path.join(self._directory, layer)  # noqa: PTH118 - compared with the mount table

    def device(self, layer: str) -> int | None:
        """The number of the device that is mounted there."""
        entry = mountinfo.mount_at(self.path(layer))
        return None if entry is None else entry.device

    def mount(self, layer: str, device: str, options: Sequence[str]) -> None:
        """Mount a layer's device, unless it is mounted.

        Raises:
            ThinpoolError: as ``filesystems.mount_volume``.
        """
        there, wanted = self.device(layer), os.stat(device).st_rdev  # noqa: PTH116 - a device
        if there == wanted:
            return
        if there is not None:  # of a server that died: a device that is gone
            self.unmount(layer, lazy=True)
        path = self.path(layer)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)  # noqa: PTH102 - as above
        filesystems.mount_volume(device, path, options=options)

    def unmount(self, layer: str, *, lazy: bool) -> None:
        """Unmount a layer, and remove its mount point; fine when it is not mounted.

        Args:
            layer: its id.
            lazy: when it is in use, take it out of sight and let it end when it is not.

        Raises:
            BusyError: it is in use, and not lazy.
        """
        path = self.path(layer)
        if lazy:
            try:
                mounts.unmount_all(path, timeout=_BUSY_S)
            except errors.BusyError:
                mounts.unmount(path, lazy=True)
        else:
            mounts.unmount_all(path)
        with contextlib.suppress(OSError):
            os.rmdir(path)  # noqa: PTH106 - as above

    def layers(self) -> list[str]:
        """What is mounted."""
        prefix = self._directory + "/"
        found = [each.mount_point for each in mountinfo.own_mounts()]
        return [
            point.removeprefix(prefix)
            for point in found
            if point.startswith(prefix) and "/" not in point.removeprefix(prefix)
        ]

    def leave(self) -> None:
        """End the folders' own mounts when nothing is mounted in them."""
        if not self.layers():
            for path in (self._directory, self._outer):
                with contextlib.suppress(errors.BusyError):
                    mounts.unmount_all(path)
