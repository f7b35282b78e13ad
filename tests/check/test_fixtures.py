"""Metadata that kernels and thin_restore wrote: checked, dumped and compared as their notes say."""

from __future__ import annotations

import lzma
import re

import pytest

from tests.check.conftest import FIXTURES, IMAGES, judge
from thinpool.check import check_metadata, delta, dump_metadata
from thinpool.errors import NotFoundError

LEAKING = "kernel-metadata/k612_after_discard_leak2.bin.xz"


def expected_dump(name: str) -> str:
    for suffix, replacement in ((".bin.xz", ".xml"), (".meta.xz", ".dump.xml.xz")):
        if name.endswith(suffix):
            data = (FIXTURES / (name.removesuffix(suffix) + replacement)).read_bytes()
            return (lzma.decompress(data) if replacement.endswith(".xz") else data).decode()
    raise AssertionError(name)


@pytest.mark.parametrize("name", [name for name in IMAGES if name != LEAKING])
def test_a_good_image_is_clean(name: str, unpack) -> None:
    report = check_metadata(unpack(name))
    assert report.clean
    assert {fault.severity for fault in report.faults} <= {"note"}
    if "kernel" in name:
        assert report.faults == ()


def test_what_thin_restore_leaves_stale_is_noted(unpack) -> None:
    report = check_metadata(unpack("restored/random3000.bin.xz"))
    assert [(fault.type, fault.structure) for fault in report.faults] == [
        ("nr_free", "data-index"),
        ("nr_free", "metadata-index"),
        ("none_free_before", "metadata-index"),
        ("nr_allocated", "metadata-space-map"),
    ]


def test_needs_check_is_a_note(unpack) -> None:
    report = check_metadata(unpack("restored/needs_check.bin.xz"))
    assert report.clean
    assert report.needs_check
    assert "needs_check" in {fault.type for fault in report.faults}


def test_what_the_kernel_leaked_is_a_leak(unpack) -> None:
    report = check_metadata(unpack(LEAKING))
    (fault,) = report.faults
    assert not report.clean
    assert report.leaked_data_blocks == 2
    assert (fault.type, fault.severity, fault.structure) == (
        "count_high",
        "leak",
        "data-space-map",
    )
    assert (fault.data_block, fault.length, fault.found, fault.wanted) == (0, 2, 1, 0)


@pytest.mark.parametrize("name", IMAGES)
def test_the_dump_is_thin_dumps_to_the_byte(name: str, unpack, require) -> None:
    path = unpack(name)
    dump = "".join(dump_metadata(path))
    if "restored" not in name:  # there the .xml is what thin_restore was given
        assert dump == expected_dump(name)
    require("thin_tools")
    assert dump == judge("thin_dump", path).stdout


def test_a_metadata_snapshot_is_dumped_and_checked(unpack, require) -> None:
    path = unpack("kernel-pools/metasnap.meta.xz")
    dump = "".join(dump_metadata(path, use_metadata_snapshot=True))
    assert dump == (FIXTURES / "kernel-pools/metasnap.live-metasnap.xml").read_text()
    report = check_metadata(path, use_metadata_snapshot=True)
    assert (report.clean, report.transaction_id, report.devices, report.mappings) == (
        True,
        1,
        2,
        120,
    )
    require("thin_tools")
    assert dump == judge("thin_dump", "-m", path).stdout


def test_without_a_metadata_snapshot_there_is_none_to_dump(unpack) -> None:
    path = unpack("kernel-pools/simple.meta.xz")
    with pytest.raises(NotFoundError):
        "".join(dump_metadata(path, use_metadata_snapshot=True))
    report = check_metadata(path, use_metadata_snapshot=True)
    assert [fault.type for fault in report.faults] == ["no_metadata_snapshot"]


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (0, 2), (2, 3), (3, 1), (1, 1)])
def test_deltas_are_thin_deltas(pair: tuple[int, int], same, unpack, require) -> None:
    require("thin_tools")
    path = unpack("kernel-pools/snaps.meta.xz")
    left, right = map(str, pair)
    text = judge("thin_delta", "--snap1", left, "--snap2", right, path).stdout
    wanted = [
        (kind, int(begin), int(length))
        for kind, begin, length in re.findall(r'<(\w+) begin="(\d+)" length="(\d+)"', text)
        if same or kind != "same"
    ]
    found = [(part.kind.value, part.begin, part.length) for part in delta(path, *pair, same=same)]
    assert found == wanted
