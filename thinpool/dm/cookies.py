"""Udev's cookies: waiting until udevd has finished with a device, by System V semaphores.

The protocol is the one that the rules of Debian's dmsetup package speak, whose last rule counts
the semaphore down. A cookie's low half names the semaphore, its high half tells the rules what to
leave alone. Python has no System V semaphores, hence ctypes; only this module does so.

A wait is bounded. Semaphores are removed on every way out; only a process that is killed in the
wait leaves one behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import time
from enum import IntFlag
from typing import TYPE_CHECKING, Final, Self

from thinpool import errors

if TYPE_CHECKING:
    from types import TracebackType

_KEY_BASE: Final = 0x0D4D0000
_ID_MAX: Final = 0xFFFF
_FLAGS_SHIFT: Final = 16
_MODE: Final = 0o600
_IPC_CREAT: Final = 0o1000
_IPC_EXCL: Final = 0o2000
_IPC_RMID: Final = 0
_SETVAL: Final = 16
_GONE: Final = (errno.EIDRM, errno.EINVAL)

_libc: Final = ctypes.CDLL(None, use_errno=True)


class UdevFlags(IntFlag):
    """What udev's rules shall leave alone with a device."""

    NO_DM_RULES = 0x01
    NO_SUBSYSTEM_RULES = 0x02
    NO_DISK_LINKS = 0x04
    NO_OTHER_RULES = 0x08
    LOW_PRIORITY = 0x10
    PRIMARY_SOURCE = 0x40


QUIET: Final = UdevFlags.NO_SUBSYSTEM_RULES | UdevFlags.NO_DISK_LINKS | UdevFlags.NO_OTHER_RULES
"""Nobody probes it: no LVM, no blkid, no udisks, no links by label. For guests' devices."""


class _Operation(ctypes.Structure):
    """struct sembuf."""

    _fields_ = (
        ("number", ctypes.c_ushort),
        ("change", ctypes.c_short),
        ("flags", ctypes.c_short),
    )


class _Timespec(ctypes.Structure):
    """struct timespec."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc.semget.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
_libc.semctl.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.semtimedop.argtypes = [
    ctypes.c_int, ctypes.POINTER(_Operation), ctypes.c_size_t, ctypes.POINTER(_Timespec),
]  # fmt: skip


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class Cookie:
    """One cookie, for one or more commands; use it as a context manager.

    Not thread-safe.
    """

    def __init__(self) -> None:
        """Make its semaphore.

        Raises:
            OSError: no semaphores here (ENOSYS), or none left (ENOSPC).
        """
        self._semaphore: int | None = None
        while self._semaphore is None:
            self.id = random.randint(1, _ID_MAX)  # noqa: S311 - a name, not a secret
            with contextlib.suppress(FileExistsError):
                self._semaphore = _checked(
                    _libc.semget(_KEY_BASE | self.id, 1, _IPC_CREAT | _IPC_EXCL | _MODE)
                )
        try:
            _checked(_libc.semctl(self._semaphore, 0, _SETVAL, 1))
        except OSError:
            self.close()
            raise

    def value(self, flags: UdevFlags) -> int:
        """What a command takes as its event number."""
        return (flags | UdevFlags.PRIMARY_SOURCE) << _FLAGS_SHIFT | self.id

    def expect(self) -> None:
        """Before a command that will raise an event: wait for one more."""
        self._change(1)

    def forgo(self) -> None:
        """After a command that raised none: wait for one less."""
        self._change(-1)

    def wait(self, seconds: float) -> bool:
        """Wait until udevd has finished with all that is expected, once.

        Returns:
            Whether it has; False when the time was over.
        """
        deadline = time.monotonic() + seconds
        self._change(-1)
        while True:
            try:
                self._change(0, max(0.0, deadline - time.monotonic()))
            except InterruptedError:
                continue  # a handler ran; one that raises ends this
            except BlockingIOError:
                self._change(1)
                return False
            return True

    def close(self) -> None:
        """Remove the semaphore; twice is once."""
        semaphore, self._semaphore = self._semaphore, None
        if semaphore is not None:
            _libc.semctl(semaphore, 0, _IPC_RMID, 0)

    def __enter__(self) -> Self:
        """The cookie itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the semaphore."""
        self.close()

    def _change(self, change: int, seconds: float = 0.0) -> None:
        if self._semaphore is None:
            raise errors.ClosedError("the udev cookie was closed")
        whole = int(seconds)
        timeout = _Timespec(whole, int((seconds - whole) * 1e9))
        operation = _Operation(0, change, 0)
        try:
            _checked(_libc.semtimedop(self._semaphore, operation, 1, timeout))
        except OSError as error:
            # Somebody cleaned up (dmsetup udevcomplete_all): nothing is left to wait for.
            if error.errno not in _GONE:
                raise
