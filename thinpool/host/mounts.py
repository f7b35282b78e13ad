"""Mounting and unmounting, and ending what a dead FUSE server left behind.

A mount is made with the new mount API (Linux 5.2): the superblock is configured first, in a
descriptor, and hung into the tree last, whole. Where the kernel lacks that, mount(2) does it.
``detached_mount`` never hangs it anywhere: files are reached through a descriptor, and the mount
ends with the last descriptor, so nothing is left over when the process is killed.

Thread-safe. Mounts are made in the caller's mount namespace.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.host import syscalls
from thinpool.host.failures import failure
from thinpool.host.holders import describe, find_holders
from thinpool.host.mountinfo import MountEntry, mount_at, own_mounts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_MNT_FORCE: Final = 1
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_UMOUNT_SECONDS: Final = 2.0
_CLONE_NEWNS: Final = 0x20000
_MS_REC: Final = 0x4000
_MS_SLAVE: Final = 1 << 19
_FUSECTL: Final = "/sys/fs/fuse/connections"
_LOG_LINE: Final = 8192
_NEW_API_ABSENT: Final = frozenset({errno.ENOSYS, errno.EPERM})
"""EPERM too: filters of system calls answer so for what they don't know. mount(2) then decides."""


class MountAttribute(enum.IntFlag):
    """MOUNT_ATTR_* of linux/mount.h: what belongs to a mount rather than to its filesystem."""

    RDONLY = 0x01
    NOSUID = 0x02
    NODEV = 0x04
    NOEXEC = 0x08
    NOATIME = 0x10
    STRICTATIME = 0x20
    NODIRATIME = 0x80
    NOSYMFOLLOW = 0x200000


_ATTRIBUTES: Final = {
    "nosuid": MountAttribute.NOSUID,
    "nodev": MountAttribute.NODEV,
    "noexec": MountAttribute.NOEXEC,
    "nodiratime": MountAttribute.NODIRATIME,
    "nosymfollow": MountAttribute.NOSYMFOLLOW,
    "noatime": MountAttribute.NOATIME,
    "strictatime": MountAttribute.STRICTATIME,
}
_REVERSED: Final = {
    "suid": MountAttribute.NOSUID,
    "dev": MountAttribute.NODEV,
    "exec": MountAttribute.NOEXEC,
    "diratime": MountAttribute.NODIRATIME,
    "symfollow": MountAttribute.NOSYMFOLLOW,
    "relatime": MountAttribute.NOATIME | MountAttribute.STRICTATIME,
    "atime": MountAttribute.NOATIME,
}
_IGNORED: Final = frozenset({"defaults", "rw", "auto", "noauto", "user", "nouser", "_netdev"})
_MS_FLAGS: Final = {
    MountAttribute.RDONLY: 0x1,
    MountAttribute.NOSUID: 0x2,
    MountAttribute.NODEV: 0x4,
    MountAttribute.NOEXEC: 0x8,
    MountAttribute.NOATIME: 0x400,
    MountAttribute.NODIRATIME: 0x800,
    MountAttribute.STRICTATIME: 0x1000000,
    MountAttribute.NOSYMFOLLOW: 0x100,
}
_MS_RELATIME: Final = 0x200000


@dataclass(frozen=True, slots=True, kw_only=True)
class MountOptions:
    """Options of ``mount -o``, taken apart.

    Attributes:
        attributes: of the mount.
        filesystem: of the filesystem, in order, "key" or "key=value".
    """

    attributes: MountAttribute
    filesystem: tuple[str, ...]

    @property
    def read_only(self) -> bool:
        """Whether nothing may be written."""
        return MountAttribute.RDONLY in self.attributes


