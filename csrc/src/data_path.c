/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The blocking data path: one block of a volume at a time, under that block's lock.
 *
 *   read         shared lock; unmapped is zeros, or what the external origin has
 *   overwrite    shared lock; mapped and not shared
 *   provision    exclusive lock; reserve, write, insert the mapping
 *   break        exclusive lock; reserve, copy and overlay, insert the mapping
 *   unmap        exclusive lock; remove the mapping
 *
 * Data is written before the mapping that refers to it exists, and flushed before that mapping is
 * committed, so no crash shows a block's former contents.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "pool_private.h"

#define IO_BUFFER_ALIGN 4096u
#define RUN_MAX         32u  /* blocks written or unmapped in one turn */
#define NEXT_DATA_TURN  512u /* blocks looked at in one turn */

struct span { /* a part of one volume block */
	uint64_t block;
	uint32_t within; /* bytes */
	uint32_t length;
};

static struct span span_at(const struct tp_pool *pool, uint64_t offset, uint64_t left)
{
	struct span s = { offset / pool->block_size, (uint32_t)(offset % pool->block_size), 0 };
	uint64_t room = pool->block_size - s.within;

	s.length = (uint32_t)(room < left ? room : left);
	return s;
}

static void *io_buffer(size_t size)
{
	void *buffer;

	return posix_memalign(&buffer, IO_BUFFER_ALIGN, size) ? NULL : buffer;
}

static int check_range(struct tp_volume *volume, uint64_t offset, uint64_t length,
		       struct tp_error *err)
{
	uint64_t size = tp_volume_size(volume);

	if (offset > size || length > size - offset)
		return tp_fail(err, TP_E_OUT_OF_RANGE,
			       "%lu bytes at %lu reach past the end of volume %u at %lu",
			       (unsigned long)length, (unsigned long)offset, volume->id,
			       (unsigned long)size);
	if (atomic_load(&volume->pool->mode) == TP_MODE_FAIL)
		return tp_fail(err, TP_E_POOL_FAILED, "the pool has failed");
	return 0;
}

/* The host's disk being full is a state of the pool, not an I/O error. */
static bool is_host_full(const struct tp_error *e)
{
	return e->status == TP_E_IO && (e->host_errno == ENOSPC || e->host_errno == EDQUOT);
}

static void copy_error(struct tp_error *to, const struct tp_error *from)
{
	if (to)
		*to = *from;
}

/* ---- reading ------------------------------------------------------------------------------ */

static int read_any(struct tp_bdev *bdev, uint32_t align, uint64_t offset, void *buffer,
		    uint32_t length, struct tp_error *err)
{
	uint64_t begin = offset - offset % align;
	uint64_t end = (offset + length + align - 1) / align * align;
	uint8_t *bounce;
	int r;

	if (begin == offset && end == offset + length)
		return tp_bdev_read(bdev, offset, buffer, length, err);
	bounce = io_buffer(end - begin);
	if (!bounce)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to read");
	r = tp_bdev_read(bdev, begin, bounce, end - begin, err);
	if (!r)
		memcpy(buffer, bounce + (offset - begin), length);
	free(bounce);
	return r;
}

/* How many of length bytes at an offset of the volume its external origin has. */
static uint32_t origin_part(const struct tp_volume *volume, uint64_t offset, uint32_t length)
{
	if (offset >= volume->origin_size)
		return 0;
	return volume->origin_size - offset < length ? (uint32_t)(volume->origin_size - offset)
						     : length;
}

/* What a volume has where nothing is mapped. */
static int read_unmapped(struct tp_volume *volume, uint64_t offset, uint8_t *buffer,
			 uint32_t length, struct tp_error *err)
{
	uint32_t part = origin_part(volume, offset, length);
	int r = part ? read_any(volume->origin, tp_bdev_io_align(volume->origin), offset, buffer,
				part, err)
		     : 0;

	if (!r)
		memset(buffer + part, 0, length - part);
	return r;
}

static int read_span(struct tp_volume *volume, struct span s, void *buffer, struct tp_error *err)
{
	struct tp_pool *pool = volume->pool;
	uint32_t lock = tp_block_lock_index(volume->id, s.block);
	uint64_t entry;
	int r;

	tp_block_lock_shared(pool->locks, lock);
	r = tp_cache_load(volume, s.block, &entry, err);
	if (!r && !tp_entry_mapped(entry))
		r = read_unmapped(volume, s.block * pool->block_size + s.within, buffer, s.length,
				  err);
	else if (!r)
		r = read_any(pool->data_bdev, pool->io_align,
			     tp_entry_block(entry) * pool->block_size + s.within, buffer, s.length,
			     err);
	tp_block_unlock_shared(pool->locks, lock);
	return r;
}

