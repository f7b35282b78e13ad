/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A regular file or a block device, O_DIRECT or through the page cache.
 *
 * Invariants:
 *  - the descriptor belongs to one open file description that nobody else opened, so that a flock
 *    on it lives exactly as long as this device and the I/O in flight on it (io_uring holds its own
 *    reference); it is therefore never unlocked by hand;
 *  - size is a multiple of io_align: a tail of the file that O_DIRECT cannot reach is not shown;
 *  - flush_errno, once set, stays: the kernel reports a lost write once and then forgets it.
 *
 * Thread-safety: positioned I/O on one descriptor; size and flush_errno are atomics. Resizes
 * exclude each other and a flush that believes the file truncated, which looks again under the
 * lock.
 */
#include "host_aio.h"
#include "thinpool/bdev.h"
#include "thinpool/error.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define KNOWN_FLAGS                                                                                \
	(TP_BDEV_READ_ONLY | TP_BDEV_DIRECT | TP_BDEV_EXCLUSIVE | TP_BDEV_CREATE |                 \
	 TP_BDEV_SHARED_LOCK)
#define BOUNCE_MAX     (256 * 1024) /* bytes per round trip through the bounce buffer */
#define FALLBACK_ALIGN 4096         /* what every Linux filesystem of today takes */
#define ALIGN_MAX      65536        /* more than that is not an alignment we believe */

struct file_bdev {
	struct tp_bdev bdev;
	pthread_mutex_t resize_lock;
	_Atomic uint64_t size;
	_Atomic int flush_errno;
	int is_block_device;
	int was_linked;       /* had a name when opened; a memfd or O_TMPFILE has none */
	uint32_t uses_aio;    /* for writes into holes */
	uint32_t punch_align; /* fallocate takes multiples of this only */
	char name[128];       /* for messages: the end of the path */
};

static struct file_bdev *as_file(struct tp_bdev *bdev)
{
	return (struct file_bdev *)bdev;
}

static void free_buffer(void *pointer)
{
	free(*(void **)pointer);
}

#define CLEANUP_FREE __attribute__((cleanup(free_buffer)))

/* ---- reading and writing ------------------------------------------------------------------ */

static int ended_early(const struct file_bdev *file, uint64_t offset, uint64_t found,
		       uint64_t wanted, struct tp_error *err)
{
	return tp_fail_block(err, TP_E_IO, TP_NO_BLOCK, found, wanted,
			     "read at %" PRIu64 " of %s: the file ends after %" PRIu64
			     " of %" PRIu64 " bytes; it was truncated",
			     offset, file->name, found, wanted);
}

/* Of a count that the kernel returned, what may be counted as done: the next system call must
 * start aligned. A count below the alignment is no progress. */
static size_t usable(const struct file_bdev *file, ssize_t count)
{
	return (size_t)count & ~(size_t)(file->bdev.io_align - 1);
}

static int read_fitting(struct file_bdev *file, uint64_t offset, unsigned char *buffer,
			size_t length, struct tp_error *err)
{
	size_t done = 0;

	while (done < length) {
		ssize_t count =
			pread(file->bdev.fd, buffer + done, length - done, (off_t)(offset + done));

		if (count < 0 && errno == EINTR)
			continue;
		if (count < 0)
			return tp_fail_errno(err, TP_E_IO, errno,
					     "read of %zu bytes at %" PRIu64 " of %s",
					     length - done, offset + done, file->name);
		if (!usable(file, count))
			return ended_early(file, offset, done + (size_t)count, length, err);
		done += usable(file, count);
	}
	return 0;
}

static int present_size(int fd, const char *name, uint64_t *size_ret, struct tp_error *err);

/*
 * The kernel answers a write past a block device's end with ENOSPC, and a device that was pulled
 * out, or cut shorter, ends before the write. That is not a full disk, which space would help.
 * A device below that is thin itself keeps its size, and its ENOSPC.
 */
