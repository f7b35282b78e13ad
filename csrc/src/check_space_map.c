/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Both space maps against the references that were counted.
 *
 * Hints are judged by what they do. One that hides free space now (nr_free 0, none_free_before past
 * a free entry, nr_allocated that leaves nothing) is fatal: a pool with room would report that
 * it is full, and for metadata turn read-only. thin_restore 0.9 leaves the metadata map off by the
 * one block that it took last, so there one hidden block is a note. Any other stale hint is a note.
 */
#include <stdlib.h>

#include "thinpool/check.h"
#include "thinpool/error.h"

#define STALE_BY_THIN_RESTORE 1u /* blocks */
#define EVEN_BITS             UINT64_C(0x5555555555555555)
#define AHEAD_LEAST           16u /* fewer bitmaps are not worth looking for */

static enum tp_check_structure structure_of(const struct tp_check_space_map *map)
{
	return map->metadata ? TP_CHECK_IN_METADATA_SPACE_MAP : TP_CHECK_IN_DATA_SPACE_MAP;
}

static void say(struct tp_check *check, enum tp_check_type type, enum tp_check_severity severity,
		enum tp_check_structure structure, uint64_t block, uint64_t key, uint64_t found,
		uint64_t wanted)
{
	struct tp_check_record record = tp_check_at(type, severity, structure, block);

	record.key = key;
	record.found = found;
	record.wanted = wanted;
	tp_check_report(check, record);
}

/* ---- counts ------------------------------------------------------------------------------ */

/* Neighbours with the same fault are one record. */
struct run {
	struct tp_check *check;
	struct tp_check_space_map *map;
	struct tp_check_record record; /* length 0: none */
	uint64_t next;
};

static void run_end(struct run *run)
{
	if (run->record.length)
		tp_check_report(run->check, run->record);
	run->record.length = 0;
}

static void run_add(struct run *run, enum tp_check_type type, enum tp_check_severity severity,
		    uint64_t bitmap_block, uint64_t number, uint64_t found, uint64_t wanted)
{
	struct tp_check_record *record = &run->record;

	if (record->length && record->type == type && number == run->next &&
	    record->found == found && record->wanted == wanted) {
		record->length++;
		run->next++;
		return;
	}
	run_end(run);
	*record = tp_check_at(type, severity, structure_of(run->map),
			      run->map->metadata ? number : bitmap_block);
	record->data_block = run->map->metadata ? UINT64_MAX : number;
	record->found = found;
	record->wanted = wanted;
	run->next = number + 1;
}

/* A count on disk that is not what was counted. */
static void run_count(struct run *run, uint64_t bitmap_block, uint64_t number, uint64_t found,
		      uint64_t wanted)
{
	struct tp_check *check = run->check;

	if (found < wanted) {
		run_add(run, TP_CHECK_COUNT_LOW, TP_CHECK_FATAL, bitmap_block, number, found,
			wanted);
		return;
	}
	if (run->map->metadata ? check->metadata_incomplete : check->data_incomplete) {
		atomic_fetch_add(&run->map->nr_unjudged, 1);
		return;
	}
	run_add(run, TP_CHECK_COUNT_HIGH, TP_CHECK_LEAK, bitmap_block, number, found, wanted);
}

void tp_check_overflow_entry(struct tp_check *check, uint64_t leaf, uint64_t key, uint32_t count)
{
	struct tp_check_space_map *map = check->visiting;
	struct run run = { .check = check, .map = map };
	enum tp_check_structure tree =
		map->metadata ? TP_CHECK_IN_METADATA_OVERFLOW : TP_CHECK_IN_DATA_OVERFLOW;
	uint64_t wanted;

	if (key >= map->nr_blocks) {
		say(check, TP_CHECK_OVERFLOW_EXTRA, TP_CHECK_FATAL, tree, leaf, key, count, 0);
		return;
	}
	if (key >= map->nr_bitmaps * TP_BITMAP_ENTRIES)
		return; /* more than there can be bitmaps for, which was reported */
	tp_walk_bit_set(map->overflowing, key);
	if (count < TP_COUNT_OVERFLOW) {
		say(check, TP_CHECK_OVERFLOW_SMALL, TP_CHECK_FATAL, tree, leaf, key, count,
		    TP_COUNT_OVERFLOW);
		return;
	}
	if (!map->compare_counts || key >= map->counts->nr)
		return;
	wanted = tp_check_counts_get(map->counts, key);
	/* Of a block that fewer use, the bitmap decides whether the entry or the count is wrong. */
	if (count != wanted && wanted >= TP_COUNT_OVERFLOW) {
		run_count(&run, leaf, key, count, wanted);
		run_end(&run);
	}
}

