"""Images: import, commit, compare, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import click

from thinpool.cli import exits
from thinpool.cli.command import command
from thinpool.cli.commands.volumes import made
from thinpool.cli.params import CONTAINER, IMAGE, SIZE, VOLUME
from thinpool.cli.session import Session, printable
from thinpool.errors import UsageError


@command(
    "import",
    exits={
        exits.EXISTS: "the name is taken by something else; the error carries it",
        exits.NO_SPACE: "the pool or the image's filesystem is full: see --size",
        exits.CORRUPT: "the archive is cut short, a digest is wrong, or a member tries to escape",
    },
    examples=[
        ("docker save debian:12 | thinpool import p/debian -", "An image from Docker:"),
        ("thinpool import p/app app.oci.tar --ref v2 --platform linux/arm64", "One of several:"),
        ("thinpool import p/rootfs ./rootfs --size 20G", "A directory, into a larger image:"),
        ("thinpool import p/site site.tar.zst --parent p/debian", "A tar as a layer on an image:"),
    ],
)
@click.argument("image", type=IMAGE, metavar="POOL/IMAGE")
@click.argument("source", type=click.Path(readable=False, allow_dash=True), metavar="SOURCE")
@click.option(
    "--parent", type=IMAGE, metavar="POOL/IMAGE", help="The lowest layer is a snapshot of it."
)
@click.option("--size", type=SIZE, help="Of the image, at least the parent's; that by default.")
@click.option("--ref", metavar="TAG", help="Which image of an archive that holds several.")
@click.option("--platform", metavar="P", help="Likewise: linux/amd64, linux/arm64/v8, …")
@click.pass_obj
def import_(
    session: Session,
    *,
    image: str,
    source: str,
    parent: str | None,
    size: int | None,
    ref: str | None,
    platform: str | None,
) -> None:
    """Import an image from an archive or a directory.

    Each layer becomes a snapshot of the one below it.

    SOURCE is a tar (plain, gzip or zstd), a directory, an archive of 'docker save' or in OCI
    layout, or '-' for one of the archives on standard input. Layers that are there already, by
    chain id, are used again. The image is the top one, read-only. Digests are verified, and no
    member of an archive can touch anything outside the image.
    """
    if source == "-" and sys.stdin.isatty():
        raise UsageError(
            "SOURCE is '-', and standard input is a terminal: redirect an archive to it",
            what="SOURCE",
        )
    notes: list[str] = []
    with session.progress() as progress:
        volume = session.api.import_image(
            image,
            source if source == "-" else Path(source),
            parent=parent,
            size=size,
            ref=ref,
            platform=platform,
            progress=progress,
            note=notes.append,
        )
    made(session, volume)
    for note in notes:
        session.note(f"left out: {printable(note)}")


@command(
    "commit",
    exits={exits.EXISTS: "the image's name is taken; the error carries who has it"},
    examples=[("thinpool commit p/c1 p/app-v2", "Make an image of what a container holds now:")],
)
@click.argument("container", type=CONTAINER, metavar="POOL/CONTAINER")
@click.argument("image", type=IMAGE, metavar="POOL/IMAGE")
@click.pass_obj
def commit(session: Session, *, container: str, image: str) -> None:
    """Make an image of a container: a read-only snapshot of it."""
    made(session, session.api.commit(container, image))


@command(
    "diff",
    examples=[("thinpool diff p/debian p/c1", "What a container changed:")],
)
@click.argument("first", type=VOLUME, metavar="POOL/A")
@click.argument("second", type=VOLUME, metavar="POOL/B")
@click.pass_obj
def diff(session: Session, *, first: str, second: str) -> None:
    """Show which files differ from the first volume to the second.

    A line per path: A for added, M for modified, D for deleted. Characters that are not printable
    show as escapes; JSON has them as they are.
    """
    with session.progress() as progress:
        changes = session.api.diff(first, second, progress=progress)
    letters = {"added": "A", "modified": "M", "deleted": "D"}
    session.answer(
        lambda: {
            "schema": 1,
            "left": first,
            "right": second,
            "changes": [change.to_json() for change in changes],
        },
        lambda: "\n".join(
            f"{letters.get(change.change, '?')} /{printable(change.path)}" for change in changes
        ),
    )


@command(
    "export",
    exits={exits.USAGE: "a tar would go to a terminal, or a stream was asked for as JSON"},
    examples=[
        ("thinpool export p/c1 -o c1.tar", "A container's files:"),
        ("thinpool export p/c1 | zstd > c1.tar.zst", "The same, compressed:"),
        ("thinpool export p/c1 --raw -o c1.img", "The device, sparse:"),
    ],
)
@click.argument("volume", type=VOLUME, metavar="POOL/NAME")
@click.option(
    "-o",
    "output",
    type=click.Path(readable=False, dir_okay=False, allow_dash=True),
    default="-",
    metavar="FILE",
    help="Where to; '-', the default, is standard output.",
)
@click.option("--raw", is_flag=True, help="The device instead of a tar; sparse in a file.")
@click.pass_obj
def export(session: Session, *, volume: str, output: str, raw: bool) -> None:
    """Write a volume's filesystem as a tar, or the device itself.

    What is exported is a snapshot, so the volume may be in use. With -o FILE the answer can be
    JSON; on standard output the stream is the answer.
    """
    if output == "-":
        session.refuse_json("export without -o FILE")
        session.refuse_terminal("a device" if raw else "a tar")
        sys.stdout.flush()
        with session.progress() as progress:
            session.api.export(volume, sys.stdout.buffer, raw=raw, progress=progress)
        return
    from thinpool.units import format_size

    with session.progress() as progress:
        exported = session.api.export(volume, Path(output), raw=raw, progress=progress)
    session.done(
        exported.to_json, lambda: f"{exported.volume}: {format_size(exported.written)} to {output}"
    )


COMMANDS: Final = {str(each.name): each for each in (import_, commit, diff, export)}
