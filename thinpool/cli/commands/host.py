"""What thinpool adds to a host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from thinpool.cli import exits
from thinpool.cli.command import command

if TYPE_CHECKING:
    from thinpool.cli.session import Session


@command(
    "install",
    exits={exits.NOT_PERMITTED: "not root"},
    examples=[
        (
            "thinpool install && systemctl enable thinpool-pools.service",
            "Bring volumes back at boot:",
        ),
    ],
)
@click.option(
    "--units",
    type=click.Path(path_type=Path, file_okay=False),
    default="/etc/systemd/system",
    show_default=True,
    metavar="DIR",
    help="Where systemd's units go.",
)
@click.option(
    "--rules",
    type=click.Path(path_type=Path, file_okay=False),
    default="/etc/udev/rules.d",
    show_default=True,
    metavar="DIR",
    help="Where udev's rules go.",
)
@click.pass_obj
def install(session: Session, *, units: Path, rules: Path) -> None:
    """Write systemd units and udev rules, and print their paths.

    The units are for this root. thinpool-pools.service activates at boot what was activated with
    --persist. thinpool@.service is the server of one pool: where it is installed, systemd starts
    servers. The udev rules keep LVM, blkid and udisks from looking into guests' devices.
    """
    written = session.api.install_units(units=units, rules=rules)
    session.answer(lambda: {"schema": 1, "written": written}, lambda: "\n".join(written))


COMMANDS: Final = {str(install.name): install}
