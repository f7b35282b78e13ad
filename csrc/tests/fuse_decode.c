/* SPDX-License-Identifier: Apache-2.0 */
/* Hostile and short requests against the decoder; what INIT settles; which errno a status shows. */
#include "server_fuse.h"
#include "thinpool/error.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void put_header(unsigned char *bytes, uint32_t length, uint32_t opcode)
{
	struct fuse_in_header header = {
		.len = length, .opcode = opcode, .unique = 2, .nodeid = FUSE_ROOT_ID
	};

	memcpy(bytes, &header, sizeof(header));
}

static void test_length_must_be_what_was_read(void)
{
	unsigned char bytes[256] = { 0 };
	struct tp_fuse_request request;
	size_t length;

	put_header(bytes, 128, FUSE_STATFS);
	for (length = 0; length < sizeof(bytes); length++)
		TP_ASSERT(tp_fuse_decode(bytes, length, &request) == (length == 128 ? 0 : -EIO));
}

static void test_short_arguments_are_refused(void)
{
	static const struct {
		uint32_t opcode;
		uint32_t size;
	} wanted[] = {
		{ FUSE_READ, sizeof(struct fuse_read_in) },
		{ FUSE_WRITE, sizeof(struct fuse_write_in) },
		{ FUSE_FALLOCATE, sizeof(struct fuse_fallocate_in) },
		{ FUSE_LSEEK, sizeof(struct fuse_lseek_in) },
		{ FUSE_OPEN, sizeof(struct fuse_open_in) },
		{ FUSE_SETATTR, sizeof(struct fuse_setattr_in) },
		{ FUSE_GETATTR, sizeof(struct fuse_getattr_in) },
		{ FUSE_INIT, 16 },
	};
	struct tp_fuse_request request;
	uint32_t i, size;

	for (i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
		for (size = 0; size <= wanted[i].size; size++) {
			/* Exactly as long as it says, so that a read past the end is seen. */
			uint32_t length = (uint32_t)sizeof(struct fuse_in_header) + size;
			unsigned char *bytes = calloc(1, length);
			int status;

			TP_ASSERT(bytes);
			put_header(bytes, length, wanted[i].opcode);
			status = tp_fuse_decode(bytes, length, &request);
			TP_ASSERT(status == (size == wanted[i].size ? 0 : -EINVAL));
			free(bytes);
		}
	}
}

static void test_payload_must_be_as_long_as_it_says(void)
{
	unsigned char bytes[FUSE_HEAD + 512] = { 0 };
	struct fuse_write_in *write = (void *)(bytes + sizeof(struct fuse_in_header));
	struct tp_fuse_request request;

	put_header(bytes, sizeof(bytes), FUSE_WRITE);
	write->size = 512;
	TP_ASSERT(tp_fuse_decode(bytes, sizeof(bytes), &request) == 0);
	TP_ASSERT(request.payload == 512);
	write->size = 513;
	TP_ASSERT(tp_fuse_decode(bytes, sizeof(bytes), &request) == -EINVAL);
	write->size = 511;
	TP_ASSERT(tp_fuse_decode(bytes, sizeof(bytes), &request) == -EINVAL);
	write->size = UINT32_MAX;
	TP_ASSERT(tp_fuse_decode(bytes, sizeof(bytes), &request) == -EINVAL);
}

static void test_names_must_end(void)
{
	unsigned char bytes[sizeof(struct fuse_in_header) + 4];
	struct tp_fuse_request request;

	put_header(bytes, sizeof(bytes), FUSE_LOOKUP);
	memcpy(bytes + sizeof(struct fuse_in_header), "id-1", 4);
	TP_ASSERT(tp_fuse_decode(bytes, sizeof(bytes), &request) == -EINVAL);
	bytes[sizeof(bytes) - 1] = 0;
	TP_ASSERT(tp_fuse_decode(bytes, sizeof(bytes), &request) == 0);
	TP_ASSERT(strcmp(request.name, "id-") == 0);
}

static void test_noise_is_survived(unsigned seed)
{
	struct tp_fuse_request request;
	unsigned round, i;

	for (round = 0; round < 200000; round++) {
		size_t length = (size_t)rand_r(&seed) % 160;
		unsigned char *bytes = malloc(length ? length : 1);

		TP_ASSERT(bytes);
		for (i = 0; i < length; i++)
			bytes[i] = (unsigned char)rand_r(&seed);
		if (length >= sizeof(struct fuse_in_header) && round % 4)
			put_header(bytes, (uint32_t)length, (uint32_t)rand_r(&seed) % 60);
		if (tp_fuse_decode(bytes, length, &request) == 0 &&
		    request.header->opcode == FUSE_LOOKUP)
			TP_ASSERT(strlen(request.name) < length);
		free(bytes);
	}
}

static void test_init_takes_the_smaller_minor(void)
{
	struct fuse_init_in in = { .major = 7, .minor = 31, .flags = UINT32_MAX };
	struct fuse_init_out out;

	TP_ASSERT(tp_fuse_negotiate(&in, 96, &out) == 0);
	TP_ASSERT(out.major == 7 && out.minor == 31);
	TP_ASSERT(out.max_write == FUSE_MAX_IO && out.max_background == 96);
	TP_ASSERT((out.flags & FUSE_ASYNC_DIO) && (out.flags & FUSE_MAX_PAGES));
	TP_ASSERT(!(out.flags & (FUSE_WRITEBACK_CACHE | FUSE_ATOMIC_O_TRUNC)));
	in.minor = 99;
	TP_ASSERT(tp_fuse_negotiate(&in, 96, &out) == 0);
	TP_ASSERT(out.minor == FUSE_KERNEL_MINOR_VERSION);
	in.flags = 0;
	TP_ASSERT(tp_fuse_negotiate(&in, 96, &out) == 0 && out.flags == 0);
	in.major = 8;
	TP_ASSERT(tp_fuse_negotiate(&in, 96, &out) == 0 && out.major == 7);
	in.major = 7;
	in.minor = 30;
	TP_ASSERT(tp_fuse_negotiate(&in, 96, &out) == -EPROTO);
}

static void test_statuses_show_as_a_disk_would(void)
{
	TP_ASSERT(tp_fuse_errno(TP_OK, 0) == 0);
	TP_ASSERT(tp_fuse_errno(TP_E_DATA_SPACE, 0) == ENOSPC);
	TP_ASSERT(tp_fuse_errno(TP_E_METADATA_SPACE, 0) == ENOSPC);
	TP_ASSERT(tp_fuse_errno(TP_E_READ_ONLY, 0) == EROFS);
	TP_ASSERT(tp_fuse_errno(TP_E_IO, EIO) == EIO);
	TP_ASSERT(tp_fuse_errno(TP_E_IO, EAGAIN) == EIO);
	TP_ASSERT(tp_fuse_errno(TP_E_IO, EDQUOT) == ENOSPC);
	TP_ASSERT(tp_fuse_errno(TP_E_POOL_FAILED, 0) == EIO);
	TP_ASSERT(tp_fuse_errno(TP_E_BLOCK_CHECKSUM, 0) == EIO);
}

int main(int argc, char **argv)
{
	unsigned seed = argc > 1 ? (unsigned)strtoul(argv[1], NULL, 0) : 1;

	printf("seed %u\n", seed);
	test_length_must_be_what_was_read();
	test_short_arguments_are_refused();
	test_payload_must_be_as_long_as_it_says();
	test_names_must_end();
	test_noise_is_survived(seed);
	test_init_takes_the_smaller_minor();
	test_statuses_show_as_a_disk_would();
	return 0;
}
