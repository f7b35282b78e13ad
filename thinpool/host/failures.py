"""One table from the host's errno to the package's error types."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from thinpool import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

_KINDS: Final[Mapping[int, type[errors.ThinpoolError]]] = {
    errno.ENOENT: errors.NotFoundError,
    errno.ENXIO: errors.NotFoundError,
    errno.ENODEV: errors.NotFoundError,
    errno.ENOTDIR: errors.NotFoundError,
    errno.EPERM: errors.NotPermittedError,
    errno.EACCES: errors.NotPermittedError,
    errno.ENOSPC: errors.HostSpaceError,
    errno.EDQUOT: errors.HostSpaceError,
    errno.ENOSYS: errors.UnsupportedHostError,
    errno.EOPNOTSUPP: errors.UnsupportedHostError,
    errno.ENOTTY: errors.UnsupportedHostError,
    errno.EBUSY: errors.BusyError,
    errno.ETXTBSY: errors.BusyError,
    errno.EEXIST: errors.AlreadyExistsError,
    errno.EROFS: errors.ReadOnlyError,
}
"""Everything else is a StorageIOError."""


def failure(cause: OSError, asked: str, *, path: str | None = None) -> errors.ThinpoolError:
    """Turn a failed system call into the typed error that says what was asked.

    Args:
        cause: the error as the system gave it.
        asked: what was being done, as the start of a sentence ("cannot attach …").
        path: the file or device concerned, where that is not in ``cause`` already.

    Returns:
        The error to raise, with ``cause`` still to be chained by ``from``.
    """
    number = cause.errno or 0
    where = path if path is not None else _text(cause.filename)
    reason = os.strerror(number) if number else str(cause)
    kind = _KINDS.get(number, errors.StorageIOError)
    attributes: dict[str, str | int | None] = {"path": where, "errno": number}
    if kind is errors.NotPermittedError:
        attributes["operation"] = asked
    elif kind is errors.UnsupportedHostError:
        attributes["missing"] = asked
    elif kind is errors.BusyError:
        attributes["holder"] = None
    elif kind is errors.AlreadyExistsError:
        attributes["existing"] = where
    return kind(f"{asked}: {reason}", **attributes)


def _text(name: object) -> str | None:
    if isinstance(name, bytes):
        return os.fsdecode(name)
    return name if isinstance(name, str) else None
