/* SPDX-License-Identifier: Apache-2.0 */
/* Data threads: read requests, start asynchronous I/O for those that can be resolved without
 * blocking, answer them as they complete. A data thread never blocks but in one place, await(),
 * and there without a timeout unless there is memory to give back.
 *
 * Requests that come one by one are all the first thread's, so that they wake no other processor.
 * It takes them with the fewest system calls: one reads, one starts the I/O and asks for the next
 * request, one answers. Once requests overlap all threads take them, in batches. */
#include "server_fuse.h"
#include "thinpool/error.h"

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#define SQ_ENTRIES 512u
#define CQ_ENTRIES 4096u
#define BATCH      64u /* requests read before their I/O is started */
/* Slots that stay in memory when idle: the next burst need not fault them in. */
#define RESIDENT_AT_REST 4u
#define SMALL            (FUSE_HEAD + 16384u) /* copied rather than a slot made resident */
#define NR_POLLS         2u
#define NR_FIXED         16u      /* files that the ring knows by number */
#define ONE_BY_ONE       64u      /* so many in a row, and others are not expected any more */
#define LOOKS            64u      /* at the ring, before others get the processor for a moment */
#define LOOK_DISK_NS     300000ll /* the longest look for an I/O's end */
#define LOOK_NEXT_NS     100000ll /* and for the request that follows the answer */

/* user_data is a slot, or one of these. */
#define TAG_FUSE  1u
#define TAG_EVENT 2u

struct data_state {
	struct data_thread *thread;
	struct tp_fuse_server *server;
	struct io_uring ring;
	bool has_ring;
	bool fuse_armed, event_armed; /* a poll is out */
	bool readable;                /* worth trying to read */
	bool starved;                 /* no slot was free */
	bool shows_work;              /* the ring has a flag for completions that wait */
	bool alone;                   /* the first's only: requests come one by one */
	uint32_t in_a_row;            /* batches of one */
	int64_t look_until_ns;        /* what comes next is looked for; 0: it is slept for */
	struct tp_fuse_spin spin;
	bool answered;            /* since the last hurry */
	bool touched;             /* there may be memory to give back */
	uint32_t pending;         /* parts of I/O out in the ring */
	uint32_t out;             /* requests that they belong to */
	struct slot *landing;     /* what the next request is read into */
	uint32_t fixed[NR_FIXED]; /* fd_key by number */
	uint32_t nr_fixed;
};

void tp_fuse_data_wake(struct data_thread *thread)
{
	const uint64_t one = 1;
	ssize_t n;

	do {
		n = write(thread->event_fd, &one, sizeof(one));
	} while (n < 0 && errno == EINTR);
	/* EAGAIN: the counter is full, so the thread is being woken anyway. */
}

void tp_fuse_data_wake_all(struct tp_fuse_server *server)
{
	uint32_t i;

	for (i = 0; i < server->nr_fds; i++)
		tp_fuse_data_wake(&server->data[i]);
}

static bool is_crowded(const struct data_state *state)
{
	return atomic_load_explicit(&state->server->crowded, memory_order_relaxed);
}

/* ---- the ring ---- */

static void open_ring(struct data_state *state)
{
	struct io_uring_params params = {
		.flags = IORING_SETUP_CQSIZE | IORING_SETUP_SINGLE_ISSUER |
			 IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
		.cq_entries = CQ_ENTRIES,
	};

	if (state->server->options.no_io_uring)
		return;
	state->has_ring = io_uring_queue_init_params(SQ_ENTRIES, &state->ring, &params) == 0;
	state->shows_work = state->has_ring;
	if (!state->has_ring) {
		/* Kernels before 6.1 lack the two. */
		params = (struct io_uring_params){ .flags = IORING_SETUP_CQSIZE,
						   .cq_entries = CQ_ENTRIES };
		state->has_ring =
			io_uring_queue_init_params(SQ_ENTRIES, &state->ring, &params) == 0;
	}
	if (state->has_ring && io_uring_register_files_sparse(&state->ring, NR_FIXED)) {
		/* A full table of keys that nobody has: plain descriptors are used. */
		memset(state->fixed, 0xff, sizeof(state->fixed));
		state->nr_fixed = NR_FIXED;
	}
}

