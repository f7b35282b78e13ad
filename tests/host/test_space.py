"""Room for sparse files."""

from __future__ import annotations

import os

from thinpool.host import space

MIB = 1 << 20


def test_free_space_is_asked_of_the_nearest_directory_that_is_there(tmp_path):
    here = os.statvfs(tmp_path)
    free = space.host_free(tmp_path / "a" / "b" / "c")
    assert abs(free - here.f_bavail * here.f_frsize) < 1 << 30


def test_files_that_fit_are_no_shortage(tmp_path):
    assert space.shortages({str(tmp_path / "data"): MIB, str(tmp_path / "metadata"): MIB}) == []


def test_files_of_one_filesystem_are_added_up(tmp_path):
    free = space.host_free(tmp_path)
    half = free // 2 + (1 << 30)
    one, two = str(tmp_path / "data"), str(tmp_path / "metadata")
    assert space.shortages({one: half}) == []
    (shortage,) = space.shortages({one: half, two: half})
    assert shortage.paths == (one, two)
    assert shortage.needed == 2 * half
    assert shortage.free < shortage.needed


def test_what_a_file_takes_already_is_counted(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"x" * MIB)
    os.sync()
    assert MIB <= space.allocated(path) < 2 * MIB
    assert space.allocated(tmp_path / "absent") == 0
    big = space.host_free(tmp_path) * 2
    (shortage,) = space.shortages({str(path): big})
    assert shortage.needed == big - space.allocated(path)
