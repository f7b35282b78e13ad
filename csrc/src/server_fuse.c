/* SPDX-License-Identifier: Apache-2.0 */
/* Making, running and ending a FUSE server: the control side, called from Python. */
#include "server_fuse.h"
#include "thinpool/error.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 256u

static uint32_t or_default(uint32_t value, uint32_t otherwise)
{
	return value ? value : otherwise;
}

static int take_options(struct tp_fuse_server *server, const struct tp_fuse_options *given,
			struct tp_error *err)
{
	struct tp_fuse_options *options = &server->options;

	if (given)
		*options = *given;
	options->write_threads = or_default(options->write_threads, 8);
	options->copy_threads = or_default(options->copy_threads, 16);
	options->read_threads = or_default(options->read_threads, 4);
	options->zero_threads = or_default(options->zero_threads, 2);
	options->flush_threads = or_default(options->flush_threads, 2);
	options->trim_ms = or_default(options->trim_ms, 1000);
	options->block_size = or_default(options->block_size, 64u << 10);
	if (server->pool) {
		struct tp_pool_status status;

		tp_pool_get_status(server->pool, &status);
		options->block_size = status.data_block_size;
	}
	/* What is not background (lookups, flushes, punches) finds a slot even when this many reads
	 * and writes are held up. */
	options->max_background =
		or_default(options->max_background, (server->slots.nr * 3 + 3) / 4);
	if (options->write_threads > MAX_THREADS || options->copy_threads > MAX_THREADS ||
	    options->read_threads > MAX_THREADS || options->zero_threads > MAX_THREADS ||
	    options->flush_threads > MAX_THREADS || options->max_background > UINT16_MAX)
		return tp_fail(err, TP_E_INVALID, "FUSE server: at most %u threads of a kind",
			       MAX_THREADS);
	return 0;
}

static int set_nonblocking(int fd, struct tp_error *err)
{
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
		return tp_fail_errno(err, TP_E_OPEN, errno, "FUSE descriptor %d", fd);
	return 0;
}

static int open_data_threads(struct tp_fuse_server *server, struct tp_error *err)
{
	uint32_t i;
	int status = 0;

	if (posix_memalign((void **)&server->data, _Alignof(struct data_thread),
			   server->nr_fds * sizeof(*server->data)))
		return tp_fail(err, TP_E_NO_MEMORY, "FUSE server: out of memory");
	memset(server->data, 0, server->nr_fds * sizeof(*server->data));
	for (i = 0; i < server->nr_fds; i++) {
		struct data_thread *thread = &server->data[i];

		thread->server = server;
		thread->index = i;
		thread->fuse_fd = server->fuse_fds[i];
		thread->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (thread->event_fd < 0)
			status = tp_fail_errno(err, TP_E_OPEN, errno, "FUSE server: eventfd");
		else if (!status)
			status = set_nonblocking(thread->fuse_fd, err);
	}
	return status;
}

int tp_fuse_server_create(struct tp_pool *pool, const int *fuse_fds, uint32_t nr_fds, int slots_fd,
			  size_t slots_size, const struct tp_fuse_options *options,
			  struct tp_fuse_server **server_ret, struct tp_error *err)
{
	struct tp_fuse_server *server;
	int status;

	if (nr_fds < 1 || nr_fds > FUSE_MAX_FDS)
		return tp_fail(err, TP_E_INVALID, "FUSE server: %u descriptors, 1 to %u wanted",
			       nr_fds, FUSE_MAX_FDS);
	server = calloc(1, sizeof(*server));
	if (!server)
		return tp_fail(err, TP_E_NO_MEMORY, "FUSE server: out of memory");
	server->pool = pool;
	server->nr_fds = nr_fds;
	server->start_time = time(NULL);
	server->hurry_fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	memcpy(server->fuse_fds, fuse_fds, nr_fds * sizeof(*fuse_fds));
	pthread_mutex_init(&server->control, NULL);
	pthread_cond_init(&server->control_changed, NULL);
	tp_fuse_files_init(&server->files);
	status = tp_fuse_slots_init(&server->slots, slots_fd, slots_size, err);
	if (!status)
		status = take_options(server, options, err);
	if (!status)
		status = open_data_threads(server, err);
	if (status) {
		tp_fuse_server_destroy(server);
		return status;
	}
	*server_ret = server;
	return 0;
}

