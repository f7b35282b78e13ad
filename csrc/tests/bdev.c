/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Block devices under several threads: each thread owns stripes of the device and finds in them
 * what it put there, while the others work on theirs and one resizes. Over memory, over a file with
 * page cache and over one opened O_DIRECT (where the filesystem has it), each behind a log and a
 * fault device. At the end the log, replayed, makes the same device.
 */
#include "check.h"

#include "thinpool/bdev.h"

#include <pthread.h>
#include <string.h>
#include <unistd.h>

#define NR_THREADS 4
#define UNIT       4096U
#define NR_UNITS   256U /* of one thread */
#define SIZE       ((uint64_t)NR_THREADS * NR_UNITS * UNIT)
#define STEPS      1500

struct worker {
	pthread_t thread;
	struct tp_bdev *bdev;
	uint64_t number;
	uint64_t seed;
	unsigned char model[NR_UNITS]; /* what each unit is filled with */
};

/* Units of the threads alternate, so that neighbours are always someone else's. */
static uint64_t offset_of(const struct worker *worker, uint64_t unit)
{
	return (unit * NR_THREADS + worker->number) * UNIT;
}

static void expect_filled(const unsigned char *buffer, unsigned char value)
{
	for (unsigned int i = 0; i < UNIT; i++)
		CHECK_EQUAL(buffer[i], value);
}

/* Space ahead is given, or not to be had here. */
static void expect_given(int status, const struct tp_error *err)
{
	CHECK(!status || status == TP_E_NOT_SUPPORTED || tp_error_is_host_full(err));
}

static void step(struct worker *worker, unsigned char *buffer)
{
	uint64_t unit = test_random_below(&worker->seed, NR_UNITS);
	uint64_t offset = offset_of(worker, unit);
	unsigned char value = (unsigned char)test_random(&worker->seed);
	struct tp_error err;
	uint64_t begin;
	uint64_t end;

	switch (test_random_below(&worker->seed, 20)) {
	case 0:
		CHECK_EQUAL(tp_bdev_flush(worker->bdev, &err), 0);
		break;
	case 1:
	case 2:
		CHECK_EQUAL(tp_bdev_punch(worker->bdev, offset, UNIT, &err), 0);
		worker->model[unit] = 0;
		break;
	case 3:
		CHECK_EQUAL(tp_bdev_next_data(worker->bdev, offset, &begin, &end, &err), 0);
		CHECK(begin >= offset && begin <= end);
		/* Data may be claimed where there is none, never the other way round. */
		CHECK(begin == offset || worker->model[unit] == 0);
		break;
	case 4:
		if (worker->number == 0)
			CHECK_EQUAL(tp_bdev_resize(worker->bdev, SIZE + (value & 7U) * UNIT, &err),
				    0);
		break;
	case 5:
		expect_given(tp_bdev_allocate(worker->bdev, offset, UNIT, &err), &err);
		break;
	case 6:
	case 7:
	case 8:
	case 9:
		CHECK_EQUAL(tp_bdev_read(worker->bdev, offset, buffer, UNIT, &err), 0);
		expect_filled(buffer, worker->model[unit]);
		break;
	default:
		memset(buffer, value, UNIT);
		/* Right or wrong about the hole: it only says how to write. */
		CHECK_EQUAL(value & 1
				    ? tp_bdev_write(worker->bdev, offset, buffer, UNIT, &err)
				    : tp_bdev_write_hole(worker->bdev, offset, buffer, UNIT, &err),
			    0);
		worker->model[unit] = value;
	}
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	unsigned char *room = malloc(UNIT + 64);

	CHECK(room);
	/* Half of the threads have buffers that O_DIRECT must bounce. */
	for (int i = 0; i < STEPS; i++)
		step(worker, room + (worker->number % 2 ? 1 : 0));
	for (uint64_t unit = 0; unit < NR_UNITS; unit++) {
		CHECK_EQUAL(tp_bdev_read(worker->bdev, offset_of(worker, unit), room, UNIT, NULL),
			    0);
		expect_filled(room, worker->model[unit]);
	}
	free(room);
	return NULL;
}

static void compare(struct tp_bdev *a, struct tp_bdev *b)
{
	unsigned char *of_a = malloc(UNIT);
	unsigned char *of_b = malloc(UNIT);

	CHECK(of_a && of_b);
	for (uint64_t offset = 0; offset < SIZE; offset += UNIT) {
		CHECK_EQUAL(tp_bdev_read(a, offset, of_a, UNIT, NULL), 0);
		CHECK_EQUAL(tp_bdev_read(b, offset, of_b, UNIT, NULL), 0);
		CHECK(!memcmp(of_a, of_b, UNIT));
	}
	free(of_a);
	free(of_b);
}

