/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hostile metadata: the independent reader takes whatever a block holds.
 *
 * A pool that the core made is altered at random, with its checksums made right again so that the
 * damage gets past the first gate, and then checked, dumped, compared and counted. Nothing may
 * crash, overread (run this under AddressSanitizer) or go on for ever; what comes out is not
 * judged here. Unaltered, the pool must be without a fault.
 *
 * Usage: check_fuzz [ROUNDS [IMAGE...]]: other images beside the one that is made here.
 */
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "thinpool/abi.h"
#include "thinpool/disk_format.h"

#define METADATA_BLOCKS 512u
#define DATA_BLOCKS     1200u
#define DATA_BLOCK_SIZE 65536u
#define ROUNDS_DEFAULT  2000u
#define CHANGES_MAX     4u
#define ROUND_SECONDS   60u /* an alarm ends what runs for ever */

struct image {
	struct tp_bdev *bdev;
	uint64_t nr_blocks;
	uint64_t *sealed; /* blocks that carry a checksum */
	uint32_t *salts;  /* of these */
	size_t nr_sealed;
};

/* ---- making ------------------------------------------------------------------------------ */

static void write_blocks(struct tp_pool *pool, uint32_t id, uint64_t first, uint64_t nr,
			 uint64_t step)
{
	static uint8_t page[4096];
	struct tp_volume *volume;

	CHECK_EQUAL(tp_volume_open(pool, id, (uint64_t)DATA_BLOCKS * DATA_BLOCK_SIZE, 0, NULL,
				   &volume, NULL),
		    0);
	for (uint64_t i = 0; i < nr; i++)
		CHECK_EQUAL(tp_volume_write(volume, (first + i * step) * DATA_BLOCK_SIZE, page,
					    sizeof(page), NULL),
			    0);
	tp_volume_close(volume);
}

static struct tp_bdev *make_pool(void)
{
	struct tp_pool_options options = { .skip_block_zeroing = 1, .error_if_no_space = 1 };
	struct tp_bdev *metadata, *data;
	struct tp_pool *pool;

	CHECK_EQUAL(tp_bdev_mem_open((uint64_t)METADATA_BLOCKS * TP_MD_BLOCK_SIZE, &metadata, NULL),
		    0);
	CHECK_EQUAL(tp_bdev_mem_open((uint64_t)DATA_BLOCKS * DATA_BLOCK_SIZE, &data, NULL), 0);
	CHECK_EQUAL(tp_pool_format(metadata, DATA_BLOCK_SIZE, DATA_BLOCKS, 0, NULL), 0);
	CHECK_EQUAL(tp_pool_open(metadata, data, &options, &pool, NULL), 0);
	CHECK_EQUAL(tp_volume_create(pool, 1, NULL), 0);
	write_blocks(pool, 1, 0, 700, 1);
	CHECK_EQUAL(tp_snapshot_create(pool, 2, 1, NULL), 0);
	write_blocks(pool, 1, 10, 20, 7);
	CHECK_EQUAL(tp_snapshot_create(pool, 3, 2, NULL), 0);
	write_blocks(pool, 3, 300, 10, 1);
	CHECK_EQUAL(tp_pool_reserve_metadata_snapshot(pool, NULL), 0);
	CHECK_EQUAL(tp_volume_create(pool, 4, NULL), 0);
	write_blocks(pool, 4, 0, 100, 3);
	write_blocks(pool, 2, 500, 10, 1);
	CHECK_EQUAL(tp_volume_delete(pool, 3, NULL), 0);
	CHECK_EQUAL(tp_pool_close(pool, NULL), 0);
	tp_bdev_close(data);
	return metadata;
}

static struct tp_bdev *load_file(const char *path)
{
	struct tp_bdev *file, *memory;
	uint8_t block[TP_MD_BLOCK_SIZE];
	uint64_t size;

	CHECK_EQUAL(tp_bdev_file_open(path, TP_BDEV_READ_ONLY, 0, &file, NULL), 0);
	size = tp_bdev_size(file) / TP_MD_BLOCK_SIZE * TP_MD_BLOCK_SIZE;
	CHECK_EQUAL(tp_bdev_mem_open(size, &memory, NULL), 0);
	for (uint64_t at = 0; at < size; at += sizeof(block)) {
		CHECK_EQUAL(tp_bdev_read(file, at, block, sizeof(block), NULL), 0);
		CHECK_EQUAL(tp_bdev_write(memory, at, block, sizeof(block), NULL), 0);
	}
	tp_bdev_close(file);
	return memory;
}

/* ---- blocks ------------------------------------------------------------------------------ */

static void get(const struct image *image, uint64_t number, uint8_t *block)
{
	CHECK_EQUAL(
		tp_bdev_read(image->bdev, number * TP_MD_BLOCK_SIZE, block, TP_MD_BLOCK_SIZE, NULL),
		0);
}

