/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Faults: kept small while the walk runs, put into words when they are asked for.
 */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "thinpool/check.h"
#include "thinpool/error.h"

#define FAULTS_MAX_DEFAULT 65536u

/* ---- names ------------------------------------------------------------------------------- */

const char *tp_check_type_name(uint32_t type)
{
	switch ((enum tp_check_type)type) {
	case TP_CHECK_IO_ERROR:
		return "io_error";
	case TP_CHECK_CHECKSUM:
		return "checksum";
	case TP_CHECK_BLOCK_NUMBER:
		return "block_number";
	case TP_CHECK_POINTER_OUT_OF_RANGE:
		return "pointer_out_of_range";
	case TP_CHECK_BLOCK_REUSED:
		return "block_reused";
	case TP_CHECK_TRUNCATED_DEVICE:
		return "truncated_device";
	case TP_CHECK_MAGIC:
		return "magic";
	case TP_CHECK_VERSION:
		return "version";
	case TP_CHECK_FEATURES:
		return "features";
	case TP_CHECK_DATA_BLOCK_SIZE:
		return "data_block_size";
	case TP_CHECK_METADATA_BLOCK_SIZE:
		return "metadata_block_size";
	case TP_CHECK_FLAGS:
		return "flags";
	case TP_CHECK_NEEDS_CHECK:
		return "needs_check";
	case TP_CHECK_NO_METADATA_SNAPSHOT:
		return "no_metadata_snapshot";
	case TP_CHECK_POOL_TIME:
		return "pool_time";
	case TP_CHECK_NODE_FLAGS:
		return "node_flags";
	case TP_CHECK_NODE_SIZE:
		return "node_size";
	case TP_CHECK_NODE_VALUE_SIZE:
		return "node_value_size";
	case TP_CHECK_NODE_MAX_ENTRIES:
		return "node_max_entries";
	case TP_CHECK_NODE_UNDERFULL:
		return "node_underfull";
	case TP_CHECK_NODE_EMPTY:
		return "node_empty";
	case TP_CHECK_KEYS_OUT_OF_ORDER:
		return "keys_out_of_order";
	case TP_CHECK_KEYS_DUPLICATE:
		return "keys_duplicate";
	case TP_CHECK_SEPARATOR_HIGH:
		return "separator_high";
	case TP_CHECK_SEPARATOR_OVERLAP:
		return "separator_overlap";
	case TP_CHECK_UNEQUAL_DEPTH:
		return "unequal_depth";
	case TP_CHECK_TOO_DEEP:
		return "too_deep";
	case TP_CHECK_DEVICE_ID:
		return "device_id";
	case TP_CHECK_DETAILS_MISSING:
		return "details_missing";
	case TP_CHECK_MAPPINGS_MISSING:
		return "mappings_missing";
	case TP_CHECK_MAPPED_BLOCKS:
		return "mapped_blocks";
	case TP_CHECK_DETAILS_TIME:
		return "details_time";
	case TP_CHECK_MAPPING_PAST_END:
		return "mapping_past_end";
	case TP_CHECK_MAPPING_TIME:
		return "mapping_time";
	case TP_CHECK_SPACE_MAP_SIZE:
		return "space_map_size";
	case TP_CHECK_INDEX_MISSING:
		return "index_missing";
	case TP_CHECK_INDEX_EXTRA:
		return "index_extra";
	case TP_CHECK_INDEX_BEYOND_END:
		return "index_beyond_end";
	case TP_CHECK_BITS_BEYOND_END:
		return "bits_beyond_end";
	case TP_CHECK_COUNT_LOW:
		return "count_low";
	case TP_CHECK_COUNT_HIGH:
		return "count_high";
	case TP_CHECK_OVERFLOW_MISSING:
		return "overflow_missing";
	case TP_CHECK_OVERFLOW_EXTRA:
		return "overflow_extra";
	case TP_CHECK_OVERFLOW_SMALL:
		return "overflow_small";
	case TP_CHECK_NR_ALLOCATED:
		return "nr_allocated";
	case TP_CHECK_NR_FREE:
		return "nr_free";
	case TP_CHECK_NONE_FREE_BEFORE:
		return "none_free_before";
	case TP_CHECK_COUNTS_UNJUDGED:
		return "counts_unjudged";
	}
	return NULL;
}

const char *tp_check_severity_name(uint32_t severity)
{
	static const char *const names[] = { NULL, "fatal", "leak", "note" };

	return severity < sizeof(names) / sizeof(*names) ? names[severity] : NULL;
}

