/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A log, in memory, of what was done to one or several devices: the raw material of crash images.
 *
 * Order: an entry is appended when its operation has succeeded below, so that an operation is
 * before every one that its completion could have caused, on whatever device of the log. Of a
 * flush, that is not all: what completed while it ran is before it and not covered by it. Its entry
 * therefore says how long the log was when it was begun: a crash after it keeps every entry of its
 * device below that index, and may lose any other. Operations that failed are not in the log; a
 * fault device in front of the log turns a torn write into the part that was written.
 *
 * Room for the entry and its payload is had before the operation is passed on: nothing is done
 * below that the log then could not hold.
 *
 * It has no descriptor for asynchronous I/O, which would go past it.
 *
 * Thread-safety: one mutex over the log, not held during I/O. The log lives until the last of its
 * devices is closed.
 */
#include "thinpool/bdev.h"
#include "thinpool/error.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define ENTRIES_MIN 256
#define ZEROS_MAX   65536 /* bytes per write where a target cannot punch */

struct entry {
	struct tp_log_entry public;
	unsigned char *payload; /* of a write */
};

struct write_log {
	pthread_mutex_t lock;
	unsigned int users;
	struct entry *entries;
	uint64_t nr_entries;
	uint64_t nr_promised; /* operations under way that have room for their entry */
	uint64_t room;
};

struct log_bdev {
	struct tp_bdev bdev;
	struct tp_bdev *below;
	struct write_log *log;
	uint32_t device;
};

static const struct tp_bdev_ops log_ops;

/* NULL when it is a device of another kind: a caller's mistake that Python can make. */
static struct log_bdev *as_log(const struct tp_bdev *bdev)
{
	return bdev->ops == &log_ops ? (struct log_bdev *)bdev : NULL;
}

/* ---- the log -------------------------------------------------------------------------------- */

static struct write_log *write_log_create(void)
{
	struct write_log *log = calloc(1, sizeof(*log));

	if (!log)
		return NULL;
	pthread_mutex_init(&log->lock, NULL);
	log->users = 1;
	return log;
}

static struct write_log *write_log_get(struct write_log *log)
{
	pthread_mutex_lock(&log->lock);
	log->users++;
	pthread_mutex_unlock(&log->lock);
	return log;
}

static void write_log_put(struct write_log *log)
{
	unsigned int left;

	pthread_mutex_lock(&log->lock);
	left = --log->users;
	pthread_mutex_unlock(&log->lock);
	if (left)
		return;
	for (uint64_t i = 0; i < log->nr_entries; i++)
		free(log->entries[i].payload);
	free(log->entries);
	pthread_mutex_destroy(&log->lock);
	free(log);
}

/* Room for one entry; *length_ret is how long the log is now. */
static int promise(struct write_log *log, uint64_t *length_ret)
{
	int status = 0;

	pthread_mutex_lock(&log->lock);
	if (log->nr_entries + log->nr_promised == log->room) {
		uint64_t room = log->room ? 2 * log->room : ENTRIES_MIN;
		struct entry *entries = realloc(log->entries, room * sizeof(*entries));

		if (entries) {
			log->entries = entries;
			log->room = room;
		} else {
			status = TP_E_NO_MEMORY;
		}
	}
	if (!status)
		log->nr_promised++;
	*length_ret = log->nr_entries;
	pthread_mutex_unlock(&log->lock);
	return status;
}

static void append_locked(struct write_log *log, struct entry entry)
{
	TP_ASSERT(log->nr_promised);
	log->nr_promised--;
	TP_ASSERT(log->nr_entries < log->room);
	log->entries[log->nr_entries++] = entry;
}

/* Append it if the operation succeeded; the payload is the log's or is freed. */
static int keep(struct write_log *log, int status, struct entry entry)
{
	pthread_mutex_lock(&log->lock);
	if (status) {
		TP_ASSERT(log->nr_promised);
		log->nr_promised--;
	} else {
		append_locked(log, entry);
	}
	pthread_mutex_unlock(&log->lock);
	if (status)
		free(entry.payload);
	return status;
}

