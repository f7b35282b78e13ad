"""Bitmaps that are read along with the leaves: what is said of them is what it would be otherwise.

The base has more leaves and bitmaps than a check needs before it reads ahead: 200 leaves whose
mappings lie all over 16 bitmaps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.check.builder import Builder
from thinpool.check import check_metadata
from thinpool.format.limits import BITMAP_ENTRIES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.check.builder import Image
    from thinpool.check import CheckReport

BITMAPS = 16
MAPPINGS = 200 * 252
STEP = 5
"""Blocks from one mapping to the next; those between are free."""


def wide() -> Image:
    builder = Builder(data_blocks=BITMAPS * BITMAP_ENTRIES)
    root = builder.tree({key: (key * STEP, 0) for key in range(MAPPINGS)})
    return builder.device(1, root).finish()


def leaves(image: Image) -> int:
    """The node above them."""
    return image.value(image.facts.data_mapping_root, 0)


def said(report: CheckReport) -> set[str]:
    return {f"{fault.severity} {fault.type}" for fault in report.faults}


def judged(image: Image, tmp_path: Path) -> CheckReport:
    return check_metadata(image.write(tmp_path / "metadata"))


def test_what_is_whole_is_clean(tmp_path) -> None:
    report = judged(wide(), tmp_path)
    assert report.faults == ()
    assert report.mappings == MAPPINGS


def test_wrong_counts_are_found_in_every_bitmap(tmp_path) -> None:
    image = wide()
    used = range(0, MAPPINGS * STEP, STEP)
    leaked = [bitmap * BITMAP_ENTRIES + 1000 for bitmap in range(BITMAPS)]
    leaked = [block + 1 if block in used else block for block in leaked]
    for block in leaked:
        image.pair("data", block, 1)
    report = judged(image, tmp_path)
    found = [fault.data_block for fault in report.faults if fault.type == "count_high"]
    assert sorted(found) == leaked
    assert report.leaked_data_blocks == BITMAPS
    assert said(judged(image.pair("data", 4 * BITMAP_ENTRIES // STEP * STEP, 0), tmp_path)) >= {
        "fatal count_low"
    }


def bitmap_damaged(image: Image) -> None:
    image.break_checksum(image.bitmaps["data"][7])


def entry_names_a_leaf(image: Image) -> None:
    image.index("data", 3, blocknr=image.value(leaves(image), 50))


def entry_names_the_node_above_the_leaves(image: Image) -> None:
    image.index("data", 3, blocknr=leaves(image))


def entry_names_another_bitmap(image: Image) -> None:
    image.index("data", 3, blocknr=image.bitmaps["data"][4])


def entry_names_the_superblock(image: Image) -> None:
    image.index("data", 3, blocknr=0)


def entry_is_past_the_end(image: Image) -> None:
    image.index("data", 3, blocknr=1 << 40)


def leaf_is_a_bitmap(image: Image) -> None:
    image.value(leaves(image), 50, image.bitmaps["data"][3])


@pytest.mark.parametrize(
    ("damage", "says", "mappings"),
    [
        (bitmap_damaged, {"fatal checksum"}, MAPPINGS),
        (entry_names_a_leaf, {"fatal block_reused"}, MAPPINGS),
        (entry_names_the_node_above_the_leaves, {"fatal block_reused"}, MAPPINGS),
        (entry_names_another_bitmap, {"fatal block_reused"}, MAPPINGS),
        (entry_names_the_superblock, {"fatal block_reused"}, MAPPINGS),
        (entry_is_past_the_end, {"fatal pointer_out_of_range"}, MAPPINGS),
        (leaf_is_a_bitmap, {"fatal checksum", "fatal block_reused"}, MAPPINGS - 252),
    ],
)
def test_damage_is_judged_in_its_turn(
    damage: Callable[[Image], None], says: set[str], mappings: int, tmp_path
) -> None:
    image = wide()
    damage(image)
    report = judged(image, tmp_path)
    assert said(report) >= says
    assert report.mappings == mappings
    # Each leaf was counted once: nothing that is mapped seems to be used more often.
    assert not [
        fault for fault in report.faults if fault.type == "count_low" and fault.data_block
    ], [fault.message for fault in report.faults]