const char *tp_check_structure_name(uint32_t structure)
{
	static const char *const names[] = {
		[TP_CHECK_IN_SUPERBLOCK] = "superblock",
		[TP_CHECK_IN_METADATA_SNAPSHOT] = "metadata snapshot",
		[TP_CHECK_IN_MAPPING_TOP_LEVEL] = "mapping tree top level",
		[TP_CHECK_IN_DEVICE_TREE] = "device tree",
		[TP_CHECK_IN_DETAILS_TREE] = "details tree",
		[TP_CHECK_IN_DATA_INDEX] = "data index",
		[TP_CHECK_IN_DATA_BITMAP] = "data bitmap",
		[TP_CHECK_IN_DATA_OVERFLOW] = "data overflow tree",
		[TP_CHECK_IN_DATA_SPACE_MAP] = "data space map",
		[TP_CHECK_IN_METADATA_INDEX] = "metadata index",
		[TP_CHECK_IN_METADATA_BITMAP] = "metadata bitmap",
		[TP_CHECK_IN_METADATA_OVERFLOW] = "metadata overflow tree",
		[TP_CHECK_IN_METADATA_SPACE_MAP] = "metadata space map",
	};

	return structure < sizeof(names) / sizeof(*names) ? names[structure] : NULL;
}

/* ---- keeping ----------------------------------------------------------------------------- */

struct tp_check_record tp_check_at(enum tp_check_type type, enum tp_check_severity severity,
				   enum tp_check_structure structure, uint64_t block)
{
	return (struct tp_check_record){
		.type = (uint16_t)type,
		.severity = (uint8_t)severity,
		.structure = (uint8_t)structure,
		.device = UINT32_MAX,
		.block = block,
		.data_block = UINT64_MAX,
		.length = 1,
		.key = UINT64_MAX,
	};
}

/* Under lock. */
static bool make_room(struct tp_check *check)
{
	uint64_t max = check->options.max_faults ? check->options.max_faults : FAULTS_MAX_DEFAULT;
	uint64_t room = check->records_room ? check->records_room * 2 : 64;
	struct tp_check_record *grown;

	if (check->nr_records < check->records_room)
		return true;
	if (check->records_room >= max)
		return false;
	room = room < max ? room : max;
	grown = realloc(check->records, room * sizeof(*grown));
	if (!grown)
		return false; /* counted all the same */
	check->records = grown;
	check->records_room = room;
	return true;
}

void tp_check_report(struct tp_check *check, struct tp_check_record record)
{
	pthread_mutex_lock(&check->lock);
	check->nr_severity[record.severity] += 1;
	if (record.type == TP_CHECK_COUNT_HIGH && record.wanted == 0) {
		if (record.structure == TP_CHECK_IN_DATA_SPACE_MAP)
			check->nr_leaked_data += record.length;
		else
			check->nr_leaked_metadata += record.length;
	}
	if (make_room(check))
		check->records[check->nr_records++] = record;
	pthread_mutex_unlock(&check->lock);
}

void tp_check_report_fault(struct tp_check *check, enum tp_check_use use, uint64_t block,
			   const struct tp_walk_fault *fault)
{
	struct tp_check_record record =
		tp_check_at(fault->type, TP_CHECK_FATAL, tp_check_use_structure(use), block);

	if (use == TP_USE_DEVICE_TREE)
		record.device = check->infos[block].device;
	record.key = fault->key;
	record.found = fault->found;
	record.wanted = fault->wanted;
	tp_check_report(check, record);
}

#define ORDER(a, b)                                                                                \
	do {                                                                                       \
		if ((a) != (b))                                                                    \
			return (a) < (b) ? -1 : 1;                                                 \
	} while (0)

static int compare_records(const void *a, const void *b)
{
	const struct tp_check_record *left = a, *right = b;

	ORDER(left->structure, right->structure);
	ORDER(left->block, right->block);
	ORDER(left->data_block, right->data_block);
	ORDER(left->type, right->type);
	ORDER(left->key, right->key);
	ORDER(left->found, right->found);
	ORDER(left->wanted, right->wanted);
	return 0;
}

void tp_check_report_sort(struct tp_check *check)
{
	if (check->nr_records)
		qsort(check->records, check->nr_records, sizeof(*check->records), compare_records);
}

/* ---- words ------------------------------------------------------------------------------- */

