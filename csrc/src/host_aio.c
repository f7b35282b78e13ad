/* SPDX-License-Identifier: Apache-2.0 */
/* The system calls of io_submit(2), spoken directly: one request at a time needs no library. */
#include "host_aio.h"
#include "thinpool/error.h"

#include <errno.h>
#include <linux/aio_abi.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NR_CONTEXTS 32u

static struct {
	_Atomic uint32_t taken;
	aio_context_t context; /* 0: none yet; its taker's */
} contexts[NR_CONTEXTS];
static _Atomic uint32_t unavailable; /* this host forbids it, or has none left */

/* One that nobody uses, made if need be; NR_CONTEXTS when there is none. */
static uint32_t take(void)
{
	uint32_t i;

	for (i = 0; i < NR_CONTEXTS; i++)
		if (!atomic_exchange_explicit(&contexts[i].taken, 1, memory_order_acquire))
			break;
	if (i < NR_CONTEXTS && !contexts[i].context &&
	    syscall(SYS_io_setup, 1, &contexts[i].context)) {
		contexts[i].context = 0;
		atomic_store(&unavailable, 1);
		atomic_store_explicit(&contexts[i].taken, 0, memory_order_release);
		return NR_CONTEXTS;
	}
	return i;
}

/* The buffer is the kernel's until the request has ended: there is no way out but the end. */
static int64_t await(aio_context_t context)
{
	struct io_event event;
	long n;

	do {
		n = syscall(SYS_io_getevents, context, 1L, 1L, &event, NULL);
	} while (n == 0 || (n < 0 && errno == EINTR));
	TP_ASSERT(n == 1);
	return event.res;
}

/* The context that a request was given to, NR_CONTEXTS when it was not taken. */
static uint32_t submit(struct iocb *request)
{
	struct iocb *requests[1] = { request };
	uint32_t i;

	if (atomic_load_explicit(&unavailable, memory_order_relaxed))
		return NR_CONTEXTS;
	i = take();
	if (i < NR_CONTEXTS && syscall(SYS_io_submit, contexts[i].context, 1L, requests) != 1) {
		atomic_store_explicit(&contexts[i].taken, 0, memory_order_release);
		return NR_CONTEXTS;
	}
	return i;
}

static int64_t end(uint32_t i)
{
	int64_t result = await(contexts[i].context);

	atomic_store_explicit(&contexts[i].taken, 0, memory_order_release);
	return result;
}

int tp_host_aio_fdatasync(int fd)
{
	/* The kernel has a thread of its own do it. Before Linux 4.18 no file had it. */
	struct iocb request = {
		.aio_lio_opcode = IOCB_CMD_FDSYNC,
		.aio_fildes = (uint32_t)fd,
	};
	uint32_t i = submit(&request);

	return i < NR_CONTEXTS ? (int)i : -1;
}

int tp_host_aio_end(int begun)
{
	return (int)end((uint32_t)begun);
}

ssize_t tp_host_aio_pwrite(int fd, const void *buffer, size_t length, uint64_t offset)
{
	struct iocb request = {
		.aio_lio_opcode = IOCB_CMD_PWRITE,
		.aio_fildes = (uint32_t)fd,
		.aio_buf = (uintptr_t)buffer,
		.aio_nbytes = length,
		.aio_offset = (int64_t)offset,
	};
	uint32_t i = submit(&request);
	int64_t result;

	/* It was not taken: pwrite says why, or can. */
	if (i == NR_CONTEXTS)
		return pwrite(fd, buffer, length, (off_t)offset);
	result = end(i);
	if (result < 0) {
		errno = (int)-result;
		return -1;
	}
	return (ssize_t)result;
}
