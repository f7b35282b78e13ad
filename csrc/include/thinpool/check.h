/* SPDX-License-Identifier: Apache-2.0 */
/**
 * What the parts of the checker share; tp_check_*() in abi.h is its face.
 *
 * A check goes through these steps, each a file of its own:
 *   check_counts.c       reference counts in memory
 *   check_superblock.c   the superblock and the metadata snapshot's
 *   check_tree.c         every node of the trees, once; counts references on the way
 *   check_device.c       what the trees say of devices, put side by side
 *   check_space_map.c    both space maps against the counted references
 *   check_report.c       the faults and their words
 *   check.c              the order of all that
 *
 * Every metadata block has an entry in `uses` (the first structure that claimed it, so that none
 * stands in two) and in `counts` (how many pointers lead to it). Visitors run on all threads; they
 * touch these through atomics, a block's own `info` only while they visit it.
 */
#ifndef THINPOOL_CHECK_H
#define THINPOOL_CHECK_H

#include <pthread.h>

#include "thinpool/walk.h"

/* ---- reference counts -------------------------------------------------------------------- */

/*
 * Three digits a block: the low one has two bits, as on disk, so that those of five million blocks
 * nearly fit a processor's own cache; the middle one a byte, in memory that only blocks with four
 * references or more touch; the rest a table.
 *
 * Counting is what a check does most, at random places, and an atomic addition would keep the
 * processor from overlapping these. So each thread may have low digits of its own, a lane.
 * tp_check_counts_get and _word only while nobody adds.
 */
struct tp_check_counts {
	uint8_t *low; /* the lanes, one after the other */
	uint64_t lane_bytes;
	uint64_t nr;
	unsigned nr_lanes;
	bool shared; /* by all threads, atomically: one lane */
	uint8_t *middle;
	uint64_t
		*carried; /* a bit for every TP_CHECK_COUNTS_WORD blocks: use tp_check_counts_get */
	pthread_mutex_t lock;
	struct tp_check_carry *carries; /* open addressing; under lock */
	uint64_t nr_carries;
	uint64_t carries_room;
	_Atomic bool failed; /* out of memory: the counts are of no use */
};

#define TP_CHECK_COUNTS_WORD 32u /* low digits in 64 bits */

/* Lanes for so many threads, where that costs little; 0: all share. */
int tp_check_counts_init(struct tp_check_counts *counts, uint64_t nr, unsigned nr_threads,
			 struct tp_error *err);
void tp_check_counts_deinit(struct tp_check_counts *counts);
void tp_check_counts_carry(struct tp_check_counts *counts, uint64_t block);
uint64_t tp_check_counts_get(const struct tp_check_counts *counts, uint64_t block);
/* The counts of blocks [first, first + 32) as a bitmap's word says them, 3 for all from 3 on.
 * first is a multiple of 32; blocks past the end count 0. */
uint64_t tp_check_counts_word(const struct tp_check_counts *counts, uint64_t first);

/* One more, of counts that are shared. block < nr. */
static inline void tp_check_counts_add(struct tp_check_counts *counts, uint64_t block)
{
	uint8_t *digits = &counts->low[block / 4];
	unsigned shift = block % 4 * 2;
	uint8_t before = __atomic_load_n(digits, __ATOMIC_RELAXED);
	uint8_t after;

	do
		after = (uint8_t)((before & ~(3u << shift)) |
				  ((before + (1u << shift)) & 3u << shift));
	while (!__atomic_compare_exchange_n(digits, &before, after, true, __ATOMIC_RELAXED,
					    __ATOMIC_RELAXED));
	if (__builtin_expect((before >> shift & 3u) == 3u, 0))
		tp_check_counts_carry(counts, block);
}

static inline uint8_t *tp_check_counts_lane(const struct tp_check_counts *counts, unsigned thread)
{
	return counts->low + counts->lane_bytes * thread;
}

/* One more, in the calling thread's own lane. */
static inline void tp_check_counts_add_own(struct tp_check_counts *counts, uint8_t *lane,
					   uint64_t block)
{
	unsigned shift = block % 4 * 2;
	unsigned digits = lane[block / 4];

	if (__builtin_expect((digits >> shift & 3u) == 3u, 0)) {
		lane[block / 4] = (uint8_t)(digits & ~(3u << shift));
		tp_check_counts_carry(counts, block);
	} else {
		lane[block / 4] = (uint8_t)(digits + (1u << shift));
	}
}

