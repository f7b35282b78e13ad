/* SPDX-License-Identifier: Apache-2.0 */
/**
 * Thin devices: which data block each of their blocks is mapped to, and their details.
 *
 * On disk: a tree device id -> root of that device's tree (virtual block -> data block and time),
 * and a tree device id -> details. In memory a device that is in use keeps its root and details;
 * they go into the two trees when the transaction is sealed.
 *
 * A transaction is made durable in steps, of which only the first and the last need the metadata
 * lock, so that changes of the next transaction go on while one is written:
 *   1. tp_md_seal     close the transaction (lock held);
 *   2. tp_md_write_blocks      new blocks, to which nothing durable refers yet;
 *   3. flush the data device (the caller's business), between tp_md_flush_begin and
 *   4. tp_md_flush_blocks;
 *   5. tp_md_write_superblock  superblock, flush;
 *   6. tp_md_finish   freed blocks become allocatable (lock held).
 * The superblock is one sector of change and the last thing written: a crash before it leaves the
 * transaction before, whole.
 *
 * Not thread-safe but for steps 2 to 5: the caller holds the metadata lock. After a function failed
 * with anything but the statuses its comment names, the in-memory state may not be committed any
 * more; the caller turns the pool read-only.
 */
#ifndef THINPOOL_METADATA_H
#define THINPOOL_METADATA_H

#include <stdatomic.h>

#include "thinpool/btree.h"
#include "thinpool/data_map.h"

struct tp_metadata;

/* A device in use. Fields are the metadata's to change. */
struct tp_device {
	struct tp_device *next;
	uint32_t id;
	uint32_t holders;
	uint32_t creation_time;
	uint32_t snapshotted_time;
	uint64_t mapped_blocks;
	uint64_t transaction_id;
	uint64_t root;
	uint64_t owned_in;   /* transaction in which its path in the top level was owned */
	uint64_t changed_in; /* transaction of the last change, 0 for none */
	bool details_changed;
	bool root_changed;
};

int tp_md_format(struct tp_bdev *bdev, uint32_t data_block_sectors, uint64_t nr_data_blocks,
		 bool force, struct tp_error *err);
/* needs_check in the superblock is not an error here: see tp_md_needs_check. */
int tp_md_open(struct tp_bdev *bdev, uint64_t cache_bytes, struct tp_metadata **md_ret,
	       struct tp_error *err);
void tp_md_close(struct tp_metadata *md);

/* ---- facts -------------------------------------------------------------------------------- */

uint32_t tp_md_data_block_sectors(const struct tp_metadata *md);
uint32_t tp_md_time(const struct tp_metadata *md);
uint64_t tp_md_transaction_id(const struct tp_metadata *md);
uint64_t tp_md_nr_devices(const struct tp_metadata *md);
uint64_t tp_md_held_root(const struct tp_metadata *md);
bool tp_md_needs_check(const struct tp_metadata *md);
/* Something in the superblock forbids to write. */
bool tp_md_read_only_features(const struct tp_metadata *md);
struct tp_data_map *tp_md_data_map(struct tp_metadata *md);
uint64_t tp_md_nr_blocks(const struct tp_metadata *md);
uint64_t tp_md_nr_used(const struct tp_metadata *md);
uint64_t tp_md_reserve(const struct tp_metadata *md);
/* Room for one change: 1 now, 0 no, -1 after a commit. What frees space may use the reserve, of
 * which a little stays for the commit itself. */
int tp_md_has_room(const struct tp_metadata *md, bool into_reserve);
/* The same for n changes of the set of devices in one transaction. */
int tp_md_has_room_for(const struct tp_metadata *md, uint64_t n, bool into_reserve);
/* Enough to delete a device in one transaction. */
bool tp_md_has_room_to_delete(const struct tp_metadata *md, const struct tp_device *device);
/* The open transaction's number, and whether it holds anything. */
uint64_t tp_md_transaction(const struct tp_metadata *md);
bool tp_md_changed(const struct tp_metadata *md);
/* As above, or a sealed transaction is not durable. */
bool tp_md_uncommitted(const struct tp_metadata *md);
/* The superblock as it will be written by the sealed transaction: TP_MD_BLOCK_SIZE bytes. */
const void *tp_md_sealed_superblock(const struct tp_metadata *md);
const void *tp_md_committed_superblock(const struct tp_metadata *md);

/* ---- devices ------------------------------------------------------------------------------ */

/* TP_E_VOLUME_NOT_FOUND. */
int tp_md_get_device(struct tp_metadata *md, uint32_t id, struct tp_device **device_ret,
		     struct tp_error *err);
