/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Threads write, read, zero and flush their own sectors of shared volumes while another makes and
 * deletes snapshots. Every byte is verified. Meant for the sanitizers, ThreadSanitizer included.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "thinpool/abi.h"
#include "thinpool/error.h"
#include "thinpool/volume_map.h"

#define BLOCK      65536u
#define THREADS    3
#define BLOCKS     24u
#define STEPS      3000u
#define SECTOR     512u
#define RUN_BLOCKS 12u

static struct tp_pool *pool;
static struct tp_volume *volumes[2], *runs;
static _Atomic int running = THREADS;

static uint32_t next_random(uint64_t *state)
{
	*state = *state * UINT64_C(6364136223846793005) + 1442695040888963407u;
	return (uint32_t)(*state >> 33);
}

static void pass(int r, const struct tp_error *err, const char *what)
{
	if (r) {
		fprintf(stderr, "%s: %s: %s\n", what, tp_status_name(r), err->message);
		abort();
	}
}

/* The non-blocking path, as a server uses it, when it can be had. */
static void through_map(struct tp_volume *volume, uint64_t offset, void *buffer, int write)
{
	struct tp_bdev *data = tp_volume_data_bdev(volume);
	struct tp_error err;
	struct tp_map map;

	tp_error_clear(&err);
	if (tp_volume_map(volume, offset, SECTOR, write, &map) == TP_MAP_OK) {
		TP_ASSERT(map.nr_extents == 1);
		if (map.extents[0].data_offset == TP_MAP_HOLE)
			memset(buffer, 0, SECTOR);
		else if (write)
			pass(tp_bdev_write(data, map.extents[0].data_offset, buffer, SECTOR, &err),
			     &err, "mapped write");
		else
			pass(tp_bdev_read(data, map.extents[0].data_offset, buffer, SECTOR, &err),
			     &err, "mapped read");
		tp_volume_unmap(volume, &map);
	} else if (write) {
		pass(tp_volume_write(volume, offset, buffer, SECTOR, &err), &err, "write");
	} else {
		pass(tp_volume_read(volume, offset, buffer, SECTOR, &err), &err, "read");
	}
}

/* Runs of whole blocks in a region of the thread's own: first writes, overwrites and unmapping. */
static void work_in_runs(uint32_t number, uint64_t *state, uint8_t *model, uint8_t *buffer)
{
	uint32_t block = next_random(state) % RUN_BLOCKS, i;
	uint32_t count = 1 + next_random(state) % (RUN_BLOCKS - block);
	uint64_t offset = (uint64_t)(number * RUN_BLOCKS + block) * BLOCK;
	struct tp_error err;

	tp_error_clear(&err);
	switch (next_random(state) % 3) {
	case 0:
		for (i = 0; i < count; i++) {
			model[block + i] = (uint8_t)(1 + next_random(state) % 255);
			memset(buffer + (size_t)i * BLOCK, model[block + i], BLOCK);
		}
		pass(tp_volume_write(runs, offset, buffer, (size_t)count * BLOCK, &err), &err,
		     "write a run");
		break;
	case 1:
		memset(model + block, 0, count);
		pass(tp_volume_zero(runs, offset, (uint64_t)count * BLOCK, &err), &err,
		     "zero a run");
		break;
	default:
		pass(tp_volume_read(runs, offset, buffer, (size_t)count * BLOCK, &err), &err,
		     "read a run");
		for (i = 0; i < count; i++)
			TP_ASSERT(buffer[(size_t)i * BLOCK] == model[block + i] &&
				  buffer[(size_t)(i + 1) * BLOCK - 1] == model[block + i]);
		break;
	}
}

static void *worker(void *argument)
{
	uint32_t number = (uint32_t)(uintptr_t)argument, step;
	uint8_t (*model)[BLOCKS] = calloc(2, sizeof(*model));
	uint8_t buffer[SECTOR], wanted[SECTOR], run_model[RUN_BLOCKS] = { 0 };
	uint8_t *run_buffer = malloc((size_t)RUN_BLOCKS * BLOCK);
	uint64_t state = number + 1;
	struct tp_error err;

	TP_ASSERT(model && run_buffer);
	for (step = 0; step < STEPS; step++) {
		uint32_t v = next_random(&state) % 2, block = next_random(&state) % BLOCKS;
		uint64_t offset = (uint64_t)block * BLOCK + number * SECTOR;
		uint32_t kind = next_random(&state) % 100;

		tp_error_clear(&err);
		if (step % 8 == 0)
			work_in_runs(number, &state, run_model, run_buffer);
		if (kind < 45) {
			model[v][block] = (uint8_t)(1 + next_random(&state) % 255);
			memset(buffer, model[v][block], SECTOR);
			through_map(volumes[v], offset, buffer, 1);
		} else if (kind < 55) {
			model[v][block] = 0;
			pass(tp_volume_zero(volumes[v], offset, SECTOR, &err), &err, "zero");
		} else if (kind < 57) {
			pass(tp_volume_flush(volumes[v], &err), &err, "flush");
		} else {
			through_map(volumes[v], offset, buffer, 0);
			memset(wanted, model[v][block], SECTOR);
			TP_ASSERT(!memcmp(buffer, wanted, SECTOR));
		}
	}
	free(model);
	free(run_buffer);
	atomic_fetch_sub(&running, 1);
	return NULL;
}

