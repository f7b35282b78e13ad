/* SPDX-License-Identifier: Apache-2.0 */
/**
 * Reading metadata that may be anything: what check, dump and delta stand on.
 *
 * Three pieces: a team of threads, a reader that visits a set of metadata blocks in large
 * sequential reads, and the tests that one btree node must pass before any byte of it is used.
 * All of it is independent of the btree and space-map code that writes pools, on purpose: it is
 * their judge.
 *
 * Invariants: nothing is written; no byte of a block is used past its 4096; a node that passed
 * tp_walk_node_parse has all its keys and values inside the block; every loop is bounded by the
 * number of metadata blocks or by TP_WALK_LEVELS_MAX.
 *
 * A reader is used by one thread at a time; the visitors it calls run on all of its threads at
 * once, each block on one of them.
 */
#ifndef THINPOOL_WALK_H
#define THINPOOL_WALK_H

#include <stdatomic.h>
#include <stdbool.h>

#include "thinpool/abi.h"
#include "thinpool/disk_format.h"

/*
 * No legal tree is deeper: nodes that are not roots have 84 children or more, so that five levels
 * hold more blocks than a metadata device can. Twice that, with both levels of the mapping tree.
 */
#define TP_WALK_LEVELS_MAX 16u

/* ---- memory ------------------------------------------------------------------------------ */

/* Zeroed memory that costs only the pages touched; NULL when out of memory. */
void *tp_walk_map(uint64_t bytes);
/* The same for what is touched all over: in huge pages where the system gives them. */
void *tp_walk_map_dense(uint64_t bytes);
/* Have zeroed memory there at once. What is read first and written then is given pages of zeros
 * that all share, and the change of each for one of its own interrupts every processor. */
void tp_walk_touch(void *memory, uint64_t bytes);
void tp_walk_unmap(void *memory, uint64_t bytes);

/* ---- thread team ------------------------------------------------------------------------- */

#define TP_WALK_THREADS_MAX 64u

struct tp_walk_team;

typedef void (*tp_walk_job)(void *argument, unsigned thread);

/* nr_threads >= 1; the caller of tp_walk_team_run is thread 0, the others are started by the first
 * run and wait without spinning. */
int tp_walk_team_create(unsigned nr_threads, struct tp_walk_team **team_ret, struct tp_error *err);
void tp_walk_team_destroy(struct tp_walk_team *team);
unsigned tp_walk_team_size(const struct tp_walk_team *team);
/* Run job on every thread and wait for all. */
void tp_walk_team_run(struct tp_walk_team *team, tp_walk_job job, void *argument);

/* ---- sets of blocks ---------------------------------------------------------------------- */

static inline uint64_t tp_walk_words(uint64_t nr_bits)
{
	return nr_bits / 64 + (nr_bits % 64 != 0);
}

/* Atomically; true when the bit was clear before. */
static inline bool tp_walk_bit_set(uint64_t *bits, uint64_t bit)
{
	uint64_t mask = UINT64_C(1) << bit % 64;

	return !(__atomic_fetch_or(&bits[bit / 64], mask, __ATOMIC_RELAXED) & mask);
}

static inline bool tp_walk_bit_get(const uint64_t *bits, uint64_t bit)
{
	return __atomic_load_n(&bits[bit / 64], __ATOMIC_RELAXED) >> bit % 64 & 1;
}

/* The first set bit at or after `from`, nr_bits when there is none. */
uint64_t tp_walk_bit_next(const uint64_t *bits, uint64_t from, uint64_t nr_bits);

/* ---- reader ------------------------------------------------------------------------------ */

struct tp_walk_reader;

/* data is NULL when the block could not be read; status then says why (TP_E_IO and so on). */
typedef void (*tp_walk_visit)(void *argument, unsigned thread, uint64_t block, const void *data,
			      int status);

