"""Looking after pools: check, dump, doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from thinpool.cli import exits
from thinpool.cli.command import command
from thinpool.cli.params import POOL
from thinpool.errors import UsageError

if TYPE_CHECKING:
    from thinpool.cli.session import Session

_METADATA = click.option(
    "--metadata",
    type=click.Path(readable=False, path_type=Path),
    metavar="FILE",
    help="A bare metadata device or file instead of a pool.",
)


def _one_of(pool: str | None, metadata: Path | None, name: str) -> str:
    """The pool or the file, as a subject.

    Raises:
        UsageError: neither or both were given.
    """
    if pool is not None and metadata is None:
        return pool
    if pool is None and metadata is not None:
        return str(metadata)
    raise UsageError(f"{name} takes a POOL or --metadata FILE, one of them", what="POOL")


@command(
    "check",
    exits={
        exits.DONE: "clean; there may be notes",
        exits.CORRUPT: "a fault is fatal or a leak; the whole report is printed all the same",
    },
    examples=[
        ("thinpool check p", "A pool, in use or not:"),
        ("thinpool check --metadata /dev/vg/pool_tmeta", "A metadata device that nothing uses:"),
    ],
)
@click.argument("pool", type=POOL, required=False)
@_METADATA
@click.pass_obj
def check(session: Session, *, pool: str | None, metadata: Path | None) -> int:
    """Check a pool's metadata: every tree, every count. Reads only.

    A live pool is checked through a metadata snapshot. Every fault is named and located, a line
    each: its severity, where it is, what is wrong, its type. Severities: fatal (the metadata is
    wrong), leak (space that nothing refers to), note (harms nobody). The last line is the verdict.
    """
    from thinpool.cli import text

    subject = _one_of(pool, metadata, "check")
    with session.progress() as progress:
        report = session.api.check(pool, metadata=metadata, progress=progress)
    session.answer(report.to_json, lambda: text.check_lines(report, subject=subject))
    return exits.DONE if report.clean else exits.CORRUPT


@command(
    "dump",
    examples=[
        ("thinpool dump p > p.xml", "A pool, in use or not:"),
        ("thinpool dump --metadata meta.img | grep '<device'", "A metadata file's devices:"),
    ],
)
@click.argument("pool", type=POOL, required=False)
@_METADATA
@click.pass_obj
def dump(session: Session, *, pool: str | None, metadata: Path | None) -> None:
    """Write a pool's metadata as XML to standard output.

    The XML is that of thin-provisioning-tools: thin_restore reads it. A live pool is read through
    a metadata snapshot.
    """
    _one_of(pool, metadata, "dump")
    session.refuse_json("dump")
    sys.stdout.flush()
    session.api.dump(pool, sys.stdout.buffer, metadata=metadata)


@command(
    "doctor",
    exits={exits.CORRUPT: "something is wrong with a pool; what the host lacks does not count"},
    examples=[
        ("thinpool doctor", "What this host can do, and every pool:"),
        ("thinpool doctor p", "One pool:"),
    ],
)
@click.argument("pool", type=POOL, required=False)
@click.pass_obj
def doctor(session: Session, *, pool: str | None) -> int:
    """Say what this host can do, and what is wrong with a pool.

    And which command mends it, where there is one. Looks at device-mapper, FUSE, loop devices and
    udev, then at each pool. A line per finding: ok, note, missing (this host lacks it) or wrong;
    the command that mends it stands below.
    """
    from thinpool.cli import text

    report = session.api.doctor(pool)
    session.answer(report.to_json, lambda: text.doctor_lines(report))
    return exits.DONE if report.healthy else exits.CORRUPT


COMMANDS: Final = {str(each.name): each for each in (check, dump, doctor)}
