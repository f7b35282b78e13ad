/* SPDX-License-Identifier: Apache-2.0 */
/**
 * Space of the host's under the data blocks that come next, taken ahead in larger pieces.
 *
 * The data file is sparse. A write into a hole of it makes the host's filesystem find space, which
 * ext4 does for one writer at a time; writes into space that it gave before go on side by side.
 * So once many first writes come in a row, the free blocks behind the last one get their space in
 * one call. What was taken and not used is returned when no first write came for a while.
 *
 * Only space is moved: such blocks are free and read as zeros before and after, on disk nothing
 * refers to them, and a write that finds no space ahead does without. A worker that dies leaves
 * at most AHEAD_MAX bytes taken, under blocks that the next first writes use.
 *
 * Invariants, under md_lock: [begin, end) are data blocks whose space was taken; those that were
 * free and known to read as zeros then, and that nobody took since, are so still.
 */
#ifndef THINPOOL_HOST_SPACE_H
#define THINPOOL_HOST_SPACE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct tp_pool;

struct tp_host_space {
	uint64_t begin, end;
	uint64_t recent;  /* holes taken in a row, without a longer pause */
	uint64_t last_ms; /* when the last was */
	bool busy;        /* somebody is taking space */
	bool unavailable;
	_Atomic uint32_t held; /* there is something to return */
};

/* Under md_lock: a hole was reserved. Whether there is space under it already; *extend_ret says
 * that tp_host_space_extend should be called once md_lock is released. */
bool tp_host_space_use(struct tp_pool *pool, uint64_t block, bool *extend_ret);
/* Take space behind a block. Without locks; may block. What fails costs time only. */
void tp_host_space_extend(struct tp_pool *pool, uint64_t block);
/* Queue what was taken and not used to be returned: see tp_pool_punch_some. Blocks queued. */
uint64_t tp_host_space_release(struct tp_pool *pool);

#endif
