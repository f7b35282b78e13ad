/* SPDX-License-Identifier: Apache-2.0 */
/**
 * A set of numbers below nr_bits as a bitmap under 64-ary summaries.
 *
 * Level 0 has a bit a number; a bit of level k + 1 is set when the word of level k that it stands
 * for is not zero. The top level is one word. So finding the next member from anywhere costs at
 * most one word up and one down a level, and all summaries together cost 1/63 of the bitmap.
 *
 * Invariants:
 *  - bits at or past nr_bits are zero on level 0, and summaries say so;
 *  - every level has one zero word more than it needs: a search may look at the word after the
 *    last without asking whether there is one.
 *
 * Numbers and ranges are the caller's to keep in bounds; nothing is validated here. Not
 * thread-safe. The functions are in this header because the allocator's cost is theirs.
 */
#ifndef THINPOOL_SRC_BIT_TREE_H
#define THINPOOL_SRC_BIT_TREE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BIT_TREE_WORD       64U
#define BIT_TREE_LEVELS_MAX 7 /* 64^7 = 2^42 numbers: past the format's 2^40 blocks */
#define BIT_TREE_BITS_MAX   (UINT64_C(1) << 40)
#define BIT_TREE_NONE       UINT64_MAX

struct bit_tree {
	uint64_t nr_bits;
	unsigned int nr_levels; /* at least 1 */
	uint64_t *level[BIT_TREE_LEVELS_MAX];
};

static inline uint64_t bit_tree_words(uint64_t nr_bits)
{
	return (nr_bits + BIT_TREE_WORD - 1) / BIT_TREE_WORD;
}

/* Bits first..last of a word, both included. */
static inline uint64_t bit_tree_mask(unsigned int first, unsigned int last)
{
	return ~UINT64_C(0) << first & ~UINT64_C(0) >> (BIT_TREE_WORD - 1 - last);
}

static inline void bit_tree_deinit(struct bit_tree *tree)
{
	for (unsigned int k = 0; k < tree->nr_levels; k++)
		free(tree->level[k]);
	tree->nr_levels = 0;
}

/* Empty. -1 when there is no memory, and then nothing is held. nr_bits <= BIT_TREE_BITS_MAX. */
static inline int bit_tree_init(struct bit_tree *tree, uint64_t nr_bits)
{
	uint64_t bits = nr_bits;

	memset(tree, 0, sizeof(*tree));
	tree->nr_bits = nr_bits;
	do {
		uint64_t words = bit_tree_words(bits);
		uint64_t *level = calloc(words + 1, sizeof(*level));

		if (!level) {
			bit_tree_deinit(tree);
			return -1;
		}
		tree->level[tree->nr_levels++] = level;
		bits = words;
	} while (bits > 1);
	return 0;
}

static inline int bit_tree_test(const struct bit_tree *tree, uint64_t bit)
{
	return tree->level[0][bit / BIT_TREE_WORD] >> bit % BIT_TREE_WORD & 1;
}

/* A word of level 0 became other than zero, or zero: the summaries follow. */
static inline void bit_tree_word_filled(struct bit_tree *tree, uint64_t word)
{
	for (unsigned int k = 1; k < tree->nr_levels; k++) {
		uint64_t *summary = &tree->level[k][word / BIT_TREE_WORD];
		uint64_t before = *summary;

		*summary |= UINT64_C(1) << word % BIT_TREE_WORD;
		if (before)
			return;
		word /= BIT_TREE_WORD;
	}
}

static inline void bit_tree_word_emptied(struct bit_tree *tree, uint64_t word)
{
	for (unsigned int k = 1; k < tree->nr_levels; k++) {
		uint64_t *summary = &tree->level[k][word / BIT_TREE_WORD];

		*summary &= ~(UINT64_C(1) << word % BIT_TREE_WORD);
		if (*summary)
			return;
		word /= BIT_TREE_WORD;
	}
}

static inline void bit_tree_or_word(struct bit_tree *tree, uint64_t word, uint64_t bits)
{
	uint64_t before = tree->level[0][word];

	tree->level[0][word] = before | bits;
	if (!before && bits)
		bit_tree_word_filled(tree, word);
}

static inline void bit_tree_clear_word_bits(struct bit_tree *tree, uint64_t word, uint64_t bits)
{
	uint64_t before = tree->level[0][word];

	tree->level[0][word] = before & ~bits;
	if (before && !(before & ~bits))
		bit_tree_word_emptied(tree, word);
}

static inline void bit_tree_set(struct bit_tree *tree, uint64_t bit)
{
	bit_tree_or_word(tree, bit / BIT_TREE_WORD, UINT64_C(1) << bit % BIT_TREE_WORD);
}

static inline void bit_tree_clear(struct bit_tree *tree, uint64_t bit)
{
	bit_tree_clear_word_bits(tree, bit / BIT_TREE_WORD, UINT64_C(1) << bit % BIT_TREE_WORD);
}

/* The smallest member >= from; from <= nr_bits. */
static inline uint64_t bit_tree_next(const struct bit_tree *tree, uint64_t from)
{
	unsigned int k = 0;
	uint64_t word;

	/* Up, while the rest of the word has nothing. */
	for (;;) {
		word = tree->level[k][from / BIT_TREE_WORD] & ~UINT64_C(0) << from % BIT_TREE_WORD;
		if (word)
			break;
		if (++k == tree->nr_levels)
			return BIT_TREE_NONE;
		/* At most one past the level's bits: that still is the word of zeros at its end. */
		from = from / BIT_TREE_WORD + 1;
	}
	/* Down, by the first bit each time. */
	for (;;) {
		from = from / BIT_TREE_WORD * BIT_TREE_WORD + (uint64_t)__builtin_ctzll(word);
		if (!k)
			return from;
		word = tree->level[--k][from];
		from *= BIT_TREE_WORD;
	}
}

/* Length of the run of members that begins at `begin`, at most `limit`. */
static inline uint64_t bit_tree_run(const struct bit_tree *tree, uint64_t begin, uint64_t limit)
{
	uint64_t length = 0;

	while (length < limit) {
		uint64_t at = begin + length;
		uint64_t absent = ~tree->level[0][at / BIT_TREE_WORD] >> at % BIT_TREE_WORD;

		if (absent) {
			length += (uint64_t)__builtin_ctzll(absent);
			break;
		}
		length += BIT_TREE_WORD - at % BIT_TREE_WORD;
	}
	return length < limit ? length : limit;
}

#endif
