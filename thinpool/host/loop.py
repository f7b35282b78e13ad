"""Loop devices: block devices over files, with direct I/O that is verified to be on.

Devices are configured whole with LOOP_CONFIGURE (Linux 5.8), so there is no moment at which one
exists half set up. Auto-clear stays off: a device outlives the process that made it and ends by
``detach`` alone.

A device number is reused as soon as it is free. ``LoopDevice.sequence`` (the kernel's disk
sequence number, new at every attach and detach) tells a device from a later one of that number,
so that detaching twice, or after somebody else detached, never takes a stranger's device down.

Thread-safe. Facts: linux/loop.h; Documentation/ABI/testing/sysfs-block-loop.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import grp
import os
import stat
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.host.failures import failure
from thinpool.host.holders import describe, find_holders
from thinpool.host.mountinfo import MountEntry, mount_of, own_mounts

if TYPE_CHECKING:
    from collections.abc import Iterator

LOOP_MAJOR: Final = 7
SECTOR: Final = 512

_LOOP_CLR_FD: Final = 0x4C01
_LOOP_SET_STATUS64: Final = 0x4C04
_LOOP_GET_STATUS64: Final = 0x4C05
_LOOP_SET_CAPACITY: Final = 0x4C07
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_CTL_REMOVE: Final = 0x4C81
_LOOP_CTL_GET_FREE: Final = 0x4C82
_BLKGETDISKSEQ: Final = 0x80081280

_FLAG_READ_ONLY: Final = 1
_FLAG_AUTOCLEAR: Final = 4
_FLAG_DIRECT_IO: Final = 16

_NAME_SIZE: Final = 64
_INFO: Final = struct.Struct("=QQQQQIIII64s64s32sQQ")
"""struct loop_info64."""
_CONFIG: Final = struct.Struct(f"=II{_INFO.size}s8Q")
"""struct loop_config."""

_ATTACH_SECONDS: Final = 10.0
_DETACH_SECONDS: Final = 2.0
_SPOILED_TRIES: Final = 8
_FIRST_PAUSE: Final = 0.0005
_LONGEST_PAUSE: Final = 0.05
_DELETED: Final = " (deleted)"
_SYSFS_PAGE: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopDevice:
    """A loop device that is attached.

    Attributes:
        number: N of /dev/loopN; ``path``: that name.
        backing_file: path of the file below, as the kernel shows it to this process.
        deleted: whether that file's name is gone.
        offset: where the device starts in the file, bytes.
        size_limit: 0 for the rest of the file, else bytes.
        sequence: the disk sequence number; 0 where the kernel (before 5.15) has none.
    """

    number: int
    path: str
    backing_file: str
    deleted: bool
    offset: int
    size_limit: int
    read_only: bool
    direct_io: bool
    autoclear: bool
    sequence: int

    @property
    def device(self) -> int:
        """The device number."""
        return os.makedev(LOOP_MAJOR, self.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Status:
    """What LOOP_GET_STATUS64 says; the call asks the filesystem of the backing file."""

    device: int
    inode: int
    flags: int
    raw: bytes


class _Control:
    """The one descriptor of /dev/loop-control, and the lock under which numbers are taken.

    The lock spares the threads of one process the collisions; between processes the kernel
    refuses the loser, who asks for another number.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._fd: int | None = None
        self._pid = 0

    def free_number(self) -> int:
        """A number that is free now. Call with the lock held."""
        return fcntl.ioctl(self._opened(), _LOOP_CTL_GET_FREE)

    def remove(self, number: int) -> None:
        """Let a free device end altogether; without effect where somebody has it open."""
        with self.lock, contextlib.suppress(OSError):
            fcntl.ioctl(self._opened(), _LOOP_CTL_REMOVE, number)

    def _opened(self) -> int:
        if self._fd is None or self._pid != os.getpid():
            try:
                self._fd = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
            except OSError as cause:
                raise _no_loop(cause) from cause
            self._pid = os.getpid()
        return self._fd


_control: Final = _Control()