/* ---- one bitmap -------------------------------------------------------------------------- */

static void check_entry(struct run *run, uint64_t bitmap_block, uint64_t number, unsigned pair)
{
	struct tp_check_space_map *map = run->map;
	bool overflowing = tp_walk_bit_get(map->overflowing, number);
	uint64_t wanted;

	if (pair == TP_COUNT_OVERFLOW && !overflowing)
		run_add(run, TP_CHECK_OVERFLOW_MISSING, TP_CHECK_FATAL, bitmap_block, number, 0,
			TP_COUNT_OVERFLOW);
	if (pair < TP_COUNT_OVERFLOW && overflowing)
		run_add(run, TP_CHECK_OVERFLOW_EXTRA, TP_CHECK_FATAL, bitmap_block, number, pair,
			TP_COUNT_OVERFLOW);
	if (!map->compare_counts)
		return;
	wanted = tp_check_counts_get(map->counts, number);
	/* A pair of 3 with an entry was compared by the entry, unless too few use the block. */
	if (pair < TP_COUNT_OVERFLOW ? pair != wanted : wanted < TP_COUNT_OVERFLOW)
		run_count(run, bitmap_block, number, pair, wanted);
}

/* The bits of `overflowing` for 32 entries, spread to pairs like a word of threes. */
static uint64_t overflow_word(const struct tp_check_space_map *map, uint64_t first)
{
	uint64_t bits =
		__atomic_load_n(&map->overflowing[first / 64], __ATOMIC_RELAXED) >> first % 64 &
		UINT32_MAX;

	if (!bits)
		return 0;
	bits = (bits | bits << 16) & UINT64_C(0x0000ffff0000ffff);
	bits = (bits | bits << 8) & UINT64_C(0x00ff00ff00ff00ff);
	bits = (bits | bits << 4) & UINT64_C(0x0f0f0f0f0f0f0f0f);
	bits = (bits | bits << 2) & UINT64_C(0x3333333333333333);
	bits = (bits | bits << 1) & EVEN_BITS;
	return bits * 3;
}

/* How many of the even bits are set; nothing else may be. The processor's own instruction is not to
 * be had on every x86-64. */
static unsigned count_even(uint64_t bits)
{
	bits = (bits & UINT64_C(0x3333333333333333)) + (bits >> 2 & UINT64_C(0x3333333333333333));
	bits = (bits + (bits >> 4)) & UINT64_C(0x0f0f0f0f0f0f0f0f);
	return (unsigned)(bits * UINT64_C(0x0101010101010101) >> 56);
}

struct found {
	uint64_t nr_used;
	uint64_t nr_free;
	uint64_t nr_free_hidden; /* free entries below none_free_before */
	bool beyond_end;
};

