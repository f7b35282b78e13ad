/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Extents through io_uring, and one after the other where there is none.
 *
 * Each thread takes the next extents, keeps several of them in flight through a ring of its own,
 * and hands out one while the others are read: neither the disk nor a processor waits for the
 * other. Where there is no ring to be had (a device without a descriptor, io_uring forbidden), it
 * reads one extent after the other.
 *
 * The large buffers are in huge pages: a read into them is few segments for the device, instead of
 * one for each page of 4 KiB, which doubles what a virtual disk gives. Large reads, many at a time,
 * gain until about 16 MiB are in flight. Clearing a huge page takes longer than reading a hundred
 * blocks, so that small sets have small buffers of their own, and more reads in flight, since
 * single blocks cost the device time rather than bandwidth.
 */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>

#include "thinpool/bdev.h"
#include "thinpool/error.h"
#include "walk_stream.h"

#define EXTENT_BLOCKS 256u /* at most: 1 MiB, and less with more threads than two */
#define EXTENT_LEAST  32u
#define SLOTS         8u /* extents in memory, a thread */
#define FLYING        4u /* of these, in flight */
#define HUGE_PAGE     (UINT64_C(2) << 20)
#define SMALL_EXTENT  16u
#define SMALL_SLOTS   256u
#define SMALL_FLYING  128u
#define SMALL_START   8u /* are submitted before the others are prepared */
#define SLOTS_MAX     256u
#define RING_BLOCKS   2u /* fewer are not worth a ring */

/* ---- buffers ----------------------------------------------------------------------------- */

