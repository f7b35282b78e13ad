/* SPDX-License-Identifier: Apache-2.0 */
/**
 * Copy-on-write B-trees of u64 keys and fixed-size values, one node a metadata block.
 *
 * Every function that changes a tree takes its root by reference and stores the new root there
 * also when it fails: a path that was shadowed on the way is a legal tree with the same entries,
 * and the old root may be gone. A failed change has changed no entry.
 *
 * Nodes that are not a root hold at least a third of their maximum. Trees are at most
 * TP_BTREE_DEPTH_MAX deep; a deeper one is a cycle and is refused.
 *
 * Costs: lookups read one block a level; inserts and removes shadow one path, and of a neighbour
 * where a node ran full or low. All may block on reads. Not thread-safe: the metadata lock.
 */
#ifndef THINPOOL_BTREE_H
#define THINPOOL_BTREE_H

#include "thinpool/transaction_manager.h"

#define TP_BTREE_DEPTH_MAX 16

struct tp_btree {
	struct tp_tm *tm;
	uint32_t value_size; /* bytes, of leaf values */
	/* Values that are references: called for each value of a leaf that was duplicated, and
	 * for each value of a tree that is deleted. NULL where values are plain. */
	int (*value_inc)(void *context, const void *value, struct tp_error *err);
	int (*value_dec)(void *context, const void *value, struct tp_error *err);
	void *context;
};

int tp_btree_empty(const struct tp_btree *tree, uint64_t *root_ret, struct tp_error *err);
/* TP_E_KEY_NOT_FOUND, with err untouched, when there is no such key. */
int tp_btree_lookup(const struct tp_btree *tree, uint64_t root, uint64_t key, void *value_ret,
		    struct tp_error *err);
/* The first entry with a key >= key. */
int tp_btree_next(const struct tp_btree *tree, uint64_t root, uint64_t key, uint64_t *key_ret,
		  void *value_ret, struct tp_error *err);
/* The leaf responsible for key, and the range [*low_ret, *high_ret] of keys it is responsible
 * for. The node is the tree's: it is valid until the next change. */
int tp_btree_leaf(const struct tp_btree *tree, uint64_t root, uint64_t key,
		  const struct tp_disk_node **leaf_ret, uint64_t *low_ret, uint64_t *high_ret,
		  struct tp_error *err);
/* Inserts or replaces; no reference of a replaced value is dropped, the caller does that. */
int tp_btree_insert(const struct tp_btree *tree, uint64_t *root, uint64_t key, const void *value,
		    struct tp_error *err);
/* Removes; the value comes back (NULL allowed) and its reference is the caller's. */
int tp_btree_remove(const struct tp_btree *tree, uint64_t *root, uint64_t key, void *value_ret,
		    struct tp_error *err);
/* Make the path to key changeable without changing anything: references are settled. */
int tp_btree_own_path(const struct tp_btree *tree, uint64_t *root, uint64_t key,
		      struct tp_error *err);
/* Drop one reference to a tree; what is no longer referred to goes with it. */
int tp_btree_delete(const struct tp_btree *tree, uint64_t root, struct tp_error *err);

static inline uint8_t *tp_node_value(const struct tp_disk_node *node, uint32_t i)
{
	return (uint8_t *)(uintptr_t)&node->keys[tp_le32_get(node->header.max_entries)] +
	       (size_t)i * tp_le32_get(node->header.value_size);
}

/* Index of the last key <= key, or -1. */
int tp_node_find(const struct tp_disk_node *node, uint64_t key);

#endif
