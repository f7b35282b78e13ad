/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Visiting a set of metadata blocks in large sequential reads, and reading lists of them.
 *
 * The set is a bitmap, so that any order of discovery becomes the order of the disk. Wanted blocks
 * that lie close together are one extent and one read, the few between them read along and dropped.
 */
#include <stdlib.h>

#include "thinpool/bdev.h"
#include "thinpool/error.h"
#include "walk_stream.h"

#define SHARE_BLOCKS      64u /* extents that are cut short to share work are not shorter */
#define VISIT_TEAM_BLOCKS 32u /* with fewer, waking the other threads costs more than it gains */

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
	rc = tp_walk_lanes_init(reader, nr_threads, err);
	if (rc) {
		tp_walk_reader_destroy(reader);
		return rc;
	}
	*reader_ret = reader;
	return 0;
}

void tp_walk_reader_destroy(struct tp_walk_reader *reader)
{
	if (!reader)
		return;
	tp_walk_lanes_deinit(reader);
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
	struct tp_walk_stream stream;
	const uint64_t *bits;
	uint64_t nr_bits;
	tp_walk_visit visit;
	void *argument;
	pthread_mutex_t lock;
	uint64_t next;    /* under lock: where the next extent is looked for */
	uint64_t nr_left; /* under lock: bits at or after next */
};

/* So few that the last ones are spread over all threads. */
static uint64_t extent_blocks(const struct visiting *v)
{
	uint64_t share = v->nr_left / (2 * tp_walk_team_size(v->stream.reader->team));
	uint64_t most = tp_walk_extent_most(&v->stream);

	share = share < SHARE_BLOCKS ? SHARE_BLOCKS : share;
	return share < most ? share : most;
}

static bool take_marked(struct tp_walk_stream *stream, struct tp_walk_extent *extent)
{
	struct visiting *v = (struct visiting *)stream;
	uint64_t begin, end, wanted, most;

	pthread_mutex_lock(&v->lock);
	most = extent_blocks(v);
	begin = tp_walk_bit_next(v->bits, v->next, v->nr_bits);
	end = begin;
	wanted = begin;
	while (wanted < v->nr_bits && wanted - end <= TP_WALK_GAP_BLOCKS && wanted - begin < most) {
		end = wanted + 1;
		v->nr_left--;
		wanted = tp_walk_bit_next(v->bits, end, v->nr_bits);
	}
	v->next = end;
	pthread_mutex_unlock(&v->lock);
	extent->begin = begin;
	extent->end = end;
	return end > begin;
}

static void give_marked(struct tp_walk_stream *stream, unsigned thread,
			const struct tp_walk_extent *extent, const uint8_t *data)
{
	struct visiting *v = (struct visiting *)stream;
	struct tp_walk_reader *reader = stream->reader;
	uint8_t single[TP_MD_BLOCK_SIZE] __attribute__((aligned(4096)));
	uint64_t visited = 0;

	for (uint64_t block = extent->begin; block < extent->end;
	     block = tp_walk_bit_next(v->bits, block + 1, extent->end)) {
		int status = 0;

		if (!data)
			status = tp_walk_read(reader, block, single, NULL);
		v->visit(v->argument, thread, block,
			 data     ? data + (block - extent->begin) * TP_MD_BLOCK_SIZE
			 : status ? NULL
				  : single,
			 status);
		visited++;
	}
	atomic_fetch_add_explicit(&reader->done, visited, memory_order_relaxed);
}

static uint64_t count_bits(const uint64_t *bits, uint64_t nr_bits)
{
	uint64_t nr = 0;

	for (uint64_t word = 0; word < tp_walk_words(nr_bits); word++)
		nr += (unsigned)__builtin_popcountll(bits[word]);
	return nr;
}

