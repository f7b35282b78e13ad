"""Where a run works, and how nothing of it stays: one folder, one stack of what has to be undone.

The process moves into a mount namespace of its own, so that its mounts end with it whatever
happens, and peers are started so that they die with it. Loop devices and pools outlive a process
that is killed outright: the next run finds their folder, whose lock nobody holds, and clears it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from thinpool.api import Thinpool
from thinpool.errors import ThinpoolError, UnsupportedHostError
from thinpool.host import loop, mounts, syscalls
from thinpool.host.mountinfo import mount_at, own_mounts
from thinpool.host.programs import find_program, run_program

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

PREFIX: Final = "thinpool-bench-"
CHUNK: Final = 1 << 20
_LOCK: Final = "lock"
_START_SECONDS: Final = 10.0
_END_SECONDS: Final = 10.0
_UNMOUNT_SECONDS: Final = 20.0
_POOL_SECONDS: Final = 60.0


class Workplace:
    """A folder, and a stack of what has to be undone, in reverse order, before it goes.

    A part of it (``part``) is the same for one suite or one case.

    Attributes:
        folder: absolute, without symbolic links.
        stack: what has to be undone.
    """

    def __init__(self, folder: Path) -> None:
        """Work in a folder that is there."""
        self.folder: Final = folder
        self.stack: Final = contextlib.ExitStack()
        self._count = 0

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Undo everything."""
        self.stack.__exit__(kind, error, trace)

    def new_folder(self, name: str) -> Path:
        """A fresh folder whose name begins so."""
        self._count += 1
        made = self.folder / f"{name}-{self._count}"
        made.mkdir()
        return made

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[Workplace]:
        """A workplace within this one, of which nothing is left afterwards."""
        folder = self.new_folder(name)
        try:
            with Workplace(folder) as inner:
                yield inner
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # ---- what is undone -------------------------------------------------------------------

    def loop_device(self, file: Path, *, sector: int = loop.SECTOR) -> str:
        """A loop device with direct I/O over a file, with sectors of so many bytes; its path."""
        device = loop.attach(file, sector_size=sector)
        self.stack.callback(_detach, device)
        return device.path

    def mount(self, source: str, target: Path, fstype: str, options: Sequence[str] = ()) -> Path:
        """Mount; unmounted at the end if it is still there."""
        target.mkdir(exist_ok=True, parents=True)
        mounts.mount(source, str(target), fstype, options)
        self.stack.callback(unmount, target)
        return target

    def start(
        self, program: str, arguments: Sequence[str], *, package: str, log: Path
    ) -> subprocess.Popen[bytes]:
        """Start a peer, by name or path; it is ended at the end, and dies with this process.

        Raises:
            UnsupportedHostError: it is not installed.
        """
        path = program if program.startswith("/") else find_program(program)
        guard = find_program("setpriv")
        if path is None or guard is None:
            missing, brings = (program, package) if path is None else ("setpriv", "util-linux")
            raise UnsupportedHostError(
                f"{missing} is not installed; on Debian, the package {brings} brings it",
                missing=missing,
            )
        with log.open("ab") as output:
            child = subprocess.Popen(
                [guard, "--pdeathsig", "KILL", "--", path, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,  # a terminal's Ctrl-C is for us; we end it in our order
            )
        self.stack.callback(end_process, child)
        return child

    def thinpool(self) -> Thinpool:
        """An API for pools in a folder of their own; they are taken down and removed."""
        root = self.new_folder("root")
        api = Thinpool(root, timeout=_POOL_SECONDS)
        self.stack.callback(clear_pools, root)
        self.stack.callback(api.close)
        return api


@contextlib.contextmanager
def workplace(directory: Path) -> Iterator[Workplace]:
    """A workplace in a new folder of a directory, whose disk is the one that is measured.

    Raises:
        NotFoundError: there is no such directory.
    """
    parent = directory.resolve(strict=True)
    with contextlib.ExitStack() as held:
        # Of two runs that begin together none must take the other's new folder for a dead one's.
        beginning = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with _closing(beginning):
            fcntl.flock(beginning, fcntl.LOCK_EX)
            clear_leftovers(parent)
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            held.callback(shutil.rmtree, folder, ignore_errors=True)
            lock = held.enter_context((folder / _LOCK).open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.geteuid() == 0:
            mounts.enter_private_namespace()
            _let_go_of_volumes(folder)
        with (
            _environment("THINPOOL_RUN", str(folder / "run")),
            _environment("THINPOOL_LINGER", "2"),
            Workplace(folder) as place,
        ):
            yield place


def _let_go_of_volumes(folder: Path) -> None:
    """Take the volumes of other pools out of this mount namespace.

    Where mounts are shared, what others unmount goes here too. Elsewhere, as in most containers, a
    copy of each mount would keep its volume busy as long as the benchmarks run.
    """
    entries = own_mounts()
    served = [f"{each.mount_point}/" for each in entries if each.fstype == "fuse.thinpool"]
    for entry in reversed(entries):
        volume = loop.describe_number(os.minor(entry.device)) if _is_loop(entry.device) else None
        if volume is not None:
            ours = any(volume.backing_file.startswith(each) for each in served)
        else:
            ours = entry.fstype == "fuse.thinpool"
        if ours and not folder.is_relative_to(entry.mount_point):
            with contextlib.suppress(ThinpoolError):
                mounts.unmount(entry.mount_point, lazy=True)


def _is_loop(device: int) -> bool:
    return os.major(device) == loop.LOOP_MAJOR


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


def clear_leftovers(parent: Path) -> list[Path]:
    """Take down what runs left that were killed outright; the folders that were cleared."""
    cleared = []
    for folder in sorted(parent.glob(f"{PREFIX}*")):
        with (
            contextlib.suppress(OSError, ThinpoolError),
            (folder / _LOCK).open("a") as lock,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with _environment("THINPOOL_RUN", str(folder / "run")):
                for pools in sorted(folder.rglob("pools")):
                    clear_pools(pools.parent)
            for device in loop.find_below(folder):
                loop.detach(device)
            shutil.rmtree(folder, ignore_errors=True)
            cleared.append(folder)
    return cleared


def clear_pools(root: Path) -> None:
    """Deactivate and remove every pool under a root, as far as that is possible."""
    if not root.exists():
        return
    with Thinpool(root, timeout=_POOL_SECONDS) as api:
        for pool in api.pools():
            with contextlib.suppress(ThinpoolError):
                active = [str(each) for each in api.list(pool.pool) if each.device is not None]
                for name in active:
                    with contextlib.suppress(ThinpoolError):
                        api.umount(name)
                    with contextlib.suppress(ThinpoolError):
                        api.deactivate(name)
                api.remove_pool(pool.pool)


# ---- processes, mounts and files ------------------------------------------------------------


def end_process(child: subprocess.Popen[bytes]) -> None:
    """Ask it to end, and make it."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
    child.wait()


def wait_for_mount(child: subprocess.Popen[bytes], target: Path, log: Path) -> None:
    """Wait until a peer has mounted its filesystem.

    Raises:
        ThinpoolError: it ended, or took too long; with the end of what it said.
    """
    deadline = time.monotonic() + _START_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        if mount_at(str(target)) is not None:
            return
        time.sleep(0.005)
    said = " ".join(log.read_text(errors="replace").split())[-300:]
    raise ThinpoolError(f"{target.name}: a peer's filesystem was not mounted: {said}")


def unmount(target: Path) -> None:
    """Unmount; lazily where something still uses it."""
    try:
        mounts.unmount(str(target), timeout=_UNMOUNT_SECONDS)
    except ThinpoolError:
        mounts.unmount(str(target), lazy=True)


def _detach(device: loop.LoopDevice) -> None:
    try:
        loop.detach(device)
    except ThinpoolError:
        loop.detach_when_unused(device)


def write_file(path: Path, size: int) -> None:
    """A file whose every block is written and durable: no holes, no unwritten extents, no pages.

    The bytes are random but repeat every MiB, which no filesystem here makes use of.
    """
    chunk = os.urandom(CHUNK)
    with path.open("wb", buffering=0) as file:
        left = size
        while left > 0:
            left -= file.write(chunk[: min(left, CHUNK)])
        os.fsync(file.fileno())
        # Pages that stay would make direct writes slower, and of the plain file only.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync_filesystem(path: Path) -> None:
    """Write the filesystem that holds a path back."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)


def drop_caches() -> None:
    """Make everything cold: clean pages, directory entries and inodes of the whole host go."""
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


_WITHOUT_LOOPS: Final = """
mounts=$(cat /proc/self/mounts)
while read -r source target rest; do
    case $source in /dev/loop*) umount -l "$(printf %b "$target")" 2>/dev/null;; esac
done <<end
$mounts
end
exec "$@"
"""


def without_loops(*command: str) -> list[str]:
    """A command that runs a command, as root, in a mount namespace without mounted loop devices.

    mkfs.btrfs looks at the files below all of them, and fails where any is on a FUSE filesystem
    whose server died.
    """
    namespace = ["unshare", "--mount", "--propagation", "slave"]
    return [*namespace, "sh", "-c", _WITHOUT_LOOPS, "sh", *command]


def make_disk(place: Workplace, fstype: str, size: int) -> Path:
    """A filesystem as its own tools make it, mounted from a loop device over a sparse file."""
    folder = place.new_folder(fstype)
    image = folder / "disk"
    with image.open("wb") as file:
        file.truncate(size)
    device = place.loop_device(image)
    package, arguments = {
        "ext4": (
            "e2fsprogs",
            ["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"],
        ),
        "xfs": ("xfsprogs", ["-q", "-f", "-K", "-m", "reflink=1"]),
        "btrfs": ("btrfs-progs", ["-q", "-f", "-K"]),
    }[fstype]
    program = find_program(f"mkfs.{fstype}")
    if program is not None and fstype == "btrfs":
        unshare, *wrapped = without_loops(program, *arguments, device)
        run_program(unshare, wrapped, package="util-linux")
    else:
        run_program(f"mkfs.{fstype}", [*arguments, device], package=package)
    return place.mount(device, folder / "mnt", fstype)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