int tp_volume_read(struct tp_volume *volume, uint64_t offset, void *buffer, size_t length,
		   struct tp_error *err)
{
	uint8_t *to = buffer;
	int r = check_range(volume, offset, length, err);

	while (!r && length) {
		struct span s = span_at(volume->pool, offset, length);

		r = read_span(volume, s, to, err);
		to += s.length;
		offset += s.length;
		length -= s.length;
	}
	return r;
}

/* ---- taking a data block ------------------------------------------------------------------ */

/* A data block, or several neighbours, that nothing refers to yet. */
struct place {
	uint64_t block;
	bool zeros;  /* known to read as zeros */
	bool hole;   /* the host has no space there yet */
	bool extend; /* space for what follows should be taken */
};

/* Under md_lock: another block becomes part of a place. */
static void take_hole_bit(struct tp_pool *pool, uint64_t block, struct place *place)
{
	bool hole = pool->holes && (pool->holes[block / 64] >> (block % 64) & 1);
	bool extend;

	place->zeros &= hole;
	if (!hole)
		return;
	pool->holes[block / 64] &= ~(UINT64_C(1) << (block % 64));
	place->hole |= !tp_host_space_use(pool, block, &extend);
	place->extend |= extend;
}

enum {
	NEEDS_COMMIT = 1,
	NEEDS_PUNCH = 2 /* the last free blocks are being returned to the host: they stay free */
};

/* Under md_lock: for one more mapping, in the metadata and, with others to come, in the log. */
static int check_room(struct tp_pool *pool, uint64_t records, struct tp_error *err)
{
	int room = tp_md_has_room(pool->md, false);

	if (!room)
		return tp_fail(err, TP_E_METADATA_SPACE,
			       "the pool's metadata is full but for its reserve: %lu of %lu blocks",
			       (unsigned long)tp_md_nr_used(pool->md),
			       (unsigned long)tp_md_nr_blocks(pool->md));
	return room < 0 || !tp_redo_has_room(pool->redo, records) ? NEEDS_COMMIT : 0;
}

static int try_reserve(struct tp_pool *pool, struct place *place, struct tp_error *err)
{
	struct tp_data_map *map = tp_md_data_map(pool->md);
	int r = tp_pool_check_writable(pool, err);

	if (!r)
		r = check_room(pool, 16, err);
	if (r)
		return r;
	if (tp_data_map_reserve(map, &place->block)) {
		if (pool->punching)
			return NEEDS_PUNCH;
		return tp_data_map_nr_waiting(map) ? NEEDS_COMMIT : TP_E_DATA_SPACE;
	}
	*place = (struct place){ .block = place->block, .zeros = true };
	take_hole_bit(pool, place->block, place);
	if (tp_data_map_nr_allocatable(map) < pool->options.low_water_blocks &&
	    !atomic_exchange(&pool->low_water_reached, 1))
		tp_pool_event(pool);
	return 0;
}

/* A block that nothing refers to yet. TP_E_DATA_SPACE: the caller may wait and try again. */
static int reserve(struct tp_pool *pool, struct place *place, struct tp_error *err)
{
	int attempt, r = NEEDS_COMMIT;

	for (attempt = 0; attempt < 3 && r == NEEDS_COMMIT; attempt++) {
		pthread_mutex_lock(&pool->md_lock);
		while ((r = try_reserve(pool, place, err)) == NEEDS_PUNCH)
			pthread_cond_wait(&pool->punched_cond, &pool->md_lock);
		pthread_mutex_unlock(&pool->md_lock);
		if (r == NEEDS_COMMIT) {
			int c = tp_pool_flush_round(pool, true, err);

			if (c)
				return c;
		}
	}
	if (r == NEEDS_COMMIT || r == TP_E_DATA_SPACE) {
		if (atomic_load(&pool->mode) == TP_MODE_RW)
			tp_pool_set_mode(pool, TP_MODE_OUT_OF_DATA_SPACE);
		return tp_fail(err, TP_E_DATA_SPACE, "the pool's data space is full");
	}
	return r;
}

