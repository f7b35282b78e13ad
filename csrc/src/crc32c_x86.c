/* SPDX-License-Identifier: Apache-2.0 */
/*
 * CRC-32C by the x86 CRC32 instruction, and by carry-less multiplication of wide registers.
 *
 * Algebra, once for all constants below. Everything is bit-reflected: in a register of w bits, bit
 * m stands for x^(w-1-m). P is the polynomial 0x1EDC6F41 with its leading x^32.
 *
 *  - A carry-less product of registers of 64 bits has 127 bits in a register of 128, so that it
 *    comes out multiplied by x once too often; constants are one power lower for it.
 *  - CRC32 of a 64-bit word W from state 0 is W * x^32 mod P.
 *  - So CRC32(0, clmul(crc, K)) with a K of 32 bits is crc * K * x^33 mod P: a state moves over L
 *    bytes of zeros with K = x^(8L - 33) mod P. (LANE_CONSTANTS)
 *  - A 128-bit register moves forward by D bits as low * x^(D+64) + high * x^D. A constant of 32
 *    bits in the upper half of a 64-bit register makes the low one K = x^(D+63), the high one
 *    K = x^(D-1) mod P. (FOLD)
 *
 * tests/base/test_crc32c.py computes these constants again from P.
 */
#ifdef __x86_64__

#include "crc32c.h"

#include <immintrin.h>
#include <string.h>

#define SSE42  __attribute__((target("sse4.2,pclmul")))
#define AVX512 __attribute__((target("sse4.2,pclmul,avx512f,avx512bw,avx512vbmi2,vpclmulqdq")))
#define ALWAYS_INLINE static inline __attribute__((always_inline))

SSE42 ALWAYS_INLINE uint64_t load64(const unsigned char *at)
{
	uint64_t word;

	memcpy(&word, at, sizeof(word));
	return word;
}

SSE42 ALWAYS_INLINE uint32_t serial(uint32_t crc, const unsigned char *at, size_t length)
{
	uint64_t state = crc;
	uint32_t narrow;

	for (; length >= 8; length -= 8, at += 8)
		state = _mm_crc32_u64(state, load64(at));
	narrow = (uint32_t)state;
	if (length & 4) {
		uint32_t word;

		memcpy(&word, at, sizeof(word));
		narrow = _mm_crc32_u32(narrow, word);
		at += 4;
	}
	if (length & 2) {
		uint16_t word;

		memcpy(&word, at, sizeof(word));
		narrow = _mm_crc32_u16(narrow, word);
		at += 2;
	}
	if (length & 1)
		narrow = _mm_crc32_u8(narrow, *at);
	return narrow;
}

SSE42 ALWAYS_INLINE __m128i state_times(uint64_t state, uint32_t constant)
{
	return _mm_clmulepi64_si128(_mm_cvtsi32_si128((int)(uint32_t)state),
				    _mm_cvtsi32_si128((int)constant), 0);
}

/*
 * The instruction answers after three cycles and starts every cycle: three lanes of `lane` bytes
 * keep it busy. The states of the first two move over what follows them on the way into the last
 * word of the third. `over_one` and `over_two` are x^(8 * lane - 33) and x^(16 * lane - 33) mod P.
 */
SSE42 ALWAYS_INLINE uint32_t three_lanes(uint32_t crc, const unsigned char *at, size_t lane,
					 uint32_t over_one, uint32_t over_two)
{
	uint64_t a = crc;
	uint64_t b = 0;
	uint64_t c = 0;
	uint64_t moved;
	size_t i;

	for (i = 0; i < lane - 8; i += 8) {
		a = _mm_crc32_u64(a, load64(at + i));
		b = _mm_crc32_u64(b, load64(at + lane + i));
		c = _mm_crc32_u64(c, load64(at + 2 * lane + i));
	}
	a = _mm_crc32_u64(a, load64(at + i));
	b = _mm_crc32_u64(b, load64(at + lane + i));
	moved = (uint64_t)_mm_cvtsi128_si64(
		_mm_xor_si128(state_times(a, over_two), state_times(b, over_one)));
	return (uint32_t)_mm_crc32_u64(c, load64(at + 2 * lane + i) ^ moved);
}

/* Three lanes of 1360 are all of a metadata block, with or without its checksum, but 12 or 16
 * bytes. */
#define LONG_LANE       1360
#define LONG_OVER_ONE   0x3f70cc6fU
#define LONG_OVER_TWO   0x5aa1f3cfU
#define MIDDLE_LANE     336
#define MIDDLE_OVER_ONE 0xa60ce07bU
#define MIDDLE_OVER_TWO 0xcec3662eU
#define SHORT_LANE      64
#define SHORT_OVER_ONE  0x9e4addf8U
#define SHORT_OVER_TWO  0x0d3b6092U

SSE42 uint32_t tp_crc32c_sse42(uint32_t crc, const void *data, size_t length)
{
	const unsigned char *at = data;

	while (length >= 3 * LONG_LANE) {
		crc = three_lanes(crc, at, LONG_LANE, LONG_OVER_ONE, LONG_OVER_TWO);
		at += 3 * LONG_LANE;
		length -= 3 * LONG_LANE;
	}
	while (length >= 3 * MIDDLE_LANE) {
		crc = three_lanes(crc, at, MIDDLE_LANE, MIDDLE_OVER_ONE, MIDDLE_OVER_TWO);
		at += 3 * MIDDLE_LANE;
		length -= 3 * MIDDLE_LANE;
	}
	while (length >= 3 * SHORT_LANE) {
		crc = three_lanes(crc, at, SHORT_LANE, SHORT_OVER_ONE, SHORT_OVER_TWO);
		at += 3 * SHORT_LANE;
		length -= 3 * SHORT_LANE;
	}
	return serial(crc, at, length);
}

