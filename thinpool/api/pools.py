"""Making, adopting, forgetting and removing pools.

A pool in the making has its own lock file, held by its maker; pool.json says ``creating`` until its
base is sealed. What a maker that died has left is removed by whoever finds it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from thinpool import errors
from thinpool.api.session import CREATION_LOCK, Session, empty, remove_directory
from thinpool.api.workbench import Finished, Workbench
from thinpool.host.signatures import refuse_foreign
from thinpool.model import DataSpace, MetadataSpace, PoolStatus, Progress, format_time
from thinpool.names import parse_pool_name
from thinpool.server.client import PoolClient, locked
from thinpool.server.protocol import error_to_json
from thinpool.store import namescopy, poolfile
from thinpool.store.poolfile import PoolConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
SECTOR: Final = 512
METADATA_BLOCK: Final = 4096
BLOCK_SIZE_LEAST: Final = 64 * KIB
BLOCK_SIZE_MOST: Final = GIB
METADATA_LEAST: Final = 2 * MIB
METADATA_MOST: Final = 255 * 16320 * METADATA_BLOCK  # what a metadata space map can count
METADATA_DEFAULT_LEAST: Final = 32 * MIB
METADATA_PER_BLOCK: Final = 128
"""Bytes of metadata for each data block: a mapping takes 16 to 32, the rest is for snapshots."""
DATA_BLOCKS_MOST: Final = 1 << 32
PERCENT: Final = 100


_WRITTEN_AT_ONCE: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    """What create_pool was asked for."""

    name: str
    size: int | None
    metadata_size: int | None
    data: Path | None
    metadata: Path | None
    block_size: int
    engine: str
    base_size: int
    base_fs: str
    mkfs_options: Sequence[str]
    zero: bool
    when_full: str
    min_free: float
    force: bool
    progress: Callable[[Progress], None] | None

    def check(self) -> None:
        """See that it can be; nothing of the host is looked at yet."""
        parse_pool_name(self.name)
        choose_engine(self.engine)
        if self.block_size % BLOCK_SIZE_LEAST or not (
            BLOCK_SIZE_LEAST <= self.block_size <= BLOCK_SIZE_MOST
        ):
            raise errors.UsageError(
                f"a data block has 64 KiB to 1 GiB in steps of 64 KiB, not {self.block_size} bytes",
                what="block size",
                value=self.block_size,
                smallest=BLOCK_SIZE_LEAST,
                largest=BLOCK_SIZE_MOST,
            )
        if (self.data is None) != (self.metadata is None):
            raise errors.UsageError(
                "--data and --metadata are given both or neither", what="metadata"
            )
        if self.when_full not in {"queue", "error"}:
            raise errors.UsageError(
                f"when-full is queue or error, not {self.when_full}",
                what="when-full",
                value=self.when_full,
            )
        if not 0 <= self.min_free < PERCENT:
            raise errors.UsageError(
                f"min-free is a percent from 0 to below 100, not {self.min_free:g}",
                what="min-free",
                value=self.min_free,
            )
        if self.base_size < 0 or self.base_size % SECTOR:
            raise errors.UsageError(
                f"the base cannot have {self.base_size} bytes: a multiple of {SECTOR}",
                what="base size",
                value=self.base_size,
            )
        if self.base_fs not in {"ext4", "xfs"}:
            raise errors.UsageError(
                f"the base's filesystem is ext4 or xfs, not {self.base_fs}",
                what="base filesystem",
                value=self.base_fs,
            )


def choose_engine(engine: str) -> str:
    """What ``auto`` stands for: dm where the kernel has it and this user may use it, else user.

    It is decided once, and recorded with the pool.

    Raises:
        UnsupportedHostError, NotPermittedError: dm was asked for, and this host lacks it, or this
            user may not.
        UsageError: no engine.
    """
    if engine == "user":
        return "user"
    if engine not in {"auto", "dm"}:
        raise errors.UsageError(
            f"the engine is auto, user or dm, not {engine}", what="engine", value=engine
        )
    try:
        _require_kernel()
    except (errors.UnsupportedHostError, errors.NotPermittedError):
        if engine == "dm":
            raise
        return "user"
    return "dm"


def _require_kernel() -> None:
    """See that the kernel has thin pools, and that this user may use them.

    Raises:
        UnsupportedHostError, NotPermittedError: not so.
    """
    from thinpool.dm.base import require_targets  # noqa: PLC0415 - where it is asked for alone
    from thinpool.dm.client import DeviceMapper  # noqa: PLC0415 - likewise

    with DeviceMapper() as mapper:
        require_targets(mapper)


# ---- create -----------------------------------------------------------------------------------


def create_pool(session: Session, plan: PoolPlan) -> PoolStatus:
    """Make a pool and its base."""
    plan.check()
    directory = poolfile.pool_directory(session.root, plan.name)
    _refuse_existing(session, plan.name)
    for path in (plan.data, plan.metadata):
        if path is not None:
            _refuse_owned(session, path)
            refuse_foreign(path, force=plan.force)
    sizes = _sizes(plan)
    with (
        _new_directory(session, plan.name) as (building, lock),
        contextlib.ExitStack() as undo,
    ):
        config = _make_files(plan, building, directory, sizes, undo)
        _write_config_in(building, config)
        _move_in_place(session, plan.name, building, directory)
        undo.callback(_take_back, session, plan, directory, config)
        status = _finish(session, plan)
        undo.pop_all()
        lock.close()
    return status


def _take_back(session: Session, plan: PoolPlan, directory: Path, config: PoolConfig) -> None:
    with contextlib.suppress(errors.ThinpoolError):
        _client_of_unfinished(session, plan.name).stop_server()
    # What was empty is so again; what was to be overwritten by force is spared as far as can be.
    remove_directory(directory, config, keep_data=plan.force)
    session.forget(plan.name)


def _refuse_existing(session: Session, name: str) -> None:
    try:
        config = poolfile.read_config(session.root, name)
    except errors.NotFoundError:
        return
    if config.state != poolfile.READY:
        with contextlib.suppress(errors.NotFoundError):
            session.drop_unfinished(name)
        return
    raise errors.AlreadyExistsError(
        f"there is a pool {name} under {session.root} already",
        existing=status_or_failure(session, name).to_json(),
    )


def _refuse_owned(session: Session, path: Path) -> None:
    """A file or device belongs to one pool under this root."""
    wanted = os.path.realpath(path)
    for name in poolfile.list_pools(session.root):
        try:
            config = poolfile.read_config(session.root, name)
        except errors.ThinpoolError:
            continue
        if wanted in {os.path.realpath(config.data), os.path.realpath(config.metadata)}:
            raise errors.AlreadyExistsError(
                f"{path} belongs to pool {name} already",
                existing=status_or_failure(session, name).to_json(),
            )


def _sizes(plan: PoolPlan) -> tuple[int, int]:
    """Bytes of data and metadata."""
    size = plan.size if plan.size is not None else _present_size(plan.data)
    if size is None and plan.data is not None and not plan.data.exists():
        raise errors.NotFoundError(
            f"{plan.data} does not exist: give --size, and it is made", path=str(plan.data)
        )
    if size is None:
        raise errors.UsageError(
            "how large shall the pool be? Give --size, or --data with a device or a file that "
            "has a size",
            what="size",
        )
    if plan.size is not None and plan.size % plan.block_size:
        raise errors.UsageError(
            f"{size} bytes are no multiple of the block size {plan.block_size}",
            what="size",
            value=size,
            block_size=plan.block_size,
        )
    size -= size % plan.block_size
    if not 0 < size // plan.block_size <= DATA_BLOCKS_MOST:
        raise errors.UsageError(
            f"a pool of blocks of {plan.block_size} bytes has {plan.block_size} to "
            f"{DATA_BLOCKS_MOST * plan.block_size} bytes, not {size}",
            what="size",
            value=size,
        )
    present = _present_size(plan.data)
    if plan.size is not None and present is not None and _is_device(plan.data) and size > present:
        raise errors.UsageError(
            f"{plan.data} has {present} bytes, {size} were asked for", what="size", value=size
        )
    return size, _metadata_size(plan, size)


def _metadata_size(plan: PoolPlan, size: int) -> int:
    wanted = plan.metadata_size
    if wanted is None:
        wanted = _present_size(plan.metadata)
        if wanted is not None:
            return min(wanted - wanted % METADATA_BLOCK, METADATA_MOST)
        estimate = size // plan.block_size * METADATA_PER_BLOCK
        estimate = -(-estimate // MIB) * MIB
        return min(max(estimate, METADATA_DEFAULT_LEAST), METADATA_MOST)
    if wanted % METADATA_BLOCK or not METADATA_LEAST <= wanted <= METADATA_MOST:
        raise errors.UsageError(
            f"metadata has {METADATA_LEAST} to {METADATA_MOST} bytes in steps of "
            f"{METADATA_BLOCK}, not {wanted}",
            what="metadata size",
            value=wanted,
            smallest=METADATA_LEAST,
            largest=METADATA_MOST,
        )
    return wanted


def _present_size(path: Path | None) -> int | None:
    """Bytes of a device, or of a file that has any."""
    if path is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except PermissionError as cause:
        raise errors.NotPermittedError(
            f"this user may not open {path}", operation="open", path=str(path)
        ) from cause
    try:
        return os.lseek(descriptor, 0, os.SEEK_END) or None
    finally:
        os.close(descriptor)


def stable_path(path: Path) -> str:
    """A file's real path; a device's as it was given: its link stays, its number may change."""
    return os.path.abspath(path) if _is_device(path) else str(path.resolve())  # noqa: PTH100


def _is_device(path: Path | None) -> bool:
    return path is not None and path.exists() and stat.S_ISBLK(path.stat().st_mode)


@contextlib.contextmanager
def _new_directory(session: Session, name: str) -> Iterator[tuple[Path, contextlib.ExitStack]]:
    """A directory beside the pools that becomes one by a rename, with its creation lock held."""
    parent = poolfile.pools_directory(session.root)
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except PermissionError as cause:
        raise errors.NotPermittedError(
            f"this user may not make {parent}", operation="mkdir", path=str(parent)
        ) from cause
    _sweep(parent)
    building = parent / f".creating.{name}.{secrets.token_hex(4)}"
    building.mkdir(mode=poolfile.DIRECTORY_MODE)
    lock = contextlib.ExitStack()
    try:
        lock.enter_context(locked(building / CREATION_LOCK, timeout=0, what="creation"))
        yield building, lock
    finally:
        lock.close()
        shutil.rmtree(building, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove directories whose makers died before the rename."""
    for entry in parent.glob(".creating.*"):
        try:
            with locked(entry / CREATION_LOCK, timeout=0, what="creation"):
                shutil.rmtree(entry, ignore_errors=True)
        except (errors.TimeoutError_, OSError):
            continue  # being made, or gone meanwhile


