"""Filesystems on volumes: what is there, making, growing, trimming, settling.

Making one is about clones: everything a fresh base maps is shared by every clone, and everything
that mounting writes is paid by each of them. Measured on a sparse 10 GiB file, Linux 6.18,
e2fsprogs 1.47.0, xfsprogs 6.1.0 (tests/host/test_mkfs.py holds them to it):

                                        64 KiB blocks        1 MiB blocks
    ext4, a fresh base maps             0.8 MiB              10 MiB
    ext4, mount and umount of a clone   1 block              1 block (1.5 and 1 ms)
    xfs, a fresh base maps              0.3 MiB              4 MiB
    xfs, mount and umount of a clone    34 blocks            4 blocks (4 and 1 ms)

ext4 by its defaults maps 5 and 19 MiB, xfs 1.3 and 17 MiB. What costs, and what is chosen:

- ext4's reserve of descriptor blocks for growing by 1024 is 4 MiB of written blocks; growing by
  10 costs 0.05 MiB. (No reserve at all, or sparse_super2, would be smaller still, but cannot be
  grown while mounted, and 1.47.0's resize2fs damages the latter.)
- ext4's journal is 16 MiB: a clone that writes much maps all of it. Unpacking 320 MiB in 12,000
  files took 1.5 s with 4 MiB, 1.2 s with 8, 1.1 s with 16, 1.0 s with 32.
- Inode tables and journal are zeroed at once, which on a thin volume maps nothing, so that no
  kernel thread does it in each clone.
- xfs has two allocation groups rather than four, which quarters what a fresh one maps, and
  sectors of 4 KiB, so that its log and headers need no read-modify-write on disks that have
  such. The log has 64 MiB, the least mkfs.xfs takes, in units of 4 KiB: a unit of a pool block
  would write a pool block for each fsync.
- Each first writable mount of an xfs clone stamps 2 MiB of log ahead of its head (the 34
  blocks). No option avoids it; only on a read-only device it writes nothing.
- No discard at mkfs: a new volume has nothing mapped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

from thinpool import errors
from thinpool.host import mounts, syscalls
from thinpool.host.ext4layout import EXTENT_DEPTH_MAX, Ext4, UnknownLayoutError
from thinpool.host.failures import failure
from thinpool.host.mountinfo import NamespaceMount, mounts_of_device, open_mount
from thinpool.host.programs import run_program
from thinpool.host.signatures import KIB, MIB, signature

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FsType = Literal["ext4", "xfs"]
FS_TYPES: Final[tuple[FsType, ...]] = get_args(FsType)

_FITRIM: Final = 0xC0185879
_EXT4_IOC_RESIZE_FS: Final = 0x40086610
_XFS_IOC_FSGROWFSDATA: Final = 0x4010586E
_XFS_IOC_FSGEOMETRY_V1: Final = 0x80705864
_XFS_IOC_FREE_EOFBLOCKS: Final = 0x8080583A
_XFS_GEOMETRY_SIZE: Final = 112
_BLOCK: Final = 4 * KIB
_GROWTH: Final = 10
_EXT4_LEAST: Final = 2 * MIB
_EXT4_BLOCKS_MOST: Final = (1 << 32) - 1
_BLOCKS_A_DESCRIPTOR_BLOCK: Final = 64 * 32768
"""What is described by one block of group descriptors: 64 groups of 128 MiB."""
_TRIALS: Final = 4  # reserving the first descriptor block moves more than itself
_JOURNAL_ALIGNMENT: Final = 64 * KIB
"""The least block of a pool; in a larger one the journal's beginning seldom straddles two."""
_XFS_LEAST: Final = 300 * MIB
_XFS_LOG: Final = 64 * MIB
_XFS_GROUP_MOST: Final = 1 << 40
_EXT4_FEATURES: Final = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,"
    "sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum"
)
"""What Linux 4.4 and any distribution since can mount; nothing from the host's mke2fs.conf."""
_LISTS: Final[dict[FsType, frozenset[str]]] = {
    "ext4": frozenset({"-O", "-E", "-J"}),
    "xfs": frozenset({"-b", "-m", "-d", "-i", "-l", "-n", "-r", "-s"}),
}
"""Flags of each mkfs that take comma-separated lists."""
_EXT4_QUOTA_FILES: Final = {"usrquota": 0x240, "grpquota": 0x244, "prjquota": 0x26C}
"""Where the superblock names the inode of each."""
_EXT4_JOURNALS: Final = ((1 << 30, 16), (256 * MIB, 8), (64 * MIB, 4))
"""From what size of the filesystem on, bytes, which size of the journal, MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filesystem:
    """A filesystem as its superblock describes it.

    Attributes:
        fstype: ext2, ext3, ext4 or xfs.
        size: bytes it covers of its device.
        block_size: bytes.
        uuid: 16 bytes.
        needs_recovery: whether its journal is known to hold what its blocks don't; None unknown
            (xfs doesn't say it in its superblock).
    """

    fstype: str
    size: int
    block_size: int
    uuid: bytes
    needs_recovery: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trimmed:
    """What fstrim did: the bytes the filesystem discarded."""

    discarded: int


def read_superblock(path: str | os.PathLike[str]) -> Filesystem | None:
    """The filesystem on a device or in a file; None if there is none of those known.

    Raises:
        NotFoundError, NotPermittedError, StorageIOError: it can't be read.
    """
    name = os.fspath(path)
    try:
        with _opened(name) as fd:
            head = os.pread(fd, _BLOCK, 0)
            kind = signature(fd, os.lseek(fd, 0, os.SEEK_END))
    except OSError as cause:
        raise failure(cause, f"cannot read {name}", path=name) from cause
    return parse_superblock(head, kind)


def parse_superblock(head: bytes, kind: str | None) -> Filesystem | None:
    """The filesystem whose first 4 KiB are given; ``kind`` as ``signatures`` names it."""
    if kind in ("ext2", "ext3", "ext4") and len(head) >= 1024 + 512:
        return _ext_superblock(head, kind)
    if kind == "xfs" and len(head) >= 128:  # noqa: PLR2004 - the fields read below end there
        (block_size,) = struct.unpack_from(">I", head, 4)
        (blocks,) = struct.unpack_from(">Q", head, 8)
        return Filesystem(
            fstype="xfs",
            size=blocks * block_size,
            block_size=block_size,
            uuid=head[32:48],
            needs_recovery=None,
        )
    return None


def fs_type(path: str | os.PathLike[str]) -> str | None:
    """The name by which to mount what a device carries; None if it isn't a filesystem."""
    name = os.fspath(path)
    try:
        with _opened(name) as fd:
            kind = signature(fd, os.lseek(fd, 0, os.SEEK_END))
    except OSError as cause:
        raise failure(cause, f"cannot read {name}", path=name) from cause
    return kind if kind in _MOUNTABLE else None


_MOUNTABLE: Final = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "erofs", "squashfs"})


