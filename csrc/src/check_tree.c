/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every node of the trees, once.
 *
 * Down: a set of nodes is visited in the order of the disk, each is tested by itself, and the
 * blocks it points to are counted; those met for the first time are the next level. However often
 * a node is shared, it is read once.
 *
 * Up: every internal node is visited once more and compared with its children (separators, depth,
 * fill), which the first pass left in `infos`, as soon as all of them are known. Nearly all
 * internal nodes stand right above the leaves, so that this is one more pass over about a
 * hundredth of the nodes. A shared subtree may hang at different levels of two trees, which is why
 * heights are counted from the leaves, and why the order is found by waiting for the children. What
 * still waits in the end is part of a circle.
 */
#include "thinpool/check.h"
#include "thinpool/error.h"

#define CHILD_PREFETCH 12u

enum tp_check_structure tp_check_use_structure(enum tp_check_use use)
{
	switch (use) {
	case TP_USE_METADATA_SNAPSHOT:
		return TP_CHECK_IN_METADATA_SNAPSHOT;
	case TP_USE_MAPPING_TOP_LEVEL:
		return TP_CHECK_IN_MAPPING_TOP_LEVEL;
	case TP_USE_DEVICE_TREE:
		return TP_CHECK_IN_DEVICE_TREE;
	case TP_USE_DETAILS_TREE:
		return TP_CHECK_IN_DETAILS_TREE;
	case TP_USE_DATA_INDEX:
		return TP_CHECK_IN_DATA_INDEX;
	case TP_USE_DATA_BITMAP:
		return TP_CHECK_IN_DATA_BITMAP;
	case TP_USE_DATA_OVERFLOW:
		return TP_CHECK_IN_DATA_OVERFLOW;
	case TP_USE_METADATA_INDEX:
		return TP_CHECK_IN_METADATA_INDEX;
	case TP_USE_METADATA_BITMAP:
		return TP_CHECK_IN_METADATA_BITMAP;
	case TP_USE_METADATA_OVERFLOW:
		return TP_CHECK_IN_METADATA_OVERFLOW;
	case TP_USE_NONE:
	case TP_USE_SUPERBLOCK:
		break;
	}
	return TP_CHECK_IN_SUPERBLOCK;
}

static uint32_t leaf_value_size(enum tp_check_use use)
{
	switch (use) {
	case TP_USE_DETAILS_TREE:
		return TP_DETAILS_VALUE_SIZE;
	case TP_USE_DATA_INDEX:
		return TP_INDEX_VALUE_SIZE;
	case TP_USE_DATA_OVERFLOW:
	case TP_USE_METADATA_OVERFLOW:
		return TP_REF_COUNT_VALUE_SIZE;
	default:
		return TP_MAPPING_VALUE_SIZE;
	}
}

static bool is_tree(enum tp_check_use use)
{
	return use == TP_USE_MAPPING_TOP_LEVEL || use == TP_USE_DEVICE_TREE ||
	       use == TP_USE_DETAILS_TREE || use == TP_USE_DATA_INDEX ||
	       use == TP_USE_DATA_OVERFLOW || use == TP_USE_METADATA_OVERFLOW;
}

/* What is kept of blocks is anywhere: ask for that of a child some entries before it is needed. */
static void prefetch_child(const struct tp_check *check, const struct tp_walk_node *node,
			   uint32_t index)
{
	uint64_t child;

	if (index + CHILD_PREFETCH >= node->nr_entries)
		return;
	child = tp_walk_value64(node, index + CHILD_PREFETCH);
	if (child >= check->nr_blocks)
		return;
	__builtin_prefetch(&check->infos[child], 1);
	__builtin_prefetch((const uint8_t *)&check->infos[child + 1] - 1, 1);
	__builtin_prefetch(&check->uses[child], 1);
}