static void give_back(struct tp_pool *pool, uint64_t block)
{
	pthread_mutex_lock(&pool->md_lock);
	tp_data_map_unreserve(tp_md_data_map(pool->md), block, 1);
	pthread_mutex_unlock(&pool->md_lock);
}

/* Make the mapping: from here on the block is the volume's. */
static int insert(struct tp_volume *volume, uint64_t vblock, uint64_t data_block,
		  struct tp_error *err)
{
	struct tp_pool *pool = volume->pool;
	uint64_t value;
	int r;

	pthread_mutex_lock(&pool->md_lock);
	r = tp_pool_check_writable(pool, err);
	/* Again: there was room for one when the block was reserved, but others came since. */
	if (!r)
		r = check_room(pool, 1, err);
	if (r) {
		tp_data_map_unreserve(tp_md_data_map(pool->md), data_block, 1);
	} else {
		r = tp_md_insert(pool->md, volume->device, vblock, data_block, &value, err);
		if (r) {
			r = tp_pool_failed(pool, r);
		} else {
			tp_redo_append(pool->redo, TP_REDO_PROVISION, volume->id, vblock,
				       data_block);
			tp_cache_put(volume, vblock, value + CACHE_BIAS);
			atomic_store(&volume->changed_in, tp_md_transaction(pool->md));
			tp_pool_dirtied(pool);
			tp_md_trim(pool->md);
		}
	}
	pthread_mutex_unlock(&pool->md_lock);
	return r;
}

/* ---- filling a new block ------------------------------------------------------------------ */

static int write_data(struct tp_pool *pool, uint64_t offset, const void *buffer, size_t length,
		      struct tp_error *err)
{
	int r = tp_bdev_write(pool->data_bdev, offset, buffer, length, err);

	tp_pool_data_changed(pool);
	return r;
}

/* Into the new block or blocks at a place, from a byte of it on. */
static int write_new(struct tp_pool *pool, const struct place *place, uint64_t at,
		     const void *buffer, size_t length, struct tp_error *err)
{
	uint64_t offset = place->block * pool->block_size + at;
	int r;

	if (!place->hole)
		return write_data(pool, offset, buffer, length, err);
	r = tp_bdev_write_hole(pool->data_bdev, offset, buffer, length, err);
	tp_pool_data_changed(pool);
	return r;
}

/*
 * Write the whole of a new block: the caller's bytes over what the volume has there so far (in the
 * data block at source; UINT64_MAX where nothing is mapped), in pieces of bounded size.
 */
static int fill_block(struct tp_volume *volume, const struct place *to, uint64_t source,
		      struct span s, const uint8_t *data, struct tp_error *err)
{
	struct tp_pool *pool = volume->pool;
	uint32_t piece = (uint32_t)pool->copy_buffers.size, at;
	uint8_t *buffer = tp_copy_buffers_get(&pool->copy_buffers);
	int r = 0;

	if (!buffer)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to copy a block");
	for (at = 0; at < pool->block_size && !r; at += piece) {
		uint32_t n = pool->block_size - at < piece ? pool->block_size - at : piece;
		uint32_t begin = s.within > at ? s.within : at;
		uint32_t end = s.within + s.length < at + n ? s.within + s.length : at + n;
		bool covered = begin == at && end == at + n;

		if (!covered && source == UINT64_MAX)
			r = read_unmapped(volume, s.block * pool->block_size + at, buffer, n, err);
		else if (!covered)
			r = tp_bdev_read(pool->data_bdev, source + at, buffer, n, err);
		if (!r && begin < end)
			memcpy(buffer + (begin - at), data + (begin - s.within), end - begin);
		if (!r)
			r = write_new(pool, to, at, buffer, n, err);
	}
	tp_copy_buffers_put(&pool->copy_buffers, buffer);
	return r;
}

/* Only the written part, rounded out with zeros to what the device can address. */
static int fill_part(struct tp_pool *pool, const struct place *to, struct span s,
		     const uint8_t *data, struct tp_error *err)
{
	uint32_t align = pool->io_align;
	uint32_t begin = s.within / align * align;
	uint32_t end = (s.within + s.length + align - 1) / align * align;
	uint8_t *buffer;
	int r;

	if (begin == s.within && end == s.within + s.length)
		return write_new(pool, to, begin, data, s.length, err);
	buffer = io_buffer(end - begin);
	if (!buffer)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to write");
	memset(buffer, 0, end - begin);
	memcpy(buffer + (s.within - begin), data, s.length);
	r = write_new(pool, to, begin, buffer, end - begin, err);
	free(buffer);
	return r;
}

