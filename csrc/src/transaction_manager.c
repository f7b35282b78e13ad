/* SPDX-License-Identifier: Apache-2.0 */
#include "thinpool/transaction_manager.h"

#include <stdlib.h>
#include <string.h>

#include "thinpool/btree.h"
#include "thinpool/error.h"

/*
 * Blocks of one sort that are read together lie together: a reader of many nodes, a check or a
 * delta, has all upper nodes, and all counts, in a few reads. A run is a cursor of the sort's own
 * and no more: its blocks stay free, for whoever comes by when no other is left, and nothing of it
 * is on disk. Leaves follow the allocator's own cursor.
 *
 * A transaction's first blocks are all taken there, so that a small commit is one write.
 */
enum sort {
	SORT_LEAF,
	SORT_INTERNAL,
	SORT_COUNTS,
	NR_SORTS
};

#define RUN_BLOCKS   64u
#define SMALL_COMMIT 32u

struct number_list {
	uint64_t *items;
	size_t count, room;
};

struct tp_tm {
	struct tp_block_manager *bm;
	uint64_t nr_blocks;
	uint64_t nr_used;
	uint32_t *counts;
	bool counted;                        /* counts are known */
	uint64_t *fresh;                     /* bit a block: allocated in the open transaction */
	uint64_t *queued;                    /* bit a block: stands in overflow_changed */
	struct number_list overflow_changed; /* counts that the overflow tree may have wrong */
	struct tp_allocator *allocator;
	uint64_t nr_given; /* in the open transaction */
	struct {
		uint64_t next, end;
	} runs[NR_SORTS];
	bool sealed;                   /* a sealed transaction is being written */
	struct number_list freed_late; /* freed since the seal */
	uint64_t index_block;          /* 0: not on disk yet */
	uint64_t overflow_root;
	struct {
		uint64_t block; /* 0: not on disk yet */
		bool dirty;
	} bitmaps[TP_INDEX_ENTRIES];
};

static int list_push(struct number_list *list, uint64_t item)
{
	if (list->count == list->room) {
		size_t room = list->room ? list->room * 2 : 64;
		uint64_t *items = realloc(list->items, room * sizeof(*items));

		if (!items)
			return TP_E_NO_MEMORY;
		list->items = items;
		list->room = room;
	}
	list->items[list->count++] = item;
	return 0;
}

static bool bit_get(const uint64_t *bits, uint64_t i)
{
	return bits[i / 64] >> (i % 64) & 1;
}

static void bit_set(uint64_t *bits, uint64_t i)
{
	bits[i / 64] |= UINT64_C(1) << (i % 64);
}

static void bit_clear(uint64_t *bits, uint64_t i)
{
	bits[i / 64] &= ~(UINT64_C(1) << (i % 64));
}

static uint64_t nr_bitmaps(const struct tp_tm *tm)
{
	return (tm->nr_blocks + TP_BITMAP_ENTRIES - 1) / TP_BITMAP_ENTRIES;
}

static size_t bit_bytes(uint64_t n)
{
	return (size_t)((n + 63) / 64 * 8);
}

static struct tp_btree overflow_tree(struct tp_tm *tm)
{
	return (struct tp_btree){ .tm = tm, .value_size = TP_REF_COUNT_VALUE_SIZE };
}

/* ---- counting ---------------------------------------------------------------------------- */

static int set_count(struct tp_tm *tm, uint64_t block, uint32_t count, struct tp_error *err)
{
	uint32_t old = tm->counts[block];

	/* What changes on disk is the pair of bits, and the tree where 3 or more is involved. */
	if ((old >= TP_COUNT_OVERFLOW || count >= TP_COUNT_OVERFLOW) &&
	    !bit_get(tm->queued, block)) {
		if (list_push(&tm->overflow_changed, block))
			return tp_fail(err, TP_E_NO_MEMORY, "no memory to count metadata");
		bit_set(tm->queued, block);
	}
	tm->counts[block] = count;
	tm->nr_used += (uint64_t)(count != 0) - (uint64_t)(old != 0);
	tm->bitmaps[block / TP_BITMAP_ENTRIES].dirty = true;
	return 0;
}

static int check_block(const struct tp_tm *tm, uint64_t block, struct tp_error *err)
{
	if (block >= tm->nr_blocks)
		return tp_fail_block(err, TP_E_OUT_OF_RANGE, block, block, tm->nr_blocks,
				     "metadata block %lu is referred to and lies past the end",
				     (unsigned long)block);
	return 0;
}

