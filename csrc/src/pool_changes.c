/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Changes of the set of volumes, and of sizes. A series of changes is judged as a whole before any
 * of it is done, and is done in one transaction together with the transaction id.
 */
#include <stdlib.h>
#include <string.h>

#include "pool_private.h"

/* A device with more mappings is emptied in bounded transactions before it is deleted, so that
 * deleting it never needs more metadata blocks than the reserve holds. */
#define DELETE_AT_ONCE_MAX (UINT64_C(1) << 18)
#define EMPTY_STEP         4096u

static int locked_snapshot(struct tp_pool *pool, uint32_t id, uint32_t origin, struct tp_error *err)
{
	struct tp_volume *volume;
	int r = tp_md_create_snapshot(pool->md, id, origin, err);

	if (r)
		return r;
	volume = tp_find_volume(pool, origin);
	if (volume) {
		atomic_store(&volume->snapshotted_time, volume->device->snapshotted_time);
		atomic_store(&volume->changed_in, tp_md_transaction(pool->md));
	}
	tp_redo_append(pool->redo, TP_REDO_SNAPSHOT, id, origin, 0);
	return 0;
}

static int apply_one(struct tp_pool *pool, const struct tp_change *change, struct tp_error *err)
{
	int r;

	switch ((enum tp_change_kind)change->kind) {
	case TP_CHANGE_CREATE:
		r = tp_md_create_device(pool->md, change->id, err);
		if (!r)
			tp_redo_append(pool->redo, TP_REDO_CREATE, change->id, 0, 0);
		return r;
	case TP_CHANGE_SNAPSHOT:
		return locked_snapshot(pool, change->id, change->origin, err);
	case TP_CHANGE_DELETE:
		r = tp_md_delete_device(pool->md, change->id, err);
		if (!r)
			tp_redo_append(pool->redo, TP_REDO_DELETE, change->id, 0, 0);
		return r;
	}
	return tp_fail(err, TP_E_INVALID, "a change of kind %u is not known", change->kind);
}

/* ---- judging a series --------------------------------------------------------------------- */

/* Whether a device will exist after the first n changes: what the last of them about it says. */
static int will_exist(struct tp_pool *pool, const struct tp_change *changes, size_t n, uint32_t id,
		      bool *exists_ret, struct tp_error *err)
{
	struct tp_device *device;
	int r;

	while (n--) {
		if (changes[n].id == id) {
			*exists_ret = changes[n].kind != TP_CHANGE_DELETE;
			return 0;
		}
	}
	r = tp_md_get_device(pool->md, id, &device, err);
	*exists_ret = !r;
	if (!r)
		tp_md_put_device(pool->md, device);
	return r == TP_E_VOLUME_NOT_FOUND ? 0 : r;
}

static int judge(struct tp_pool *pool, const struct tp_change *changes, size_t i,
		 struct tp_error *err)
{
	const struct tp_change *c = &changes[i];
	bool exists, origin_exists = true;
	int r;

	if (c->kind < TP_CHANGE_CREATE || c->kind > TP_CHANGE_DELETE)
		return tp_fail(err, TP_E_INVALID, "a change of kind %u is not known", c->kind);
	if (c->id > TP_DEVICE_ID_MAX)
		return tp_fail(err, TP_E_LIMIT, "device ids have 24 bits, %u has more", c->id);
	r = will_exist(pool, changes, i, c->id, &exists, err);
	if (!r && c->kind == TP_CHANGE_SNAPSHOT)
		r = will_exist(pool, changes, i, c->origin, &origin_exists, err);
	if (r)
		return r;
	if (!origin_exists)
		return tp_fail(err, TP_E_VOLUME_NOT_FOUND, "the pool has no device %u", c->origin);
	if (c->kind == TP_CHANGE_DELETE && !exists)
		return tp_fail(err, TP_E_VOLUME_NOT_FOUND, "the pool has no device %u", c->id);
	if (c->kind == TP_CHANGE_DELETE && tp_find_volume(pool, c->id))
		return tp_fail(err, TP_E_VOLUME_BUSY, "device %u is in use", c->id);
	if (c->kind == TP_CHANGE_SNAPSHOT)
		r = tp_pool_check_not_doomed(pool, c->origin, err);
	if (r)
		return r;
	if (c->kind != TP_CHANGE_DELETE && exists)
		return tp_fail(err, TP_E_VOLUME_EXISTS, "the pool has a device %u already", c->id);
	/* In others' metadata it may be there by half; one that the series deletes is whole. */
	while (i--)
		if (changes[i].id == c->id)
			return 0;
	return c->kind == TP_CHANGE_DELETE ? 0 : tp_md_check_new_id(pool->md, c->id, err);
}

