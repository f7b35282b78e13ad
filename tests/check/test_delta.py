"""Deltas and exclusive counts of random trees against plain Python, and against thin_delta."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

import pytest

from tests.check.builder import Builder
from tests.check.conftest import judge
from thinpool.check import (
    MetadataReader,
    check_metadata,
    delta,
    exclusive_blocks,
    exclusive_blocks_each,
)
from thinpool.engine.bdev import BlockDevice
from thinpool.errors import CorruptMetadataError, NotFoundError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.check.builder import Image

Mappings = dict[int, tuple[int, int]]
SEEDS = range(6)


class Family:
    """Devices that share what was not changed since they parted. A test's id is its seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.builder = Builder(data_blocks=20000)
        self._next_data = 0
        self.devices: dict[int, Mappings] = {}
        self._leaves: dict[int, list[tuple[int, int, Mappings]]] = {}

    def _data(self) -> int:
        self._next_data += 1
        return self._next_data - 1

    def original(self, number: int, nr_leaves: int) -> None:
        leaves = []
        key = 0
        for _ in range(nr_leaves):
            first = key
            entries = {}
            for _ in range(self._random.randrange(84, 253)):
                entries[key] = (self._data(), 0)
                key += self._random.choice([1, 1, 1, 5])
            leaves.append((first, self.builder.leaf(entries), entries))
        self._add(number, leaves)

    def copy(self, number: int, origin: int, *, changes: int) -> None:
        leaves = list(self._leaves[origin])
        for _ in range(changes):
            at = self._random.randrange(len(leaves))
            first, _, entries = leaves[at]
            changed = dict(entries)
            for key in self._random.sample(sorted(changed), min(len(changed), 5)):
                changed[key] = (self._data(), 1)
            if len(changed) > 100:
                del changed[self._random.choice(sorted(changed)[1:])]
            leaves[at] = (first, self.builder.leaf(changed), changed)
        self._add(number, leaves)

    def _add(self, number: int, leaves: list[tuple[int, int, Mappings]]) -> None:
        self._leaves[number] = leaves
        self.devices[number] = {key: value for _, _, part in leaves for key, value in part.items()}
        pairs = [(first, block) for first, block, _ in leaves]
        self.builder.device(number, self.builder.internal(pairs))

    def finish(self) -> Image:
        return self.builder.finish()


def grown(seed: int) -> Family:
    family = Family(seed)
    family.original(1, 18)
    family.copy(2, 1, changes=0)
    family.copy(3, 1, changes=3)
    family.copy(4, 3, changes=6)
    family.original(5, 2)
    return family