int tp_tm_inc(struct tp_tm *tm, uint64_t block, struct tp_error *err)
{
	int r = check_block(tm, block, err);

	if (r)
		return r;
	if (!tm->counts[block] || tm->counts[block] == UINT32_MAX)
		return tp_fail_block(err, TP_E_SPACE_MAP_MALFORMED, block, tm->counts[block], 1,
				     "metadata block %lu is in use and counted %u times",
				     (unsigned long)block, tm->counts[block]);
	return set_count(tm, block, tm->counts[block] + 1, err);
}

/* A block whose last reference went. */
static int release(struct tp_tm *tm, uint64_t block, struct tp_error *err)
{
	if (bit_get(tm->fresh, block)) {
		/* The committed state never knew it. */
		bit_clear(tm->fresh, block);
		tp_bm_forget(tm->bm, block);
		return tp_allocator_untake(tm->allocator, block, 1);
	}
	if (tm->sealed) {
		if (list_push(&tm->freed_late, block))
			return tp_fail(err, TP_E_NO_MEMORY, "no memory to free metadata");
		return 0;
	}
	return tp_allocator_free(tm->allocator, block, 1);
}

int tp_tm_dec(struct tp_tm *tm, uint64_t block, uint32_t *left_ret, struct tp_error *err)
{
	int r = check_block(tm, block, err);

	if (r)
		return r;
	if (!tm->counts[block])
		return tp_fail_block(err, TP_E_SPACE_MAP_MALFORMED, block, 0, 1,
				     "metadata block %lu is in use and counted as free",
				     (unsigned long)block);
	r = set_count(tm, block, tm->counts[block] - 1, err);
	if (r)
		return r;
	if (left_ret)
		*left_ret = tm->counts[block];
	return tm->counts[block] ? 0 : release(tm, block, err);
}

uint32_t tp_tm_count(const struct tp_tm *tm, uint64_t block)
{
	return block < tm->nr_blocks ? tm->counts[block] : 0;
}

static enum sort sort_of(enum tp_block_kind kind, uint32_t node_flags)
{
	if (kind == TP_KIND_BITMAP || kind == TP_KIND_INDEX)
		return SORT_COUNTS;
	return kind == TP_KIND_NODE && node_flags & TP_NODE_INTERNAL ? SORT_INTERNAL : SORT_LEAF;
}

/* The next block of the sort's run, or of a new one behind the allocator's cursor, which goes on
 * after it. A run is as long as there is one: of one block in the worst case. */
static int alloc_in_run(struct tp_tm *tm, enum sort sort, uint64_t *block_ret)
{
	uint64_t length;
	int r;

	for (;;) {
		while (tm->runs[sort].next < tm->runs[sort].end) {
			*block_ret = tm->runs[sort].next++;
			/* Others may have come by. */
			if (!tp_allocator_take(tm->allocator, *block_ret, 1))
				return 0;
		}
		r = tp_allocator_alloc_run(tm->allocator, RUN_BLOCKS, &tm->runs[sort].next,
					   &length);
		if (r)
			return r;
		tm->runs[sort].end = tm->runs[sort].next + length;
		r = tp_allocator_untake(tm->allocator, tm->runs[sort].next, length);
		TP_ASSERT(!r);
	}
}

static int allocate(struct tp_tm *tm, enum sort sort, uint64_t *block_ret, struct tp_error *err)
{
	int r = sort == SORT_LEAF || tm->nr_given < SMALL_COMMIT
			? tp_allocator_alloc(tm->allocator, block_ret)
			: alloc_in_run(tm, sort, block_ret);

	if (r)
		return tp_fail(err, TP_E_METADATA_SPACE,
			       "no metadata block is free: %lu of %lu are used",
			       (unsigned long)tm->nr_used, (unsigned long)tm->nr_blocks);
	r = set_count(tm, *block_ret, 1, err);
	if (r) {
		tp_allocator_untake(tm->allocator, *block_ret, 1);
		return r;
	}
	bit_set(tm->fresh, *block_ret);
	tm->nr_given++;
	return 0;
}

/* ---- blocks ------------------------------------------------------------------------------ */

