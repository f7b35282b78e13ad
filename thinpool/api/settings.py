"""KEY=VALUE settings of a pool, as fields of its pool.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from thinpool import errors
from thinpool.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ENGINE: Final = "engine"
"""Not of the running pool: the server ends, and the next one is the other engine's."""

_PERCENT: Final = 100.0


def parse_settings(settings: Mapping[str, str], *, total: Callable[[], int]) -> dict[str, Any]:
    """Read settings.

    Args:
        settings: text by key.
        total: bytes of the pool's data, asked for where a percent of it is meant.

    Raises:
        UsageError: an unknown key, or a value that cannot be.
    """
    values: dict[str, Any] = {}
    for key, text in settings.items():
        match key:
            case "when-full":
                if text not in {"queue", "error"}:
                    raise errors.UsageError(
                        f"when-full is queue or error, not {text}", what=key, value=text
                    )
                values["when_full"] = text
            case "min-free" | "autoextend-threshold" | "autoextend-percent":
                values[key.replace("-", "_")] = _percent(key, text)
            case "low-water":
                if text.endswith("%"):
                    values["low_water"] = int(total() * _percent(key, text) / _PERCENT)
                else:
                    values["low_water"] = int(parse_size(text))
            case _:
                raise errors.UsageError(
                    f"there is no setting {key}: there are when-full, min-free, low-water, "
                    "autoextend-threshold, autoextend-percent and engine",
                    what="setting",
                    value=key,
                )
    return values


def _percent(key: str, text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= _PERCENT:
        raise errors.UsageError(
            f"{key} is a percent from 0 to 100, not {text}", what=key, value=text
        )
    return value
