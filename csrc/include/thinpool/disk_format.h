/* SPDX-License-Identifier: Apache-2.0 */
/**
 * dm-thin metadata, version 2, as it lies on disk: records, salts, limits.
 *
 * Declares bytes and knows nothing of I/O, trees or policies. Integers on disk are little-endian
 * and wrapped (struct tp_le64 and so on), so that a missed conversion does not compile. Every
 * struct is exactly as long as its record; the assertions at the end hold sizes and offsets.
 * thinpool/format declares the same records for Python, and a test keeps the two equal.
 *
 * Metadata is addressed in blocks of TP_MD_BLOCK_SIZE bytes. Four kinds of block carry a checksum:
 * a u32 at offset 0, with the block's own number as u64 at offset 8. The checksum is raw CRC-32C
 * (initial value 0xFFFFFFFF, no final inversion) of bytes 4 ... 4095, xored with the kind's salt.
 *
 * All functions are pure and thread-safe.
 */
#ifndef THINPOOL_DISK_FORMAT_H
#define THINPOOL_DISK_FORMAT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* ---- little-endian integers -------------------------------------------------------------- */

struct tp_le16 {
	uint16_t raw;
} __attribute__((packed));
struct tp_le32 {
	uint32_t raw;
} __attribute__((packed));
struct tp_le64 {
	uint64_t raw;
} __attribute__((packed));

static inline uint16_t tp_le16_get(struct tp_le16 v)
{
	return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? v.raw : __builtin_bswap16(v.raw);
}

static inline uint32_t tp_le32_get(struct tp_le32 v)
{
	return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? v.raw : __builtin_bswap32(v.raw);
}

static inline uint64_t tp_le64_get(struct tp_le64 v)
{
	return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? v.raw : __builtin_bswap64(v.raw);
}

static inline struct tp_le16 tp_le16_put(uint16_t v)
{
	struct tp_le16 le = { v };

	le.raw = tp_le16_get(le);
	return le;
}

static inline struct tp_le32 tp_le32_put(uint32_t v)
{
	struct tp_le32 le = { v };

	le.raw = tp_le32_get(le);
	return le;
}

static inline struct tp_le64 tp_le64_put(uint64_t v)
{
	struct tp_le64 le = { v };

	le.raw = tp_le64_get(le);
	return le;
}

/* ---- sizes and limits -------------------------------------------------------------------- */

#define TP_SECTOR_SIZE            512u  /* bytes */
#define TP_MD_BLOCK_SIZE          4096u /* bytes */
#define TP_MD_BLOCK_SECTORS       8u
#define TP_BITMAP_ENTRIES         16320u /* reference counts in one bitmap block */
#define TP_BITMAP_WORDS           510u
#define TP_WORD_ENTRIES           32u  /* reference counts in one bitmap word */
#define TP_INDEX_ENTRIES          255u /* in the metadata space map's index block */
#define TP_MD_BLOCKS_MAX          ((uint64_t)TP_INDEX_ENTRIES * TP_BITMAP_ENTRIES)
#define TP_DATA_BLOCK_SECTORS_MIN 128u                /* 64 KiB; sizes are multiples of it */
#define TP_DATA_BLOCK_SECTORS_MAX 2097152u            /* 1 GiB */
#define TP_DATA_BLOCKS_MAX        (UINT64_C(1) << 40) /* block numbers have 40 bits */
#define TP_TIME_MAX               16777215u           /* mappings keep 24 bits */
#define TP_DEVICE_ID_MAX          16777215u
#define TP_MD_RESERVE_MAX         4096u /* reserve: min(this, blocks / 10) */
#define TP_MD_LOW_WATER_MAX       1024u /* low water: min(this, blocks / 4) */

#define TP_SUPERBLOCK_LOCATION    0u
#define TP_SUPERBLOCK_MAGIC       UINT64_C(27022010)
#define TP_SUPERBLOCK_VERSION     2u
#define TP_SUPERBLOCK_NEEDS_CHECK 1u /* bit of flags */

/* ---- checksums --------------------------------------------------------------------------- */

#define TP_SALT_SUPERBLOCK 160774u
#define TP_SALT_NODE       121107u
#define TP_SALT_INDEX      160478u
#define TP_SALT_BITMAP     240779u
#define TP_CSUM_SKIP       4u /* the checksum itself is not covered */
#define TP_CSUM_LENGTH     (TP_MD_BLOCK_SIZE - TP_CSUM_SKIP)