void tp_md_put_device(struct tp_metadata *md, struct tp_device *device);
/* The first device with an id >= id: TP_E_KEY_NOT_FOUND when there is none. */
int tp_md_next_device(struct tp_metadata *md, uint32_t id, struct tp_volume_info *info_ret,
		      struct tp_error *err);
/* TP_E_VOLUME_EXISTS, TP_E_LIMIT. */
int tp_md_check_new_id(struct tp_metadata *md, uint32_t id, struct tp_error *err);
/* TP_E_VOLUME_EXISTS, TP_E_LIMIT: nothing changed. */
int tp_md_create_device(struct tp_metadata *md, uint32_t id, struct tp_error *err);
/* TP_E_VOLUME_EXISTS, TP_E_VOLUME_NOT_FOUND, TP_E_LIMIT: nothing changed. */
int tp_md_create_snapshot(struct tp_metadata *md, uint32_t id, uint32_t origin,
			  struct tp_error *err);
/* TP_E_VOLUME_NOT_FOUND, TP_E_VOLUME_BUSY: nothing changed. */
int tp_md_delete_device(struct tp_metadata *md, uint32_t id, struct tp_error *err);
/* TP_E_TRANSACTION_ID: nothing changed. */
int tp_md_set_transaction_id(struct tp_metadata *md, uint64_t expected, uint64_t wanted,
			     struct tp_error *err);

/* ---- mappings ----------------------------------------------------------------------------- */

/* The value (tp_mapping_block, tp_mapping_time): TP_E_KEY_NOT_FOUND when unmapped. */
int tp_md_lookup(struct tp_metadata *md, struct tp_device *device, uint64_t block,
		 uint64_t *value_ret, struct tp_error *err);
/* As tp_btree_leaf. */
int tp_md_leaf(struct tp_metadata *md, struct tp_device *device, uint64_t block,
	       const struct tp_disk_node **leaf_ret, uint64_t *low_ret, uint64_t *high_ret,
	       struct tp_error *err);
/* The first mapping at or after block: TP_E_KEY_NOT_FOUND when there is none. */
int tp_md_next_mapping(struct tp_metadata *md, struct tp_device *device, uint64_t block,
		       uint64_t *block_ret, uint64_t *value_ret, struct tp_error *err);
/* Map block to a reserved data block, at the pool's present time; what it was mapped to loses a
 * reference. *value_ret is the new mapping. */
int tp_md_insert(struct tp_metadata *md, struct tp_device *device, uint64_t block,
		 uint64_t data_block, uint64_t *value_ret, struct tp_error *err);
/* TP_E_KEY_NOT_FOUND: nothing changed. */
int tp_md_remove(struct tp_metadata *md, struct tp_device *device, uint64_t block,
		 struct tp_error *err);

/* ---- size, metadata snapshot -------------------------------------------------------------- */

int tp_md_resize_data(struct tp_metadata *md, uint64_t nr_blocks, struct tp_error *err);
int tp_md_resize_metadata(struct tp_metadata *md, struct tp_error *err);
/* Directly after a commit, with nothing changed since: the caller sees to it and commits again.
 * TP_E_METADATA_SNAPSHOT_HELD, TP_E_NO_METADATA_SNAPSHOT: nothing changed. */
int tp_md_hold_snapshot(struct tp_metadata *md, struct tp_error *err);
int tp_md_release_snapshot(struct tp_metadata *md, struct tp_error *err);

/* ---- commit ------------------------------------------------------------------------------- */

int tp_md_seal(struct tp_metadata *md, struct tp_error *err);
int tp_md_write_blocks(struct tp_metadata *md, struct tp_error *err);
/* What tp_md_flush_blocks is given, so that both devices are flushed at once; -1 for neither. Once
 * begun it has to be ended, whatever fails in between. */
int tp_md_flush_begin(struct tp_metadata *md);
int tp_md_flush_blocks(struct tp_metadata *md, int begun, struct tp_error *err);
/* When it fails, the superblock may or may not have been written. */
int tp_md_write_superblock(struct tp_metadata *md, struct tp_error *err);
void tp_md_finish(struct tp_metadata *md, struct tp_run_list *freed);
/* Set or clear needs_check in the committed superblock, changing nothing else; durable. */
int tp_md_write_needs_check(struct tp_metadata *md, bool needs_check, struct tp_error *err);
/* Give back clean blocks above the cache's limit. No pointer into a node survives it. */
void tp_md_trim(struct tp_metadata *md);

#endif