/* A new data block with the caller's bytes in it, mapped. Exclusive block lock held. */
static int provision(struct tp_volume *volume, struct span s, const uint8_t *data,
		     uint64_t old_entry, struct tp_error *err)
{
	struct tp_pool *pool = volume->pool;
	bool whole = s.length == pool->block_size, copies = tp_entry_mapped(old_entry);
	struct place to;
	int r = reserve(pool, &to, err);

	if (r)
		return r;
	if (to.extend)
		tp_host_space_extend(pool, to.block);
	if (whole)
		r = write_new(pool, &to, 0, data, s.length, err);
	else if (copies)
		r = fill_block(volume, &to, tp_entry_block(old_entry) * pool->block_size, s, data,
			       err);
	else if ((to.zeros || pool->options.skip_block_zeroing) &&
		 !origin_part(volume, s.block * pool->block_size, pool->block_size))
		r = fill_part(pool, &to, s, data, err);
	else
		r = fill_block(volume, &to, UINT64_MAX, s, data, err);
	if (r) {
		give_back(pool, to.block);
		return r;
	}
	r = insert(volume, s.block, to.block, err);
	if (!r)
		atomic_fetch_add(copies ? &pool->broke_sharing : &pool->provisioned, 1);
	return r;
}

/* ---- writing ------------------------------------------------------------------------------ */

/* Over a mapped block that is not shared, at any alignment. Exclusive block lock held. */
static int overwrite_unaligned(struct tp_pool *pool, uint64_t base, struct span s,
			       const uint8_t *data, struct tp_error *err)
{
	uint32_t align = pool->io_align;
	uint32_t begin = s.within / align * align;
	uint32_t end = (s.within + s.length + align - 1) / align * align;
	uint8_t *buffer = io_buffer(end - begin);
	int r;

	if (!buffer)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to write");
	r = tp_bdev_read(pool->data_bdev, base + begin, buffer, end - begin, err);
	if (!r) {
		memcpy(buffer + (s.within - begin), data, s.length);
		r = write_data(pool, base + begin, buffer, end - begin, err);
	}
	free(buffer);
	return r;
}

static bool is_aligned(const struct tp_pool *pool, struct span s)
{
	return !((s.within | s.length) % pool->io_align);
}

/* One attempt; the gate is entered. *took_ret: it took a new data block. */
static int write_span_once(struct tp_volume *volume, struct span s, const uint8_t *data,
			   bool *took_ret, struct tp_error *err)
{
	struct tp_pool *pool = volume->pool;
	uint32_t lock = tp_block_lock_index(volume->id, s.block);
	uint64_t entry, base;
	bool in_place;
	int r;

	tp_block_lock_shared(pool->locks, lock);
	r = tp_cache_load(volume, s.block, &entry, err);
	in_place = !r && tp_entry_mapped(entry) && !tp_entry_shared(volume, entry);
	if (in_place && is_aligned(pool, s))
		r = write_data(pool, tp_entry_block(entry) * pool->block_size + s.within, data,
			       s.length, err);
	tp_block_unlock_shared(pool->locks, lock);
	if (r || (in_place && is_aligned(pool, s)))
		return r;

	tp_block_lock_exclusive(pool->locks, lock);
	/* Another may have been here in between. */
	r = tp_cache_load(volume, s.block, &entry, err);
	if (!r && tp_entry_mapped(entry) && !tp_entry_shared(volume, entry)) {
		base = tp_entry_block(entry) * pool->block_size;
		if (is_aligned(pool, s))
			r = write_data(pool, base + s.within, data, s.length, err);
		else
			r = overwrite_unaligned(pool, base, s, data, err);
	} else if (!r) {
		r = provision(volume, s, data, entry, err);
		*took_ret = !r;
	}
	tp_block_unlock_exclusive(pool->locks, lock);
	return r;
}

static int write_span(struct tp_volume *volume, struct span s, const uint8_t *data,
		      struct tp_error *err)
{
	struct tp_pool *pool = volume->pool;
	struct tp_error e;
	uint32_t slot;
	bool took, was_full = false;
	int r;

