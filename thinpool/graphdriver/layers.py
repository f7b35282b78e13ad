"""Layers as thin snapshots: made, mounted, counted, filled, removed.

A layer is the volume of its id, marked by labels as this driver's: what else is in the pool is not
seen here and never touched. A layer on a parent is a snapshot of the parent's volume, one without
is a snapshot of the pool's base, so a layer's cost is that of one snapshot at any depth.

Every call may be repeated, also when the first was cut off anywhere; what a killed process left
half done is finished or undone by the next one's start.

Calls for one layer must not overlap (the caller sees to that); for different ones they may.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.api import volumes
from thinpool.graphdriver.options import Options, parse_options
from thinpool.host import filesystems, mounts
from thinpool.model import PoolStatus, Volume
from thinpool.oci.extract import Extractor
from thinpool.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from thinpool.api import Thinpool
    from thinpool.api.session import Session
    from thinpool.graphdriver.places import Places
    from thinpool.graphdriver.state import State
    from thinpool.oci.streams import Source
    from thinpool.server.client import PoolClient

logger = logging.getLogger(__name__)

BASE: Final = "base"
DRIVER: Final = "graphdriver"
PARENT: Final = "graphdriver-parent"
LIMIT: Final = "graphdriver-limit"

_OPTIONS: Final = "options"
_TRASH: Final = "removed-layer-"
_BUSY_S: Final = 3.0
_BUSY_STEP_S: Final = 0.1
_TIDY_S: Final = 5.0
_SELINUX: Final = Path("/sys/fs/selinux/enforce")
_LABEL: Final = re.compile(r"[A-Za-z0-9_.:,\-]+")


class Layers:
    """The layers of one driver in one pool.

    Args:
        api: of the pools.
        session: of the same root.
        pool: the pool's name.
        driver: this driver's name, by which its layers are marked.
        state: what outlives this process.
        places: where layers are mounted.
    """

    def __init__(
        self,
        api: Thinpool,
        session: Session,
        pool: str,
        *,
        driver: str,
        state: State,
        places: Places,
    ) -> None:
        """Nothing is asked yet; recover() does the rest."""
        self._api = api
        self._session = session
        self.pool: Final = pool
        self._driver = driver
        self._state = state
        self._places = places
        self._options = Options.from_json(state.document(_OPTIONS))
        self._idle: set[str] = set()
        self._tidying = threading.Lock()
        self._stop = threading.Event()
        self._background = threading.Thread(target=self._tidy_often, name="tidy", daemon=True)

    # ---- start and end ----------------------------------------------------------------------

    def recover(self) -> None:
        """Finish or undo what an earlier process left, and begin to tidy in the background."""
        for layer in self._state.filling():
            logger.warning("layer %s was half filled: removing it", layer)
            self.remove(layer)
            self._state.end_filling(layer)
        mounted = set(self._places.layers())
        for layer in self._state.counted():
            if layer not in mounted:
                logger.info("layer %s is not mounted any more", layer)
                self._state.forget(layer)
        for layer in self.unheld():
            self._leave(layer)
        for each in self.all():
            if each.device is not None and each.name not in mounted:
                self._idle.add(each.name)
        self._background.start()

    def close(self) -> None:
        """End the background work; what is mounted stays mounted."""
        self._stop.set()
        if self._background.is_alive():
            self._background.join()

    def _tidy_often(self) -> None:
        while not self._stop.wait(_TIDY_S):
            try:
                self.tidy()
            except errors.ThinpoolError as error:
                logger.warning("tidying: %s", error.message)
            except Exception:
                logger.exception("tidying")

    def tidy(self) -> None:
        """Take down devices and remove layers that were in use when they should have gone."""
        self._state.expire()
        for layer in self._waiting():
            with self._tidying:  # a Get waits for this one device at most
                if layer in self._idle and (self._state.count(layer) or self._deactivate(layer)):
                    self._idle.discard(layer)
        for name in self._state.trash():
            with contextlib.suppress(errors.BusyError):
                self._remove_volume(name)
                self._state.end_removal(name)

    def _waiting(self) -> list[str]:
        with self._tidying:
            return sorted(self._idle)

    # ---- looking ----------------------------------------------------------------------------

    @property
    def client(self) -> PoolClient:
        """Of the pool's server."""
        return self._session.client(self.pool)

    def find(self, layer: str) -> Volume | None:
        """A layer's volume; None where there is none, or none of this driver."""
        try:
            found = Volume.from_json(self.client.call("get", {"name": layer}))
        except errors.NotFoundError:
            self.client.config()  # raises where it is the pool that is not there
            return None
        return found if self._is_ours(found) else None

    def _is_ours(self, found: Volume) -> bool:
        return found.labels.get(DRIVER) == self._driver

    def require(self, layer: str) -> Volume:
        """A layer's volume.

        Raises:
            NotFoundError: there is no such layer.
        """
        found = self.find(layer)
        if found is None:
            raise errors.NotFoundError(
                f"there is no layer {layer} in pool {self.pool}", pool=self.pool, name=layer
            )
        return found

    def all(self) -> list[Volume]:
        """Every layer."""
        answer = self.client.call("by_label", {"key": DRIVER, "value": self._driver})
        return [Volume.from_json(each) for each in answer]

    def base(self) -> Volume:
        """What a layer without a parent stands on.

        Raises:
            NotFoundError: the pool has none.
        """
        try:
            return Volume.from_json(self.client.call("get", {"name": BASE}))
        except errors.NotFoundError as cause:
            raise errors.NotFoundError(
                f"pool {self.pool} has no base device: make it with create-pool --base-size",
                pool=self.pool,
                name=BASE,
            ) from cause

    def exists(self, layer: str) -> bool:
        """Whether there is such a layer."""
        return self.find(layer) is not None

    def metadata(self, layer: str) -> dict[str, str]:
        """What docker inspect shows of a layer."""
        found = self.require(layer)
        shown = {
            "DeviceId": str(found.id),
            "DeviceName": str(found),
            "DeviceSize": str(found.size),
            "Filesystem": found.filesystem or "",
            "Parent": found.labels.get(PARENT, ""),
        }
        if LIMIT in found.labels:
            shown["SizeLimit"] = found.labels[LIMIT]
        if found.device is not None:
            shown["Device"] = found.device
        if self._places.device(layer) is not None:
            shown["MergedDir"] = self._places.path(layer)
        return shown

    # ---- init -------------------------------------------------------------------------------

    def init(self, given: Sequence[str], *, maps: bool) -> None:
        """Take dockerd's options.

        Args:
            given: ``key=value``.
            maps: dockerd remaps users.

        Raises:
            UsageError: an option that cannot be honoured.
            UnsupportedHostError: user-namespace remapping.
        """
        if maps:
            raise errors.UnsupportedHostError(
                "user-namespace remapping (userns-remap) is not supported by this driver: layers "
                "are shared by all containers with the owners that the images have",
                missing="userns-remap",
            )
        asked = parse_options(given)
        base = self.base()
        size = asked.options.base_size
        if size is not None and size < base.size:
            raise errors.UsageError(
                f"basesize {size} is less than the base's {base.size}: filesystems are never "
                "shrunk; make the pool with create-pool --base-size",
                what="basesize",
                value=size,
                smallest=base.size,
            )
        if asked.filesystem is not None and asked.filesystem != base.filesystem:
            raise errors.UsageError(
                f"the base of pool {self.pool} has {base.filesystem}, not {asked.filesystem}: "
                "it is chosen by create-pool --base-fs",
                what="fs",
                value=asked.filesystem,
            )
        mounts.parse_options(asked.options.mount_options)
        if asked.settings:
            self._api.set(self.pool, asked.settings)
        self._state.inherit()
        self._options = asked.options
        self._state.keep_document(_OPTIONS, asked.options.to_json())

    # ---- making -----------------------------------------------------------------------------

    def create(self, layer: str, parent: str | None, size: int | None) -> None:
        """Make a layer; fine when it is there with the same parent.

        Args:
            layer: its id.
            parent: the id of the layer that it stands on; None for an empty one.
            size: bytes that its filesystem shows at most; None for its parent's.

        Raises:
            AlreadyExistsError: the id is taken by something else.
            NotFoundError: there is no such parent.
            NoSpaceError: the pool has less than min-free left.
        """
        if parent == layer:
            raise errors.UsageError(f"layer {layer} cannot be its own parent", what="Parent")
        if self._is_made(layer, parent):
            return
        if parent is not None and self._state.is_filling(parent):
            raise errors.BusyError(f"layer {parent} is being filled", holder=None)
        below = self.base() if parent is None else self.require(parent)
        if parent is None and size is None:
            size = self._options.base_size
        labels = {DRIVER: self._driver, PARENT: parent or ""}
        grown = None
        if size is not None and size > below.size:
            grown = size
        elif size is not None and size < below.size:
            self._refuse_limit(below)
            labels[LIMIT] = str(size)
        try:
            volumes.snapshot(
                self._session,
                str(below),
                f"{self.pool}/{layer}",
                read_only=False,
                size=grown,
                labels=labels,
            )
        except errors.AlreadyExistsError:
            if not self._is_made(layer, parent):
                raise

    def _is_made(self, layer: str, parent: str | None) -> bool:
        """Whether this layer is there.

        Raises:
            AlreadyExistsError: its id is taken by something else.
        """
        try:
            found = Volume.from_json(self.client.call("get", {"name": layer}))
        except errors.NotFoundError:
            return False
        if self._is_ours(found) and found.labels.get(PARENT, "") == (parent or ""):
            return True
        raise errors.AlreadyExistsError(
            f"{found} exists already, and is not this layer", existing=found.to_json()
        )

    @staticmethod
    def _refuse_limit(below: Volume) -> None:
        if below.filesystem != "ext4":
            raise errors.UnsupportedHostError(
                f"a size below its image's {below.size} needs ext4: {below.filesystem} cannot "
                "hold a filesystem back here",
                missing="project quotas",
            )

    # ---- mounting ---------------------------------------------------------------------------

    def get(self, layer: str, label: str) -> tuple[str, int]:
        """Mount a layer, or count once more; returns where it is, and a ticket for ``answered``.

        Args:
            layer: its id.
            label: of SELinux, for all its files; empty for none.
        """
        found = self.require(layer)
        with self._tidying:
            self._idle.discard(layer)
        if self._places.device(layer) is None:
            self._state.forget(layer)
        try:
            self._mount(found, label)
        except BaseException:
            if not self._state.count(layer):
                with contextlib.suppress(errors.ThinpoolError):
                    self._leave(layer)
            raise
        return self._places.path(layer), self._state.add(layer)

    def _mount(self, found: Volume, label: str) -> None:
        options = ["dev", "suid", *self._options.mount_options]
        if label:
            if not _LABEL.fullmatch(label):
                raise errors.UsageError("MountLabel is no SELinux label", what="MountLabel")
            if not _SELINUX.exists():
                raise errors.UnsupportedHostError(
                    f"{found} cannot be mounted with the label {label}: this kernel has no "
                    "SELinux; start dockerd without --selinux-enabled",
                    missing="selinux",
                )
            options.append(f'context="{label}"')
        activation = volumes.activate(self.client, found.name, read_only=False, by_mount=True)
        if activation.device is None:
            raise errors.UnsupportedHostError(
                f"{found} has no device on this host: FUSE and loop devices are needed",
                missing="loop",
            )
        self._places.mount(found.name, activation.device, options)
        limit = found.labels.get(LIMIT)
        if limit is not None:
            self._hold_back(activation.device, self._places.path(found.name), int(limit))

    @staticmethod
    def _hold_back(device: str, path: str, limit: int) -> None:
        """Let a filesystem give no more than ``limit`` bytes to anyone, root included.

        ext4 keeps reserved clusters from everybody; the number is the mounted filesystem's and not
        on its disk (Documentation/ABI/testing/sysfs-fs-ext4), so it is set at each mount.
        """
        space = os.statvfs(path)
        reserve = max(space.f_blocks - limit // space.f_frsize, 0)
        number = os.stat(device).st_rdev  # noqa: PTH116 - a device; its node may have any name
        block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
        name = block.resolve().name
        try:
            Path(f"/sys/fs/ext4/{name}/reserved_clusters").write_text(
                str(reserve), encoding="ascii"
            )
        except OSError as cause:
            raise errors.UnsupportedHostError(
                f"cannot hold {path} to {limit} bytes: {cause.strerror}", missing="sysfs"
            ) from cause

    def put(self, layer: str) -> int:
        """Count once less, and unmount with the last; one too many is harmless. A ticket."""
        ticket = self._state.take(layer)
        self.leave_unheld(layer)
        return ticket

    def answered(self, ticket: int, *, lost: bool) -> None:
        """The answer to a Get or a Put is out, or is lost: see ``State``."""
        if lost:
            self._state.lose(ticket)
        else:
            self._state.answered(ticket)

    def _leave(self, layer: str) -> None:
        """Unmount a layer and take its device down, later if it is in use."""
        self._places.unmount(layer, lazy=self._options.deferred_removal)
        if not self._deactivate(layer):
            with self._tidying:
                self._idle.add(layer)

    def _deactivate(self, layer: str) -> bool:
        """Take a layer's device down; False when it is in use."""
        try:
            self.client.call("deactivate", {"name": layer, "if_by_mount": True})
        except errors.NotFoundError:
            return True
        except errors.BusyError:
            return False
        return True

    def unheld(self) -> list[str]:
        """Layers that are mounted and that nobody has got."""
        return [layer for layer in self._places.layers() if not self._state.count(layer)]

    def disown(self) -> None:
        """What a dockerd before this one had got, and this one never named, nobody has got."""
        for layer in self._state.inherited():
            self._state.forget(layer)

    def leave_unheld(self, layer: str) -> None:
        """Unmount a layer unless somebody has got it."""
        if self._state.count(layer):
            return
        if self._places.device(layer) is not None or self.find(layer) is not None:
            self._leave(layer)

    @contextlib.contextmanager
    def reached(self, found: Volume) -> Iterator[int]:
        """A descriptor of a layer's root, in a mount that no namespace has."""
        activation = volumes.activate(self.client, found.name, read_only=False, by_mount=True)
        if activation.device is None:
            raise errors.UnsupportedHostError(
                f"{found} has no device on this host: FUSE and loop devices are needed",
                missing="loop",
            )
        try:
            kind = filesystems.fs_type(activation.device)
            if kind is None:
                raise errors.UsageError(f"{found} carries no filesystem", what="layer")
            options = filesystems.private_options(kind)
            with mounts.detached_mount(activation.device, kind, options) as root:
                yield root
        finally:
            if self._places.device(found.name) is None and not self._deactivate(found.name):
                with self._tidying:
                    self._idle.add(found.name)

    # ---- filling and removing ---------------------------------------------------------------

    def apply(self, layer: str, parent: str | None, source: Source) -> int:
        """Unpack a layer's tar into a layer; returns the bytes of files and links in it.

        A layer that fails half way and is not mounted is removed: nobody will take it for whole.

        Raises:
            ArchiveError: the tar is damaged or tries to escape.
            NoSpaceError: the pool or the layer's filesystem is full.
        """
        found = self.require(layer)
        if parent is not None and found.labels.get(PARENT, "") != parent:
            raise errors.UsageError(f"layer {layer} is not made on {parent}", what="parent")
        self._state.begin_filling(layer)
        try:
            with self.reached(found) as root:
                extractor = Extractor(root, best_effort_xattrs=True, holes=True)
                done = extractor.apply(source, archive=f"layer {layer:.12}", need_end=False)
        except BaseException as error:
            failed = isinstance(error, (errors.StorageIOError, errors.ReadOnlyError, OSError))
            full = failed and self._is_full()  # asked first: the removal makes room
            self._drop_half_filled(layer)
            if full:
                raise errors.DataSpaceError(
                    f"pool {self.pool} is full: layer {layer} does not fit", used=None, total=None
                ) from error
            raise
        self._state.end_filling(layer)
        for note in done.notes:
            logger.info("layer %s: %s", layer, note)
        return done.bytes_written + done.link_bytes

    def _drop_half_filled(self, layer: str) -> None:
        if not self._state.count(layer):
            try:
                self.remove(layer)
            except errors.ThinpoolError as second:
                logger.warning("layer %s is half filled and stays: %s", layer, second.message)
                return  # the next start tries again
        self._state.end_filling(layer)

    def _is_full(self) -> bool:
        try:
            return PoolStatus.from_json(self.client.call("status")).mode != "rw"
        except errors.ThinpoolError:
            return False

    def remove(self, layer: str) -> None:
        """Remove a layer, counted or not; fine when there is none. Snapshots of it live on.

        Raises:
            BusyError: it is in use, and deferred deletion is off.
        """
        if self.find(layer) is None:
            self._state.forget(layer)
            return
        self._places.unmount(layer, lazy=self._options.deferred_removal)
        deadline = time.monotonic() + _BUSY_S
        while True:
            try:
                self._remove_volume(layer)
                break
            except errors.BusyError:
                if time.monotonic() < deadline:
                    time.sleep(_BUSY_STEP_S)
                    continue
                if not self._options.deferred_deletion:
                    raise
                self._set_aside(layer)
                break
        self._state.forget(layer)
        with self._tidying:
            self._idle.discard(layer)

    def _remove_volume(self, name: str) -> None:
        arguments = {"names": [name], "deactivate": True, "dry_run": False}
        with contextlib.suppress(errors.NotFoundError):
            self.client.call("remove", arguments)

    def _set_aside(self, layer: str) -> None:
        """Give a layer that is in use another name, under which it is removed later."""
        name = _TRASH + secrets.token_hex(8)
        self._state.begin_removal(name)
        with contextlib.suppress(errors.NotFoundError):
            self.client.call("rename", {"name": layer, "new": name})
        self.client.call("label", {"name": name, "labels": {DRIVER: f"removed:{self._driver}"}})
        logger.info("layer %s is in use: it is removed when it is not", layer)

    # ---- status -----------------------------------------------------------------------------

    def status(self) -> list[tuple[str, str]]:
        """What docker info shows, with the words of the devicemapper driver."""
        pool = PoolStatus.from_json(self.client.call("status"))
        base = self.base()
        data, metadata = pool.data, pool.metadata
        on_off = {True: "true", False: "false"}
        shown = [
            ("Pool Name", pool.pool),
            ("Pool UUID", pool.uuid),
            ("Pool Engine", pool.engine),
            ("Pool Mode", pool.mode),
            ("Pool Blocksize", format_size(pool.block_size)),
            ("Base Device Size", format_size(max(base.size, self._options.base_size or 0))),
            ("Backing Filesystem", base.filesystem or "unknown"),
            ("Data file", data.path),
            ("Metadata file", metadata.path),
            ("Data Space Used", format_size(data.used)),
            ("Data Space Total", format_size(data.total)),
            (
                "Data Space Available",
                format_size(_available(data.total - data.used, data.host_free)),
            ),
            ("Metadata Space Used", format_size(metadata.used)),
            ("Metadata Space Total", format_size(metadata.total)),
            ("Metadata Space Available", format_size(metadata.total - metadata.used)),
            ("Thin Pool Minimum Free Space", format_size(int(data.total * pool.min_free / 100))),
            ("When Full", pool.when_full),
            ("Deferred Removal Enabled", on_off[self._options.deferred_removal]),
            ("Deferred Deletion Enabled", on_off[self._options.deferred_deletion]),
            ("Deferred Removal Device Count", str(len(self._idle))),
            ("Deferred Deleted Device Count", str(len(self._state.trash()))),
            ("Layers", str(len(self.all()))),
        ]
        return shown + [("Warning", each) for each in pool.warnings]


def _available(free: int, host_free: int | None) -> int:
    return free if host_free is None else min(free, host_free)
