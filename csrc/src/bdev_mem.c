/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A device in memory, for tests and benchmarks. Contents are zero at first.
 *
 * Sparse: pages are private anonymous memory that the kernel gives on first write. A bit a page
 * says whether it was written since it was last punched; reads of others return zeros without
 * touching (and so populating) the memory.
 *
 * Invariant: a page whose bit is clear holds only zeros.
 *
 * Thread-safety: reads and writes share a lock; punch and resize, which would break the invariant
 * under a running write, take it exclusively. Flush has nothing to do.
 */
#include "thinpool/bdev.h"
#include "thinpool/error.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE      4096UL
#define WORD_BITS 64

struct mem_bdev {
	struct tp_bdev bdev;
	pthread_rwlock_t lock;
	_Atomic uint64_t size;
	unsigned char *memory;     /* NULL when size is 0 */
	_Atomic uint64_t *written; /* bit a page */
};

static struct mem_bdev *as_mem(struct tp_bdev *bdev)
{
	return (struct mem_bdev *)bdev;
}

static size_t memory_bytes(uint64_t size)
{
	return (size + PAGE - 1) & ~(PAGE - 1);
}

static size_t bitmap_bytes(uint64_t size)
{
	uint64_t words = (memory_bytes(size) / PAGE + WORD_BITS - 1) / WORD_BITS;

	return memory_bytes(words * sizeof(uint64_t));
}

static int is_written(const struct mem_bdev *mem, uint64_t page)
{
	uint64_t word = atomic_load_explicit(&mem->written[page / WORD_BITS], memory_order_relaxed);

	return word >> (page % WORD_BITS) & 1;
}

/* Relaxed is enough: whoever is to see the data is ordered after the write by other means. */
static void set_written(struct mem_bdev *mem, uint64_t page)
{
	if (!is_written(mem, page))
		atomic_fetch_or_explicit(&mem->written[page / WORD_BITS],
					 UINT64_C(1) << (page % WORD_BITS), memory_order_relaxed);
}

static void clear_written(struct mem_bdev *mem, uint64_t page)
{
	atomic_fetch_and_explicit(&mem->written[page / WORD_BITS],
				  ~(UINT64_C(1) << (page % WORD_BITS)), memory_order_relaxed);
}

/* Bytes from offset to the end of its page, or to the end of the range. */
static size_t within_page(uint64_t offset, uint64_t length)
{
	uint64_t rest = PAGE - offset % PAGE;

	return length < rest ? length : rest;
}

static int mem_read(struct tp_bdev *bdev, uint64_t offset, void *buffer, size_t length,
		    struct tp_error *err)
{
	struct mem_bdev *mem = as_mem(bdev);
	unsigned char *to = buffer;

	(void)err;
	pthread_rwlock_rdlock(&mem->lock);
	while (length) {
		size_t part = within_page(offset, length);

		if (is_written(mem, offset / PAGE))
			memcpy(to, mem->memory + offset, part);
		else
			memset(to, 0, part);
		to += part;
		offset += part;
		length -= part;
	}
	pthread_rwlock_unlock(&mem->lock);
	return 0;
}

static int mem_write(struct tp_bdev *bdev, uint64_t offset, const void *buffer, size_t length,
		     struct tp_error *err)
{
	struct mem_bdev *mem = as_mem(bdev);

	(void)err;
	pthread_rwlock_rdlock(&mem->lock);
	for (uint64_t page = offset / PAGE; page <= (offset + length - 1) / PAGE; page++)
		set_written(mem, page);
	memcpy(mem->memory + offset, buffer, length);
	pthread_rwlock_unlock(&mem->lock);
	return 0;
}

static int mem_flush(struct tp_bdev *bdev, struct tp_error *err)
{
	(void)bdev;
	(void)err;
	return 0;
}

/* First page at or after `page`, before `end`, whose bit is `wanted`; end when there is none. */
static uint64_t find_page(const struct mem_bdev *mem, uint64_t page, uint64_t end, int wanted)
{
	while (page < end) {
		uint64_t word =
			atomic_load_explicit(&mem->written[page / WORD_BITS], memory_order_relaxed);

		if (!wanted)
			word = ~word;
		word >>= page % WORD_BITS;
		if (word) {
			page += (uint64_t)__builtin_ctzll(word);
			return page < end ? page : end;
		}
		page += WORD_BITS - page % WORD_BITS;
	}
	return end;
}

/* Part of a page, or parts of two. */
static void zero_locked(struct mem_bdev *mem, uint64_t offset, uint64_t length)
{
	while (length) {
		size_t part = within_page(offset, length);

		if (is_written(mem, offset / PAGE))
			memset(mem->memory + offset, 0, part);
		offset += part;
		length -= part;
	}
}

/* Pages first to last - 1; first < last. */
static void drop_pages_locked(struct mem_bdev *mem, uint64_t first, uint64_t last)
{
	int kept = madvise(mem->memory + first * PAGE, (last - first) * PAGE, MADV_DONTNEED);
	uint64_t page = find_page(mem, first, last, 1);

	while (page < last) {
		/* Locked memory, say, is not given back: it still has to read as zeros. */
		if (kept)
			memset(mem->memory + page * PAGE, 0, PAGE);
		clear_written(mem, page);
		page = find_page(mem, page + 1, last, 1);
	}
}

