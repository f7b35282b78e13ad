/* SPDX-License-Identifier: Apache-2.0 */
/* The superblock, and the metadata snapshot's copy of it. */
#include "thinpool/check.h"
#include "thinpool/error.h"

#define IN_LIVE TP_CHECK_IN_SUPERBLOCK
#define IN_HELD TP_CHECK_IN_METADATA_SNAPSHOT

static void say(struct tp_check *check, enum tp_check_type type, enum tp_check_severity severity,
		enum tp_check_structure structure, uint64_t block, uint64_t found, uint64_t wanted)
{
	struct tp_check_record record = tp_check_at(type, severity, structure, block);

	record.found = found;
	record.wanted = wanted;
	tp_check_report(check, record);
}

/* Number, magic, checksum: without these no field means anything. */
static bool identify(struct tp_check *check, const uint8_t *data, uint64_t block,
		     enum tp_check_structure structure)
{
	const struct tp_disk_superblock *disk = (const void *)data;
	struct tp_walk_fault fault;
	uint64_t magic = tp_le64_get(disk->magic);

	if (magic != TP_SUPERBLOCK_MAGIC) {
		say(check, TP_CHECK_MAGIC, TP_CHECK_FATAL, structure, block, magic,
		    TP_SUPERBLOCK_MAGIC);
		return false;
	}
	if (!tp_walk_block_check(data, block, TP_SALT_SUPERBLOCK, &fault)) {
		say(check, fault.type, TP_CHECK_FATAL, structure, block, fault.found, fault.wanted);
		/* With a checksum that is right, only the number is odd: the rest can be read. */
		return fault.type == TP_CHECK_BLOCK_NUMBER;
	}
	return true;
}

static void check_fields(struct tp_check *check, const uint8_t *data, uint64_t block,
			 enum tp_check_structure in)
{
	const struct tp_disk_superblock *disk = (const void *)data;
	uint32_t version = tp_le32_get(disk->version);
	uint32_t size = tp_le32_get(disk->data_block_size);
	uint32_t md_size = tp_le32_get(disk->metadata_block_size);
	uint32_t flags = tp_le32_get(disk->flags);
	uint32_t time = tp_le32_get(disk->time);

	/* thin_restore writes version 1 when its input names none, and nobody reads the field. */
	if (version != TP_SUPERBLOCK_VERSION)
		say(check, TP_CHECK_VERSION, version == 1 ? TP_CHECK_NOTE : TP_CHECK_FATAL, in,
		    block, version, TP_SUPERBLOCK_VERSION);
	if (tp_le32_get(disk->incompat_flags))
		say(check, TP_CHECK_FEATURES, TP_CHECK_FATAL, in, block,
		    tp_le32_get(disk->incompat_flags), 0);
	if (tp_le32_get(disk->compat_ro_flags))
		say(check, TP_CHECK_FEATURES, TP_CHECK_FATAL, in, block,
		    tp_le32_get(disk->compat_ro_flags), 0);
	if (tp_le32_get(disk->compat_flags))
		say(check, TP_CHECK_FEATURES, TP_CHECK_NOTE, in, block,
		    tp_le32_get(disk->compat_flags), 0);
	if (size < TP_DATA_BLOCK_SECTORS_MIN || size > TP_DATA_BLOCK_SECTORS_MAX ||
	    size % TP_DATA_BLOCK_SECTORS_MIN)
		say(check, TP_CHECK_DATA_BLOCK_SIZE, TP_CHECK_FATAL, in, block, size,
		    TP_DATA_BLOCK_SECTORS_MIN);
	if (md_size != TP_MD_BLOCK_SECTORS)
		say(check, TP_CHECK_METADATA_BLOCK_SIZE, TP_CHECK_NOTE, in, block, md_size,
		    TP_MD_BLOCK_SECTORS);
	if (flags & TP_SUPERBLOCK_NEEDS_CHECK && in == IN_LIVE)
		say(check, TP_CHECK_NEEDS_CHECK, TP_CHECK_NOTE, in, block, flags,
		    flags & ~TP_SUPERBLOCK_NEEDS_CHECK);
	if (flags & ~TP_SUPERBLOCK_NEEDS_CHECK)
		say(check, TP_CHECK_FLAGS, TP_CHECK_NOTE, in, block, flags,
		    flags & TP_SUPERBLOCK_NEEDS_CHECK);
	if (time > TP_TIME_MAX)
		say(check, TP_CHECK_POOL_TIME, TP_CHECK_FATAL, in, block, time, TP_TIME_MAX);
}

