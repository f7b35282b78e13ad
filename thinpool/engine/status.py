"""From the C core's statuses to errors: one table, and the one function that reads it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, Final

from thinpool import errors
from thinpool._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Mapping

STATUS_ERRORS: Final[Mapping[str, type[errors.ThinpoolError]]] = {
    # the host
    "TP_E_NO_MEMORY": errors.NoMemoryError,
    "TP_E_IO": errors.StorageIOError,
    "TP_E_OPEN": errors.StorageIOError,
    "TP_E_NOT_SUPPORTED": errors.UnsupportedHostError,
    "TP_E_INTERRUPTED": errors.InterruptedError_,
    # the caller
    "TP_E_INVALID": errors.UsageError,
    "TP_E_ALIGNMENT": errors.UsageError,
    "TP_E_OUT_OF_RANGE": errors.UsageError,
    "TP_E_BUSY": errors.BusyError,
    "TP_E_CLOSED": errors.ClosedError,
    "TP_E_READ_ONLY": errors.ReadOnlyError,
    # what is on disk
    "TP_E_SUPERBLOCK_MAGIC": errors.CorruptMetadataError,
    "TP_E_SUPERBLOCK_CHECKSUM": errors.ChecksumError,
    "TP_E_SUPERBLOCK_VERSION": errors.UnsupportedFormatError,
    "TP_E_SUPERBLOCK_BLOCKNR": errors.CorruptMetadataError,
    "TP_E_SUPERBLOCK_FEATURES": errors.UnsupportedFormatError,
    "TP_E_SUPERBLOCK_GEOMETRY": errors.CorruptMetadataError,
    "TP_E_BLOCK_CHECKSUM": errors.ChecksumError,
    "TP_E_BLOCK_NUMBER": errors.CorruptMetadataError,
    "TP_E_NODE_MALFORMED": errors.CorruptMetadataError,
    "TP_E_SPACE_MAP_MALFORMED": errors.CorruptMetadataError,
    "TP_E_MAPPING_OUT_OF_RANGE": errors.CorruptMetadataError,
    "TP_E_METADATA_TRUNCATED": errors.CorruptMetadataError,
    "TP_E_NOT_EMPTY": errors.ForeignDataError,
    "TP_E_UNFORMATTED": errors.CorruptMetadataError,
    "TP_E_NEEDS_CHECK": errors.NeedsCheckError,
    # space
    "TP_E_DATA_SPACE": errors.DataSpaceError,
    "TP_E_METADATA_SPACE": errors.MetadataSpaceError,
    # volumes
    "TP_E_VOLUME_NOT_FOUND": errors.NotFoundError,
    "TP_E_VOLUME_EXISTS": errors.AlreadyExistsError,
    "TP_E_VOLUME_BUSY": errors.BusyError,
    "TP_E_TRANSACTION_ID": errors.TransactionIdError,
    "TP_E_METADATA_SNAPSHOT_HELD": errors.BusyError,
    "TP_E_NO_METADATA_SNAPSHOT": errors.NotFoundError,
    "TP_E_LIMIT": errors.LimitError,
    "TP_E_LOG_FULL": errors.BusyError,
    "TP_E_POOL_FAILED": errors.PoolFailedError,
    "TP_E_KEY_NOT_FOUND": errors.NotFoundError,
}
"""Every status but TP_OK, exactly once."""

_HOST_ERRORS: Final[Mapping[tuple[str, int], type[errors.ThinpoolError]]] = {
    ("TP_E_IO", errno.ENOSPC): errors.HostSpaceError,
    ("TP_E_IO", errno.EDQUOT): errors.HostSpaceError,
    ("TP_E_OPEN", errno.ENOSPC): errors.HostSpaceError,
    ("TP_E_OPEN", errno.EDQUOT): errors.HostSpaceError,
    ("TP_E_OPEN", errno.ENOENT): errors.NotFoundError,
    ("TP_E_OPEN", errno.ENOTDIR): errors.NotFoundError,
    ("TP_E_OPEN", errno.ENXIO): errors.NotFoundError,
    ("TP_E_OPEN", errno.EBUSY): errors.BusyError,
    ("TP_E_OPEN", errno.EACCES): errors.NotPermittedError,
    ("TP_E_OPEN", errno.EPERM): errors.NotPermittedError,
    ("TP_E_OPEN", errno.EROFS): errors.ReadOnlyError,
    ("TP_E_OPEN", errno.EEXIST): errors.AlreadyExistsError,
}
"""Where the host's errno says more than the status does."""

NO_BLOCK: Final = (1 << 64) - 1

_ERROR: Final = ffi.typeof("struct tp_error *")
_NAMES: Final[Mapping[int, str]] = dict(ffi.typeof("enum tp_status").elements)


def status_name(status: int) -> str:
    """The name of a status, such as ``TP_E_DATA_SPACE``."""
    return _NAMES.get(status, f"TP_E_{status}")


def new_error() -> Any:  # noqa: ANN401 - cffi's data has no type
    """A ``struct tp_error`` to pass to a call."""
    return ffi.new(_ERROR)


def check(status: int, err: Any = None, **context: Any) -> None:  # noqa: ANN401 - as above
    """Raise what a status stands for.

    Args:
        status: a C function's result; 0 or more is success.
        err: the ``struct tp_error`` that was passed, None for a function that takes none.
        context: attributes that the caller knows, such as ``path``.
    """
    if status >= 0:
        return
    raise error_for(status, err, **context)


def error_for(status: int, err: Any = None, **context: Any) -> errors.ThinpoolError:  # noqa: ANN401
    """The error that a status stands for."""
    name = status_name(status)
    attributes: dict[str, Any] = {"status": name, **context}
    message = ""
    host_errno = 0
    if err is not None and err != ffi.NULL:
        message = ffi.string(err.message).decode(errors="replace")
        host_errno = int(err.host_errno)
        if host_errno:
            attributes["errno"] = host_errno
        if err.block != NO_BLOCK:
            attributes["block"] = int(err.block)
        if err.found or err.wanted:
            attributes["found"] = int(err.found)
            attributes["wanted"] = int(err.wanted)
    if not message:
        message = ffi.string(lib.tp_status_name(status)).decode()
    path = context.get("path")
    if path is not None and str(path) not in message:
        message = f"{path}: {message}"
    if host_errno and os.strerror(host_errno) not in message:
        message = f"{message}: {os.strerror(host_errno)}"
    cls = _HOST_ERRORS.get((name, host_errno)) or STATUS_ERRORS.get(name, errors.ThinpoolError)
    return cls(message, **attributes)
