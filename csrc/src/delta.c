/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What differs between two devices, without reading what they share.
 *
 * Both trees are expanded a level at a time, from the higher one's root down. At each height the
 * nodes that stand in both lists are dropped: the same block holds the same mappings for both. So
 * the work is that of the nodes that were copied since the two parted. The leaves that are left are
 * read in windows of bounded size and merged.
 *
 * A node's height is counted from the leaves, since a shared subtree may hang at different levels.
 */
#include <stdlib.h>

#include "thinpool/error.h"
#include "thinpool/walk.h"

#define WINDOW_LEAVES 4096u /* of each side, 16 MiB: copies lie in the order of the writes */
#define BATCH_NODES   512u
#define SEEN_NODES    8u

struct node_ref {
	uint64_t key; /* its separator: no key in it or after it is below */
	uint64_t block;
};

struct side {
	struct node_ref *nodes; /* of the current height, in key order */
	size_t nr;
	unsigned height; /* of nodes */
	/* the window */
	size_t first; /* leaf */
	size_t nr_leaves;
	uint8_t *slots;
	uint64_t *blocks;
	int *statuses;
	size_t at; /* leaf in the window that is being merged */
	struct tp_walk_node leaf;
	bool leaf_valid;
	uint32_t index;
	uint64_t last_key;
	bool any_key;
	uint64_t key; /* of the entry at hand; valid unless ended */
	uint64_t data_block;
	bool ended; /* nothing more below the window's bound */
};

/* A node on the way down to the leaves: both sides pass the same ones, and come again to expand. */
struct seen {
	uint64_t block;
	uint8_t data[TP_MD_BLOCK_SIZE];
};

struct tp_delta {
	struct tp_walk_reader *reader;
	struct seen seen[SEEN_NODES];
	unsigned nr_seen; /* may go past SEEN_NODES: the oldest is replaced */
	struct tp_delta_options options;
	struct side left;
	struct side right;
	uint64_t bound; /* keys below are merged in this window */
	bool last_window;
	bool finished;
	struct tp_delta_run run; /* begun; length 0: none */
	struct tp_delta_run *runs;
	size_t nr_runs;
	size_t next_run;
	size_t runs_room;
};

/* ---- expansion --------------------------------------------------------------------------- */

static int read_node(struct tp_delta *delta, uint64_t block, uint8_t *data, struct tp_error *err)
{
	struct seen *seen;
	int rc;

	for (unsigned i = 0; i < SEEN_NODES && i < delta->nr_seen; i++)
		if (delta->seen[i].block == block) {
			memcpy(data, delta->seen[i].data, TP_MD_BLOCK_SIZE);
			return 0;
		}
	rc = tp_walk_read(delta->reader, block, data, err);
	if (rc)
		return rc;
	seen = &delta->seen[delta->nr_seen++ % SEEN_NODES];
	seen->block = block;
	memcpy(seen->data, data, TP_MD_BLOCK_SIZE);
	return 0;
}

/* Levels below a root, along its first children. */
static int find_height(struct tp_delta *delta, uint64_t block, unsigned *height_ret,
		       struct tp_error *err)
{
	uint8_t data[TP_MD_BLOCK_SIZE] __attribute__((aligned(4096)));
	struct tp_walk_node node;

	for (unsigned height = 0; height < TP_WALK_LEVELS_MAX; height++) {
		int rc = read_node(delta, block, data, err);

		if (!rc)
			rc = tp_walk_node_load(data, block, TP_MAPPING_VALUE_SIZE, &node, err);
		if (rc)
			return rc;
		if (node.leaf) {
			*height_ret = height;
			return 0;
		}
		block = tp_walk_value64(&node, 0);
	}
	return tp_fail_block(err, TP_E_NODE_MALFORMED, block, 0, 0,
			     "a tree of more than %u levels: it runs in a circle",
			     TP_WALK_LEVELS_MAX);
}

