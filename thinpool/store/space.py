"""A pool's space: its status for people, the guard before anything new, growth by itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.engine import METADATA_BLOCK, PoolMode
from thinpool.model import DataSpace, MetadataSpace, PoolStatus

if TYPE_CHECKING:
    from thinpool import engine
    from thinpool.engine import BlockDevice, PoolBackend
    from thinpool.store.poolfile import PoolConfig

_MODES: Final = {
    PoolMode.RW: "rw",
    PoolMode.OUT_OF_DATA_SPACE: "out_of_data_space",
    PoolMode.RO: "ro",
    PoolMode.FAIL: "fail",
}
_PERCENT: Final = 100
_NEARLY_FULL: Final = 90.0
_METADATA_MAX: Final = 255 * 16320 * METADATA_BLOCK  # what the metadata space map can count
_HOST_RESERVE: Final = 64 << 20


def host_free(path: str) -> int | None:
    """Free bytes of the filesystem that holds a file; None for a device, or where it is gone."""
    try:
        if not Path(path).is_file():
            return None
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def allocated(path: str) -> int:
    """Bytes of the host's disk that a file takes."""
    return os.stat(path).st_blocks * 512  # noqa: PTH116 - the path is a string here


def describe(
    config: PoolConfig,
    status: engine.PoolStatus,
    *,
    volumes: int,
    active: int,
    server_pid: int | None,
) -> PoolStatus:
    """A pool's status for people and programs."""
    block = status.data_block_size
    total = status.data_blocks_total * block
    used = status.data_blocks_used * block
    free_on_host = host_free(config.data)
    metadata_total = status.metadata_blocks_total * METADATA_BLOCK
    metadata_used = status.metadata_blocks_used * METADATA_BLOCK
    return PoolStatus(
        pool=config.name,
        uuid=config.uuid,
        engine=config.engine,
        mode=_MODES[status.mode],
        needs_check=status.needs_check,
        transaction_id=status.transaction_id,
        block_size=block,
        data=DataSpace(
            path=config.data,
            used=used,
            total=total,
            low_water=config.low_water_bytes(total),
            host_free=free_on_host,
        ),
        metadata=MetadataSpace(path=config.metadata, used=metadata_used, total=metadata_total),
        when_full=config.when_full,
        volumes=volumes,
        active=active,
        min_free=config.min_free,
        autoextend_threshold=config.autoextend_threshold,
        autoextend_percent=config.autoextend_percent,
        zero=config.zero,
        read_only=config.read_only,
        server_pid=server_pid,
        warnings=_warnings(config, status, total=total, used=used, free_on_host=free_on_host),
    )


def _warnings(
    config: PoolConfig,
    status: engine.PoolStatus,
    *,
    total: int,
    used: int,
    free_on_host: int | None,
) -> tuple[str, ...]:
    found = [
        f"{path} is gone: bring it back"
        for path in (config.data, config.metadata)
        if not Path(path).exists()
    ]
    if status.needs_check:
        found.append(f"a change could not be made durable: run 'thinpool check {config.name}'")
    if status.mode is PoolMode.OUT_OF_DATA_SPACE:
        if free_on_host is not None and used < total:
            found.append(
                f"the host's disk is full: free some of the filesystem that holds {config.data}"
            )
        else:
            found.append(
                f"data space is full: 'thinpool extend-pool {config.name} --data-size SIZE', "
                "or remove something"
            )
    elif total - used < config.low_water_bytes(total):
        found.append(f"less than the low-water mark of data is left: {total - used} bytes")
    metadata = status.metadata_blocks_used * _PERCENT / max(status.metadata_blocks_total, 1)
    if metadata >= _NEARLY_FULL:
        found.append(
            f"metadata is {metadata:.0f} % full: "
            f"'thinpool extend-pool {config.name} --metadata-size SIZE'"
        )
    if free_on_host is not None:
        missing = total - allocated(config.data) - free_on_host
        if missing > 0:
            found.append(
                f"the host's disk cannot hold this pool full: it lacks {missing} bytes of the "
                f"{total} that {config.data} may grow to"
            )
    return tuple(found)


def guard(config: PoolConfig, status: engine.PoolStatus) -> None:
    """See that there is room for something new.

    Raises:
        DataSpaceError, MetadataSpaceError: less than min-free is left.
        NeedsCheckError, ReadOnlyError: the pool takes no changes.
    """
    if status.needs_check:
        raise errors.NeedsCheckError(
            f"pool {config.name} is read-only until it was checked: "
            f"run 'thinpool check {config.name}'",
            pool=config.name,
        )
    if config.read_only or status.mode in {PoolMode.RO, PoolMode.FAIL}:
        raise errors.ReadOnlyError(f"pool {config.name} is read-only", pool=config.name)
    for what, kind, used, total, unit, option in (
        (
            "data",
            errors.DataSpaceError,
            status.data_blocks_used,
            status.data_blocks_total,
            status.data_block_size,
            "--data-size",
        ),
        (
            "metadata",
            errors.MetadataSpaceError,
            status.metadata_blocks_used,
            status.metadata_blocks_total,
            METADATA_BLOCK,
            "--metadata-size",
        ),
    ):
        free = _PERCENT * (total - used) / total if total else 0.0
        if free < config.min_free or used >= total:
            raise kind(
                f"pool {config.name} has {free:.1f} % of its {what} free and keeps "
                f"{config.min_free:g} %: remove something, or 'thinpool extend-pool "
                f"{config.name} {option} SIZE'",
                pool=config.name,
                used=used * unit,
                total=total * unit,
                min_free=config.min_free,
            )


