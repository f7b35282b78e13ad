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
from typing import Any, Final

from thinpool.errors import UsageError

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

    def for_command(self, name: str, options: dict[str, str]) -> dict[str, Any]:
        """A command's defaults by parameter.

        Args:
            name: of the command.
            options: parameter by option, without dashes in front.

        Raises:
            UsageError: ``path`` and ``what``: the command has no such option.
        """
        defaults: dict[str, Any] = {}
        for key, value in self._tables.get(name, {}).items():
            if key not in options:
                raise self._wrong(f"[{name}] {key}", f"is not an option of {name}")
            defaults[options[key]] = value
        return defaults

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
