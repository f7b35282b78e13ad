"""Apply one layer's tar to a root directory, and touch nothing outside it.

Semantics are those of the OCI image spec (layer.md, "Applying Changesets"), and where it is silent
those of Docker's engine:

* ``.wh.NAME`` hides NAME of the layers below, ``.wh..wh..opq`` everything that they have in its
  directory. Both leave alone what this layer itself brings, whether it stands before or after them
  in the archive. Other names in ``.wh..wh.`` are aufs' own and skipped. A whiteout without anything
  to hide is harmless.
* A directory over a directory merges: the metadata is the new one's, extended attributes included
  (security labels of the host stay). Anything else replaces what was there, trees too. Of several
  members with one name the last wins.
* Parents that have no member of their own are made with mode 0755, owned by the caller.
* A parent that is a symbolic link is followed, inside the root as a chroot would: ``/`` in a link
  is the root, ``..`` ends there. Names are cleaned before that: ``/x`` and ``./x`` are ``x``; a
  name whose ``..`` climbs above the root is an error.
* A hard link needs its target, in this layer or a lower one. Owner, mode, attributes and times of
  the link's own member are set on it, as Docker and containerd do, so they are what every name of
  the file has then; of a link to a symbolic link only owner and attributes.
* Owner, extended attributes, mode, times: a change of owner takes setuid and capabilities away.
  Times of directories and default ACLs are set at the end; a default ACL of a lower layer's
  directory is not inherited. ACLs as text (``SCHILY.acl.*``) are not read, as Docker does not.

Safety. Directories are opened only by ``openat2`` with RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS and
RESOLVE_NO_XDEV; everything else is done to one name inside such a directory, with calls that do not
follow a link. Files are made by O_CREAT | O_EXCL; what exists is never opened but directories, so a
device or a fifo of a layer below is never touched, only unlinked. The caller makes sure that nobody
else changes the tree meanwhile (the mount is private), which is what cached directories rely on.

Extended attributes. An attribute that the filesystem or the caller's rights cannot take is an
error, because ``security.capability`` or an ACL lost in silence is a broken program. Exceptions,
each named in the result's notes: other ``security.*`` labels (they belong to the host's security
module, which may be another one), namespaces that Linux does not have (``com.apple.*`` in layers
built on a Mac), and everything where ``best_effort_xattrs`` is asked.

Not thread-safe; one :class:`Extractor` per layer.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NoReturn

from thinpool.errors import (
    ArchiveError,
    NoSpaceError,
    NotPermittedError,
    ReadOnlyError,
    StorageIOError,
    ThinpoolError,
)
from thinpool.oci import syscalls, tree
from thinpool.oci import tar as tarformat
from thinpool.oci.streams import LimitSource, Source

if TYPE_CHECKING:
    from collections.abc import Callable

WHITEOUT: Final = b".wh."
WHITEOUT_META: Final = b".wh..wh."
WHITEOUT_OPAQUE: Final = b".wh..wh..opq"

IMPLIED_DIRECTORY_MODE: Final = 0o755
_CACHED_DIRECTORIES: Final = 64
_NOTES_MAX: Final = 100
_MAJOR_MAX: Final = (1 << 12) - 1  # of the kernel's dev_t
_MINOR_MAX: Final = (1 << 20) - 1
_ID_MAX: Final = 0xFFFF_FFFE  # the last one, -1, tells chown to leave the owner alone
_SECONDS_MAX: Final = 1 << 55  # utimensat takes a time_t; filesystems clamp to what they hold
_RESOLVE: Final = (
    syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV
)
_OPEN_PATH: Final = os.O_PATH | os.O_DIRECTORY
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ZEROS: Final = bytes(4096)
_NAMESPACES: Final = (b"user.", b"trusted.", b"security.", b"system.")  # of xattr(7)
_DEFAULT_ACL: Final = b"system.posix_acl_default"
_DEVICE_KINDS: Final = {
    tarformat.CHARACTER: stat.S_IFCHR,
    tarformat.BLOCK_DEVICE: stat.S_IFBLK,
    tarformat.FIFO: stat.S_IFIFO,
}
# What a name, a link or a number of the archive brings about, as opposed to the target's disk.
_ARCHIVE_ERRNOS: Final = {
    errno.ENAMETOOLONG: "a name in it is too long",
    errno.ELOOP: "its directory is a loop of symbolic links",
    errno.ENOTDIR: "its directory is no directory",
    errno.ENOENT: "its directory or link target does not exist",
    errno.EISDIR: "it is a directory",
    errno.EXDEV: "it leaves the root",
    errno.EINVAL: "the filesystem cannot hold it",
    errno.EFBIG: "the file is larger than the filesystem can hold",
    errno.EMLINK: "too many hard links",
    errno.EOVERFLOW: "a number is out of range",
    errno.EILSEQ: "the filesystem cannot hold its name",
    errno.E2BIG: "an extended attribute is too large",
    errno.ERANGE: "an extended attribute is too large",
    errno.ENXIO: "it is a device",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a layer may ask for at most.

    Attributes:
        tar: of the archive's structure.
        path_bytes: of a name after cleaning.
        depth: directories in a name.
        stream_bytes: of the uncompressed layer; None for no limit but the target's space.
    """

    tar: tarformat.TarLimits = field(default_factory=tarformat.TarLimits)
    path_bytes: int = 4095
    depth: int = 1024
    stream_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """What applying a layer did.

    Attributes:
        members: entries of the archive.
        bytes_written: file data.
        link_bytes: targets of symbolic links.
        whiteouts: entries that hide.
        notes: what was left out, at most 100 lines, for people.
    """

    members: int
    bytes_written: int
    link_bytes: int
    whiteouts: int
    notes: tuple[str, ...]