static int add_child(struct tp_delta *delta, struct node_ref **nodes, size_t *nr, size_t *room,
		     struct node_ref child, struct tp_error *err)
{
	if (*nr && child.key <= (*nodes)[*nr - 1].key)
		return tp_fail_block(
			err, TP_E_NODE_MALFORMED, child.block, child.key, (*nodes)[*nr - 1].key + 1,
			"metadata block %llu: its separator %llu is not above the one "
			"before it",
			(unsigned long long)child.block, (unsigned long long)child.key);
	if (*nr >= tp_walk_reader_nr_blocks(delta->reader))
		return tp_fail_block(err, TP_E_NODE_MALFORMED, child.block, 0, 0,
				     "a tree with more nodes than the device has blocks");
	if (*nr == *room) {
		size_t grown_room = *room ? *room * 2 : 1024;
		struct node_ref *grown = realloc(*nodes, grown_room * sizeof(*grown));

		if (!grown)
			return tp_fail(err, TP_E_NO_MEMORY, "no memory for %zu nodes", grown_room);
		*nodes = grown;
		*room = grown_room;
	}
	(*nodes)[(*nr)++] = child;
	return 0;
}

/* The children of nodes [first, first + nr) onto the end of a list. */
static int expand_batch(struct tp_delta *delta, const struct side *side, size_t first, size_t nr,
			struct node_ref **nodes, size_t *nr_nodes, size_t *room,
			struct tp_error *err)
{
	uint64_t blocks[BATCH_NODES];
	int statuses[BATCH_NODES];
	uint8_t *slots = malloc(nr * TP_MD_BLOCK_SIZE);
	int rc;

	if (!slots)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for %zu nodes", nr);
	for (size_t i = 0; i < nr; i++)
		blocks[i] = side->nodes[first + i].block;
	if (nr == 1) {
		statuses[0] = 0;
		rc = read_node(delta, blocks[0], slots, err);
	} else {
		rc = tp_walk_read_list(delta->reader, blocks, nr, slots, statuses, err);
	}
	for (size_t i = 0; !rc && i < nr; i++) {
		const struct node_ref *ref = &side->nodes[first + i];
		uint8_t *data = slots + i * TP_MD_BLOCK_SIZE;
		struct tp_walk_node node;

		if (statuses[i])
			rc = tp_walk_read(delta->reader, ref->block, data, err);
		if (!rc)
			rc = tp_walk_node_load(data, ref->block, TP_MAPPING_VALUE_SIZE, &node, err);
		if (!rc && node.leaf)
			rc = tp_fail_block(err, TP_E_NODE_MALFORMED, ref->block, 0, side->height,
					   "metadata block %llu is a leaf, %u levels above the "
					   "others",
					   (unsigned long long)ref->block, side->height);
		for (uint32_t k = 0; !rc && k < node.nr_entries; k++)
			rc = add_child(delta, nodes, nr_nodes, room,
				       (struct node_ref){ .key = tp_walk_key(&node, k),
							  .block = tp_walk_value64(&node, k) },
				       err);
	}
	free(slots);
	return rc;
}

static int expand(struct tp_delta *delta, struct side *side, struct tp_error *err)
{
	struct node_ref *nodes = NULL;
	size_t nr_nodes = 0, room = 0;
	int rc = 0;

	for (size_t i = 0; !rc && i < side->nr; i += BATCH_NODES)
		rc = expand_batch(delta, side, i,
				  side->nr - i < BATCH_NODES ? side->nr - i : BATCH_NODES, &nodes,
				  &nr_nodes, &room, err);
	if (rc) {
		free(nodes);
		return rc;
	}
	free(side->nodes);
	side->nodes = nodes;
	side->nr = nr_nodes;
	side->height--;
	return 0;
}

static int compare_numbers(const void *a, const void *b)
{
	uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;

	return (left > right) - (left < right);
}

static uint64_t *sorted_blocks(const struct side *side)
{
	uint64_t *blocks = malloc((side->nr ? side->nr : 1) * sizeof(*blocks));

	for (size_t i = 0; blocks && i < side->nr; i++)
		blocks[i] = side->nodes[i].block;
	if (blocks)
		qsort(blocks, side->nr, sizeof(*blocks), compare_numbers);
	return blocks;
}

