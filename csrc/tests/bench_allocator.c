/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an allocation costs, one row of tab-separated numbers a case; thinpool bench core runs this
 * and shows the table.
 *
 * Usage: bench_allocator NR_BLOCKS SEED
 * Row: layout, percent full, blocks wanted, ns a call and blocks got a call of the allocator, and
 * both of a plain linear scan.
 *
 * A round allocates 0.2 % of the blocks (so that 99 % full stays that), is timed whole, and gives
 * them back untimed; the cursor goes on, so that rounds see different places. The median counts.
 * The scan is next-fit too, over the same bitmap a bit at a time; for a run it looks on for one of
 * the wanted length all the way round, which costs so much in fragments that few calls are timed.
 */
#include "thinpool/abi.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ROUNDS           7
#define STRETCH          8192 /* blocks, used and free together, of the long-stretch layout */
#define SCAN_SECONDS_MAX 0.15 /* of one round */

struct scan {
	uint64_t *free; /* bit a block */
	uint64_t nr_blocks;
	uint64_t cursor;
};

struct extent {
	uint64_t begin;
	uint64_t length;
};

struct result {
	double ns;
	double length;
};

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void check(int ok, const char *what)
{
	if (ok)
		return;
	fprintf(stderr, "bench_allocator: %s\n", what);
	exit(1);
}

/* xorshift64*: the same layout for the same seed everywhere. */
static uint64_t next_random(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * UINT64_C(0x2545F4914F6CDD1D);
}

static int scan_is_free(const struct scan *scan, uint64_t block)
{
	return scan->free[block / 64] >> block % 64 & 1;
}

static void scan_mark(struct scan *scan, uint64_t block, int is_free)
{
	if (is_free)
		scan->free[block / 64] |= UINT64_C(1) << block % 64;
	else
		scan->free[block / 64] &= ~(UINT64_C(1) << block % 64);
}

static struct extent scan_alloc(struct scan *scan, uint64_t want)
{
	struct extent best = { 0, 0 };
	struct extent run = { 0, 0 };
	uint64_t block = scan->cursor;

	for (uint64_t seen = 0; seen < scan->nr_blocks && best.length < want; seen++) {
		if (block == scan->nr_blocks) {
			block = 0;
			run.length = 0;
		}
		if (!scan_is_free(scan, block)) {
			run.length = 0;
		} else {
			if (!run.length++)
				run.begin = block;
			if (run.length > best.length)
				best = run;
		}
		block++;
	}
	for (uint64_t i = 0; i < best.length; i++)
		scan_mark(scan, best.begin + i, 0);
	scan->cursor = best.begin + best.length;
	return best;
}

static void take(struct tp_allocator *allocator, struct scan *scan, uint64_t begin, uint64_t length)
{
	check(!tp_allocator_take(allocator, begin, length), "cannot lay out");
	for (uint64_t i = 0; i < length; i++)
		scan_mark(scan, begin + i, 0);
}

