/* SPDX-License-Identifier: Apache-2.0 */
/**
 * The data space map: how many leaf entries refer to each data block.
 *
 * On disk: bitmaps of 2-bit counts, a tree of index entries, a tree of counts of 3 and more. In
 * memory: the index entries, and the bitmap allocator from which blocks are taken. Allocation has
 * two steps, so that a block can be written before anything refers to it: tp_data_map_reserve
 * takes it in memory only, tp_data_map_claim counts it; a reserved block is still free on disk.
 *
 * A block whose count falls to 0 is kept from the allocator until the transaction that freed it
 * is durable (tp_data_map_finish_seal). Not thread-safe: the metadata lock.
 */
#ifndef THINPOOL_DATA_MAP_H
#define THINPOOL_DATA_MAP_H

#include "thinpool/transaction_manager.h"

struct tp_data_map;

struct tp_run {
	uint64_t begin, length;
};

struct tp_run_list {
	struct tp_run *runs;
	size_t count, room;
	uint64_t blocks; /* in all runs */
};

int tp_run_list_add(struct tp_run_list *list, uint64_t begin, uint64_t length);
void tp_run_list_free(struct tp_run_list *list);

/* A map of no blocks, in the open transaction. */
int tp_data_map_create(struct tp_tm *tm, struct tp_data_map **map_ret, struct tp_error *err);
int tp_data_map_open(struct tp_tm *tm, const struct tp_disk_space_map_root *root,
		     struct tp_data_map **map_ret, struct tp_error *err);
void tp_data_map_destroy(struct tp_data_map *map);
int tp_data_map_resize(struct tp_data_map *map, uint64_t nr_blocks, struct tp_error *err);

/* TP_E_DATA_SPACE, err untouched, when nothing is allocatable (blocks may be waiting for a
 * commit). */
int tp_data_map_reserve(struct tp_data_map *map, uint64_t *block_ret);
/* Up to want neighbours, at least one: as above. */
int tp_data_map_reserve_some(struct tp_data_map *map, uint64_t want, uint64_t *begin_ret,
			     uint64_t *length_ret);
/* This very block: TP_E_BUSY when it is not allocatable. */
int tp_data_map_reserve_run(struct tp_data_map *map, uint64_t begin, uint64_t length);
void tp_data_map_unreserve(struct tp_data_map *map, uint64_t begin, uint64_t length);
int tp_data_map_claim(struct tp_data_map *map, uint64_t block, struct tp_error *err);
int tp_data_map_inc(struct tp_data_map *map, uint64_t block, struct tp_error *err);
int tp_data_map_dec(struct tp_data_map *map, uint64_t block, struct tp_error *err);
int tp_data_map_count(struct tp_data_map *map, uint64_t block, uint32_t *count_ret,
		      struct tp_error *err);

uint64_t tp_data_map_nr_blocks(const struct tp_data_map *map);
uint64_t tp_data_map_nr_used(const struct tp_data_map *map); /* count >= 1 */
/* What bounds the metadata blocks that changes of counts need: entries of the overflow tree,
 * bitmaps. */
uint64_t tp_data_map_nr_overflow(const struct tp_data_map *map);
uint64_t tp_data_map_nr_bitmaps(const struct tp_data_map *map);
uint64_t tp_data_map_nr_allocatable(const struct tp_data_map *map);
uint64_t tp_data_map_nr_waiting(const struct tp_data_map *map); /* freed, not yet durable */
int tp_data_map_next_free_run(const struct tp_data_map *map, uint64_t begin, uint64_t *begin_ret,
			      uint64_t *length_ret);
int tp_data_map_is_allocatable(const struct tp_data_map *map, uint64_t block);

int tp_data_map_flush(struct tp_data_map *map, struct tp_disk_space_map_root *root_ret,
		      struct tp_error *err);
void tp_data_map_seal(struct tp_data_map *map);
/* What the sealed transaction freed becomes allocatable and is appended to *freed. */
void tp_data_map_finish_seal(struct tp_data_map *map, struct tp_run_list *freed);

#endif
