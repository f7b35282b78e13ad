"""CRC-32C: known vectors, and every implementation equal to a bit-by-bit one."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinpool._native import ffi, lib

IMPLEMENTATIONS = ["portable", "sse4.2", "avx512"]
REFLECTED = 0x82F63B78
SALTS_OF_ZERO_BLOCKS = {  # kind's salt: salt ^ raw CRC of 4092 zero bytes
    160774: 0x58CFD397,
    121107: 0x58CC7E82,
    160478: 0x58CFD54F,
    240779: 0x58CE0B1A,
}


def bit_by_bit(crc: int, data: bytes) -> int:
    """The definition."""
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (REFLECTED if crc & 1 else 0)
    return crc


def with_implementation(name: str, crc: int, data: bytes, misalignment: int = 0) -> int:
    room = ffi.new("unsigned char[]", len(data) + 128)
    base = int(ffi.cast("uintptr_t", room))
    at = room + (-base % 64) + misalignment
    ffi.memmove(at, data, len(data))
    out = ffi.new("uint32_t *")
    status = lib.tp_crc32c_with(name.encode(), crc, at, len(data), out)
    if status == lib.TP_E_NOT_SUPPORTED:
        pytest.skip(f"this processor has no {name}")
    assert status == 0
    return out[0]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with_implementation(request.param, 0, b"")
    return request.param


def test_the_check_string_has_its_published_crc(implementation):
    assert with_implementation(implementation, 0xFFFFFFFF, b"123456789") == 0x1CF96D7C


@pytest.mark.parametrize(("salt", "expected"), SALTS_OF_ZERO_BLOCKS.items())
def test_zero_blocks_have_the_checksums_of_the_format(implementation, salt, expected):
    assert with_implementation(implementation, 0xFFFFFFFF, bytes(4092), 4) ^ salt == expected


def test_an_empty_leaf_has_the_checksum_of_the_format(implementation):
    leaf = struct.pack("<IQIIII", 2, 7, 0, 252, 8, 0).ljust(4092, b"\0")
    assert with_implementation(implementation, 0xFFFFFFFF, leaf, 4) ^ 121107 == 0x49C54642


def test_the_chosen_implementation_is_the_best_of_this_processor():
    chosen = ffi.string(lib.tp_crc32c_implementation()).decode()
    out = ffi.new("uint32_t *")
    able = [
        name
        for name in IMPLEMENTATIONS
        if lib.tp_crc32c_with(name.encode(), 0, ffi.NULL, 0, out) == 0
    ]
    assert chosen == able[-1]


def test_an_unknown_implementation_is_not_supported():
    assert lib.tp_crc32c_with(b"md5", 0, b"", 0, ffi.new("uint32_t *")) == lib.TP_E_NOT_SUPPORTED


def test_every_length_and_alignment_agrees_with_the_definition(implementation, rng):
    """One byte sequence; a prefix's CRC is known while its bytes are fed one by one."""
    data = rng.randbytes(1500)
    start = rng.randrange(2**32)
    crc = start
    for length in range(len(data) + 1):
        found = with_implementation(implementation, start, data[:length], length * 7 % 64)
        assert found == crc, f"{length} bytes at {length * 7 % 64}"
        if length < len(data):
            crc = bit_by_bit(crc, data[length : length + 1])


@pytest.mark.parametrize("length", [320, 321, 577, 4080, 4092, 4095, 4096, 8191])
def test_every_alignment_agrees_with_the_portable_one(implementation, rng, length):
    data = rng.randbytes(length)
    start = rng.randrange(2**32)
    expected = with_implementation("portable", start, data)
    for misalignment in range(64):
        assert with_implementation(implementation, start, data, misalignment) == expected


@given(
    data=st.binary(max_size=6000),
    start=st.integers(0, 2**32 - 1),
    cut=st.floats(0, 1),
    misalignment=st.integers(0, 63),
)
def test_a_crc_continues_where_another_ended(data, start, cut, misalignment):
    at = int(len(data) * cut)
    whole = lib.tp_crc32c(start, data, len(data))
    assert lib.tp_crc32c(lib.tp_crc32c(start, data[:at], at), data[at:], len(data) - at) == whole
    for name in IMPLEMENTATIONS:
        out = ffi.new("uint32_t *")
        if lib.tp_crc32c_with(name.encode(), start, data, len(data), out) == 0:
            assert out[0] == whole
            assert with_implementation(name, start, data, misalignment) == whole


def power_of_x(n: int) -> int:
    """x^n mod P, bit-reflected."""
    value = 1 << 31
    for _ in range(n):
        value = value >> 1 ^ (REFLECTED if value & 1 else 0)
    return value


def test_the_constants_in_the_source_are_the_powers_they_claim_to_be():
    source = (Path(__file__).parents[2] / "csrc/src/crc32c_x86.c").read_text()
    defines = dict(re.findall(r"#define (\w+)\s+(?:FOLD_HALF\()?(0x[0-9a-f]+U|\d+)", source))
    values = {name: int(text.rstrip("U"), 0) for name, text in defines.items()}
    lanes = [name.removesuffix("_LANE") for name in values if name.endswith("_LANE")]
    assert len(lanes) >= 3
    for lane in lanes:
        size = values[f"{lane}_LANE"]
        assert values[f"{lane}_OVER_ONE"] == power_of_x(8 * size - 33)
        assert values[f"{lane}_OVER_TWO"] == power_of_x(16 * size - 33)
    folds = [name.split("_")[1] for name in values if re.fullmatch(r"FOLD_\d+_LOW", name)]
    assert len(folds) >= 7
    for distance in folds:
        assert values[f"FOLD_{distance}_LOW"] == power_of_x(int(distance) + 63)
        assert values[f"FOLD_{distance}_HIGH"] == power_of_x(int(distance) - 1)
