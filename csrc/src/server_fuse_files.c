/* SPDX-License-Identifier: Apache-2.0 */
/* The files of the mount, by volume id: looked up without a lock, removed after a drain.
 *
 * A struct tp_fuse_file lives until the server ends, so a reader may touch it at any time; `users`
 * and `active` decide whether its target may be used. */
#include "server_fuse.h"
#include "thinpool/error.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define LEAF_SIZE 4096u

int tp_fuse_files_init(struct files *files)
{
	memset(files, 0, sizeof(*files));
	pthread_mutex_init(&files->lock, NULL);
	pthread_cond_init(&files->drained, NULL);
	return 0;
}

void tp_fuse_files_deinit(struct files *files)
{
	_Atomic(struct tp_fuse_file *) *leaf;
	struct tp_fuse_file *file;
	uint32_t i, k;

	for (i = 0; i < FUSE_NR_IDS / LEAF_SIZE; i++) {
		leaf = atomic_load(&files->leaves[i]);
		if (!leaf)
			continue;
		for (k = 0; k < LEAF_SIZE; k++) {
			file = atomic_load(&leaf[k]);
			if (file && file->active && file->ops->close)
				file->ops->close(file->target);
			free(file);
		}
		free(leaf);
	}
	pthread_cond_destroy(&files->drained);
	pthread_mutex_destroy(&files->lock);
}

static struct tp_fuse_file *find(struct files *files, uint32_t id)
{
	_Atomic(struct tp_fuse_file *) *leaf = atomic_load(&files->leaves[id / LEAF_SIZE]);

	return leaf ? atomic_load(&leaf[id % LEAF_SIZE]) : NULL;
}

/* Under the lock. */
static struct tp_fuse_file *find_or_make(struct files *files, uint32_t id)
{
	struct tp_fuse_file *file = find(files, id);
	_Atomic(struct tp_fuse_file *) *leaf;

	if (file)
		return file;
	leaf = atomic_load(&files->leaves[id / LEAF_SIZE]);
	if (!leaf) {
		leaf = calloc(LEAF_SIZE, sizeof(*leaf));
		if (!leaf)
			return NULL;
		atomic_store(&files->leaves[id / LEAF_SIZE], leaf);
	}
	file = calloc(1, sizeof(*file));
	if (file) {
		file->id = id;
		atomic_store(&leaf[id % LEAF_SIZE], file);
	}
	return file;
}

int tp_fuse_files_add(struct files *files, const struct tp_fuse_file *description,
		      struct tp_error *err)
{
	struct tp_fuse_file *file;
	int status = 0;

	if (description->id >= FUSE_NR_IDS)
		return tp_fail(err, TP_E_INVALID, "volume id %u: at most %u", description->id,
			       FUSE_NR_IDS - 1);
	pthread_mutex_lock(&files->lock);
	file = find_or_make(files, description->id);
	/* Whoever looks at an inactive file holds it for an instant. */
	while (file && !atomic_load(&file->active) && atomic_load(&file->users))
		pthread_cond_wait(&files->drained, &files->lock);
	if (!file) {
		status = tp_fail(err, TP_E_NO_MEMORY, "file id-%u: out of memory", description->id);
	} else if (atomic_load(&file->active)) {
		status = tp_fail(err, TP_E_VOLUME_EXISTS, "file id-%u is served already",
				 description->id);
	} else {
		file->read_only = description->read_only;
		file->generation = description->generation;
		file->fd = description->fd;
		file->fd_key = description->fd_key;
		file->ops = description->ops;
		file->target = description->target;
		atomic_store(&file->active, 1);
		files->nr_active++;
	}
	pthread_mutex_unlock(&files->lock);
	return status;
}

int tp_fuse_files_remove(struct files *files, uint32_t id, struct tp_error *err)
{
	struct tp_fuse_file *file = id < FUSE_NR_IDS ? find(files, id) : NULL;

	pthread_mutex_lock(&files->lock);
	if (!file || !atomic_load(&file->active)) {
		pthread_mutex_unlock(&files->lock);
		return tp_fail(err, TP_E_VOLUME_NOT_FOUND, "file id-%u is not served", id);
	}
	atomic_store(&file->active, 0);
	files->nr_active--;
	/* A reader that came after this sees active 0; one that came before is counted in users. */
	while (atomic_load(&file->users))
		pthread_cond_wait(&files->drained, &files->lock);
	if (file->ops->close)
		file->ops->close(file->target);
	file->target = NULL;
	pthread_mutex_unlock(&files->lock);
	return 0;
}

struct tp_fuse_file *tp_fuse_files_get(struct files *files, uint64_t nodeid)
{
	struct tp_fuse_file *file;

	if (nodeid < FUSE_FIRST_NODE || nodeid - FUSE_FIRST_NODE >= FUSE_NR_IDS)
		return NULL;
	file = find(files, (uint32_t)(nodeid - FUSE_FIRST_NODE));
	if (!file)
		return NULL;
	atomic_fetch_add(&file->users, 1);
	if (atomic_load(&file->active))
		return file;
	tp_fuse_files_put(files, file);
	return NULL;
}

void tp_fuse_files_put(struct files *files, struct tp_fuse_file *file)
{
	if (atomic_fetch_sub(&file->users, 1) != 1 || atomic_load(&file->active))
		return;
	/* Somebody may wait; taking the lock orders us behind his look at users. */
	pthread_mutex_lock(&files->lock);
	pthread_cond_broadcast(&files->drained);
	pthread_mutex_unlock(&files->lock);
}

uint32_t tp_fuse_files_next(struct files *files, uint32_t id)
{
	struct tp_fuse_file *file;

	pthread_mutex_lock(&files->lock);
	while (id < FUSE_NR_IDS) {
		if (!atomic_load(&files->leaves[id / LEAF_SIZE])) {
			id = (id / LEAF_SIZE + 1) * LEAF_SIZE;
			continue;
		}
		file = find(files, id);
		if (file && atomic_load(&file->active))
			break;
		id++;
	}
	pthread_mutex_unlock(&files->lock);
	return id;
}
