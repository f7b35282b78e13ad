/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One pass from the root down serves every change: a node that would overflow is split, and one
 * that would run low is evened out or merged with a neighbour, before it is entered, so that no
 * step has to go back up. Minimum fill is a third (what the format asks for), splits are in halves,
 * and a split at the right end leaves two thirds behind: appending fills a tree to two thirds.
 */
#include "thinpool/btree.h"

#include <string.h>

#include "thinpool/error.h"

static uint32_t nr_entries(const struct tp_disk_node *n)
{
	return tp_le32_get(n->header.nr_entries);
}

static void set_nr_entries(struct tp_disk_node *n, uint32_t nr)
{
	n->header.nr_entries = tp_le32_put(nr);
}

static uint32_t max_entries(const struct tp_disk_node *n)
{
	return tp_le32_get(n->header.max_entries);
}

static bool is_leaf(const struct tp_disk_node *n)
{
	return tp_le32_get(n->header.flags) & TP_NODE_LEAF;
}

static uint64_t key_at(const struct tp_disk_node *n, uint32_t i)
{
	return tp_le64_get(n->keys[i]);
}

static uint64_t child_at(const struct tp_disk_node *n, uint32_t i)
{
	struct tp_le64 v;

	memcpy(&v, tp_node_value(n, i), sizeof(v));
	return tp_le64_get(v);
}

static void set_child(struct tp_disk_node *n, uint32_t i, uint64_t block)
{
	struct tp_le64 v = tp_le64_put(block);

	memcpy(tp_node_value(n, i), &v, sizeof(v));
}

int tp_node_find(const struct tp_disk_node *n, uint64_t key)
{
	uint32_t low = 0, high = nr_entries(n);

	/* Invariant: keys below low are <= key, keys from high on are > key. */
	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (key_at(n, middle) <= key)
			low = middle + 1;
		else
			high = middle;
	}
	return (int)low - 1;
}

static void init_node(struct tp_disk_node *n, uint32_t flags, uint32_t value_size)
{
	n->header.flags = tp_le32_put(flags);
	n->header.value_size = tp_le32_put(value_size);
	n->header.max_entries = tp_le32_put(TP_NODE_MAX_ENTRIES(value_size));
}

static int check_node(const struct tp_btree *tree, const struct tp_disk_node *n, uint64_t block,
		      struct tp_error *err)
{
	if (is_leaf(n) && tp_le32_get(n->header.value_size) != tree->value_size)
		return tp_fail_block(
			err, TP_E_NODE_MALFORMED, block, tp_le32_get(n->header.value_size),
			tree->value_size, "leaf %lu has values of %u bytes, its tree of %u",
			(unsigned long)block, tp_le32_get(n->header.value_size), tree->value_size);
	return 0;
}

static int read_node(const struct tp_btree *tree, uint64_t block, int depth,
		     const struct tp_disk_node **node_ret, struct tp_error *err)
{
	const void *data;
	int r;

	if (depth >= TP_BTREE_DEPTH_MAX)
		return tp_fail_block(err, TP_E_NODE_MALFORMED, block, (uint64_t)depth,
				     TP_BTREE_DEPTH_MAX, "node %lu stands too deep: a cycle",
				     (unsigned long)block);
	r = tp_tm_read(tree->tm, block, TP_KIND_NODE, &data, err);
	if (r)
		return r;
	*node_ret = data;
	return check_node(tree, data, block, err);
}

/* Foreign tools may leave nodes with another maximum; ours have the formula's. */
static int normalise(struct tp_disk_node *n, uint64_t block, struct tp_error *err)
{
	uint32_t value_size = tp_le32_get(n->header.value_size), nr = nr_entries(n);
	uint32_t max = TP_NODE_MAX_ENTRIES(value_size);

	if (max_entries(n) == max)
		return 0;
	if (nr > max)
		return tp_fail_block(err, TP_E_NODE_MALFORMED, block, nr, max,
				     "node %lu holds %u entries, the format allows %u",
				     (unsigned long)block, nr, max);
	memmove(&n->keys[max], &n->keys[max_entries(n)], (size_t)nr * value_size);
	n->header.max_entries = tp_le32_put(max);
	return 0;
}

static int gain_children(const struct tp_btree *tree, const struct tp_disk_node *n,
			 struct tp_error *err)
{
	uint32_t i;
	int r = 0;

