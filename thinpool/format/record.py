"""How a record on disk is declared: fields in order, each with its unit and meaning.

From one declaration come the construct parser, the offsets that a test compares with the C core's,
and the tables of docs/on-disk-format.md. Bytes become a dataclass at the edge, and nothing of
construct shows beyond.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import construct

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

BLOCK_SIZE: Final = 4096
"""Bytes of a metadata block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field.

    Attributes:
        name: as in disk_format.h and in the dataclass.
        size: bytes.
        codec: construct's.
        unit: what it counts: bytes, sectors, metadata blocks, ...; "" where it counts nothing.
        meaning: one sentence, for people.
    """

    name: str
    size: int
    codec: Any
    unit: str
    meaning: str


def u32(name: str, unit: str, meaning: str) -> Field:
    """A little-endian number of 4 bytes."""
    return Field(name=name, size=4, codec=construct.Int32ul, unit=unit, meaning=meaning)


def u64(name: str, unit: str, meaning: str) -> Field:
    """A little-endian number of 8 bytes."""
    return Field(name=name, size=8, codec=construct.Int64ul, unit=unit, meaning=meaning)


def octets(name: str, size: int, meaning: str) -> Field:
    """Bytes."""
    return Field(name=name, size=size, codec=construct.Bytes(size), unit="", meaning=meaning)


def u64s(name: str, count: int, unit: str, meaning: str) -> Field:
    """Numbers of 8 bytes."""
    codec = construct.Array(count, construct.Int64ul)
    return Field(name=name, size=8 * count, codec=codec, unit=unit, meaning=meaning)


def nested(name: str, record: Record[Any], meaning: str) -> Field:
    """Another record in place."""
    return Field(name=name, size=record.size, codec=_Nested(record), unit="", meaning=meaning)


def array(name: str, count: int, record: Record[Any], meaning: str) -> Field:
    """Another record, count times."""
    codec = construct.Array(count, _Nested(record))
    return Field(name=name, size=count * record.size, codec=codec, unit="", meaning=meaning)


class Record(Generic[T]):
    """A record: parse bytes to a dataclass, build bytes of one.

    Args:
        name: as in disk_format.h, without tp_disk_.
        title: for the documentation.
        values: the dataclass, whose fields are the record's, in order.
        declared: the fields, in the order of the disk.
    """

    def __init__(self, name: str, title: str, values: type[T], *declared: Field) -> None:
        """Declare it."""
        names = [field.name for field in declared]
        if [field.name for field in fields(values)] != names:  # type: ignore[arg-type]
            message = f"{values.__name__} does not have the fields of {name}: {names}"
            raise TypeError(message)
        self.name = name
        self.title = title
        self.fields = declared
        self.size = sum(field.size for field in declared)
        self._values = values
        self._struct = construct.Struct(*(field.name / field.codec for field in declared))

    def offsets(self) -> Iterator[tuple[int, Field]]:
        """Each field with where it stands, in bytes."""
        offset = 0
        for field in self.fields:
            yield offset, field
            offset += field.size

    def parse(self, data: bytes | bytearray | memoryview, offset: int = 0) -> T:
        """Read one.

        Raises:
            ValueError: the data ends before the record does.
        """
        part = bytes(data[offset : offset + self.size])
        if len(part) < self.size:
            raise ValueError(f"{self.name} has {self.size} bytes, here are {len(part)}")
        found = self._struct.parse(part)
        values = {field.name: _plain(found[field.name]) for field in self.fields}
        return self._values(**values)

    def build(self, values: T) -> bytes:
        """Write one.

        Raises:
            ValueError: a number does not fit its field.
        """
        parts = {field.name: getattr(values, field.name) for field in self.fields}
        try:
            return bytes(self._struct.build(parts))
        except construct.ConstructError as error:
            raise ValueError(f"{self.name}: {error}") from error


def _plain(value: Any) -> Any:  # noqa: ANN401 - numbers, bytes, dataclasses, lists of these
    return tuple(value) if isinstance(value, list) else value


# construct is not typed, so that mypy cannot see what is subclassed.
class _Nested(construct.Construct):  # type: ignore[misc]
    """A record within a record."""

    def __init__(self, record: Record[Any]) -> None:
        super().__init__()
        self._record = record

    def _parse(self, stream: Any, context: Any, path: Any) -> Any:  # noqa: ANN401, ARG002 - construct's
        return self._record.parse(construct.stream_read(stream, self._record.size, path))

    def _build(self, obj: Any, stream: Any, context: Any, path: Any) -> Any:  # noqa: ANN401, ARG002 - construct's
        construct.stream_write(stream, self._record.build(obj), self._record.size, path)
        return obj

    def _sizeof(self, context: Any, path: Any) -> int:  # noqa: ANN401, ARG002 - construct's
        return self._record.size
