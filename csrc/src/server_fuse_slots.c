/* SPDX-License-Identifier: Apache-2.0 */
/* Request slots in shared memory: see server_fuse.h for what must hold of them. */
#include "server_fuse.h"
#include "thinpool/error.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define SLOTS_MAGIC  0x746f6c7370746675ull
#define SLOTS_LAYOUT 1u
#define TRIM_BATCH   8u

/* The first page. Read by successors of another build: grow it only together with SLOTS_LAYOUT. */
struct slots_head {
	uint64_t magic;
	uint32_t layout;
	uint32_t nr;
	_Atomic uint32_t minor;
};

static struct slots_head *head_of(const struct slots *slots)
{
	return (struct slots_head *)slots->memory;
}

size_t tp_fuse_slots_size(uint32_t nr_slots)
{
	return FUSE_PAGE + (size_t)nr_slots * FUSE_SLOT_STRIDE;
}

static int check_layout(struct slots *slots, struct tp_error *err)
{
	struct slots_head *head = head_of(slots);

	if (!head->magic) {
		head->layout = SLOTS_LAYOUT;
		head->nr = slots->nr;
		atomic_signal_fence(memory_order_seq_cst);
		head->magic = SLOTS_MAGIC;
		return 0;
	}
	if (head->magic != SLOTS_MAGIC || head->layout != SLOTS_LAYOUT || head->nr != slots->nr)
		return tp_fail(err, TP_E_INVALID,
			       "request slots: layout %u with %u slots found, %u with %u wanted",
			       head->layout, head->nr, SLOTS_LAYOUT, slots->nr);
	return 0;
}

static void place(struct slots *slots, uint32_t index)
{
	unsigned char *base = slots->memory + FUSE_PAGE + (size_t)index * FUSE_SLOT_STRIDE;
	struct slot *slot = &slots->slots[index];

	slot->shared = (struct slot_shared *)base;
	slot->data = base + FUSE_PAGE;
	slot->header = (struct fuse_in_header *)(slot->data - FUSE_HEAD);
}

static void push(struct slot **list, struct slot *slot)
{
	slot->next = *list;
	*list = slot;
}

static struct slot *pop(struct slot **list)
{
	struct slot *slot = *list;

	if (slot)
		*list = slot->next;
	return slot;
}

int tp_fuse_slots_init(struct slots *slots, int fd, size_t size, struct tp_error *err)
{
	uint32_t i;
	int status;

	memset(slots, 0, sizeof(*slots));
	slots->fd = -1;
	if (size < tp_fuse_slots_size(1) || size > tp_fuse_slots_size(FUSE_MAX_SLOTS))
		return tp_fail(err, TP_E_INVALID, "request slots: %zu bytes of memory", size);
	slots->nr = (uint32_t)((size - FUSE_PAGE) / FUSE_SLOT_STRIDE);
	slots->size = size;
	slots->slots = calloc(slots->nr, sizeof(*slots->slots));
	if (!slots->slots)
		return tp_fail(err, TP_E_NO_MEMORY, "request slots: out of memory");
	pthread_mutex_init(&slots->lock, NULL);
	slots->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	slots->memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (slots->memory == MAP_FAILED || slots->fd < 0) {
		status = tp_fail_errno(err, TP_E_OPEN, errno, "request slots: descriptor %d", fd);
		tp_fuse_slots_deinit(slots);
		return status;
	}
	status = check_layout(slots, err);
	if (status) {
		tp_fuse_slots_deinit(slots);
		return status;
	}
	for (i = 0; i < slots->nr; i++)
		place(slots, i);
	/* Only slots without an open request are free; the others wait for tp_fuse_server_run. */
	for (i = slots->nr; i-- > 0;) {
		struct slot *slot = &slots->slots[i];

		/* A predecessor may have left memory in it. */
		slot->touched = true;
		if (atomic_load(&slot->shared->state) != SLOT_FREE && slot->header->unique)
			continue;
		atomic_store(&slot->shared->state, SLOT_FREE);
		push(&slots->plain, slot);
		slots->nr_free++;
	}
	return 0;
}

void tp_fuse_slots_deinit(struct slots *slots)
{
	if (!slots->slots)
		return;
	if (slots->memory && slots->memory != MAP_FAILED)
		munmap(slots->memory, slots->size);
	if (slots->fd >= 0)
		close(slots->fd);
	pthread_mutex_destroy(&slots->lock);
	free(slots->slots);
	memset(slots, 0, sizeof(*slots));
	slots->fd = -1;
}

uint32_t tp_fuse_slots_minor(const struct slots *slots)
{
	return atomic_load(&head_of(slots)->minor);
}

void tp_fuse_slots_set_minor(struct slots *slots, uint32_t minor)
{
	atomic_store(&head_of(slots)->minor, minor);
}

