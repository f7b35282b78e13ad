"""The front ends that other programs use as servers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from thinpool.cli import exits
from thinpool.cli.command import command
from thinpool.errors import NotThereYetError, UsageError

if TYPE_CHECKING:
    from thinpool.cli.session import Session
    from thinpool.graphdriver.serve import Serving


@command(
    "serve",
    exits={
        exits.BUSY: "another process serves this driver",
        exits.NOT_PERMITTED: "not root, or no FUSE or loop devices here",
        exits.NOT_THERE_YET: "snapshotter",
    },
    examples=[
        ("thinpool serve graphdriver p", "Docker's --storage-driver=thinpool, until SIGTERM:"),
        ("thinpool serve graphdriver p --name fast", "The same under another name:"),
        ("thinpool serve graphdriver p --print-unit", "The unit for /etc/systemd/system:"),
    ],
)
@click.argument("front_end", type=click.Choice(["graphdriver", "snapshotter"]))
@click.argument("pool", metavar="POOL")
@click.option(
    "--name",
    metavar="N",
    help="The driver's name, as in dockerd's --storage-driver; thinpool by default.",
)
@click.option(
    "--socket",
    "path",
    type=click.Path(readable=False, path_type=Path, dir_okay=False),
    metavar="PATH",
    help="Where to listen; /run/docker/plugins/N.sock by default, where dockerd looks.",
)
@click.option(
    "--print-unit",
    is_flag=True,
    help="Print the systemd unit that runs this, ordered before Docker, and end.",
)
@click.pass_obj
def serve(
    session: Session,
    *,
    front_end: str,
    pool: str,
    name: str | None,
    path: Path | None,
    print_unit: bool,
) -> None:
    """Serve a pool to Docker or containerd.

    Until SIGTERM or SIGINT. 'graphdriver' is a graph-driver plugin of Docker up to 27: dockerd
    needs --experimental and --storage-driver=N, and has to be started after it. It may be killed
    and started again at any time: containers go on. It logs to standard error, one line an event.

    'snapshotter', for containerd, is not there yet.
    """
    if front_end == "snapshotter":
        raise NotThereYetError(
            "serve snapshotter is not there yet: a later version brings it",
            operation="serve snapshotter",
        )
    if session.json:
        raise UsageError("serve logs to standard error and takes no --json", what="--json")
    from thinpool.graphdriver import serve as graphdriver

    what = graphdriver.serving(pool, name, path)
    api = session.api
    if print_unit:
        _print_unit(what, api.root)
        return
    if not session.verbosity:
        _log_events()
    graphdriver.serve(
        api, what, ready=lambda: session.note(f"serving {what.pool} on {what.socket}")
    )


def _print_unit(what: Serving, root: Path) -> None:
    from thinpool.graphdriver.serve import serving
    from thinpool.graphdriver.unit import unit

    usual = root == Path("/var/lib/thinpool")
    default = serving(what.pool, what.name, None)
    click.echo(unit(what, root=None if usual else root, default_socket=default.socket), nl=False)


def _log_events() -> None:
    """What a service manager's journal is to have."""
    import logging
    import sys

    logging.basicConfig(
        stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", level=logging.INFO
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)


COMMANDS: Final = {"serve": serve}
