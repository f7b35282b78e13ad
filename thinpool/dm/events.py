"""Events: of a device (mode changes, low water) and of udev (devices come, change and go).

A device's event number counts what happens to it. The control device says when any device's has
changed, so one poll waits for many devices, for a timeout and for ``cancel`` at once. Crossing
the low-water mark raises such an event, and no uevent.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from thinpool import errors
from thinpool.dm import abi
from thinpool.dm.control import Control, as_kind, failure

if TYPE_CHECKING:
    from types import TracebackType

_POLL_SINCE: Final = (4, 37, 0)
_threads: Final = threading.local()


class DeviceEvents:
    """Waits for event numbers. One thread waits; any thread may cancel."""

    def __init__(self) -> None:
        """Open a control device of its own: what was seen is remembered with the descriptor.

        Raises:
            UnsupportedHostError: no device-mapper, or one that cannot be polled (before 4.37).
            NotPermittedError: not for this user.
        """
        self._control = Control()
        if self._control.versions < _POLL_SINCE:
            self._control.close()
            message = "this kernel's device-mapper cannot be polled for events: Linux 4.14 can"
            raise errors.UnsupportedHostError(message, missing="DEV_ARM_POLL")
        self._cancelled = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def wait(self, name: str, event_nr: int, *, timeout: float | None = None) -> int | None:
        """Wait until a device's event number is another than the one given.

        Args:
            name: the device.
            event_nr: the number that was seen last.
            timeout: seconds; None for ever.

        Returns:
            The number now; None when the time was over.

        Raises:
            NotFoundError: no such device, or it ended meanwhile.
            InterruptedError_: cancelled.
            ClosedError: closed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        poller = select.poll()
        poller.register(self._control.fileno(), select.POLLIN)
        poller.register(self._cancelled, select.POLLIN)
        while True:
            current = self._armed(name)
            if current != event_nr:
                return current
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            ready = {fd for fd, _ in poller.poll(None if left is None else left * 1000 + 1)}
            if self._cancelled in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._cancelled)
                message = f"the wait for an event of the device {name} was cancelled"
                raise errors.InterruptedError_(message, device=name)

    def cancel(self) -> None:
        """End the wait that runs, or the next one."""
        os.eventfd_write(self._cancelled, 1)

    def close(self) -> None:
        """Let go; not while another thread waits."""
        self._control.close()
        fd, self._cancelled = self._cancelled, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _armed(self, name: str) -> int:
        """Arm the poll, then look: what happens between is seen by the poll."""
        command = abi.Command.DEV_ARM_POLL
        try:
            self._control.call(command)
            command = abi.Command.DEV_STATUS
            header, _ = self._control.call(command, name=name)
        except OSError as cause:
            number = cause.errno or 0
            if number == errno.ENXIO:
                message = f"there is no device {name} to wait for"
                raise as_kind(errors.NotFoundError, command, name, number, message) from cause
            raise failure(command, name, number, f"cannot wait for the device {name}") from cause
        return header.event_nr


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceEvent:
    """What udev says of a device-mapper device.

    Attributes:
        action: add, change, remove, …
        number: the device number; ``node``: its kernel name's path, /dev/dm-N.
        name, uuid: as the rules found them; None where they did not (source ``kernel``).
        cookie: of the command that raised it; None for none.
        sequence: the kernel's number of the event.
    """

    action: str
    sequence: int
    number: int
    node: str
    name: str | None
    uuid: str | None
    cookie: int | None


class DeviceMonitor:
    """Listens to events of block devices, from the moment it is made. One thread uses it."""

    def __init__(self, source: Literal["udev", "kernel"] = "udev") -> None:
        """Begin to listen.

        Args:
            source: ``udev`` is heard after udevd has finished with a device, ``kernel`` at once
                and without a udevd.

        Raises:
            UnsupportedHostError: libudev is not there.
        """
        context = _context()
        import pyudev  # noqa: PLC0415 - loads libudev, which few need

        self._monitor: Any = pyudev.Monitor.from_netlink(context, source=source)
        self._monitor.filter_by("block")
        self._monitor.start()

    def next_event(self, timeout: float | None = None) -> DeviceEvent | None:
        """The next event of a device-mapper device; None when ``timeout`` seconds were over."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            device = self._monitor.poll(left)
            if device is None:
                return None
            if device.sys_name.startswith("dm-"):
                return _event(device)

    def close(self) -> None:
        """Stop listening; pyudev closes the socket with its last reference."""
        self._monitor = None

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def _context() -> Any:  # noqa: ANN401 - pyudev is untyped
    """One a thread: libudev's are not thread-safe, and each takes a look at all libraries."""
    context = getattr(_threads, "context", None)
    if context is None:
        try:
            import pyudev  # noqa: PLC0415 - as above

            context = _threads.context = pyudev.Context()
        except ImportError as cause:
            message = "udev's events cannot be heard: libudev is not installed"
            raise errors.UnsupportedHostError(message, missing="libudev") from cause
    return context


def _event(device: Any) -> DeviceEvent:  # noqa: ANN401 - pyudev is untyped
    properties = device.properties
    cookie = properties.get("DM_COOKIE")
    return DeviceEvent(
        action=device.action,
        sequence=device.sequence_number,
        number=device.device_number,
        node=f"/dev/{device.sys_name}",
        name=properties.get("DM_NAME"),
        uuid=properties.get("DM_UUID"),
        cookie=None if cookie is None else int(cookie),
    )
