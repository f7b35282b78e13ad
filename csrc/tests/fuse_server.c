/* SPDX-License-Identifier: Apache-2.0 */
/* The server against a kernel played by this test: a sequenced-packet socket carries requests and
 * answers as /dev/fuse does, so slots, replay and every operation are tested without a mount. */
#include "server_fuse.h"
#include "thinpool/error.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define NR_SLOTS   8u
#define FILE_SIZE  (1u << 20)
#define GENERATION 7u
#define NODE       (1u + FUSE_FIRST_NODE)
#define IO         4096u

struct bench {
	char path[64];
	int file;
	int slots_fd;
	int kernel; /* our end */
	int device; /* the server's */
	struct tp_fuse_server *server;
	pthread_t thread;
	int run_status;
	uint64_t unique;
	uint32_t no_io_uring;
};

static void *runner(void *argument)
{
	struct bench *bench = argument;

	bench->run_status = tp_fuse_server_run(bench->server, NULL);
	return NULL;
}

static void start(struct bench *bench)
{
	const struct tp_fuse_options options = { .trim_ms = 50, .no_io_uring = bench->no_io_uring };
	struct tp_error err;

	TP_ASSERT(tp_fuse_server_create(NULL, &bench->device, 1, bench->slots_fd,
					tp_fuse_slots_size(NR_SLOTS), &options, &bench->server,
					&err) == 0);
	TP_ASSERT(tp_fuse_server_add_linear(bench->server, 1, bench->path, 0, GENERATION, &err) ==
		  0);
	TP_ASSERT(pthread_create(&bench->thread, NULL, runner, bench) == 0);
}

static void stop(struct bench *bench)
{
	tp_fuse_server_stop(bench->server);
	pthread_join(bench->thread, NULL);
	tp_fuse_server_destroy(bench->server);
	bench->server = NULL;
}

