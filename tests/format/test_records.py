"""The records of thinpool.format against the C core's, and against metadata that a kernel wrote."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from thinpool._native import ffi, lib
from thinpool.format import (
    BITMAP,
    BLOCK_SIZE,
    DEVICE_DETAILS,
    MAPPING,
    METADATA_INDEX,
    NODE_HEADER,
    RECORDS,
    SUPERBLOCK,
    Details,
    MappingValue,
    Salt,
    checksum,
    kind_of,
    sealed,
)
from thinpool.format.bitmap import words_of

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def c_fields() -> list[tuple[str, str, int, int]]:
    found = []
    field = ffi.new("struct tp_disk_field *")
    while lib.tp_disk_field_at(len(found), field) == 0:
        record, name = ffi.string(field.record).decode(), ffi.string(field.field).decode()
        found.append((record, name, int(field.offset), int(field.size)))
    return found


@pytest.fixture(scope="module")
def snaps() -> bytes:
    return lzma.decompress((FIXTURES / "kernel-pools/snaps.meta.xz").read_bytes())


def block(metadata: bytes, number: int) -> bytes:
    return metadata[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE]


def test_every_field_stands_where_the_c_core_has_it() -> None:
    declared = [
        (record.name, field.name, offset, field.size)
        for record in RECORDS
        for offset, field in record.offsets()
    ]
    assert sorted(declared) == sorted(c_fields())


def test_every_field_has_a_meaning() -> None:
    for record in RECORDS:
        for field in record.fields:
            assert field.meaning.endswith("."), f"{record.name}.{field.name}"


@pytest.mark.parametrize(
    ("salt", "wanted"),
    [
        (Salt.SUPERBLOCK, 0x58CFD397),
        (Salt.NODE, 0x58CC7E82),
        (Salt.INDEX, 0x58CFD54F),
        (Salt.BITMAP, 0x58CE0B1A),
    ],
)
def test_checksums_of_zeros(salt: Salt, wanted: int) -> None:
    assert checksum(bytes(BLOCK_SIZE), salt) == wanted
    assert kind_of(sealed(bytes(BLOCK_SIZE), salt)) is salt


def test_a_kernels_superblock_is_read_and_written_back(snaps: bytes) -> None:
    data = block(snaps, 0)
    superblock = SUPERBLOCK.parse(data)
    assert superblock.magic == 27022010
    assert superblock.version == 2
    assert superblock.trans_id == 42
    assert superblock.data_block_size == 128
    assert superblock.metadata_space_map.nr_blocks == len(snaps) // BLOCK_SIZE
    assert superblock.csum == checksum(data, Salt.SUPERBLOCK)
    assert SUPERBLOCK.build(superblock) == data[: SUPERBLOCK.size]


def test_a_kernels_trees_and_bitmaps_are_read(snaps: bytes) -> None:
    superblock = SUPERBLOCK.parse(block(snaps, 0))
    node = NODE_HEADER.parse(block(snaps, superblock.device_details_root))
    assert (node.flags, node.nr_entries, node.max_entries, node.value_size) == (2, 4, 126, 24)
    values = 32 + 8 * node.max_entries
    details = [
        DEVICE_DETAILS.parse(block(snaps, superblock.device_details_root), values + 24 * index)
        for index in range(4)
    ]
    assert [each.mapped_blocks for each in details] == [241, 200, 241, 220]
    index = METADATA_INDEX.parse(block(snaps, superblock.metadata_space_map.bitmap_root))
    bitmap = BITMAP.parse(block(snaps, index.entries[0].blocknr))
    counts = [bitmap.count(entry) for entry in range(4096)]
    assert counts[0] == 1
    assert sum(count > 0 for count in counts) == superblock.metadata_space_map.nr_allocated
    assert words_of(counts) == bitmap.words


def test_mappings_pack_block_and_time() -> None:
    value = MappingValue.of(data_block=(1 << 40) - 1, time=7)
    assert MAPPING.build(value) == b"\x07\x00\x00" + b"\xff" * 5
    assert MAPPING.parse(MAPPING.build(value)) == value
    assert (value.data_block, value.time) == ((1 << 40) - 1, 7)
    with pytest.raises(ValueError, match="does not fit"):
        MappingValue.of(data_block=1 << 40, time=0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="device_details has 24 bytes"):
        DEVICE_DETAILS.parse(bytes(23))
    wide = Details(mapped_blocks=0, transaction_id=0, creation_time=1 << 32, snapshotted_time=0)
    with pytest.raises(ValueError, match="device_details"):
        DEVICE_DETAILS.build(wide)


def test_counts_are_swapped_pairs() -> None:
    assert words_of([1, 1, 1, 1])[0] == 0xAA
    assert words_of([2, 2, 2, 2])[0] == 0x55
    assert words_of([0, 3, 9])[0] == 0b111100