def _make_files(
    plan: PoolPlan,
    building: Path,
    directory: Path,
    sizes: tuple[int, int],
    undo: contextlib.ExitStack,
) -> PoolConfig:
    """The data and the metadata, formatted."""
    from thinpool.engine import BlockDevice, format_pool  # noqa: PLC0415 - the C core, only here

    data_size, metadata_size = sizes
    owns = plan.data is None
    if owns and (directory / "data").exists():
        raise errors.ForeignDataError(
            f"{directory} holds the files of a pool that was detached: attach it again with "
            f"'thinpool attach-pool {plan.name} --data {directory}/data --metadata "
            f"{directory}/metadata', or move them away",
            path=str(directory / "data"),
            carries="a detached pool",
        )
    data = building / "data" if plan.data is None else plan.data
    metadata = building / "metadata" if plan.metadata is None else plan.metadata
    if data.exists() and metadata.exists() and data.samefile(metadata):
        raise errors.UsageError("data and metadata cannot be the same", what="metadata")
    _make_file(data, data_size, undo, shown=directory / "data" if owns else data)
    _make_file(
        metadata,
        metadata_size,
        undo,
        shown=directory / "metadata" if owns else metadata,
        allocated=True,
    )
    with BlockDevice.open_file(data, exclusive=True):  # nobody else uses it
        pass
    with BlockDevice.open_file(metadata, exclusive=True) as device:
        if not owns:
            undo.callback(empty, str(metadata))
        format_pool(
            device,
            block_size=plan.block_size,
            data_blocks=data_size // plan.block_size,
            force=plan.force,
        )
    return PoolConfig(
        name=plan.name,
        uuid=poolfile.new_uuid(),
        engine=choose_engine(plan.engine),
        block_size=plan.block_size,
        data=str(directory / "data") if owns else stable_path(data),
        metadata=str(directory / "metadata") if owns else stable_path(metadata),
        owns_files=owns,
        state=poolfile.CREATING,
        created=format_time(datetime.now(UTC)),
        zero=plan.zero,
        when_full=plan.when_full,
        min_free=plan.min_free,
    )