static int write_failed(const struct file_bdev *file, uint64_t offset, size_t length,
			int host_errno, struct tp_error *err)
{
	uint64_t present;

	if (file->is_block_device && tp_errno_is_host_full(host_errno) &&
	    (present_size(file->bdev.fd, file->name, &present, NULL) || present < offset + length))
		return tp_fail_errno(err, TP_E_IO, ENODEV,
				     "write of %zu bytes at %" PRIu64
				     " of %s: the device is gone or became smaller",
				     length, offset, file->name);
	return tp_fail_errno(err, TP_E_IO, host_errno, "write of %zu bytes at %" PRIu64 " of %s",
			     length, offset, file->name);
}

static ssize_t write_some(struct file_bdev *file, uint64_t offset, const void *buffer,
			  size_t length, int hole)
{
	if (hole)
		return tp_host_aio_pwrite(file->bdev.fd, buffer, length, offset);
	return pwrite(file->bdev.fd, buffer, length, (off_t)offset);
}

static int write_fitting(struct file_bdev *file, uint64_t offset, const unsigned char *buffer,
			 size_t length, int hole, struct tp_error *err)
{
	size_t done = 0;

	while (done < length) {
		ssize_t count = write_some(file, offset + done, buffer + done, length - done, hole);

		if (count < 0 && errno == EINTR)
			continue;
		if (count < 0)
			return write_failed(file, offset + done, length - done, errno, err);
		/* Less than one aligned unit, and no error: a retry would loop for ever. */
		if (!usable(file, count))
			return tp_fail_errno(err, TP_E_IO, EIO,
					     "write of %zu bytes at %" PRIu64
					     " of %s stopped after %zd",
					     length - done, offset + done, file->name, count);
		done += usable(file, count);
	}
	return 0;
}

static int fits(const struct file_bdev *file, const void *buffer)
{
	return !((uintptr_t)buffer & (file->bdev.mem_align - 1));
}

static void *bounce_buffer(const struct file_bdev *file, size_t length)
{
	size_t align = file->bdev.mem_align;
	void *buffer;

	if (align < sizeof(void *))
		align = sizeof(void *);
	return posix_memalign(&buffer, align, length) ? NULL : buffer;
}

static int no_bounce_memory(size_t length, struct tp_error *err)
{
	return tp_fail(err, TP_E_NO_MEMORY, "no memory for a bounce buffer of %zu bytes", length);
}

static size_t min_size(size_t a, size_t b)
{
	return a < b ? a : b;
}

static int file_read(struct tp_bdev *bdev, uint64_t offset, void *buffer, size_t length,
		     struct tp_error *err)
{
	struct file_bdev *file = as_file(bdev);
	CLEANUP_FREE void *bounce = NULL;
	unsigned char *to = buffer;

	if (fits(file, buffer))
		return read_fitting(file, offset, buffer, length, err);
	bounce = bounce_buffer(file, min_size(length, BOUNCE_MAX));
	if (!bounce)
		return no_bounce_memory(min_size(length, BOUNCE_MAX), err);
	while (length) {
		size_t part = min_size(length, BOUNCE_MAX);
		int status = read_fitting(file, offset, bounce, part, err);

		if (status)
			return status;
		memcpy(to, bounce, part);
		to += part;
		offset += part;
		length -= part;
	}
	return 0;
}

static int file_write(struct tp_bdev *bdev, uint64_t offset, const void *buffer, size_t length,
		      struct tp_error *err)
{
	struct file_bdev *file = as_file(bdev);
	CLEANUP_FREE void *bounce = NULL;
	const unsigned char *from = buffer;

