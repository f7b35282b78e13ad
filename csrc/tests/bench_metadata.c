/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes metadata to measure checkers with, through the engine's own trees but without any data.
 *
 * Usage: bench_metadata FILE fragmented NR_DEVICES NR_MAPPINGS
 *        bench_metadata FILE clustered|scattered|stretches-LENGTH NR_MAPPINGS NR_CHANGED
 *
 * fragmented: devices 1 to NR_DEVICES hold NR_MAPPINGS together, made in random order of device and
 * virtual block, so that hardly any mapping continues its neighbour's.
 * The others: device 1 holds NR_MAPPINGS in order, device 2 is a snapshot of it in which sharing
 * was broken in NR_CHANGED places: in stretches of 100, one by one at random, or in stretches of
 * LENGTH.
 */
#include "pool_private.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK         65536u
#define STRETCH       100u
#define SPARE         4096u /* metadata blocks beside the mappings' */
#define LEAF_MAPPINGS 100u  /* a leaf holds at least so many */

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * UINT64_C(0x2545F4914F6CDD1D);
}

static uint32_t *shuffled(uint32_t n, uint64_t *state)
{
	uint32_t *order = malloc(n * sizeof(*order));

	TP_ASSERT(order);
	for (uint32_t i = 0; i < n; i++)
		order[i] = i;
	for (uint32_t i = n - 1; i; i--) {
		uint32_t k = (uint32_t)((next_random(state) >> 16) % (i + 1)), swap = order[i];

		order[i] = order[k];
		order[k] = swap;
	}
	return order;
}

static void insert(struct tp_pool *pool, struct tp_device *device, uint64_t block)
{
	uint64_t data, value;

	pthread_mutex_lock(&pool->md_lock);
	TP_ASSERT(!tp_data_map_reserve(tp_md_data_map(pool->md), &data));
	TP_ASSERT(!tp_md_insert(pool->md, device, block, data, &value, NULL));
	pthread_mutex_unlock(&pool->md_lock);
}

static struct tp_volume *opened(struct tp_pool *pool, uint32_t id, uint64_t nr_blocks)
{
	struct tp_volume *volume;

	TP_ASSERT(!tp_volume_open(pool, id, nr_blocks * BLOCK, 0, NULL, &volume, NULL));
	return volume;
}

static void fragmented(struct tp_pool *pool, uint32_t nr_devices, uint32_t nr_mappings)
{
	struct tp_volume **volumes = calloc(nr_devices, sizeof(*volumes));
	uint64_t state = 1;
	uint32_t *order = shuffled(nr_mappings, &state);

	TP_ASSERT(volumes);
	for (uint32_t i = 0; i < nr_devices; i++) {
		TP_ASSERT(!tp_volume_create(pool, i + 1, NULL));
		volumes[i] = opened(pool, i + 1, nr_mappings / nr_devices + 1);
	}
	for (uint32_t i = 0; i < nr_mappings; i++)
		insert(pool, volumes[order[i] % nr_devices]->device, order[i] / nr_devices);
	TP_ASSERT(!tp_pool_commit(pool, NULL));
	for (uint32_t i = 0; i < nr_devices; i++)
		tp_volume_close(volumes[i]);
	free(volumes);
	free(order);
}

static void changed(struct tp_pool *pool, uint32_t stretch, uint32_t nr_mappings,
		    uint32_t nr_changed)
{
	uint32_t nr_stretches = nr_mappings / stretch;
	struct tp_volume *volume;
	uint64_t state = 1;
	uint32_t *order;

	TP_ASSERT(!tp_volume_create(pool, 1, NULL));
	volume = opened(pool, 1, nr_mappings);
	for (uint32_t i = 0; i < nr_mappings; i++)
		insert(pool, volume->device, i);
	tp_volume_close(volume);
	TP_ASSERT(!tp_pool_commit(pool, NULL));
	TP_ASSERT(!tp_snapshot_create(pool, 2, 1, NULL));
	volume = opened(pool, 2, nr_mappings);
	order = shuffled(nr_stretches, &state);
	for (uint32_t i = 0; i < nr_changed; i++)
		insert(pool, volume->device, (uint64_t)order[i / stretch] * stretch + i % stretch);
	tp_volume_close(volume);
	TP_ASSERT(!tp_pool_commit(pool, NULL));
	free(order);
}

/* Blocks in a stretch; 0: no such kind. */
static uint32_t stretch_of(const char *kind)
{
	static const char prefix[] = "stretches-";

	if (!strcmp(kind, "clustered"))
		return STRETCH;
	if (!strcmp(kind, "scattered"))
		return 1;
	if (strncmp(kind, prefix, sizeof(prefix) - 1))
		return 0;
	return (uint32_t)strtoul(kind + sizeof(prefix) - 1, NULL, 10);
}

int main(int argc, char **argv)
{
	struct tp_pool_options options = { .error_if_no_space = 1 };
	uint32_t first = argc == 5 ? (uint32_t)strtoul(argv[3], NULL, 10) : 0;
	uint32_t second = argc == 5 ? (uint32_t)strtoul(argv[4], NULL, 10) : 0;
	uint32_t stretch = argc == 5 ? stretch_of(argv[2]) : 0;
	struct tp_bdev *metadata, *data;
	uint32_t nr_mappings;
	struct tp_pool *pool;

	if (!first || !second || (strcmp(argv[2], "fragmented") && (!stretch || stretch > first))) {
		fprintf(stderr, "usage: bench_metadata FILE fragmented NR_DEVICES NR_MAPPINGS\n"
				"       bench_metadata FILE clustered|scattered|stretches-LENGTH "
				"NR_MAPPINGS NR_CHANGED\n");
		return 2;
	}
	nr_mappings = strcmp(argv[2], "fragmented") ? first + second : second;
	TP_ASSERT(!tp_bdev_file_open(argv[1], TP_BDEV_CREATE,
				     (nr_mappings / LEAF_MAPPINGS + SPARE) * 4096ull, &metadata,
				     NULL));
	TP_ASSERT(!tp_bdev_mem_open((uint64_t)nr_mappings * BLOCK, &data, NULL));
	TP_ASSERT(!tp_pool_format(metadata, BLOCK, nr_mappings, 0, NULL));
	TP_ASSERT(!tp_pool_open(metadata, data, &options, &pool, NULL));
	if (!strcmp(argv[2], "fragmented"))
		fragmented(pool, first, second);
	else
		changed(pool, stretch, first, second);
	TP_ASSERT(!tp_pool_close(pool, NULL));
	tp_bdev_close(metadata);
	tp_bdev_close(data);
	return 0;
}
