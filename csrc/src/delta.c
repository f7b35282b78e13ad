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
 * But finding it costs reads down to a leaf, one after the other, and roots that have a child in
 * common have one height: all leaves of a tree are equally far below it. So both sides mostly go
 * down together without knowing how far.
 *
 * Of a few hundred nodes a delta consists of waiting: each level is read at once, both sides
 * together, into memory that it is used in.
 */
#include <stdlib.h>

#include "thinpool/error.h"
#include "thinpool/walk.h"

#define WINDOW      4096u /* nodes of each side: copies lie in the order of the writes */
#define MATCH_WORDS 4u    /* bits for all entries of an internal node */
#define SAME_STEP   16u

struct node_ref {
	uint64_t key; /* its separator: no key in it or after it is below */
	uint64_t block;
};

struct side {
	struct node_ref *nodes; /* of the current height, in key order */
	size_t nr;
	size_t room;
	/* the window */
	size_t first; /* of these nodes */
	size_t nr_here;
	size_t list; /* its first one's place in the list that was read */
	/* merging */
	size_t at; /* leaf in the window */
	struct tp_walk_node leaf;
	bool leaf_valid;
	uint32_t index;
	uint32_t end; /* of the leaf's entries below the window's bound */
	uint64_t last_key;
	bool any_key;
	bool ended; /* nothing more below the window's bound; else there is an entry at index */
};

struct tp_delta {
	struct tp_walk_reader *reader;
	struct tp_walk_nodes *list; /* the window's nodes: the left ones, then the right ones */
	uint64_t *blocks;           /* of these */
	struct tp_delta_options options;
	struct side left;
	struct side right;
	uint64_t bound; /* keys below are merged in this window */
	bool last_window;
	bool loaded; /* the window was read to find out that it holds leaves */
	bool finished;
	struct tp_delta_run run; /* begun; length 0: none */
	struct tp_delta_run *runs;
	size_t nr_runs;
	size_t next_run;
	size_t runs_room;
};

/* ---- windows ----------------------------------------------------------------------------- */

static uint64_t window_bound(const struct side *side, bool *last)
{
	if (side->nr - side->first <= WINDOW)
		return UINT64_MAX;
	*last = false;
	return side->nodes[side->first + WINDOW].key;
}

static void side_choose(struct tp_delta *delta, struct side *side, size_t list)
{
	size_t nr = 0;

	while (nr < WINDOW && side->first + nr < side->nr &&
	       (delta->last_window || side->nodes[side->first + nr].key < delta->bound)) {
		delta->blocks[list + nr] = side->nodes[side->first + nr].block;
		nr++;
	}
	side->list = list;
	side->nr_here = nr;
}

/* The next nodes of both sides, as far as the shorter window reaches. */
static int load_window(struct tp_delta *delta, struct tp_error *err)
{
	uint64_t left, right;

	delta->last_window = true;
	left = window_bound(&delta->left, &delta->last_window);
	right = window_bound(&delta->right, &delta->last_window);
	delta->bound = left < right ? left : right;
	side_choose(delta, &delta->left, 0);
	side_choose(delta, &delta->right, delta->left.nr_here);
	return tp_walk_nodes_read(delta->list, delta->blocks,
				  delta->left.nr_here + delta->right.nr_here, err);
}

/* The same of one side, the other's window being empty. */
static int load_alone(struct tp_delta *delta, struct side *side, struct tp_error *err)
{
	delta->left.nr_here = 0;
	delta->right.nr_here = 0;
	delta->last_window = true;
	delta->bound = window_bound(side, &delta->last_window);
	side_choose(delta, side, 0);
	return tp_walk_nodes_read(delta->list, delta->blocks, side->nr_here, err);
}

static int get_node(struct tp_delta *delta, const struct side *side, size_t index,
		    const struct tp_walk_node **node_ret, struct tp_error *err)
{
	size_t i = side->list + index;

	return tp_walk_nodes_get(delta->list, delta->blocks[i], i, node_ret, err);
}