	if (fits(file, buffer))
		return write_fitting(file, offset, buffer, length, 0, err);
	bounce = bounce_buffer(file, min_size(length, BOUNCE_MAX));
	if (!bounce)
		return no_bounce_memory(min_size(length, BOUNCE_MAX), err);
	while (length) {
		size_t part = min_size(length, BOUNCE_MAX);
		int status;

		memcpy(bounce, from, part);
		status = write_fitting(file, offset, bounce, part, 0, err);
		if (status)
			return status;
		from += part;
		offset += part;
		length -= part;
	}
	return 0;
}

static int file_write_hole(struct tp_bdev *bdev, uint64_t offset, const void *buffer, size_t length,
			   struct tp_error *err)
{
	struct file_bdev *file = as_file(bdev);

	if (!file->uses_aio || !fits(file, buffer))
		return file_write(bdev, offset, buffer, length, err);
	return write_fitting(file, offset, buffer, length, 1, err);
}

/* ---- flush -------------------------------------------------------------------------------- */

static int flush_failed(struct file_bdev *file, int host_errno, struct tp_error *err)
{
	atomic_store(&file->flush_errno, host_errno);
	return tp_fail_errno(err, TP_E_IO, host_errno, "flush of %s", file->name);
}

static int check_device(struct file_bdev *file, struct tp_error *err)
{
	uint64_t size = atomic_load(&file->size);
	uint64_t present;
	int status = present_size(file->bdev.fd, file->name, &present, err);

	if (status || present >= size)
		return status;
	atomic_store(&file->flush_errno, ENODEV);
	return tp_fail_block(err, TP_E_IO, TP_NO_BLOCK, present, size,
			     "flush of %s: the device is gone or became smaller: it has %" PRIu64
			     " bytes, it had %" PRIu64,
			     file->name, present, size);
}

/*
 * Size and links, and no times: since Linux 6.13 a file whose times somebody asked for gets a new
 * one with the very next write, where otherwise a write in the same tick of the clock leaves them
 * as they are, and on a host's ext4 without a journal each new time is a block more for the next
 * flush.
 */
static int check_length(struct file_bdev *file, struct tp_error *err)
{
	uint64_t size = atomic_load(&file->size);
	struct statx st;

	if (file->is_block_device)
		return check_device(file, err);
	if (statx(file->bdev.fd, "", AT_EMPTY_PATH, STATX_SIZE | STATX_NLINK, &st))
		return flush_failed(file, errno, err);
	if (file->was_linked && !st.stx_nlink) {
		atomic_store(&file->flush_errno, ENOENT);
		return tp_fail_errno(err, TP_E_IO, ENOENT,
				     "flush of %s: the file was removed or replaced", file->name);
	}
	if (st.stx_size >= size)
		return 0;
	return tp_fail_block(err, TP_E_IO, TP_NO_BLOCK, st.stx_size, size,
			     "flush of %s: the file was truncated to %ju bytes, it had %" PRIu64,
			     file->name, (uintmax_t)st.stx_size, size);
}

/*
 * What a completed flush promises is that the data can be found again. A file that lost its last
 * name cannot, and one that was cut shorter under us has lost some; fdatasync would say all is
 * well. Nor does a block device that was pulled out refuse a flush with nothing to write.
 */
static int still_there(struct file_bdev *file, struct tp_error *err)
{
	int status;

	if (!check_length(file, NULL))
		return 0;
	/* Size and length are two reads, and a resize of our own may have come between. */
	pthread_mutex_lock(&file->resize_lock);
	status = check_length(file, err);
	if (status && !atomic_load(&file->flush_errno))
		atomic_store(&file->flush_errno, EIO);
	pthread_mutex_unlock(&file->resize_lock);
	return status;
}

static int file_check(struct tp_bdev *bdev, struct tp_error *err)
{
	struct file_bdev *file = as_file(bdev);
	int failed_before = atomic_load(&file->flush_errno);

	if (failed_before)
		return tp_fail_errno(err, TP_E_IO, failed_before, "an earlier flush of %s failed",
				     file->name);
	return still_there(file, err);
}

