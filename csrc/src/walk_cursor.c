/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Entries of one tree in key order, the superblock, and the list of devices.
 *
 * The cursor keeps for each level the children of the node above, all read at once. It stops at
 * the first thing that is wrong. It cannot loop: no tree has more nodes than the device has
 * blocks, nor more levels than TP_WALK_LEVELS_MAX.
 */
#include <stdlib.h>

#include "thinpool/error.h"
#include "thinpool/walk.h"

struct level {
	uint8_t *slots;
	uint64_t *blocks;
	int *statuses;
	size_t nr;
	size_t next;
};

struct tp_walk_cursor {
	struct tp_walk_reader *reader;
	uint32_t leaf_value_size;
	uint64_t nr_visited;
	uint64_t last_key;
	bool any_key;
	int depth; /* of the deepest level in use, -1 at the end */
	struct tp_walk_node leaf;
	struct level levels[TP_WALK_LEVELS_MAX];
};

static void drop_level(struct level *level)
{
	free(level->slots);
	free(level->blocks);
	free(level->statuses);
	*level = (struct level){ 0 };
}

/* node NULL: the root itself. */
static int push_level(struct tp_walk_cursor *cursor, const struct tp_walk_node *node, uint64_t root,
		      struct tp_error *err)
{
	size_t nr = node ? node->nr_entries : 1;
	struct level *level;

	if (cursor->depth + 1 == TP_WALK_LEVELS_MAX)
		return tp_fail(err, TP_E_NODE_MALFORMED,
			       "a tree of more than %u levels: it runs in a circle",
			       TP_WALK_LEVELS_MAX);
	level = &cursor->levels[cursor->depth + 1];
	level->slots = malloc(nr * TP_MD_BLOCK_SIZE);
	level->blocks = malloc(nr * sizeof(*level->blocks));
	level->statuses = malloc(nr * sizeof(*level->statuses));
	if (!level->slots || !level->blocks || !level->statuses) {
		drop_level(level);
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a level of a tree");
	}
	for (size_t i = 0; i < nr; i++)
		level->blocks[i] = node ? tp_walk_value64(node, (uint32_t)i) : root;
	level->nr = nr;
	cursor->depth++;
	return tp_walk_read_list(cursor->reader, level->blocks, nr, level->slots, level->statuses,
				 err);
}

int tp_walk_cursor_create(struct tp_walk_reader *reader, uint64_t root, uint32_t leaf_value_size,
			  struct tp_walk_cursor **cursor_ret, struct tp_error *err)
{
	struct tp_walk_cursor *cursor = calloc(1, sizeof(*cursor));
	int rc;

	if (!cursor)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a cursor");
	cursor->reader = reader;
	cursor->leaf_value_size = leaf_value_size;
	cursor->depth = -1;
	rc = push_level(cursor, NULL, root, err);
	if (rc) {
		tp_walk_cursor_destroy(cursor);
		return rc;
	}
	*cursor_ret = cursor;
	return 0;
}

void tp_walk_cursor_destroy(struct tp_walk_cursor *cursor)
{
	if (!cursor)
		return;
	for (unsigned i = 0; i < TP_WALK_LEVELS_MAX; i++)
		drop_level(&cursor->levels[i]);
	free(cursor);
}

static int take_node(struct tp_walk_cursor *cursor, struct tp_walk_node *node_ret,
		     struct tp_error *err)
{
	struct level *level = &cursor->levels[cursor->depth];
	size_t i = level->next++;

	if (cursor->nr_visited++ >= tp_walk_reader_nr_blocks(cursor->reader))
		return tp_fail_block(err, TP_E_NODE_MALFORMED, level->blocks[i], 0, 0,
				     "a tree with more nodes than the device has blocks");
	if (level->statuses[i]) {
		uint8_t again[TP_MD_BLOCK_SIZE] __attribute__((aligned(4096)));

		/* Once more, for the error's text. */
		return tp_walk_read(cursor->reader, level->blocks[i], again, err)
			       ?: tp_fail_block(err, TP_E_IO, level->blocks[i], 0, 0,
						"metadata block %llu could not be read at first",
						(unsigned long long)level->blocks[i]);
	}
	return tp_walk_node_load(level->slots + i * TP_MD_BLOCK_SIZE, level->blocks[i],
				 cursor->leaf_value_size, node_ret, err);
}

int tp_walk_cursor_next(struct tp_walk_cursor *cursor, const struct tp_walk_node **node_ret,
			struct tp_error *err)
{
	struct tp_walk_node *leaf = &cursor->leaf;
	struct tp_walk_node node;
	int rc;

