"""What this host can do, and why not: for doctor, for choosing ways, for skipping tests.

Every probe tries the thing itself as far as that leaves no trace; none looks at versions. Device-
mapper's is thinpool.dm's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from thinpool.host import syscalls
from thinpool.host.loop import open_device
from thinpool.host.programs import find_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SYS_IO_URING_SETUP: Final = 425
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_CONFIG_SIZE: Final = 304
_CAP_SYS_RESOURCE: Final = 24
_PUNCH_KEEP_SIZE: Final = 3
_ALIGNMENT: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """One thing that a host has or lacks.

    Attributes:
        name: stable.
        reason: why it is lacking, for people; None where the host has it.
    """

    name: str
    reason: str | None

    @property
    def available(self) -> bool:
        """Whether the host has it."""
        return self.reason is None


def root() -> str | None:
    """Why this process isn't root; None where it is. So with all probes."""
    return None if os.geteuid() == 0 else "not root"


def fuse() -> str | None:
    """Serving volumes as files."""
    return _opens("/dev/fuse", os.O_RDWR) or _known_filesystem("fuse")


def loop() -> str | None:
    """Loop devices that are configured in one step (LOOP_CONFIGURE, Linux 5.8)."""
    control = "/dev/loop-control"
    reason = _opens(control, os.O_RDWR)
    if reason is not None:
        return reason
    try:
        with _closing(os.open(control, os.O_RDWR | os.O_CLOEXEC)) as fd:
            number = fcntl.ioctl(fd, _LOOP_CTL_GET_FREE)
        with _closing(open_device(number, read_only=True)) as fd:
            # With no file to configure it with: EBADF from a kernel that knows the call.
            config = struct.pack("=I", 0xFFFFFFFF) + bytes(_LOOP_CONFIG_SIZE - 4)
            fcntl.ioctl(fd, _LOOP_CONFIGURE, config)
    except OSError as error:
        if error.errno in (errno.EBADF, errno.EBUSY):
            return None
        return f"loop devices: {os.strerror(error.errno or 0)}"
    return None


def mounting() -> str | None:
    """The right to mount."""
    try:
        fs = syscalls.fsopen("tmpfs")
    except OSError as error:
        if error.errno == errno.ENOSYS:  # before Linux 5.2
            return root()
        return f"may not mount: {os.strerror(error.errno or 0)}"
    try:
        syscalls.fsconfig(fs, syscalls.FSCONFIG_CMD_CREATE)
        os.close(syscalls.fsmount(fs, 0))
    except OSError as error:
        return f"may not mount: {os.strerror(error.errno or 0)}"
    finally:
        os.close(fs)
    return None


def udev() -> str | None:
    """A udev daemon, which looks at each new device."""
    return None if os.path.exists("/run/udev/control") else "udevd isn't running"


def systemd() -> str | None:
    """Systemd as the host's init, for units of our own."""
    return None if os.path.isdir("/run/systemd/system") else "systemd isn't running"


def io_uring() -> str | None:
    """Asynchronous I/O by io_uring."""
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(120)
    number = ctypes.c_long(_SYS_IO_URING_SETUP)
    fd = libc.syscall(number, ctypes.c_uint(1), parameters)
    if fd >= 0:
        os.close(fd)
        return None
    code = ctypes.get_errno()
    if code == errno.EPERM:
        return "io_uring: not permitted (kernel.io_uring_disabled, or a filter of system calls)"
    return f"io_uring: {os.strerror(code)}"


def growing_mounted_ext4() -> str | None:
    """The right to grow ext4 while it is mounted."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("CapEff:"):
                held = int(line.split()[1], 16) >> _CAP_SYS_RESOURCE & 1
                return None if held else "this process lacks CAP_SYS_RESOURCE"
    return "capabilities can't be read"


def ext4() -> str | None:
    """Making ext4 and mounting it."""
    return _programs("mkfs.ext4", "debugfs", "e2fsck", "resize2fs") or _known_filesystem("ext4")


def xfs() -> str | None:
    """Making xfs and mounting it."""
    return _programs("mkfs.xfs") or _known_filesystem("xfs")


def direct_io(path: str | os.PathLike[str]) -> str | None:
    """O_DIRECT on a file, or on files made in a directory: tried with a read of 4 KiB."""
    try:
        with _closing(_probe_file(path, os.O_DIRECT)) as fd, mmap.mmap(-1, _ALIGNMENT) as buffer:
            os.preadv(fd, [buffer], 0)
    except OSError as error:
        return f"no direct I/O at {os.fspath(path)}: {os.strerror(error.errno or 0)}"
    return None


def hole_punching(directory: str | os.PathLike[str]) -> str | None:
    """Giving space of files in a directory back without shortening them."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    where = os.fspath(directory)
    try:
        with _closing(_probe_file(where, 0)) as fd:
            os.pwrite(fd, bytes(_ALIGNMENT), 0)
            if libc.fallocate(fd, _PUNCH_KEEP_SIZE, 0, _ALIGNMENT) == 0:
                return None
            return f"no hole punching at {where}: {os.strerror(ctypes.get_errno())}"
    except OSError as error:
        return f"no hole punching at {where}: {os.strerror(error.errno or 0)}"


PROBES: Final[dict[str, Callable[[], str | None]]] = {
    "root": root,
    "mount": mounting,
    "fuse": fuse,
    "loop": loop,
    "io_uring": io_uring,
    "udev": udev,
    "systemd": systemd,
    "ext4": ext4,
    "xfs": xfs,
    "grow-mounted-ext4": growing_mounted_ext4,
}


def probe_all(path: str | os.PathLike[str] | None = None) -> list[Capability]:
    """Every probe; with a directory, also what files in it can do."""
    found = [Capability(name=name, reason=probe()) for name, probe in PROBES.items()]
    if path is not None:
        found.append(Capability(name="direct-io", reason=direct_io(path)))
        found.append(Capability(name="punch-hole", reason=hole_punching(path)))
    return found


# ---- the steps ----------------------------------------------------------------------------


def _opens(path: str, flags: int) -> str | None:
    try:
        os.close(os.open(path, flags | os.O_CLOEXEC))
    except OSError as error:
        return f"{path}: {os.strerror(error.errno or 0)}"
    return None


def _known_filesystem(name: str) -> str | None:
    """Whether the kernel has a filesystem, loaded or to be loaded at the first mount."""
    with open("/proc/filesystems", encoding="ascii", errors="replace") as table:
        if any(line.split()[-1:] == [name] for line in table):
            return None
    modules = f"/lib/modules/{os.uname().release}"
    for listing in ("modules.dep", "modules.builtin"):
        with (
            contextlib.suppress(OSError),
            open(f"{modules}/{listing}", encoding="utf-8", errors="replace") as table,
        ):
            if any(f"/{name}.ko" in line.partition(":")[0] for line in table):
                return None
    return f"this kernel has no {name}"


def _programs(*names: str) -> str | None:
    missing = [name for name in names if find_program(name) is None]
    return f"{', '.join(missing)} not installed" if missing else None


def _probe_file(path: str | os.PathLike[str], flags: int) -> int:
    """The file itself, read only, or a nameless one in the directory."""
    if os.path.isdir(path):
        return os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
