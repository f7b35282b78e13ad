"""Volumes as block devices and mounts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from thinpool.cli import exits
from thinpool.cli.command import command
from thinpool.cli.commands.volumes import changed
from thinpool.cli.params import MODE, OWNER, VOLUME

if TYPE_CHECKING:
    from thinpool.cli.session import Session


@command(
    "activate",
    exits={
        exits.BUSY: "it is active writable and was asked for read-only, or in use otherwise",
        exits.NOT_PERMITTED: "not root, or no FUSE or loop devices here",
        exits.NOT_THERE_YET: "--persist",
    },
    examples=[
        ("dev=$(thinpool activate p/c1)", "A block device:"),
        ("thinpool activate p/vm --owner 1000:1000", "One that a user's QEMU may open:"),
    ],
)
@click.argument("volume", type=VOLUME, metavar="POOL/NAME")
@click.option("--read-only", is_flag=True, help="A device that cannot be written.")
@click.option("--persist", is_flag=True, help="Bring it back after a reboot.")
@click.option("--owner", type=OWNER, metavar="UID:GID", help="Who owns the device node.")
@click.option("--mode", type=MODE, metavar="MODE", help="Its permission bits, such as 0660.")
@click.pass_obj
def activate(
    session: Session,
    *,
    volume: str,
    read_only: bool,
    persist: bool,
    owner: tuple[int, int] | None,
    mode: int | None,
) -> None:
    """Make a block device of a volume, and print its path.

    The path is /run/thinpool/dev/POOL/NAME, a stable link to the device. Of a volume that is
    active already the same path is printed; asking read-only for one that is active writable is
    exit code 5.
    """
    found = session.api.activate(
        volume, read_only=read_only, persist=persist, owner=owner, mode=mode
    )
    session.answer(found.to_json, lambda: found.device or found.file or "")


@command(
    "deactivate",
    exits={exits.BUSY: "it is mounted or open"},
    examples=[("thinpool deactivate p/c1", "Take the device down:")],
)
@click.argument("volume", type=VOLUME, metavar="POOL/NAME")
@click.pass_obj
def deactivate(session: Session, *, volume: str) -> None:
    """Take a volume's block device down; fine when there is none."""
    changed(session, session.api.deactivate(volume))


@command(
    "mount",
    examples=[
        ("thinpool mount p/c1 /mnt", "A container's filesystem:"),
        ("thinpool mount p/c1 /mnt -o noatime,dev,suid", "With device nodes and set-uid programs:"),
    ],
)
@click.argument("volume", type=VOLUME, metavar="POOL/NAME")
@click.argument(
    "directory", type=click.Path(readable=False, path_type=Path, file_okay=False), metavar="DIR"
)
@click.option("--read-only", is_flag=True, help="Mount it read-only, on a read-only device.")
@click.option(
    "-o",
    "options",
    multiple=True,
    metavar="OPTIONS",
    help="As for mount(8), separated by commas; may be given again.",
)
@click.pass_obj
def mount(
    session: Session,
    *,
    volume: str,
    directory: Path,
    read_only: bool,
    options: tuple[str, ...],
) -> None:
    """Activate a volume and mount its filesystem.

    nodev and nosuid unless the options ask for 'dev' and 'suid'; snapshots of xfs get nouuid.
    'thinpool umount' undoes both.
    """
    split = tuple(part for each in options for part in each.split(",") if part)
    found = session.api.mount(volume, directory, read_only=read_only, options=split)
    session.done(found.to_json, lambda: f"{found.volume}: {found.device} on {found.directory}")


@command(
    "umount",
    exits={exits.BUSY: "a file on it is open"},
    examples=[("thinpool umount p/c1", "Unmount it, and deactivate it if mount had activated it:")],
)
@click.argument("volume", type=VOLUME, metavar="POOL/NAME")
@click.pass_obj
def umount(session: Session, *, volume: str) -> None:
    """Unmount a volume and undo what mount did.

    Fine when it is not mounted.
    """
    changed(session, session.api.umount(volume))


@command(
    "trim",
    examples=[("thinpool trim p/c1", "Give back what deleted files had used:")],
)
@click.argument("volume", type=VOLUME, metavar="POOL/NAME")
@click.pass_obj
def trim(session: Session, *, volume: str) -> None:
    """Give the blocks back that a volume's filesystem does not use.

    Works on an active volume as on one that is not.
    """
    from thinpool.units import format_size

    found = session.api.trim(volume)
    session.done(found.to_json, lambda: f"{found.volume}: trimmed {format_size(found.trimmed)}")


COMMANDS: Final = {str(each.name): each for each in (activate, deactivate, mount, umount, trim)}