def parse_options(options: Sequence[str], *, read_only: bool = False) -> MountOptions:
    """Take option lists apart; each item may itself be comma-separated, later ones win.

    Raises:
        UsageError: an option this program can't honour (bind, remount, propagation, loop).
    """
    attributes = MountAttribute.RDONLY if read_only else MountAttribute(0)
    filesystem: list[str] = []
    for option in split_options(options):
        if option in _UNFIT:
            raise errors.UsageError(
                f"mount option {option!r} makes no sense for a volume", option=option
            )
        if option == "ro":
            attributes |= MountAttribute.RDONLY
        elif option == "rw" and not read_only:
            attributes &= ~MountAttribute.RDONLY
        elif option in _ATTRIBUTES:
            if option in ("noatime", "strictatime"):
                attributes &= ~_REVERSED["relatime"]
            attributes |= _ATTRIBUTES[option]
        elif option in _REVERSED:
            attributes &= ~_REVERSED[option]
        elif option not in _IGNORED:
            filesystem.append(option)
    return MountOptions(attributes=attributes, filesystem=tuple(filesystem))


_UNFIT: Final = frozenset(
    {
        *("bind", "rbind", "remount", "move", "loop"),
        *("shared", "rshared", "slave", "rslave", "private", "rprivate"),
        *("unbindable", "runbindable"),
    }
)


def split_options(options: Sequence[str]) -> list[str]:
    """Comma-separated options as a list; a comma within double quotes separates nothing."""
    found = []
    for group in options:
        current, quoted = "", False
        for letter in group:
            if letter == '"':
                quoted = not quoted
            if letter == "," and not quoted:
                found.append(current)
                current = ""
            else:
                current += letter
        found.append(current)
    return [option.strip() for option in found if option.strip()]


def mount(
    source: str,
    target: str,
    fstype: str,
    options: Sequence[str] = (),
    *,
    read_only: bool = False,
) -> None:
    """Mount a filesystem on a directory. May replay a journal, and block while it does.

    Raises:
        UsageError: an option that can't be honoured.
        NotFoundError: no such device, directory, or filesystem type.
        BusyError, NotPermittedError, StorageIOError: as the kernel says.
    """
    wanted = parse_options(options, read_only=read_only)
    asked = f"cannot mount {source} on {target}"
    try:
        fd = _mount_descriptor(source, fstype, wanted, asked=asked)
    except OSError as cause:
        if cause.errno not in _NEW_API_ABSENT:
            raise _refusal(cause, asked, source) from cause
        _mount_classic(source, target, fstype, wanted, asked=asked)
        return
    try:
        syscalls.move_mount(fd, target)
    except OSError as cause:
        raise failure(cause, asked, path=target) from cause
    finally:
        os.close(fd)


@contextlib.contextmanager
def detached_mount(
    source: str,
    fstype: str,
    options: Sequence[str] = (),
    *,
    read_only: bool = False,
) -> Iterator[int]:
    """Mount a filesystem that nobody else sees; yields a descriptor of its root directory.

    Use it as ``dir_fd``. ".." of its root is the root; absolute links lead out of it, to the
    caller's own root, unless opened with RESOLVE_IN_ROOT. On leaving, what was written is
    written back and a failed write-back raised; the mount ends when the last descriptor on it
    is closed. When the process dies, the kernel unmounts.

    Raises:
        As ``mount``; on leaving also StorageIOError, or HostSpaceError.
    """
    wanted = parse_options(options, read_only=read_only)
    asked = f"cannot mount {source}"
    try:
        fd = _mount_descriptor(source, fstype, wanted, asked=asked)
    except OSError as cause:
        if cause.errno not in _NEW_API_ABSENT:
            raise _refusal(cause, asked, source) from cause
        fd = _detached_classic(source, fstype, wanted, asked=asked)
    try:
        # The kernel's descriptor names the mount only; one that can be read is needed too.
        root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
        try:
            yield root
            if not wanted.read_only:
                _write_back(root, source)
        finally:
            os.close(root)
    finally:
        os.close(fd)


def _write_back(root: int, source: str) -> None:
    try:
        syscalls.syncfs(root)
    except OSError as cause:
        raise failure(cause, f"cannot write {source} back", path=source) from cause


