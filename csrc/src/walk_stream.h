/* SPDX-License-Identifier: Apache-2.0 */
/**
 * How the reader reads: extents of metadata blocks, many in flight, on all threads of its team.
 *
 * A user says which extents there are (take) and what becomes of each (give); both run on all
 * threads at once. What take gives is either placed, into memory of the user's, or read into a
 * buffer of the thread's that is valid until give returns.
 */
#ifndef THINPOOL_WALK_STREAM_H
#define THINPOOL_WALK_STREAM_H

#include <liburing.h>
#include <pthread.h>

#include "thinpool/walk.h"

#define TP_WALK_SMALL_BLOCKS 512u /* fewer are small whatever they are */

/* Wanted blocks with no more between them are read together: that is cheaper than a read more. */
#define TP_WALK_GAP_BLOCKS 8u

/* What one thread reads with. */
struct tp_walk_lane {
	struct io_uring ring;
	uint64_t owner; /* of the ring: the kernel lets no other thread submit */
	enum {
		TP_RING_UNTRIED,
		TP_RING_READY,
		TP_RING_NONE
	} state;
};

struct tp_walk_reader {
	struct tp_bdev *bdev;
	struct tp_walk_team *team;
	uint64_t nr_blocks;
	uint64_t extent_blocks; /* at most, in a large buffer */
	uint8_t *buffers;
	uint8_t *small;
	struct tp_walk_lane *lanes;
	_Atomic uint64_t done;
	_Atomic bool cancelled;
};

struct tp_walk_extent {
	uint64_t begin;
	uint64_t end;
	size_t cookie;  /* the user's */
	uint8_t *place; /* where it is wanted, in a placed stream */
};

struct tp_walk_stream {
	struct tp_walk_reader *reader;
	/* The next extent, of extent_most blocks at most; false when there is none. */
	bool (*take)(struct tp_walk_stream *stream, struct tp_walk_extent *extent);
	/* data is NULL where the extent could not be read whole. The user then reads block by
	 * block, since one bad sector must not take its neighbours along. */
	void (*give)(struct tp_walk_stream *stream, unsigned thread,
		     const struct tp_walk_extent *extent, const uint8_t *data);
	uint64_t nr; /* blocks that are wanted in all */
	bool small;  /* extents of few blocks: more of them in flight, in small buffers */
	bool alone;  /* not worth waking the other threads */
	bool placed;
};

int tp_walk_lanes_init(struct tp_walk_reader *reader, unsigned nr_threads, struct tp_error *err);
void tp_walk_lanes_deinit(struct tp_walk_reader *reader);
uint64_t tp_walk_extent_most(const struct tp_walk_stream *stream);
/* Until take has no more; all is given, and nothing in flight, on return. */
void tp_walk_stream_run(struct tp_walk_stream *stream);

#endif