static struct io_uring_sqe *get_sqe(struct data_state *state)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&state->ring);

	while (!sqe) {
		io_uring_submit(&state->ring);
		sqe = io_uring_get_sqe(&state->ring);
	}
	return sqe;
}

/* The ring's number of a file's descriptor, or -1. */
static int fixed_file(struct data_state *state, const struct tp_fuse_file *file)
{
	uint32_t i;

	for (i = 0; i < state->nr_fixed; i++)
		if (state->fixed[i] == file->fd_key)
			return (int)i;
	if (i >= NR_FIXED || io_uring_register_files_update(&state->ring, i, &file->fd, 1) != 1)
		return -1;
	state->fixed[i] = file->fd_key;
	state->nr_fixed++;
	return (int)i;
}

static void start_extent(struct data_state *state, struct slot *slot, bool write,
			 unsigned char *data, const struct tp_map_extent *extent)
{
	struct io_uring_sqe *sqe = get_sqe(state);
	int fixed = fixed_file(state, slot->file);
	int fd = fixed >= 0 ? fixed : slot->file->fd;

	if (write)
		io_uring_prep_write(sqe, fd, data, extent->length, extent->data_offset);
	else
		io_uring_prep_read(sqe, fd, data, extent->length, extent->data_offset);
	if (fixed >= 0)
		sqe->flags |= IOSQE_FIXED_FILE;
	io_uring_sqe_set_data(sqe, slot);
	slot->expected += extent->length;
	slot->pending++;
	state->pending++;
}

/* ---- fast reads and writes ---- */

static void finish_io(struct data_state *state, struct slot *slot)
{
	struct tp_fuse_server *server = state->server;
	struct tp_fuse_file *file = slot->file;
	bool write = slot->header->opcode == FUSE_WRITE;

	file->ops->unmap(file->target, &slot->map);
	if (slot->failed) {
		count(&state->thread->counters.retried, 1);
		count(&state->thread->counters.slow, 1);
		tp_fuse_dispatch_slow(server, slot); /* keeps its hold on the file */
		return;
	}
	slot->file = NULL;
	tp_fuse_files_put(&server->files, file);
	state->answered = true;
	count(&state->thread->counters.fast, 1);
	if (write) {
		count(&state->thread->counters.written_bytes, slot->length);
		tp_fuse_reply_done(server, slot, 0, slot->length);
	} else {
		count(&state->thread->counters.read_bytes, slot->length);
		tp_fuse_reply(server, slot, 0, slot->data, slot->length);
	}
	/* One by one, the poll tells of the next. */
	state->readable |= !state->alone;
}

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ll + now.tv_nsec;
}

/* A request that came alone has its I/O started. */
static void begin_alone(struct data_state *state)
{
	int64_t now = now_ns();

	state->look_until_ns = tp_fuse_spin_next(&state->spin, now) ? now + LOOK_DISK_NS : 0;
}

static void not_alone(struct data_state *state)
{
	tp_fuse_spin_interrupt(&state->spin);
	state->look_until_ns = 0;
}