struct words {
	char *text;
	size_t room;
	size_t used;
};

__attribute__((format(printf, 2, 3))) static void add(struct words *words, const char *format, ...)
{
	va_list args;
	int nr;

	va_start(args, format);
	nr = vsnprintf(words->text + words->used, words->room - words->used, format, args);
	va_end(args);
	if (nr > 0)
		words->used += (size_t)nr < words->room - words->used
				       ? (size_t)nr
				       : words->room - words->used - 1;
}

static void add_where(struct words *words, const struct tp_check_record *r)
{
	add(words, "%s, block %" PRIu64, tp_check_structure_name(r->structure), r->block);
	if (r->device != UINT32_MAX)
		add(words, ", device %" PRIu32, r->device);
	add(words, ": ");
}

/* "data block 5 is", "data blocks 5 to 9 are". */
static void add_counted(struct words *words, const struct tp_check_record *r)
{
	const char *kind = r->data_block == UINT64_MAX ? "metadata block" : "data block";
	uint64_t first = r->data_block == UINT64_MAX ? r->block : r->data_block;

	if (r->length == 1)
		add(words, "%s %" PRIu64 " is", kind, first);
	else
		add(words, "%ss %" PRIu64 " to %" PRIu64 " are", kind, first,
		    first + r->length - 1);
}

static void describe_block(struct words *words, const struct tp_check_record *r)
{
	switch ((enum tp_check_type)r->type) {
	case TP_CHECK_IO_ERROR:
		if (r->found == (uint64_t)-TP_E_METADATA_TRUNCATED)
			add(words, "lies past the end of the metadata device");
		else
			add(words, "cannot be read");
		break;
	case TP_CHECK_CHECKSUM:
		add(words, "checksum is 0x%08" PRIx64 ", wanted 0x%08" PRIx64, r->found, r->wanted);
		break;
	case TP_CHECK_BLOCK_NUMBER:
		add(words, "says that it is block %" PRIu64, r->found);
		break;
	case TP_CHECK_POINTER_OUT_OF_RANGE:
		add(words, "points to block %" PRIu64 ", of %" PRIu64, r->found, r->wanted);
		break;
	case TP_CHECK_BLOCK_REUSED:
		add(words, "also stands in the %s; block %" PRIu64 " points to it",
		    tp_check_structure_name((uint32_t)r->found), r->wanted);
		break;
	case TP_CHECK_TRUNCATED_DEVICE:
		add(words, "%s device has %" PRIu64 " blocks, wanted %" PRIu64,
		    r->structure == TP_CHECK_IN_DATA_SPACE_MAP ? "the data" : "the metadata",
		    r->found, r->wanted);
		break;
	case TP_CHECK_MAGIC:
		if (r->found == 0)
			add(words, "no magic: this device carries no pool");
		else
			add(words, "magic is 0x%" PRIx64 ", wanted 0x%" PRIx64, r->found,
			    r->wanted);
		break;
	case TP_CHECK_VERSION:
		add(words, "version is %" PRIu64 ", wanted %" PRIu64, r->found, r->wanted);
		break;
	case TP_CHECK_FEATURES:
		add(words, "unknown feature flags 0x%" PRIx64, r->found);
		break;
	case TP_CHECK_DATA_BLOCK_SIZE:
		add(words,
		    "data block size is %" PRIu64 " sectors, wanted a multiple of 128 up to %u",
		    r->found, TP_DATA_BLOCK_SECTORS_MAX);
		break;
	case TP_CHECK_METADATA_BLOCK_SIZE:
		add(words,
		    "metadata block size is %" PRIu64 " sectors, wanted %" PRIu64
		    "; nobody reads it",
		    r->found, r->wanted);
		break;
	case TP_CHECK_FLAGS:
		add(words, "unknown flags 0x%" PRIx64, r->found);
		break;
	case TP_CHECK_NEEDS_CHECK:
		add(words, "needs_check is set: an earlier transaction was aborted");
		break;
	case TP_CHECK_NO_METADATA_SNAPSHOT:
		add(words, "no metadata snapshot is held");
		break;
	case TP_CHECK_POOL_TIME:
		add(words, "time is %" PRIu64 ", of %" PRIu64 " at most", r->found, r->wanted);
		break;
	default:
		TP_ASSERT(false);
	}
}

