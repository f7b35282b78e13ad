"""Every altered image is judged as it should be, beside what thin_check 0.9 says of it."""

from __future__ import annotations

import pytest

from tests.check.conftest import judge
from tests.check.defects import DEFECTS
from thinpool.check import check_metadata

TABLE = """
good sb_version_0 sb_version_1 sb_version_3 sb_version_99 sb_blocknr_5 sb_magic_bad sb_csum_bad
sb_mdblocksize_16 sb_md_nr_blocks_500 sb_md_nr_blocks_5000 sb_compat_1 sb_compat_ro_1 sb_incompat_1
sb_needs_check sb_flag_bit1 sb_uuid sb_tail_garbage sb_dbs_256 sb_time_zero sb_smroot_tail_garbage
node_padding_nonzero node_blocknr_bad node_csum_bad node_flags_3 node_flags_6 node_flags_0
node_unused_slots_garbage keys_out_of_order keys_duplicate parent_key_lower parent_key_higher
parent_key0_higher parent_key_too_low_overlap leaf_83 leaf_84 leaf_last_1 leaf_root_1
leaf_empty_middle leaf_full_252 max_251 max_254 max_255 max_126 max_3_root internal_root_1_child
internal_root_empty internal_underfull unbalanced internal_value_size_4 leaf_value_size_16
details_missing_dev1 mapping_missing_dev1 mapped_blocks_wrong dev_id_2p24 dev_id_2p32
mapping_beyond_data mapping_time_future index_beyond_nonzero index_padding_nonzero
bitmap_unused_nonzero md_bits_beyond_end data_bits_beyond_end md_leak_1 md_leak_2 md_count_low
data_leak data_count_low data_count_high md_nr_allocated_wrong data_nr_allocated_wrong
md_nr_free_zero md_none_free_before_high md_none_free_before_zero data_nr_free_zero
overflow_extra_entry overflow_missing truncated_nr_free file_longer file_shorter
junk_in_free_blocks held_root_zeroed_sm held_root_bad_block
""".split()  # noqa: SIM905 - a table reads better than 83 lines
"""The experiments from which the format's facts were learned."""


def test_all_experiments_are_covered() -> None:
    assert len(TABLE) == 83
    assert set(TABLE) <= DEFECTS.keys()


@pytest.mark.parametrize("name", DEFECTS)
def test_the_verdict_on(name: str, tmp_path) -> None:
    defect = DEFECTS[name]
    report = check_metadata(defect.make().write(tmp_path / "metadata"))
    said = {f"{fault.severity} {fault.type}" for fault in report.faults}
    assert said == defect.says, "\n".join(fault.message for fault in report.faults)
    assert report.clean == all(each.startswith("note") for each in defect.says)


@pytest.mark.parametrize("name", DEFECTS)
def test_thin_check_finds_nothing_that_we_do_not(name: str, tmp_path, require) -> None:
    require("thin_tools")
    defect = DEFECTS[name]
    path = defect.make().write(tmp_path / "metadata")
    result = judge("thin_check", path)
    assert (result.returncode == 0) == defect.thin_check, result.stdout + result.stderr
    if not defect.thin_check:
        assert not check_metadata(path).clean
