"""Locks that are waited for with a bound: one for the pool, one for each volume."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from thinpool import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from thinpool.model import VolumeId


class VolumeLocks:
    """At most one operation works on a volume at a time.

    Several are taken in the order of their ids, so that two operations cannot wait for each other.
    """

    def __init__(self) -> None:
        """Nothing is held."""
        self._changed = threading.Condition()
        self._held: dict[VolumeId, str] = {}

    @contextmanager
    def hold(self, *ids: VolumeId, operation: str, timeout: float) -> Iterator[None]:
        """Hold some volumes' locks.

        Args:
            ids: of the volumes.
            operation: what for; named to those who wait in vain.
            timeout: seconds to wait.

        Raises:
            TimeoutError_: others held one for so long.
        """
        deadline = time.monotonic() + timeout
        taken: list[VolumeId] = []
        try:
            for volume_id in sorted(set(ids)):
                self._take(volume_id, operation, deadline, timeout)
                taken.append(volume_id)
            yield
        finally:
            with self._changed:
                for volume_id in taken:
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

    @contextmanager
    def hold(self, *, timeout: float) -> Iterator[None]:
        """Hold it.

        Raises:
            TimeoutError_: others held it for so long.
        """
        if not self._lock.acquire(timeout=max(timeout, 0)):
            raise errors.TimeoutError_(
                f"{self._what} is busy with another operation: waited {timeout:g} s",
                holder=None,
                timeout=timeout,
            )
        try:
            yield
        finally:
            self._lock.release()