static int file_flush(struct tp_bdev *bdev, struct tp_error *err)
{
	struct file_bdev *file = as_file(bdev);
	int status = file_check(bdev, err);

	if (status)
		return status;
	while (fdatasync(bdev->fd)) {
		/* POSIX allows EINTR before anything was tried; no lost write is reported so. */
		if (errno != EINTR)
			return flush_failed(file, errno, err);
	}
	return 0;
}

static int file_flush_begin(struct tp_bdev *bdev)
{
	return tp_host_aio_fdatasync(bdev->fd);
}

static int file_flush_end(struct tp_bdev *bdev, int begun, struct tp_error *err)
{
	int result = tp_host_aio_end(begun);

	if (result < 0 && result != -EINTR)
		return flush_failed(as_file(bdev), -result, err);
	return result ? file_flush(bdev, err) : file_check(bdev, err);
}

static void file_start(struct tp_bdev *bdev)
{
	/* An error of the writing is kept by the kernel for the flush. */
	(void)sync_file_range(bdev->fd, 0, 0, SYNC_FILE_RANGE_WRITE);
}

/* ---- punch -------------------------------------------------------------------------------- */

static int write_zeros(struct file_bdev *file, uint64_t offset, uint64_t length,
		       struct tp_error *err)
{
	static const unsigned char zeros[4096];
	int status = 0;

	while (length && !status) {
		size_t part = length < sizeof(zeros) ? (size_t)length : sizeof(zeros);

		status = write_fitting(file, offset, zeros, part, 0, err);
		offset += part;
		length -= part;
	}
	return status;
}

static int punch_hole(struct file_bdev *file, uint64_t offset, uint64_t length,
		      struct tp_error *err)
{
	while (fallocate(file->bdev.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
			 (off_t)length)) {
		if (errno == EINTR)
			continue;
		return tp_fail_errno(
			err, errno == EOPNOTSUPP || errno == ENOSYS ? TP_E_NOT_SUPPORTED : TP_E_IO,
			errno, "punch of %" PRIu64 " bytes at %" PRIu64 " of %s", length, offset,
			file->name);
	}
	return 0;
}

/*
 * A filesystem zeroes the partial ends of a punch itself. A block device refuses ranges that do not
 * fit its logical blocks, which only buffered I/O can bring here: those ends are written.
 *
 * On block devices this is the kernel's zero-out without its fallback of writing pages, so what
 * comes back as success reads as zeros; BLKDISCARD would not promise that.
 */
static int file_punch(struct tp_bdev *bdev, uint64_t offset, uint64_t length, struct tp_error *err)
{
	struct file_bdev *file = as_file(bdev);
	uint64_t mask = file->punch_align - 1;
	uint64_t begin = (offset + mask) & ~mask;
	uint64_t end = (offset + length) & ~mask;
	int status;

	if (begin >= end)
		return write_zeros(file, offset, length, err);
	status = punch_hole(file, begin, end - begin, err);
	if (!status)
		status = write_zeros(file, offset, begin - offset, err);
	if (!status)
		status = write_zeros(file, end, offset + length - end, err);
	return status;
}

/* Of the host's free space, at most this part is taken at once. */
#define ALLOCATE_SHARE 16

static int file_allocate(struct tp_bdev *bdev, uint64_t offset, uint64_t length,
			 struct tp_error *err)
{
	struct file_bdev *file = as_file(bdev);
	struct statvfs host;

	if (file->is_block_device)
		return tp_fail(err, TP_E_NOT_SUPPORTED, "%s is a block device", file->name);
	if (fstatvfs(bdev->fd, &host))
		return tp_fail_errno(err, TP_E_IO, errno, "free space below %s", file->name);
	if ((uint64_t)host.f_bavail * host.f_frsize / ALLOCATE_SHARE < length)
		return tp_fail_errno(err, TP_E_IO, ENOSPC,
				     "%" PRIu64 " bytes for %s would leave the host with little",
				     length, file->name);
	while (fallocate(bdev->fd, FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length)) {
		if (errno == EINTR)
			continue;
		return tp_fail_errno(
			err, errno == EOPNOTSUPP || errno == ENOSYS ? TP_E_NOT_SUPPORTED : TP_E_IO,
			errno, "space for %" PRIu64 " bytes at %" PRIu64 " of %s", length, offset,
			file->name);
	}
	return 0;
}