static void scan(struct run *run, uint64_t index, const struct tp_disk_bitmap *bitmap,
		 uint64_t nr_entries, struct found *found)
{
	struct tp_check_space_map *map = run->map;
	const struct tp_check_bitmap *entry = &map->bitmaps[index];
	uint64_t first = index * TP_BITMAP_ENTRIES;

	for (unsigned w = 0; w < TP_BITMAP_WORDS; w++) {
		uint64_t word = tp_le64_get(bitmap->words[w]);
		unsigned at = w * TP_WORD_ENTRIES;
		unsigned nr = at >= nr_entries                    ? 0
			      : nr_entries - at < TP_WORD_ENTRIES ? (unsigned)(nr_entries - at)
								  : TP_WORD_ENTRIES;
		uint64_t live = nr == TP_WORD_ENTRIES ? UINT64_MAX : (UINT64_C(1) << 2 * nr) - 1;
		uint64_t used = (word | word >> 1) & EVEN_BITS & live;
		uint64_t nr_used = count_even(used);
		uint64_t threes;

		if (word & ~live)
			found->beyond_end = true;
		if (!nr)
			continue;
		found->nr_used += nr_used;
		found->nr_free += nr - nr_used;
		if (at + nr <= entry->none_free_before)
			found->nr_free_hidden += nr - nr_used;
		else if (at < entry->none_free_before)
			found->nr_free_hidden += count_even(
				~used & EVEN_BITS & live &
				((UINT64_C(1) << 2 * (entry->none_free_before - at)) - 1));
		word &= live;
		threes = (word & word >> 1 & EVEN_BITS) * 3;
		if (threes == (overflow_word(map, first + at) & live) &&
		    (!map->compare_counts ||
		     word == (tp_check_counts_word(map->counts, first + at) & live)))
			continue;
		for (unsigned i = 0; i < nr; i++)
			check_entry(run, entry->block, first + at + i, tp_word_count(word, i));
	}
}

static void check_hints(struct tp_check *check, const struct tp_check_space_map *map,
			uint64_t index, const struct found *found)
{
	const struct tp_check_bitmap *entry = &map->bitmaps[index];
	enum tp_check_structure structure =
		map->metadata ? TP_CHECK_IN_METADATA_INDEX : TP_CHECK_IN_DATA_INDEX;
	uint64_t tolerated = map->metadata ? STALE_BY_THIN_RESTORE : 0;
	uint64_t wanted = TP_BITMAP_ENTRIES - found->nr_used;

	if (entry->nr_free != wanted)
		say(check, TP_CHECK_NR_FREE,
		    entry->nr_free == 0 && found->nr_free > tolerated ? TP_CHECK_FATAL
								      : TP_CHECK_NOTE,
		    structure, entry->index_block, index, entry->nr_free, wanted);
	if (found->nr_free_hidden)
		say(check, TP_CHECK_NONE_FREE_BEFORE,
		    found->nr_free_hidden > tolerated ? TP_CHECK_FATAL : TP_CHECK_NOTE, structure,
		    entry->index_block, index, entry->none_free_before, found->nr_free_hidden);
	if (found->beyond_end)
		say(check, TP_CHECK_BITS_BEYOND_END, TP_CHECK_NOTE,
		    map->metadata ? TP_CHECK_IN_METADATA_BITMAP : TP_CHECK_IN_DATA_BITMAP,
		    entry->block, index, 0, 0);
}

static void visit_bitmap(void *argument, unsigned thread, uint64_t block, const void *data,
			 int status)
{
	struct tp_check *check = argument;
	struct tp_check_space_map *map = check->visiting;
	uint64_t index = check->infos[block].first_key;
	uint64_t left = map->nr_blocks - index * TP_BITMAP_ENTRIES;
	struct tp_walk_fault fault = { .type = TP_CHECK_IO_ERROR, .key = UINT64_MAX };
	struct run run = { .check = check, .map = map };
	struct found found = { 0 };

	(void)thread;
	if (!data)
		fault.found = (uint64_t)-status;
	if (!data || !tp_walk_block_check(data, block, TP_SALT_BITMAP, &fault)) {
		tp_check_report_fault(check, check->uses[block], block, &fault);
		map->unreadable = true;
		return;
	}
	scan(&run, index, data, left < TP_BITMAP_ENTRIES ? left : TP_BITMAP_ENTRIES, &found);
	run_end(&run);
	check_hints(check, map, index, &found);
	atomic_fetch_add(&map->nr_used, found.nr_used);
	atomic_fetch_add(&map->nr_free_found, found.nr_free);
}

/* ---- indexes ----------------------------------------------------------------------------- */

