/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Commits and flushes go in rounds, one at a time. Whoever asks waits for the round that has not
 * begun yet: it covers everything acknowledged before the call, and everybody who asked in the
 * meantime shares its flushes. The first who finds no round running leads the next one. A round
 * is a flush of the data device (one host flush), or a commit (three) when someone in it needs a
 * mapping made durable.
 */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <time.h>

#include "pool_private.h"

#define PUNCH_STEP_BLOCKS  256u
#define PUNCH_MERGE_BLOCKS 4096u
#define AT_REST_MS         500u /* without a change, then the space taken ahead is returned */

void tp_pool_wait_until_ready(int fd)
{
	struct pollfd ready = { .fd = fd, .events = POLLIN };

	while (fd >= 0 && poll(&ready, 1, -1) < 0 && errno == EINTR)
		;
}

static int flush_data(struct tp_pool *pool, struct tp_error *err)
{
	atomic_fetch_add(&pool->data_flushes, 1);
	return tp_bdev_flush(pool->data_bdev, err);
}

/*
 * With commit_lock: the data that a commit's mappings point at. The flag is taken before the flush
 * begins, so what is written meanwhile is the next commit's. Nobody knows what a predecessor left
 * unflushed: a pool is opened with the flag set.
 */
static int flush_changed_data(struct tp_pool *pool, struct tp_error *err)
{
	int r;

	/* What was flushed before must still be there: a commit promises it again. */
	if (!atomic_exchange(&pool->data_unflushed, 0))
		return tp_bdev_check(pool->data_bdev, err);
	r = flush_data(pool, err);
	if (r)
		atomic_store(&pool->data_unflushed, 1);
	return r;
}

/* With the new blocks written: both devices at once where the data has to be flushed. */
static int flush_both(struct tp_pool *pool, struct tp_error *err)
{
	int begun = atomic_load(&pool->data_unflushed) ? tp_md_flush_begin(pool->md) : -1;
	int r = flush_changed_data(pool, err), m;

	if (r && begun < 0)
		return r;
	atomic_fetch_add(&pool->metadata_flushes, 1);
	m = tp_md_flush_blocks(pool->md, begun, r ? NULL : err);
	return r ? r : m;
}

/*
 * After a seal, without md_lock. Data and new blocks are made durable before the superblock that
 * refers to both; between themselves they have no order.
 */
static int write_out(struct tp_pool *pool, struct tp_error *err)
{
	int r = tp_md_write_blocks(pool->md, err);

	if (!r)
		r = flush_both(pool, err);
	if (!r) {
		atomic_fetch_add(&pool->metadata_flushes, 1);
		tp_pool_wait_until_ready(pool->sealed_after_fd);
		r = tp_md_write_superblock(pool->md, err);
	}
	pool->sealed_after_fd = -1;
	return r;
}

/* Under md_lock: what the commit that has become durable changes in memory. */
static void finish(struct tp_pool *pool, uint64_t transaction)
{
	bool space;

	tp_redo_committed(pool->redo);
	tp_md_finish(pool->md,
		     pool->options.discard_mode == TP_DISCARD_PASSDOWN && pool->data_bdev->can_punch
			     ? &pool->to_punch
			     : NULL);
	atomic_store(&pool->committed, transaction);
	atomic_fetch_add(&pool->commits, 1);
	if (pool->to_punch.blocks) {
		pthread_mutex_lock(&pool->background_lock);
		pool->punch_now = true;
		pthread_cond_signal(&pool->background_cond);
		pthread_mutex_unlock(&pool->background_lock);
	}
	space = tp_data_map_nr_allocatable(tp_md_data_map(pool->md)) > 0;
	if (space && atomic_load(&pool->mode) == TP_MODE_OUT_OF_DATA_SPACE &&
	    !atomic_load(&pool->host_full))
		tp_pool_set_mode(pool, TP_MODE_RW);
	if (space)
		tp_pool_space_changed(pool);
}

static int seal(struct tp_pool *pool, uint64_t *transaction_ret, struct tp_error *err)
{
	int r;

	*transaction_ret = tp_md_transaction(pool->md);
	atomic_store(&pool->dirty, 0);
	r = tp_md_seal(pool->md, err);
	if (r)
		return tp_pool_failed(pool, r);
	tp_redo_seal(pool->redo, tp_md_sealed_superblock(pool->md));
	pool->sealed_after_fd = pool->after_fd;
	pool->after_fd = -1;
	return 0;
}