def unmount(target: str, *, lazy: bool = False, timeout: float = _UMOUNT_SECONDS) -> bool:
    """Unmount what is mounted on a directory (the topmost). Repeatable.

    Args:
        target: the mount point.
        lazy: take it out of sight now and let the kernel end it when it's no longer used.
        timeout: seconds to wait while it's busy.

    Returns:
        False if nothing was mounted there.

    Raises:
        BusyError: it is in use; ``holder`` says by whom.
        NotPermittedError, StorageIOError: as the kernel says.
    """
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    deadline = time.monotonic() + timeout
    while True:
        try:
            syscalls.umount2(target, flags)
        except OSError as cause:
            if cause.errno in (errno.EINVAL, errno.ENOENT):
                return False
            if cause.errno != errno.EBUSY:
                raise failure(cause, f"cannot unmount {target}", path=target) from cause
            if time.monotonic() >= deadline:
                raise _busy(target) from cause
            time.sleep(0.02)
        else:
            return True


def unmount_all(target: str, *, timeout: float = _UMOUNT_SECONDS) -> int:
    """Unmount everything stacked on a directory; returns how many mounts that were."""
    count = 0
    while unmount(target, timeout=timeout):
        count += 1
    return count


def enter_private_namespace() -> None:
    """Move this process (its calling thread, and those it starts) to a mount namespace of its own.

    What it mounts from then on nobody else sees, and ends with its last process. What others
    unmount goes here too where their mounts are shared, as they are under systemd, so that this
    namespace keeps no device of theirs busy.

    Raises:
        NotPermittedError: not root.
    """
    try:
        syscalls.unshare(_CLONE_NEWNS)
        syscalls.mount("none", "/", "", _MS_REC | _MS_SLAVE, "")
    except OSError as cause:
        raise failure(cause, "cannot leave the mount namespace") from cause


# ---- FUSE ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseMount:
    """A FUSE filesystem that is mounted.

    Attributes:
        connection: its number under fusectl.
        mount_point: where.
    """

    connection: int
    mount_point: str


def fuse_mounts(directory: str | None = None) -> list[FuseMount]:
    """The FUSE mounts of this namespace, at or below a directory if one is given.

    Read from the mount table alone, a hung server isn't asked: so ``directory`` must be named
    without symbolic links.
    """
    wanted = None if directory is None else os.path.join(os.path.abspath(directory), "")
    return [
        FuseMount(connection=os.minor(entry.device), mount_point=entry.mount_point)
        for entry in own_mounts()
        if _is_fuse(entry)
        and (wanted is None or os.path.join(entry.mount_point, "").startswith(wanted))
    ]


