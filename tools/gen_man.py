"""Write docs/man from the commands' own definitions; ``--check`` only says what is stale.

A page a command, in section 8, beside thinpool(8). Nothing is written twice: text, options,
defaults, exit codes and examples are those of ``thinpool COMMAND --help``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thinpool import __version__
from thinpool.cli.app import COMMANDS, cli
from thinpool.cli.command import Command, Group
from thinpool.cli.exits import MEANINGS

if TYPE_CHECKING:
    from collections.abc import Iterable

DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "man"

ENVIRONMENT = (
    ("THINPOOL_ROOT", "The root, where --root does not name one."),
    ("THINPOOL_CONFIG", "The file of defaults, instead of /etc/thinpool.toml."),
    ("THINPOOL_RUN", "The run directory, instead of /run/thinpool."),
    ("THINPOOL_LINGER", "Seconds that a pool's server stays after its last use, instead of 30."),
    ("NO_COLOR", "Set to anything: no colours in progress bars."),
)
FILES = (
    ("/var/lib/thinpool", "The root of root; of others, $XDG_DATA_HOME/thinpool."),
    ("/run/thinpool/dev/POOL/NAME", "The block device of an active volume."),
    (
        "/etc/thinpool.toml",
        (
            "Defaults: root and timeout, and a table per command with its options, such as "
            '[create-pool] with block-size = "128K".'
        ),
    ),
)


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when stale")
    check = parser.parse_args().check
    pages = {"thinpool.8": program_page()}
    for name in COMMANDS:
        pages[f"thinpool-{name}.8"] = command_page(name)
    stale = [
        *(DIRECTORY / name for name, page in pages.items() if read(DIRECTORY / name) != page),
        *(path for path in DIRECTORY.glob("*.8") if path.name not in pages),
    ]
    if check:
        for path in stale:
            print(f"{path.name} is stale: run tools/gen_man.py", file=sys.stderr)
        return 1 if stale else 0
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for path in stale:
        if path.name in pages:
            path.write_text(pages[path.name])
        else:
            path.unlink()
    return 0


def read(path: Path) -> str | None:
    """What stands in a file, if it is there."""
    return path.read_text() if path.exists() else None


def program_page() -> str:
    """thinpool(8)."""
    ctx = context(cli, "thinpool")
    title, *paragraphs = paragraphs_of(cli)
    lines = head("thinpool", title)
    lines += [".B thinpool", roff("[OPTIONS] COMMAND [ARGS]..."), ".SH DESCRIPTION"]
    lines += body([title, *paragraphs])
    lines += [".SH COMMANDS"]
    for name in COMMANDS:
        command = cli.get_command(ctx, name)
        if command is None:
            raise LookupError(name)
        lines += item(f"thinpool-{name}(8)", paragraphs_of(command)[0])
    lines += options(cli, ctx)
    lines += [".SH EXIT STATUS", *table((str(code), text) for code, text in MEANINGS.items())]
    lines += [".SH ENVIRONMENT", *table(ENVIRONMENT)]
    lines += [".SH FILES", *table(FILES)]
    lines += [".SH SEE ALSO", ".BR thin_check (8),", ".BR thin_dump (8)"]
    return "\n".join(lines) + "\n"


def command_page(name: str) -> str:
    """The page of a command."""
    ctx = context(cli, "thinpool")
    command = cli.get_command(ctx, name)
    if not isinstance(command, Command):
        raise TypeError(name)
    own = context(command, name, parent=ctx)
    title, *paragraphs = paragraphs_of(command)
    lines = head(f"thinpool-{name}", title)
    usage = " ".join(command.collect_usage_pieces(own))
    lines += [f".B thinpool {roff(name)}", roff(usage), ".SH DESCRIPTION"]
    lines += body([title, *paragraphs])
    lines += options(command, own)
    lines += [".SH EXIT STATUS"]
    lines += table((str(code), command.exits.get(code, text)) for code, text in MEANINGS.items())
    if command.examples:
        lines += [".SH EXAMPLES"]
        for line, text in command.examples:
            lines += [".PP", roff(text), ".PP", ".RS 4", ".nf", f"$ {roff(line)}", ".fi", ".RE"]
    lines += [".SH SEE ALSO", ".BR thinpool (8)"]
    return "\n".join(lines) + "\n"


def context(
    command: click.Command, name: str, parent: click.Context | None = None
) -> click.Context:
    """Where a command's help is written from."""
    return click.Context(command, info_name=name, parent=parent, **command.context_settings)


def head(name: str, title: str) -> list[str]:
    """Title line, name, and the synopsis's heading."""
    return [
        ".\\\" Written by tools/gen_man.py from the commands' definitions.",
        f'.TH {roff(name.upper())} 8 "" "thinpool {__version__}" "thinpool"',
        ".SH NAME",
        f"{roff(name)} \\- {roff(title[0].lower() + title[1:].rstrip('.'))}",
        ".SH SYNOPSIS",
    ]


def paragraphs_of(command: click.Command) -> list[str]:
    """A help text's paragraphs; click's mark stays on those that are set as they stand."""
    text = command.help or ""
    found = [part.strip("\n") for part in text.split("\n\n")]
    return [part if part.startswith("\b") else " ".join(part.split()) for part in found if part]


def body(paragraphs: Iterable[str]) -> list[str]:
    """Paragraphs, the verbatim ones as they stand."""
    lines: list[str] = []
    for part in paragraphs:
        if part.startswith("\b"):
            inner = [roff(line) for line in part.split("\n")[1:]]
            lines += [".PP", ".RS 4", ".nf", *inner, ".fi", ".RE"]
        else:
            lines += [".PP", roff(part)]
    return lines


def options(command: Command | Group, ctx: click.Context) -> list[str]:
    """A command's own options, then those of every command."""
    lines: list[str] = []
    for title, wanted in (("OPTIONS", False), ("GLOBAL OPTIONS", True)):
        lines.append(f".SH {title}")
        for param in command.get_params(ctx):
            if not isinstance(param, click.Option) or (param in command.globals) is not wanted:
                continue
            record = param.get_help_record(ctx)
            if record is not None:
                lines += item(record[0], " ".join(record[1].split()))
    return lines


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Terms with their texts."""
    return [line for term, text in rows for line in item(term, text)]


def item(term: str, text: str) -> list[str]:
    """A term in bold and its text."""
    return [".TP", f".B {roff(term)}", roff(text)]


def roff(text: str) -> str:
    """A text as it may stand on a line of roff."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...")
    escaped = escaped.replace("'", "\\(aq").replace("^", "\\(ha").replace("~", "\\(ti")
    escaped = escaped.replace("`", "\\(ga").replace('"', "\\(dq")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


if __name__ == "__main__":
    sys.exit(main())
