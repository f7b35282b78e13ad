/* SPDX-License-Identifier: Apache-2.0 */
/* Dispatch, and the checks that every device shares: see bdev.h. */
#include "thinpool/bdev.h"
#include "thinpool/error.h"

#include <inttypes.h>

static int check_range(const struct tp_bdev *bdev, const char *what, uint64_t offset,
		       uint64_t length, struct tp_error *err)
{
	uint64_t size = bdev->ops->size(bdev);

	if ((offset | length) & (bdev->io_align - 1))
		return tp_fail(err, TP_E_ALIGNMENT,
			       "%s of %" PRIu64 " bytes at %" PRIu64
			       ": both must be multiples of %" PRIu32,
			       what, length, offset, bdev->io_align);
	if (offset > size || length > size - offset)
		return tp_fail_block(err, TP_E_OUT_OF_RANGE, TP_NO_BLOCK, offset, size,
				     "%s of %" PRIu64 " bytes at %" PRIu64
				     ": the %s device ends at %" PRIu64,
				     what, length, offset, bdev->ops->name, size);
	return 0;
}

static int check_writable(const struct tp_bdev *bdev, const char *what, struct tp_error *err)
{
	if (bdev->read_only)
		return tp_fail(err, TP_E_READ_ONLY, "%s: the %s device was opened read-only", what,
			       bdev->ops->name);
	return 0;
}

void tp_bdev_close(struct tp_bdev *bdev)
{
	if (bdev)
		bdev->ops->close(bdev);
}

int tp_bdev_read(struct tp_bdev *bdev, uint64_t offset, void *buffer, size_t length,
		 struct tp_error *err)
{
	int status = check_range(bdev, "read", offset, length, err);

	if (status || !length)
		return status;
	return bdev->ops->read(bdev, offset, buffer, length, err);
}

int tp_bdev_write(struct tp_bdev *bdev, uint64_t offset, const void *buffer, size_t length,
		  struct tp_error *err)
{
	int status = check_writable(bdev, "write", err);

	if (!status)
		status = check_range(bdev, "write", offset, length, err);
	if (status || !length)
		return status;
	return bdev->ops->write(bdev, offset, buffer, length, err);
}

int tp_bdev_flush(struct tp_bdev *bdev, struct tp_error *err)
{
	/* A read-only device has nothing of ours to lose. */
	if (bdev->read_only)
		return 0;
	return bdev->ops->flush(bdev, err);
}

int tp_bdev_punch(struct tp_bdev *bdev, uint64_t offset, uint64_t length, struct tp_error *err)
{
	int status = check_writable(bdev, "punch", err);

	if (!status)
		status = check_range(bdev, "punch", offset, length, err);
	if (status || !length)
		return status;
	if (!bdev->can_punch)
		return tp_fail(err, TP_E_NOT_SUPPORTED,
			       "punch: the %s device cannot deallocate and then read as zeros",
			       bdev->ops->name);
	return bdev->ops->punch(bdev, offset, length, err);
}

int tp_bdev_write_hole(struct tp_bdev *bdev, uint64_t offset, const void *buffer, size_t length,
		       struct tp_error *err)
{
	int status;

	if (!bdev->ops->write_hole)
		return tp_bdev_write(bdev, offset, buffer, length, err);
	status = check_writable(bdev, "write", err);
	if (!status)
		status = check_range(bdev, "write", offset, length, err);
	if (status || !length)
		return status;
	return bdev->ops->write_hole(bdev, offset, buffer, length, err);
}

int tp_bdev_allocate(struct tp_bdev *bdev, uint64_t offset, uint64_t length, struct tp_error *err)
{
	int status = check_writable(bdev, "allocate", err);

	if (!status)
		status = check_range(bdev, "allocate", offset, length, err);
	if (status || !length)
		return status;
	if (!bdev->ops->allocate)
		return tp_fail(err, TP_E_NOT_SUPPORTED,
			       "allocate: the %s device has no space to give ahead",
			       bdev->ops->name);
	return bdev->ops->allocate(bdev, offset, length, err);
}

int tp_bdev_resize(struct tp_bdev *bdev, uint64_t size, struct tp_error *err)
{
	int status = check_writable(bdev, "resize", err);

	if (status)
		return status;
	if (size & (bdev->io_align - 1))
		return tp_fail(err, TP_E_ALIGNMENT,
			       "resize to %" PRIu64 ": must be a multiple of %" PRIu32, size,
			       bdev->io_align);
	if (size > INT64_MAX)
		return tp_fail(err, TP_E_INVALID, "resize to %" PRIu64 ": too large", size);
	return bdev->ops->resize(bdev, size, err);
}

uint64_t tp_bdev_size(const struct tp_bdev *bdev)
{
	return bdev->ops->size(bdev);
}

uint32_t tp_bdev_io_align(const struct tp_bdev *bdev)
{
	return bdev->io_align;
}

uint32_t tp_bdev_can_punch(const struct tp_bdev *bdev)
{
	return bdev->can_punch;
}

int tp_bdev_next_data(struct tp_bdev *bdev, uint64_t offset, uint64_t *begin_ret, uint64_t *end_ret,
		      struct tp_error *err)
{
	uint64_t size = bdev->ops->size(bdev);

	if (offset > size)
		return tp_fail_block(err, TP_E_OUT_OF_RANGE, TP_NO_BLOCK, offset, size,
				     "search for data from %" PRIu64
				     ": the %s device ends at %" PRIu64,
				     offset, bdev->ops->name, size);
	return bdev->ops->next_data(bdev, offset, begin_ret, end_ret, err);
}
