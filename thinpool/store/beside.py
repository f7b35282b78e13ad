"""A thread beside, for one flush at a time: begun by one, waited for perhaps in the C core."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable


class Running:
    """Something that runs in the thread beside; ends in any case, and soon.

    Attributes:
        result: of it, once it has ended; None where it raised.
    """

    def __init__(self, due: threading.Lock, ended: int) -> None:
        """It is about to begin."""
        self._due: Final = due
        self._ended: Final = ended
        self._is_started = False
        self._seen = False
        self.result: object = None

    def start(self) -> None:
        """Begin, unless it has begun.

        Best just before the interpreter is left for long: the thread that is woken needs it.
        """
        if not self._is_started:
            self._is_started = True
            self._due.release()

    def fileno(self) -> int:
        """Readable from when it has ended, until that was waited for."""
        return self._ended

    def wait(self) -> None:
        """Until it has ended; begins it if need be. By the thread that starts it."""
        self.start()
        if not self._seen:
            os.eventfd_read(self._ended)
            self._seen = True


class Beside:
    """The thread. Used by one thread at a time, which waits for what it began."""

    def __init__(self, name: str) -> None:
        """It is started when it is first needed."""
        self._name = name
        self._ended = os.eventfd(0, os.EFD_CLOEXEC)
        # A plain lock, taken here and released there, is the lightest of all that wakes a thread.
        self._due = threading.Lock()
        self._due.acquire()
        self._work: tuple[Callable[[], object], Running] | None = None
        self._thread: threading.Thread | None = None

    def prepare(self, work: Callable[[], object]) -> Running:
        """Have a function run there, which should not raise, when it is started."""
        running = Running(self._due, self._ended)
        self._work = work, running
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        return running

    def _run(self) -> None:
        while True:
            self._due.acquire()
            if self._work is None:
                return
            work, running = self._work
            self._work = None
            try:
                running.result = work()
            finally:
                os.eventfd_write(self._ended, 1)

    def close(self) -> None:
        """End the thread. Nothing is running."""
        if self._thread is not None:
            self._work = None
            self._due.release()
            self._thread.join()
        os.close(self._ended)