/* nr_threads 0 is two. The device must outlive the reader. */
int tp_walk_reader_create(struct tp_bdev *bdev, unsigned nr_threads,
			  struct tp_walk_reader **reader_ret, struct tp_error *err);
void tp_walk_reader_destroy(struct tp_walk_reader *reader);
struct tp_walk_team *tp_walk_reader_team(struct tp_walk_reader *reader);
/* Whole metadata blocks of the device. */
uint64_t tp_walk_reader_nr_blocks(const struct tp_walk_reader *reader);
uint64_t tp_walk_reader_done(const struct tp_walk_reader *reader);
/* From any thread: visits come to an end soon and tp_walk_cancelled says so. */
void tp_walk_cancel(struct tp_walk_reader *reader);
bool tp_walk_cancelled(const struct tp_walk_reader *reader);
/* Visit every block whose bit is set, in runs of ascending blocks. Visitors may set bits of
 * other sets, not of this one. */
void tp_walk_blocks(struct tp_walk_reader *reader, const uint64_t *bits, uint64_t nr_bits,
		    tp_walk_visit visit, void *argument);
/* One block into a buffer of 4096 bytes, on the calling thread. Any memory alignment. */
int tp_walk_read(struct tp_walk_reader *reader, uint64_t block, void *buffer, struct tp_error *err);

/* Blocks into slots of 4096 bytes each, in the order given; any number, in large reads on all
 * threads. statuses[i] is 0 or why block i could not be read. */
int tp_walk_read_list(struct tp_walk_reader *reader, const uint64_t *blocks, size_t nr_blocks,
		      uint8_t *slots, int *statuses, struct tp_error *err);

/* ---- nodes ------------------------------------------------------------------------------- */

/* A fault of one block, before it is put into a report. type 0: none. */
struct tp_walk_fault {
	uint32_t type; /* enum tp_check_type */
	uint64_t key;
	uint64_t found;
	uint64_t wanted;
};

struct tp_walk_node {
	uint64_t block; /* set by tp_walk_node_load */
	const uint8_t *keys;
	const uint8_t *values;
	uint32_t nr_entries;
	uint32_t max_entries;
	uint32_t value_size;
	bool leaf;
	bool odd_flags; /* a leaf with bits that mean nothing */
};

static inline uint64_t tp_walk_get64(const uint8_t *bytes)
{
	struct tp_le64 v;

	memcpy(&v, bytes, sizeof(v));
	return tp_le64_get(v);
}

static inline uint32_t tp_walk_get32(const uint8_t *bytes)
{
	struct tp_le32 v;

	memcpy(&v, bytes, sizeof(v));
	return tp_le32_get(v);
}

static inline uint64_t tp_walk_key(const struct tp_walk_node *node, uint32_t index)
{
	return tp_walk_get64(node->keys + 8 * (size_t)index);
}

static inline const uint8_t *tp_walk_value(const struct tp_walk_node *node, uint32_t index)
{
	return node->values + node->value_size * (size_t)index;
}

/* Of a child pointer, a mapping, a device's root. */
static inline uint64_t tp_walk_value64(const struct tp_walk_node *node, uint32_t index)
{
	return tp_walk_get64(node->values + 8 * (size_t)index);
}

/* Checksum and own number of a block; false fills *fault. */
bool tp_walk_block_check(const void *data, uint64_t block, uint32_t salt,
			 struct tp_walk_fault *fault);
/* Whether the node may be used at all: flags, sizes. Not its checksum, nor the order of its keys.
 * False fills *fault. */
bool tp_walk_node_parse(const void *data, uint32_t leaf_value_size, struct tp_walk_node *node_ret,
			struct tp_walk_fault *fault);