static uint64_t buffers_size(const struct tp_walk_reader *reader)
{
	uint64_t bytes = (uint64_t)tp_walk_team_size(reader->team) * SLOTS * reader->extent_blocks *
			 TP_MD_BLOCK_SIZE;

	return (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
}

static uint64_t small_size(const struct tp_walk_reader *reader)
{
	return (uint64_t)tp_walk_team_size(reader->team) * SMALL_SLOTS * SMALL_EXTENT *
	       TP_MD_BLOCK_SIZE;
}

int tp_walk_lanes_init(struct tp_walk_reader *reader, unsigned nr_threads, struct tp_error *err)
{
	reader->extent_blocks = 2 * EXTENT_BLOCKS / nr_threads;
	if (reader->extent_blocks > EXTENT_BLOCKS)
		reader->extent_blocks = EXTENT_BLOCKS;
	if (reader->extent_blocks < EXTENT_LEAST)
		reader->extent_blocks = EXTENT_LEAST;
	reader->buffers = tp_walk_map_dense(buffers_size(reader));
	reader->small = tp_walk_map(small_size(reader));
	reader->lanes = calloc(nr_threads, sizeof(*reader->lanes));
	if (!reader->buffers || !reader->small || !reader->lanes)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for read buffers");
	return 0;
}

void tp_walk_lanes_deinit(struct tp_walk_reader *reader)
{
	for (unsigned i = 0; reader->lanes && i < tp_walk_team_size(reader->team); i++)
		if (reader->lanes[i].state == TP_RING_READY)
			io_uring_queue_exit(&reader->lanes[i].ring);
	free(reader->lanes);
	tp_walk_unmap(reader->buffers, buffers_size(reader));
	tp_walk_unmap(reader->small, small_size(reader));
}

static unsigned slots_of(const struct tp_walk_stream *stream)
{
	return stream->small ? SMALL_SLOTS : SLOTS;
}

/* So many that the first thread to come does not take all. */
static unsigned flying_of(const struct tp_walk_stream *stream)
{
	uint64_t share = stream->nr / tp_walk_team_size(stream->reader->team) + 1;

	if (!stream->small)
		return FLYING;
	return stream->alone || share > SMALL_FLYING ? SMALL_FLYING : (unsigned)share;
}

uint64_t tp_walk_extent_most(const struct tp_walk_stream *stream)
{
	return stream->small && !stream->placed ? SMALL_EXTENT : stream->reader->extent_blocks;
}

static uint8_t *buffer_of(const struct tp_walk_stream *stream, unsigned thread, unsigned slot,
			  const struct tp_walk_extent *extent)
{
	uint8_t *buffers = stream->small ? stream->reader->small : stream->reader->buffers;

	if (stream->placed)
		return extent->place;
	return buffers + ((size_t)thread * slots_of(stream) + slot) * tp_walk_extent_most(stream) *
				 TP_MD_BLOCK_SIZE;
}

/* ---- reading ----------------------------------------------------------------------------- */

static bool on_device(const struct tp_walk_reader *reader, const struct tp_walk_extent *extent)
{
	return extent->end <= reader->nr_blocks;
}

static size_t bytes_of(const struct tp_walk_extent *extent)
{
	return (size_t)(extent->end - extent->begin) * TP_MD_BLOCK_SIZE;
}

static bool take(struct tp_walk_stream *stream, struct tp_walk_extent *extent)
{
	return !tp_walk_cancelled(stream->reader) && stream->take(stream, extent);
}

static void read_in_turn(struct tp_walk_stream *stream, unsigned thread)
{
	struct tp_walk_reader *reader = stream->reader;
	struct tp_walk_extent extent;

	while (take(stream, &extent)) {
		uint8_t *buffer = buffer_of(stream, thread, 0, &extent);
		bool whole = on_device(reader, &extent) &&
			     !tp_bdev_read(reader->bdev, extent.begin * TP_MD_BLOCK_SIZE, buffer,
					   bytes_of(&extent), NULL);

		stream->give(stream, thread, &extent, whole ? buffer : NULL);
	}
}

static bool ring_open(struct io_uring *ring)
{
	/* Completions are worked off when we wait for them, and do not interrupt us. Kernels before
	 * 6.1 lack that. */
	if (!io_uring_queue_init(SMALL_FLYING, ring,
				 IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN))
		return true;
	return !io_uring_queue_init(SMALL_FLYING, ring, 0);
}

/* Never given twice, as pthread_self and gettid are once a thread has ended. */
static uint64_t thread_number(void)
{
	static _Atomic uint64_t last;
	static _Thread_local uint64_t number;

	if (!number)
		number = atomic_fetch_add_explicit(&last, 1, memory_order_relaxed) + 1;
	return number;
}

static bool ring_ready(struct tp_walk_reader *reader, struct tp_walk_lane *lane)
{
	uint64_t self = thread_number();

	/* The first lane is the caller's, which may be another thread than the last time. */
	if (lane->state == TP_RING_READY && lane->owner != self) {
		io_uring_queue_exit(&lane->ring);
		lane->state = TP_RING_UNTRIED;
	}
	if (lane->state == TP_RING_UNTRIED) {
		lane->state = reader->bdev->fd >= 0 && ring_open(&lane->ring) ? TP_RING_READY
									      : TP_RING_NONE;
		lane->owner = self;
	}
	return lane->state == TP_RING_READY;
}

/* What one thread has in its slots. */
struct work {
	struct tp_walk_stream *stream;
	struct io_uring *ring;
	unsigned thread;
	unsigned most_flying;
	unsigned nr_flying;
	unsigned nr_queued; /* of these, not submitted yet */
	bool ended;         /* there is no extent left to take */
	unsigned nr_free;
	unsigned nr_read;
	uint8_t free[SLOTS_MAX]; /* numbers of slots */
	uint8_t read[SLOTS_MAX]; /* read, and not given yet */
	bool whole[SLOTS_MAX];
	struct tp_walk_extent extents[SLOTS_MAX];
};

/* Start reading the next extent; false when there is none, or no more may fly. */
static bool start(struct work *work)
{
	struct tp_walk_stream *stream = work->stream;
	struct tp_walk_extent *extent;
	struct io_uring_sqe *sqe;
	unsigned slot;

	if (work->ended || !work->nr_free || work->nr_flying == work->most_flying)
		return false;
	slot = work->free[work->nr_free - 1];
	extent = &work->extents[slot];
	for (;;) {
		if (!take(stream, extent)) {
			work->ended = true;
			return false;
		}
		if (on_device(stream->reader, extent))
			break;
		stream->give(stream, work->thread, extent, NULL);
	}
	sqe = io_uring_get_sqe(work->ring);
	TP_ASSERT(sqe); /* no more than it holds are in flight */
	io_uring_prep_read(sqe, stream->reader->bdev->fd,
			   buffer_of(stream, work->thread, slot, extent),
			   (unsigned)bytes_of(extent), extent->begin * TP_MD_BLOCK_SIZE);
	io_uring_sqe_set_data64(sqe, slot);
	work->nr_free--;
	work->nr_flying++;
	work->nr_queued++;
	return true;
}

/* Submit what is queued and wait until so many of those in flight were read. */
static void submit(struct work *work, unsigned wait)
{
	int rc = wait ? io_uring_submit_and_wait(work->ring, wait) : io_uring_submit(work->ring);

	/* What is submitted must come back before its buffers are used again, so that there is no
	 * giving up; anything but these would be our own mistake. What the ring cannot take now
	 * stays queued. */
	if (rc < 0) {
		TP_ASSERT(rc == -EINTR || rc == -EAGAIN || rc == -EBUSY || rc == -ENOMEM);
		sched_yield();
		return;
	}
	work->nr_queued = io_uring_sq_ready(work->ring);
}

static void start_all(struct work *work)
{
	unsigned at_once = work->stream->small ? SMALL_START : 1;

	while (start(work))
		if (work->nr_queued >= at_once) {
			/* The first ones early, so that the device has something to do meanwhile;
			 * the others together, since each submission costs a system call. */
			submit(work, 0);
			at_once = work->stream->small ? SLOTS_MAX : 1;
		}
}

static void reap(struct work *work)
{
	struct io_uring_cqe *cqe;

	/* They are not seen before the kernel was asked for them. */
	if (work->nr_flying)
		io_uring_get_events(work->ring);
	while (work->nr_flying && !io_uring_peek_cqe(work->ring, &cqe)) {
		unsigned slot = (unsigned)io_uring_cqe_get_data64(cqe);

		work->whole[slot] =
			cqe->res >= 0 && (size_t)cqe->res == bytes_of(&work->extents[slot]);
		io_uring_cqe_seen(work->ring, cqe);
		work->read[work->nr_read++] = (uint8_t)slot;
		work->nr_flying--;
	}
}

static void give(struct work *work)
{
	struct tp_walk_stream *stream = work->stream;
	unsigned slot = work->read[--work->nr_read];
	const struct tp_walk_extent *extent = &work->extents[slot];

	stream->give(stream, work->thread, extent,
		     work->whole[slot] ? buffer_of(stream, work->thread, slot, extent) : NULL);
	work->free[work->nr_free++] = (uint8_t)slot;
}

/* Nothing is left in flight on return. */
static void read_ahead(struct tp_walk_stream *stream, unsigned thread)
{
	struct work work = {
		.stream = stream,
		.ring = &stream->reader->lanes[thread].ring,
		.thread = thread,
		.most_flying = flying_of(stream),
	};

	for (unsigned slot = slots_of(stream); slot; slot--)
		work.free[work.nr_free++] = (uint8_t)(slot - 1);
	for (;;) {
		start_all(&work);
		if (!work.nr_flying && !work.nr_read)
			return;
		/* Half at a time, so that the next ones start together. */
		if (!work.nr_read)
			submit(&work, work.nr_flying > 1 ? work.nr_flying / 2 : 1);
		else if (work.nr_queued)
			submit(&work, 0);
		reap(&work);
		start_all(&work);
		if (work.nr_queued)
			submit(&work, 0);
		if (work.nr_read)
			give(&work);
	}
}

static void read_extents(void *argument, unsigned thread)
{
	struct tp_walk_stream *stream = argument;

	if (stream->nr >= RING_BLOCKS && ring_ready(stream->reader, &stream->reader->lanes[thread]))
		read_ahead(stream, thread);
	else
		read_in_turn(stream, thread);
}

void tp_walk_stream_run(struct tp_walk_stream *stream)
{
	if (stream->alone)
		read_extents(stream, 0);
	else
		tp_walk_team_run(stream->reader->team, read_extents, stream);
}