static void start_io(struct data_state *state, struct slot *slot)
{
	struct tp_fuse_server *server = state->server;
	bool write = slot->header->opcode == FUSE_WRITE;
	unsigned char *data = slot->data;
	struct tp_map_extent *extent;
	struct tp_fuse_file *file;
	int error;
	uint32_t i;

	error = tp_fuse_prepare_io(server, slot);
	if (error) {
		count(&state->thread->counters.errors, 1);
		if (write)
			tp_fuse_reply_done(server, slot, error, 0);
		else
			tp_fuse_reply(server, slot, error, NULL, 0);
		return;
	}
	file = slot->file;
	slot->map.copies = 0; /* not everything below asks */
	/* The completion ring has room for whatever is out. */
	if (!state->has_ring || file->fd < 0 || !slot->length ||
	    state->pending > CQ_ENTRIES - TP_MAP_MAX - NR_POLLS ||
	    file->ops->map(file->target, slot->offset, slot->length, write, &slot->map) !=
		    TP_MAP_OK) {
		count(&state->thread->counters.slow, 1);
		tp_fuse_dispatch_slow(server, slot);
		return;
	}
	TP_ASSERT(slot->map.nr_extents <= TP_MAP_MAX);
	for (i = 0; i < slot->map.nr_extents; i++) {
		extent = &slot->map.extents[i];
		TP_ASSERT(extent->length <= slot->data + slot->length - data);
		if (extent->data_offset == TP_MAP_HOLE)
			memset(data, 0, extent->length);
		else
			start_extent(state, slot, write, data, extent);
		data += extent->length;
	}
	TP_ASSERT(data == slot->data + slot->length);
	if (!slot->pending) {
		finish_io(state, slot);
		return;
	}
	state->out++;
	if (state->alone && state->shows_work && state->out == 1 && !is_crowded(state))
		begin_alone(state);
	else
		not_alone(state);
}

/* A short transfer shows in the sum only: parts of one request differ in length. */
static void complete(struct data_state *state, struct slot *slot, int result)
{
	state->pending--;
	if (result < 0)
		slot->failed = true;
	else
		slot->transferred += (uint32_t)result;
	if (--slot->pending)
		return;
	state->out--;
	/* Who had this answered often sends the next at once. */
	if (state->look_until_ns)
		state->look_until_ns = now_ns() + LOOK_NEXT_NS;
	if (slot->transferred != slot->expected)
		slot->failed = true;
	finish_io(state, slot);
}

/* ---- requests ---- */

static void handle(struct data_state *state, struct slot *slot, size_t length)
{
	struct tp_fuse_server *server = state->server;
	int error = tp_fuse_decode(slot->header, length, &slot->request);

	count(&state->thread->counters.requests, 1);
	if (length < sizeof(*slot->header)) {
		tp_fuse_drop(server, slot);
		return;
	}
	if (error == -EIO || error == -EINVAL) {
		count(&state->thread->counters.errors, 1);
		tp_fuse_reply(server, slot, error, NULL, 0);
		return;
	}
	switch (slot->header->opcode) {
	case FUSE_READ:
	case FUSE_WRITE:
		start_io(state, slot);
		break;
	default:
		if (tp_fuse_is_quick(slot->header->opcode)) {
			tp_fuse_operate(server, slot);
			break;
		}
		count(&state->thread->counters.slow, 1);
		tp_fuse_dispatch_slow(server, slot);
		break;
	}
}

static void disconnect(struct tp_fuse_server *server)
{
	pthread_mutex_lock(&server->control);
	atomic_store(&server->disconnected, 1);
	pthread_cond_broadcast(&server->control_changed);
	pthread_mutex_unlock(&server->control);
	tp_fuse_data_wake_all(server);
}

/* The slot that has the request that was read, which is not the landing one any more. */
static struct slot *moved(struct data_state *state, size_t length)
{
	struct slot *landing = state->landing, *slot = NULL;

	if (length >= sizeof(*landing->header) && length <= SMALL)
		slot = tp_fuse_slots_move(&state->server->slots, landing, length);
	if (slot)
		return slot;
	state->landing = NULL;
	return landing;
}

