/* SPDX-License-Identifier: Apache-2.0 */
#include "copy_buffers.h"

#include <sys/mman.h>

#define KEPT_BYTES (UINT32_C(512) << 10)

void tp_copy_buffers_init(struct tp_copy_buffers *buffers)
{
	pthread_mutex_init(&buffers->lock, NULL);
	buffers->nr_kept = 0;
}

void tp_copy_buffers_set_size(struct tp_copy_buffers *buffers, size_t size)
{
	buffers->size = size;
	buffers->max_kept = (uint32_t)(KEPT_BYTES / size);
	if (buffers->max_kept > COPY_BUFFERS_KEPT)
		buffers->max_kept = COPY_BUFFERS_KEPT;
}

void tp_copy_buffers_deinit(struct tp_copy_buffers *buffers)
{
	while (buffers->nr_kept)
		munmap(buffers->kept[--buffers->nr_kept], buffers->size);
	pthread_mutex_destroy(&buffers->lock);
}

void *tp_copy_buffers_get(struct tp_copy_buffers *buffers)
{
	void *buffer = NULL;

	pthread_mutex_lock(&buffers->lock);
	if (buffers->nr_kept)
		buffer = buffers->kept[--buffers->nr_kept];
	pthread_mutex_unlock(&buffers->lock);
	if (buffer)
		return buffer;
	buffer = mmap(NULL, buffers->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		      0);
	return buffer == MAP_FAILED ? NULL : buffer;
}

void tp_copy_buffers_put(struct tp_copy_buffers *buffers, void *buffer)
{
	pthread_mutex_lock(&buffers->lock);
	if (buffers->nr_kept < buffers->max_kept) {
		buffers->kept[buffers->nr_kept++] = buffer;
		buffer = NULL;
	}
	pthread_mutex_unlock(&buffers->lock);
	if (buffer)
		munmap(buffer, buffers->size);
}
