/* SPDX-License-Identifier: Apache-2.0 */
/**
 * The implementations behind tp_crc32c(). All compute the same function, for any alignment and
 * length; those for x86 may be called only where crc32c.c finds that the processor has what they
 * need. Pure functions, no state, thread-safe.
 */
#ifndef THINPOOL_SRC_CRC32C_H
#define THINPOOL_SRC_CRC32C_H

#include <stddef.h>
#include <stdint.h>

uint32_t tp_crc32c_portable(uint32_t crc, const void *data, size_t length);

#ifdef __x86_64__
/* Needs SSE4.2 and PCLMULQDQ. */
uint32_t tp_crc32c_sse42(uint32_t crc, const void *data, size_t length);
/* Needs those and AVX-512 F, BW, VBMI2 and VPCLMULQDQ. */
uint32_t tp_crc32c_avx512(uint32_t crc, const void *data, size_t length);
#endif

#endif
