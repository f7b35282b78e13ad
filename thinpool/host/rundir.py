"""The run directory: FUSE mount points, and the stable names of devices.

    RUN/fuse/<pool uuid>         where a pool's volumes appear as files
    RUN/dev/POOL/NAME            a link to the device of an active volume
    RUN/dev/POOL/.root           which root the pool of that name belongs to
    RUN/dev/POOL@<hash>/NAME     the same, for a root that found the name taken

A pool's name is unique within its root only, so the directory of its links is claimed by the
first root to use it. The claim ends with the last link. Claims are made and ended under a lock
on RUN/dev; links are replaced by rename, so that a reader sees the old or the new device.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.host.failures import failure

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_CLAIM: Final = ".root"
_HASH_DIGITS: Final = 8
_SEEN_BY_ALL: Final = 0o755
_PASSED_BY_ALL: Final = 0o711


def run_directory(root: str | os.PathLike[str]) -> Path:
    """Where RUN is for this user and root: $THINPOOL_RUN, /run/thinpool for root, ROOT/run."""
    if named := os.environ.get("THINPOOL_RUN"):
        return Path(named)
    return Path("/run/thinpool") if os.geteuid() == 0 else Path(root) / "run"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDirectory:
    """The names of one root's pools in a run directory. Thread- and process-safe.

    Attributes:
        base: RUN.
        root: the root directory; compared by its real path.
    """

    base: Path
    root: str

    @classmethod
    def of_root(cls, root: str | os.PathLike[str]) -> RunDirectory:
        """The run directory of a root, as the environment and the user say."""
        return cls(base=run_directory(root), root=os.path.realpath(root))

    def fuse_directory(self, uuid: str) -> Path:
        """Make and return the mount point of a pool's volumes. Repeatable.

        What is mounted there isn't touched, so a dead server's mount point can be asked for.
        """
        _make(self.base, _SEEN_BY_ALL)
        _make(self.base / "fuse", _PASSED_BY_ALL)
        path = self.base / "fuse" / uuid
        with contextlib.suppress(FileExistsError):
            _mkdir(path, 0o700)
        return path

    def link_device(self, pool: str, name: str, device: str) -> Path:
        """Let RUN/dev/POOL/NAME lead to a device; replaces an older link. Returns its path."""
        return self.link_devices(pool, {name: device})[name]

    def link_devices(self, pool: str, devices: Mapping[str, str]) -> dict[str, Path]:
        """The same for the devices of several names; where one fails, those before it stay."""
        links = {}
        with self._locked():
            directory = self._claimed(pool)
            for name, device in devices.items():
                links[name] = directory / name
                _link(links[name], device)
        return links

    def unlink_device(self, pool: str, name: str) -> bool:
        """Take a link away, and the claim with the last one; False if there was none."""
        with self._locked():
            directory = self._found(pool)
            if directory is None:
                return False
            try:
                (directory / name).unlink()
            except FileNotFoundError:
                return False
            _release_if_empty(directory)
        return True

    def device_link(self, pool: str, name: str) -> Path | None:
        """The link of a volume if it has one; whether the device is alive is not asked."""
        return self.find_links(pool, [name]).get(name)

    def find_links(self, pool: str, names: Iterable[str]) -> dict[str, Path]:
        """The links of those volumes that have one, likewise."""
        directory = self._found(pool)
        if directory is None:
            return {}
        links = {name: directory / name for name in names}
        return {name: link for name, link in links.items() if os.path.islink(link)}

    def device_links(self, pool: str) -> dict[str, str]:
        """Every volume of a pool that has a link, and the device it leads to."""
        directory = self._found(pool)
        if directory is None:
            return {}
        links = {}
        with contextlib.suppress(FileNotFoundError):  # the last link went, and it with it
            for entry in directory.iterdir():
                if entry.is_symlink() and not entry.name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):
                        links[entry.name] = os.readlink(entry)
        return links

    def forget_pool(self, pool: str) -> int:
        """Take all links of a pool and its claim away; returns how many links there were."""
        with self._locked():
            directory = self._found(pool)
            if directory is None:
                return 0
            count = 0
            for entry in list(directory.iterdir()):
                if entry.is_symlink():
                    entry.unlink()
                    count += not entry.name.startswith(".")
            _release_if_empty(directory)
        return count

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        _make(self.base, _SEEN_BY_ALL)
        _make(self.base / "dev", _SEEN_BY_ALL)
        try:
            fd = os.open(self.base / "dev", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as cause:
            raise failure(cause, f"cannot use {self.base}/dev") from cause
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        except OSError as cause:
            raise failure(cause, f"cannot change the names in {self.base}/dev") from cause
        finally:
            os.close(fd)

    def _names(self, pool: str) -> tuple[Path, Path]:
        """The directory a pool has when nobody else has it, and the one it has otherwise."""
        digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:_HASH_DIGITS]
        return self.base / "dev" / pool, self.base / "dev" / f"{pool}@{digest}"

    def _found(self, pool: str) -> Path | None:
        for directory in reversed(self._names(pool)):
            if _claimant(directory) == self.root:
                return directory
        return None

    def _claimed(self, pool: str) -> Path:
        """The pool's directory, claimed now if it wasn't. Call with the lock held."""
        if (found := self._found(pool)) is not None:
            return found
        for directory in self._names(pool):
            claimant = _claimant(directory)
            # A claim whose root is gone, and with it every pool of it, binds nobody.
            if claimant is None or not os.path.isdir(claimant):
                _claim(directory, self.root)
                return directory
        raise errors.AlreadyExistsError(
            f"both names for the pool {pool} in {self.base}/dev belong to other roots",
            existing=_claimant(self._names(pool)[1]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAccess:
    """Who may use a device node."""

    owner: int
    group: int
    mode: int


def node_access(device: str) -> NodeAccess:
    """Who may use a device node now."""
    try:
        found = os.stat(device)
    except OSError as cause:
        raise failure(cause, f"cannot look at {device}", path=device) from cause
    return NodeAccess(owner=found.st_uid, group=found.st_gid, mode=stat.S_IMODE(found.st_mode))


def set_node_access(
    device: str, *, owner: int | None = None, group: int | None = None, mode: int | None = None
) -> NodeAccess:
    """Let somebody use a device node; returns what held before.

    The node is shared by whoever gets the device's number next: ``loop.attach`` and
    ``loop.detach`` take such rights back.

    Args:
        device: the device, or a link to it.
        owner: numeric user id; None leaves what is.
        group: numeric group id; None leaves what is.
        mode: permission bits; None leaves what is.

    Raises:
        UsageError: it is no block device, or the mode is out of range.
        NotPermittedError, NotFoundError: as the system says.
    """
    if mode is not None and not 0 <= mode <= 0o777:  # noqa: PLR2004 - rwxrwxrwx
        raise errors.UsageError(f"{mode:o} is no mode of a device", mode=mode)
    try:
        fd = os.open(device, os.O_PATH | os.O_CLOEXEC)
    except OSError as cause:
        raise failure(cause, f"cannot open {device}", path=device) from cause
    try:
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise errors.UsageError(f"{device} is no block device", path=device)
        path = f"/proc/self/fd/{fd}"
        before = node_access(path)
        # Nobody may use it who is not meant to, at any moment in between.
        os.chmod(path, 0o600)
        os.chown(path, -1 if owner is None else owner, -1 if group is None else group)
        os.chmod(path, before.mode if mode is None else mode)
    except OSError as cause:
        raise failure(cause, f"cannot set the owner and mode of {device}", path=device) from cause
    finally:
        os.close(fd)
    return before


# ---- the steps ----------------------------------------------------------------------------


def _make(path: Path, mode: int) -> None:
    """A directory with parents, of that mode whatever the umask, if it isn't there."""
    if not path.is_dir():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise failure(cause, f"cannot make {path}", path=str(path)) from cause
        with contextlib.suppress(FileExistsError):
            _mkdir(path, mode)