def attach(
    path: str | os.PathLike[str],
    *,
    offset: int = 0,
    size_limit: int = 0,
    read_only: bool = False,
    direct_io: bool = True,
    sector_size: int = SECTOR,
) -> LoopDevice:
    """Put a loop device over a file. May block on the filesystem that holds the file.

    Args:
        path: the file (or block device).
        offset: where the device starts in it, bytes, a multiple of the sector size.
        size_limit: bytes of the device at most; 0 for the rest of the file.
        read_only: opens the file for reading only too.
        direct_io: demand it; the device is taken down again where it can't be had.
        sector_size: logical sector size of the device, bytes.

    Raises:
        UnsupportedHostError: no loop devices here, or no direct I/O to this file.
        NotFoundError, NotPermittedError, StorageIOError: the file or the device can't be used.
        TimeoutError_: others took every number this one was offered, for 10 s.
    """
    name = os.path.abspath(path)
    if offset < 0 or size_limit < 0 or offset % sector_size or size_limit % sector_size:
        raise errors.UsageError(
            f"cannot attach {name}: offset {offset} and size limit {size_limit} "
            f"must be multiples of {sector_size}",
            path=name,
        )
    flags = (_FLAG_READ_ONLY if read_only else 0) | (_FLAG_DIRECT_IO if direct_io else 0)
    try:
        access = os.O_RDONLY if read_only else os.O_RDWR
        backing = os.open(name, access | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as cause:
        raise failure(cause, f"cannot attach {name}", path=name) from cause
    with _closing(backing):
        _refuse_what_is_no_disk(backing, name)
        fcntl.fcntl(backing, fcntl.F_SETFL, 0)  # O_NONBLOCK was for opening a pipe by mistake
        for _ in range(_SPOILED_TRIES):
            number, fd = _configure(
                backing,
                name=name,
                offset=offset,
                size_limit=size_limit,
                flags=flags,
                sector_size=sector_size,
            )
            with _closing(fd):
                try:
                    _guard_node(fd)
                    if not _is_spoiled(number):
                        _verify(number, name=name, direct_io=direct_io)
                        return LoopDevice(
                            number=number,
                            path=f"/dev/loop{number}",
                            backing_file=name,
                            deleted=False,
                            offset=offset,
                            size_limit=size_limit,
                            read_only=read_only,
                            direct_io=direct_io,
                            autoclear=False,
                            sequence=_sequence(fd),
                        )
                except BaseException:
                    _abandon(fd)
                    raise
                _abandon(fd)
            _control.remove(number)
    raise errors.UnsupportedHostError(
        f"cannot attach {name}: the loop device offered has discards turned off for good",
        missing="discard",
        path=name,
    )


def detach(device: LoopDevice | str, *, timeout: float = _DETACH_SECONDS) -> bool:
    """Take a loop device down. Repeatable.

    Args:
        device: as ``attach`` or ``list_all`` gave it, or a path.
        timeout: seconds to wait for others to let go of it (udev looks at each new device).

    Returns:
        True if this call took it down, False if it was down already (or its number serves
        something else by now).

    Raises:
        BusyError: it is in use; ``holder`` says by whom. It stays attached.
        NotFoundError, NotPermittedError, UsageError: there is no such loop device.
    """
    path = device if isinstance(device, str) else device.path
    number = _number_of(path)
    wanted = 0 if isinstance(device, str) else device.sequence
    deadline = time.monotonic() + timeout
    pauses = _pauses()
    while True:
        outcome = _try_detach(path, number, wanted)
        if outcome is not None:
            return outcome
        if time.monotonic() >= deadline:
            raise _busy(path, number)
        time.sleep(next(pauses))


def detach_when_unused(device: LoopDevice) -> None:
    """Let a device in use go by itself when its last user has let go of it. Repeatable.

    For devices over a dead server: ``detach`` is for all others.
    """
    with contextlib.suppress(FileNotFoundError), _opened(device.path, os.O_RDONLY) as fd:
        if device.sequence and _sequence(fd) not in (0, device.sequence):
            return
        _guard_node(fd)
        _clear(fd, device.path)


def set_capacity(device: LoopDevice | str) -> int:
    """Let the device follow its file's size; returns the size in bytes afterwards."""
    path = device if isinstance(device, str) else device.path
    below = describe_number(_number_of(path))
    try:
        if below is not None:
            with contextlib.suppress(OSError):
                os.stat(below.backing_file)  # older kernels go by the size they last heard of
        with _opened(path, os.O_RDONLY) as fd:
            fcntl.ioctl(fd, _LOOP_SET_CAPACITY)
            return os.lseek(fd, 0, os.SEEK_END)
    except OSError as cause:
        raise failure(cause, f"cannot resize {path}", path=path) from cause


def describe_number(number: int) -> LoopDevice | None:
    """The device of that number if it is attached, from sysfs: never waits for a server."""
    directory = f"/sys/block/loop{number}"
    text = _attribute(f"{directory}/loop/backing_file")
    if text is None:
        return None
    deleted = text.endswith(_DELETED)
    return LoopDevice(
        number=number,
        path=f"/dev/loop{number}",
        backing_file=text.removesuffix(_DELETED),
        deleted=deleted,
        offset=int(_attribute(f"{directory}/loop/offset") or 0),
        size_limit=int(_attribute(f"{directory}/loop/sizelimit") or 0),
        read_only=_attribute(f"{directory}/ro") == "1",
        direct_io=_attribute(f"{directory}/loop/dio") == "1",
        autoclear=_attribute(f"{directory}/loop/autoclear") == "1",
        sequence=int(_attribute(f"{directory}/diskseq") or 0),
    )


def open_device(number: int, *, read_only: bool) -> int:
    """Open a loop device by number, attached or not; its node is made where /dev lacks it.

    Raises:
        OSError: as the system says.
    """
    path = f"/dev/loop{number}"
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        # A /dev that is no devtmpfs (a privileged container's) has the nodes of its start only.
        with contextlib.suppress(FileExistsError):
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(LOOP_MAJOR, number))
        return os.open(path, flags)


