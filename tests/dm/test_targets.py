"""Targets are rendered as the kernel takes them and parsed as it answers."""

from __future__ import annotations

import pytest

from thinpool import errors
from thinpool.dm import (
    DelayTarget,
    ErrorTarget,
    FlakeyTarget,
    LinearTarget,
    OtherTarget,
    ThinPoolTarget,
    ThinTarget,
    ZeroTarget,
)
from thinpool.dm.abi import TableLine
from thinpool.dm.targets import parse_target, split_words

POOL = {"length": 2048, "metadata": "/dev/a", "data": "/dev/b", "block_sectors": 128}

LINES = [
    (ThinPoolTarget(**POOL), "thin-pool", "/dev/a /dev/b 128 0 0"),
    (
        ThinPoolTarget(**POOL, low_water_blocks=7, skip_block_zeroing=True, read_only=True),
        "thin-pool",
        "/dev/a /dev/b 128 7 2 skip_block_zeroing read_only",
    ),
    (ThinTarget(length=8, pool="253:0", id=5), "thin", "253:0 5"),
    (ThinTarget(length=8, pool="253:0", id=5, origin="7:1"), "thin", "253:0 5 7:1"),
    (LinearTarget(start=8, length=8, device="8:0", offset=16), "linear", "8:0 16"),
    (ErrorTarget(length=8), "error", ""),
    (ZeroTarget(length=8), "zero", ""),
    (FlakeyTarget(length=8, device="8:0", up_seconds=0, down_seconds=1), "flakey", "8:0 0 0 1"),
    (
        FlakeyTarget(
            length=8, device="8:0", up_seconds=0, down_seconds=1, features=("drop_writes",)
        ),
        "flakey",
        "8:0 0 0 1 1 drop_writes",
    ),
    (DelayTarget(length=8, device="8:0", delay_ms=50), "delay", "8:0 0 50"),
    (OtherTarget(length=8, type_name="striped", words=("2", "16")), "striped", "2 16"),
]


@pytest.mark.parametrize(("target", "kind", "text"), LINES, ids=lambda value: str(value)[:24])
def test_a_target_and_its_line_say_the_same(target, kind, text):
    line = target.line()
    assert line == TableLine(target.start, target.length, kind, text)
    assert parse_target(line) == target


def test_the_kernels_own_form_of_a_pool_is_parsed():
    features = "skip_block_zeroing ignore_discard no_discard_passdown error_if_no_space "
    found = parse_target(TableLine(0, 2048, "thin-pool", f"254:0 254:16 128 0 4 {features}"))
    assert found == ThinPoolTarget(
        length=2048, metadata="254:0", data="254:16", block_sectors=128, skip_block_zeroing=True,
        ignore_discard=True, no_discard_passdown=True, error_if_no_space=True,
    )  # fmt: skip


def test_features_are_parsed_in_any_case_and_may_be_left_out():
    assert parse_target(TableLine(0, 8, "thin-pool", "1:2 3:4 128 0 1 Read_Only")).read_only
    assert parse_target(TableLine(0, 8, "thin-pool", "1:2 3:4 128 5")).low_water_blocks == 5


def test_no_more_features_are_sent_than_the_kernel_takes():
    pool = ThinPoolTarget(
        **POOL, skip_block_zeroing=True, ignore_discard=True, no_discard_passdown=True,
        read_only=True, error_if_no_space=True,
    )  # fmt: skip
    words = pool.line().text.split()
    assert words[4:] == [
        "4", "skip_block_zeroing", "ignore_discard", "read_only", "error_if_no_space"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_sectors": 64},
        {"block_sectors": 130},
        {"block_sectors": 2_097_280},
        {"start": 8},
        {"length": 0},
        {"low_water_blocks": -1},
    ],
    ids=str,
)
def test_a_pool_that_cannot_be_is_refused(wrong):
    with pytest.raises(errors.UsageError, match="thin-pool target"):
        ThinPoolTarget(**{**POOL, **wrong})


@pytest.mark.parametrize("number", [-1, 1 << 24])
def test_an_id_that_does_not_fit_is_refused(number):
    with pytest.raises(errors.UsageError, match="id"):
        ThinTarget(length=8, pool="1:1", id=number)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("thin-pool", "1:2 3:4 128 0 1 new_feature"),
        ("thin-pool", "1:2"),
        ("thin", "1:2 x"),
        ("linear", "1:2"),
        ("error", "what"),
        ("flakey", "8:0 0 0 1 5 drop_writes"),
        ("delay", "8:0 0 1 8:0 0 2"),
        ("striped", "2 16 8:0 0 8:1 0"),
    ],
)
def test_what_is_not_known_is_kept_as_it_is(kind, text):
    found = parse_target(TableLine(0, 8, kind, text))
    assert found == OtherTarget(length=8, type_name=kind, words=tuple(text.split()))
    assert found.line() == TableLine(0, 8, kind, text)


@pytest.mark.parametrize("path", ["/dev/a b", "/dev/a\\b", "/dev/\t", "/dev/ü", "\\ "])
def test_odd_paths_are_quoted(path):
    target = LinearTarget(length=8, device=path)
    line = target.line()
    assert split_words(line.text) == [path, "0"]
    assert parse_target(line) == target
