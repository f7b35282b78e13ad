/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pool_private.h"

#define SPACE_POLL_MS 1000u /* a host's disk does not tell when it has room again */

uint64_t tp_now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

struct timespec tp_deadline_in(uint64_t ms)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	t.tv_sec += (time_t)(ms / 1000);
	t.tv_nsec += (long)(ms % 1000) * 1000000;
	if (t.tv_nsec >= 1000000000) {
		t.tv_nsec -= 1000000000;
		t.tv_sec++;
	}
	return t;
}

static void cond_init_monotonic(pthread_cond_t *cond)
{
	pthread_condattr_t attr;

	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(cond, &attr);
	pthread_condattr_destroy(&attr);
}

/* ---- events and modes --------------------------------------------------------------------- */

void tp_pool_event(struct tp_pool *pool)
{
	pthread_mutex_lock(&pool->event_lock);
	pool->event_sequence++;
	pthread_cond_broadcast(&pool->event_cond);
	pthread_mutex_unlock(&pool->event_lock);
}

int tp_pool_wait_event(struct tp_pool *pool, uint64_t *sequence, uint32_t timeout_ms)
{
	struct timespec until = tp_deadline_in(timeout_ms);
	int r = 0;

	pthread_mutex_lock(&pool->event_lock);
	while (!r && pool->event_sequence == *sequence)
		r = pthread_cond_timedwait(&pool->event_cond, &pool->event_lock, &until);
	*sequence = pool->event_sequence;
	pthread_mutex_unlock(&pool->event_lock);
	return 0;
}

void tp_pool_set_mode(struct tp_pool *pool, uint32_t mode)
{
	if (atomic_exchange(&pool->mode, mode) == mode)
		return;
	if (mode == TP_MODE_OUT_OF_DATA_SPACE) {
		atomic_store(&pool->no_space_since_ms, tp_now_ms());
	} else if (mode == TP_MODE_RW) {
		atomic_store(&pool->erroring, 0);
		atomic_store(&pool->host_full, 0);
	}
	tp_pool_event(pool);
}

int tp_pool_failed(struct tp_pool *pool, int status)
{
	if (atomic_load(&pool->mode) == TP_MODE_RO || atomic_load(&pool->mode) == TP_MODE_FAIL)
		return status;
	atomic_store(&pool->needs_check, 1);
	/* What is in memory can still be read; none of it is committed any more. */
	tp_pool_set_mode(pool, TP_MODE_RO);
	if (tp_md_write_needs_check(pool->md, true, NULL))
		tp_pool_event(pool);
	tp_pool_space_changed(pool);
	return status;
}

int tp_pool_check_writable(struct tp_pool *pool, struct tp_error *err)
{
	switch (atomic_load(&pool->mode)) {
	case TP_MODE_RW:
	case TP_MODE_OUT_OF_DATA_SPACE:
		return 0;
	case TP_MODE_RO:
		if (atomic_load(&pool->needs_check))
			return tp_fail(err, TP_E_NEEDS_CHECK,
				       "the pool is read-only until it "
				       "was checked: a flush or a metadata write failed");
		return tp_fail(err, TP_E_READ_ONLY, "the pool is read-only");
	default:
		return tp_fail(err, TP_E_POOL_FAILED, "the pool has failed");
	}
}

void tp_pool_space_changed(struct tp_pool *pool)
{
	pthread_mutex_lock(&pool->space_lock);
	pool->space_generation++;
	pthread_cond_broadcast(&pool->space_cond);
	pthread_mutex_unlock(&pool->space_lock);
}

