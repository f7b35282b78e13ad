/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a mapping lookup costs, in random order over a device of a million mappings: from the
 * volume's cache, through the server's non-blocking path (locks included), and in the btree.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "pool_private.h"
#include "thinpool/volume_map.h"

#define BLOCK   65536u
#define LOOKUPS 4000000u
#define ROUNDS  5

static uint32_t mappings = 1000000; /* or what the command line says */

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint64_t *shuffled(uint32_t n)
{
	uint64_t *order = malloc(n * sizeof(*order)), state = 1;

	TP_ASSERT(order);
	for (uint32_t i = 0; i < n; i++)
		order[i] = i;
	for (uint32_t i = n - 1; i; i--) {
		uint64_t k, swap = order[i];

		state = state * UINT64_C(6364136223846793005) + 1442695040888963407u;
		k = (state >> 33) % (i + 1);
		order[i] = order[k];
		order[k] = swap;
	}
	return order;
}

static void map_all(struct tp_pool *pool, struct tp_volume *volume)
{
	uint64_t data, value;

	for (uint64_t block = 0; block < mappings; block++) {
		pthread_mutex_lock(&pool->md_lock);
		TP_ASSERT(!tp_data_map_reserve(tp_md_data_map(pool->md), &data));
		TP_ASSERT(!tp_md_insert(pool->md, volume->device, block, data, &value, NULL));
		pthread_mutex_unlock(&pool->md_lock);
	}
}

int main(int argc, char **argv)
{
	struct tp_pool_options options = { .error_if_no_space = 1, .cache_bytes = 64 << 20 };
	double best[4] = { 0 }, begin, rate;
	struct tp_bdev *metadata, *data;
	struct tp_volume *volume;
	struct tp_pool *pool;
	uint64_t *order, sum = 0, value;
	struct tp_map map;

	if (argc == 2)
		mappings = (uint32_t)strtoul(argv[1], NULL, 10);
	TP_ASSERT(mappings);
	order = shuffled(mappings);
	TP_ASSERT(!tp_bdev_mem_open(16384ull * 4096, &metadata, NULL));
	TP_ASSERT(!tp_bdev_mem_open((uint64_t)mappings * BLOCK, &data, NULL));
	TP_ASSERT(!tp_pool_format(metadata, BLOCK, mappings, 0, NULL));
	TP_ASSERT(!tp_pool_open(metadata, data, &options, &pool, NULL));
	TP_ASSERT(!tp_volume_create(pool, 1, NULL));
	TP_ASSERT(!tp_volume_open(pool, 1, (uint64_t)mappings * BLOCK, 0, NULL, &volume, NULL));
	begin = now();
	map_all(pool, volume);
	printf("insert, ascending:            %6.2f M/s\n", mappings / (now() - begin) / 1e6);
	begin = now();
	TP_ASSERT(!tp_pool_commit(pool, NULL));
	printf("commit of them:               %6.1f ms\n", (now() - begin) * 1e3);
	for (uint32_t i = 0; i < mappings; i++)
		TP_ASSERT(!tp_cache_load(volume, order[i], &value, NULL));
	for (int round = 0; round < ROUNDS; round++) {
		begin = now();
		for (uint32_t i = 0; i < LOOKUPS; i++)
			sum += tp_cache_get(volume, order[i % mappings]);
		rate = LOOKUPS / (now() - begin) / 1e6;
		best[0] = rate > best[0] ? rate : best[0];
		begin = now();
		for (uint32_t i = 0; i < LOOKUPS; i++) {
			TP_ASSERT(
				!tp_volume_map(volume, order[i % mappings] * BLOCK, 4096, 1, &map));
			sum += map.extents[0].data_offset;
			tp_volume_unmap(volume, &map);
		}
		rate = LOOKUPS / (now() - begin) / 1e6;
		best[1] = rate > best[1] ? rate : best[1];
		begin = now();
		for (uint32_t i = 0; i < LOOKUPS / 4; i++) {
			TP_ASSERT(!tp_md_lookup(pool->md, volume->device, order[i % mappings],
						&value, NULL));
			sum += value;
		}
		rate = LOOKUPS / 4 / (now() - begin) / 1e6;
		best[2] = rate > best[2] ? rate : best[2];
	}
	printf("lookup from the cache:        %6.2f M/s\n", best[0]);
	printf("map and unmap a 4 KiB write:  %6.2f M/s\n", best[1]);
	printf("lookup in the btree:          %6.2f M/s\n", best[2]);
	printf("(%lx)\n", (unsigned long)sum & 0xf);
	tp_volume_close(volume);
	TP_ASSERT(!tp_pool_close(pool, NULL));
	tp_bdev_close(metadata);
	tp_bdev_close(data);
	free(order);
	return 0;
}
