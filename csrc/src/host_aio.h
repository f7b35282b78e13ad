/* SPDX-License-Identifier: Apache-2.0 */
/**
 * What io_submit(2) can do that no other call does: a blocking write that does not hold the file
 * while the disk works, and a flush that is waited for later.
 *
 * ext4 takes its lock of a file exclusively for direct writes into a hole, and pwrite(2) keeps it
 * until the disk has answered: such writes go one after another, however many threads do them.
 * One that is submitted through io_submit(2) gives the lock back once its blocks are allocated.
 *
 * The kernel's contexts that this needs belong to the process: there are as many as writes ran at
 * once, at most 32, and they end with it. To destroy one takes the kernel tens of milliseconds, so
 * they are not each device's own.
 *
 * Thread-safety: any thread. A child made by fork(2) writes as by pwrite(2).
 */
#ifndef THINPOOL_HOST_AIO_H
#define THINPOOL_HOST_AIO_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Begin fdatasync(2): what tp_host_aio_end is given, or -1 where that cannot be had and nothing was
 * begun. */
int tp_host_aio_fdatasync(int fd);
/* Wait for what was begun, once. 0, or -errno. */
int tp_host_aio_end(int begun);

/* As pwrite(2), which is what it does where there is no asynchronous I/O to be had. What is in
 * flight when the process dies holds the file's description, and with it its flock, until it has
 * ended. */
ssize_t tp_host_aio_pwrite(int fd, const void *buffer, size_t length, uint64_t offset);

#endif