static void take_index_entry(struct tp_check *check, struct tp_check_space_map *map,
			     uint64_t index_block, uint64_t index, const uint8_t *value)
{
	enum tp_check_use use = map->metadata ? TP_USE_METADATA_BITMAP : TP_USE_DATA_BITMAP;
	struct tp_disk_index_entry entry;
	uint64_t block;

	memcpy(&entry, value, sizeof(entry));
	block = tp_le64_get(entry.blocknr);
	if (!tp_check_refer(check, use, block, index_block, index, UINT32_MAX)) {
		map->unreadable = true;
		return;
	}
	if (index >= map->nr_bitmaps)
		return;
	check->infos[block].first_key = index;
	map->bitmaps[index] = (struct tp_check_bitmap){
		.block = block,
		.index_block = index_block,
		.nr_free = tp_le32_get(entry.nr_free),
		.none_free_before = tp_le32_get(entry.none_free_before),
	};
}

void tp_check_index_entry(struct tp_check *check, uint64_t leaf, uint64_t key, const uint8_t *value)
{
	struct tp_check_space_map *map = &check->data_map;

	if (key >= map->nr_bitmaps)
		say(check, TP_CHECK_INDEX_EXTRA, TP_CHECK_FATAL, TP_CHECK_IN_DATA_INDEX, leaf, key,
		    key, map->nr_bitmaps);
	take_index_entry(check, map, leaf, key, value);
}

static void read_metadata_index(struct tp_check *check)
{
	uint8_t data[TP_MD_BLOCK_SIZE] __attribute__((aligned(4096)));
	const struct tp_disk_metadata_index *index = (const void *)data;
	struct tp_check_space_map *map = &check->metadata_map;
	struct tp_walk_fault fault = { .type = TP_CHECK_IO_ERROR, .key = UINT64_MAX };
	uint64_t block = map->bitmap_root;
	int rc;

	map->unreadable = true;
	if (!tp_check_refer(check, TP_USE_METADATA_INDEX, block, TP_SUPERBLOCK_LOCATION, UINT64_MAX,
			    UINT32_MAX))
		return;
	rc = tp_walk_read(check->reader, block, data, NULL);
	fault.found = (uint64_t)-rc;
	if (rc || !tp_walk_block_check(data, block, TP_SALT_INDEX, &fault)) {
		tp_check_report_fault(check, TP_USE_METADATA_INDEX, block, &fault);
		check->metadata_incomplete = true;
		return;
	}
	map->unreadable = false;
	for (uint64_t i = 0; i < TP_INDEX_ENTRIES; i++) {
		static const struct tp_disk_index_entry none;
		const struct tp_disk_index_entry *entry = &index->entries[i];

		if (i < map->nr_bitmaps)
			take_index_entry(check, map, block, i, (const uint8_t *)entry);
		else if (memcmp(entry, &none, sizeof(none)))
			say(check, TP_CHECK_INDEX_BEYOND_END, TP_CHECK_NOTE,
			    TP_CHECK_IN_METADATA_INDEX, block, i, i, map->nr_bitmaps);
	}
}

static void say_missing(struct tp_check *check, const struct tp_check_space_map *map)
{
	for (uint64_t i = 0, end; i < map->nr_bitmaps; i = end + 1) {
		struct tp_check_record record;

		for (end = i; end < map->nr_bitmaps && !map->bitmaps[end].block; end++)
			;
		if (end == i)
			continue;
		record = tp_check_at(TP_CHECK_INDEX_MISSING, TP_CHECK_FATAL, TP_CHECK_IN_DATA_INDEX,
				     map->bitmap_root);
		record.key = i;
		record.length = end - i;
		record.found = 0;
		record.wanted = end - i;
		tp_check_report(check, record);
	}
}

/* ---- one map ----------------------------------------------------------------------------- */