def extend(
    config: PoolConfig,
    pool: PoolBackend,
    *,
    data: BlockDevice,
    metadata: BlockDevice,
    data_size: int | None,
    metadata_size: int | None,
) -> None:
    """Grow a pool to sizes in bytes; with neither, to what its devices have by now.

    Raises:
        UsageError: smaller than it is, or a device that is not so large.
        HostSpaceError: the host's disk cannot take it.
    """
    status = pool.status()
    block = status.data_block_size
    for device in (data, metadata):
        device.resize(0)  # to what it has by now
    if data_size is None and metadata_size is None:
        data_size = data.size // block * block
        metadata_size = metadata.size // METADATA_BLOCK * METADATA_BLOCK
    if data_size is not None:
        if data_size % block:
            raise errors.UsageError(
                f"{data_size} bytes of data are no multiple of the block size {block}",
                what="data size",
                value=data_size,
            )
        _refuse_shrink("data", data_size, status.data_blocks_total * block)
        _grow_device(data, config.data, data_size)
        if data_size // block > status.data_blocks_total:
            pool.resize_data(data_size // block)
    if metadata_size is not None:
        if metadata_size % METADATA_BLOCK or metadata_size > _METADATA_MAX:
            raise errors.UsageError(
                f"{metadata_size} bytes of metadata are no multiple of {METADATA_BLOCK}, "
                f"or more than {_METADATA_MAX}",
                what="metadata size",
                value=metadata_size,
            )
        _refuse_shrink("metadata", metadata_size, status.metadata_blocks_total * METADATA_BLOCK)
        _grow_device(metadata, config.metadata, metadata_size, allocated=True)
        pool.resize_metadata()


def _refuse_shrink(what: str, wanted: int, present: int) -> None:
    if wanted < present:
        raise errors.UsageError(
            f"a pool cannot shrink: its {what} has {present} bytes, {wanted} were asked for",
            what=f"{what} size",
            value=wanted,
            present=present,
        )


def _grow_device(device: BlockDevice, path: str, size: int, *, allocated: bool = False) -> None:
    """Of metadata the host's space is taken at once: see _make_file in thinpool.api.pools."""
    if device.size >= size:
        return
    if not Path(path).is_file():
        raise errors.UsageError(
            f"{path} has {device.size} bytes, {size} were asked for: grow the device first",
            what="size",
            value=size,
            path=path,
        )
    before = device.size
    device.resize(size)
    if allocated:
        with Path(path).open("rb+") as file:
            try:
                os.posix_fallocate(file.fileno(), before, size - before)
            except OSError as cause:
                raise errors.HostSpaceError(
                    f"{path} cannot have {size} bytes: {cause.strerror}", path=path
                ) from cause


def autoextend(
    config: PoolConfig, pool: PoolBackend, *, data: BlockDevice, metadata: BlockDevice
) -> tuple[int | None, int | None]:
    """Grow a pool that is fuller than its threshold; what it grew to, in bytes.

    A file grows as far as the host's disk has room. A device is not made larger here, but what it
    has more than the pool uses is taken.
    """
    threshold = config.autoextend_threshold
    if threshold <= 0 or config.read_only:
        return None, None
    status = pool.status()
    if status.mode not in {PoolMode.RW, PoolMode.OUT_OF_DATA_SPACE}:
        return None, None
    grown_data = _step(
        config,
        data,
        config.data,
        used=status.data_blocks_used,
        total=status.data_blocks_total,
        unit=status.data_block_size,
    )
    grown_metadata = _step(
        config,
        metadata,
        config.metadata,
        used=status.metadata_blocks_used,
        total=status.metadata_blocks_total,
        unit=METADATA_BLOCK,
    )
    if grown_metadata is not None:
        grown_metadata = min(grown_metadata, _METADATA_MAX)
        if grown_metadata <= status.metadata_blocks_total * METADATA_BLOCK:
            grown_metadata = None
    if grown_data is not None or grown_metadata is not None:
        extend(
            config,
            pool,
            data=data,
            metadata=metadata,
            data_size=grown_data,
            metadata_size=grown_metadata,
        )
    return grown_data, grown_metadata


def _step(
    config: PoolConfig, device: BlockDevice, path: str, *, used: int, total: int, unit: int
) -> int | None:
    """The next size in bytes, if it is time and there is room below."""
    if _PERCENT * used < config.autoextend_threshold * total:
        return None
    more = max(1, int(total * config.autoextend_percent / _PERCENT)) * unit
    free = host_free(path)
    if free is None:
        device.resize(0)  # to what it has by now
        most = device.size // unit * unit
        return min(total * unit + more, most) if most > total * unit else None
    if free < more + _HOST_RESERVE:
        return None
    return total * unit + more
