/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A thread's life beside a commit: a wake-up, a flush, a word that it is done. Woken on a processor
 * that was asleep, an interpreter took as long to get there as the flush itself does.
 */
#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "thinpool/abi.h"
#include "thinpool/error.h"

int tp_flush_when_due(int32_t fd, int32_t due_fd, int32_t ended_fd, struct tp_error *err)
{
	eventfd_t due;

	for (;;) {
		while (eventfd_read(due_fd, &due))
			if (errno != EINTR)
				return tp_fail_errno(err, TP_E_INVALID, errno, "no eventfd");
		if (due != 1)
			return tp_fail(err, TP_E_CLOSED, "no flush is due any more");
		while (fdatasync(fd))
			if (errno != EINTR)
				return tp_fail_errno(err, TP_E_IO, errno, "a flush failed");
		if (ended_fd < 0)
			return 0;
		if (eventfd_write(ended_fd, 1))
			return tp_fail_errno(err, TP_E_INVALID, errno, "no eventfd");
	}
}