static void setup(struct bench *bench, uint32_t no_io_uring)
{
	const int size = 1 << 20;
	int pair[2];

	memset(bench, 0, sizeof(*bench));
	bench->no_io_uring = no_io_uring;
	snprintf(bench->path, sizeof(bench->path), "fuse_server.XXXXXX");
	bench->file = mkstemp(bench->path);
	TP_ASSERT(bench->file >= 0 && ftruncate(bench->file, FILE_SIZE) == 0);
	bench->slots_fd = memfd_create("slots", MFD_CLOEXEC);
	TP_ASSERT(bench->slots_fd >= 0);
	TP_ASSERT(ftruncate(bench->slots_fd, (off_t)tp_fuse_slots_size(NR_SLOTS)) == 0);
	TP_ASSERT(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
	bench->kernel = pair[0];
	bench->device = pair[1];
	setsockopt(bench->kernel, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	setsockopt(bench->device, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
}

static void teardown(struct bench *bench)
{
	close(bench->kernel);
	close(bench->device);
	close(bench->slots_fd);
	close(bench->file);
	unlink(bench->path);
}

static size_t build(struct bench *bench, unsigned char *bytes, uint32_t opcode, uint64_t nodeid,
		    const void *arg, size_t arg_length, const void *payload, size_t payload_length)
{
	struct fuse_in_header header = {
		.len = (uint32_t)(sizeof(header) + arg_length + payload_length),
		.opcode = opcode,
		.unique = bench->unique += 2,
		.nodeid = nodeid,
	};

	memcpy(bytes, &header, sizeof(header));
	memcpy(bytes + sizeof(header), arg, arg_length);
	if (payload_length)
		memcpy(bytes + sizeof(header) + arg_length, payload, payload_length);
	return header.len;
}

static void submit(struct bench *bench, uint32_t opcode, uint64_t nodeid, const void *arg,
		   size_t arg_length, const void *payload, size_t payload_length)
{
	static unsigned char bytes[FUSE_HEAD + (64u << 10)];
	size_t length =
		build(bench, bytes, opcode, nodeid, arg, arg_length, payload, payload_length);

	TP_ASSERT(send(bench->kernel, bytes, length, 0) == (ssize_t)length);
}

/* The error; *length_ret bytes of payload. Answers must come within ten seconds. */
static int receive(struct bench *bench, uint64_t *unique_ret, void *payload, size_t size,
		   size_t *length_ret)
{
	static unsigned char bytes[sizeof(struct fuse_out_header) + (64u << 10)];
	struct pollfd fd = { .fd = bench->kernel, .events = POLLIN };
	struct fuse_out_header header;
	ssize_t n;

	TP_ASSERT(poll(&fd, 1, 10000) == 1);
	n = recv(bench->kernel, bytes, sizeof(bytes), 0);
	TP_ASSERT(n >= (ssize_t)sizeof(header));
	memcpy(&header, bytes, sizeof(header));
	TP_ASSERT(header.len == (uint32_t)n);
	*length_ret = (size_t)n - sizeof(header);
	TP_ASSERT(*length_ret <= size);
	memcpy(payload, bytes + sizeof(header), *length_ret);
	*unique_ret = header.unique;
	return header.error;
}

static unsigned char answer[64u << 10];
static size_t answer_length;

static int ask(struct bench *bench, uint32_t opcode, uint64_t nodeid, const void *arg,
	       size_t arg_length)
{
	uint64_t unique;
	int error;

	submit(bench, opcode, nodeid, arg, arg_length, NULL, 0);
	error = receive(bench, &unique, answer, sizeof(answer), &answer_length);
	TP_ASSERT(unique == bench->unique);
	return error;
}

static int ask_read(struct bench *bench, uint64_t offset, uint32_t size)
{
	struct fuse_read_in in = { .fh = GENERATION, .offset = offset, .size = size };

	return ask(bench, FUSE_READ, NODE, &in, sizeof(in));
}

static int ask_write(struct bench *bench, uint64_t fh, uint64_t offset, const void *data,
		     uint32_t size)
{
	struct fuse_write_in in = { .fh = fh, .offset = offset, .size = size };
	uint64_t unique;
	int error;

	submit(bench, FUSE_WRITE, NODE, &in, sizeof(in), data, size);
	error = receive(bench, &unique, answer, sizeof(answer), &answer_length);
	TP_ASSERT(unique == bench->unique);
	return error;
}

static int ask_fallocate(struct bench *bench, uint32_t mode, uint64_t offset, uint64_t length)
{
	struct fuse_fallocate_in in = {
		.fh = GENERATION, .offset = offset, .length = length, .mode = mode
	};

	return ask(bench, FUSE_FALLOCATE, NODE, &in, sizeof(in));
}

/* ---- tests ---- */

static void test_reads_and_writes_of_any_alignment(struct bench *bench)
{
	static unsigned char data[3 * IO], found[3 * IO];
	uint32_t size;

	memset(data, 0xa5, sizeof(data));
	TP_ASSERT(ask_write(bench, GENERATION, IO, data, IO) == 0);
	TP_ASSERT(((struct fuse_write_out *)answer)->size == IO);
	TP_ASSERT(pread(bench->file, found, IO, IO) == IO && memcmp(found, data, IO) == 0);
	TP_ASSERT(ask_write(bench, GENERATION, 2 * IO + 7, data, 4097) == 0);
	TP_ASSERT(ask_read(bench, 2 * IO, 2 * IO) == 0 && answer_length == 2 * IO);
	TP_ASSERT(answer[6] == 0 && answer[7] == 0xa5 && answer[7 + 4096] == 0xa5 &&
		  answer[7 + 4097] == 0);

	/* At the end: short, then nothing; a disk's error for a write. */
	TP_ASSERT(ask_read(bench, FILE_SIZE - 512, IO) == 0 && answer_length == 512);
	TP_ASSERT(ask_read(bench, FILE_SIZE + IO, IO) == 0 && answer_length == 0);
	TP_ASSERT(ask_write(bench, GENERATION, FILE_SIZE - 512, data, IO) == 0);
	size = ((struct fuse_write_out *)answer)->size;
	TP_ASSERT(size == 512);
	TP_ASSERT(ask_write(bench, GENERATION, FILE_SIZE, data, IO) == -ENOSPC);
	TP_ASSERT(ask_write(bench, GENERATION, UINT64_MAX - 100, data, IO) == -ENOSPC);
	TP_ASSERT(ask_read(bench, UINT64_MAX, IO) == 0 && answer_length == 0);
	/* A handle of an earlier activation. */
	TP_ASSERT(ask_write(bench, GENERATION - 1, 0, data, IO) == -ESTALE);
}

static void test_punches_and_zero_ranges_read_as_zeros(struct bench *bench)
{
	static unsigned char data[4 * IO];
	const uint32_t keep = FALLOC_FL_KEEP_SIZE;
	uint32_t i;

	memset(data, 0x77, sizeof(data));
	TP_ASSERT(ask_write(bench, GENERATION, 0, data, sizeof(data)) == 0);
	TP_ASSERT(ask_fallocate(bench, FALLOC_FL_PUNCH_HOLE | keep, 100, 5000) == 0);
	TP_ASSERT(ask_fallocate(bench, FALLOC_FL_ZERO_RANGE | keep, 3 * IO, 512) == 0);
	TP_ASSERT(ask_read(bench, 0, sizeof(data)) == 0);
	for (i = 0; i < sizeof(data); i++)
		TP_ASSERT(answer[i] ==
			  ((i >= 100 && i < 5100) || (i >= 3 * IO && i < 3 * IO + 512) ? 0 : 0x77));
	/* What changes nothing inside, and what would grow. */
	TP_ASSERT(ask_fallocate(bench, 0, 0, FILE_SIZE) == 0);
	TP_ASSERT(ask_fallocate(bench, 0, 0, FILE_SIZE + 1) == -EOPNOTSUPP);
	TP_ASSERT(ask_fallocate(bench, keep, FILE_SIZE, 1) == -EOPNOTSUPP);
	TP_ASSERT(ask_fallocate(bench, FALLOC_FL_COLLAPSE_RANGE, 0, IO) == -EOPNOTSUPP);
	TP_ASSERT(ask_fallocate(bench, FALLOC_FL_PUNCH_HOLE | keep, FILE_SIZE - 1, IO) == 0);
	TP_ASSERT(ask_fallocate(bench, FALLOC_FL_PUNCH_HOLE | keep, 2 * FILE_SIZE, IO) == 0);
	TP_ASSERT(ask_fallocate(bench, FALLOC_FL_PUNCH_HOLE | keep, UINT64_MAX, 2) == -EINVAL);
	TP_ASSERT(ask_fallocate(bench, FALLOC_FL_PUNCH_HOLE | keep, 0, 0) == -EINVAL);
}

static void test_seeks_find_data_and_holes(struct bench *bench)
{
	struct fuse_lseek_in in = { .fh = GENERATION, .whence = SEEK_DATA };
	static unsigned char data[64u << 10];
	uint64_t found;

	TP_ASSERT(ask_fallocate(bench, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, FILE_SIZE) ==
		  0);
	TP_ASSERT(ask(bench, FUSE_LSEEK, NODE, &in, sizeof(in)) == -ENXIO);
	memset(data, 1, sizeof(data));
	TP_ASSERT(ask_write(bench, GENERATION, 128u << 10, data, sizeof(data) - FUSE_HEAD) == 0);
	TP_ASSERT(ask(bench, FUSE_LSEEK, NODE, &in, sizeof(in)) == 0);
	memcpy(&found, answer, sizeof(found));
	TP_ASSERT(found == 128u << 10);
	in.offset = (128u << 10) + 5;
	TP_ASSERT(ask(bench, FUSE_LSEEK, NODE, &in, sizeof(in)) == 0);
	memcpy(&found, answer, sizeof(found));
	TP_ASSERT(found == in.offset);
	in.whence = SEEK_HOLE;
	TP_ASSERT(ask(bench, FUSE_LSEEK, NODE, &in, sizeof(in)) == 0);
	memcpy(&found, answer, sizeof(found));
	TP_ASSERT(found >= (191u << 10) && found <= 192u << 10);
	in.offset = FILE_SIZE;
	TP_ASSERT(ask(bench, FUSE_LSEEK, NODE, &in, sizeof(in)) == -ENXIO);
	in.offset = 0;
	in.whence = 77;
	TP_ASSERT(ask(bench, FUSE_LSEEK, NODE, &in, sizeof(in)) == -EINVAL);
}

static void test_names_and_attributes(struct bench *bench)
{
	struct fuse_getattr_in get = { 0 };
	struct fuse_setattr_in set = { .valid = FATTR_SIZE, .size = FILE_SIZE };
	struct fuse_entry_out entry;
	struct fuse_attr_out attr;

	TP_ASSERT(ask(bench, FUSE_LOOKUP, FUSE_ROOT_ID, "id-1", 5) == 0);
	memcpy(&entry, answer, sizeof(entry));
	TP_ASSERT(entry.nodeid == NODE && entry.attr.size == FILE_SIZE);
	TP_ASSERT(entry.attr.mode == (S_IFREG | 0600) && entry.entry_valid == 0);
	TP_ASSERT(ask(bench, FUSE_LOOKUP, FUSE_ROOT_ID, "id-01", 6) == -ENOENT);
	TP_ASSERT(ask(bench, FUSE_LOOKUP, FUSE_ROOT_ID, "id-", 4) == -ENOENT);
	TP_ASSERT(ask(bench, FUSE_LOOKUP, FUSE_ROOT_ID, "id-99999999999999999999", 24) == -ENOENT);
	TP_ASSERT(ask(bench, FUSE_LOOKUP, FUSE_ROOT_ID, "id-1x", 6) == -ENOENT);
	TP_ASSERT(ask(bench, FUSE_LOOKUP, NODE, "id-1", 5) == -ENOENT);
	TP_ASSERT(ask(bench, FUSE_GETATTR, FUSE_ROOT_ID, &get, sizeof(get)) == 0);
	memcpy(&attr, answer, sizeof(attr));
	TP_ASSERT(S_ISDIR(attr.attr.mode));
	TP_ASSERT(ask(bench, FUSE_GETATTR, NODE + 1, &get, sizeof(get)) == -ENOENT);
	TP_ASSERT(ask(bench, FUSE_GETATTR, UINT64_MAX, &get, sizeof(get)) == -ENOENT);

	TP_ASSERT(ask(bench, FUSE_SETATTR, NODE, &set, sizeof(set)) == 0);
	set.size = 0;
	TP_ASSERT(ask(bench, FUSE_SETATTR, NODE, &set, sizeof(set)) == -EPERM);
	set.valid = FATTR_MODE;
	set.mode = 0777;
	TP_ASSERT(ask(bench, FUSE_SETATTR, NODE, &set, sizeof(set)) == -EPERM);
	set.valid = FATTR_ATIME_NOW | FATTR_MTIME_NOW;
	TP_ASSERT(ask(bench, FUSE_SETATTR, NODE, &set, sizeof(set)) == 0);
}

static void test_what_is_not_served_is_refused(struct bench *bench)
{
	TP_ASSERT(ask(bench, FUSE_UNLINK, FUSE_ROOT_ID, "id-1", 5) == -EPERM);
	TP_ASSERT(ask(bench, FUSE_GETXATTR, NODE, "xxxxxxxxxxxxxxxx", 16) == -ENOSYS);
	TP_ASSERT(ask(bench, FUSE_IOCTL, NODE, "", 1) == -ENOSYS);
	TP_ASSERT(ask(bench, 4711, NODE, "", 1) == -ENOSYS);
	TP_ASSERT(ask(bench, FUSE_READ, NODE, "short", 5) == -EINVAL);
}

static void test_directory_is_listed_whole_in_small_pieces(struct bench *bench)
{
	struct fuse_read_in in = { .size = 64 };
	char seen[256] = "";
	uint32_t id, rounds = 0;

	for (id = 100; id < 105; id++)
		TP_ASSERT(tp_fuse_server_add_linear(bench->server, id, bench->path, 1, 1, NULL) ==
			  0);
	do {
		size_t at = 0;

		TP_ASSERT(ask(bench, FUSE_READDIR, FUSE_ROOT_ID, &in, sizeof(in)) == 0);
		while (at < answer_length) {
			struct fuse_dirent *entry = (void *)(answer + at);
			size_t used = strlen(seen);

			snprintf(seen + used, sizeof(seen) - used, "%.*s ", (int)entry->namelen,
				 entry->name);
			in.offset = entry->off;
			at += FUSE_DIRENT_SIZE(entry);
		}
	} while (answer_length && ++rounds < 100);
	TP_ASSERT(strcmp(seen, ". .. id-1 id-100 id-101 id-102 id-103 id-104 ") == 0);
	for (id = 100; id < 105; id++)
		TP_ASSERT(tp_fuse_server_remove_file(bench->server, id, NULL) == 0);
	TP_ASSERT(tp_fuse_server_remove_file(bench->server, 100, NULL) == TP_E_VOLUME_NOT_FOUND);
}

static void test_no_answer_to_what_wants_none(struct bench *bench)
{
	struct fuse_forget_in forget = { .nlookup = 1 };
	struct fuse_interrupt_in interrupt = { .unique = 2 };

	submit(bench, FUSE_FORGET, NODE, &forget, sizeof(forget), NULL, 0);
	submit(bench, FUSE_INTERRUPT, NODE, &interrupt, sizeof(interrupt), NULL, 0);
	/* The next answer is the next request's: ask() compares. */
	TP_ASSERT(ask(bench, FUSE_ACCESS, NODE, &(struct fuse_access_in){ 0 },
		      sizeof(struct fuse_access_in)) == 0);
}

static void test_noise_is_answered_or_dropped(struct bench *bench, unsigned seed)
{
	struct tp_fuse_statistics statistics;
	unsigned char bytes[200];
	unsigned round, i;
	uint64_t before;

	tp_fuse_server_get_statistics(bench->server, &statistics);
	before = statistics.requests;
	for (round = 0; round < 2000; round++) {
		size_t length = 1 + (size_t)rand_r(&seed) % sizeof(bytes);

		for (i = 0; i < length; i++)
			bytes[i] = (unsigned char)rand_r(&seed);
		if (round % 2 && length >= sizeof(struct fuse_in_header)) {
			struct fuse_in_header header = {
				.len = (uint32_t)length,
				.opcode = (uint32_t)rand_r(&seed) % 60,
				.unique = 1000000 + round,
				.nodeid = round % 4 == 1 ? NODE : (uint64_t)rand_r(&seed),
			};

			memcpy(bytes, &header, sizeof(header));
		}
		TP_ASSERT(send(bench->kernel, bytes, length, 0) == (ssize_t)length);
		while (recv(bench->kernel, answer, sizeof(answer), MSG_DONTWAIT) > 0)
			;
	}
	/* Still there, and nothing of it is kept. */
	for (round = 0; round < 1000; round++) {
		while (recv(bench->kernel, answer, sizeof(answer), MSG_DONTWAIT) > 0)
			;
		tp_fuse_server_get_statistics(bench->server, &statistics);
		if (!statistics.in_flight && statistics.requests >= before + 2000)
			break;
		poll(NULL, 0, 10);
	}
	TP_ASSERT(!statistics.in_flight);
	while (recv(bench->kernel, answer, sizeof(answer), MSG_DONTWAIT) > 0)
		;
	TP_ASSERT(ask_read(bench, 0, IO) == 0);
}

static void test_more_requests_than_slots(struct bench *bench)
{
	struct fuse_read_in in = { .fh = GENERATION, .size = IO };
	uint64_t unique, first = bench->unique + 2, sum = 0;
	const uint32_t nr = 5 * NR_SLOTS;
	uint32_t i;

	for (i = 0; i < nr; i++)
		submit(bench, FUSE_READ, NODE, &in, sizeof(in), NULL, 0);
	for (i = 0; i < nr; i++) {
		TP_ASSERT(receive(bench, &unique, answer, sizeof(answer), &answer_length) == 0);
		sum += (unique - first) / 2;
	}
	TP_ASSERT(sum == (uint64_t)nr * (nr - 1) / 2);
}

static void test_files_come_and_go_under_requests(struct bench *bench)
{
	struct fuse_read_in in = { .fh = GENERATION, .size = IO };
	uint32_t round, i, served = 0;
	uint64_t unique;
	int error;

	for (round = 0; round < 200; round++) {
		for (i = 0; i < NR_SLOTS; i++) {
			/* Aligned goes the fast way, the other the slow one. */
			in.offset = i % 2 ? IO : 1;
			submit(bench, FUSE_READ, NODE, &in, sizeof(in), NULL, 0);
		}
		TP_ASSERT(tp_fuse_server_remove_file(bench->server, 1, NULL) == 0);
		/* What was not there yet when it went is refused; the rest was answered before. */
		for (i = 0; i < NR_SLOTS; i++) {
			error = receive(bench, &unique, answer, sizeof(answer), &answer_length);
			TP_ASSERT((!error && answer_length == IO) || error == -EIO);
			served += !error;
		}
		TP_ASSERT(tp_fuse_server_add_linear(bench->server, 1, bench->path, 0, GENERATION,
						    NULL) == 0);
	}
	TP_ASSERT(ask_read(bench, 0, IO) == 0);
	printf("%u of %u reads came before the file went\n", served, 200 * NR_SLOTS);
}

/* ---- what a dead predecessor leaves ---- */

static struct slot *leave_open(struct bench *bench, struct slots *slots, uint64_t offset,
			       const void *data, uint32_t length)
{
	struct fuse_write_in in = { .fh = GENERATION, .offset = offset, .size = length };
	struct slot *slot = tp_fuse_slots_take(slots, 0);

	TP_ASSERT(slot);
	build(bench, (unsigned char *)slot->header, FUSE_WRITE, NODE, &in, sizeof(in), data,
	      length);
	return slot;
}

static void test_successor_does_what_is_open_and_only_answers_what_was_done(struct bench *bench)
{
	static unsigned char old[IO], new[IO], found[IO];
	struct tp_fuse_statistics statistics;
	uint64_t open_unique, done_unique, unique;
	struct slots slots;
	struct slot *slot;
	int i, error;

	memset(old, 1, sizeof(old));
	memset(new, 2, sizeof(new));
	TP_ASSERT(pwrite(bench->file, new, IO, 0) == IO);
	TP_ASSERT(pwrite(bench->file, new, IO, IO) == IO);
	TP_ASSERT(tp_fuse_slots_init(&slots, bench->slots_fd, tp_fuse_slots_size(NR_SLOTS), NULL) ==
		  0);
	slot = leave_open(bench, &slots, 0, old, IO);
	open_unique = bench->unique;
	slot = leave_open(bench, &slots, IO, old, IO);
	done_unique = bench->unique;
	slot->shared->error = 0;
	slot->shared->written = IO;
	atomic_store(&slot->shared->state, SLOT_DONE);
	TP_ASSERT(tp_fuse_slots_take(&slots, 0)); /* offered, nothing was read into it */
	tp_fuse_slots_deinit(&slots);

	start(bench);
	for (i = 0; i < 2; i++) {
		error = receive(bench, &unique, answer, sizeof(answer), &answer_length);
		TP_ASSERT(error == 0 && ((struct fuse_write_out *)answer)->size == IO);
		TP_ASSERT(unique == open_unique || unique == done_unique);
	}
	TP_ASSERT(pread(bench->file, found, IO, 0) == IO && memcmp(found, old, IO) == 0);
	/* A later write to the same place was acknowledged: the old one must not be done again. */
	TP_ASSERT(pread(bench->file, found, IO, IO) == IO && memcmp(found, new, IO) == 0);
	tp_fuse_server_get_statistics(bench->server, &statistics);
	TP_ASSERT(statistics.replays == 2);
	stop(bench);

	TP_ASSERT(tp_fuse_slots_init(&slots, bench->slots_fd, tp_fuse_slots_size(NR_SLOTS), NULL) ==
		  0);
	TP_ASSERT(slots.nr_free == NR_SLOTS);
	tp_fuse_slots_deinit(&slots);
}

/* Killed while a request was being moved from one slot to another: both have it. */
static void test_successor_does_what_was_being_moved_once(struct bench *bench)
{
	static unsigned char old[IO], new[IO], found[IO];
	struct tp_fuse_statistics statistics;
	struct slot *slot, *same;
	struct slots slots;
	uint64_t unique;

	memset(old, 3, sizeof(old));
	memset(new, 4, sizeof(new));
	TP_ASSERT(tp_fuse_slots_init(&slots, bench->slots_fd, tp_fuse_slots_size(NR_SLOTS), NULL) ==
		  0);
	slot = leave_open(bench, &slots, 0, old, IO);
	same = tp_fuse_slots_take(&slots, 0);
	memcpy(same->header, slot->header, FUSE_HEAD + IO);
	tp_fuse_slots_deinit(&slots);

	start(bench);
	TP_ASSERT(receive(bench, &unique, answer, sizeof(answer), &answer_length) == 0);
	TP_ASSERT(unique == bench->unique);
	TP_ASSERT(ask_write(bench, GENERATION, 0, new, IO) == 0);
	tp_fuse_server_get_statistics(bench->server, &statistics);
	TP_ASSERT(statistics.replays == 1);
	stop(bench);
	TP_ASSERT(pread(bench->file, found, IO, 0) == IO && memcmp(found, new, IO) == 0);
	TP_ASSERT(recv(bench->kernel, answer, sizeof(answer), MSG_DONTWAIT) < 0);
}

static void test_moving_leaves_the_other_slot_as_taken(void)
{
	int fd = memfd_create("slots", MFD_CLOEXEC);
	struct bench bench = { .unique = 40 };
	static unsigned char data[IO];
	struct slot *slot, *moved;
	struct slots slots;

	memset(data, 9, sizeof(data));
	TP_ASSERT(fd >= 0 && ftruncate(fd, (off_t)tp_fuse_slots_size(3)) == 0);
	TP_ASSERT(tp_fuse_slots_init(&slots, fd, tp_fuse_slots_size(3), NULL) == 0);
	slot = leave_open(&bench, &slots, 0, data, IO);
	moved = tp_fuse_slots_move(&slots, slot, FUSE_HEAD + IO);
	TP_ASSERT(moved && moved != slot && !moved->resident && slot->resident);
	TP_ASSERT(moved->header->unique == bench.unique && slot->header->unique == 0);
	TP_ASSERT(memcmp(moved->data, data, IO) == 0 && moved->shared->state == SLOT_OPEN);
	TP_ASSERT(moved->header->len == FUSE_HEAD + IO && slots.nr_free == 1);

	/* Where a resident one is free nothing needs to be copied; nor where none is. */
	build(&bench, (unsigned char *)slot->header, FUSE_WRITE, NODE, data, FUSE_HEAD, NULL, 0);
	tp_fuse_slot_make_resident(moved);
	tp_fuse_slots_put(&slots, moved);
	TP_ASSERT(!tp_fuse_slots_move(&slots, slot, FUSE_HEAD));
	TP_ASSERT(tp_fuse_slots_take(&slots, 0) == moved && tp_fuse_slots_take(&slots, 0));
	TP_ASSERT(!tp_fuse_slots_move(&slots, slot, FUSE_HEAD) && !slots.nr_free);
	TP_ASSERT(slot->header->unique == bench.unique);
	tp_fuse_slots_deinit(&slots);
	close(fd);
}

static void test_many_small_requests_take_little_memory(struct bench *bench)
{
	struct fuse_read_in in = { .fh = GENERATION, .size = IO };
	uint64_t unique;
	struct stat st;
	uint32_t i;

	for (i = 0; i < NR_SLOTS; i++)
		submit(bench, FUSE_READ, NODE, &in, sizeof(in), NULL, 0);
	start(bench);
	for (i = 0; i < NR_SLOTS; i++)
		TP_ASSERT(receive(bench, &unique, answer, sizeof(answer), &answer_length) == 0);
	TP_ASSERT(fstat(bench->slots_fd, &st) == 0);
	/* One that is offered, and of each its first page and what it moved. */
	TP_ASSERT(st.st_blocks * 512 <= FUSE_SLOT_STRIDE + (2 * NR_SLOTS + 1) * FUSE_PAGE);
	stop(bench);
}

static void test_memory_of_another_layout_is_refused(void)
{
	int fd = memfd_create("slots", MFD_CLOEXEC);
	struct slots slots;

	TP_ASSERT(fd >= 0 && ftruncate(fd, (off_t)tp_fuse_slots_size(4)) == 0);
	TP_ASSERT(tp_fuse_slots_init(&slots, fd, tp_fuse_slots_size(4), NULL) == 0);
	tp_fuse_slots_deinit(&slots);
	TP_ASSERT(tp_fuse_slots_init(&slots, fd, tp_fuse_slots_size(3), NULL) == TP_E_INVALID);
	TP_ASSERT(tp_fuse_slots_init(&slots, fd, 100, NULL) == TP_E_INVALID);
	TP_ASSERT(tp_fuse_slots_init(&slots, -1, tp_fuse_slots_size(4), NULL) == TP_E_OPEN);
	close(fd);
}

static void test_memory_is_given_back_at_rest(struct bench *bench)
{
	struct stat st;
	int i;

	for (i = 0; i < 100; i++) {
		TP_ASSERT(fstat(bench->slots_fd, &st) == 0);
		/* The slot that waits for the next request stays, four more, and each first
		 * page. */
		if (st.st_blocks * 512 <= 5 * FUSE_SLOT_STRIDE + (NR_SLOTS + 1) * FUSE_PAGE)
			return;
		poll(NULL, 0, 50);
	}
	TP_ASSERT(!"memory was not given back");
}

static void test_end_of_connection_ends_the_run(struct bench *bench)
{
	start(bench);
	shutdown(bench->kernel, SHUT_WR);
	pthread_join(bench->thread, NULL);
	TP_ASSERT(bench->run_status == TP_E_CLOSED);
	tp_fuse_server_destroy(bench->server);
}

static void run_all(uint32_t no_io_uring, unsigned seed)
{
	struct bench bench;

	setup(&bench, no_io_uring);
	test_many_small_requests_take_little_memory(&bench);
	start(&bench);
	test_reads_and_writes_of_any_alignment(&bench);
	test_punches_and_zero_ranges_read_as_zeros(&bench);
	test_seeks_find_data_and_holes(&bench);
	test_names_and_attributes(&bench);
	test_what_is_not_served_is_refused(&bench);
	test_directory_is_listed_whole_in_small_pieces(&bench);
	test_no_answer_to_what_wants_none(&bench);
	test_more_requests_than_slots(&bench);
	test_files_come_and_go_under_requests(&bench);
	test_noise_is_answered_or_dropped(&bench, seed);
	test_memory_is_given_back_at_rest(&bench);
	stop(&bench);
	TP_ASSERT(bench.run_status == 0);
	test_successor_does_what_is_open_and_only_answers_what_was_done(&bench);
	test_successor_does_what_was_being_moved_once(&bench);
	test_end_of_connection_ends_the_run(&bench);
	teardown(&bench);
}

int main(int argc, char **argv)
{
	unsigned seed = argc > 1 ? (unsigned)strtoul(argv[1], NULL, 0) : 1;

	printf("seed %u\n", seed);
	test_memory_of_another_layout_is_refused();
	test_moving_leaves_the_other_slot_as_taken();
	run_all(0, seed);
	run_all(1, seed);
	return 0;
}
