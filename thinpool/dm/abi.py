"""The records of device-mapper's ioctl interface, declared once, and their encodings.

Every command takes one buffer: a header, then from ``data_start`` on what belongs to the command.
Nothing here makes a system call. Facts: include/uapi/linux/dm-ioctl.h, interface version 4.
"""

from __future__ import annotations

import os
import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from thinpool import errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NAME_MAX: Final = 127
"""Bytes of a device's name; the field holds 128 with its NUL."""
UUID_MAX: Final = 128
"""Bytes of a device's uuid; the field holds 129 with its NUL."""
TYPE_MAX: Final = 15
"""Bytes of a target type's name; the field holds 16 with its NUL."""
BUFFER_MAX: Final = 1 << 30
"""Bytes of the largest buffer that the kernel takes."""

CLIENT_VERSION: Final = (4, 0, 0)
"""What we say we speak: the oldest of this interface. The reply says what the kernel has."""

_REQUEST_BASE: Final = 0xC138FD00


class Command(IntEnum):
    """The ioctls; the value is the request code."""

    VERSION = _REQUEST_BASE + 0x00
    LIST_DEVICES = _REQUEST_BASE + 0x02
    DEV_CREATE = _REQUEST_BASE + 0x03
    DEV_REMOVE = _REQUEST_BASE + 0x04
    DEV_RENAME = _REQUEST_BASE + 0x05
    DEV_SUSPEND = _REQUEST_BASE + 0x06
    DEV_STATUS = _REQUEST_BASE + 0x07
    DEV_WAIT = _REQUEST_BASE + 0x08
    TABLE_LOAD = _REQUEST_BASE + 0x09
    TABLE_CLEAR = _REQUEST_BASE + 0x0A
    TABLE_DEPS = _REQUEST_BASE + 0x0B
    TABLE_STATUS = _REQUEST_BASE + 0x0C
    LIST_VERSIONS = _REQUEST_BASE + 0x0D
    TARGET_MSG = _REQUEST_BASE + 0x0E
    DEV_ARM_POLL = _REQUEST_BASE + 0x10
    GET_TARGET_VERSION = _REQUEST_BASE + 0x11


class Flag:
    """Bits of the header's ``flags``: plain ints, since an IntFlag is a score of times slower."""

    READONLY: Final = 0x1
    SUSPEND: Final = 0x2
    PERSISTENT_DEV: Final = 0x8
    STATUS_TABLE: Final = 0x10
    ACTIVE_PRESENT: Final = 0x20
    INACTIVE_PRESENT: Final = 0x40
    BUFFER_FULL: Final = 0x100
    SKIP_LOCKFS: Final = 0x400
    NOFLUSH: Final = 0x800
    QUERY_INACTIVE_TABLE: Final = 0x1000
    UEVENT_GENERATED: Final = 0x2000
    UUID: Final = 0x4000
    DATA_OUT: Final = 0x10000
    DEFERRED_REMOVE: Final = 0x20000
    INTERNAL_SUSPEND: Final = 0x40000


HEADER: Final = struct.Struct("=3IIIIiIIIQ128s129s7x")
"""version[3], data_size, data_start, target_count, open_count, flags, event_nr, padding, dev,
name, uuid."""
TARGET_SPEC: Final = struct.Struct("=QQiI16s")
"""start, length, status, next, type."""
MESSAGE: Final = struct.Struct("=Q")
"""sector; the text follows."""
DEPS: Final = struct.Struct("=II")
"""count, padding; device numbers of 64 bits follow."""
DEVICE_ENTRY: Final = struct.Struct("=QI")
"""dev, next; the name follows, then at the next 8 bytes an EVENT_ENTRY."""
EVENT_ENTRY: Final = struct.Struct("=II")
"""event_nr, flags; the uuid follows where flags has bit 0."""
VERSION_ENTRY: Final = struct.Struct("=I3I")
"""next, version[3]; the type's name follows."""
DEVICE_NUMBER: Final = struct.Struct("=Q")

_ALIGNMENT: Final = 8
_ENTRY_HAS_UUID: Final = 1
_ENTRY_HAS_NO_UUID: Final = 2


class Header(NamedTuple):
    """A reply's header."""

    version_major: int
    version_minor: int
    version_patch: int
    data_size: int
    data_start: int
    target_count: int
    open_count: int
    flags: int
    event_nr: int
    padding: int
    dev: int
    name: bytes
    uuid: bytes


class TableLine(NamedTuple):
    """One target of a table or of a status. Sectors of 512 bytes.

    Attributes:
        start: where it begins in the device; ``length``: how far it goes.
        type: the target type's name.
        text: its arguments, or its status.
    """

    start: int
    length: int
    type: str
    text: str


class DeviceEntry(NamedTuple):
    """One device of the list.

    Attributes:
        name: its name; ``number``: its device number, as os.makedev has it.
        event_nr: its event number.
        uuid: None where it has none, or where the kernel doesn't say (``uuid_known``).
    """

    name: str
    number: int
    event_nr: int
    uuid: str | None
    uuid_known: bool


