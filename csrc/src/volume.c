/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An open volume: its mapping cache, which the data path reads without a lock, and its gate, which
 * a snapshot closes to drain writes.
 *
 * The cache is a table of chunks of 512 mappings, 8 bytes a mapping that was ever looked at. Every
 * change of a mapping stores into it under md_lock, so what it knows is always right.
 */
#include <linux/futex.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "pool_private.h"
#include "thinpool/volume_map.h"

/* ---- gate --------------------------------------------------------------------------------- */

static uint32_t my_slot(void)
{
	return (uint32_t)((uintptr_t)pthread_self() >> 12) % GATE_SLOTS;
}

bool tp_gate_try_enter(struct tp_volume *volume, uint32_t *slot_ret)
{
	uint32_t slot = my_slot();

	/* Sequentially consistent with tp_gate_close: one of the two sees the other. */
	atomic_fetch_add(&volume->gate[slot].inside, 1);
	if (atomic_load(&volume->gate_closed)) {
		atomic_fetch_sub(&volume->gate[slot].inside, 1);
		return false;
	}
	*slot_ret = slot;
	return true;
}

uint32_t tp_gate_enter(struct tp_volume *volume)
{
	uint32_t slot;

	while (!tp_gate_try_enter(volume, &slot))
		syscall(SYS_futex, &volume->gate_closed, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
	return slot;
}

void tp_gate_leave(struct tp_volume *volume, uint32_t slot)
{
	uint32_t inside = atomic_fetch_sub(&volume->gate[slot].inside, 1);

	TP_ASSERT(inside);
}

void tp_gate_close(struct tp_volume *volume)
{
	const struct timespec pause = { .tv_nsec = 50000 };
	uint32_t open = 0, i, spins = 0;

	while (!atomic_compare_exchange_strong(&volume->gate_closed, &open, 1)) {
		open = 0;
		nanosleep(&pause, NULL);
	}
	for (i = 0; i < GATE_SLOTS; i++)
		while (atomic_load(&volume->gate[i].inside)) {
			if (spins++ < 100)
				sched_yield();
			else
				nanosleep(&pause, NULL);
		}
}

void tp_gate_open(struct tp_volume *volume)
{
	atomic_store(&volume->gate_closed, 0);
	syscall(SYS_futex, &volume->gate_closed, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

/* ---- mapping cache ------------------------------------------------------------------------ */

static struct chunk_table *new_table(uint64_t size, uint32_t block_size)
{
	uint64_t blocks = (size + block_size - 1) / block_size;
	uint64_t chunks = (blocks + CHUNK_ENTRIES - 1) / CHUNK_ENTRIES;
	struct chunk_table *table = calloc(1, sizeof(*table) + chunks * sizeof(table->chunks[0]));

	if (table)
		table->nr_chunks = chunks;
	return table;
}

static struct chunk *find_chunk(struct tp_volume *volume, uint64_t block)
{
	struct chunk_table *table = atomic_load_explicit(&volume->table, memory_order_acquire);

	if (block / CHUNK_ENTRIES >= table->nr_chunks)
		return NULL;
	return atomic_load_explicit(&table->chunks[block / CHUNK_ENTRIES], memory_order_acquire);
}

uint64_t tp_cache_get(struct tp_volume *volume, uint64_t block)
{
	struct chunk *chunk = find_chunk(volume, block);

	return chunk ? atomic_load_explicit(&chunk->entries[block % CHUNK_ENTRIES],
					    memory_order_acquire)
		     : CACHE_UNKNOWN;
}

/* Under md_lock: the chunk, made if needed; NULL without memory or past the end. */
static struct chunk *make_chunk(struct tp_volume *volume, uint64_t block)
{
	struct chunk_table *table = atomic_load(&volume->table);
	uint64_t at = block / CHUNK_ENTRIES;
	struct chunk *chunk;

	if (at >= table->nr_chunks)
		return NULL;
	chunk = atomic_load(&table->chunks[at]);
	if (!chunk) {
		chunk = calloc(1, sizeof(*chunk));
		if (chunk) {
			atomic_store_explicit(&table->chunks[at], chunk, memory_order_release);
			if (at >= table->nr_used)
				table->nr_used = at + 1;
		}
	}
	return chunk;
}

void tp_cache_put(struct tp_volume *volume, uint64_t block, uint64_t entry)
{
	struct chunk *chunk = find_chunk(volume, block);

	/* Without a chunk nobody has asked yet, and the tree has the answer. */
	if (chunk)
		atomic_store_explicit(&chunk->entries[block % CHUNK_ENTRIES], entry,
				      memory_order_release);
}

/* The part of a leaf that lies in block's chunk goes into the cache, gaps included. */
static int fill(struct tp_volume *volume, uint64_t block, uint64_t *entry_ret, struct tp_error *err)
{
	uint64_t begin = block - block % CHUNK_ENTRIES, end = begin + CHUNK_ENTRIES - 1;
	uint64_t low, high, key, value, nr_data;
	const struct tp_disk_node *leaf;
	struct chunk *chunk;
	uint32_t n, i;
	int r = tp_md_leaf(volume->pool->md, volume->device, block, &leaf, &low, &high, err);

	if (r)
		return r;
	nr_data = tp_data_map_nr_blocks(tp_md_data_map(volume->pool->md));
	chunk = make_chunk(volume, block);
	begin = low > begin ? low : begin;
	end = high < end ? high : end;
	*entry_ret = CACHE_UNMAPPED;
	i = (uint32_t)(tp_node_find(leaf, begin) + 1);
	if (i && tp_le64_get(leaf->keys[i - 1]) == begin)
		i--;
	n = tp_le32_get(leaf->header.nr_entries);
	for (key = begin; key <= end; key++) {
		uint64_t entry = CACHE_UNMAPPED;

		if (i < n && tp_le64_get(leaf->keys[i]) == key) {
			struct tp_le64 packed;

			memcpy(&packed, tp_node_value(leaf, i++), sizeof(packed));
			value = tp_le64_get(packed);
			if (tp_mapping_block(value) >= nr_data) {
				if (key != block)
					continue;
				return tp_fail_block(err, TP_E_MAPPING_OUT_OF_RANGE,
						     tp_le64_get(leaf->header.blocknr),
						     tp_mapping_block(value), nr_data,
						     "device %u maps block %lu to data block %lu, "
						     "past the end",
						     volume->id, (unsigned long)key,
						     (unsigned long)tp_mapping_block(value));
			}
			entry = value + CACHE_BIAS;
		}
		if (key == block)
			*entry_ret = entry;
		if (chunk)
			atomic_store_explicit(&chunk->entries[key % CHUNK_ENTRIES], entry,
					      memory_order_release);
	}
	return 0;
}

int tp_cache_load(struct tp_volume *volume, uint64_t block, uint64_t *entry_ret,
		  struct tp_error *err)
{
	int r = 0;

	*entry_ret = tp_cache_get(volume, block);
	if (*entry_ret != CACHE_UNKNOWN)
		return 0;
	pthread_mutex_lock(&volume->pool->md_lock);
	*entry_ret = tp_cache_get(volume, block);
	if (*entry_ret == CACHE_UNKNOWN) {
		r = fill(volume, block, entry_ret, err);
		tp_md_trim(volume->pool->md);
	}
	pthread_mutex_unlock(&volume->pool->md_lock);
	return r;
}

/* ---- life --------------------------------------------------------------------------------- */

struct tp_volume *tp_find_volume(struct tp_pool *pool, uint32_t id)
{
	struct tp_volume *volume = pool->volumes;

	while (volume && volume->id != id)
		volume = volume->next;
	return volume;
}

static int check_size(uint64_t size, struct tp_error *err)
{
	if (!size || size % TP_SECTOR_SIZE || size > UINT64_C(1) << 62)
		return tp_fail(err, TP_E_INVALID,
			       "a volume's size is a multiple of %u bytes, "
			       "not %lu",
			       TP_SECTOR_SIZE, (unsigned long)size);
	return 0;
}

static void volume_free(struct tp_volume *volume)
{
	struct chunk_table *table = atomic_load(&volume->table), *older;
	uint64_t i;

	/* Not all of it: that of a volume whose size is not known yet is huge and untouched. */
	for (i = 0; table && i < table->nr_used; i++)
		free(atomic_load(&table->chunks[i]));
	for (; table; table = older) {
		older = table->older;
		free(table);
	}
	free(volume);
}

int tp_volume_open(struct tp_pool *pool, uint32_t id, uint64_t size, uint32_t read_only,
		   struct tp_bdev *origin, struct tp_volume **volume_ret, struct tp_error *err)
{
	struct tp_volume *volume;
	void *memory;
	int r = check_size(size, err);

	if (r)
		return r;
	if (posix_memalign(&memory, 64, sizeof(*volume)))
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for volume %u", id);
	memset(memory, 0, sizeof(*volume));
	volume = memory;
	volume->pool = pool;
	volume->id = id;
	volume->read_only = read_only || pool->options.read_only;
	volume->origin = origin;
	volume->origin_size = origin ? tp_bdev_size(origin) : 0;
	atomic_init(&volume->size, size);
	atomic_init(&volume->table, new_table(size, pool->block_size));
	if (!atomic_load(&volume->table)) {
		free(volume);
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for volume %u", id);
	}
	pthread_mutex_lock(&pool->changes_lock);
	pthread_mutex_lock(&pool->md_lock);
	if (tp_find_volume(pool, id))
		r = tp_fail(err, TP_E_VOLUME_BUSY, "device %u is open already", id);
	if (!r)
		r = tp_pool_check_not_doomed(pool, id, err);
	if (!r)
		r = tp_md_get_device(pool->md, id, &volume->device, err);
	if (!r) {
		atomic_init(&volume->snapshotted_time, volume->device->snapshotted_time);
		/* Changes replayed or made before it was opened belong to it. */
		atomic_init(&volume->changed_in, volume->device->changed_in);
		volume->next = pool->volumes;
		pool->volumes = volume;
	}
	pthread_mutex_unlock(&pool->md_lock);
	pthread_mutex_unlock(&pool->changes_lock);
	if (r) {
		volume_free(volume);
		return r;
	}
	*volume_ret = volume;
	return 0;
}

void tp_volume_close(struct tp_volume *volume)
{
	struct tp_pool *pool;
	struct tp_volume **at;
	uint32_t i;
	bool last;

	if (!volume)
		return;
	pool = volume->pool;
	pthread_mutex_lock(&pool->changes_lock);
	for (i = 0; i < GATE_SLOTS; i++)
		TP_ASSERT(!atomic_load(&volume->gate[i].inside));
	pthread_mutex_lock(&pool->md_lock);
	for (at = &pool->volumes; *at != volume; at = &(*at)->next)
		;
	*at = volume->next;
	tp_md_put_device(pool->md, volume->device);
	pthread_mutex_unlock(&pool->md_lock);
	last = pool->orphaned && !pool->volumes;
	pthread_mutex_unlock(&pool->changes_lock);
	volume_free(volume);
	if (last)
		tp_pool_free(pool);
}

int tp_volume_resize(struct tp_volume *volume, uint64_t size, struct tp_error *err)
{
	struct chunk_table *table, *old;
	uint64_t i;
	int r = check_size(size, err);

	if (r)
		return r;
	tp_gate_close(volume);
	pthread_mutex_lock(&volume->pool->md_lock);
	old = atomic_load(&volume->table);
	table = new_table(size, volume->pool->block_size);
	if (!table) {
		r = tp_fail(err, TP_E_NO_MEMORY, "no memory for volume %u", volume->id);
	} else if (table->nr_chunks > old->nr_chunks) {
		for (i = 0; i < old->nr_used; i++)
			atomic_init(&table->chunks[i], atomic_load(&old->chunks[i]));
		table->nr_used = old->nr_used;
		table->older = old;
		atomic_store_explicit(&volume->table, table, memory_order_release);
	} else {
		free(table);
	}
	if (!r)
		atomic_store(&volume->size, size);
	pthread_mutex_unlock(&volume->pool->md_lock);
	tp_gate_open(volume);
	return r;
}

uint32_t tp_volume_id(const struct tp_volume *volume)
{
	return volume->id;
}

uint64_t tp_volume_size(const struct tp_volume *volume)
{
	return atomic_load(&((struct tp_volume *)(uintptr_t)volume)->size);
}

struct tp_bdev *tp_volume_data_bdev(struct tp_volume *volume)
{
	return volume->pool->data_bdev;
}

/* ---- the non-blocking path ---------------------------------------------------------------- */

static bool map_block(struct tp_volume *volume, uint64_t block, uint32_t within, uint32_t length,
		      struct tp_map *map)
{
	struct tp_pool *pool = volume->pool;
	uint32_t lock = tp_block_lock_index(volume->id, block);
	struct tp_map_extent *last;
	uint64_t entry, offset;

	if (!tp_block_lock_try_shared(pool->locks, lock))
		return false;
	map->locks[map->nr_locks++] = lock;
	entry = tp_cache_get(volume, block);
	if (entry == CACHE_UNKNOWN)
		return false;
	if (map->write && (!tp_entry_mapped(entry) || tp_entry_shared(volume, entry))) {
		map->copies = tp_entry_mapped(entry);
		return false;
	}
	if (!tp_entry_mapped(entry) && block * pool->block_size + within < volume->origin_size)
		return false;
	offset = tp_entry_mapped(entry) ? tp_entry_block(entry) * pool->block_size + within
					: TP_MAP_HOLE;
	last = map->nr_extents ? &map->extents[map->nr_extents - 1] : NULL;
	if (last && (offset == TP_MAP_HOLE ? last->data_offset == TP_MAP_HOLE
					   : last->data_offset != TP_MAP_HOLE &&
						     last->data_offset + last->length == offset))
		last->length += length;
	else
		map->extents[map->nr_extents++] = (struct tp_map_extent){ offset, length };
	return true;
}

int tp_volume_map(struct tp_volume *volume, uint64_t offset, uint32_t length, int write,
		  struct tp_map *map)
{
	struct tp_pool *pool = volume->pool;
	uint64_t size = atomic_load_explicit(&volume->size, memory_order_relaxed);
	uint32_t done = 0;

	map->nr_extents = map->nr_locks = map->copies = 0;
	map->write = (uint32_t)write;
	if (!length || offset > size || length > size - offset ||
	    (offset | length) & (pool->io_align - 1) ||
	    atomic_load_explicit(&pool->mode, memory_order_relaxed) == TP_MODE_FAIL)
		return TP_MAP_SLOW;
	if (write && (volume->read_only || !tp_gate_try_enter(volume, &map->gate_slot)))
		return TP_MAP_SLOW;
	while (done < length) {
		uint64_t block = (offset + done) / pool->block_size;
		uint32_t within = (uint32_t)((offset + done) % pool->block_size);
		uint32_t part = pool->block_size - within;

		part = part < length - done ? part : length - done;
		if (map->nr_locks == TP_MAP_MAX || !map_block(volume, block, within, part, map)) {
			tp_volume_unmap(volume, map);
			return TP_MAP_SLOW;
		}
		done += part;
	}
	return TP_MAP_OK;
}

void tp_volume_unmap(struct tp_volume *volume, struct tp_map *map)
{
	if (map->write)
		tp_pool_data_changed(volume->pool);
	while (map->nr_locks)
		tp_block_unlock_shared(volume->pool->locks, map->locks[--map->nr_locks]);
	if (map->write)
		tp_gate_leave(volume, map->gate_slot);
}
