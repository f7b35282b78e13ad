/* SPDX-License-Identifier: Apache-2.0 */
#include "thinpool/metadata.h"

#include <stdlib.h>
#include <string.h>

#include "thinpool/error.h"
#include "superblock.h"

#define DEVICE_BUCKETS 256u
#define MD_BLOCKS_MIN  16u /* below this not even an empty pool fits */
/* Metadata blocks of a change's paths and of a commit's, but for what counting them needs. */
#define CHANGE_BLOCKS 24u
/* Of a further change in the same transaction: a leaf and its parent, copied and split, in the tree
 * of roots and in that of details. */
#define SERIES_CHANGE_BLOCKS 8u
/* Nodes hold no fewer, so both trees together have no more than two nodes for so many devices. */
#define SERIES_NODE_DEVICES 32u
/* Fewer entries of the overflow tree than any of its nodes but the root has. */
#define OVERFLOW_PER_NODE 110u

struct tp_metadata {
	struct tp_bdev *bdev;
	struct tp_block_manager *bm;
	struct tp_tm *tm;
	struct tp_data_map *data_map;
	uint64_t mapping_root;
	uint64_t details_root;
	uint64_t held_root;
	uint64_t transaction_id;
	uint64_t nr_devices;
	uint32_t time;
	uint32_t data_block_sectors;
	uint64_t transaction; /* number of the open one, from 1 */
	bool changed;         /* it holds something */
	bool sealed;
	union {
		struct tp_disk_superblock sb;
		uint8_t bytes[TP_MD_BLOCK_SIZE];
	} *committed, *pending;
	struct tp_device *devices[DEVICE_BUCKETS];
};

/* ---- trees -------------------------------------------------------------------------------- */

static int block_inc(void *context, const void *value, struct tp_error *err)
{
	struct tp_metadata *md = context;
	struct tp_le64 v;

	memcpy(&v, value, sizeof(v));
	return tp_data_map_inc(md->data_map, tp_mapping_block(tp_le64_get(v)), err);
}

static int block_dec(void *context, const void *value, struct tp_error *err)
{
	struct tp_metadata *md = context;
	struct tp_le64 v;

	memcpy(&v, value, sizeof(v));
	return tp_data_map_dec(md->data_map, tp_mapping_block(tp_le64_get(v)), err);
}

static struct tp_btree device_tree(struct tp_metadata *md)
{
	return (struct tp_btree){ .tm = md->tm,
				  .value_size = TP_MAPPING_VALUE_SIZE,
				  .value_inc = block_inc,
				  .value_dec = block_dec,
				  .context = md };
}

static int root_inc(void *context, const void *value, struct tp_error *err)
{
	struct tp_metadata *md = context;
	struct tp_le64 v;

	memcpy(&v, value, sizeof(v));
	return tp_tm_inc(md->tm, tp_le64_get(v), err);
}

static int root_dec(void *context, const void *value, struct tp_error *err)
{
	struct tp_metadata *md = context;
	struct tp_btree tree = device_tree(md);
	struct tp_le64 v;

	memcpy(&v, value, sizeof(v));
	return tp_btree_delete(&tree, tp_le64_get(v), err);
}

static struct tp_btree top_tree(struct tp_metadata *md)
{
	return (struct tp_btree){ .tm = md->tm,
				  .value_size = TP_MAPPING_VALUE_SIZE,
				  .value_inc = root_inc,
				  .value_dec = root_dec,
				  .context = md };
}

static struct tp_btree details_tree(struct tp_metadata *md)
{
	return (struct tp_btree){ .tm = md->tm, .value_size = TP_DETAILS_VALUE_SIZE };
}

static void mark_changed(struct tp_metadata *md, struct tp_device *device)
{
	md->changed = true;
	if (device)
		device->changed_in = md->transaction;
}

/* ---- life --------------------------------------------------------------------------------- */

static struct tp_metadata *md_alloc(struct tp_bdev *bdev, uint64_t cache_bytes,
				    struct tp_error *err)
{
	struct tp_metadata *md = calloc(1, sizeof(*md));
	void *committed = NULL, *pending = NULL;