static void put(const struct image *image, uint64_t number, const uint8_t *block)
{
	CHECK_EQUAL(tp_bdev_write(image->bdev, number * TP_MD_BLOCK_SIZE, block, TP_MD_BLOCK_SIZE,
				  NULL),
		    0);
}

static uint32_t crc(const uint8_t *block)
{
	return tp_crc32c(UINT32_MAX, block + TP_CSUM_SKIP, TP_CSUM_LENGTH);
}

static void seal(uint8_t *block, uint32_t salt)
{
	struct tp_le32 sum = tp_le32_put(crc(block) ^ salt);

	memcpy(block, &sum, sizeof(sum));
}

static struct image image_of(struct tp_bdev *bdev)
{
	static const uint32_t salts[] = { TP_SALT_SUPERBLOCK, TP_SALT_NODE, TP_SALT_INDEX,
					  TP_SALT_BITMAP };
	struct image image = { .bdev = bdev, .nr_blocks = tp_bdev_size(bdev) / TP_MD_BLOCK_SIZE };
	uint8_t block[TP_MD_BLOCK_SIZE];

	image.sealed = calloc(image.nr_blocks, sizeof(*image.sealed));
	image.salts = calloc(image.nr_blocks, sizeof(*image.salts));
	CHECK(image.sealed && image.salts);
	for (uint64_t number = 0; number < image.nr_blocks; number++) {
		struct tp_le32 sum;

		get(&image, number, block);
		memcpy(&sum, block, sizeof(sum));
		for (size_t i = 0; i < sizeof(salts) / sizeof(*salts); i++) {
			if ((tp_le32_get(sum) ^ crc(block)) != salts[i])
				continue;
			image.sealed[image.nr_sealed] = number;
			image.salts[image.nr_sealed++] = salts[i];
		}
	}
	CHECK(image.nr_sealed > 0);
	return image;
}

/* ---- altering ---------------------------------------------------------------------------- */

static uint64_t odd_number(const struct image *image, uint64_t number, uint64_t *random)
{
	const uint64_t interesting[] = {
		0,
		1,
		2,
		3,
		number,
		image->nr_blocks,
		image->nr_blocks - 1,
		UINT64_MAX,
		UINT64_MAX >> 1,
		UINT64_C(1) << 24,
		UINT64_C(1) << 40,
		UINT32_MAX,
		image->sealed[test_random_below(random, image->nr_sealed)],
		image->sealed[test_random_below(random, image->nr_sealed)],
		test_random_below(random, 1000) << 24,
		test_random(random),
	};

	return interesting[test_random_below(random, sizeof(interesting) / sizeof(*interesting))];
}

/* Where the bytes that mean something are: the head, the first keys, the first values. */
static size_t odd_place(uint64_t *random)
{
	static const size_t begins[] = { 4, 16, 32, 32 + 8 * 252, 32 + 8 * 126, 0x38, 0x140, 0x40 };
	size_t begin = begins[test_random_below(random, sizeof(begins) / sizeof(*begins))];

	if (test_random_below(random, 4) == 0)
		return (size_t)test_random_below(random, TP_MD_BLOCK_SIZE - 8);
	return begin + (size_t)test_random_below(random, 8) * 8;
}

static void alter(const struct image *image, size_t which, uint64_t *random)
{
	uint64_t number = image->sealed[which];
	uint8_t block[TP_MD_BLOCK_SIZE];
	size_t place = odd_place(random);
	struct tp_le64 value;
	struct tp_le32 half;

	get(image, number, block);
	switch (test_random_below(random, 5)) {
	case 0:
		block[place] ^= (uint8_t)(1u << test_random_below(random, 8));
		break;
	case 1:
		value = tp_le64_put(odd_number(image, number, random));
		memcpy(block + place, &value, sizeof(value));
		break;
	case 2:
		half = tp_le32_put((uint32_t)odd_number(image, number, random));
		memcpy(block + place, &half, sizeof(half));
		break;
	case 3:
		/* Another block in its place, as if written to the wrong one. */
		get(image, image->sealed[test_random_below(random, image->nr_sealed)], block);
		value = tp_le64_put(number);
		memcpy(block + 8, &value, sizeof(value));
		break;
	default:
		/* A node whose children are all one block. */
		value = tp_le64_put(image->sealed[test_random_below(random, image->nr_sealed)]);
		for (size_t at = 32 + 8 * 252; at + 8 <= TP_MD_BLOCK_SIZE; at += 8)
			memcpy(block + at, &value, sizeof(value));
		break;
	}
	if (test_random_below(random, 50))
		seal(block, image->salts[which]);
	put(image, number, block);
}

/* ---- reading ----------------------------------------------------------------------------- */

