"""The allocator as Python sees it: typed errors, ranges, and one lock for all threads."""

from __future__ import annotations

import threading

import pytest

from thinpool.engine import Allocator
from thinpool.errors import BusyError, ClosedError, DataSpaceError, UsageError


@pytest.fixture
def allocator():
    with Allocator(1000) as made:
        yield made


def test_blocks_go_out_and_come_back(allocator):
    assert allocator.allocate() == 0
    assert allocator.allocate_run(64) == range(1, 65)
    assert allocator.allocate_batch(10) == list(range(65, 75))
    allocator.free(1, 64)
    allocator.free_batch([0, 70])
    assert (len(allocator), allocator.free_blocks, allocator.pending_blocks) == (1000, 925, 66)
    assert not allocator.is_free(70)
    allocator.commit()
    assert allocator.is_free(70)
    assert list(allocator.free_runs()) == [range(65), range(70, 71), range(75, 1000)]
    allocator.untake(65)
    allocator.take(0, 66)
    allocator.resize(2000)
    assert list(allocator.free_runs()) == [range(70, 71), range(75, 2000)]


def test_errors_are_types_and_change_nothing(allocator):
    allocator.take(0, 990)
    with pytest.raises(BusyError):
        allocator.take(980, 20)
    with pytest.raises(UsageError):
        allocator.take(990, 11)
    with pytest.raises(UsageError):
        allocator.free_batch([5, 6, 5])
    with pytest.raises(UsageError):
        allocator.untake(985, 10)
    with pytest.raises(UsageError):
        allocator.resize(10)
    with pytest.raises(UsageError):
        allocator.allocate_run(0)
    assert allocator.allocate_batch(20) == list(range(990, 1000))
    for full in (allocator.allocate, lambda: allocator.allocate_run(4)):
        with pytest.raises(DataSpaceError):
            full()
    with pytest.raises(DataSpaceError):
        allocator.allocate_batch(1)
    assert allocator.allocate_batch(0) == []
    assert (allocator.free_blocks, allocator.pending_blocks) == (0, 0)


@pytest.mark.parametrize("nr_blocks", [-1, (1 << 40) + 1])
def test_more_blocks_than_the_format_has_are_refused(nr_blocks):
    with pytest.raises(UsageError):
        Allocator(nr_blocks)


def test_a_closed_allocator_says_so():
    allocator = Allocator(1)
    allocator.close()
    allocator.close()
    with pytest.raises(ClosedError):
        allocator.allocate()


def test_threads_never_get_the_same_block():
    with Allocator(20000) as allocator:
        got: list[int] = []

        def work() -> None:
            mine = []
            for _ in range(100):
                mine.append(allocator.allocate())
                mine += allocator.allocate_run(10)
                mine += allocator.allocate_batch(20)
            got.extend(mine)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == len(set(got)) == 20000 - allocator.free_blocks
