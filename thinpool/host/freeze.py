"""Freezing the filesystems on a device for the instant of a snapshot.

A frozen filesystem has written everything back and lets no write begin, so a snapshot taken then
is clean: ext4 needs no recovery at all, xfs by design still replays its log at the next mount, so
a snapshot of it that shall be read-only is to be settled first (``filesystems.replay_journal``).

While it is frozen, everyone who writes to it waits: so a freeze ends by itself after a
bound, ends when its guard is closed, and is recorded in a directory before it begins, so that
whoever comes after a killed process can end it (``thaw_recorded``).

Invariants:
- never frozen: a filesystem that the pool's own files, or what lies below them, are on;
- FIFREEZE itself may wait for writes; if it waits longer than the bound, the call gives up, and
  the freeze, should it come yet, is ended at once by the thread that made it.

Thread-safe. Facts: Documentation/filesystems/ext4, ioctl_fsfreeze; fsfreeze(8).
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from thinpool.host import syscalls
from thinpool.host.mountinfo import (
    MountEntry,
    NamespaceMount,
    mount_of,
    mounts_of_device,
    open_mount,
    own_mounts,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

BOUND_SECONDS: Final = 5.0
_FIFREEZE: Final = 0xC0045877
_FITHAW: Final = 0xC0045878
_DEPTH: Final = 16
"""How many devices may lie on top of each other."""


class FreezeState(enum.StrEnum):
    """How a freeze came out."""

    FROZEN = "frozen"
    NOT_MOUNTED = "not_mounted"
    REFUSED = "refused"
    """It holds the pool's own files."""
    FAILED = "failed"
    """The kernel or the filesystem wouldn't, or not in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Freeze:
    """What ``FreezeGuard.freeze`` did.

    Attributes:
        device: number of the block device.
        state: FROZEN means every filesystem found on the device is.
        reason: why it isn't, for people.
        mounts: where the frozen filesystems are mounted, for people.
    """

    device: int
    state: FreezeState
    reason: str | None = None
    mounts: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class _Hold:
    """The filesystems of one device, from before they are frozen until they are thawed."""

    device: int
    targets: list[tuple[int, NamespaceMount]]
    deadline: float
    frozen: list[int] = field(default_factory=list)
    failure: str | None = None
    ended: bool = False
    expired: bool = False
    settled: threading.Event = field(default_factory=threading.Event)
    timer: threading.Timer | None = None


class FreezeGuard:
    """Freezes filesystems and answers for their being thawed.

    Args:
        protect: paths of the pool's own files; what holds them is never frozen.
        bound: seconds a freeze lasts at most, FIFREEZE's own time included.
        record: a directory for notes of what is frozen (made if need be), for
            ``thaw_recorded``; None keeps none.
    """

    def __init__(
        self,
        *,
        protect: Sequence[str | os.PathLike[str]],
        bound: float = BOUND_SECONDS,
        record: Path | None = None,
    ) -> None:
        """Note what is protected; freezes nothing."""
        own = [*protect, *([] if record is None else [record])]
        self._protect = [os.path.abspath(path) for path in own]
        self._bound = bound
        self._record = record
        self._lock = threading.Lock()
        self._holds: dict[int, _Hold] = {}

    def __enter__(self) -> Self:
        """Use it as a context: everything is thawed at the end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Thaw what is frozen."""
        self.close()

    def freeze(self, device: int) -> Freeze:
        """Freeze every filesystem on a device and on what is stacked on it, wherever mounted.

        Never raises for what may happen to a freeze: a snapshot is taken all the same, and is
        then what a power cut leaves. Blocks for the bound at most.
        """
        found = list(_filesystems_on(device))
        if not found:
            return Freeze(device=device, state=FreezeState.NOT_MOUNTED)
        protected = devices_below(self._protect)
        for mount in found:
            if mount.entry.device in protected:
                return Freeze(
                    device=device,
                    state=FreezeState.REFUSED,
                    reason=f"what is {mount.describe()} holds the pool's own files",
                )
        hold = _Hold(device=device, targets=[], deadline=time.monotonic() + self._bound)
        with self._lock:
            if device in self._holds:
                return Freeze(
                    device=device, state=FreezeState.FAILED, reason="it is being frozen already"
                )
            self._holds[device] = hold
        try:
            hold.targets = _reach(found)
            self._note(device)
        except OSError as cause:
            self._finish(hold)
            return Freeze(
                device=device,
                state=FreezeState.FAILED,
                reason=f"{cause.filename} cannot be reached: {cause.strerror}",
            )
        try:
            threading.Thread(target=self._freeze_all, args=(hold,), daemon=True).start()
        except RuntimeError as cause:
            self._finish(hold)
            return Freeze(device=device, state=FreezeState.FAILED, reason=str(cause))
        hold.settled.wait(self._bound)
        return self._outcome(hold)

    def thaw(self, device: int) -> bool:
        """Thaw what ``freeze`` froze. Repeatable.

        Returns:
            True if it was frozen all the time since; False if the bound had ended it before,
            or it wasn't frozen: the snapshot is then one of a filesystem in use.
        """
        with self._lock:
            hold = self._holds.get(device)
        if hold is None:
            return False
        self._end(hold)
        return bool(hold.frozen) and not hold.expired and hold.failure is None

    def close(self) -> None:
        """Thaw everything."""
        with self._lock:
            holds = list(self._holds.values())
        for hold in holds:
            self._end(hold)

    # -- the steps --------------------------------------------------------------------------

    def _freeze_all(self, hold: _Hold) -> None:
        """In a thread of its own, since FIFREEZE may wait for as long as writes take."""
        for fd, mount in hold.targets:
            reason = None
            try:
                fcntl.ioctl(fd, _FIFREEZE, 0)
            except OSError as cause:
                busy = cause.errno == errno.EBUSY
                why = "frozen by somebody else" if busy else os.strerror(cause.errno or 0)
                reason = f"what is {mount.describe()} cannot be frozen: {why}"
            with self._lock:
                if reason is None:
                    hold.frozen.append(fd)
                hold.failure = hold.failure or reason
                stop = hold.ended or hold.failure is not None
            if stop:
                break
        with self._lock:
            late = hold.ended
            if not late and hold.failure is None:
                rest = max(0.0, hold.deadline - time.monotonic())
                hold.timer = threading.Timer(rest, self._expire, (hold,))
                hold.timer.daemon = True
                hold.timer.start()
            # With the lock: who ends the hold must see either that the thread is still to
            # thaw, or that it has left that to others.
            hold.settled.set()
        if late:
            self._finish(hold)

    def _outcome(self, hold: _Hold) -> Freeze:
        if hold.settled.is_set() and hold.failure is None and not hold.ended:
            places = tuple(mount.describe() for _fd, mount in hold.targets)
            return Freeze(device=hold.device, state=FreezeState.FROZEN, mounts=places)
        reason = hold.failure or f"its writes were not done within {self._bound:g} s"
        self._end(hold)
        return Freeze(device=hold.device, state=FreezeState.FAILED, reason=reason)

    def _expire(self, hold: _Hold) -> None:
        hold.expired = True
        self._end(hold)

    def _end(self, hold: _Hold) -> None:
        """End a hold once; if its thread is in FIFREEZE still, that ends it."""
        with self._lock:
            first = not hold.ended
            hold.ended = True
            settled = hold.settled.is_set()
        if first and settled:
            self._finish(hold)

    def _finish(self, hold: _Hold) -> None:
        """Thaw, let go, forget. Only one thread gets here for a hold."""
        if hold.timer is not None:
            hold.timer.cancel()
        for fd in reversed(hold.frozen):
            with contextlib.suppress(OSError):  # EINVAL: somebody thawed it before us
                fcntl.ioctl(fd, _FITHAW, 0)
        for fd, _mount in hold.targets:
            os.close(fd)
        if self._record is not None:
            (self._record / _note_name(hold.device)).unlink(missing_ok=True)
        with self._lock:
            self._holds.pop(hold.device, None)

    def _note(self, device: int) -> None:
        if self._record is None:
            return
        self._record.mkdir(mode=0o700, parents=True, exist_ok=True)
        note = {"device": device, "sequence": _sequence(device)}
        (self._record / _note_name(device)).write_text(json.dumps(note))


def thaw_recorded(record: Path) -> list[str]:
    """Thaw what a killed process left frozen, by its notes; returns where that was, for people.

    For the next one to start, and for a worker whose supervisor is gone.
    """
    thawed: list[str] = []
    if not record.is_dir():
        return thawed
    for path in sorted(record.iterdir()):
        try:
            note = json.loads(path.read_text())
            device, sequence = int(note["device"]), int(note["sequence"])
        except (OSError, ValueError, KeyError, TypeError):
            path.unlink(missing_ok=True)  # cut short: written before anything was frozen
            continue
        # Another device by that number is nobody's to thaw.
        if _sequence(device) == sequence:
            for mount in _filesystems_on(device):
                with contextlib.suppress(OSError):
                    fd = open_mount(mount)
                    try:
                        fcntl.ioctl(fd, _FITHAW, 0)
                        thawed.append(mount.describe())
                    finally:
                        os.close(fd)
        path.unlink(missing_ok=True)
    return thawed


def devices_below(paths: Iterable[str]) -> frozenset[int]:
    """The numbers of every device that files lie on, all the way down.

    Through loop devices to the filesystem of their file, through stacked devices to those below,
    through overlay mounts to their upper directory.
    """
    found: set[int] = set()
    table = own_mounts()
    for path in paths:
        _add_below(path, table, found, _DEPTH)
    return frozenset(found)


def _add_below(path: str, table: list[MountEntry], found: set[int], depth: int) -> None:
    place = path
    while True:
        try:
            device = syscalls.statx(place).device
            break
        except OSError:
            if place == os.path.dirname(place):
                return
            place = os.path.dirname(place)  # not made yet: what would hold it
    _add_device(device, table, found, depth)
    # The number may be one that only the filesystem knows: go by what is mounted there, too.
    entry = mount_of(os.path.realpath(place), table)
    if entry is None or depth <= 0:
        return
    if entry.fstype == "overlay":
        for option in entry.super_options.split(","):
            key, _, value = option.partition("=")
            if key == "upperdir":
                _add_below(value, table, found, depth - 1)
    elif entry.source.startswith("/dev/"):
        with contextlib.suppress(OSError):
            _add_device(os.stat(entry.source).st_rdev, table, found, depth)


def _add_device(device: int, table: list[MountEntry], found: set[int], depth: int) -> None:
    if device in found or depth <= 0:
        return
    found.add(device)
    directory = _sysfs(device)
    with contextlib.suppress(OSError):
        backing = os.fsdecode((directory / "loop/backing_file").read_bytes()).rstrip("\n")
        _add_below(backing, table, found, depth - 1)
    with contextlib.suppress(OSError):
        for slave in (directory / "slaves").iterdir():
            with contextlib.suppress(OSError, ValueError):
                major, _, minor = (slave / "dev").read_text().strip().partition(":")
                _add_device(os.makedev(int(major), int(minor)), table, found, depth - 1)


def _filesystems_on(device: int) -> Iterator[NamespaceMount]:
    """One mount of each filesystem on a device and on what is stacked on it."""
    for above in sorted(_devices_above(device, _DEPTH)):
        name = _device_name(above)
        seen: set[int] = set()
        for mount in mounts_of_device(above, source=name):
            if mount.entry.device in seen or not _reachable(mount):
                continue
            seen.add(mount.entry.device)
            yield mount
        if not seen:
            # Mounted, but hidden below other mounts everywhere: let the caller's open fail.
            yield from mounts_of_device(above, source=name)[:1]


def _reachable(mount: NamespaceMount) -> bool:
    try:
        os.close(open_mount(mount))
    except OSError:
        return False
    return True


def _devices_above(device: int, depth: int) -> set[int]:
    found = {device}
    directory = _sysfs(device)
    if depth <= 0:
        return found
    with contextlib.suppress(OSError):
        partitions = [entry for entry in directory.iterdir() if (entry / "partition").exists()]
        for entry in [*(directory / "holders").iterdir(), *partitions]:
            major, _, minor = (entry / "dev").read_text().strip().partition(":")
            found |= _devices_above(os.makedev(int(major), int(minor)), depth - 1)
    return found


def _reach(found: list[NamespaceMount]) -> list[tuple[int, NamespaceMount]]:
    """Open every mount, or none."""
    targets: list[tuple[int, NamespaceMount]] = []
    try:
        for mount in found:
            targets.append((open_mount(mount), mount))  # noqa: PERF401 - closed if one fails
    except OSError:
        for fd, _mount in targets:
            os.close(fd)
        raise
    return targets


def _sysfs(device: int) -> Path:
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")


def _sequence(device: int) -> int:
    try:
        return int((_sysfs(device) / "diskseq").read_text())
    except (OSError, ValueError):
        return 0


def _device_name(device: int) -> str | None:
    with contextlib.suppress(OSError):
        for line in (_sysfs(device) / "uevent").read_text().splitlines():
            if line.startswith("DEVNAME="):
                return f"/dev/{line.removeprefix('DEVNAME=')}"
    return None


def _note_name(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"
