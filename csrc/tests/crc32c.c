/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every CRC-32C implementation against the definition, on blocks of exactly the length: under a
 * sanitizer a byte read outside is found, in front of the block too.
 */
#include "check.h"

#include "thinpool/abi.h"

#include <string.h>

#define REFLECTED  0x82F63B78U
#define LENGTH_MAX 4500
#define ROUNDS     400

static uint32_t bit_by_bit(uint32_t crc, const unsigned char *data, size_t length)
{
	for (size_t i = 0; i < length; i++) {
		crc ^= data[i];
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? REFLECTED : 0);
	}
	return crc;
}

static void check_all(const unsigned char *data, size_t length, uint32_t start)
{
	static const char *const names[] = { "portable", "sse4.2", "avx512" };
	uint32_t wanted = bit_by_bit(start, data, length);

	CHECK_EQUAL(tp_crc32c(start, data, length), wanted);
	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		uint32_t found;
		int status = tp_crc32c_with(names[i], start, data, length, &found);

		if (status == TP_E_NOT_SUPPORTED) {
			CHECK(i > 0);
			continue;
		}
		CHECK_EQUAL(status, 0);
		CHECK_EQUAL(found, wanted);
	}
}

int main(void)
{
	uint64_t seed = test_seed();

	CHECK_EQUAL(tp_crc32c(UINT32_MAX, "123456789", 9), 0x1cf96d7c);
	for (size_t round = 0; round < ROUNDS; round++) {
		/* All short lengths, then any. */
		size_t length = round < ROUNDS / 2 ? round : test_random_below(&seed, LENGTH_MAX);
		size_t before = test_random_below(&seed, 64);
		unsigned char *room = malloc(before + length);
		unsigned char *data;

		CHECK(room || !(before + length));
		for (size_t i = 0; i < before + length; i++)
			room[i] = (unsigned char)test_random(&seed);
		check_all(room + before, length, (uint32_t)test_random(&seed));
		free(room);
		/* With nothing of ours in front. */
		data = malloc(length);
		CHECK(data || !length);
		for (size_t i = 0; i < length; i++)
			data[i] = (unsigned char)test_random(&seed);
		check_all(data, length, (uint32_t)test_random(&seed));
		free(data);
	}
	return 0;
}