static void take_fields(const uint8_t *data, uint64_t block, struct tp_walk_superblock *out)
{
	const struct tp_disk_superblock *disk = (const void *)data;

	*out = (struct tp_walk_superblock){
		.flags = tp_le32_get(disk->flags),
		.version = tp_le32_get(disk->version),
		.time = tp_le32_get(disk->time),
		.data_block_size = tp_le32_get(disk->data_block_size),
		.trans_id = tp_le64_get(disk->trans_id),
		.held_root = tp_le64_get(disk->held_root),
		.data_nr_blocks = tp_le64_get(disk->data_space_map.nr_blocks),
		.metadata_nr_blocks = tp_le64_get(disk->metadata_space_map.nr_blocks),
		.mapping_root = tp_le64_get(disk->data_mapping_root),
		.details_root = tp_le64_get(disk->device_details_root),
		.block = block,
	};
}

static void take_map(struct tp_check_space_map *map, const struct tp_disk_space_map_root *root)
{
	map->nr_blocks = tp_le64_get(root->nr_blocks);
	map->nr_allocated = tp_le64_get(root->nr_allocated);
	map->bitmap_root = tp_le64_get(root->bitmap_root);
	map->overflow_root = tp_le64_get(root->ref_count_root);
}

static bool check_held(struct tp_check *check)
{
	uint8_t data[TP_MD_BLOCK_SIZE] __attribute__((aligned(4096)));
	uint64_t block = check->live.held_root;
	int rc;

	if (block == TP_SUPERBLOCK_LOCATION || block >= check->nr_blocks) {
		struct tp_check_record record =
			tp_check_at(TP_CHECK_POINTER_OUT_OF_RANGE, TP_CHECK_FATAL, IN_LIVE,
				    TP_SUPERBLOCK_LOCATION);

		record.found = block;
		record.wanted = check->nr_blocks;
		tp_check_report(check, record);
		return false;
	}
	rc = tp_walk_read(check->reader, block, data, NULL);
	if (rc) {
		say(check, TP_CHECK_IO_ERROR, TP_CHECK_FATAL, IN_HELD, block, (uint64_t)-rc, 0);
		return false;
	}
	if (!identify(check, data, block, IN_HELD))
		return false;
	check_fields(check, data, block, IN_HELD);
	take_fields(data, block, &check->held);
	return true;
}

int tp_check_superblocks(struct tp_check *check, struct tp_error *err)
{
	uint8_t data[TP_MD_BLOCK_SIZE] __attribute__((aligned(4096)));
	const struct tp_disk_superblock *disk = (const void *)data;
	uint64_t device_blocks = tp_walk_reader_nr_blocks(check->reader);
	uint64_t wanted;
	int rc;

	check->stop = true;
	if (device_blocks == 0) {
		say(check, TP_CHECK_TRUNCATED_DEVICE, TP_CHECK_FATAL, IN_LIVE, 0, 0, 1);
		return 0;
	}
	rc = tp_walk_read(check->reader, TP_SUPERBLOCK_LOCATION, data, err);
	if (rc)
		return rc;
	if (!identify(check, data, TP_SUPERBLOCK_LOCATION, IN_LIVE))
		return 0;
	check_fields(check, data, TP_SUPERBLOCK_LOCATION, IN_LIVE);
	take_fields(data, TP_SUPERBLOCK_LOCATION, &check->live);
	check->superblock_valid = true;
	take_map(&check->data_map, &disk->data_space_map);
	take_map(&check->metadata_map, &disk->metadata_space_map);

	wanted = check->metadata_map.nr_blocks;
	if (wanted > device_blocks)
		say(check, TP_CHECK_TRUNCATED_DEVICE, TP_CHECK_FATAL, IN_LIVE,
		    TP_SUPERBLOCK_LOCATION, device_blocks, wanted);
	if (wanted == 0 || wanted > TP_MD_BLOCKS_MAX) {
		say(check, TP_CHECK_SPACE_MAP_SIZE, TP_CHECK_FATAL, TP_CHECK_IN_METADATA_SPACE_MAP,
		    TP_SUPERBLOCK_LOCATION, wanted, TP_MD_BLOCKS_MAX);
		wanted = device_blocks;
	}
	check->nr_blocks = wanted < TP_MD_BLOCKS_MAX ? wanted : TP_MD_BLOCKS_MAX;
	check->progress_total = check->metadata_map.nr_allocated < check->nr_blocks
					? check->metadata_map.nr_allocated
					: check->nr_blocks;
	if (check->live.held_root || check->options.use_metadata_snapshot)
		check->has_held = check->live.held_root && check_held(check);
	check->stop = false;
	if (check->options.use_metadata_snapshot) {
		if (!check->live.held_root)
			say(check, TP_CHECK_NO_METADATA_SNAPSHOT, TP_CHECK_FATAL, IN_LIVE,
			    TP_SUPERBLOCK_LOCATION, 0, 1);
		check->stop = !check->has_held;
		check->superblock_valid = check->has_held;
		check->live = check->held;
		check->has_held = false;
	}
	return 0;
}
