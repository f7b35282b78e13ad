/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The checker's reference counts against plain numbers: every digit goes round, some often, from
 * several threads at once, in lanes and shared; whole words and single counts are read back.
 */
#include "check.h"

#include <pthread.h>
#include <stdbool.h>

#include "thinpool/check.h"

#define THREADS 3u
#define ADDS    60000u
#define OFTEN   2100u /* past the middle digit of one thread */

struct work {
	struct tp_check_counts *counts;
	unsigned number;
	uint64_t seed;
	uint32_t *added; /* by this thread, a number a block */
};

static void add(struct work *work, uint64_t block)
{
	struct tp_check_counts *counts = work->counts;

	if (counts->shared)
		tp_check_counts_add(counts, block);
	else
		tp_check_counts_add_own(counts, tp_check_counts_lane(counts, work->number), block);
	work->added[block]++;
}

static void *run(void *argument)
{
	struct work *work = argument;
	uint64_t nr = work->counts->nr;

	/* Neighbours in one byte, so that a digit that spills into the next one is seen. */
	for (unsigned i = 0; i < OFTEN; i++)
		add(work, nr / 2);
	for (unsigned i = 0; i < ADDS; i++) {
		uint64_t block = test_random_below(&work->seed, nr);

		add(work, i % 4 ? block : block % 64 < nr ? block % 64 : block);
	}
	return NULL;
}

static unsigned pair_of(uint64_t count)
{
	return count >= 3 ? 3 : count == 2 ? 1 : count == 1 ? 2 : 0;
}

static void check_all(const struct tp_check_counts *counts, const struct work *works)
{
	uint64_t word = 0;

	for (uint64_t block = 0; block < counts->nr; block++) {
		uint64_t wanted = 0;

		for (unsigned i = 0; i < THREADS; i++)
			wanted += works[i].added[block];
		CHECK_EQUAL(tp_check_counts_get(counts, block), wanted);
		if (block % TP_CHECK_COUNTS_WORD == 0)
			word = tp_check_counts_word(counts, block);
		CHECK_EQUAL(word & 3, pair_of(wanted));
		word >>= 2;
		if (block + 1 == counts->nr)
			CHECK_EQUAL(word, 0); /* nothing past the end */
	}
}

static void check_one(uint64_t nr, unsigned nr_threads, uint64_t *seed)
{
	struct tp_check_counts counts;
	struct work works[THREADS];
	pthread_t threads[THREADS];

	CHECK_EQUAL(tp_check_counts_init(&counts, nr, nr_threads, NULL), 0);
	CHECK_EQUAL(counts.shared, nr_threads == 0);
	for (unsigned i = 0; i < THREADS; i++) {
		works[i] = (struct work){
			.counts = &counts,
			.number = i,
			.seed = test_random(seed),
			.added = calloc(nr, sizeof(*works[i].added)),
		};
		CHECK(works[i].added);
		CHECK_EQUAL(pthread_create(&threads[i], NULL, run, &works[i]), 0);
	}
	for (unsigned i = 0; i < THREADS; i++)
		CHECK_EQUAL(pthread_join(threads[i], NULL), 0);
	CHECK(!counts.failed);
	check_all(&counts, works);
	for (unsigned i = 0; i < THREADS; i++)
		free(works[i].added);
	tp_check_counts_deinit(&counts);
	tp_check_counts_deinit(&counts); /* as where making the tables stopped half way */
}

int main(void)
{
	static const uint64_t sizes[] = { 1, 31, 32, 33, 1000, 16320, 100003 };
	struct tp_check_counts counts;
	uint64_t seed = test_seed();

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		check_one(sizes[i], 0, &seed);
		check_one(sizes[i], THREADS, &seed);
	}
	/* Lanes of this size would cost more than they give. */
	CHECK_EQUAL(tp_check_counts_init(&counts, UINT64_C(1) << 30, 2, NULL), 0);
	CHECK(counts.shared);
	tp_check_counts_deinit(&counts);
	CHECK_EQUAL(tp_check_counts_init(&counts, 0, 2, NULL), 0);
	tp_check_counts_deinit(&counts);
	return 0;
}
