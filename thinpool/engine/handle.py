"""What every handle on the C core has in common.

- A call counts itself, so that close cannot free what a call in another thread uses.
- A handle belongs to the process that opened it: after fork it says so instead of working.
- Forgotten handles are freed without committing, and warn.
"""

from __future__ import annotations

import os
import threading
import warnings
from typing import TYPE_CHECKING, Any, Self

from thinpool._native import ffi
from thinpool.engine.status import new_error
from thinpool.errors import BusyError, ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class Handle:
    """Owns one C object. Thread-safe.

    Args:
        pointer: the object.
        free: frees it when the handle is forgotten; must not commit anything.
        above: handles that the object uses, which it keeps open.
        what: names it in messages.
    """

    def __init__(
        self,
        pointer: Any,  # noqa: ANN401 - cffi's data has no type
        free: Callable[[Any], None],
        *,
        above: tuple[Handle, ...] = (),
        what: str,
    ) -> None:
        """Take ownership."""
        self._what = what
        self._pid = os.getpid()
        self._counting = threading.RLock()
        self._idle = threading.Condition(self._counting)
        self._calls = 0
        self._users = 0
        self._above = above
        # The backstop keeps what the object uses alive: it must not be freed first.
        self._pointer: Any = ffi.gc(
            pointer, _Backstop(free, self._pid, tuple(each.pointer for each in above))
        )
        for each in above:
            each.add_user()

    # ---- calls ------------------------------------------------------------------------------

    def in_call(self) -> _Call:
        """The pointer and a fresh tp_error, for one call."""
        return _Call(self)

    def begin_call(self) -> Any:  # noqa: ANN401 - cffi's data has no type
        """The pointer, until end_call."""
        with self._counting:
            pointer = self._checked()
            self._calls += 1
        return pointer

    def end_call(self) -> None:
        """Undo begin_call."""
        with self._counting:
            self._calls -= 1
            # Whoever waits for the last one has taken the pointer.
            if self._calls == 0 and self._pointer is None:
                self._idle.notify_all()

    @property
    def pointer(self) -> Any:  # noqa: ANN401 - cffi's data has no type
        """The C object, for one that is built on it and holds this handle as ``above``."""
        with self._counting:
            return self._checked()

    def _checked(self) -> Any:  # noqa: ANN401 - cffi's data has no type
        if self._pointer is None:
            raise ClosedError(f"{self._what} was closed", what=self._what)
        if os.getpid() != self._pid:
            raise ClosedError(
                f"{self._what} was opened before a fork, by process {self._pid}: "
                "open it in this process",
                what=self._what,
            )
        return self._pointer

    # ---- users ------------------------------------------------------------------------------

    def add_user(self) -> None:
        """Keep it from being closed."""
        with self._counting:
            self._checked()
            self._users += 1

    def drop_user(self) -> None:
        """Undo add_user."""
        with self._counting:
            self._users -= 1

    # ---- closing ----------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """It was closed."""
        return self._pointer is None

    def _take(self) -> Any:  # noqa: ANN401 - cffi's data has no type
        """The pointer, for the caller to free; None when that was done. Waits for calls to end."""
        with self._counting:
            if self._pointer is None:
                return None
            if os.getpid() != self._pid:
                self._pointer = None  # the backstop knows that it is not ours to free
                return None
            if self._users:
                raise BusyError(
                    f"{self._what} is used by {self._users} open handles: close these first",
                    what=self._what,
                    users=self._users,
                )
            pointer, self._pointer = self._pointer, None
            while self._calls:
                self._idle.wait()
            return pointer

    def _finish(self, pointer: Any, free: Callable[[Any], None]) -> None:  # noqa: ANN401 - as above
        try:
            free(pointer)
        except BusyError:
            with self._counting:
                self._pointer = pointer  # not freed, still ours
            raise
        except BaseException:
            self._disown(pointer)
            raise
        self._disown(pointer)

    def _disown(self, pointer: Any) -> None:  # noqa: ANN401 - as above
        ffi.gc(pointer, None)
        for each in self._above:
            each.drop_user()

    def _free(self, pointer: Any) -> None:  # noqa: ANN401 - as above
        """Free the object; raises BusyError when it was not freed."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the object; twice is fine.

        Raises:
            BusyError: other open handles use it; it stays open.
        """
        pointer = self._take()
        if pointer is not None:
            self._finish(pointer, self._free)

    def __enter__(self) -> Self:
        """The handle itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """Warn of a handle that nobody closed; its backstop frees it."""
        if getattr(self, "_pointer", None) is not None and os.getpid() == self._pid:
            warnings.warn(
                f"{self._what} was never closed", ResourceWarning, stacklevel=2, source=self
            )


class _Call:
    """One call of the library; every operation makes several, so it is no generator."""

    __slots__ = ("_handle",)

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def __enter__(self) -> tuple[Any, Any]:
        error = new_error()
        return self._handle.begin_call(), error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handle.end_call()


class _Backstop:
    """Frees a forgotten object, in the process that made it."""

    __slots__ = ("_above", "_free", "_pid")

    def __init__(self, free: Callable[[Any], None], pid: int, above: tuple[Any, ...]) -> None:
        self._free = free
        self._pid = pid
        self._above = above

    def __call__(self, pointer: Any) -> None:  # noqa: ANN401 - cffi's data has no type
        if os.getpid() == self._pid:
            self._free(pointer)
