"""Removing and walking directory trees by descriptor, at any depth, without following a link.

No recursion and one open descriptor at a time: a tree may be deeper than PATH_MAX, than Python's
stack and than the limit of open files. The way up is ``..``, checked against the inode the way down
came from; callers make sure that nobody moves directories meanwhile.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
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

    Raises:
        OSError: EBUSY where another filesystem is mounted in it, which is not entered.
    """
    fd = os.open(b".", OPEN_DIRECTORY, dir_fd=dir_fd)
    try:
        status = os.fstat(fd)
        device = status.st_dev
        stack = [_Frame(b"", status.st_ino, entries(fd))]
        while True:
            frame = stack[-1]
            if frame.left:
                name, is_directory = frame.left.pop()
                if is_directory:
                    child, inode = open_directory(fd, name)
                    if os.fstat(child).st_dev != device:
                        os.close(child)
                        raise OSError(errno.EBUSY, "something is mounted there", name)
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


class Entry:
    """What a walk is at.

    Attributes:
        directory: descriptor of the directory it is in; valid until the walk goes on.
        name: in that directory; ``.`` for the root.
        path: from the root, empty for the root.
        status: of the entry itself.
        enter: for a directory, whether the walk will go into it; may be set to False.
    """

    __slots__ = ("directory", "enter", "name", "path", "status")

    def __init__(self, directory: int, name: bytes, path: bytes, status: os.stat_result) -> None:
        """An entry that will be entered."""
        self.directory = directory
        self.name = name
        self.path = path
        self.status = status
        self.enter = True


def walk(root_fd: int) -> Iterator[Entry]:
    """The root and all below it, a directory before what it holds, names in byte order.

    Args:
        root_fd: stays open.

    Raises:
        OSError: a directory cannot be read, or was moved meanwhile.
    """
    fd = os.open(b".", OPEN_DIRECTORY, dir_fd=root_fd)
    try:
        status = os.fstat(fd)
        root = Entry(fd, b".", b"", status)
        yield root
        if not root.enter:
            return
        stack = [(b"", status.st_ino, _names(fd))]
        while stack:
            path, _, names = stack[-1]
            if not names:
                stack.pop()
                if stack:
                    parent = open_parent(fd, stack[-1][1])
                    os.close(fd)
                    fd = parent
                continue
            name = names.pop()
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue  # removed meanwhile, in a tree that is in use
            below = path + b"/" + name if path else name
            entry = Entry(fd, name, below, status)
            yield entry
            if entry.enter and stat.S_ISDIR(status.st_mode):
                child, inode = open_directory(fd, name)
                os.close(fd)
                fd = child
                stack.append((below, inode, _names(fd)))  # whatever became of entry.path
    finally:
        os.close(fd)


def _names(fd: int) -> list[bytes]:
    """Names in a directory, the first in byte order last."""
    return sorted((os.fsencode(name) for name in os.listdir(fd)), reverse=True)


def xattrs(directory: int, name: bytes) -> dict[bytes, bytes]:
    """Extended attributes of an entry, links not followed; none where there can be none.

    Labels of the host's security modules are left out: they are not the tree's own.
    """
    path = b"/proc/self/fd/%d/%s" % (directory, name)
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOENT):
            return {}
        raise
    found: dict[bytes, bytes] = {}
    for text in sorted(names):
        attribute = os.fsencode(text)
        if attribute.startswith(b"security.") and attribute != b"security.capability":
            continue
        try:
            found[attribute] = os.getxattr(path, attribute, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.ENOENT):
                raise
    return found