/* What stands at the start of every checksummed block. */
struct tp_disk_block_header {
	struct tp_le32 csum;
	struct tp_le32 other; /* a record's own business */
	struct tp_le64 blocknr;
} __attribute__((packed));

/* ---- superblock -------------------------------------------------------------------------- */

struct tp_disk_space_map_root {
	struct tp_le64 nr_blocks;
	struct tp_le64 nr_allocated; /* blocks whose count is not 0 */
	struct tp_le64 bitmap_root;
	struct tp_le64 ref_count_root; /* overflow tree */
} __attribute__((packed));

#define TP_SPACE_MAP_ROOT_FIELD 128u /* bytes given to each root in the superblock */

struct tp_disk_superblock {
	struct tp_le32 csum;
	struct tp_le32 flags;
	struct tp_le64 blocknr;
	uint8_t uuid[16];
	struct tp_le64 magic;
	struct tp_le32 version;
	struct tp_le32 time;
	struct tp_le64 trans_id;
	struct tp_le64 held_root; /* block of the metadata snapshot, 0 for none */
	struct tp_disk_space_map_root data_space_map;
	uint8_t data_space_map_rest[TP_SPACE_MAP_ROOT_FIELD - 32];
	struct tp_disk_space_map_root metadata_space_map;
	uint8_t metadata_space_map_rest[TP_SPACE_MAP_ROOT_FIELD - 32];
	struct tp_le64 data_mapping_root;
	struct tp_le64 device_details_root;
	struct tp_le32 data_block_size;     /* sectors */
	struct tp_le32 metadata_block_size; /* sectors */
	struct tp_le64 metadata_nr_blocks;  /* at format; not kept up to date */
	struct tp_le32 compat_flags;
	struct tp_le32 compat_ro_flags;
	struct tp_le32 incompat_flags;
} __attribute__((packed));

/* ---- btree nodes ------------------------------------------------------------------------- */

#define TP_NODE_INTERNAL    1u
#define TP_NODE_LEAF        2u
#define TP_NODE_HEADER_SIZE 32u

struct tp_disk_node_header {
	struct tp_le32 csum;
	struct tp_le32 flags; /* TP_NODE_INTERNAL or TP_NODE_LEAF */
	struct tp_le64 blocknr;
	struct tp_le32 nr_entries;
	struct tp_le32 max_entries;
	struct tp_le32 value_size; /* bytes */
	struct tp_le32 padding;
} __attribute__((packed));

/* max_entries keys follow the header, and max_entries values follow the keys. */
struct tp_disk_node {
	struct tp_disk_node_header header;
	struct tp_le64 keys[(TP_MD_BLOCK_SIZE - TP_NODE_HEADER_SIZE) / 8];
} __attribute__((packed));

/* Entries of a node whose values are value_size bytes long: a multiple of 3. */
#define TP_NODE_MAX_ENTRIES(value_size)                                                            \
	(3u * (((TP_MD_BLOCK_SIZE - TP_NODE_HEADER_SIZE) / (8u + (value_size))) / 3u))

#define TP_MAPPING_VALUE_SIZE   8u
#define TP_DETAILS_VALUE_SIZE   24u
#define TP_INDEX_VALUE_SIZE     16u
#define TP_REF_COUNT_VALUE_SIZE 4u

#define TP_MAPPING_MAX_ENTRIES   TP_NODE_MAX_ENTRIES(TP_MAPPING_VALUE_SIZE) /* 252; internal too */
#define TP_DETAILS_MAX_ENTRIES   TP_NODE_MAX_ENTRIES(TP_DETAILS_VALUE_SIZE) /* 126 */
#define TP_INDEX_MAX_ENTRIES     TP_NODE_MAX_ENTRIES(TP_INDEX_VALUE_SIZE)   /* 168 */
#define TP_REF_COUNT_MAX_ENTRIES TP_NODE_MAX_ENTRIES(TP_REF_COUNT_VALUE_SIZE) /* 336 */

/* ---- tree values ------------------------------------------------------------------------- */

struct tp_disk_device_details {
	struct tp_le64 mapped_blocks;
	struct tp_le64 transaction_id;
	struct tp_le32 creation_time;
	struct tp_le32 snapshotted_time;
} __attribute__((packed));