	for (;;) {
		tp_error_clear(&e);
		took = false;
		slot = tp_gate_enter(volume);
		r = write_span_once(volume, s, data, &took, &e);
		tp_gate_leave(volume, slot);
		if (r == NEEDS_COMMIT) {
			r = tp_pool_flush_round(pool, true, &e);
			if (!r)
				continue;
		}
		if (r == TP_E_IO && is_host_full(&e)) {
			atomic_store(&pool->host_full, 1);
			if (atomic_load(&pool->mode) == TP_MODE_RW)
				tp_pool_set_mode(pool, TP_MODE_OUT_OF_DATA_SPACE);
			r = tp_fail(&e, TP_E_DATA_SPACE,
				    "the filesystem that holds the pool's "
				    "data is full");
			was_full = true;
		} else if (!r && (took || was_full) &&
			   atomic_load_explicit(&pool->host_full, memory_order_relaxed)) {
			/* Any other write in place says nothing of the host's space. */
			atomic_store(&pool->host_full, 0);
			if (atomic_load(&pool->mode) == TP_MODE_OUT_OF_DATA_SPACE)
				tp_pool_set_mode(pool, TP_MODE_RW);
			tp_pool_space_changed(pool);
		}
		/* Nothing is held while waiting: snapshots and deletes go on. */
		if (r == TP_E_DATA_SPACE)
			r = tp_pool_wait_for_space(pool, &e);
		else if (!r)
			return 0;
		if (!r)
			continue;
		copy_error(err, &e);
		return r;
	}
}

/* ---- several new blocks at once ----------------------------------------------------------- */

/* A run of blocks of one volume that this thread has locked exclusively. */
struct locked_run {
	uint64_t first;
	uint32_t count;
	uint32_t locks[RUN_MAX];
};

/* Only trying, after the first: whoever holds a block lock never waits for another. */
static bool lock_next(struct tp_volume *volume, struct locked_run *run)
{
	uint32_t lock = tp_block_lock_index(volume->id, run->first + run->count);

	if (!run->count)
		tp_block_lock_exclusive(volume->pool->locks, lock);
	else if (!tp_block_lock_try_exclusive(volume->pool->locks, lock))
		return false;
	run->locks[run->count++] = lock;
	return true;
}

static void unlock_last(struct tp_volume *volume, struct locked_run *run)
{
	tp_block_unlock_exclusive(volume->pool->locks, run->locks[--run->count]);
}

static bool wants_new_block(struct tp_volume *volume, uint64_t block)
{
	uint64_t entry;

	return !tp_cache_load(volume, block, &entry, NULL) &&
	       (!tp_entry_mapped(entry) || tp_entry_shared(volume, entry));
}

/* As many of the run's blocks as there are free neighbours. */
static bool reserve_neighbours(struct tp_pool *pool, uint32_t want, struct tp_run *got_ret,
			       struct place *place_ret)
{
	struct tp_data_map *map = tp_md_data_map(pool->md);
	bool got;
	uint64_t i;

	pthread_mutex_lock(&pool->md_lock);
	got = !tp_pool_check_writable(pool, NULL) && tp_md_has_room(pool->md, false) == 1 &&
	      tp_redo_has_room(pool->redo, 2 * RUN_MAX) &&
	      tp_data_map_nr_allocatable(map) > pool->options.low_water_blocks + want &&
	      !tp_data_map_reserve_some(map, want, &got_ret->begin, &got_ret->length);
	*place_ret = (struct place){ .block = got_ret->begin, .zeros = true };
	for (i = 0; got && i < got_ret->length; i++)
		take_hole_bit(pool, got_ret->begin + i, place_ret);
	pthread_mutex_unlock(&pool->md_lock);
	return got;
}

/* Map the run's blocks to the reserved ones; those that could not be are given back. */
static uint32_t insert_run(struct tp_volume *volume, const struct locked_run *run,
			   struct tp_run blocks)
{
	struct tp_pool *pool = volume->pool;
	uint64_t value, old;
	uint32_t i;
	int r = 0;