/* A whole disk has its queue beside it, a partition has its disk's one level up. */
static uint64_t write_zeroes_max(dev_t device)
{
	static const char *const places[] = { "queue", "../queue" };
	unsigned long long value = 0;
	char path[96];

	for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
		FILE *stream;
		int got;

		snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/%s/write_zeroes_max_bytes",
			 major(device), minor(device), places[i]);
		stream = fopen(path, "re");
		if (!stream)
			continue;
		got = fscanf(stream, "%llu", &value);
		fclose(stream);
		return got == 1 ? value : 0;
	}
	return 0;
}

/* Asked of a file by punching past its end, which changes nothing in it. */
static uint32_t probe_punch(const struct file_bdev *file, const struct stat *st)
{
	if (file->bdev.read_only)
		return 0;
	if (file->is_block_device)
		return write_zeroes_max(st->st_rdev) > 0;
	while (fallocate(file->bdev.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, st->st_size,
			 FALLBACK_ALIGN)) {
		if (errno != EINTR)
			return 0;
	}
	return 1;
}

/* ---- size and holes ------------------------------------------------------------------------ */

static uint64_t file_size(const struct tp_bdev *bdev)
{
	return atomic_load_explicit(&((const struct file_bdev *)bdev)->size, memory_order_relaxed);
}

static int present_size(int fd, const char *name, uint64_t *size_ret, struct tp_error *err)
{
	struct stat st;

	if (fstat(fd, &st))
		return tp_fail_errno(err, TP_E_IO, errno, "size of %s", name);
	*size_ret = (uint64_t)st.st_size;
	if (S_ISBLK(st.st_mode) && ioctl(fd, BLKGETSIZE64, size_ret))
		return tp_fail_errno(err, TP_E_IO, errno, "size of %s", name);
	return 0;
}

static int set_length(struct file_bdev *file, uint64_t size, struct tp_error *err)
{
	while (ftruncate(file->bdev.fd, (off_t)size)) {
		if (errno != EINTR)
			return tp_fail_errno(err, TP_E_IO, errno, "resize of %s to %" PRIu64,
					     file->name, size);
	}
	return 0;
}

static int resize_locked(struct file_bdev *file, uint64_t size, struct tp_error *err)
{
	uint64_t old = atomic_load(&file->size);
	uint64_t present;
	int status = present_size(file->bdev.fd, file->name, &present, err);

	if (status)
		return status;
	if (!size) {
		size = present & ~(uint64_t)(file->bdev.io_align - 1);
	} else if (file->is_block_device) {
		if (size > present)
			return tp_fail_block(err, TP_E_OUT_OF_RANGE, TP_NO_BLOCK, size, present,
					     "resize of %s to %" PRIu64
					     ": the block device has %" PRIu64,
					     file->name, size, present);
	} else {
		/* New operations end before what is about to be cut off. */
		if (size < old)
			atomic_store(&file->size, size);
		status = set_length(file, size, err);
		if (status) {
			atomic_store(&file->size, old);
			return status;
		}
	}
	atomic_store(&file->size, size);
	return 0;
}

static int file_resize(struct tp_bdev *bdev, uint64_t size, struct tp_error *err)
{
	struct file_bdev *file = as_file(bdev);
	int status;

	pthread_mutex_lock(&file->resize_lock);
	status = resize_locked(file, size, err);
	pthread_mutex_unlock(&file->resize_lock);
	return status;
}