/* Something below could not be followed: what is counted too high may only seem so. */
static void mark_incomplete(struct tp_check *check, enum tp_check_use use)
{
	check->metadata_incomplete = true;
	if (use == TP_USE_DEVICE_TREE || use == TP_USE_MAPPING_TOP_LEVEL ||
	    use == TP_USE_METADATA_SNAPSHOT)
		check->data_incomplete = true;
}

static struct tp_check_record record_at(const struct tp_check *check, enum tp_check_type type,
					enum tp_check_severity severity, enum tp_check_use use,
					uint64_t block)
{
	struct tp_check_record record =
		tp_check_at(type, severity, tp_check_use_structure(use), block);

	if (use == TP_USE_DEVICE_TREE)
		record.device = check->infos[block].device;
	return record;
}

/* ---- down -------------------------------------------------------------------------------- */

bool tp_check_refer(struct tp_check *check, enum tp_check_use use, uint64_t block, uint64_t from,
		    uint64_t key, uint32_t device)
{
	struct tp_check_record record;
	uint8_t before = TP_USE_NONE;
	bool first;

	if (block >= check->nr_blocks) {
		record = tp_check_at(TP_CHECK_POINTER_OUT_OF_RANGE, TP_CHECK_FATAL,
				     tp_check_use_structure(use), from);
		record.device = device;
		record.key = key;
		record.found = block;
		record.wanted = check->nr_blocks;
		tp_check_report(check, record);
		mark_incomplete(check, use);
		return false;
	}
	__atomic_compare_exchange_n(&check->uses[block], &before, (uint8_t)use, false,
				    __ATOMIC_RELAXED, __ATOMIC_RELAXED);
	first = before == TP_USE_NONE;
	if (!first && (before != (uint8_t)use || !is_tree(use))) {
		record = tp_check_at(TP_CHECK_BLOCK_REUSED, TP_CHECK_FATAL,
				     tp_check_use_structure(use), block);
		record.device = device;
		record.key = key;
		record.found = tp_check_use_structure(before);
		record.wanted = from;
		tp_check_report(check, record);
		mark_incomplete(check, use);
		return false;
	}
	tp_check_counts_add(&check->counts, block);
	if (first) {
		check->infos[block].device = device;
		if (is_tree(use))
			tp_walk_bit_set(check->next_level, block);
	}
	return true;
}

static void visit_top_level(struct tp_check *check, uint64_t block, const struct tp_walk_node *node)
{
	for (uint32_t i = 0; i < node->nr_entries; i++) {
		uint64_t id = tp_walk_key(node, i);
		bool legal = id <= TP_DEVICE_ID_MAX;

		if (!legal) {
			struct tp_check_record record =
				record_at(check, TP_CHECK_DEVICE_ID, TP_CHECK_FATAL,
					  TP_USE_MAPPING_TOP_LEVEL, block);

			record.key = id;
			record.found = id;
			record.wanted = TP_DEVICE_ID_MAX;
			tp_check_report(check, record);
		}
		if (!check->options.skip_mappings)
			tp_check_refer(check, TP_USE_DEVICE_TREE, tp_walk_value64(node, i), block,
				       id, legal ? (uint32_t)id : UINT32_MAX);
	}
}

static void say_mapping(struct tp_check *check, enum tp_check_type type, uint64_t block,
			uint64_t key, uint64_t data_block, uint64_t found, uint64_t wanted)
{
	struct tp_check_record record =
		record_at(check, type, TP_CHECK_FATAL, TP_USE_DEVICE_TREE, block);

	record.key = key;
	record.data_block = data_block;
	record.found = found;
	record.wanted = wanted;
	tp_check_report(check, record);
}

#define LONG_PASS 8u  /* as many blocks as those that are put aside, at least */
#define PREFETCH  16u /* entries ahead: data blocks of neighbours are anywhere */

/* Faults of one entry; rare, so that the loop that counts stays small. */
static void say_mapping_faults(struct tp_check *check, uint64_t block, uint64_t key,
			       uint64_t data_block, uint32_t time)
{
	if (data_block >= check->nr_data_blocks)
		say_mapping(check, TP_CHECK_MAPPING_PAST_END, block, key, data_block, data_block,
			    check->nr_data_blocks);
	if (time > check->live.time)
		say_mapping(check, TP_CHECK_MAPPING_TIME, block, key, data_block, time,
			    check->live.time);
}