	if (!md || posix_memalign(&committed, TP_MD_BLOCK_SIZE, TP_MD_BLOCK_SIZE) ||
	    posix_memalign(&pending, TP_MD_BLOCK_SIZE, TP_MD_BLOCK_SIZE) ||
	    !(md->bm = tp_bm_create(bdev, cache_bytes))) {
		free(committed);
		free(pending);
		free(md);
		tp_fail(err, TP_E_NO_MEMORY, "no memory for metadata");
		return NULL;
	}
	memset(committed, 0, TP_MD_BLOCK_SIZE);
	memset(pending, 0, TP_MD_BLOCK_SIZE);
	md->committed = committed;
	md->pending = pending;
	md->bdev = bdev;
	md->transaction = 1;
	return md;
}

void tp_md_close(struct tp_metadata *md)
{
	uint32_t i;

	if (!md)
		return;
	for (i = 0; i < DEVICE_BUCKETS; i++) {
		while (md->devices[i]) {
			struct tp_device *device = md->devices[i];

			md->devices[i] = device->next;
			free(device);
		}
	}
	tp_data_map_destroy(md->data_map);
	tp_tm_destroy(md->tm);
	tp_bm_destroy(md->bm);
	free(md->committed);
	free(md->pending);
	free(md);
}

static int check_empty(struct tp_bdev *bdev, void *buffer, struct tp_error *err)
{
	const uint64_t *words = buffer;
	size_t i;
	int r = tp_bdev_read(bdev, 0, buffer, TP_MD_BLOCK_SIZE, err);

	if (r)
		return r;
	for (i = 0; i < TP_MD_BLOCK_SIZE / sizeof(*words); i++)
		if (words[i])
			return tp_fail_block(err, TP_E_NOT_EMPTY, 0, words[i], 0,
					     "the metadata device already carries something: its "
					     "first block is not zeros");
	return 0;
}

int tp_md_format(struct tp_bdev *bdev, uint32_t data_block_sectors, uint64_t nr_data_blocks,
		 bool force, struct tp_error *err)
{
	uint64_t blocks = tp_superblock_usable_blocks(bdev);
	struct tp_metadata *md;
	struct tp_btree tree;
	int r = 0;

	if (data_block_sectors < TP_DATA_BLOCK_SECTORS_MIN ||
	    data_block_sectors > TP_DATA_BLOCK_SECTORS_MAX ||
	    data_block_sectors % TP_DATA_BLOCK_SECTORS_MIN)
		return tp_fail(err, TP_E_INVALID,
			       "a data block has 64 KiB to 1 GiB in steps of "
			       "64 KiB, not %lu bytes",
			       (unsigned long)data_block_sectors * TP_SECTOR_SIZE);
	if (blocks < MD_BLOCKS_MIN + nr_data_blocks / TP_BITMAP_ENTRIES)
		return tp_fail(err, TP_E_METADATA_SPACE,
			       "a metadata device of %lu blocks is too small for %lu data blocks",
			       (unsigned long)blocks, (unsigned long)nr_data_blocks);
	md = md_alloc(bdev, 0, err);
	if (!md)
		return TP_E_NO_MEMORY;
	if (!force)
		r = check_empty(bdev, md->pending, err);
	memset(md->pending, 0, TP_MD_BLOCK_SIZE);
	md->data_block_sectors = data_block_sectors;
	if (!r)
		r = tp_tm_create(md->bm, blocks, &md->tm, err);
	if (!r)
		r = tp_data_map_create(md->tm, &md->data_map, err);
	tree = top_tree(md);
	if (!r)
		r = tp_btree_empty(&tree, &md->mapping_root, err);
	tree = details_tree(md);
	if (!r)
		r = tp_btree_empty(&tree, &md->details_root, err);
	if (!r)
		r = tp_data_map_resize(md->data_map, nr_data_blocks, err);
	if (!r) {
		struct tp_disk_superblock *sb = &md->committed->sb;

		sb->magic = tp_le64_put(TP_SUPERBLOCK_MAGIC);
		sb->version = tp_le32_put(TP_SUPERBLOCK_VERSION);
		sb->data_block_size = tp_le32_put(data_block_sectors);
		sb->metadata_block_size = tp_le32_put(TP_MD_BLOCK_SECTORS);
		sb->metadata_nr_blocks = tp_le64_put(blocks);
		md->changed = true;
		r = tp_md_seal(md, err);
	}
	if (!r)
		r = tp_md_write_blocks(md, err);
	if (!r)
		r = tp_md_flush_blocks(md, -1, err);
	if (!r)
		r = tp_md_write_superblock(md, err);
	tp_md_close(md);
	return r;
}