static int file_next_data(struct tp_bdev *bdev, uint64_t offset, uint64_t *begin_ret,
			  uint64_t *end_ret, struct tp_error *err)
{
	struct file_bdev *file = as_file(bdev);
	uint64_t size = atomic_load(&file->size);
	off_t data;
	off_t hole;

	*begin_ret = offset;
	*end_ret = size;
	if (file->is_block_device)
		return 0;
	data = lseek(bdev->fd, (off_t)offset, SEEK_DATA);
	if (data < 0 && errno == ENXIO) {
		*begin_ret = size;
		return 0;
	}
	if (data < 0 && (errno == EINVAL || errno == EOPNOTSUPP))
		return 0;
	hole = data < 0 ? data : lseek(bdev->fd, data, SEEK_HOLE);
	/* Punched or cut between the two calls: nothing is known of what follows. */
	if (hole < 0 && errno == ENXIO)
		return 0;
	if (hole < 0)
		return tp_fail_errno(err, TP_E_IO, errno, "search for data from %" PRIu64 " of %s",
				     offset, file->name);
	*begin_ret = (uint64_t)data < size ? (uint64_t)data : size;
	*end_ret = (uint64_t)hole < size ? (uint64_t)hole : size;
	return 0;
}

static void file_close(struct tp_bdev *bdev)
{
	struct file_bdev *file = as_file(bdev);

	if (bdev->fd >= 0)
		close(bdev->fd);
	pthread_mutex_destroy(&file->resize_lock);
	free(file);
}

static const struct tp_bdev_ops file_ops = {
	.name = "file",
	.read = file_read,
	.write = file_write,
	.flush = file_flush,
	.flush_begin = file_flush_begin,
	.flush_end = file_flush_end,
	.check = file_check,
	.start = file_start,
	.punch = file_punch,
	.resize = file_resize,
	.size = file_size,
	.next_data = file_next_data,
	.write_hole = file_write_hole,
	.allocate = file_allocate,
	.close = file_close,
};

/* ---- opening ------------------------------------------------------------------------------- */

/* What open itself does not tell apart is TP_E_OPEN with the errno. */
static int open_failed(const char *path, uint32_t flags, int host_errno, struct tp_error *err)
{
	if (host_errno == EEXIST && flags & TP_BDEV_CREATE)
		return tp_fail_errno(err, TP_E_NOT_EMPTY, host_errno, "create %s", path);
	if (host_errno == EBUSY)
		return tp_fail_errno(err, TP_E_BUSY, host_errno, "open %s", path);
	return tp_fail_errno(err, TP_E_OPEN, host_errno, "open %s", path);
}

static int open_descriptor(const char *path, uint32_t flags, int *fd_ret, struct tp_error *err)
{
	/* O_NONBLOCK so that a FIFO in the path's place cannot hold us up; taken off below. */
	int open_flags = O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
	struct stat st;
	int fd;

	open_flags |= flags & TP_BDEV_READ_ONLY ? O_RDONLY : O_RDWR;
	if (flags & TP_BDEV_CREATE)
		open_flags |= O_CREAT | O_EXCL;
	else if (flags & TP_BDEV_EXCLUSIVE && !stat(path, &st) && S_ISBLK(st.st_mode))
		open_flags |= O_EXCL;
	do {
		fd = open(path, open_flags, 0600);
	} while (fd < 0 && errno == EINTR);
	if (fd < 0)
		return open_failed(path, flags, errno, err);
	*fd_ret = fd;
	return 0;
}

/*
 * O_NONBLOCK goes, for io_uring would answer EAGAIN where it should wait. O_DIRECT comes only now:
 * an open that makes a file and then finds no direct I/O there fails and leaves the file.
 */
