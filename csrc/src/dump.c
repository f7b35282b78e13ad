/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Devices and their mappings as runs: what a dump writes.
 *
 * A run goes on while virtual block and data block both step by one and the time stays the same,
 * across leaves too. That is how thin_dump prints them.
 */
#include <stdlib.h>

#include "thinpool/error.h"
#include "thinpool/walk.h"

struct tp_dump {
	struct tp_walk_reader *reader;
	struct tp_walk_superblock superblock;
	struct tp_walk_device *devices;
	uint64_t nr_devices;
	/* the selected device */
	struct tp_walk_cursor *cursor;
	uint64_t device_id;
	const struct tp_walk_node *leaf; /* NULL: the next one is wanted */
	uint32_t index;                  /* in leaf */
	struct tp_dump_run run;          /* begun; length 0: none */
};

int tp_dump_open(struct tp_bdev *metadata, uint32_t use_metadata_snapshot,
		 struct tp_dump **dump_ret, struct tp_error *err)
{
	struct tp_dump *dump = calloc(1, sizeof(*dump));
	int rc;

	if (!dump)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a dump");
	rc = tp_walk_reader_create(metadata, 0, &dump->reader, err);
	if (!rc)
		rc = tp_walk_superblock_read(dump->reader, use_metadata_snapshot, &dump->superblock,
					     err);
	if (!rc)
		rc = tp_walk_devices(dump->reader, &dump->superblock, &dump->devices,
				     &dump->nr_devices, err);
	if (rc) {
		tp_dump_close(dump);
		return rc;
	}
	*dump_ret = dump;
	return 0;
}

void tp_dump_close(struct tp_dump *dump)
{
	if (!dump)
		return;
	tp_walk_cursor_destroy(dump->cursor);
	free(dump->devices);
	tp_walk_reader_destroy(dump->reader);
	free(dump);
}

void tp_dump_get_superblock(const struct tp_dump *dump, struct tp_dump_superblock *superblock_ret)
{
	const struct tp_walk_superblock *superblock = &dump->superblock;

	*superblock_ret = (struct tp_dump_superblock){
		.flags = superblock->flags,
		.version = superblock->version,
		.time = superblock->time,
		.data_block_size = superblock->data_block_size,
		.transaction_id = superblock->trans_id,
		.held_root = superblock->held_root,
		.nr_data_blocks = superblock->data_nr_blocks,
		.nr_metadata_blocks = superblock->metadata_nr_blocks,
	};
	memcpy(superblock_ret->uuid, superblock->uuid, sizeof(superblock_ret->uuid));
}

int tp_dump_devices(const struct tp_dump *dump, uint64_t index, struct tp_dump_device *devices,
		    size_t max, size_t *count_ret)
{
	size_t count = 0;

	for (; count < max && index + count < dump->nr_devices; count++) {
		const struct tp_walk_device *device = &dump->devices[index + count];

		devices[count] = (struct tp_dump_device){
			.id = device->id,
			.mapped_blocks = device->mapped_blocks,
			.transaction_id = device->transaction_id,
			.creation_time = device->creation_time,
			.snapshotted_time = device->snapshotted_time,
		};
	}
	*count_ret = count;
	return 0;
}

static int compare_ids(const void *key, const void *element)
{
	uint64_t id = *(const uint64_t *)key;
	const struct tp_walk_device *device = element;

	return (id > device->id) - (id < device->id);
}

int tp_dump_select(struct tp_dump *dump, uint64_t device_id, struct tp_error *err)
{
	const struct tp_walk_device *device = NULL;

	if (dump->nr_devices)
		device = bsearch(&device_id, dump->devices, dump->nr_devices,
				 sizeof(*dump->devices), compare_ids);
	if (!device)
		return tp_fail(err, TP_E_VOLUME_NOT_FOUND, "device %llu is not in this metadata",
			       (unsigned long long)device_id);
	tp_walk_cursor_destroy(dump->cursor);
	dump->cursor = NULL;
	dump->leaf = NULL;
	dump->run = (struct tp_dump_run){ 0 };
	dump->device_id = device_id;
	return tp_walk_cursor_create(dump->reader, device->root, TP_MAPPING_VALUE_SIZE,
				     &dump->cursor, err);
}

/* Take one mapping into the begun run; false when it starts another. */
static bool extend(struct tp_dump_run *run, uint64_t key, uint64_t value)
{
	if (run->length == 0 || key != run->begin + run->length ||
	    tp_mapping_block(value) != run->data_begin + run->length ||
	    tp_mapping_time(value) != run->time)
		return false;
	run->length++;
	return true;
}

int tp_dump_next(struct tp_dump *dump, struct tp_dump_run *runs, size_t max, size_t *count_ret,
		 struct tp_error *err)
{
	size_t count = 0;
	int rc;

	*count_ret = 0;
	if (!dump->cursor)
		return tp_fail(err, TP_E_INVALID, "no device is selected");
	while (count < max) {
		uint64_t key, value;

		if (!dump->leaf) {
			rc = tp_walk_cursor_next(dump->cursor, &dump->leaf, err);
			if (rc)
				return rc;
			dump->index = 0;
			if (!dump->leaf) {
				if (dump->run.length)
					runs[count++] = dump->run;
				dump->run.length = 0;
				break;
			}
		}
		key = tp_walk_key(dump->leaf, dump->index);
		value = tp_walk_value64(dump->leaf, dump->index);
		if (!extend(&dump->run, key, value)) {
			if (dump->run.length)
				runs[count++] = dump->run;
			dump->run = (struct tp_dump_run){
				.device_id = dump->device_id,
				.begin = key,
				.data_begin = tp_mapping_block(value),
				.length = 1,
				.time = tp_mapping_time(value),
			};
		}
		if (++dump->index == dump->leaf->nr_entries)
			dump->leaf = NULL;
	}
	*count_ret = count;
	return 0;
}
