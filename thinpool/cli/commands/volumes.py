"""Volumes: make, snapshot, list, compare, rename, resize, remove."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from thinpool.cli import exits
from thinpool.cli.command import command
from thinpool.cli.params import NEW_NAME, POOL, SIZE, VOLUME
from thinpool.host.failures import failure
from thinpool.names import parse_ref

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from thinpool.cli.session import Session
    from thinpool.model import Volume


def made(session: Session, volume: Volume) -> None:
    """Confirm a new volume; one that is active is answered with its device's path."""
    from thinpool.cli import text

    if session.json:
        session.write_json({"schema": 1, "volume": volume.to_json()})
        return
    if volume.device is not None:
        session.write(volume.device)
    elif not session.quiet:
        session.write(text.volume_line(volume))
    note = text.consistency_note(volume)
    if note is not None:
        session.note(note)


def made_many(session: Session, volumes: Sequence[Volume]) -> None:
    """Confirm new volumes, as ``made`` does one."""
    from thinpool.cli import text

    if session.json:
        session.write_json({"schema": 1, "volumes": [volume.to_json() for volume in volumes]})
        return
    for volume in volumes:
        if volume.device is not None:
            session.write(volume.device)
        elif not session.quiet:
            session.write(text.volume_line(volume))
        note = text.consistency_note(volume)
        if note is not None:
            session.note(note)


def changed(session: Session, volume: Volume) -> None:
    """Confirm what was done to a volume."""
    from thinpool.cli import text

    session.done(
        lambda: {"schema": 1, "volume": volume.to_json()}, lambda: text.volume_line(volume)
    )


@command(
    "create",
    exits={
        exits.EXISTS: "the name is taken; the error carries who has it",
        exits.NO_SPACE: "less than the pool's min-free is left",
    },
    examples=[
        ("thinpool create p/db --size 20G --fs xfs", "A volume with a filesystem:"),
        ("thinpool create p/raw --size 1T", "One without:"),
        (
            "thinpool create p/try --external-origin /dev/vg/golden",
            "One over a device that stays as it is:",
        ),
    ],
)
@click.argument("volume", type=VOLUME, metavar="POOL/NAME")
@click.option("--size", type=SIZE, help="A multiple of 512 bytes.")
@click.option(
    "--external-origin",
    type=click.Path(path_type=Path),
    metavar="DEVICE",
    help="What is not written reads as this device, which nobody writes any more; its size is the "
    "default. In pools of the dm engine.",
)
@click.option("--fs", type=click.Choice(["ext4", "xfs"]), help="Make this filesystem on it.")
@click.option(
    "--mkfs-option",
    "mkfs_options",
    multiple=True,
    metavar="O",
    help="Added to mkfs's command line; may be given again.",
)
@click.pass_obj
def create(
    session: Session,
    *,
    volume: str,
    size: int | None,
    external_origin: Path | None,
    fs: str | None,
    mkfs_options: tuple[str, ...],
) -> None:
    """Make an empty thin volume, with a filesystem if asked.

    It takes no space but what is written to it, and reads as zeros elsewhere.
    """
    if size is None and external_origin is None:
        raise click.MissingParameter(param_hint="'--size'", param_type="option")
    made(
        session,
        session.api.create(
            volume,
            size=size,
            fs=fs,
            mkfs_options=mkfs_options,
            external_origin=external_origin,
        ),
    )


