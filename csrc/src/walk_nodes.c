/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Lists of btree nodes, read side by side and used where they were read.
 *
 * All of a list stands in one stretch of memory in huge pages, which the device writes to and which
 * nothing is copied out of: a page of 4 KiB that is touched for the first time costs as much time
 * as a block of a large read. What lies between two wanted blocks and is read along is not thrown
 * away: copies made one after the other lie side by side, so that it is often what the next list
 * wants. Nothing is taken from it untested, nor unless a node leads there.
 */
#include <stdlib.h>

#include "thinpool/bdev.h"
#include "thinpool/error.h"
#include "walk_stream.h"

#define SMALL_EXTENT 16u
#define ROOM_LEAST   512u

struct wanted {
	uint64_t block;
	size_t index; /* in the list */
};

struct item {
	struct tp_walk_node node; /* keys NULL: not read, or of no use */
	uint8_t *place;           /* NULL: not on the device */
};

struct tp_walk_nodes {
	struct tp_walk_stream stream;
	size_t most;     /* blocks of a list */
	size_t room;     /* for so many are the arrays now */
	size_t nr_slots; /* of the stretch */
	uint8_t *stretch;
	/* the present list */
	struct item *items;
	size_t nr;
	/* of those that are read, by block */
	struct wanted *wanted;
	size_t nr_wanted;
	struct tp_walk_extent *extents; /* the cookie is the first one wanted */
	size_t nr_extents;
	_Atomic size_t next;
	/* the list before: what it read */
	struct tp_walk_extent *kept;
	size_t nr_kept;
	size_t begin; /* slots that these extents stand in */
	size_t end;
};

/* ---- planning ---------------------------------------------------------------------------- */

static int compare_wanted(const void *a, const void *b)
{
	const struct wanted *left = a, *right = b;

	return (left->block > right->block) - (left->block < right->block);
}

/* Test one that was read; keys NULL unless it is good. */
static void load(struct tp_walk_nodes *list, const struct wanted *wanted)
{
	struct item *item = &list->items[wanted->index];

	if (tp_walk_node_load(item->place, wanted->block, TP_MAPPING_VALUE_SIZE, &item->node, NULL))
		item->node.keys = NULL;
}

/* Where the list before read this block; NULL: it did not. */
static uint8_t *find_kept(const struct tp_walk_nodes *list, uint64_t block)
{
	size_t low = 0, high = list->nr_kept;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (list->kept[middle].end <= block)
			low = middle + 1;
		else
			high = middle;
	}
	if (low == list->nr_kept || list->kept[low].begin > block)
		return NULL;
	return list->kept[low].place + (block - list->kept[low].begin) * TP_MD_BLOCK_SIZE;
}

/* What has to be read of the list; the rest is at hand, or not on the device. */
static void want(struct tp_walk_nodes *list, const uint64_t *blocks)
{
	bool sorted = true;

	list->nr_wanted = 0;
	for (size_t i = 0; i < list->nr; i++) {
		struct wanted wanted = { .block = blocks[i], .index = i };

		list->items[i].node.keys = NULL;
		list->items[i].place = NULL;
		if (blocks[i] >= list->stream.reader->nr_blocks)
			continue;
		list->items[i].place = find_kept(list, blocks[i]);
		if (list->items[i].place) {
			load(list, &wanted);
			continue;
		}
		sorted &= !list->nr_wanted || list->wanted[list->nr_wanted - 1].block <= blocks[i];
		list->wanted[list->nr_wanted++] = wanted;
	}
	if (!sorted)
		qsort(list->wanted, list->nr_wanted, sizeof(*list->wanted), compare_wanted);
}

/* Extents of what is wanted; how many slots they take. */
static size_t plan(struct tp_walk_nodes *list, uint64_t gap)
{
	uint64_t most = tp_walk_extent_most(&list->stream);
	struct tp_walk_extent *extent = NULL;
	size_t nr_slots = 0;

	list->nr_extents = 0;
	for (size_t i = 0; i < list->nr_wanted; i++) {
		uint64_t block = list->wanted[i].block;

		if (extent && block < extent->end + gap && block < extent->begin + most) {
			nr_slots += block < extent->end ? 0 : block + 1 - extent->end;
			extent->end = block < extent->end ? extent->end : block + 1;
			continue;
		}
		extent = &list->extents[list->nr_extents++];
		*extent = (struct tp_walk_extent){ .begin = block, .end = block + 1, .cookie = i };
		nr_slots++;
	}
	return nr_slots;
}

/* Give the extents their places, beside those of the list before where these can stay. */
static void place(struct tp_walk_nodes *list, size_t nr_slots)
{
	size_t slot = 0;

	if (list->nr_kept && list->end + nr_slots <= list->nr_slots)
		slot = list->end;
	list->begin = slot;
	for (size_t i = 0; i < list->nr_extents; i++) {
		struct tp_walk_extent *extent = &list->extents[i];

		extent->place = list->stretch + slot * TP_MD_BLOCK_SIZE;
		slot += extent->end - extent->begin;
	}
	list->end = slot;
	for (size_t i = 0, k = 0; i < list->nr_wanted; i++) {
		const struct wanted *wanted = &list->wanted[i];

		while (list->extents[k].end <= wanted->block)
			k++;
		list->items[wanted->index].place =
			list->extents[k].place +
			(wanted->block - list->extents[k].begin) * TP_MD_BLOCK_SIZE;
	}
}