def default_options(fstype: str) -> list[str]:
    """The options volumes are mounted with unless others are asked for.

    Others were tried to make mounting cheaper (Linux 6.18, plain loop device): ext4 takes 0.8
    and 0.6 ms (6 reads, 6 writes, 6 flushes), xfs 4 to 7 and 1 ms (43 reads, 6 writes, 5
    flushes). noinit_itable, no_prefetch_block_bitmaps, nodiscard, logbufs, logbsize change
    nothing, nodelalloc saves three flushes and costs every later write, nobarrier is no option.
    Read-only on a read-only device: 0.6 ms, nothing written.

    xfs refuses a second filesystem of the same uuid, which every snapshot is: hence nouuid.
    """
    return ["nodev", "nosuid", *(["nouuid"] if fstype == "xfs" else [])]


def private_options(fstype: str) -> list[str]:
    """The options for mounts of our own, which shouldn't write what nobody asked for.

    Read-only ones are made on read-only devices, where no filesystem can write a log either.
    """
    return [*default_options(fstype), "noatime", "noexec"]


def mount_volume(
    path: str | os.PathLike[str],
    target: str,
    *,
    options: Sequence[str] = (),
    read_only: bool = False,
) -> str:
    """Mount the filesystem on a volume's device for a user; returns its type.

    Args:
        path: the device.
        target: the directory.
        options: after the default ones, so that they win.
        read_only: mount it so; a journal is replayed first where the device can be written.

    Raises:
        UsageError: it carries no known filesystem, or an option can't be honoured.
        ReadOnlyError: the device can't be written and there is a journal to replay, which isn't
            passed over: what would be seen is not what the filesystem holds.
        BusyError, NotFoundError, NotPermittedError, StorageIOError: as ``mounts.mount``.
    """
    name = os.fspath(path)
    kind = fs_type(name)
    if kind is None:
        raise errors.UsageError(f"cannot mount {name}: it carries no known filesystem", path=name)
    try:
        wanted = [*default_options(kind), *options]
        mounts.mount(name, target, kind, wanted, read_only=read_only)
    except errors.ReadOnlyError as cause:
        raise errors.ReadOnlyError(
            f"cannot mount {name} on {target}: the device is read-only, and the {kind} on it "
            "wants to be written, if only to replay its journal; mount a snapshot of it",
            path=name,
        ) from cause
    if kind == "xfs" and not read_only:
        _bound_retries(os.stat(name).st_rdev)
    return kind


