"""Removing directory trees by descriptor, at any depth, without following a link.

No recursion and one open descriptor at a time: a tree may be deeper than PATH_MAX, than Python's
stack and than the limit of open files. The way up is ``..``, checked against the inode the way down
came from; callers make sure that nobody moves directories meanwhile.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Final

OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Keep = Callable[[int, bytes], bool]
"""Whether to keep an entry: the inode number of its directory, its name."""


def _nothing(_inode: int, _name: bytes) -> bool:
    return False


def entries(fd: int) -> list[tuple[bytes, bool]]:
    """The names in a directory and whether each is a directory itself, in no order."""
    with os.scandir(fd) as found:
        return [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in found]


def open_directory(parent_fd: int, name: bytes) -> tuple[int, int]:
    """Open a directory that is no link: its descriptor, which the caller owns, and its inode."""
    fd = os.open(name, OPEN_DIRECTORY, dir_fd=parent_fd)
    return fd, os.fstat(fd).st_ino


def open_parent(fd: int, inode: int) -> int:
    """Open the directory above ``fd``, which must have the given inode."""
    parent = os.open(b"..", OPEN_DIRECTORY, dir_fd=fd)
    if os.fstat(parent).st_ino != inode:
        os.close(parent)
        raise OSError(errno.ESTALE, "a directory was moved while its tree was walked")
    return parent


class _Frame:
    __slots__ = ("inode", "kept", "left", "name")

    def __init__(self, name: bytes, inode: int, left: list[tuple[bytes, bool]]) -> None:
        self.name = name
        self.inode = inode
        self.left = left
        self.kept = False


def clear_directory(dir_fd: int, keep: Keep = _nothing) -> bool:
    """Remove what is in a directory, to any depth, but for what is to be kept.

    A kept directory stays with its metadata and is cleared inside; a directory in which something
    is kept stays too.

    Args:
        dir_fd: stays open; may be a descriptor for reading only, not O_PATH.
        keep: see :data:`Keep`.

    Returns:
        Whether anything was kept.
    """
    fd = os.open(b".", OPEN_DIRECTORY, dir_fd=dir_fd)
    try:
        stack = [_Frame(b"", os.fstat(fd).st_ino, entries(fd))]
        while True:
            frame = stack[-1]
            if frame.left:
                name, is_directory = frame.left.pop()
                if is_directory:
                    child, inode = open_directory(fd, name)
                    os.close(fd)
                    fd = child
                    stack.append(_Frame(name, inode, entries(fd)))
                    stack[-1].kept = keep(frame.inode, name)
                elif keep(frame.inode, name):
                    frame.kept = True
                else:
                    os.unlink(name, dir_fd=fd)
                continue
            stack.pop()
            if not stack:
                return frame.kept
            parent = open_parent(fd, stack[-1].inode)
            os.close(fd)
            fd = parent
            if frame.kept:
                stack[-1].kept = True
            else:
                os.rmdir(frame.name, dir_fd=fd)
    finally:
        os.close(fd)


def remove(parent_fd: int, name: bytes, keep: Keep = _nothing) -> int | None:
    """Remove an entry and all below it; not there is fine.

    Args:
        parent_fd: its directory.
        name: one component, neither ``.`` nor ``..``.
        keep: see :data:`Keep`; asked about what is inside, not about ``name``.

    Returns:
        The file type (S_IFMT) of what was removed or cleared, None where there was nothing.
    """
    try:
        mode = os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(mode):
        os.unlink(name, dir_fd=parent_fd)
    else:
        fd, _ = open_directory(parent_fd, name)
        try:
            kept = clear_directory(fd, keep)
        finally:
            os.close(fd)
        if not kept:
            os.rmdir(name, dir_fd=parent_fd)
    return stat.S_IFMT(mode)
