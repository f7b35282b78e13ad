"""The ioctl records: laid out as the interface says, and read as a kernel wrote them.

``recorded.json`` holds what the kernel named in it answered to ``tests/dm/record.py``.
"""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinpool import errors
from thinpool.dm import abi
from thinpool.dm.abi import Flag, TableLine
from thinpool.dm.client import DeviceInfo
from thinpool.dm.nodes import check_name, check_uuid
from thinpool.dm.status import TargetStatus, ThinPoolMode, ThinStatus
from thinpool.dm.targets import ThinPoolTarget, parse_target

RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text())


def answer(label):
    buffer = bytearray.fromhex(RECORDED[label])
    return abi.unpack_header(buffer), buffer


def test_sizes_and_places_are_the_interfaces():
    assert abi.HEADER.size == 312
    assert abi.TARGET_SPEC.size == 40
    assert (abi.MESSAGE.size, abi.DEPS.size) == (8, 8)
    assert abi.Command.VERSION == 0xC138FD00
    assert abi.Command.GET_TARGET_VERSION == 0xC138FD11
    buffer = bytearray(4096)
    abi.pack_request(
        buffer, name=b"N" * 127, uuid=b"U" * 128, flags=0x11223344, event_nr=0x55667788,
        dev=0x0102030405060708, target_count=9,
    )  # fmt: skip
    assert struct.unpack_from("=3I", buffer, 0) == (4, 0, 0)
    assert struct.unpack_from("=3I", buffer, 12) == (4096, 312, 9)
    assert struct.unpack_from("=3I", buffer, 28) == (0x11223344, 0x55667788, 0)
    assert struct.unpack_from("=Q", buffer, 40) == (0x0102030405060708,)
    assert buffer[48:176] == b"N" * 127 + b"\0"
    assert buffer[176:305] == b"U" * 128 + b"\0"
    assert not any(buffer[305:])


@pytest.mark.parametrize(
    ("major", "minor", "value"),
    [(253, 0, 0xFD00), (8, 1, 0x801), (253, 255, 0xFDFF), (253, 256, 0x10FD00),
     (4095, (1 << 20) - 1, 0xFFFFFFFF)],
)  # fmt: skip
def test_device_numbers_have_the_minor_around_the_major(major, minor, value):
    number = os.makedev(major, minor)
    assert abi.encode_device(number) == value
    assert abi.decode_device(value) == number


def test_the_version_of_a_kernel_is_read():
    header, _ = answer("version")
    assert header[:3] == (4, 47, 0)


def test_a_list_of_devices_is_read_with_uuids():
    header, buffer = answer("list")
    found = {entry.name: entry for entry in abi.unpack_devices(buffer, header)}
    assert {name: entry.uuid for name, entry in found.items()} == {
        "tpr-pool": "THINPOOL-pool", "tpr-thin": "X-thin", "tpr-mixed": None, "tpr-bare": None
    }  # fmt: skip
    assert all(entry.uuid_known for entry in found.values())
    assert sorted(os.minor(entry.number) for entry in found.values()) == [0, 1, 2, 3]
    assert {os.major(entry.number) for entry in found.values()} == {253}


def test_a_list_without_uuids_says_that_they_are_not_known():
    header, buffer = answer("list_plain")
    found = list(abi.unpack_devices(buffer, header))
    assert len(found) == 4
    assert not any(entry.uuid_known for entry in found)


def test_an_empty_list_is_read():
    buffer = bytearray(4096)
    abi.pack_request(buffer)
    assert list(abi.unpack_devices(buffer, abi.unpack_header(buffer))) == []


def test_tables_and_status_of_a_kernel_are_read():
    [line] = abi.unpack_table(*reversed(answer("table_pool")))
    pool = parse_target(line)
    assert isinstance(pool, ThinPoolTarget)
    assert (pool.length, pool.block_sectors, pool.low_water_blocks) == (32768, 128, 4)
    assert pool.features() == ("skip_block_zeroing",)
    assert re.fullmatch(r"7:\d+", pool.metadata)
    [line] = abi.unpack_table(*reversed(answer("status_pool")))
    status = TargetStatus.of(line)
    assert (status.start, status.length, status.type) == (0, 32768, "thin-pool")
    assert status.value.mode is ThinPoolMode.RW
    assert (status.value.total_data_blocks, status.value.total_metadata_blocks) == (256, 1024)
    [line] = abi.unpack_table(*reversed(answer("status_thin")))
    assert TargetStatus.of(line).value == ThinStatus(mapped_sectors=0, highest_mapped_sector=None)