	*node_ret = NULL;
	while (cursor->depth >= 0) {
		struct level *level = &cursor->levels[cursor->depth];

		if (level->next == level->nr) {
			drop_level(level);
			cursor->depth--;
			continue;
		}
		rc = take_node(cursor, &node, err);
		if (rc)
			return rc;
		if (!node.leaf) {
			rc = push_level(cursor, &node, 0, err);
			if (rc)
				return rc;
			continue;
		}
		if (node.nr_entries == 0)
			continue;
		if (cursor->any_key && tp_walk_key(&node, 0) <= cursor->last_key) {
			uint64_t block = level->blocks[level->next - 1];

			return tp_fail_block(err, TP_E_NODE_MALFORMED, block, tp_walk_key(&node, 0),
					     cursor->last_key + 1,
					     "metadata block %llu: its first key %llu is not above "
					     "the leaf before it",
					     (unsigned long long)block,
					     (unsigned long long)tp_walk_key(&node, 0));
		}
		cursor->any_key = true;
		cursor->last_key = tp_walk_key(&node, node.nr_entries - 1);
		*leaf = node;
		*node_ret = leaf;
		return 0;
	}
	return 0;
}

/* ---- lookup ------------------------------------------------------------------------------ */

int tp_walk_lookup(struct tp_walk_reader *reader, uint64_t root, uint64_t key, uint64_t *value_ret,
		   struct tp_error *err)
{
	uint8_t data[TP_MD_BLOCK_SIZE] __attribute__((aligned(4096)));
	uint64_t block = root;

	for (unsigned level = 0; level < TP_WALK_LEVELS_MAX; level++) {
		struct tp_walk_node node;
		uint32_t index;
		int rc = tp_walk_read(reader, block, data, err);

		if (!rc)
			rc = tp_walk_node_load(data, block, 8, &node, err);
		if (rc)
			return rc;
		index = tp_walk_node_find(&node, key);
		if (index == node.nr_entries || (node.leaf && tp_walk_key(&node, index) != key))
			return tp_fail(err, TP_E_KEY_NOT_FOUND, "key %llu is not in the tree",
				       (unsigned long long)key);
		block = tp_walk_value64(&node, index);
		if (node.leaf) {
			*value_ret = block;
			return 0;
		}
	}
	return tp_fail_block(err, TP_E_NODE_MALFORMED, block, 0, 0,
			     "a tree of more than %u levels: it runs in a circle",
			     TP_WALK_LEVELS_MAX);
}

/* ---- superblock -------------------------------------------------------------------------- */

static int read_superblock_at(struct tp_walk_reader *reader, uint64_t block,
			      struct tp_walk_superblock *out, struct tp_error *err)
{
	uint8_t buffer[TP_MD_BLOCK_SIZE] __attribute__((aligned(4096)));
	const struct tp_disk_superblock *disk = (const void *)buffer;
	unsigned long long number = block;
	struct tp_walk_fault fault;
	int rc = tp_walk_read(reader, block, buffer, err);

	if (rc)
		return rc;
	if (tp_le64_get(disk->magic) != TP_SUPERBLOCK_MAGIC)
		return tp_fail_block(err, TP_E_SUPERBLOCK_MAGIC, block, tp_le64_get(disk->magic),
				     TP_SUPERBLOCK_MAGIC,
				     "metadata block %llu is no superblock: magic 0x%llx, wanted "
				     "0x%llx",
				     number, (unsigned long long)tp_le64_get(disk->magic),
				     (unsigned long long)TP_SUPERBLOCK_MAGIC);
	if (!tp_walk_block_check(buffer, block, TP_SALT_SUPERBLOCK, &fault))
		return tp_fail_block(
			err,
			fault.type == TP_CHECK_CHECKSUM ? TP_E_SUPERBLOCK_CHECKSUM
							: TP_E_SUPERBLOCK_BLOCKNR,
			block, fault.found, fault.wanted,
			"superblock at block %llu: wrong %s: 0x%llx, wanted 0x%llx", number,
			fault.type == TP_CHECK_CHECKSUM ? "checksum" : "block number",
			(unsigned long long)fault.found, (unsigned long long)fault.wanted);
	memcpy(out->uuid, disk->uuid, sizeof(out->uuid));
	out->flags = tp_le32_get(disk->flags);
	out->version = tp_le32_get(disk->version);
	out->time = tp_le32_get(disk->time);
	out->data_block_size = tp_le32_get(disk->data_block_size);
	out->trans_id = tp_le64_get(disk->trans_id);
	out->held_root = tp_le64_get(disk->held_root);
	out->data_nr_blocks = tp_le64_get(disk->data_space_map.nr_blocks);
	out->metadata_nr_blocks = tp_le64_get(disk->metadata_space_map.nr_blocks);
	out->mapping_root = tp_le64_get(disk->data_mapping_root);
	out->details_root = tp_le64_get(disk->device_details_root);
	out->block = block;
	return 0;
}