static int map_init(struct tp_check *check, struct tp_check_space_map *map, struct tp_error *err)
{
	uint64_t nr_bitmaps =
		map->nr_blocks / TP_BITMAP_ENTRIES + (map->nr_blocks % TP_BITMAP_ENTRIES != 0);
	uint64_t limit = map->metadata ? TP_INDEX_ENTRIES : check->nr_blocks;

	if (nr_bitmaps > limit || map->nr_blocks > TP_DATA_BLOCKS_MAX) {
		/* The metadata map's size was judged with the superblock. */
		if (!map->metadata)
			say(check, TP_CHECK_SPACE_MAP_SIZE, TP_CHECK_FATAL,
			    TP_CHECK_IN_DATA_SPACE_MAP, TP_SUPERBLOCK_LOCATION, UINT64_MAX,
			    map->nr_blocks, limit * TP_BITMAP_ENTRIES);
		nr_bitmaps = nr_bitmaps < limit ? nr_bitmaps : limit;
	}
	map->nr_bitmaps = nr_bitmaps;
	map->bitmaps = calloc(nr_bitmaps ? nr_bitmaps : 1, sizeof(*map->bitmaps));
	map->overflowing = tp_walk_map(tp_walk_words(nr_bitmaps * TP_BITMAP_ENTRIES) * 8);
	if (!map->bitmaps || !map->overflowing)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for %llu bitmaps",
			       (unsigned long long)nr_bitmaps);
	return 0;
}

int tp_check_space_maps_init(struct tp_check *check, struct tp_error *err)
{
	struct tp_check_space_map *data = &check->data_map, *metadata = &check->metadata_map;
	uint64_t wanted = check->options.nr_data_blocks;
	uint64_t nr_counted;
	int rc;

	metadata->metadata = true;
	metadata->counts = &check->counts;
	data->counts = &check->data_counts;
	check->nr_data_blocks = wanted ? wanted : UINT64_MAX;
	if (check->options.use_metadata_snapshot)
		return 0;
	rc = map_init(check, metadata, err);
	if (!rc)
		rc = map_init(check, data, err);
	if (rc)
		return rc;
	if (wanted && wanted < data->nr_blocks)
		say(check, TP_CHECK_TRUNCATED_DEVICE, TP_CHECK_FATAL, TP_CHECK_IN_DATA_SPACE_MAP,
		    TP_SUPERBLOCK_LOCATION, UINT64_MAX, wanted, data->nr_blocks);
	if (!wanted || wanted > data->nr_blocks)
		check->nr_data_blocks = data->nr_blocks;
	data->compare_counts = !check->options.skip_mappings;
	metadata->compare_counts = !check->options.skip_mappings;
	if (!data->compare_counts)
		return 0;
	nr_counted = data->nr_bitmaps * TP_BITMAP_ENTRIES;
	return tp_check_counts_init(&check->data_counts,
				    nr_counted < data->nr_blocks ? nr_counted : data->nr_blocks,
				    tp_walk_team_size(tp_walk_reader_team(check->reader)), err);
}

void tp_check_space_maps_deinit(struct tp_check *check)
{
	struct tp_check_space_map *maps[] = { &check->data_map, &check->metadata_map };

	for (int i = 0; i < 2; i++) {
		free(maps[i]->bitmaps);
		tp_walk_unmap(maps[i]->overflowing,
			      tp_walk_words(maps[i]->nr_bitmaps * TP_BITMAP_ENTRIES) * 8);
	}
	tp_check_counts_deinit(&check->data_counts);
}

/* ---- ahead ------------------------------------------------------------------------------- */

static void mark_ahead(struct tp_check *check, const struct tp_walk_node *leaf)
{
	struct tp_check_ahead *ahead = &check->ahead;

	for (uint32_t i = 0; i < leaf->nr_entries && ahead->nr < TP_CHECK_KEPT_MAX; i++) {
		struct tp_disk_index_entry entry;
		uint64_t block;

		memcpy(&entry, tp_walk_value(leaf, i), sizeof(entry));
		block = tp_le64_get(entry.blocknr);
		if (block && block < check->nr_blocks && tp_walk_bit_set(ahead->bits, block))
			ahead->nr++;
	}
}