static void visit_mappings(struct tp_check *check, unsigned thread, uint64_t block,
			   const struct tp_walk_node *node)
{
	struct tp_check_counts *counts = &check->data_counts;
	/* In locals: the bytes that are counted in could alias anything else. */
	const uint8_t *values = node->values;
	uint32_t nr = node->nr_entries;
	uint64_t end = check->nr_data_blocks;
	uint64_t nr_counted = check->data_map.compare_counts ? counts->nr : 0;
	uint32_t time_max = check->live.time;
	uint64_t limit = end < nr_counted ? end : nr_counted;
	uint8_t *lane = counts->shared ? NULL : tp_check_counts_lane(counts, thread);

	for (uint32_t i = 0; i < nr; i++) {
		uint64_t value = tp_walk_get64(values + 8 * (size_t)i);
		uint64_t data_block = tp_mapping_block(value);
		uint32_t time = tp_mapping_time(value);

		if (lane && i + PREFETCH < nr) {
			uint64_t ahead = tp_mapping_block(
				tp_walk_get64(values + 8 * (size_t)(i + PREFETCH)));

			if (ahead < limit)
				__builtin_prefetch(&lane[ahead / 4], 1);
		}
		if (__builtin_expect(data_block >= limit || time > time_max, 0)) {
			say_mapping_faults(check, block, tp_walk_key(node, i), data_block, time);
			if (data_block >= nr_counted)
				continue;
		}
		if (lane)
			tp_check_counts_add_own(counts, lane, data_block);
		else
			tp_check_counts_add(counts, data_block);
	}
}

static void visit_details(struct tp_check *check, uint64_t block, const struct tp_walk_node *node)
{
	for (uint32_t i = 0; i < node->nr_entries; i++) {
		uint64_t id = tp_walk_key(node, i);
		struct tp_check_record record = record_at(check, TP_CHECK_DEVICE_ID, TP_CHECK_FATAL,
							  TP_USE_DETAILS_TREE, block);
		struct tp_disk_device_details details;
		uint32_t created, snapshotted;

		memcpy(&details, tp_walk_value(node, i), sizeof(details));
		created = tp_le32_get(details.creation_time);
		snapshotted = tp_le32_get(details.snapshotted_time);
		record.key = id;
		if (id > TP_DEVICE_ID_MAX) {
			record.found = id;
			record.wanted = TP_DEVICE_ID_MAX;
			tp_check_report(check, record);
		}
		if (created > check->live.time || snapshotted > check->live.time) {
			/* Costs copies that nobody needed, and no more. */
			record.type = TP_CHECK_DETAILS_TIME;
			record.severity = TP_CHECK_NOTE;
			record.found = created > snapshotted ? created : snapshotted;
			record.wanted = check->live.time;
			tp_check_report(check, record);
		}
	}
}

static void visit_leaf(struct tp_check *check, unsigned thread, enum tp_check_use use,
		       uint64_t block, const struct tp_walk_node *node)
{
	switch (use) {
	case TP_USE_MAPPING_TOP_LEVEL:
		visit_top_level(check, block, node);
		break;
	case TP_USE_DEVICE_TREE:
		visit_mappings(check, thread, block, node);
		break;
	case TP_USE_DETAILS_TREE:
		visit_details(check, block, node);
		break;
	case TP_USE_DATA_INDEX:
		for (uint32_t i = 0; i < node->nr_entries; i++)
			tp_check_index_entry(check, block, tp_walk_key(node, i),
					     tp_walk_value(node, i));
		break;
	default:
		for (uint32_t i = 0; check->comparing_overflow && i < node->nr_entries; i++)
			tp_check_overflow_entry(check, block, tp_walk_key(node, i),
						tp_walk_get32(tp_walk_value(node, i)));
		break;
	}
}