static void describe_node(struct words *words, const struct tp_check_record *r)
{
	switch ((enum tp_check_type)r->type) {
	case TP_CHECK_NODE_FLAGS:
		if (r->severity == TP_CHECK_NOTE)
			add(words, "a leaf with flags that mean nothing");
		else
			add(words, "flags 0x%" PRIx64 " are neither leaf nor internal node",
			    r->found);
		break;
	case TP_CHECK_NODE_SIZE:
		add(words, "%" PRIu64 " entries where %" PRIu64 " fit", r->found, r->wanted);
		break;
	case TP_CHECK_NODE_VALUE_SIZE:
		add(words, "values of %" PRIu64 " bytes, wanted %" PRIu64, r->found, r->wanted);
		break;
	case TP_CHECK_NODE_MAX_ENTRIES:
		add(words, "room for %" PRIu64 " entries, wanted %" PRIu64, r->found, r->wanted);
		break;
	case TP_CHECK_NODE_UNDERFULL:
		add(words, "%" PRIu64 " entries, wanted %" PRIu64 " at least", r->found, r->wanted);
		break;
	case TP_CHECK_NODE_EMPTY:
		add(words, "an internal node without children");
		break;
	case TP_CHECK_KEYS_OUT_OF_ORDER:
		add(words, "entry %" PRIu64 " has key %" PRIu64 " after key %" PRIu64, r->key,
		    r->found, r->wanted);
		break;
	case TP_CHECK_KEYS_DUPLICATE:
		add(words, "entry %" PRIu64 " has key %" PRIu64 " again", r->key, r->found);
		break;
	case TP_CHECK_SEPARATOR_HIGH:
		add(words,
		    "separator %" PRIu64 " is %" PRIu64 ", above its child's first key %" PRIu64,
		    r->key, r->found, r->wanted);
		break;
	case TP_CHECK_SEPARATOR_OVERLAP:
		add(words,
		    "separator %" PRIu64 " is %" PRIu64 ", not above the last key %" PRIu64
		    " of the child before it",
		    r->key, r->found, r->wanted);
		break;
	case TP_CHECK_UNEQUAL_DEPTH:
		add(words, "child %" PRIu64 " is %" PRIu64 " levels high, others %" PRIu64, r->key,
		    r->found, r->wanted);
		break;
	case TP_CHECK_TOO_DEEP:
		add(words, "part of a circle, or of more levels than any tree has");
		break;
	default:
		TP_ASSERT(false);
	}
}

static void describe_device(struct words *words, const struct tp_check_record *r)
{
	switch ((enum tp_check_type)r->type) {
	case TP_CHECK_DEVICE_ID:
		add(words, "device id %" PRIu64 ", of %" PRIu64 " at most", r->found, r->wanted);
		break;
	case TP_CHECK_DETAILS_MISSING:
		add(words, "device %" PRIu64 " has mappings and no details", r->key);
		break;
	case TP_CHECK_MAPPINGS_MISSING:
		add(words, "device %" PRIu64 " has details and no mappings", r->key);
		break;
	case TP_CHECK_MAPPED_BLOCKS:
		add(words, "device %" PRIu64 " says %" PRIu64 " mapped blocks and has %" PRIu64,
		    r->key, r->found, r->wanted);
		break;
	case TP_CHECK_DETAILS_TIME:
		add(words, "device %" PRIu64 " is of time %" PRIu64 ", the pool of %" PRIu64,
		    r->key, r->found, r->wanted);
		break;
	case TP_CHECK_MAPPING_PAST_END:
		add(words,
		    "virtual block %" PRIu64 " is mapped to data block %" PRIu64 ", of %" PRIu64,
		    r->key, r->found, r->wanted);
		break;
	case TP_CHECK_MAPPING_TIME:
		add(words,
		    "virtual block %" PRIu64 " was mapped at time %" PRIu64
		    ", the pool is at %" PRIu64 ": snapshots would not keep it",
		    r->key, r->found, r->wanted);
		break;
	default:
		TP_ASSERT(false);
	}
}