struct tp_disk_mapping {
	struct tp_le64 block_time; /* data block << 24 | time */
} __attribute__((packed));

#define TP_MAPPING_TIME_BITS 24u

static inline uint64_t tp_mapping_pack(uint64_t data_block, uint32_t time)
{
	return data_block << TP_MAPPING_TIME_BITS | time;
}

static inline uint64_t tp_mapping_block(uint64_t value)
{
	return value >> TP_MAPPING_TIME_BITS;
}

static inline uint32_t tp_mapping_time(uint64_t value)
{
	return (uint32_t)value & TP_TIME_MAX;
}

/* ---- space maps -------------------------------------------------------------------------- */

struct tp_disk_index_entry {
	struct tp_le64 blocknr;          /* of the bitmap block */
	struct tp_le32 nr_free;          /* entries past the end of the device count as free */
	struct tp_le32 none_free_before; /* no free entry below this one */
} __attribute__((packed));

struct tp_disk_metadata_index {
	struct tp_le32 csum;
	struct tp_le32 padding;
	struct tp_le64 blocknr;
	struct tp_disk_index_entry entries[TP_INDEX_ENTRIES];
} __attribute__((packed));

struct tp_disk_bitmap {
	struct tp_le32 csum;
	struct tp_le32 padding;
	struct tp_le64 blocknr;
	struct tp_le64 words[TP_BITMAP_WORDS];
} __attribute__((packed));

/*
 * Two bits an entry; the even bit weighs 2 and the odd bit 1, so that a count of 1 is the pair 2
 * and a count of 2 the pair 1. 3 means three or more, and the overflow tree has the count.
 */
#define TP_COUNT_OVERFLOW 3u

static inline unsigned tp_pair_swap(unsigned pair)
{
	return (pair & 1u) << 1 | (pair >> 1 & 1u);
}

/* The count 0 ... 3 of entry 0 ... 31 of a word in host order, and the word with it replaced. */
static inline unsigned tp_word_count(uint64_t word, unsigned entry)
{
	return tp_pair_swap((unsigned)(word >> 2u * entry) & 3u);
}

static inline uint64_t tp_word_with_count(uint64_t word, unsigned entry, unsigned count)
{
	return (word & ~(UINT64_C(3) << 2u * entry)) | (uint64_t)tp_pair_swap(count) << 2u * entry;
}

struct tp_disk_ref_count {
	struct tp_le32 count; /* never below 3 */
} __attribute__((packed));

/* ---- sizes and offsets ------------------------------------------------------------------- */