int tp_tm_read(struct tp_tm *tm, uint64_t block, enum tp_block_kind kind, const void **data_ret,
	       struct tp_error *err)
{
	int r = check_block(tm, block, err);

	if (r)
		return r;
	/* It could be handed out under its reader, even as the place of its own copy. */
	if (tm->counted && !tm->counts[block])
		return tp_fail_block(err, TP_E_SPACE_MAP_MALFORMED, block, 0, 1,
				     "metadata block %lu is in use and counted as free",
				     (unsigned long)block);
	return tp_bm_read(tm->bm, block, kind, data_ret, err);
}

static int new_block(struct tp_tm *tm, enum tp_block_kind kind, uint32_t node_flags,
		     uint64_t *block_ret, void **data_ret, struct tp_error *err)
{
	int r = allocate(tm, sort_of(kind, node_flags), block_ret, err);

	if (r)
		return r;
	r = tp_bm_new(tm->bm, *block_ret, kind, data_ret, err);
	if (r)
		tp_tm_dec(tm, *block_ret, NULL, NULL);
	return r;
}

int tp_tm_new(struct tp_tm *tm, enum tp_block_kind kind, uint64_t *block_ret, void **data_ret,
	      struct tp_error *err)
{
	return new_block(tm, kind, 0, block_ret, data_ret, err);
}

int tp_tm_new_node(struct tp_tm *tm, uint32_t flags, uint64_t *block_ret, void **data_ret,
		   struct tp_error *err)
{
	return new_block(tm, TP_KIND_NODE, flags, block_ret, data_ret, err);
}

int tp_tm_shadow(struct tp_tm *tm, uint64_t *block, enum tp_block_kind kind, void **data_ret,
		 bool *children_gained, struct tp_error *err)
{
	struct tp_disk_block_header *h;
	uint64_t old = *block, copy;
	const void *from;
	void *to;
	uint32_t left, flags = 0;
	int r;

	*children_gained = false;
	r = tp_tm_read(tm, old, kind, &from, err);
	if (r)
		return r;
	if (bit_get(tm->fresh, old) && tm->counts[old] == 1) {
		*data_ret = tp_bm_new_data(tm->bm, old);
		return 0;
	}
	if (kind == TP_KIND_NODE)
		flags = tp_le32_get(((const struct tp_disk_node_header *)from)->flags);
	r = new_block(tm, kind, flags, &copy, &to, err);
	if (r)
		return r;
	memcpy(to, from, TP_MD_BLOCK_SIZE);
	h = to;
	h->blocknr = tp_le64_put(copy);
	r = tp_tm_dec(tm, old, &left, err);
	if (r) {
		tp_tm_dec(tm, copy, NULL, NULL);
		return r;
	}
	*children_gained = left > 0;
	*data_ret = to;
	*block = copy;
	return 0;
}

/* ---- life -------------------------------------------------------------------------------- */

void tp_tm_destroy(struct tp_tm *tm)
{
	if (!tm)
		return;
	tp_allocator_destroy(tm->allocator);
	free(tm->counts);
	free(tm->fresh);
	free(tm->queued);
	free(tm->overflow_changed.items);
	free(tm->freed_late.items);
	free(tm);
}

static int alloc_arrays(struct tp_tm *tm, uint64_t nr_blocks, struct tp_error *err)
{
	tm->nr_blocks = nr_blocks;
	tm->counts = calloc(nr_blocks, sizeof(*tm->counts));
	tm->fresh = calloc(1, bit_bytes(nr_blocks));
	tm->queued = calloc(1, bit_bytes(nr_blocks));
	tm->allocator = tp_allocator_create(nr_blocks);
	if (!tm->counts || !tm->fresh || !tm->queued || !tm->allocator)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for %lu metadata blocks' counts",
			       (unsigned long)nr_blocks);
	return 0;
}

int tp_tm_create(struct tp_block_manager *bm, uint64_t nr_blocks, struct tp_tm **tm_ret,
		 struct tp_error *err)
{
	struct tp_tm *tm = calloc(1, sizeof(*tm));
	struct tp_btree tree;
	uint64_t i;
	int r;