int tp_walk_superblock_read(struct tp_walk_reader *reader, bool metadata_snapshot,
			    struct tp_walk_superblock *superblock_ret, struct tp_error *err)
{
	struct tp_walk_superblock live;
	int rc = read_superblock_at(reader, TP_SUPERBLOCK_LOCATION, &live, err);

	if (rc)
		return rc;
	if (!metadata_snapshot) {
		*superblock_ret = live;
		return 0;
	}
	if (live.held_root == 0)
		return tp_fail(err, TP_E_NO_METADATA_SNAPSHOT, "no metadata snapshot is held");
	return read_superblock_at(reader, live.held_root, superblock_ret, err);
}

/* ---- devices ----------------------------------------------------------------------------- */

struct device_list {
	struct tp_walk_device *devices;
	uint64_t nr;
	uint64_t room;
};

static int add_devices(struct device_list *list, const struct tp_walk_node *leaf,
		       struct tp_error *err)
{
	if (list->room - list->nr < leaf->nr_entries) {
		uint64_t room = list->room * 2 + leaf->nr_entries;
		struct tp_walk_device *grown = realloc(list->devices, room * sizeof(*grown));

		if (!grown)
			return tp_fail(err, TP_E_NO_MEMORY, "no memory for %llu devices",
				       (unsigned long long)room);
		list->devices = grown;
		list->room = room;
	}
	for (uint32_t i = 0; i < leaf->nr_entries; i++)
		list->devices[list->nr++] = (struct tp_walk_device){
			.id = tp_walk_key(leaf, i),
			.root = tp_walk_value64(leaf, i),
		};
	return 0;
}

static void add_details(struct device_list *list, uint64_t *at, const struct tp_walk_node *leaf)
{
	for (uint32_t i = 0; i < leaf->nr_entries; i++) {
		uint64_t id = tp_walk_key(leaf, i);
		struct tp_disk_device_details details;
		struct tp_walk_device *device;

		while (*at < list->nr && list->devices[*at].id < id)
			++*at;
		if (*at == list->nr || list->devices[*at].id != id)
			continue;
		memcpy(&details, tp_walk_value(leaf, i), sizeof(details));
		device = &list->devices[*at];
		device->mapped_blocks = tp_le64_get(details.mapped_blocks);
		device->transaction_id = tp_le64_get(details.transaction_id);
		device->creation_time = tp_le32_get(details.creation_time);
		device->snapshotted_time = tp_le32_get(details.snapshotted_time);
		device->has_details = true;
	}
}

static int collect(struct tp_walk_reader *reader, uint64_t root, bool details,
		   struct device_list *list, struct tp_error *err)
{
	struct tp_walk_cursor *cursor;
	const struct tp_walk_node *leaf;
	uint64_t at = 0;
	int rc = tp_walk_cursor_create(reader, root,
				       details ? TP_DETAILS_VALUE_SIZE : TP_MAPPING_VALUE_SIZE,
				       &cursor, err);

	if (rc)
		return rc;
	while (!(rc = tp_walk_cursor_next(cursor, &leaf, err)) && leaf) {
		if (details) {
			add_details(list, &at, leaf);
			continue;
		}
		rc = add_devices(list, leaf, err);
		if (rc)
			break;
	}
	tp_walk_cursor_destroy(cursor);
	return rc;
}

int tp_walk_devices(struct tp_walk_reader *reader, const struct tp_walk_superblock *superblock,
		    struct tp_walk_device **devices_ret, uint64_t *nr_devices_ret,
		    struct tp_error *err)
{
	struct device_list list = { 0 };
	int rc = collect(reader, superblock->mapping_root, false, &list, err);

	if (!rc)
		rc = collect(reader, superblock->details_root, true, &list, err);
	if (rc) {
		free(list.devices);
		return rc;
	}
	*devices_ret = list.devices;
	*nr_devices_ret = list.nr;
	return 0;
}
