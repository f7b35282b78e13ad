"""Changing volumes and the pool: names, labels, sizes, settings, removal."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from thinpool import errors
from thinpool.model import (
    PoolStatus,
    Removal,
    Volume,
)
from thinpool.names import parse_volume_name
from thinpool.store import care, poolfile, space
from thinpool.store.catalogue import (
    MISSING,
    Record,
)
from thinpool.store.core import ANYONE, Caller, PoolCore

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from thinpool.model import VolumeId

logger = logging.getLogger(__name__)

SETTABLE: Final[dict[str, tuple[type, ...]]] = {
    "when_full": (str,),
    "min_free": (int, float),
    "low_water": (int,),
    "autoextend_threshold": (int, float),
    "autoextend_percent": (int, float),
}


class Changing(PoolCore):
    """What changes and removes volumes, and changes the pool."""

    # ---- changing ---------------------------------------------------------------------------

    def rename(self, name: str, new: str, *, caller: Caller = ANYONE) -> Volume:
        """Give it another name; an active one's device path follows."""
        parse_volume_name(new)
        record = self._find(name) if self._done_before(caller) is None else self._find(new)
        with self._locks.hold(record.id, operation="rename", timeout=caller.timeout):
            with self._lock.hold(timeout=caller.timeout):
                if (done := self._done_before(caller)) is not None:
                    return self._repeat(done)
                record = self._find(name)
                if new == name:
                    return self._volume(record)
                self._refuse_taken(new)
                with self._catalogue.transaction():
                    record = self._catalogue.update(record, name=new)
                    if caller.request is not None:
                        self._catalogue.put_request(caller.request, "rename", [record.id])
                self._names_changed()
            if self._catalogue.activation(record.id) is not None:
                self._devices.renamed(name, record)
        return self._volume(record)

    def label(
        self, name: str, labels: Mapping[str, str | None], *, caller: Caller = ANYONE
    ) -> Volume:
        """Set labels; None drops one."""
        with self._lock.hold(timeout=caller.timeout):
            record = self._find(name)
            merged: dict[str, str | None] = {**record.labels, **labels}
            kept = {key: value for key, value in merged.items() if value is not None}
            record = self._catalogue.update(record, labels=kept)
            self._names_changed()
        return self._volume(record)

    def resize(
        self,
        name: str,
        size: int,
        *,
        device_only: bool = False,
        lease: str | None = None,
        caller: Caller = ANYONE,
    ) -> Volume:
        """Set the size of the device. What lies past a smaller size is gone.

        Raises:
            UsageError: smaller, though it carries a filesystem.
            BusyError: smaller, though it is active or open.
            ReadOnlyError: it is sealed.
        """
        self._check_size(size)
        record = self._present(name, lease=lease)
        with self._locks.hold(record.id, operation="resize", timeout=caller.timeout):
            record = self._present(name, lease=lease)
            if record.size == size:
                return self._volume(record)
            if record.read_only or self._config.read_only:
                raise errors.ReadOnlyError(f"{name} is read-only", name=name)
            if size < record.size:
                self._shrink(record, size, device_only=device_only)
            self._resize_open(record, size)
            record = self._catalogue.update(record, size=size)
            self._devices.resized(record)
            self._names_changed()
        return self._volume(record)

    def _resize_open(self, record: Record, size: int) -> None:
        if self._devices.resize(record, size):
            return
        handle = self._volumes.find(record.id)
        if handle is not None:
            handle.resize(size)

    def _shrink(self, record: Record, size: int, *, device_only: bool) -> None:
        if record.filesystem is not None and not device_only:
            raise errors.UsageError(
                f"{record.name} carries {record.filesystem}, which is not made smaller: "
                f"{size} bytes were asked for, it has {record.size}",
                what="size",
                value=size,
                smallest=record.size,
            )
        self._refuse_in_use(record)
        # Unmapped first: growing it again must not show what was there.
        with self._volumes.using(record, writer="resize") as volume:
            volume.zero(size, record.size - size)
            volume.flush()

    def configure(self, values: Mapping[str, Any], *, caller: Caller = ANYONE) -> PoolStatus:
        """Change settings.

        Args:
            values: fields of PoolConfig, of those that can be set.
            caller: who asks.

        Raises:
            UsageError: another field, or a value of another type.
        """
        for key, value in values.items():
            kinds = SETTABLE.get(key)
            if kinds is None or not isinstance(value, kinds) or isinstance(value, bool):
                raise errors.UsageError(
                    f"{key} cannot be set to {value!r}", what="setting", value=key
                )
        return self._configure(values, caller=caller)

    def _configure(self, values: Mapping[str, Any], *, caller: Caller = ANYONE) -> PoolStatus:
        with self._lock.hold(timeout=caller.timeout):
            config = self._config.changed(**values)
            poolfile.write_config(self._root, config)
            self._config = config
            self._pool.set_when_full(
                error=config.when_full == "error", timeout_ms=config.no_space_timeout_ms
            )
            self._apply_low_water()
        self._wake.set()
        return self.status()

    def extend(
        self,
        *,
        data_size: int | None,
        metadata_size: int | None,
        caller: Caller = ANYONE,
    ) -> PoolStatus:
        """Grow the pool."""
        if self._config.read_only:
            raise errors.ReadOnlyError(
                f"pool {self._config.name} is attached read-only", pool=self._config.name
            )
        with self._lock.hold(timeout=caller.timeout):
            space.extend(
                self._config,
                self._pool,
                data=self._data,
                metadata=self._metadata,
                data_size=data_size,
                metadata_size=metadata_size,
            )
            self._apply_low_water()
        return self.status()

    # ---- removing ---------------------------------------------------------------------------

    def remove(
        self,
        names: Sequence[str],
        *,
        deactivate: bool = False,
        deferred: bool = False,
        dry_run: bool = False,
        caller: Caller = ANYONE,
    ) -> Removal:
        """Remove volumes, all or none.

        Args:
            names: of the volumes.
            deactivate: also active ones that nobody uses.
            deferred: also those whose device is in use: the names go now, each device and its
                space when its last user lets go of it.
            dry_run: only say what it would free.
            caller: who asks.
        """
        if self._done_before(caller) is not None:
            return Removal(removed=(), freed=0, dry_run=False)
        records = [self._find(name) for name in dict.fromkeys(names)]
        if dry_run:
            freed = care.freed(self, [record.id for record in records if record.state != MISSING])
            return Removal(
                removed=tuple(self._volume(record) for record in records),
                freed=freed,
                dry_run=True,
            )
        ids = [record.id for record in records]
        with self._locks.hold(*ids, operation="remove", timeout=caller.timeout):
            records = [self._find(name) for name in dict.fromkeys(names)]
            for record in records:
                self._refuse_in_use(record, but_device=deactivate or deferred)
            volumes = tuple(self._volume(record) for record in records)
            leaving: set[VolumeId] = set()
            if deactivate or deferred:
                for record in records:
                    if not self._deactivate(record, deferred=deferred):
                        leaving.add(record.id)
            with self._lock.hold(timeout=caller.timeout):
                if leaving:
                    return self._remove_later(records, volumes, caller=caller)
                before = self._pool.status().data_blocks_used
                self._delete_now(records, request=caller.request)
                after = self._pool.status().data_blocks_used
        freed = max(before - after, 0) * self._config.block_size
        return Removal(removed=volumes, freed=freed, dry_run=False)

    def _remove_later(
        self, records: Sequence[Record], volumes: tuple[Volume, ...], *, caller: Caller
    ) -> Removal:
        """The names go; the background deletes each volume when its device is gone."""
        gone = [record for record in records if record.state == MISSING]
        there = [record for record in records if record.state != MISSING]
        for record in there:
            self._devices.unlink(record)
        self._decide_removal(gone, there, request=caller.request)
        return Removal(removed=volumes, freed=0, dry_run=False)
