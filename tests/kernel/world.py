"""Volumes of one pool and what they hold, changed in turn by our engine and by the kernel."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.kernel.trees import Script, Tree

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable
    from pathlib import Path

KIB = 1 << 10
MIB = 1 << 20
BLOCK = 64 * KIB
SECTOR = 512


@dataclass
class Held:
    """A volume: a filesystem with a tree, or raw bytes."""

    name: str
    id: int
    size: int
    filesystem: str | None
    depth: int = 0
    tree: Tree = field(default_factory=Tree)
    raw: bytearray = field(default_factory=bytearray)

    def snapshot(self, name: str, id_: int) -> Held:
        return Held(name, id_, self.size, self.filesystem, self.depth + 1, self.tree.copy(),
                    bytearray(self.raw))  # fmt: skip


def lists_for_guest(folder: Path, volumes: Iterable[Held]) -> None:
    """Write down what each volume should hold, for guest.sh."""
    for volume in volumes:
        if volume.filesystem is None:
            (folder / f"{volume.name}.raw").write_bytes(volume.raw)
        else:
            (folder / f"{volume.name}.sums").write_text(volume.tree.sums())
            (folder / f"{volume.name}.listing").write_text(volume.tree.listing())


def change_raw(
    volume: Held,
    random_: random.Random,
    script: Script,
    device: str,
    steps: int,
    *,
    whole: bool,
    unit: int = SECTOR,
) -> None:
    """Writes and discards on a volume without a filesystem.

    Args:
        volume: changed as well.
        random_: chooses.
        script: gets the lines that do it.
        device: shell word for its block device.
        steps: how many.
        whole: a discard takes whole blocks only and leaves partial ends (dm's); else all of it
            reads as zeros (a loop device's).
        unit: of offsets and lengths; a block where new blocks are not zeroed.
    """
    for _ in range(steps):
        offset = random_.randrange(volume.size // unit) * unit
        length = random_.choice((SECTOR, 4096, BLOCK, 5 * BLOCK, 40 * BLOCK))
        length = min(-(-length // unit) * unit, volume.size - offset)
        if random_.random() < 0.4:
            script.lines.append(f"blkdiscard -o {offset} -l {length} {device}")
            first, end = offset, offset + length
            if whole:
                first, end = -(-offset // BLOCK) * BLOCK, (offset + length) // BLOCK * BLOCK
            volume.raw[first:end] = bytes(max(0, end - first))
            continue
        data = random_.randbytes(length)
        volume.raw[offset : offset + length] = data
        script.lines.append(
            f"dd if={script.payload(data)} of={device} bs=64K seek={offset} oflag=seek_bytes "
            "conv=notrunc,fsync status=none"
        )


def quoted(*words: object) -> str:
    """A shell line."""
    return " ".join(shlex.quote(str(word)) for word in words)