	pthread_mutex_lock(&pool->md_lock);
	for (i = 0; i < blocks.length && !r; i++) {
		if (tp_pool_check_writable(pool, NULL) || !tp_redo_has_room(pool->redo, 1) ||
		    tp_md_has_room(pool->md, false) != 1)
			break;
		old = tp_cache_get(volume, run->first + i);
		r = tp_md_insert(pool->md, volume->device, run->first + i, blocks.begin + i, &value,
				 NULL);
		if (r) {
			tp_pool_failed(pool, r);
			break;
		}
		tp_redo_append(pool->redo, TP_REDO_PROVISION, volume->id, run->first + i,
			       blocks.begin + i);
		tp_cache_put(volume, run->first + i, value + CACHE_BIAS);
		atomic_fetch_add(tp_entry_mapped(old) ? &pool->broke_sharing : &pool->provisioned,
				 1);
	}
	if (i) {
		atomic_store(&volume->changed_in, tp_md_transaction(pool->md));
		tp_pool_dirtied(pool);
	}
	/* After a failed insert its block may be half accounted for; nothing is allocated any
	 * more. */
	if (!r && i < blocks.length)
		tp_data_map_unreserve(tp_md_data_map(pool->md), blocks.begin + i,
				      blocks.length - i);
	tp_md_trim(pool->md);
	pthread_mutex_unlock(&pool->md_lock);
	return i;
}

/*
 * The beginning of a write of whole blocks that all need a new one, in one write to the device and
 * one turn at the metadata. How many blocks were done; 0 leaves it to the one-block path, which
 * knows what to do about every obstacle.
 */
static uint32_t write_new_blocks(struct tp_volume *volume, uint64_t first, uint64_t max,
				 const uint8_t *data)
{
	struct tp_pool *pool = volume->pool;
	struct locked_run run = { .first = first };
	struct tp_run blocks = { 0 };
	struct place place;
	uint32_t slot = tp_gate_enter(volume), done = 0;

	while (run.count < RUN_MAX && run.count < max && lock_next(volume, &run)) {
		if (!wants_new_block(volume, first + run.count - 1)) {
			unlock_last(volume, &run);
			break;
		}
	}
	if (run.count > 1 && reserve_neighbours(pool, run.count, &blocks, &place)) {
		if (place.extend)
			tp_host_space_extend(pool, blocks.begin + blocks.length - 1);
		if (!write_new(pool, &place, 0, data, blocks.length * pool->block_size, NULL)) {
			done = insert_run(volume, &run, blocks);
		} else {
			pthread_mutex_lock(&pool->md_lock);
			tp_data_map_unreserve(tp_md_data_map(pool->md), blocks.begin,
					      blocks.length);
			pthread_mutex_unlock(&pool->md_lock);
		}
	}
	while (run.count)
		unlock_last(volume, &run);
	tp_gate_leave(volume, slot);
	return done;
}

int tp_volume_write(struct tp_volume *volume, uint64_t offset, const void *buffer, size_t length,
		    struct tp_error *err)
{
	const uint8_t *from = buffer;
	int r = check_range(volume, offset, length, err);

	if (!r && volume->read_only)
		return tp_fail(err, TP_E_READ_ONLY, "volume %u is open read-only", volume->id);
	while (!r && length) {
		uint64_t size = volume->pool->block_size;
		struct span s = span_at(volume->pool, offset, length);
		uint64_t done = 0;

		/* The one-block path finds out that the host has space again. */
		if (!s.within && length >= 2 * size && !atomic_load(&volume->pool->host_full))
			done = write_new_blocks(volume, s.block, length / size, from) * size;
		if (!done) {
			r = write_span(volume, s, from, err);
			done = s.length;
		}
		from += done;
		offset += done;
		length -= done;
	}
	return r;
}

/* ---- discard and zero --------------------------------------------------------------------- */

/* Under md_lock and the block's lock. TP_E_KEY_NOT_FOUND: it is not mapped. */
static int remove_mapping(struct tp_volume *volume, uint64_t block, struct tp_error *err)
{
	struct tp_pool *pool = volume->pool;
	int room, r = tp_pool_check_writable(pool, err);

	if (r)
		return r;
	/* Unmapping frees space: it may use the reserve. */
	room = tp_md_has_room(pool->md, true);
	if (!room)
		return tp_fail(err, TP_E_METADATA_SPACE, "the metadata's reserve is used up");
	if (room < 0 || !tp_redo_has_room(pool->redo, 1))
		return NEEDS_COMMIT;
	r = tp_md_remove(pool->md, volume->device, block, err);
	if (r)
		return r == TP_E_KEY_NOT_FOUND ? r : tp_pool_failed(pool, r);
	tp_redo_append(pool->redo, TP_REDO_UNMAP, volume->id, block, 0);
	tp_cache_put(volume, block, CACHE_UNMAPPED);
	atomic_store(&volume->changed_in, tp_md_transaction(pool->md));
	atomic_fetch_add(&pool->discarded, 1);
	tp_pool_dirtied(pool);
	return 0;
}