static int wrong_kind(const struct tp_walk_node *node, struct tp_error *err)
{
	return tp_fail_block(err, TP_E_NODE_MALFORMED, node->block, 0, 0,
			     "metadata block %llu is %s leaf, %s the others beside it",
			     (unsigned long long)node->block, node->leaf ? "a" : "no",
			     node->leaf ? "unlike" : "as are");
}

/* ---- shared children --------------------------------------------------------------------- */

/* Entries of an internal node that stand in its counterpart as well. */
struct matched {
	uint64_t bits[MATCH_WORDS];
};

static bool is_matched(const struct matched *matched, uint32_t index)
{
	return matched->bits[index / 64] >> index % 64 & 1;
}

static void match(const struct tp_walk_node *left, const struct tp_walk_node *right,
		  struct matched *in_left, struct matched *in_right)
{
	uint32_t i = 0, k = 0;

	_Static_assert(MATCH_WORDS * 64 >= TP_NODE_MAX_ENTRIES(TP_MAPPING_VALUE_SIZE) + 2,
		       "nodes of odd sizes hold that many");
	while (i < left->nr_entries && k < right->nr_entries) {
		uint64_t left_key = tp_walk_key(left, i), right_key = tp_walk_key(right, k);

		if (left_key == right_key &&
		    tp_walk_value64(left, i) == tp_walk_value64(right, k)) {
			in_left->bits[i / 64] |= UINT64_C(1) << i % 64;
			in_right->bits[k / 64] |= UINT64_C(1) << k % 64;
		}
		i += left_key <= right_key;
		k += right_key <= left_key;
	}
}

/* Numbers of blocks as a set; those past the end of the device are in none. */
static uint64_t *block_set(const struct tp_delta *delta, const struct side *side)
{
	uint64_t nr_blocks = tp_walk_reader_nr_blocks(delta->reader);
	uint64_t *bits = calloc(tp_walk_words(nr_blocks) + 1, sizeof(*bits));

	for (size_t i = 0; bits && i < side->nr; i++)
		if (side->nodes[i].block < nr_blocks)
			tp_walk_bit_set(bits, side->nodes[i].block);
	return bits;
}

static void keep_others(const struct tp_delta *delta, struct side *side, const uint64_t *bits)
{
	uint64_t nr_blocks = tp_walk_reader_nr_blocks(delta->reader);
	size_t kept = 0;

	for (size_t i = 0; i < side->nr; i++)
		if (side->nodes[i].block >= nr_blocks ||
		    !tp_walk_bit_get(bits, side->nodes[i].block))
			side->nodes[kept++] = side->nodes[i];
	side->nr = kept;
}

/* Of the current heights, wherever they hang. */
static int drop_shared(struct tp_delta *delta, struct tp_error *err)
{
	uint64_t *left, *right;
	int rc = 0;

	if (!delta->left.nr || !delta->right.nr)
		return 0;
	left = block_set(delta, &delta->left);
	right = block_set(delta, &delta->right);
	if (left && right) {
		keep_others(delta, &delta->left, right);
		keep_others(delta, &delta->right, left);
	} else {
		rc = tp_fail(err, TP_E_NO_MEMORY, "no memory to compare %zu nodes",
			     delta->left.nr + delta->right.nr);
	}
	free(left);
	free(right);
	return rc;
}

/* ---- expansion --------------------------------------------------------------------------- */

static int add_child(struct side *side, struct node_ref child, struct tp_error *err)
{
	if (side->nr == side->room) {
		size_t room = side->room ? side->room * 2 : 256;
		struct node_ref *grown = realloc(side->nodes, room * sizeof(*grown));

		if (!grown)
			return tp_fail(err, TP_E_NO_MEMORY, "no memory for %zu nodes", room);
		side->nodes = grown;
		side->room = room;
	}
	side->nodes[side->nr++] = child;
	return 0;
}

