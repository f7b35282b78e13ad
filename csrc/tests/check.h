/* SPDX-License-Identifier: Apache-2.0 */
/**
 * What every C test shares: a check that stays on in every build and says where it failed, and a
 * generator that gives the same numbers for the same seed everywhere.
 *
 * A test takes its seed from THINPOOL_SEED (decimal, not 0) and prints it, so that a failure can be
 * repeated.
 */
#ifndef THINPOOL_TESTS_CHECK_H
#define THINPOOL_TESTS_CHECK_H

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                           \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);    \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

/* Both are evaluated once and printed. */
#define CHECK_EQUAL(found, wanted)                                                                 \
	do {                                                                                       \
		int64_t found_ = (int64_t)(found);                                                 \
		int64_t wanted_ = (int64_t)(wanted);                                               \
		if (found_ != wanted_) {                                                           \
			fprintf(stderr, "%s:%d: %s is %" PRId64 ", wanted %" PRId64 "\n",          \
				__FILE__, __LINE__, #found, found_, wanted_);                      \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

static inline uint64_t test_seed(void)
{
	const char *text = getenv("THINPOOL_SEED");
	uint64_t seed = text ? strtoull(text, NULL, 10) : 1;

	if (!seed)
		seed = 1;
	printf("THINPOOL_SEED=%" PRIu64 "\n", seed);
	return seed * UINT64_C(0x9E3779B97F4A7C15);
}

/* xorshift64*; *state is never 0. */
static inline uint64_t test_random(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * UINT64_C(0x2545F4914F6CDD1D);
}

/* Below limit, which is not 0. */
static inline uint64_t test_random_below(uint64_t *state, uint64_t limit)
{
	return test_random(state) % limit;
}

#endif