	if (!tm)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a metadata space map");
	tm->bm = bm;
	r = alloc_arrays(tm, nr_blocks, err);
	if (!r)
		r = tp_allocator_take(tm->allocator, TP_SUPERBLOCK_LOCATION, 1);
	if (!r)
		r = set_count(tm, TP_SUPERBLOCK_LOCATION, 1, err);
	tm->counted = true;
	if (!r) {
		tree = overflow_tree(tm);
		r = tp_btree_empty(&tree, &tm->overflow_root, err);
	}
	for (i = 0; i < nr_bitmaps(tm); i++)
		tm->bitmaps[i].dirty = true;
	if (r) {
		tp_tm_destroy(tm);
		return r;
	}
	*tm_ret = tm;
	return 0;
}

static int load_bitmap(struct tp_tm *tm, uint64_t i, struct tp_error *err)
{
	const struct tp_disk_bitmap *bitmap;
	const void *data;
	uint64_t begin = i * TP_BITMAP_ENTRIES, n = TP_BITMAP_ENTRIES, e;
	int r = tp_tm_read(tm, tm->bitmaps[i].block, TP_KIND_BITMAP, &data, err);

	if (r)
		return r;
	bitmap = data;
	if (begin + n > tm->nr_blocks)
		n = tm->nr_blocks - begin;
	for (e = 0; e < n; e++) {
		uint64_t word = tp_le64_get(bitmap->words[e / TP_WORD_ENTRIES]);
		unsigned count = tp_word_count(word, (unsigned)(e % TP_WORD_ENTRIES));

		if (!count)
			continue;
		tm->counts[begin + e] = count;
		tm->nr_used++;
		r = tp_allocator_take(tm->allocator, begin + e, 1);
		if (r)
			return tp_fail(err, r, "metadata block %lu cannot be taken",
				       (unsigned long)(begin + e));
	}
	return 0;
}

static int load_overflow(struct tp_tm *tm, struct tp_error *err)
{
	struct tp_btree tree = overflow_tree(tm);
	struct tp_disk_ref_count value;
	uint64_t key = 0, found, seen = 0, wanted = 0, i;
	int r;

	for (i = 0; i < tm->nr_blocks; i++)
		wanted += tm->counts[i] == TP_COUNT_OVERFLOW;
	while (!(r = tp_btree_next(&tree, tm->overflow_root, key, &found, &value, err))) {
		if (found >= tm->nr_blocks || tm->counts[found] != TP_COUNT_OVERFLOW ||
		    tp_le32_get(value.count) < TP_COUNT_OVERFLOW)
			return tp_fail_block(err, TP_E_SPACE_MAP_MALFORMED, found,
					     tp_le32_get(value.count), TP_COUNT_OVERFLOW,
					     "metadata block %lu has an overflow entry that its "
					     "bitmap does not ask for",
					     (unsigned long)found);
		tm->counts[found] = tp_le32_get(value.count);
		seen++;
		key = found + 1;
	}
	if (r != TP_E_KEY_NOT_FOUND)
		return r;
	if (seen != wanted)
		return tp_fail_block(err, TP_E_SPACE_MAP_MALFORMED, tm->overflow_root, seen, wanted,
				     "%lu metadata blocks are counted 3 or more and have "
				     "no overflow entry",
				     (unsigned long)(wanted - seen));
	return 0;
}

int tp_tm_open(struct tp_block_manager *bm, const struct tp_disk_space_map_root *root,
	       struct tp_tm **tm_ret, struct tp_error *err)
{
	struct tp_tm *tm = calloc(1, sizeof(*tm));
	uint64_t nr_blocks = tp_le64_get(root->nr_blocks), i;
	const struct tp_disk_metadata_index *index;
	const void *data;
	int r;

	if (!tm)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a metadata space map");
	if (!nr_blocks || nr_blocks > TP_MD_BLOCKS_MAX) {
		free(tm);
		return tp_fail_block(err, TP_E_SPACE_MAP_MALFORMED, TP_SUPERBLOCK_LOCATION,
				     nr_blocks, TP_MD_BLOCKS_MAX,
				     "the superblock gives the metadata %lu blocks",
				     (unsigned long)nr_blocks);
	}
	tm->bm = bm;
	tm->index_block = tp_le64_get(root->bitmap_root);
	tm->overflow_root = tp_le64_get(root->ref_count_root);
	r = alloc_arrays(tm, nr_blocks, err);
	if (!r)
		r = tp_tm_read(tm, tm->index_block, TP_KIND_INDEX, &data, err);
	if (!r) {
		index = data;
		for (i = 0; i < nr_bitmaps(tm); i++)
			tm->bitmaps[i].block = tp_le64_get(index->entries[i].blocknr);
	}
	for (i = 0; i < nr_bitmaps(tm) && !r; i++)
		r = load_bitmap(tm, i, err);
	tm->counted = true;
	if (!r)
		r = load_overflow(tm, err);
	if (r) {
		tp_tm_destroy(tm);
		return r;
	}
	*tm_ret = tm;
	return 0;
}

