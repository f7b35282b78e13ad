/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Deltas of devices that are read in several windows, against their dumps put side by side.
 *
 * A device of several hundred thousand mappings, its snapshots, and changes to these: in stretches,
 * one by one, with mappings taken away and added, so that leaves and upper nodes are split and
 * joined and the trees are of different heights. Each delta goes on in another thread than the one
 * that began it, from a file and from memory.
 */
#include "check.h"
#include "pool_private.h"

#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

#include "thinpool/abi.h"

#define BLOCK       65536u
#define NR_MAPPINGS 1500000u /* three windows of 4,096 leaves, at 169 in each */
#define NR_BLOCKS   (2u * NR_MAPPINGS)
#define MD_BLOCKS   60000u
#define RUNS        1000u

static struct tp_volume *opened(struct tp_pool *pool, uint32_t id)
{
	struct tp_volume *volume;

	CHECK_EQUAL(tp_volume_open(pool, id, (uint64_t)NR_BLOCKS * BLOCK, 0, NULL, &volume, NULL),
		    0);
	return volume;
}

static void insert(struct tp_pool *pool, struct tp_device *device, uint64_t block)
{
	uint64_t data, value;

	pthread_mutex_lock(&pool->md_lock);
	CHECK_EQUAL(tp_data_map_reserve(tp_md_data_map(pool->md), &data), 0);
	CHECK_EQUAL(tp_md_insert(pool->md, device, block, data, &value, NULL), 0);
	pthread_mutex_unlock(&pool->md_lock);
}

static void drop(struct tp_pool *pool, struct tp_device *device, uint64_t block)
{
	int rc;

	pthread_mutex_lock(&pool->md_lock);
	rc = tp_md_remove(pool->md, device, block, NULL);
	CHECK(rc == 0 || rc == TP_E_KEY_NOT_FOUND);
	pthread_mutex_unlock(&pool->md_lock);
}

static void change(struct tp_pool *pool, uint32_t id, uint64_t *seed)
{
	struct tp_volume *volume = opened(pool, id);
	uint64_t first = test_random_below(seed, NR_MAPPINGS);

	switch (id) {
	case 2: /* here and there a stretch */
		for (unsigned i = 0; i < 20; i++) {
			first = test_random_below(seed, NR_MAPPINGS);
			for (unsigned k = 0; k < 300; k++)
				insert(pool, volume->device, first + k);
		}
		break;
	case 3: /* one by one, all over */
		for (unsigned i = 0; i < 30000; i++)
			insert(pool, volume->device, test_random_below(seed, NR_MAPPINGS));
		break;
	case 4: /* a third taken away, and as much added behind */
		for (uint64_t i = 0; i < NR_MAPPINGS / 3; i++)
			drop(pool, volume->device, (first + i) % NR_MAPPINGS);
		for (uint64_t i = 0; i < NR_MAPPINGS / 3; i++)
			insert(pool, volume->device, NR_MAPPINGS + i);
		break;
	case 5: /* nearly all, so that the tree is lower */
		for (uint64_t i = 200; i < NR_MAPPINGS; i++)
			drop(pool, volume->device, i);
		break;
	default: /* 6: the same as its origin */
		break;
	}
	tp_volume_close(volume);
}

static void make(struct tp_bdev *metadata, uint64_t *seed)
{
	struct tp_pool_options options = { .error_if_no_space = 1 };
	struct tp_volume *volume;
	struct tp_bdev *data;
	struct tp_pool *pool;

	CHECK_EQUAL(tp_bdev_mem_open((uint64_t)NR_BLOCKS * BLOCK, &data, NULL), 0);
	CHECK_EQUAL(tp_pool_format(metadata, BLOCK, NR_BLOCKS, 0, NULL), 0);
	CHECK_EQUAL(tp_pool_open(metadata, data, &options, &pool, NULL), 0);
	CHECK_EQUAL(tp_volume_create(pool, 1, NULL), 0);
	volume = opened(pool, 1);
	for (uint64_t i = 0; i < NR_MAPPINGS; i++)
		insert(pool, volume->device, i);
	tp_volume_close(volume);
	CHECK_EQUAL(tp_pool_commit(pool, NULL), 0);
	for (uint32_t id = 2; id <= 6; id++) {
		CHECK_EQUAL(tp_snapshot_create(pool, id, 1, NULL), 0);
		change(pool, id, seed);
		CHECK_EQUAL(tp_pool_commit(pool, NULL), 0);
	}
	CHECK_EQUAL(tp_pool_close(pool, NULL), 0);
	tp_bdev_close(data);
}