void tp_fuse_slot_make_resident(struct slot *slot)
{
	unsigned char *base = slot->data - FUSE_PAGE;

	/* mlock also faults everything in. Where we may not lock, populate; where that is missing
	 * too (before 5.14), touch. */
	if (mlock(base, FUSE_SLOT_STRIDE) && madvise(base, FUSE_SLOT_STRIDE, MADV_POPULATE_WRITE)) {
		size_t at;

		for (at = 0; at < FUSE_SLOT_STRIDE; at += FUSE_PAGE)
			*(volatile unsigned char *)&base[at] = base[at];
	}
	slot->resident = true;
}

static void open_slot(struct slot *slot, uint32_t fd_index)
{
	slot->next = NULL;
	slot->file = NULL;
	slot->failed = false;
	slot->touched = true;
	slot->pending = 0;
	slot->expected = 0;
	slot->transferred = 0;
	slot->header->unique = 0;
	slot->shared->fd_index = fd_index;
	/* The compiler must not move the zeroing of unique behind the read; the processor's order
	 * does not matter, for only death shows it to another. */
	atomic_store_explicit(&slot->shared->state, SLOT_OPEN, memory_order_release);
}

struct slot *tp_fuse_slots_take(struct slots *slots, uint32_t fd_index)
{
	struct slot *slot;

	pthread_mutex_lock(&slots->lock);
	slot = pop(&slots->resident);
	if (!slot)
		slot = pop(&slots->plain);
	if (slot)
		slots->nr_free--;
	else
		slots->starved = true;
	pthread_mutex_unlock(&slots->lock);
	if (!slot)
		return NULL;
	if (!slot->resident)
		tp_fuse_slot_make_resident(slot);
	open_slot(slot, fd_index);
	return slot;
}

struct slot *tp_fuse_slots_move(struct slots *slots, struct slot *from, size_t length)
{
	struct fuse_in_header header = *from->header;
	struct slot *slot = NULL;

	pthread_mutex_lock(&slots->lock);
	if (!slots->resident)
		slot = pop(&slots->plain);
	if (slot)
		slots->nr_free--;
	pthread_mutex_unlock(&slots->lock);
	if (!slot)
		return NULL;
	open_slot(slot, from->shared->fd_index);
	header.unique = 0;
	*slot->header = header;
	memcpy(slot->header + 1, from->header + 1, length - sizeof(header));
	/* For a moment both have it, never none. See the third invariant. */
	atomic_signal_fence(memory_order_seq_cst);
	slot->header->unique = from->header->unique;
	atomic_signal_fence(memory_order_seq_cst);
	from->header->unique = 0;
	atomic_signal_fence(memory_order_seq_cst);
	return slot;
}

bool tp_fuse_slots_put(struct slots *slots, struct slot *slot)
{
	bool starved;

	slot->header->unique = 0;
	atomic_store_explicit(&slot->shared->state, SLOT_FREE, memory_order_release);
	pthread_mutex_lock(&slots->lock);
	push(slot->resident ? &slots->resident : &slots->plain, slot);
	slots->nr_free++;
	starved = slots->starved;
	slots->starved = false;
	pthread_mutex_unlock(&slots->lock);
	return starved;
}

/* The head page stays: it says that the slot is free. */
static bool give_back(struct slots *slots, struct slot *slot)
{
	if (slot->resident)
		munlock(slot->data - FUSE_PAGE, FUSE_SLOT_STRIDE);
	if (fallocate(slots->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		      slot->data - slots->memory, FUSE_MAX_IO))
		return false;
	slot->resident = false;
	slot->touched = false;
	return true;
}

/* At most TRIM_BATCH of them under the lock; returns whether there may be more. What cannot be
 * punched stays, and is not tried for ever. */
static bool trim_some(struct slots *slots, uint32_t keep)
{
	struct slot **at = &slots->resident;
	uint32_t seen = 0, done = 0;
	struct slot *slot;

	pthread_mutex_lock(&slots->lock);
	while ((slot = *at) && done < TRIM_BATCH) {
		if (seen++ < keep) {
			at = &slot->next;
			continue;
		}
		if (!give_back(slots, slot))
			break;
		*at = slot->next;
		push(&slots->plain, slot);
		done++;
	}
	for (slot = slots->plain; slot && done < TRIM_BATCH; slot = slot->next) {
		if (!slot->touched)
			continue;
		if (!give_back(slots, slot))
			break;
		done++;
	}
	pthread_mutex_unlock(&slots->lock);
	return done == TRIM_BATCH;
}

void tp_fuse_slots_trim(struct slots *slots, uint32_t keep)
{
	while (trim_some(slots, keep))
		;
}
