"""Names of pools and of what is in them: ``POOL`` and ``POOL/NAME``.

Letters, digits, ``.``, ``_`` and ``-``, not starting with ``-`` (so that a name is never taken for
an option) or ``.`` (so that it is never hidden, nor ``..``), 128 characters at most. Names become
parts of paths under a root and under the run directory: nothing else may ever build such a path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NewType

from thinpool.errors import UsageError

PoolName = NewType("PoolName", str)
"""A pool's name that was checked."""

VolumeName = NewType("VolumeName", str)
"""The checked name of a volume, image, container or base within its pool."""

NAME_MAX: Final = 128

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_OUTSIDE = re.compile(r"[^A-Za-z0-9._-]")
_SHOWN_MAX = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeRef:
    """``POOL/NAME``."""

    pool: PoolName
    name: VolumeName

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.pool}/{self.name}"


def parse_pool_name(text: str) -> PoolName:
    """See that a text can name a pool.

    Raises:
        UsageError: ``what`` and ``value``; the text says which rule is broken.
    """
    if "/" in text:
        raise UsageError(
            f"{_shown(text)} is not the name of a pool: a pool is named POOL, "
            "and POOL/NAME is something in it",
            what="pool name",
            value=text,
        )
    return PoolName(_checked(text, what="pool name"))


def parse_volume_name(text: str) -> VolumeName:
    """See that a text can be the NAME of POOL/NAME.

    Raises:
        UsageError: ``what`` and ``value``; the text says which rule is broken.
    """
    return VolumeName(_checked(text, what="volume name"))


def parse_ref(text: str, *, what: str = "volume") -> VolumeRef:
    """Read ``POOL/NAME``.

    Args:
        text: what was typed.
        what: what is named, for the error's text: volume, image, container.

    Raises:
        UsageError: ``what`` and ``value``; the text says which rule is broken.
    """
    pool, slash, name = text.partition("/")
    if not slash:
        raise UsageError(
            f"{_shown(text)} does not name a {what}: write POOL/NAME", what=what, value=text
        )
    if "/" in name:
        raise UsageError(
            f"{_shown(text)} has more than one '/': a {what} is named POOL/NAME",
            what=what,
            value=text,
        )
    return VolumeRef(pool=parse_pool_name(pool), name=parse_volume_name(name))


def same_pool(first: VolumeRef, second: VolumeRef) -> PoolName:
    """The pool of two references that have to be in one.

    Raises:
        UsageError: ``what`` and ``value``.
    """
    if first.pool != second.pool:
        raise UsageError(
            f"{first} and {second} are in different pools: blocks are shared within one pool only",
            what="pool",
            value=second.pool,
        )
    return first.pool


def _checked(text: str, *, what: str) -> str:
    if len(text) <= NAME_MAX and _NAME.fullmatch(text):
        return text
    if not text:
        raise UsageError(f"the {what} is empty", what=what, value=text)
    if len(text) > NAME_MAX:
        raise UsageError(
            f"{what} {_shown(text)} has {len(text)} characters: at most {NAME_MAX}",
            what=what,
            value=text,
        )
    outside = _OUTSIDE.search(text)
    if outside:
        raise UsageError(
            f"{what} {_shown(text)} contains {outside.group()!r}: "
            "use letters (A-Z, a-z), digits, '.', '_' and '-'",
            what=what,
            value=text,
        )
    raise UsageError(f"{what} {_shown(text)} starts with {text[0]!r}", what=what, value=text)


def _shown(text: str) -> str:
    """A caller's text as it may stand in a message of one line."""
    return repr(text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "…")