static void punch_locked(struct mem_bdev *mem, uint64_t offset, uint64_t length)
{
	uint64_t end = offset + length;
	uint64_t first = (offset + PAGE - 1) / PAGE;
	uint64_t last = end / PAGE;

	if (first >= last) {
		zero_locked(mem, offset, length);
		return;
	}
	zero_locked(mem, offset, first * PAGE - offset);
	drop_pages_locked(mem, first, last);
	zero_locked(mem, last * PAGE, end - last * PAGE);
}

static int mem_punch(struct tp_bdev *bdev, uint64_t offset, uint64_t length, struct tp_error *err)
{
	struct mem_bdev *mem = as_mem(bdev);

	(void)err;
	pthread_rwlock_wrlock(&mem->lock);
	punch_locked(mem, offset, length);
	pthread_rwlock_unlock(&mem->lock);
	return 0;
}

static void *map(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return memory == MAP_FAILED ? NULL : memory;
}

static int remap_locked(struct mem_bdev *mem, uint64_t old, uint64_t size)
{
	void *memory;
	void *written;

	memory = mremap(mem->memory, memory_bytes(old), memory_bytes(size), MREMAP_MAYMOVE);
	if (memory == MAP_FAILED)
		return TP_E_NO_MEMORY;
	mem->memory = memory;
	written = mremap(mem->written, bitmap_bytes(old), bitmap_bytes(size), MREMAP_MAYMOVE);
	if (written == MAP_FAILED) {
		/* Growing failed: shrinking back to what it was does not fail. */
		memory = mremap(mem->memory, memory_bytes(size), memory_bytes(old), MREMAP_MAYMOVE);
		TP_ASSERT(memory != MAP_FAILED);
		mem->memory = memory;
		return TP_E_NO_MEMORY;
	}
	mem->written = written;
	return 0;
}

static int mem_resize(struct tp_bdev *bdev, uint64_t size, struct tp_error *err)
{
	struct mem_bdev *mem = as_mem(bdev);
	uint64_t old;
	int status = 0;

	/* The present size, which for memory is the one it has. */
	if (!size)
		return 0;
	pthread_rwlock_wrlock(&mem->lock);
	old = atomic_load(&mem->size);
	/* What is cut off reads as zeros when it comes back: the tail of the last page, and
	 * bits. */
	if (size < old)
		punch_locked(mem, size, old - size);
	status = remap_locked(mem, old, size);
	if (!status)
		atomic_store(&mem->size, size);
	pthread_rwlock_unlock(&mem->lock);
	if (status)
		return tp_fail(err, status, "no memory for a device of %" PRIu64 " bytes", size);
	return 0;
}

static uint64_t mem_size(const struct tp_bdev *bdev)
{
	return atomic_load_explicit(&((const struct mem_bdev *)bdev)->size, memory_order_relaxed);
}

static int mem_next_data(struct tp_bdev *bdev, uint64_t offset, uint64_t *begin_ret,
			 uint64_t *end_ret, struct tp_error *err)
{
	struct mem_bdev *mem = as_mem(bdev);
	uint64_t size;
	uint64_t pages;
	uint64_t first;
	uint64_t last;

	(void)err;
	pthread_rwlock_rdlock(&mem->lock);
	size = atomic_load(&mem->size);
	pages = memory_bytes(size) / PAGE;
	first = find_page(mem, offset / PAGE, pages, 1);
	last = find_page(mem, first, pages, 0);
	pthread_rwlock_unlock(&mem->lock);
	*begin_ret = first * PAGE < offset ? offset : first * PAGE;
	*end_ret = last * PAGE;
	if (*begin_ret > size)
		*begin_ret = size;
	if (*end_ret > size)
		*end_ret = size;
	return 0;
}

static void mem_close(struct tp_bdev *bdev)
{
	struct mem_bdev *mem = as_mem(bdev);
	uint64_t size = atomic_load(&mem->size);

	if (mem->memory)
		munmap(mem->memory, memory_bytes(size));
	if (mem->written)
		munmap(mem->written, bitmap_bytes(size));
	pthread_rwlock_destroy(&mem->lock);
	free(mem);
}

static const struct tp_bdev_ops mem_ops = {
	.name = "memory",
	.read = mem_read,
	.write = mem_write,
	.flush = mem_flush,
	.punch = mem_punch,
	.resize = mem_resize,
	.size = mem_size,
	.next_data = mem_next_data,
	.close = mem_close,
};

int tp_bdev_mem_open(uint64_t size, struct tp_bdev **bdev_ret, struct tp_error *err)
{
	struct mem_bdev *mem;

	if (!size || size > INT64_MAX - PAGE)
		return tp_fail(err, TP_E_INVALID, "a memory device cannot have %" PRIu64 " bytes",
			       size);
	mem = calloc(1, sizeof(*mem));
	if (!mem)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a device");
	mem->bdev.ops = &mem_ops;
	mem->bdev.io_align = 1;
	mem->bdev.mem_align = 1;
	mem->bdev.fd = -1;
	mem->bdev.can_punch = 1;
	atomic_init(&mem->size, size);
	pthread_rwlock_init(&mem->lock, NULL);
	mem->memory = map(memory_bytes(size));
	mem->written = map(bitmap_bytes(size));
	if (!mem->memory || !mem->written) {
		mem_close(&mem->bdev);
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a device of %" PRIu64 " bytes",
			       size);
	}
	*bdev_ret = &mem->bdev;
	return 0;
}
