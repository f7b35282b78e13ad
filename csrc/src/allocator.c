/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The allocator: which blocks can be handed out now. In memory only; the space map on disk counts.
 *
 * Three bit trees: `free` has the allocatable blocks, `pending` those freed since the last commit,
 * and a block in neither is used. `whole` has the words of `free` with all 64 bits set, so that a
 * long run is found without looking at the fragments before it. That makes two bits a block and
 * some 5 % for the summaries and `whole`.
 *
 * Next-fit: a cursor stands behind the last block handed out. It never looks back for holes before
 * the end is reached, so that blocks allocated together lie together.
 *
 * Invariants:
 *  1. free and pending are disjoint, and hold nothing at or past nr_blocks;
 *  2. nr_free and nr_pending are their sizes;
 *  3. whole has exactly the words of free that are all ones;
 *  4. a block leaves pending only in tp_allocator_commit;
 *  5. window is 0, or the free blocks from the cursor on in the word of the block before the
 *     cursor, which is used. Single blocks are taken from it: while it holds another one, no
 *     summary changes. Whatever else changes free sets it to 0.
 */
#include "thinpool/abi.h"
#include "thinpool/error.h"

#include "bit_tree.h"

#define ALL_ONES (~UINT64_C(0))

/* Bounds on the search for a run: a bad run now is better than a good one late. */
#define RUN_NEAR_MAX 16 /* free stretches looked at behind the cursor */
#define RUN_FAR_MAX  8  /* stretches with a whole word looked at anywhere */

struct tp_allocator {
	uint64_t window;
	uint64_t window_begin; /* the block of its bit 0 */
	uint64_t cursor;       /* <= nr_bits of free */
	struct bit_tree free;
	uint64_t nr_free;
	struct bit_tree whole;
	struct bit_tree pending;
	uint64_t nr_pending;
};

struct run {
	uint64_t begin;
	uint64_t length;
};

/* ---- ranges word by word ------------------------------------------------------------------- */

/* The part of [at, end) that lies in the word of `at`; at < end. */
static uint64_t part_mask(uint64_t at, uint64_t end)
{
	unsigned int first = (unsigned int)(at % BIT_TREE_WORD);
	uint64_t rest = end - at;

	if (rest > BIT_TREE_WORD - first)
		rest = BIT_TREE_WORD - first;
	return bit_tree_mask(first, first + (unsigned int)rest - 1);
}

static uint64_t next_word_begin(uint64_t at)
{
	return (at / BIT_TREE_WORD + 1) * BIT_TREE_WORD;
}

static void free_bits_set(struct tp_allocator *allocator, uint64_t word, uint64_t bits)
{
	bit_tree_or_word(&allocator->free, word, bits);
	if (allocator->free.level[0][word] == ALL_ONES)
		bit_tree_set(&allocator->whole, word);
}

static void free_bits_clear(struct tp_allocator *allocator, uint64_t word, uint64_t bits)
{
	if (allocator->free.level[0][word] == ALL_ONES)
		bit_tree_clear(&allocator->whole, word);
	bit_tree_clear_word_bits(&allocator->free, word, bits);
}

static void make_free(struct tp_allocator *allocator, uint64_t begin, uint64_t end)
{
	for (uint64_t at = begin; at < end; at = next_word_begin(at))
		free_bits_set(allocator, at / BIT_TREE_WORD, part_mask(at, end));
	allocator->nr_free += end - begin;
	allocator->window = 0;
}

static void make_used(struct tp_allocator *allocator, uint64_t begin, uint64_t end)
{
	for (uint64_t at = begin; at < end; at = next_word_begin(at))
		free_bits_clear(allocator, at / BIT_TREE_WORD, part_mask(at, end));
	TP_ASSERT(allocator->nr_free >= end - begin);
	allocator->nr_free -= end - begin;
	allocator->window = 0;
}

static int all_free(const struct tp_allocator *allocator, uint64_t begin, uint64_t end)
{
	return bit_tree_run(&allocator->free, begin, end - begin) == end - begin;
}

