"""A thread beside, for one flush at a time: begun by one, waited for perhaps in the C core."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.engine import flush_when_due
from thinpool.store.crashpoint import is_armed, reached

if TYPE_CHECKING:
    from collections.abc import Callable

_FLUSH: Final = 1
_END: Final = 2
_STEP: Final = "intent-flushed"


class Flushing:
    """A flush in the thread beside; ends in any case, and soon.

    Attributes:
        result: once it has ended, whether what was to be flushed is durable.
    """

    def __init__(
        self, due: int, ended: int, failed: Callable[[errors.ThinpoolError], bool]
    ) -> None:
        """It is about to begin."""
        self._due: Final = due
        self._ended: Final = ended
        self._failed: Final = failed
        self._is_started = False
        self._seen = False
        self.result = True

    def start(self) -> None:
        """Begin, unless it has begun."""
        if not self._is_started:
            self._is_started = True
            os.eventfd_write(self._due, _FLUSH)

    def fileno(self) -> int:
        """Readable from when it has ended, until that was waited for."""
        return self._ended

    def wait(self) -> None:
        """Until it has ended; begins it if need be. By the thread that starts it."""
        self.start()
        if not self._seen:
            os.eventfd_read(self._ended)
            self._seen = True

    def fail(self, error: errors.ThinpoolError) -> None:
        """Do what is to be done instead, in the thread beside."""
        self.result = False
        self.result = self._failed(error)


class Beside:
    """The thread. Used by one thread at a time, which waits for what it began.

    It stays in the C core from flush to flush: what is woken there needs no interpreter.
    """

    def __init__(self, name: str) -> None:
        """It is started when it is first needed."""
        self._name = name
        self._due = os.eventfd(0, os.EFD_CLOEXEC)
        self._ended = os.eventfd(0, os.EFD_CLOEXEC)
        self._now: Flushing | None = None
        self._thread: threading.Thread | None = None

    def prepare(self, fd: int, failed: Callable[[errors.ThinpoolError], bool]) -> Flushing:
        """Have a file flushed when that is started.

        Args:
            fd: of the file; the same each time. After a flush that failed there is no other.
            failed: does what is to be done where it fails, in the thread beside, before anybody is
                told that it has ended; whether what was to be flushed is durable then.
        """
        self._now = Flushing(self._due, self._ended, failed)
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, args=(fd,), name=self._name, daemon=True
            )
            self._thread.start()
        return self._now

    def _run(self, fd: int) -> None:
        while True:
            try:
                # Whoever is to die behind the flush comes back for that each time.
                flush_when_due(fd, due=self._due, ended=-1 if is_armed(_STEP) else self._ended)
            except errors.ClosedError:
                return
            except errors.ThinpoolError as error:
                assert self._now is not None  # noqa: S101 - it was begun
                try:
                    self._now.fail(error)
                finally:
                    os.eventfd_write(self._ended, 1)
                return
            reached(_STEP)
            os.eventfd_write(self._ended, 1)

    def close(self) -> None:
        """End the thread. Nothing is running."""
        if self._thread is not None:
            os.eventfd_write(self._due, _END)
            self._thread.join()
        os.close(self._due)
        os.close(self._ended)