static int judge_all(struct tp_pool *pool, const struct tp_change *changes, size_t n,
		     struct tp_error *err)
{
	bool only_deletes = true;
	uint64_t snapshots = 0;
	size_t i;
	int r = tp_pool_check_writable(pool, err);

	for (i = 0; i < n && !r; i++) {
		r = judge(pool, changes, i, err);
		only_deletes &= changes[i].kind == TP_CHANGE_DELETE;
		snapshots += changes[i].kind == TP_CHANGE_SNAPSHOT;
	}
	if (r)
		return r;
	if (tp_md_time(pool->md) + snapshots > TP_TIME_MAX)
		return tp_fail(err, TP_E_LIMIT,
			       "the pool has had its %u snapshots: times have "
			       "24 bits",
			       TP_TIME_MAX);
	/* The caller has just committed where that helps. */
	if (tp_md_has_room_for(pool->md, only_deletes ? 1 : n, only_deletes) != 1)
		return tp_fail(err, TP_E_METADATA_SPACE,
			       "the pool's metadata is full but for its reserve: %lu of %lu blocks",
			       (unsigned long)tp_md_nr_used(pool->md),
			       (unsigned long)tp_md_nr_blocks(pool->md));
	if (!tp_redo_has_room(pool->redo, n + 1))
		return tp_fail(err, TP_E_LOG_FULL, "%zu changes are too many for one transaction",
			       n);
	return 0;
}

/* ---- big deletes -------------------------------------------------------------------------- */

int tp_pool_check_not_doomed(struct tp_pool *pool, uint32_t id, struct tp_error *err)
{
	const struct doomed *doomed = pool->doomed;

	while (doomed && doomed->id != id)
		doomed = doomed->next;
	return doomed ? tp_fail(err, TP_E_VOLUME_BUSY, "device %u is being deleted", id) : 0;
}

/* Whether change i deletes a device with all that it has: a copy of the same series keeps it. */
static bool empties(const struct tp_change *changes, size_t n, size_t i)
{
	size_t k;

	for (k = 0; k < n; k++)
		if (changes[k].kind == TP_CHANGE_SNAPSHOT && changes[k].origin == changes[i].id)
			return false;
	return changes[i].kind == TP_CHANGE_DELETE;
}

/* Judge a series, and keep from others what it empties, for that is not undone. */
static int doom(struct tp_pool *pool, const struct tp_change *changes, size_t n,
		struct doomed *doomed, size_t *count_ret, struct tp_error *err)
{
	size_t i, count = 0;
	int r = 0;

	for (i = 0; i < n && !r; i++)
		r = judge(pool, changes, i, err);
	for (i = 0; i < n && !r; i++)
		if (changes[i].kind == TP_CHANGE_DELETE)
			r = tp_pool_check_not_doomed(pool, changes[i].id, err);
	for (i = 0; i < n && !r; i++) {
		if (!empties(changes, n, i))
			continue;
		doomed[count] = (struct doomed){ .id = changes[i].id, .next = pool->doomed };
		pool->doomed = &doomed[count++];
	}
	*count_ret = count;
	return r;
}

static void pardon(struct tp_pool *pool, struct doomed *doomed, size_t count)
{
	struct doomed **at;

	pthread_mutex_lock(&pool->md_lock);
	while (count--) {
		for (at = &pool->doomed; *at != &doomed[count]; at = &(*at)->next)
			;
		*at = doomed[count].next;
	}
	pthread_mutex_unlock(&pool->md_lock);
}

/* TP_E_KEY_NOT_FOUND when it is empty. *done_ret: how many mappings went. */
static int empty_some(struct tp_pool *pool, struct tp_device *device, uint32_t *done_ret,
		      struct tp_error *err)
{
	uint64_t block = 0, value;
	uint32_t i;
	int r = 0;

	for (i = 0; i < EMPTY_STEP; i++) {
		if (!tp_redo_has_room(pool->redo, 1) || tp_md_has_room(pool->md, true) != 1)
			break;
		r = tp_md_next_mapping(pool->md, device, block, &block, &value, err);
		if (!r)
			r = tp_md_remove(pool->md, device, block, err);
		if (r)
			break;
		tp_redo_append(pool->redo, TP_REDO_UNMAP, device->id, block, 0);
		tp_pool_dirtied(pool);
	}
	tp_md_trim(pool->md);
	*done_ret = i;
	return r;
}

