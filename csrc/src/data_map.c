/* SPDX-License-Identifier: Apache-2.0 */
#include "thinpool/data_map.h"

#include <stdlib.h>
#include <string.h>

#include "thinpool/btree.h"
#include "thinpool/error.h"

struct index_entry {
	uint64_t block;               /* of the bitmap */
	struct tp_disk_bitmap *owned; /* the changeable bitmap in this transaction, or NULL */
	bool dirty;                   /* its index entry is out of date */
};

struct tp_data_map {
	struct tp_tm *tm;
	uint64_t nr_blocks;
	uint64_t nr_used;
	uint64_t nr_overflow; /* entries of the overflow tree */
	uint64_t index_root;
	uint64_t overflow_root;
	struct index_entry *index;
	uint64_t nr_index;
	struct tp_allocator *allocator;
	struct tp_run_list freed_open, freed_sealed;
};

int tp_run_list_add(struct tp_run_list *list, uint64_t begin, uint64_t length)
{
	struct tp_run *last = list->count ? &list->runs[list->count - 1] : NULL;

	if (last && last->begin + last->length == begin) {
		last->length += length;
	} else {
		if (list->count == list->room) {
			size_t room = list->room ? list->room * 2 : 64;
			struct tp_run *runs = realloc(list->runs, room * sizeof(*runs));

			if (!runs)
				return TP_E_NO_MEMORY;
			list->runs = runs;
			list->room = room;
		}
		list->runs[list->count++] = (struct tp_run){ begin, length };
	}
	list->blocks += length;
	return 0;
}

void tp_run_list_free(struct tp_run_list *list)
{
	free(list->runs);
	memset(list, 0, sizeof(*list));
}

static struct tp_btree index_tree(struct tp_data_map *map)
{
	return (struct tp_btree){ .tm = map->tm, .value_size = TP_INDEX_VALUE_SIZE };
}

static struct tp_btree overflow_tree(struct tp_data_map *map)
{
	return (struct tp_btree){ .tm = map->tm, .value_size = TP_REF_COUNT_VALUE_SIZE };
}

static uint64_t bitmaps_for(uint64_t nr_blocks)
{
	return (nr_blocks + TP_BITMAP_ENTRIES - 1) / TP_BITMAP_ENTRIES;
}

/* ---- counts ------------------------------------------------------------------------------ */

static int check_block(const struct tp_data_map *map, uint64_t block, struct tp_error *err)
{
	if (block >= map->nr_blocks)
		return tp_fail_block(err, TP_E_MAPPING_OUT_OF_RANGE, block, block, map->nr_blocks,
				     "data block %lu is referred to and lies past the end",
				     (unsigned long)block);
	return 0;
}

static int pair_of(struct tp_data_map *map, uint64_t block, unsigned *pair_ret,
		   struct tp_error *err)
{
	struct index_entry *entry = &map->index[block / TP_BITMAP_ENTRIES];
	uint64_t e = block % TP_BITMAP_ENTRIES;
	const struct tp_disk_bitmap *bitmap = entry->owned;
	int r;

	if (!bitmap) {
		const void *data;

		r = tp_tm_read(map->tm, entry->block, TP_KIND_BITMAP, &data, err);
		if (r)
			return r;
		bitmap = data;
	}
	*pair_ret = tp_word_count(tp_le64_get(bitmap->words[e / TP_WORD_ENTRIES]),
				  (unsigned)(e % TP_WORD_ENTRIES));
	return 0;
}

static int set_pair(struct tp_data_map *map, uint64_t block, unsigned pair, struct tp_error *err)
{
	struct index_entry *entry = &map->index[block / TP_BITMAP_ENTRIES];
	uint64_t e = block % TP_BITMAP_ENTRIES;
	struct tp_le64 *word;

	if (!entry->owned) {
		bool gained;
		void *data;
		int r = tp_tm_shadow(map->tm, &entry->block, TP_KIND_BITMAP, &data, &gained, err);

		if (r)
			return r;
		entry->owned = data;
		entry->dirty = true;
	}
	word = &entry->owned->words[e / TP_WORD_ENTRIES];
	*word = tp_le64_put(
		tp_word_with_count(tp_le64_get(*word), (unsigned)(e % TP_WORD_ENTRIES), pair));
	return 0;
}

int tp_data_map_count(struct tp_data_map *map, uint64_t block, uint32_t *count_ret,
		      struct tp_error *err)
{
	struct tp_btree tree = overflow_tree(map);
	struct tp_disk_ref_count value;
	unsigned pair;
	int r = check_block(map, block, err);

