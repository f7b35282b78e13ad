"""Flushing a file beside something else, without the interpreter."""

from __future__ import annotations

from thinpool._native import lib
from thinpool.engine.status import check, new_error


def flush_when_due(fd: int, *, due: int, ended: int) -> None:
    """Flush a file each time that it is due, in the calling thread, and never return by that.

    Args:
        fd: of the file.
        due: an eventfd: 1 for a flush, the next when that has ended; 2 for the end.
        ended: an eventfd that becomes readable when it is durable; -1 to return after one flush.

    Raises:
        ClosedError: due said so.
        StorageIOError, HostSpaceError: a flush failed; ``ended`` is left alone.
    """
    err = new_error()
    check(lib.tp_flush_when_due(fd, due, ended, err), err)