/* The children that only one side has, onto the end of a list. */
static int add_children(struct tp_delta *delta, struct side *below, const struct tp_walk_node *node,
			const struct matched *matched, struct tp_error *err)
{
	uint64_t first = tp_walk_key(node, 0);
	int rc = 0;

	if (below->any_key && first <= below->last_key)
		return tp_fail_block(err, TP_E_NODE_MALFORMED, node->block, first,
				     below->last_key + 1,
				     "metadata block %llu: its separator %llu is not above the one "
				     "before it",
				     (unsigned long long)node->block, (unsigned long long)first);
	below->any_key = true;
	below->last_key = tp_walk_key(node, node->nr_entries - 1);
	for (uint32_t i = 0; !rc && i < node->nr_entries; i++)
		if (!is_matched(matched, i))
			rc = add_child(below,
				       (struct node_ref){ .key = tp_walk_key(node, i),
							  .block = tp_walk_value64(node, i) },
				       err);
	if (!rc && below->nr > tp_walk_reader_nr_blocks(delta->reader))
		rc = tp_fail_block(err, TP_E_NODE_MALFORMED, node->block, 0, 0,
				   "a tree with more nodes than the device has blocks");
	return rc;
}

static const struct node_ref *ref_of(const struct side *side, size_t index)
{
	return index < side->nr_here ? &side->nodes[side->first + index] : NULL;
}

/* One node, or one of each side that stand at the same key. */
static int expand_next(struct tp_delta *delta, size_t *left_index, size_t *right_index,
		       struct side *left_below, struct side *right_below, struct tp_error *err)
{
	const struct node_ref *left_ref = ref_of(&delta->left, *left_index);
	const struct node_ref *right_ref = ref_of(&delta->right, *right_index);
	bool take_left = left_ref && (!right_ref || left_ref->key <= right_ref->key);
	bool take_right = right_ref && (!left_ref || right_ref->key <= left_ref->key);
	const struct tp_walk_node *left = NULL, *right = NULL;
	struct matched in_left = { 0 }, in_right = { 0 };
	int rc = 0;

	if (take_left)
		rc = get_node(delta, &delta->left, (*left_index)++, &left, err);
	if (!rc && take_right)
		rc = get_node(delta, &delta->right, (*right_index)++, &right, err);
	if (!rc && left && left->leaf)
		rc = wrong_kind(left, err);
	if (!rc && right && right->leaf)
		rc = wrong_kind(right, err);
	if (!rc && left && right && !delta->options.with_same)
		match(left, right, &in_left, &in_right);
	if (!rc && left)
		rc = add_children(delta, left_below, left, &in_left, err);
	if (!rc && right)
		rc = add_children(delta, right_below, right, &in_right, err);
	return rc;
}

/* The children of the window's nodes onto the ends of two lists. */
static int expand_window(struct tp_delta *delta, struct side *left_below, struct side *right_below,
			 struct tp_error *err)
{
	size_t left = 0, right = 0;
	int rc = 0;

	while (!rc && (left < delta->left.nr_here || right < delta->right.nr_here))
		rc = expand_next(delta, &left, &right, left_below, right_below, err);
	delta->left.first += left;
	delta->right.first += right;
	return rc;
}

static void take_level(struct side *side, struct side *below)
{
	free(side->nodes);
	*side = (struct side){ .nodes = below->nodes, .nr = below->nr, .room = below->room };
}

static bool any_left(const struct tp_delta *delta)
{
	return delta->left.first < delta->left.nr || delta->right.first < delta->right.nr;
}

/*
 * One level down, both sides. When there is none below, *leaves_ret, and the window that is loaded
 * is the first one to merge.
 */