	if (!r)
		r = pair_of(map, block, &pair, err);
	if (r)
		return r;
	*count_ret = pair;
	if (pair < TP_COUNT_OVERFLOW)
		return 0;
	r = tp_btree_lookup(&tree, map->overflow_root, block, &value, err);
	if (r == TP_E_KEY_NOT_FOUND)
		return tp_fail_block(err, TP_E_SPACE_MAP_MALFORMED, block, 0, TP_COUNT_OVERFLOW,
				     "data block %lu is counted 3 or more and has no overflow "
				     "entry",
				     (unsigned long)block);
	*count_ret = r ? 0 : tp_le32_get(value.count);
	return r;
}

static int set_count(struct tp_data_map *map, uint64_t block, uint32_t old, uint32_t count,
		     struct tp_error *err)
{
	struct tp_btree tree = overflow_tree(map);
	struct tp_disk_ref_count value = { tp_le32_put(count) };
	int r = 0;

	/* The tree first: a failure there leaves the pair as it was. */
	if (count >= TP_COUNT_OVERFLOW)
		r = tp_btree_insert(&tree, &map->overflow_root, block, &value, err);
	else if (old >= TP_COUNT_OVERFLOW)
		r = tp_btree_remove(&tree, &map->overflow_root, block, NULL, err);
	if (!r && (old < TP_COUNT_OVERFLOW || count < TP_COUNT_OVERFLOW))
		r = set_pair(map, block, count < TP_COUNT_OVERFLOW ? count : TP_COUNT_OVERFLOW,
			     err);
	if (r)
		return r;
	map->nr_used += (uint64_t)(count != 0) - (uint64_t)(old != 0);
	map->nr_overflow +=
		(uint64_t)(count >= TP_COUNT_OVERFLOW) - (uint64_t)(old >= TP_COUNT_OVERFLOW);
	return 0;
}

int tp_data_map_claim(struct tp_data_map *map, uint64_t block, struct tp_error *err)
{
	uint32_t count;
	int r = tp_data_map_count(map, block, &count, err);

	if (r)
		return r;
	if (count)
		return tp_fail_block(err, TP_E_SPACE_MAP_MALFORMED, block, count, 0,
				     "data block %lu was allocated and is counted already",
				     (unsigned long)block);
	return set_count(map, block, 0, 1, err);
}

int tp_data_map_inc(struct tp_data_map *map, uint64_t block, struct tp_error *err)
{
	uint32_t count;
	int r = tp_data_map_count(map, block, &count, err);

	if (r)
		return r;
	if (!count || count == UINT32_MAX)
		return tp_fail_block(err, TP_E_SPACE_MAP_MALFORMED, block, count, 1,
				     "data block %lu is mapped and counted %u times",
				     (unsigned long)block, count);
	return set_count(map, block, count, count + 1, err);
}

int tp_data_map_dec(struct tp_data_map *map, uint64_t block, struct tp_error *err)
{
	uint32_t count;
	int r = tp_data_map_count(map, block, &count, err);

	if (r)
		return r;
	if (!count)
		return tp_fail_block(err, TP_E_SPACE_MAP_MALFORMED, block, 0, 1,
				     "data block %lu is mapped and counted as free",
				     (unsigned long)block);
	r = set_count(map, block, count, count - 1, err);
	if (r || count > 1)
		return r;
	if (tp_run_list_add(&map->freed_open, block, 1))
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to free data blocks");
	return 0;
}

/* ---- life -------------------------------------------------------------------------------- */

void tp_data_map_destroy(struct tp_data_map *map)
{
	if (!map)
		return;
	tp_allocator_destroy(map->allocator);
	tp_run_list_free(&map->freed_open);
	tp_run_list_free(&map->freed_sealed);
	free(map->index);
	free(map);
}

int tp_data_map_create(struct tp_tm *tm, struct tp_data_map **map_ret, struct tp_error *err)
{
	struct tp_data_map *map = calloc(1, sizeof(*map));
	struct tp_btree tree;
	int r;

	if (!map || !(map->allocator = tp_allocator_create(0))) {
		free(map);
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a data space map");
	}
	map->tm = tm;
	tree = index_tree(map);
	r = tp_btree_empty(&tree, &map->index_root, err);
	tree = overflow_tree(map);
	if (!r)
		r = tp_btree_empty(&tree, &map->overflow_root, err);
	if (r) {
		tp_data_map_destroy(map);
		return r;
	}
	*map_ret = map;
	return 0;
}