int tp_pool_wait_for_space(struct tp_pool *pool, struct tp_error *err)
{
	uint64_t since = atomic_load(&pool->no_space_since_ms), now = tp_now_ms(), left, seen;
	uint32_t timeout = pool->options.no_space_timeout_ms;
	struct timespec until;
	int r = 0;

	if (pool->options.error_if_no_space || atomic_load(&pool->erroring) || pool->stop)
		return TP_E_DATA_SPACE;
	if (atomic_load(&pool->mode) == TP_MODE_RO || atomic_load(&pool->mode) == TP_MODE_FAIL)
		return tp_pool_check_writable(pool, err);
	if (timeout && now - since >= timeout) {
		/* As the kernel: from here on every write errors, until there is space again. */
		atomic_store(&pool->erroring, 1);
		tp_pool_event(pool);
		tp_pool_space_changed(pool);
		return TP_E_DATA_SPACE;
	}
	left = timeout ? timeout - (now - since) : SPACE_POLL_MS;
	until = tp_deadline_in(left < SPACE_POLL_MS ? left : SPACE_POLL_MS);
	pthread_mutex_lock(&pool->space_lock);
	seen = pool->space_generation;
	while (!r && pool->space_generation == seen && !pool->stop)
		r = pthread_cond_timedwait(&pool->space_cond, &pool->space_lock, &until);
	pthread_mutex_unlock(&pool->space_lock);
	return 0;
}

void tp_pool_dirtied(struct tp_pool *pool)
{
	if (tp_redo_half_full(pool->redo)) {
		pthread_mutex_lock(&pool->background_lock);
		pool->commit_now = true;
		pthread_cond_signal(&pool->background_cond);
		pthread_mutex_unlock(&pool->background_lock);
	}
	if (atomic_load_explicit(&pool->dirty, memory_order_relaxed) ||
	    atomic_exchange(&pool->dirty, 1))
		return;
	pthread_mutex_lock(&pool->background_lock);
	pthread_cond_signal(&pool->background_cond);
	pthread_mutex_unlock(&pool->background_lock);
}

/* ---- life --------------------------------------------------------------------------------- */

int tp_pool_format(struct tp_bdev *metadata, uint32_t data_block_size, uint64_t nr_data_blocks,
		   uint32_t force, struct tp_error *err)
{
	if (data_block_size % TP_SECTOR_SIZE)
		return tp_fail(err, TP_E_INVALID, "a data block of %u bytes is not whole sectors",
			       data_block_size);
	return tp_md_format(metadata, data_block_size / TP_SECTOR_SIZE, nr_data_blocks, force, err);
}

static int replay_one(struct tp_pool *pool, const struct tp_redo_record *record,
		      struct tp_error *err)
{
	struct tp_metadata *md = pool->md;
	struct tp_device *device;
	uint64_t value;
	int r;

	switch ((enum tp_redo_kind)record->kind) {
	case TP_REDO_PROVISION:
		r = tp_md_get_device(md, record->device, &device, err);
		if (r)
			return r;
		r = tp_data_map_reserve_run(tp_md_data_map(md), record->b, 1);
		if (r)
			r = tp_fail_block(err, r, record->b, 0, 0,
					  "a replayed first write wants data block %lu, which is "
					  "taken",
					  (unsigned long)record->b);
		else
			r = tp_md_insert(md, device, record->a, record->b, &value, err);
		tp_md_put_device(md, device);
		return r;
	case TP_REDO_UNMAP:
		r = tp_md_get_device(md, record->device, &device, err);
		if (r)
			return r;
		r = tp_md_remove(md, device, record->a, err);
		tp_md_put_device(md, device);
		return r;
	case TP_REDO_CREATE:
		return tp_md_create_device(md, record->device, err);
	case TP_REDO_SNAPSHOT:
		return tp_md_create_snapshot(md, record->device, (uint32_t)record->a, err);
	case TP_REDO_DELETE:
		return tp_md_delete_device(md, record->device, err);
	case TP_REDO_TRANSACTION_ID:
		return tp_md_set_transaction_id(md, tp_md_transaction_id(md), record->a, err);
	}
	return tp_fail(err, TP_E_INVALID, "the redo log has a record of kind %u", record->kind);
}

