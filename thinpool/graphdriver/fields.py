"""Requests of the graph-driver protocol, read field by field. Trusts nothing."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from thinpool import errors
from thinpool.names import parse_volume_name
from thinpool.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping

_DOCKER_SIZE: Final = re.compile(r"(?P<number>[0-9.]+)\s*(?P<unit>[kmgtp])i?b?", re.IGNORECASE)
_SIZE_MIN: Final = 1 << 20


def parse_document(body: bytes) -> Fields:
    """The fields of a request's body; an empty one has none.

    Raises:
        UsageError: no JSON object.
    """
    if not body.strip():
        return Fields({})
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as cause:
        raise errors.UsageError(f"the request is not JSON: {cause}"[:200], what="request") from None
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise errors.UsageError("the request is no JSON object", what="request")
    return Fields(document)


class Fields:
    """What a request carries."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        """Fields by name, of whatever type."""
        self._document = document

    def _of(self, name: str, kind: type, what: str) -> Any:  # noqa: ANN401 - JSON
        value = self._document.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise errors.UsageError(f"{name} is no {what}", what=name)
        return value

    def id(self, name: str = "ID") -> str:
        """A layer's id that has to be there.

        Raises:
            UsageError: it is missing, or cannot be an id.
        """
        value = self.optional_id(name)
        if value is None:
            raise errors.UsageError(f"{name} is missing", what=name)
        return value

    def optional_id(self, name: str) -> str | None:
        """A layer's id; None where it is missing or empty."""
        value = self._of(name, str, "text")
        return parse_id(value) if value else None

    def text(self, name: str) -> str:
        """A text; empty where it is missing."""
        return self._of(name, str, "text") or ""

    def texts(self, name: str) -> list[str]:
        """A list of texts; empty where it is missing."""
        value = self._of(name, list, "list") or []
        if not all(isinstance(each, str) for each in value):
            raise errors.UsageError(f"{name} is no list of texts", what=name)
        return list(value)

    def entries(self, name: str) -> list[Any]:
        """A list of anything; empty where it is missing."""
        return list(self._of(name, list, "list") or [])

    def size(self) -> int | None:
        """``StorageOpt``'s size in bytes, or none.

        Raises:
            UsageError: no size, or an option that is not known.
        """
        found = self._of("StorageOpt", dict, "object") or {}
        size = None
        for key, value in found.items():
            if key.lower() != "size":
                raise errors.UsageError(
                    f"there is no storage option {key!r:.60} of a container: only size", what=key
                )
            if not isinstance(value, str):
                raise errors.UsageError("StorageOpt's size is no text", what=key)
            size = parse_docker_size(value)
        return size


def parse_id(text: str) -> str:
    """See that a text can be a layer's id: it becomes a volume's name and part of a path.

    Raises:
        UsageError: it cannot.
    """
    if not text.isascii():
        raise errors.UsageError(f"{text!r:.60} is no layer's id", what="ID", value=text[:128])
    return parse_volume_name(text)


def parse_docker_size(text: str) -> int:
    """A size as Docker's users write it (``10G``, ``10gb``), whole sectors of 4 KiB.

    Raises:
        UsageError: it is none, or below 1 MiB.
    """
    stripped = text.strip()
    found = _DOCKER_SIZE.fullmatch(stripped)
    if found is not None:
        stripped = found["number"] + found["unit"]
    value = int(parse_size(stripped, minimum=_SIZE_MIN))
    return value - value % 4096
