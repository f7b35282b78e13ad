/* SPDX-License-Identifier: Apache-2.0 */
/* Reference counts as the walk finds them. */
#include <stdlib.h>

#include "thinpool/check.h"
#include "thinpool/error.h"

/* A block's byte went round this often. */
struct tp_check_carry {
	uint64_t block;
	uint64_t rounds; /* 0: an empty place */
};

#define LANES_MAX        4u
#define LANES_BLOCKS_MAX (UINT64_C(1) << 26) /* 64 MiB a lane */

int tp_check_counts_init(struct tp_check_counts *counts, uint64_t nr, unsigned nr_threads,
			 struct tp_error *err)
{
	bool lanes = nr_threads >= 1 && nr_threads <= LANES_MAX && nr <= LANES_BLOCKS_MAX;

	*counts = (struct tp_check_counts){
		.nr = nr,
		.nr_lanes = lanes ? nr_threads : 1,
		.shared = !lanes,
	};
	pthread_mutex_init(&counts->lock, NULL);
	counts->low = tp_walk_map(nr * counts->nr_lanes);
	if (!counts->low)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to count references to %llu blocks",
			       (unsigned long long)nr);
	return 0;
}

void tp_check_counts_deinit(struct tp_check_counts *counts)
{
	if (!counts->low)
		return;
	tp_walk_unmap(counts->low, counts->nr * counts->nr_lanes);
	free(counts->carries);
	pthread_mutex_destroy(&counts->lock);
	counts->low = NULL;
}

#define CHUNK 4096u

void tp_check_counts_merge(struct tp_check_counts *counts)
{
	for (unsigned lane = 1; lane < counts->nr_lanes; lane++) {
		const uint8_t *more = counts->low + counts->nr * lane;

		for (uint64_t at = 0; at < counts->nr; at += CHUNK) {
			uint64_t end = counts->nr - at < CHUNK ? counts->nr : at + CHUNK;
			uint8_t carried = 0;

			/* Without a branch, so that it is vectorised. */
			for (uint64_t i = at; i < end; i++) {
				counts->low[i] = (uint8_t)(counts->low[i] + more[i]);
				carried |= counts->low[i] < more[i];
			}
			for (uint64_t i = at; carried && i < end; i++)
				if (counts->low[i] < more[i])
					tp_check_counts_carry(counts, i);
		}
	}
}

static struct tp_check_carry *place(struct tp_check_carry *carries, uint64_t room, uint64_t block)
{
	uint64_t at = block * UINT64_C(0x9e3779b97f4a7c15) & (room - 1);

	while (carries[at].rounds && carries[at].block != block)
		at = (at + 1) & (room - 1);
	return &carries[at];
}

static bool grow(struct tp_check_counts *counts)
{
	uint64_t room = counts->carries_room ? counts->carries_room * 2 : 1024;
	struct tp_check_carry *grown = calloc(room, sizeof(*grown));

	if (!grown)
		return false;
	for (uint64_t i = 0; i < counts->carries_room; i++)
		if (counts->carries[i].rounds)
			*place(grown, room, counts->carries[i].block) = counts->carries[i];
	free(counts->carries);
	counts->carries = grown;
	counts->carries_room = room;
	return true;
}

void tp_check_counts_carry(struct tp_check_counts *counts, uint64_t block)
{
	struct tp_check_carry *carry;

	pthread_mutex_lock(&counts->lock);
	if (counts->nr_carries * 2 >= counts->carries_room && !grow(counts)) {
		counts->failed = true;
		pthread_mutex_unlock(&counts->lock);
		return;
	}
	carry = place(counts->carries, counts->carries_room, block);
	if (!carry->rounds) {
		carry->block = block;
		counts->nr_carries++;
	}
	carry->rounds++;
	pthread_mutex_unlock(&counts->lock);
}

uint64_t tp_check_counts_get(const struct tp_check_counts *counts, uint64_t block)
{
	uint64_t count = counts->low[block];

	if (counts->nr_carries)
		count += 256 * place(counts->carries, counts->carries_room, block)->rounds;
	return count;
}