static int set_mode(int fd, const char *path, uint32_t flags, struct tp_error *err)
{
	if (!fcntl(fd, F_SETFL, flags & TP_BDEV_DIRECT ? O_DIRECT : 0))
		return 0;
	if (errno == EINVAL && flags & TP_BDEV_DIRECT)
		return tp_fail_errno(err, TP_E_NOT_SUPPORTED, errno,
				     "open %s for direct I/O: its filesystem has none", path);
	return tp_fail_errno(err, TP_E_OPEN, errno, "open %s", path);
}

static int lock(int fd, const char *path, uint32_t flags, struct tp_error *err)
{
	int operation = flags & TP_BDEV_EXCLUSIVE ? LOCK_EX : LOCK_SH;

	if (!(flags & (TP_BDEV_EXCLUSIVE | TP_BDEV_SHARED_LOCK)))
		return 0;
	while (flock(fd, operation | LOCK_NB)) {
		if (errno == EINTR)
			continue;
		if (errno == EWOULDBLOCK)
			return tp_fail_errno(err, TP_E_BUSY, errno,
					     "lock %s: another process has it open", path);
		return tp_fail_errno(err, TP_E_NOT_SUPPORTED, errno, "lock %s", path);
	}
	return 0;
}

static int is_alignment(uint32_t value)
{
	return value && value <= ALIGN_MAX && !(value & (value - 1));
}

/* The kernel says what direct I/O on this very file takes, or that it would not be direct at
 * all. */
static int ask_alignment(struct file_bdev *file, struct tp_error *err)
{
	int logical = 0;
#ifdef STATX_DIOALIGN
	struct statx stx;

	if (!statx(file->bdev.fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) &&
	    stx.stx_mask & STATX_DIOALIGN) {
		if (!stx.stx_dio_offset_align)
			return tp_fail(err, TP_E_NOT_SUPPORTED,
				       "%s: the kernel says that direct I/O on it is not direct",
				       file->name);
		if (is_alignment(stx.stx_dio_offset_align) && is_alignment(stx.stx_dio_mem_align)) {
			file->bdev.io_align = stx.stx_dio_offset_align;
			file->bdev.mem_align = stx.stx_dio_mem_align;
			return 0;
		}
	}
#endif
	file->bdev.io_align = FALLBACK_ALIGN;
	if (file->is_block_device && !ioctl(file->bdev.fd, BLKSSZGET, &logical) && logical > 0 &&
	    is_alignment((uint32_t)logical))
		file->bdev.io_align = (uint32_t)logical;
	file->bdev.mem_align = file->bdev.io_align;
	return 0;
}