static void lay_out(struct tp_allocator *allocator, struct scan *scan, int fragmented,
		    unsigned int percent, uint64_t seed)
{
	uint64_t at = 0;

	if (!percent)
		return;
	if (fragmented) {
		for (; at < scan->nr_blocks; at++) {
			if (next_random(&seed) % 100 < percent)
				take(allocator, scan, at, 1);
		}
		return;
	}
	while (at < scan->nr_blocks) {
		uint64_t stretch = STRETCH / 2 + next_random(&seed) % STRETCH;
		uint64_t used = stretch * percent / 100;

		if (used > scan->nr_blocks - at)
			used = scan->nr_blocks - at;
		take(allocator, scan, at, used);
		at += stretch;
	}
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a;
	double y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static double median(double *values, size_t count)
{
	qsort(values, count, sizeof(*values), by_value);
	return values[count / 2];
}

static struct result measure_singles(struct tp_allocator *allocator, struct extent *got,
				     uint64_t count)
{
	double ns[ROUNDS];

	for (int round = 0; round < ROUNDS; round++) {
		double begin = seconds();

		for (uint64_t i = 0; i < count; i++)
			check(!tp_allocator_alloc(allocator, &got[i].begin), "full");
		ns[round] = (seconds() - begin) * 1e9 / (double)count;
		for (uint64_t i = 0; i < count; i++)
			check(!tp_allocator_untake(allocator, got[i].begin, 1), "untake");
	}
	return (struct result){ median(ns, ROUNDS), 1 };
}

static struct result measure_runs(struct tp_allocator *allocator, struct extent *got,
				  uint64_t blocks, uint64_t want)
{
	double lengths = 0;
	double calls_all = 0;
	double ns[ROUNDS];

	for (int round = 0; round < ROUNDS; round++) {
		double begin = seconds();
		uint64_t calls = 0;

		for (uint64_t done = 0; done < blocks; done += got[calls++].length)
			check(!tp_allocator_alloc_run(allocator, want, &got[calls].begin,
						      &got[calls].length),
			      "full");
		ns[round] = (seconds() - begin) * 1e9 / (double)calls;
		calls_all += (double)calls;
		for (uint64_t i = 0; i < calls; i++) {
			lengths += (double)got[i].length;
			check(!tp_allocator_untake(allocator, got[i].begin, got[i].length),
			      "untake");
		}
	}
	return (struct result){ median(ns, ROUNDS), lengths / calls_all };
}

static struct result measure_scan(struct scan *scan, struct extent *got, uint64_t blocks,
				  uint64_t want)
{
	double lengths = 0;
	double calls_all = 0;
	double ns[ROUNDS];

	for (int round = 0; round < ROUNDS; round++) {
		double begin = seconds();
		double took = 0;
		uint64_t calls = 0;

		/* The clock is asked every 64 calls, or each time where a call takes long
		 * anyway. */
		for (uint64_t done = 0; done < blocks && took < SCAN_SECONDS_MAX;
		     done += got[calls++].length) {
			got[calls] = scan_alloc(scan, want);
			check(got[calls].length > 0, "full");
			if (want > 1 || calls % 64 == 63)
				took = seconds() - begin;
		}
		ns[round] = (seconds() - begin) * 1e9 / (double)calls;
		calls_all += (double)calls;
		for (uint64_t i = 0; i < calls; i++) {
			lengths += (double)got[i].length;
			for (uint64_t j = 0; j < got[i].length; j++)
				scan_mark(scan, got[i].begin + j, 1);
		}
	}
	return (struct result){ median(ns, ROUNDS), lengths / calls_all };
}

static void measure(uint64_t nr_blocks, uint64_t seed, int fragmented, unsigned int percent)
{
	static const uint64_t wants[] = { 1, 64 };
	uint64_t blocks = nr_blocks / 500;
	struct extent *got = malloc((blocks + 1) * sizeof(*got));
	struct tp_allocator *allocator = tp_allocator_create(nr_blocks);
	struct scan scan = { malloc((nr_blocks / 64 + 1) * sizeof(uint64_t)), nr_blocks, 0 };

	check(got && allocator && scan.free, "no memory");
	memset(scan.free, 0xff, (nr_blocks / 64 + 1) * sizeof(uint64_t));
	/* Touched before it is timed. */
	memset(got, 0, (blocks + 1) * sizeof(*got));
	lay_out(allocator, &scan, fragmented, percent, seed);
	for (size_t i = 0; i < sizeof(wants) / sizeof(wants[0]); i++) {
		struct result ours = wants[i] == 1 ? measure_singles(allocator, got, blocks)
						   : measure_runs(allocator, got, blocks, wants[i]);
		struct result scanned = measure_scan(&scan, got, blocks, wants[i]);

		printf("%s\t%u\t%u\t%.2f\t%.2f\t%.2f\t%.2f\n",
		       fragmented ? "fragmented" : "stretches", percent, (unsigned int)wants[i],
		       ours.ns, ours.length, scanned.ns, scanned.length);
		fflush(stdout);
	}
	tp_allocator_destroy(allocator);
	free(scan.free);
	free(got);
}

int main(int argc, char **argv)
{
	static const unsigned int percents[] = { 0, 50, 90, 95, 99 };
	uint64_t nr_blocks = argc == 3 ? strtoull(argv[1], NULL, 10) : 0;
	uint64_t seed = argc == 3 ? strtoull(argv[2], NULL, 10) : 0;

	check(nr_blocks >= 100000 && seed,
	      "usage: bench_allocator NR_BLOCKS SEED (at least 100000; not 0)");
	for (int fragmented = 1; fragmented >= 0; fragmented--) {
		for (size_t i = 0; i < sizeof(percents) / sizeof(percents[0]); i++)
			measure(nr_blocks, seed, fragmented, percents[i]);
	}
	return 0;
}
