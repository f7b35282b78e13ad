/* SPDX-License-Identifier: Apache-2.0 */
/* A whole check, in order: superblocks, mappings and details, devices, space maps. */
#include <stdlib.h>

#include "thinpool/check.h"
#include "thinpool/error.h"

#define KEPT_BYTES ((uint64_t)TP_CHECK_KEPT_MAX * TP_MD_BLOCK_SIZE)

int tp_check_create(struct tp_bdev *metadata, const struct tp_check_options *options,
		    struct tp_check **check_ret, struct tp_error *err)
{
	struct tp_check *check = calloc(1, sizeof(*check));
	int rc;

	if (!check)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a check");
	if (options)
		check->options = *options;
	pthread_mutex_init(&check->lock, NULL);
	rc = tp_walk_reader_create(metadata, check->options.nr_threads, &check->reader, err);
	if (rc) {
		tp_check_destroy(check);
		return rc;
	}
	*check_ret = check;
	return 0;
}

/* What only the walk needs. */
static void drop_tables(struct tp_check *check)
{
	uint64_t bits = tp_walk_words(check->nr_blocks) * 8;

	tp_check_space_maps_deinit(check);
	check->data_map.bitmaps = NULL;
	check->data_map.overflowing = NULL;
	check->metadata_map.bitmaps = NULL;
	check->metadata_map.overflowing = NULL;
	tp_check_counts_deinit(&check->counts);
	tp_walk_unmap(check->uses, check->nr_blocks);
	tp_walk_unmap(check->infos, check->nr_blocks * sizeof(*check->infos));
	tp_walk_unmap(check->level, bits);
	tp_walk_unmap(check->next_level, bits);
	tp_walk_unmap(check->internals, bits);
	tp_walk_unmap(check->kept.nodes, KEPT_BYTES);
	free(check->kept.blocks);
	check->kept = (struct tp_check_kept){ 0 };
	tp_walk_unmap(check->ahead.bits, bits);
	tp_walk_unmap(check->ahead.copies.nodes, KEPT_BYTES);
	free(check->ahead.copies.blocks);
	check->ahead = (struct tp_check_ahead){ 0 };
	check->uses = NULL;
	check->infos = NULL;
	check->level = NULL;
	check->next_level = NULL;
	check->internals = NULL;
}

void tp_check_destroy(struct tp_check *check)
{
	if (!check)
		return;
	drop_tables(check);
	tp_walk_reader_destroy(check->reader);
	free(check->records);
	pthread_mutex_destroy(&check->lock);
	free(check);
}

static int make_tables(struct tp_check *check, struct tp_error *err)
{
	uint64_t nr = check->nr_blocks;
	uint64_t bits = tp_walk_words(nr) * 8;

	check->uses = tp_walk_map(nr);
	check->infos = tp_walk_map_dense(nr * sizeof(*check->infos));
	check->level = tp_walk_map(bits);
	check->next_level = tp_walk_map(bits);
	check->internals = tp_walk_map(bits);
	check->kept.nodes = tp_walk_map_dense(KEPT_BYTES);
	check->kept.blocks = calloc(TP_CHECK_KEPT_MAX, sizeof(*check->kept.blocks));
	if (!check->uses || !check->infos || !check->level || !check->next_level ||
	    !check->internals || !check->kept.nodes || !check->kept.blocks)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to check %llu metadata blocks",
			       (unsigned long long)nr);
	return tp_check_counts_init(&check->counts, nr, 0, err)
		       ?: tp_check_space_maps_init(check, err)
		       ?: tp_check_look_ahead(check, err);
}

static void refer_trees(struct tp_check *check, const struct tp_walk_superblock *superblock)
{
	tp_check_refer(check, TP_USE_MAPPING_TOP_LEVEL, superblock->mapping_root, superblock->block,
		       UINT64_MAX, UINT32_MAX);
	tp_check_refer(check, TP_USE_DETAILS_TREE, superblock->details_root, superblock->block,
		       UINT64_MAX, UINT32_MAX);
}

static int run(struct tp_check *check, struct tp_error *err)
{
	int rc = tp_check_superblocks(check, err);

	if (rc || check->stop)
		return rc;
	rc = make_tables(check, err);
	if (rc)
		return rc;
	check->uses[TP_SUPERBLOCK_LOCATION] = TP_USE_SUPERBLOCK;
	tp_check_counts_add(&check->counts, TP_SUPERBLOCK_LOCATION);
	if (check->has_held)
		tp_check_refer(check, TP_USE_METADATA_SNAPSHOT, check->held.block,
			       TP_SUPERBLOCK_LOCATION, UINT64_MAX, UINT32_MAX);
	else if (check->live.held_root) {
		/* It cannot be read, and what it keeps cannot be told from leaks. */
		check->data_incomplete = true;
		check->metadata_incomplete = true;
	}
	refer_trees(check, &check->live);
	if (check->has_held)
		refer_trees(check, &check->held);
	tp_check_walk(check);
	rc = tp_check_devices(check, err);
	if (!rc && !check->options.use_metadata_snapshot)
		rc = tp_check_space_maps(check, err);
	return rc;
}

int tp_check_run(struct tp_check *check, struct tp_error *err)
{
	int rc;

	if (check->ran)
		return tp_fail(err, TP_E_INVALID, "this check ran already");
	check->ran = true;
	rc = run(check, err);
	drop_tables(check);
	tp_check_report_sort(check);
	atomic_store(&check->progress_total, tp_walk_reader_done(check->reader));
	if (!rc && tp_walk_cancelled(check->reader))
		return tp_fail(err, TP_E_INTERRUPTED, "the check was stopped");
	return rc;
}

void tp_check_get_progress(const struct tp_check *check, struct tp_check_progress *progress_ret)
{
	uint64_t total = atomic_load(&check->progress_total);
	uint64_t done = tp_walk_reader_done(check->reader);

	progress_ret->total = total;
	progress_ret->done = done < total ? done : total;
}

void tp_check_cancel(struct tp_check *check)
{
	tp_walk_cancel(check->reader);
}

void tp_check_get_summary(const struct tp_check *check, struct tp_check_summary *summary_ret)
{
	*summary_ret = (struct tp_check_summary){
		.transaction_id = check->live.trans_id,
		.time = check->live.time,
		.needs_check = check->live.flags & TP_SUPERBLOCK_NEEDS_CHECK,
		.superblock_valid = check->superblock_valid,
		.nr_faults = check->nr_records,
		.nr_fatal = check->nr_severity[TP_CHECK_FATAL],
		.nr_leaks = check->nr_severity[TP_CHECK_LEAK],
		.nr_notes = check->nr_severity[TP_CHECK_NOTE],
		.nr_leaked_data_blocks = check->nr_leaked_data,
		.nr_leaked_metadata_blocks = check->nr_leaked_metadata,
		.nr_devices = check->nr_devices,
		.nr_mappings = check->nr_mappings,
		.nr_blocks_read = tp_walk_reader_done(check->reader),
		.metadata_blocks_total = check->metadata_map.nr_blocks,
		.metadata_blocks_used = check->metadata_map.nr_used,
		.data_blocks_total = check->data_map.nr_blocks,
		.data_blocks_used = check->data_map.nr_used,
	};
}
