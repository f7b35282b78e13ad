/* SPDX-License-Identifier: Apache-2.0 */
/**
 * Copy on write for metadata blocks, and the metadata space map that counts their references.
 *
 * These functions are the only way to get hold of a changeable block. A block made or copied in
 * the open transaction with one reference is changed in place; any other is copied to a new place
 * first (shadowed), so that nothing reachable from the committed superblock is overwritten.
 *
 * The metadata space map's counts live in memory as one array, loaded at open. Nothing that
 * happens between two commits touches its blocks on disk, so counting a block never allocates
 * one; tp_tm_flush_space_map writes the map at a commit and repeats until writing it no longer
 * changes it. The array takes 4 bytes a metadata block: 16 MB for the largest device there is.
 *
 * A commit has two halves: tp_tm_seal closes the transaction (a new one is open at once), then
 * tp_bm_write_sealed and the superblock are written without the metadata lock, then
 * tp_tm_finish_seal makes the blocks freed before the seal allocatable. Blocks freed in between
 * wait for the next commit: the one being written still refers to them.
 *
 * Not thread-safe: the caller holds the metadata lock.
 */
#ifndef THINPOOL_TRANSACTION_MANAGER_H
#define THINPOOL_TRANSACTION_MANAGER_H

#include <stdbool.h>

#include "thinpool/block_manager.h"
#include "thinpool/disk_format.h"

struct tp_tm;

/* An empty map over nr_blocks with block 0 counted; nothing is on disk before the first commit. */
int tp_tm_create(struct tp_block_manager *bm, uint64_t nr_blocks, struct tp_tm **tm_ret,
		 struct tp_error *err);
/* The map that a superblock's root describes. */
int tp_tm_open(struct tp_block_manager *bm, const struct tp_disk_space_map_root *root,
	       struct tp_tm **tm_ret, struct tp_error *err);
void tp_tm_destroy(struct tp_tm *tm);

int tp_tm_read(struct tp_tm *tm, uint64_t block, enum tp_block_kind kind, const void **data_ret,
	       struct tp_error *err);
/* TP_E_METADATA_SPACE when no block is left. */
int tp_tm_new(struct tp_tm *tm, enum tp_block_kind kind, uint64_t *block_ret, void **data_ret,
	      struct tp_error *err);
/* The same for a node of a tree: flags say of which sort, TP_NODE_LEAF or TP_NODE_INTERNAL. */
int tp_tm_new_node(struct tp_tm *tm, uint32_t flags, uint64_t *block_ret, void **data_ret,
		   struct tp_error *err);
/* Make block changeable: *block is replaced by its copy's number, which the caller puts into the
 * parent. *children_gained is set when the old block lives on, so that everything that the copy
 * points at has one reference more, which the caller counts. */
int tp_tm_shadow(struct tp_tm *tm, uint64_t *block, enum tp_block_kind kind, void **data_ret,
		 bool *children_gained, struct tp_error *err);
int tp_tm_inc(struct tp_tm *tm, uint64_t block, struct tp_error *err);
/* *left_ret is the count after; at 0 the block is free (allocatable after the commit). */
int tp_tm_dec(struct tp_tm *tm, uint64_t block, uint32_t *left_ret, struct tp_error *err);
uint32_t tp_tm_count(const struct tp_tm *tm, uint64_t block);

uint64_t tp_tm_nr_blocks(const struct tp_tm *tm);
uint64_t tp_tm_nr_used(const struct tp_tm *tm);
/* What can be allocated before the next commit. */
uint64_t tp_tm_nr_allocatable(const struct tp_tm *tm);
uint64_t tp_tm_nr_pending(const struct tp_tm *tm);
int tp_tm_resize(struct tp_tm *tm, uint64_t nr_blocks, struct tp_error *err);

/* Write the changed part of the map into new blocks and fill its root. */
int tp_tm_flush_space_map(struct tp_tm *tm, struct tp_disk_space_map_root *root_ret,
			  struct tp_error *err);
void tp_tm_seal(struct tp_tm *tm);
void tp_tm_finish_seal(struct tp_tm *tm);

#endif
