/* SPDX-License-Identifier: Apache-2.0 */
#include "pool_private.h"
#include "thinpool/bdev.h"

#define AHEAD_MAX   (UINT64_C(32) << 20) /* bytes */
#define AHEAD_MIN   8u                   /* blocks: less is not worth a call */
#define AHEAD_AFTER 64u                  /* first writes in a row */
#define AHEAD_SHARE 4u                   /* of what was written in a row, so much is taken ahead */
#define PAUSE_MS    500u                 /* ends a row */

static uint64_t step(const struct tp_pool *pool)
{
	uint64_t max = AHEAD_MAX / pool->block_size;
	uint64_t wanted = pool->space.recent / AHEAD_SHARE;

	return wanted < max ? wanted : max;
}

bool tp_host_space_use(struct tp_pool *pool, uint64_t block, bool *extend_ret)
{
	struct tp_host_space *space = &pool->space;
	bool inside = block >= space->begin && block < space->end;
	uint64_t now = tp_now_ms();

	if (now - space->last_ms > PAUSE_MS)
		space->recent = 0;
	space->last_ms = now;
	space->recent++;
	/* The allocator goes forward, so what lies before was in use. */
	if (inside)
		space->begin = block + 1;
	*extend_ret = !space->busy && !space->unavailable && space->recent >= AHEAD_AFTER &&
		      (!inside || space->end - block <= step(pool) / 8 + 1);
	return inside;
}

/* Free blocks from `from` on that are one hole: how many of at most max. */
static uint64_t find_hole(struct tp_pool *pool, uint64_t from, uint64_t max, uint64_t *begin_ret)
{
	uint64_t length, n;

	if (tp_data_map_next_free_run(tp_md_data_map(pool->md), from, begin_ret, &length))
		return 0;
	length = length < max ? length : max;
	for (n = 0; n < length; n++)
		if (!(pool->holes[(*begin_ret + n) / 64] >> ((*begin_ret + n) % 64) & 1))
			break;
	return n;
}

/* Under md_lock. Blocks queued. */
static uint64_t queue_rest(struct tp_pool *pool)
{
	struct tp_host_space *space = &pool->space;
	uint64_t begin = space->begin, length = space->end - space->begin;

	space->begin = space->end = 0;
	/* Without memory to note it, the space stays the pool's. */
	return length && !tp_run_list_add(&pool->to_punch, begin, length) ? length : 0;
}

/* Under md_lock: what is to be taken, or false. */
static bool choose(struct tp_pool *pool, uint64_t block, uint64_t *begin_ret, uint64_t *length_ret)
{
	struct tp_host_space *space = &pool->space;
	uint64_t next, ignored;
	bool live;

	if (space->busy || space->unavailable || !pool->holes ||
	    tp_data_map_next_free_run(tp_md_data_map(pool->md), block + 1, &next, &ignored))
		return false;
	/* As long as there is some where the allocator goes, only what continues it. */
	live = next >= space->begin && next < space->end;
	*length_ret = find_hole(pool, live ? space->end : next, step(pool), begin_ret);
	if (live && *begin_ret != space->end)
		return false;
	if (*length_ret >= AHEAD_MIN)
		return true;
	space->recent = 0; /* scattered: look again after as many more */
	return false;
}

void tp_host_space_extend(struct tp_pool *pool, uint64_t block)
{
	struct tp_host_space *space = &pool->space;
	uint64_t begin, length;
	bool chosen;
	int r;

	pthread_mutex_lock(&pool->md_lock);
	chosen = choose(pool, block, &begin, &length);
	space->busy |= chosen;
	pthread_mutex_unlock(&pool->md_lock);
	if (!chosen)
		return;
	r = tp_bdev_allocate(pool->data_bdev, begin * pool->block_size, length * pool->block_size,
			     NULL);
	pthread_mutex_lock(&pool->md_lock);
	space->busy = false;
	if (r == TP_E_NOT_SUPPORTED) {
		space->unavailable = true;
	} else if (r) {
		space->recent = 0; /* a full host: not with every write */
	} else if (space->end == begin) {
		space->end = begin + length;
	} else {
		(void)queue_rest(pool);
		space->begin = begin;
		space->end = begin + length;
	}
	atomic_store(&space->held, space->begin < space->end);
	pthread_mutex_unlock(&pool->md_lock);
}

uint64_t tp_host_space_release(struct tp_pool *pool)
{
	struct tp_host_space *space = &pool->space;
	uint64_t queued;

	pthread_mutex_lock(&pool->md_lock);
	/* Whoever is at it sets held again. */
	atomic_store(&space->held, 0);
	space->recent = 0;
	queued = queue_rest(pool);
	pthread_mutex_unlock(&pool->md_lock);
	return queued;
}
