/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where metadata blocks are put: upper nodes of a large transaction together, those of a small one
 * with all else of it; every block of the device can be had, and none that was freed since the
 * last commit.
 */
#include <stdbool.h>
#include <string.h>

#include "check.h"
#include "thinpool/abi.h"
#include "thinpool/btree.h"
#include "thinpool/error.h"

#define MD_BLOCKS   20000u
#define SMALL       700u /* blocks of a device that is filled up */
#define NR_KEYS     400000u
#define RUN_BLOCKS  64u /* that a sort of block has to itself */
#define MIXED_FIRST 32u /* blocks of a transaction that are not sorted */

struct world {
	struct tp_bdev *bdev;
	struct tp_block_manager *bm;
	struct tp_tm *tm;
	struct tp_disk_space_map_root root;
};

static struct world world_make(uint64_t nr_blocks)
{
	struct world w = { 0 };

	CHECK_EQUAL(tp_bdev_mem_open(nr_blocks * TP_MD_BLOCK_SIZE, &w.bdev, NULL), 0);
	w.bm = tp_bm_create(w.bdev, 0);
	CHECK(w.bm);
	CHECK_EQUAL(tp_tm_create(w.bm, nr_blocks, &w.tm, NULL), 0);
	return w;
}

static void world_end(struct world *w)
{
	tp_tm_destroy(w->tm);
	tp_bm_destroy(w->bm);
	tp_bdev_close(w->bdev);
}

static void commit(struct world *w)
{
	CHECK_EQUAL(tp_tm_flush_space_map(w->tm, &w->root, NULL), 0);
	tp_tm_seal(w->tm);
	CHECK_EQUAL(tp_bm_write_sealed(w->bm, NULL), 0);
	tp_tm_finish_seal(w->tm);
}

static void reopen(struct world *w)
{
	tp_tm_destroy(w->tm);
	tp_bm_destroy(w->bm);
	w->bm = tp_bm_create(w->bdev, 0);
	CHECK(w->bm);
	CHECK_EQUAL(tp_tm_open(w->bm, &w->root, &w->tm, NULL), 0);
}

/* ---- trees ------------------------------------------------------------------------------- */

struct blocks {
	bool upper[MD_BLOCKS];
	bool leaves[MD_BLOCKS];
	uint64_t nr_upper, nr_leaves;
};

static void collect(struct world *w, uint64_t block, struct blocks *blocks)
{
	const struct tp_disk_node *node;
	const void *data;
	bool leaf;

	CHECK_EQUAL(tp_tm_read(w->tm, block, TP_KIND_NODE, &data, NULL), 0);
	node = data;
	leaf = tp_le32_get(node->header.flags) & TP_NODE_LEAF;
	if (!(leaf ? blocks->leaves : blocks->upper)[block]) {
		(leaf ? blocks->leaves : blocks->upper)[block] = true;
		*(leaf ? &blocks->nr_leaves : &blocks->nr_upper) += 1;
	}
	for (uint32_t i = 0; !leaf && i < tp_le32_get(node->header.nr_entries); i++) {
		struct tp_le64 child;

		memcpy(&child, tp_node_value(node, i), sizeof(child));
		collect(w, tp_le64_get(child), blocks);
	}
}

static struct blocks *tree_blocks(struct world *w, uint64_t root)
{
	struct blocks *blocks = calloc(1, sizeof(*blocks));

	CHECK(blocks);
	collect(w, root, blocks);
	return blocks;
}

/* Reads that it takes to have all that are in now and not in before, read along so many between. */
static uint64_t nr_reads(const bool *now, const bool *before, uint64_t gap)
{
	uint64_t reads = 0, last = 0;

	for (uint64_t block = 1; block < MD_BLOCKS; block++) {
		if (!now[block] || (before && before[block]))
			continue;
		reads += !last || block - last > gap;
		last = block;
	}
	return reads;
}

static void insert(struct world *w, uint64_t *root, uint64_t key)
{
	struct tp_btree tree = { .tm = w->tm, .value_size = 8 };
	struct tp_le64 value = tp_le64_put(key);

	CHECK_EQUAL(tp_btree_insert(&tree, root, key, &value, NULL), 0);
}

/* A tree, and a copy of it that is changed all over, each made in one transaction. */
static void test_upper_nodes_lie_together(uint64_t *seed, bool reopened)
{
	struct world w = world_make(MD_BLOCKS);
	struct tp_btree tree = { .tm = w.tm, .value_size = 8 };
	struct blocks *first, *second;
	uint64_t root, copy, nr_new = 0;

	CHECK_EQUAL(tp_btree_empty(&tree, &root, NULL), 0);
	for (uint64_t key = 0; key < NR_KEYS; key++)
		insert(&w, &root, key);
	commit(&w);
	if (reopened)
		reopen(&w);
	first = tree_blocks(&w, root);
	CHECK(first->nr_upper > 10 && first->nr_leaves > 2000);
	/* The root became one where it stood as a leaf. */
	CHECK(nr_reads(first->upper, NULL, 4) <= 3 + first->nr_upper / RUN_BLOCKS);

	copy = root;
	CHECK_EQUAL(tp_tm_inc(w.tm, copy, NULL), 0);
	for (unsigned i = 0; i < 200; i++)
		insert(&w, &copy, test_random_below(seed, NR_KEYS));
	commit(&w);
	second = tree_blocks(&w, copy);
	for (uint64_t block = 0; block < MD_BLOCKS; block++)
		nr_new += second->upper[block] && !first->upper[block];
	CHECK(nr_new > 10);
	/* The first few among the leaves, the others in what is left of one run and in another. */
	CHECK(nr_reads(second->upper, first->upper, MIXED_FIRST) <= 3);
	CHECK(nr_reads(second->leaves, first->leaves, MIXED_FIRST + RUN_BLOCKS) <= 3);
	free(first);
	free(second);
	world_end(&w);
}

