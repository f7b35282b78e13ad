/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Visiting a set of metadata blocks in large sequential reads.
 *
 * The set is a bitmap, so that any order of discovery becomes the order of the disk. Wanted blocks
 * that lie close together are one read, the few between them read along and dropped. Each thread
 * takes the next such extent, reads it into a buffer of its own and visits its blocks: while one
 * computes, another reads.
 */
#include <pthread.h>
#include <stdlib.h>

#include "thinpool/bdev.h"
#include "thinpool/error.h"
#include "thinpool/walk.h"

#define EXTENT_BLOCKS 128u /* at most: 512 KiB, past which a read gains nothing */
#define GAP_BLOCKS    8u   /* read along rather than start another read */

struct tp_walk_reader {
	struct tp_bdev *bdev;
	struct tp_walk_team *team;
	uint64_t nr_blocks;
	uint8_t *buffers;
	_Atomic uint64_t done;
	_Atomic bool cancelled;
};

static uint64_t buffers_size(unsigned nr_threads)
{
	return (uint64_t)nr_threads * EXTENT_BLOCKS * TP_MD_BLOCK_SIZE;
}

int tp_walk_reader_create(struct tp_bdev *bdev, unsigned nr_threads,
			  struct tp_walk_reader **reader_ret, struct tp_error *err)
{
	struct tp_walk_reader *reader = calloc(1, sizeof(*reader));
	int rc;

	if (!reader)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a metadata reader");
	if (nr_threads == 0)
		nr_threads = 2;
	reader->bdev = bdev;
	reader->nr_blocks = tp_bdev_size(bdev) / TP_MD_BLOCK_SIZE;
	rc = tp_walk_team_create(nr_threads, &reader->team, err);
	if (rc) {
		free(reader);
		return rc;
	}
	reader->buffers = tp_walk_map(buffers_size(nr_threads));
	if (!reader->buffers) {
		tp_walk_reader_destroy(reader);
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for read buffers");
	}
	*reader_ret = reader;
	return 0;
}

void tp_walk_reader_destroy(struct tp_walk_reader *reader)
{
	if (!reader)
		return;
	tp_walk_unmap(reader->buffers, buffers_size(tp_walk_team_size(reader->team)));
	tp_walk_team_destroy(reader->team);
	free(reader);
}

struct tp_walk_team *tp_walk_reader_team(struct tp_walk_reader *reader)
{
	return reader->team;
}

uint64_t tp_walk_reader_nr_blocks(const struct tp_walk_reader *reader)
{
	return reader->nr_blocks;
}

uint64_t tp_walk_reader_done(const struct tp_walk_reader *reader)
{
	return atomic_load_explicit(&reader->done, memory_order_relaxed);
}

void tp_walk_cancel(struct tp_walk_reader *reader)
{
	atomic_store_explicit(&reader->cancelled, true, memory_order_relaxed);
}

bool tp_walk_cancelled(const struct tp_walk_reader *reader)
{
	return atomic_load_explicit(&reader->cancelled, memory_order_relaxed);
}

uint64_t tp_walk_bit_next(const uint64_t *bits, uint64_t from, uint64_t nr_bits)
{
	uint64_t words = tp_walk_words(nr_bits);
	uint64_t word = from / 64;
	uint64_t value, bit;

	if (from >= nr_bits)
		return nr_bits;
	value = bits[word] & UINT64_MAX << from % 64;
	while (!value) {
		if (++word == words)
			return nr_bits;
		value = bits[word];
	}
	bit = word * 64 + (unsigned)__builtin_ctzll(value);
	return bit < nr_bits ? bit : nr_bits;
}

int tp_walk_read(struct tp_walk_reader *reader, uint64_t block, void *buffer, struct tp_error *err)
{
	if (block >= reader->nr_blocks)
		return tp_fail_block(
			err, TP_E_METADATA_TRUNCATED, block, reader->nr_blocks, block + 1,
			"metadata block %llu lies past the end of the device (%llu "
			"blocks)",
			(unsigned long long)block, (unsigned long long)reader->nr_blocks);
	return tp_bdev_read(reader->bdev, block * TP_MD_BLOCK_SIZE, buffer, TP_MD_BLOCK_SIZE, err);
}

/* ---- visiting ---------------------------------------------------------------------------- */

struct visiting {
	struct tp_walk_reader *reader;
	const uint64_t *bits;
	uint64_t nr_bits;
	tp_walk_visit visit;
	void *argument;
	pthread_mutex_t lock;
	uint64_t next; /* under lock: where the next extent is looked for */
};

/* The next wanted blocks that are worth one read: [*begin_ret, end), end == begin at the end. */
static uint64_t take_extent(struct visiting *v, uint64_t *begin_ret)
{
	uint64_t begin, end, wanted;

	pthread_mutex_lock(&v->lock);
	begin = tp_walk_bit_next(v->bits, v->next, v->nr_bits);
	end = begin;
	wanted = begin;
	while (wanted < v->nr_bits && wanted - end <= GAP_BLOCKS &&
	       wanted - begin < EXTENT_BLOCKS) {
		end = wanted + 1;
		wanted = tp_walk_bit_next(v->bits, end, v->nr_bits);
	}
	v->next = end;
	pthread_mutex_unlock(&v->lock);
	*begin_ret = begin;
	return end;
}

static void visit_singly(struct visiting *v, unsigned thread, uint64_t begin, uint64_t end,
			 uint8_t *buffer)
{
	for (uint64_t block = tp_walk_bit_next(v->bits, begin, end); block < end;
	     block = tp_walk_bit_next(v->bits, block + 1, end)) {
		int status = tp_walk_read(v->reader, block, buffer, NULL);

		v->visit(v->argument, thread, block, status ? NULL : buffer, status);
	}
}

