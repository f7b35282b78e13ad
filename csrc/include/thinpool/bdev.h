/* SPDX-License-Identifier: Apache-2.0 */
/**
 * Block devices that stack.
 *
 * A device knows nothing of pools or formats. The fields below ops are set at open and constant
 * after. All operations are thread-safe and may block; what two overlapping operations leave when
 * they run at once is undefined, as on a disk. Offsets and lengths are multiples of io_align; a
 * buffer of any memory alignment is taken (a file opened O_DIRECT bounces one that does not fit
 * mem_align).
 *
 * Layers: tp_bdev_*() in bdev.c check range, alignment and read-only once, then call the
 * operations, which may rely on it. An operation of length 0 succeeds and does nothing. Each
 * operation is done whole or fails; a write that failed may have changed any part of its range.
 *
 * Errors of the host are TP_E_IO with its errno in err->host_errno, ENOSPC and EDQUOT too: the
 * layers above tell a full host by tp_error_is_host_full(). A file that ends before the device
 * does is TP_E_IO with host_errno 0. A flush that failed is final: what the host failed to write it
 * may have forgotten, so each later flush of that device fails likewise.
 *
 * A device that stacks (fault, log) borrows the one below it, which must outlive it;
 * tp_bdev_close() closes only the device it is given, and only when no operation on it is running.
 */
#ifndef THINPOOL_BDEV_H
#define THINPOOL_BDEV_H

#include "thinpool/abi.h"

#include <errno.h>

struct tp_bdev_ops {
	const char *name;
	int (*read)(struct tp_bdev *bdev, uint64_t offset, void *buffer, size_t length,
		    struct tp_error *err);
	int (*write)(struct tp_bdev *bdev, uint64_t offset, const void *buffer, size_t length,
		     struct tp_error *err);
	int (*flush)(struct tp_bdev *bdev, struct tp_error *err);
	/* May be NULL: nothing can. See tp_bdev_check. */
	int (*check)(struct tp_bdev *bdev, struct tp_error *err);
	/* May be NULL. Begin to write what is still in the host's memory, so that a flush soon to
	 * come finds less to do. Promises nothing, cannot fail. */
	void (*start)(struct tp_bdev *bdev);
	int (*punch)(struct tp_bdev *bdev, uint64_t offset, uint64_t length, struct tp_error *err);
	int (*resize)(struct tp_bdev *bdev, uint64_t size, struct tp_error *err);
	uint64_t (*size)(const struct tp_bdev *bdev);
	/* The next stretch [*begin_ret, *end_ret) at or after offset that may hold anything but
	 * zeros; begin == end == size when there is none. A device that cannot tell answers
	 * that everything may. */
	int (*next_data)(struct tp_bdev *bdev, uint64_t offset, uint64_t *begin_ret,
			 uint64_t *end_ret, struct tp_error *err);
	/* What follows only saves time, and may be NULL. */
	/* A flush in two parts: see tp_bdev_flush_begin. Both or none. */
	int (*flush_begin)(struct tp_bdev *bdev);
	int (*flush_end)(struct tp_bdev *bdev, int begun, struct tp_error *err);
	/* As write, into a range that has no space of the host's yet. */
	int (*write_hole)(struct tp_bdev *bdev, uint64_t offset, const void *buffer, size_t length,
			  struct tp_error *err);
	/* See tp_bdev_allocate. */
	int (*allocate)(struct tp_bdev *bdev, uint64_t offset, uint64_t length,
			struct tp_error *err);
	void (*close)(struct tp_bdev *bdev);
};

struct tp_bdev {
	const struct tp_bdev_ops *ops;
	uint32_t io_align;  /* bytes, a power of two */
	uint32_t mem_align; /* bytes, a power of two; what passes without a bounce */
	int fd; /* for asynchronous I/O on the same description; -1 where there is none */
	uint32_t can_punch; /* punch is supported and reads as zeros afterwards */
	uint32_t read_only;
};

/* As tp_bdev_write, where the caller knows that the host has no space for the range yet. */
int tp_bdev_write_hole(struct tp_bdev *bdev, uint64_t offset, const void *buffer, size_t length,
		       struct tp_error *err);
/* Have the host give space to a range in one go, so that writes into it need not. What the range
 * reads as stays, also while others read and write it; nothing is durable. TP_E_NOT_SUPPORTED where
 * that cannot be had, TP_E_IO with ENOSPC where the host would be left with little; part of the
 * range may have got space then. */
int tp_bdev_allocate(struct tp_bdev *bdev, uint64_t offset, uint64_t length, struct tp_error *err);

/* Whether what earlier flushes made durable can still be found; what tp_bdev_flush says of that,
 * where there is nothing to flush. TP_E_IO. */
static inline int tp_bdev_check(struct tp_bdev *bdev, struct tp_error *err)
{
	return bdev->ops->check && !bdev->read_only ? bdev->ops->check(bdev, err) : 0;
}

/*
 * A flush that the caller need not wait for at once: of what was written before the first of the
 * two, durable when the second has returned. The second is given what the first returned, once, and
 * has the errors of tp_bdev_flush. A device that cannot do it so flushes in the second.
 */
static inline int tp_bdev_flush_begin(struct tp_bdev *bdev)
{
	return bdev->ops->flush_begin && !bdev->read_only ? bdev->ops->flush_begin(bdev) : -1;
}

static inline int tp_bdev_flush_end(struct tp_bdev *bdev, int begun, struct tp_error *err)
{
	return begun < 0 ? tp_bdev_flush(bdev, err) : bdev->ops->flush_end(bdev, begun, err);
}

static inline void tp_bdev_start(struct tp_bdev *bdev)
{
	if (bdev->ops->start && !bdev->read_only)
		bdev->ops->start(bdev);
}

/* Whether an errno of the host means that its own disk, or this user's quota of it, is full. */
static inline int tp_errno_is_host_full(int host_errno)
{
	return host_errno == ENOSPC || host_errno == EDQUOT;
}

static inline int tp_error_is_host_full(const struct tp_error *err)
{
	return err->status == TP_E_IO && tp_errno_is_host_full(err->host_errno);
}

#endif