@command(
    "snapshot",
    exits={
        exits.EXISTS: "the new name is taken; the error carries who has it",
        exits.NO_SPACE: "less than the pool's min-free is left",
    },
    examples=[
        ("thinpool snapshot p/debian p/c1", "A container from an image:"),
        (
            "dev=$(thinpool snapshot p/debian p/guest1 --activate --size 40G)",
            "One command per guest: a larger disk of its own, ready to use:",
        ),
        ("thinpool snapshot p/db p/db.monday --read-only", "Keep what a volume holds now:"),
        (
            "thinpool snapshot p/debian p/g{1..100} --mount-each /guests",
            "A hundred at once, mounted on /guests/g1 to /guests/g100:",
        ),
    ],
)
@click.argument("source", type=VOLUME, metavar="POOL/FROM")
@click.argument("targets", type=VOLUME, nargs=-1, required=True, metavar="POOL/TO...")
@click.option("--read-only", is_flag=True, help="Seal it; of a container that is an image.")
@click.option("--size", type=SIZE, help="Larger than the source's: its filesystem grows too.")
@click.option("--activate", is_flag=True, help="Activate it and print its device.")
@click.option(
    "--mount-each",
    type=click.Path(readable=False, path_type=Path, file_okay=False),
    metavar="DIR",
    help="Activate each, mount it on DIR/NAME, which is made, and print its device.",
)
@click.option(
    "--mount",
    type=click.Path(readable=False, path_type=Path, file_okay=False),
    metavar="DIR",
    help="Activate it, mount it there, and print its device.",
)
@click.pass_obj
def snapshot(
    session: Session,
    *,
    source: str,
    targets: tuple[str, ...],
    read_only: bool,
    size: int | None,
    activate: bool,
    mount: Path | None,
    mount_each: Path | None,
) -> None:
    """Make snapshots of anything, at any depth, active or not.

    It shares every block with its source until either is written. It holds what a disk would hold
    after a power cut at one instant; a filesystem that is mounted on this host is frozen for that
    instant, so that the snapshot is clean. Where it cannot be frozen the output says
    crash-consistent.

    Several names make as many snapshots of the same instant, all or none, in one commit.
    """
    if len(targets) == 1 and mount_each is None:
        made(
            session,
            session.api.snapshot(
                source, targets[0], read_only=read_only, size=size, activate=activate, mount=mount
            ),
        )
        return
    for given, option in ((read_only, "--read-only"), (size, "--size"), (mount, "--mount")):
        if given:
            raise click.UsageError(f"{option} is for one snapshot; several were asked for")
    if mount_each is None:
        made_many(session, session.api.snapshot_many(source, targets, activate=activate))
        return
    with _directories(mount_each, [parse_ref(target).name for target in targets]) as directories:
        volumes = session.api.snapshot_many(source, targets, mount=directories)
    made_many(session, volumes)


