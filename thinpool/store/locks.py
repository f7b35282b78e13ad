"""Locks that are waited for with a bound: one for the pool, one for each volume."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from thinpool import errors

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from thinpool.model import VolumeId


class VolumeLocks:
    """At most one operation works on a volume at a time.

    Several are taken in the order of their ids, so that two operations cannot wait for each other.
    """

    def __init__(self) -> None:
        """Nothing is held."""
        self._changed = threading.Condition()
        self._held: dict[VolumeId, str] = {}

    def hold(self, *ids: VolumeId, operation: str, timeout: float) -> _HeldVolumes:
        """Hold some volumes' locks, as a context.

        Args:
            ids: of the volumes.
            operation: what for; named to those who wait in vain.
            timeout: seconds to wait.

        Raises:
            TimeoutError_: others held one for so long.
        """
        return _HeldVolumes(self, ids, operation, timeout)

    def take(self, ids: Iterable[VolumeId], operation: str, timeout: float) -> None:
        """Take them all, or none."""
        deadline = time.monotonic() + timeout
        taken: list[VolumeId] = []
        try:
            for volume_id in sorted(ids):
                self._take(volume_id, operation, deadline, timeout)
                taken.append(volume_id)
        except BaseException:
            self.drop(taken)
            raise

    def drop(self, ids: Iterable[VolumeId]) -> None:
        """Undo take."""
        with self._changed:
            for volume_id in ids:
                del self._held[volume_id]
            self._changed.notify_all()

    def _take(self, volume_id: VolumeId, operation: str, deadline: float, timeout: float) -> None:
        with self._changed:
            while (holder := self._held.get(volume_id)) is not None:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise errors.TimeoutError_(
                        f"volume {volume_id} is busy with {holder}: waited {timeout:g} s",
                        holder=holder,
                        timeout=timeout,
                    )
            self._held[volume_id] = operation


class TimedLock:
    """A re-entrant lock that is waited for with a bound."""

    def __init__(self, what: str) -> None:
        """Free."""
        self._what = what
        self._lock = threading.RLock()

    def hold(self, *, timeout: float) -> _Held:
        """Hold it, as a context.

        Raises:
            TimeoutError_: others held it for so long.
        """
        return _Held(self, timeout)

    def take(self, timeout: float) -> None:
        """Take it; drop is to follow."""
        if not self._lock.acquire(timeout=max(timeout, 0)):
            raise errors.TimeoutError_(
                f"{self._what} is busy with another operation: waited {timeout:g} s",
                holder=None,
                timeout=timeout,
            )

    def drop(self) -> None:
        """Undo take."""
        self._lock.release()


# Every request comes by here: these are no generators.


class _HeldVolumes:
    """Some volumes' locks, held in the context."""

    __slots__ = ("_ids", "_locks", "_operation", "_timeout")

    def __init__(
        self, locks: VolumeLocks, ids: Iterable[VolumeId], operation: str, timeout: float
    ) -> None:
        self._locks = locks
        self._ids = set(ids)
        self._operation = operation
        self._timeout = timeout

    def __enter__(self) -> None:
        self._locks.take(self._ids, self._operation, self._timeout)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._locks.drop(self._ids)


class _Held:
    """A lock, held in the context."""

    __slots__ = ("_lock", "_timeout")

    def __init__(self, lock: TimedLock, timeout: float) -> None:
        self._lock = lock
        self._timeout = timeout

    def __enter__(self) -> None:
        self._lock.take(self._timeout)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.drop()