#define WIDE     64         /* bytes in a register */
#define FOLD_MIN (4 * WIDE) /* below that the lanes are as fast */

/* The two constants of a fold by D bits: x^(D+63) and x^(D-1) mod P, in upper halves. */
#define FOLD_HALF(k)   ((long long)((uint64_t)(k) << 32))
#define FOLD_2048_LOW  FOLD_HALF(0xe9a5d8beU)
#define FOLD_2048_HIGH FOLD_HALF(0x1426a815U)
#define FOLD_1536_LOW  FOLD_HALF(0x7ccbbbf2U)
#define FOLD_1536_HIGH FOLD_HALF(0x31c94608U)
#define FOLD_1024_LOW  FOLD_HALF(0x6577b245U)
#define FOLD_1024_HIGH FOLD_HALF(0x7417153fU)
#define FOLD_512_LOW   FOLD_HALF(0x1c19243bU)
#define FOLD_512_HIGH  FOLD_HALF(0x75bba45bU)
#define FOLD_384_LOW   FOLD_HALF(0xa46ef4aaU)
#define FOLD_384_HIGH  FOLD_HALF(0x6051243fU)
#define FOLD_256_LOW   FOLD_HALF(0x33ccbbbcU)
#define FOLD_256_HIGH  FOLD_HALF(0xa2158b34U)
#define FOLD_128_LOW   FOLD_HALF(0x3743f7bdU)
#define FOLD_128_HIGH  FOLD_HALF(0x3171d430U)

AVX512 ALWAYS_INLINE __m512i both(long long low, long long high)
{
	return _mm512_set_epi64(high, low, high, low, high, low, high, low);
}

/* value moved forward by the distance of the constants, plus next. */
AVX512 ALWAYS_INLINE __m512i fold(__m512i value, __m512i constants, __m512i next)
{
	/* 0x96: the exclusive or of all three */
	return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(value, constants, 0x00),
					 _mm512_clmulepi64_epi128(value, constants, 0x11), next,
					 0x96);
}

/* The CRC, from state 0, of the bytes that the register stands for. */
AVX512 ALWAYS_INLINE uint32_t reduce(__m512i value)
{
	const __m512i constants = _mm512_set_epi64(0, 0, FOLD_128_HIGH, FOLD_128_LOW, FOLD_256_HIGH,
						   FOLD_256_LOW, FOLD_384_HIGH, FOLD_384_LOW);
	/* The last quarter stays where it is; its constants make nothing of it. */
	__m512i moved = fold(value, constants, _mm512_maskz_mov_epi64(0xc0, value));
	__m256i halves = _mm256_xor_si256(_mm512_castsi512_si256(moved),
					  _mm512_extracti64x4_epi64(moved, 1));
	__m128i last =
		_mm_xor_si128(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
	uint64_t state = _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(last));

	return (uint32_t)_mm_crc32_u64(state, (uint64_t)_mm_extract_epi64(last, 1));
}

/*
 * Bytes before the data count as zeros, and zeros leave a state of 0 alone: so the first load
 * starts at a cache line's begin with what lies before the data masked off, and every later one is
 * aligned. A metadata block without its checksum (4092 bytes at 4) is then 16 rounds and no rest.
 * The initial state goes, as always, into the first four bytes of data.
 */
AVX512 uint32_t tp_crc32c_avx512(uint32_t crc, const void *data, size_t length)
{
	const unsigned char *at = data;
	size_t before = (uintptr_t)at % WIDE;
	__mmask64 wanted;
	__m512i state;
	__m512i a;
	__m512i b;
	__m512i c;
	__m512i d;

	if (length < FOLD_MIN + WIDE)
		return tp_crc32c_sse42(crc, data, length);
	if (before > WIDE - sizeof(crc)) {
		/* The state would straddle two registers. */
		crc = serial(crc, at, WIDE - before);
		at += WIDE - before;
		length -= WIDE - before;
		before = 0;
	}
	wanted = ~UINT64_C(0) << before;
	at = (const unsigned char *)((uintptr_t)at - before);
	length += before;
	state = _mm512_maskz_expand_epi8(wanted,
					 _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
	a = _mm512_xor_si512(_mm512_maskz_loadu_epi8(wanted, at), state);
	b = _mm512_load_si512(at + WIDE);
	c = _mm512_load_si512(at + 2 * WIDE);
	d = _mm512_load_si512(at + 3 * WIDE);
	for (at += FOLD_MIN, length -= FOLD_MIN; length >= FOLD_MIN;
	     at += FOLD_MIN, length -= FOLD_MIN) {
		const __m512i constants = both(FOLD_2048_LOW, FOLD_2048_HIGH);

		a = fold(a, constants, _mm512_load_si512(at));
		b = fold(b, constants, _mm512_load_si512(at + WIDE));
		c = fold(c, constants, _mm512_load_si512(at + 2 * WIDE));
		d = fold(d, constants, _mm512_load_si512(at + 3 * WIDE));
	}
	a = fold(a, both(FOLD_1536_LOW, FOLD_1536_HIGH),
		 fold(b, both(FOLD_1024_LOW, FOLD_1024_HIGH),
		      fold(c, both(FOLD_512_LOW, FOLD_512_HIGH), d)));
	for (; length >= WIDE; at += WIDE, length -= WIDE)
		a = fold(a, both(FOLD_512_LOW, FOLD_512_HIGH), _mm512_load_si512(at));
	return serial(reduce(a), at, length);
}

#else

/* ISO C wants something in a file. */
typedef int tp_crc32c_x86_is_empty;

#endif
