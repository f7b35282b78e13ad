/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One word a lock: the number of shared holders, a bit for an exclusive holder, a bit that an
 * exclusive user waits, and a bit that somebody sleeps. Waiting is a futex on the word.
 */
#include "block_locks.h"

#include <linux/futex.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "thinpool/error.h"

#define NR_LOCKS  8192u /* a power of two; 64 bytes each, so that neighbours do not collide */
#define EXCLUSIVE 0x80000000u
#define WANTED    0x40000000u /* an exclusive user waits */
#define SLEEPERS  0x20000000u
#define HOLDERS   0x1fffffffu

struct lock {
	_Alignas(64) _Atomic uint32_t word;
};

struct tp_block_locks {
	struct lock locks[NR_LOCKS];
};

static void futex_wait(_Atomic uint32_t *word, uint32_t seen)
{
	syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake_all(_Atomic uint32_t *word)
{
	syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

struct tp_block_locks *tp_block_locks_create(void)
{
	void *locks;

	if (posix_memalign(&locks, 64, sizeof(struct tp_block_locks)))
		return NULL;
	for (uint32_t i = 0; i < NR_LOCKS; i++)
		atomic_init(&((struct tp_block_locks *)locks)->locks[i].word, 0);
	return locks;
}

void tp_block_locks_destroy(struct tp_block_locks *locks)
{
	free(locks);
}

uint32_t tp_block_lock_index(uint32_t volume_id, uint64_t block)
{
	uint64_t h = (block + ((uint64_t)volume_id << 40)) * UINT64_C(0x9E3779B97F4A7C15);

	return (uint32_t)(h >> 40) & (NR_LOCKS - 1);
}

bool tp_block_lock_try_shared(struct tp_block_locks *locks, uint32_t index)
{
	_Atomic uint32_t *word = &locks->locks[index].word;
	uint32_t seen = atomic_load_explicit(word, memory_order_relaxed);

	do {
		if (seen & (EXCLUSIVE | WANTED))
			return false;
	} while (!atomic_compare_exchange_weak_explicit(word, &seen, seen + 1, memory_order_acquire,
							memory_order_relaxed));
	return true;
}

/* Sleep until the word changes; the bit tells the releaser that somebody sleeps. */
static void sleep_on(_Atomic uint32_t *word, uint32_t seen)
{
	if (!(seen & SLEEPERS)) {
		if (!atomic_compare_exchange_strong(word, &seen, seen | SLEEPERS))
			return;
		seen |= SLEEPERS;
	}
	futex_wait(word, seen);
}

void tp_block_lock_shared(struct tp_block_locks *locks, uint32_t index)
{
	_Atomic uint32_t *word = &locks->locks[index].word;

	while (!tp_block_lock_try_shared(locks, index)) {
		uint32_t seen = atomic_load(word);

		if (seen & (EXCLUSIVE | WANTED))
			sleep_on(word, seen);
	}
}

void tp_block_unlock_shared(struct tp_block_locks *locks, uint32_t index)
{
	_Atomic uint32_t *word = &locks->locks[index].word;
	uint32_t seen = atomic_fetch_sub_explicit(word, 1, memory_order_release);

	TP_ASSERT(seen & HOLDERS);
	if ((seen & HOLDERS) == 1 && (seen & SLEEPERS)) {
		atomic_fetch_and(word, ~SLEEPERS);
		futex_wake_all(word);
	}
}

void tp_block_lock_exclusive(struct tp_block_locks *locks, uint32_t index)
{
	_Atomic uint32_t *word = &locks->locks[index].word;

	for (;;) {
		uint32_t seen = atomic_load(word);

		if (!(seen & (EXCLUSIVE | HOLDERS))) {
			/* Others that wait set WANTED again when they wake and find us. */
			if (atomic_compare_exchange_strong(word, &seen,
							   (seen & SLEEPERS) | EXCLUSIVE))
				return;
			continue;
		}
		if (!(seen & WANTED)) {
			if (!atomic_compare_exchange_strong(word, &seen, seen | WANTED))
				continue;
			seen |= WANTED;
		}
		sleep_on(word, seen);
	}
}

bool tp_block_lock_try_exclusive(struct tp_block_locks *locks, uint32_t index)
{
	uint32_t free = 0;

	return atomic_compare_exchange_strong(&locks->locks[index].word, &free, EXCLUSIVE);
}

void tp_block_unlock_exclusive(struct tp_block_locks *locks, uint32_t index)
{
	_Atomic uint32_t *word = &locks->locks[index].word;
	uint32_t seen = atomic_exchange(word, 0);

	TP_ASSERT((seen & EXCLUSIVE) && !(seen & HOLDERS));
	if (seen & SLEEPERS)
		futex_wake_all(word);
}