static int expand(struct tp_delta *delta, bool *leaves_ret, struct tp_error *err)
{
	struct side left_below = { 0 }, right_below = { 0 };
	const struct tp_walk_node *node;
	int rc;

	rc = load_window(delta, err);
	if (!rc)
		rc = get_node(delta, delta->left.nr_here ? &delta->left : &delta->right, 0, &node,
			      err);
	*leaves_ret = !rc && node->leaf;
	if (rc || node->leaf)
		return rc;
	rc = expand_window(delta, &left_below, &right_below, err);
	while (!rc && any_left(delta)) {
		rc = load_window(delta, err);
		if (!rc)
			rc = expand_window(delta, &left_below, &right_below, err);
	}
	take_level(&delta->left, &left_below);
	take_level(&delta->right, &right_below);
	return rc;
}

/* One level down, one side. */
static int expand_alone(struct tp_delta *delta, struct side *side, struct tp_error *err)
{
	struct side below = { 0 };
	int rc = 0;

	while (!rc && side->first < side->nr) {
		rc = load_alone(delta, side, err);
		if (!rc)
			rc = expand_window(delta, &below, &below, err);
	}
	take_level(side, &below);
	return rc;
}

/* ---- descent ----------------------------------------------------------------------------- */

static int too_deep(uint64_t block, struct tp_error *err)
{
	return tp_fail_block(err, TP_E_NODE_MALFORMED, block, 0, 0,
			     "a tree of more than %u levels: it runs in a circle",
			     TP_WALK_LEVELS_MAX);
}

/* Levels below both roots, along the first children. */
static int find_heights(struct tp_delta *delta, unsigned heights[2], struct tp_error *err)
{
	uint64_t blocks[2] = { delta->left.nodes[0].block, delta->right.nodes[0].block };
	unsigned sides[2] = { 0, 1 };
	size_t nr = 2;

	for (unsigned level = 0; nr && level < TP_WALK_LEVELS_MAX; level++) {
		size_t nr_below = 0;

		int rc = tp_walk_nodes_read(delta->list, blocks, nr, err);

		if (rc)
			return rc;
		for (size_t i = 0; i < nr; i++) {
			const struct tp_walk_node *node;

			rc = tp_walk_nodes_get(delta->list, blocks[i], i, &node, err);
			if (rc)
				return rc;
			heights[sides[i]] = level;
			if (node->leaf)
				continue;
			sides[nr_below] = sides[i];
			blocks[nr_below++] = tp_walk_value64(node, 0);
		}
		nr = nr_below;
	}
	return nr ? too_deep(blocks[0], err) : 0;
}

/* Whether it can be seen from the roots that they are of one height. */
static int look_even(struct tp_delta *delta, bool *even_ret, struct tp_error *err)
{
	struct matched in_left = { 0 }, in_right = { 0 };
	const struct tp_walk_node *left, *right;
	int rc;

	rc = load_window(delta, err) ?: get_node(delta, &delta->left, 0, &left, err)
			?: get_node(delta, &delta->right, 0, &right, err);
	if (rc)
		return rc;
	*even_ret = left->leaf && right->leaf;
	if (left->leaf || right->leaf)
		return 0;
	match(left, right, &in_left, &in_right);
	for (unsigned i = 0; i < MATCH_WORDS; i++)
		*even_ret |= in_left.bits[i] != 0;
	return 0;
}

/* Bring both roots to one height. */
static int even_out(struct tp_delta *delta, struct tp_error *err)
{
	unsigned heights[2];
	bool even;
	int rc = look_even(delta, &even, err);

	if (rc || even)
		return rc;
	rc = find_heights(delta, heights, err);
	for (; !rc && heights[0] > heights[1]; heights[0]--)
		rc = expand_alone(delta, &delta->left, err);
	for (; !rc && heights[1] > heights[0]; heights[1]--)
		rc = expand_alone(delta, &delta->right, err);
	return rc;
}