static int no_memory(struct tp_error *err)
{
	return tp_fail(err, TP_E_NO_MEMORY, "no memory to log an operation, which was not done");
}

/* ---- operations ----------------------------------------------------------------------------- */

static int log_read(struct tp_bdev *bdev, uint64_t offset, void *buffer, size_t length,
		    struct tp_error *err)
{
	return tp_bdev_read(as_log(bdev)->below, offset, buffer, length, err);
}

static int log_write(struct tp_bdev *bdev, uint64_t offset, const void *buffer, size_t length,
		     struct tp_error *err)
{
	struct log_bdev *device = as_log(bdev);
	struct entry entry = { { TP_LOG_WRITE, device->device, offset, length }, NULL };
	uint64_t ignored;
	int status;

	entry.payload = malloc(length);
	if (!entry.payload || promise(device->log, &ignored)) {
		free(entry.payload);
		return no_memory(err);
	}
	memcpy(entry.payload, buffer, length);
	/* From our copy: what is logged is what was written, whatever happens to the buffer. */
	status = tp_bdev_write(device->below, offset, entry.payload, length, err);
	return keep(device->log, status, entry);
}

static int log_flush(struct tp_bdev *bdev, struct tp_error *err)
{
	struct log_bdev *device = as_log(bdev);
	struct entry entry = { { TP_LOG_FLUSH, device->device, 0, 0 }, NULL };
	int status;

	if (promise(device->log, &entry.public.offset))
		return no_memory(err);
	status = tp_bdev_flush(device->below, err);
	return keep(device->log, status, entry);
}

static int log_check(struct tp_bdev *bdev, struct tp_error *err)
{
	return tp_bdev_check(as_log(bdev)->below, err);
}

static void log_start(struct tp_bdev *bdev)
{
	tp_bdev_start(as_log(bdev)->below);
}

static int log_punch(struct tp_bdev *bdev, uint64_t offset, uint64_t length, struct tp_error *err)
{
	struct log_bdev *device = as_log(bdev);
	struct entry entry = { { TP_LOG_PUNCH, device->device, offset, length }, NULL };
	uint64_t ignored;
	int status;

	if (promise(device->log, &ignored))
		return no_memory(err);
	status = tp_bdev_punch(device->below, offset, length, err);
	return keep(device->log, status, entry);
}

/* Not recorded: it changes nothing that can be read. */
static int log_allocate(struct tp_bdev *bdev, uint64_t offset, uint64_t length,
			struct tp_error *err)
{
	return tp_bdev_allocate(as_log(bdev)->below, offset, length, err);
}

static int log_resize(struct tp_bdev *bdev, uint64_t size, struct tp_error *err)
{
	return tp_bdev_resize(as_log(bdev)->below, size, err);
}

static uint64_t log_size(const struct tp_bdev *bdev)
{
	return tp_bdev_size(as_log(bdev)->below);
}

static int log_next_data(struct tp_bdev *bdev, uint64_t offset, uint64_t *begin_ret,
			 uint64_t *end_ret, struct tp_error *err)
{
	return tp_bdev_next_data(as_log(bdev)->below, offset, begin_ret, end_ret, err);
}

static void log_close(struct tp_bdev *bdev)
{
	write_log_put(as_log(bdev)->log);
	free(bdev);
}

static const struct tp_bdev_ops log_ops = {
	.name = "log",
	.read = log_read,
	.write = log_write,
	.flush = log_flush,
	.check = log_check,
	.start = log_start,
	.punch = log_punch,
	.resize = log_resize,
	.size = log_size,
	.next_data = log_next_data,
	.allocate = log_allocate,
	.close = log_close,
};

int tp_bdev_log_open(struct tp_bdev *below, struct tp_bdev *order, uint32_t device_number,
		     struct tp_bdev **bdev_ret, struct tp_error *err)
{
	struct log_bdev *device;