/* Keep the nodes that are not in a sorted list. */
static void keep_others(struct side *side, const uint64_t *blocks, size_t nr)
{
	size_t kept = 0;

	for (size_t i = 0; i < side->nr; i++)
		if (!bsearch(&side->nodes[i].block, blocks, nr, sizeof(*blocks), compare_numbers))
			side->nodes[kept++] = side->nodes[i];
	side->nr = kept;
}

static int drop_shared(struct tp_delta *delta, struct tp_error *err)
{
	uint64_t *left = sorted_blocks(&delta->left);
	uint64_t *right = sorted_blocks(&delta->right);
	size_t nr_left = delta->left.nr, nr_right = delta->right.nr;
	int rc = 0;

	if (left && right) {
		keep_others(&delta->left, right, nr_right);
		keep_others(&delta->right, left, nr_left);
	} else {
		rc = tp_fail(err, TP_E_NO_MEMORY, "no memory for %zu nodes", nr_left + nr_right);
	}
	free(left);
	free(right);
	return rc;
}

static int expand_all(struct tp_delta *delta, struct tp_error *err)
{
	struct side *left = &delta->left, *right = &delta->right;
	int rc = 0;

	for (;;) {
		unsigned height = left->height > right->height ? left->height : right->height;

		if (left->height == right->height && !delta->options.with_same)
			rc = drop_shared(delta, err);
		if (rc || height == 0)
			return rc;
		if (left->height == height)
			rc = expand(delta, left, err);
		if (!rc && right->height == height)
			rc = expand(delta, right, err);
		if (rc)
			return rc;
	}
}

/* ---- open, close ------------------------------------------------------------------------- */

static int side_init(struct tp_delta *delta, struct side *side, uint64_t root, struct tp_error *err)
{
	side->nodes = malloc(sizeof(*side->nodes));
	side->slots = malloc((size_t)WINDOW_LEAVES * TP_MD_BLOCK_SIZE);
	side->blocks = malloc(WINDOW_LEAVES * sizeof(*side->blocks));
	side->statuses = malloc(WINDOW_LEAVES * sizeof(*side->statuses));
	if (!side->nodes || !side->slots || !side->blocks || !side->statuses)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a delta");
	side->nodes[0] = (struct node_ref){ .key = 0, .block = root };
	side->nr = 1;
	return find_height(delta, root, &side->height, err);
}

static void side_deinit(struct side *side)
{
	free(side->nodes);
	free(side->slots);
	free(side->blocks);
	free(side->statuses);
}

static int find_root(struct tp_delta *delta, const struct tp_walk_superblock *superblock,
		     uint64_t id, uint64_t *root_ret, struct tp_error *err)
{
	int rc = tp_walk_lookup(delta->reader, superblock->mapping_root, id, root_ret, err);

	if (rc == TP_E_KEY_NOT_FOUND)
		return tp_fail(err, TP_E_VOLUME_NOT_FOUND, "device %llu is not in this metadata",
			       (unsigned long long)id);
	return rc;
}

static int start(struct tp_delta *delta, struct tp_bdev *metadata, struct tp_error *err)
{
	const struct tp_delta_options *options = &delta->options;
	struct tp_walk_superblock superblock;
	uint64_t left, right;
	int rc = tp_walk_reader_create(metadata, options->nr_threads, &delta->reader, err);

	if (!rc)
		rc = tp_walk_superblock_read(delta->reader, options->use_metadata_snapshot,
					     &superblock, err);
	if (!rc)
		rc = find_root(delta, &superblock, options->left, &left, err);
	if (!rc)
		rc = find_root(delta, &superblock, options->right, &right, err);
	if (!rc)
		rc = side_init(delta, &delta->left, left, err);
	if (!rc)
		rc = side_init(delta, &delta->right, right, err);
	return rc ? rc : expand_all(delta, err);
}