def _make_file(
    path: Path, size: int, undo: contextlib.ExitStack, *, shown: Path, allocated: bool = False
) -> None:
    """A sparse file of at least that size; a device or a larger file stays as it is.

    Metadata is allocated at once: when the host's disk runs full later, data waits for space, but a
    metadata write that failed would turn the pool read-only. Its beginning, where most pools' ends,
    is written too, for a first write to allocated space is recorded in the host's filesystem, and
    each commit would wait for that.
    """
    if _is_device(path):
        return
    existed = path.exists()
    zeros = memoryview(bytes(1 << 20))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError as cause:
        raise errors.NotFoundError(
            f"{path.parent} does not exist", path=str(path.parent)
        ) from cause
    except PermissionError as cause:
        raise errors.NotPermittedError(
            f"this user may not write {path}", operation="open", path=str(path)
        ) from cause
    try:
        before = os.fstat(descriptor).st_size
        if existed:
            undo.callback(os.truncate, path, before)
        else:
            undo.callback(path.unlink, missing_ok=True)
        if before < size:
            os.ftruncate(descriptor, size)
        if allocated:
            os.posix_fallocate(descriptor, 0, size)
            for offset in range(before, min(size, _WRITTEN_AT_ONCE), len(zeros)):
                os.pwrite(descriptor, zeros[: size - offset], offset)
        os.fsync(descriptor)
    except OSError as cause:
        raise errors.HostSpaceError(
            f"{shown} cannot have {size} bytes: {cause.strerror}",
            path=str(shown),
            errno=cause.errno,
        ) from cause
    finally:
        os.close(descriptor)


