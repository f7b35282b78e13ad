"""The system calls that Python's library does not offer, through ctypes.

Every call drops the GIL while it runs and raises OSError with the errno on failure. Numbers of
the mount API are the same on every architecture but alpha (include/uapi/asm-generic/unistd.h).
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)

_SYS_MOVE_MOUNT: Final = 429
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432

FSOPEN_CLOEXEC: Final = 0x1
FSMOUNT_CLOEXEC: Final = 0x1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
_MOVE_MOUNT_T_SYMLINKS: Final = 0x10
_MOVE_MOUNT_T_AUTOMOUNTS: Final = 0x20

FSCONFIG_SET_FLAG: Final = 0
FSCONFIG_SET_STRING: Final = 1
FSCONFIG_CMD_CREATE: Final = 6

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
_AT_NO_AUTOMOUNT: Final = 0x800
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_BASIC: Final = 0x7FF
_STATX_DIOALIGN: Final = 0x2000

_char_p = ctypes.c_char_p
_long = ctypes.c_long
_int = ctypes.c_int
_uint = ctypes.c_uint

_libc.mount.argtypes = [_char_p, _char_p, _char_p, ctypes.c_ulong, _char_p]
_libc.umount2.argtypes = [_char_p, _int]
_libc.syncfs.argtypes = [_int]
_libc.unshare.argtypes = [_int]
_libc.statx.argtypes = [_int, _char_p, _int, _uint, ctypes.c_void_p]
_libc.syscall.restype = _long


def _checked(result: int, path: str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """Mount a filesystem the old way, in one call."""
    arguments = (os.fsencode(source), os.fsencode(target), fstype.encode(), flags, data.encode())
    _checked(_libc.mount(*arguments), target)


def umount2(target: str, flags: int) -> None:
    """Unmount what is topmost at a path."""
    _checked(_libc.umount2(os.fsencode(target), flags), target)


def syncfs(fd: int) -> None:
    """Write the filesystem of a descriptor back; an earlier failed write-back is reported too."""
    _checked(_libc.syncfs(fd))


def unshare(flags: int) -> None:
    """Leave what the flags name to the others: CLONE_NEWNS is the mount namespace."""
    _checked(_libc.unshare(flags))


def fsopen(fstype: str) -> int:
    """Open a descriptor on which a superblock is configured."""
    kind = _char_p(fstype.encode())
    return _checked(_libc.syscall(_long(_SYS_FSOPEN), kind, _uint(FSOPEN_CLOEXEC)))


def fsconfig(fd: int, command: int, key: str | None = None, value: str | None = None) -> None:
    """Configure a superblock: one option, or the command to make it."""
    _checked(
        _libc.syscall(
            _long(_SYS_FSCONFIG),
            _int(fd),
            _uint(command),
            _char_p(None if key is None else key.encode()),
            _char_p(None if value is None else os.fsencode(value)),
            _int(0),
        )
    )


def fsmount(fd: int, attributes: int) -> int:
    """Make a descriptor of a mount that hangs nowhere; closing it unmounts."""
    flags = _uint(FSMOUNT_CLOEXEC)
    return _checked(_libc.syscall(_long(_SYS_FSMOUNT), _int(fd), flags, _uint(attributes)))


def move_mount(fd: int, target: str) -> None:
    """Put the mount of a descriptor at a path, whose links are followed as mount(2) does."""
    _checked(
        _libc.syscall(
            _long(_SYS_MOVE_MOUNT),
            _int(fd),
            _char_p(b""),
            _int(AT_FDCWD),
            _char_p(os.fsencode(target)),
            _uint(_MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_SYMLINKS | _MOVE_MOUNT_T_AUTOMOUNTS),
        ),
        target,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """What statx says of a file without asking a remote or FUSE server.

    Attributes:
        device: number of the device the file lies on.
        rdev: number of the device the file stands for; 0 for what is no device node.
        direct_io_offset: alignment that O_DIRECT wants of offsets, 0 unknown or unsupported.
        direct_io_reported: whether the filesystem reports its O_DIRECT alignment at all.
    """

    device: int
    rdev: int
    direct_io_offset: int
    direct_io_reported: bool


class _Statx(ctypes.Structure):
    """struct statx of linux/stat.h, 256 bytes; only the fields read here are named."""

    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("_head", ctypes.c_uint8 * 124),
        ("rdev_major", ctypes.c_uint32),
        ("rdev_minor", ctypes.c_uint32),
        ("dev_major", ctypes.c_uint32),
        ("dev_minor", ctypes.c_uint32),
        ("mnt_id", ctypes.c_uint64),
        ("dio_mem_align", ctypes.c_uint32),
        ("dio_offset_align", ctypes.c_uint32),
        ("_tail", ctypes.c_uint8 * 96),
    )


def statx(path: str, *, fd: int = AT_FDCWD) -> FileIdentity:
    """Ask for a file without waiting for a FUSE or network server; "" means ``fd`` itself."""
    record = _Statx()
    flags = _AT_STATX_DONT_SYNC | _AT_NO_AUTOMOUNT | (0 if path else AT_EMPTY_PATH)
    name = os.fsencode(path)
    mask = _STATX_BASIC | _STATX_DIOALIGN
    _checked(_libc.statx(fd, name, flags, mask, ctypes.byref(record)), path)
    return FileIdentity(
        device=os.makedev(record.dev_major, record.dev_minor),
        rdev=os.makedev(record.rdev_major, record.rdev_minor),
        direct_io_offset=record.dio_offset_align,
        direct_io_reported=bool(record.mask & _STATX_DIOALIGN),
    )
