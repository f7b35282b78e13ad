/* SPDX-License-Identifier: Apache-2.0 */
/**
 * Buffers that blocks are copied through: all of one size, aligned to pages, a few kept.
 *
 * They are the kernel's pages and not malloc's: among metadata blocks, which live long, they would
 * leave the heap full of gaps.
 *
 * Thread-safety: get and put by any thread.
 */
#ifndef THINPOOL_COPY_BUFFERS_H
#define THINPOOL_COPY_BUFFERS_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define COPY_BUFFERS_KEPT 8u

struct tp_copy_buffers {
	pthread_mutex_t lock;
	size_t size;
	uint32_t nr_kept, max_kept;
	void *kept[COPY_BUFFERS_KEPT];
};

void tp_copy_buffers_init(struct tp_copy_buffers *buffers);
/* Once, before the first get: bytes of each, a power of two of at least a page. */
void tp_copy_buffers_set_size(struct tp_copy_buffers *buffers, size_t size);
void tp_copy_buffers_deinit(struct tp_copy_buffers *buffers);
/* NULL without memory. */
void *tp_copy_buffers_get(struct tp_copy_buffers *buffers);
void tp_copy_buffers_put(struct tp_copy_buffers *buffers, void *buffer);

#endif