/* *more_ret: it is not small enough yet to be deleted at once, and *done_ret mappings went. */
static int empty_step(struct tp_pool *pool, uint32_t id, bool *more_ret, uint32_t *done_ret,
		      struct tp_error *err)
{
	struct tp_device *device;
	int r = tp_pool_check_writable(pool, err);

	*more_ret = false;
	if (!r)
		r = tp_md_get_device(pool->md, id, &device, err);
	if (r)
		return r == TP_E_VOLUME_NOT_FOUND ? 0 : r;
	if (device->mapped_blocks > DELETE_AT_ONCE_MAX ||
	    !tp_md_has_room_to_delete(pool->md, device)) {
		r = empty_some(pool, device, done_ret, err);
		*more_ret = !r;
		if (r == TP_E_KEY_NOT_FOUND)
			r = 0;
		else if (r)
			r = tp_pool_failed(pool, r);
	}
	tp_md_put_device(pool->md, device);
	return r;
}

static int empty_device(struct tp_pool *pool, uint32_t id, struct tp_error *err)
{
	uint32_t done, in_vain = 0;
	bool more;
	int r;

	do {
		pthread_mutex_lock(&pool->md_lock);
		r = empty_step(pool, id, &more, &done, err);
		pthread_mutex_unlock(&pool->md_lock);
		if (r || !more)
			return r;
		in_vain = done ? 0 : in_vain + 1;
		if (in_vain > 2)
			return tp_fail(err, TP_E_METADATA_SPACE,
				       "no metadata space to unmap a block of device %u", id);
		if (done < EMPTY_STEP)
			r = tp_pool_flush_round(pool, true, err);
	} while (!r);
	return r;
}

/* ---- series ------------------------------------------------------------------------------- */

struct closed_gates {
	struct tp_volume **volumes;
	size_t count;
};

/* Drain the writes of every open origin, so that a snapshot is what a disk holds at one instant. */
static int close_gates(struct tp_pool *pool, const struct tp_change *changes, size_t n,
		       struct closed_gates *gates, struct tp_error *err)
{
	size_t i, k;

	gates->count = 0;
	gates->volumes = calloc(n ? n : 1, sizeof(struct tp_volume *));
	if (!gates->volumes)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for %zu changes", n);
	pthread_mutex_lock(&pool->md_lock);
	for (i = 0; i < n; i++) {
		struct tp_volume *volume = changes[i].kind == TP_CHANGE_SNAPSHOT
						   ? tp_find_volume(pool, changes[i].origin)
						   : NULL;

		for (k = 0; k < gates->count && gates->volumes[k] != volume; k++)
			;
		if (volume && k == gates->count)
			gates->volumes[gates->count++] = volume;
	}
	pthread_mutex_unlock(&pool->md_lock);
	for (i = 0; i < gates->count; i++)
		tp_gate_close(gates->volumes[i]);
	return 0;
}

static void open_gates(struct closed_gates *gates)
{
	size_t i;

	for (i = 0; i < gates->count; i++)
		tp_gate_open(gates->volumes[i]);
	free(gates->volumes);
}

static int change_all(struct tp_pool *pool, const struct tp_change *changes, size_t n,
		      uint64_t expected, uint64_t wanted, struct tp_error *err)
{
	size_t i;
	int r;

	if (tp_md_transaction_id(pool->md) != expected)
		return tp_md_set_transaction_id(pool->md, expected, wanted, err);
	r = judge_all(pool, changes, n, err);
	if (r || (!n && wanted == expected))
		return r;
	/* A successor of a process that is killed in here must find the whole series or nothing. */
	tp_redo_begin_group(pool->redo);
	for (i = 0; i < n && !r; i++)
		r = apply_one(pool, &changes[i], err);
	if (!r)
		r = tp_md_set_transaction_id(pool->md, expected, wanted, err);
	if (!r && wanted != expected)
		tp_redo_append(pool->redo, TP_REDO_TRANSACTION_ID, 0, wanted, 0);
	tp_redo_end_group(pool->redo, !r);
	if (r)
		return tp_pool_failed(pool, r);
	tp_md_trim(pool->md);
	return 0;
}

/* The series with its gates and locks; durable on return when commit is set. */
static int run_series(struct tp_pool *pool, const struct tp_change *changes, size_t n,
		      const uint64_t *expected, uint64_t wanted, bool commit, int after_fd,
		      struct tp_error *err)
{
	struct closed_gates gates;
	bool tight;
	size_t i;
	int r;

