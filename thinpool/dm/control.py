"""The control device: opening it, one command at a time, and errors that say what to do.

A command's errno becomes a type of thinpool.errors with the attributes ``command`` (the ioctl's
name), ``device`` and ``errno``. What the kernel logged meanwhile, which is where it says why it
refused a table, is quoted.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from typing import TYPE_CHECKING, Final, Self

from thinpool import errors
from thinpool.dm import abi

if TYPE_CHECKING:
    from collections.abc import Mapping

CONTROL: Final = "/dev/mapper/control"

_NUMBER: Final = os.makedev(10, 236)
"""Documentation/admin-guide/devices.txt; opening it loads the module."""
_MISC_MAJOR_NAME: Final = "misc"
_MISC_NAME: Final = "device-mapper"
_FIRST_BUFFER: Final = 4096
_LOG_PREFIX: Final = "device-mapper:"
_LOG_RECORD: Final = 8192
_LOG_RECORDS_MAX: Final = 4096

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)

_KINDS: Final[Mapping[int, type[errors.ThinpoolError]]] = {
    errno.ENXIO: errors.NotFoundError,
    errno.ENODEV: errors.NotFoundError,
    errno.ENOENT: errors.NotFoundError,
    errno.ENODATA: errors.NotFoundError,
    errno.EEXIST: errors.AlreadyExistsError,
    errno.EBUSY: errors.BusyError,
    errno.EACCES: errors.NotPermittedError,
    errno.EPERM: errors.NotPermittedError,
    errno.ENOTTY: errors.UnsupportedHostError,
    errno.ENOMEM: errors.NoMemoryError,
    errno.ENOSPC: errors.NoSpaceError,
    errno.EIO: errors.StorageIOError,
}
"""Everything else is a DeviceMapperError."""


def failure(
    command: abi.Command, device: str | None, number: int, said: str, **attributes: object
) -> errors.ThinpoolError:
    """The typed error of a failed command.

    Args:
        command: the ioctl.
        device: the device's name; None for commands that have none.
        number: the errno.
        said: what was asked, what stands in the way and what to do; the errno is added.
        attributes: what else the type carries.
    """
    return as_kind(_KINDS.get(number, errors.DeviceMapperError), command, device, number, said,
                   **attributes)  # fmt: skip


def as_kind(
    kind: type[errors.ThinpoolError],
    command: abi.Command,
    device: str | None,
    number: int,
    said: str,
    **attributes: object,
) -> errors.ThinpoolError:
    """An error of a given type, with what all errors of this interface carry."""
    carried: dict[str, object] = {"command": command.name, "device": device, "errno": number}
    if issubclass(kind, errors.BusyError):
        carried["holder"] = None
    elif issubclass(kind, errors.AlreadyExistsError):
        carried["existing"] = None
    elif issubclass(kind, errors.NotPermittedError):
        carried["operation"] = command.name
    elif issubclass(kind, errors.UnsupportedHostError):
        carried["missing"] = command.name
    carried.update(attributes)
    return kind(f"{said} ({command.name}: {os.strerror(number)})", **carried)


def _ioctl(fd: int, command: abi.Command, buffer: bytearray) -> None:
    """Send a command in a buffer that the answer replaces.

    Not fcntl.ioctl, which with more than 1 KiB keeps the interpreter's lock: a command may wait in
    the kernel for what another thread of ours has yet to do.

    Raises:
        OSError: as the kernel gave it.
    """
    area = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    if _libc.ioctl(fd, command, ctypes.byref(area)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Control:
    """An open control device. Thread-safe: each command has a buffer of its own."""

    def __init__(self) -> None:
        """Open it.

        Raises:
            UnsupportedHostError: the kernel has no device-mapper.
            NotPermittedError: this user may not use it.
        """
        self._fd: int | None = open_control()
        self.versions = self._negotiated()

    def call(
        self,
        command: abi.Command,
        *,
        name: str | None = None,
        uuid: str | None = None,
        flags: int = 0,
        event_nr: int = 0,
        dev: int = 0,
        target_count: int = 0,
        payload: bytes = b"",
    ) -> tuple[abi.Header, bytearray]:
        """Send one command, again with a larger buffer until the answer fits.

        Raises:
            OSError: as the kernel gave it.
            ClosedError: this was closed.
        """
        fd = self.fileno()
        size = max(_FIRST_BUFFER, abi.HEADER.size + len(payload))
        encoded = b"" if name is None else os.fsencode(name)
        key = b"" if uuid is None else os.fsencode(uuid)
        while True:
            buffer = bytearray(size)
            if payload:
                buffer[abi.HEADER.size : abi.HEADER.size + len(payload)] = payload
            abi.pack_request(
                buffer, name=encoded, uuid=key, flags=flags, event_nr=event_nr, dev=dev,
                target_count=target_count,
            )  # fmt: skip
            try:
                _ioctl(fd, command, buffer)
            except InterruptedError:
                continue  # a signal for whichever thread; a handler that raises ends this
            header = abi.unpack_header(buffer)
            if not header.flags & abi.Flag.BUFFER_FULL:
                return header, buffer
            size *= 2
            if size > abi.BUFFER_MAX:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    def fileno(self) -> int:
        """The descriptor, for poll.

        Raises:
            ClosedError: this was closed.
        """
        if self._fd is None:
            raise errors.ClosedError("the device-mapper client was closed")
        return self._fd

    def close(self) -> None:
        """Let go; twice is once."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _negotiated(self) -> tuple[int, int, int]:
        try:
            header, _ = self.call(abi.Command.VERSION)
        except OSError as cause:
            self.close()
            if cause.errno in (errno.EACCES, errno.EPERM):
                raise _not_permitted(cause) from cause
            message = (
                f"the kernel's device-mapper speaks another interface than {abi.CLIENT_VERSION[0]}"
            )
            raise as_kind(
                errors.UnsupportedHostError,
                abi.Command.VERSION,
                None,
                cause.errno or 0,
                message,
                missing="device-mapper 4",
            ) from cause
        return (header.version_major, header.version_minor, header.version_patch)


