/* SPDX-License-Identifier: Apache-2.0 */
/* The threads that may block, and the queues in front of them. */
#include "server_fuse.h"
#include "thinpool/error.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#define STACK_SIZE (256u << 10)

static void let_go(struct tp_fuse_server *server, struct slot *slot)
{
	struct tp_fuse_file *file = slot->file;

	slot->file = NULL;
	if (file)
		tp_fuse_files_put(&server->files, file);
}

static void do_read(struct tp_fuse_server *server, struct slot *slot)
{
	struct tp_error err = { 0 };
	int error = slot->file ? 0 : tp_fuse_prepare_io(server, slot);
	int status;

	if (!error && slot->length) {
		status = slot->file->ops->read(slot->file->target, slot->offset, slot->data,
					       slot->length, &err);
		if (status)
			error = -tp_fuse_errno(status, err.host_errno);
	}
	if (error)
		count(&server->counters.errors, 1);
	else
		count(&server->counters.read_bytes, slot->length);
	let_go(server, slot);
	tp_fuse_reply(server, slot, error, slot->data, slot->length);
}

static void do_write(struct tp_fuse_server *server, struct slot *slot)
{
	struct tp_error err = { 0 };
	int error = slot->file ? 0 : tp_fuse_prepare_io(server, slot);
	int status;

	if (!error && slot->length) {
		status = slot->file->ops->write(slot->file->target, slot->offset, slot->data,
						slot->length, &err);
		if (status)
			error = -tp_fuse_errno(status, err.host_errno);
	}
	if (error)
		count(&server->counters.errors, 1);
	else
		count(&server->counters.written_bytes, slot->length);
	let_go(server, slot);
	tp_fuse_reply_done(server, slot, error, slot->length);
}

/* The length that lies inside the file, or -errno. *zero_ret: whether anything is to be done. */
static int check_fallocate(const struct fuse_fallocate_in *in, const struct tp_fuse_file *file,
			   uint64_t *length_ret, bool *zero_ret)
{
	const uint32_t keep = FALLOC_FL_KEEP_SIZE;
	uint64_t size = file->ops->size(file->target);

	if (!in->length || in->offset > UINT64_MAX - in->length)
		return -EINVAL;
	*length_ret = in->length;
	switch (in->mode) {
	case FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE:
		*zero_ret = true;
		if (in->offset >= size)
			*length_ret = 0; /* nothing there to punch: success, as in any file */
		else if (in->length > size - in->offset)
			*length_ret = size - in->offset;
		break;
	case FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE:
	case FALLOC_FL_ZERO_RANGE:
		*zero_ret = true;
		break;
	case FALLOC_FL_KEEP_SIZE:
	case 0:
		*zero_ret = false;
		break;
	default:
		return -EOPNOTSUPP;
	}
	/* A volume does not grow by being written to. */
	if (in->offset + *length_ret > size && !(in->mode == (FALLOC_FL_PUNCH_HOLE | keep)))
		return -EOPNOTSUPP;
	return file->read_only ? -EROFS : 0;
}

/* Whole blocks first: they give space back, which the ends may need to break sharing. */
static int zero(const struct tp_fuse_file *file, uint32_t block_size, uint64_t offset,
		uint64_t length, struct tp_error *err)
{
	uint64_t end = offset + length;
	uint64_t first = (offset + block_size - 1) / block_size * block_size;
	uint64_t last = end == file->ops->size(file->target) ? end : end / block_size * block_size;
	int status;

	if (first >= last)
		return file->ops->zero(file->target, offset, length, err);
	status = file->ops->zero(file->target, first, last - first, err);
	if (!status && offset < first)
		status = file->ops->zero(file->target, offset, first - offset, err);
	if (!status && last < end)
		status = file->ops->zero(file->target, last, end - last, err);
	return status;
}

static void do_fallocate(struct tp_fuse_server *server, struct slot *slot)
{
	const struct fuse_fallocate_in *in = slot->request.arg;
	struct tp_fuse_file *file = tp_fuse_files_get(&server->files, slot->header->nodeid);
	uint64_t length = 0;
	struct tp_error err = { 0 };
	bool zeroes = false;
	int error = -EIO;
	int status;

	slot->file = file;
	if (file)
		error = in->fh == file->generation ? check_fallocate(in, file, &length, &zeroes)
						   : -ESTALE;
	if (!error && zeroes && length) {
		status = zero(file, server->options.block_size, in->offset, length, &err);
		if (status)
			error = -tp_fuse_errno(status, err.host_errno);
	}
	if (error && error != -EOPNOTSUPP)
		count(&server->counters.errors, 1);
	else
		count(&server->counters.zeroed_bytes, length);
	let_go(server, slot);
	tp_fuse_reply_done(server, slot, error, 0);
}

static void serve_one(struct work_queue *queue, struct slot *slot)
{
	struct tp_fuse_server *server = queue->server;

	switch (slot->header->opcode) {
	case FUSE_READ:
		do_read(server, slot);
		break;
	case FUSE_WRITE:
		do_write(server, slot);
		break;
	case FUSE_FALLOCATE:
		do_fallocate(server, slot);
		break;
	default:
		tp_fuse_operate(server, slot);
		break;
	}
}