/* Index of the first key that is not above the one before it; nr_entries when all are. */
uint32_t tp_walk_node_disorder(const struct tp_walk_node *node);
/* Index of the last key that is not above; nr_entries when all are. */
uint32_t tp_walk_node_find(const struct tp_walk_node *node, uint64_t key);
/* tp_walk_block_check and tp_walk_node_parse as a status for those who need the node or fail. */
int tp_walk_node_load(const void *data, uint64_t block, uint32_t leaf_value_size,
		      struct tp_walk_node *node_ret, struct tp_error *err);

/* ---- lists of nodes ---------------------------------------------------------------------- */

/*
 * Nodes of trees with values of 8 bytes, read together on all threads, tested, and used where they
 * were read. For lists each of which follows from the one before: blocks that were read along with
 * that are not read again.
 */
struct tp_walk_nodes;

/* Of lists of at most so many blocks: one and a half times that in memory, as it is used. */
int tp_walk_nodes_create(struct tp_walk_reader *reader, size_t most,
			 struct tp_walk_nodes **nodes_ret, struct tp_error *err);
void tp_walk_nodes_destroy(struct tp_walk_nodes *list);
/* Blocks may stand in the list more than once, and need not be on the device. Fails for want of
 * memory only. */
int tp_walk_nodes_read(struct tp_walk_nodes *list, const uint64_t *blocks, size_t nr,
		       struct tp_error *err);
/* The node of the list's index'th block, valid until the next read; fails as tp_walk_node_load
 * does. One thread at a time. */
int tp_walk_nodes_get(struct tp_walk_nodes *list, uint64_t block, size_t index,
		      const struct tp_walk_node **node_ret, struct tp_error *err);

/* ---- ordered walk of one tree ------------------------------------------------------------ */

/*
 * Entries of one tree in key order, a leaf at a time, for small trees and for streaming. Fails at
 * the first thing that is wrong, out-of-order keys included, so that whatever it gives is a map.
 */
struct tp_walk_cursor;

int tp_walk_cursor_create(struct tp_walk_reader *reader, uint64_t root, uint32_t leaf_value_size,
			  struct tp_walk_cursor **cursor_ret, struct tp_error *err);
void tp_walk_cursor_destroy(struct tp_walk_cursor *cursor);
/* The next leaf that is not empty, valid until the next call; *node_ret NULL at the end. */
int tp_walk_cursor_next(struct tp_walk_cursor *cursor, const struct tp_walk_node **node_ret,
			struct tp_error *err);

/* One value of a tree with values of 8 bytes: TP_E_KEY_NOT_FOUND. */
int tp_walk_lookup(struct tp_walk_reader *reader, uint64_t root, uint64_t key, uint64_t *value_ret,
		   struct tp_error *err);

/* ---- superblock and devices -------------------------------------------------------------- */

struct tp_walk_superblock {
	uint8_t uuid[16];
	uint32_t flags;
	uint32_t version;
	uint32_t time;
	uint32_t data_block_size; /* sectors */
	uint64_t trans_id;
	uint64_t held_root;
	uint64_t data_nr_blocks;
	uint64_t metadata_nr_blocks; /* of the space map */
	uint64_t mapping_root;
	uint64_t details_root;
	uint64_t block; /* where it was read */
};

/* The live one or the metadata snapshot's; checked for number, magic and checksum. */
int tp_walk_superblock_read(struct tp_walk_reader *reader, bool metadata_snapshot,
			    struct tp_walk_superblock *superblock_ret, struct tp_error *err);

struct tp_walk_device {
	uint64_t id;
	uint64_t root;
	uint64_t mapped_blocks;
	uint64_t transaction_id;
	uint32_t creation_time;
	uint32_t snapshotted_time;
	bool has_details;
};

/* The devices of the top level, in id order, with their details. A malloc'd array. Devices that
 * have details only are left out: nothing can be read of them. */
int tp_walk_devices(struct tp_walk_reader *reader, const struct tp_walk_superblock *superblock,
		    struct tp_walk_device **devices_ret, uint64_t *nr_devices_ret,
		    struct tp_error *err);

#endif