#define TP_ASSERT_SIZE(type, size) _Static_assert(sizeof(type) == (size), #type)
#define TP_ASSERT_AT(type, field, offset)                                                          \
	_Static_assert(offsetof(type, field) == (offset), #type "." #field)

TP_ASSERT_SIZE(struct tp_le16, 2);
TP_ASSERT_SIZE(struct tp_le32, 4);
TP_ASSERT_SIZE(struct tp_le64, 8);

TP_ASSERT_SIZE(struct tp_disk_block_header, 16);
TP_ASSERT_AT(struct tp_disk_block_header, csum, 0);
TP_ASSERT_AT(struct tp_disk_block_header, other, 4);
TP_ASSERT_AT(struct tp_disk_block_header, blocknr, 8);

TP_ASSERT_SIZE(struct tp_disk_space_map_root, 32);
TP_ASSERT_AT(struct tp_disk_space_map_root, nr_blocks, 0);
TP_ASSERT_AT(struct tp_disk_space_map_root, nr_allocated, 8);
TP_ASSERT_AT(struct tp_disk_space_map_root, bitmap_root, 16);
TP_ASSERT_AT(struct tp_disk_space_map_root, ref_count_root, 24);

TP_ASSERT_SIZE(struct tp_disk_superblock, 0x16c);
TP_ASSERT_AT(struct tp_disk_superblock, csum, 0x000);
TP_ASSERT_AT(struct tp_disk_superblock, flags, 0x004);
TP_ASSERT_AT(struct tp_disk_superblock, blocknr, 0x008);
TP_ASSERT_AT(struct tp_disk_superblock, uuid, 0x010);
TP_ASSERT_AT(struct tp_disk_superblock, magic, 0x020);
TP_ASSERT_AT(struct tp_disk_superblock, version, 0x028);
TP_ASSERT_AT(struct tp_disk_superblock, time, 0x02c);
TP_ASSERT_AT(struct tp_disk_superblock, trans_id, 0x030);
TP_ASSERT_AT(struct tp_disk_superblock, held_root, 0x038);
TP_ASSERT_AT(struct tp_disk_superblock, data_space_map, 0x040);
TP_ASSERT_AT(struct tp_disk_superblock, data_space_map_rest, 0x060);
TP_ASSERT_AT(struct tp_disk_superblock, metadata_space_map, 0x0c0);
TP_ASSERT_AT(struct tp_disk_superblock, metadata_space_map_rest, 0x0e0);
TP_ASSERT_AT(struct tp_disk_superblock, data_mapping_root, 0x140);
TP_ASSERT_AT(struct tp_disk_superblock, device_details_root, 0x148);
TP_ASSERT_AT(struct tp_disk_superblock, data_block_size, 0x150);
TP_ASSERT_AT(struct tp_disk_superblock, metadata_block_size, 0x154);
TP_ASSERT_AT(struct tp_disk_superblock, metadata_nr_blocks, 0x158);
TP_ASSERT_AT(struct tp_disk_superblock, compat_flags, 0x160);
TP_ASSERT_AT(struct tp_disk_superblock, compat_ro_flags, 0x164);
TP_ASSERT_AT(struct tp_disk_superblock, incompat_flags, 0x168);

TP_ASSERT_SIZE(struct tp_disk_node_header, TP_NODE_HEADER_SIZE);
TP_ASSERT_AT(struct tp_disk_node_header, csum, 0);
TP_ASSERT_AT(struct tp_disk_node_header, flags, 4);
TP_ASSERT_AT(struct tp_disk_node_header, blocknr, 8);
TP_ASSERT_AT(struct tp_disk_node_header, nr_entries, 16);
TP_ASSERT_AT(struct tp_disk_node_header, max_entries, 20);
TP_ASSERT_AT(struct tp_disk_node_header, value_size, 24);
TP_ASSERT_AT(struct tp_disk_node_header, padding, 28);
TP_ASSERT_SIZE(struct tp_disk_node, TP_MD_BLOCK_SIZE);
TP_ASSERT_AT(struct tp_disk_node, keys, TP_NODE_HEADER_SIZE);

TP_ASSERT_SIZE(struct tp_disk_device_details, TP_DETAILS_VALUE_SIZE);
TP_ASSERT_AT(struct tp_disk_device_details, mapped_blocks, 0);
TP_ASSERT_AT(struct tp_disk_device_details, transaction_id, 8);
TP_ASSERT_AT(struct tp_disk_device_details, creation_time, 16);
TP_ASSERT_AT(struct tp_disk_device_details, snapshotted_time, 20);
TP_ASSERT_SIZE(struct tp_disk_mapping, TP_MAPPING_VALUE_SIZE);
TP_ASSERT_SIZE(struct tp_disk_ref_count, TP_REF_COUNT_VALUE_SIZE);

TP_ASSERT_SIZE(struct tp_disk_index_entry, TP_INDEX_VALUE_SIZE);
TP_ASSERT_AT(struct tp_disk_index_entry, blocknr, 0);
TP_ASSERT_AT(struct tp_disk_index_entry, nr_free, 8);
TP_ASSERT_AT(struct tp_disk_index_entry, none_free_before, 12);
TP_ASSERT_SIZE(struct tp_disk_metadata_index, TP_MD_BLOCK_SIZE);
TP_ASSERT_AT(struct tp_disk_metadata_index, blocknr, 8);
TP_ASSERT_AT(struct tp_disk_metadata_index, entries, 16);
TP_ASSERT_SIZE(struct tp_disk_bitmap, TP_MD_BLOCK_SIZE);
TP_ASSERT_AT(struct tp_disk_bitmap, blocknr, 8);
TP_ASSERT_AT(struct tp_disk_bitmap, words, 16);

_Static_assert(TP_MAPPING_MAX_ENTRIES == 252, "mapping leaves and internal nodes");
_Static_assert(TP_DETAILS_MAX_ENTRIES == 126, "device details leaves");
_Static_assert(TP_INDEX_MAX_ENTRIES == 168, "data space map index leaves");
_Static_assert(TP_REF_COUNT_MAX_ENTRIES == 336, "overflow leaves");
_Static_assert(TP_MD_BLOCKS_MAX == 4161600, "largest metadata device");

#endif
