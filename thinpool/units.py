"""Bytes and percents as people write them, and as they read them.

Everything above the disk counts in bytes. Sizes are written ``64K``, ``10G``, ``1.5T`` (powers of
1024, also ``64KiB``) and printed in KiB, MiB, GiB; JSON carries plain integers. A fraction is
accepted where it makes whole bytes, so that nothing is ever rounded behind anybody's back.

Knows nothing of pools but the limits of the on-disk format, which callers name as ranges.
"""

from __future__ import annotations

import re
from typing import Final, NewType

from thinpool.errors import UsageError

Bytes = NewType("Bytes", int)
"""A count of bytes, never negative."""

Percent = NewType("Percent", float)
"""0 to 100."""

SECTOR: Final = Bytes(512)
KIB: Final = Bytes(1 << 10)
MIB: Final = Bytes(1 << 20)
GIB: Final = Bytes(1 << 30)
TIB: Final = Bytes(1 << 40)

# Limits of dm-thin (Documentation/admin-guide/device-mapper/thin-provisioning.rst).
BLOCK_SIZE_MIN: Final = Bytes(64 << 10)
BLOCK_SIZE_MAX: Final = Bytes(1 << 30)
BLOCK_SIZE_STEP: Final = Bytes(64 << 10)
BLOCK_SIZE_DEFAULT: Final = Bytes(64 << 10)

# What a file offset can hold (loff_t), in whole sectors.
SIZE_MAX: Final = Bytes((1 << 63) - 512)

_PREFIXES: Final = "KMGTPE"
_SIZE = re.compile(r"(?P<whole>[0-9]+)(?:\.(?P<fraction>[0-9]+))?(?P<unit>[A-Za-z]*)")
_PERCENT = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)%?")
# Longer than any number in range, and short enough that int() cannot be made to work for long.
_TEXT_MAX = 40

_WRITTEN = "write it like 64K, 1.5G or 65536 (powers of 1024)"


def parse_size(
    text: str,
    *,
    what: str = "size",
    minimum: int = 0,
    maximum: int = SIZE_MAX,
    multiple_of: int = 1,
) -> Bytes:
    """Read a size such as ``64K``, ``10G``, ``1.5GiB`` or ``65536``.

    Args:
        text: digits, perhaps a fraction, perhaps one of B K M G T P E or KiB … EiB, in any case.
        what: what the size is of, for the error's text.
        minimum: the least that is accepted, in bytes.
        maximum: the most that is accepted, in bytes.
        multiple_of: bytes that the size has to be a multiple of.

    Raises:
        UsageError: ``what``, ``value``, and ``minimum``, ``maximum`` or ``multiple_of``.
    """
    stripped = text.strip()
    found = _SIZE.fullmatch(stripped) if len(stripped) <= _TEXT_MAX else None
    if found is None:
        if stripped.startswith("-") and _SIZE.fullmatch(stripped[1:]):
            raise UsageError(f"{what} {_shown(text)} is negative", what=what, value=text)
        raise UsageError(f"{what} {_shown(text)} is not a size: {_WRITTEN}", what=what, value=text)
    fraction = found["fraction"] or ""
    scaled = int(found["whole"] + fraction) * _factor(found["unit"], text=text, what=what)
    value, rest = divmod(scaled, 10 ** len(fraction))
    if rest:
        raise UsageError(
            f"{what} {_shown(text)} is not a whole number of bytes: write it in a smaller unit",
            what=what,
            value=text,
        )
    return check_size(value, what=what, minimum=minimum, maximum=maximum, multiple_of=multiple_of)


def check_size(
    value: int,
    *,
    what: str = "size",
    minimum: int = 0,
    maximum: int = SIZE_MAX,
    multiple_of: int = 1,
) -> Bytes:
    """See that a number of bytes is in range and a multiple of what it has to be one of.

    Raises:
        UsageError: as :func:`parse_size`.
    """
    if value < minimum:
        raise UsageError(
            f"{what} {format_exact(value)} is too small: at least {format_exact(minimum)}",
            what=what,
            value=value,
            minimum=minimum,
        )
    if value > maximum:
        raise UsageError(
            f"{what} {format_exact(value)} is too large: at most {format_exact(maximum)}",
            what=what,
            value=value,
            maximum=maximum,
        )
    if value % multiple_of:
        below = value - value % multiple_of
        above = below + multiple_of
        near = [size for size in (below, above) if minimum <= size <= maximum and size > 0]
        next_ones = " and ".join(format_exact(size) for size in near)
        raise UsageError(
            f"{what} {format_exact(value)} is not a multiple of {format_exact(multiple_of)}"
            f": the next are {next_ones}",
            what=what,
            value=value,
            multiple_of=multiple_of,
        )
    return Bytes(value)


