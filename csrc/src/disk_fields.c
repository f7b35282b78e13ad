/* SPDX-License-Identifier: Apache-2.0 */
/* The on-disk records as a table, for the test that compares them with thinpool.format. */
#include "thinpool/abi.h"
#include "thinpool/disk_format.h"

#define FIELD(record, type, member)                                                                \
	{ record, #member, (uint32_t)offsetof(struct type, member),                                \
	  (uint32_t)sizeof(((struct type *)0)->member) }

#define SUPERBLOCK(member)  FIELD("superblock", tp_disk_superblock, member)
#define MAP_ROOT(member)    FIELD("space_map_root", tp_disk_space_map_root, member)
#define NODE(member)        FIELD("node_header", tp_disk_node_header, member)
#define DETAILS(member)     FIELD("device_details", tp_disk_device_details, member)
#define INDEX_ENTRY(member) FIELD("index_entry", tp_disk_index_entry, member)
#define INDEX(member)       FIELD("metadata_index", tp_disk_metadata_index, member)
#define BITMAP(member)      FIELD("bitmap", tp_disk_bitmap, member)

static const struct tp_disk_field fields[] = {
	SUPERBLOCK(csum),
	SUPERBLOCK(flags),
	SUPERBLOCK(blocknr),
	SUPERBLOCK(uuid),
	SUPERBLOCK(magic),
	SUPERBLOCK(version),
	SUPERBLOCK(time),
	SUPERBLOCK(trans_id),
	SUPERBLOCK(held_root),
	SUPERBLOCK(data_space_map),
	SUPERBLOCK(data_space_map_rest),
	SUPERBLOCK(metadata_space_map),
	SUPERBLOCK(metadata_space_map_rest),
	SUPERBLOCK(data_mapping_root),
	SUPERBLOCK(device_details_root),
	SUPERBLOCK(data_block_size),
	SUPERBLOCK(metadata_block_size),
	SUPERBLOCK(metadata_nr_blocks),
	SUPERBLOCK(compat_flags),
	SUPERBLOCK(compat_ro_flags),
	SUPERBLOCK(incompat_flags),
	MAP_ROOT(nr_blocks),
	MAP_ROOT(nr_allocated),
	MAP_ROOT(bitmap_root),
	MAP_ROOT(ref_count_root),
	NODE(csum),
	NODE(flags),
	NODE(blocknr),
	NODE(nr_entries),
	NODE(max_entries),
	NODE(value_size),
	NODE(padding),
	DETAILS(mapped_blocks),
	DETAILS(transaction_id),
	DETAILS(creation_time),
	DETAILS(snapshotted_time),
	FIELD("mapping", tp_disk_mapping, block_time),
	FIELD("ref_count", tp_disk_ref_count, count),
	INDEX_ENTRY(blocknr),
	INDEX_ENTRY(nr_free),
	INDEX_ENTRY(none_free_before),
	INDEX(csum),
	INDEX(padding),
	INDEX(blocknr),
	INDEX(entries),
	BITMAP(csum),
	BITMAP(padding),
	BITMAP(blocknr),
	BITMAP(words),
};

int tp_disk_field_at(size_t index, struct tp_disk_field *field_ret)
{
	if (index >= sizeof(fields) / sizeof(*fields))
		return TP_E_OUT_OF_RANGE;
	*field_ret = fields[index];
	return 0;
}
