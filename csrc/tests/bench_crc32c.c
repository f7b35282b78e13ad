/* SPDX-License-Identifier: Apache-2.0 */
/* Prints what each CRC-32C implementation does on a metadata block hot in cache. No test: marks are
 * not asserted. */
#include "thinpool/abi.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#define ROUNDS 400000

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void measure(const char *name, const unsigned char *data, size_t length)
{
	uint32_t crc = 0;
	double begin;
	double took;

	if (tp_crc32c_with(name, crc, data, length, &crc))
		return;
	begin = seconds();
	/* Each call starts from the last one's result: latency, as a caller sees it. */
	for (int i = 0; i < ROUNDS; i++)
		tp_crc32c_with(name, crc, data, length, &crc);
	took = seconds() - begin;
	printf("%-10s %5zu bytes: %6.1f ns, %6.1f GB/s (%08x)\n", name, length, took / ROUNDS * 1e9,
	       (double)length * ROUNDS / took * 1e-9, crc);
}

int main(void)
{
	static const char *const names[] = {"portable", "sse4.2", "avx512"};
	static _Alignas(4096) unsigned char block[4096];

	memset(block, 0x5a, sizeof(block));
	printf("tp_crc32c uses %s\n", tp_crc32c_implementation());
	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		measure(names[i], block + 4, 4092);
		measure(names[i], block, 4096);
	}
	return 0;
}