static void describe_map(struct words *words, const struct tp_check_record *r)
{
	switch ((enum tp_check_type)r->type) {
	case TP_CHECK_SPACE_MAP_SIZE:
		add(words, "says %" PRIu64 " blocks, of %" PRIu64 " at most", r->found, r->wanted);
		break;
	case TP_CHECK_INDEX_MISSING:
		add(words, "entries %" PRIu64 " to %" PRIu64 " are missing", r->key,
		    r->key + r->length - 1);
		break;
	case TP_CHECK_INDEX_EXTRA:
		add(words, "entry %" PRIu64 " of a map of %" PRIu64 " bitmaps", r->found,
		    r->wanted);
		break;
	case TP_CHECK_INDEX_BEYOND_END:
		add(words, "entry %" PRIu64 ", past the last of %" PRIu64 " bitmaps, is not zero",
		    r->found, r->wanted);
		break;
	case TP_CHECK_BITS_BEYOND_END:
		add(words,
		    "bitmap %" PRIu64 " counts blocks past the end of the device: they leak "
		    "when it grows",
		    r->key);
		break;
	case TP_CHECK_COUNT_LOW:
	case TP_CHECK_COUNT_HIGH:
		add_counted(words, r);
		add(words, " counted %" PRIu64 " times and used %" PRIu64 " times", r->found,
		    r->wanted);
		break;
	case TP_CHECK_OVERFLOW_MISSING:
		add_counted(words, r);
		add(words, " marked as counted three times or more and not in the overflow tree");
		break;
	case TP_CHECK_OVERFLOW_EXTRA:
		if (r->structure == TP_CHECK_IN_DATA_SPACE_MAP ||
		    r->structure == TP_CHECK_IN_METADATA_SPACE_MAP) {
			add_counted(words, r);
			add(words, " in the overflow tree and counted only %" PRIu64 " times",
			    r->found);
		} else {
			add(words, "an entry for block %" PRIu64 ", past the end", r->key);
		}
		break;
	case TP_CHECK_OVERFLOW_SMALL:
		add(words, "count of block %" PRIu64 " is %" PRIu64 ", wanted 3 at least", r->key,
		    r->found);
		break;
	case TP_CHECK_NR_ALLOCATED:
		add(words, "nr_allocated is %" PRIu64 ", wanted %" PRIu64 "%s", r->found, r->wanted,
		    r->severity == TP_CHECK_NOTE ? "" : ": hides free space");
		break;
	case TP_CHECK_NR_FREE:
		add(words, "nr_free of bitmap %" PRIu64 " is %" PRIu64 ", wanted %" PRIu64 "%s",
		    r->key, r->found, r->wanted,
		    r->severity == TP_CHECK_NOTE ? "" : ": hides free space");
		break;
	case TP_CHECK_NONE_FREE_BEFORE:
		add(words,
		    "none_free_before of bitmap %" PRIu64 " is %" PRIu64 " and hides %" PRIu64
		    " free blocks",
		    r->key, r->found, r->wanted);
		break;
	case TP_CHECK_COUNTS_UNJUDGED:
		add(words,
		    "%" PRIu64 " counts are higher than what was found, which says nothing "
		    "while parts of the trees are unreadable",
		    r->found);
		break;
	default:
		TP_ASSERT(false);
	}
}

static void describe(const struct tp_check_record *r, char *text, size_t room)
{
	struct words words = { .text = text, .room = room };

	text[0] = '\0';
	add_where(&words, r);
	if (r->type < TP_CHECK_NODE_FLAGS)
		describe_block(&words, r);
	else if (r->type < TP_CHECK_DEVICE_ID)
		describe_node(&words, r);
	else if (r->type < TP_CHECK_SPACE_MAP_SIZE)
		describe_device(&words, r);
	else
		describe_map(&words, r);
}

static uint64_t device_of(const struct tp_check_record *r)
{
	if (r->device != UINT32_MAX)
		return r->device;
	if (r->type >= TP_CHECK_DEVICE_ID && r->type <= TP_CHECK_DETAILS_TIME)
		return r->key;
	return UINT64_MAX;
}

int tp_check_get_fault(const struct tp_check *check, uint64_t index,
		       struct tp_check_fault *fault_ret)
{
	const struct tp_check_record *r;

	if (!check->ran || index >= check->nr_records)
		return TP_E_OUT_OF_RANGE;
	r = &check->records[index];
	*fault_ret = (struct tp_check_fault){
		.type = r->type,
		.severity = r->severity,
		.structure = r->structure,
		.status = r->type == TP_CHECK_IO_ERROR ? (uint32_t)r->found : 0,
		.block = r->block,
		.data_block = r->data_block,
		.length = r->length,
		.device_id = device_of(r),
		.key = r->key,
		.found = r->found,
		.wanted = r->wanted,
	};
	describe(r, fault_ret->message, sizeof(fault_ret->message));
	return 0;
}