/* From the roots to the leaves that are not shared, with their first window. */
static int descend(struct tp_delta *delta, struct tp_error *err)
{
	bool with_same = delta->options.with_same;
	int rc;

	if (!with_same && delta->left.nodes[0].block == delta->right.nodes[0].block) {
		delta->left.nr = 0;
		delta->right.nr = 0;
		return 0;
	}
	rc = even_out(delta, err);
	for (unsigned level = 0; !rc && !delta->loaded && any_left(delta); level++) {
		if (level == TP_WALK_LEVELS_MAX)
			return too_deep(delta->left.nr ? delta->left.nodes[0].block
						       : delta->right.nodes[0].block,
					err);
		if (!with_same)
			rc = drop_shared(delta, err);
		if (!rc && any_left(delta))
			rc = expand(delta, &delta->loaded, err);
	}
	return rc;
}

/* ---- open, close ------------------------------------------------------------------------- */

static int no_device(uint64_t id, struct tp_error *err)
{
	return tp_fail(err, TP_E_VOLUME_NOT_FOUND, "device %llu is not in this metadata",
		       (unsigned long long)id);
}

/* The roots of both devices' trees: down the tree of devices, both at once. */
static int find_roots(struct tp_delta *delta, const struct tp_walk_superblock *superblock,
		      uint64_t roots[2], struct tp_error *err)
{
	const uint64_t ids[2] = { delta->options.left, delta->options.right };

	roots[0] = superblock->mapping_root;
	roots[1] = superblock->mapping_root;
	for (unsigned level = 0; level < TP_WALK_LEVELS_MAX; level++) {
		uint64_t blocks[2] = { roots[0], roots[1] };
		bool leaf[2];
		int rc = tp_walk_nodes_read(delta->list, blocks, 2, err);

		if (rc)
			return rc;
		for (size_t i = 0; i < 2; i++) {
			const struct tp_walk_node *node;
			uint32_t index;

			rc = tp_walk_nodes_get(delta->list, blocks[i], i, &node, err);
			if (rc)
				return rc;
			index = tp_walk_node_find(node, ids[i]);
			leaf[i] = node->leaf;
			if (index == node->nr_entries ||
			    (node->leaf && tp_walk_key(node, index) != ids[i]))
				return no_device(ids[i], err);
			roots[i] = tp_walk_value64(node, index);
		}
		if (leaf[0] && leaf[1])
			return 0;
		if (leaf[0] != leaf[1])
			return tp_fail_block(err, TP_E_NODE_MALFORMED, blocks[!leaf[0]], 0, 0,
					     "the tree of devices is not equally deep");
	}
	return too_deep(roots[0], err);
}

static int side_init(struct side *side, uint64_t root, struct tp_error *err)
{
	return add_child(side, (struct node_ref){ .key = 0, .block = root }, err);
}

static int start(struct tp_delta *delta, struct tp_bdev *metadata, struct tp_error *err)
{
	const struct tp_delta_options *options = &delta->options;
	struct tp_walk_superblock superblock;
	uint64_t roots[2];
	int rc = tp_walk_reader_create(metadata, options->nr_threads, &delta->reader, err);

	if (!rc)
		rc = tp_walk_nodes_create(delta->reader, 2 * WINDOW, &delta->list, err);
	if (!rc && !(delta->blocks = malloc(2 * WINDOW * sizeof(*delta->blocks))))
		rc = tp_fail(err, TP_E_NO_MEMORY, "no memory for a delta");
	if (!rc)
		rc = tp_walk_superblock_read(delta->reader, options->use_metadata_snapshot,
					     &superblock, err);
	if (!rc)
		rc = find_roots(delta, &superblock, roots, err);
	if (!rc)
		rc = side_init(&delta->left, roots[0], err);
	if (!rc)
		rc = side_init(&delta->right, roots[1], err);
	return rc ? rc : descend(delta, err);
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
	free(delta->left.nodes);
	free(delta->right.nodes);
	free(delta->blocks);
	free(delta->runs);
	tp_walk_nodes_destroy(delta->list);
	tp_walk_reader_destroy(delta->reader);
	free(delta);
}

