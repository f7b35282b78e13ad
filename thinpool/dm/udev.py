"""Waiting for udev around a command: who makes the node, and when a device is ready.

Where udevd runs, our rules (``55-thinpool.rules``) are put under /run before the first device is
made, unless they are installed or masked. With them, or with no rules for device-mapper at all,
udevd's announcements are listened to. The rules of device-mapper's own package alone make no link
unless a command carries a cookie, so there a cookie is waited for; each costs udevd two processes.
Where udevd doesn't run, there is nothing to wait for. In every case a node that is missing
afterwards is made by us.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol, Self

from thinpool import errors
from thinpool.dm import nodes
from thinpool.dm.cookies import QUIET, Cookie, UdevFlags
from thinpool.dm.events import DeviceMonitor
from thinpool.host.programs import run_program

if TYPE_CHECKING:
    from types import TracebackType

CONTROL_SOCKET: Final = "/run/udev/control"
WAIT_SECONDS: Final = 60.0
"""How long udevd may take for one device before that is an error."""

_SLICE_SECONDS: Final = 1.0
_IDLE_SLICES: Final = 2
_VOLATILE_RULES: Final = "/run/udev/rules.d"
_RULE_DIRECTORIES: Final = (
    "/etc/udev/rules.d",
    _VOLATILE_RULES,
    "/usr/local/lib/udev/rules.d",
    "/usr/lib/udev/rules.d",
    "/lib/udev/rules.d",
)
OWN_RULES: Final = "55-thinpool.rules"
RULES_PATH: Final = os.path.join(os.path.dirname(__file__), OWN_RULES)
"""The rules that come with this package."""
_COMPLETING_RULES: Final = "95-dm-notify.rules"
_QUEUE: Final = "/run/udev/queue"
"""Is there while udevd has something to do."""
_SEQUENCE: Final = "/sys/kernel/uevent_seqnum"
_OFF_VARIABLE: Final = "DM_DISABLE_UDEV"


class UdevMode(Enum):
    """How udev is waited for."""

    COOKIES = "cookies"
    EVENTS = "events"
    NONE = "none"


class Wait(Protocol):
    """What stands around one command that may raise an event. A context manager."""

    event_nr: int
    """What the command takes."""

    def finished(self, number: int, *, raised: bool) -> None:
        """The command succeeded: wait until udevd is done, if an event was raised.

        Args:
            number: the device's.
            raised: whether an event was raised.

        Raises:
            TimeoutError_: udevd is not.
        """
        ...

    def __enter__(self) -> Self:
        """Itself."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of what it holds."""
        ...


def prepare() -> UdevMode:
    """The way that works here, for making devices: our rules are put in place where they lack."""
    if detect() is not UdevMode.NONE:
        put_rules()
    return detect()


def detect() -> UdevMode:
    """The way that works here as it is now."""
    if os.environ.get(_OFF_VARIABLE) == "1" or not is_running():
        return UdevMode.NONE
    cookies = rules_file(OWN_RULES) is None and rules_file(_COMPLETING_RULES) is not None
    return UdevMode.COOKIES if cookies and _semaphores() else UdevMode.EVENTS


def put_rules() -> bool:
    """Put our rules where udevd reads them until the next boot, unless it has them.

    Devices of ours exist only after a client was here, so nothing needs them before. Rules that
    an administrator installed, or masked (a link to /dev/null), are left alone.

    Returns:
        Whether udevd has our rules now.
    """
    target = f"{_VOLATILE_RULES}/{OWN_RULES}"
    present = rules_file(OWN_RULES, masked=True)
    try:
        with open(RULES_PATH, "rb") as file:
            text = file.read()
        if present is not None:
            with open(present, "rb") as file:
                if present != target or file.read() == text:
                    return os.path.realpath(present) != os.devnull
        os.makedirs(_VOLATILE_RULES, exist_ok=True)
        fresh = f"{target}.{os.getpid()}.{threading.get_ident()}"  # no name that udevd reads
        with open(fresh, "wb") as file:
            file.write(text)
        os.replace(fresh, target)
        # It asks udevd, and waits for the answer.
        run_program("udevadm", ["control", "--reload"], package="udev")
    except (OSError, errors.ThinpoolError):
        return False
    return True