static int load_bitmap(struct tp_data_map *map, uint64_t i, struct tp_error *err)
{
	const struct tp_disk_bitmap *bitmap;
	const void *data;
	uint64_t begin = i * TP_BITMAP_ENTRIES, n = TP_BITMAP_ENTRIES, e, run = 0;
	int r = tp_tm_read(map->tm, map->index[i].block, TP_KIND_BITMAP, &data, err);

	if (r)
		return r;
	bitmap = data;
	if (begin + n > map->nr_blocks)
		n = map->nr_blocks - begin;
	for (e = 0; e <= n; e++) {
		uint64_t word = e < n ? tp_le64_get(bitmap->words[e / TP_WORD_ENTRIES]) : 0;
		unsigned pair = tp_word_count(word, (unsigned)(e % TP_WORD_ENTRIES));

		if (e < n && !run && !word && e % TP_WORD_ENTRIES == 0) {
			e += TP_WORD_ENTRIES - 1;
			if (e >= n)
				e = n - 1;
			continue;
		}
		if (pair) {
			run++;
			map->nr_overflow += pair == TP_COUNT_OVERFLOW;
			continue;
		}
		if (run) {
			r = tp_allocator_take(map->allocator, begin + e - run, run);
			TP_ASSERT(!r);
			map->nr_used += run;
			run = 0;
		}
	}
	return 0;
}

int tp_data_map_open(struct tp_tm *tm, const struct tp_disk_space_map_root *root,
		     struct tp_data_map **map_ret, struct tp_error *err)
{
	struct tp_data_map *map = calloc(1, sizeof(*map));
	struct tp_disk_index_entry value;
	struct tp_btree tree;
	uint64_t i, key;
	int r = 0;

	if (!map)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a data space map");
	map->tm = tm;
	map->nr_blocks = tp_le64_get(root->nr_blocks);
	map->index_root = tp_le64_get(root->bitmap_root);
	map->overflow_root = tp_le64_get(root->ref_count_root);
	if (map->nr_blocks > TP_DATA_BLOCKS_MAX) {
		r = tp_fail_block(err, TP_E_SPACE_MAP_MALFORMED, TP_SUPERBLOCK_LOCATION,
				  map->nr_blocks, TP_DATA_BLOCKS_MAX,
				  "the superblock gives the pool %lu data blocks",
				  (unsigned long)map->nr_blocks);
		free(map);
		return r;
	}
	map->nr_index = bitmaps_for(map->nr_blocks);
	map->index = calloc(map->nr_index ? map->nr_index : 1, sizeof(*map->index));
	map->allocator = tp_allocator_create(map->nr_blocks);
	if (!map->index || !map->allocator)
		r = tp_fail(err, TP_E_NO_MEMORY, "no memory for %lu data blocks",
			    (unsigned long)map->nr_blocks);
	tree = index_tree(map);
	for (i = 0; !r && i < map->nr_index; i++) {
		r = tp_btree_next(&tree, map->index_root, i, &key, &value, err);
		if (r == TP_E_KEY_NOT_FOUND || (!r && key != i))
			r = tp_fail_block(err, TP_E_SPACE_MAP_MALFORMED, map->index_root, i,
					  map->nr_index, "the data space map has no bitmap %lu",
					  (unsigned long)i);
		if (r)
			break;
		map->index[i].block = tp_le64_get(value.blocknr);
		r = load_bitmap(map, i, err);
	}
	if (r) {
		tp_data_map_destroy(map);
		return r;
	}
	*map_ret = map;
	return 0;
}

int tp_data_map_resize(struct tp_data_map *map, uint64_t nr_blocks, struct tp_error *err)
{
	uint64_t nr_index = bitmaps_for(nr_blocks);
	struct index_entry *index;
	uint64_t at;
	void *data;
	int r;

	if (nr_blocks < map->nr_blocks || nr_blocks > TP_DATA_BLOCKS_MAX)
		return tp_fail(err, TP_E_INVALID, "a pool of %lu data blocks cannot have %lu",
			       (unsigned long)map->nr_blocks, (unsigned long)nr_blocks);
	index = realloc(map->index, (nr_index ? nr_index : 1) * sizeof(*index));
	if (!index)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for %lu data blocks",
			       (unsigned long)nr_blocks);
	map->index = index;
	/* The last bitmap's index entry changes only if its counts do: free ends count as free. */
	for (; map->nr_index < nr_index; map->nr_index++) {
		struct index_entry *entry = &index[map->nr_index];

		memset(entry, 0, sizeof(*entry));
		r = tp_tm_new(map->tm, TP_KIND_BITMAP, &entry->block, &data, err);
		if (r)
			return r;
		entry->owned = data;
		entry->dirty = true;
	}
	if (tp_allocator_resize(map->allocator, nr_blocks))
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for %lu data blocks",
			       (unsigned long)nr_blocks);
	/*
	 * A pool restored by others may carry hints that hide the new end, and the format says
	 * nothing of the bits past the end: write both again.
	 */
	for (at = map->nr_blocks; at < nr_blocks && at % TP_BITMAP_ENTRIES; at++) {
		r = set_pair(map, at, 0, err);
		if (r)
			return r;
	}
	map->nr_blocks = nr_blocks;
	return 0;
}

/* ---- allocation -------------------------------------------------------------------------- */

