/* SPDX-License-Identifier: Apache-2.0 */
/**
 * What the files of the pool share: pool.c (life, modes, status), pool_commit.c (commits, flushes,
 * returning host space), pool_changes.c (create, snapshot, delete, resize), volume.c (mapping
 * cache, gate), host_space.c (space taken ahead) and data_path.c (read, write, discard, zero).
 *
 * Locks, in the order in which they are taken:
 *   changes_lock -> a volume's gate -> block locks (one at a time) -> commit_lock -> md_lock -> the
 *   small ones (space_lock, event_lock, background_lock), none of which is held while taking
 *   another.
 * I/O on the data device is done with a gate and block lock held, never with md_lock; the metadata
 * device is read under md_lock (a cache miss) and written under commit_lock only.
 */
#ifndef THINPOOL_POOL_PRIVATE_H
#define THINPOOL_POOL_PRIVATE_H

#include <pthread.h>
#include <stdatomic.h>

#include "block_locks.h"
#include "copy_buffers.h"
#include "host_space.h"
#include "redo_log.h"
#include "thinpool/abi.h"
#include "thinpool/error.h"
#include "thinpool/metadata.h"

#define GATE_SLOTS    8u
#define CHUNK_ENTRIES 512u
#define FLUSH_RESULTS 64u

/* A cached mapping: 0 is not known, 1 is known to be unmapped, else the mapping value + 2. */
#define CACHE_UNKNOWN  UINT64_C(0)
#define CACHE_UNMAPPED UINT64_C(1)
#define CACHE_BIAS     UINT64_C(2)

struct chunk {
	_Atomic uint64_t entries[CHUNK_ENTRIES];
};

struct chunk_table {
	uint64_t nr_chunks;
	uint64_t nr_used;          /* chunks from here on were never made; under md_lock */
	struct chunk_table *older; /* readers may still look at it: freed at close */
	_Atomic(struct chunk *) chunks[];
};

struct gate_slot {
	_Alignas(64) _Atomic uint32_t inside;
};

struct tp_volume {
	struct gate_slot gate[GATE_SLOTS];
	_Atomic uint32_t gate_closed;
	_Atomic uint32_t snapshotted_time; /* mappings older than this may be shared */
	_Atomic uint64_t changed_in;       /* transaction of its last change */
	_Atomic uint64_t size;             /* bytes */
	_Atomic(struct chunk_table *) table;
	struct tp_pool *pool;
	struct tp_device *device;
	struct tp_volume *next;
	struct tp_bdev *origin; /* external: read where nothing is mapped; NULL for zeros */
	uint64_t origin_size;   /* bytes */
	uint32_t id;
	bool read_only;
};

/* On the stack of whoever deletes; under md_lock. Such a volume is neither opened nor copied. */
struct doomed {
	uint32_t id;
	struct doomed *next;
};

struct flush_rounds {
	pthread_mutex_t lock;
	pthread_cond_t cond;
	uint64_t next; /* the round that has not begun */
	uint64_t done; /* all rounds up to this have ended */
	bool running;
	bool wants_commit; /* somebody who waits for the next round does */
	int results[FLUSH_RESULTS];
	struct tp_error errors[FLUSH_RESULTS];
};

struct tp_pool {
	struct tp_bdev *metadata_bdev, *data_bdev;
	struct tp_pool_options options;
	uint32_t block_size; /* bytes */
	uint32_t io_align;
	struct tp_block_locks *locks;
	struct tp_copy_buffers copy_buffers;

	pthread_mutex_t changes_lock; /* the set of open volumes is changed or relied upon */
	pthread_mutex_t md_lock;
	struct tp_metadata *md;
	struct tp_redo_log *redo;
	struct tp_volume *volumes;
	uint64_t *holes; /* bit a data block: known to read as zeros */
	struct tp_host_space space;
	struct tp_run_list to_punch; /* freed and committed: host space to be returned */
	uint64_t punching;           /* free blocks that are kept from allocation meanwhile */
	pthread_cond_t punched_cond; /* with md_lock: fewer are */
	struct doomed *doomed;       /* volumes that are being deleted in steps */

	/* Descriptors whose readiness a superblock waits for, -1 for none: of the open transaction
	 * (with md_lock), and of the sealed one (with commit_lock). */
	int after_fd;
	int sealed_after_fd;

	/* Something was done to the data device since the flush of the last commit began: set when
	 * it has been done and before that is known to anybody, so by whoever maps it or answers.
	 * Taken back under commit_lock. */
	_Atomic uint32_t data_unflushed;

	pthread_mutex_t commit_lock;
	struct flush_rounds flushes;
	_Atomic uint64_t committed; /* the last durable transaction */

	_Atomic uint32_t mode;
	_Atomic uint32_t needs_check;
	_Atomic uint32_t host_full; /* the host had no space for a data block */
	_Atomic uint32_t erroring;  /* writes no longer wait for space */
	_Atomic uint32_t low_water_reached;
	_Atomic uint64_t no_space_since_ms;