def _write_config_in(building: Path, config: PoolConfig) -> None:
    import json  # noqa: PLC0415 - beside what writes it
    from dataclasses import asdict  # noqa: PLC0415 - likewise

    document = {"schema": poolfile.SCHEMA, **asdict(config)}
    poolfile.write_atomically(building / poolfile.FILE, json.dumps(document, indent=2).encode())


def _move_in_place(session: Session, name: str, building: Path, directory: Path) -> None:
    try:
        if directory.is_dir() and not (directory / poolfile.FILE).exists():
            # Of a pool that was detached: its files stay where they are.
            for entry in (CREATION_LOCK, poolfile.FILE):
                (building / entry).rename(directory / entry)
        else:
            building.rename(directory)
    except OSError as cause:
        if directory.exists():
            raise errors.AlreadyExistsError(
                f"there is a pool {name} under {session.root} already", existing=None
            ) from cause
        raise errors.StorageIOError(
            f"cannot make {directory}: {cause.strerror}", errno=cause.errno, path=str(directory)
        ) from cause
    descriptor = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _client_of_unfinished(session: Session, name: str) -> PoolClient:
    client = PoolClient(session.root, name, timeout=session.timeout)
    client.allow_unfinished = True
    return client


def _finish(session: Session, plan: PoolPlan) -> PoolStatus:
    """Make the base in the pool's own server, and say that the pool is whole."""
    client = _client_of_unfinished(session, plan.name)
    if plan.base_size:
        _tell(plan, "making the base device's filesystem")
        with Workbench(client) as bench:
            volume = bench.create(size=plan.base_size, kind="base")
            bench.make_filesystem(volume, plan.base_fs, plan.mkfs_options)
            bench.publish(
                Finished(
                    volume=volume,
                    publish_as="base",
                    kind="base",
                    read_only=True,
                    labels={},
                    filesystem=plan.base_fs,
                )
            )
    status = PoolStatus.from_json(client.call("finish_creation"))
    client.close()
    return status