static int count_devices(struct tp_metadata *md, struct tp_error *err)
{
	struct tp_btree details = details_tree(md);
	struct tp_disk_device_details value;
	uint64_t key = 0;
	int r;

	while (!(r = tp_btree_next(&details, md->details_root, key, &key, &value, err))) {
		md->nr_devices++;
		key++;
	}
	return r == TP_E_KEY_NOT_FOUND ? 0 : r;
}

int tp_md_open(struct tp_bdev *bdev, uint64_t cache_bytes, struct tp_metadata **md_ret,
	       struct tp_error *err)
{
	struct tp_metadata *md = md_alloc(bdev, cache_bytes, err);
	const struct tp_disk_superblock *sb;
	int r;

	if (!md)
		return TP_E_NO_MEMORY;
	sb = &md->committed->sb;
	r = tp_superblock_read(bdev, md->committed, err);
	if (!r) {
		md->mapping_root = tp_le64_get(sb->data_mapping_root);
		md->details_root = tp_le64_get(sb->device_details_root);
		md->held_root = tp_le64_get(sb->held_root);
		md->transaction_id = tp_le64_get(sb->trans_id);
		md->time = tp_le32_get(sb->time);
		md->data_block_sectors = tp_le32_get(sb->data_block_size);
		r = tp_tm_open(md->bm, &sb->metadata_space_map, &md->tm, err);
	}
	if (!r)
		r = tp_data_map_open(md->tm, &sb->data_space_map, &md->data_map, err);
	if (!r)
		r = count_devices(md, err);
	if (r) {
		tp_md_close(md);
		return r;
	}
	tp_bm_trim(md->bm);
	*md_ret = md;
	return 0;
}

/* ---- facts -------------------------------------------------------------------------------- */

uint32_t tp_md_data_block_sectors(const struct tp_metadata *md)
{
	return md->data_block_sectors;
}

uint32_t tp_md_time(const struct tp_metadata *md)
{
	return md->time;
}

uint64_t tp_md_transaction_id(const struct tp_metadata *md)
{
	return md->transaction_id;
}

uint64_t tp_md_nr_devices(const struct tp_metadata *md)
{
	return md->nr_devices;
}

uint64_t tp_md_held_root(const struct tp_metadata *md)
{
	return md->held_root;
}

bool tp_md_needs_check(const struct tp_metadata *md)
{
	return tp_le32_get(md->committed->sb.flags) & TP_SUPERBLOCK_NEEDS_CHECK;
}

bool tp_md_read_only_features(const struct tp_metadata *md)
{
	/* A time beyond what a mapping can hold would run over into its block. */
	return tp_le32_get(md->committed->sb.compat_ro_flags) != 0 || md->time > TP_TIME_MAX;
}

struct tp_data_map *tp_md_data_map(struct tp_metadata *md)
{
	return md->data_map;
}

uint64_t tp_md_nr_blocks(const struct tp_metadata *md)
{
	return tp_tm_nr_blocks(md->tm);
}

uint64_t tp_md_nr_used(const struct tp_metadata *md)
{
	return tp_tm_nr_used(md->tm);
}

uint64_t tp_md_reserve(const struct tp_metadata *md)
{
	uint64_t reserve = tp_tm_nr_blocks(md->tm) / 10;

	return reserve < TP_MD_RESERVE_MAX ? reserve : TP_MD_RESERVE_MAX;
}

