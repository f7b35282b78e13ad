/* SPDX-License-Identifier: Apache-2.0 */
/**
 * Metadata blocks in memory: read through a validator, changed only when new, written at a commit.
 *
 * A block is clean (as on disk), new (made in the open transaction, changeable) or sealed (part of
 * the transaction that is being written; no longer changeable, still readable). The committed
 * state is never overwritten, so a block in place is never dirtied: there is no other state. The
 * superblock is not kept here.
 *
 * A pointer handed out stays valid until tp_bm_trim, which only the owner of the metadata lock
 * calls between operations. Not thread-safe: the caller holds the metadata lock, but for
 * tp_bm_write_sealed, which touches sealed blocks only and runs beside readers.
 */
#ifndef THINPOOL_BLOCK_MANAGER_H
#define THINPOOL_BLOCK_MANAGER_H

#include "thinpool/bdev.h"

struct tp_block_manager;

/* What a checksummed block is: chooses the salt and the validator. */
enum tp_block_kind {
	TP_KIND_NODE = 1,
	TP_KIND_INDEX = 2,
	TP_KIND_BITMAP = 3,
	TP_KIND_SUPERBLOCK = 4 /* a metadata snapshot's copy only */
};

struct tp_block_manager *tp_bm_create(struct tp_bdev *bdev, uint64_t cache_bytes);
void tp_bm_destroy(struct tp_block_manager *bm);

/* Reads from disk when it is not cached: may block. The block is valid as its kind on success. */
int tp_bm_read(struct tp_block_manager *bm, uint64_t block, enum tp_block_kind kind,
	       const void **data_ret, struct tp_error *err);
/* A new block of zeros. What was cached under its number is forgotten. */
int tp_bm_new(struct tp_block_manager *bm, uint64_t block, enum tp_block_kind kind, void **data_ret,
	      struct tp_error *err);
/* The changeable contents of a new block. */
void *tp_bm_new_data(struct tp_block_manager *bm, uint64_t block);
/* Drop a new block that is no longer referred to: it need not be written. */
void tp_bm_forget(struct tp_block_manager *bm, uint64_t block);

/* Every new block becomes sealed. None may be sealed already. */
void tp_bm_seal(struct tp_block_manager *bm);
/* Write the sealed blocks, neighbours together. Without the metadata lock; blocks. */
int tp_bm_write_sealed(struct tp_block_manager *bm, struct tp_error *err);
/* Sealed blocks become clean. */
void tp_bm_finish_sealed(struct tp_block_manager *bm);

/* Give back clean blocks above the limit, the longest unused first. */
void tp_bm_trim(struct tp_block_manager *bm);
uint64_t tp_bm_nr_new(const struct tp_block_manager *bm);

/* Checksum of a block's bytes 4 ... 4095 with its kind's salt. */
uint32_t tp_block_checksum(const void *data, uint32_t salt);

#endif