@contextlib.contextmanager
def _directories(below: Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """A directory for each name; those made here go again when what they are for fails."""
    with contextlib.ExitStack() as undo:
        for name in names:
            try:
                (below / name).mkdir()
            except FileExistsError:
                continue  # what it is, mount will see
            except OSError as cause:
                raise failure(cause, f"cannot make {below / name}", path=str(below)) from cause
            undo.callback(_remove_directory, below / name)
        yield [below / name for name in names]
        undo.pop_all()


def _remove_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


@command(
    "list",
    examples=[
        ("thinpool list", "Everything in every pool:"),
        ("thinpool list p --tree", "Who is a snapshot of whom:"),
        ("thinpool list p --exclusive --json", "With what nothing else refers to, for a program:"),
    ],
)
@click.argument("pool", type=POOL, required=False)
@click.option("--tree", is_flag=True, help="Each below what it is a snapshot of.")
@click.option(
    "--exclusive",
    is_flag=True,
    help="Also the bytes that nothing else in the pool refers to; reads every mapping.",
)
@click.pass_obj
def list_(session: Session, *, pool: str | None, tree: bool, exclusive: bool) -> None:
    """List what a pool holds, or every pool.

    Kinds: base, image, container, volume. MAPPED counts the blocks that a volume refers to, those
    it shares with others too; EXCLUSIVE those that it alone refers to. A parent that was removed
    shows as '-'.
    """
    from thinpool.cli import text

    volumes = session.api.list(pool, exclusive=exclusive)
    session.answer(
        lambda: {"schema": 1, "volumes": [volume.to_json() for volume in volumes]},
        lambda: text.volume_table(volumes, exclusive=exclusive, tree=tree),
    )


@command(
    "remove",
    exits={exits.BUSY: "one of them is active: see --deactivate"},
    examples=[
        ("thinpool remove p/c1 p/c2 --deactivate", "Two containers, in use or not:"),
        ("thinpool remove p/debian --dry-run", "What it would free:"),
    ],
)
@click.argument("volumes", type=VOLUME, nargs=-1, required=True, metavar="POOL/NAME...")
@click.option("--deactivate", is_flag=True, help="Unmount and deactivate what is active.")
@click.option(
    "--deferred",
    is_flag=True,
    help="Also what is in use: names go now, each device and its space when its last user lets go.",
)
@click.option(
    "--dry-run", is_flag=True, help="Only say how many bytes removing that whole set would free."
)
@click.pass_obj
def remove(
    session: Session,
    *,
    volumes: tuple[str, ...],
    deactivate: bool,
    deferred: bool,
    dry_run: bool,
) -> None:
    """Remove volumes, images and containers, all or none.

    Snapshots of what is removed live on.
    """
    from thinpool.units import format_size

    removal = session.api.remove(
        list(volumes), deactivate=deactivate, deferred=deferred, dry_run=dry_run
    )
    names = ", ".join(str(volume) for volume in removal.removed)
    freed = format_size(removal.freed)
    if dry_run:
        session.answer(removal.to_json, lambda: f"would remove {names}, freeing {freed}")
    else:
        session.done(removal.to_json, lambda: f"removed {names}, freed {freed}")


@command(
    "rename",
    exits={exits.EXISTS: "the new name is taken"},
    examples=[("thinpool rename p/c1 web", "Also 'thinpool rename p/c1 p/web':")],
)
@click.argument("volume", type=VOLUME, metavar="POOL/NAME")
@click.argument("name", type=NEW_NAME, metavar="NEW")
@click.pass_obj
def rename(session: Session, *, volume: str, name: str) -> None:
    """Give a volume another name.

    The device path of an active one follows.
    """
    changed(session, session.api.rename(volume, name))


@command(
    "resize",
    exits={exits.NOT_PERMITTED: "it is sealed read-only"},
    examples=[
        ("thinpool resize p/c1 20G", "Grow a container and its filesystem:"),
        ("thinpool resize p/raw 2T --device-only", "Grow the device alone:"),
    ],
)
@click.argument("volume", type=VOLUME, metavar="POOL/NAME")
@click.argument("size", type=SIZE)
@click.option("--device-only", is_flag=True, help="Leave its filesystem as it is.")
@click.pass_obj
def resize(session: Session, *, volume: str, size: int, device_only: bool) -> None:
    """Set a volume's size; its filesystem grows with it.

    SIZE is a multiple of 512 bytes. An active volume's device grows while it is in use.
    """
    changed(session, session.api.resize(volume, size, device_only=device_only))


@command(
    "delta",
    examples=[
        ("thinpool delta p/db.monday p/db", "Which ranges were written since the snapshot:"),
        ("thinpool delta p/a p/b --json", "The same for a program, in bytes:"),
    ],
)
@click.argument("first", type=VOLUME, metavar="POOL/A")
@click.argument("second", type=VOLUME, metavar="POOL/B")
@click.pass_obj
def delta(session: Session, *, first: str, second: str) -> None:
    """Show in which block ranges two volumes differ.

    A line per range: its first byte, its length in bytes, and left_only (mapped in the first
    alone), right_only, or different. Reads mappings only: a block that was written with what it
    held counts as different.
    """
    found = session.api.delta(first, second)
    session.answer(
        found.to_json,
        lambda: "\n".join(f"{each.begin} {each.length} {each.change}" for each in found.ranges),
    )


COMMANDS: Final = {
    str(each.name): each for each in (create, snapshot, list_, remove, rename, resize, delta)
}
