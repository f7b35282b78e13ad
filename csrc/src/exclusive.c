/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which data blocks only certain devices map.
 *
 * Every device has a label: one of its own (tp_exclusive_each), or one for the whole set
 * (tp_exclusive); all others, and the metadata snapshot's, are OTHERS. A node that is reached with
 * one label only carries that label; reached with two, it is OTHERS', and so is all below. A node
 * changes its label twice at most, so that the walk ends. Then the entries of all leaves are
 * counted per data block; what counts is what would be freed: the blocks all of whose entries
 * stand in leaves of the label.
 */
#include <stdlib.h>

#include "thinpool/check.h"
#include "thinpool/error.h"

#define OTHERS UINT32_MAX

struct wanted_id {
	uint64_t id;
	uint32_t label;
};

struct exclusive {
	struct tp_walk_reader *reader;
	uint64_t nr_blocks;
	uint64_t nr_data_blocks;
	uint32_t *labels; /* of metadata blocks; 0: not reached */
	uint64_t *level;
	uint64_t *next_level;
	uint64_t *leaves;
	struct tp_check_counts total;
	struct tp_check_counts ours; /* entries in leaves of label 1, for a set */
	uint64_t *claimed;           /* bits: data blocks of the set that were added up already */
	bool set;
	uint64_t *blocks; /* by label - 1 */
	pthread_mutex_t lock;
	struct tp_error first; /* under lock: the first failure; status 0: none */
};

static void fail(struct exclusive *e, const struct tp_error *err)
{
	pthread_mutex_lock(&e->lock);
	if (!e->first.status)
		e->first = *err;
	pthread_mutex_unlock(&e->lock);
	tp_walk_cancel(e->reader);
}

static int failed(struct exclusive *e, struct tp_error *err)
{
	if (!e->first.status && (e->total.failed || e->ours.failed))
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for reference counts");
	if (e->first.status && err)
		*err = e->first;
	return e->first.status;
}

/* False, and a failure, when the node cannot be used. */
static bool load(struct exclusive *e, uint64_t block, const void *data,
		 struct tp_walk_node *node_ret)
{
	struct tp_error err = { 0 };
	uint8_t again[TP_MD_BLOCK_SIZE] __attribute__((aligned(4096)));
	int rc = data ? 0 : tp_walk_read(e->reader, block, again, &err);

	if (!rc && !data)
		rc = tp_fail_block(&err, TP_E_IO, block, 0, 0, "metadata block %llu: read failed",
				   (unsigned long long)block);
	if (!rc)
		rc = tp_walk_node_load(data, block, TP_MAPPING_VALUE_SIZE, node_ret, &err);
	if (rc)
		fail(e, &err);
	return !rc;
}

static void mark(struct exclusive *e, uint64_t block, uint32_t label)
{
	uint32_t before = 0;

	if (block >= e->nr_blocks) {
		struct tp_error err = { 0 };

		tp_fail_block(&err, TP_E_NODE_MALFORMED, block, block, e->nr_blocks,
			      "a pointer to metadata block %llu, of %llu",
			      (unsigned long long)block, (unsigned long long)e->nr_blocks);
		fail(e, &err);
		return;
	}
	for (;;) {
		uint32_t after = before == 0 ? label : OTHERS;

		if (before == label || before == OTHERS)
			return;
		if (__atomic_compare_exchange_n(&e->labels[block], &before, after, false,
						__ATOMIC_RELAXED, __ATOMIC_RELAXED))
			break;
	}
	tp_walk_bit_set(e->next_level, block);
}

static void visit_level(void *argument, unsigned thread, uint64_t block, const void *data,
			int status)
{
	struct exclusive *e = argument;
	struct tp_walk_node node;
	uint32_t label;

	(void)thread;
	(void)status;
	if (!load(e, block, data, &node))
		return;
	if (node.leaf) {
		tp_walk_bit_set(e->leaves, block);
		return;
	}
	label = __atomic_load_n(&e->labels[block], __ATOMIC_RELAXED);
	for (uint32_t i = 0; i < node.nr_entries; i++)
		mark(e, tp_walk_value64(&node, i), label);
}

static void visit_count(void *argument, unsigned thread, uint64_t block, const void *data,
			int status)
{
	struct exclusive *e = argument;
	struct tp_walk_node node;
	bool ours = e->set && e->labels[block] != OTHERS;

	(void)thread;
	(void)status;
	if (!load(e, block, data, &node))
		return;
	for (uint32_t i = 0; i < node.nr_entries; i++) {
		uint64_t data_block = tp_mapping_block(tp_walk_value64(&node, i));

		if (data_block >= e->nr_data_blocks) {
			struct tp_error err = { 0 };

			tp_fail_block(&err, TP_E_MAPPING_OUT_OF_RANGE, block, data_block,
				      e->nr_data_blocks,
				      "metadata block %llu maps data block %llu, of %llu",
				      (unsigned long long)block, (unsigned long long)data_block,
				      (unsigned long long)e->nr_data_blocks);
			fail(e, &err);
			return;
		}
		tp_check_counts_add(&e->total, data_block);
		if (ours)
			tp_check_counts_add(&e->ours, data_block);
	}
}