def _tell(plan: PoolPlan, step: str) -> None:
    if plan.progress is not None:
        plan.progress(Progress(operation="create-pool", step=step, done=0, total=None))


# ---- attach, detach, remove -------------------------------------------------------------------


def attach_pool(
    session: Session,
    name: str,
    *,
    data: Path,
    metadata: Path,
    engine: str,
    read_only: bool,
) -> PoolStatus:
    """Adopt a pool that is there."""
    parse_pool_name(name)
    engine = choose_engine(engine)
    _refuse_existing(session, name)
    for path in (data, metadata):
        if not path.exists():
            raise errors.NotFoundError(f"{path} does not exist", path=str(path))
        _refuse_owned(session, path)
        _refuse_used(path)
    if data.samefile(metadata):
        raise errors.UsageError("data and metadata cannot be the same", what="metadata")
    directory = poolfile.pool_directory(session.root, name)
    with _new_directory(session, name) as (building, lock):
        config = PoolConfig(
            name=name,
            uuid=poolfile.new_uuid(),
            engine=engine,
            block_size=_block_size(data, metadata),
            data=stable_path(data),
            metadata=stable_path(metadata),
            owns_files=data.resolve().parent == metadata.resolve().parent == directory.resolve(),
            state=poolfile.CREATING,
            created=format_time(datetime.now(UTC)),
            read_only=read_only,
        )
        _write_config_in(building, config)
        _move_in_place(session, name, building, directory)
        client = _client_of_unfinished(session, name)
        try:
            return PoolStatus.from_json(client.call("finish_creation"))
        except BaseException:
            with contextlib.suppress(errors.ThinpoolError):
                client.stop_server()
            forget_directory(directory)
            raise
        finally:
            client.close()
            lock.close()


def _refuse_used(path: Path) -> None:
    """A device of dm or a mount, or a file under a loop device, is in use."""
    from thinpool.host import holders, loop  # noqa: PLC0415 - only where a pool is adopted

    if _is_device(path):
        found = holders.find_holders(path.stat().st_rdev, path=str(path))
        if found:
            raise errors.BusyError(
                f"{path} is in use: {holders.describe(found)}",
                holder=holders.describe(found),
                path=str(path),
            )
        return
    devices = loop.find(path)
    if devices:
        raise errors.BusyError(
            f"{path} is in use under {devices[0].path}", holder=devices[0].path, path=str(path)
        )


def _block_size(data: Path, metadata: Path) -> int:
    """Open the pool without a change and see what it is.

    Raises:
        BusyError: a server has it.
        CorruptMetadataError: it is none.
    """
    from thinpool.engine import BlockDevice, Pool, PoolOptions  # noqa: PLC0415 - the C core

    with (
        BlockDevice.open_file(metadata, read_only=True, exclusive=True) as metadata_device,
        BlockDevice.open_file(data, read_only=True) as data_device,
        Pool.open(
            metadata_device, data_device, PoolOptions(read_only=True, commit_interval_ms=0)
        ) as pool,
    ):
        return pool.status().data_block_size


def detach_pool(session: Session, name: str) -> None:
    """Forget a pool."""
    client = session.client(name)
    with client.stopped():
        refuse_in_kernel(client.config())
        forget_directory(client.directory)
    session.forget(name)


