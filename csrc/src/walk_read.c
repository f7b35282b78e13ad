/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Visiting a set of metadata blocks in large sequential reads.
 *
 * The set is a bitmap, so that any order of discovery becomes the order of the disk. Wanted blocks
 * that lie close together are one extent and one read, the few between them read along and dropped.
 * Each thread takes the next extents, keeps DEPTH of them in flight through a ring of its own, and
 * hands out one while the others are read: neither the disk nor a processor waits for the other.
 * Where there is no ring to be had (a device without a descriptor, io_uring forbidden), and for a
 * few blocks, it reads one extent after the other.
 *
 * The buffers are in huge pages: a read into them is few segments for the device, instead of one
 * for each page of 4 KiB, which doubles what a virtual disk gives. Large reads, many at a time,
 * gain until about 16 MiB are in flight. Clearing a huge page takes longer than reading a hundred
 * blocks, so that small sets have small buffers of their own, and more reads in flight, since
 * single blocks cost the device time rather than bandwidth.
 */
#include <errno.h>
#include <liburing.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#include "thinpool/bdev.h"
#include "thinpool/error.h"
#include "thinpool/walk.h"

#define EXTENT_BLOCKS 256u /* at most: 1 MiB, and less with more threads than two */
#define EXTENT_LEAST  32u
#define GAP_BLOCKS    8u /* read along rather than start another read */
#define DEPTH         8u /* extents in flight, a thread */
#define HUGE_PAGE     (UINT64_C(2) << 20)
#define SHARE_BLOCKS  16u  /* extents that are cut short to share work are not shorter */
#define SMALL_BLOCKS  512u /* fewer are read through small buffers */
#define SMALL_EXTENT  16u
#define SMALL_DEPTH   64u
#define RING_BLOCKS   8u   /* fewer are not worth a ring */
#define TEAM_BLOCKS   256u /* fewer are not worth waking the other threads */

/* What one thread reads with. */
struct lane {
	struct io_uring ring;
	enum {
		RING_UNTRIED,
		RING_READY,
		RING_NONE
	} state;
};

struct tp_walk_reader {
	struct tp_bdev *bdev;
	struct tp_walk_team *team;
	uint64_t nr_blocks;
	uint64_t extent_blocks; /* at most */
	uint8_t *buffers;       /* DEPTH a thread */
	uint8_t *small;         /* SMALL_DEPTH a thread */
	struct lane *lanes;
	_Atomic uint64_t done;
	_Atomic bool cancelled;
};