uint64_t tp_tm_nr_blocks(const struct tp_tm *tm)
{
	return tm->nr_blocks;
}

uint64_t tp_tm_nr_used(const struct tp_tm *tm)
{
	return tm->nr_used;
}

uint64_t tp_tm_nr_allocatable(const struct tp_tm *tm)
{
	return tp_allocator_nr_free(tm->allocator);
}

uint64_t tp_tm_nr_pending(const struct tp_tm *tm)
{
	return tp_allocator_nr_pending(tm->allocator) + tm->freed_late.count;
}

int tp_tm_resize(struct tp_tm *tm, uint64_t nr_blocks, struct tp_error *err)
{
	uint64_t old = tm->nr_blocks, i;
	uint64_t *fresh, *queued;
	uint32_t *counts;

	if (nr_blocks > TP_MD_BLOCKS_MAX)
		nr_blocks = TP_MD_BLOCKS_MAX;
	if (nr_blocks < old)
		return tp_fail(err, TP_E_INVALID, "metadata cannot shrink: %lu blocks to %lu",
			       (unsigned long)old, (unsigned long)nr_blocks);
	/* Each array is kept when a later one fails: larger than needed does no harm. */
	counts = realloc(tm->counts, nr_blocks * sizeof(*counts));
	if (counts)
		tm->counts = counts;
	fresh = realloc(tm->fresh, bit_bytes(nr_blocks));
	if (fresh)
		tm->fresh = fresh;
	queued = realloc(tm->queued, bit_bytes(nr_blocks));
	if (queued)
		tm->queued = queued;
	if (!counts || !fresh || !queued || tp_allocator_resize(tm->allocator, nr_blocks))
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for %lu metadata blocks' counts",
			       (unsigned long)nr_blocks);
	memset(counts + old, 0, (nr_blocks - old) * sizeof(*counts));
	for (i = bit_bytes(old) / 8; i < bit_bytes(nr_blocks) / 8; i++)
		fresh[i] = queued[i] = 0;
	tm->nr_blocks = nr_blocks;
	for (i = old / TP_BITMAP_ENTRIES; i < nr_bitmaps(tm); i++)
		tm->bitmaps[i].dirty = true;
	return 0;
}

/* ---- commit ------------------------------------------------------------------------------ */

static int flush_overflow(struct tp_tm *tm, struct tp_error *err)
{
	struct tp_btree tree = overflow_tree(tm);
	struct tp_disk_ref_count value;
	int r;

	while (tm->overflow_changed.count) {
		uint64_t block = tm->overflow_changed.items[--tm->overflow_changed.count];

		bit_clear(tm->queued, block);
		value.count = tp_le32_put(tm->counts[block]);
		if (tm->counts[block] >= TP_COUNT_OVERFLOW) {
			r = tp_btree_insert(&tree, &tm->overflow_root, block, &value, err);
		} else {
			r = tp_btree_remove(&tree, &tm->overflow_root, block, NULL, err);
			/* It rose to 3 and fell again within the transaction. */
			if (r == TP_E_KEY_NOT_FOUND)
				r = 0;
		}
		if (r)
			return r;
	}
	return 0;
}

/* Give a dirty bitmap, or the index, a place in this transaction; true when one was given. */
static int place(struct tp_tm *tm, uint64_t *block, enum tp_block_kind kind, bool *moved,
		 struct tp_error *err)
{
	uint64_t old = *block;
	void *data;
	int r;

	if (old && bit_get(tm->fresh, old))
		return 0;
	r = tp_tm_new(tm, kind, block, &data, err);
	if (r)
		return r;
	*moved = true;
	return old ? tp_tm_dec(tm, old, NULL, err) : 0;
}

