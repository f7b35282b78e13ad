/* SPDX-License-Identifier: Apache-2.0 */
/**
 * Block devices that stack.
 *
 * A device knows nothing of pools or formats. The fields below ops are set at open and constant
 * after, size excepted. All operations are thread-safe and may block. Offsets and lengths are
 * multiples of io_align; a buffer of any memory alignment is taken (a file opened O_DIRECT
 * bounces one that does not fit mem_align).
 */
#ifndef THINPOOL_BDEV_H
#define THINPOOL_BDEV_H

#include "thinpool/abi.h"

struct tp_bdev_ops {
	const char *name;
	int (*read)(struct tp_bdev *bdev, uint64_t offset, void *buffer, size_t length,
		    struct tp_error *err);
	int (*write)(struct tp_bdev *bdev, uint64_t offset, const void *buffer, size_t length,
		     struct tp_error *err);
	int (*flush)(struct tp_bdev *bdev, struct tp_error *err);
	int (*punch)(struct tp_bdev *bdev, uint64_t offset, uint64_t length, struct tp_error *err);
	int (*resize)(struct tp_bdev *bdev, uint64_t size, struct tp_error *err);
	uint64_t (*size)(const struct tp_bdev *bdev);
	/* The next stretch [*begin_ret, *end_ret) at or after offset that may hold anything but
	 * zeros; begin == end == size when there is none. A device that cannot tell answers
	 * that everything may. */
	int (*next_data)(struct tp_bdev *bdev, uint64_t offset, uint64_t *begin_ret,
			 uint64_t *end_ret, struct tp_error *err);
	void (*close)(struct tp_bdev *bdev);
};

struct tp_bdev {
	const struct tp_bdev_ops *ops;
	uint32_t io_align;	/* bytes */
	uint32_t mem_align;	/* bytes; what passes without a bounce */
	int fd;			/* for asynchronous I/O on the same description; -1 where there is none */
	uint32_t can_punch;	/* punch is supported and reads as zeros afterwards */
};

int tp_bdev_next_data(struct tp_bdev *bdev, uint64_t offset, uint64_t *begin_ret,
		      uint64_t *end_ret, struct tp_error *err);
/* Vectored; iov_len of each part is a multiple of io_align. */
struct iovec;

#endif