/* An index that is more than two nodes high has more bitmaps than are put aside. */
static int mark_below(struct tp_check *check, const struct tp_walk_node *root, struct tp_error *err)
{
	uint64_t blocks[TP_MD_BLOCK_SIZE / 16];
	int statuses[TP_MD_BLOCK_SIZE / 16];
	uint32_t nr = root->nr_entries;
	uint8_t *slots = malloc((size_t)nr * TP_MD_BLOCK_SIZE);
	struct tp_walk_node leaf;
	int rc;

	if (!slots)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for %u nodes", nr);
	for (uint32_t i = 0; i < nr; i++)
		blocks[i] = tp_walk_value64(root, i);
	rc = tp_walk_read_list(check->reader, blocks, nr, slots, statuses, err);
	for (uint32_t i = 0; !rc && i < nr; i++)
		if (!statuses[i] &&
		    !tp_walk_node_load(slots + (size_t)i * TP_MD_BLOCK_SIZE, blocks[i],
				       TP_INDEX_VALUE_SIZE, &leaf, NULL) &&
		    leaf.leaf)
			mark_ahead(check, &leaf);
	free(slots);
	return rc;
}

int tp_check_look_ahead(struct tp_check *check, struct tp_error *err)
{
	uint8_t data[TP_MD_BLOCK_SIZE] __attribute__((aligned(4096)));
	struct tp_check_space_map *map = &check->data_map;
	struct tp_check_ahead *ahead = &check->ahead;
	struct tp_walk_node root;

	if (map->nr_bitmaps < AHEAD_LEAST)
		return 0;
	ahead->bits = tp_walk_map(tp_walk_words(check->nr_blocks) * 8);
	ahead->copies.nodes = tp_walk_map_dense((uint64_t)TP_CHECK_KEPT_MAX * TP_MD_BLOCK_SIZE);
	ahead->copies.blocks = calloc(TP_CHECK_KEPT_MAX, sizeof(*ahead->copies.blocks));
	if (!ahead->bits || !ahead->copies.nodes || !ahead->copies.blocks)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for bitmaps");
	if (tp_walk_read(check->reader, map->bitmap_root, data, NULL) ||
	    tp_walk_node_load(data, map->bitmap_root, TP_INDEX_VALUE_SIZE, &root, NULL))
		return 0;
	if (!root.leaf)
		return mark_below(check, &root, err);
	mark_ahead(check, &root);
	return 0;
}

static void visit_aside(void *argument, unsigned thread)
{
	struct tp_check *check = argument;
	struct tp_check_kept *copies = &check->ahead.copies;
	size_t slot;

	while ((slot = atomic_fetch_add_explicit(&copies->next, 1, memory_order_relaxed)) <
	       tp_check_nr_kept(copies)) {
		uint64_t block = copies->blocks[slot];

		if (tp_walk_bit_get(check->level, block))
			visit_bitmap(check, thread, block, copies->nodes + slot * TP_MD_BLOCK_SIZE,
				     0);
	}
}

/* Those of the bitmaps in `level` that were put aside, which are then no longer in it. */
static void check_aside(struct tp_check *check)
{
	struct tp_check_kept *copies = &check->ahead.copies;

	if (!tp_check_nr_kept(copies))
		return;
	atomic_store(&copies->next, 0);
	tp_walk_team_run(tp_walk_reader_team(check->reader), visit_aside, check);
	for (size_t slot = 0; slot < tp_check_nr_kept(copies); slot++) {
		uint64_t block = copies->blocks[slot];

		check->level[block / 64] &= ~(UINT64_C(1) << block % 64);
	}
}

/* ---- both -------------------------------------------------------------------------------- */

static void check_bitmaps(struct tp_check *check, struct tp_check_space_map *map)
{
	check->visiting = map;
	memset(check->level, 0, tp_walk_words(check->nr_blocks) * 8);
	for (uint64_t i = 0; i < map->nr_bitmaps; i++) {
		if (map->bitmaps[i].block)
			tp_walk_bit_set(check->level, map->bitmaps[i].block);
		else
			map->unreadable = true;
	}
	check_aside(check);
	tp_walk_blocks(check->reader, check->level, check->nr_blocks, visit_bitmap, check);
}