/* ---- entries ----------------------------------------------------------------------------- */

static uint64_t side_key(const struct side *side)
{
	return tp_walk_key(&side->leaf, side->index);
}

static uint64_t side_data_block(const struct side *side)
{
	return tp_mapping_block(tp_walk_value64(&side->leaf, side->index));
}

/* The first of a leaf's entries that is not below the window's bound. */
static uint32_t leaf_end(const struct tp_delta *delta, const struct tp_walk_node *leaf)
{
	uint32_t end = leaf->nr_entries;

	while (!delta->last_window && end && tp_walk_key(leaf, end - 1) >= delta->bound)
		end--;
	return end;
}

static int side_load_leaf(struct tp_delta *delta, struct side *side, struct tp_error *err)
{
	const struct tp_walk_node *leaf;
	int rc = get_node(delta, side, side->at, &leaf, err);

	if (rc)
		return rc;
	if (!leaf->leaf)
		return wrong_kind(leaf, err);
	side->leaf = *leaf;
	side->leaf_valid = true;
	side->index = 0;
	side->end = leaf_end(delta, leaf);
	/* A leaf that spans the bound comes again in the next window. */
	while (side->any_key && side->index < side->end && side_key(side) <= side->last_key)
		side->index++;
	if (side->index && side->at)
		return tp_fail_block(err, TP_E_NODE_MALFORMED, leaf->block, tp_walk_key(leaf, 0),
				     side->last_key + 1,
				     "metadata block %llu: its first key is not above the leaf "
				     "before it",
				     (unsigned long long)leaf->block);
	/* It is the last one then, so that every window gets somewhere. */
	if (side->end < leaf->nr_entries && side->at + 1 < side->nr_here)
		return tp_fail_block(err, TP_E_NODE_MALFORMED, leaf->block,
				     tp_walk_key(leaf, side->end), delta->bound,
				     "metadata block %llu: its last key is not below the leaf "
				     "after it",
				     (unsigned long long)leaf->block);
	return 0;
}

/* From index on, to the next entry there is. */
static int side_settle(struct tp_delta *delta, struct side *side, struct tp_error *err)
{
	while (side->at < side->nr_here) {
		int rc = side->leaf_valid ? 0 : side_load_leaf(delta, side, err);

		if (rc || side->index < side->end)
			return rc;
		if (side->end < side->leaf.nr_entries)
			break;
		side->at++;
		side->leaf_valid = false;
	}
	side->ended = true;
	side->first += side->at;
	return 0;
}

static int side_begin(struct tp_delta *delta, struct side *side, struct tp_error *err)
{
	side->at = 0;
	side->leaf_valid = false;
	side->ended = false;
	return side_settle(delta, side, err);
}

static int side_advance(struct tp_delta *delta, struct side *side, uint32_t nr,
			struct tp_error *err)
{
	side->index += nr;
	side->last_key = tp_walk_key(&side->leaf, side->index - 1);
	side->any_key = true;
	return side->index < side->end ? 0 : side_settle(delta, side, err);
}

/* Nonzero where two leaves' entries differ; times are not compared. */
static uint64_t difference(const struct side *left, const struct side *right, uint32_t ahead)
{
	size_t l = 8 * (size_t)(left->index + ahead), r = 8 * (size_t)(right->index + ahead);

	return (tp_walk_get64(left->leaf.keys + l) ^ tp_walk_get64(right->leaf.keys + r)) |
	       tp_mapping_block(tp_walk_get64(left->leaf.values + l) ^
				tp_walk_get64(right->leaf.values + r));
}