/* Whether an entry of ours is to be added up: nobody else maps its block. */
static bool adds_up(struct exclusive *e, uint64_t data_block)
{
	uint64_t total = tp_check_counts_get(&e->total, data_block);

	if (!e->set)
		return total == 1;
	return tp_check_counts_get(&e->ours, data_block) == total &&
	       tp_walk_bit_set(e->claimed, data_block);
}

static void visit_ours(void *argument, unsigned thread, uint64_t block, const void *data,
		       int status)
{
	struct exclusive *e = argument;
	uint32_t label = e->labels[block];
	struct tp_walk_node node;
	uint64_t nr = 0;

	(void)thread;
	(void)status;
	if (label == OTHERS || !load(e, block, data, &node))
		return;
	for (uint32_t i = 0; i < node.nr_entries; i++) {
		uint64_t data_block = tp_mapping_block(tp_walk_value64(&node, i));

		if (data_block < e->nr_data_blocks)
			nr += adds_up(e, data_block);
	}
	__atomic_fetch_add(&e->blocks[label - 1], nr, __ATOMIC_RELAXED);
}

/* ---- labels ------------------------------------------------------------------------------ */

static int compare_wanted(const void *a, const void *b)
{
	const struct wanted_id *left = a, *right = b;

	return (left->id > right->id) - (left->id < right->id);
}

static int mark_devices(struct exclusive *e, const struct tp_walk_superblock *superblock,
			const struct wanted_id *wanted, size_t nr_wanted, struct tp_error *err)
{
	struct tp_walk_device *devices;
	uint64_t nr_devices;
	size_t at = 0;
	int rc = tp_walk_devices(e->reader, superblock, &devices, &nr_devices, err);

	if (rc)
		return rc;
	for (uint64_t i = 0; i < nr_devices; i++) {
		bool ours = at < nr_wanted && wanted[at].id == devices[i].id;

		if (at < nr_wanted && wanted[at].id < devices[i].id)
			break;
		mark(e, devices[i].root, ours ? wanted[at].label : OTHERS);
		at += ours;
	}
	free(devices);
	if (at < nr_wanted)
		return tp_fail(err, TP_E_VOLUME_NOT_FOUND, "device %llu is not in this metadata",
			       (unsigned long long)wanted[at].id);
	return failed(e, err);
}

static struct wanted_id *sort_ids(const uint64_t *ids, size_t nr_ids, bool set,
				  struct tp_error *err)
{
	struct wanted_id *wanted = malloc((nr_ids ? nr_ids : 1) * sizeof(*wanted));

	if (!wanted || nr_ids >= OTHERS) {
		free(wanted);
		tp_fail(err, TP_E_NO_MEMORY, "no memory for %zu devices", nr_ids);
		return NULL;
	}
	for (size_t i = 0; i < nr_ids; i++)
		wanted[i] = (struct wanted_id){ ids[i], set ? 1 : (uint32_t)i + 1 };
	qsort(wanted, nr_ids, sizeof(*wanted), compare_wanted);
	return wanted;
}

/* ---- the walk ---------------------------------------------------------------------------- */

static int label_nodes(struct exclusive *e, struct tp_error *err)
{
	size_t bytes = tp_walk_words(e->nr_blocks) * 8;

	/* Each level once, and once more for what became the others' on the way. */
	for (unsigned round = 0; round < 2 * TP_WALK_LEVELS_MAX; round++) {
		uint64_t *swap = e->level;

		if (tp_walk_bit_next(e->next_level, 0, e->nr_blocks) == e->nr_blocks)
			return failed(e, err);
		e->level = e->next_level;
		e->next_level = swap;
		memset(e->next_level, 0, bytes);
		tp_walk_blocks(e->reader, e->level, e->nr_blocks, visit_level, e);
		if (failed(e, err))
			return e->first.status;
	}
	return tp_fail(err, TP_E_NODE_MALFORMED,
		       "a tree of more than %u levels: it runs in a circle", TP_WALK_LEVELS_MAX);
}

static int count_blocks(struct exclusive *e, struct tp_error *err)
{
	int rc;

	tp_walk_blocks(e->reader, e->leaves, e->nr_blocks, visit_count, e);
	rc = failed(e, err);
	if (rc)
		return rc;
	tp_walk_blocks(e->reader, e->leaves, e->nr_blocks, visit_ours, e);
	return failed(e, err);
}

static int make_tables(struct exclusive *e, const struct tp_walk_superblock *live,
		       struct tp_error *err)
{
	uint64_t bytes, limit;

