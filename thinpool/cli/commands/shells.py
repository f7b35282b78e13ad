"""The completion scripts of shells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from thinpool.cli.command import command

if TYPE_CHECKING:
    from thinpool.cli.session import Session


@command(
    "completion",
    examples=[
        ('eval "$(thinpool completion bash)"', "In ~/.bashrc; for zsh likewise in ~/.zshrc:"),
        (
            "thinpool completion fish > ~/.config/fish/completions/thinpool.fish",
            "Once, for fish:",
        ),
    ],
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_obj
def completion(session: Session, *, shell: str) -> None:
    """Print a shell's completion script.

    It completes commands, options, pools and volumes.

    At the tab key no server is started and nothing waits: names come from what each pool keeps
    beside it.
    """
    from thinpool.cli.completion import script

    session.refuse_json("completion")
    session.write(script(shell))


COMMANDS: Final = {str(completion.name): completion}