/* ---- blocks ------------------------------------------------------------------------------ */

enum tp_check_use {
	TP_USE_NONE = 0,
	TP_USE_SUPERBLOCK,
	TP_USE_METADATA_SNAPSHOT,
	TP_USE_MAPPING_TOP_LEVEL,
	TP_USE_DEVICE_TREE,
	TP_USE_DETAILS_TREE,
	TP_USE_DATA_INDEX,
	TP_USE_DATA_BITMAP,
	TP_USE_DATA_OVERFLOW,
	TP_USE_METADATA_INDEX,
	TP_USE_METADATA_BITMAP,
	TP_USE_METADATA_OVERFLOW
};

enum tp_check_structure tp_check_use_structure(enum tp_check_use use);

#define TP_INFO_USABLE         1u /* visited, and its entries may be used */
#define TP_INFO_DONE           2u /* the subtree below is known */
#define TP_INFO_INCOMPLETE     4u /* parts of the subtree could not be read */
#define TP_INFO_UNDERFULL_SAID 8u
#define TP_INFO_INTERNAL       16u

/* Of a node. Of a bitmap, first_key is its index in the space map. */
struct tp_check_info {
	uint64_t first_key;        /* the node's own first key */
	uint64_t last_key;         /* the last one in the subtree */
	uint64_t nr_entries_below; /* in the leaves of the subtree */
	uint32_t device;           /* one that leads here; UINT32_MAX: none or no legal id */
	uint16_t nr_entries;
	uint16_t max_entries;
	uint8_t height; /* 0: leaf */
	uint8_t state;
	bool empty; /* no key in the whole subtree */
};

/* Copies of blocks, so that they need not be read again: the first internal nodes of a walk. */
struct tp_check_kept {
	uint8_t *nodes; /* TP_CHECK_KEPT_MAX blocks; costs those that are used */
	uint64_t *blocks;
	_Atomic size_t nr;   /* may go past TP_CHECK_KEPT_MAX */
	_Atomic size_t next; /* that a thread looks at */
};

#define TP_CHECK_KEPT_MAX 2048u

/*
 * The data space map's bitmaps stand between the leaves of the trees, and each would be a read of
 * its own once these are walked. So they are read with them, where a first look at the index finds
 * them, and put aside. It judges nothing: a bitmap is looked at when its time has come, and one
 * that was not put aside is read then.
 */
struct tp_check_ahead {
	uint64_t nr;    /* of bits that are set; 0: nothing is read ahead */
	uint64_t *bits; /* blocks to put aside */
	bool passing;   /* in this pass */
	struct tp_check_kept copies;
};

/* ---- the check --------------------------------------------------------------------------- */

/* A fault as it is kept; words are made when they are asked for. */
struct tp_check_record {
	uint16_t type;
	uint8_t severity;
	uint8_t structure;
	uint32_t device; /* as in tp_check_info */
	uint64_t block;
	uint64_t data_block;
	uint64_t length;
	uint64_t key;
	uint64_t found;
	uint64_t wanted;
};

/* One space map's bitmaps. */
struct tp_check_bitmap {
	uint64_t block;       /* 0: no index entry names one */
	uint64_t index_block; /* where that entry stands */
	uint32_t nr_free;
	uint32_t none_free_before;
};

struct tp_check_space_map {
	bool metadata;      /* else data */
	uint64_t nr_blocks; /* as it says itself */
	uint64_t nr_allocated;
	uint64_t bitmap_root;
	uint64_t overflow_root;
	uint64_t nr_bitmaps; /* that are looked at */
	struct tp_check_bitmap *bitmaps;
	uint64_t *overflowing; /* a bit a block: has an entry in the overflow tree */
	struct tp_check_counts *counts;
	bool compare_counts;
	_Atomic uint64_t nr_used; /* as found in the bitmaps */
	_Atomic uint64_t nr_free_found;
	_Atomic uint64_t nr_unjudged; /* counts above what was found, in a damaged pool */
	_Atomic bool unreadable;      /* a bitmap is missing or damaged */
};