int tp_delta_open(struct tp_bdev *metadata, const struct tp_delta_options *options,
		  struct tp_delta **delta_ret, struct tp_error *err)
{
	struct tp_delta *delta = calloc(1, sizeof(*delta));
	int rc;

	if (!delta)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a delta");
	delta->options = *options;
	rc = start(delta, metadata, err);
	if (rc) {
		tp_delta_close(delta);
		return rc;
	}
	*delta_ret = delta;
	return 0;
}

void tp_delta_close(struct tp_delta *delta)
{
	if (!delta)
		return;
	side_deinit(&delta->left);
	side_deinit(&delta->right);
	free(delta->runs);
	tp_walk_reader_destroy(delta->reader);
	free(delta);
}

/* ---- windows ----------------------------------------------------------------------------- */

static uint64_t window_bound(const struct side *side, bool *last)
{
	if (side->nr - side->first <= WINDOW_LEAVES)
		return UINT64_MAX;
	*last = false;
	return side->nodes[side->first + WINDOW_LEAVES].key;
}

static int side_load(struct tp_delta *delta, struct side *side, struct tp_error *err)
{
	size_t nr = 0;

	while (nr < WINDOW_LEAVES && side->first + nr < side->nr &&
	       (delta->last_window || side->nodes[side->first + nr].key < delta->bound)) {
		side->blocks[nr] = side->nodes[side->first + nr].block;
		nr++;
	}
	side->nr_leaves = nr;
	side->at = 0;
	side->leaf_valid = false;
	side->ended = false;
	return tp_walk_read_list(delta->reader, side->blocks, nr, side->slots, side->statuses, err);
}

static int side_load_leaf(struct tp_delta *delta, struct side *side, struct tp_error *err)
{
	uint64_t block = side->blocks[side->at];
	uint8_t *data = side->slots + side->at * TP_MD_BLOCK_SIZE;
	int rc = side->statuses[side->at] ? tp_walk_read(delta->reader, block, data, err) : 0;

	if (!rc)
		rc = tp_walk_node_load(data, block, TP_MAPPING_VALUE_SIZE, &side->leaf, err);
	if (rc)
		return rc;
	if (!side->leaf.leaf)
		return tp_fail_block(err, TP_E_NODE_MALFORMED, block, 0, 0,
				     "metadata block %llu is no leaf, as the others beside it are",
				     (unsigned long long)block);
	side->leaf_valid = true;
	side->index = 0;
	/* A leaf that spans the bound comes again in the next window. */
	while (side->any_key && side->index < side->leaf.nr_entries &&
	       tp_walk_key(&side->leaf, side->index) <= side->last_key)
		side->index++;
	if (side->index && side->at)
		return tp_fail_block(err, TP_E_NODE_MALFORMED, block, tp_walk_key(&side->leaf, 0),
				     side->last_key + 1,
				     "metadata block %llu: its first key is not above the leaf "
				     "before it",
				     (unsigned long long)block);
	return 0;
}

/* Bring the next entry to hand. */
static int side_step(struct tp_delta *delta, struct side *side, struct tp_error *err)
{
	while (side->at < side->nr_leaves) {
		if (!side->leaf_valid) {
			int rc = side_load_leaf(delta, side, err);

			if (rc)
				return rc;
		}
		if (side->index == side->leaf.nr_entries) {
			side->at++;
			side->leaf_valid = false;
			continue;
		}
		side->key = tp_walk_key(&side->leaf, side->index);
		if (!delta->last_window && side->key >= delta->bound)
			break;
		side->data_block = tp_mapping_block(tp_walk_value64(&side->leaf, side->index));
		side->last_key = side->key;
		side->any_key = true;
		side->index++;
		return 0;
	}
	side->ended = true;
	side->first += side->at;
	return 0;
}

/* ---- runs -------------------------------------------------------------------------------- */