static void check_shape(struct tp_check *check, enum tp_check_use use, uint64_t block,
			const struct tp_walk_node *node)
{
	uint32_t formula =
		3 * ((TP_MD_BLOCK_SIZE - TP_NODE_HEADER_SIZE) / (8 + node->value_size) / 3);
	uint32_t disorder = tp_walk_node_disorder(node);
	struct tp_check_record record;

	if (node->odd_flags) {
		record = record_at(check, TP_CHECK_NODE_FLAGS, TP_CHECK_NOTE, use, block);
		record.wanted = TP_NODE_LEAF;
		tp_check_report(check, record);
	}
	if (node->max_entries != formula) {
		bool usable = node->max_entries >= 3 && node->max_entries % 3 == 0;

		record = record_at(check, TP_CHECK_NODE_MAX_ENTRIES,
				   usable ? TP_CHECK_NOTE : TP_CHECK_FATAL, use, block);
		record.found = node->max_entries;
		record.wanted = formula;
		tp_check_report(check, record);
	}
	if (disorder < node->nr_entries) {
		uint64_t key = tp_walk_key(node, disorder);
		uint64_t before = tp_walk_key(node, disorder - 1);

		record = record_at(
			check, key == before ? TP_CHECK_KEYS_DUPLICATE : TP_CHECK_KEYS_OUT_OF_ORDER,
			TP_CHECK_FATAL, use, block);
		record.key = disorder;
		record.found = key;
		record.wanted = before;
		tp_check_report(check, record);
	}
}

void tp_check_keep(struct tp_check_kept *kept, uint64_t block, const void *data)
{
	size_t slot = atomic_fetch_add_explicit(&kept->nr, 1, memory_order_relaxed);

	if (slot >= TP_CHECK_KEPT_MAX)
		return;
	memcpy(kept->nodes + slot * TP_MD_BLOCK_SIZE, data, TP_MD_BLOCK_SIZE);
	kept->blocks[slot] = block;
}

static void visit_node(void *argument, unsigned thread, uint64_t block, const void *data,
		       int status)
{
	struct tp_check *check = argument;
	enum tp_check_use use = check->uses[block];
	struct tp_check_info *info = &check->infos[block];
	struct tp_walk_fault fault = { .type = TP_CHECK_IO_ERROR, .key = UINT64_MAX };
	struct tp_walk_node node;
	uint8_t state = TP_INFO_USABLE;

	if (check->ahead.passing && tp_walk_bit_get(check->ahead.bits, block)) {
		if (data)
			tp_check_keep(&check->ahead.copies, block, data);
		return;
	}
	if (!data)
		fault.found = (uint64_t)-status;
	if (!data || !tp_walk_block_check(data, block, TP_SALT_NODE, &fault) ||
	    !tp_walk_node_parse(data, leaf_value_size(use), &node, &fault)) {
		tp_check_report_fault(check, use, block, &fault);
		mark_incomplete(check, use);
		return;
	}
	check_shape(check, use, block, &node);
	info->nr_entries = (uint16_t)node.nr_entries;
	info->max_entries = (uint16_t)node.max_entries;
	if (node.nr_entries) {
		info->first_key = tp_walk_key(&node, 0);
		info->last_key = tp_walk_key(&node, node.nr_entries - 1);
	}
	if (node.leaf) {
		info->empty = node.nr_entries == 0;
		info->nr_entries_below = node.nr_entries;
		visit_leaf(check, thread, use, block, &node);
		state |= TP_INFO_DONE;
	} else {
		state |= TP_INFO_INTERNAL;
		for (uint32_t i = 0; i < node.nr_entries; i++) {
			prefetch_child(check, &node, i);
			if (!tp_check_refer(check, use, tp_walk_value64(&node, i), block,
					    tp_walk_key(&node, i), info->device))
				state |= TP_INFO_INCOMPLETE;
		}
		tp_walk_bit_set(check->internals, block);
		tp_check_keep(&check->kept, block, data);
	}
	__atomic_fetch_or(&info->state, state, __ATOMIC_RELEASE);
}

