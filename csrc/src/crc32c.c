/* SPDX-License-Identifier: Apache-2.0 */
/*
 * CRC-32C: the portable implementation, and the choice between it and the hardware's.
 *
 * The choice is made in each call, by __builtin_cpu_supports(): a few tests of a word that the
 * compiler's runtime filled in once before main, all of them predicted. Against an ifunc this costs
 * about a nanosecond a block of 4 KiB takes 50 of; it needs no function pointer of ours to
 * initialise (and to get wrong with threads), no help of the dynamic linker, and no resolver that
 * runs before a sanitizer is ready.
 */
#include "crc32c.h"

#include "thinpool/abi.h"

#include <endian.h>
#include <string.h>

/*
 * Slice-by-8. T(s, b) is the CRC of byte b followed by s zero bytes. It is linear in the bits of b,
 * so that eight numbers a slice say it all and the preprocessor writes out the tables.
 */
#define BIT(b, n, value) ((b) >> (n) & 1 ? (value) : 0U)
#define T(b, v0, v1, v2, v3, v4, v5, v6, v7)                                                       \
	(BIT(b, 0, v0) ^ BIT(b, 1, v1) ^ BIT(b, 2, v2) ^ BIT(b, 3, v3) ^ BIT(b, 4, v4) ^           \
	 BIT(b, 5, v5) ^ BIT(b, 6, v6) ^ BIT(b, 7, v7))
#define T4(b, ...)                                                                                 \
	T(b, __VA_ARGS__), T((b) + 1, __VA_ARGS__), T((b) + 2, __VA_ARGS__), T((b) + 3, __VA_ARGS__)
#define T16(b, ...)                                                                                \
	T4(b, __VA_ARGS__), T4((b) + 4, __VA_ARGS__), T4((b) + 8, __VA_ARGS__),                    \
		T4((b) + 12, __VA_ARGS__)
#define T64(b, ...)                                                                                \
	T16(b, __VA_ARGS__), T16((b) + 16, __VA_ARGS__), T16((b) + 32, __VA_ARGS__),               \
		T16((b) + 48, __VA_ARGS__)
#define T256(...)                                                                                  \
	{ T64(0, __VA_ARGS__), T64(64, __VA_ARGS__), T64(128, __VA_ARGS__), T64(192, __VA_ARGS__) }

/* clang-format off */
static const uint32_t table[8][256] = {
	T256(0xf26b8303, 0xe13b70f7, 0xc79a971f, 0x8ad958cf,
	     0x105ec76f, 0x20bd8ede, 0x417b1dbc, 0x82f63b78),
	T256(0x13a29877, 0x274530ee, 0x4e8a61dc, 0x9d14c3b8,
	     0x3fc5f181, 0x7f8be302, 0xff17c604, 0xfbc3faf9),
	T256(0xa541927e, 0x4f6f520d, 0x9edea41a, 0x38513ec5,
	     0x70a27d8a, 0xe144fb14, 0xc76580d9, 0x8b277743),
	T256(0xdd45aab8, 0xbf672381, 0x7b2231f3, 0xf64463e6,
	     0xe964b13d, 0xd725148b, 0xaba65fe7, 0x52a0c93f),
	T256(0x38116fac, 0x7022df58, 0xe045beb0, 0xc5670b91,
	     0x8f2261d3, 0x1ba8b557, 0x37516aae, 0x6ea2d55c),
	T256(0xef306b19, 0xdb8ca0c3, 0xb2f53777, 0x6006181f,
	     0xc00c303e, 0x85f4168d, 0x0e045beb, 0x1c08b7d6),
	T256(0x68032cc8, 0xd0065990, 0xa5e0c5d1, 0x4e2dfd53,
	     0x9c5bfaa6, 0x3d5b83bd, 0x7ab7077a, 0xf56e0ef4),
	T256(0x493c7d27, 0x9278fa4e, 0x211d826d, 0x423b04da,
	     0x847609b4, 0x0d006599, 0x1a00cb32, 0x34019664),
};
/* clang-format on */

uint32_t tp_crc32c_portable(uint32_t crc, const void *data, size_t length)
{
	const unsigned char *at = data;

	for (; length >= 8; length -= 8, at += 8) {
		uint64_t word;

		memcpy(&word, at, sizeof(word));
		word = le64toh(word) ^ crc;
		crc = table[7][word & 255] ^ table[6][word >> 8 & 255] ^
		      table[5][word >> 16 & 255] ^ table[4][word >> 24 & 255] ^
		      table[3][word >> 32 & 255] ^ table[2][word >> 40 & 255] ^
		      table[1][word >> 48 & 255] ^ table[0][word >> 56];
	}
	for (; length; length--)
		crc = crc >> 8 ^ table[0][(crc ^ *at++) & 255];
	return crc;
}

#ifdef __x86_64__

static int have_sse42(void)
{
	return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
}

static int have_avx512(void)
{
	/* The runtime says no to these also where the system does not save the wide registers. */
	return have_sse42() && __builtin_cpu_supports("avx512f") &&
	       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi2") &&
	       __builtin_cpu_supports("vpclmulqdq");
}

#else

static int have_sse42(void)
{
	return 0;
}

static int have_avx512(void)
{
	return 0;
}

#define tp_crc32c_sse42  tp_crc32c_portable
#define tp_crc32c_avx512 tp_crc32c_portable

#endif

uint32_t tp_crc32c(uint32_t crc, const void *data, size_t length)
{
	if (have_avx512())
		return tp_crc32c_avx512(crc, data, length);
	if (have_sse42())
		return tp_crc32c_sse42(crc, data, length);
	return tp_crc32c_portable(crc, data, length);
}

const char *tp_crc32c_implementation(void)
{
	if (have_avx512())
		return "avx512";
	return have_sse42() ? "sse4.2" : "portable";
}

int tp_crc32c_with(const char *implementation, uint32_t crc, const void *data, size_t length,
		   uint32_t *crc_ret)
{
	if (!strcmp(implementation, "portable"))
		*crc_ret = tp_crc32c_portable(crc, data, length);
	else if (!strcmp(implementation, "sse4.2") && have_sse42())
		*crc_ret = tp_crc32c_sse42(crc, data, length);
	else if (!strcmp(implementation, "avx512") && have_avx512())
		*crc_ret = tp_crc32c_avx512(crc, data, length);
	else
		return TP_E_NOT_SUPPORTED;
	return 0;
}