static int all_used(const struct tp_allocator *allocator, uint64_t begin, uint64_t end)
{
	for (uint64_t at = begin; at < end; at = next_word_begin(at)) {
		uint64_t word = at / BIT_TREE_WORD;
		uint64_t not_used =
			allocator->free.level[0][word] | allocator->pending.level[0][word];

		if (not_used & part_mask(at, end))
			return 0;
	}
	return 1;
}

/* ---- lifetime and size ---------------------------------------------------------------------- */

static int trees_init(struct tp_allocator *allocator, uint64_t nr_blocks)
{
	memset(allocator, 0, sizeof(*allocator));
	if (nr_blocks > BIT_TREE_BITS_MAX)
		return -1;
	if (!bit_tree_init(&allocator->free, nr_blocks) &&
	    !bit_tree_init(&allocator->whole, bit_tree_words(nr_blocks)) &&
	    !bit_tree_init(&allocator->pending, nr_blocks))
		return 0;
	return -1;
}

static void trees_deinit(struct tp_allocator *allocator)
{
	bit_tree_deinit(&allocator->free);
	bit_tree_deinit(&allocator->whole);
	bit_tree_deinit(&allocator->pending);
}

struct tp_allocator *tp_allocator_create(uint64_t nr_blocks)
{
	struct tp_allocator *allocator = malloc(sizeof(*allocator));

	if (!allocator)
		return NULL;
	if (trees_init(allocator, nr_blocks)) {
		tp_allocator_destroy(allocator);
		return NULL;
	}
	make_free(allocator, 0, nr_blocks);
	return allocator;
}

void tp_allocator_destroy(struct tp_allocator *allocator)
{
	if (!allocator)
		return;
	trees_deinit(allocator);
	free(allocator);
}

int tp_allocator_resize(struct tp_allocator *allocator, uint64_t nr_blocks)
{
	uint64_t old = allocator->free.nr_bits;
	struct tp_allocator grown;

	if (nr_blocks < old || nr_blocks > BIT_TREE_BITS_MAX)
		return TP_E_INVALID;
	if (nr_blocks == old)
		return 0;
	if (trees_init(&grown, nr_blocks)) {
		trees_deinit(&grown);
		return TP_E_NO_MEMORY;
	}
	for (uint64_t word = 0; word < bit_tree_words(old); word++) {
		free_bits_set(&grown, word, allocator->free.level[0][word]);
		bit_tree_or_word(&grown.pending, word, allocator->pending.level[0][word]);
	}
	grown.nr_free = allocator->nr_free;
	grown.nr_pending = allocator->nr_pending;
	grown.cursor = allocator->cursor;
	make_free(&grown, old, nr_blocks);
	trees_deinit(allocator);
	*allocator = grown;
	return 0;
}

uint64_t tp_allocator_nr_blocks(const struct tp_allocator *allocator)
{
	return allocator->free.nr_bits;
}

uint64_t tp_allocator_nr_free(const struct tp_allocator *allocator)
{
	return allocator->nr_free;
}

uint64_t tp_allocator_nr_pending(const struct tp_allocator *allocator)
{
	return allocator->nr_pending;
}

/* ---- allocation ----------------------------------------------------------------------------- */

/* There is a free block. */
static uint64_t next_free_from(const struct tp_allocator *allocator, uint64_t from)
{
	uint64_t block = bit_tree_next(&allocator->free, from);

	if (block == BIT_TREE_NONE)
		block = bit_tree_next(&allocator->free, 0);
	TP_ASSERT(block != BIT_TREE_NONE);
	return block;
}

/* Out of line, so that the common case saves no registers for it. */
static __attribute__((noinline)) uint64_t alloc_slowly(struct tp_allocator *allocator)
{
	uint64_t block;
	uint64_t word;
	uint64_t bits;

	if (allocator->window)
		block = allocator->window_begin + (uint64_t)__builtin_ctzll(allocator->window);
	else
		block = next_free_from(allocator, allocator->cursor);
	word = block / BIT_TREE_WORD;
	bits = allocator->free.level[0][word] & ALL_ONES << block % BIT_TREE_WORD;
	free_bits_clear(allocator, word, UINT64_C(1) << block % BIT_TREE_WORD);
	allocator->window = bits & (bits - 1);
	allocator->window_begin = word * BIT_TREE_WORD;
	allocator->nr_free--;
	allocator->cursor = block + 1;
	return block;
}