def refuse_in_kernel(config: PoolConfig) -> None:
    """A server that ended could leave its pool with the kernel, where somebody had a device open.

    Raises:
        BusyError: so it did.
    """
    if config.engine != "dm":
        return
    from thinpool.dm import names  # noqa: PLC0415 - for pools of this engine alone
    from thinpool.dm.client import DeviceMapper  # noqa: PLC0415 - likewise

    try:
        mapper = DeviceMapper()
    except errors.UnsupportedHostError:
        return  # a kernel without device-mapper has no pool: this one came from another host
    with mapper:
        for entry in mapper.devices(uuid_prefix=names.prefix_of(config.uuid)):
            raise errors.BusyError(
                f"pool {config.name} is in use by the kernel as {entry.name}: close what has that "
                "open, and ask again",
                holder=entry.name,
                device=entry.name,
                pool=config.name,
            )


def change_engine(session: Session, name: str, engine: str) -> None:
    """Let the other engine serve a pool from now on. Both read and write the same metadata.

    Raises:
        BusyError: something is active in it.
        UnsupportedHostError, NotPermittedError: dm was asked for, and cannot be had.
    """
    client = session.client(name)
    chosen = choose_engine(engine)
    if client.config().engine == chosen:
        return
    with client.stopped():
        config = client.config()
        refuse_in_kernel(config)
        poolfile.write_config(session.root, config.changed(engine=chosen))
    session.forget(name)


def forget_directory(directory: Path) -> None:
    """Drop what makes a directory a pool of ours, and nothing that holds the pool's bytes."""
    (directory / poolfile.FILE).unlink(missing_ok=True)
    for pattern in ("catalogue.db*", "server.*", "supervisor.pid", "*.lock", ".*.new"):
        for entry in directory.glob(pattern):
            entry.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


def remove_pool(session: Session, name: str) -> None:
    """Remove a pool."""
    client = session.client(name)
    config = client.config()
    if not config.owns_files and config.read_only:
        raise errors.ReadOnlyError(
            f"pool {name} is attached read-only: 'thinpool detach-pool {name}' forgets it",
            pool=name,
        )
    with client.stopped():
        refuse_in_kernel(config)
        remove_directory(client.directory, config)
    if not config.owns_files:
        copy = Path(f"{config.metadata}{namescopy.SUFFIX}")
        for path in (namescopy.changes_path(copy), copy):
            path.unlink(missing_ok=True)
    session.forget(name)


# ---- looking ----------------------------------------------------------------------------------


def pools(session: Session) -> list[PoolStatus]:
    """Every pool's status."""
    names = []
    for name in poolfile.list_pools(session.root):
        try:
            config = poolfile.read_config(session.root, name)
        except errors.NotFoundError:
            continue
        except errors.ThinpoolError:
            names.append(name)
            continue
        if config.state == poolfile.READY:
            names.append(name)
        else:
            with contextlib.suppress(errors.ThinpoolError):
                session.drop_unfinished(name)
    if not names:
        return []
    with ThreadPoolExecutor(max_workers=min(len(names), 8)) as threads:
        return list(threads.map(lambda name: status_or_failure(session, name), names))


def status_or_failure(session: Session, name: str) -> PoolStatus:
    """A pool's status; what can be said of it when it cannot be opened."""
    try:
        return PoolStatus.from_json(session.client(name).call("status"))
    except errors.ThinpoolError as error:
        return _failed(session, name, error)


def _failed(session: Session, name: str, error: errors.ThinpoolError) -> PoolStatus:
    try:
        config: Any = poolfile.read_config(session.root, name)
    except errors.ThinpoolError:
        config = None
    return PoolStatus(
        pool=name,
        uuid=config.uuid if config else "",
        engine=config.engine if config else "user",
        mode="fail",
        needs_check=isinstance(error, errors.NeedsCheckError),
        transaction_id=0,
        block_size=config.block_size if config else 0,
        data=DataSpace(
            path=config.data if config else "", used=0, total=0, low_water=0, host_free=None
        ),
        metadata=MetadataSpace(path=config.metadata if config else "", used=0, total=0),
        when_full=config.when_full if config else "queue",
        volumes=0,
        active=0,
        min_free=config.min_free if config else 0.0,
        error=error_to_json(error),
        warnings=(error.message,),
    )
