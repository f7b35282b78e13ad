/* SPDX-License-Identifier: Apache-2.0 */
/* Files that are a pool's volumes. Volumes stay their owner's: nothing is closed here. */
#include "server_fuse.h"
#include "thinpool/bdev.h"
#include "thinpool/error.h"

static int volume_map(void *target, uint64_t offset, uint32_t length, int write,
		      struct tp_map *map_ret)
{
	return tp_volume_map(target, offset, length, write, map_ret);
}

static void volume_unmap(void *target, struct tp_map *map)
{
	tp_volume_unmap(target, map);
}

static int volume_read(void *target, uint64_t offset, void *buffer, size_t length,
		       struct tp_error *err)
{
	return tp_volume_read(target, offset, buffer, length, err);
}

static int volume_write(void *target, uint64_t offset, const void *buffer, size_t length,
			struct tp_error *err)
{
	return tp_volume_write(target, offset, buffer, length, err);
}

static int volume_zero(void *target, uint64_t offset, uint64_t length, struct tp_error *err)
{
	return tp_volume_zero(target, offset, length, err);
}

static int volume_flush(void *target, struct tp_error *err)
{
	return tp_volume_flush(target, err);
}

static int volume_next_data(void *target, uint64_t offset, uint64_t *begin_ret, uint64_t *end_ret,
			    struct tp_error *err)
{
	return tp_volume_next_data(target, offset, begin_ret, end_ret, err);
}

static uint64_t volume_size(void *target)
{
	return tp_volume_size(target);
}

static uint64_t volume_mapped(struct tp_pool *pool, void *target)
{
	struct tp_pool_status status;
	struct tp_volume_info info;

	if (tp_pool_get_volume_info(pool, tp_volume_id(target), &info, NULL))
		return 0;
	tp_pool_get_status(pool, &status);
	return info.mapped_blocks * status.data_block_size;
}

const struct tp_fuse_target_ops tp_fuse_volume_ops = {
	.map = volume_map,
	.unmap = volume_unmap,
	.read = volume_read,
	.write = volume_write,
	.zero = volume_zero,
	.flush = volume_flush,
	.next_data = volume_next_data,
	.size = volume_size,
	.mapped = volume_mapped,
};

/* In data blocks, so that whoever looks at f_bsize learns what is unmapped at once. */
void tp_fuse_pool_statfs(struct tp_pool *pool, struct fuse_kstatfs *out)
{
	struct tp_pool_status status;

	tp_pool_get_status(pool, &status);
	out->bsize = out->frsize = status.data_block_size;
	out->blocks = status.data_blocks_total;
	out->bfree = out->bavail = status.data_blocks_total - status.data_blocks_used;
}

int tp_fuse_server_add_file(struct tp_fuse_server *server, struct tp_volume *volume,
			    uint32_t read_only, uint64_t generation, struct tp_error *err)
{
	const struct tp_fuse_file file = {
		.id = tp_volume_id(volume),
		.read_only = read_only,
		.generation = generation,
		/* All volumes of a pool lie on one device: one number in every ring. */
		.fd = tp_volume_data_bdev(volume)->fd,
		.fd_key = 0,
		.ops = &tp_fuse_volume_ops,
		.target = volume,
	};

	if (!server->pool)
		return tp_fail(err, TP_E_INVALID, "this FUSE server was made without a pool");
	return tp_fuse_files_add(&server->files, &file, err);
}