def model(left: Mappings, right: Mappings) -> list[tuple[str, int, int]]:
    """Joined runs, the same ones included."""
    runs: list[tuple[str, int, int]] = []
    for key in sorted(left.keys() | right.keys()):
        if key not in right:
            kind = "left_only"
        elif key not in left:
            kind = "right_only"
        else:
            kind = "same" if left[key][0] == right[key][0] else "different"
        if runs and runs[-1][0] == kind and runs[-1][1] + runs[-1][2] == key:
            runs[-1] = (kind, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((kind, key, 1))
    return runs


@pytest.fixture(params=SEEDS)
def family_and_path(request, tmp_path) -> tuple[Family, Path]:
    family = grown(request.param)
    path = family.finish().write(tmp_path / "metadata")
    report = check_metadata(path)
    assert report.faults == (), [fault.message for fault in report.faults]
    return family, path


def test_a_delta_is_the_models(family_and_path) -> None:
    family, path = family_and_path
    for left in family.devices:
        for right in family.devices:
            wanted = model(family.devices[left], family.devices[right])
            full = [(p.kind.value, p.begin, p.length) for p in delta(path, left, right, same=True)]
            assert full == wanted
            part = [(p.kind.value, p.begin, p.length) for p in delta(path, left, right)]
            assert part == [run for run in wanted if run[0] != "same"]


def test_a_delta_is_thin_deltas(family_and_path, require) -> None:
    require("thin_tools")
    _, path = family_and_path
    text = judge("thin_delta", "--snap1", "1", "--snap2", "4", path).stdout
    wanted = [
        (kind, int(begin), int(length))
        for kind, begin, length in re.findall(r'<(\w+) begin="(\d+)" length="(\d+)"', text)
    ]
    found = [(p.kind.value, p.begin, p.length) for p in delta(path, 1, 4, same=True)]
    assert found == wanted


def test_ranges_by_data_block_can_be_copied_in_one_go(family_and_path) -> None:
    family, path = family_and_path
    left, right = family.devices[1], family.devices[4]
    blocks = 0
    for part in delta(path, 1, 4, by_data_block=True):
        for step in range(part.length):
            key = part.begin + step
            for mappings, begin in ((left, part.left_data_begin), (right, part.right_data_begin)):
                if begin is None:
                    assert key not in mappings
                else:
                    assert mappings[key][0] == begin + step
        blocks += part.length
    changed = {key for key in left.keys() | right.keys() if left.get(key) != right.get(key)}
    assert blocks == len(changed)


def test_runs_are_the_mappings(family_and_path) -> None:
    family, path = family_and_path
    with BlockDevice.open_file(path, read_only=True) as device, MetadataReader(device) as reader:
        assert [each.id for each in reader.devices()] == sorted(family.devices)
        for number, mappings in family.devices.items():
            found = {
                run.begin + step: (run.data_begin + step, run.time)
                for run in reader.runs(number)
                for step in range(run.length)
            }
            assert found == mappings


def test_exclusive_blocks_are_the_models(family_and_path) -> None:
    family, path = family_and_path
    users: dict[int, set[int]] = {}
    for number, mappings in family.devices.items():
        for block, _ in mappings.values():
            users.setdefault(block, set()).add(number)
    each = exclusive_blocks_each(path, list(family.devices))
    assert each == {
        number: sum(owners == {number} for owners in users.values()) for number in family.devices
    }
    for ids in ([1], [1, 2], [1, 2, 3], [4, 5], [1, 2, 3, 4, 5], []):
        wanted = sum(owners <= set(ids) for owners in users.values())
        assert exclusive_blocks(path, ids) == wanted


def test_a_metadata_snapshot_keeps_its_blocks(tmp_path) -> None:
    builder = Builder()
    root = builder.leaf({block: (block, 0) for block in range(50)})
    other = builder.leaf({block: (100 + block, 0) for block in range(20)})
    image = builder.device(1, root).hold().device(2, other).finish()
    path = image.write(tmp_path / "metadata")
    assert exclusive_blocks(path, [1, 2]) == 20
    assert exclusive_blocks(path, [1], use_metadata_snapshot=True) == 50


def test_unknown_devices_are_not_found(tmp_path) -> None:
    path = grown(0).finish().write(tmp_path / "metadata")
    with pytest.raises(NotFoundError):
        list(delta(path, 1, 9))
    with pytest.raises(NotFoundError):
        exclusive_blocks(path, [1, 9])
    with pytest.raises(UsageError):
        exclusive_blocks_each(path, [1, 1])


def test_damage_on_the_way_is_an_error(tmp_path) -> None:
    image = grown(0).finish()
    root = image.value(image.facts.data_mapping_root, 0)
    path = image.break_checksum(image.value(root, 3)).write(tmp_path / "metadata")
    with pytest.raises(CorruptMetadataError, match="checksum"):
        list(delta(path, 1, 5, same=True))
    with pytest.raises(CorruptMetadataError):
        exclusive_blocks(path, [1])
    # Both share the broken leaf: what it holds is the same, whatever it is.
    assert list(delta(path, 1, 2)) == []


def test_trees_of_different_height_share_leaves(tmp_path) -> None:
    builder = Builder(data_blocks=40000)
    leaves = [
        (first, builder.leaf({key: (key, 0) for key in range(first, first + 84)}))
        for first in range(0, 84 * 170, 84)
    ]
    low = builder.internal(leaves)
    high = builder.internal(
        [(0, builder.internal(leaves[:85])), (84 * 85, builder.internal(leaves[85:]))]
    )
    path = builder.device(1, low).device(2, high).finish().write(tmp_path / "metadata")
    assert check_metadata(path).faults == ()
    assert list(delta(path, 1, 2)) == []
    assert [part.kind.value for part in delta(path, 1, 2, same=True)] == ["same"]


def test_progress_ends_at_what_there_is(tmp_path) -> None:
    path = grown(0).finish().write(tmp_path / "metadata")
    told: list[tuple[int, int]] = []
    check_metadata(path, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0