	if (order && !as_log(order))
		return tp_fail(err, TP_E_INVALID, "the order is a log device's, not a %s one's",
			       order->ops->name);
	device = calloc(1, sizeof(*device));
	if (!device)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a log device");
	device->log = order ? write_log_get(as_log(order)->log) : write_log_create();
	if (!device->log) {
		free(device);
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a log");
	}
	device->bdev = *below;
	device->bdev.ops = &log_ops;
	device->bdev.fd = -1;
	device->below = below;
	device->device = device_number;
	*bdev_ret = &device->bdev;
	return 0;
}

/* ---- reading the log ------------------------------------------------------------------------ */

uint64_t tp_bdev_log_count(const struct tp_bdev *bdev)
{
	struct log_bdev *device = as_log(bdev);
	uint64_t count;

	if (!device)
		return 0;
	pthread_mutex_lock(&device->log->lock);
	count = device->log->nr_entries;
	pthread_mutex_unlock(&device->log->lock);
	return count;
}

/* A copy: the array may move, what a payload pointer points at does not. */
static int entry_at(const struct tp_bdev *bdev, uint64_t index, struct entry *entry_ret)
{
	struct log_bdev *device = as_log(bdev);
	int status = 0;

	if (!device)
		return TP_E_INVALID;
	pthread_mutex_lock(&device->log->lock);
	if (index < device->log->nr_entries)
		*entry_ret = device->log->entries[index];
	else
		status = TP_E_OUT_OF_RANGE;
	pthread_mutex_unlock(&device->log->lock);
	return status;
}

int tp_bdev_log_entry(const struct tp_bdev *bdev, uint64_t index, struct tp_log_entry *entry_ret)
{
	struct entry entry;
	int status = entry_at(bdev, index, &entry);

	if (!status)
		*entry_ret = entry.public;
	return status;
}

int tp_bdev_log_payload(const struct tp_bdev *bdev, uint64_t index, void *buffer)
{
	struct entry entry;
	int status = entry_at(bdev, index, &entry);

	if (status)
		return status;
	if (entry.public.kind != TP_LOG_WRITE)
		return TP_E_INVALID;
	memcpy(buffer, entry.payload, entry.public.length);
	return 0;
}

int tp_bdev_log_mark(struct tp_bdev *bdev, uint64_t number)
{
	struct log_bdev *device = as_log(bdev);
	struct entry entry = { { TP_LOG_MARK, 0, number, 0 }, NULL };
	uint64_t ignored;

	if (!device)
		return TP_E_INVALID;
	entry.public.device = device->device;
	if (promise(device->log, &ignored))
		return TP_E_NO_MEMORY;
	return keep(device->log, 0, entry);
}

static int zero(struct tp_bdev *target, uint64_t offset, uint64_t length, struct tp_error *err)
{
	static const unsigned char zeros[ZEROS_MAX];
	int status = 0;

	if (target->can_punch)
		return tp_bdev_punch(target, offset, length, err);
	while (length && !status) {
		size_t part = length < ZEROS_MAX ? (size_t)length : ZEROS_MAX;

		status = tp_bdev_write(target, offset, zeros, part, err);
		offset += part;
		length -= part;
	}
	return status;
}

int tp_bdev_log_replay(const struct tp_bdev *bdev, uint64_t begin, uint64_t end, uint32_t device,
		       struct tp_bdev *target, struct tp_error *err)
{
	int status = 0;

	for (uint64_t i = begin; i < end && !status; i++) {
		struct entry entry;

		status = entry_at(bdev, i, &entry);
		if (status)
			return tp_fail(err, status, "no entry %" PRIu64 " in this log", i);
		if (entry.public.device != device)
			continue;
		if (entry.public.kind == TP_LOG_WRITE)
			status = tp_bdev_write(target, entry.public.offset, entry.payload,
					       entry.public.length, err);
		else if (entry.public.kind == TP_LOG_PUNCH)
			status = zero(target, entry.public.offset, entry.public.length, err);
	}
	return status;
}