def _mkdir(path: Path, mode: int) -> None:
    try:
        path.mkdir()
        path.chmod(mode)
    except FileExistsError:
        raise
    except OSError as cause:
        raise failure(cause, f"cannot make {path}", path=str(path)) from cause


def _link(link: Path, device: str) -> None:
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    try:
        try:
            os.symlink(device, link)  # most are new
        except FileExistsError:
            os.symlink(device, temporary)
            os.rename(temporary, link)
    except OSError as cause:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise failure(cause, f"cannot make the link {link}", path=str(link)) from cause


def _claimant(directory: Path) -> str | None:
    try:
        return os.fsdecode((directory / _CLAIM).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        return "/"  # another user's: whose it is can't be told, but it is somebody's


def _claim(directory: Path, root: str) -> None:
    _make(directory, _SEEN_BY_ALL)
    temporary = directory / f"{_CLAIM}.{secrets.token_hex(4)}"
    try:
        for entry in directory.iterdir():
            entry.unlink()  # links of a root that is gone
        temporary.write_bytes(os.fsencode(root))
        temporary.chmod(0o644)
        temporary.rename(directory / _CLAIM)
    except OSError as cause:
        raise failure(cause, f"cannot claim {directory}", path=str(directory)) from cause


def _release_if_empty(directory: Path) -> None:
    if all(entry.name == _CLAIM for entry in directory.iterdir()):
        (directory / _CLAIM).unlink(missing_ok=True)
        directory.rmdir()
