/* SPDX-License-Identifier: Apache-2.0 */
/**
 * Filling a struct tp_error, and assertions that stay on in every build.
 *
 * Bytes from disk, the kernel or a caller are validated and yield a status; TP_ASSERT is for our
 * own mistakes only. Plain assert() would vanish: CPython passes -DNDEBUG to extensions.
 */
#ifndef THINPOOL_ERROR_H
#define THINPOOL_ERROR_H

#include "thinpool/abi.h"

#define TP_NO_BLOCK UINT64_MAX

/* All return `status`, so that a caller can write: return tp_fail(err, TP_E_INVALID, "..."). */
int tp_fail(struct tp_error *err, int status, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
/* With the block concerned, and what stood there and what was wanted. */
int tp_fail_block(struct tp_error *err, int status, uint64_t block, uint64_t found, uint64_t wanted,
		  const char *format, ...) __attribute__((format(printf, 6, 7)));
/* With the host's errno, whose text is appended. */
int tp_fail_errno(struct tp_error *err, int status, int host_errno, const char *format, ...)
	__attribute__((format(printf, 4, 5)));
/* No error: for a struct reused over several calls. */
void tp_error_clear(struct tp_error *err);

_Noreturn void tp_assert_failed(const char *condition, const char *file, int line);

#define TP_ASSERT(condition)                                                                       \
	do {                                                                                       \
		if (__builtin_expect(!(condition), 0))                                             \
			tp_assert_failed(#condition, __FILE__, __LINE__);                          \
	} while (0)

#ifdef TP_DEBUG
#define TP_DEBUG_ASSERT(condition) TP_ASSERT(condition)
#else
#define TP_DEBUG_ASSERT(condition)                                                                 \
	do {                                                                                       \
	} while (0)
#endif

#endif