static void check_it(struct tp_bdev *bdev, uint64_t *random, bool good)
{
	struct tp_check_options options = {
		.nr_threads = 1 + (uint32_t)test_random_below(random, 2),
		.max_faults = 100,
		.use_metadata_snapshot = test_random_below(random, 4) == 0,
		.skip_mappings = test_random_below(random, 8) == 0,
	};
	struct tp_check_summary summary;
	struct tp_check_fault fault;
	struct tp_check *check;

	if (good)
		options = (struct tp_check_options){ 0 };
	CHECK_EQUAL(tp_check_create(bdev, &options, &check, NULL), 0);
	CHECK_EQUAL(tp_check_run(check, NULL), 0);
	tp_check_get_summary(check, &summary);
	for (uint64_t i = 0; i < summary.nr_faults; i++) {
		CHECK_EQUAL(tp_check_get_fault(check, i, &fault), 0);
		CHECK(fault.message[0] && strlen(fault.message) < sizeof(fault.message));
		CHECK(tp_check_type_name(fault.type));
		CHECK(tp_check_structure_name(fault.structure));
		CHECK(tp_check_severity_name(fault.severity));
		if (good)
			printf("%s\n", fault.message);
	}
	CHECK(!good || summary.nr_fatal + summary.nr_leaks == 0);
	tp_check_destroy(check);
}

static void dump_it(struct tp_bdev *bdev, uint64_t *random)
{
	struct tp_dump_device devices[8];
	struct tp_dump_run runs[64];
	struct tp_dump *dump;
	size_t nr_devices, nr_runs;

	if (tp_dump_open(bdev, test_random_below(random, 2) == 0, &dump, NULL))
		return;
	CHECK_EQUAL(tp_dump_devices(dump, 0, devices, 8, &nr_devices), 0);
	for (size_t i = 0; i < nr_devices; i++) {
		uint64_t end = 0;

		if (tp_dump_select(dump, devices[i].id, NULL))
			continue;
		while (!tp_dump_next(dump, runs, 64, &nr_runs, NULL) && nr_runs) {
			for (size_t run = 0; run < nr_runs; run++) {
				CHECK(runs[run].length > 0 && runs[run].begin >= end);
				end = runs[run].begin + runs[run].length;
			}
		}
	}
	tp_dump_close(dump);
}

static void compare_it(struct tp_bdev *bdev, uint64_t *random)
{
	struct tp_delta_options options = {
		.left = 1 + test_random_below(random, 4),
		.right = 1 + test_random_below(random, 4),
		.with_same = test_random_below(random, 2) == 0,
		.by_data_block = test_random_below(random, 2) == 0,
	};
	struct tp_delta_run runs[64];
	struct tp_delta *delta;
	uint64_t end = 0;
	size_t nr_runs;

	if (tp_delta_open(bdev, &options, &delta, NULL))
		return;
	while (!tp_delta_next(delta, runs, 64, &nr_runs, NULL) && nr_runs) {
		for (size_t run = 0; run < nr_runs; run++) {
			CHECK(runs[run].length > 0 && runs[run].begin >= end);
			end = runs[run].begin + runs[run].length;
		}
	}
	tp_delta_close(delta);
}

static void count_it(struct tp_bdev *bdev, uint64_t *random)
{
	uint64_t ids[] = { 1, 2, 4 };
	uint64_t blocks[3];

	if (test_random_below(random, 2))
		tp_exclusive(bdev, 0, ids, 3, blocks, NULL);
	else
		tp_exclusive_each(bdev, 0, ids, 3, blocks, NULL);
}

static void fuzz(struct image *image, uint64_t rounds, uint64_t *random)
{
	uint8_t saved[CHANGES_MAX][TP_MD_BLOCK_SIZE];
	size_t changed[CHANGES_MAX];

	check_it(image->bdev, random, true);
	for (uint64_t round = 0; round < rounds; round++) {
		size_t nr = 1 + (size_t)test_random_below(random, CHANGES_MAX);

		for (size_t i = 0; i < nr; i++) {
			changed[i] = (size_t)test_random_below(random, image->nr_sealed);
			get(image, image->sealed[changed[i]], saved[i]);
			alter(image, changed[i], random);
		}
		alarm(ROUND_SECONDS);
		check_it(image->bdev, random, false);
		dump_it(image->bdev, random);
		compare_it(image->bdev, random);
		count_it(image->bdev, random);
		while (nr--)
			put(image, image->sealed[changed[nr]], saved[nr]);
	}
	alarm(0);
	check_it(image->bdev, random, true);
}

int main(int argc, char **argv)
{
	uint64_t rounds = argc > 1 ? strtoull(argv[1], NULL, 10) : ROUNDS_DEFAULT;
	uint64_t random = test_seed();

	for (int i = 1; i < (argc > 2 ? argc : 2); i++) {
		struct tp_bdev *bdev = i == 1 ? make_pool() : load_file(argv[i]);
		struct image image = image_of(bdev);

		fuzz(&image, rounds, &random);
		free(image.sealed);
		free(image.salts);
		tp_bdev_close(bdev);
	}
	return 0;
}
