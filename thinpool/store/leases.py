"""Leases: what is built under one goes with it, unless it was published."""

from __future__ import annotations

import logging
import time
from typing import Final

from thinpool import errors
from thinpool.store.catalogue import (
    BUILDING,
    Record,
)
from thinpool.store.core import DEFAULT_TIMEOUT_S, PoolCore

logger = logging.getLogger(__name__)

LEASE_GRACE_S: Final = 20.0
"""For clients to find the successor of a server that died."""
BROKEN_LEASE_GRACE_S: Final = 2.0
"""For a client whose connection ended though this server lives: it is hardly coming back."""


class Leases(PoolCore):
    """The leases of one pool's clients. Thread-safe."""

    def open_lease(self, lease: str) -> None:
        """What is built under this lease lives while it is open."""
        with self._lease_lock:
            self._leases[lease] = float("inf")

    def suspend_lease(self, lease: str) -> None:
        """The connection broke: the client has a while to come back."""
        with self._lease_lock:
            if lease in self._leases:
                self._leases[lease] = time.monotonic() + BROKEN_LEASE_GRACE_S
        self._wake.set()

    def close_lease(self, lease: str) -> None:
        """Remove what is still unfinished under it."""
        with self._lease_lock:
            self._leases.pop(lease, None)
        self._clean_lease(lease)
        self._wake.set()  # for what was in use

    def _expire_leases(self) -> None:
        now = time.monotonic()
        with self._lease_lock:
            over = [lease for lease, until in self._leases.items() if until < now]
        for lease in over:
            logger.info("lease %s ended without its client: cleaning up", lease)
            self._clean_lease(lease)
            with self._lease_lock:
                self._leases.pop(lease, None)
        with self._lease_lock:
            held = set(self._leases)
        for record in self._catalogue.records(BUILDING):
            if record.lease not in held:
                self._try_to_clean(record)  # it was in use when its lease ended

    def _clean_lease(self, lease: str) -> None:
        for record in self._catalogue.by_lease(lease):
            self._try_to_clean(record)

    def _try_to_clean(self, record: Record) -> None:
        try:
            self._clean(record)
        except errors.BusyError as error:
            logger.info("%s; it is removed when it is not", error.message)

    def _clean(self, found: Record) -> None:
        """Remove what was being built, unless it was published meanwhile."""
        with self._locks.hold(found.id, operation="clean-up", timeout=DEFAULT_TIMEOUT_S):
            record = self._catalogue.by_id(found.id)
            if record is None or record.state != BUILDING:
                return
            self._refuse_in_use(record, but_device=True)
            self._deactivate(record)
            with self._lock.hold(timeout=DEFAULT_TIMEOUT_S):
                record = self._catalogue.by_id(found.id)
                if record is not None and record.state == BUILDING:
                    self._delete_now([record], request=None)

    def _check_lease(self, lease: str | None) -> None:
        if lease is None:
            return
        with self._lease_lock:
            if lease not in self._leases:
                raise errors.NotFoundError(
                    "the lease ended: what was built under it is gone", lease=lease
                )