	pthread_mutex_lock(&pool->md_lock);
	tight = tp_md_has_room_for(pool->md, n, false) != 1 || !tp_redo_has_room(pool->redo, n + 1);
	pthread_mutex_unlock(&pool->md_lock);
	if (tight && !tp_pool_check_writable(pool, NULL)) {
		r = tp_pool_flush_round(pool, true, err);
		if (r)
			return r;
	}
	pthread_mutex_lock(&pool->changes_lock);
	r = close_gates(pool, changes, n, &gates, err);
	if (r) {
		pthread_mutex_unlock(&pool->changes_lock);
		return r;
	}
	pthread_mutex_lock(&pool->md_lock);
	r = change_all(pool, changes, n, expected ? *expected : tp_md_transaction_id(pool->md),
		       expected ? wanted : tp_md_transaction_id(pool->md), err);
	if (!r && after_fd >= 0) {
		/* Two of one transaction: the second waits here for the first's. */
		tp_pool_wait_until_ready(pool->after_fd);
		pool->after_fd = after_fd;
	}
	/* Nobody need be woken for what is committed here at once. */
	if (!r && !commit)
		tp_pool_dirtied(pool);
	pthread_mutex_unlock(&pool->md_lock);
	open_gates(&gates);
	pthread_mutex_unlock(&pool->changes_lock);
	for (i = 0; i < n && !r; i++)
		if (changes[i].kind == TP_CHANGE_DELETE)
			tp_pool_space_changed(pool);
	if (!r && commit)
		r = tp_pool_flush_round(pool, true, err);
	return r;
}

static int run_with_deletes(struct tp_pool *pool, const struct tp_change *changes, size_t n,
			    const uint64_t *expected, uint64_t wanted, bool commit, int after_fd,
			    struct tp_error *err)
{
	struct doomed *doomed = calloc(n ? n : 1, sizeof(*doomed));
	size_t count = 0, i;
	int r = 0;

	if (!doomed)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for %zu changes", n);
	pthread_mutex_lock(&pool->md_lock);
	if (expected && tp_md_transaction_id(pool->md) != *expected)
		r = tp_md_set_transaction_id(pool->md, *expected, 0, err);
	if (!r)
		r = doom(pool, changes, n, doomed, &count, err);
	pthread_mutex_unlock(&pool->md_lock);
	/* Emptying commits on its own, and is not undone. */
	if (!r && count)
		tp_pool_wait_until_ready(after_fd);
	for (i = 0; i < n && !r; i++)
		if (empties(changes, n, i))
			r = empty_device(pool, changes[i].id, err);
	if (!r)
		r = run_series(pool, changes, n, expected, wanted, commit, after_fd, err);
	pardon(pool, doomed, count);
	free(doomed);
	return r;
}

int tp_pool_apply(struct tp_pool *pool, const struct tp_change *changes, size_t nr_changes,
		  uint64_t expected_transaction_id, uint64_t new_transaction_id, int32_t after_fd,
		  struct tp_error *err)
{
	return run_with_deletes(pool, changes, nr_changes, &expected_transaction_id,
				new_transaction_id, true, after_fd, err);
}

int tp_volume_create(struct tp_pool *pool, uint32_t id, struct tp_error *err)
{
	struct tp_change change = { .kind = TP_CHANGE_CREATE, .id = id };

	return run_series(pool, &change, 1, NULL, 0, false, -1, err);
}

int tp_snapshot_create(struct tp_pool *pool, uint32_t id, uint32_t origin_id, struct tp_error *err)
{
	struct tp_change change = { .kind = TP_CHANGE_SNAPSHOT, .id = id, .origin = origin_id };

	return run_series(pool, &change, 1, NULL, 0, false, -1, err);
}

int tp_volume_delete(struct tp_pool *pool, uint32_t id, struct tp_error *err)
{
	struct tp_change change = { .kind = TP_CHANGE_DELETE, .id = id };

	return run_with_deletes(pool, &change, 1, NULL, 0, false, -1, err);
}

int tp_pool_set_transaction_id(struct tp_pool *pool, uint64_t expected, uint64_t wanted,
			       struct tp_error *err)
{
	return run_series(pool, NULL, 0, &expected, wanted, false, -1, err);
}

/* ---- sizes, metadata snapshot ------------------------------------------------------------- */

/* With the next transaction kept out: commit, change, commit. */
static int change_exclusively(struct tp_pool *pool,
			      int (*change)(struct tp_pool *pool, uint64_t argument,
					    struct tp_error *err),
			      uint64_t argument, struct tp_error *err)
{
	int r;

	pthread_mutex_lock(&pool->commit_lock);
	pthread_mutex_lock(&pool->md_lock);
	r = tp_pool_commit_locked(pool, err);
	if (!r) {
		r = change(pool, argument, err);
		if (!r)
			r = tp_pool_commit_locked(pool, err);
		else if (tp_md_changed(pool->md))
			r = tp_pool_failed(pool, r);
	}
	tp_md_trim(pool->md);
	pthread_mutex_unlock(&pool->md_lock);
	pthread_mutex_unlock(&pool->commit_lock);
	if (!r) {
		tp_pool_space_changed(pool);
		tp_pool_event(pool);
	}
	return r;
}

