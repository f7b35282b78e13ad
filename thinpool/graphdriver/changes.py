"""Diff, Changes and DiffSize: a layer compared with its parent, file by file.

Both sides are hidden snapshots, mounted read-only where nobody sees them and gone afterwards: so a
layer that is mounted and written to is seen as it was at one instant, and a comparison never holds
up a Get, a Put or a Remove. On ext4 only that is looked at which the block delta leads to;
elsewhere both trees are walked.
"""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from thinpool import errors
from thinpool.api.images import still
from thinpool.api.workbench import Workbench
from thinpool.graphdriver.layers import PARENT
from thinpool.host.ext4 import leading_inodes
from thinpool.oci.diff import iter_changes, iter_layer
from thinpool.oci.export import iter_tar
from thinpool.oci.tar import text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from thinpool.graphdriver.layers import Layers
    from thinpool.model import Volume
    from thinpool.oci.diff import Change
    from thinpool.server.client import PoolClient

_DEPTH_MAX: Final = 1 << 16
_NS: Final = 1_000_000_000
_KINDS: Final = {"modified": 0, "added": 1, "deleted": 2}
"""Docker's numbers, of pkg/archive's ChangeType."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sides:
    """Two trees.

    Attributes:
        before: descriptor of the root.
        after: likewise.
        parted_ns: when they parted, in nanoseconds since 1970, or earlier.
        within: inodes that may differ or lead there, where known; see ``iter_changes``.
    """

    before: int
    after: int
    parted_ns: int
    within: frozenset[int] | None

    def changes(self, *, parents: bool) -> Iterator[Change]:
        """What differs."""
        return iter_changes(
            self.before,
            self.after,
            related=True,
            parted_ns=self.parted_ns,
            parents=parents,
            within=self.within,
        )


@contextlib.contextmanager
def _sides(layers: Layers, layer: str, parent: str | None) -> Iterator[_Sides]:
    """A layer and what it is compared with: another one, or the empty base."""
    after = layers.require(layer)
    before = layers.base() if parent is None else layers.require(parent)
    parted = _parted_ns(layers, after, before, parent)
    with (
        Workbench(layers.client) as bench,
        _mounted(layers.client, bench, (before, after)) as mounted,
    ):
        sides, roots = [each for each, _ in mounted], [root for _, root in mounted]
        yield _Sides(
            before=roots[0],
            after=roots[1],
            parted_ns=parted,
            within=_within(bench, sides, roots),
        )


@contextlib.contextmanager
def _mounted(
    client: PoolClient, bench: Workbench, volumes: tuple[Volume, ...]
) -> Iterator[list[tuple[Volume, int]]]:
    """Snapshots of volumes and the roots of their filesystems, made and taken down side by side.

    Most of the time that takes is the kernel's, for devices to come and go.
    """
    stacks = [contextlib.ExitStack() for _ in volumes]

    def enter(stack: contextlib.ExitStack, volume: Volume) -> tuple[Volume, int]:
        side = stack.enter_context(still(client, bench, volume.name))
        return side, stack.enter_context(bench.mounted(side, read_only=True))

    with ThreadPoolExecutor(len(volumes), thread_name_prefix="side") as threads:
        entering = [threads.submit(enter, *each) for each in zip(stacks, volumes, strict=True)]
        try:
            yield [each.result() for each in entering]
        finally:
            wait(entering)
            ending = [threads.submit(stack.close) for stack in stacks]
            wait(ending)
            for each in ending:
                each.result()


def _parted_ns(layers: Layers, after: Volume, before: Volume, parent: str | None) -> int:
    """When the two parted: when the one above ``parent`` in the line of ``after`` was made.

    Where the line does not lead there they parted at some time since the base was made.
    """
    at: Volume | None = after
    for _ in range(_DEPTH_MAX):
        if at is None:
            break
        above = at.labels.get(PARENT, "")
        if above == (parent or ""):
            return int(at.created.timestamp()) * _NS
        at = layers.find(above) if above else None
    return int(min(before.created, layers.base().created).timestamp()) * _NS


def _within(bench: Workbench, sides: list[Volume], roots: list[int]) -> frozenset[int] | None:
    """Inodes that may differ or lead there, from the block delta; None where it does not tell."""
    if any(each.filesystem != "ext4" for each in sides):
        return None
    delta = bench.delta(*sides)
    ranges = [(each.begin, each.begin + each.length) for each in delta.ranges]
    with contextlib.ExitStack() as stack:
        devices = []
        for root in roots:
            devices.append(_open_device(os.fstat(root).st_dev))
            stack.callback(os.close, devices[-1])
        return leading_inodes(devices[0], devices[1], ranges)


def _open_device(number: int) -> int:
    """A descriptor of the block device of a number."""
    node = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name
    return os.open(f"/dev/{node}", os.O_RDONLY | os.O_CLOEXEC)


def changes(layers: Layers, layer: str, parent: str | None) -> list[dict[str, Any]]:
    """What differs, as Docker lists it: modified directories on the way to a change too.

    Raises:
        NotFoundError: there is no such layer.
    """
    with _sides(layers, layer, parent) as sides:
        return [
            {"Path": "/" + text(each.path), "Kind": _KINDS[each.kind]}
            for each in sides.changes(parents=True)
            if each.path
        ]


def diff_size(layers: Layers, layer: str, parent: str | None) -> int:
    """Bytes of the files and links that were added or changed, each counted once.

    Raises:
        NotFoundError: there is no such layer.
    """
    with _sides(layers, layer, parent) as sides:
        total, counted = 0, set()
        for each in sides.changes(parents=False):
            if each.kind != "deleted" and each.inode not in counted:
                total += each.size
                if each.inode:
                    counted.add(each.inode)
        return total


def diff(layers: Layers, layer: str, parent: str | None) -> Iterator[bytes]:
    """The pieces of a layer's tar; what it needs is taken down when the iterator is closed.

    Holes are zeros in it: Docker cannot put an image together again that has sparse files.

    Raises:
        NotFoundError: there is no such layer.
        StorageIOError: a tree cannot be read.
    """
    with _sides(layers, layer, parent) as sides:
        if parent is None:
            yield from iter_tar(sides.after, sparse=False)
        else:
            yield from iter_layer(
                sides.before,
                sides.after,
                related=True,
                parted_ns=sides.parted_ns,
                within=sides.within,
                sparse=False,
            )


def error_text(error: BaseException) -> str:
    """What Docker is told: one line."""
    if isinstance(error, errors.ThinpoolError):
        return " ".join(error.message.split())
    if isinstance(error, OSError):
        return f"{error.strerror or error}"
    return f"internal error: {type(error).__name__}"
