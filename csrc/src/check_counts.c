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

int tp_check_counts_init(struct tp_check_counts *counts, uint64_t nr, struct tp_error *err)
{
	*counts = (struct tp_check_counts){.nr = nr};
	pthread_mutex_init(&counts->lock, NULL);
	counts->low = tp_walk_map(nr);
	if (!counts->low)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to count references to %llu blocks",
			       (unsigned long long)nr);
	return 0;
}

void tp_check_counts_deinit(struct tp_check_counts *counts)
{
	if (!counts->low)
		return;
	tp_walk_unmap(counts->low, counts->nr);
	free(counts->carries);
	pthread_mutex_destroy(&counts->lock);
	counts->low = NULL;
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