def test_a_table_of_many_targets_is_read():
    header, buffer = answer("table_mixed")
    zero, linear, error = abi.unpack_table(buffer, header)
    assert zero == (0, 8, "zero", "")
    assert linear[:3] == (8, 16, "linear")
    assert re.fullmatch(r"7:\d+ 64", linear.text)
    assert error == (24, 8, "error", "")
    assert header.flags & Flag.READONLY


def test_dependencies_are_read():
    header, buffer = answer("deps_pool")
    found = abi.unpack_deps(buffer, header)
    assert len(found) == 2
    assert {os.major(number) for number in found} == {7}
    header, buffer = answer("deps_bare")
    assert abi.unpack_deps(buffer, header) == ()


def test_states_are_read():
    bare = DeviceInfo.of(answer("info_bare")[0])
    assert (bare.name, bare.uuid, bare.live, bare.target_count) == ("tpr-bare", None, False, 0)
    mixed = DeviceInfo.of(answer("info_mixed")[0])
    assert (mixed.live, mixed.read_only, mixed.suspended, mixed.target_count) == (
        True, True, False, 3
    )  # fmt: skip
    assert mixed.path == "/dev/mapper/tpr-mixed"


def test_target_versions_are_read():
    header, buffer = answer("versions")
    found = dict(abi.unpack_versions(buffer, header))
    assert found["thin-pool"] == found["thin"] == (1, 22, 0)
    assert {"linear", "zero", "error"} <= found.keys()
    header, buffer = answer("version_thin")
    assert dict(abi.unpack_versions(buffer, header)) == {"thin": (1, 22, 0)}


def test_the_answer_to_a_message_is_read():
    header, buffer = answer("message_stats")
    assert header.flags & Flag.DATA_OUT
    text = abi.text_at(buffer, header.data_start, header.data_size)
    assert text.startswith("0: 0+")


WORD = st.text(
    st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1, max_size=60
)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**64 - 1), st.integers(1, 2**64 - 1),
            st.sampled_from(["thin", "thin-pool", "fifteen-letters"]), WORD,
        ),
        max_size=8,
    )
)  # fmt: skip
def test_a_packed_table_has_the_form_that_the_kernel_reads(values):
    lines = [TableLine(*value) for value in values]
    payload = abi.pack_table(lines)
    offset = 0
    for line in lines:
        start, length, status, following, kind = struct.unpack_from("=QQiI16s", payload, offset)
        assert (start, length, status) == (line.start, line.length, 0)
        assert kind.rstrip(b"\0").decode() == line.type
        assert following % 8 == 0
        text = payload[offset + 40 : offset + following]
        assert text.split(b"\0")[0] == line.text.encode()
        assert text.endswith(b"\0")
        offset += following
    assert offset == len(payload)


@pytest.mark.parametrize(
    "line",
    [TableLine(0, 8, "sixteen-letters-", ""), TableLine(0, 8, "", ""), TableLine(0, 8, "a", "\0")],
)
def test_what_no_table_can_hold_is_refused(line):
    with pytest.raises(errors.UsageError, match="no line of a table"):
        abi.pack_table([line])


@pytest.mark.parametrize("name", ["a", "tp-1", "A.b:c=d@e_f#g+h-i", "x" * 127])
def test_names_that_udev_leaves_alone_are_taken(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "control", "a/b", "a b", "ü", "a\\b", "a\n", "x" * 128, "$(x)"]
)
def test_other_names_are_refused(name):
    with pytest.raises(errors.UsageError, match="no device-mapper name"):
        check_name(name)


def test_uuids_have_a_limit_of_their_own():
    assert check_uuid("u" * 128)
    for wrong in ("u" * 129, "", "a b"):
        with pytest.raises(errors.UsageError, match="no device-mapper uuid"):
            check_uuid(wrong)