/* So many entries are the same from here on, in the leaves at hand. */
static uint32_t same_entries(const struct side *left, const struct side *right)
{
	uint32_t nr_left = left->end - left->index, nr_right = right->end - right->index;
	uint32_t nr = nr_left < nr_right ? nr_left : nr_right;
	uint32_t same = 0;

	if (nr && difference(left, right, 0))
		return 0;
	/* Several together without an exit between, so that they are compared as vectors. */
	for (; same + SAME_STEP <= nr; same += SAME_STEP) {
		uint64_t differ = 0;

		for (uint32_t i = 0; i < SAME_STEP; i++)
			differ |= difference(left, right, same + i);
		if (differ)
			break;
	}
	while (same < nr && !difference(left, right, same))
		same++;
	return same;
}

/* So many entries from here on differ and continue a run that has begun. */
static uint32_t differing_entries(const struct side *left, const struct side *right,
				  const struct tp_delta_run *run)
{
	uint32_t nr_left = left->end - left->index, nr_right = right->end - right->index;
	uint32_t nr = nr_left < nr_right ? nr_left : nr_right;
	uint64_t next = run->begin + run->length;
	uint32_t i;

	if (!run->length || run->kind != TP_DELTA_DIFFERENT)
		return 0;
	for (i = 0; i < nr; i++) {
		uint32_t l = left->index + i, r = right->index + i;

		if (tp_walk_key(&left->leaf, l) != next + i ||
		    tp_walk_key(&right->leaf, r) != next + i ||
		    tp_mapping_block(tp_walk_value64(&left->leaf, l)) ==
			    tp_mapping_block(tp_walk_value64(&right->leaf, r)))
			break;
	}
	return i;
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

static int merge_entry(struct tp_delta *delta, struct tp_error *err)
{
	struct side *left = &delta->left, *right = &delta->right;
	bool take_left = !left->ended && (right->ended || side_key(left) <= side_key(right));
	bool take_right = !right->ended && (left->ended || side_key(right) <= side_key(left));
	uint64_t key = side_key(take_left ? left : right);
	uint64_t left_block = take_left ? side_data_block(left) : UINT64_MAX;
	uint64_t right_block = take_right ? side_data_block(right) : UINT64_MAX;
	enum tp_delta_kind kind = !take_right                 ? TP_DELTA_LEFT_ONLY
				  : !take_left                ? TP_DELTA_RIGHT_ONLY
				  : left_block == right_block ? TP_DELTA_SAME
							      : TP_DELTA_DIFFERENT;
	int rc = 0;

	if (kind != TP_DELTA_SAME || delta->options.with_same)
		rc = emit(delta, kind, key, left_block, right_block, err);
	if (!rc && take_left)
		rc = side_advance(delta, left, 1, err);
	if (!rc && take_right)
		rc = side_advance(delta, right, 1, err);
	return rc;
}

/* Entries that need no run of their own, of the leaves at hand. */
static uint32_t skim(struct tp_delta *delta)
{
	const struct side *left = &delta->left, *right = &delta->right;
	uint32_t nr;

	if (left->ended || right->ended || delta->options.with_same)
		return 0;
	nr = same_entries(left, right);
	if (nr || delta->options.by_data_block)
		return nr;
	nr = differing_entries(left, right, &delta->run);
	delta->run.length += nr;
	return nr;
}

static int merge_window(struct tp_delta *delta, struct tp_error *err)
{
	struct side *left = &delta->left, *right = &delta->right;
	int rc = side_begin(delta, left, err) ?: side_begin(delta, right, err);

	while (!rc && !(left->ended && right->ended)) {
		uint32_t nr = skim(delta);

		if (nr)
			rc = side_advance(delta, left, nr, err)
				     ?: side_advance(delta, right, nr, err);
		else
			rc = merge_entry(delta, err);
	}
	return rc;
}

static int next_window(struct tp_delta *delta, struct tp_error *err)
{
	int rc = delta->loaded ? 0 : load_window(delta, err);

	delta->loaded = false;
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