static void visit_extents(void *argument, unsigned thread)
{
	struct visiting *v = argument;
	struct tp_walk_reader *reader = v->reader;
	uint8_t *buffer = reader->buffers + (size_t)thread * EXTENT_BLOCKS * TP_MD_BLOCK_SIZE;
	uint64_t begin, end, block, visited;

	while (!tp_walk_cancelled(reader) && (end = take_extent(v, &begin)) > begin) {
		if (end > reader->nr_blocks ||
		    tp_bdev_read(reader->bdev, begin * TP_MD_BLOCK_SIZE, buffer,
				 (end - begin) * TP_MD_BLOCK_SIZE, NULL)) {
			/* One bad sector must not take its neighbours along. */
			visit_singly(v, thread, begin, end, buffer);
			continue;
		}
		visited = 0;
		for (block = begin; block < end;
		     block = tp_walk_bit_next(v->bits, block + 1, end)) {
			v->visit(v->argument, thread, block,
				 buffer + (block - begin) * TP_MD_BLOCK_SIZE, 0);
			visited++;
		}
		atomic_fetch_add_explicit(&reader->done, visited, memory_order_relaxed);
	}
}

void tp_walk_blocks(struct tp_walk_reader *reader, const uint64_t *bits, uint64_t nr_bits,
		    tp_walk_visit visit, void *argument)
{
	struct visiting v = {
		.reader = reader,
		.bits = bits,
		.nr_bits = nr_bits,
		.visit = visit,
		.argument = argument,
		.lock = PTHREAD_MUTEX_INITIALIZER,
	};

	tp_walk_team_run(reader->team, visit_extents, &v);
	pthread_mutex_destroy(&v.lock);
}

/* ---- lists ------------------------------------------------------------------------------- */

struct wanted {
	uint64_t block;
	size_t slot;
};

struct listing {
	struct tp_walk_reader *reader;
	const struct wanted *wanted; /* sorted by block */
	size_t nr_wanted;
	uint8_t *slots;
	int *statuses;
	pthread_mutex_t lock;
	size_t next; /* under lock */
};

static int compare_wanted(const void *a, const void *b)
{
	const struct wanted *left = a, *right = b;

	return (left->block > right->block) - (left->block < right->block);
}

/* Entries [*first_ret, end) of the sorted list are one read. */
static size_t take_wanted(struct listing *l, size_t *first_ret)
{
	size_t first, end;

	pthread_mutex_lock(&l->lock);
	first = l->next;
	end = first;
	while (end < l->nr_wanted &&
	       (end == first || (l->wanted[end].block - l->wanted[end - 1].block <= GAP_BLOCKS &&
				 l->wanted[end].block - l->wanted[first].block < EXTENT_BLOCKS)))
		end++;
	l->next = end;
	pthread_mutex_unlock(&l->lock);
	*first_ret = first;
	return end;
}

static void read_listed(void *argument, unsigned thread)
{
	struct listing *l = argument;
	struct tp_walk_reader *reader = l->reader;
	uint8_t *buffer = reader->buffers + (size_t)thread * EXTENT_BLOCKS * TP_MD_BLOCK_SIZE;
	size_t first, end;

	while ((end = take_wanted(l, &first)) > first) {
		uint64_t begin = l->wanted[first].block;
		uint64_t length = l->wanted[end - 1].block - begin + 1;
		bool whole = begin < reader->nr_blocks && length <= reader->nr_blocks - begin &&
			     !tp_bdev_read(reader->bdev, begin * TP_MD_BLOCK_SIZE, buffer,
					   length * TP_MD_BLOCK_SIZE, NULL);

		for (size_t i = first; i < end; i++) {
			const struct wanted *w = &l->wanted[i];
			uint8_t *slot = l->slots + w->slot * TP_MD_BLOCK_SIZE;

			l->statuses[w->slot] = 0;
			if (whole)
				memcpy(slot, buffer + (w->block - begin) * TP_MD_BLOCK_SIZE,
				       TP_MD_BLOCK_SIZE);
			else
				l->statuses[w->slot] = tp_walk_read(reader, w->block, slot, NULL);
		}
		atomic_fetch_add_explicit(&reader->done, end - first, memory_order_relaxed);
	}
}

int tp_walk_read_list(struct tp_walk_reader *reader, const uint64_t *blocks, size_t nr_blocks,
		      uint8_t *slots, int *statuses, struct tp_error *err)
{
	struct wanted *wanted = malloc((nr_blocks ? nr_blocks : 1) * sizeof(*wanted));
	struct listing l = {
		.reader = reader,
		.wanted = wanted,
		.nr_wanted = nr_blocks,
		.slots = slots,
		.statuses = statuses,
		.lock = PTHREAD_MUTEX_INITIALIZER,
	};

	if (!wanted)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to read %zu blocks", nr_blocks);
	for (size_t i = 0; i < nr_blocks; i++)
		wanted[i] = (struct wanted){.block = blocks[i], .slot = i};
	qsort(wanted, nr_blocks, sizeof(*wanted), compare_wanted);
	if (nr_blocks > EXTENT_BLOCKS)
		tp_walk_team_run(reader->team, read_listed, &l);
	else
		read_listed(&l, 0); /* waking the others would cost more than the read */
	pthread_mutex_destroy(&l.lock);
	free(wanted);
	return 0;
}
