/* SPDX-License-Identifier: Apache-2.0 */
/* The null target: a raw file served as it is. What the mapping layer costs is the difference. */
#include "server_fuse.h"
#include "thinpool/error.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define SECTOR 512u

struct linear {
	int direct;   /* O_DIRECT, for asynchronous I/O */
	int buffered; /* for what is not aligned */
	uint64_t size;
};

static void linear_close(void *target)
{
	struct linear *linear = target;

	if (linear->direct >= 0)
		close(linear->direct);
	if (linear->buffered >= 0)
		close(linear->buffered);
	free(linear);
}

int tp_fuse_linear_open(const char *path, uint32_t read_only, void **target_ret, int *fd_ret,
			struct tp_error *err)
{
	int flags = (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC;
	struct linear *linear = calloc(1, sizeof(*linear));
	struct stat st;
	int status;

	if (!linear)
		return tp_fail(err, TP_E_NO_MEMORY, "%s: out of memory", path);
	linear->buffered = open(path, flags);
	linear->direct = open(path, flags | O_DIRECT);
	if (linear->buffered < 0 || linear->direct < 0 || fstat(linear->direct, &st)) {
		status = tp_fail_errno(err, TP_E_OPEN, errno, "%s", path);
		linear_close(linear);
		return status;
	}
	linear->size = (uint64_t)st.st_size;
	*target_ret = linear;
	*fd_ret = linear->direct;
	return 0;
}

static int linear_map(void *target, uint64_t offset, uint32_t length, int write,
		      struct tp_map *map_ret)
{
	(void)target;
	(void)write;
	if ((offset | length) % SECTOR)
		return TP_MAP_SLOW;
	map_ret->nr_extents = 1;
	map_ret->extents[0].data_offset = offset;
	map_ret->extents[0].length = length;
	return TP_MAP_OK;
}

static void linear_unmap(void *target, struct tp_map *map)
{
	(void)target;
	(void)map;
}

static int linear_read(void *target, uint64_t offset, void *buffer, size_t length,
		       struct tp_error *err)
{
	struct linear *linear = target;
	ssize_t n = pread(linear->buffered, buffer, length, (off_t)offset);

	if (n == (ssize_t)length)
		return 0;
	return tp_fail_errno(err, TP_E_IO, n < 0 ? errno : EIO, "linear file: read");
}

static int linear_write(void *target, uint64_t offset, const void *buffer, size_t length,
			struct tp_error *err)
{
	struct linear *linear = target;
	ssize_t n = pwrite(linear->buffered, buffer, length, (off_t)offset);

	if (n == (ssize_t)length)
		return 0;
	return tp_fail_errno(err, TP_E_IO, n < 0 ? errno : ENOSPC, "linear file: write");
}

static int linear_zero(void *target, uint64_t offset, uint64_t length, struct tp_error *err)
{
	struct linear *linear = target;

	if (fallocate(linear->buffered, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
		      (off_t)length) == 0)
		return 0;
	return tp_fail_errno(err, errno == EOPNOTSUPP ? TP_E_NOT_SUPPORTED : TP_E_IO, errno,
			     "linear file: punch");
}

static int linear_flush(void *target, struct tp_error *err)
{
	struct linear *linear = target;

	if (fdatasync(linear->buffered) == 0)
		return 0;
	return tp_fail_errno(err, TP_E_IO, errno, "linear file: flush");
}

static int linear_next_data(void *target, uint64_t offset, uint64_t *begin_ret, uint64_t *end_ret,
			    struct tp_error *err)
{
	struct linear *linear = target;
	off_t begin = lseek(linear->buffered, (off_t)offset, SEEK_DATA);
	off_t end;

	if (begin < 0 && errno == ENXIO)
		return tp_fail(err, TP_E_KEY_NOT_FOUND, "linear file: no data behind");
	end = begin < 0 ? -1 : lseek(linear->buffered, begin, SEEK_HOLE);
	if (end < 0)
		return tp_fail_errno(err, TP_E_IO, errno, "linear file: seek");
	*begin_ret = (uint64_t)begin;
	*end_ret = (uint64_t)end;
	return 0;
}

static uint64_t linear_size(void *target)
{
	const struct linear *linear = target;

	return linear->size;
}

static uint64_t linear_mapped(struct tp_pool *pool, void *target)
{
	const struct linear *linear = target;
	struct stat st;

	(void)pool;
	return fstat(linear->direct, &st) ? 0 : (uint64_t)st.st_blocks * SECTOR;
}

const struct tp_fuse_target_ops tp_fuse_linear_ops = {
	.map = linear_map,
	.unmap = linear_unmap,
	.read = linear_read,
	.write = linear_write,
	.zero = linear_zero,
	.flush = linear_flush,
	.next_data = linear_next_data,
	.size = linear_size,
	.mapped = linear_mapped,
	.close = linear_close,
};
