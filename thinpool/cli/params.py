"""The types of the command line's parameters: they read words, and complete them.

A word that cannot be is a thinpool UsageError with attributes, the same that the API raises, and
names the option or argument it was given for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import click
from click.shell_completion import CompletionItem

from thinpool import names, units
from thinpool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable


def _what(param: click.Parameter | None) -> str:
    """How an error names a parameter: ``--size``, ``SIZE``."""
    if isinstance(param, click.Option):
        return max(param.opts, key=len)
    return param.human_readable_name if param is not None else "value"


class SizeType(click.ParamType[units.Bytes]):
    """``64K``, ``10G``, ``1.5T``: bytes."""

    name = "size"

    def __init__(self, *, minimum: int = 1, multiple_of: int = 1) -> None:
        """Take sizes from a minimum on."""
        self._minimum = minimum
        self._multiple_of = multiple_of

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> units.Bytes:
        """Read it; a number is bytes."""
        return units.parse_size(
            str(value), what=_what(param), minimum=self._minimum, multiple_of=self._multiple_of
        )


class BlockSizeType(click.ParamType[units.Bytes]):
    """A pool's data block size."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> units.Bytes:
        """Read it; a number is bytes."""
        return units.parse_block_size(str(value))


class PercentType(click.ParamType[units.Percent]):
    """``10%``."""

    name = "percent"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> units.Percent:
        """Read it."""
        return units.parse_percent(str(value), what=_what(param))


class SecondsType(click.ParamType[float]):
    """A time to wait."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read it."""
        text = str(value).strip()
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
            raise UsageError(
                f"{_what(param)} {text[:40]!r} is not a number of seconds", what=_what(param)
            )
        return float(text)


class PoolType(click.ParamType[str]):
    """``POOL``."""

    name = "pool"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See that it can be one."""
        return names.parse_pool_name(str(value))

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The pools under the root."""
        from thinpool.cli import completion

        return [CompletionItem(name) for name in completion.pools(ctx, incomplete)]


class RefType(click.ParamType[str]):
    """``POOL/NAME``."""

    name = "ref"

    def __init__(self, what: str = "volume") -> None:
        """Say in errors what is named."""
        self._what = what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See that it can be one."""
        return str(names.parse_ref(str(value), what=self._what))

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """What is in the pools under the root."""
        from thinpool.cli import completion

        return [CompletionItem(name) for name in completion.volumes(ctx, incomplete)]


class NewNameType(click.ParamType[str]):
    """The second name of rename: ``NAME``, or ``POOL/NAME`` with the same pool."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See that it can be one."""
        text = str(value)
        if "/" in text:
            return str(names.parse_ref(text))
        return names.parse_volume_name(text)


class OwnerType(click.ParamType[tuple[int, int]]):
    """``UID:GID``."""

    name = "owner"
    _id_max = (1 << 32) - 2  # (uid_t)-1 means "leave it"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Read two numbers."""
        found = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", str(value))
        if found is None or max(int(each) for each in found.groups()) > self._id_max:
            raise UsageError(
                f"{_what(param)} {str(value)[:40]!r} is not UID:GID, two numbers such as 1000:1000",
                what=_what(param),
                value=str(value),
            )
        return int(found[1]), int(found[2])


class ModeType(click.ParamType[int]):
    """``0660``: octal permission bits."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read octal digits."""
        if not re.fullmatch(r"0?[0-7]{3}", str(value)):
            raise UsageError(
                f"{_what(param)} {str(value)[:40]!r} is not a mode of octal digits such as 0660",
                what=_what(param),
                value=str(value),
            )
        return int(str(value), 8)


class KeyValueType(click.ParamType[tuple[str, str]]):
    """``KEY=VALUE``."""

    name = "key=value"

    def __init__(self, keys: dict[str, str]) -> None:
        """Complete the keys that exist; the API refuses the others."""
        self._keys = keys

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Split it."""
        key, equals, rest = str(value).partition("=")
        if not (key and equals and rest):
            raise UsageError(
                f"{str(value)[:80]!r} is not KEY=VALUE: write it like when-full=error",
                what=_what(param),
                value=str(value),
            )
        return key, rest

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The keys, with what they are for."""
        return [
            CompletionItem(f"{key}=", help=text)
            for key, text in self._keys.items()
            if key.startswith(incomplete)
        ]


SIZE: Final = SizeType()
BLOCK_SIZE: Final = BlockSizeType()
PERCENT: Final = PercentType()
SECONDS: Final = SecondsType()
POOL: Final = PoolType()
VOLUME: Final = RefType()
IMAGE: Final = RefType("image")
CONTAINER: Final = RefType("container")
NEW_NAME: Final = NewNameType()
OWNER: Final = OwnerType()
MODE: Final = ModeType()


def unique(what: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A callback that refuses the same key twice, of which one would be lost in silence."""

    def check(ctx: click.Context, param: click.Parameter, pairs: Any) -> Any:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise UsageError(f"{key!r} is given twice", what=what, value=key)
            seen.add(key)
        return pairs

    return check
