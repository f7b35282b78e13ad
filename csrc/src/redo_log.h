/* SPDX-License-Identifier: Apache-2.0 */
/**
 * What was acknowledged and is not committed yet, in memory that outlives the process.
 *
 * The supervisor owns the memory; a worker appends a record after each change of the metadata in
 * memory and before the request is answered. Its successor opens the last commit and replays the
 * records onto it. Which records a commit covers is decided by the superblock on disk: before it
 * is written, its image and the log position stand here, so that a successor can tell on which
 * side of the write its predecessor died.
 *
 * It is not a journal: nothing of it survives a power cut, and nothing needs to.
 *
 * Not thread-safe: the metadata lock. Records are fixed-size and a position is published after
 * its record, so a process killed at any instruction leaves whole records only.
 */
#ifndef THINPOOL_REDO_LOG_H
#define THINPOOL_REDO_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "thinpool/abi.h"

enum tp_redo_kind {
	TP_REDO_PROVISION = 1, /* a: virtual block, b: data block */
	TP_REDO_UNMAP = 2,     /* a: virtual block */
	TP_REDO_CREATE = 3,
	TP_REDO_SNAPSHOT = 4, /* a: origin */
	TP_REDO_DELETE = 5,
	TP_REDO_TRANSACTION_ID = 6 /* a: the new one */
};

struct tp_redo_record {
	uint32_t kind;
	uint32_t device;
	uint64_t a, b;
	uint64_t reserved;
};

struct tp_redo_log;

/* Attach to memory: zeros become an empty log; a log is taken up. committed_superblock is the one
 * on disk. NULL memory gives a log that keeps nothing. */
int tp_redo_open(void *memory, size_t size, const void *committed_superblock,
		 struct tp_redo_log **log_ret, struct tp_error *err);
void tp_redo_close(struct tp_redo_log *log);
/* Records to replay, oldest first. */
uint64_t tp_redo_count(const struct tp_redo_log *log);
void tp_redo_get(const struct tp_redo_log *log, uint64_t i, struct tp_redo_record *record_ret);
/* Room for n records. */
bool tp_redo_has_room(const struct tp_redo_log *log, uint64_t n);
bool tp_redo_half_full(const struct tp_redo_log *log);
/* The caller has asked tp_redo_has_room. */
void tp_redo_append(struct tp_redo_log *log, enum tp_redo_kind kind, uint32_t device, uint64_t a,
		    uint64_t b);
/* The records appended between the two become visible together: a successor finds all or none. */
void tp_redo_begin_group(struct tp_redo_log *log);
/* Without keep they are forgotten. */
void tp_redo_end_group(struct tp_redo_log *log, bool keep);
/* All records so far belong to the transaction that superblock is about to commit. */
void tp_redo_seal(struct tp_redo_log *log, const void *superblock);
/* That superblock is durable: its records are no longer needed. */
void tp_redo_committed(struct tp_redo_log *log);
/* Forget everything: after a clean close. */
void tp_redo_clear(struct tp_redo_log *log);

#endif