	for (i = 0; i < nr_entries(n) && !r; i++) {
		if (!is_leaf(n))
			r = tp_tm_inc(tree->tm, child_at(n, i), err);
		else if (tree->value_inc)
			r = tree->value_inc(tree->context, tp_node_value(n, i), err);
	}
	return r;
}

static int shadow(const struct tp_btree *tree, uint64_t *block, struct tp_disk_node **node_ret,
		  struct tp_error *err)
{
	bool gained;
	void *data;
	int r = tp_tm_shadow(tree->tm, block, TP_KIND_NODE, &data, &gained, err);

	if (r)
		return r;
	*node_ret = data;
	r = check_node(tree, data, *block, err);
	if (!r)
		r = normalise(data, *block, err);
	if (!r && gained)
		r = gain_children(tree, data, err);
	return r;
}

/* Shadow child i of a changeable node and put its new number into the node. */
static int shadow_child(const struct tp_btree *tree, struct tp_disk_node *parent, uint32_t i,
			uint64_t *block_ret, struct tp_disk_node **node_ret, struct tp_error *err)
{
	int r;

	*block_ret = child_at(parent, i);
	r = shadow(tree, block_ret, node_ret, err);
	set_child(parent, i, *block_ret);
	return r;
}

/* ---- entries of one node ----------------------------------------------------------------- */

static void insert_at(struct tp_disk_node *n, uint32_t i, uint64_t key, const void *value)
{
	uint32_t nr = nr_entries(n), value_size = tp_le32_get(n->header.value_size);

	TP_ASSERT(nr < max_entries(n) && i <= nr);
	memmove(&n->keys[i + 1], &n->keys[i], (nr - i) * sizeof(n->keys[0]));
	memmove(tp_node_value(n, i + 1), tp_node_value(n, i), (size_t)(nr - i) * value_size);
	n->keys[i] = tp_le64_put(key);
	memcpy(tp_node_value(n, i), value, value_size);
	set_nr_entries(n, nr + 1);
}

static void remove_at(struct tp_disk_node *n, uint32_t i)
{
	uint32_t nr = nr_entries(n), value_size = tp_le32_get(n->header.value_size);

	TP_ASSERT(i < nr);
	memmove(&n->keys[i], &n->keys[i + 1], (nr - i - 1) * sizeof(n->keys[0]));
	memmove(tp_node_value(n, i), tp_node_value(n, i + 1), (size_t)(nr - i - 1) * value_size);
	set_nr_entries(n, nr - 1);
}

/* Append entries [from, from + count) of source to the end of target. */
static void append(struct tp_disk_node *target, const struct tp_disk_node *source, uint32_t from,
		   uint32_t count)
{
	uint32_t nr = nr_entries(target), value_size = tp_le32_get(target->header.value_size);

	TP_ASSERT(nr + count <= max_entries(target));
	memcpy(&target->keys[nr], &source->keys[from], count * sizeof(target->keys[0]));
	memcpy(tp_node_value(target, nr), tp_node_value(source, from), (size_t)count * value_size);
	set_nr_entries(target, nr + count);
}

static void drop_front(struct tp_disk_node *n, uint32_t count)
{
	uint32_t nr = nr_entries(n) - count, value_size = tp_le32_get(n->header.value_size);

	memmove(&n->keys[0], &n->keys[count], nr * sizeof(n->keys[0]));
	memmove(tp_node_value(n, 0), tp_node_value(n, count), (size_t)nr * value_size);
	set_nr_entries(n, nr);
}

static void make_room_in_front(struct tp_disk_node *n, uint32_t count)
{
	uint32_t nr = nr_entries(n), value_size = tp_le32_get(n->header.value_size);

	TP_ASSERT(nr + count <= max_entries(n));
	memmove(&n->keys[count], &n->keys[0], nr * sizeof(n->keys[0]));
	memmove(tp_node_value(n, count), tp_node_value(n, 0), (size_t)nr * value_size);
	set_nr_entries(n, nr + count);
}

/* ---- reading ----------------------------------------------------------------------------- */

int tp_btree_empty(const struct tp_btree *tree, uint64_t *root_ret, struct tp_error *err)
{
	void *data;
	int r = tp_tm_new_node(tree->tm, TP_NODE_LEAF, root_ret, &data, err);

	if (!r)
		init_node(data, TP_NODE_LEAF, tree->value_size);
	return r;
}