static void run_threads(struct tp_bdev *bdev, uint64_t seed)
{
	static struct worker workers[NR_THREADS];

	memset(workers, 0, sizeof(workers));
	for (uint64_t i = 0; i < NR_THREADS; i++) {
		workers[i].bdev = bdev;
		workers[i].number = i;
		workers[i].seed = seed + i;
		CHECK(!pthread_create(&workers[i].thread, NULL, work, &workers[i]));
	}
	for (uint64_t i = 0; i < NR_THREADS; i++)
		CHECK(!pthread_join(workers[i].thread, NULL));
}

static void test_threads(struct tp_bdev *below, uint64_t seed)
{
	struct tp_bdev *log;
	struct tp_bdev *fault;
	struct tp_bdev *image;

	CHECK_EQUAL(tp_bdev_log_open(below, NULL, 3, &log, NULL), 0);
	CHECK_EQUAL(tp_bdev_fault_open(log, &fault, NULL), 0);
	run_threads(fault, seed);
	CHECK_EQUAL(tp_bdev_mem_open(SIZE, &image, NULL), 0);
	CHECK_EQUAL(tp_bdev_log_replay(log, 0, tp_bdev_log_count(log), 3, image, NULL), 0);
	compare(below, image);
	tp_bdev_close(image);
	tp_bdev_close(fault);
	tp_bdev_close(log);
}

/* Operations that fail below leave nothing in the log, nor (LeakSanitizer) anywhere else. */
static void test_failures_are_not_logged(void)
{
	static const unsigned char data[UNIT];
	struct tp_bdev *memory;
	struct tp_bdev *fault;
	struct tp_bdev *log;

	CHECK_EQUAL(tp_bdev_mem_open(SIZE, &memory, NULL), 0);
	CHECK_EQUAL(tp_bdev_fault_open(memory, &fault, NULL), 0);
	CHECK_EQUAL(tp_bdev_log_open(fault, NULL, 0, &log, NULL), 0);
	CHECK_EQUAL(
		tp_bdev_fault_add(fault, TP_FAULT_WRITE, TP_FAULT_ERROR, 0, SIZE, 2, 1, 0, 0, NULL),
		0);
	CHECK_EQUAL(tp_bdev_write(log, 0, data, UNIT, NULL), 0);
	CHECK_EQUAL(tp_bdev_write(log, 0, data, UNIT, NULL), TP_E_IO);
	CHECK_EQUAL(tp_bdev_log_count(log), 1);
	tp_bdev_close(log);
	tp_bdev_close(fault);
	tp_bdev_close(memory);
}

static void test_file(uint32_t flags, uint64_t seed)
{
	char path[] = "bdev-test-XXXXXX";
	struct tp_error err;
	struct tp_bdev *bdev;
	int fd = mkstemp(path);
	int status;

	CHECK(fd >= 0);
	close(fd);
	unlink(path);
	status = tp_bdev_file_open(path, flags | TP_BDEV_CREATE | TP_BDEV_EXCLUSIVE, SIZE, &bdev,
				   &err);
	if (status == TP_E_NOT_SUPPORTED && flags & TP_BDEV_DIRECT) {
		printf("direct I/O: not on this filesystem\n");
		return;
	}
	CHECK_EQUAL(status, 0);
	if (bdev->can_punch) {
		test_threads(bdev, seed);
		/* Alone, for what stands in front keeps writes into holes from it. */
		CHECK_EQUAL(tp_bdev_punch(bdev, 0, SIZE, &err), 0);
		run_threads(bdev, seed + NR_THREADS);
	} else {
		printf("this filesystem cannot punch\n");
	}
	tp_bdev_close(bdev);
	CHECK(!unlink(path));
}

int main(void)
{
	uint64_t seed = test_seed();
	struct tp_bdev *memory;

	CHECK_EQUAL(tp_bdev_mem_open(SIZE, &memory, NULL), 0);
	test_threads(memory, seed);
	tp_bdev_close(memory);
	test_failures_are_not_logged();
	test_file(0, seed);
	test_file(TP_BDEV_DIRECT, seed);
	tp_bdev_close(NULL);
	return 0;
}