static int replay(struct tp_pool *pool, struct tp_error *err)
{
	uint64_t n = tp_redo_count(pool->redo), i;
	struct tp_redo_record record;
	int r;

	for (i = 0; i < n; i++) {
		tp_redo_get(pool->redo, i, &record);
		r = replay_one(pool, &record, err);
		if (r)
			return r;
		tp_md_trim(pool->md);
	}
	atomic_store(&pool->replayed, n);
	if (n)
		atomic_store(&pool->dirty, 1);
	return 0;
}

int tp_pool_find_holes(struct tp_pool *pool, uint64_t first_block, struct tp_error *err)
{
	uint64_t nr = tp_data_map_nr_blocks(tp_md_data_map(pool->md));
	uint64_t limit = nr * pool->block_size, at = first_block * pool->block_size;
	uint64_t begin, end, block, *holes;
	int r;

	if (!pool->data_bdev->can_punch)
		return 0;
	holes = realloc(pool->holes, (nr + 63) / 64 * 8 + 8);
	if (!holes)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for %lu data blocks",
			       (unsigned long)nr);
	pool->holes = holes;
	for (block = first_block; block < nr; block++) {
		if (block % 64 == 0)
			pool->holes[block / 64] = 0;
		pool->holes[block / 64] |= UINT64_C(1) << (block % 64);
	}
	while (at < limit) {
		r = tp_bdev_next_data(pool->data_bdev, at, &begin, &end, err);
		if (r)
			return r;
		if (begin >= limit || begin >= end)
			break;
		for (block = begin / pool->block_size; block < nr && block * pool->block_size < end;
		     block++)
			pool->holes[block / 64] &= ~(UINT64_C(1) << (block % 64));
		at = end;
	}
	return 0;
}

void tp_pool_free(struct tp_pool *pool)
{
	if (!pool)
		return;
	tp_md_close(pool->md);
	tp_redo_close(pool->redo);
	tp_block_locks_destroy(pool->locks);
	tp_copy_buffers_deinit(&pool->copy_buffers);
	tp_run_list_free(&pool->to_punch);
	free(pool->holes);
	pthread_mutex_destroy(&pool->changes_lock);
	pthread_mutex_destroy(&pool->md_lock);
	pthread_mutex_destroy(&pool->commit_lock);
	pthread_mutex_destroy(&pool->flushes.lock);
	pthread_mutex_destroy(&pool->space_lock);
	pthread_mutex_destroy(&pool->event_lock);
	pthread_mutex_destroy(&pool->background_lock);
	pthread_cond_destroy(&pool->punched_cond);
	pthread_cond_destroy(&pool->flushes.cond);
	pthread_cond_destroy(&pool->space_cond);
	pthread_cond_destroy(&pool->event_cond);
	pthread_cond_destroy(&pool->background_cond);
	free(pool);
}

static struct tp_pool *pool_alloc(void)
{
	struct tp_pool *pool = calloc(1, sizeof(*pool));

	if (!pool)
		return NULL;
	pthread_mutex_init(&pool->changes_lock, NULL);
	pthread_mutex_init(&pool->md_lock, NULL);
	pthread_mutex_init(&pool->commit_lock, NULL);
	pthread_mutex_init(&pool->flushes.lock, NULL);
	pthread_mutex_init(&pool->space_lock, NULL);
	pthread_mutex_init(&pool->event_lock, NULL);
	pthread_mutex_init(&pool->background_lock, NULL);
	pthread_cond_init(&pool->punched_cond, NULL);
	pthread_cond_init(&pool->flushes.cond, NULL);
	cond_init_monotonic(&pool->space_cond);
	cond_init_monotonic(&pool->event_cond);
	cond_init_monotonic(&pool->background_cond);
	pool->flushes.next = 1;
	tp_copy_buffers_init(&pool->copy_buffers);
	pool->after_fd = pool->sealed_after_fd = -1;
	pool->data_unflushed = 1;
	pool->locks = tp_block_locks_create();
	if (!pool->locks) {
		tp_pool_free(pool);
		return NULL;
	}
	return pool;
}

