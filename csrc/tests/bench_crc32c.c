/* SPDX-License-Identifier: Apache-2.0 */
/* Prints what each CRC-32C implementation does on a metadata block hot in cache. No test: marks are
 * not asserted. */
#include "thinpool/abi.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#define ROUNDS 30
#define CALLS  5000

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static uint32_t call(const char *name, uint32_t crc, const unsigned char *data, size_t length)
{
	if (!name)
		return tp_crc32c(crc, data, length);
	tp_crc32c_with(name, crc, data, length, &crc);
	return crc;
}

/* name NULL: tp_crc32c itself, its choice included. The best round counts: the rest is others'. */
static void measure(const char *name, const unsigned char *data, size_t length)
{
	double best = 1e9;
	uint32_t crc = 0;

	if (name && tp_crc32c_with(name, crc, data, length, &crc))
		return;
	for (int round = 0; round < ROUNDS; round++) {
		double begin = seconds();
		double took;

		/* Each call starts from the last one's result: latency, as a caller sees it. */
		for (int i = 0; i < CALLS; i++)
			crc = call(name, crc, data, length);
		took = (seconds() - begin) / CALLS;
		if (took < best)
			best = took;
	}
	printf("%-10s %5zu bytes: %6.1f ns, %6.1f GB/s (%08x)\n", name ? name : "tp_crc32c", length,
	       best * 1e9, (double)length / best * 1e-9, crc);
}

int main(void)
{
	static const char *const names[] = { "portable", "sse4.2", "avx512", NULL };
	static _Alignas(4096) unsigned char block[4096];

	memset(block, 0x5a, sizeof(block));
	printf("tp_crc32c uses %s\n", tp_crc32c_implementation());
	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		measure(names[i], block + 4, 4092);
		measure(names[i], block, 4096);
	}
	return 0;
}
