/* SPDX-License-Identifier: Apache-2.0 */
#include "thinpool/block_manager.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "thinpool/disk_format.h"
#include "thinpool/error.h"

#define HASH_SIZE_MIN       1024u
#define WRITE_BATCH         64u /* neighbours written in one call: 256 KiB */
#define DEFAULT_CACHE_BYTES (UINT64_C(32) << 20)

enum block_state {
	CLEAN,
	NEW,
	SEALED
};

struct md_block {
	uint64_t nr;
	uint8_t *data;
	struct md_block *hash_next;
	struct md_block *prev, *next; /* in the list of its state */
	uint8_t state;
	uint8_t kind;
	bool used; /* since the clock hand passed */
};

struct block_list {
	struct md_block head;
	uint64_t count;
};

struct tp_block_manager {
	struct tp_bdev *bdev;
	uint64_t clean_max;
	struct md_block **hash;
	uint64_t hash_size; /* a power of two */
	uint64_t nr_cached;
	struct block_list clean, fresh, sealed;
};

static void list_init(struct block_list *list)
{
	list->head.prev = list->head.next = &list->head;
	list->count = 0;
}

static void list_add(struct block_list *list, struct md_block *b)
{
	b->next = list->head.next;
	b->prev = &list->head;
	b->next->prev = b;
	list->head.next = b;
	list->count++;
}

static void list_del(struct block_list *list, struct md_block *b)
{
	b->prev->next = b->next;
	b->next->prev = b->prev;
	list->count--;
}

static struct block_list *list_of(struct tp_block_manager *bm, const struct md_block *b)
{
	return b->state == CLEAN ? &bm->clean : b->state == NEW ? &bm->fresh : &bm->sealed;
}

static uint64_t bucket(const struct tp_block_manager *bm, uint64_t nr)
{
	return (nr * UINT64_C(0x9E3779B97F4A7C15) >> 20) & (bm->hash_size - 1);
}

static struct md_block *find(const struct tp_block_manager *bm, uint64_t nr)
{
	struct md_block *b;

	for (b = bm->hash[bucket(bm, nr)]; b && b->nr != nr; b = b->hash_next)
		;
	return b;
}

static void unhash(struct tp_block_manager *bm, struct md_block *b)
{
	struct md_block **at = &bm->hash[bucket(bm, b->nr)];

	while (*at != b)
		at = &(*at)->hash_next;
	*at = b->hash_next;
	bm->nr_cached--;
}

/* A larger table, or the same one when memory is short: only speed is lost. */
static void grow_hash(struct tp_block_manager *bm)
{
	struct md_block **old = bm->hash, *b, *next;
	uint64_t old_size = bm->hash_size, i;
	struct md_block **hash = calloc(old_size * 2, sizeof(struct md_block *));

	if (!hash)
		return;
	bm->hash = hash;
	bm->hash_size = old_size * 2;
	for (i = 0; i < old_size; i++) {
		for (b = old[i]; b; b = next) {
			uint64_t at = bucket(bm, b->nr);

			next = b->hash_next;
			b->hash_next = hash[at];
			hash[at] = b;
		}
	}
	free(old);
}

static void block_free(struct tp_block_manager *bm, struct md_block *b)
{
	unhash(bm, b);
	list_del(list_of(bm, b), b);
	free(b->data);
	free(b);
}

static struct md_block *block_alloc(uint64_t nr, enum tp_block_kind kind)
{
	struct md_block *b = calloc(1, sizeof(*b));
	void *data;

	if (!b)
		return NULL;
	if (posix_memalign(&data, TP_MD_BLOCK_SIZE, TP_MD_BLOCK_SIZE)) {
		free(b);
		return NULL;
	}
	b->nr = nr;
	b->data = data;
	b->kind = (uint8_t)kind;
	b->used = true;
	return b;
}

static void block_insert(struct tp_block_manager *bm, struct md_block *b, enum block_state state)
{
	uint64_t at;

	if (bm->nr_cached > bm->hash_size)
		grow_hash(bm);
	at = bucket(bm, b->nr);
	b->hash_next = bm->hash[at];
	bm->hash[at] = b;
	bm->nr_cached++;
	b->state = (uint8_t)state;
	list_add(list_of(bm, b), b);
}

struct tp_block_manager *tp_bm_create(struct tp_bdev *bdev, uint64_t cache_bytes)
{
	struct tp_block_manager *bm = calloc(1, sizeof(*bm));

	if (!bm)
		return NULL;
	bm->bdev = bdev;
	bm->clean_max = (cache_bytes ? cache_bytes : DEFAULT_CACHE_BYTES) / TP_MD_BLOCK_SIZE;
	bm->hash_size = HASH_SIZE_MIN;
	bm->hash = calloc(bm->hash_size, sizeof(struct md_block *));
	if (!bm->hash) {
		free(bm);
		return NULL;
	}
	list_init(&bm->clean);
	list_init(&bm->fresh);
	list_init(&bm->sealed);
	return bm;
}