int tp_pool_commit_locked(struct tp_pool *pool, struct tp_error *err)
{
	uint64_t transaction;
	int r = tp_pool_check_writable(pool, err);

	if (r || !tp_md_changed(pool->md))
		return r;
	r = seal(pool, &transaction, err);
	if (r)
		return r;
	r = write_out(pool, err);
	if (r)
		return tp_pool_failed(pool, r);
	finish(pool, transaction);
	return 0;
}

static int commit(struct tp_pool *pool, struct tp_error *err)
{
	uint64_t transaction;
	bool changed;
	int r;

	pthread_mutex_lock(&pool->commit_lock);
	pthread_mutex_lock(&pool->md_lock);
	r = tp_pool_check_writable(pool, err);
	changed = !r && tp_md_changed(pool->md);
	if (changed)
		r = seal(pool, &transaction, err);
	else
		atomic_store(&pool->dirty, 0);
	pthread_mutex_unlock(&pool->md_lock);
	if (!r)
		r = changed ? write_out(pool, err) : flush_data(pool, err);
	pthread_mutex_lock(&pool->md_lock);
	if (r)
		r = tp_pool_failed(pool, r);
	else if (changed)
		finish(pool, transaction);
	/* It failed in memory while this was written: the superblock just written lacks the
	 * flag. */
	if (!r && changed && atomic_load(&pool->needs_check))
		(void)tp_md_write_needs_check(pool->md, true, NULL);
	pthread_mutex_unlock(&pool->md_lock);
	pthread_mutex_unlock(&pool->commit_lock);
	return r;
}

/* A flush where no mapping changed. In a pool that is read-only it is still a flush. */
static int flush_only(struct tp_pool *pool, struct tp_error *err)
{
	int r = flush_data(pool, err);

	if (r) {
		pthread_mutex_lock(&pool->commit_lock);
		pthread_mutex_lock(&pool->md_lock);
		tp_pool_failed(pool, r);
		pthread_mutex_unlock(&pool->md_lock);
		pthread_mutex_unlock(&pool->commit_lock);
	}
	return r;
}

int tp_pool_flush_round(struct tp_pool *pool, bool wants_commit, struct tp_error *err)
{
	struct flush_rounds *f = &pool->flushes;
	uint64_t mine;
	int r;

	pthread_mutex_lock(&f->lock);
	mine = f->next;
	f->wants_commit |= wants_commit;
	while (f->done < mine) {
		struct tp_error e;
		bool commits;

		if (f->running) {
			pthread_cond_wait(&f->cond, &f->lock);
			continue;
		}
		f->running = true;
		TP_ASSERT(f->next == mine);
		f->next++;
		commits = f->wants_commit;
		f->wants_commit = false;
		pthread_mutex_unlock(&f->lock);
		tp_error_clear(&e);
		r = commits ? commit(pool, &e) : flush_only(pool, &e);
		pthread_mutex_lock(&f->lock);
		f->running = false;
		f->done = mine;
		f->results[mine % FLUSH_RESULTS] = r;
		f->errors[mine % FLUSH_RESULTS] = e;
		pthread_cond_broadcast(&f->cond);
	}
	/* A waiter that slept through FLUSH_RESULTS rounds learns of a failure by the mode. */
	r = f->done - mine < FLUSH_RESULTS ? f->results[mine % FLUSH_RESULTS]
					   : tp_pool_check_writable(pool, err);
	if (r && f->done - mine < FLUSH_RESULTS && err)
		*err = f->errors[mine % FLUSH_RESULTS];
	pthread_mutex_unlock(&f->lock);
	return r;
}

int tp_pool_commit(struct tp_pool *pool, struct tp_error *err)
{
	return tp_pool_flush_round(pool, true, err);
}

/* ---- returning the host's space ----------------------------------------------------------- */

/* Under md_lock: take a run of at most max blocks that is still free. */
static bool take_run(struct tp_pool *pool, uint64_t max, struct tp_run *run_ret)
{
	struct tp_run_list *list = &pool->to_punch;
	struct tp_data_map *map = tp_md_data_map(pool->md);

	while (list->count) {
		struct tp_run *last = &list->runs[list->count - 1];
		uint64_t n = 0;

		/* From the end of the last run: what was allocated again is left out. */
		while (n < max && n < last->length &&
		       tp_data_map_is_allocatable(map, last->begin + last->length - 1 - n))
			n++;
		if (n) {
			run_ret->begin = last->begin + last->length - n;
			run_ret->length = n;
			if (tp_data_map_reserve_run(map, run_ret->begin, n))
				n = 0;
			pool->punching += n;
		}
		last->length -= n ? n : 1;
		list->blocks -= n ? n : 1;
		if (!last->length)
			list->count--;
		if (n)
			return true;
	}
	return false;
}

