"""Exit codes: one table from the errors' kinds, which scripts rely on."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from thinpool.errors import ThinpoolError

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
EXISTS: Final = 4
BUSY: Final = 5
NO_SPACE: Final = 6
CORRUPT: Final = 7
NOT_PERMITTED: Final = 8
NOT_THERE_YET: Final = 9
INTERRUPTED: Final = 130

MEANINGS: Final[Mapping[int, str]] = MappingProxyType(
    {
        DONE: "done",
        FAILED: "failed",
        USAGE: "wrong usage: a name, a size, an option, or a question without a terminal",
        NOT_FOUND: "not found",
        EXISTS: "exists already, or the device already carries something",
        BUSY: "busy: in use, or a lock was not to be had within --timeout",
        NO_SPACE: "no space: data, metadata or the host's disk is full",
        CORRUPT: "corrupt, or needs check",
        NOT_PERMITTED: "not permitted, or this host lacks what is needed",
        NOT_THERE_YET: "not there yet: a later version brings it",
        INTERRUPTED: "interrupted; what was begun was undone",
    }
)

CODES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "failed": FAILED,
        "usage": USAGE,
        "not_found": NOT_FOUND,
        "already_exists": EXISTS,
        "foreign_data": EXISTS,
        "busy": BUSY,
        "timeout": BUSY,
        "no_space": NO_SPACE,
        "data_space": NO_SPACE,
        "metadata_space": NO_SPACE,
        "host_space": NO_SPACE,
        "corrupt": CORRUPT,
        "checksum": CORRUPT,
        "unsupported_format": CORRUPT,
        "needs_check": CORRUPT,
        "transaction_id": CORRUPT,
        "pool_failed": CORRUPT,
        "archive": CORRUPT,
        "not_permitted": NOT_PERMITTED,
        "read_only": NOT_PERMITTED,
        "unsupported_host": NOT_PERMITTED,
        "not_there_yet": NOT_THERE_YET,
        "interrupted": INTERRUPTED,
        "closed": FAILED,
        "io": FAILED,
        "device_mapper": FAILED,
        "limit": FAILED,
        "no_memory": FAILED,
        "server": FAILED,
    }
)


def code_of(error: ThinpoolError) -> int:
    """The exit code of an error; one whose kind a newer server made up is a failure."""
    for cls in type(error).__mro__:
        code = CODES.get(getattr(cls, "kind", ""))
        if code is not None:
            return code
    return FAILED


def from_os_error(error: OSError) -> ThinpoolError:
    """An error of the host as one of ours."""
    from thinpool.host.failures import failure

    return failure(error, "input or output" if error.filename is None else str(error.filename))
