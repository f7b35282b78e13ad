"""Volumes as block devices and mounts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from thinpool.cli import exits
from thinpool.cli.command import command
from thinpool.cli.commands.volumes import changed
from thinpool.cli.params import MODE, OWNER, POOL, VOLUME

if TYPE_CHECKING:
    from thinpool.cli.session import Session


@command(
    "activate",
    exits={
        exits.BUSY: "it is active writable and was asked for read-only, or in use otherwise",
        exits.NOT_PERMITTED: "not root, or no FUSE or loop devices here",
    },
    examples=[
        ("dev=$(thinpool activate p/c1)", "A block device:"),
        ("thinpool activate p/vm --owner 1000:1000", "One that a user's QEMU may open:"),
        ("thinpool activate p/db --persist", "One that 'thinpool resume' brings back at boot:"),
    ],
)
@click.argument("volume", type=VOLUME, metavar="POOL/NAME")
@click.option("--read-only", is_flag=True, help="A device that cannot be written.")
@click.option("--persist", is_flag=True, help="'thinpool resume' brings it back, at boot.")
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
    examples=[
        ("thinpool deactivate p/c1", "Take the device down:"),
        ("thinpool deactivate p/c1 --deferred", "Or let it go when its last user does:"),
    ],
)
@click.argument("volume", type=VOLUME, metavar="POOL/NAME")
@click.option("--deferred", is_flag=True, help="One that is in use goes when it is closed.")
@click.pass_obj
def deactivate(session: Session, *, volume: str, deferred: bool) -> None:
    """Take a volume's block device down; fine when there is none.

    It does not come back at boot any more, if it was activated with --persist.
    """
    changed(session, session.api.deactivate(volume, deferred=deferred))


@command(
    "resume",
    exits={exits.FAILED: "a volume or a pool could not be brought back; the others were"},
    examples=[
        ("thinpool resume", "At boot, for every pool under the root:"),
        ("thinpool resume p", "For one:"),
    ],
)
@click.argument("pool", type=POOL, required=False)
@click.pass_obj
def resume(session: Session, *, pool: str | None) -> int:
    """Activate again what was activated with --persist.

    What is active already stays as it is. 'thinpool install' makes the host do this at boot.
    """
    found = session.api.resume(pool)
    lines = [f"{each.volume}: {each.device or each.file}" for each in found.activations]
    session.done(found.to_json, lambda: "\n".join(lines))
    if not session.json:
        for failure in found.failures:
            click.echo(f"thinpool resume: {failure.message}", err=True)
    return exits.FAILED if found.failures else exits.DONE


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


COMMANDS: Final = {
    str(each.name): each for each in (activate, deactivate, resume, mount, umount, trim)
}
