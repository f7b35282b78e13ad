"""What the tab key asks: answered from files alone, so that no server is started for it.

Speaks click's protocol between the shell's script and the program: COMP_WORDS and COMP_CWORD in
the environment, a line per proposal on standard output.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from click.shell_completion import ShellComplete, get_completion_class

from thinpool.errors import UsageError
from thinpool.names import parse_pool_name, parse_volume_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PROGRAM: Final = "thinpool"
VARIABLE: Final = "_THINPOOL_COMPLETE"

# The store's copy of a catalogue, written beside the metadata after each change (namescopy.py).
COPY_SUFFIX: Final = ".names.json"
CHANGES_SUFFIX: Final = ".changes"


def script(shell: str) -> str:
    """The script that a shell loads: bash, zsh or fish."""
    found = get_completion_class(shell)
    if found is None:
        raise ValueError(shell)
    # Not found.source(): bash's would first start a bash to ask for its version.
    return ShellComplete.source(found(click.Command(PROGRAM), {}, PROGRAM, VARIABLE))


def answer(cli: click.Command, instruction: str) -> int:
    """Answer the shell; whatever goes wrong proposes nothing and says nothing.

    Args:
        cli: the program.
        instruction: such as ``bash_complete``.

    Returns:
        The exit code.
    """
    shell, _, verb = instruction.partition("_")
    found = get_completion_class(shell)
    if found is None or verb != "complete":
        return 1
    try:
        proposals = found(cli, {}, PROGRAM, VARIABLE).complete()
        sys.stdout.write(proposals + "\n" if proposals else "")
        sys.stdout.flush()
    except Exception:  # noqa: BLE001 - an error's text would land in the middle of a command line
        return 1
    return 0


def pools(ctx: click.Context, incomplete: str) -> list[str]:
    """Names of pools under the root that was typed, or else under the default."""
    try:
        with os.scandir(_pools_directory(ctx)) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []
    return _chosen(names, incomplete, parse_pool_name)


def volumes(ctx: click.Context, incomplete: str) -> list[str]:
    """``POOL/NAME`` of what is in those pools that the word so far may mean."""
    import json

    pool_so_far, slash, _ = incomplete.partition("/")
    found: list[str] = []
    for pool in pools(ctx, pool_so_far):
        if slash and pool != pool_so_far:
            continue
        directory = _pools_directory(ctx) / pool
        copy = directory / f"metadata{COPY_SUFFIX}"
        try:
            if not copy.exists():  # the metadata is a file somewhere else
                metadata = json.loads((directory / "pool.json").read_bytes())["metadata"]
                copy = Path(f"{metadata}{COPY_SUFFIX}")
            names = _names_in(copy)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        valid = _chosen(names, "", parse_volume_name)
        found += [ref for name in valid if (ref := f"{pool}/{name}").startswith(incomplete)]
    return found


def _names_in(copy: Path) -> list[str]:
    """The names of a copy and of the changes since, which begin with the copy they belong to."""
    import json

    document = json.loads(copy.read_bytes())
    listed = enumerate(document["volumes"])
    names = {each.get("id", f"no {number}"): str(each["name"]) for number, each in listed}
    try:
        first, *lines = copy.with_name(copy.name + CHANGES_SUFFIX).read_bytes().splitlines()
        if json.loads(first)["copy"] == document["copy"]:
            for line in map(json.loads, lines):
                names.update((volume["id"], str(volume["name"])) for volume in line["put"])
                for gone in line["drop"]:
                    names.pop(gone, None)
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that is being written
        pass
    return list(names.values())


def _chosen(names: Iterable[str], incomplete: str, parse: Callable[[str], str]) -> list[str]:
    """Those that start with the word so far, without what could be no name."""
    chosen = []
    for name in sorted(names):
        try:
            if name.startswith(incomplete):
                chosen.append(parse(name))
        except UsageError:
            continue
    return chosen


def _pools_directory(ctx: click.Context) -> Path:
    """Where the API looks; not asked of it, because it takes its time to be imported."""
    from thinpool.cli import app, command, settings

    root = command.session_of(ctx).root or os.environ.get("THINPOOL_ROOT")
    if not root:
        try:
            root = settings.load(list(app.COMMANDS)).root
        except UsageError:
            root = None
    if root:
        return Path(root) / "pools"
    if os.geteuid() == 0:
        return Path("/var/lib/thinpool/pools")
    data_home = os.environ.get("XDG_DATA_HOME")
    base = Path(data_home) if data_home else Path.home() / ".local" / "share"
    return base / "thinpool" / "pools"