/*
 * Unmap *at, whose lock is waited for, and the mapped blocks behind it as long as their locks are
 * free, in one turn at the metadata. *at becomes the first block that was not looked at.
 */
static int unmap_some(struct tp_volume *volume, uint64_t *at, uint64_t end, struct tp_error *err)
{
	struct tp_pool *pool = volume->pool;
	uint32_t slot = tp_gate_enter(volume), locks[RUN_MAX], n = 0;
	uint64_t value;
	int r;

	locks[n++] = tp_block_lock_index(volume->id, *at);
	tp_block_lock_exclusive(pool->locks, locks[0]);
	pthread_mutex_lock(&pool->md_lock);
	for (;;) {
		r = remove_mapping(volume, *at, err);
		if (r && r != TP_E_KEY_NOT_FOUND)
			break;
		(*at)++;
		r = tp_md_next_mapping(pool->md, volume->device, *at, at, &value, err);
		if (r == TP_E_KEY_NOT_FOUND)
			*at = end;
		if (r || *at >= end || n == RUN_MAX)
			break;
		locks[n] = tp_block_lock_index(volume->id, *at);
		if (!tp_block_lock_try_exclusive(pool->locks, locks[n]))
			break;
		n++;
	}
	tp_md_trim(pool->md);
	pthread_mutex_unlock(&pool->md_lock);
	while (n)
		tp_block_unlock_exclusive(pool->locks, locks[--n]);
	tp_gate_leave(volume, slot);
	return r == TP_E_KEY_NOT_FOUND ? 0 : r;
}

/* Unmap every mapped block of [begin, end). */
static int unmap_range(struct tp_volume *volume, uint64_t begin, uint64_t end, struct tp_error *err)
{
	struct tp_pool *pool = volume->pool;
	uint32_t commits_in_vain = 0;
	uint64_t value, before;
	int r = 0;

	if (begin >= end)
		return 0;
	pthread_mutex_lock(&pool->md_lock);
	r = tp_md_next_mapping(pool->md, volume->device, begin, &begin, &value, err);
	tp_md_trim(pool->md);
	pthread_mutex_unlock(&pool->md_lock);
	while (!r && begin < end) {
		before = begin;
		r = unmap_some(volume, &begin, end, err);
		if (r != NEEDS_COMMIT)
			continue;
		commits_in_vain = begin == before ? commits_in_vain + 1 : 0;
		if (commits_in_vain > 2)
			return tp_fail(err, TP_E_METADATA_SPACE,
				       "no metadata space to unmap a block");
		r = tp_pool_flush_round(pool, true, err);
	}
	return r == TP_E_KEY_NOT_FOUND ? 0 : r;
}

static int check_change(struct tp_volume *volume, uint64_t offset, uint64_t length,
			struct tp_error *err)
{
	int r = check_range(volume, offset, length, err);

	if (!r && volume->read_only)
		r = tp_fail(err, TP_E_READ_ONLY, "volume %u is open read-only", volume->id);
	return r;
}

int tp_volume_discard(struct tp_volume *volume, uint64_t offset, uint64_t length,
		      struct tp_error *err)
{
	uint32_t size = volume->pool->block_size;
	uint64_t begin = (offset + size - 1) / size, end;
	int r = check_change(volume, offset, length, err);

	if (r || volume->pool->options.discard_mode == TP_DISCARD_IGNORE)
		return r;
	if (atomic_load(&volume->pool->mode) == TP_MODE_RO)
		return 0; /* as the kernel: succeeds without effect */
	end = (offset + length) / size;
	/* The last block of a volume may be partial: it is whole when the range reaches its end. */
	if (offset + length == tp_volume_size(volume))
		end = (offset + length + size - 1) / size;
	return unmap_range(volume, begin, end, err);
}

