/* SPDX-License-Identifier: Apache-2.0 */
/**
 * A fixed table of shared/exclusive locks for blocks of volumes.
 *
 * Every request holds the lock of each block that it has resolved, shared, while its I/O runs;
 * provisioning, breaking sharing, unmapping and read-modify-write hold it exclusively. So a block
 * that some request has resolved is neither freed, nor moved, nor half rewritten under it.
 *
 * Two blocks may share a lock. Whoever holds one may only try another, never wait for it: a
 * blocking function is called with none held. A lock may be released by another thread than the
 * one that took it. A waiting exclusive user keeps new shared users out, so it is not starved.
 */
#ifndef THINPOOL_BLOCK_LOCKS_H
#define THINPOOL_BLOCK_LOCKS_H

#include <stdbool.h>
#include <stdint.h>

struct tp_block_locks;

struct tp_block_locks *tp_block_locks_create(void);
void tp_block_locks_destroy(struct tp_block_locks *locks);
uint32_t tp_block_lock_index(uint32_t volume_id, uint64_t block);
bool tp_block_lock_try_shared(struct tp_block_locks *locks, uint32_t index);
void tp_block_lock_shared(struct tp_block_locks *locks, uint32_t index);
void tp_block_unlock_shared(struct tp_block_locks *locks, uint32_t index);
void tp_block_lock_exclusive(struct tp_block_locks *locks, uint32_t index);
bool tp_block_lock_try_exclusive(struct tp_block_locks *locks, uint32_t index);
void tp_block_unlock_exclusive(struct tp_block_locks *locks, uint32_t index);

#endif
