"""Names: the rules, and what a refusal says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinpool import names
from thinpool.errors import UsageError

GOOD = ["a", "0", "_", "pool", "Pool-1", "a.b", "a..b", "a-", "a.", "_x", "id-17", "x" * 128]
BAD = [
    ("", "is empty"),
    (".", "starts with '.'"),
    ("..", "starts with '.'"),
    (".hidden", "starts with '.'"),
    ("-x", "starts with '-'"),
    ("--yes", "starts with '-'"),
    ("a b", "contains ' '"),
    ("a\nb", r"contains '\n'"),
    ("a\0b", r"contains '\x00'"),
    ("a@b", "contains '@'"),
    ("a:b", "contains ':'"),
    ("a\\b", r"contains '\\'"),
    ("é", "contains 'é'"),
    ("а", "contains 'а'"),  # noqa: RUF001 (Cyrillic on purpose)
    ("٣", "contains '٣'"),
    ("a\n", r"contains '\n'"),
    ("x" * 129, "has 129 characters: at most 128"),
]


@pytest.mark.parametrize("text", GOOD)
def test_names_of_letters_digits_dot_underscore_dash(text):
    assert names.parse_pool_name(text) == text
    assert names.parse_volume_name(text) == text
    ref = names.parse_ref(f"p/{text}")
    assert (ref.pool, ref.name) == ("p", text)
    assert str(ref) == f"p/{text}"


@pytest.mark.parametrize(("text", "says"), BAD)
def test_a_name_that_is_none_says_what_is_wrong(text, says):
    for parse in (names.parse_pool_name, names.parse_volume_name):
        with pytest.raises(UsageError) as caught:
            parse(text)
        assert says in caught.value.message
        assert "\n" not in caught.value.message
        assert caught.value.value == text
    for ref in (f"p/{text}", f"{text}/v"):
        with pytest.raises(UsageError) as caught:
            names.parse_ref(ref)
        assert says in caught.value.message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pool", "write POOL/NAME"),
        ("a/b/c", "more than one '/'"),
        ("/b", "is empty"),
        ("a/", "is empty"),
        ("/", "is empty"),
        ("../x", "starts with '.'"),
        ("x/..", "starts with '.'"),
    ],
)
def test_a_reference_that_is_none_says_what_is_wrong(text, says):
    with pytest.raises(UsageError) as caught:
        names.parse_ref(text, what="image")
    assert says in caught.value.message


def test_a_volume_is_not_taken_for_a_pool():
    with pytest.raises(UsageError, match="POOL/NAME is something in it"):
        names.parse_pool_name("p/v")


def test_two_references_have_to_be_in_one_pool():
    first = names.parse_ref("p/a")
    assert names.same_pool(first, names.parse_ref("p/b")) == "p"
    with pytest.raises(UsageError, match="p/a and q/b are in different pools"):
        names.same_pool(first, names.parse_ref("q/b"))


@given(st.text(max_size=200))
def test_any_text_is_a_safe_part_of_a_path_or_a_usage_error(text):
    try:
        name = names.parse_volume_name(text)
    except UsageError as error:
        name, message = "refused", error.message
    else:
        message = ""
        assert name == text
    assert "\n" not in message
    assert len(message) < 1000
    assert "/" not in name
    assert name[0] not in ".-"
    assert name.isascii()
