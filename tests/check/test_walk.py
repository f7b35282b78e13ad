"""How nodes are read: far from each other and close by, more than are kept, half a device."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from tests.check.builder import Builder, Image
from thinpool.check import DeltaKind, check_metadata, delta
from thinpool.engine.bdev import FOR_EVER, BlockDevice, FaultDevice, FaultKind, FaultOp
from thinpool.errors import StorageIOError

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 4096
FIRST_LEAF = 100
KEPT = 2048
"""Internal nodes that a check keeps in memory (TP_CHECK_KEPT_MAX)."""
WINDOW = 4096
"""Leaves of each side that a delta reads at once (WINDOW_LEAVES)."""


def _narrow(nr_leaves: int, *, fan_out: int = 3) -> tuple[Image, list[int], list[int]]:
    """A tree with many internal nodes: its image, leaves and internal nodes, lowest first."""
    builder = Builder(metadata_blocks=3 * nr_leaves, data_blocks=nr_leaves * 4)
    level = [
        (3 * i, builder.leaf({3 * i + k: (3 * i + k, 0) for k in range(3)}, max_entries=3))
        for i in range(nr_leaves)
    ]
    leaves = [block for _, block in level]
    internals: list[int] = []
    while len(level) > 1:
        parts = [level[i : i + fan_out] for i in range(0, len(level), fan_out)]
        level = [(part[0][0], builder.internal(part, max_entries=fan_out)) for part in parts]
        internals += [block for _, block in level]
    return builder.device(1, level[0][1]).finish(), leaves, internals


def _faults(source: Path | BlockDevice, threads: int = 2) -> set[tuple[str, int]]:
    report = check_metadata(source, threads=threads)
    return {(each.type, each.block) for each in report.faults if each.severity != "note"}


def test_more_internal_nodes_than_are_kept(tmp_path) -> None:
    image, leaves, internals = _narrow(5000)
    assert len(internals) > KEPT + 200
    path = image.write(tmp_path / "metadata")
    report = check_metadata(path)
    assert report.clean
    assert report.mappings == 3 * len(leaves)

    # A separator above its child's first key, in the first internal node of the lowest level and
    # in the last: whichever is kept and whichever is read again, both are found.
    wrong = (internals[0], internals[len(leaves) // 3 - 1])
    for number in wrong:
        image.key(number, 1, image.key(number, 1) + 1)
    path = image.write(tmp_path / "metadata")
    for threads in (1, 2, 5):
        assert _faults(path, threads) == {("separator_high", number) for number in wrong}


def _spread(seed: int, *, nr_leaves: int = 900) -> tuple[Image, list[int]]:
    """A device whose leaves lie in no order, with gaps of all lengths between them."""
    rng = random.Random(seed)
    builder = Builder(metadata_blocks=4096, data_blocks=nr_leaves * 100).continue_at(FIRST_LEAF)
    order = list(range(nr_leaves))
    rng.shuffle(order)
    placed = {}
    for index in order:
        entries = {100 * index + k: (100 * index + k, 0) for k in range(90)}
        placed[index] = builder.leaf(entries)
        if rng.random() < 0.3:
            for _ in range(rng.randrange(1, 12)):
                builder.take()  # leaked on purpose: nothing refers to it
    pairs = [(100 * index, placed[index]) for index in range(nr_leaves)]
    # Everything else lies before the leaves.
    builder.continue_at(1)
    parts = [pairs[i : i + 100] for i in range(0, nr_leaves, 100)]
    root = builder.internal([(part[0][0], builder.internal(part)) for part in parts])
    image = builder.device(1, root).finish()
    assert builder.take() <= FIRST_LEAF
    return image, [block for _, block in pairs]


@pytest.mark.parametrize("how", ["direct", "cached"])
@pytest.mark.parametrize("seed", range(3))
def test_damage_among_neighbours_is_told_apart(seed: int, how: str, tmp_path) -> None:
    rng = random.Random(seed)
    image, leaves = _spread(seed)
    assert check_metadata(image.write(tmp_path / "whole")).clean
    torn, moved, flipped = rng.sample(leaves, 3)
    data = image.data
    # The second half of the block is another's: a write that was torn.
    data[torn * BLOCK + 2048 : (torn + 1) * BLOCK] = rng.randbytes(2048)
    other = bytes(data[leaves[0] * BLOCK : (leaves[0] + 1) * BLOCK])
    if moved == leaves[0]:
        other = bytes(data[leaves[1] * BLOCK : (leaves[1] + 1) * BLOCK])
    data[moved * BLOCK : (moved + 1) * BLOCK] = other  # a good node, at the wrong place
    data[flipped * BLOCK + rng.randrange(BLOCK)] ^= 1 << rng.randrange(8)
    path = image.write(tmp_path / "metadata")
    wanted = {("checksum", torn), ("block_number", moved), ("checksum", flipped)}
    with BlockDevice.open_file(path, read_only=True, direct=how == "direct") as device:
        assert _faults(device) == wanted


def test_a_device_that_ends_early(tmp_path) -> None:
    """Reads that come back short lose what is past the end, and nothing before it."""
    image, leaves = _spread(7)
    path = image.write(tmp_path / "metadata")
    end = sorted(leaves)[len(leaves) // 2]
    with BlockDevice.open_file(path, read_only=True, direct=True) as device:
        os.truncate(path, end * BLOCK)
        assert _faults(device) == {("io_error", block) for block in leaves if block >= end}
        with pytest.raises(StorageIOError):
            list(delta(device, 1, 1, same=True))


def test_bad_sectors_take_no_neighbours_along(tmp_path) -> None:
    image, leaves = _spread(11)
    path = image.write(tmp_path / "metadata")
    bad = set(random.Random(3).sample(leaves, 5))
    with (
        BlockDevice.open_file(path, read_only=True) as below,
        FaultDevice.over(below) as device,
    ):
        for block in bad:
            device.add(
                FaultKind.ERROR,
                FaultOp.READ,
                begin=block * BLOCK,
                end=(block + 1) * BLOCK,
                count=FOR_EVER,
            )
        assert _faults(device) == {("io_error", block) for block in bad}


def test_a_delta_of_more_leaves_than_are_read_at_once(tmp_path) -> None:
    """Two trees that share nothing, whose leaves begin at different keys."""
    nr_entries = 90 * (WINDOW + 300)
    rng = random.Random(5)
    left = {key: (key, 0) for key in range(nr_entries)}
    changed = sorted(rng.sample(range(nr_entries), 400))
    right = left | {key: (nr_entries + at, 0) for at, key in enumerate(changed)}
    builder = Builder(metadata_blocks=12000, data_blocks=nr_entries + len(changed))
    builder.device(1, builder.tree(left, per_leaf=90))
    builder.device(2, builder.tree(right, per_leaf=97))
    path = builder.finish().write(tmp_path / "metadata")
    found = [
        (each.begin + at, (each.left_data_begin or 0) + at, (each.right_data_begin or 0) + at)
        for each in delta(path, 1, 2, by_data_block=True)
        for at in range(each.length)
    ]
    assert found == [(key, key, nr_entries + at) for at, key in enumerate(changed)]
    same = sum(each.length for each in delta(path, 1, 2, same=True) if each.kind is DeltaKind.SAME)
    assert same == nr_entries - len(changed)