	e->nr_blocks = tp_walk_reader_nr_blocks(e->reader);
	if (e->nr_blocks > TP_MD_BLOCKS_MAX)
		e->nr_blocks = TP_MD_BLOCKS_MAX;
	/* Each data block needs its place in a bitmap. */
	limit = e->nr_blocks * TP_BITMAP_ENTRIES;
	e->nr_data_blocks = live->data_nr_blocks < limit ? live->data_nr_blocks : limit;
	bytes = tp_walk_words(e->nr_blocks) * 8;
	e->labels = tp_walk_map(e->nr_blocks * sizeof(*e->labels));
	e->level = tp_walk_map(bytes);
	e->next_level = tp_walk_map(bytes);
	e->leaves = tp_walk_map(bytes);
	if (!e->labels || !e->level || !e->next_level || !e->leaves)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for %llu metadata blocks",
			       (unsigned long long)e->nr_blocks);
	if (e->set) {
		int rc = tp_check_counts_init(&e->ours, e->nr_data_blocks, 0, err);

		e->claimed = tp_walk_map(tp_walk_words(e->nr_data_blocks) * 8);
		if (!rc && !e->claimed)
			rc = tp_fail(err, TP_E_NO_MEMORY, "no memory for %llu data blocks",
				     (unsigned long long)e->nr_data_blocks);
		if (rc)
			return rc;
	}
	return tp_check_counts_init(&e->total, e->nr_data_blocks, 0, err);
}

static int work(struct exclusive *e, bool use_metadata_snapshot, const struct wanted_id *wanted,
		size_t nr_wanted, struct tp_error *err)
{
	struct tp_walk_superblock live, held;
	bool has_held;
	int rc = tp_walk_superblock_read(e->reader, false, &live, err);

	has_held = !rc && (live.held_root || use_metadata_snapshot);
	if (has_held)
		rc = tp_walk_superblock_read(e->reader, true, &held, err);
	if (!rc)
		rc = make_tables(e, &live, err);
	if (!rc)
		rc = mark_devices(e, use_metadata_snapshot ? &held : &live, wanted, nr_wanted, err);
	if (!rc && has_held && !use_metadata_snapshot)
		rc = mark_devices(e, &held, NULL, 0, err);
	if (!rc)
		rc = label_nodes(e, err);
	return rc ? rc : count_blocks(e, err);
}

static int exclusive(struct tp_bdev *metadata, bool use_metadata_snapshot, bool set,
		     const uint64_t *ids, size_t nr_ids, uint64_t *blocks_ret, struct tp_error *err)
{
	struct exclusive e = { .set = set, .blocks = blocks_ret };
	struct wanted_id *wanted = sort_ids(ids, nr_ids, set, err);
	uint64_t bytes;
	int rc = 0;

	if (!wanted)
		return TP_E_NO_MEMORY;
	for (size_t i = 1; !rc && i < nr_ids; i++)
		if (wanted[i].id == wanted[i - 1].id)
			rc = tp_fail(err, TP_E_INVALID, "device %llu is named twice",
				     (unsigned long long)wanted[i].id);
	memset(blocks_ret, 0, (set ? 1 : nr_ids) * sizeof(*blocks_ret));
	pthread_mutex_init(&e.lock, NULL);
	if (!rc)
		rc = tp_walk_reader_create(metadata, 0, &e.reader, err);
	if (!rc)
		rc = work(&e, use_metadata_snapshot, wanted, nr_ids, err);
	bytes = tp_walk_words(e.nr_blocks) * 8;
	tp_check_counts_deinit(&e.total);
	tp_check_counts_deinit(&e.ours);
	tp_walk_unmap(e.labels, e.nr_blocks * sizeof(*e.labels));
	tp_walk_unmap(e.level, bytes);
	tp_walk_unmap(e.next_level, bytes);
	tp_walk_unmap(e.leaves, bytes);
	tp_walk_unmap(e.claimed, tp_walk_words(e.nr_data_blocks) * 8);
	tp_walk_reader_destroy(e.reader);
	pthread_mutex_destroy(&e.lock);
	free(wanted);
	return rc;
}

int tp_exclusive(struct tp_bdev *metadata, uint32_t use_metadata_snapshot, const uint64_t *ids,
		 size_t nr_ids, uint64_t *blocks_ret, struct tp_error *err)
{
	return exclusive(metadata, use_metadata_snapshot, true, ids, nr_ids, blocks_ret, err);
}

int tp_exclusive_each(struct tp_bdev *metadata, uint32_t use_metadata_snapshot, const uint64_t *ids,
		      size_t nr_ids, uint64_t *blocks_ret, struct tp_error *err)
{
	return exclusive(metadata, use_metadata_snapshot, false, ids, nr_ids, blocks_ret, err);
}
