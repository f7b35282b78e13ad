/* SPDX-License-Identifier: Apache-2.0 */
#include "superblock.h"

#include "thinpool/block_manager.h"
#include "thinpool/error.h"

uint64_t tp_superblock_usable_blocks(struct tp_bdev *bdev)
{
	uint64_t blocks = tp_bdev_size(bdev) / TP_MD_BLOCK_SIZE;

	return blocks < TP_MD_BLOCKS_MAX ? blocks : TP_MD_BLOCKS_MAX;
}

static int judge(struct tp_bdev *bdev, const struct tp_disk_superblock *sb, struct tp_error *err)
{
	uint64_t blocks = tp_superblock_usable_blocks(bdev);
	uint64_t wanted = tp_le64_get(sb->metadata_space_map.nr_blocks);
	uint32_t sectors = tp_le32_get(sb->data_block_size);
	uint32_t csum = tp_block_checksum(sb, TP_SALT_SUPERBLOCK);

	if (tp_le64_get(sb->magic) != TP_SUPERBLOCK_MAGIC)
		return tp_fail_block(
			err, TP_E_SUPERBLOCK_MAGIC, 0, tp_le64_get(sb->magic), TP_SUPERBLOCK_MAGIC,
			"this is not dm-thin metadata: magic %lu instead of %lu",
			(unsigned long)tp_le64_get(sb->magic), (unsigned long)TP_SUPERBLOCK_MAGIC);
	if (tp_le64_get(sb->blocknr) != TP_SUPERBLOCK_LOCATION)
		return tp_fail_block(err, TP_E_SUPERBLOCK_BLOCKNR, 0, tp_le64_get(sb->blocknr), 0,
				     "the superblock says that it is block %lu",
				     (unsigned long)tp_le64_get(sb->blocknr));
	if (tp_le32_get(sb->csum) != csum)
		return tp_fail_block(err, TP_E_SUPERBLOCK_CHECKSUM, 0, tp_le32_get(sb->csum), csum,
				     "the superblock has checksum %08x, its contents %08x",
				     tp_le32_get(sb->csum), csum);
	/* Others ignore the version; a layout that we do not know must not be written to. */
	if (tp_le32_get(sb->version) < 1 || tp_le32_get(sb->version) > TP_SUPERBLOCK_VERSION)
		return tp_fail_block(err, TP_E_SUPERBLOCK_VERSION, 0, tp_le32_get(sb->version),
				     TP_SUPERBLOCK_VERSION,
				     "metadata version %u; versions 1 and 2 are known",
				     tp_le32_get(sb->version));
	if (tp_le32_get(sb->incompat_flags))
		return tp_fail_block(err, TP_E_SUPERBLOCK_FEATURES, 0,
				     tp_le32_get(sb->incompat_flags), 0,
				     "the metadata uses features that are not known: %08x",
				     tp_le32_get(sb->incompat_flags));
	if (sectors < TP_DATA_BLOCK_SECTORS_MIN || sectors > TP_DATA_BLOCK_SECTORS_MAX ||
	    sectors % TP_DATA_BLOCK_SECTORS_MIN)
		return tp_fail_block(err, TP_E_SUPERBLOCK_GEOMETRY, 0, sectors,
				     TP_DATA_BLOCK_SECTORS_MIN,
				     "a data block of %u sectors cannot be", sectors);
	if (wanted > blocks)
		return tp_fail_block(err, TP_E_METADATA_TRUNCATED, 0, blocks, wanted,
				     "the metadata has %lu blocks and its device only %lu",
				     (unsigned long)wanted, (unsigned long)blocks);
	return 0;
}

int tp_superblock_read(struct tp_bdev *bdev, void *buffer, struct tp_error *err)
{
	const uint64_t *words = buffer;
	size_t i;
	int r;

	if (tp_bdev_size(bdev) < TP_MD_BLOCK_SIZE)
		return tp_fail(err, TP_E_METADATA_TRUNCATED,
			       "a metadata device of %lu bytes holds no superblock",
			       (unsigned long)tp_bdev_size(bdev));
	r = tp_bdev_read(bdev, 0, buffer, TP_MD_BLOCK_SIZE, err);
	if (r)
		return r;
	for (i = 0; i < TP_MD_BLOCK_SIZE / sizeof(*words) && !words[i]; i++)
		;
	if (i == TP_MD_BLOCK_SIZE / sizeof(*words))
		return tp_fail_block(err, TP_E_UNFORMATTED, 0, 0, TP_SUPERBLOCK_MAGIC,
				     "the metadata device holds no pool: its first block is zeros");
	return judge(bdev, buffer, err);
}

int tp_superblock_write(struct tp_bdev *bdev, void *buffer, struct tp_error *err)
{
	struct tp_disk_superblock *sb = buffer;

	TP_ASSERT(tp_le64_get(sb->magic) == TP_SUPERBLOCK_MAGIC);
	TP_ASSERT(tp_le64_get(sb->blocknr) == TP_SUPERBLOCK_LOCATION);
	sb->csum = tp_le32_put(tp_block_checksum(sb, TP_SALT_SUPERBLOCK));
	return tp_bdev_write(bdev, 0, buffer, TP_MD_BLOCK_SIZE, err);
}
