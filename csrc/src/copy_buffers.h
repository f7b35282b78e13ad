/* SPDX-License-Identifier: Apache-2.0 */
/**
 * Buffers that blocks are copied through: all of one size, aligned to pages.
 *
 * They lie in one huge page where the system gives one, made at the first use and kept: a disk
 * that is given 64 KiB in small pages gets 16 segments, and is slower by a third on some. More
 * than fit into it are mapped singly and not kept.
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

struct tp_copy_buffers {
	pthread_mutex_t lock;
	size_t size;
	uint8_t *region; /* NULL until the first use, then never moved */
	uint32_t free;   /* bit a buffer of the region */
};

void tp_copy_buffers_init(struct tp_copy_buffers *buffers);
/* Once, before the first get: bytes of each, whole pages, 64 KiB to 1 MiB. */
void tp_copy_buffers_set_size(struct tp_copy_buffers *buffers, size_t size);
void tp_copy_buffers_deinit(struct tp_copy_buffers *buffers);
/* NULL without memory. */
void *tp_copy_buffers_get(struct tp_copy_buffers *buffers);
void tp_copy_buffers_put(struct tp_copy_buffers *buffers, void *buffer);

#endif