static void *upheaval(void *argument)
{
	struct tp_pool_status status;
	struct tp_error err;
	uint32_t id = 100;

	(void)argument;
	while (atomic_load(&running)) {
		tp_error_clear(&err);
		pass(tp_snapshot_create(pool, id, 1 + id % 3, &err), &err, "snapshot");
		if (id >= 104)
			pass(tp_volume_delete(pool, id - 4, &err), &err, "delete");
		pass(tp_pool_punch_some(pool, 64, NULL, &err), &err, "punch");
		tp_pool_get_status(pool, &status);
		TP_ASSERT(status.mode == TP_MODE_RW);
		id++;
	}
	return NULL;
}

/* INV-03: what was written through a map is flushed by the next commit, though nothing else was. */
static void check_that_a_mapped_write_is_flushed(void)
{
	struct tp_bdev *data = tp_volume_data_bdev(volumes[0]);
	struct tp_pool_status before, after;
	uint8_t buffer[SECTOR] = { 1 };
	struct tp_error err;
	struct tp_map map;

	tp_error_clear(&err);
	pass(tp_volume_write(volumes[0], 0, buffer, SECTOR, &err), &err, "write");
	pass(tp_pool_commit(pool, &err), &err, "commit");
	tp_pool_get_status(pool, &before);
	TP_ASSERT(tp_volume_map(volumes[0], 0, SECTOR, 1, &map) == TP_MAP_OK);
	pass(tp_bdev_write(data, map.extents[0].data_offset, buffer, SECTOR, &err), &err,
	     "mapped write");
	tp_volume_unmap(volumes[0], &map);
	pass(tp_volume_create(pool, 50, &err), &err, "create");
	pass(tp_pool_commit(pool, &err), &err, "commit");
	tp_pool_get_status(pool, &after);
	TP_ASSERT(after.commits > before.commits && after.data_flushes > before.data_flushes);
}

int main(void)
{
	struct tp_pool_options options = { .commit_interval_ms = 10, .error_if_no_space = 1 };
	struct tp_bdev *metadata, *data;
	pthread_t threads[THREADS + 1];
	struct tp_error err;
	uintptr_t i;

	tp_error_clear(&err);
	pass(tp_bdev_mem_open(512 * 4096, &metadata, &err), &err, "metadata");
	pass(tp_bdev_mem_open((uint64_t)600 * BLOCK, &data, &err), &err, "data");
	pass(tp_pool_format(metadata, BLOCK, 600, 0, &err), &err, "format");
	pass(tp_pool_open(metadata, data, &options, &pool, &err), &err, "open");
	for (i = 0; i < 2; i++) {
		pass(tp_volume_create(pool, (uint32_t)i + 1, &err), &err, "create");
		pass(tp_volume_open(pool, (uint32_t)i + 1, (uint64_t)BLOCKS * BLOCK, 0, NULL,
				    &volumes[i], &err),
		     &err, "open volume");
	}
	pass(tp_volume_create(pool, 3, &err), &err, "create");
	pass(tp_volume_open(pool, 3, (uint64_t)THREADS * RUN_BLOCKS * BLOCK, 0, NULL, &runs, &err),
	     &err, "open volume");
	for (i = 0; i < THREADS; i++)
		TP_ASSERT(!pthread_create(&threads[i], NULL, worker, (void *)i));
	TP_ASSERT(!pthread_create(&threads[THREADS], NULL, upheaval, NULL));
	for (i = 0; i <= THREADS; i++)
		pthread_join(threads[i], NULL);
	check_that_a_mapped_write_is_flushed();
	for (i = 0; i < 2; i++)
		tp_volume_close(volumes[i]);
	tp_volume_close(runs);
	pass(tp_pool_close(pool, &err), &err, "close");
	tp_bdev_close(metadata);
	tp_bdev_close(data);
	return 0;
}