def parse_block_size(text: str) -> Bytes:
    """Read a pool's data block size: 64 KiB to 1 GiB in steps of 64 KiB.

    Raises:
        UsageError: as :func:`parse_size`.
    """
    return parse_size(
        text,
        what="block size",
        minimum=BLOCK_SIZE_MIN,
        maximum=BLOCK_SIZE_MAX,
        multiple_of=BLOCK_SIZE_STEP,
    )


def check_block_size(value: int) -> Bytes:
    """See that a number of bytes can be a pool's data block size.

    Raises:
        UsageError: as :func:`parse_size`.
    """
    return check_size(
        value,
        what="block size",
        minimum=BLOCK_SIZE_MIN,
        maximum=BLOCK_SIZE_MAX,
        multiple_of=BLOCK_SIZE_STEP,
    )


def parse_percent(text: str, *, what: str = "percentage", maximum: float = 100) -> Percent:
    """Read ``10%``, ``12.5%`` or ``10``.

    Raises:
        UsageError: ``what``, ``value``, and ``maximum`` where it is above that.
    """
    stripped = text.strip()
    found = _PERCENT.fullmatch(stripped) if len(stripped) <= _TEXT_MAX else None
    if found is None:
        raise UsageError(
            f"{what} {_shown(text)} is not a percentage: write it like 10% or 12.5%",
            what=what,
            value=text,
        )
    value = float(found["number"])
    if value > maximum:
        raise UsageError(
            f"{what} {_shown(text)} is too large: at most {maximum:g}%",
            what=what,
            value=text,
            maximum=maximum,
        )
    return Percent(value)


def format_size(value: int) -> str:
    """Print a size for people: ``0 B``, ``64 KiB``, ``1.5 GiB``; one decimal, none if exact.

    A value just under a unit stays under it: 1048575 bytes is ``1023.9 KiB``, because a pool with
    one byte missing is not full.
    """
    magnitude = abs(value)
    sign = "-" if value < 0 else ""
    if magnitude < KIB:
        return f"{value} B"
    power = min((magnitude.bit_length() - 1) // 10, len(_PREFIXES))
    unit = 1 << (10 * power)
    whole, rest = divmod(magnitude, unit)
    tenths = rest * 10 // unit
    number = f"{whole}" if rest == 0 else f"{whole}.{tenths}"
    return f"{sign}{number} {_PREFIXES[power - 1]}iB"


def format_exact(value: int) -> str:
    """Print a size so that it can be typed again: ``64K``, ``10G``, or plain bytes."""
    magnitude = abs(value)
    if magnitude < KIB or magnitude % KIB:
        return f"{value} bytes" if magnitude != 1 else f"{value} byte"
    power = 1
    while power < len(_PREFIXES) and magnitude % (1 << (10 * (power + 1))) == 0:
        power += 1
    return f"{value >> (10 * power)}{_PREFIXES[power - 1]}"


def format_percent(part: int, whole: int) -> str:
    """Print a share for people; 100% only when all of it is used, 0% only when nothing is."""
    if whole <= 0 or part <= 0:
        return "0%"
    if part >= whole:
        return f"{part * 100 // whole}%"
    return f"{min(max(part * 1000 // whole, 1), 999) / 10:.1f}%"


def _factor(unit: str, *, text: str, what: str) -> int:
    """How many bytes one of a unit is."""
    upper = unit.upper()
    if upper in ("", "B"):
        return 1
    prefix, rest = upper[0], upper[1:]
    if prefix not in _PREFIXES or rest not in ("", "IB", "B"):
        raise UsageError(
            f"{what} {_shown(text)} has the unknown unit {_shown(unit)}: {_WRITTEN}",
            what=what,
            value=text,
        )
    if rest == "B":
        raise UsageError(
            f"{what} {_shown(text)} could mean powers of 1000: "
            f"write {prefix} or {prefix}iB for powers of 1024",
            what=what,
            value=text,
        )
    return 1 << (10 * (_PREFIXES.index(prefix) + 1))


def _shown(text: str) -> str:
    """A caller's text as it may stand in a message of one line."""
    return repr(text if len(text) <= _TEXT_MAX else text[:_TEXT_MAX] + "…")
