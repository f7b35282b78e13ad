/* SPDX-License-Identifier: Apache-2.0 */
/**
 * Reading, judging and writing the superblock. Thread-safe; may block.
 */
#ifndef THINPOOL_SUPERBLOCK_H
#define THINPOOL_SUPERBLOCK_H

#include "thinpool/bdev.h"
#include "thinpool/disk_format.h"

/* Metadata blocks of a device that the format can use. */
uint64_t tp_superblock_usable_blocks(struct tp_bdev *bdev);
/* Into a buffer of TP_MD_BLOCK_SIZE aligned bytes. TP_E_UNFORMATTED, TP_E_METADATA_TRUNCATED,
 * TP_E_SUPERBLOCK_*. */
int tp_superblock_read(struct tp_bdev *bdev, void *buffer, struct tp_error *err);
/* Seals the checksum in the buffer and writes it; no flush. */
int tp_superblock_write(struct tp_bdev *bdev, void *buffer, struct tp_error *err);

#endif