def abort_fuse(connection: int) -> bool:
    """End a FUSE connection: everyone who waits for its server gets an error at once.

    Returns:
        False if there is no such connection (any more).

    Raises:
        NotPermittedError: it is another user's, or fusectl can't be mounted.
    """
    asked = f"cannot abort FUSE connection {connection}"
    with _fusectl() as directory:
        try:
            fd = os.open(f"{connection}/abort", os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            return False
        except OSError as cause:
            raise failure(cause, asked) from cause
        try:
            os.write(fd, b"1")
        except OSError as cause:
            if cause.errno in (errno.ENOENT, errno.ENOTCONN):
                return False
            raise failure(cause, asked) from cause
        finally:
            os.close(fd)
    return True


def waiting_requests(connection: int) -> int | None:
    """How many requests of a connection its server hasn't answered; None if there is none."""
    with _fusectl() as directory:
        try:
            fd = os.open(f"{connection}/waiting", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        except OSError:
            return None
        try:
            return int(os.read(fd, 32))
        except (OSError, ValueError):
            return None
        finally:
            os.close(fd)


@contextlib.contextmanager
def _fusectl() -> Iterator[int]:
    """A descriptor of fusectl's root: where it is mounted, else of a mount of our own."""
    entry = mount_at(_FUSECTL)
    if entry is not None and entry.fstype == "fusectl":
        fd = os.open(_FUSECTL, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
    else:
        with detached_mount("fusectl", "fusectl") as fd:
            yield fd


def _is_fuse(entry: MountEntry) -> bool:
    return entry.fstype in ("fuse", "fuseblk") or entry.fstype.startswith(("fuse.", "fuseblk."))


# ---- the steps ----------------------------------------------------------------------------


def _mount_descriptor(source: str, fstype: str, wanted: MountOptions, *, asked: str) -> int:
    """A descriptor of a detached mount.

    Raises:
        OSError: what decides whether mount(2) is tried instead, or has no explanation.
        ThinpoolError: the filesystem refused and said why.
    """
    fs = syscalls.fsopen(fstype)
    try:
        syscalls.fsconfig(fs, syscalls.FSCONFIG_SET_STRING, "source", source)
        if wanted.read_only:
            syscalls.fsconfig(fs, syscalls.FSCONFIG_SET_FLAG, "ro")
        for option in wanted.filesystem:
            key, separator, value = option.partition("=")
            if separator:
                syscalls.fsconfig(fs, syscalls.FSCONFIG_SET_STRING, key, value.strip('"'))
            else:
                syscalls.fsconfig(fs, syscalls.FSCONFIG_SET_FLAG, key)
        syscalls.fsconfig(fs, syscalls.FSCONFIG_CMD_CREATE)
        return syscalls.fsmount(fs, wanted.attributes)
    except OSError as cause:
        said = _context_log(fs)
        if said and cause.errno not in _NEW_API_ABSENT:
            raise _refusal(cause, f"{asked} ({said})", source) from cause
        raise
    finally:
        os.close(fs)


def _refusal(cause: OSError, asked: str, source: str) -> errors.ThinpoolError:
    """The error for a mount that the kernel refused; a busy device's holder is named."""
    error = failure(cause, asked, path=source)
    if not isinstance(error, errors.BusyError):
        return error
    holder = None
    with contextlib.suppress(OSError):
        device = os.stat(source).st_rdev
        holder = describe(find_holders(device, path=source)) if device else None
    known = holder or "by something not visible from here"
    return errors.BusyError(f"{asked}: {source} is in use, {known}", holder=holder, path=source)


def _context_log(fs: int) -> str:
    """What the kernel noted in a filesystem context, in one line."""
    lines = []
    with contextlib.suppress(OSError):
        while True:
            line = os.read(fs, _LOG_LINE).decode(errors="replace").strip()
            lines.append(line[2:] if line[1:2] == " " else line)
    return "; ".join(lines)


def _classic_flags(wanted: MountOptions) -> int:
    flags = sum(flag for attribute, flag in _MS_FLAGS.items() if attribute in wanted.attributes)
    atime = MountAttribute.NOATIME | MountAttribute.STRICTATIME
    return flags if wanted.attributes & atime else flags | _MS_RELATIME


def _mount_classic(
    source: str, target: str, fstype: str, wanted: MountOptions, *, asked: str
) -> None:
    data = ",".join(wanted.filesystem)
    try:
        syscalls.mount(source, target, fstype, _classic_flags(wanted), data)
    except OSError as cause:
        raise _refusal(cause, asked, source) from cause


def _detached_classic(source: str, fstype: str, wanted: MountOptions, *, asked: str) -> int:
    """Mount on a directory of our own, open it, and unmount lazily: the descriptor keeps it."""
    with tempfile.TemporaryDirectory(prefix="thinpool-") as directory:
        _mount_classic(source, directory, fstype, wanted, asked=asked)
        try:
            return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            syscalls.umount2(directory, _UMOUNT_NOFOLLOW | _MNT_DETACH)


def _busy(target: str) -> errors.BusyError:
    entry = mount_at(target)
    reasons = []
    if entry is not None:
        # Other mounts of the same device don't keep this one busy; mounts below it do.
        reasons = [
            f"mounted on {other.mount_point}"
            for other in own_mounts()
            if other.parent_id == entry.mount_id
        ]
        users = (found for found in find_holders(entry.device) if found.how == "open")
        reasons += [str(found) for found in users]
    holder = "; ".join(reasons) or None
    known = holder or "by something not visible from here"
    return errors.BusyError(f"cannot unmount {target}: in use, {known}", holder=holder, path=target)