static void fill_bitmap(const struct tp_tm *tm, uint64_t i, struct tp_disk_index_entry *entry_ret)
{
	struct tp_disk_bitmap *bitmap = tp_bm_new_data(tm->bm, tm->bitmaps[i].block);
	uint64_t begin = i * TP_BITMAP_ENTRIES, n = TP_BITMAP_ENTRIES, e;
	uint32_t used = 0, first_free = TP_BITMAP_ENTRIES;
	uint64_t word = 0;

	if (begin + n > tm->nr_blocks)
		n = tm->nr_blocks - begin;
	for (e = 0; e < TP_BITMAP_ENTRIES; e++) {
		uint32_t count = e < n ? tm->counts[begin + e] : 0;

		if (count) {
			used++;
			word |= (uint64_t)tp_pair_swap(
					count < TP_COUNT_OVERFLOW ? count : TP_COUNT_OVERFLOW)
				<< 2 * (e % TP_WORD_ENTRIES);
		} else if (first_free == TP_BITMAP_ENTRIES) {
			first_free = (uint32_t)e;
		}
		if (e % TP_WORD_ENTRIES == TP_WORD_ENTRIES - 1) {
			bitmap->words[e / TP_WORD_ENTRIES] = tp_le64_put(word);
			word = 0;
		}
	}
	/* Entries past the end count as free, as the kernel counts them. */
	entry_ret->blocknr = tp_le64_put(tm->bitmaps[i].block);
	entry_ret->nr_free = tp_le32_put(TP_BITMAP_ENTRIES - used);
	entry_ret->none_free_before = tp_le32_put(first_free);
}

int tp_tm_flush_space_map(struct tp_tm *tm, struct tp_disk_space_map_root *root_ret,
			  struct tp_error *err)
{
	struct tp_disk_metadata_index *index;
	const void *old_index = NULL;
	uint64_t old_block = tm->index_block, i;
	bool moved;
	int r;

	/*
	 * Each placement changes counts, which may dirty another bitmap or the overflow tree.
	 * A bitmap and a tree node are placed once a transaction, so this ends.
	 */
	do {
		moved = false;
		r = flush_overflow(tm, err);
		for (i = 0; i < nr_bitmaps(tm) && !r; i++)
			if (tm->bitmaps[i].dirty)
				r = place(tm, &tm->bitmaps[i].block, TP_KIND_BITMAP, &moved, err);
		if (!r)
			r = place(tm, &tm->index_block, TP_KIND_INDEX, &moved, err);
		if (r)
			return r;
	} while (moved || tm->overflow_changed.count);

	index = tp_bm_new_data(tm->bm, tm->index_block);
	if (old_block && old_block != tm->index_block) {
		r = tp_bm_read(tm->bm, old_block, TP_KIND_INDEX, &old_index, err);
		if (r)
			return r;
		memcpy(index->entries, ((const struct tp_disk_metadata_index *)old_index)->entries,
		       sizeof(index->entries));
	}
	for (i = 0; i < nr_bitmaps(tm); i++) {
		if (!tm->bitmaps[i].dirty)
			continue;
		fill_bitmap(tm, i, &index->entries[i]);
		tm->bitmaps[i].dirty = false;
	}
	memset(&index->entries[nr_bitmaps(tm)], 0,
	       (TP_INDEX_ENTRIES - nr_bitmaps(tm)) * sizeof(index->entries[0]));
	root_ret->nr_blocks = tp_le64_put(tm->nr_blocks);
	root_ret->nr_allocated = tp_le64_put(tm->nr_used);
	root_ret->bitmap_root = tp_le64_put(tm->index_block);
	root_ret->ref_count_root = tp_le64_put(tm->overflow_root);
	return 0;
}

void tp_tm_seal(struct tp_tm *tm)
{
	TP_ASSERT(!tm->sealed);
	TP_ASSERT(!tm->overflow_changed.count);
	memset(tm->fresh, 0, bit_bytes(tm->nr_blocks));
	tp_bm_seal(tm->bm);
	tm->sealed = true;
	tm->nr_given = 0;
}

void tp_tm_finish_seal(struct tp_tm *tm)
{
	size_t i;

	TP_ASSERT(tm->sealed);
	tm->sealed = false;
	tp_bm_finish_sealed(tm->bm);
	tp_allocator_commit(tm->allocator);
	for (i = 0; i < tm->freed_late.count; i++) {
		int r = tp_allocator_free(tm->allocator, tm->freed_late.items[i], 1);

		TP_ASSERT(!r);
	}
	tm->freed_late.count = 0;
}