def open_control() -> int:
    """A descriptor of the control device, whose node is made where it is missing.

    Raises:
        UnsupportedHostError, NotPermittedError: as for Control.
    """
    try:
        return _opened()
    except FileNotFoundError:
        pass
    except OSError as cause:
        raise _unusable(cause) from cause
    made = False
    try:
        made = _make_node()
        return _opened()
    except OSError as cause:
        if made:  # a node that leads nowhere would say that there is something
            with contextlib.suppress(OSError):
                os.unlink(CONTROL)
                os.rmdir(os.path.dirname(CONTROL))
        raise _unusable(cause) from cause


def _opened() -> int:
    return os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)


def _make_node() -> bool:
    """Make the node; False where somebody else just did.

    Its number is fixed, unless the kernel that runs says otherwise.
    """
    os.makedirs(os.path.dirname(CONTROL), exist_ok=True)
    try:
        os.mknod(CONTROL, 0o600 | stat.S_IFCHR, _registered_number() or _NUMBER)
    except FileExistsError:
        return False
    return True


def _registered_number() -> int | None:
    """The control device's number as /proc/devices and /proc/misc show it; None before it is."""
    with open("/proc/devices", encoding="ascii") as table:
        majors = [line.split() for line in table]
    with open("/proc/misc", encoding="ascii") as table:
        minors = [line.split() for line in table]
    major = [words[0] for words in majors if words[1:] == [_MISC_MAJOR_NAME]]
    minor = [words[0] for words in minors if words[1:] == [_MISC_NAME]]
    return os.makedev(int(major[0]), int(minor[0])) if major and minor else None


def _unusable(cause: OSError) -> errors.ThinpoolError:
    if cause.errno in (errno.EACCES, errno.EPERM):
        return _not_permitted(cause)
    return errors.UnsupportedHostError(
        f"this kernel has no device-mapper ({CONTROL}: {os.strerror(cause.errno or 0)}): load the"
        " module dm-thin-pool, or use the user engine",
        missing="device-mapper",
        command="open",
        device=CONTROL,
        errno=cause.errno,
    )


def _not_permitted(cause: OSError) -> errors.NotPermittedError:
    return errors.NotPermittedError(
        f"may not use device-mapper ({CONTROL}: {os.strerror(cause.errno or 0)}): it takes root"
        " (CAP_SYS_ADMIN); the user engine works without",
        operation="device-mapper",
        command="open",
        device=CONTROL,
        errno=cause.errno,
    )


class KernelLog:
    """What device-mapper writes to the kernel's log from now on; nothing where it can't be read."""

    def __init__(self) -> None:
        """Begin here."""
        self._fd: int | None = None
        with contextlib.suppress(OSError):
            self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)

    def lines(self) -> tuple[str, ...]:
        """Its lines since then."""
        found: list[str] = []
        if self._fd is None:
            return ()
        for _ in range(_LOG_RECORDS_MAX):
            try:
                record = os.read(self._fd, _LOG_RECORD)
            except BrokenPipeError:
                continue  # overwritten before we read it; the next one stands
            except OSError:
                break
            head, _, rest = record.partition(b";")
            text = os.fsdecode(rest).partition("\n")[0]
            if head and text.startswith(_LOG_PREFIX):
                found.append(text.removeprefix(_LOG_PREFIX).strip())
        return tuple(found)

    def close(self) -> None:
        """Let go."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        """The log itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()