def list_all() -> list[LoopDevice]:
    """Every attached loop device of the host, by number; never waits for a server."""
    numbers = []
    with contextlib.suppress(FileNotFoundError):
        numbers = [
            int(name.removeprefix("loop"))
            for name in os.listdir("/sys/block")
            if name.startswith("loop") and name.removeprefix("loop").isdigit()
        ]
    found = (describe_number(number) for number in sorted(numbers))
    return [device for device in found if device is not None]


def find(path: str | os.PathLike[str]) -> list[LoopDevice]:
    """The loop devices over a file: its own inode where it can be asked, else its path.

    The same file under another name (a hard link, another mount namespace) is found too. A
    device whose kernel-shown path is the very path asked for is taken at its word when that
    path can't be looked at, so devices over an aborted FUSE mount are found. Other files on
    FUSE and network filesystems aren't asked for theirs: a hung server there is not ours.
    """
    name = os.path.abspath(path)
    try:
        file = os.stat(name)
    except OSError:
        file = None
    table = own_mounts()
    return [device for device in list_all() if _is_over(device, name, file, table)]


def find_below(directory: str | os.PathLike[str]) -> list[LoopDevice]:
    """The loop devices whose file lies under a directory, by the path the kernel shows."""
    prefix = os.path.join(os.path.abspath(directory), "")
    return [device for device in list_all() if device.backing_file.startswith(prefix)]


# ---- the steps ----------------------------------------------------------------------------


