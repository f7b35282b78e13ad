/* SPDX-License-Identifier: Apache-2.0 */
/* The allocator against an array of states, over enough blocks for four levels of summaries. */
#include "check.h"

#include "thinpool/abi.h"

#include <string.h>

#define NR_BLOCKS_MAX 600000
#define STEPS         60000
#define COMPARE_EVERY 3000

enum state {
	FREE,
	USED,
	PENDING
};

static struct tp_allocator *allocator;
static uint8_t *model;
static uint64_t nr_blocks;
static uint64_t seed;

static uint64_t below(uint64_t limit)
{
	return test_random_below(&seed, limit);
}

static int all_are(uint64_t begin, uint64_t length, enum state state)
{
	for (uint64_t i = begin; i < begin + length; i++) {
		if (model[i] != state)
			return 0;
	}
	return 1;
}

static void change(uint64_t begin, uint64_t length, enum state from, enum state to)
{
	CHECK(length <= nr_blocks && begin <= nr_blocks - length);
	CHECK(all_are(begin, length, from));
	memset(model + begin, to, length);
}

static void compare(void)
{
	uint64_t count[3] = { 0, 0, 0 };
	uint64_t block = 0;
	uint64_t begin;
	uint64_t length;

	for (uint64_t i = 0; i < nr_blocks; i++) {
		count[model[i]]++;
		CHECK_EQUAL(tp_allocator_is_free(allocator, i), model[i] == FREE);
	}
	CHECK_EQUAL(tp_allocator_nr_blocks(allocator), nr_blocks);
	CHECK_EQUAL(tp_allocator_nr_free(allocator), count[FREE]);
	CHECK_EQUAL(tp_allocator_nr_pending(allocator), count[PENDING]);
	while (!tp_allocator_next_free_run(allocator, block, &begin, &length)) {
		CHECK(length && begin >= block && begin + length <= nr_blocks);
		for (; block < begin; block++)
			CHECK(model[block] != FREE);
		CHECK(all_are(begin, length, FREE));
		block = begin + length;
		CHECK(block == nr_blocks || model[block] != FREE);
	}
	for (; block < nr_blocks; block++)
		CHECK(model[block] != FREE);
}

static void allocate(void)
{
	uint64_t blocks[300];
	uint64_t length;
	uint64_t want = 1 + below(below(10) ? 100 : 20000);
	size_t got;

	switch (below(3)) {
	case 0:
		if (tp_allocator_alloc(allocator, blocks) == 0)
			change(blocks[0], 1, FREE, USED);
		else
			CHECK_EQUAL(tp_allocator_nr_free(allocator), 0);
		break;
	case 1:
		if (tp_allocator_alloc_run(allocator, want, blocks, &length) == 0) {
			CHECK(length >= 1 && length <= want);
			change(blocks[0], length, FREE, USED);
		} else {
			CHECK_EQUAL(tp_allocator_nr_free(allocator), 0);
		}
		break;
	default:
		if (tp_allocator_alloc_batch(allocator, 300, blocks, &got) == 0) {
			CHECK(got == 300 || tp_allocator_nr_free(allocator) == 0);
			for (size_t i = 0; i < got; i++)
				change(blocks[i], 1, FREE, USED);
		} else {
			CHECK_EQUAL(tp_allocator_nr_free(allocator), 0);
		}
	}
}

/* A random range; half of the time shrunk to what has one state, so that it can succeed. */
static void on_a_range(void)
{
	uint64_t begin = below(nr_blocks);
	uint64_t length = below(below(10) ? 200 : 30000);
	int what = (int)below(3);
	enum state from = what == 0 ? FREE : USED;
	enum state to = what == 0 ? USED : what == 1 ? PENDING : FREE;
	int status;

	if (length > nr_blocks - begin)
		length = nr_blocks - begin;
	if (below(2)) {
		uint64_t fits = 0;

		while (fits < length && model[begin + fits] == from)
			fits++;
		length = fits;
	}
	if (what == 0)
		status = tp_allocator_take(allocator, begin, length);
	else if (what == 1)
		status = tp_allocator_free(allocator, begin, length);
	else
		status = tp_allocator_untake(allocator, begin, length);
	if (all_are(begin, length, from)) {
		CHECK_EQUAL(status, 0);
		change(begin, length, from, to);
	} else {
		CHECK_EQUAL(status, what == 0 ? TP_E_BUSY : TP_E_INVALID);
	}
}

static void commit(void)
{
	tp_allocator_commit(allocator);
	for (uint64_t i = 0; i < nr_blocks; i++) {
		if (model[i] == PENDING)
			model[i] = FREE;
	}
}

static void resize(void)
{
	uint64_t more = below(20000);

	if (nr_blocks + more > NR_BLOCKS_MAX)
		return;
	CHECK_EQUAL(tp_allocator_resize(allocator, nr_blocks + more), 0);
	memset(model + nr_blocks, FREE, more);
	nr_blocks += more;
}

int main(void)
{
	seed = test_seed();
	nr_blocks = 250000;
	allocator = tp_allocator_create(nr_blocks);
	model = calloc(NR_BLOCKS_MAX, 1);
	CHECK(allocator && model);
	for (uint64_t step = 0; step < STEPS; step++) {
		/* First it fills, then it breathes. */
		uint64_t choice = below(step < STEPS / 3 ? 60 : 100);

		if (choice < 50)
			allocate();
		else if (choice < 98)
			on_a_range();
		else if (choice < 99)
			commit();
		else
			resize();
		if (step % COMPARE_EVERY == 0)
			compare();
	}
	compare();
	/* To the last block, from any state. */
	commit();
	while (tp_allocator_nr_free(allocator))
		allocate();
	compare();
	tp_allocator_destroy(allocator);
	free(model);
	return 0;
}