int tp_pool_punch_some(struct tp_pool *pool, uint64_t max_blocks, uint64_t *left_ret,
		       struct tp_error *err)
{
	struct tp_run run;
	uint64_t i, done = 0;
	bool got;
	int r = 0;

	while (!r && done < max_blocks) {
		pthread_mutex_lock(&pool->md_lock);
		got = take_run(pool,
			       PUNCH_MERGE_BLOCKS < max_blocks - done ? PUNCH_MERGE_BLOCKS
								      : max_blocks - done,
			       &run);
		pthread_mutex_unlock(&pool->md_lock);
		if (!got)
			break;
		r = tp_bdev_punch(pool->data_bdev, run.begin * pool->block_size,
				  run.length * pool->block_size, err);
		tp_pool_data_changed(pool);
		pthread_mutex_lock(&pool->md_lock);
		for (i = run.begin; !r && pool->holes && i < run.begin + run.length; i++)
			pool->holes[i / 64] |= UINT64_C(1) << (i % 64);
		tp_data_map_unreserve(tp_md_data_map(pool->md), run.begin, run.length);
		pool->punching -= run.length;
		pthread_cond_broadcast(&pool->punched_cond);
		pthread_mutex_unlock(&pool->md_lock);
		done += run.length;
		tp_pool_space_changed(pool);
	}
	pthread_mutex_lock(&pool->md_lock);
	if (left_ret)
		*left_ret = pool->to_punch.blocks;
	pthread_mutex_unlock(&pool->md_lock);
	return r;
}

/* ---- the background thread ---------------------------------------------------------------- */

/* Until something is to be done, or for AT_REST_MS: true when nothing was. background_lock. */
static bool stayed_at_rest(struct tp_pool *pool)
{
	struct timespec until = tp_deadline_in(AT_REST_MS);
	int r = 0;

	while (!r && !atomic_load(&pool->dirty) && !pool->commit_now && !pool->punch_now &&
	       !pool->stop)
		r = pthread_cond_timedwait(&pool->background_cond, &pool->background_lock, &until);
	return r != 0;
}

/* Commits at the latest commit_interval_ms after a first change, punches in small steps in between,
 * and after AT_REST_MS without a change returns the space taken ahead. At rest it sleeps without a
 * time-out. */
void *tp_pool_background(void *argument)
{
	struct tp_pool *pool = argument;
	uint64_t left = 0;
	struct timespec until;
	bool now;
	int r;

	pthread_mutex_lock(&pool->background_lock);
	while (!pool->stop) {
		if (!atomic_load(&pool->dirty) && !pool->commit_now && !pool->punch_now && !left) {
			if (!atomic_load(&pool->space.held)) {
				pthread_cond_wait(&pool->background_cond, &pool->background_lock);
			} else if (stayed_at_rest(pool)) {
				pthread_mutex_unlock(&pool->background_lock);
				left = tp_host_space_release(pool);
				pthread_mutex_lock(&pool->background_lock);
			}
			continue;
		}
		until = tp_deadline_in(pool->options.commit_interval_ms);
		r = 0;
		while (atomic_load(&pool->dirty) && !pool->commit_now && !pool->punch_now &&
		       !pool->stop && !r && !left)
			r = pthread_cond_timedwait(&pool->background_cond, &pool->background_lock,
						   &until);
		if (pool->stop)
			break;
		now = pool->commit_now;
		left |= pool->punch_now;
		pool->commit_now = pool->punch_now = false;
		pthread_mutex_unlock(&pool->background_lock);
		if (atomic_load(&pool->dirty) &&
		    (now || !left || tp_now_ms() >= pool->next_commit_ms)) {
			tp_pool_flush_round(pool, true, NULL);
			pool->next_commit_ms = tp_now_ms() + pool->options.commit_interval_ms;
		}
		/* A punch that fails is not tried again: the space stays the pool's. */
		if (tp_pool_punch_some(pool, PUNCH_STEP_BLOCKS, &left, NULL))
			left = 0;
		pthread_mutex_lock(&pool->background_lock);
		if (atomic_load(&pool->mode) == TP_MODE_RO ||
		    atomic_load(&pool->mode) == TP_MODE_FAIL) {
			atomic_store(&pool->dirty, 0);
			left = 0;
		}
	}
	pthread_mutex_unlock(&pool->background_lock);
	return NULL;
}
