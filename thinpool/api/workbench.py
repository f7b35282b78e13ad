"""Volumes that are being made: hidden, under a lease, until they are whole and get their names.

The lease lives as long as the process that works; when that dies, the server removes the lot.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from thinpool import errors
from thinpool.host import filesystems, mounts
from thinpool.host.signatures import data_ranges
from thinpool.model import Activation, Delta, PoolStatus, Volume

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from thinpool.model import Kind
    from thinpool.server.client import Lease, PoolClient
    from thinpool.server.raw import VolumeHandle

_COPY_BYTES: Final = 1 << 20
_HEAD: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What becomes of a hidden volume when it is published."""

    volume: Volume
    publish_as: str
    kind: Kind
    read_only: bool
    labels: Mapping[str, str]
    filesystem: str | None

    def to_json(self) -> dict[str, Any]:
        """As the server takes it."""
        return {
            "name": self.volume.name,
            "publish_as": self.publish_as,
            "kind": self.kind,
            "read_only": self.read_only,
            "labels": dict(self.labels),
            "filesystem": self.filesystem,
        }


class Workbench:
    """Makes hidden volumes in one pool. A context manager: what is not published goes at its end.

    Args:
        client: of the pool's server.
    """

    def __init__(self, client: PoolClient) -> None:
        """Open the lease."""
        self._client = client
        self._lease: Lease = client.lease()
        self._block_size = client.config().block_size

    def __enter__(self) -> Self:
        """The workbench itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the lease."""
        self._lease.close()

    # ---- making -----------------------------------------------------------------------------

    def create(self, *, size: int, kind: Kind) -> Volume:
        """An empty volume."""
        arguments = {"size": size, "kind": kind, "lease": self._lease.id}
        return Volume.from_json(self._client.call("create", arguments))

    def snapshot(self, source: str, *, kind: Kind, size: int | None = None) -> Volume:
        """A snapshot, writable until it is sealed or published read-only."""
        arguments = {"source": source, "kind": kind, "size": size, "lease": self._lease.id}
        return Volume.from_json(self._client.call("snapshot", arguments))

    def seal(self, volume: Volume) -> Volume:
        """Make it read-only, so that it can be a parent."""
        arguments = {"name": volume.name, "lease": self._lease.id}
        return Volume.from_json(self._client.call("seal", arguments))

    def publish(self, *items: Finished) -> list[Volume]:
        """Give them their names, all or none."""
        arguments = {"items": [item.to_json() for item in items], "lease": self._lease.id}
        return [Volume.from_json(each) for each in self._client.call("publish", arguments)]

    def delta(self, left: Volume, right: Volume) -> Delta:
        """Where two volumes do not share their blocks."""
        arguments = {"left": left.name, "right": right.name, "lease": self._lease.id}
        return Delta.from_json(self._client.call("delta", arguments))

    # ---- using ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def active(self, volume: Volume, *, read_only: bool = False) -> Iterator[str]:
        """Its device's path, for a while."""
        arguments: dict[str, Any] = {"name": volume.name, "lease": self._lease.id}
        answer = self._client.call("activate", {**arguments, "read_only": read_only})
        device = Activation.from_json(answer).device
        if device is None:
            raise errors.UnsupportedHostError(
                f"{volume} has no device on this host", missing="loop"
            )
        try:
            yield device
        finally:
            self._client.call("deactivate", arguments)

    @contextlib.contextmanager
    def mounted(
        self, volume: Volume, *, read_only: bool = False, called: str | None = None
    ) -> Iterator[int]:
        """A descriptor of its root directory, mounted where nobody else sees it.

        On leaving everything written is on the volume, and the volume is not active. In errors it
        has the name by which the caller was asked for it.
        """
        with self.active(volume, read_only=read_only) as device:
            kind = filesystems.fs_type(device)
            if kind is None:
                asked = called or str(volume)
                raise errors.UsageError(
                    f"{asked} carries no filesystem", what="volume", value=asked
                )
            options = filesystems.private_options(kind)
            with mounts.detached_mount(device, kind, options, read_only=read_only) as root:
                yield root

    def raw(self, volume: Volume, *, writable: bool) -> VolumeHandle:
        """Open it for raw I/O."""
        return self._client.open(volume.name, writable=writable, lease=self._lease.id)

    # ---- filesystems ------------------------------------------------------------------------

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """What writes much into a filesystem: on a full pool that reports EIO; say what it is."""
        try:
            yield
        except errors.ThinpoolError as cause:
            # Of an error of the host or of a program that it ran; others say what they mean.
            if type(cause) not in {errors.StorageIOError, errors.ThinpoolError}:
                raise
            status = PoolStatus.from_json(self._client.call("status"))
            if status.mode != "out_of_data_space":
                raise
            raise errors.DataSpaceError(
                f"the data space of pool {status.pool} is full: remove volumes, or extend-pool",
                pool=status.pool,
                used=status.data.used,
                total=status.data.total,
            ) from cause

    def make_filesystem(self, volume: Volume, fs: str, options: Sequence[str]) -> str:
        """Make a filesystem; on its device where there can be one, else through a file.

        Returns:
            Its type.
        """
        fstype = filesystems.check_fs_type(fs)
        try:
            with self.filling(), self.active(volume) as device:
                filesystems.make_filesystem(
                    device, fstype, block_size=self._block_size, options=options
                )
        except (errors.UnsupportedHostError, errors.NotPermittedError) as error:
            if error.attributes.get("missing") not in {"fuse", "loop", None}:
                raise
            self._make_by_file(volume, fstype, options)
        return fstype

    def _make_by_file(
        self, volume: Volume, fstype: filesystems.FsType, options: Sequence[str]
    ) -> None:
        """In a sparse file without a name, whose data is then copied."""
        with tempfile.TemporaryFile(dir=self._client.directory, buffering=0) as file:
            descriptor = file.fileno()
            os.ftruncate(descriptor, volume.size)
            filesystems.make_filesystem(
                f"/proc/{os.getpid()}/fd/{descriptor}",
                fstype,
                block_size=self._block_size,
                options=options,
            )
            with self.raw(volume, writable=True) as handle:
                copy_in(descriptor, handle)

    def settle(self, volume: Volume) -> None:
        """Replay the journal of a snapshot that was not clean, where that can be done.

        Afterwards it can be sealed, and mounts read-only without a write.
        """
        if volume.filesystem is None or not self._is_unsettled(volume):
            return
        with (
            contextlib.suppress(errors.UnsupportedHostError),
            self.active(volume) as device,
        ):
            filesystems.replay_journal(device)

    def _is_unsettled(self, volume: Volume) -> bool:
        with self.raw(volume, writable=False) as handle:
            head = handle.read(0, min(_HEAD, volume.size))
        found = filesystems.parse_superblock(head, volume.filesystem)
        if found is None:
            return False
        if found.needs_recovery is None:
            # xfs does not say; how the snapshot was taken does. A freeze leaves its log dirty too.
            return volume.consistency != "quiescent"
        return found.needs_recovery

    def grow_filesystem(self, volume: Volume) -> None:
        """Let its filesystem fill it."""
        with self.active(volume) as device:
            filesystems.grow(device)


def copy_in(descriptor: int, handle: VolumeHandle) -> None:
    """Copy what is not a hole of a file to a volume, durably."""
    for begin, end in data_ranges(descriptor):
        position = begin
        while position < end:
            data = os.pread(descriptor, min(_COPY_BYTES, end - position), position)
            if not data:
                break
            handle.write(position, data)
            position += len(data)
    handle.flush()
