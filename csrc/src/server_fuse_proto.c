/* SPDX-License-Identifier: Apache-2.0 */
/* Decoding and answering without side effects: what hostile bytes meet first. */
#include "server_fuse.h"

#include <errno.h>
#include <string.h>

/* The fixed part that follows the header, for the requests we serve. SIZE_UNKNOWN: any. */
#define SIZE_UNKNOWN UINT32_MAX

static uint32_t argument_size(uint32_t opcode)
{
	switch (opcode) {
	case FUSE_INIT:
		/* Kernels before 7.36 send 16 bytes; what lies behind them is not read then. */
		return 16;
	case FUSE_GETATTR:
		return sizeof(struct fuse_getattr_in);
	case FUSE_SETATTR:
		return sizeof(struct fuse_setattr_in);
	case FUSE_OPEN:
	case FUSE_OPENDIR:
		return sizeof(struct fuse_open_in);
	case FUSE_READ:
	case FUSE_READDIR:
	case FUSE_READDIRPLUS:
		return sizeof(struct fuse_read_in);
	case FUSE_WRITE:
		return sizeof(struct fuse_write_in);
	case FUSE_FALLOCATE:
		return sizeof(struct fuse_fallocate_in);
	case FUSE_LSEEK:
		return sizeof(struct fuse_lseek_in);
	case FUSE_ACCESS:
		return sizeof(struct fuse_access_in);
	case FUSE_FLUSH:
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
	case FUSE_FSYNC:
	case FUSE_FSYNCDIR:
	case FUSE_STATFS:
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
	case FUSE_INTERRUPT:
	case FUSE_DESTROY:
		return 0; /* nothing of theirs is looked at */
	case FUSE_LOOKUP:
		return 1;
	default:
		return SIZE_UNKNOWN;
	}
}

int tp_fuse_decode(const void *bytes, size_t length, struct tp_fuse_request *request_ret)
{
	const struct fuse_in_header *header = bytes;
	const struct fuse_write_in *write;
	size_t argument_length;
	uint32_t wanted;

	memset(request_ret, 0, sizeof(*request_ret));
	if (length < sizeof(*header) || header->len != length)
		return -EIO;
	request_ret->header = header;
	request_ret->arg = header + 1;
	argument_length = length - sizeof(*header);
	wanted = argument_size(header->opcode);
	if (wanted == SIZE_UNKNOWN)
		return -ENOSYS;
	if (argument_length < wanted)
		return -EINVAL;
	if (header->opcode == FUSE_WRITE) {
		write = request_ret->arg;
		if (write->size > FUSE_MAX_IO || argument_length - sizeof(*write) != write->size)
			return -EINVAL;
		request_ret->payload = write->size;
	}
	if (header->opcode == FUSE_LOOKUP) {
		request_ret->name = request_ret->arg;
		if (!memchr(request_ret->name, 0, argument_length))
			return -EINVAL;
	}
	return 0;
}

int tp_fuse_errno(int status, int host_errno)
{
	switch (status) {
	case TP_OK:
		return 0;
	case TP_E_DATA_SPACE:
	case TP_E_METADATA_SPACE:
		return ENOSPC;
	case TP_E_READ_ONLY:
		return EROFS;
	case TP_E_NO_MEMORY:
		return ENOMEM;
	case TP_E_INVALID:
	case TP_E_ALIGNMENT:
	case TP_E_OUT_OF_RANGE:
		return EINVAL;
	case TP_E_NOT_SUPPORTED:
		return EOPNOTSUPP;
	case TP_E_KEY_NOT_FOUND:
		return ENXIO;
	case TP_E_IO:
		/* Only what a disk can say; EAGAIN or EINTR would be repeated for ever above. */
		return host_errno == ENOSPC || host_errno == EDQUOT ? ENOSPC : EIO;
	default:
		return EIO;
	}
}

int tp_fuse_negotiate(const struct fuse_init_in *in, uint16_t max_background,
		      struct fuse_init_out *out)
{
	const uint32_t wanted = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO |
				FUSE_MAX_PAGES | FUSE_PARALLEL_DIROPS | FUSE_DO_READDIRPLUS |
				FUSE_READDIRPLUS_AUTO;

	memset(out, 0, sizeof(*out));
	out->major = FUSE_KERNEL_VERSION;
	out->minor = FUSE_KERNEL_MINOR_VERSION;
	/* 7.31 is Linux 5.4; older ones lack what a fast direct file needs. */
	if (in->major < FUSE_KERNEL_VERSION || (in->major == FUSE_KERNEL_VERSION && in->minor < 31))
		return -EPROTO;
	if (in->major > FUSE_KERNEL_VERSION)
		return 0; /* the kernel asks again with our major */
	if (in->minor < out->minor)
		out->minor = in->minor;
	out->max_readahead = in->max_readahead;
	out->flags = in->flags & wanted;
	out->max_background = max_background;
	out->congestion_threshold = max_background;
	out->max_write = FUSE_MAX_IO;
	out->max_pages = FUSE_MAX_IO / FUSE_PAGE;
	out->time_gran = 1;
	return 0;
}