/* ---- reading ----------------------------------------------------------------------------- */

static bool take(struct tp_walk_stream *stream, struct tp_walk_extent *extent)
{
	struct tp_walk_nodes *list = (struct tp_walk_nodes *)stream;
	size_t next = atomic_fetch_add_explicit(&list->next, 1, memory_order_relaxed);

	if (next >= list->nr_extents)
		return false;
	*extent = list->extents[next];
	return true;
}

static void give(struct tp_walk_stream *stream, unsigned thread,
		 const struct tp_walk_extent *extent, const uint8_t *data)
{
	struct tp_walk_nodes *list = (struct tp_walk_nodes *)stream;
	struct tp_walk_reader *reader = stream->reader;
	size_t i = extent->cookie;

	(void)thread;
	for (; i < list->nr_wanted && list->wanted[i].block < extent->end; i++) {
		const struct wanted *wanted = &list->wanted[i];

		if (data ||
		    !tp_walk_read(reader, wanted->block, list->items[wanted->index].place, NULL))
			load(list, wanted);
	}
	atomic_fetch_add_explicit(&reader->done, i - extent->cookie, memory_order_relaxed);
}

static bool grow(void **array, size_t room, size_t size)
{
	void *grown = realloc(*array, room * size);

	if (grown)
		*array = grown;
	return grown;
}

static int make_room(struct tp_walk_nodes *list, size_t nr, struct tp_error *err)
{
	size_t room = list->room ? 2 * list->room : ROOM_LEAST;

	if (nr <= list->room)
		return 0;
	room = room < nr ? nr : room;
	if (!grow((void **)&list->items, room, sizeof(*list->items)) ||
	    !grow((void **)&list->wanted, room, sizeof(*list->wanted)) ||
	    !grow((void **)&list->extents, room, sizeof(*list->extents)) ||
	    !grow((void **)&list->kept, room, sizeof(*list->kept)))
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to read %zu nodes", nr);
	list->room = room;
	return 0;
}

int tp_walk_nodes_read(struct tp_walk_nodes *list, const uint64_t *blocks, size_t nr,
		       struct tp_error *err)
{
	struct tp_walk_extent *extents;
	size_t nr_slots;
	int rc = make_room(list, nr, err);

	if (rc)
		return rc;
	TP_ASSERT(nr <= list->most);
	extents = list->extents;
	list->extents = list->kept;
	list->kept = extents;
	list->nr_kept = list->nr_extents;
	list->nr = nr;
	want(list, blocks);
	nr_slots = plan(list, TP_WALK_GAP_BLOCKS);
	if (list->nr_kept && list->end + nr_slots > list->nr_slots) {
		/* There is no room for both lists. */
		list->nr_kept = 0;
		want(list, blocks);
		nr_slots = plan(list, TP_WALK_GAP_BLOCKS);
	}
	if (nr_slots > list->nr_slots)
		nr_slots = plan(list, 1);
	place(list, nr_slots);
	list->stream.nr = list->nr_extents > 1 ? list->nr_wanted : 1;
	list->stream.small = nr_slots < (uint64_t)SMALL_EXTENT * list->nr_extents;
	list->stream.alone = list->nr_wanted < TP_WALK_SMALL_BLOCKS;
	atomic_store_explicit(&list->next, 0, memory_order_relaxed);
	tp_walk_stream_run(&list->stream);
	return 0;
}

int tp_walk_nodes_get(struct tp_walk_nodes *list, uint64_t block, size_t index,
		      const struct tp_walk_node **node_ret, struct tp_error *err)
{
	struct item *item = &list->items[index];
	int rc = 0;

	/* Once more, for the error's text; it may also be good now. */
	if (!item->node.keys) {
		rc = tp_walk_read(list->stream.reader, block, item->place, err);
		if (!rc)
			rc = tp_walk_node_load(item->place, block, TP_MAPPING_VALUE_SIZE,
					       &item->node, err);
		if (rc)
			item->node.keys = NULL;
	}
	*node_ret = &item->node;
	return rc;
}

/* ---- open, close ------------------------------------------------------------------------- */

int tp_walk_nodes_create(struct tp_walk_reader *reader, size_t most,
			 struct tp_walk_nodes **nodes_ret, struct tp_error *err)
{
	struct tp_walk_nodes *list = calloc(1, sizeof(*list));

	if (!list)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a list of nodes");
	list->stream = (struct tp_walk_stream){
		.reader = reader,
		.take = take,
		.give = give,
		.placed = true,
	};
	list->most = most;
	list->nr_slots = most + most / 2;
	list->stretch = tp_walk_map_dense(list->nr_slots * TP_MD_BLOCK_SIZE);
	if (!list->stretch) {
		tp_walk_nodes_destroy(list);
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to read %zu nodes", most);
	}
	*nodes_ret = list;
	return 0;
}

void tp_walk_nodes_destroy(struct tp_walk_nodes *list)
{
	if (!list)
		return;
	tp_walk_unmap(list->stretch, list->nr_slots * TP_MD_BLOCK_SIZE);
	free(list->items);
	free(list->wanted);
	free(list->extents);
	free(list->kept);
	free(list);
}
