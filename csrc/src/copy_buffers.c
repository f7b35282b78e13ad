/* SPDX-License-Identifier: Apache-2.0 */
#include "copy_buffers.h"

#include <stdint.h>
#include <sys/mman.h>

#define REGION ((size_t)2 << 20) /* a huge page of x86; elsewhere, merely memory */

static void *map(size_t bytes)
{
	void *memory =
		mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return memory == MAP_FAILED ? NULL : memory;
}

/* Aligned to its size, since else it would be no huge page. */
static uint8_t *map_region(void)
{
	uint8_t *memory = map(2 * REGION);
	size_t lead;

	if (!memory)
		return NULL;
	lead = -(uintptr_t)memory % REGION;
	if (lead)
		munmap(memory, lead);
	munmap(memory + lead + REGION, REGION - lead);
	(void)madvise(memory + lead, REGION, MADV_HUGEPAGE); /* else in small ones: slower */
	return memory + lead;
}

void tp_copy_buffers_init(struct tp_copy_buffers *buffers)
{
	pthread_mutex_init(&buffers->lock, NULL);
	buffers->region = NULL;
	buffers->free = 0;
}

void tp_copy_buffers_set_size(struct tp_copy_buffers *buffers, size_t size)
{
	size_t count = REGION / size;

	buffers->size = size;
	buffers->free = count < 32 ? (UINT32_C(1) << count) - 1 : UINT32_MAX;
}

void tp_copy_buffers_deinit(struct tp_copy_buffers *buffers)
{
	if (buffers->region)
		munmap(buffers->region, REGION);
	buffers->region = NULL;
	pthread_mutex_destroy(&buffers->lock);
}

void *tp_copy_buffers_get(struct tp_copy_buffers *buffers)
{
	void *buffer = NULL;

	pthread_mutex_lock(&buffers->lock);
	if (!buffers->region)
		buffers->region = map_region();
	/* The lowest: where there are no huge pages, fewer are touched. */
	if (buffers->region && buffers->free) {
		buffer = buffers->region + (size_t)__builtin_ctz(buffers->free) * buffers->size;
		buffers->free &= buffers->free - 1;
	}
	pthread_mutex_unlock(&buffers->lock);
	return buffer ? buffer : map(buffers->size);
}

void tp_copy_buffers_put(struct tp_copy_buffers *buffers, void *buffer)
{
	uintptr_t at;

	pthread_mutex_lock(&buffers->lock);
	at = (uintptr_t)buffer - (uintptr_t)buffers->region;
	if (at < REGION) {
		buffers->free |= UINT32_C(1) << at / buffers->size;
		buffer = NULL;
	}
	pthread_mutex_unlock(&buffers->lock);
	if (buffer)
		munmap(buffer, buffers->size);
}