/* Every volume of the pool at once: 0, or a status when it must be asked one by one. */
static int flush_pool(struct tp_fuse_server *server, const struct slot *list)
{
	const struct slot *slot;

	if (!server->pool)
		return TP_E_NOT_SUPPORTED;
	for (slot = list; slot; slot = slot->next)
		if (slot->file && slot->file->ops != &tp_fuse_volume_ops)
			return TP_E_NOT_SUPPORTED;
	count(&server->counters.flush_calls, 1);
	return tp_pool_commit(server->pool, NULL);
}

static int flush_file(struct tp_fuse_server *server, struct tp_fuse_file *file)
{
	struct tp_error err = { 0 };
	int status;

	if (!file)
		return -EIO;
	count(&server->counters.flush_calls, 1);
	status = file->ops->flush(file->target, &err);
	return status ? -tp_fuse_errno(status, err.host_errno) : 0;
}

/*
 * Everyone who waits is served by one call: a flush of the file that all of them name, or a commit
 * of the pool where they name several. A failing commit says nothing about a volume without
 * changes (in a pool that is read-only, say), so each is asked then.
 */
static void serve_flushes(struct tp_fuse_server *server, struct slot *list)
{
	struct tp_fuse_file *asked = NULL;
	bool several = false, all_done;
	struct slot *slot;
	int error = 0;

	for (slot = list; slot; slot = slot->next) {
		slot->file = tp_fuse_files_get(&server->files, slot->header->nodeid);
		several |= slot->header->nodeid != list->header->nodeid;
	}
	all_done = several && flush_pool(server, list) == 0;
	for (slot = list; slot; slot = list) {
		list = slot->next;
		if (!slot->file)
			error = -EIO;
		else if (all_done)
			error = 0;
		else if (slot->file != asked)
			error = flush_file(server, slot->file);
		asked = slot->file;
		count(&server->counters.flushes, 1);
		if (error)
			count(&server->counters.errors, 1);
		let_go(server, slot);
		tp_fuse_reply(server, slot, error, NULL, 0);
	}
}

/* NULL: the queue ends and is empty. A flush thread takes the whole list. */
static struct slot *take_work(struct work_queue *queue)
{
	struct slot *slot;

	pthread_mutex_lock(&queue->lock);
	while (!queue->head && !queue->ending)
		pthread_cond_wait(&queue->wake, &queue->lock);
	slot = queue->head;
	if (slot && queue->kind == WORK_FLUSH) {
		queue->head = NULL;
		queue->tail = &queue->head;
	} else if (slot) {
		queue->head = slot->next;
		if (!queue->head)
			queue->tail = &queue->head;
		slot->next = NULL;
	}
	pthread_mutex_unlock(&queue->lock);
	return slot;
}

static void *work_thread(void *argument)
{
	struct work_queue *queue = argument;
	struct slot *slot;

	while ((slot = take_work(queue))) {
		if (queue->kind == WORK_FLUSH)
			serve_flushes(queue->server, slot);
		else
			serve_one(queue, slot);
	}
	return NULL;
}

void tp_fuse_work_push(struct work_queue *queue, struct slot *slot)
{
	slot->next = NULL;
	pthread_mutex_lock(&queue->lock);
	*queue->tail = slot;
	queue->tail = &slot->next;
	pthread_cond_signal(&queue->wake);
	pthread_mutex_unlock(&queue->lock);
}

void tp_fuse_dispatch_slow(struct tp_fuse_server *server, struct slot *slot)
{
	enum work_kind kind = WORK_READ;

	switch (slot->header->opcode) {
	case FUSE_WRITE:
		kind = slot->map.copies ? WORK_COPY : WORK_WRITE;
		break;
	case FUSE_FALLOCATE:
		kind = WORK_ZERO;
		break;
	case FUSE_FSYNC:
		kind = WORK_FLUSH;
		break;
	default:
		break;
	}
	tp_fuse_work_push(&server->queues[kind], slot);
}

int tp_fuse_work_start(struct work_queue *queue, struct tp_fuse_server *server, enum work_kind kind,
		       uint32_t nr_threads, struct tp_error *err)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	int failure = 0;

	memset(queue, 0, sizeof(*queue));
	queue->tail = &queue->head;
	queue->server = server;
	queue->kind = kind;
	pthread_mutex_init(&queue->lock, NULL);
	pthread_cond_init(&queue->wake, NULL);
	queue->threads = calloc(nr_threads, sizeof(*queue->threads));
	if (!queue->threads)
		return tp_fail(err, TP_E_NO_MEMORY, "FUSE server: out of memory");
	/* Signals are for the thread that Python runs in. */
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_SIZE);
	while (!failure && queue->nr_threads < nr_threads) {
		failure = pthread_create(&queue->threads[queue->nr_threads], &attributes,
					 work_thread, queue);
		if (!failure)
			queue->nr_threads++;
	}
	pthread_attr_destroy(&attributes);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return failure ? tp_fail_errno(err, TP_E_NO_MEMORY, failure, "FUSE server: thread") : 0;
}

void tp_fuse_work_stop(struct work_queue *queue)
{
	uint32_t i;

	if (!queue->server)
		return;
	pthread_mutex_lock(&queue->lock);
	queue->ending = true;
	pthread_cond_broadcast(&queue->wake);
	pthread_mutex_unlock(&queue->lock);
	for (i = 0; i < queue->nr_threads; i++)
		pthread_join(queue->threads[i], NULL);
	pthread_cond_destroy(&queue->wake);
	pthread_mutex_destroy(&queue->lock);
	free(queue->threads);
	memset(queue, 0, sizeof(*queue));
}
