/* SPDX-License-Identifier: Apache-2.0 */
#include "redo_log.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "thinpool/disk_format.h"
#include "thinpool/error.h"

#define REDO_MAGIC  UINT64_C(0x31676f6c6f646572)
#define RECORDS_MIN 64u

/* Positions count records since the log was made; a record stands at position % capacity. */
struct header {
	uint64_t magic;
	uint64_t capacity;
	_Atomic uint64_t head;   /* next to be written */
	_Atomic uint64_t tail;   /* first that is not committed */
	_Atomic uint64_t sealed; /* up to here the pending superblock covers; 0: none is pending */
	uint8_t superblock[TP_MD_BLOCK_SIZE];
};

struct tp_redo_log {
	struct header *header; /* NULL: keeps nothing */
	struct tp_redo_record *records;
	bool grouping;
	uint64_t grouped; /* records behind head that are not visible yet */
};

int tp_redo_open(void *memory, size_t size, const void *committed_superblock,
		 struct tp_redo_log **log_ret, struct tp_error *err)
{
	struct tp_redo_log *log = calloc(1, sizeof(*log));
	struct header *h = memory;
	uint64_t capacity;

	if (!log)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for the redo log");
	*log_ret = log;
	if (!memory)
		return 0;
	if (size < sizeof(*h) + RECORDS_MIN * sizeof(struct tp_redo_record)) {
		free(log);
		return tp_fail(err, TP_E_INVALID, "a redo log of %zu bytes is too small", size);
	}
	capacity = (size - sizeof(*h)) / sizeof(struct tp_redo_record);
	log->header = h;
	log->records = (struct tp_redo_record *)(h + 1);
	if (!h->magic) {
		h->capacity = capacity;
		atomic_thread_fence(memory_order_seq_cst);
		h->magic = REDO_MAGIC;
		return 0;
	}
	if (h->magic != REDO_MAGIC || h->capacity != capacity) {
		free(log);
		return tp_fail(err, TP_E_INVALID, "this is no redo log of this size");
	}
	if (h->sealed) {
		/* Did the superblock get there before the writer died? */
		if (!memcmp(h->superblock, committed_superblock, TP_MD_BLOCK_SIZE))
			h->tail = h->sealed;
		h->sealed = 0;
	}
	return 0;
}

void tp_redo_close(struct tp_redo_log *log)
{
	free(log);
}

uint64_t tp_redo_count(const struct tp_redo_log *log)
{
	return log->header ? log->header->head - log->header->tail : 0;
}

void tp_redo_get(const struct tp_redo_log *log, uint64_t i, struct tp_redo_record *record_ret)
{
	const struct header *h = log->header;

	TP_ASSERT(i < tp_redo_count(log));
	*record_ret = log->records[(h->tail + i) % h->capacity];
}

bool tp_redo_has_room(const struct tp_redo_log *log, uint64_t n)
{
	return !log->header || tp_redo_count(log) + log->grouped + n <= log->header->capacity;
}

bool tp_redo_half_full(const struct tp_redo_log *log)
{
	return log->header && tp_redo_count(log) > log->header->capacity / 2;
}

void tp_redo_append(struct tp_redo_log *log, enum tp_redo_kind kind, uint32_t device, uint64_t a,
		    uint64_t b)
{
	struct header *h = log->header;
	uint64_t head;

	if (!h)
		return;
	TP_ASSERT(tp_redo_has_room(log, 1));
	head = atomic_load_explicit(&h->head, memory_order_relaxed) + log->grouped;
	log->records[head % h->capacity] =
		(struct tp_redo_record){ .kind = kind, .device = device, .a = a, .b = b };
	if (log->grouping)
		log->grouped++;
	else
		atomic_store_explicit(&h->head, head + 1, memory_order_release);
}

void tp_redo_begin_group(struct tp_redo_log *log)
{
	TP_ASSERT(!log->grouping && !log->grouped);
	log->grouping = true;
}

void tp_redo_end_group(struct tp_redo_log *log, bool keep)
{
	TP_ASSERT(log->grouping);
	if (keep && log->header)
		atomic_fetch_add_explicit(&log->header->head, log->grouped, memory_order_release);
	log->grouping = false;
	log->grouped = 0;
}

void tp_redo_seal(struct tp_redo_log *log, const void *superblock)
{
	struct header *h = log->header;

	if (!h)
		return;
	TP_ASSERT(!h->sealed && !log->grouping);
	memcpy(h->superblock, superblock, TP_MD_BLOCK_SIZE);
	/* Position 0 means none; an empty log that commits anyway has nothing to forget. */
	atomic_store_explicit(&h->sealed, h->head, memory_order_release);
}

void tp_redo_committed(struct tp_redo_log *log)
{
	struct header *h = log->header;

	if (!h || !h->sealed)
		return;
	/* In this order: killed between the two, the successor compares and does the same. */
	atomic_store_explicit(&h->tail, h->sealed, memory_order_release);
	atomic_store_explicit(&h->sealed, 0, memory_order_release);
}

void tp_redo_clear(struct tp_redo_log *log)
{
	if (!log->header)
		return;
	log->header->sealed = 0;
	log->header->tail = log->header->head;
}