int tp_btree_leaf(const struct tp_btree *tree, uint64_t root, uint64_t key,
		  const struct tp_disk_node **leaf_ret, uint64_t *low_ret, uint64_t *high_ret,
		  struct tp_error *err)
{
	const struct tp_disk_node *n;
	int depth = 0, i, r;

	*low_ret = 0;
	*high_ret = UINT64_MAX;
	for (;;) {
		r = read_node(tree, root, depth++, &n, err);
		if (r)
			return r;
		if (is_leaf(n)) {
			*leaf_ret = n;
			return 0;
		}
		/* Below the first separator: the first child has nothing there either. */
		i = tp_node_find(n, key);
		if (i > 0)
			*low_ret = key_at(n, (uint32_t)i);
		else
			i = 0;
		if ((uint32_t)i + 1 < nr_entries(n))
			*high_ret = key_at(n, (uint32_t)i + 1) - 1;
		root = child_at(n, (uint32_t)i);
	}
}

int tp_btree_lookup(const struct tp_btree *tree, uint64_t root, uint64_t key, void *value_ret,
		    struct tp_error *err)
{
	const struct tp_disk_node *leaf;
	uint64_t low, high;
	int i, r = tp_btree_leaf(tree, root, key, &leaf, &low, &high, err);

	if (r)
		return r;
	i = tp_node_find(leaf, key);
	if (i < 0 || key_at(leaf, (uint32_t)i) != key)
		return TP_E_KEY_NOT_FOUND;
	memcpy(value_ret, tp_node_value(leaf, (uint32_t)i), tree->value_size);
	return 0;
}

int tp_btree_next(const struct tp_btree *tree, uint64_t root, uint64_t key, uint64_t *key_ret,
		  void *value_ret, struct tp_error *err)
{
	const struct tp_disk_node *leaf;
	uint64_t low, high;
	int r;

	for (;;) {
		uint32_t i;

		r = tp_btree_leaf(tree, root, key, &leaf, &low, &high, err);
		if (r)
			return r;
		i = (uint32_t)(tp_node_find(leaf, key) + 1);
		if (i && key_at(leaf, i - 1) == key)
			i--;
		if (i < nr_entries(leaf)) {
			*key_ret = key_at(leaf, i);
			memcpy(value_ret, tp_node_value(leaf, i), tree->value_size);
			return 0;
		}
		if (high == UINT64_MAX)
			return TP_E_KEY_NOT_FOUND;
		key = high + 1;
	}
}

/* ---- insert ------------------------------------------------------------------------------ */

/* How many of a full node's entries stay on the left when key is the reason for the split. */
static uint32_t split_point(const struct tp_disk_node *n, uint64_t key)
{
	uint32_t nr = nr_entries(n);

	return key > key_at(n, nr - 1) ? nr - max_entries(n) / 3 : nr / 2;
}

/* The root block stays the root: its entries move to two new children. */
static int split_root(const struct tp_btree *tree, struct tp_disk_node *root, uint64_t key,
		      struct tp_error *err)
{
	uint32_t flags = tp_le32_get(root->header.flags);
	uint32_t value_size = tp_le32_get(root->header.value_size);
	uint32_t nr = nr_entries(root), left_nr = split_point(root, key);
	uint64_t left_block, right_block;
	struct tp_disk_node *left, *right;
	struct tp_le64 value;
	void *data;
	int r = tp_tm_new_node(tree->tm, flags, &left_block, &data, err);

	if (r)
		return r;
	left = data;
	r = tp_tm_new_node(tree->tm, flags, &right_block, &data, err);
	if (r) {
		tp_tm_dec(tree->tm, left_block, NULL, NULL);
		return r;
	}
	right = data;
	init_node(left, flags, value_size);
	init_node(right, flags, value_size);
	append(left, root, 0, left_nr);
	append(right, root, left_nr, nr - left_nr);
	set_nr_entries(root, 0);
	init_node(root, TP_NODE_INTERNAL, sizeof(value));
	value = tp_le64_put(left_block);
	insert_at(root, 0, key_at(left, 0), &value);
	value = tp_le64_put(right_block);
	insert_at(root, 1, key_at(right, 0), &value);
	return 0;
}

/* Split changeable child i of a changeable parent that has room. */
static int split_child(const struct tp_btree *tree, struct tp_disk_node *parent, uint32_t i,
		       struct tp_disk_node *left, uint64_t key, struct tp_error *err)
{
	uint32_t nr = nr_entries(left), left_nr = split_point(left, key);
	uint32_t flags = tp_le32_get(left->header.flags);
	struct tp_disk_node *right;
	struct tp_le64 value;
	uint64_t block;
	void *data;
	int r = tp_tm_new_node(tree->tm, flags, &block, &data, err);

