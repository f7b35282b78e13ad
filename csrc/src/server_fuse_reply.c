/* SPDX-License-Identifier: Apache-2.0 */
/* Answers. A slot is freed behind its answer, never before. */
#include "server_fuse.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

/* 0, or the errno of the write. */
static int send_reply(int fd, uint64_t unique, int error, const void *payload, size_t length)
{
	struct fuse_out_header header = {
		.len = (uint32_t)(sizeof(header) + length),
		.error = error,
		.unique = unique,
	};
	struct iovec parts[2] = {
		{ .iov_base = &header, .iov_len = sizeof(header) },
		{ .iov_base = (void *)payload, .iov_len = length },
	};
	ssize_t n;

	do {
		n = writev(fd, parts, length ? 2 : 1);
	} while (n < 0 && (errno == EINTR || errno == EAGAIN));
	return n < 0 ? errno : 0;
}

static void free_slot(struct tp_fuse_server *server, struct slot *slot)
{
	if (tp_fuse_slots_put(&server->slots, slot))
		tp_fuse_data_wake_all(server);
}

void tp_fuse_drop(struct tp_fuse_server *server, struct slot *slot)
{
	free_slot(server, slot);
}

void tp_fuse_reply(struct tp_fuse_server *server, struct slot *slot, int error, const void *payload,
		   size_t length)
{
	int fd = server->fuse_fds[slot->shared->fd_index];
	uint64_t unique = slot->header->unique;
	int failure;

	if (error)
		length = 0;
	failure = send_reply(fd, unique, error, payload, length);
	/* ENOENT: interrupted, aborted, or answered by a predecessor. Anything else means that the
	 * kernel did not like the answer; a waiter must have some answer. */
	if (failure && failure != ENOENT && failure != ENODEV)
		failure = send_reply(fd, unique, -EIO, NULL, 0);
	if (failure)
		count(&server->counters.lost_replies, 1);
	free_slot(server, slot);
}

/*
 * A loop device's request that ends in a process, not in an interrupt, is ended for good by a soft
 * interrupt, for which the kernel wakes ksoftirqd: one more thread between us and the one who
 * waits. But whoever gives back a lock that keeps soft interrupts off does what waits on his
 * processor, and setting a socket's option takes such a lock. The option and the socket, which
 * nobody uses, do not matter; nor does whether it succeeds: ksoftirqd was told, and comes later.
 */
void tp_fuse_hurry(struct tp_fuse_server *server)
{
	const int off = 0;

	if (server->hurry_fd >= 0)
		setsockopt(server->hurry_fd, SOL_SOCKET, SO_BROADCAST, &off, sizeof(off));
}

void tp_fuse_reply_again(struct tp_fuse_server *server, struct slot *slot)
{
	struct fuse_write_out out = { .size = slot->shared->written };

	if (slot->header->opcode == FUSE_WRITE)
		tp_fuse_reply(server, slot, slot->shared->error, &out, sizeof(out));
	else
		tp_fuse_reply(server, slot, slot->shared->error, NULL, 0);
}

void tp_fuse_reply_done(struct tp_fuse_server *server, struct slot *slot, int error,
			uint32_t written)
{
	slot->shared->error = error;
	slot->shared->written = written;
	atomic_store_explicit(&slot->shared->state, SLOT_DONE, memory_order_release);
	/* Not after the answer: see the second invariant. */
	atomic_signal_fence(memory_order_seq_cst);
	tp_fuse_reply_again(server, slot);
}