int tp_data_map_reserve(struct tp_data_map *map, uint64_t *block_ret)
{
	return tp_allocator_alloc(map->allocator, block_ret);
}

int tp_data_map_reserve_some(struct tp_data_map *map, uint64_t want, uint64_t *begin_ret,
			     uint64_t *length_ret)
{
	return tp_allocator_alloc_run(map->allocator, want, begin_ret, length_ret);
}

int tp_data_map_reserve_run(struct tp_data_map *map, uint64_t begin, uint64_t length)
{
	return tp_allocator_take(map->allocator, begin, length);
}

void tp_data_map_unreserve(struct tp_data_map *map, uint64_t begin, uint64_t length)
{
	int r = tp_allocator_untake(map->allocator, begin, length);

	TP_ASSERT(!r);
}

uint64_t tp_data_map_nr_blocks(const struct tp_data_map *map)
{
	return map->nr_blocks;
}

uint64_t tp_data_map_nr_used(const struct tp_data_map *map)
{
	return map->nr_used;
}

uint64_t tp_data_map_nr_overflow(const struct tp_data_map *map)
{
	return map->nr_overflow;
}

uint64_t tp_data_map_nr_bitmaps(const struct tp_data_map *map)
{
	return map->nr_index;
}

uint64_t tp_data_map_nr_allocatable(const struct tp_data_map *map)
{
	return tp_allocator_nr_free(map->allocator);
}

uint64_t tp_data_map_nr_waiting(const struct tp_data_map *map)
{
	return map->freed_open.blocks + map->freed_sealed.blocks;
}

int tp_data_map_next_free_run(const struct tp_data_map *map, uint64_t begin, uint64_t *begin_ret,
			      uint64_t *length_ret)
{
	return tp_allocator_next_free_run(map->allocator, begin, begin_ret, length_ret);
}

int tp_data_map_is_allocatable(const struct tp_data_map *map, uint64_t block)
{
	return tp_allocator_is_free(map->allocator, block);
}

/* ---- commit ------------------------------------------------------------------------------ */

static void describe_bitmap(const struct index_entry *entry, struct tp_disk_index_entry *value_ret)
{
	const uint64_t low_bits = UINT64_C(0x5555555555555555);
	uint32_t used = 0, first_free = TP_BITMAP_ENTRIES, i;

	for (i = 0; i < TP_BITMAP_WORDS; i++) {
		uint64_t word = tp_le64_get(entry->owned->words[i]);
		uint64_t taken = (word | word >> 1) & low_bits;

		used += (uint32_t)__builtin_popcountll(taken);
		if (taken != low_bits && first_free == TP_BITMAP_ENTRIES)
			first_free = i * TP_WORD_ENTRIES +
				     (uint32_t)__builtin_ctzll(~taken & low_bits) / 2;
	}
	value_ret->blocknr = tp_le64_put(entry->block);
	value_ret->nr_free = tp_le32_put(TP_BITMAP_ENTRIES - used);
	value_ret->none_free_before = tp_le32_put(first_free);
}

int tp_data_map_flush(struct tp_data_map *map, struct tp_disk_space_map_root *root_ret,
		      struct tp_error *err)
{
	struct tp_btree tree = index_tree(map);
	struct tp_disk_index_entry value;
	uint64_t i;
	int r;

	for (i = 0; i < map->nr_index; i++) {
		if (!map->index[i].dirty)
			continue;
		describe_bitmap(&map->index[i], &value);
		r = tp_btree_insert(&tree, &map->index_root, i, &value, err);
		if (r)
			return r;
		map->index[i].dirty = false;
	}
	root_ret->nr_blocks = tp_le64_put(map->nr_blocks);
	root_ret->nr_allocated = tp_le64_put(map->nr_used);
	root_ret->bitmap_root = tp_le64_put(map->index_root);
	root_ret->ref_count_root = tp_le64_put(map->overflow_root);
	return 0;
}

void tp_data_map_seal(struct tp_data_map *map)
{
	uint64_t i;

	for (i = 0; i < map->nr_index; i++)
		map->index[i].owned = NULL;
	TP_ASSERT(!map->freed_sealed.count);
	map->freed_sealed = map->freed_open;
	memset(&map->freed_open, 0, sizeof(map->freed_open));
}

void tp_data_map_finish_seal(struct tp_data_map *map, struct tp_run_list *freed)
{
	size_t i;

	for (i = 0; i < map->freed_sealed.count; i++) {
		struct tp_run *run = &map->freed_sealed.runs[i];
		int r = tp_allocator_free(map->allocator, run->begin, run->length);

		TP_ASSERT(!r);
		/* Without memory the host's space is returned by a later scan instead. */
		if (freed)
			(void)tp_run_list_add(freed, run->begin, run->length);
	}
	tp_allocator_commit(map->allocator);
	tp_run_list_free(&map->freed_sealed);
}