/* ---- up ---------------------------------------------------------------------------------- */

static uint8_t state_of(const struct tp_check *check, uint64_t block)
{
	return __atomic_load_n(&check->infos[block].state, __ATOMIC_ACQUIRE);
}

/* A child that the first pass could use; what it could not was reported then. */
static const struct tp_check_info *child_info(const struct tp_check *check, enum tp_check_use use,
					      uint64_t child)
{
	if (child >= check->nr_blocks || check->uses[child] != (uint8_t)use ||
	    !(state_of(check, child) & TP_INFO_USABLE))
		return NULL;
	return &check->infos[child];
}

static void say_child(struct tp_check *check, enum tp_check_type type, enum tp_check_use use,
		      uint64_t block, uint64_t key, uint64_t found, uint64_t wanted)
{
	struct tp_check_record record = record_at(check, type, TP_CHECK_FATAL, use, block);

	record.key = key;
	record.found = found;
	record.wanted = wanted;
	tp_check_report(check, record);
}

/* One child against its separators and its own minimum. */
static void check_child(struct tp_check *check, enum tp_check_use use, uint64_t block,
			const struct tp_walk_node *node, uint32_t index)
{
	uint64_t child = tp_walk_value64(node, index);
	struct tp_check_info *info = &check->infos[child];
	uint64_t key = tp_walk_key(node, index);
	uint32_t minimum = info->max_entries / 3u;

	if (info->nr_entries < minimum &&
	    !(__atomic_fetch_or(&info->state, TP_INFO_UNDERFULL_SAID, __ATOMIC_RELAXED) &
	      TP_INFO_UNDERFULL_SAID))
		say_child(check, TP_CHECK_NODE_UNDERFULL, use, child, UINT64_MAX, info->nr_entries,
			  minimum);
	if (info->nr_entries && key > info->first_key)
		say_child(check, TP_CHECK_SEPARATOR_HIGH, use, block, index, key, info->first_key);
	if (!info->empty && index + 1 < node->nr_entries &&
	    info->last_key >= tp_walk_key(node, index + 1))
		say_child(check, TP_CHECK_SEPARATOR_OVERLAP, use, block, index + 1,
			  tp_walk_key(node, index + 1), info->last_key);
}

/* All children are known: compare them and become known oneself. */
static void finish(struct tp_check *check, enum tp_check_use use, uint64_t block,
		   const struct tp_walk_node *node)
{
	struct tp_check_info *info = &check->infos[block];
	const struct tp_check_info *sibling = NULL;
	uint8_t state = TP_INFO_DONE;
	bool depth_said = false, max_said = false;

	info->empty = true;
	for (uint32_t i = 0; i < node->nr_entries; i++) {
		uint64_t child = tp_walk_value64(node, i);
		const struct tp_check_info *below = child_info(check, use, child);

		if (!below) {
			state |= TP_INFO_INCOMPLETE;
			continue;
		}
		state |= state_of(check, child) & TP_INFO_INCOMPLETE;
		check_child(check, use, block, node, i);
		if (sibling && below->height != sibling->height && !depth_said) {
			depth_said = true;
			say_child(check, TP_CHECK_UNEQUAL_DEPTH, use, block, i, below->height,
				  sibling->height);
		}
		if (sibling && below->max_entries != sibling->max_entries &&
		    below->height == sibling->height && !max_said) {
			max_said = true;
			say_child(check, TP_CHECK_NODE_MAX_ENTRIES, use, child, UINT64_MAX,
				  below->max_entries, sibling->max_entries);
		}
		sibling = sibling ? sibling : below;
		info->nr_entries_below += below->nr_entries_below;
		if (!below->empty) {
			info->empty = false;
			info->last_key = below->last_key;
		}
		if (below->height >= info->height)
			info->height = below->height + 1;
	}
	if (info->height > TP_WALK_LEVELS_MAX) {
		info->height = TP_WALK_LEVELS_MAX;
		say_child(check, TP_CHECK_TOO_DEEP, use, block, UINT64_MAX, TP_WALK_LEVELS_MAX + 1,
			  TP_WALK_LEVELS_MAX);
	}
	__atomic_fetch_or(&info->state, state, __ATOMIC_RELEASE);
	atomic_fetch_add_explicit(&check->nr_finished, 1, memory_order_relaxed);
}