/* Until nothing is there, or BATCH were read, or no slot is free. Returns how many. */
static uint32_t read_requests(struct data_state *state)
{
	struct tp_fuse_server *server = state->server;
	struct slot *slot;
	uint32_t n = 0;
	ssize_t length;

	while (state->readable && n < BATCH) {
		if (!state->landing)
			state->landing = tp_fuse_slots_take(&server->slots, state->thread->index);
		slot = state->landing;
		state->starved = !slot;
		if (!slot)
			break;
		length = read(state->thread->fuse_fd, slot->header, FUSE_READ_SIZE);
		if (length > 0) {
			slot = moved(state, (size_t)length);
			handle(state, slot, (size_t)length);
			n++;
			/* The poll that goes with its I/O tells whether there are more. */
			if (state->alone)
				state->readable = false;
		} else if (length < 0 && errno == EAGAIN) {
			state->readable = false;
		} else if (length == 0 || (errno != EINTR && errno != ENOENT && errno != EIO)) {
			/* ENODEV: unmounted or aborted. Nothing else is to be expected. */
			state->readable = false;
			disconnect(server);
			break;
		}
	}
	if (n)
		state->touched = true;
	return n;
}

/* ---- waiting ---- */

static void reap(struct data_state *state)
{
	struct io_uring_cqe *cqe;
	unsigned head, seen = 0;
	uint64_t tags[BATCH];
	int results[BATCH];
	unsigned i;

	/* Copied out first: what is answered may bring the next request, and its I/O fills the
	 * ring. */
	io_uring_for_each_cqe(&state->ring, head, cqe)
	{
		tags[seen] = cqe->user_data;
		results[seen] = cqe->res;
		if (++seen == BATCH)
			break;
	}
	io_uring_cq_advance(&state->ring, seen);
	for (i = 0; i < seen; i++) {
		switch (tags[i]) {
		case TAG_FUSE:
			state->fuse_armed = false;
			state->readable = true;
			break;
		case TAG_EVENT:
			state->event_armed = false;
			break;
		default:
			complete(state, (struct slot *)(uintptr_t)tags[i], results[i]);
			break;
		}
	}
	/* All answers of a batch at once. */
	if (state->answered)
		tp_fuse_hurry(state->server);
	state->answered = false;
}

static void arm(struct data_state *state, int fd, unsigned events, uint64_t tag, bool *armed)
{
	struct io_uring_sqe *sqe;

	if (*armed)
		return;
	sqe = get_sqe(state);
	io_uring_prep_poll_add(sqe, fd, events);
	io_uring_sqe_set_data64(sqe, tag);
	*armed = true;
}

static void drain_event(struct data_state *state)
{
	uint64_t value;

	if (read(state->thread->event_fd, &value, sizeof(value)) <= 0)
		return;
	state->readable = true;
	state->alone &= !is_crowded(state);
}

static void give_back_memory(struct data_state *state)
{
	struct slots *slots = &state->server->slots;
	bool idle;

	state->touched = false;
	pthread_mutex_lock(&slots->lock);
	idle = slots->nr - slots->nr_free <= state->server->nr_fds;
	pthread_mutex_unlock(&slots->lock);
	/* Where another thread works it does this when it rests. */
	if (idle)
		tp_fuse_slots_trim(slots, RESIDENT_AT_REST);
}

static bool stopping(const struct data_state *state)
{
	return atomic_load_explicit(&state->server->stopping, memory_order_relaxed) ||
	       atomic_load_explicit(&state->server->disconnected, memory_order_relaxed);
}

/* One waiter is woken for one request: EPOLLEXCLUSIVE. */
static void arm_all(struct data_state *state)
{
	bool wanted = state->thread->index == 0 || is_crowded(state);

	if (wanted && !state->starved && !stopping(state))
		arm(state, state->thread->fuse_fd, EPOLLIN | EPOLLEXCLUSIVE, TAG_FUSE,
		    &state->fuse_armed);
	arm(state, state->thread->event_fd, EPOLLIN, TAG_EVENT, &state->event_armed);
}

/* Another request came before the last was answered. */
static void expect_many(struct data_state *state)
{
	uint32_t i;

	state->alone = false;
	state->in_a_row = 0;
	not_alone(state);
	if (atomic_exchange(&state->server->crowded, 1))
		return;
	for (i = 0; i < state->server->nr_fds; i++)
		if (i != state->thread->index)
			tp_fuse_data_wake(&state->server->data[i]);
}