void tp_bm_destroy(struct tp_block_manager *bm)
{
	struct block_list *lists[3];
	int i;

	if (!bm)
		return;
	lists[0] = &bm->clean;
	lists[1] = &bm->fresh;
	lists[2] = &bm->sealed;
	for (i = 0; i < 3; i++)
		while (lists[i]->count)
			block_free(bm, lists[i]->head.next);
	free(bm->hash);
	free(bm);
}

static uint32_t salt_of(enum tp_block_kind kind)
{
	switch (kind) {
	case TP_KIND_NODE:
		return TP_SALT_NODE;
	case TP_KIND_INDEX:
		return TP_SALT_INDEX;
	case TP_KIND_BITMAP:
		return TP_SALT_BITMAP;
	case TP_KIND_SUPERBLOCK:
		return TP_SALT_SUPERBLOCK;
	}
	TP_ASSERT(!"a block kind");
	return 0;
}

uint32_t tp_block_checksum(const void *data, uint32_t salt)
{
	return tp_crc32c(UINT32_MAX, (const uint8_t *)data + TP_CSUM_SKIP, TP_CSUM_LENGTH) ^ salt;
}

/* What every user of a node relies on, so that no index computed from it leaves the block. */
static int validate_node(const struct tp_disk_node *node, uint64_t nr, struct tp_error *err)
{
	uint32_t flags = tp_le32_get(node->header.flags);
	uint32_t n = tp_le32_get(node->header.nr_entries);
	uint32_t max = tp_le32_get(node->header.max_entries);
	uint32_t value_size = tp_le32_get(node->header.value_size);
	bool internal = flags & TP_NODE_INTERNAL;
	uint32_t i;

	if (internal == !!(flags & TP_NODE_LEAF))
		return tp_fail_block(err, TP_E_NODE_MALFORMED, nr, flags, TP_NODE_LEAF,
				     "node %lu is neither internal nor leaf: flags %u",
				     (unsigned long)nr, flags);
	if (value_size > TP_MD_BLOCK_SIZE || max > TP_MD_BLOCK_SIZE || n > max ||
	    TP_NODE_HEADER_SIZE + (uint64_t)max * (8 + value_size) > TP_MD_BLOCK_SIZE)
		return tp_fail_block(
			err, TP_E_NODE_MALFORMED, nr, n, max,
			"node %lu does not fit its block: %u of %u entries of %u bytes",
			(unsigned long)nr, n, max, value_size);
	if (internal && (value_size != 8 || !n))
		return tp_fail_block(err, TP_E_NODE_MALFORMED, nr, value_size, 8,
				     "internal node %lu has %u entries of %u bytes",
				     (unsigned long)nr, n, value_size);
	for (i = 1; i < n; i++) {
		uint64_t before = tp_le64_get(node->keys[i - 1]);
		uint64_t key = tp_le64_get(node->keys[i]);

		if (key <= before)
			return tp_fail_block(err, TP_E_NODE_MALFORMED, nr, key, before,
					     "node %lu has its keys out of order at entry %u",
					     (unsigned long)nr, i);
	}
	return 0;
}

static int validate(const void *data, uint64_t nr, enum tp_block_kind kind, struct tp_error *err)
{
	const struct tp_disk_block_header *h = data;
	uint32_t wanted = tp_block_checksum(data, salt_of(kind));

	if (tp_le64_get(h->blocknr) != nr)
		return tp_fail_block(err, TP_E_BLOCK_NUMBER, nr, tp_le64_get(h->blocknr), nr,
				     "metadata block %lu says that it is block %lu",
				     (unsigned long)nr, (unsigned long)tp_le64_get(h->blocknr));
	if (tp_le32_get(h->csum) != wanted)
		return tp_fail_block(err, TP_E_BLOCK_CHECKSUM, nr, tp_le32_get(h->csum), wanted,
				     "metadata block %lu has checksum %08x, its contents %08x",
				     (unsigned long)nr, tp_le32_get(h->csum), wanted);
	return kind == TP_KIND_NODE ? validate_node(data, nr, err) : 0;
}

int tp_bm_read(struct tp_block_manager *bm, uint64_t block, enum tp_block_kind kind,
	       const void **data_ret, struct tp_error *err)
{
	struct md_block *b = find(bm, block);
	int r;

	if (b) {
		/* Seen as another kind before: one of the two references is wrong. */
		if (b->kind != kind)
			return tp_fail_block(err, TP_E_NODE_MALFORMED, block, b->kind, kind,
					     "metadata block %lu is used as two kinds of block",
					     (unsigned long)block);
		b->used = true;
		*data_ret = b->data;
		return 0;
	}
	if (block == TP_SUPERBLOCK_LOCATION || block >= tp_bdev_size(bm->bdev) / TP_MD_BLOCK_SIZE)
		return tp_fail_block(err, TP_E_OUT_OF_RANGE, block, block,
				     tp_bdev_size(bm->bdev) / TP_MD_BLOCK_SIZE,
				     "metadata block %lu is referred to and does not exist",
				     (unsigned long)block);
	b = block_alloc(block, kind);
	if (!b)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a metadata block");
	r = tp_bdev_read(bm->bdev, block * TP_MD_BLOCK_SIZE, b->data, TP_MD_BLOCK_SIZE, err);
	if (!r)
		r = validate(b->data, block, kind, err);
	if (r) {
		free(b->data);
		free(b);
		return r;
	}
	block_insert(bm, b, CLEAN);
	*data_ret = b->data;
	return 0;
}