/* Finish a node unless a child is not known yet. */
static void try_finish(struct tp_check *check, enum tp_check_use use, uint64_t block,
		       const struct tp_walk_node *node)
{
	for (uint32_t i = 0; i < node->nr_entries; i++) {
		uint64_t child = tp_walk_value64(node, i);

		prefetch_child(check, node, i);
		if (child_info(check, use, child) && !(state_of(check, child) & TP_INFO_DONE))
			return;
	}
	finish(check, use, block, node);
}

static void visit_again(void *argument, unsigned thread, uint64_t block, const void *data,
			int status)
{
	struct tp_check *check = argument;
	enum tp_check_use use = check->uses[block];
	struct tp_walk_fault fault = { .type = TP_CHECK_IO_ERROR, .key = UINT64_MAX };
	struct tp_walk_node node;

	(void)thread;
	if (!data)
		fault.found = (uint64_t)-status;
	/* It was good a moment ago; a device that changes under us must not lead us astray. */
	if (!data || !tp_walk_block_check(data, block, TP_SALT_NODE, &fault) ||
	    !tp_walk_node_parse(data, leaf_value_size(use), &node, &fault)) {
		tp_check_report_fault(check, use, block, &fault);
		mark_incomplete(check, use);
		__atomic_fetch_or(&check->infos[block].state, TP_INFO_DONE | TP_INFO_INCOMPLETE,
				  __ATOMIC_RELEASE);
		atomic_fetch_add_explicit(&check->nr_finished, 1, memory_order_relaxed);
		return;
	}
	try_finish(check, use, block, &node);
}

size_t tp_check_nr_kept(const struct tp_check_kept *kept)
{
	size_t nr = atomic_load_explicit(&kept->nr, memory_order_relaxed);

	return nr < TP_CHECK_KEPT_MAX ? nr : TP_CHECK_KEPT_MAX;
}

static void visit_kept(void *argument, unsigned thread)
{
	struct tp_check *check = argument;
	struct tp_check_kept *kept = &check->kept;
	size_t slot;

	(void)thread;
	while ((slot = atomic_fetch_add_explicit(&kept->next, 1, memory_order_relaxed)) <
	       tp_check_nr_kept(&check->kept)) {
		uint64_t block = kept->blocks[slot];
		enum tp_check_use use = check->uses[block];
		struct tp_walk_fault fault;
		struct tp_walk_node node;
		bool parsed;

		if (state_of(check, block) & TP_INFO_DONE)
			continue;
		parsed = tp_walk_node_parse(kept->nodes + slot * TP_MD_BLOCK_SIZE,
					    leaf_value_size(use), &node, &fault);
		TP_ASSERT(parsed); /* as it did before it was copied */
		try_finish(check, use, block, &node);
	}
}

/* ---- both -------------------------------------------------------------------------------- */

static uint64_t next_bit(const struct tp_check *check, const uint64_t *bits, uint64_t from)
{
	return tp_walk_bit_next(bits, from, check->nr_blocks);
}

static void say_too_deep(struct tp_check *check, const uint64_t *bits)
{
	uint64_t block;

	for (block = next_bit(check, bits, 0); block < check->nr_blocks;
	     block = next_bit(check, bits, block + 1)) {
		enum tp_check_use use = check->uses[block];

		say_child(check, TP_CHECK_TOO_DEEP, use, block, UINT64_MAX, TP_WALK_LEVELS_MAX + 1,
			  TP_WALK_LEVELS_MAX);
		mark_incomplete(check, use);
	}
}