	if (r)
		return r;
	right = data;
	init_node(right, flags, tp_le32_get(left->header.value_size));
	append(right, left, left_nr, nr - left_nr);
	set_nr_entries(left, left_nr);
	value = tp_le64_put(block);
	insert_at(parent, i + 1, key_at(right, 0), &value);
	return 0;
}

static bool must_split(const struct tp_disk_node *n, uint64_t key)
{
	int i;

	if (nr_entries(n) < max_entries(n))
		return false;
	if (!is_leaf(n))
		return true;
	i = tp_node_find(n, key);
	return i < 0 || key_at(n, (uint32_t)i) != key;
}

int tp_btree_insert(const struct tp_btree *tree, uint64_t *root, uint64_t key, const void *value,
		    struct tp_error *err)
{
	struct tp_disk_node *n, *child;
	uint64_t block;
	int depth, i, r;

	r = shadow(tree, root, &n, err);
	if (!r && must_split(n, key))
		r = split_root(tree, n, key, err);
	if (r)
		return r;
	for (depth = 1; !is_leaf(n); depth++) {
		if (depth >= TP_BTREE_DEPTH_MAX)
			return tp_fail_block(err, TP_E_NODE_MALFORMED, *root, (uint64_t)depth,
					     TP_BTREE_DEPTH_MAX, "the tree at %lu is too deep",
					     (unsigned long)*root);
		i = tp_node_find(n, key);
		if (i < 0) {
			i = 0;
			n->keys[0] = tp_le64_put(key);
		}
		r = shadow_child(tree, n, (uint32_t)i, &block, &child, err);
		if (r)
			return r;
		if (must_split(child, key)) {
			r = split_child(tree, n, (uint32_t)i, child, key, err);
			if (r)
				return r;
			if (key >= key_at(n, (uint32_t)i + 1)) {
				r = shadow_child(tree, n, (uint32_t)i + 1, &block, &child, err);
				if (r)
					return r;
			}
		}
		n = child;
	}
	i = tp_node_find(n, key);
	if (i >= 0 && key_at(n, (uint32_t)i) == key)
		memcpy(tp_node_value(n, (uint32_t)i), value, tree->value_size);
	else
		insert_at(n, (uint32_t)(i + 1), key, value);
	return 0;
}

int tp_btree_own_path(const struct tp_btree *tree, uint64_t *root, uint64_t key,
		      struct tp_error *err)
{
	struct tp_disk_node *n, *child;
	uint64_t block;
	int depth, i, r = shadow(tree, root, &n, err);

	for (depth = 1; !r && !is_leaf(n); depth++) {
		if (depth >= TP_BTREE_DEPTH_MAX)
			return tp_fail_block(err, TP_E_NODE_MALFORMED, *root, (uint64_t)depth,
					     TP_BTREE_DEPTH_MAX, "the tree at %lu is too deep",
					     (unsigned long)*root);
		i = tp_node_find(n, key);
		r = shadow_child(tree, n, i < 0 ? 0 : (uint32_t)i, &block, &child, err);
		n = child;
	}
	return r;
}

/* Below the first separator: the first child, as for a lookup. */
static int child_for(const struct tp_disk_node *n, uint64_t key)
{
	int i = tp_node_find(n, key);

	return i < 0 ? 0 : i;
}

/* ---- remove ------------------------------------------------------------------------------ */

/*
 * Give child i of a changeable parent more than the minimum, with the help of a neighbour: merge
 * the two where one node can hold both, else share evenly. The caller looks the child up again.
 */
static int refill(const struct tp_btree *tree, struct tp_disk_node *parent, uint32_t i,
		  struct tp_error *err)
{
	uint32_t at = i ? i - 1 : 0, total, left_nr, right_nr, want;
	struct tp_disk_node *left, *right;
	uint64_t left_block, right_block;
	int r = shadow_child(tree, parent, at, &left_block, &left, err);

