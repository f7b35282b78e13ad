/* SPDX-License-Identifier: Apache-2.0 */
/**
 * The non-blocking half of the data path, for asynchronous servers.
 *
 * tp_volume_map resolves a request onto the data device without blocking and without an exclusive
 * lock; the caller then does the I/O itself (io_uring) and gives the map back with
 * tp_volume_unmap, from any thread, when the I/O has ended and before anybody is told so: a commit
 * flushes the data for writes that were given back. While a map is held, none of its blocks can be
 * freed, moved or shared. What cannot be resolved so (a first write, a shared block, an unaligned
 * edge, a mapping that is not cached, a lock that is taken) is TP_MAP_SLOW: the caller hands the
 * whole request to a thread that may block and calls tp_volume_read or tp_volume_write there.
 *
 * If the I/O of a map fails, the caller gives the map back and repeats the request on the slow
 * path, which knows what a host's ENOSPC means.
 */
#ifndef THINPOOL_VOLUME_MAP_H
#define THINPOOL_VOLUME_MAP_H

#include "thinpool/abi.h"

#define TP_MAP_MAX  20 /* extents: a request of 1 MiB over blocks of 64 KiB touches 17 */
#define TP_MAP_HOLE UINT64_MAX

struct tp_map_extent {
	uint64_t data_offset; /* bytes on the data device; TP_MAP_HOLE: reads as zeros */
	uint32_t length;      /* bytes */
};

struct tp_map {
	uint32_t nr_extents;
	uint32_t nr_locks;
	uint32_t gate_slot; /* the volume's business, as locks is */
	uint32_t write;
	uint32_t copies; /* with TP_MAP_SLOW: a block is shared, and a write will copy it */
	struct tp_map_extent extents[TP_MAP_MAX];
	uint32_t locks[TP_MAP_MAX];
};

enum tp_map_result {
	TP_MAP_OK = 0,
	TP_MAP_SLOW = 1
};

/* offset + length within the volume (else TP_MAP_SLOW, which then fails properly). */
int tp_volume_map(struct tp_volume *volume, uint64_t offset, uint32_t length, int write,
		  struct tp_map *map_ret);
void tp_volume_unmap(struct tp_volume *volume, struct tp_map *map);
/* The data device under the pool: its fd serves asynchronous I/O when it is not -1. */
struct tp_bdev *tp_volume_data_bdev(struct tp_volume *volume);

#endif