/* The data block of every virtual block, UINT64_MAX where there is none. */
static uint64_t *dumped(struct tp_bdev *metadata, uint64_t id)
{
	uint64_t *blocks = malloc(NR_BLOCKS * sizeof(*blocks));
	struct tp_dump_run runs[64];
	struct tp_dump *dump;
	size_t count;

	CHECK(blocks != NULL);
	memset(blocks, 0xff, NR_BLOCKS * sizeof(*blocks));
	CHECK_EQUAL(tp_dump_open(metadata, 0, &dump, NULL), 0);
	CHECK_EQUAL(tp_dump_select(dump, id, NULL), 0);
	for (;;) {
		CHECK_EQUAL(tp_dump_next(dump, runs, 64, &count, NULL), 0);
		if (!count)
			break;
		for (size_t i = 0; i < count; i++)
			for (uint64_t k = 0; k < runs[i].length; k++)
				blocks[runs[i].begin + k] = runs[i].data_begin + k;
	}
	tp_dump_close(dump);
	return blocks;
}

struct going {
	struct tp_delta *delta;
	struct tp_delta_run *runs;
	size_t count;
};

static void *go_on(void *argument)
{
	struct going *going = argument;

	CHECK_EQUAL(tp_delta_next(going->delta, going->runs, RUNS, &going->count, NULL), 0);
	return NULL;
}

static bool next(struct going *going)
{
	pthread_t thread;

	CHECK_EQUAL(pthread_create(&thread, NULL, go_on, going), 0);
	CHECK_EQUAL(pthread_join(thread, NULL), 0);
	return going->count > 0;
}

static uint32_t kind_of(uint64_t left, uint64_t right)
{
	return left == right         ? TP_DELTA_SAME
	       : left == UINT64_MAX  ? TP_DELTA_RIGHT_ONLY
	       : right == UINT64_MAX ? TP_DELTA_LEFT_ONLY
				     : TP_DELTA_DIFFERENT;
}

/* Blocks [from, to) are in no run: rightly so. */
static void check_gap(const uint64_t *left, const uint64_t *right, uint64_t from, uint64_t to,
		      bool with_same)
{
	for (uint64_t block = from; block < to; block++) {
		CHECK_EQUAL(left[block], right[block]);
		CHECK(!with_same || left[block] == UINT64_MAX);
	}
}

static void compare(struct tp_bdev *metadata, uint64_t *const *blocks, unsigned left_id,
		    unsigned right_id, bool with_same)
{
	const uint64_t *left = blocks[left_id], *right = blocks[right_id];
	struct tp_delta_options options = {
		.left = left_id,
		.right = right_id,
		.with_same = with_same,
	};
	struct tp_delta_run runs[RUNS];
	struct going going = { .runs = runs };
	uint64_t at = 0;

	CHECK_EQUAL(tp_delta_open(metadata, &options, &going.delta, NULL), 0);
	while (next(&going)) {
		for (size_t i = 0; i < going.count; i++) {
			const struct tp_delta_run *run = &runs[i];

			CHECK(run->begin >= at && run->length > 0);
			check_gap(left, right, at, run->begin, with_same);
			at = run->begin + run->length;
			CHECK(at <= NR_BLOCKS);
			CHECK_EQUAL(run->left_data_begin, left[run->begin]);
			CHECK_EQUAL(run->right_data_begin, right[run->begin]);
			for (uint64_t block = run->begin; block < at; block++)
				CHECK_EQUAL(kind_of(left[block], right[block]), run->kind);
		}
	}
	check_gap(left, right, at, NR_BLOCKS, with_same);
	tp_delta_close(going.delta);
}

static void compare_all(struct tp_bdev *metadata)
{
	uint64_t *blocks[7] = { NULL };

	for (unsigned id = 1; id <= 6; id++)
		blocks[id] = dumped(metadata, id);
	for (unsigned id = 1; id <= 6; id++) {
		compare(metadata, blocks, 1, id, false);
		compare(metadata, blocks, id, 3, id == 4);
	}
	for (unsigned id = 1; id <= 6; id++)
		free(blocks[id]);
}

/* The same bytes in a file, where there is io_uring. */
static void copy(struct tp_bdev *from, struct tp_bdev *to)
{
	static uint8_t bytes[1u << 20];

	for (uint64_t at = 0; at < MD_BLOCKS * UINT64_C(4096); at += sizeof(bytes)) {
		uint64_t left = MD_BLOCKS * UINT64_C(4096) - at;
		size_t length = left < sizeof(bytes) ? (size_t)left : sizeof(bytes);

		CHECK_EQUAL(tp_bdev_read(from, at, bytes, length, NULL), 0);
		CHECK_EQUAL(tp_bdev_write(to, at, bytes, length, NULL), 0);
	}
}

int main(void)
{
	char path[] = "/tmp/thinpool-delta-XXXXXX";
	uint64_t seed = test_seed();
	struct tp_bdev *memory, *file;
	int fd = mkstemp(path);

	CHECK(fd >= 0);
	close(fd);
	unlink(path);
	CHECK_EQUAL(tp_bdev_mem_open(MD_BLOCKS * UINT64_C(4096), &memory, NULL), 0);
	make(memory, &seed);
	CHECK_EQUAL(
		tp_bdev_file_open(path, TP_BDEV_CREATE, MD_BLOCKS * UINT64_C(4096), &file, NULL),
		0);
	copy(memory, file);
	unlink(path);
	compare_all(memory);
	compare_all(file);
	tp_bdev_close(file);
	tp_bdev_close(memory);
	return 0;
}