struct tp_check {
	struct tp_walk_reader *reader;
	struct tp_check_options options;
	struct tp_walk_superblock live; /* or the metadata snapshot, when that is what is checked */
	struct tp_walk_superblock held;
	bool has_held; /* held is valid, and part of this check */
	bool superblock_valid;
	bool stop; /* nothing below the superblock can be looked at */
	_Atomic uint64_t progress_total;
	uint64_t nr_blocks; /* metadata blocks that may be referred to */
	uint64_t
		nr_data_blocks; /* mappings at or past this are past the end; UINT64_MAX: unknown */

	struct tp_check_counts counts; /* of metadata blocks */
	struct tp_check_counts data_counts;
	uint8_t *uses;
	struct tp_check_info *infos;
	uint64_t *level; /* bits: nodes to visit now */
	uint64_t *next_level;
	uint64_t *internals; /* bits: internal nodes met in this walk */
	struct tp_check_kept kept;
	struct tp_check_ahead ahead;
	struct tp_check_space_map data_map;
	struct tp_check_space_map metadata_map;
	struct tp_check_space_map *visiting; /* the one whose tree is being walked */
	bool comparing_overflow;      /* its counts are complete: overflow leaves are compared */
	_Atomic uint64_t nr_finished; /* internal nodes, in one round */
	_Atomic bool data_incomplete; /* mappings are missing from the counts */
	_Atomic bool metadata_incomplete;

	pthread_mutex_t lock; /* of the report */
	struct tp_check_record *records;
	uint64_t nr_records;
	uint64_t records_room;
	bool ran;
	uint64_t nr_devices;
	uint64_t nr_mappings;
	uint64_t nr_severity[4]; /* by enum tp_check_severity */
	uint64_t nr_leaked_data;
	uint64_t nr_leaked_metadata;
};

/* check_report.c */
struct tp_check_record tp_check_at(enum tp_check_type type, enum tp_check_severity severity,
				   enum tp_check_structure structure, uint64_t block);
/* Any thread. Keeps or merely counts it. */
void tp_check_report(struct tp_check *check, struct tp_check_record record);
/* A fault of one block as the walk's tests found it. */
void tp_check_report_fault(struct tp_check *check, enum tp_check_use use, uint64_t block,
			   const struct tp_walk_fault *fault);
void tp_check_report_sort(struct tp_check *check);

/* check_superblock.c: a failure says that nothing below can be looked at (and was reported). */
int tp_check_superblocks(struct tp_check *check, struct tp_error *err);

/* check_tree.c */
/* A copy of a block, while there is room. Any thread. */
void tp_check_keep(struct tp_check_kept *kept, uint64_t block, const void *data);
/* How many there are. */
size_t tp_check_nr_kept(const struct tp_check_kept *kept);
/* Count a pointer to a block, and put it on the next level when it is the first. `from` is the
 * block that holds the pointer. False when the pointer is of no use (and was reported). */
bool tp_check_refer(struct tp_check *check, enum tp_check_use use, uint64_t block, uint64_t from,
		    uint64_t key, uint32_t device);
/* Visit what tp_check_refer has put on the next level, and everything below. */
void tp_check_walk(struct tp_check *check);
/* Whether a node was visited and everything below is known. */
bool tp_check_whole(const struct tp_check *check, uint64_t block);

/* check_device.c */
int tp_check_devices(struct tp_check *check, struct tp_error *err);

/* check_space_map.c */
/* After the superblocks, before any walk; deinit takes what init left half made. */
int tp_check_space_maps_init(struct tp_check *check, struct tp_error *err);
void tp_check_space_maps_deinit(struct tp_check *check);
/* Find out which blocks are worth putting aside. After init. Fails for want of memory only. */
int tp_check_look_ahead(struct tp_check *check, struct tp_error *err);
int tp_check_space_maps(struct tp_check *check, struct tp_error *err);
/* An entry of the data space map's index, an entry of an overflow tree: called by the walk. */
void tp_check_index_entry(struct tp_check *check, uint64_t leaf, uint64_t key,
			  const uint8_t *value);
void tp_check_overflow_entry(struct tp_check *check, uint64_t leaf, uint64_t key, uint32_t count);

#endif
