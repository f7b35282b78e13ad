/* SPDX-License-Identifier: Apache-2.0 */
/* Reference counts as the walk finds them. */
#include <stdlib.h>

#include "thinpool/check.h"
#include "thinpool/error.h"

/* The middle digit of a block went round this often. */
struct tp_check_carry {
	uint64_t block;
	uint64_t rounds; /* 0: an empty place */
};

#define LOW             4u   /* the low digit goes round at */
#define MIDDLE          256u /* and the middle one */
#define LANES_MAX       64u
#define LANES_BYTES_MAX (UINT64_C(32) << 20) /* of all */

int tp_check_counts_init(struct tp_check_counts *counts, uint64_t nr, unsigned nr_threads,
			 struct tp_error *err)
{
	uint64_t words = nr / TP_CHECK_COUNTS_WORD + (nr % TP_CHECK_COUNTS_WORD != 0);
	uint64_t lane_bytes = words * 8;
	bool lanes = nr_threads >= 1 && nr_threads <= LANES_MAX &&
		     lane_bytes <= LANES_BYTES_MAX / nr_threads;

	*counts = (struct tp_check_counts){
		.nr = nr,
		.lane_bytes = lane_bytes,
		.nr_lanes = lanes ? nr_threads : 1,
		.shared = !lanes,
	};
	pthread_mutex_init(&counts->lock, NULL);
	counts->low = tp_walk_map_dense(lane_bytes * counts->nr_lanes);
	counts->middle = tp_walk_map(nr);
	counts->carried = tp_walk_map(tp_walk_words(words) * 8);
	if (!counts->low || !counts->middle || !counts->carried) {
		tp_check_counts_deinit(counts);
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to count references to %llu blocks",
			       (unsigned long long)nr);
	}
	tp_walk_touch(counts->low, lane_bytes * counts->nr_lanes);
	return 0;
}

void tp_check_counts_deinit(struct tp_check_counts *counts)
{
	uint64_t words = counts->lane_bytes / 8;

	if (!counts->nr_lanes)
		return;
	tp_walk_unmap(counts->low, counts->lane_bytes * counts->nr_lanes);
	tp_walk_unmap(counts->middle, counts->nr);
	tp_walk_unmap(counts->carried, tp_walk_words(words) * 8);
	free(counts->carries);
	pthread_mutex_destroy(&counts->lock);
	*counts = (struct tp_check_counts){ 0 };
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

static void carry_on(struct tp_check_counts *counts, uint64_t block)
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

void tp_check_counts_carry(struct tp_check_counts *counts, uint64_t block)
{
	uint64_t word = block / TP_CHECK_COUNTS_WORD;

	if (!tp_walk_bit_get(counts->carried, word))
		tp_walk_bit_set(counts->carried, word);
	if (__atomic_fetch_add(&counts->middle[block], 1, __ATOMIC_RELAXED) == MIDDLE - 1)
		carry_on(counts, block);
}

uint64_t tp_check_counts_get(const struct tp_check_counts *counts, uint64_t block)
{
	uint64_t count = 0;

	for (unsigned lane = 0; lane < counts->nr_lanes; lane++)
		count += tp_check_counts_lane(counts, lane)[block / 4] >> block % 4 * 2 & 3u;
	if (!tp_walk_bit_get(counts->carried, block / TP_CHECK_COUNTS_WORD))
		return count;
	count += (uint64_t)LOW * counts->middle[block];
	if (counts->nr_carries)
		count += (uint64_t)LOW * MIDDLE *
			 place(counts->carries, counts->carries_room, block)->rounds;
	return count;
}

#define LOW_BITS UINT64_C(0x5555555555555555)

/* The sum of low digits, each at most 3; their bits in words of their own. */
static uint64_t lanes_word(const struct tp_check_counts *counts, uint64_t first)
{
	uint64_t ones = 0, twos = 0;

	for (unsigned lane = 0; lane < counts->nr_lanes; lane++) {
		uint64_t word = tp_walk_get64(tp_check_counts_lane(counts, lane) + first / 4);
		uint64_t more_ones = word & LOW_BITS, more_twos = word >> 1 & LOW_BITS;
		uint64_t carry = ones & more_ones;
		uint64_t past = (twos & more_twos) | (carry & (twos ^ more_twos));

		ones = (ones ^ more_ones) | past;
		twos = (twos ^ more_twos ^ carry) | past;
	}
	/* On disk the bits of an entry stand the other way round. */
	return ones << 1 | twos;
}

uint64_t tp_check_counts_word(const struct tp_check_counts *counts, uint64_t first)
{
	static const uint8_t pairs[4] = { 0, 2, 1, 3 };
	uint64_t word = 0;

	if (!tp_walk_bit_get(counts->carried, first / TP_CHECK_COUNTS_WORD))
		return lanes_word(counts, first);
	for (unsigned i = 0; i < TP_CHECK_COUNTS_WORD && first + i < counts->nr; i++) {
		uint64_t count = tp_check_counts_get(counts, first + i);

		word |= (uint64_t)pairs[count < 3 ? count : 3] << 2 * i;
	}
	return word;
}