static int flush_run(struct tp_delta *delta, struct tp_error *err)
{
	if (!delta->run.length)
		return 0;
	if (delta->nr_runs == delta->runs_room) {
		size_t room = delta->runs_room ? delta->runs_room * 2 : 1024;
		struct tp_delta_run *grown = realloc(delta->runs, room * sizeof(*grown));

		if (!grown)
			return tp_fail(err, TP_E_NO_MEMORY, "no memory for %zu runs", room);
		delta->runs = grown;
		delta->runs_room = room;
	}
	delta->runs[delta->nr_runs++] = delta->run;
	delta->run.length = 0;
	return 0;
}

static bool follows(uint64_t begin, uint64_t length, uint64_t block)
{
	return begin == UINT64_MAX || block == begin + length;
}

static int emit(struct tp_delta *delta, enum tp_delta_kind kind, uint64_t key, uint64_t left,
		uint64_t right, struct tp_error *err)
{
	struct tp_delta_run *run = &delta->run;
	int rc;

	if (run->length && run->kind == (uint32_t)kind && key == run->begin + run->length &&
	    (!delta->options.by_data_block ||
	     (follows(run->left_data_begin, run->length, left) &&
	      follows(run->right_data_begin, run->length, right)))) {
		run->length++;
		return 0;
	}
	rc = flush_run(delta, err);
	*run = (struct tp_delta_run){
		.begin = key,
		.length = 1,
		.left_data_begin = left,
		.right_data_begin = right,
		.kind = (uint32_t)kind,
	};
	return rc;
}

static int merge_window(struct tp_delta *delta, struct tp_error *err)
{
	struct side *left = &delta->left, *right = &delta->right;
	int rc = side_step(delta, left, err) ?: side_step(delta, right, err);

	while (!rc && !(left->ended && right->ended)) {
		bool take_left = !left->ended && (right->ended || left->key <= right->key);
		bool take_right = !right->ended && (left->ended || right->key <= left->key);

		if (take_left && take_right) {
			bool same = left->data_block == right->data_block;

			if (!same || delta->options.with_same)
				rc = emit(delta, same ? TP_DELTA_SAME : TP_DELTA_DIFFERENT,
					  left->key, left->data_block, right->data_block, err);
		} else if (take_left) {
			rc = emit(delta, TP_DELTA_LEFT_ONLY, left->key, left->data_block,
				  UINT64_MAX, err);
		} else {
			rc = emit(delta, TP_DELTA_RIGHT_ONLY, right->key, UINT64_MAX,
				  right->data_block, err);
		}
		if (!rc && take_left)
			rc = side_step(delta, left, err);
		if (!rc && take_right)
			rc = side_step(delta, right, err);
	}
	return rc;
}

static int next_window(struct tp_delta *delta, struct tp_error *err)
{
	uint64_t left, right;
	int rc;

	delta->last_window = true;
	left = window_bound(&delta->left, &delta->last_window);
	right = window_bound(&delta->right, &delta->last_window);
	delta->bound = left < right ? left : right;
	rc = side_load(delta, &delta->left, err) ?: side_load(delta, &delta->right, err);
	if (!rc)
		rc = merge_window(delta, err);
	if (!rc && delta->last_window) {
		delta->finished = true;
		rc = flush_run(delta, err);
	}
	return rc;
}

int tp_delta_next(struct tp_delta *delta, struct tp_delta_run *runs, size_t max, size_t *count_ret,
		  struct tp_error *err)
{
	size_t count = 0;

	*count_ret = 0;
	while (count < max) {
		size_t nr = delta->nr_runs - delta->next_run;

		if (nr == 0) {
			int rc;

			if (delta->finished)
				break;
			delta->nr_runs = 0;
			delta->next_run = 0;
			rc = next_window(delta, err);
			if (rc)
				return rc;
			continue;
		}
		nr = nr < max - count ? nr : max - count;
		memcpy(runs + count, delta->runs + delta->next_run, nr * sizeof(*runs));
		delta->next_run += nr;
		count += nr;
	}
	*count_ret = count;
	return 0;
}