int tp_bm_new(struct tp_block_manager *bm, uint64_t block, enum tp_block_kind kind, void **data_ret,
	      struct tp_error *err)
{
	struct md_block *b = find(bm, block);
	struct tp_disk_block_header *h;

	if (b) {
		TP_ASSERT(b->state == CLEAN);
		block_free(bm, b);
	}
	b = block_alloc(block, kind);
	if (!b)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a metadata block");
	memset(b->data, 0, TP_MD_BLOCK_SIZE);
	h = (struct tp_disk_block_header *)b->data;
	h->blocknr = tp_le64_put(block);
	block_insert(bm, b, NEW);
	*data_ret = b->data;
	return 0;
}

void *tp_bm_new_data(struct tp_block_manager *bm, uint64_t block)
{
	struct md_block *b = find(bm, block);

	TP_ASSERT(b && b->state == NEW);
	return b->data;
}

void tp_bm_forget(struct tp_block_manager *bm, uint64_t block)
{
	struct md_block *b = find(bm, block);

	if (b && b->state == NEW)
		block_free(bm, b);
}

void tp_bm_seal(struct tp_block_manager *bm)
{
	struct md_block *b;

	TP_ASSERT(!bm->sealed.count);
	while (bm->fresh.count) {
		b = bm->fresh.head.next;
		list_del(&bm->fresh, b);
		b->state = SEALED;
		list_add(&bm->sealed, b);
	}
}

static int compare_blocks(const void *a, const void *b)
{
	const struct md_block *const *x = a, *const *y = b;

	return (*x)->nr<(*y)->nr ? -1 : (*x)->nr>(*y)->nr;
}

int tp_bm_write_sealed(struct tp_block_manager *bm, struct tp_error *err)
{
	uint64_t n = bm->sealed.count, i, run, k;
	struct md_block **order, *b;
	void *staging = NULL;
	int r = 0;

	if (!n)
		return 0;
	order = malloc(n * sizeof(struct md_block *));
	if (!order ||
	    posix_memalign(&staging, TP_MD_BLOCK_SIZE, (size_t)WRITE_BATCH * TP_MD_BLOCK_SIZE)) {
		free(order);
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to write metadata");
	}
	for (b = bm->sealed.head.next, i = 0; b != &bm->sealed.head; b = b->next)
		order[i++] = b;
	TP_ASSERT(i == n);
	qsort(order, n, sizeof(struct md_block *), compare_blocks);
	for (i = 0; i < n && !r; i += run) {
		for (run = 0;
		     i + run < n && run < WRITE_BATCH && order[i + run]->nr == order[i]->nr + run;
		     run++) {
			uint8_t *to = (uint8_t *)staging + run * TP_MD_BLOCK_SIZE;
			struct tp_disk_block_header *h = (struct tp_disk_block_header *)to;

			/* Into the copy: the block itself has readers. */
			memcpy(to, order[i + run]->data, TP_MD_BLOCK_SIZE);
			TP_ASSERT(tp_le64_get(h->blocknr) == order[i + run]->nr);
			h->csum = tp_le32_put(tp_block_checksum(to, salt_of(order[i + run]->kind)));
		}
		r = tp_bdev_write(bm->bdev, order[i]->nr * TP_MD_BLOCK_SIZE, staging,
				  run * TP_MD_BLOCK_SIZE, err);
	}
	for (k = 0; k < n && !r; k++)
		TP_DEBUG_ASSERT(order[k]->state == SEALED);
	free(staging);
	free(order);
	return r;
}

void tp_bm_finish_sealed(struct tp_block_manager *bm)
{
	struct md_block *b;

	while (bm->sealed.count) {
		b = bm->sealed.head.next;
		list_del(&bm->sealed, b);
		b->state = CLEAN;
		list_add(&bm->clean, b);
	}
}

void tp_bm_trim(struct tp_block_manager *bm)
{
	struct md_block *b;

	/* Second chance from the old end: what was used since goes to the young end once. */
	while (bm->clean.count > bm->clean_max) {
		b = bm->clean.head.prev;
		if (b->used) {
			b->used = false;
			list_del(&bm->clean, b);
			list_add(&bm->clean, b);
		} else {
			block_free(bm, b);
		}
	}
}

uint64_t tp_bm_nr_new(const struct tp_block_manager *bm)
{
	return bm->fresh.count;
}