/* The name of a new file is durable only with its directory. */
static int sync_directory_of(const char *path, struct tp_error *err)
{
	CLEANUP_FREE char *directory = strdup(path);
	char *slash;
	int status = 0;
	int fd;

	if (!directory)
		return tp_fail(err, TP_E_NO_MEMORY, "create %s: no memory", path);
	slash = strrchr(directory, '/');
	if (slash == directory)
		slash++;
	if (slash)
		*slash = '\0';
	fd = open(slash ? directory : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	/* Filesystems that have no fsync of directories say EINVAL. */
	if (fd < 0 || (fsync(fd) && errno != EINVAL))
		status = tp_fail_errno(err, TP_E_IO, errno, "sync the directory of %s", path);
	if (fd >= 0)
		close(fd);
	return status;
}

static int give_size(int fd, const char *path, uint64_t size, struct tp_error *err)
{
	if (ftruncate(fd, (off_t)size) || fsync(fd))
		return tp_fail_errno(err, TP_E_IO, errno, "create %s of %" PRIu64 " bytes", path,
				     size);
	return sync_directory_of(path, err);
}

static void keep_name(struct file_bdev *file, const char *path)
{
	size_t length = strlen(path);
	size_t room = sizeof(file->name) - 1;

	if (length > room)
		snprintf(file->name, sizeof(file->name), "...%s", path + length - (room - 3));
	else
		memcpy(file->name, path, length + 1);
}

static int examine(struct file_bdev *file, const char *path, uint32_t flags, uint64_t create_size,
		   struct tp_error *err)
{
	uint64_t size;
	struct stat st;
	int status;

	if (fstat(file->bdev.fd, &st))
		return tp_fail_errno(err, TP_E_OPEN, errno, "open %s", path);
	file->is_block_device = S_ISBLK(st.st_mode);
	if (!file->is_block_device && !S_ISREG(st.st_mode))
		return tp_fail(err, TP_E_OPEN, "open %s: neither a regular file nor a block device",
			       path);
	status = set_mode(file->bdev.fd, path, flags, err);
	if (!status)
		status = lock(file->bdev.fd, path, flags, err);
	if (!status && flags & TP_BDEV_CREATE)
		status = give_size(file->bdev.fd, path, create_size, err);
	if (!status && flags & TP_BDEV_DIRECT)
		status = ask_alignment(file, err);
	if (!status)
		status = present_size(file->bdev.fd, file->name, &size, err);
	/* Again, now that nobody with a lock changes it. */
	if (!status && fstat(file->bdev.fd, &st))
		status = tp_fail_errno(err, TP_E_OPEN, errno, "open %s", path);
	if (status)
		return status;
	file->was_linked = st.st_nlink > 0;
	/* Through the page cache io_submit does nothing that pwrite does not. */
	file->uses_aio = !file->is_block_device && !!(flags & TP_BDEV_DIRECT);
	atomic_init(&file->size, size & ~(uint64_t)(file->bdev.io_align - 1));
	file->bdev.can_punch = probe_punch(file, &st);
	if (file->is_block_device) {
		int logical = 0;

		if (!ioctl(file->bdev.fd, BLKSSZGET, &logical) && logical > 0 &&
		    is_alignment((uint32_t)logical))
			file->punch_align = (uint32_t)logical;
		else
			file->punch_align = FALLBACK_ALIGN;
	}
	return 0;
}

static int check_flags(uint32_t flags, uint64_t create_size, struct tp_error *err)
{
	if (flags & ~(uint32_t)KNOWN_FLAGS)
		return tp_fail(err, TP_E_INVALID, "unknown flags 0x%" PRIx32, flags);
	if (flags & TP_BDEV_CREATE && flags & TP_BDEV_READ_ONLY)
		return tp_fail(err, TP_E_INVALID, "a device cannot be created read-only");
	if (flags & TP_BDEV_EXCLUSIVE && flags & TP_BDEV_SHARED_LOCK)
		return tp_fail(err, TP_E_INVALID, "a lock is either exclusive or shared");
	if (create_size > INT64_MAX)
		return tp_fail(err, TP_E_INVALID, "size %" PRIu64 " is too large", create_size);
	return 0;
}

int tp_bdev_file_open(const char *path, uint32_t flags, uint64_t create_size,
		      struct tp_bdev **bdev_ret, struct tp_error *err)
{
	struct file_bdev *file;
	int status = check_flags(flags, create_size, err);

	if (status)
		return status;
	file = calloc(1, sizeof(*file));
	if (!file)
		return tp_fail(err, TP_E_NO_MEMORY, "open %s: no memory", path);
	file->bdev.ops = &file_ops;
	file->bdev.io_align = 1;
	file->bdev.mem_align = 1;
	file->bdev.fd = -1;
	file->bdev.read_only = !!(flags & TP_BDEV_READ_ONLY);
	file->punch_align = 1;
	pthread_mutex_init(&file->resize_lock, NULL);
	keep_name(file, path);
	status = open_descriptor(path, flags, &file->bdev.fd, err);
	if (!status) {
		status = examine(file, path, flags, create_size, err);
		/* We made the file, so a failure leaves none. */
		if (status && flags & TP_BDEV_CREATE)
			unlink(path);
	}
	if (status) {
		file_close(&file->bdev);
		return status;
	}
	*bdev_ret = &file->bdev;
	return 0;
}