def _configure(
    backing: int, *, name: str, offset: int, size_limit: int, flags: int, sector_size: int
) -> tuple[int, int]:
    """Take a free device and configure it; returns its number and an open descriptor."""
    label = os.fsencode(name)[: _NAME_SIZE - 1]
    info = _INFO.pack(0, 0, 0, offset, size_limit, 0, 0, 0, flags, label, b"", b"", 0, 0)
    config = _CONFIG.pack(backing, sector_size, info, *([0] * 8))
    deadline = time.monotonic() + _ATTACH_SECONDS
    pauses = _pauses()
    while True:
        try:
            with _control.lock:
                number = _control.free_number()
                fd = open_device(number, read_only=bool(flags & _FLAG_READ_ONLY))
                try:
                    fcntl.ioctl(fd, _LOOP_CONFIGURE, config)
                except BaseException:
                    os.close(fd)
                    raise
        except OSError as cause:
            # EBUSY: another process was quicker, or looks at the device just now. ENXIO,
            # ENOENT: it was removed between the two steps.
            if cause.errno not in (errno.EBUSY, errno.ENXIO, errno.ENOENT, errno.EAGAIN):
                raise failure(cause, f"cannot attach {name} to a loop device", path=name) from cause
            if time.monotonic() >= deadline:
                raise errors.TimeoutError_(
                    f"cannot attach {name}: no loop device could be had in {_ATTACH_SECONDS:g} s",
                    holder=None,
                    timeout=_ATTACH_SECONDS,
                ) from cause
            time.sleep(next(pauses))
        else:
            return number, fd


def _guard_node(fd: int) -> None:
    """Take back the rights that an activation for some user left on the device's node.

    A number is reused, its node with it: the rights to one volume must not open the next one.
    Groups that the host itself gives its disks stay.
    """
    node = os.fstat(fd)
    if node.st_uid == 0 and node.st_gid in _disk_groups() and not node.st_mode & 0o007:
        return
    with contextlib.suppress(PermissionError):
        os.fchmod(fd, 0o600)
        os.fchown(fd, 0, 0)


@functools.cache
def _disk_groups() -> frozenset[int]:
    try:
        return frozenset({0, grp.getgrnam("disk").gr_gid})
    except KeyError:
        return frozenset({0})


