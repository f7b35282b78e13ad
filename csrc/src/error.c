/* SPDX-License-Identifier: Apache-2.0 */
#include "thinpool/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void tp_error_clear(struct tp_error *err)
{
	if (!err)
		return;
	memset(err, 0, sizeof(*err));
	err->block = TP_NO_BLOCK;
}

static void fill(struct tp_error *err, int status, const char *format, va_list args)
{
	tp_error_clear(err);
	err->status = status;
	vsnprintf(err->message, sizeof(err->message), format, args);
}

int tp_fail(struct tp_error *err, int status, const char *format, ...)
{
	va_list args;

	if (!err)
		return status;
	va_start(args, format);
	fill(err, status, format, args);
	va_end(args);
	return status;
}

int tp_fail_block(struct tp_error *err, int status, uint64_t block, uint64_t found, uint64_t wanted,
		  const char *format, ...)
{
	va_list args;

	if (!err)
		return status;
	va_start(args, format);
	fill(err, status, format, args);
	va_end(args);
	err->block = block;
	err->found = found;
	err->wanted = wanted;
	return status;
}

int tp_fail_errno(struct tp_error *err, int status, int host_errno, const char *format, ...)
{
	va_list args;
	size_t used;
	char text[64];

	if (!err)
		return status;
	va_start(args, format);
	fill(err, status, format, args);
	va_end(args);
	err->host_errno = host_errno;
	used = strlen(err->message);
	snprintf(err->message + used, sizeof(err->message) - used, ": %s",
		 strerror_r(host_errno, text, sizeof(text)));
	return status;
}

void tp_assert_failed(const char *condition, const char *file, int line)
{
	fprintf(stderr, "thinpool: assertion failed: %s (%s:%d)\n", condition, file, line);
	abort();
}

const char *tp_status_name(int status)
{
	switch ((enum tp_status)status) {
#define NAME(s)                                                                                    \
	case s:                                                                                    \
		return #s
		NAME(TP_OK);
		NAME(TP_E_NO_MEMORY);
		NAME(TP_E_IO);
		NAME(TP_E_OPEN);
		NAME(TP_E_NOT_SUPPORTED);
		NAME(TP_E_INTERRUPTED);
		NAME(TP_E_INVALID);
		NAME(TP_E_ALIGNMENT);
		NAME(TP_E_OUT_OF_RANGE);
		NAME(TP_E_BUSY);
		NAME(TP_E_CLOSED);
		NAME(TP_E_READ_ONLY);
		NAME(TP_E_SUPERBLOCK_MAGIC);
		NAME(TP_E_SUPERBLOCK_CHECKSUM);
		NAME(TP_E_SUPERBLOCK_VERSION);
		NAME(TP_E_SUPERBLOCK_BLOCKNR);
		NAME(TP_E_SUPERBLOCK_FEATURES);
		NAME(TP_E_SUPERBLOCK_GEOMETRY);
		NAME(TP_E_BLOCK_CHECKSUM);
		NAME(TP_E_BLOCK_NUMBER);
		NAME(TP_E_NODE_MALFORMED);
		NAME(TP_E_SPACE_MAP_MALFORMED);
		NAME(TP_E_MAPPING_OUT_OF_RANGE);
		NAME(TP_E_METADATA_TRUNCATED);
		NAME(TP_E_NOT_EMPTY);
		NAME(TP_E_UNFORMATTED);
		NAME(TP_E_NEEDS_CHECK);
		NAME(TP_E_DATA_SPACE);
		NAME(TP_E_METADATA_SPACE);
		NAME(TP_E_VOLUME_NOT_FOUND);
		NAME(TP_E_VOLUME_EXISTS);
		NAME(TP_E_VOLUME_BUSY);
		NAME(TP_E_TRANSACTION_ID);
		NAME(TP_E_METADATA_SNAPSHOT_HELD);
		NAME(TP_E_NO_METADATA_SNAPSHOT);
		NAME(TP_E_LIMIT);
		NAME(TP_E_LOG_FULL);
		NAME(TP_E_POOL_FAILED);
		NAME(TP_E_KEY_NOT_FOUND);
#undef NAME
	}
	return "unknown status";
}