static inline uint64_t alloc_one(struct tp_allocator *allocator)
{
	uint64_t window = allocator->window;
	uint64_t rest = window & (window - 1);
	uint64_t block;

	/* The last of a word changes the summaries. */
	if (!rest)
		return alloc_slowly(allocator);
	block = allocator->window_begin + (uint64_t)__builtin_ctzll(window);
	allocator->window = rest;
	/* Not whole: a block before this one is used, or there was no window. */
	allocator->free.level[0][block / BIT_TREE_WORD] ^= window ^ rest;
	allocator->nr_free--;
	allocator->cursor = block + 1;
	return block;
}

int tp_allocator_alloc(struct tp_allocator *allocator, uint64_t *block_ret)
{
	if (!allocator->nr_free)
		return TP_E_DATA_SPACE;
	*block_ret = alloc_one(allocator);
	return 0;
}

int tp_allocator_alloc_batch(struct tp_allocator *allocator, size_t count, uint64_t *blocks,
			     size_t *count_ret)
{
	size_t got = count < allocator->nr_free ? count : (size_t)allocator->nr_free;

	if (count && !got)
		return TP_E_DATA_SPACE;
	for (size_t i = 0; i < got; i++)
		blocks[i] = alloc_one(allocator);
	*count_ret = got;
	return 0;
}

static struct run run_at(const struct tp_allocator *allocator, uint64_t begin, uint64_t want)
{
	return (struct run){ begin, bit_tree_run(&allocator->free, begin, want) };
}

/* The next few free stretches from the cursor on. */
static struct run near_run(const struct tp_allocator *allocator, uint64_t want)
{
	struct run best = run_at(allocator, next_free_from(allocator, allocator->cursor), want);
	struct run run = best;

	for (int seen = 1; seen < RUN_NEAR_MAX && best.length < want; seen++) {
		uint64_t begin = bit_tree_next(&allocator->free, run.begin + run.length);

		if (begin == BIT_TREE_NONE)
			break;
		run = run_at(allocator, begin, want);
		if (run.length > best.length)
			best = run;
	}
	return best;
}

/* The stretch that a whole free word lies in, from its begin or 63 blocks before the word. */
static struct run run_around(const struct tp_allocator *allocator, uint64_t word, uint64_t want)
{
	uint64_t begin = word * BIT_TREE_WORD;

	if (word) {
		uint64_t absent = ~allocator->free.level[0][word - 1];

		/* A whole word before this one was passed over on purpose: it lies behind us. */
		if (absent)
			begin -= (uint64_t)__builtin_clzll(absent);
	}
	return run_at(allocator, begin, want);
}

/* Stretches that hold a whole word, from the cursor round to it again. Length 0: there are none. */
static struct run far_run(const struct tp_allocator *allocator, uint64_t want)
{
	uint64_t nr_words = allocator->whole.nr_bits;
	uint64_t from = (allocator->cursor + BIT_TREE_WORD - 1) / BIT_TREE_WORD;
	struct run best = { 0, 0 };
	int wrapped = 0;

	for (int seen = 0; seen < RUN_FAR_MAX && best.length < want; seen++) {
		uint64_t word = bit_tree_next(&allocator->whole, from);
		struct run run;

		if (word == BIT_TREE_NONE) {
			if (wrapped)
				break;
			wrapped = 1;
			from = 0;
			continue;
		}
		run = run_around(allocator, word, want);
		if (run.length > best.length)
			best = run;
		/* A stretch cut at want ended the search; any other ends before this word. */
		from = (run.begin + run.length) / BIT_TREE_WORD;
		if (from > nr_words)
			from = nr_words;
	}
	return best;
}