def is_running() -> bool:
    """Whether a udevd answers at its socket: one that died leaves the socket behind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(CONTROL_SOCKET)
        except PermissionError:
            return True  # it is there, and not ours to ask
        except OSError:
            return False
    return True


def rules_file(name: str, *, masked: bool = False) -> str | None:
    """Where a file of udev rules is; None where it is nowhere, or is masked unless asked for."""
    for directory in _RULE_DIRECTORIES:
        path = f"{directory}/{name}"
        if os.path.lexists(path):
            return path if masked or os.path.realpath(path) != os.devnull else None
    return None


def wait_for(mode: UdevMode, device: str, *, quiet: bool, seconds: float) -> Wait:
    """What to put around a command on a device."""
    if mode is UdevMode.COOKIES:
        return _CookieWait(device, QUIET if quiet else UdevFlags(0), seconds)
    if mode is UdevMode.EVENTS:
        return _EventWait(device, seconds)
    return no_wait()


def no_wait() -> Wait:
    """For a command that raises no event."""
    return _NoWait()


def _semaphores() -> bool:
    try:
        Cookie().close()
    except OSError:
        return False
    return True


class _NoWait:
    """No udevd."""

    event_nr = 0

    def finished(self, number: int, *, raised: bool) -> None:
        """Nothing to wait for."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _CookieWait:
    """Udevd's last rule counts a semaphore down."""

    def __init__(self, device: str, flags: UdevFlags, seconds: float) -> None:
        self._device, self._seconds = device, seconds
        try:
            self._cookie = Cookie()
        except OSError as cause:
            message = f"cannot wait for udev with {device}: {os.strerror(cause.errno or 0)}"
            if cause.errno == errno.ENOSPC:
                message += "; remove leftovers with: dmsetup udevcomplete_all"
            raise errors.UnsupportedHostError(
                message, missing="System V semaphores", device=device, errno=cause.errno
            ) from cause
        self.event_nr = self._cookie.value(flags)

    def finished(self, number: int, *, raised: bool) -> None:  # noqa: ARG002 - the cookie tells
        if not raised:
            self._cookie.forgo()
        deadline = time.monotonic() + self._seconds
        while not self._cookie.wait(min(_SLICE_SECONDS, self._seconds)):
            if not is_running():
                return  # died under us: nobody will finish, and the nodes are ours to make
            if time.monotonic() >= deadline:
                raise _late(self._device, self._seconds)

    def __enter__(self) -> Self:
        self._cookie.expect()
        return self

    def __exit__(self, *_: object) -> None:
        self._cookie.close()


class _EventWait:
    """Udevd announces each event when it has finished with it, a device's in their order.

    Ours is the first of the device that is younger than the command's beginning. Announcements
    that were lost (a full socket) are made up for by udevd's queue: when that is empty twice, so
    that udevd had the time to hear of the event, it is done.
    """

    event_nr = 0

    def __init__(self, device: str, seconds: float) -> None:
        self._device, self._seconds = device, seconds
        self._monitor = DeviceMonitor()
        self._before = 0

    def finished(self, number: int, *, raised: bool) -> None:
        deadline = time.monotonic() + self._seconds
        idle = 0
        while raised:
            left = min(_SLICE_SECONDS, max(0.0, deadline - time.monotonic()))
            event = self._monitor.next_event(left)
            if event is None:
                idle = 0 if os.path.exists(_QUEUE) else idle + 1
                if idle == _IDLE_SLICES or not is_running():
                    return
            elif event.number == number and event.sequence > self._before:
                return
            if time.monotonic() >= deadline:
                raise _late(self._device, self._seconds)

    def __enter__(self) -> Self:
        with open(_SEQUENCE, encoding="ascii") as file:
            self._before = int(file.read())
        return self

    def __exit__(self, *_: object) -> None:
        self._monitor.close()


def _late(device: str, seconds: float) -> errors.TimeoutError_:
    return errors.TimeoutError_(
        f"udevd has not finished with {nodes.path_of(device)} within {seconds:g} s: look at its"
        " queue (udevadm settle) and log, or set DM_DISABLE_UDEV=1 to do without it",
        holder="udevd",
        timeout=seconds,
        device=device,
    )