def _abandon(fd: int) -> None:
    """Take a device down that nobody was told of: it goes when ``fd`` is closed."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _LOOP_CLR_FD)


def _verify(number: int, *, name: str, direct_io: bool) -> None:
    found = _attribute(f"/sys/block/loop{number}/loop/dio")
    if found is None:
        raise errors.UnsupportedHostError(
            f"cannot attach {name}: sysfs isn't mounted at /sys, or another one is",
            missing="sysfs",
            path=name,
        )
    if direct_io and found != "1":
        raise errors.UnsupportedHostError(
            f"cannot attach {name}: its filesystem offers no direct I/O in units of the "
            "device's sectors, without which every page would be cached twice",
            missing="direct I/O",
            path=name,
        )


def _is_spoiled(number: int) -> bool:
    """Whether an earlier user of the number turned discards off for good.

    A zero written to discard_max_bytes outlives the attachment, and the kernel takes no other
    value afterwards (seen with Linux 6.18): only removing the device undoes it.
    """
    queue = f"/sys/block/loop{number}/queue"
    if _attribute(f"{queue}/discard_max_bytes") != "0":
        return False
    return (_attribute(f"{queue}/discard_max_hw_bytes") or "0") != "0"


def _try_detach(path: str, number: int, wanted: int) -> bool | None:
    """One try: True done, False was down already, None busy."""
    try:
        # Exclusive: fails while it is mounted or has a device on top, in any namespace.
        # LOOP_CLR_FD by itself would succeed and detach at some later time.
        fd = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as cause:
        if cause.errno == errno.EBUSY:
            return None if _still(number, wanted) else False
        if cause.errno in (errno.ENXIO, errno.ENOENT) and describe_number(number) is None:
            return False
        raise failure(cause, f"cannot detach {path}", path=path) from cause
    with _closing(fd):
        sequence = _sequence(fd)
        if wanted and sequence not in (0, wanted):
            return False
        _guard_node(fd)
        cleared = _clear(fd, path)
    if cleared is not True:
        return cleared
    # The last to close it takes it down. If that wasn't us, others have it open unexclusively.
    return None if _still(number, sequence) and _keep(path, sequence) else True


def _clear(fd: int, path: str) -> bool | None:
    """LOOP_CLR_FD: True asked for, False was down already, None busy."""
    try:
        fcntl.ioctl(fd, _LOOP_CLR_FD)
    except OSError as cause:
        if cause.errno == errno.ENXIO:
            return False
        if cause.errno == errno.EBUSY:
            return None
        raise failure(cause, f"cannot detach {path}", path=path) from cause
    return True


def _keep(path: str, sequence: int) -> bool:
    """Take back the auto-clear that LOOP_CLR_FD leaves on a device others have open.

    Returns:
        False if the others let go meanwhile and it is down.
    """
    try:
        with _opened(path, os.O_RDONLY) as fd:
            if _sequence(fd) != sequence:
                return False
            status = _status(fd)
            info = bytearray(status.raw)
            struct.pack_into("=I", info, 52, status.flags & ~_FLAG_AUTOCLEAR)
            fcntl.ioctl(fd, _LOOP_SET_STATUS64, bytes(info))
    except OSError as cause:
        if cause.errno in (errno.ENXIO, errno.ENOENT):
            return False
        # A dead server below: the flag can't be had back, and it's as well that it goes.
    return True


def _still(number: int, sequence: int) -> bool:
    """Whether the device of that number is attached and still the one meant."""
    device = describe_number(number)
    return device is not None and (not sequence or device.sequence in (0, sequence))


def _busy(path: str, number: int) -> errors.BusyError:
    holder = describe(find_holders(os.makedev(LOOP_MAJOR, number), path=path))
    known = holder or "by something not visible from here, perhaps another mount namespace"
    return errors.BusyError(f"cannot detach {path}: in use, {known}", holder=holder, device=path)


def _is_over(
    device: LoopDevice, name: str, file: os.stat_result | None, table: list[MountEntry]
) -> bool:
    same_text = device.backing_file == name and not device.deleted
    if file is None:
        return device.backing_file == name
    below = mount_of(device.backing_file, table)
    if not same_text and below is not None and below.has_server:
        return False
    try:
        with _opened(device.path, os.O_RDONLY) as fd:
            status = _status(fd)
    except OSError:
        return same_text
    return (status.device, status.inode) == (file.st_dev, file.st_ino)


def _status(fd: int) -> _Status:
    raw = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_INFO.size))
    device, inode, _rdevice, _offset, _limit, _number, _type, _key, flags, *_rest = _INFO.unpack(
        raw
    )
    return _Status(device=device, inode=inode, flags=flags, raw=raw)


def _sequence(fd: int) -> int:
    try:
        return int.from_bytes(fcntl.ioctl(fd, _BLKGETDISKSEQ, bytes(8)), "little")
    except OSError:
        return 0


def _number_of(path: str) -> int:
    """N of the loop device that a path leads to, even if its node's name says otherwise."""
    try:
        node = os.stat(path)
    except FileNotFoundError:
        digits = os.path.basename(path).removeprefix("loop")
        if digits.isdigit():
            return int(digits)
        raise errors.NotFoundError(f"there is no device {path}", path=path) from None
    except OSError as cause:
        raise failure(cause, f"cannot look at {path}", path=path) from cause
    if not stat.S_ISBLK(node.st_mode) or os.major(node.st_rdev) != LOOP_MAJOR:
        raise errors.UsageError(f"{path} is no loop device", path=path)
    return os.minor(node.st_rdev)


def _refuse_what_is_no_disk(fd: int, name: str) -> None:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise errors.UsageError(f"cannot attach {name}: neither file nor block device", path=name)


def _no_loop(cause: OSError) -> errors.ThinpoolError:
    if cause.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return errors.UnsupportedHostError(
            "cannot attach a loop device: there is no /dev/loop-control; load the module loop",
            missing="loop",
        )
    return failure(cause, "cannot open /dev/loop-control")


def _attribute(path: str) -> str | None:
    """A line of sysfs without its end, or None where it isn't there."""
    try:
        with _opened(path, os.O_RDONLY) as fd:
            return os.fsdecode(os.read(fd, _SYSFS_PAGE)).removesuffix("\n")
    except OSError:
        return None


def _pauses() -> Iterator[float]:
    pause = _FIRST_PAUSE
    while True:
        yield pause
        pause = min(pause * 2, _LONGEST_PAUSE)


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    with _closing(fd):
        yield fd


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)