int tp_allocator_alloc_run(struct tp_allocator *allocator, uint64_t want, uint64_t *begin_ret,
			   uint64_t *length_ret)
{
	struct run run;

	if (!want)
		return TP_E_INVALID;
	if (!allocator->nr_free)
		return TP_E_DATA_SPACE;
	run = near_run(allocator, want);
	if (run.length < want) {
		struct run far = far_run(allocator, want);

		if (far.length > run.length)
			run = far;
	}
	make_used(allocator, run.begin, run.begin + run.length);
	allocator->cursor = run.begin + run.length;
	*begin_ret = run.begin;
	*length_ret = run.length;
	return 0;
}

int tp_allocator_take(struct tp_allocator *allocator, uint64_t begin, uint64_t length)
{
	uint64_t nr_blocks = allocator->free.nr_bits;

	if (begin > nr_blocks || length > nr_blocks - begin)
		return TP_E_OUT_OF_RANGE;
	if (!all_free(allocator, begin, begin + length))
		return TP_E_BUSY;
	make_used(allocator, begin, begin + length);
	return 0;
}

/* ---- giving back ---------------------------------------------------------------------------- */

static int check_used(const struct tp_allocator *allocator, uint64_t begin, uint64_t length)
{
	uint64_t nr_blocks = allocator->free.nr_bits;

	if (begin > nr_blocks || length > nr_blocks - begin)
		return TP_E_OUT_OF_RANGE;
	return all_used(allocator, begin, begin + length) ? 0 : TP_E_INVALID;
}

int tp_allocator_free(struct tp_allocator *allocator, uint64_t begin, uint64_t length)
{
	uint64_t end = begin + length;
	int status = check_used(allocator, begin, length);

	if (status)
		return status;
	for (uint64_t at = begin; at < end; at = next_word_begin(at))
		bit_tree_or_word(&allocator->pending, at / BIT_TREE_WORD, part_mask(at, end));
	allocator->nr_pending += length;
	return 0;
}

int tp_allocator_free_batch(struct tp_allocator *allocator, const uint64_t *blocks, size_t count)
{
	int status = 0;
	size_t done;

	for (done = 0; done < count && !status; done++)
		status = tp_allocator_free(allocator, blocks[done], 1);
	if (!status)
		return 0;
	/* The last one failed, and so found, too, what stands twice in the batch. */
	for (size_t i = 0; i + 1 < done; i++)
		bit_tree_clear(&allocator->pending, blocks[i]);
	allocator->nr_pending -= done - 1;
	return status;
}

int tp_allocator_untake(struct tp_allocator *allocator, uint64_t begin, uint64_t length)
{
	int status = check_used(allocator, begin, length);

	if (status)
		return status;
	make_free(allocator, begin, begin + length);
	return 0;
}

void tp_allocator_commit(struct tp_allocator *allocator)
{
	struct bit_tree *pending = &allocator->pending;
	uint64_t block = bit_tree_next(pending, 0);

	while (block != BIT_TREE_NONE) {
		uint64_t word = block / BIT_TREE_WORD;
		uint64_t bits = pending->level[0][word];

		TP_ASSERT(!(allocator->free.level[0][word] & bits));
		free_bits_set(allocator, word, bits);
		bit_tree_clear_word_bits(pending, word, bits);
		block = bit_tree_next(pending, block);
	}
	allocator->window = 0;
	allocator->nr_free += allocator->nr_pending;
	allocator->nr_pending = 0;
}

/* ---- asking --------------------------------------------------------------------------------- */

int tp_allocator_is_free(const struct tp_allocator *allocator, uint64_t block)
{
	return block < allocator->free.nr_bits && bit_tree_test(&allocator->free, block);
}

int tp_allocator_next_free_run(const struct tp_allocator *allocator, uint64_t begin,
			       uint64_t *begin_ret, uint64_t *length_ret)
{
	uint64_t nr_blocks = allocator->free.nr_bits;
	uint64_t found = begin < nr_blocks ? bit_tree_next(&allocator->free, begin) : BIT_TREE_NONE;

	if (found == BIT_TREE_NONE)
		return TP_E_KEY_NOT_FOUND;
	*begin_ret = found;
	*length_ret = bit_tree_run(&allocator->free, found, nr_blocks - found);
	return 0;
}