static int resize_data(struct tp_pool *pool, uint64_t nr_blocks, struct tp_error *err)
{
	uint64_t old = tp_data_map_nr_blocks(tp_md_data_map(pool->md));
	int r;

	if (nr_blocks < old)
		return tp_fail(err, TP_E_INVALID, "a pool cannot shrink: %lu data blocks to %lu",
			       (unsigned long)old, (unsigned long)nr_blocks);
	if (nr_blocks > tp_bdev_size(pool->data_bdev) / pool->block_size)
		return tp_fail(err, TP_E_OUT_OF_RANGE,
			       "the data device has room for %lu blocks, "
			       "not %lu",
			       (unsigned long)(tp_bdev_size(pool->data_bdev) / pool->block_size),
			       (unsigned long)nr_blocks);
	/* The device may have grown for this, and its length is durable with its flush. */
	tp_pool_data_changed(pool);
	r = tp_md_resize_data(pool->md, nr_blocks, err);
	if (!r)
		r = tp_pool_find_holes(pool, old, err);
	if (!r) {
		atomic_store(&pool->low_water_reached, 0);
		if (atomic_load(&pool->mode) == TP_MODE_OUT_OF_DATA_SPACE && nr_blocks > old)
			tp_pool_set_mode(pool, TP_MODE_RW);
	}
	return r;
}

int tp_pool_resize_data(struct tp_pool *pool, uint64_t nr_blocks, struct tp_error *err)
{
	return change_exclusively(pool, resize_data, nr_blocks, err);
}

static int resize_metadata(struct tp_pool *pool, uint64_t argument, struct tp_error *err)
{
	(void)argument;
	return tp_md_resize_metadata(pool->md, err);
}

int tp_pool_resize_metadata(struct tp_pool *pool, struct tp_error *err)
{
	return change_exclusively(pool, resize_metadata, 0, err);
}

static int hold_snapshot(struct tp_pool *pool, uint64_t argument, struct tp_error *err)
{
	(void)argument;
	if (tp_md_has_room(pool->md, false) != 1)
		return tp_fail(err, TP_E_METADATA_SPACE,
			       "no metadata space for a metadata snapshot");
	return tp_md_hold_snapshot(pool->md, err);
}

int tp_pool_reserve_metadata_snapshot(struct tp_pool *pool, struct tp_error *err)
{
	return change_exclusively(pool, hold_snapshot, 0, err);
}

static int release_snapshot(struct tp_pool *pool, uint64_t argument, struct tp_error *err)
{
	(void)argument;
	if (tp_md_has_room(pool->md, true) != 1)
		return tp_fail(err, TP_E_METADATA_SPACE, "the metadata's reserve is used up");
	return tp_md_release_snapshot(pool->md, err);
}

int tp_pool_release_metadata_snapshot(struct tp_pool *pool, struct tp_error *err)
{
	return change_exclusively(pool, release_snapshot, 0, err);
}

/* ---- listing ------------------------------------------------------------------------------ */

int tp_pool_list_volumes(struct tp_pool *pool, uint32_t first_id, struct tp_volume_info *infos,
			 size_t max, size_t *count_ret, struct tp_error *err)
{
	int r = 0;

	*count_ret = 0;
	pthread_mutex_lock(&pool->md_lock);
	while (*count_ret < max) {
		r = tp_md_next_device(pool->md, first_id, &infos[*count_ret], err);
		if (r)
			break;
		first_id = infos[*count_ret].id + 1;
		infos[*count_ret].open = tp_find_volume(pool, infos[*count_ret].id) != NULL;
		(*count_ret)++;
	}
	tp_md_trim(pool->md);
	pthread_mutex_unlock(&pool->md_lock);
	return r == TP_E_KEY_NOT_FOUND ? 0 : r;
}

int tp_pool_get_volume_info(struct tp_pool *pool, uint32_t id, struct tp_volume_info *info_ret,
			    struct tp_error *err)
{
	size_t count;
	int r = tp_pool_list_volumes(pool, id, info_ret, 1, &count, err);

	if (!r && (!count || info_ret->id != id))
		r = tp_fail(err, TP_E_VOLUME_NOT_FOUND, "the pool has no device %u", id);
	return r;
}