/* One changed path is written in one go, counts with it. */
static void test_small_transaction_is_one_stretch(uint64_t *seed)
{
	struct world w = world_make(MD_BLOCKS);
	struct tp_btree tree = { .tm = w.tm, .value_size = 8 };
	uint64_t root;

	CHECK_EQUAL(tp_btree_empty(&tree, &root, NULL), 0);
	for (uint64_t key = 0; key < NR_KEYS; key++)
		insert(&w, &root, key);
	commit(&w);
	for (unsigned i = 0; i < 50; i++) {
		bool *before = calloc(MD_BLOCKS, sizeof(*before));
		bool *now = calloc(MD_BLOCKS, sizeof(*now));

		CHECK(before && now);
		for (uint64_t block = 0; block < MD_BLOCKS; block++)
			before[block] = tp_tm_count(w.tm, block);
		insert(&w, &root, test_random_below(seed, NR_KEYS));
		commit(&w);
		for (uint64_t block = 0; block < MD_BLOCKS; block++)
			now[block] = tp_tm_count(w.tm, block);
		CHECK_EQUAL(nr_reads(now, before, 1), 1);
		free(before);
		free(now);
	}
	world_end(&w);
}

/* ---- the last block ---------------------------------------------------------------------- */

static int take_any(struct world *w, uint64_t *seed, uint64_t *block)
{
	void *data;

	switch (test_random_below(seed, 3)) {
	case 0:
		return tp_tm_new(w->tm, TP_KIND_BITMAP, block, &data, NULL);
	case 1:
		return tp_tm_new_node(w->tm, TP_NODE_INTERNAL, block, &data, NULL);
	default:
		return tp_tm_new_node(w->tm, TP_NODE_LEAF, block, &data, NULL);
	}
}

/* Take blocks of any sort until no more than that are left; none may be one of the forbidden. */
static void take_until(struct world *w, uint64_t *seed, uint64_t left, const bool *forbidden,
		       bool *taken)
{
	uint64_t nr = tp_tm_nr_allocatable(w->tm), block;

	for (; nr > left; nr--) {
		CHECK_EQUAL(take_any(w, seed, &block), 0);
		CHECK(block > 0 && block < SMALL && !taken[block] && !forbidden[block]);
		CHECK_EQUAL(tp_tm_count(w->tm, block), 1);
		taken[block] = true;
		CHECK_EQUAL(tp_tm_nr_allocatable(w->tm), nr - 1);
	}
}

/* On a device that is full but for what was given back here and there. */
static void test_every_block_is_used(uint64_t *seed, bool reopened)
{
	struct world w = world_make(SMALL);
	bool ours[SMALL] = { 0 }, freed[SMALL] = { 0 }, again[SMALL] = { 0 }, last[SMALL] = { 0 };
	uint64_t nr = 0, block;

	/* A commit needs a few for itself. */
	take_until(&w, seed, 8, freed, ours);
	commit(&w);
	if (reopened)
		reopen(&w);
	for (block = 0; block < SMALL; block++) {
		if (!ours[block] || test_random_below(seed, 4))
			continue;
		CHECK_EQUAL(tp_tm_dec(w.tm, block, NULL, NULL), 0);
		freed[block] = true;
		nr++;
	}
	CHECK(nr > SMALL / 8);
	CHECK_EQUAL(tp_tm_nr_pending(w.tm), nr);
	/* What was freed waits for the commit, however little else there is. */
	take_until(&w, seed, 0, freed, again);
	CHECK_EQUAL(take_any(&w, seed, &block), TP_E_METADATA_SPACE);
	for (block = 0; block < SMALL; block++)
		if (again[block])
			CHECK_EQUAL(tp_tm_dec(w.tm, block, NULL, NULL), 0);
	memset(again, 0, sizeof(again));
	commit(&w);
	CHECK(tp_tm_nr_allocatable(w.tm) >= nr);
	take_until(&w, seed, 0, again, last);
	CHECK_EQUAL(take_any(&w, seed, &block), TP_E_METADATA_SPACE);
	for (block = 0; block < SMALL; block++)
		CHECK(tp_tm_count(w.tm, block));
	world_end(&w);
}

int main(void)
{
	uint64_t seed = test_seed();

	for (unsigned i = 0; i < 4; i++) {
		test_upper_nodes_lie_together(&seed, i & 1);
		test_every_block_is_used(&seed, i & 1);
	}
	test_small_transaction_is_one_stretch(&seed);
	return 0;
}