static int check_data_device(struct tp_pool *pool, struct tp_error *err)
{
	uint64_t wanted = tp_data_map_nr_blocks(tp_md_data_map(pool->md));
	uint64_t have = tp_bdev_size(pool->data_bdev) / pool->block_size;

	if (have < wanted)
		return tp_fail(err, TP_E_METADATA_TRUNCATED,
			       "the pool has %lu data blocks and its data device only %lu",
			       (unsigned long)wanted, (unsigned long)have);
	return 0;
}

int tp_pool_open(struct tp_bdev *metadata, struct tp_bdev *data,
		 const struct tp_pool_options *options, struct tp_pool **pool_ret,
		 struct tp_error *err)
{
	struct tp_pool *pool = pool_alloc();
	int r;

	if (!pool)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a pool");
	pool->metadata_bdev = metadata;
	pool->data_bdev = data;
	pool->options = *options;
	pool->io_align = tp_bdev_io_align(data) ? tp_bdev_io_align(data) : 1;
	r = tp_md_open(metadata, options->cache_bytes, &pool->md, err);
	if (!r) {
		pool->block_size = tp_md_data_block_sectors(pool->md) * TP_SECTOR_SIZE;
		tp_copy_buffers_set_size(&pool->copy_buffers, pool->block_size < COPY_BYTES
								      ? pool->block_size
								      : COPY_BYTES);
		atomic_store(&pool->needs_check, tp_md_needs_check(pool->md));
		if (options->read_only || tp_md_needs_check(pool->md) ||
		    tp_md_read_only_features(pool->md))
			atomic_store(&pool->mode, TP_MODE_RO);
		r = check_data_device(pool, err);
	}
	if (!r)
		r = tp_redo_open(options->redo_memory, options->redo_size,
				 tp_md_committed_superblock(pool->md), &pool->redo, err);
	if (!r)
		r = replay(pool, err);
	if (!r && atomic_load(&pool->mode) == TP_MODE_RW)
		r = tp_pool_find_holes(pool, 0, err);
	/* One that needs a check may be writable later. */
	if (!r && options->commit_interval_ms && !options->read_only) {
		if (pthread_create(&pool->background, NULL, tp_pool_background, pool))
			r = tp_fail(err, TP_E_NO_MEMORY, "no thread for background commits");
		else
			pool->background_runs = true;
	}
	if (r) {
		tp_pool_free(pool);
		return r;
	}
	*pool_ret = pool;
	return 0;
}

static void stop_background(struct tp_pool *pool)
{
	pthread_mutex_lock(&pool->background_lock);
	pool->stop = true;
	pthread_cond_signal(&pool->background_cond);
	pthread_mutex_unlock(&pool->background_lock);
	tp_pool_space_changed(pool);
	if (pool->background_runs)
		pthread_join(pool->background, NULL);
	pool->background_runs = false;
}

int tp_pool_close(struct tp_pool *pool, struct tp_error *err)
{
	bool busy;
	int r = 0;

	pthread_mutex_lock(&pool->md_lock);
	busy = pool->volumes != NULL;
	pthread_mutex_unlock(&pool->md_lock);
	if (busy)
		return tp_fail(err, TP_E_BUSY, "the pool has open volumes");
	stop_background(pool);
	if (!tp_pool_check_writable(pool, NULL)) {
		uint64_t ahead = tp_host_space_release(pool);

		/* What was taken ahead was queued last and goes first. Space only: the commit
		 * tells what the close is worth. */
		(void)tp_pool_punch_some(pool, ahead, NULL, NULL);
		r = tp_pool_flush_round(pool, true, err);
		if (!r)
			tp_redo_clear(pool->redo);
	} else if (tp_md_uncommitted(pool->md)) {
		/* What was acknowledged since the last commit goes: that is not a success. */
		r = tp_pool_check_writable(pool, err);
	}
	tp_pool_free(pool);
	return r;
}

