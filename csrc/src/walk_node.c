/* SPDX-License-Identifier: Apache-2.0 */
/* What one block must pass before any byte of it is used. */
#include "thinpool/error.h"
#include "thinpool/walk.h"

bool tp_walk_block_check(const void *data, uint64_t block, uint32_t salt,
			 struct tp_walk_fault *fault)
{
	const struct tp_disk_block_header *header = data;
	uint32_t wanted =
		tp_crc32c(UINT32_MAX, (const uint8_t *)data + TP_CSUM_SKIP, TP_CSUM_LENGTH) ^ salt;
	uint32_t found = tp_le32_get(header->csum);

	*fault = (struct tp_walk_fault){ .key = UINT64_MAX };
	if (found != wanted) {
		fault->type = TP_CHECK_CHECKSUM;
		fault->found = found;
		fault->wanted = wanted;
		return false;
	}
	if (tp_le64_get(header->blocknr) != block) {
		fault->type = TP_CHECK_BLOCK_NUMBER;
		fault->found = tp_le64_get(header->blocknr);
		fault->wanted = block;
		return false;
	}
	return true;
}

static bool refuse(struct tp_walk_fault *fault, uint32_t type, uint64_t found, uint64_t wanted)
{
	fault->type = type;
	fault->key = UINT64_MAX;
	fault->found = found;
	fault->wanted = wanted;
	return false;
}

bool tp_walk_node_parse(const void *data, uint32_t leaf_value_size, struct tp_walk_node *node_ret,
			struct tp_walk_fault *fault)
{
	const struct tp_disk_node_header *header = data;
	const uint8_t *bytes = data;
	uint32_t flags = tp_le32_get(header->flags);
	uint32_t kind = flags & (TP_NODE_INTERNAL | TP_NODE_LEAF);
	uint32_t nr = tp_le32_get(header->nr_entries);
	uint32_t max = tp_le32_get(header->max_entries);
	uint32_t value_size = tp_le32_get(header->value_size);
	bool leaf = kind == TP_NODE_LEAF;
	uint32_t wanted_size = leaf ? leaf_value_size : TP_MAPPING_VALUE_SIZE;

	if (kind != TP_NODE_INTERNAL && kind != TP_NODE_LEAF)
		return refuse(fault, TP_CHECK_NODE_FLAGS, flags, TP_NODE_LEAF);
	if (value_size != wanted_size)
		return refuse(fault, TP_CHECK_NODE_VALUE_SIZE, value_size, wanted_size);
	/* The sizes are known and small here, so that the product cannot overflow. */
	if (max > (TP_MD_BLOCK_SIZE - TP_NODE_HEADER_SIZE) / (8 + value_size))
		return refuse(fault, TP_CHECK_NODE_SIZE, max, TP_NODE_MAX_ENTRIES(value_size));
	if (nr > max)
		return refuse(fault, TP_CHECK_NODE_SIZE, nr, max);
	if (!leaf && nr == 0)
		return refuse(fault, TP_CHECK_NODE_EMPTY, 0, 1);
	*node_ret = (struct tp_walk_node){
		.keys = bytes + TP_NODE_HEADER_SIZE,
		.values = bytes + TP_NODE_HEADER_SIZE + 8 * (size_t)max,
		.nr_entries = nr,
		.max_entries = max,
		.value_size = value_size,
		.leaf = leaf,
		.odd_flags = flags != kind,
	};
	return true;
}

uint32_t tp_walk_node_disorder(const struct tp_walk_node *node)
{
	uint64_t bad = 0;

	/* Without an early exit, so that the usual case is vectorised. */
	for (uint32_t i = 1; i < node->nr_entries; i++)
		bad |= tp_walk_key(node, i) <= tp_walk_key(node, i - 1);
	if (!bad)
		return node->nr_entries;
	for (uint32_t i = 1; i < node->nr_entries; i++)
		if (tp_walk_key(node, i) <= tp_walk_key(node, i - 1))
			return i;
	return node->nr_entries;
}

int tp_walk_node_load(const void *data, uint64_t block, uint32_t leaf_value_size,
		      struct tp_walk_node *node_ret, struct tp_error *err)
{
	unsigned long long number = block;
	struct tp_walk_fault fault;
	uint32_t disorder;

	if (!tp_walk_block_check(data, block, TP_SALT_NODE, &fault)) {
		if (fault.type == TP_CHECK_CHECKSUM)
			return tp_fail_block(
				err, TP_E_BLOCK_CHECKSUM, block, fault.found, fault.wanted,
				"metadata block %llu: checksum 0x%llx, wanted 0x%llx", number,
				(unsigned long long)fault.found, (unsigned long long)fault.wanted);
		return tp_fail_block(err, TP_E_BLOCK_NUMBER, block, fault.found, fault.wanted,
				     "metadata block %llu says that it is block %llu", number,
				     (unsigned long long)fault.found);
	}
	if (!tp_walk_node_parse(data, leaf_value_size, node_ret, &fault))
		return tp_fail_block(err, TP_E_NODE_MALFORMED, block, fault.found, fault.wanted,
				     "metadata block %llu is no btree node of this tree (%s): "
				     "found %llu, wanted %llu",
				     number, tp_check_type_name(fault.type),
				     (unsigned long long)fault.found,
				     (unsigned long long)fault.wanted);
	node_ret->block = block;
	disorder = tp_walk_node_disorder(node_ret);
	if (disorder < node_ret->nr_entries)
		return tp_fail_block(err, TP_E_NODE_MALFORMED, block,
				     tp_walk_key(node_ret, disorder),
				     tp_walk_key(node_ret, disorder - 1) + 1,
				     "metadata block %llu: key %u is not above the one before it",
				     number, disorder);
	return 0;
}

uint32_t tp_walk_node_find(const struct tp_walk_node *node, uint64_t key)
{
	uint32_t low = 0, high = node->nr_entries;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (tp_walk_key(node, middle) <= key)
			low = middle + 1;
		else
			high = middle;
	}
	return low ? low - 1 : node->nr_entries;
}