def encode_device(number: int) -> int:
    """A device number as this interface has it: the minor around 12 bits of major."""
    major, minor = os.major(number), os.minor(number)
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12


def decode_device(value: int) -> int:
    """The inverse of encode_device."""
    return os.makedev((value >> 8) & 0xFFF, (value & 0xFF) | ((value >> 12) & 0xFFF00))


def pack_request(
    buffer: bytearray,
    *,
    name: bytes = b"",
    uuid: bytes = b"",
    flags: int = 0,
    event_nr: int = 0,
    dev: int = 0,
    target_count: int = 0,
) -> None:
    """Write a header into a buffer; what the command needs stands behind it already."""
    HEADER.pack_into(
        buffer, 0,
        *CLIENT_VERSION, len(buffer), HEADER.size, target_count, 0, flags, event_nr, 0, dev,
        name, uuid,
    )  # fmt: skip


def unpack_header(buffer: bytearray) -> Header:
    """Read a reply's header."""
    return Header._make(HEADER.unpack_from(buffer))


def text_at(buffer: bytes | bytearray, offset: int, end: int | None = None) -> str:
    """The NUL-terminated text at an offset."""
    limit = len(buffer) if end is None else end
    stop = buffer.find(0, offset, limit)
    return os.fsdecode(bytes(buffer[offset : limit if stop < 0 else stop]))


def _field(value: bytes) -> str:
    return os.fsdecode(value.partition(b"\0")[0])


def header_name(header: Header) -> str:
    """The name of a reply."""
    return _field(header.name)


def header_uuid(header: Header) -> str | None:
    """The uuid of a reply; None for none."""
    return _field(header.uuid) or None


def pack_table(lines: Sequence[TableLine]) -> bytes:
    """The payload of TABLE_LOAD.

    Raises:
        UsageError: a type's name that is too long, text with a NUL.
    """
    parts = []
    for line in lines:
        kind, text = os.fsencode(line.type), os.fsencode(line.text)
        if not 0 < len(kind) <= TYPE_MAX or b"\0" in kind + text:
            message = f"{line.type!r} {line.text!r}: no line of a table: the type has 1 to"
            raise errors.UsageError(f"{message} {TYPE_MAX} bytes, and nothing holds a NUL")
        length = TARGET_SPEC.size + len(text) + 1
        padded = length + -length % _ALIGNMENT
        parts.append(TARGET_SPEC.pack(line.start, line.length, 0, padded, kind))
        parts.append(text.ljust(padded - TARGET_SPEC.size, b"\0"))
    return b"".join(parts)


def unpack_table(buffer: bytearray, header: Header) -> tuple[TableLine, ...]:
    """The lines of a TABLE_STATUS reply; ``next`` counts from the first there."""
    lines = []
    offset = header.data_start
    for _ in range(header.target_count):
        start, length, _status, following, kind = TARGET_SPEC.unpack_from(buffer, offset)
        end = header.data_start + following
        text = text_at(buffer, offset + TARGET_SPEC.size, end)
        lines.append(TableLine(start, length, _field(kind), text))
        offset = end
    return tuple(lines)


def unpack_devices(buffer: bytearray, header: Header) -> Iterator[DeviceEntry]:
    """The entries of a LIST_DEVICES reply."""
    offset = header.data_start
    if header.data_size <= offset:
        return
    while True:
        dev, following = DEVICE_ENTRY.unpack_from(buffer, offset)
        if dev == 0:
            return
        start = offset + DEVICE_ENTRY.size
        stop = buffer.index(0, start)
        # The alignment counts from the buffer's start: entries begin at multiples of 8.
        behind = stop + 1 + -(stop + 1) % _ALIGNMENT
        event_nr, flags = EVENT_ENTRY.unpack_from(buffer, behind)
        known = bool(flags & (_ENTRY_HAS_UUID | _ENTRY_HAS_NO_UUID))
        uuid = text_at(buffer, behind + EVENT_ENTRY.size) if flags & _ENTRY_HAS_UUID else None
        name = os.fsdecode(bytes(buffer[start:stop]))
        yield DeviceEntry(name, decode_device(dev), event_nr, uuid, known)
        if following == 0:
            return
        offset += following


def unpack_versions(
    buffer: bytearray, header: Header
) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """The target types and versions of a LIST_VERSIONS or GET_TARGET_VERSION reply."""
    offset = header.data_start
    while offset + VERSION_ENTRY.size < header.data_size:
        following, major, minor, patch = VERSION_ENTRY.unpack_from(buffer, offset)
        yield text_at(buffer, offset + VERSION_ENTRY.size), (major, minor, patch)
        if following == 0:
            return
        offset += following


def unpack_deps(buffer: bytearray, header: Header) -> tuple[int, ...]:
    """The device numbers of a TABLE_DEPS reply."""
    if header.data_size < header.data_start + DEPS.size:
        return ()  # no live table
    count, _ = DEPS.unpack_from(buffer, header.data_start)
    start = header.data_start + DEPS.size
    values = struct.unpack_from(f"={count}Q", buffer, start)
    return tuple(decode_device(value) for value in values)