class _Directory:
    __slots__ = ("fd", "inherits", "inode")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.inode = os.fstat(fd).st_ino
        self.inherits = _has_default_acl(fd)


def _has_default_acl(fd: int) -> bool:
    """Whether what is made in a directory inherits an ACL from it."""
    try:
        os.getxattr(f"/proc/self/fd/{fd}", _DEFAULT_ACL)
    except OSError:
        return False
    return True


class _Deferred:
    """What is set on a directory at the end."""

    __slots__ = ("acl", "inode", "mode", "path", "times")

    def __init__(
        self,
        path: bytes,
        inode: int,
        times: tuple[int, int],
        mode: int | None,
        acl: bytes | None,
    ) -> None:
        self.path = path
        self.inode = inode
        self.times = times
        self.mode = mode
        self.acl = acl


def clean(name: bytes) -> bytes | None:
    """A name without leading slashes, ``.``, ``..`` and doubled slashes; None if it climbs out."""
    name = name.strip(b"/")
    if name[:1] != b"." and b"/." not in name and b"//" not in name:
        return name
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part in (b"", b"."):
            continue
        if part == b"..":
            if not parts:
                return None
            parts.pop()
        else:
            parts.append(part)
    return b"/".join(parts)


def target_error(error: OSError, *, member: str) -> ThinpoolError:
    """The typed error for a system call on the target that failed for a member."""
    number = error.errno or 0
    reason = error.strerror or str(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(
            f"{member}: no space left in the layer's filesystem", member=member, errno=number
        )
    if number in _ARCHIVE_ERRNOS:
        return ArchiveError(f"{member}: {_ARCHIVE_ERRNOS[number]}", member=member, errno=number)
    if number in (errno.EPERM, errno.EACCES):
        return NotPermittedError(f"{member}: {reason}", operation="unpack", member=member)
    if number == errno.EROFS:
        return ReadOnlyError(f"{member}: the layer's filesystem is read-only", member=member)
    return StorageIOError(f"{member}: {reason}", errno=number, member=member)


class Extractor:
    """Applies one layer to one root."""

    def __init__(
        self,
        root_fd: int,
        *,
        limits: Limits | None = None,
        ignore_ownership: bool = False,
        best_effort_xattrs: bool = False,
        whiteouts: bool = True,
        holes: bool = False,
        written: Callable[[int], None] | None = None,
    ) -> None:
        """Prepare to write below a directory.

        Args:
            root_fd: the root directory; stays open and is the caller's.
            limits: see :class:`Limits`.
            ignore_ownership: leave every owner the caller's and leave devices out, noting it;
                for callers that are not root.
            best_effort_xattrs: leave out attributes that cannot be set, noting it.
            whiteouts: names in ``.wh.`` hide; False makes them names like others.
            holes: leave holes in files where there are only zeros.
            written: called with the bytes of each piece written.
        """
        self._root_fd = root_fd
        self._limits = limits or Limits()
        self._ignore_ownership = ignore_ownership
        self._best_effort_xattrs = best_effort_xattrs
        self._whiteouts = whiteouts
        self._holes = holes
        self._written = written
        self._is_root = os.geteuid() == 0
        self._directories: OrderedDict[bytes, _Directory] = OrderedDict()
        self._stale: list[int] = []
        self._made: dict[int, set[bytes]] = {}  # by the directory's inode
        self._deferred: dict[tuple[int, bytes], _Deferred] = {}
        self._late_root: _Deferred | None = None
        self._bytes = 0
        self._link_bytes = 0
        self._hidden = 0
        self._notes: list[str] = []
        self._member = ""
        self._reader: tarformat.TarReader
        self._makers = {
            tarformat.REGULAR: self._regular,
            tarformat.DIRECTORY: self._make_directory,
            tarformat.SYMLINK: self._symlink,
            tarformat.HARD_LINK: self._hard_link,
            tarformat.CHARACTER: self._device,
            tarformat.BLOCK_DEVICE: self._device,
            tarformat.FIFO: self._device,
        }

    def apply(self, source: Source, *, archive: str = "layer", need_end: bool = True) -> Extracted:
        """Unpack a whole uncompressed tar, and read the source to its end.

        Args:
            source: the tar.
            archive: its name in errors.
            need_end: see :class:`~thinpool.oci.tar.TarReader`.

        Raises:
            ArchiveError: the archive is damaged, beyond a limit, or tries to escape.
            NoSpaceError: the target is full.
            NotPermittedError: the caller may not set an owner, make a device, set an attribute.
            StorageIOError, ReadOnlyError: the target failed.

        After an error the tree is half made and to be thrown away.
        """
        if self._limits.stream_bytes is not None:
            source = LimitSource(source, limit=self._limits.stream_bytes, member=archive)
        reader = self._reader = tarformat.TarReader(
            source, archive=archive, limits=self._limits.tar, need_end=need_end
        )
        try:
            for member in reader:
                try:
                    self._apply(member)
                except OSError as error:
                    raise target_error(error, member=tarformat.text(member.name)) from error
            self._finish()
        finally:
            self._forget_directories()
            self._close_stale()
        return Extracted(
            members=reader.count,
            bytes_written=self._bytes,
            link_bytes=self._link_bytes,
            whiteouts=self._hidden,
            notes=tuple(self._notes),
        )

    # ---- names and directories -------------------------------------------------------------

    def _bad(self, what: str) -> NoReturn:
        raise ArchiveError(f"{self._member}: {what}", member=self._member)

    def _note(self, what: str) -> None:
        if len(self._notes) < _NOTES_MAX:
            self._notes.append(f"{self._member}: {what}")
        elif len(self._notes) == _NOTES_MAX:
            self._notes.append("and more")

    def _cleaned(self, name: bytes, what: str) -> bytes:
        path = clean(name)
        if path is None:
            self._bad(f"{what} climbs out of the root")
        if len(path) > self._limits.path_bytes or path.count(b"/") >= self._limits.depth:
            self._bad(f"{what} is too long or too deep")
        return path

    def _directory(self, path: bytes, *, create: bool) -> _Directory:
        """The directory at a cleaned path, links followed inside the root.

        The descriptor stays this object's, and open until the next member.
        """
        found = self._directories.get(path)
        if found is not None:
            self._directories.move_to_end(path)
            return found
        try:
            fd = syscalls.openat2(self._root_fd, path or b".", _OPEN_PATH, resolve=_RESOLVE)
        except FileNotFoundError:
            if not create or not path:
                raise
            return self._make_parents(path)
        found = _Directory(fd)
        self._directories[path] = found
        if len(self._directories) > _CACHED_DIRECTORIES:
            self._stale.append(self._directories.popitem(last=False)[1].fd)
        return found

    def _make_parents(self, path: bytes) -> _Directory:
        """Make what is missing of ``path``, from the last directory that is there."""
        missing: list[bytes] = []
        upper = path
        while True:
            upper, _, name = upper.rpartition(b"/")
            missing.append(name)
            try:
                parent = self._directory(upper, create=False)
                break
            except FileNotFoundError:
                if not upper:
                    raise
        at = upper
        while missing:
            name = missing.pop()
            try:
                os.mkdir(name, IMPLIED_DIRECTORY_MODE, dir_fd=parent.fd)
            except FileExistsError:
                # openat2 said that it does not exist: a symbolic link to nowhere.
                self._bad("its directory is a symbolic link to nowhere")
            os.chmod(name, IMPLIED_DIRECTORY_MODE, dir_fd=parent.fd)  # whatever the umask
            self._made.setdefault(parent.inode, set()).add(name)
            at = at + b"/" + name if at else name
            parent = self._directory(at, create=False)
        return parent

    def _forget_directories(self) -> None:
        while self._directories:
            self._stale.append(self._directories.popitem()[1].fd)

    def _close_stale(self) -> None:
        while self._stale:
            os.close(self._stale.pop())

    def _keep(self, inode: int, name: bytes) -> bool:
        made = self._made.get(inode)
        return made is not None and name in made

    def _remove(self, parent: _Directory, name: bytes, keep: tree.Keep | None = None) -> None:
        kind = tree.remove(parent.fd, name, keep) if keep else tree.remove(parent.fd, name)
        if kind in (stat.S_IFDIR, stat.S_IFLNK):
            self._forget_directories()  # a cached path may have led through it

    # ---- one member ------------------------------------------------------------------------

    def _apply(self, member: tarformat.Member) -> None:
        self._member = tarformat.text(member.name)
        if self._stale:
            self._close_stale()
        path = self._cleaned(member.name, "its name")
        if member.uid > _ID_MAX or member.gid > _ID_MAX:
            self._bad("its owner is out of range")
        if not path:
            if member.kind != tarformat.DIRECTORY:
                self._bad("only a directory can be the root")
            self._root(member)
            return
        directory, _, name = path.rpartition(b"/")
        if self._whiteouts and b".wh." in path:
            if directory.startswith(WHITEOUT) or b"/.wh." in directory:
                self._bad("a directory has a name that is reserved for whiteouts")
            if name.startswith(WHITEOUT):
                self._whiteout(directory, name)
                return
        parent = self._directory(directory, create=True)
        if self._makers[member.kind](member, parent, path, name):
            made = self._made.get(parent.inode)
            if made is None:
                made = self._made[parent.inode] = set()
            made.add(name)

    def _whiteout(self, directory: bytes, name: bytes) -> None:
        if name.startswith(WHITEOUT_META) and name != WHITEOUT_OPAQUE:
            return
        hidden = name[len(WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            self._bad("a whiteout that names no entry")
        try:
            parent = self._directory(directory, create=False)
        except (FileNotFoundError, NotADirectoryError):
            return
        self._hidden += 1
        if name == WHITEOUT_OPAQUE:
            self._clear(parent, b".")
        elif not self._keep(parent.inode, hidden):
            self._remove(parent, hidden, self._keep)
        elif stat.S_ISDIR(os.stat(hidden, dir_fd=parent.fd, follow_symlinks=False).st_mode):
            self._clear(parent, hidden)

    def _clear(self, parent: _Directory, name: bytes) -> None:
        """Remove from a directory what lower layers have in it."""
        fd = os.open(name, tree.OPEN_DIRECTORY, dir_fd=parent.fd)
        try:
            tree.clear_directory(fd, self._keep)
        finally:
            os.close(fd)
            self._forget_directories()

    def _regular(
        self, member: tarformat.Member, parent: _Directory, _path: bytes, name: bytes
    ) -> bool:
        try:
            fd = os.open(name, _CREATE, 0o600, dir_fd=parent.fd)
        except FileExistsError:
            self._remove(parent, name)
            fd = os.open(name, _CREATE, 0o600, dir_fd=parent.fd)
        try:
            if member.sparse is not None:
                self._sparse(member, fd)
            elif member.size and self._holes:
                self._reader.data(lambda piece: self._write_around_zeros(fd, piece))
                os.ftruncate(fd, member.size)
            elif member.size:
                self._reader.data(lambda piece: self._write(fd, piece))
            self._own(member, fd)
            if parent.inherits:
                self._drop_xattrs(member, fd)
            if member.xattrs:
                self._xattrs(member, fd)
            os.fchmod(fd, member.mode)  # after the attributes: nobody but root sets them on 0400
            os.utime(fd, ns=_times(member))
        finally:
            os.close(fd)
        return True

    def _write(self, fd: int, piece: memoryview) -> None:
        count = os.write(fd, piece)
        while count < len(piece):
            count += os.write(fd, piece[count:])
        self._bytes += count
        if self._written is not None:
            self._written(count)

    def _write_around_zeros(self, fd: int, piece: memoryview) -> None:
        """Write a piece at the file's position but for its zeros, and go on behind it."""
        start = at = 0  # before ``start`` all is done, up to ``at`` it is to be written
        while at < len(piece):
            end = min(at + len(_ZEROS), len(piece))
            if not piece[at] and bytes(piece[at:end]) == _ZEROS[: end - at]:
                if at > start:
                    self._write(fd, piece[start:at])
                os.lseek(fd, end - at, os.SEEK_CUR)
                self._bytes += end - at
                start = end
            at = end
        if at > start:
            self._write(fd, piece[start:])

    def _sparse(self, member: tarformat.Member, fd: int) -> None:
        os.ftruncate(fd, member.size)
        for offset, length in member.sparse or ():
            os.lseek(fd, offset, os.SEEK_SET)
            self._reader.segment(length, lambda piece: self._write(fd, piece))

    def _make_directory(
        self, member: tarformat.Member, parent: _Directory, path: bytes, name: bytes
    ) -> bool:
        existing = False
        try:
            os.mkdir(name, 0o700, dir_fd=parent.fd)
        except FileExistsError:
            mode = os.stat(name, dir_fd=parent.fd, follow_symlinks=False).st_mode
            existing = stat.S_ISDIR(mode)
            if not existing:
                self._remove(parent, name)
                os.mkdir(name, 0o700, dir_fd=parent.fd)
            elif not self._is_root:
                # One's own directory that one may not read: the final mode comes at the end.
                os.chmod(name, 0o700, dir_fd=parent.fd)
        fd = os.open(name, tree.OPEN_DIRECTORY, dir_fd=parent.fd)
        try:
            late_mode, acl = self._directory_metadata(
                member, fd, existing=existing or parent.inherits
            )
            self._deferred[parent.inode, name] = _Deferred(
                path, os.fstat(fd).st_ino, _times(member), late_mode, acl
            )
        finally:
            os.close(fd)
        return True

    def _directory_metadata(
        self, member: tarformat.Member, fd: int, *, existing: bool
    ) -> tuple[int | None, bytes | None]:
        """Set what can be set now; returns the mode and the default ACL that have to wait."""
        self._own(member, fd)
        late_mode = None
        if self._is_root:
            os.fchmod(fd, member.mode)
        else:
            os.fchmod(fd, member.mode | 0o700)
            late_mode = member.mode
        if existing:
            self._drop_xattrs(member, fd)
        acl = None
        if member.xattrs:
            # Set now, it would be inherited by what the layer puts into the directory.
            acl = member.xattrs.pop(_DEFAULT_ACL, None)
            self._xattrs(member, fd)
        return late_mode, acl

    def _root(self, member: tarformat.Member) -> None:
        fd = os.open(b".", tree.OPEN_DIRECTORY, dir_fd=self._root_fd)
        try:
            mode, acl = self._directory_metadata(member, fd, existing=True)
        finally:
            os.close(fd)
        self._late_root = _Deferred(b"", 0, _times(member), mode, acl)

    def _symlink(
        self, member: tarformat.Member, parent: _Directory, _path: bytes, name: bytes
    ) -> bool:
        if not member.linkname:
            self._bad("a symbolic link without a target")
        try:
            os.symlink(member.linkname, name, dir_fd=parent.fd)
        except FileExistsError:
            self._remove(parent, name)
            os.symlink(member.linkname, name, dir_fd=parent.fd)
        self._link_bytes += len(member.linkname)
        self._name_metadata(member, parent, name, of_link=True)
        return True

    def _hard_link(
        self, member: tarformat.Member, parent: _Directory, path: bytes, name: bytes
    ) -> bool:
        target = self._cleaned(member.linkname, "its link target")
        if not target or target == path:
            self._bad("a hard link to itself")
        directory, _, target_name = target.rpartition(b"/")
        source = self._directory(directory, create=False)
        status = os.stat(target_name, dir_fd=source.fd, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            self._bad("a hard link to a directory")
        try:
            self._link(source, target_name, parent, name)
        except FileExistsError:
            if (source.inode, target_name) == (parent.inode, name):
                self._bad("a hard link to itself")
            self._remove(parent, name)
            self._link(source, target_name, parent, name)
        self._name_metadata(
            member, parent, name, of_link=stat.S_ISLNK(status.st_mode), existing=status
        )
        return True

    @staticmethod
    def _link(source: _Directory, target: bytes, parent: _Directory, name: bytes) -> None:
        os.link(target, name, src_dir_fd=source.fd, dst_dir_fd=parent.fd, follow_symlinks=False)

    def _device(
        self, member: tarformat.Member, parent: _Directory, _path: bytes, name: bytes
    ) -> bool:
        """Make a device or a fifo; returns whether it was made."""
        if self._ignore_ownership and member.kind != tarformat.FIFO:
            self._note("a device, left out")
            return False
        major, minor = member.device
        if major > _MAJOR_MAX or minor > _MINOR_MAX:
            self._bad("its device number is out of range")
        device = os.makedev(major, minor)
        mode = _DEVICE_KINDS[member.kind] | 0o600
        try:
            os.mknod(name, mode, device, dir_fd=parent.fd)
        except FileExistsError:
            self._remove(parent, name)
            os.mknod(name, mode, device, dir_fd=parent.fd)
        self._name_metadata(member, parent, name)
        return True

    # ---- metadata --------------------------------------------------------------------------

    def _name_metadata(
        self,
        member: tarformat.Member,
        parent: _Directory,
        name: bytes,
        *,
        of_link: bool = False,
        existing: os.stat_result | None = None,
    ) -> None:
        """Metadata of what must not be opened.

        Args:
            member: has it.
            parent: the directory.
            name: in it.
            of_link: it is a symbolic link.
            existing: what it was, if it is one more name of something that was there.
        """
        fresh = existing is None
        owned = existing is not None and (existing.st_uid, existing.st_gid) == (
            member.uid,
            member.gid,
        )
        if not self._ignore_ownership and not owned:  # it would take capabilities away
            try:
                os.chown(name, member.uid, member.gid, dir_fd=parent.fd, follow_symlinks=False)
            except PermissionError as error:
                raise self._no_owner(member) from error
        path = b"/proc/self/fd/%d/%s" % (parent.fd, name)
        if not of_link:
            os.chmod(name, member.mode, dir_fd=parent.fd)
            if fresh and parent.inherits:
                self._drop_xattrs(member, path)
        if member.xattrs:
            self._xattrs(member, path)
        if fresh or not of_link:
            os.utime(name, ns=_times(member), dir_fd=parent.fd, follow_symlinks=False)

    def _own(self, member: tarformat.Member, fd: int) -> None:
        if self._ignore_ownership:
            return
        try:
            os.fchown(fd, member.uid, member.gid)
        except PermissionError as error:
            raise self._no_owner(member) from error

    def _no_owner(self, member: tarformat.Member) -> NotPermittedError:
        return NotPermittedError(
            f"{self._member}: only root can give it to {member.uid}:{member.gid}",
            operation="chown",
            member=self._member,
            uid=member.uid,
            gid=member.gid,
        )

    def _xattrs(self, member: tarformat.Member, where: int | bytes) -> None:
        follow = isinstance(where, int)
        for name, value in member.xattrs.items():
            try:
                os.setxattr(where, name, value, follow_symlinks=follow)
            except OSError as error:
                self._no_xattr(name, error)

    def _no_xattr(self, name: bytes, error: OSError) -> None:
        shown = tarformat.text(name)
        if error.errno not in (errno.EOPNOTSUPP, errno.EPERM, errno.EACCES):
            raise error
        label = name.startswith(b"security.") and name != b"security.capability"
        foreign = label or not name.startswith(_NAMESPACES)
        if self._best_effort_xattrs or foreign:
            self._note(f"attribute {shown} left out ({error.strerror})")
            return
        raise NotPermittedError(
            f"{self._member}: its attribute {shown} cannot be set here: {error.strerror}",
            operation="setxattr",
            member=self._member,
            attribute=shown,
            errno=error.errno,
        ) from error

    def _drop_xattrs(self, member: tarformat.Member, where: int | bytes) -> None:
        """Take away attributes that a member lacks, of a merged directory or inherited ones."""
        for text in os.listxattr(where):
            name = os.fsencode(text)
            host = name.startswith(b"security.") and name != b"security.capability"
            if name in member.xattrs or host:
                continue
            try:
                os.removexattr(where, name)
            except OSError as error:
                if error.errno != errno.ENODATA:  # xfs lists an ACL twice
                    self._no_xattr(name, error)

    def _finish(self) -> None:
        """Set what had to wait, deepest directories first."""
        for (inode, name), late in sorted(
            self._deferred.items(), key=lambda item: item[1].path, reverse=True
        ):
            try:
                parent = self._directory(late.path.rpartition(b"/")[0], create=False)
                found = os.stat(name, dir_fd=parent.fd, follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                continue  # replaced or hidden later in the layer
            if (parent.inode, found.st_ino) == (inode, late.inode) and stat.S_ISDIR(found.st_mode):
                try:
                    self._set_late(late, parent.fd, name)
                except OSError as error:
                    raise target_error(error, member=tarformat.text(late.path)) from error
            self._close_stale()
        if self._late_root is not None:
            try:
                self._set_late(self._late_root, self._root_fd, b".")
            except OSError as error:
                raise target_error(error, member="the root directory") from error

    def _set_late(self, late: _Deferred, parent_fd: int, name: bytes) -> None:
        if late.acl is not None:
            self._late_acl(parent_fd, name, late.acl)
        if late.mode is not None:
            os.chmod(name, late.mode, dir_fd=parent_fd)
        os.utime(name, ns=late.times, dir_fd=parent_fd, follow_symlinks=False)

    def _late_acl(self, parent_fd: int, name: bytes, acl: bytes) -> None:
        fd = os.open(name, tree.OPEN_DIRECTORY, dir_fd=parent_fd)
        try:
            os.setxattr(fd, _DEFAULT_ACL, acl)
        except OSError as error:
            self._no_xattr(_DEFAULT_ACL, error)
        finally:
            os.close(fd)


def _times(member: tarformat.Member) -> tuple[int, int]:
    """Access and modification time in nanoseconds, within what utimensat takes."""
    most = _SECONDS_MAX * 1_000_000_000
    modified = max(-most, min(most, member.mtime_ns))
    if member.atime_ns is None:
        return modified, modified
    return max(-most, min(most, member.atime_ns)), modified
