"""Targets: what a device-mapper device is made of, rendered for the kernel and parsed from it.

All lengths and offsets are sectors of 512 bytes, the kernel's unit here. A device argument is a
path, or ``major:minor`` as the kernel answers; ``device_text`` makes the latter from a number.
Facts: the kernel's Documentation/admin-guide/device-mapper.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Self

from thinpool import errors
from thinpool.dm.abi import TableLine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SECTOR: Final = 512
BLOCK_SECTORS_MIN: Final = 128
BLOCK_SECTORS_MAX: Final = 2_097_152
BLOCK_SECTORS_STEP: Final = 128
THIN_ID_MAX: Final = (1 << 24) - 1
_POOL_FEATURES_MAX: Final = 4


def device_text(number: int) -> str:
    """``major:minor`` of a device number, as tables take it."""
    return f"{os.major(number)}:{os.minor(number)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target(ABC):
    """One stretch of a device.

    Attributes:
        start: where it begins, sectors; ``length``: how far it goes, sectors.
    """

    type: ClassVar[str]

    start: int = 0
    length: int

    def __post_init__(self) -> None:
        """Refuse what no table can hold."""
        if self.start < 0 or self.length <= 0:
            _refuse(self.type, f"start {self.start}, length {self.length}: not a stretch")

    @abstractmethod
    def arguments(self) -> tuple[str, ...]:
        """What stands behind the type in the table."""

    @classmethod
    @abstractmethod
    def parse(cls, start: int, length: int, words: Sequence[str]) -> Self:
        """From a table's words.

        Raises:
            ValueError, IndexError: they don't have this target's form.
        """

    def line(self) -> TableLine:
        """As the kernel takes it."""
        text = " ".join(_quoted(word) for word in self.arguments())
        return TableLine(self.start, self.length, self.type, text)

    def devices(self) -> tuple[str, ...]:
        """The device arguments among its own."""
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinPoolTarget(Target):
    """A pool; alone in its table, at 0.

    Attributes:
        metadata, data: the devices.
        block_sectors: of a data block: 128 to 2097152, a multiple of 128.
        low_water_blocks: free data blocks at which an event is raised; 0 for none.
        skip_block_zeroing: leave what new blocks held before.
        ignore_discard: volumes take no discards. Cannot change on a reload.
        no_discard_passdown: discards unmap and aren't passed to the data device.
        read_only: nothing is changed.
        error_if_no_space: writes fail at once when data space is out, else they wait.
    """

    type: ClassVar[str] = "thin-pool"

    metadata: str
    data: str
    block_sectors: int
    low_water_blocks: int = 0
    skip_block_zeroing: bool = False
    ignore_discard: bool = False
    no_discard_passdown: bool = False
    read_only: bool = False
    error_if_no_space: bool = False

    FEATURES: ClassVar[tuple[str, ...]] = (
        "skip_block_zeroing",
        "ignore_discard",
        "no_discard_passdown",
        "read_only",
        "error_if_no_space",
    )

    def __post_init__(self) -> None:
        """Refuse sizes that no pool can have."""
        Target.__post_init__(self)
        size = self.block_sectors
        if not BLOCK_SECTORS_MIN <= size <= BLOCK_SECTORS_MAX or size % BLOCK_SECTORS_STEP:
            _refuse(
                self.type, f"data blocks of {size} sectors: 64 KiB to 1 GiB, in steps of 64 KiB"
            )
        if self.start != 0:
            _refuse(self.type, f"starts at {self.start}: a pool starts at 0")
        if self.low_water_blocks < 0:
            _refuse(self.type, f"low-water mark of {self.low_water_blocks} blocks")

    def features(self) -> tuple[str, ...]:
        """Those that are set. The kernel takes four; passdown means nothing without discards."""
        names = tuple(name for name in self.FEATURES if getattr(self, name))
        if len(names) > _POOL_FEATURES_MAX:
            return tuple(name for name in names if name != "no_discard_passdown")
        return names

    def arguments(self) -> tuple[str, ...]:
        """Devices, block size, low water, features."""
        names = self.features()
        return (
            self.metadata, self.data, str(self.block_sectors), str(self.low_water_blocks),
            str(len(names)), *names,
        )  # fmt: skip

    @classmethod
    def parse(cls, start: int, length: int, words: Sequence[str]) -> Self:
        """From a table's words; features in any case and order, or none at all."""
        count = int(words[4]) if len(words) > 4 else 0  # noqa: PLR2004 - place in the line
        names = {word.lower() for word in words[5 : 5 + count]}
        if names - set(cls.FEATURES) or len(words) > 5 + count:
            raise ValueError(words)
        return cls(
            start=start,
            length=length,
            metadata=words[0],
            data=words[1],
            block_sectors=int(words[2]),
            low_water_blocks=int(words[3]),
            **dict.fromkeys(names, True),
        )

    def devices(self) -> tuple[str, ...]:
        """Metadata and data."""
        return (self.metadata, self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinTarget(Target):
    """A thin volume of a pool.

    Attributes:
        pool: the pool's device.
        id: the thin device's id in the pool's metadata.
        origin: a device that is read where nothing is mapped; never written.
    """

    type: ClassVar[str] = "thin"

    pool: str
    id: int
    origin: str | None = None

    def __post_init__(self) -> None:
        """Refuse ids that don't fit."""
        Target.__post_init__(self)
        if not 0 <= self.id <= THIN_ID_MAX:
            _refuse(self.type, f"id {self.id}: 0 to {THIN_ID_MAX}")

    def arguments(self) -> tuple[str, ...]:
        """Pool, id, origin."""
        origin = () if self.origin is None else (self.origin,)
        return (self.pool, str(self.id), *origin)

    @classmethod
    def parse(cls, start: int, length: int, words: Sequence[str]) -> Self:
        """From a table's words."""
        pool, number, *rest = words
        origin = rest[0] if rest else None
        return cls(start=start, length=length, pool=pool, id=int(number), origin=origin)

    def devices(self) -> tuple[str, ...]:
        """Pool and origin."""
        return (self.pool,) if self.origin is None else (self.pool, self.origin)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearTarget(Target):
    """A stretch of another device, from ``offset`` sectors on."""

    type: ClassVar[str] = "linear"

    device: str
    offset: int = 0

    def arguments(self) -> tuple[str, ...]:
        """Device, offset."""
        return (self.device, str(self.offset))

    @classmethod
    def parse(cls, start: int, length: int, words: Sequence[str]) -> Self:
        """From a table's words."""
        device, offset = words
        return cls(start=start, length=length, device=device, offset=int(offset))

    def devices(self) -> tuple[str, ...]:
        """The one."""
        return (self.device,)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorTarget(Target):
    """All I/O fails."""

    type: ClassVar[str] = "error"

    def arguments(self) -> tuple[str, ...]:
        """None."""
        return ()

    @classmethod
    def parse(cls, start: int, length: int, words: Sequence[str]) -> Self:
        """From a table's words: there are none."""
        if words:
            raise ValueError(words)
        return cls(start=start, length=length)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroTarget(ErrorTarget):
    """Reads as zeros, writes are dropped."""

    type: ClassVar[str] = "zero"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlakeyTarget(Target):
    """Works and fails by turns.

    Attributes:
        device, offset: what is below.
        up_seconds: how long it works; ``down_seconds``: how long it fails.
        features: how it fails: ("drop_writes",), ("error_writes",), …; none: all I/O fails.
    """

    type: ClassVar[str] = "flakey"

    device: str
    offset: int = 0
    up_seconds: int
    down_seconds: int
    features: tuple[str, ...] = ()

    def arguments(self) -> tuple[str, ...]:
        """Device, offset, times, features."""
        times = (str(self.up_seconds), str(self.down_seconds))
        features = (str(len(self.features)), *self.features) if self.features else ()
        return (self.device, str(self.offset), *times, *features)

    @classmethod
    def parse(cls, start: int, length: int, words: Sequence[str]) -> Self:
        """From a table's words."""
        device, offset, up, down, *rest = words
        if rest and int(rest[0]) != len(rest) - 1:
            raise ValueError(words)
        return cls(
            start=start, length=length, device=device, offset=int(offset),
            up_seconds=int(up), down_seconds=int(down), features=tuple(rest[1:]),
        )  # fmt: skip

    def devices(self) -> tuple[str, ...]:
        """The one below."""
        return (self.device,)


@dataclass(frozen=True, slots=True, kw_only=True)
class DelayTarget(Target):
    """Each I/O waits ``delay_ms`` before it goes below."""

    type: ClassVar[str] = "delay"

    device: str
    offset: int = 0
    delay_ms: int

    def arguments(self) -> tuple[str, ...]:
        """Device, offset, delay."""
        return (self.device, str(self.offset), str(self.delay_ms))

    @classmethod
    def parse(cls, start: int, length: int, words: Sequence[str]) -> Self:
        """From a table's words: one class of delays, for reads and writes alike."""
        device, offset, delay = words
        return cls(
            start=start, length=length, device=device, offset=int(offset), delay_ms=int(delay)
        )

    def devices(self) -> tuple[str, ...]:
        """The one below."""
        return (self.device,)


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherTarget(Target):
    """A target whose form is not known here; its words go as they are."""

    type: ClassVar[str] = ""

    type_name: str
    words: tuple[str, ...] = ()

    def arguments(self) -> tuple[str, ...]:
        """The words."""
        return self.words

    def line(self) -> TableLine:
        """As the kernel takes it."""
        return Target.line(self)._replace(type=self.type_name)

    @classmethod
    def parse(cls, start: int, length: int, words: Sequence[str]) -> Self:
        """From the type and a table's words."""
        return cls(start=start, length=length, type_name=words[0], words=tuple(words[1:]))


KNOWN: Final[Mapping[str, type[Target]]] = {
    cls.type: cls
    for cls in (
        ThinPoolTarget, ThinTarget, LinearTarget, ErrorTarget, ZeroTarget, FlakeyTarget,
        DelayTarget,
    )
}  # fmt: skip


def parse_target(line: TableLine) -> Target:
    """The target that a table's line describes; OtherTarget where the form is not known."""
    words = split_words(line.text)
    known = KNOWN.get(line.type)
    if known is not None:
        try:
            return known.parse(line.start, line.length, words)
        except (ValueError, IndexError, errors.UsageError):
            pass  # newer, or an odd one: kept as it is
    return OtherTarget.parse(line.start, line.length, [line.type, *words])


def split_words(text: str) -> list[str]:
    """Words of a table, where a backslash quotes the next character."""
    if "\\" not in text:
        return text.split()
    words: list[str] = []
    word: list[str] = []
    begun = quoted = False
    for character in text:
        if quoted:
            word.append(character)
            quoted = False
        elif character == "\\":
            begun = quoted = True
        elif character.isspace():
            if begun:
                words.append("".join(word))
            word, begun = [], False
        else:
            word.append(character)
            begun = True
    if begun:
        words.append("".join(word))
    return words


def _quoted(word: str) -> str:
    if word.isascii() and not any(c.isspace() or c == "\\" for c in word):
        return word
    return "".join(f"\\{c}" if c.isspace() or c == "\\" else c for c in word)


def _refuse(kind: str, why: str) -> None:
    raise errors.UsageError(f"{kind} target: {why}")