/* After a batch that was read to its end. */
static void expect_few(struct data_state *state, uint32_t n)
{
	state->in_a_row = n <= 1 && state->out <= 1 ? state->in_a_row + 1 : 0;
	/* The others take once more what comes when the poll tells them that they have out already,
	 * and then no more. Until nothing is left, for one poll may have taken the wake-ups of
	 * several requests, and nobody else is told of them. */
	if (state->in_a_row < ONE_BY_ONE || state->thread->index != 0)
		return;
	state->alone = true;
	atomic_store(&state->server->crowded, 0);
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

static bool work_waits(const struct data_state *state)
{
	const struct io_uring *ring = &state->ring;

	return (__atomic_load_n(ring->sq.kflags, __ATOMIC_RELAXED) & IORING_SQ_TASKRUN) ||
	       io_uring_cq_ready(ring);
}

/* A moment of looking: for what has ended now, for requests when this returns. Whoever else wants
 * the processor gets it, first of all the one who was answered. */
static void look(struct data_state *state)
{
	uint32_t i;

	for (i = 0; state->pending && i < LOOKS && !work_waits(state); i++)
		relax();
	if (work_waits(state)) {
		io_uring_submit_and_get_events(&state->ring);
		reap(state);
		if (!state->event_armed)
			drain_event(state);
	}
	if (!work_waits(state))
		sched_yield();
	state->readable = true;
}

/* Wait in the ring: for a request, a completion, or a wake-up. */
static void await(struct data_state *state)
{
	const uint32_t ms = state->server->options.trim_ms;
	struct __kernel_timespec timeout = { ms / 1000, (ms % 1000) * 1000000L };
	bool trim = state->touched && !state->pending;
	struct io_uring_cqe *cqe;
	int status;

	arm_all(state);
	status = io_uring_submit_and_wait_timeout(&state->ring, &cqe, 1, trim ? &timeout : NULL,
						  NULL);
	if (status == -ETIME)
		give_back_memory(state);
	reap(state);
	if (!state->event_armed)
		drain_event(state);
}

/* Without io_uring (forbidden on this host): everything is handed to the blocking threads. */
static void await_by_poll(struct data_state *state)
{
	struct pollfd fds[2] = {
		{ .fd = state->thread->event_fd, .events = POLLIN },
		{ .fd = state->starved ? -1 : state->thread->fuse_fd, .events = POLLIN },
	};
	int n = poll(fds, 2, state->touched ? (int)state->server->options.trim_ms : -1);

	if (n == 0)
		give_back_memory(state);
	drain_event(state);
	state->readable = true;
}

void *tp_fuse_data_thread(void *argument)
{
	struct data_thread *thread = argument;
	struct data_state state = {
		.thread = thread,
		.server = thread->server,
		.readable = true,
	};

	open_ring(&state);
	state.alone = state.has_ring && thread->index == 0;
	while (!stopping(&state) || state.pending) {
		uint32_t n = stopping(&state) ? 0 : read_requests(&state);

		if (!state.has_ring) {
			if (!n && !stopping(&state))
				await_by_poll(&state);
		} else if (n) {
			/* Starts what was read and looks for what has ended, in one call. */
			if (!state.alone)
				expect_few(&state, n);
			else if (!state.look_until_ns)
				arm_all(&state);
			io_uring_submit_and_get_events(&state.ring);
			reap(&state);
			if (state.alone && (state.readable || state.out > 1))
				expect_many(&state);
		} else if (state.look_until_ns && now_ns() < state.look_until_ns) {
			look(&state);
		} else {
			state.look_until_ns = 0;
			await(&state);
		}
	}
	if (state.landing)
		tp_fuse_drop(state.server, state.landing);
	if (state.has_ring)
		io_uring_queue_exit(&state.ring);
	return NULL;
}
