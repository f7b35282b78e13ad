"""Commands whose names are taken: a later version brings them, until then they exit with 9."""

from __future__ import annotations

from typing import Final, NoReturn

import click

from thinpool.cli import exits
from thinpool.cli.command import Command
from thinpool.errors import NotThereYetError


def _later(name: str, *, summary: str, instead: str | None = None) -> Command:
    """A command that takes whatever it will take one day, and does nothing."""

    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS]...")
    def refuse(*, arguments: tuple[str, ...]) -> NoReturn:
        hint = "" if instead is None else f"; {instead}"
        raise NotThereYetError(
            f"{name} is not there yet: a later version brings it{hint}",
            operation=name,
        )

    hint = "" if instead is None else f" Meanwhile {instead}."
    refuse.__doc__ = f"{summary}\n\nNot there yet: exits with {exits.NOT_THERE_YET}.{hint}"
    return click.command(
        name,
        cls=Command,
        exits={exits.NOT_THERE_YET: "always, in this version"},
        context_settings={"ignore_unknown_options": True},
    )(refuse)


COMMANDS: Final = {
    "restore": _later(
        "restore",
        summary="Write a pool's metadata from XML.",
        instead="thin_restore of thin-provisioning-tools reads what dump writes",
    ),
    "repair": _later(
        "repair",
        summary="Write new metadata beside damaged, and swap.",
        instead="thin_repair of thin-provisioning-tools works on the same format",
    ),
}
