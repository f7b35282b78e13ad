"""Reading mount tables: /proc/PID/mountinfo of this process and of every mount namespace.

Format: Documentation/filesystems/proc.rst, section 3.5. Fields that may hold spaces are escaped
in octal. Nothing here changes anything, and nothing waits for a FUSE server.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_ESCAPE = re.compile(rb"\\([0-7]{3})")
_BEFORE_OPTIONAL = 6
_AFTER_SEPARATOR = 3
_NO_DEVICE_NUMBER = frozenset({"btrfs"})
"""Filesystems that show an anonymous number in place of their block device's."""
_NO_NUMBER_LINES = tuple(f" - {kind} ".encode() for kind in _NO_DEVICE_NUMBER)
_SERVED = frozenset({"fuse", "nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "afs", "autofs"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MountEntry:
    """One line of a mount table.

    Attributes:
        device: device number of the superblock (for ext4 and xfs, of the block device).
        root: what of the filesystem is visible; "/" for all of it.
        mount_point: as seen from the root directory of the process whose table it is.
        options: of this mount; ``super_options``: of the filesystem.
        source: what was mounted, as the filesystem gives it.
    """

    mount_id: int
    parent_id: int
    device: int
    root: str
    mount_point: str
    options: str
    optional: tuple[str, ...]
    fstype: str
    source: str
    super_options: str

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written through this mount."""
        return "ro" in self.options.split(",") or "ro" in self.super_options.split(",")

    @property
    def has_server(self) -> bool:
        """Whether a process or another host answers for it, and may not answer."""
        return self.fstype.partition(".")[0] in _SERVED


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceMount:
    """A mount and one process that sees it.

    Attributes:
        pid: a process in that mount namespace.
        namespace: inode of the namespace; ``foreign`` if it isn't the caller's own.
    """

    entry: MountEntry
    pid: int
    namespace: int
    foreign: bool

    @property
    def reachable_path(self) -> str:
        """A path that leads there from this process, through /proc if need be."""
        if not self.foreign:
            return self.entry.mount_point
        return f"/proc/{self.pid}/root{self.entry.mount_point}"

    def describe(self) -> str:
        """Where it is, for people."""
        if not self.foreign:
            return f"mounted on {self.entry.mount_point}"
        return f"mounted on {self.entry.mount_point} in the namespace of process {self.pid}"


def unescape(field: bytes) -> str:
    """A field of a mount table as it was before the kernel escaped it."""
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes((int(match[1], 8) & 0xFF,)), field))


def parse_mountinfo(table: bytes) -> list[MountEntry]:
    """The entries of a table, in its order; lines that are no entry are passed over."""
    found = (_parse_line(line) for line in table.split(b"\n"))
    return [entry for entry in found if entry is not None]


def _parse_line(line: bytes) -> MountEntry | None:
    fields = line.split(b" ")
    try:
        separator = fields.index(b"-", _BEFORE_OPTIONAL)
        fstype, source, super_options = fields[separator + 1 : separator + 1 + _AFTER_SEPARATOR]
        major, _, minor = fields[2].partition(b":")
        return MountEntry(
            mount_id=int(fields[0]),
            parent_id=int(fields[1]),
            device=os.makedev(int(major), int(minor)),
            root=unescape(fields[3]),
            mount_point=unescape(fields[4]),
            options=fields[5].decode(errors="replace"),
            optional=tuple(field.decode(errors="replace") for field in fields[6:separator]),
            fstype=unescape(fstype),
            source=unescape(source),
            super_options=unescape(super_options),
        )
    except ValueError:
        return None


def own_mounts() -> list[MountEntry]:
    """The mounts that this process sees."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())


def mount_at(target: str) -> MountEntry | None:
    """The topmost mount whose mount point is ``target``, or None; symbolic links are followed.

    What is mounted there isn't touched, so the mount of a hung server can be asked for.
    """
    absolute = os.path.abspath(target)
    parent, name = os.path.split(absolute)
    by_point = {entry.mount_point: entry for entry in own_mounts()}
    found = by_point.get(os.path.join(os.path.realpath(parent), name) if name else absolute)
    return found or by_point.get(os.path.realpath(target))


def mount_of(path: str, table: list[MountEntry]) -> MountEntry | None:
    """The mount of a table that a path lies in, by its name: it must have no links in it."""
    wanted = os.path.join(path, "")
    best = None
    for entry in table:
        inside = wanted.startswith(os.path.join(entry.mount_point, ""))
        # Of mounts on one place the later covers the earlier.
        if inside and (best is None or len(entry.mount_point) >= len(best.mount_point)):
            best = entry
    return best


def process_ids() -> list[int]:
    """Every process this one can see, itself first."""
    own = os.getpid()
    others = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [own, *(pid for pid in others if pid != own)]


def namespaces() -> Iterator[tuple[int, int]]:
    """Each mount namespace once: its inode and a process in it, the caller's own first.

    A namespace that no process is in (kept by a bind mount or a descriptor) isn't seen, and
    neither are those of processes whose namespaces this user may not read.
    """
    seen: set[int] = set()
    for pid in process_ids():
        try:
            inode = os.stat(f"/proc/{pid}/ns/mnt").st_ino
        except OSError:
            continue
        if inode not in seen:
            seen.add(inode)
            yield inode, pid


def mounts_of_device(device: int, *, source: str | None = None) -> list[NamespaceMount]:
    """Every mount of a block device in every mount namespace, the caller's own first.

    Args:
        device: its device number.
        source: its path; only for filesystems that hide the number (btrfs).
    """
    own = os.stat("/proc/self/ns/mnt").st_ino
    number = f" {os.major(device)}:{os.minor(device)} ".encode()
    found = []
    for inode, pid in namespaces():
        try:
            table = Path(f"/proc/{pid}/mountinfo").read_bytes()
        except OSError:
            continue  # ended meanwhile
        for line in table.split(b"\n"):
            # Tables may be long, and taking every line apart takes as long as everything else.
            if number not in line and not any(mark in line for mark in _NO_NUMBER_LINES):
                continue
            entry = _parse_line(line)
            if entry is None:
                continue
            hidden = entry.fstype in _NO_DEVICE_NUMBER and entry.source == source
            if entry.device == device or hidden:
                found.append(
                    NamespaceMount(entry=entry, pid=pid, namespace=inode, foreign=inode != own)
                )
    return found


def open_mount(found: NamespaceMount) -> int:
    """A descriptor of a mount's root directory, in whatever namespace it is.

    Raises:
        OSError: it can't be reached; ESTALE where something else was mounted over it.
    """
    path = found.reachable_path
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if found.entry.fstype not in _NO_DEVICE_NUMBER and os.fstat(fd).st_dev != found.entry.device:
        os.close(fd)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
    return fd