void tp_fuse_server_destroy(struct tp_fuse_server *server)
{
	uint32_t i;

	if (!server)
		return;
	TP_ASSERT(!atomic_load(&server->running));
	for (i = 0; server->data && i < server->nr_fds; i++)
		if (server->data[i].event_fd >= 0)
			close(server->data[i].event_fd);
	free(server->data);
	if (server->hurry_fd >= 0)
		close(server->hurry_fd);
	tp_fuse_files_deinit(&server->files);
	tp_fuse_slots_deinit(&server->slots);
	pthread_cond_destroy(&server->control_changed);
	pthread_mutex_destroy(&server->control);
	free(server);
}

int tp_fuse_server_add_linear(struct tp_fuse_server *server, uint32_t id, const char *path,
			      uint32_t read_only, uint64_t generation, struct tp_error *err)
{
	struct tp_fuse_file file = {
		.id = id,
		.read_only = read_only,
		.generation = generation,
		.ops = &tp_fuse_linear_ops,
		.fd_key = atomic_fetch_add(&server->next_fd_key, 1) + 1,
	};
	int status;

	status = tp_fuse_linear_open(path, read_only, &file.target, &file.fd, err);
	if (status)
		return status;
	status = tp_fuse_files_add(&server->files, &file, err);
	if (status)
		tp_fuse_linear_ops.close(file.target);
	return status;
}

int tp_fuse_server_remove_file(struct tp_fuse_server *server, uint32_t id, struct tp_error *err)
{
	return tp_fuse_files_remove(&server->files, id, err);
}

/* ---- running ---- */

static bool is_open(const struct slot *slot)
{
	return atomic_load(&slot->shared->state) != SLOT_FREE && slot->header->unique;
}

/* Whether a slot before this one has the same request. */
static bool is_twice(const struct slots *slots, uint32_t index)
{
	const struct slot *all = slots->slots;
	uint32_t i;

	for (i = 0; i < index; i++)
		if (is_open(&all[i]) && all[i].header->unique == all[index].header->unique)
			return true;
	return false;
}

static void replay_one(struct tp_fuse_server *server, struct slot *slot)
{
	int error;

	count(&server->counters.replays, 1);
	if (slot->shared->fd_index >= server->nr_fds) {
		tp_fuse_drop(server, slot);
		return;
	}
	tp_fuse_slot_make_resident(slot);
	if (atomic_load(&slot->shared->state) == SLOT_DONE) {
		tp_fuse_reply_again(server, slot);
		return;
	}
	error = slot->header->len > FUSE_READ_SIZE
			? -EIO
			: tp_fuse_decode(slot->header, slot->header->len, &slot->request);
	if (error == -EIO || error == -EINVAL)
		tp_fuse_reply(server, slot, error, NULL, 0);
	else
		tp_fuse_dispatch_slow(server, slot);
}

/* Open requests of a predecessor, before any new one is read. */
static void replay(struct tp_fuse_server *server)
{
	struct slots *slots = &server->slots;
	uint32_t i;

	/* What was being moved is dropped once before anything is begun: served twice, the second
	 * time could be after the answer. */
	for (i = 1; i < slots->nr; i++)
		if (is_open(&slots->slots[i]) && is_twice(slots, i))
			tp_fuse_drop(server, &slots->slots[i]);
	for (i = 0; i < slots->nr; i++)
		if (is_open(&slots->slots[i]))
			replay_one(server, &slots->slots[i]);
}

static int start_queues(struct tp_fuse_server *server, struct tp_error *err)
{
	const struct tp_fuse_options *options = &server->options;
	const uint32_t nr[NR_WORK_KINDS] = {
		[WORK_READ] = options->read_threads,   [WORK_WRITE] = options->write_threads,
		[WORK_COPY] = options->copy_threads,   [WORK_ZERO] = options->zero_threads,
		[WORK_FLUSH] = options->flush_threads,
	};
	uint32_t kind;
	int status = 0;

	for (kind = 0; kind < NR_WORK_KINDS && !status; kind++)
		status = tp_fuse_work_start(&server->queues[kind], server, kind, nr[kind], err);
	return status;
}