static void check_totals(struct tp_check *check, struct tp_check_space_map *map)
{
	uint64_t tolerated = map->metadata ? STALE_BY_THIN_RESTORE : 0;
	bool none_left = map->nr_allocated >= map->nr_blocks;

	if (map->nr_unjudged)
		say(check, TP_CHECK_COUNTS_UNJUDGED, TP_CHECK_NOTE, structure_of(map),
		    TP_SUPERBLOCK_LOCATION, UINT64_MAX, map->nr_unjudged, 0);
	if (map->unreadable || map->nr_allocated == map->nr_used)
		return;
	say(check, TP_CHECK_NR_ALLOCATED,
	    map->nr_allocated > map->nr_blocks || (none_left && map->nr_free_found > tolerated)
		    ? TP_CHECK_FATAL
		    : TP_CHECK_NOTE,
	    structure_of(map), TP_SUPERBLOCK_LOCATION, UINT64_MAX, map->nr_allocated, map->nr_used);
}

/* ---- both -------------------------------------------------------------------------------- */

static void check_data_map(struct tp_check *check)
{
	struct tp_check_space_map *map = &check->data_map;

	check->visiting = map;
	check->comparing_overflow = true;
	tp_check_refer(check, TP_USE_DATA_INDEX, map->bitmap_root, TP_SUPERBLOCK_LOCATION,
		       UINT64_MAX, UINT32_MAX);
	tp_check_refer(check, TP_USE_DATA_OVERFLOW, map->overflow_root, TP_SUPERBLOCK_LOCATION,
		       UINT64_MAX, UINT32_MAX);
	tp_check_walk(check);
	if (tp_check_whole(check, map->bitmap_root))
		say_missing(check, map);
	check_bitmaps(check, map);
	check_totals(check, map);
}

static void visit_overflow_leaf(void *argument, unsigned thread, uint64_t block, const void *data,
				int status)
{
	struct tp_check *check = argument;
	struct tp_walk_fault fault;
	struct tp_walk_node node;

	(void)thread;
	(void)status;
	if (!data || !tp_walk_node_parse(data, TP_REF_COUNT_VALUE_SIZE, &node, &fault) ||
	    !node.leaf)
		return; /* changed since the walk: nothing to compare */
	for (uint32_t i = 0; i < node.nr_entries; i++)
		tp_check_overflow_entry(check, block, tp_walk_key(&node, i),
					tp_walk_get32(tp_walk_value(&node, i)));
}

/* Its own blocks count too, so that it is compared only after all of them were seen. */
static void check_metadata_map(struct tp_check *check)
{
	struct tp_check_space_map *map = &check->metadata_map;

	check->visiting = map;
	check->comparing_overflow = false;
	read_metadata_index(check);
	tp_check_refer(check, TP_USE_METADATA_OVERFLOW, map->overflow_root, TP_SUPERBLOCK_LOCATION,
		       UINT64_MAX, UINT32_MAX);
	tp_check_walk(check);

	memset(check->level, 0, tp_walk_words(check->nr_blocks) * 8);
	for (uint64_t block = 0; block < check->nr_blocks; block++)
		if (check->uses[block] == TP_USE_METADATA_OVERFLOW &&
		    (check->infos[block].state & (TP_INFO_USABLE | TP_INFO_INTERNAL)) ==
			    TP_INFO_USABLE)
			tp_walk_bit_set(check->level, block);
	tp_walk_blocks(check->reader, check->level, check->nr_blocks, visit_overflow_leaf, check);
	check_bitmaps(check, map);
	check_totals(check, map);
}

int tp_check_space_maps(struct tp_check *check, struct tp_error *err)
{
	if (check->data_counts.failed || check->counts.failed)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for reference counts");
	check_data_map(check);
	check_metadata_map(check);
	return 0;
}
