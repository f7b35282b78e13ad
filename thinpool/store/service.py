"""Everything that can be done with an open pool, once: the one owner of its catalogue and engine.

Its callers translate (HTTP, tests); it decides. This module starts and ends it, and does what
nobody asks for: expires leases, returns space to the host, grows the pool, copies the names.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from thinpool import errors
from thinpool.host.failures import failure
from thinpool.model import (
    Finding,
    PoolStatus,
)
from thinpool.store import poolfile, space
from thinpool.store.catalogue import (
    BUILDING,
    DELETING,
    MISSING,
)
from thinpool.store.changing import Changing
from thinpool.store.core import DEFAULT_TIMEOUT_S, LEAVING
from thinpool.store.leases import LEASE_GRACE_S
from thinpool.store.making import Making
from thinpool.store.namescopy import NamesCopy, copy_path, find_copy, read_copy
from thinpool.store.reconcile import FINDINGS, reconcile
from thinpool.store.using import Using

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from thinpool.model import VolumeId
    from thinpool.store.catalogue import Record

logger = logging.getLogger(__name__)

_REST_S: Final = 1.0
_BURST_S: Final = 0.25


class PoolService(Making, Changing, Using):
    """The operations of one open pool. Thread-safe."""

    # ---- start and end ----------------------------------------------------------------------

    def start(self) -> None:
        """Mend what was left; what was active is served again already."""
        self._devices.sweep()
        self.findings = reconcile(self._catalogue, self._pool, known=self._names_copied)
        for finding in self.findings:
            logger.warning("reconciled %s: %s", finding.subject, finding.message)
        self._drop_stale_metadata_snapshot()
        for name in self._devices.restore():
            logger.warning("%s is not active any more", name)
        now = time.monotonic()
        with self._lease_lock:
            for record in self._catalogue.records(BUILDING):
                self._leases[record.lease or ""] = now + LEASE_GRACE_S
        self._copy = NamesCopy(copy_path(self._config, self._directory), self._catalogue)
        self._background = threading.Thread(target=self._work, name="store", daemon=True)
        self._background.start()
        self._names_changed()
        self._pool.on_event(self._event)

    def _names_copied(self) -> Mapping[VolumeId, Record]:
        """What the copy of the names says, if it is this pool's."""
        known = read_copy(find_copy(self._config, self._directory))
        return known[1] if known is not None and self._is_ours(known[0]) else {}

    def _is_ours(self, document: Mapping[str, Any]) -> bool:
        """A copy of names belongs to this pool, or to one that was attached under another uuid."""
        return bool(document.get("uuid") == self._config.uuid or self._catalogue.is_new)

    def close(self) -> None:
        """End the background work and close the catalogue. The pool stays the caller's."""
        self._stop.set()
        self._wake.set()
        if self._background is not None:
            self._background.join()
            self._safely("the copy of the names", lambda: self._write_copy(whole=True))
        if not self._catalogue.activations():
            self._devices.forget()
        self._volumes.close()
        self._catalogue.close()

    # ---- the background ---------------------------------------------------------------------

    def _work(self) -> None:
        """Sleeps until something was changed; looks around meanwhile where something is unfinished.

        Host space under freed blocks is returned by the engine itself.
        """
        unfinished = True
        while not self._stop.is_set():
            self._wake.wait(_REST_S if unfinished else None)
            self._wake.clear()
            if self._copy_due.is_set():
                if self._stop.wait(_BURST_S):  # changes come in bursts: one copy for all
                    break
                self._copy_due.clear()
                self._safely("the copy of the names", self._write_copy)
            self._safely("unfinished work of ended clients", self._expire_leases)
            self._safely("growing the pool", self._autoextend)
            self._safely("devices that were to go", self._finish_leaving)
            self._safely("unfinished removals", self._finish_removals)
            unfinished = self._is_unfinished()

    def _is_unfinished(self) -> bool:
        """Something is to be done that nobody will ask for."""
        if self._config.autoextend_threshold > 0 or self._copy_due.is_set():
            return True
        with self._lease_lock:
            held = set(self._leases)
            if any(until != float("inf") for until in self._leases.values()):
                return True
        if self._catalogue.count(DELETING):
            return True
        if any(each.settings.get(LEAVING) for each in self._catalogue.activations()):
            return True
        return any(record.lease not in held for record in self._catalogue.records(BUILDING))

    def _safely(self, what: str, step: Callable[[], None]) -> None:
        """The background goes on whatever one step meets; the next round tries again."""
        try:
            step()
        except errors.ThinpoolError as error:
            if self._said.get(what) != error.message:  # once, however often it is tried
                logger.warning("%s: %s", what, error.message)
                self._said[what] = error.message
        except Exception:
            logger.exception("%s", what)
        else:
            self._said.pop(what, None)

    def _write_copy(self, *, whole: bool = False) -> None:
        try:
            self._copy.write(self._config, whole=whole)
        except OSError as cause:
            self._copy_due.set()  # the next round tries again
            raise failure(cause, "the copy of the names could not be written") from cause

    def _event(self) -> None:
        """The pool's mode or its low water changed: what is to be done is done now."""
        if self._stop.is_set():
            return
        status = self._pool.status()
        free = (status.data_blocks_total - status.data_blocks_used) * status.data_block_size
        logger.info("the pool is %s, %s bytes of data are free", status.mode.name, free)
        self._safely("growing the pool", self._autoextend)

    def _autoextend(self) -> None:
        with self._lock.hold(timeout=DEFAULT_TIMEOUT_S):
            data, metadata = space.autoextend(
                self._config, self._pool, data=self._data, metadata=self._metadata
            )
        if data is not None or metadata is not None:
            logger.info("grew the pool: data %s, metadata %s", data, metadata)
            self._apply_low_water()

    def _finish_leaving(self) -> None:
        """Record the end of devices whose last user let go of them."""
        for found in self._catalogue.activations():
            if not found.settings.get(LEAVING):
                continue
            with self._locks.hold(found.id, operation="deactivate", timeout=DEFAULT_TIMEOUT_S):
                activation = self._catalogue.activation(found.id)
                record = self._catalogue.by_id(found.id)
                if activation is None or record is None or not activation.settings.get(LEAVING):
                    continue  # it is gone, or wanted again
                self._devices.detach(record, deferred=True)

    def _finish_removals(self) -> None:
        for found in self._catalogue.records(DELETING):
            with self._lock.hold(timeout=DEFAULT_TIMEOUT_S):
                record = self._catalogue.by_id(found.id)
                if record is None or record.state != DELETING:
                    continue  # somebody else was faster
                active = self._catalogue.activation(record.id) is not None
                if not active and self._volumes.users(record.id) == 0:
                    self._delete_now([record], request=None)

    # ---- care -------------------------------------------------------------------------------

    def doctor(self) -> list[Finding]:
        """What was mended at the start, and what is wrong with names now."""
        recorded = json.loads(self._catalogue.get(FINDINGS) or "[]")
        found = [Finding.from_json(each) for each in recorded if each["state"] == "wrong"]
        found = [each for each in found if each.subject in {"transaction id", "intent"}]
        found.extend(each for each in self.findings if each.state == "note")
        pool = self._config.name
        found.extend(
            Finding(
                subject=record.name,
                state="wrong",
                message=f"the pool has no device {record.id} any more",
                remedy=f"thinpool remove {pool}/{record.name}",
            )
            for record in self._catalogue.records(MISSING)
        )
        status = self.status()
        found.extend(
            Finding(subject=pool, state="wrong", message=warning) for warning in status.warnings
        )
        return [
            replace(each, remedy=each.remedy and each.remedy.replace("POOL/", f"{pool}/"))
            for each in found
        ]

    def acknowledge(self) -> None:
        """Forget what was found at earlier starts."""
        self._catalogue.put(FINDINGS, "[]")

    def finish_creation(self) -> PoolStatus:
        """The pool is whole: what was made with it is sealed."""
        return self._configure({"state": poolfile.READY})