/* What is pending and was not kept, in `level`; false when that is nothing. */
static bool mark_unkept(struct tp_check *check)
{
	memcpy(check->level, check->internals, tp_walk_words(check->nr_blocks) * 8);
	for (size_t i = 0; i < tp_check_nr_kept(&check->kept); i++) {
		uint64_t block = check->kept.blocks[i];

		check->level[block / 64] &= ~(UINT64_C(1) << block % 64);
	}
	return next_bit(check, check->level, 0) < check->nr_blocks;
}

static void walk_up(struct tp_check *check)
{
	uint64_t *pending = check->internals;
	uint64_t block;

	/* Each round finishes at least one height, and no legal tree is higher than this. */
	for (unsigned round = 0; round <= TP_WALK_LEVELS_MAX; round++) {
		if (next_bit(check, pending, 0) == check->nr_blocks)
			return;
		atomic_store(&check->nr_finished, 0);
		atomic_store(&check->kept.next, 0);
		tp_walk_team_run(tp_walk_reader_team(check->reader), visit_kept, check);
		if (mark_unkept(check))
			tp_walk_blocks(check->reader, check->level, check->nr_blocks, visit_again,
				       check);
		if (atomic_load(&check->nr_finished) == 0)
			break;
		for (block = next_bit(check, pending, 0); block < check->nr_blocks;
		     block = next_bit(check, pending, block + 1))
			if (state_of(check, block) & TP_INFO_DONE)
				pending[block / 64] &= ~(UINT64_C(1) << block % 64);
	}
	if (!tp_walk_cancelled(check->reader))
		say_too_deep(check, pending);
}

/* Put aside in this pass what is not part of it and lies on its way, when it is a long one. */
static void pass_by(struct tp_check *check)
{
	struct tp_check_ahead *ahead = &check->ahead;
	uint64_t words = tp_walk_words(check->nr_blocks), nr = 0, block;

	if (!ahead->nr)
		return;
	for (uint64_t word = 0; word < words; word++)
		nr += (unsigned)__builtin_popcountll(check->level[word]);
	if (nr < LONG_PASS * ahead->nr)
		return;
	for (block = next_bit(check, ahead->bits, 0); block < check->nr_blocks;
	     block = next_bit(check, ahead->bits, block + 1)) {
		uint64_t bit = UINT64_C(1) << block % 64;

		/* Somebody's already: it is visited as that, now or later, and not twice. */
		if (check->uses[block] != TP_USE_NONE)
			ahead->bits[block / 64] &= ~bit;
		else
			check->level[block / 64] |= bit;
	}
	ahead->passing = true;
	ahead->nr = 0;
}

void tp_check_walk(struct tp_check *check)
{
	size_t bytes = tp_walk_words(check->nr_blocks) * 8;

	memset(check->internals, 0, bytes);
	atomic_store(&check->kept.nr, 0);
	for (unsigned level = 0; next_bit(check, check->next_level, 0) < check->nr_blocks;
	     level++) {
		uint64_t *swap = check->level;

		if (level == TP_WALK_LEVELS_MAX || tp_walk_cancelled(check->reader)) {
			if (!tp_walk_cancelled(check->reader))
				say_too_deep(check, check->next_level);
			memset(check->next_level, 0, bytes);
			break;
		}
		check->level = check->next_level;
		check->next_level = swap;
		memset(check->next_level, 0, bytes);
		pass_by(check);
		tp_walk_blocks(check->reader, check->level, check->nr_blocks, visit_node, check);
		check->ahead.passing = false;
	}
	walk_up(check);
}

bool tp_check_whole(const struct tp_check *check, uint64_t block)
{
	uint8_t mask = TP_INFO_USABLE | TP_INFO_DONE | TP_INFO_INCOMPLETE;

	return block < check->nr_blocks &&
	       (check->infos[block].state & mask) == (TP_INFO_USABLE | TP_INFO_DONE);
}