/* Zeros over a part of a block; nothing to do where it reads as zeros for want of a mapping. */
static int zero_span(struct tp_volume *volume, struct span s, struct tp_error *err)
{
	uint64_t entry;
	void *zeros;
	int r = tp_cache_load(volume, s.block, &entry, err);

	/* A first write that comes in between puts its zeros or its data: both are an order. */
	if (r || (!tp_entry_mapped(entry) &&
		  !origin_part(volume, s.block * volume->pool->block_size + s.within, s.length)))
		return r;
	zeros = calloc(1, s.length);
	if (!zeros)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to zero");
	r = write_span(volume, s, zeros, err);
	free(zeros);
	return r;
}

/* Up to where zeros have to be written, since without a mapping the external origin shows. */
static uint64_t end_of_origin(const struct tp_volume *volume)
{
	uint64_t size = volume->pool->block_size;

	return (volume->origin_size + size - 1) / size * size;
}

int tp_volume_zero(struct tp_volume *volume, uint64_t offset, uint64_t length, struct tp_error *err)
{
	struct tp_pool *pool = volume->pool;
	uint64_t end = offset + length, size;
	int r = check_change(volume, offset, length, err);

	size = tp_volume_size(volume);
	while (!r && offset < end) {
		struct span s = span_at(pool, offset, end - offset);
		bool to_end = offset + s.length == size;

		if (!s.within && (s.length == pool->block_size || to_end) &&
		    offset >= end_of_origin(volume)) {
			uint64_t last = end == size
						? (end + pool->block_size - 1) / pool->block_size
						: end / pool->block_size;

			r = unmap_range(volume, s.block, last, err);
			offset = last * pool->block_size < end ? last * pool->block_size : end;
		} else {
			s.length = s.length < COPY_BYTES ? s.length : COPY_BYTES;
			r = zero_span(volume, s, err);
			offset += s.length;
		}
	}
	return r;
}

/* ---- the rest ----------------------------------------------------------------------------- */

int tp_volume_flush(struct tp_volume *volume, struct tp_error *err)
{
	struct tp_pool *pool = volume->pool;

	return tp_pool_flush_round(
		pool, atomic_load(&volume->changed_in) > atomic_load(&pool->committed), err);
}

int tp_volume_next_data(struct tp_volume *volume, uint64_t offset, uint64_t *begin_ret,
			uint64_t *end_ret, struct tp_error *err)
{
	struct tp_pool *pool = volume->pool;
	uint64_t size = tp_volume_size(volume), block, value, next;
	int r;

	if (offset >= size)
		return TP_E_KEY_NOT_FOUND;
	if (offset < volume->origin_size) {
		*begin_ret = offset;
		*end_ret = volume->origin_size < size ? volume->origin_size : size;
		return 0;
	}
	pthread_mutex_lock(&pool->md_lock);
	r = tp_md_next_mapping(pool->md, volume->device, offset / pool->block_size, &block, &value,
			       err);
	if (!r && block * pool->block_size >= size)
		r = TP_E_KEY_NOT_FOUND;
	if (!r) {
		*begin_ret = block * pool->block_size > offset ? block * pool->block_size : offset;
		next = block;
		while (!r && next == block && block * pool->block_size < size) {
			block++;
			/* A stretch may be long, and others want their turn. */
			if (block % NEXT_DATA_TURN == 0) {
				tp_md_trim(pool->md);
				pthread_mutex_unlock(&pool->md_lock);
				pthread_mutex_lock(&pool->md_lock);
			}
			r = tp_md_next_mapping(pool->md, volume->device, block, &next, &value, err);
		}
		*end_ret = block * pool->block_size < size ? block * pool->block_size : size;
		r = r == TP_E_KEY_NOT_FOUND ? 0 : r;
	}
	tp_md_trim(pool->md);
	pthread_mutex_unlock(&pool->md_lock);
	return r;
}

int tp_volume_lookup(struct tp_volume *volume, uint64_t block, uint64_t *data_block_ret,
		     uint32_t *shared_ret, struct tp_error *err)
{
	uint64_t entry;
	int r;

	if (block >=
	    (tp_volume_size(volume) + volume->pool->block_size - 1) / volume->pool->block_size)
		return tp_fail(err, TP_E_OUT_OF_RANGE, "volume %u has no block %lu", volume->id,
			       (unsigned long)block);
	r = tp_cache_load(volume, block, &entry, err);
	if (r)
		return r;
	if (!tp_entry_mapped(entry))
		return TP_E_KEY_NOT_FOUND;
	*data_block_ret = tp_entry_block(entry);
	*shared_ret = tp_entry_shared(volume, entry);
	return 0;
}