static uint64_t buffers_size(const struct tp_walk_reader *reader)
{
	uint64_t bytes = (uint64_t)tp_walk_team_size(reader->team) * DEPTH * reader->extent_blocks *
			 TP_MD_BLOCK_SIZE;

	return (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
}

static uint64_t small_size(const struct tp_walk_reader *reader)
{
	return (uint64_t)tp_walk_team_size(reader->team) * SMALL_DEPTH * SMALL_EXTENT *
	       TP_MD_BLOCK_SIZE;
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
	reader->extent_blocks = 2 * EXTENT_BLOCKS / nr_threads;
	if (reader->extent_blocks > EXTENT_BLOCKS)
		reader->extent_blocks = EXTENT_BLOCKS;
	if (reader->extent_blocks < EXTENT_LEAST)
		reader->extent_blocks = EXTENT_LEAST;
	rc = tp_walk_team_create(nr_threads, &reader->team, err);
	if (rc) {
		free(reader);
		return rc;
	}
	reader->buffers = tp_walk_map_dense(buffers_size(reader));
	reader->small = tp_walk_map(small_size(reader));
	reader->lanes = calloc(nr_threads, sizeof(*reader->lanes));
	if (!reader->buffers || !reader->small || !reader->lanes) {
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
	for (unsigned i = 0; reader->lanes && i < tp_walk_team_size(reader->team); i++)
		if (reader->lanes[i].state == RING_READY)
			io_uring_queue_exit(&reader->lanes[i].ring);
	free(reader->lanes);
	tp_walk_unmap(reader->buffers, buffers_size(reader));
	tp_walk_unmap(reader->small, small_size(reader));
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

/* ---- extents ----------------------------------------------------------------------------- */

/*
 * What is read, and what becomes of it. take gives the next extent [*begin_ret, end), end equal to
 * begin when there is none; *cookie_ret is handed to give. give gets NULL where the extent could
 * not be read whole: it then reads block by block, since one bad sector must not take its
 * neighbours along.
 */
struct stream {
	struct tp_walk_reader *reader;
	uint64_t (*take)(struct stream *stream, uint64_t *begin_ret, size_t *cookie_ret);
	void (*give)(struct stream *stream, unsigned thread, uint64_t begin, uint64_t end,
		     size_t cookie, const uint8_t *data);
	uint64_t nr; /* blocks that are wanted, before the first is taken */
};

struct extent {
	uint64_t begin;
	uint64_t end;
	size_t cookie;
};

static bool is_small(const struct stream *stream)
{
	return stream->nr < SMALL_BLOCKS;
}

static unsigned depth_of(const struct stream *stream)
{
	return is_small(stream) ? SMALL_DEPTH : DEPTH;
}

/* At most so many in one extent. */
static uint64_t extent_most(const struct stream *stream)
{
	return is_small(stream) ? SMALL_EXTENT : stream->reader->extent_blocks;
}

static uint8_t *buffer_of(const struct stream *stream, unsigned thread, unsigned slot)
{
	uint8_t *buffers = is_small(stream) ? stream->reader->small : stream->reader->buffers;

	return buffers +
	       ((size_t)thread * depth_of(stream) + slot) * extent_most(stream) * TP_MD_BLOCK_SIZE;
}

static bool on_device(const struct tp_walk_reader *reader, const struct extent *extent)
{
	return extent->end <= reader->nr_blocks;
}

static size_t bytes_of(const struct extent *extent)
{
	return (size_t)(extent->end - extent->begin) * TP_MD_BLOCK_SIZE;
}

static bool take(struct stream *stream, struct extent *extent)
{
	if (tp_walk_cancelled(stream->reader))
		return false;
	extent->end = stream->take(stream, &extent->begin, &extent->cookie);
	return extent->end > extent->begin;
}

static void read_in_turn(struct stream *stream, unsigned thread)
{
	struct tp_walk_reader *reader = stream->reader;
	uint8_t *buffer = buffer_of(stream, thread, 0);
	struct extent extent;

	while (take(stream, &extent)) {
		bool whole = on_device(reader, &extent) &&
			     !tp_bdev_read(reader->bdev, extent.begin * TP_MD_BLOCK_SIZE, buffer,
					   bytes_of(&extent), NULL);

		stream->give(stream, thread, extent.begin, extent.end, extent.cookie,
			     whole ? buffer : NULL);
	}
}

static bool ring_ready(struct tp_walk_reader *reader, struct lane *lane)
{
	if (lane->state == RING_UNTRIED)
		lane->state = reader->bdev->fd >= 0 &&
					      io_uring_queue_init(SMALL_DEPTH, &lane->ring, 0) == 0
				      ? RING_READY
				      : RING_NONE;
	return lane->state == RING_READY;
}

/* Start reading the next extent into a slot; false when there is none. */
static bool start(struct stream *stream, unsigned thread, unsigned slot, struct extent *extents)
{
	struct tp_walk_reader *reader = stream->reader;
	struct extent *extent = &extents[slot];
	struct io_uring_sqe *sqe;

	while (take(stream, extent)) {
		if (!on_device(reader, extent)) {
			stream->give(stream, thread, extent->begin, extent->end, extent->cookie,
				     NULL);
			continue;
		}
		sqe = io_uring_get_sqe(&reader->lanes[thread].ring);
		TP_ASSERT(sqe); /* no more than it holds are in flight */
		io_uring_prep_read(sqe, reader->bdev->fd, buffer_of(stream, thread, slot),
				   (unsigned)bytes_of(extent), extent->begin * TP_MD_BLOCK_SIZE);
		io_uring_sqe_set_data64(sqe, slot);
		return true;
	}
	return false;
}

/* Nothing is left in flight on return. */
static void read_ahead(struct stream *stream, unsigned thread)
{
	struct tp_walk_reader *reader = stream->reader;
	struct io_uring *ring = &reader->lanes[thread].ring;
	struct extent extents[SMALL_DEPTH];
	unsigned depth = depth_of(stream);
	unsigned nr_flying = 0;

	while (nr_flying < depth && start(stream, thread, nr_flying, extents))
		nr_flying++;
	while (nr_flying) {
		/* Of small reads half at a time, so that the next ones start together: each start
		 * on its own costs a system call and wakes the device. */
		unsigned wait = is_small(stream) && nr_flying > 1 ? nr_flying / 2 : 1;
		struct io_uring_cqe *cqe;
		int rc = io_uring_submit_and_wait(ring, wait);

		/* What is submitted must come back before its buffers are used again, so that there
		 * is no giving up; anything but these would be our own mistake. */
		if (rc < 0) {
			TP_ASSERT(rc == -EINTR || rc == -EAGAIN || rc == -EBUSY || rc == -ENOMEM);
			sched_yield();
			continue;
		}
		while (nr_flying && !io_uring_peek_cqe(ring, &cqe)) {
			unsigned slot = (unsigned)io_uring_cqe_get_data64(cqe);
			const struct extent *extent = &extents[slot];
			bool whole = cqe->res >= 0 && (size_t)cqe->res == bytes_of(extent);

			io_uring_cqe_seen(ring, cqe);
			stream->give(stream, thread, extent->begin, extent->end, extent->cookie,
				     whole ? buffer_of(stream, thread, slot) : NULL);
			if (!start(stream, thread, slot, extents))
				nr_flying--;
			else if (!is_small(stream))
				io_uring_submit(ring); /* what it cannot take now stays queued */
		}
	}
}

static void read_extents(void *argument, unsigned thread)
{
	struct stream *stream = argument;

	if (stream->nr >= RING_BLOCKS && ring_ready(stream->reader, &stream->reader->lanes[thread]))
		read_ahead(stream, thread);
	else
		read_in_turn(stream, thread);
}

/* ---- visiting ---------------------------------------------------------------------------- */

struct visiting {
	struct stream stream;
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
	uint64_t most = extent_most(&v->stream);

	share = share < SHARE_BLOCKS ? SHARE_BLOCKS : share;
	return share < most ? share : most;
}

static uint64_t take_marked(struct stream *stream, uint64_t *begin_ret, size_t *cookie_ret)
{
	struct visiting *v = (struct visiting *)stream;
	uint64_t begin, end, wanted, most;

	*cookie_ret = 0;
	pthread_mutex_lock(&v->lock);
	most = extent_blocks(v);
	begin = tp_walk_bit_next(v->bits, v->next, v->nr_bits);
	end = begin;
	wanted = begin;
	while (wanted < v->nr_bits && wanted - end <= GAP_BLOCKS && wanted - begin < most) {
		end = wanted + 1;
		v->nr_left--;
		wanted = tp_walk_bit_next(v->bits, end, v->nr_bits);
	}
	v->next = end;
	pthread_mutex_unlock(&v->lock);
	*begin_ret = begin;
	return end;
}

static void give_marked(struct stream *stream, unsigned thread, uint64_t begin, uint64_t end,
			size_t cookie, const uint8_t *data)
{
	struct visiting *v = (struct visiting *)stream;
	struct tp_walk_reader *reader = stream->reader;
	uint8_t single[TP_MD_BLOCK_SIZE] __attribute__((aligned(4096)));
	uint64_t visited = 0;

	(void)cookie;
	for (uint64_t block = begin; block < end;
	     block = tp_walk_bit_next(v->bits, block + 1, end)) {
		int status = 0;

		if (!data)
			status = tp_walk_read(reader, block, single, NULL);
		v->visit(v->argument, thread, block,
			 data     ? data + (block - begin) * TP_MD_BLOCK_SIZE
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
		},
		.nr_left = nr,
		.bits = bits,
		.nr_bits = nr_bits,
		.visit = visit,
		.argument = argument,
		.lock = PTHREAD_MUTEX_INITIALIZER,
	};

	tp_walk_team_run(reader->team, read_extents, &v.stream);
	pthread_mutex_destroy(&v.lock);
}

/* ---- lists ------------------------------------------------------------------------------- */

struct wanted {
	uint64_t block;
	size_t slot;
};

struct listing {
	struct stream stream;
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
static uint64_t take_listed(struct stream *stream, uint64_t *begin_ret, size_t *cookie_ret)
{
	struct listing *l = (struct listing *)stream;
	size_t first, end;

	pthread_mutex_lock(&l->lock);
	first = l->next;
	end = first;
	while (end < l->nr_wanted &&
	       (end == first ||
		(l->wanted[end].block - l->wanted[end - 1].block <= GAP_BLOCKS &&
		 l->wanted[end].block - l->wanted[first].block < extent_most(stream))))
		end++;
	l->next = end;
	pthread_mutex_unlock(&l->lock);
	*cookie_ret = first;
	*begin_ret = 0;
	if (end == first)
		return 0;
	*begin_ret = l->wanted[first].block;
	/* A pointer of all ones has no block after it: an extent past any device will do. */
	return l->wanted[end - 1].block == UINT64_MAX ? UINT64_MAX : l->wanted[end - 1].block + 1;
}

static void give_listed(struct stream *stream, unsigned thread, uint64_t begin, uint64_t end,
			size_t cookie, const uint8_t *data)
{
	struct listing *l = (struct listing *)stream;
	size_t i = cookie;

	(void)thread;
	for (; i < l->nr_wanted && l->wanted[i].block >= begin && l->wanted[i].block < end; i++) {
		const struct wanted *w = &l->wanted[i];
		uint8_t *slot = l->slots + w->slot * TP_MD_BLOCK_SIZE;

		l->statuses[w->slot] = 0;
		if (data)
			memcpy(slot, data + (w->block - begin) * TP_MD_BLOCK_SIZE,
			       TP_MD_BLOCK_SIZE);
		else
			l->statuses[w->slot] = tp_walk_read(stream->reader, w->block, slot, NULL);
	}
	atomic_fetch_add_explicit(&stream->reader->done, i - cookie, memory_order_relaxed);
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
	if (nr_blocks >= TEAM_BLOCKS)
		tp_walk_team_run(reader->team, read_extents, &l.stream);
	else
		read_extents(&l.stream, 0); /* waking the others would cost more than the read */
	pthread_mutex_destroy(&l.lock);
	free(wanted);
	return 0;
}