void tp_pool_abandon(struct tp_pool *pool)
{
	bool open_volumes;

	if (!pool)
		return;
	stop_background(pool);
	/* Handles may be dropped in any order: the last volume takes the pool along. */
	pthread_mutex_lock(&pool->changes_lock);
	atomic_store(&pool->mode, TP_MODE_FAIL);
	pool->orphaned = true;
	open_volumes = pool->volumes != NULL;
	pthread_mutex_unlock(&pool->changes_lock);
	if (!open_volumes)
		tp_pool_free(pool);
}

/* ---- status and settings ------------------------------------------------------------------ */

void tp_pool_get_status(struct tp_pool *pool, struct tp_pool_status *status)
{
	struct tp_data_map *map;

	memset(status, 0, sizeof(*status));
	pthread_mutex_lock(&pool->md_lock);
	map = tp_md_data_map(pool->md);
	status->transaction_id = tp_md_transaction_id(pool->md);
	status->time = tp_md_time(pool->md);
	status->data_block_size = pool->block_size;
	status->data_blocks_total = tp_data_map_nr_blocks(map);
	status->data_blocks_used = tp_data_map_nr_used(map);
	status->metadata_blocks_total = tp_md_nr_blocks(pool->md);
	status->metadata_blocks_used = tp_md_nr_used(pool->md);
	status->metadata_blocks_reserve = tp_md_reserve(pool->md);
	status->held_root = tp_md_held_root(pool->md);
	status->nr_volumes = tp_md_nr_devices(pool->md);
	status->punch_backlog = pool->to_punch.blocks;
	status->dirty = tp_md_changed(pool->md);
	tp_md_trim(pool->md);
	pthread_mutex_unlock(&pool->md_lock);
	status->mode = atomic_load(&pool->mode);
	status->needs_check = atomic_load(&pool->needs_check);
	status->commits = atomic_load(&pool->commits);
	status->data_flushes = atomic_load(&pool->data_flushes);
	status->metadata_flushes = atomic_load(&pool->metadata_flushes);
	status->provisioned = atomic_load(&pool->provisioned);
	status->broke_sharing = atomic_load(&pool->broke_sharing);
	status->discarded = atomic_load(&pool->discarded);
	status->low_water_reached = atomic_load(&pool->low_water_reached);
	status->replayed = atomic_load(&pool->replayed);
}

int tp_pool_set_when_full(struct tp_pool *pool, uint32_t error_if_no_space, uint32_t timeout_ms)
{
	pool->options.error_if_no_space = error_if_no_space;
	pool->options.no_space_timeout_ms = timeout_ms;
	tp_pool_space_changed(pool);
	return 0;
}

int tp_pool_set_low_water(struct tp_pool *pool, uint64_t blocks)
{
	pool->options.low_water_blocks = blocks;
	atomic_store(&pool->low_water_reached, 0);
	return 0;
}

int tp_pool_clear_needs_check(struct tp_pool *pool, struct tp_error *err)
{
	int r = 0;

	/* The in-memory state may be ahead of the disk: only a fresh open may write again. */
	if (pool->options.read_only)
		return tp_fail(err, TP_E_READ_ONLY, "the pool is open read-only");
	if (tp_md_read_only_features(pool->md))
		return tp_fail(err, TP_E_READ_ONLY, "the pool's superblock forbids to write");
	pthread_mutex_lock(&pool->md_lock);
	if (tp_md_uncommitted(pool->md))
		r = tp_fail(err, TP_E_NEEDS_CHECK,
			    "the pool failed with changes in memory: open it "
			    "again before clearing needs-check");
	if (!r)
		r = tp_md_write_needs_check(pool->md, false, err);
	if (!r) {
		atomic_store(&pool->needs_check, 0);
		tp_pool_set_mode(pool, TP_MODE_RW);
	}
	pthread_mutex_unlock(&pool->md_lock);
	return r;
}
