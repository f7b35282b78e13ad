"""Defaults from ``/etc/thinpool.toml``.

``root`` and ``timeout`` at the top; a table per command with its options, named as on the command
line without the dashes::

    root = "/srv/thinpool"
    timeout = 60

    [create-pool]
    block-size = "128K"
    base-size = "20G"

What is given on the command line or in the environment wins. ``$THINPOOL_CONFIG`` names another
file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from thinpool.errors import UsageError

if TYPE_CHECKING:
    import click

DEFAULT_PATH: Final = "/etc/thinpool.toml"


class Settings:
    """What the file says; empty where there is none.

    Attributes:
        path: of the file.
        root: of the pools, or None.
        timeout: seconds, or None.
    """

    def __init__(self, path: Path, data: dict[str, Any], commands: list[str]) -> None:
        """See that the file says nothing that would be passed over in silence.

        Raises:
            UsageError: ``path`` and ``what``: a key that does not exist or has no such value.
        """
        self.path: Final = path
        self.root: str | None = None
        self.timeout: float | None = None
        self._tables: dict[str, dict[str, Any]] = {}
        for key, value in data.items():
            if key == "root":
                if not isinstance(value, str) or not value:
                    raise self._wrong(key, "has to be a path in quotes")
                self.root = value
            elif key == "timeout":
                if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                    raise self._wrong(key, "has to be a number of seconds")
                self.timeout = float(value)
            elif key in commands:
                if not isinstance(value, dict):
                    raise self._wrong(key, f"has to be a table: [{key}]")
                self._tables[key] = value
            else:
                raise self._wrong(key, "is neither root, timeout nor a command")

    def for_command(self, name: str, options: dict[str, click.Option]) -> dict[str, Any]:
        """A command's defaults by parameter.

        Args:
            name: of the command.
            options: its options, by their names without dashes in front.

        Raises:
            UsageError: ``path`` and ``what``: the command has no such option, or not of that type.
        """
        defaults: dict[str, Any] = {}
        for key, value in self._tables.get(name, {}).items():
            option = options.get(key)
            if option is None or option.name is None:
                raise self._wrong(f"[{name}] {key}", f"is not an option of {name}")
            defaults[option.name] = self._value(option, value, f"[{name}] {key}")
        return defaults

    def _value(self, option: click.Option, value: object, what: str) -> object:
        """A value as if it had been typed; lists only where an option may be given again."""
        if option.is_flag:
            if not isinstance(value, bool):
                raise self._wrong(what, "has to be true or false")
            return value
        if option.multiple and isinstance(value, list):
            return [self._text(each, what) for each in value]
        text = self._text(value, what)
        return [text] if option.multiple else text

    def _text(self, value: object, what: str) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self._wrong(what, "has to be a text or a number")
        return str(value)

    def _wrong(self, what: str, why: str) -> UsageError:
        return UsageError(f"{self.path}: {what!r} {why}", path=str(self.path), what=what)


def load(commands: list[str]) -> Settings:
    """Read the file of defaults, if there is one.

    Args:
        commands: the names that tables may have.

    Raises:
        UsageError: it is not TOML, or says what cannot be.
    """
    path = Path(os.environ.get("THINPOOL_CONFIG") or DEFAULT_PATH)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return Settings(path, {}, commands)
    import tomllib

    try:
        data = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}", path=str(path), what="toml") from error
    return Settings(path, data, commands)