def _bound_retries(device: int) -> None:
    """Let xfs give up when the pool is full.

    By default it tries a failed write of metadata again for ever, and whoever waits for it can't
    be killed. The pool itself has waited for space already when it says that there is none.
    Where sysfs is read-only, xfs keeps its default.
    """
    node = os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    limit = f"/sys/fs/xfs/{os.path.basename(node)}/error/metadata/ENOSPC/max_retries"
    with contextlib.suppress(OSError), open(limit, "w", encoding="ascii") as file:
        file.write("0")


# ---- making -------------------------------------------------------------------------------


def check_fs_type(name: str) -> FsType:
    """A filesystem that volumes can be made with.

    Raises:
        UsageError: it isn't one.
    """
    if name not in FS_TYPES:
        raise errors.UsageError(
            f"{name!r} is no filesystem for volumes: it is {' or '.join(FS_TYPES)}", fs=name
        )
    return name


def make_filesystem(
    path: str | os.PathLike[str],
    fstype: FsType,
    *,
    block_size: int,
    options: Sequence[str] = (),
) -> Filesystem:
    """Make a filesystem on a fresh volume, whose root directory is empty with mode 0755.

    ``path`` is a device, or a regular file of the volume's size (no root needed): its
    ``signatures.data_ranges`` are then all there is to copy to the volume. What is there is
    overwritten: ask ``signatures.refuse_foreign`` first. Durable on return.

    Args:
        path: where.
        fstype: ext4 or xfs.
        block_size: of the pool, bytes: allocation is aligned to it.
        options: more for mkfs; each may hold several words, and where one names what ours
            names too, it wins: ["-O ^metadata_csum", "-d", "agcount=8"].

    Raises:
        UsageError: too small for that filesystem.
        UnsupportedHostError: the tools aren't installed.
        ThinpoolError: mkfs failed; ``program``, ``code``, ``output``.
        StorageIOError: what was written couldn't be made durable.
    """
    name = os.path.abspath(path)
    try:
        with _opened(name) as fd:
            size = os.lseek(fd, 0, os.SEEK_END)
    except OSError as cause:
        raise failure(cause, f"cannot use {name}", path=name) from cause
    least = _XFS_LEAST if fstype == "xfs" else _EXT4_LEAST
    if size < least:
        raise errors.UsageError(
            f"{fstype} needs at least {least // MIB} MiB, and {name} has {size} bytes",
            path=name,
            size=size,
            least=least,
        )
    if fstype == "ext4":
        arguments = _with_aligned_journal(size, block_size=block_size, options=options)
        run_program("mkfs.ext4", [*arguments, name], package="e2fsprogs")
        _remove_lost_and_found(name)
    else:
        arguments = merge_options(fstype, xfs_arguments(size, block_size=block_size), options)
        run_program("mkfs.xfs", [*arguments, name], package="xfsprogs")
    _make_durable(name)
    made = read_superblock(name)
    if made is None:
        raise errors.ThinpoolError(
            f"mkfs.{fstype} left no {fstype} on {name}", program=f"mkfs.{fstype}", code=0, output=""
        )
    return made