static uint64_t min_of(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* The most metadata blocks that it takes to change the counts of n data blocks, and to commit. */
static uint64_t counting_blocks(const struct tp_metadata *md, uint64_t n)
{
	uint64_t bitmaps = tp_data_map_nr_bitmaps(md->data_map);
	uint64_t overflow = tp_data_map_nr_overflow(md->data_map) / OVERFLOW_PER_NODE + 1;

	return min_of(n, bitmaps) + min_of(n, overflow) +
	       tp_tm_nr_blocks(md->tm) / TP_BITMAP_ENTRIES;
}

/* What the others of n changes of the set of devices take beside the first. A node is copied once
 * a transaction, however many of them are in it. */
static uint64_t series_blocks(const struct tp_metadata *md, uint64_t n)
{
	if (n < 2)
		return 0;
	return min_of((n - 1) * SERIES_CHANGE_BLOCKS,
		      CHANGE_BLOCKS + 2 * (md->nr_devices + n) / SERIES_NODE_DEVICES);
}

int tp_md_has_room(const struct tp_metadata *md, bool into_reserve)
{
	return tp_md_has_room_for(md, 1, into_reserve);
}

int tp_md_has_room_for(const struct tp_metadata *md, uint64_t n, bool into_reserve)
{
	/* A shared leaf's blocks are all counted once more when one of its mappings changes. */
	uint64_t worst =
		CHANGE_BLOCKS + counting_blocks(md, TP_NODE_MAX_ENTRIES(8)) + series_blocks(md, n);
	uint64_t keep = tp_md_reserve(md) + series_blocks(md, n);

	/* The kernel's reserve is a tenth; on a tiny device that is less than one change needs. */
	if (keep < worst + CHANGE_BLOCKS)
		keep = worst + CHANGE_BLOCKS;
	if (into_reserve)
		keep = worst;
	if (tp_tm_nr_allocatable(md->tm) > keep)
		return 1;
	return tp_tm_nr_allocatable(md->tm) + tp_tm_nr_pending(md->tm) > keep ? -1 : 0;
}

bool tp_md_has_room_to_delete(const struct tp_metadata *md, const struct tp_device *device)
{
	/* Shared as a whole, it only loses a reference. */
	return tp_tm_count(md->tm, device->root) > 1 ||
	       tp_tm_nr_allocatable(md->tm) >
		       CHANGE_BLOCKS + counting_blocks(md, device->mapped_blocks);
}

uint64_t tp_md_transaction(const struct tp_metadata *md)
{
	return md->transaction;
}

bool tp_md_changed(const struct tp_metadata *md)
{
	return md->changed;
}

bool tp_md_uncommitted(const struct tp_metadata *md)
{
	return md->changed || md->sealed;
}

const void *tp_md_sealed_superblock(const struct tp_metadata *md)
{
	return md->pending->bytes;
}

const void *tp_md_committed_superblock(const struct tp_metadata *md)
{
	return md->committed->bytes;
}

/* ---- devices ------------------------------------------------------------------------------ */

static struct tp_device *find_device(struct tp_metadata *md, uint32_t id)
{
	struct tp_device *device = md->devices[id % DEVICE_BUCKETS];

	while (device && device->id != id)
		device = device->next;
	return device;
}

static struct tp_device *add_device(struct tp_metadata *md, uint32_t id, struct tp_error *err)
{
	struct tp_device *device = calloc(1, sizeof(*device));

	if (!device) {
		tp_fail(err, TP_E_NO_MEMORY, "no memory for device %u", id);
		return NULL;
	}
	device->id = id;
	device->next = md->devices[id % DEVICE_BUCKETS];
	md->devices[id % DEVICE_BUCKETS] = device;
	return device;
}

static void drop_device(struct tp_metadata *md, struct tp_device *device)
{
	struct tp_device **at = &md->devices[device->id % DEVICE_BUCKETS];

	while (*at != device)
		at = &(*at)->next;
	*at = device->next;
	free(device);
}

static void drop_if_idle(struct tp_metadata *md, struct tp_device *device)
{
	if (!device->holders && !device->details_changed && !device->root_changed)
		drop_device(md, device);
}

int tp_md_get_device(struct tp_metadata *md, uint32_t id, struct tp_device **device_ret,
		     struct tp_error *err)
{
	struct tp_btree details = details_tree(md), top = top_tree(md);
	struct tp_device *device = find_device(md, id);
	struct tp_disk_device_details value;
	struct tp_le64 root;
	int r;

	if (device) {
		device->holders++;
		*device_ret = device;
		return 0;
	}
	r = tp_btree_lookup(&details, md->details_root, id, &value, err);
	if (r == TP_E_KEY_NOT_FOUND)
		return tp_fail(err, TP_E_VOLUME_NOT_FOUND, "the pool has no device %u", id);
	if (!r)
		r = tp_btree_lookup(&top, md->mapping_root, id, &root, err);
	if (r == TP_E_KEY_NOT_FOUND)
		return tp_fail_block(err, TP_E_NODE_MALFORMED, md->mapping_root, id, id,
				     "device %u has details and no mappings", id);
	if (r)
		return r;
	device = add_device(md, id, err);
	if (!device)
		return TP_E_NO_MEMORY;
	device->mapped_blocks = tp_le64_get(value.mapped_blocks);
	device->transaction_id = tp_le64_get(value.transaction_id);
	device->creation_time = tp_le32_get(value.creation_time);
	device->snapshotted_time = tp_le32_get(value.snapshotted_time);
	device->root = tp_le64_get(root);
	device->holders = 1;
	*device_ret = device;
	return 0;
}

void tp_md_put_device(struct tp_metadata *md, struct tp_device *device)
{
	TP_ASSERT(device->holders);
	device->holders--;
	drop_if_idle(md, device);
}

int tp_md_check_new_id(struct tp_metadata *md, uint32_t id, struct tp_error *err)
{
	struct tp_btree details = details_tree(md), top = top_tree(md);
	struct tp_disk_device_details value;
	struct tp_le64 root;
	int r;

	if (id > TP_DEVICE_ID_MAX)
		return tp_fail(err, TP_E_LIMIT, "device ids have 24 bits, %u has more", id);
	if (find_device(md, id))
		return tp_fail(err, TP_E_VOLUME_EXISTS, "the pool has a device %u already", id);
	r = tp_btree_lookup(&details, md->details_root, id, &value, err);
	/* In others' metadata a device may stand in one tree only: it is not written over. */
	if (r == TP_E_KEY_NOT_FOUND)
		r = tp_btree_lookup(&top, md->mapping_root, id, &root, err);
	if (!r)
		return tp_fail(err, TP_E_VOLUME_EXISTS, "the pool has a device %u already", id);
	return r == TP_E_KEY_NOT_FOUND ? 0 : r;
}

int tp_md_next_device(struct tp_metadata *md, uint32_t id, struct tp_volume_info *info_ret,
		      struct tp_error *err)
{
	struct tp_btree details = details_tree(md);
	struct tp_disk_device_details value;
	const struct tp_device *device;
	uint64_t key;
	int r;

	/* Devices made in the open transaction are in the tree at once, see enter_device. */
	r = tp_btree_next(&details, md->details_root, id, &key, &value, err);
	if (r)
		return r;
	if (key > TP_DEVICE_ID_MAX)
		return TP_E_KEY_NOT_FOUND;
	memset(info_ret, 0, sizeof(*info_ret));
	info_ret->id = (uint32_t)key;
	device = find_device(md, (uint32_t)key);
	info_ret->mapped_blocks = device ? device->mapped_blocks : tp_le64_get(value.mapped_blocks);
	info_ret->transaction_id = tp_le64_get(value.transaction_id);
	info_ret->creation_time = tp_le32_get(value.creation_time);
	info_ret->snapshotted_time =
		device ? device->snapshotted_time : tp_le32_get(value.snapshotted_time);
	info_ret->open = device ? device->holders : 0;
	return 0;
}

static struct tp_disk_device_details pack_details(const struct tp_device *device)
{
	return (struct tp_disk_device_details){
		.mapped_blocks = tp_le64_put(device->mapped_blocks),
		.transaction_id = tp_le64_put(device->transaction_id),
		.creation_time = tp_le32_put(device->creation_time),
		.snapshotted_time = tp_le32_put(device->snapshotted_time),
	};
}

/* Put a device into both trees. */
static int enter_device(struct tp_metadata *md, const struct tp_device *device,
			struct tp_error *err)
{
	struct tp_disk_device_details value = pack_details(device);
	struct tp_btree details = details_tree(md), top = top_tree(md);
	struct tp_le64 root = tp_le64_put(device->root);
	int r = tp_btree_insert(&top, &md->mapping_root, device->id, &root, err);

	if (!r)
		r = tp_btree_insert(&details, &md->details_root, device->id, &value, err);
	if (!r)
		md->nr_devices++;
	return r;
}

int tp_md_create_device(struct tp_metadata *md, uint32_t id, struct tp_error *err)
{
	struct tp_btree tree = device_tree(md);
	struct tp_device device = { .id = id,
				    .creation_time = md->time,
				    .snapshotted_time = md->time,
				    .transaction_id = md->transaction_id };
	int r = tp_md_check_new_id(md, id, err);

	if (!r)
		r = tp_btree_empty(&tree, &device.root, err);
	if (!r)
		r = enter_device(md, &device, err);
	if (!r)
		mark_changed(md, NULL);
	return r;
}

/*
 * Before a device's tree changes, the path to it in the top level is made ours: were that path
 * shared with a metadata snapshot, its roots would each gain a reference by that, and the
 * device's tree could no longer be changed in place.
 */
static int own_device(struct tp_metadata *md, struct tp_device *device, struct tp_error *err)
{
	struct tp_btree top = top_tree(md);
	int r;

	if (device->owned_in == md->transaction)
		return 0;
	r = tp_btree_own_path(&top, &md->mapping_root, device->id, err);
	if (!r)
		device->owned_in = md->transaction;
	return r;
}

int tp_md_create_snapshot(struct tp_metadata *md, uint32_t id, uint32_t origin_id,
			  struct tp_error *err)
{
	struct tp_device snapshot, *origin;
	int r = tp_md_check_new_id(md, id, err);

	if (r)
		return r;
	if (md->time >= TP_TIME_MAX)
		return tp_fail(err, TP_E_LIMIT,
			       "the pool has had its %u snapshots: times have "
			       "24 bits",
			       TP_TIME_MAX);
	r = tp_md_get_device(md, origin_id, &origin, err);
	if (r)
		return r;
	r = own_device(md, origin, err);
	if (!r)
		r = tp_tm_inc(md->tm, origin->root, err);
	if (!r) {
		md->time++;
		snapshot = (struct tp_device){ .id = id,
					       .root = origin->root,
					       .mapped_blocks = origin->mapped_blocks,
					       .transaction_id = md->transaction_id,
					       .creation_time = md->time,
					       .snapshotted_time = md->time };
		origin->snapshotted_time = md->time;
		origin->details_changed = true;
		mark_changed(md, origin);
		r = enter_device(md, &snapshot, err);
	}
	tp_md_put_device(md, origin);
	return r;
}

int tp_md_delete_device(struct tp_metadata *md, uint32_t id, struct tp_error *err)
{
	struct tp_btree details = details_tree(md), top = top_tree(md), tree = device_tree(md);
	struct tp_device *device;
	uint64_t root;
	int r = tp_md_get_device(md, id, &device, err);

	if (r)
		return r;
	if (device->holders > 1) {
		tp_md_put_device(md, device);
		return tp_fail(err, TP_E_VOLUME_BUSY, "device %u is in use", id);
	}
	r = own_device(md, device, err);
	root = device->root;
	if (!r)
		r = tp_btree_remove(&top, &md->mapping_root, id, NULL, err);
	if (!r)
		r = tp_btree_remove(&details, &md->details_root, id, NULL, err);
	drop_device(md, device);
	md->nr_devices--;
	mark_changed(md, NULL);
	return r ? r : tp_btree_delete(&tree, root, err);
}

int tp_md_set_transaction_id(struct tp_metadata *md, uint64_t expected, uint64_t wanted,
			     struct tp_error *err)
{
	if (md->transaction_id != expected)
		return tp_fail_block(err, TP_E_TRANSACTION_ID, TP_NO_BLOCK, md->transaction_id,
				     expected, "the pool's transaction id is %lu, not %lu",
				     (unsigned long)md->transaction_id, (unsigned long)expected);
	if (wanted != expected)
		mark_changed(md, NULL);
	md->transaction_id = wanted;
	return 0;
}

/* ---- mappings ----------------------------------------------------------------------------- */

int tp_md_lookup(struct tp_metadata *md, struct tp_device *device, uint64_t block,
		 uint64_t *value_ret, struct tp_error *err)
{
	struct tp_btree tree = device_tree(md);
	struct tp_le64 value;
	int r = tp_btree_lookup(&tree, device->root, block, &value, err);

	if (!r)
		*value_ret = tp_le64_get(value);
	return r;
}

int tp_md_leaf(struct tp_metadata *md, struct tp_device *device, uint64_t block,
	       const struct tp_disk_node **leaf_ret, uint64_t *low_ret, uint64_t *high_ret,
	       struct tp_error *err)
{
	struct tp_btree tree = device_tree(md);

	return tp_btree_leaf(&tree, device->root, block, leaf_ret, low_ret, high_ret, err);
}

int tp_md_next_mapping(struct tp_metadata *md, struct tp_device *device, uint64_t block,
		       uint64_t *block_ret, uint64_t *value_ret, struct tp_error *err)
{
	struct tp_btree tree = device_tree(md);
	struct tp_le64 value;
	int r = tp_btree_next(&tree, device->root, block, block_ret, &value, err);

	if (!r)
		*value_ret = tp_le64_get(value);
	return r;
}

int tp_md_insert(struct tp_metadata *md, struct tp_device *device, uint64_t block,
		 uint64_t data_block, uint64_t *value_ret, struct tp_error *err)
{
	struct tp_btree tree = device_tree(md);
	uint64_t value = tp_mapping_pack(data_block, md->time), old;
	struct tp_le64 packed = tp_le64_put(value);
	bool replaces;
	int r = own_device(md, device, err);

	if (r)
		return r;
	mark_changed(md, device);
	/*
	 * The leaf is owned before the old value's reference is dropped: were the leaf shared,
	 * owning it gives every block in it a reference more, the old one included.
	 */
	r = tp_btree_own_path(&tree, &device->root, block, err);
	device->root_changed = true;
	if (r)
		return r;
	r = tp_md_lookup(md, device, block, &old, err);
	if (r && r != TP_E_KEY_NOT_FOUND)
		return r;
	replaces = !r;
	r = tp_data_map_claim(tp_md_data_map(md), data_block, err);
	if (!r)
		r = tp_btree_insert(&tree, &device->root, block, &packed, err);
	if (!r && replaces)
		r = tp_data_map_dec(md->data_map, tp_mapping_block(old), err);
	if (r)
		return r;
	if (!replaces) {
		device->mapped_blocks++;
		device->details_changed = true;
	}
	*value_ret = value;
	return 0;
}

int tp_md_remove(struct tp_metadata *md, struct tp_device *device, uint64_t block,
		 struct tp_error *err)
{
	struct tp_btree tree = device_tree(md);
	struct tp_le64 value;
	uint64_t ignored;
	int r = tp_md_lookup(md, device, block, &ignored, err);

	if (r)
		return r;
	r = own_device(md, device, err);
	if (r)
		return r;
	mark_changed(md, device);
	device->root_changed = true;
	r = tp_btree_remove(&tree, &device->root, block, &value, err);
	if (r)
		return r;
	/* Others may have counted wrong. */
	if (device->mapped_blocks)
		device->mapped_blocks--;
	device->details_changed = true;
	return tp_data_map_dec(md->data_map, tp_mapping_block(tp_le64_get(value)), err);
}

/* ---- size, metadata snapshot -------------------------------------------------------------- */

int tp_md_resize_data(struct tp_metadata *md, uint64_t nr_blocks, struct tp_error *err)
{
	if (nr_blocks == tp_data_map_nr_blocks(md->data_map))
		return 0;
	mark_changed(md, NULL);
	return tp_data_map_resize(md->data_map, nr_blocks, err);
}

int tp_md_resize_metadata(struct tp_metadata *md, struct tp_error *err)
{
	uint64_t blocks = tp_superblock_usable_blocks(md->bdev);

	int r;

	if (blocks == tp_tm_nr_blocks(md->tm))
		return 0;
	r = tp_tm_resize(md->tm, blocks, err);
	if (!r)
		mark_changed(md, NULL);
	return r;
}

int tp_md_hold_snapshot(struct tp_metadata *md, struct tp_error *err)
{
	struct tp_disk_superblock *copy;
	uint64_t block;
	void *data;
	int r;

	if (md->held_root)
		return tp_fail_block(err, TP_E_METADATA_SNAPSHOT_HELD, md->held_root, md->held_root,
				     0, "the pool holds a metadata snapshot already, at block %lu",
				     (unsigned long)md->held_root);
	TP_ASSERT(!md->changed && !md->sealed);
	r = tp_tm_new(md->tm, TP_KIND_SUPERBLOCK, &block, &data, err);
	if (r)
		return r;
	memcpy(data, md->committed, TP_MD_BLOCK_SIZE);
	copy = data;
	copy->blocknr = tp_le64_put(block);
	/* Readers of the snapshot need no space maps, and these would soon be wrong. */
	memset(&copy->data_space_map, 0, TP_SPACE_MAP_ROOT_FIELD);
	memset(&copy->metadata_space_map, 0, TP_SPACE_MAP_ROOT_FIELD);
	mark_changed(md, NULL);
	r = tp_tm_inc(md->tm, md->mapping_root, err);
	if (!r)
		r = tp_tm_inc(md->tm, md->details_root, err);
	if (!r)
		md->held_root = block;
	return r;
}

int tp_md_release_snapshot(struct tp_metadata *md, struct tp_error *err)
{
	struct tp_btree top = top_tree(md), details = details_tree(md);
	const struct tp_disk_superblock *copy;
	uint64_t mapping_root, details_root;
	const void *data;
	int r;

	if (!md->held_root)
		return tp_fail(err, TP_E_NO_METADATA_SNAPSHOT,
			       "the pool holds no metadata snapshot");
	r = tp_tm_read(md->tm, md->held_root, TP_KIND_SUPERBLOCK, &data, err);
	if (r)
		return r;
	copy = data;
	mapping_root = tp_le64_get(copy->data_mapping_root);
	details_root = tp_le64_get(copy->device_details_root);
	mark_changed(md, NULL);
	r = tp_btree_delete(&top, mapping_root, err);
	if (!r)
		r = tp_btree_delete(&details, details_root, err);
	if (!r)
		r = tp_tm_dec(md->tm, md->held_root, NULL, err);
	if (!r)
		md->held_root = 0;
	return r;
}

/* ---- commit ------------------------------------------------------------------------------- */

static int enter_changed_devices(struct tp_metadata *md, struct tp_error *err)
{
	struct tp_btree details = details_tree(md), top = top_tree(md);
	struct tp_device *device, *next;
	uint32_t i;
	int r = 0;

	for (i = 0; i < DEVICE_BUCKETS; i++) {
		for (device = md->devices[i]; device; device = next) {
			next = device->next;
			if (device->details_changed) {
				struct tp_disk_device_details value = pack_details(device);

				r = tp_btree_insert(&details, &md->details_root, device->id, &value,
						    err);
				if (r)
					return r;
				device->details_changed = false;
			}
			if (device->root_changed) {
				struct tp_le64 root = tp_le64_put(device->root);

				TP_ASSERT(device->owned_in == md->transaction);
				r = tp_btree_insert(&top, &md->mapping_root, device->id, &root,
						    err);
				if (r)
					return r;
				device->root_changed = false;
			}
			drop_if_idle(md, device);
		}
	}
	return 0;
}

int tp_md_seal(struct tp_metadata *md, struct tp_error *err)
{
	struct tp_disk_superblock *sb = &md->pending->sb;
	int r;

	TP_ASSERT(!md->sealed);
	memcpy(md->pending, md->committed, TP_MD_BLOCK_SIZE);
	r = enter_changed_devices(md, err);
	if (!r)
		r = tp_data_map_flush(md->data_map, &sb->data_space_map, err);
	/* Last: everything above allocates and frees metadata blocks. */
	if (!r)
		r = tp_tm_flush_space_map(md->tm, &sb->metadata_space_map, err);
	if (r)
		return r;
	sb->time = tp_le32_put(md->time);
	sb->trans_id = tp_le64_put(md->transaction_id);
	sb->held_root = tp_le64_put(md->held_root);
	sb->data_mapping_root = tp_le64_put(md->mapping_root);
	sb->device_details_root = tp_le64_put(md->details_root);
	sb->csum = tp_le32_put(tp_block_checksum(sb, TP_SALT_SUPERBLOCK));
	tp_data_map_seal(md->data_map);
	tp_tm_seal(md->tm);
	md->sealed = true;
	md->changed = false;
	md->transaction++;
	return 0;
}

int tp_md_write_blocks(struct tp_metadata *md, struct tp_error *err)
{
	int r;

	TP_ASSERT(md->sealed);
	r = tp_bm_write_sealed(md->bm, err);
	if (!r)
		tp_bdev_start(md->bdev);
	return r;
}

int tp_md_flush_begin(struct tp_metadata *md)
{
	TP_ASSERT(md->sealed);
	return tp_bdev_flush_begin(md->bdev);
}

int tp_md_flush_blocks(struct tp_metadata *md, int begun, struct tp_error *err)
{
	TP_ASSERT(md->sealed);
	return tp_bdev_flush_end(md->bdev, begun, err);
}

int tp_md_write_superblock(struct tp_metadata *md, struct tp_error *err)
{
	int r;

	TP_ASSERT(md->sealed);
	r = tp_superblock_write(md->bdev, md->pending, err);
	return r ? r : tp_bdev_flush(md->bdev, err);
}

void tp_md_finish(struct tp_metadata *md, struct tp_run_list *freed)
{
	TP_ASSERT(md->sealed);
	memcpy(md->committed, md->pending, TP_MD_BLOCK_SIZE);
	tp_data_map_finish_seal(md->data_map, freed);
	tp_tm_finish_seal(md->tm);
	md->sealed = false;
	tp_bm_trim(md->bm);
}

int tp_md_write_needs_check(struct tp_metadata *md, bool needs_check, struct tp_error *err)
{
	struct tp_disk_superblock *sb = &md->committed->sb;
	uint32_t flags = tp_le32_get(sb->flags) & ~TP_SUPERBLOCK_NEEDS_CHECK;
	int r;

	sb->flags = tp_le32_put(flags | (needs_check ? TP_SUPERBLOCK_NEEDS_CHECK : 0));
	r = tp_superblock_write(md->bdev, md->committed, err);
	return r ? r : tp_bdev_flush(md->bdev, err);
}

void tp_md_trim(struct tp_metadata *md)
{
	tp_bm_trim(md->bm);
}
