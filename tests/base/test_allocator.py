"""The allocator against a plain set, and the promises a set does not show."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from thinpool._native import ffi, lib


class Allocator:
    """One struct tp_allocator; statuses come back as they are."""

    def __init__(self, nr_blocks: int) -> None:
        self.ptr = lib.tp_allocator_create(nr_blocks)
        assert self.ptr != ffi.NULL

    def close(self) -> None:
        lib.tp_allocator_destroy(self.ptr)

    def alloc(self) -> int | None:
        out = ffi.new("uint64_t *")
        status = lib.tp_allocator_alloc(self.ptr, out)
        assert status in (0, lib.TP_E_DATA_SPACE)
        return None if status else out[0]

    def alloc_run(self, want: int) -> tuple[int, int] | None:
        begin, length = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        status = lib.tp_allocator_alloc_run(self.ptr, want, begin, length)
        assert status in (0, lib.TP_E_DATA_SPACE)
        return None if status else (begin[0], length[0])

    def alloc_batch(self, count: int) -> list[int] | None:
        blocks, got = ffi.new("uint64_t[]", max(count, 1)), ffi.new("size_t *")
        status = lib.tp_allocator_alloc_batch(self.ptr, count, blocks, got)
        assert status in (0, lib.TP_E_DATA_SPACE)
        return None if status else list(blocks[0 : got[0]])

    def take(self, begin: int, length: int = 1) -> int:
        return lib.tp_allocator_take(self.ptr, begin, length)

    def free(self, begin: int, length: int = 1) -> int:
        return lib.tp_allocator_free(self.ptr, begin, length)

    def free_batch(self, blocks: list[int]) -> int:
        return lib.tp_allocator_free_batch(self.ptr, blocks, len(blocks))

    def untake(self, begin: int, length: int = 1) -> int:
        return lib.tp_allocator_untake(self.ptr, begin, length)

    def commit(self) -> None:
        lib.tp_allocator_commit(self.ptr)

    def resize(self, nr_blocks: int) -> int:
        return lib.tp_allocator_resize(self.ptr, nr_blocks)

    def is_free(self, block: int) -> int:
        return lib.tp_allocator_is_free(self.ptr, block)

    def next_free_run(self, begin: int) -> tuple[int, int] | None:
        found, length = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        status = lib.tp_allocator_next_free_run(self.ptr, begin, found, length)
        assert status in (0, lib.TP_E_KEY_NOT_FOUND)
        return None if status else (found[0], length[0])

    @property
    def nr_free(self) -> int:
        return lib.tp_allocator_nr_free(self.ptr)

    @property
    def nr_pending(self) -> int:
        return lib.tp_allocator_nr_pending(self.ptr)

    @property
    def nr_blocks(self) -> int:
        return lib.tp_allocator_nr_blocks(self.ptr)

    def free_runs(self) -> list[tuple[int, int]]:
        """All runs of allocatable blocks, from the searches alone."""
        runs = []
        at = 0
        while (run := self.next_free_run(at)) is not None:
            runs.append(run)
            at = run[0] + run[1]
        return runs


@pytest.fixture
def allocator_of():
    made: list[Allocator] = []

    def make(nr_blocks: int) -> Allocator:
        made.append(Allocator(nr_blocks))
        return made[-1]

    yield make
    for allocator in made:
        allocator.close()


def runs_of(blocks: set[int]) -> list[tuple[int, int]]:
    """The runs of neighbours in a set of numbers."""
    runs: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if runs and block == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


# Around the sizes of a word and of a summary's reach, where mistakes would live.
SIZES = st.one_of(
    st.integers(0, 300),
    st.sampled_from([63, 64, 65, 127, 128, 129, 4095, 4096, 4097, 4160, 8192, 8257]),
)
RAW = st.integers(0, 2**63)


class AllocatorMachine(RuleBasedStateMachine):
    """Three sets are the model. Choices are raw numbers, scaled to what there is to choose from."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator: Allocator | None = None

    @initialize(nr_blocks=SIZES)
    def create(self, nr_blocks: int) -> None:
        self.allocator = Allocator(nr_blocks)
        self.free = set(range(nr_blocks))
        self.used: set[int] = set()
        self.pending: set[int] = set()
        self.cursor = 0

    def teardown(self) -> None:
        if self.allocator is not None:
            self.allocator.close()

    @property
    def nr_blocks(self) -> int:
        return len(self.free) + len(self.used) + len(self.pending)

    def use(self, begin: int, length: int = 1) -> None:
        blocks = set(range(begin, begin + length))
        assert blocks <= self.free
        self.free -= blocks
        self.used |= blocks

    def range_from(self, raw: int, length: int) -> tuple[int, int]:
        """A range that may reach a little past the end."""
        return raw % (self.nr_blocks + 3), length

    def expected(self, begin: int, length: int, within: set[int], otherwise: int) -> int:
        if begin + length > self.nr_blocks:
            return lib.TP_E_OUT_OF_RANGE
        return 0 if set(range(begin, begin + length)) <= within else otherwise

    @rule()
    def alloc(self) -> None:
        block = self.allocator.alloc()
        if not self.free:
            assert block is None
            return
        ahead = [b for b in self.free if b >= self.cursor]
        assert block == min(ahead or self.free), "next-fit"
        self.use(block)
        self.cursor = block + 1

    @rule(want=st.one_of(st.integers(1, 5), st.integers(1, 200), st.just(2**64 - 1)))
    def alloc_run(self, want: int) -> None:
        run = self.allocator.alloc_run(want)
        if not self.free:
            assert run is None
            return
        begin, length = run
        assert 1 <= length <= want
        runs = runs_of(self.free)
        whole_word = any((b + 63) // 64 * 64 + 64 <= b + n for b, n in runs)
        first = min((r for r in runs if sum(r) > self.cursor), default=runs[0])
        first_length = sum(first) - first[0]
        if first[0] < self.cursor < sum(first):
            first_length = sum(first) - self.cursor
        assert length >= min(want, max(first_length, 64 if whole_word else 1))
        self.use(begin, length)
        self.cursor = begin + length

    @rule(count=st.integers(0, 150))
    def alloc_batch(self, count: int) -> None:
        blocks = self.allocator.alloc_batch(count)
        if count and not self.free:
            assert blocks is None
            return
        in_order = sorted(self.free, key=lambda b: (b < self.cursor, b))[:count]
        assert blocks == in_order
        for block in blocks:
            self.use(block)
        if blocks:
            self.cursor = blocks[-1] + 1

    @rule(raw=RAW, length=st.integers(0, 200))
    def take(self, raw: int, length: int) -> None:
        begin, length = self.range_from(raw, length)
        status = self.allocator.take(begin, length)
        assert status == self.expected(begin, length, self.free, lib.TP_E_BUSY)
        if not status:
            self.use(begin, length)

    @rule(raw=RAW, length=st.integers(0, 200))
    def free_range(self, raw: int, length: int) -> None:
        begin, length = self.range_from(raw, length)
        status = self.allocator.free(begin, length)
        assert status == self.expected(begin, length, self.used, lib.TP_E_INVALID)
        if not status:
            blocks = set(range(begin, begin + length))
            self.used -= blocks
            self.pending |= blocks

    @rule(
        raws=st.lists(RAW, max_size=80),
        spoilt=st.sampled_from(["no", "twice", "free", "pending", "past"]),
    )
    def free_batch(self, raws: list[int], spoilt: str) -> None:
        choices = sorted(self.used)
        blocks = list(dict.fromkeys(choices[raw % len(choices)] for raw in raws if choices))
        if spoilt == "twice":
            assume(blocks)
            blocks.append(blocks[0])
        elif spoilt == "free":
            assume(self.free)
            blocks.insert(len(blocks) // 2, min(self.free))
        elif spoilt == "pending":
            assume(self.pending)
            blocks.append(min(self.pending))
        elif spoilt == "past":
            blocks.append(self.nr_blocks)
        status = self.allocator.free_batch(blocks)
        if spoilt == "no":
            assert status == 0
            self.used -= set(blocks)
            self.pending |= set(blocks)
        else:
            past = lib.TP_E_OUT_OF_RANGE
            assert status == (past if spoilt == "past" else lib.TP_E_INVALID)

    @rule(raw=RAW, length=st.integers(0, 200))
    def untake(self, raw: int, length: int) -> None:
        begin, length = self.range_from(raw, length)
        status = self.allocator.untake(begin, length)
        assert status == self.expected(begin, length, self.used, lib.TP_E_INVALID)
        if not status:
            blocks = set(range(begin, begin + length))
            self.used -= blocks
            self.free |= blocks

    @rule(raw=RAW)
    def free_a_used_run(self, raw: int) -> None:
        """Random ranges seldom are all used; this one is."""
        runs = runs_of(self.used)
        assume(runs)
        begin, length = runs[raw % len(runs)]
        assert self.allocator.free(begin, length) == 0
        self.used -= set(range(begin, begin + length))
        self.pending |= set(range(begin, begin + length))

    @rule()
    def commit(self) -> None:
        self.allocator.commit()
        self.free |= self.pending
        self.pending = set()

    @rule(more=SIZES)
    def resize(self, more: int) -> None:
        old = self.nr_blocks
        assume(old + more < 20000)
        if old:
            assert self.allocator.resize(old - 1) == lib.TP_E_INVALID
        assert self.allocator.resize(old + more) == 0
        self.free |= set(range(old, old + more))

    @invariant()
    def agrees_with_the_sets(self) -> None:
        if self.allocator is None:
            return
        assert self.allocator.nr_blocks == self.nr_blocks
        assert self.allocator.nr_free == len(self.free)
        assert self.allocator.nr_pending == len(self.pending)
        assert self.allocator.free_runs() == runs_of(self.free)
        for block in (0, self.cursor, self.nr_blocks // 2, self.nr_blocks, 2**63):
            assert self.allocator.is_free(block) == (block in self.free)


def test_the_allocator_equals_three_sets():
    run_state_machine_as_test(
        AllocatorMachine, settings=settings(stateful_step_count=40, max_examples=120)
    )


def test_a_freed_block_is_not_handed_out_before_the_commit(allocator_of):
    allocator = allocator_of(3)
    assert [allocator.alloc() for _ in range(3)] == [0, 1, 2]
    assert allocator.free(1) == 0
    assert allocator.alloc() is None
    assert allocator.take(1) == lib.TP_E_BUSY
    assert allocator.untake(1) == lib.TP_E_INVALID
    allocator.commit()
    assert allocator.alloc() == 1


def test_what_was_only_taken_can_go_back_at_once(allocator_of):
    allocator = allocator_of(2)
    assert allocator.take(0, 2) == 0
    assert allocator.untake(0) == 0
    assert allocator.alloc() == 0


def test_a_batch_that_frees_a_pending_block_leaves_it_pending(allocator_of):
    allocator = allocator_of(5)
    assert allocator.take(0, 5) == 0
    assert allocator.free(3) == 0
    assert allocator.free_batch([0, 1, 3]) == lib.TP_E_INVALID
    assert allocator.nr_pending == 1
    allocator.commit()
    assert allocator.free_runs() == [(3, 1)]


@pytest.mark.parametrize("how", ["untake", "commit"])
def test_a_block_given_back_ahead_of_the_cursor_is_the_next(allocator_of, how):
    allocator = allocator_of(64)
    assert allocator.take(5, 10) == 0
    assert [allocator.alloc() for _ in range(3)] == [0, 1, 2]
    if how == "untake":
        assert allocator.untake(7) == 0
    else:
        assert allocator.free(7) == 0
        assert allocator.alloc() == 3
        allocator.commit()
    following = [allocator.alloc() for _ in range(3)]
    assert following == ([3, 4, 7] if how == "untake" else [4, 7, 15])


@pytest.mark.parametrize("nr_blocks", [0, 1, 64, 4096, 4097])
def test_an_allocator_hands_out_each_block_once(allocator_of, nr_blocks):
    allocator = allocator_of(nr_blocks)
    assert (allocator.alloc_batch(nr_blocks + 5) or []) == list(range(nr_blocks))
    assert allocator.alloc() is None
    assert allocator.alloc_run(1) is None
    assert allocator.next_free_run(0) is None


def test_a_run_of_none_is_refused(allocator_of):
    out = ffi.new("uint64_t[2]")
    status = lib.tp_allocator_alloc_run(allocator_of(10).ptr, 0, out, out + 1)
    assert status == lib.TP_E_INVALID


def test_a_run_is_found_beyond_any_number_of_fragments(allocator_of):
    """Every second block is used but for one stretch, two thirds of the way in."""
    nr_blocks = 300000
    allocator = allocator_of(nr_blocks)
    stretch = range(200001, 200001 + 130)
    for block in range(0, nr_blocks, 2):
        if block not in stretch:
            assert allocator.take(block) == 0
    assert allocator.alloc_run(64) == (200001, 64)
    assert allocator.alloc_run(64) == (200065, 64)
    begin, length = allocator.alloc_run(64)
    assert length in (1, 3)  # the stretch's end; neighbours of it are fragments
    assert allocator.is_free(begin) == 0


def test_a_run_is_found_behind_the_cursor_too(allocator_of):
    """After it there are fragments only, more of them than a search looks at."""
    allocator = allocator_of(1000)
    for block in range(201, 1000, 2):
        assert allocator.take(block) == 0
    assert allocator.take(0, 200) == 0
    assert allocator.alloc() == 200
    assert allocator.untake(10, 150) == 0
    assert allocator.alloc_run(64) == (10, 64)


def test_a_long_want_gets_the_longest_stretch_of_those_that_are_seen(allocator_of):
    allocator = allocator_of(10000)
    for wall in (1000, 1200, 5000, 5100):
        assert allocator.take(wall) == 0
    assert allocator.alloc_run(5000) == (5101, 4899)
    assert allocator.alloc_run(5000) == (1201, 3799)


def test_growth_past_a_summary_level_keeps_all_states(allocator_of):
    allocator = allocator_of(60)
    assert allocator.take(0, 60) == 0
    assert allocator.free(10, 5) == 0
    assert allocator.resize(70000) == 0
    assert allocator.free_runs() == [(60, 70000 - 60)]
    assert allocator.free(20, 1) == 0
    allocator.commit()
    assert allocator.free_runs() == [(10, 5), (20, 1), (60, 70000 - 60)]


def test_sizes_past_the_formats_limit_are_refused(allocator_of):
    assert lib.tp_allocator_create(2**40 + 1) == ffi.NULL
    assert lib.tp_allocator_create(2**64 - 1) == ffi.NULL
    allocator = allocator_of(5)
    assert allocator.resize(2**40 + 1) == lib.TP_E_INVALID
    assert allocator.nr_blocks == 5


@given(begin=st.integers(0, 2**64 - 1), length=st.integers(0, 2**64 - 1))
@settings(max_examples=200)
def test_no_range_wraps_around(begin, length):
    allocator = Allocator(1000)
    inside = begin + length <= 1000
    status = allocator.take(begin, length)
    assert status == (0 if inside else lib.TP_E_OUT_OF_RANGE)
    assert allocator.free(begin, length) == status
    allocator.close()


def test_destroying_nothing_is_fine():
    lib.tp_allocator_destroy(ffi.NULL)