	if (!r)
		r = shadow_child(tree, parent, at + 1, &right_block, &right, err);
	if (r)
		return r;
	if (is_leaf(left) != is_leaf(right))
		return tp_fail_block(err, TP_E_NODE_MALFORMED, right_block, is_leaf(right),
				     is_leaf(left),
				     "nodes %lu and %lu are neighbours of unequal "
				     "depth",
				     (unsigned long)left_block, (unsigned long)right_block);
	left_nr = nr_entries(left);
	right_nr = nr_entries(right);
	total = left_nr + right_nr;
	if (total <= max_entries(left)) {
		append(left, right, 0, right_nr);
		remove_at(parent, at + 1);
		/* The entries moved with their references: only the node itself goes. */
		return tp_tm_dec(tree->tm, right_block, NULL, err);
	}
	want = total / 2;
	if (left_nr < want) {
		append(left, right, 0, want - left_nr);
		drop_front(right, want - left_nr);
	} else if (left_nr > want) {
		uint32_t move = left_nr - want;

		make_room_in_front(right, move);
		memcpy(&right->keys[0], &left->keys[want], move * sizeof(left->keys[0]));
		memcpy(tp_node_value(right, 0), tp_node_value(left, want),
		       (size_t)move * tp_le32_get(left->header.value_size));
		set_nr_entries(left, want);
	}
	parent->keys[at + 1] = right->keys[0];
	return 0;
}

/* A root with one child gives its place to the child. */
static int collapse_root(const struct tp_btree *tree, uint64_t *root, struct tp_error *err)
{
	const struct tp_disk_node *n;
	uint64_t child;
	int r;

	for (;;) {
		r = read_node(tree, *root, 0, &n, err);
		if (r || is_leaf(n) || nr_entries(n) != 1)
			return r;
		child = child_at(n, 0);
		r = tp_tm_dec(tree->tm, *root, NULL, err);
		if (r)
			return r;
		*root = child;
	}
}

int tp_btree_remove(const struct tp_btree *tree, uint64_t *root, uint64_t key, void *value_ret,
		    struct tp_error *err)
{
	struct tp_disk_node *n, *child;
	uint64_t block;
	uint8_t probe[TP_MD_BLOCK_SIZE / 8];
	int depth, i, r;

	/* Nothing is shadowed for a key that is not there. */
	TP_ASSERT(tree->value_size <= sizeof(probe));
	r = tp_btree_lookup(tree, *root, key, probe, err);
	if (r)
		return r;
	r = shadow(tree, root, &n, err);
	for (depth = 1; !r && !is_leaf(n); depth++) {
		if (depth >= TP_BTREE_DEPTH_MAX)
			return tp_fail_block(err, TP_E_NODE_MALFORMED, *root, (uint64_t)depth,
					     TP_BTREE_DEPTH_MAX, "the tree at %lu is too deep",
					     (unsigned long)*root);
		i = child_for(n, key);
		r = shadow_child(tree, n, (uint32_t)i, &block, &child, err);
		if (!r && nr_entries(child) <= max_entries(child) / 3 && nr_entries(n) > 1) {
			r = refill(tree, n, (uint32_t)i, err);
			if (r)
				return r;
			i = child_for(n, key);
			r = shadow_child(tree, n, (uint32_t)i, &block, &child, err);
		}
		n = child;
	}
	if (r)
		return r;
	i = tp_node_find(n, key);
	/* It was there: only neighbours whose keys overlap can have hidden it. */
	if (i < 0 || key_at(n, (uint32_t)i) != key)
		return tp_fail_block(err, TP_E_NODE_MALFORMED, tp_le64_get(n->header.blocknr), key,
				     key, "key %lu is lost between nodes that overlap",
				     (unsigned long)key);
	if (value_ret)
		memcpy(value_ret, tp_node_value(n, (uint32_t)i), tree->value_size);
	remove_at(n, (uint32_t)i);
	return collapse_root(tree, root, err);
}

static int delete_node(const struct tp_btree *tree, uint64_t block, int depth, struct tp_error *err)
{
	const struct tp_disk_node *n;
	uint32_t i;
	int r;

	if (tp_tm_count(tree->tm, block) > 1)
		return tp_tm_dec(tree->tm, block, NULL, err);
	r = read_node(tree, block, depth, &n, err);
	for (i = 0; !r && i < nr_entries(n); i++) {
		if (!is_leaf(n))
			r = delete_node(tree, child_at(n, i), depth + 1, err);
		else if (tree->value_dec)
			r = tree->value_dec(tree->context, tp_node_value(n, i), err);
	}
	return r ? r : tp_tm_dec(tree->tm, block, NULL, err);
}

int tp_btree_delete(const struct tp_btree *tree, uint64_t root, struct tp_error *err)
{
	return delete_node(tree, root, 0, err);
}
