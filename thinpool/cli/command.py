"""What every command has in common: global options on both sides, help that is the man page.

A command is declared once, with its examples and what its exit codes mean where that is its own;
``--help`` and the manual pages are both written from that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from thinpool.cli import settings
from thinpool.cli.params import SECONDS
from thinpool.cli.session import Session
from thinpool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Examples = Sequence[tuple[str, str]]

HELP_WIDTH: Final = 96


def session_of(ctx: click.Context) -> Session:
    """The session of this run."""
    found = ctx.find_object(Session)
    if found is None:  # completion parses without one
        found = ctx.find_root().obj = Session()
    return found


# ---- global options -----------------------------------------------------------------------


def _set(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep a global option where it was typed; its default never undoes what stood before."""
    if param.name is None or ctx.get_parameter_source(param.name) != ParameterSource.COMMANDLINE:
        return
    session = session_of(ctx)
    if param.name == "json_":
        session.json = True
    elif param.name == "verbose":
        session.verbosity += value
    elif param.name == "quiet":
        session.quiet = True
    elif param.name == "root":
        if not value:
            raise UsageError("--root is empty", what="--root")
        session.root = value
    elif param.name == "timeout":
        session.timeout = value
    if session.quiet and session.verbosity:
        raise UsageError("-v and --quiet exclude each other", what="--quiet")


def global_options() -> list[click.Option]:
    """Fresh ones, for one command."""
    common: dict[str, Any] = {"expose_value": False, "callback": _set}
    return [
        click.Option(
            ["--root"],
            metavar="DIR",
            type=click.Path(readable=False, file_okay=False),
            help="Where the pools are: else $THINPOOL_ROOT, else /var/lib/thinpool for root, "
            "$XDG_DATA_HOME/thinpool for others.",
            **common,
        ),
        click.Option(
            ["--json", "json_"],
            is_flag=True,
            help="Answer with one JSON document; sizes are bytes.",
            **common,
        ),
        click.Option(
            ["--timeout"],
            metavar="S",
            type=SECONDS,
            help="Seconds to wait for a lock before exit code 5 (30).",
            **common,
        ),
        click.Option(
            ["-v", "--verbose"],
            count=True,
            help="Say on standard error what is done; twice for more.",
            **common,
        ),
        click.Option(
            ["--quiet"],
            is_flag=True,
            help="No confirmations, no warnings, no progress bars.",
            **common,
        ),
    ]


class _GlobalOptions(click.Command):
    """A command that takes the global options too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Add them behind its own."""
        super().__init__(*args, **kwargs)
        self.globals: Final = global_options()
        self.params.extend(self.globals)

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Help is wrapped for reading, whatever the terminal."""
        extra.setdefault("max_content_width", HELP_WIDTH)
        return super().make_context(info_name, args, parent, **extra)

    def write_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Its own options first, those of every command after them."""
        for title, wanted in (("Options", False), ("Global options", True)):
            records = [
                record
                for param in self.get_params(ctx)
                if isinstance(param, click.Option)
                and (param in self.globals) is wanted
                and (record := param.get_help_record(ctx)) is not None
            ]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


# ---- commands -----------------------------------------------------------------------------


class Command(_GlobalOptions):
    """One command.

    Attributes:
        examples: command lines, each with what it does.
        exits: what an exit code means for this command, where the table does not say it all.
    """

    def __init__(
        self,
        *args: Any,
        examples: Examples = (),
        exits: Mapping[int, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what help is written from."""
        super().__init__(*args, **kwargs)
        self.examples: Final = tuple(examples)
        self.exits: Final = dict(exits or {})

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options, then exit codes and examples."""
        self.write_options(ctx, formatter)
        if self.exits:
            with formatter.section("Exit codes (all are in 'thinpool --help')"):
                formatter.write_dl([(str(code), text) for code, text in self.exits.items()])
        if self.examples:
            with formatter.section("Examples"):
                for line, text in self.examples:
                    formatter.write_text(text)
                    formatter.write(f"{'':>{formatter.current_indent + 2}}$ {line}\n")

    def own_options(self) -> dict[str, click.Option]:
        """Options by their names without dashes, of those that a file of defaults may set."""
        return {
            each.lstrip("-"): param
            for param in self.params
            if isinstance(param, click.Option) and param not in self.globals
            for each in param.opts
            if each.startswith("--") and each != "--help"
        }


def command(
    name: str, *, examples: Examples = (), exits: Mapping[int, str] | None = None, **kwargs: Any
) -> Callable[[Callable[..., Any]], Command]:
    """Declare a command; the function's docstring is its help."""

    def declare(function: Callable[..., Any]) -> Command:
        return click.command(name, cls=Command, examples=examples, exits=exits, **kwargs)(function)

    return declare


class Group(_GlobalOptions, click.Group):
    """The commands, each imported when it is used.

    Attributes:
        table: the module of each command, in the order of the help.
    """

    def __init__(self, *args: Any, table: Mapping[str, str], **kwargs: Any) -> None:
        """Take the table of commands."""
        super().__init__(*args, **kwargs)
        self.table: Final = dict(table)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table: as one meets them."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module that has it."""
        module = self.table.get(cmd_name)
        if module is None:
            return None
        found = importlib.import_module(module).COMMANDS[cmd_name]
        if not isinstance(found, click.Command):
            raise TypeError(f"{module}: {cmd_name} is no command")
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, with its defaults from the file; a typing error gets a proposal."""
        if not ctx.resilient_parsing and args and not args[0].startswith("-"):
            self._known(args[0])
        name, found, rest = super().resolve_command(ctx, args)
        if isinstance(found, Command) and name is not None and not ctx.resilient_parsing:
            session = session_of(ctx)
            session.settings = session.settings or settings.load(list(self.table))
            defaults = session.settings.for_command(name, found.own_options())
            ctx.default_map = {name: defaults}
        return name, found, rest

    def _known(self, name: str) -> None:
        if name in self.table:
            return
        from difflib import get_close_matches

        near = get_close_matches(name, self.table, n=2)
        hint = f": did you mean {' or '.join(near)}?" if near else ": see thinpool --help"
        raise UsageError(f"there is no command {name[:40]!r}{hint}", what="command", value=name)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Commands, options, exit codes."""
        from thinpool.cli.exits import MEANINGS

        self.format_commands(ctx, formatter)
        self.write_options(ctx, formatter)
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in MEANINGS.items()])
