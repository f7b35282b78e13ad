"""What targets answer about themselves, parsed by position into values.

Fields are the kernel's units: metadata blocks of 4 KiB, data blocks of the pool, sectors of 512
bytes. Fields that older kernels lack are None.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from thinpool import errors

if TYPE_CHECKING:
    from thinpool.dm.abi import TableLine


class ThinPoolMode(StrEnum):
    """What a pool can do at present; values are the kernel's words."""

    RW = "rw"
    OUT_OF_DATA_SPACE = "out_of_data_space"
    RO = "ro"


class DiscardPolicy(StrEnum):
    """What becomes of discards; values are the kernel's words."""

    IGNORE = "ignore_discard"
    PASSDOWN = "discard_passdown"
    NO_PASSDOWN = "no_discard_passdown"


class Failure(StrEnum):
    """The one word that a failed target answers."""

    FAIL = "Fail"
    """The pool gave up its metadata; only removing and making it anew leaves this."""
    ERROR = "Error"
    """The status could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinPoolStatus:
    """A pool's state.

    Attributes:
        transaction_id: userland's.
        used_metadata_blocks, total_metadata_blocks: 4 KiB each; ``used`` includes the kernel's
            reserve of min(4096, total / 10).
        used_data_blocks, total_data_blocks: of the pool's block size.
        held_root: metadata block of the reserved metadata snapshot; None for none.
        mode: what it can do.
        discard: what becomes of discards; no passdown also where the data device takes none.
        error_if_no_space: writes fail at once when data space is out, else they wait.
        needs_check: it stays read-only until its metadata was checked.
        metadata_low_water_blocks: free metadata blocks at which an event is raised.
    """

    transaction_id: int
    used_metadata_blocks: int
    total_metadata_blocks: int
    used_data_blocks: int
    total_data_blocks: int
    held_root: int | None
    mode: ThinPoolMode
    discard: DiscardPolicy | None = None
    error_if_no_space: bool | None = None
    needs_check: bool = False
    metadata_low_water_blocks: int | None = None

    @classmethod
    def parse(cls, text: str) -> ThinPoolStatus | Failure:
        """From a status line's text.

        Raises:
            UnsupportedHostError: a form that is not known.
        """
        words = text.split()
        try:
            return Failure(words[0]) if len(words) == 1 else cls._of(words)
        except (ValueError, IndexError) as cause:
            raise _unknown("thin-pool", text) from cause

    @classmethod
    def _of(cls, words: list[str]) -> ThinPoolStatus:
        used_metadata, total_metadata = words[1].split("/")
        used_data, total_data = words[2].split("/")
        rest = dict(enumerate(words))
        full = rest.get(6)
        if full not in {None, "error_if_no_space", "queue_if_no_space"}:
            raise ValueError(full)
        check = rest.get(7)
        if check not in {None, "-", "needs_check"}:
            raise ValueError(check)
        return cls(
            transaction_id=int(words[0]),
            used_metadata_blocks=int(used_metadata),
            total_metadata_blocks=int(total_metadata),
            used_data_blocks=int(used_data),
            total_data_blocks=int(total_data),
            held_root=None if words[3] == "-" else int(words[3]),
            mode=ThinPoolMode(words[4]),
            discard=DiscardPolicy(rest[5]) if 5 in rest else None,  # noqa: PLR2004 - a place
            error_if_no_space=None if full is None else full == "error_if_no_space",
            needs_check=check == "needs_check",
            metadata_low_water_blocks=int(rest[8]) if 8 in rest else None,  # noqa: PLR2004
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinStatus:
    """A thin volume's.

    Attributes:
        mapped_sectors: of the blocks it refers to, shared ones included.
        highest_mapped_sector: None where nothing is mapped.
    """

    mapped_sectors: int
    highest_mapped_sector: int | None

    @classmethod
    def parse(cls, text: str) -> ThinStatus | Failure | None:
        """From a status line's text; None for a device that has no thin volume open.

        Raises:
            UnsupportedHostError: a form that is not known.
        """
        words = text.split()
        try:
            if words == ["-"]:
                return None
            if len(words) == 1:
                return Failure(words[0])
            highest = None if words[1] == "-" else int(words[1])
            return cls(mapped_sectors=int(words[0]), highest_mapped_sector=highest)
        except (ValueError, IndexError) as cause:
            raise _unknown("thin", text) from cause


Status = ThinPoolStatus | ThinStatus | Failure | None

_PARSERS: Final = {"thin-pool": ThinPoolStatus.parse, "thin": ThinStatus.parse}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStatus:
    """One target's answer.

    Attributes:
        start, length: its stretch of the device, sectors.
        type: the target type's name.
        text: as the kernel gave it.
        value: of thin-pool and thin targets, parsed; else None.
    """

    start: int
    length: int
    type: str
    text: str
    value: Status

    @classmethod
    def of(cls, line: TableLine) -> TargetStatus:
        """From a line of TABLE_STATUS."""
        parser = _PARSERS.get(line.type)
        value = None if parser is None else parser(line.text)
        return cls(start=line.start, length=line.length, type=line.type, text=line.text,
                   value=value)  # fmt: skip


def _unknown(kind: str, text: str) -> errors.UnsupportedHostError:
    return errors.UnsupportedHostError(
        f"the kernel's status of a {kind} target has a form that is not known: {text!r}",
        missing=f"{kind} status",
    )
