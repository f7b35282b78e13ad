"""The system call the standard library lacks: openat2(2).

Stateless and thread-safe; raises :class:`OSError` as the ``os`` module would.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

from thinpool.errors import UnsupportedHostError

# linux/openat2.h
RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10

# One number on every architecture (asm-generic since 5.6; Alpha, the exception, has no Debian).
_NR_OPENAT2: Final = 437
# A rename or mount anywhere on the host makes a ".." under RESOLVE_IN_ROOT answer EAGAIN.
_ATTEMPTS: Final = 1000


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_HOW_SIZE: Final = ctypes.c_size_t(ctypes.sizeof(_OpenHow))
_NUMBER: Final = ctypes.c_long(_NR_OPENAT2)


def openat2(dir_fd: int, path: bytes, flags: int, *, resolve: int, mode: int = 0) -> int:
    """Open ``path`` below ``dir_fd`` under the given resolve rules; close-on-exec.

    Args:
        dir_fd: the directory that relative names, and the root of RESOLVE_IN_ROOT, start from.
        path: without NUL bytes.
        flags: O_* of open(2).
        resolve: RESOLVE_* flags.
        mode: permission bits where ``flags`` creates.

    Returns:
        A descriptor that the caller owns.

    Raises:
        OSError: as open(2); EXDEV where a resolve rule forbids the path.
        UnsupportedHostError: the kernel (before 5.6) or a seccomp filter has no openat2.
    """
    if b"\0" in path:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    for _ in range(_ATTEMPTS):
        fd: int = _syscall(
            _NUMBER, ctypes.c_int(dir_fd), ctypes.c_char_p(path), ctypes.byref(how), _HOW_SIZE
        )
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        if number not in (errno.EAGAIN, errno.EINTR):
            break
    if number == errno.ENOSYS:
        raise UnsupportedHostError(
            "unpacking an archive safely needs the kernel's openat2 (Linux 5.6 or later)",
            missing="openat2",
        )
    raise OSError(number, os.strerror(number), os.fsdecode(path))
