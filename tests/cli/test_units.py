"""Sizes and percents: what is accepted, what is refused and why, and what is printed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinpool import units
from thinpool.errors import UsageError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1", 1),
        ("512", 512),
        ("512B", 512),
        ("64K", 65536),
        ("64k", 65536),
        ("64KiB", 65536),
        ("64kib", 65536),
        (" 64K ", 65536),
        ("10G", 10 << 30),
        ("1.5G", 3 << 29),
        ("0.5K", 512),
        ("2.25M", 2359296),
        ("1T", 1 << 40),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
        ("00064K", 65536),
        ("9223372036854775296", units.SIZE_MAX),
    ],
)
def test_sizes_are_powers_of_1024(text, value):
    assert units.parse_size(text) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a size"),
        (" ", "is not a size"),
        ("K", "is not a size"),
        (".5G", "is not a size"),
        ("5.G", "is not a size"),
        ("1e9", "is not a size"),
        ("0x40", "is not a size"),
        ("1 G", "is not a size"),
        ("1_000", "is not a size"),
        ("+5G", "is not a size"),
        ("10%", "is not a size"),
        ("\u0661\u0660G", "is not a size"),  # Arabic-Indic digits
        ("\n", "is not a size"),
        ("nan", "is not a size"),
        ("9" * 5000, "is not a size"),
        ("-1G", "is negative"),
        ("10X", "unknown unit 'X'"),
        ("10Ki", "unknown unit 'Ki'"),
        ("10GiBs", "unknown unit 'GiBs'"),
        ("10GB", "write G or GiB"),
        ("10kb", "write K or KiB"),
        ("0.1G", "not a whole number"),
        ("1.5", "not a whole number"),
        ("8E", "too large"),
        ("9223372036854775807", "too large"),
    ],
)
def test_a_text_that_is_no_size_is_a_usage_error_that_says_why(text, says):
    with pytest.raises(UsageError) as caught:
        units.parse_size(text, what="pool size")
    assert says in caught.value.message
    assert caught.value.message.startswith("pool size ")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 200
    assert caught.value.what == "pool size"
    assert "value" in caught.value.attributes


def test_the_range_and_the_multiple_are_said_so_that_they_can_be_typed():
    with pytest.raises(UsageError, match=r"64K is too small: at least 1M") as caught:
        units.parse_size("64K", minimum=1 << 20)
    assert caught.value.minimum == 1 << 20
    with pytest.raises(UsageError, match=r"2M is too large: at most 1M") as caught:
        units.parse_size("2M", maximum=1 << 20)
    assert caught.value.maximum == 1 << 20
    with pytest.raises(
        UsageError, match=r"100000 bytes is not a multiple of 64K: the next are 64K and 128K"
    ) as caught:
        units.parse_size("100000", multiple_of=65536)
    assert caught.value.multiple_of == 65536


def test_only_sizes_in_range_are_offered_as_the_next_ones():
    with pytest.raises(UsageError, match=r"the next are 64K$"):
        units.parse_size("100K", multiple_of=65536, maximum=120 << 10)
    with pytest.raises(UsageError, match=r"the next are 64K$"):
        units.parse_size("1K", multiple_of=65536)


@pytest.mark.parametrize("value", [65536, 131072, 196608, 1 << 20, 1 << 30])
def test_block_sizes_are_multiples_of_64k_up_to_1g(value):
    assert units.check_block_size(value) == value
    assert units.parse_block_size(str(value)) == value


@pytest.mark.parametrize("value", [0, 1, 512, 65535, 65537, 96 << 10, (1 << 30) + 65536])
def test_other_block_sizes_are_refused(value):
    with pytest.raises(UsageError):
        units.check_block_size(value)
    with pytest.raises(UsageError):
        units.parse_block_size(str(value))


def test_negative_numbers_are_too_small():
    with pytest.raises(UsageError, match="too small"):
        units.check_size(-1)


@pytest.mark.parametrize(
    ("text", "value"),
    [("10%", 10.0), ("10", 10.0), ("0", 0.0), ("12.5%", 12.5), ("100%", 100.0), (" 5% ", 5.0)],
)
def test_percents(text, value):
    assert units.parse_percent(text) == value


@pytest.mark.parametrize(
    "text", ["", "%", "10%%", "-1", "101", "1e1", "ten", "10 %", "100.1%", "nan", "9" * 5000]
)
def test_a_text_that_is_no_percentage_is_a_usage_error(text):
    with pytest.raises(UsageError) as caught:
        units.parse_percent(text, what="min-free")
    assert caught.value.message.startswith("min-free ")
    assert caught.value.what == "min-free"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (65536, "64 KiB"),
        ((1 << 20) - 1, "1023.9 KiB"),
        (1 << 20, "1 MiB"),
        (10 << 30, "10 GiB"),
        ((10 << 30) + 1, "10.0 GiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 60, "1 EiB"),
        (1 << 63, "8 EiB"),
        (1 << 75, "32768 EiB"),
        (-65536, "-64 KiB"),
        (-3, "-3 B"),
    ],
)
def test_sizes_are_printed_in_binary_units(value, text):
    assert units.format_size(value) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 100, "0%"),
        (1, 1 << 40, "0.1%"),
        (50, 100, "50.0%"),
        (99999, 100000, "99.9%"),
        (100, 100, "100%"),
        (0, 0, "0%"),
        (120, 100, "120%"),
    ],
)
def test_a_share_is_full_only_when_it_is(part, whole, text):
    assert units.format_percent(part, whole) == text


@given(st.integers(min_value=0, max_value=units.SIZE_MAX))
def test_what_is_printed_exactly_reads_back(value):
    text = units.format_exact(value).removesuffix(" bytes").removesuffix(" byte")
    assert units.parse_size(text) == value


@given(st.text(max_size=60))
def test_any_text_is_a_size_or_a_usage_error(text):
    try:
        value = units.parse_size(text)
    except UsageError as error:
        value, message = 0, error.message
    else:
        message = ""
    assert "\n" not in message
    assert 0 <= value <= units.SIZE_MAX