def ext4_arguments(size: int, *, block_size: int) -> list[str]:
    """What mkfs.ext4 is told, for a filesystem of that many bytes on a pool of that block."""
    stripe = max(1, block_size // _BLOCK)
    extended = [
        "nodiscard",
        "lazy_itable_init=0",
        "lazy_journal_init=0",
        "packed_meta_blocks=1",
        "root_owner=0:0",
        f"resize={_resize_blocks(size)}",
    ]
    if stripe > 1:
        extended += [f"stride={stripe}", f"stripe_width={stripe}"]
    journal = next((mib for least, mib in _EXT4_JOURNALS if size >= least), None)
    return [
        *("-q", "-F", "-b", str(_BLOCK), "-I", "256", "-m", "0", "-e", "remount-ro"),
        *("-O", _EXT4_FEATURES),
        *(() if journal is None else ("-J", f"size={journal}")),
        *("-E", ",".join(extended)),
    ]


def _with_aligned_journal(size: int, *, block_size: int, options: Sequence[str]) -> list[str]:
    """What mkfs.ext4 is told so that the journal begins with 64 KiB, and so in a block of the pool.

    A first fsync in a clone writes the journal's first few blocks: they shall not fall into two of
    the pool's. mke2fs puts the journal behind all tables (packed_meta_blocks; a location for it is
    not heeded then), and how much comes before depends on all that it is told: so it is told the
    same for a file that is never filled, and descriptor blocks are reserved to fill up.
    """
    own = ext4_arguments(size, block_size=block_size)
    wanted = arguments = merge_options("ext4", own, options)
    blocks = _resize_blocks(size)
    for _ in range(_TRIALS):
        begin = _journal_begin(arguments, size)
        if begin is None:
            break
        lacking = -begin % _JOURNAL_ALIGNMENT // _BLOCK
        if not lacking:
            return arguments
        blocks += lacking * _BLOCKS_A_DESCRIPTOR_BLOCK
        if blocks > _EXT4_BLOCKS_MOST:
            break
        more = merge_options("ext4", own, ["-E", f"resize={blocks}"])
        arguments = merge_options("ext4", more, options)
    return wanted


def _resize_blocks(size: int) -> int:
    return min(_GROWTH * (size // _BLOCK), _EXT4_BLOCKS_MOST)


def _journal_begin(arguments: Sequence[str], size: int) -> int | None:
    """Where the journal would begin, in bytes; None where that cannot be told."""
    trial = os.memfd_create("mkfs", os.MFD_CLOEXEC)
    try:
        os.ftruncate(trial, size)
        hasty = [each.replace("_init=0", "_init=1") for each in arguments]
        path = f"/proc/{os.getpid()}/fd/{trial}"
        run_program("mkfs.ext4", [*hasty, path], package="e2fsprogs")
        made = Ext4(lambda offset, length: os.pread(trial, length, offset))
        journal = made.inode(made.journal_inode)
        first, _ = next(iter(made.extents(journal.blocks, EXTENT_DEPTH_MAX)))
    except (UnknownLayoutError, StopIteration, struct.error, OSError, errors.ThinpoolError):
        return None  # what is wrong, if anything is, the real one says
    finally:
        os.close(trial)
    return int(first * made.block)


def xfs_arguments(size: int, *, block_size: int) -> list[str]:
    """What mkfs.xfs is told; as ``ext4_arguments``."""
    groups = max(2, -(-size // _XFS_GROUP_MOST))
    data = [f"agcount={groups}"]
    # A stripe unit must be whole blocks and fit the groups; xfs takes it as a 32-bit of sectors.
    if block_size >= _BLOCK and block_size % _BLOCK == 0 and size // groups >= 4 * block_size:
        data += [f"su={block_size}", "sw=1"]
    return [
        *("-q", "-f", "-K", "-s", "size=4096", "-b", f"size={_BLOCK}"),
        *("-m", "crc=1,finobt=1,reflink=1,rmapbt=0,bigtime=1,inobtcount=1"),
        *("-i", "sparse=1"),
        *("-d", ",".join(data)),
        *("-l", f"size={_XFS_LOG},su={_BLOCK},lazy-count=1"),
    ]


def merge_options(fstype: FsType, own: Sequence[str], more: Sequence[str]) -> list[str]:
    """Add options for mkfs to ours.

    A second -O or -E would make mke2fs forget the whole first, and mkfs.xfs refuses a key that
    comes twice: so lists of one flag are joined, without the keys of ours that come again.
    """
    words = [word for option in more for word in shlex.split(option)]
    merged = list(own)
    index = 0
    while index < len(words):
        flag, value = words[index][:2], words[index][2:]
        index += 1
        if flag not in _LISTS[fstype]:
            merged.append(words[index - 1])
            continue
        if not value and index < len(words):
            value = words[index]
            index += 1
        if flag in merged:
            at = merged.index(flag) + 1
            merged[at] = _joined(merged[at], value)
        else:
            merged += [flag, value]
    return merged


def _joined(own: str, more: str) -> str:
    taken = {_key(item) for item in more.split(",")}
    if taken & {"sunit", "swidth", "noalign"}:  # other words for the same
        taken |= {"su", "sw"}
    kept = [item for item in own.split(",") if _key(item) not in taken]
    return ",".join([*kept, more])


def _key(item: str) -> str:
    return item.strip().lstrip("^").partition("=")[0]


def _remove_lost_and_found(name: str) -> None:
    """Without mounting: it needs no root, and leaves the journal untouched."""
    said = run_program(
        "debugfs",
        ["-w", "-f", "-", name],
        package="e2fsprogs",
        script="rmdir lost+found\nls -p /\n",
    )
    entries = [line.split("/") for line in said.splitlines() if line.startswith("/")]
    names = {fields[5] for fields in entries if len(fields) > 5}  # noqa: PLR2004 - ls -p
    if not names or "lost+found" in names:
        raise errors.ThinpoolError(
            f"debugfs did not remove lost+found from {name}: {said.strip()}",
            program="debugfs",
            code=0,
            output=said,
        )
    _recount_quota(name)


def _recount_quota(name: str) -> None:
    """Let quota files that the user asked for count again: debugfs doesn't know of them."""
    with _opened(name) as fd:
        head = os.pread(fd, _BLOCK, 0)
    kinds = [
        kind
        for kind, offset in _EXT4_QUOTA_FILES.items()
        if head[1024 + offset : 1024 + offset + 4] != bytes(4)
    ]
    for sign in ("^", ""):
        if kinds:
            which = ",".join(f"{sign}{kind}" for kind in kinds)
            run_program("tune2fs", ["-Q", which, name], package="e2fsprogs")


# ---- growing, trimming, settling ----------------------------------------------------------


def grow(path: str | os.PathLike[str]) -> None:
    """Let a filesystem fill its device, mounted or not. May take a while.

    A mounted one is grown by the kernel, in whatever namespace it is mounted; xfs that isn't
    mounted, in a private mount; ext4 that isn't, by resize2fs, if e2fsck finds nothing wrong.

    Raises:
        UsageError: there is no filesystem that this program can grow.
        NotPermittedError: for ext4 that is mounted the kernel wants CAP_SYS_RESOURCE.
        ReadOnlyError: it is mounted read-only.
        UnsupportedHostError, ThinpoolError: no tools, or they failed.
    """
    name = os.path.abspath(path)
    there = read_superblock(name)
    if there is None:
        raise errors.UsageError(
            f"cannot grow what {name} carries: {fs_type(name) or 'no known filesystem'}", path=name
        )
    size = _device_size(name)
    found = mounts_of_device(os.stat(name).st_rdev, source=name)
    if found:
        with _open_writable(name, found) as fd:
            _grow_mounted(fd, there, name=name, size=size)
    elif there.fstype == "xfs":
        with mounts.detached_mount(name, "xfs", private_options("xfs")) as fd:
            _grow_mounted(fd, there, name=name, size=size)
    else:
        if there.needs_recovery:
            replay_journal(name)
        # resize2fs wants a check that mends, but that would make lost+found: look only, and
        # stop where there is something to mend.
        run_program("e2fsck", ["-fn", name], package="e2fsprogs")
        run_program("resize2fs", ["-f", name], package="e2fsprogs")


def trim(mount_point: str | int, *, least: int = 0) -> Trimmed:
    """Discard what a mounted filesystem doesn't use, what was just deleted included.

    Args:
        mount_point: its path, or a descriptor on it.
        least: leave runs shorter than that many bytes.

    Raises:
        UnsupportedHostError: the filesystem or the device can't.
        ReadOnlyError, NotPermittedError, StorageIOError: as the kernel says.
    """
    asked = f"cannot trim {mount_point}"
    try:
        opened = (
            contextlib.nullcontext(mount_point)
            if isinstance(mount_point, int)
            else _opened(mount_point)
        )
        with opened as fd:
            _settle_deletions(fd)
            answer = fcntl.ioctl(fd, _FITRIM, struct.pack("=QQQ", 0, (1 << 64) - 1, least))
    except OSError as cause:
        raise failure(cause, asked) from cause
    return Trimmed(discarded=struct.unpack("=QQQ", answer)[1])


def _settle_deletions(fd: int) -> None:
    """Make what was deleted free: what a trim sees is what the last commit left free.

    xfs deletes in the background; freeing its speculative preallocations waits for that. Other
    filesystems don't know that ioctl.
    """
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _XFS_IOC_FREE_EOFBLOCKS, struct.pack("=II120x", 1, 1))
    syscalls.syncfs(fd)


def trim_device(path: str | os.PathLike[str]) -> Trimmed:
    """Trim the filesystem on a device wherever it is mounted, or in a private mount."""
    name = os.path.abspath(path)
    kind = fs_type(name)
    if kind is None:
        raise errors.UsageError(f"cannot trim {name}: it carries no known filesystem", path=name)
    found = mounts_of_device(os.stat(name).st_rdev, source=name)
    if found:
        with _open_writable(name, found) as fd:
            return trim(fd)
    with mounts.detached_mount(name, kind, private_options(kind)) as root:
        return trim(root)


def replay_journal(path: str | os.PathLike[str]) -> None:
    """Bring a filesystem that was cut off to rest, by mounting and unmounting it.

    Afterwards it can be mounted read-only without writing.

    Raises:
        UsageError: there is no known filesystem.
        StorageIOError, …: it can't be mounted.
    """
    name = os.path.abspath(path)
    kind = fs_type(name)
    if kind is None:
        raise errors.UsageError(f"{name} carries no known filesystem", path=name)
    with mounts.detached_mount(name, kind, private_options(kind)):
        pass


def _grow_mounted(fd: int, there: Filesystem, *, name: str, size: int) -> None:
    asked = f"cannot grow the {there.fstype} on {name} while it is mounted"
    try:
        if there.fstype == "xfs":
            geometry = fcntl.ioctl(fd, _XFS_IOC_FSGEOMETRY_V1, bytes(_XFS_GEOMETRY_SIZE))
            block_size, inode_percent = struct.unpack_from("=I24xI", geometry)
            (blocks,) = struct.unpack_from("=Q", geometry, 32)
            if size // block_size > blocks:
                wanted = struct.pack("=QI4x", size // block_size, inode_percent)
                fcntl.ioctl(fd, _XFS_IOC_FSGROWFSDATA, wanted)
        else:
            wanted = struct.pack("=Q", size // there.block_size)
            fcntl.ioctl(fd, _EXT4_IOC_RESIZE_FS, wanted)
    except PermissionError as cause:
        right = "CAP_SYS_ADMIN" if there.fstype == "xfs" else "CAP_SYS_RESOURCE"
        raise errors.NotPermittedError(
            f"{asked}: the kernel wants {right}; unmount it first", operation=asked, path=name
        ) from cause
    except OSError as cause:
        raise failure(cause, asked, path=name) from cause


@contextlib.contextmanager
def _open_writable(name: str, found: Sequence[NamespaceMount]) -> Iterator[int]:
    """A descriptor on a mount of the device through which it may be changed."""
    reason: OSError | None = None
    for mount in found:
        if mount.entry.read_only:
            continue
        try:
            fd = open_mount(mount)
        except OSError as cause:
            reason = cause
            continue
        try:
            yield fd
        finally:
            os.close(fd)
        return
    if reason is not None:
        raise failure(reason, f"cannot reach where {name} is mounted", path=name) from reason
    raise errors.ReadOnlyError(
        f"cannot change the filesystem on {name}: {found[0].describe()}, read-only", path=name
    )


def _device_size(name: str) -> int:
    try:
        with _opened(name) as fd:
            return os.lseek(fd, 0, os.SEEK_END)
    except OSError as cause:
        raise failure(cause, f"cannot read {name}", path=name) from cause


def _ext_superblock(head: bytes, kind: str) -> Filesystem:
    blocks, log_block_size = struct.unpack_from("<I16xI", head, 1024 + 4)
    (incompat,) = struct.unpack_from("<I", head, 1024 + 96)
    (blocks_high,) = struct.unpack_from("<I", head, 1024 + 0x150)
    if incompat & 0x80:  # 64bit
        blocks |= blocks_high << 32
    block_size = 1024 << log_block_size
    return Filesystem(
        fstype=kind,
        size=blocks * block_size,
        block_size=block_size,
        uuid=head[1024 + 104 : 1024 + 120],
        needs_recovery=bool(incompat & 0x4),
    )


def _make_durable(name: str) -> None:
    try:
        with _opened(name) as fd:
            os.fsync(fd)
    except OSError as cause:
        raise failure(cause, f"cannot write {name} back", path=name) from cause


@contextlib.contextmanager
def _opened(name: str) -> Iterator[int]:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
