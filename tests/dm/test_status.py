"""Status lines as kernels give them."""

from __future__ import annotations

import pytest

from thinpool import errors
from thinpool.dm import (
    DiscardPolicy,
    Failure,
    TargetStatus,
    ThinPoolMode,
    ThinPoolStatus,
    ThinStatus,
)
from thinpool.dm.abi import TableLine

FULL = "3 213/2048 5/16 - rw discard_passdown queue_if_no_space - 1024 "


def test_a_pool_in_order():
    assert ThinPoolStatus.parse(FULL) == ThinPoolStatus(
        transaction_id=3, used_metadata_blocks=213, total_metadata_blocks=2048,
        used_data_blocks=5, total_data_blocks=16, held_root=None, mode=ThinPoolMode.RW,
        discard=DiscardPolicy.PASSDOWN, error_if_no_space=False, needs_check=False,
        metadata_low_water_blocks=1024,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ({3: "77"}, {"held_root": 77}),
        ({4: "ro", 7: "needs_check"}, {"mode": ThinPoolMode.RO, "needs_check": True}),
        ({4: "out_of_data_space"}, {"mode": ThinPoolMode.OUT_OF_DATA_SPACE}),
        ({5: "no_discard_passdown"}, {"discard": DiscardPolicy.NO_PASSDOWN}),
        ({5: "ignore_discard"}, {"discard": DiscardPolicy.IGNORE}),
        ({6: "error_if_no_space"}, {"error_if_no_space": True}),
    ],
    ids=str,
)
def test_modes_and_flags(words, changed):
    line = FULL.split()
    for place, word in words.items():
        line[place] = word
    found = ThinPoolStatus.parse(" ".join(line))
    plain = ThinPoolStatus.parse(FULL)
    assert isinstance(found, ThinPoolStatus)
    assert {name: getattr(found, name) for name in changed} == changed
    same = [name for name in ThinPoolStatus.__slots__ if name not in changed]
    assert [getattr(found, name) for name in same] == [getattr(plain, name) for name in same]


@pytest.mark.parametrize(
    ("left", "field"),
    [(8, "metadata_low_water_blocks"), (6, "error_if_no_space"), (5, "discard")],
)
def test_fields_that_older_kernels_lack_are_none(left, field):
    found = ThinPoolStatus.parse(" ".join(FULL.split()[:left]))
    assert isinstance(found, ThinPoolStatus)
    assert getattr(found, field) is None
    assert found.mode is ThinPoolMode.RW
    assert not found.needs_check


@pytest.mark.parametrize("word", ["Fail", "Error"])
def test_failed_targets_say_one_word(word):
    assert ThinPoolStatus.parse(word) is Failure(word)
    assert ThinStatus.parse(word) is Failure(word)


def test_a_thin_volume():
    assert ThinStatus.parse("1280 1279") == ThinStatus(
        mapped_sectors=1280, highest_mapped_sector=1279
    )
    assert ThinStatus.parse("0 -") == ThinStatus(mapped_sectors=0, highest_mapped_sector=None)
    assert ThinStatus.parse("-") is None


@pytest.mark.parametrize(
    "text",
    ["", "x", "3 213 5/16 - rw", "3 1/2 3/4 - sideways", "3 1/2 3/4 - rw discard_passdown perhaps"],
)
def test_an_unknown_form_is_an_error_that_shows_it(text):
    with pytest.raises(errors.UnsupportedHostError) as caught:
        ThinPoolStatus.parse(text)
    assert repr(text) in str(caught.value)


def test_lines_of_other_targets_keep_their_text():
    found = TargetStatus.of(TableLine(0, 8, "linear", ""))
    assert (found.type, found.text, found.value) == ("linear", "", None)
    assert TargetStatus.of(TableLine(0, 8, "thin", "0 -")).value == ThinStatus(
        mapped_sectors=0, highest_mapped_sector=None
    )
