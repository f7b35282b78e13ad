"""Pools: make, adopt, look at, change, grow, remove."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from thinpool.cli import exits
from thinpool.cli.command import command
from thinpool.cli.params import BLOCK_SIZE, PERCENT, POOL, SIZE, KeyValueType, unique

if TYPE_CHECKING:
    from thinpool.cli.session import Session
    from thinpool.model import PoolStatus

SETTINGS: Final = {
    "when-full": "queue or error",
    "min-free": "percent below which nothing new is made",
    "low-water": "free space below which the pool warns and extends itself: a size or a percent",
    "autoextend-threshold": "percent used at which a pool grows; 0 for never",
    "autoextend-percent": "by how many percent it grows",
    "engine": "user, dm or auto, of a pool of which nothing is active",
}

_ENGINE = click.Choice(["auto", "user", "dm"])
_FILE = click.Path(readable=False, path_type=Path)


def _changed(session: Session, pool: PoolStatus, text: str) -> None:
    """Confirm what was done to a pool, and pass its warnings on."""
    session.done(pool.to_json, lambda: text)
    for warning in pool.warnings:
        session.warn(warning)


def _summary(pool: PoolStatus) -> str:
    from thinpool.units import format_size

    return (
        f"{pool.pool}: {format_size(pool.data.total)} of data, "
        f"{format_size(pool.metadata.total)} of metadata, "
        f"{format_size(pool.block_size)} blocks, engine {pool.engine}, {pool.volumes} volumes"
    )


@command(
    "create-pool",
    exits={
        exits.EXISTS: "the pool exists already, or a file or device carries something: see --force",
        exits.NOT_PERMITTED: "the dm engine was asked for, and this host or user cannot have it",
    },
    examples=[
        ("thinpool create-pool p --size 100G", "A pool in sparse files under the root:"),
        (
            "thinpool create-pool p --data /dev/vdb --metadata /dev/vdc --block-size 128K",
            "A pool on two devices, of their size:",
        ),
        (
            "thinpool create-pool p --size 1T --base-size 20G --base-fs xfs --when-full error",
            "With a larger base, xfs on it, and errors instead of waiting when it is full:",
        ),
    ],
)
@click.argument("pool", type=POOL)
@click.option(
    "--size",
    type=SIZE,
    help="Of the data. Needed unless --data is a device or a file that has a size.",
)
@click.option(
    "--metadata-size",
    type=SIZE,
    help="Of the metadata, at most 15.81 GiB; chosen by the data's size otherwise.",
)
@click.option("--data", type=_FILE, metavar="PATH", help="A file or device for the data.")
@click.option("--metadata", type=_FILE, metavar="PATH", help="A file or device for the metadata.")
@click.option(
    "--block-size",
    type=BLOCK_SIZE,
    default="64K",
    show_default=True,
    help="Of a data block: 64K to 1G in steps of 64K.",
)
@click.option(
    "--engine",
    type=_ENGINE,
    default="auto",
    show_default=True,
    help="Who serves it: 'user' is thinpool's own engine, 'dm' the kernel's device-mapper; 'auto' "
    "is dm where the kernel has it, decided once and recorded.",
)
@click.option(
    "--base-size",
    type=SIZE,
    default="10G",
    show_default=True,
    help="Of the base device, which images are snapshots of; snapshots can be larger.",
)
@click.option(
    "--base-fs",
    type=click.Choice(["ext4", "xfs"]),
    default="ext4",
    show_default=True,
    help="The base device's filesystem.",
)
@click.option(
    "--mkfs-option",
    "mkfs_options",
    multiple=True,
    metavar="O",
    help="Added to mkfs's command line; may be given again. One that starts with a dash: "
    "--mkfs-option=-i --mkfs-option=65536.",
)
@click.option(
    "--no-zero",
    is_flag=True,
    help="New blocks are not zeroed: a volume may read what a removed one had written.",
)
@click.option(
    "--when-full",
    type=click.Choice(["queue", "error"]),
    default="queue",
    show_default=True,
    help="When data space runs out, writes wait for 60 s, or fail at once.",
)
@click.option(
    "--min-free",
    type=PERCENT,
    default="10%",
    show_default=True,
    help="Of data and of metadata; with less nothing new is made.",
)
@click.option("--force", is_flag=True, help="Overwrite what the files or devices carry.")
@click.pass_obj
def create_pool(
    session: Session,
    *,
    pool: str,
    size: int | None,
    metadata_size: int | None,
    data: Path | None,
    metadata: Path | None,
    block_size: int,
    engine: str,
    base_size: int,
    base_fs: str,
    mkfs_options: tuple[str, ...],
    no_zero: bool,
    when_full: str,
    min_free: float,
    force: bool,
) -> None:
    """Make a pool, and its base device with an empty filesystem.

    Without --data and --metadata the pool lives in sparse files under the root, with a warning
    where the host's disk could not hold them full. A file or device that already carries
    something is refused, and the error says what it carries, unless --force is given.

    The base device is named 'base': its filesystem has an empty root directory of mode 0755 and
    is made for being cloned. Images and containers are snapshots of it.
    """
    with session.progress() as progress:
        made = session.api.create_pool(
            pool,
            size=size,
            metadata_size=metadata_size,
            data=data,
            metadata=metadata,
            block_size=block_size,
            engine=engine,
            base_size=base_size,
            base_fs=base_fs,
            mkfs_options=mkfs_options,
            zero=not no_zero,
            when_full=when_full,
            min_free=min_free,
            force=force,
            progress=progress,
        )
    _changed(session, made, _summary(made))


@command(
    "attach-pool",
    exits={
        exits.BUSY: "the pool is in use: by a server, by the kernel, by another program",
        exits.CORRUPT: "the metadata does not check",
    },
    examples=[
        (
            "thinpool attach-pool old --data /dev/vg/docker_tdata --metadata /dev/vg/docker_tmeta",
            "Adopt a pool that Docker left behind:",
        ),
        (
            "thinpool attach-pool old --data data.img --metadata meta.img --read-only",
            "Only look at one:",
        ),
    ],
)
@click.argument("pool", type=POOL)
@click.option("--data", type=_FILE, metavar="PATH", required=True, help="Its data device or file.")
@click.option(
    "--metadata", type=_FILE, metavar="PATH", required=True, help="Its metadata device or file."
)
@click.option(
    "--engine", type=_ENGINE, default="auto", show_default=True, help="Who serves it from now on."
)
@click.option("--read-only", is_flag=True, help="Change nothing in it.")
@click.pass_obj
def attach_pool(
    session: Session, *, pool: str, data: Path, metadata: Path, engine: str, read_only: bool
) -> None:
    """Adopt an existing dm-thin pool.

    Made by the kernel, by LVM's tools or by Docker, moved from another host, or one whose names
    were lost: volumes are named id-N where no name is known. A pool that is in use is refused.
    """
    found = session.api.attach_pool(
        pool, data=data, metadata=metadata, engine=engine, read_only=read_only
    )
    _changed(session, found, _summary(found))


@command(
    "detach-pool",
    exits={exits.BUSY: "something is active in it"},
    examples=[("thinpool detach-pool old", "Forget a pool that moves to another host:")],
)
@click.argument("pool", type=POOL)
@click.pass_obj
def detach_pool(session: Session, *, pool: str) -> None:
    """Forget a pool and touch none of its bytes.

    Its volumes' names are forgotten too: attach-pool names them id-N.
    """
    session.api.detach_pool(pool)
    session.done(lambda: {"schema": 1, "pool": pool, "detached": True}, lambda: f"{pool}: detached")


@command("pools", examples=[("thinpool pools", "Every pool, and how full it is:")])
@click.pass_obj
def pools(session: Session) -> None:
    """List the pools under the root.

    One that cannot be opened is listed with the mode 'fail'; 'thinpool doctor POOL' says more.
    """
    from thinpool.cli import text

    found = session.api.pools()
    session.answer(
        lambda: {"schema": 1, "pools": [pool.to_json() for pool in found]},
        lambda: text.pool_table(found) if found else "",
    )
    for pool in found:
        for warning in pool.warnings:
            session.warn(f"{pool.pool}: {warning}")


@command(
    "status",
    examples=[
        ("thinpool status p", "How full a pool is, and what state it is in:"),
        ("thinpool status p --json | jq .data.used", "The bytes used, for a program:"),
    ],
)
@click.argument("pool", type=POOL)
@click.pass_obj
def status(session: Session, *, pool: str) -> None:
    """Show a pool's state: mode, space, transaction id, settings.

    Modes: rw; ro, where a flush or a metadata write failed; out_of_data_space, where writes to new
    blocks wait or fail; fail, where the pool cannot be opened.
    """
    from thinpool.cli import text

    found = session.api.status(pool)
    session.answer(found.to_json, lambda: text.pool_lines(found))
    for warning in found.warnings:
        session.warn(warning)


@command(
    "set",
    examples=[
        ("thinpool set p when-full=error min-free=5%", "Two settings, both or none:"),
        (
            "thinpool set p autoextend-threshold=80% autoextend-percent=20%",
            "Let a pool in files grow by itself:",
        ),
    ],
)
@click.argument("pool", type=POOL)
@click.argument(
    "settings",
    type=KeyValueType(SETTINGS),
    nargs=-1,
    required=True,
    metavar="KEY=VALUE...",
    callback=unique("KEY=VALUE"),
)
@click.pass_obj
def set_(session: Session, *, pool: str, settings: tuple[tuple[str, str], ...]) -> None:
    r"""Change a pool's settings, all or none.

    \b
    when-full             queue (writes wait for space, 60 s) or error
    min-free              percent below which nothing new is made
    low-water             free space below which the pool warns and
                          extends itself: a size or a percent
    autoextend-threshold  percent used at which a pool grows, in files,
                          or to what its device has; 0 for never
    autoextend-percent    by how many percent it grows
    engine                user, dm or auto: who serves it from now on, of
                          a pool of which nothing is active
    """
    changed = session.api.set(pool, dict(settings))
    text = ", ".join(f"{key}={value}" for key, value in settings)
    _changed(session, changed, f"{pool}: {text}")


@command(
    "extend-pool",
    examples=[
        ("thinpool extend-pool p --data-size 200G", "Grow a pool in files:"),
        ("thinpool extend-pool p", "Take in that its devices were grown:"),
    ],
)
@click.argument("pool", type=POOL)
@click.option("--data-size", type=SIZE, help="The data's new size, not smaller than it is.")
@click.option("--metadata-size", type=SIZE, help="The metadata's new size, likewise.")
@click.pass_obj
def extend_pool(
    session: Session, *, pool: str, data_size: int | None, metadata_size: int | None
) -> None:
    """Grow a pool while it is in use.

    With no size given, to what its devices have by now.
    """
    grown = session.api.extend_pool(pool, data_size=data_size, metadata_size=metadata_size)
    _changed(session, grown, _summary(grown))


@command(
    "remove-pool",
    exits={
        exits.USAGE: "there is no terminal to ask on, and no --yes",
        exits.BUSY: "something is active in it",
    },
    examples=[("thinpool remove-pool p --yes", "Remove a pool and all that is in it:")],
)
@click.argument("pool", type=POOL)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def remove_pool(session: Session, *, pool: str, yes: bool) -> None:
    """Remove a pool with all its volumes, images and containers.

    Its files under the root go; files and devices that were given with --data and --metadata
    stay, empty. Asks first, and refuses while anything is active.
    """
    session.ask(
        f"Remove pool {pool} and everything in it?", yes=yes, refused=f"{pool} was not removed"
    )
    session.api.remove_pool(pool)
    session.done(lambda: {"schema": 1, "pool": pool, "removed": True}, lambda: f"{pool}: removed")


COMMANDS: Final = {
    str(each.name): each
    for each in (
        create_pool,
        attach_pool,
        detach_pool,
        pools,
        status,
        set_,
        extend_pool,
        remove_pool,
    )
}