void tp_walk_blocks(struct tp_walk_reader *reader, const uint64_t *bits, uint64_t nr_bits,
		    tp_walk_visit visit, void *argument)
{
	uint64_t nr = count_bits(bits, nr_bits);
	struct visiting v = {
		.stream = {
			.reader = reader,
			.take = take_marked,
			.give = give_marked,
			.nr = nr,
			.small = nr < TP_WALK_SMALL_BLOCKS,
			.alone = nr < VISIT_TEAM_BLOCKS,
		},
		.nr_left = nr,
		.bits = bits,
		.nr_bits = nr_bits,
		.visit = visit,
		.argument = argument,
		.lock = PTHREAD_MUTEX_INITIALIZER,
	};

	tp_walk_stream_run(&v.stream);
	pthread_mutex_destroy(&v.lock);
}

/* ---- lists ------------------------------------------------------------------------------- */

struct wanted {
	uint64_t block;
	size_t slot;
};

struct listing {
	struct tp_walk_stream stream;
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

/* The cookie is the extent's first entry of the list. */
static bool take_listed(struct tp_walk_stream *stream, struct tp_walk_extent *extent)
{
	struct listing *l = (struct listing *)stream;
	size_t first, end;

	pthread_mutex_lock(&l->lock);
	first = l->next;
	end = first;
	while (end < l->nr_wanted &&
	       (end == first ||
		(l->wanted[end].block - l->wanted[end - 1].block <= TP_WALK_GAP_BLOCKS &&
		 l->wanted[end].block - l->wanted[first].block < tp_walk_extent_most(stream))))
		end++;
	l->next = end;
	pthread_mutex_unlock(&l->lock);
	extent->cookie = first;
	if (end == first)
		return false;
	extent->begin = l->wanted[first].block;
	/* A pointer of all ones has no block after it: an extent past any device will do. */
	extent->end =
		l->wanted[end - 1].block == UINT64_MAX ? UINT64_MAX : l->wanted[end - 1].block + 1;
	return true;
}

static void give_listed(struct tp_walk_stream *stream, unsigned thread,
			const struct tp_walk_extent *extent, const uint8_t *data)
{
	struct listing *l = (struct listing *)stream;
	size_t i = extent->cookie;

	(void)thread;
	for (; i < l->nr_wanted && l->wanted[i].block >= extent->begin &&
	       l->wanted[i].block < extent->end;
	     i++) {
		const struct wanted *w = &l->wanted[i];
		uint8_t *slot = l->slots + w->slot * TP_MD_BLOCK_SIZE;

		l->statuses[w->slot] = 0;
		if (data)
			memcpy(slot, data + (w->block - extent->begin) * TP_MD_BLOCK_SIZE,
			       TP_MD_BLOCK_SIZE);
		else
			l->statuses[w->slot] = tp_walk_read(stream->reader, w->block, slot, NULL);
	}
	atomic_fetch_add_explicit(&stream->reader->done, i - extent->cookie, memory_order_relaxed);
}

int tp_walk_read_list(struct tp_walk_reader *reader, const uint64_t *blocks, size_t nr_blocks,
		      uint8_t *slots, int *statuses, struct tp_error *err)
{
	struct wanted *wanted = malloc((nr_blocks ? nr_blocks : 1) * sizeof(*wanted));
	struct listing l = {
		.stream = {
			.reader = reader,
			.take = take_listed,
			.give = give_listed,
			.nr = nr_blocks,
			.small = nr_blocks < TP_WALK_SMALL_BLOCKS,
			.alone = nr_blocks < TP_WALK_SMALL_BLOCKS,
		},
		.wanted = wanted,
		.nr_wanted = nr_blocks,
		.slots = slots,
		.statuses = statuses,
		.lock = PTHREAD_MUTEX_INITIALIZER,
	};

	if (!wanted)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to read %zu blocks", nr_blocks);
	/* What is never reached, since the walk was cancelled, was not read. */
	for (size_t i = 0; i < nr_blocks; i++) {
		wanted[i] = (struct wanted){ .block = blocks[i], .slot = i };
		statuses[i] = TP_E_INTERRUPTED;
	}
	qsort(wanted, nr_blocks, sizeof(*wanted), compare_wanted);
	tp_walk_stream_run(&l.stream);
	pthread_mutex_destroy(&l.lock);
	free(wanted);
	return 0;
}