static int start_data_threads(struct tp_fuse_server *server, uint32_t *started_ret,
			      struct tp_error *err)
{
	sigset_t all, before;
	int failure = 0;
	uint32_t i;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	for (i = 0; i < server->nr_fds && !failure; i++) {
		failure = pthread_create(&server->data[i].thread, NULL, tp_fuse_data_thread,
					 &server->data[i]);
		if (!failure)
			*started_ret = i + 1;
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return failure ? tp_fail_errno(err, TP_E_NO_MEMORY, failure, "FUSE server: thread") : 0;
}

int tp_fuse_server_run(struct tp_fuse_server *server, struct tp_error *err)
{
	uint32_t started = 0, kind, i;
	int status;

	pthread_mutex_lock(&server->control);
	if (atomic_exchange(&server->running, 1)) {
		pthread_mutex_unlock(&server->control);
		return tp_fail(err, TP_E_BUSY, "FUSE server: it runs already");
	}
	pthread_mutex_unlock(&server->control);
	status = start_queues(server, err);
	if (!status) {
		replay(server);
		status = start_data_threads(server, &started, err);
	}
	pthread_mutex_lock(&server->control);
	while (!status && !atomic_load(&server->stopping) && !atomic_load(&server->disconnected))
		pthread_cond_wait(&server->control_changed, &server->control);
	pthread_mutex_unlock(&server->control);

	/* Data threads first: they feed the queues. */
	atomic_store(&server->stopping, 1);
	tp_fuse_data_wake_all(server);
	for (i = 0; i < started; i++)
		pthread_join(server->data[i].thread, NULL);
	for (kind = 0; kind < NR_WORK_KINDS; kind++)
		tp_fuse_work_stop(&server->queues[kind]);
	if (!status && atomic_load(&server->disconnected))
		status = tp_fail(err, TP_E_CLOSED, "FUSE server: the kernel ended the connection");
	atomic_store(&server->running, 0);
	return status;
}

void tp_fuse_server_stop(struct tp_fuse_server *server)
{
	pthread_mutex_lock(&server->control);
	atomic_store(&server->stopping, 1);
	pthread_cond_broadcast(&server->control_changed);
	pthread_mutex_unlock(&server->control);
}

static void add_counters(struct tp_fuse_statistics *sum, const struct counters *counters)
{
	sum->requests += atomic_load(&counters->requests);
	sum->fast += atomic_load(&counters->fast);
	sum->slow += atomic_load(&counters->slow);
	sum->retried += atomic_load(&counters->retried);
	sum->replays += atomic_load(&counters->replays);
	sum->flushes += atomic_load(&counters->flushes);
	sum->flush_calls += atomic_load(&counters->flush_calls);
	sum->errors += atomic_load(&counters->errors);
	sum->lost_replies += atomic_load(&counters->lost_replies);
	sum->read_bytes += atomic_load(&counters->read_bytes);
	sum->written_bytes += atomic_load(&counters->written_bytes);
	sum->zeroed_bytes += atomic_load(&counters->zeroed_bytes);
}

void tp_fuse_server_get_statistics(struct tp_fuse_server *server,
				   struct tp_fuse_statistics *statistics_ret)
{
	struct slots *slots = &server->slots;
	uint64_t taken;
	uint32_t i;

	memset(statistics_ret, 0, sizeof(*statistics_ret));
	add_counters(statistics_ret, &server->counters);
	for (i = 0; i < server->nr_fds; i++)
		add_counters(statistics_ret, &server->data[i].counters);
	statistics_ret->files = server->files.nr_active;
	pthread_mutex_lock(&slots->lock);
	taken = slots->nr - slots->nr_free;
	pthread_mutex_unlock(&slots->lock);
	/* Each data thread holds one for the request to come. */
	statistics_ret->in_flight = taken > server->nr_fds ? taken - server->nr_fds : 0;
}