	pthread_mutex_t space_lock;
	pthread_cond_t space_cond;
	uint64_t space_generation;

	pthread_mutex_t event_lock;
	pthread_cond_t event_cond;
	uint64_t event_sequence;

	pthread_mutex_t background_lock;
	pthread_cond_t background_cond;
	pthread_t background;
	bool background_runs;
	_Atomic bool stop;
	bool orphaned; /* abandoned: freed with its last volume */
	bool commit_now;
	bool punch_now; /* a commit freed host space; it may have come before the thread woke */
	uint64_t next_commit_ms; /* the background thread's own */
	_Atomic uint32_t dirty;

	_Atomic uint64_t commits, data_flushes, metadata_flushes;
	_Atomic uint64_t provisioned, broke_sharing, discarded, replayed;
};

/* Bytes that are copied, or zeroed, at once. */
#define COPY_BYTES (UINT32_C(1) << 20)

/* ---- pool.c ------------------------------------------------------------------------------- */

uint64_t tp_now_ms(void);
/* CLOCK_MONOTONIC, for the pool's conditions. */
struct timespec tp_deadline_in(uint64_t ms);
void tp_pool_free(struct tp_pool *pool);
void tp_pool_event(struct tp_pool *pool);
void tp_pool_set_mode(struct tp_pool *pool, uint32_t mode);
/* After an error that leaves memory and disk apart: read-only, needs_check set. Returns status. */
int tp_pool_failed(struct tp_pool *pool, int status);
/* 0 when mappings may change, else the typed error. */
int tp_pool_check_writable(struct tp_pool *pool, struct tp_error *err);
/* Something was freed or grew: writers that wait for space try again. */
void tp_pool_space_changed(struct tp_pool *pool);
/* Wait for space: 0 to try again, TP_E_DATA_SPACE when it is over. */
int tp_pool_wait_for_space(struct tp_pool *pool, struct tp_error *err);
/* Under md_lock: a mapping changed. */
void tp_pool_dirtied(struct tp_pool *pool);
/* Under md_lock: which data blocks from first_block on the backing file has no space for. */
int tp_pool_find_holes(struct tp_pool *pool, uint64_t first_block, struct tp_error *err);

/* ---- pool_commit.c ------------------------------------------------------------------------ */

/* Behind each write to the data device and all else that a flush of it makes durable. */
static inline void tp_pool_data_changed(struct tp_pool *pool)
{
	/* Mostly set already: writers share the line then. */
	if (!atomic_load(&pool->data_unflushed))
		atomic_store(&pool->data_unflushed, 1);
}

/* One flush round: what was acknowledged before the call is durable on return. */
int tp_pool_flush_round(struct tp_pool *pool, bool commit, struct tp_error *err);
/* Seal, write and finish with the next transaction kept out; commit_lock and md_lock held. */
/* Until a descriptor is readable; at once for -1. May block. */
void tp_pool_wait_until_ready(int fd);
int tp_pool_commit_locked(struct tp_pool *pool, struct tp_error *err);
void *tp_pool_background(void *pool);

/* ---- volume.c ----------------------------------------------------------------------------- */

/* The cached mapping, CACHE_UNKNOWN when it must be loaded. */
uint64_t tp_cache_get(struct tp_volume *volume, uint64_t block);
/* Under md_lock. Without memory nothing is cached. */
void tp_cache_put(struct tp_volume *volume, uint64_t block, uint64_t entry);
/* Cached or loaded. */
int tp_cache_load(struct tp_volume *volume, uint64_t block, uint64_t *entry_ret,
		  struct tp_error *err);
bool tp_gate_try_enter(struct tp_volume *volume, uint32_t *slot_ret);
uint32_t tp_gate_enter(struct tp_volume *volume);
void tp_gate_leave(struct tp_volume *volume, uint32_t slot);
/* No write is inside on return, and none enters before tp_gate_open. */
void tp_gate_close(struct tp_volume *volume);
void tp_gate_open(struct tp_volume *volume);
struct tp_volume *tp_find_volume(struct tp_pool *pool, uint32_t id);
/* Under md_lock. TP_E_VOLUME_BUSY when the volume is being deleted. */
int tp_pool_check_not_doomed(struct tp_pool *pool, uint32_t id, struct tp_error *err);

static inline bool tp_entry_mapped(uint64_t entry)
{
	return entry >= CACHE_BIAS;
}

static inline bool tp_entry_shared(const struct tp_volume *volume, uint64_t entry)
{
	return tp_mapping_time(entry - CACHE_BIAS) <
	       atomic_load_explicit(&volume->snapshotted_time, memory_order_relaxed);
}

static inline uint64_t tp_entry_block(uint64_t entry)
{
	return tp_mapping_block(entry - CACHE_BIAS);
}

#endif
