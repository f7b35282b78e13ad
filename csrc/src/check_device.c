/* SPDX-License-Identifier: Apache-2.0 */
/* Devices: the top level of the mapping tree beside the details tree, in id order. */
#include "thinpool/check.h"
#include "thinpool/error.h"

/* One of the two trees, an entry at a time. */
struct stream {
	struct tp_walk_cursor *cursor;
	const struct tp_walk_node *leaf; /* NULL at the end */
	uint32_t index;
};

static int stream_fill(struct stream *stream, struct tp_error *err)
{
	stream->index = 0;
	return tp_walk_cursor_next(stream->cursor, &stream->leaf, err);
}

static int stream_open(struct tp_check *check, struct stream *stream, uint64_t root,
		       uint32_t value_size, struct tp_error *err)
{
	int rc = tp_walk_cursor_create(check->reader, root, value_size, &stream->cursor, err);

	return rc ? rc : stream_fill(stream, err);
}

static int stream_step(struct stream *stream, struct tp_error *err)
{
	if (++stream->index < stream->leaf->nr_entries)
		return 0;
	return stream_fill(stream, err);
}

static uint64_t stream_id(const struct stream *stream)
{
	return stream->leaf ? tp_walk_key(stream->leaf, stream->index) : UINT64_MAX;
}

static void say_device(struct tp_check *check, enum tp_check_type type,
		       enum tp_check_structure structure, uint64_t block, uint64_t id,
		       uint64_t found, uint64_t wanted)
{
	struct tp_check_record record = tp_check_at(type, TP_CHECK_FATAL, structure, block);

	record.key = id;
	record.found = found;
	record.wanted = wanted;
	tp_check_report(check, record);
}

static void check_mapped(struct tp_check *check, const struct stream *mappings,
			 const struct stream *details)
{
	uint64_t root = tp_walk_value64(mappings->leaf, mappings->index);
	uint64_t found = tp_walk_get64(tp_walk_value(details->leaf, details->index));
	uint64_t wanted;

	if (check->options.skip_mappings || !tp_check_whole(check, root))
		return;
	wanted = check->infos[root].nr_entries_below;
	if (found != wanted)
		say_device(check, TP_CHECK_MAPPED_BLOCKS, TP_CHECK_IN_DETAILS_TREE,
			   details->leaf->block, stream_id(details), found, wanted);
}

static int merge(struct tp_check *check, const struct tp_walk_superblock *superblock,
		 struct stream *mappings, struct stream *details, bool count, struct tp_error *err)
{
	int rc = 0;

	while (!rc && (mappings->leaf || details->leaf)) {
		uint64_t left = stream_id(mappings), right = stream_id(details);
		bool in_mappings = mappings->leaf && (left <= right || !details->leaf);
		bool in_details = details->leaf && (right <= left || !mappings->leaf);

		if (!in_details)
			say_device(check, TP_CHECK_DETAILS_MISSING, TP_CHECK_IN_DETAILS_TREE,
				   superblock->details_root, left, 0, 1);
		else if (!in_mappings)
			say_device(check, TP_CHECK_MAPPINGS_MISSING, TP_CHECK_IN_MAPPING_TOP_LEVEL,
				   superblock->mapping_root, right, 0, 1);
		else
			check_mapped(check, mappings, details);
		if (in_mappings) {
			uint64_t root = tp_walk_value64(mappings->leaf, mappings->index);

			if (count) {
				check->nr_devices++;
				if (!check->options.skip_mappings && root < check->nr_blocks)
					check->nr_mappings += check->infos[root].nr_entries_below;
			}
			rc = stream_step(mappings, err);
		}
		if (!rc && in_details)
			rc = stream_step(details, err);
	}
	return rc;
}

static int check_source(struct tp_check *check, const struct tp_walk_superblock *superblock,
			bool count, struct tp_error *err)
{
	struct stream mappings = { 0 }, details = { 0 };
	int rc;

	/* What is broken there has been reported; half a list would only raise false alarms. */
	if (!tp_check_whole(check, superblock->details_root) ||
	    (!check->options.skip_mappings &&
	     !(superblock->mapping_root < check->nr_blocks &&
	       check->infos[superblock->mapping_root].state & TP_INFO_DONE)))
		return 0;
	rc = stream_open(check, &mappings, superblock->mapping_root, TP_MAPPING_VALUE_SIZE, err);
	if (!rc)
		rc = stream_open(check, &details, superblock->details_root, TP_DETAILS_VALUE_SIZE,
				 err);
	if (!rc)
		rc = merge(check, superblock, &mappings, &details, count, err);
	tp_walk_cursor_destroy(mappings.cursor);
	tp_walk_cursor_destroy(details.cursor);
	return rc == TP_E_NO_MEMORY ? rc : 0;
}

int tp_check_devices(struct tp_check *check, struct tp_error *err)
{
	int rc = check_source(check, &check->live, true, err);

	if (!rc && check->has_held &&
	    (check->held.mapping_root != check->live.mapping_root ||
	     check->held.details_root != check->live.details_root))
		rc = check_source(check, &check->held, false, err);
	return rc;
}
