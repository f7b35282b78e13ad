/* SPDX-License-Identifier: Apache-2.0 */
/**
 * The one declaration of everything that Python calls.
 *
 * tools/emit_cffi.py cuts the text between the two cffi marks for cdef and includes this same
 * file for the compiler, so nothing is declared twice. Only plain declarations may stand there:
 * no #ifdef, no attributes, no inline functions, no function-like macros.
 *
 * Every function is safe to call with the GIL released and from several threads at once, unless
 * its comment says otherwise. Sizes and offsets are bytes unless the name says blocks. A function
 * that can fail returns 0 or a negative enum tp_status and fills *err when err is not NULL.
 */
#ifndef THINPOOL_ABI_H
#define THINPOOL_ABI_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

/* ---- status ---------------------------------------------------------------------------- */

enum tp_status {
	TP_OK = 0,
	/* the host */
	TP_E_NO_MEMORY = -1,
	TP_E_IO = -2,            /* err->host_errno says which */
	TP_E_OPEN = -3,          /* a file or device could not be opened */
	TP_E_NOT_SUPPORTED = -4, /* this host or this device cannot do it */
	TP_E_INTERRUPTED = -5,
	/* the caller */
	TP_E_INVALID = -10, /* an argument out of its range */
	TP_E_ALIGNMENT = -11,
	TP_E_OUT_OF_RANGE = -12, /* past the end of a device */
	TP_E_BUSY = -13,
	TP_E_CLOSED = -14,
	TP_E_READ_ONLY = -15,
	/* what is on disk */
	TP_E_SUPERBLOCK_MAGIC = -20,
	TP_E_SUPERBLOCK_CHECKSUM = -21,
	TP_E_SUPERBLOCK_VERSION = -22,
	TP_E_SUPERBLOCK_BLOCKNR = -23,
	TP_E_SUPERBLOCK_FEATURES = -24,
	TP_E_SUPERBLOCK_GEOMETRY = -25,
	TP_E_BLOCK_CHECKSUM = -26,
	TP_E_BLOCK_NUMBER = -27,
	TP_E_NODE_MALFORMED = -28,
	TP_E_SPACE_MAP_MALFORMED = -29,
	TP_E_MAPPING_OUT_OF_RANGE = -30,
	TP_E_METADATA_TRUNCATED = -31,
	TP_E_NOT_EMPTY = -32,   /* a device that already carries something */
	TP_E_UNFORMATTED = -33, /* a metadata device whose block 0 is zeros */
	TP_E_NEEDS_CHECK = -34,
	/* space */
	TP_E_DATA_SPACE = -40,
	TP_E_METADATA_SPACE = -41,
	/* volumes */
	TP_E_VOLUME_NOT_FOUND = -50,
	TP_E_VOLUME_EXISTS = -51,
	TP_E_VOLUME_BUSY = -52,
	TP_E_TRANSACTION_ID = -53, /* not the expected current transaction id */
	TP_E_METADATA_SNAPSHOT_HELD = -54,
	TP_E_NO_METADATA_SNAPSHOT = -55,
	TP_E_LIMIT = -56, /* a limit of the format: ids, times, blocks */
	TP_E_LOG_FULL = -57,
	TP_E_POOL_FAILED = -58,
	TP_E_KEY_NOT_FOUND = -59
};

/* Caller-allocated; no heap, no thread-local state. */
struct tp_error {
	int32_t status;
	int32_t host_errno; /* 0 where the host said nothing */
	uint64_t block;     /* the metadata or data block concerned, UINT64_MAX for none */
	uint64_t found;
	uint64_t wanted;
	char message[256];
};

const char *tp_status_name(int status);

/* cffi: end */

/* cffi: begin */
/* ---- CRC-32C ---------------------------------------------------------------------------- */

/* Raw CRC-32C (reflected 0x82F63B78): no final inversion. Start with crc = 0xFFFFFFFF. */
uint32_t tp_crc32c(uint32_t crc, const void *data, size_t length);
/* Which implementation tp_crc32c uses: "portable", "sse4.2", "avx512". */
const char *tp_crc32c_implementation(void);
/* By name, for tests and benchmarks; TP_E_NOT_SUPPORTED where the processor lacks it. */
int tp_crc32c_with(const char *implementation, uint32_t crc, const void *data, size_t length,
		   uint32_t *crc_ret);

/* cffi: end */

/* cffi: begin */
/* ---- allocator --------------------------------------------------------------------------- */

/*
 * A block is allocatable, used, or pending: freed since the last commit, which still refers to it.
 * Not thread-safe: the caller serialises. Nothing here blocks. On failure nothing has changed.
 */
struct tp_allocator;

/* All blocks allocatable. NULL when out of memory or nr_blocks is past the format's 2^40. */
struct tp_allocator *tp_allocator_create(uint64_t nr_blocks);
void tp_allocator_destroy(struct tp_allocator *allocator);
/* Growth adds allocatable blocks; shrinking is TP_E_INVALID. TP_E_NO_MEMORY. */
int tp_allocator_resize(struct tp_allocator *allocator, uint64_t nr_blocks);
uint64_t tp_allocator_nr_blocks(const struct tp_allocator *allocator);
/* Blocks that can be allocated now. */
uint64_t tp_allocator_nr_free(const struct tp_allocator *allocator);
/* Blocks freed since the last commit: not used, not allocatable. */
uint64_t tp_allocator_nr_pending(const struct tp_allocator *allocator);
/* One block, next-fit with wrap-around; TP_E_DATA_SPACE when none is allocatable. */
int tp_allocator_alloc(struct tp_allocator *allocator, uint64_t *block_ret);
/* A run of neighbours, at least 1 and up to `want` (>= 1) blocks: the first of `want` among the
 * next free stretches, else one out of an aligned free stretch of 64 or more wherever there is one
 * (so that a `want` up to 64 is got whole then), else the longest seen. TP_E_DATA_SPACE as
 * above. */
int tp_allocator_alloc_run(struct tp_allocator *allocator, uint64_t want, uint64_t *begin_ret,
			   uint64_t *length_ret);
/* Up to count single blocks in one call; *count_ret says how many were got: fewer when space ends,
 * and none (of a count that is not 0) is TP_E_DATA_SPACE. */
int tp_allocator_alloc_batch(struct tp_allocator *allocator, size_t count, uint64_t *blocks,
			     size_t *count_ret);
/* Use a given run if every block of it is allocatable, else TP_E_BUSY; TP_E_OUT_OF_RANGE. */
int tp_allocator_take(struct tp_allocator *allocator, uint64_t begin, uint64_t length);
/* Used blocks become pending until tp_allocator_commit. Freeing what is not used (in a batch: or
 * twice) is TP_E_INVALID, past the end TP_E_OUT_OF_RANGE. */
int tp_allocator_free(struct tp_allocator *allocator, uint64_t begin, uint64_t length);
int tp_allocator_free_batch(struct tp_allocator *allocator, const uint64_t *blocks, size_t count);
/* Used blocks become allocatable at once: only for what the last commit does not refer to (taken or
 * allocated since). Statuses as tp_allocator_free. */
int tp_allocator_untake(struct tp_allocator *allocator, uint64_t begin, uint64_t length);
/* Everything freed so far becomes allocatable. Costs by the blocks freed, not by the size. */
void tp_allocator_commit(struct tp_allocator *allocator);
/* 1 when allocatable; 0 when used, pending or past the end. */
int tp_allocator_is_free(const struct tp_allocator *allocator, uint64_t block);
/* First run of allocatable blocks at or after `begin`: TP_E_KEY_NOT_FOUND when there is none. */
int tp_allocator_next_free_run(const struct tp_allocator *allocator, uint64_t begin,
			       uint64_t *begin_ret, uint64_t *length_ret);

/* cffi: end */

/* cffi: begin */
/* ---- block devices ------------------------------------------------------------------------ */

struct tp_bdev;

enum tp_bdev_flags {
	TP_BDEV_READ_ONLY = 1,
	TP_BDEV_DIRECT = 2,    /* O_DIRECT; falls back to TP_E_NOT_SUPPORTED, never silently */
	TP_BDEV_EXCLUSIVE = 4, /* flock LOCK_EX|LOCK_NB (and O_EXCL on a block device): TP_E_BUSY */
	TP_BDEV_CREATE =
		8, /* O_CREAT|O_EXCL, then ftruncate to size: TP_E_NOT_EMPTY if it exists */
	TP_BDEV_SHARED_LOCK =
		16 /* flock LOCK_SH|LOCK_NB, which lives until the last I/O on this open
				  * file description has ended: TP_E_BUSY against an exclusive
				  * one */
};

int tp_bdev_file_open(const char *path, uint32_t flags, uint64_t create_size,
		      struct tp_bdev **bdev_ret, struct tp_error *err);
/* Memory; contents zero; size >= 1. */
int tp_bdev_mem_open(uint64_t size, struct tp_bdev **bdev_ret, struct tp_error *err);
void tp_bdev_close(struct tp_bdev *bdev);

/* Whole or not at all, but for a failed write or punch, which may have changed any part of its
 * range. The host's errors are TP_E_IO with host_errno. After a failed flush each later one
 * fails. */
int tp_bdev_read(struct tp_bdev *bdev, uint64_t offset, void *buffer, size_t length,
		 struct tp_error *err);
int tp_bdev_write(struct tp_bdev *bdev, uint64_t offset, const void *buffer, size_t length,
		  struct tp_error *err);
int tp_bdev_flush(struct tp_bdev *bdev, struct tp_error *err);
/* Deallocate; reads as zeros afterwards. TP_E_NOT_SUPPORTED where that cannot be promised. */
int tp_bdev_punch(struct tp_bdev *bdev, uint64_t offset, uint64_t length, struct tp_error *err);
/* A file is cut or grown with zeros; a block device cannot pass its real size. Size 0 takes the
 * size that the file or device has at present: it was grown from outside. */
int tp_bdev_resize(struct tp_bdev *bdev, uint64_t size, struct tp_error *err);
uint64_t tp_bdev_size(const struct tp_bdev *bdev);
/* Offsets and lengths of I/O must be multiples of this (512 or 4096; 1 where it does not
 * matter). */
uint32_t tp_bdev_io_align(const struct tp_bdev *bdev);

/* 1 when punch can be had. */
uint32_t tp_bdev_can_punch(const struct tp_bdev *bdev);
/* The next stretch [*begin_ret, *end_ret) at or after offset that may hold anything but zeros;
 * begin == end == size when there is none. A device that cannot tell answers that everything
 * may. */
int tp_bdev_next_data(struct tp_bdev *bdev, uint64_t offset, uint64_t *begin_ret, uint64_t *end_ret,
		      struct tp_error *err);

/* cffi: end */

/* cffi: begin */
/* ---- faults and logs ------------------------------------------------------------------------ */

/* Scripted faults in front of `below` (which stays the caller's and must outlive it). */
int tp_bdev_fault_open(struct tp_bdev *below, struct tp_bdev **bdev_ret, struct tp_error *err);

enum tp_fault_kind {
	TP_FAULT_ERROR = 1,      /* fails with host_errno, nothing done */
	TP_FAULT_TORN = 2,       /* the first `arg` bytes are written (or punched), then it fails */
	TP_FAULT_DROP_FLUSH = 3, /* a flush is acknowledged and not passed on */
	TP_FAULT_MISDIRECT = 4,  /* goes to offset + arg (modulo 2^64) instead */
	TP_FAULT_BIT_FLIP =
		5, /* bit `arg` (modulo its bits) of a write, or of what a read returns */
	TP_FAULT_LOST_WRITE = 6, /* a write or punch is acknowledged and not done */
	TP_FAULT_HOLD = 7        /* waits for tp_bdev_fault_release, then goes on */
};
enum tp_fault_op {
	TP_FAULT_READ = 1,
	TP_FAULT_WRITE = 2,
	TP_FAULT_FLUSH = 4,
	TP_FAULT_PUNCH = 8
};

/* Fires on the nth matching operation (1 = next) touching [begin, end) (a flush touches all), then
 * `count` times in all (0 = for ever). Several rules may stand, and each counts all that it
 * matches; the first that is due acts. host_errno 0 is EIO. TP_E_INVALID where a kind cannot be
 * done to an operation. */
int tp_bdev_fault_add(struct tp_bdev *fault, uint32_t ops, uint32_t kind, uint64_t begin,
		      uint64_t end, uint64_t nth, uint64_t count, int32_t host_errno, uint64_t arg,
		      struct tp_error *err);
void tp_bdev_fault_clear(struct tp_bdev *fault);
uint64_t tp_bdev_fault_operations(const struct tp_bdev *fault); /* seen so far */
uint64_t tp_bdev_fault_fired(const struct tp_bdev *fault);
/* Operations that wait now; all of them go on at a release. */
uint64_t tp_bdev_fault_held(const struct tp_bdev *fault);
void tp_bdev_fault_release(struct tp_bdev *fault);

/* Records, in memory, every write, punch and flush that succeeded in front of `below` (as above).
 * Entries of several devices share one order when opened with the same `order` device's log, NULL
 * for a log of its own. Entries stand in the order of completion. */
int tp_bdev_log_open(struct tp_bdev *below, struct tp_bdev *order, uint32_t device_number,
		     struct tp_bdev **bdev_ret, struct tp_error *err);

enum tp_log_kind {
	TP_LOG_WRITE = 1,
	TP_LOG_FLUSH = 2,
	TP_LOG_PUNCH = 3,
	TP_LOG_MARK = 4
};
struct tp_log_entry {
	uint32_t kind;
	uint32_t device;
	uint64_t offset; /* of a mark: its number. Of a flush: it made durable the entries of
				 * its device with an index below this; what else is before it
				 * completed while it ran */
	uint64_t length;
};
uint64_t tp_bdev_log_count(const struct tp_bdev *log);
/* TP_E_OUT_OF_RANGE past the end. */
int tp_bdev_log_entry(const struct tp_bdev *log, uint64_t index, struct tp_log_entry *entry_ret);
/* Copy the payload of a write (else TP_E_INVALID); buffer holds entry.length bytes. */
int tp_bdev_log_payload(const struct tp_bdev *log, uint64_t index, void *buffer);
/* A mark in the order: "everything numbered up to this was acknowledged before here". */
int tp_bdev_log_mark(struct tp_bdev *log, uint64_t number);
/* Do the writes and punches of one device among the entries [begin, end) again, to `target`. */
int tp_bdev_log_replay(const struct tp_bdev *log, uint64_t begin, uint64_t end, uint32_t device,
		       struct tp_bdev *target, struct tp_error *err);

/* cffi: end */

/* cffi: begin */
/* ---- pool ---------------------------------------------------------------------------------- */

struct tp_pool;
struct tp_volume;

enum tp_pool_mode {
	TP_MODE_RW = 0,
	TP_MODE_OUT_OF_DATA_SPACE = 1,
	TP_MODE_RO = 2,
	TP_MODE_FAIL = 3
};
enum tp_discard_mode {
	TP_DISCARD_PASSDOWN = 0,
	TP_DISCARD_NO_PASSDOWN = 1,
	TP_DISCARD_IGNORE = 2
};

struct tp_pool_options {
	uint32_t skip_block_zeroing;
	uint32_t error_if_no_space;   /* else writes wait no_space_timeout_ms */
	uint32_t no_space_timeout_ms; /* 0 waits for ever; the kernel's default is 60000 */
	uint32_t discard_mode;
	uint32_t read_only;
	uint32_t commit_interval_ms; /* 0: no background commits; the default is 1000 */
	uint64_t low_water_blocks;
	uint64_t cache_bytes; /* soft limit of clean metadata blocks in memory; 0 = 32 MiB */
	void *redo_memory;    /* shared memory for the redo log, NULL for none */
	size_t redo_size;
};

struct tp_pool_status {
	uint32_t mode;
	uint32_t needs_check;
	uint64_t transaction_id;
	uint32_t time;
	uint32_t data_block_size; /* bytes */
	uint64_t data_blocks_total;
	uint64_t data_blocks_used;
	uint64_t metadata_blocks_total;
	uint64_t metadata_blocks_used; /* without the reserve */
	uint64_t metadata_blocks_reserve;
	uint64_t held_root; /* 0 for none */
	uint64_t nr_volumes;
	uint64_t commits;
	uint64_t data_flushes;
	uint64_t metadata_flushes;
	uint64_t provisioned;   /* first writes since open */
	uint64_t broke_sharing; /* copies since open */
	uint64_t discarded;     /* blocks unmapped since open */
	uint64_t punch_backlog; /* blocks whose host space is still to be returned */
	uint32_t low_water_reached;
	uint32_t dirty;    /* mappings changed since the last commit */
	uint64_t replayed; /* redo records applied at open */
};

struct tp_volume_info {
	uint32_t id;
	uint32_t creation_time;
	uint32_t snapshotted_time;
	uint32_t open;
	uint64_t mapped_blocks;
	uint64_t transaction_id;
};

enum tp_change_kind {
	TP_CHANGE_CREATE = 1,
	TP_CHANGE_SNAPSHOT = 2,
	TP_CHANGE_DELETE = 3
};
struct tp_change {
	uint32_t kind;
	uint32_t id;
	uint32_t origin; /* of a snapshot */
};

/* Write an empty pool. The metadata device's block 0 must be zeros unless force. Durable on
 * return. */
int tp_pool_format(struct tp_bdev *metadata, uint32_t data_block_size, uint64_t nr_data_blocks,
		   uint32_t force, struct tp_error *err);
/* The devices stay the caller's and must outlive the pool. Replays the redo log, if it holds
 * anything, onto the last commit. May block. */
int tp_pool_open(struct tp_bdev *metadata, struct tp_bdev *data,
		 const struct tp_pool_options *options, struct tp_pool **pool_ret,
		 struct tp_error *err);
/* Commits, then frees. TP_E_BUSY while volumes are open. On another failure the pool is freed
 * too. */
int tp_pool_close(struct tp_pool *pool, struct tp_error *err);
/* Frees without committing: what a crash leaves. Open volumes fail from here on; the last that is
 * closed frees the pool. */
void tp_pool_abandon(struct tp_pool *pool);
/* Everything acknowledged before the call is durable on return. */
int tp_pool_commit(struct tp_pool *pool, struct tp_error *err);
void tp_pool_get_status(struct tp_pool *pool, struct tp_pool_status *status_ret);
/* Wait until the mode, the low-water state or the volume set changed, or timeout_ms passed.
 * *sequence is what the caller saw last and is updated. */
int tp_pool_wait_event(struct tp_pool *pool, uint64_t *sequence, uint32_t timeout_ms);

/* All changes or none, together with the transaction id, in one commit; durable on return.
 * expected must be the current id (else TP_E_TRANSACTION_ID). Origins' writers are drained here.
 * after_fd: the superblock that makes them durable is not written before this descriptor is
 * readable (poll's POLLIN; it is not read), whoever leads the commit; -1 for none. It stays the
 * caller's, who keeps it open until the call returns and sees to it that it becomes readable. */
int tp_pool_apply(struct tp_pool *pool, const struct tp_change *changes, size_t nr_changes,
		  uint64_t expected_transaction_id, uint64_t new_transaction_id, int32_t after_fd,
		  struct tp_error *err);
/* The single steps, durable only after tp_pool_commit. */
int tp_volume_create(struct tp_pool *pool, uint32_t id, struct tp_error *err);
int tp_snapshot_create(struct tp_pool *pool, uint32_t id, uint32_t origin_id, struct tp_error *err);
int tp_volume_delete(struct tp_pool *pool, uint32_t id, struct tp_error *err);
int tp_pool_set_transaction_id(struct tp_pool *pool, uint64_t expected, uint64_t wanted,
			       struct tp_error *err);

int tp_pool_resize_data(struct tp_pool *pool, uint64_t nr_blocks, struct tp_error *err);
/* To the present size of the metadata device. */
int tp_pool_resize_metadata(struct tp_pool *pool, struct tp_error *err);
int tp_pool_reserve_metadata_snapshot(struct tp_pool *pool, struct tp_error *err);
int tp_pool_release_metadata_snapshot(struct tp_pool *pool, struct tp_error *err);
int tp_pool_clear_needs_check(struct tp_pool *pool, struct tp_error *err);
int tp_pool_set_when_full(struct tp_pool *pool, uint32_t error_if_no_space, uint32_t timeout_ms);
int tp_pool_set_low_water(struct tp_pool *pool, uint64_t blocks);
/* Return the host space of up to max_blocks freed blocks; *left_ret says how many remain. */
int tp_pool_punch_some(struct tp_pool *pool, uint64_t max_blocks, uint64_t *left_ret,
		       struct tp_error *err);

/* Up to max entries with id >= first_id, in id order. */
int tp_pool_list_volumes(struct tp_pool *pool, uint32_t first_id, struct tp_volume_info *infos,
			 size_t max, size_t *count_ret, struct tp_error *err);
int tp_pool_get_volume_info(struct tp_pool *pool, uint32_t id, struct tp_volume_info *info_ret,
			    struct tp_error *err);

/* cffi: end */

/* cffi: begin */
/* ---- a flush beside ---------------------------------------------------------------------- */

/* Flush a file (fdatasync) each time that an eventfd says that it is due, and add 1 to another when
 * that is durable, so that neither who asks nor the thread that is in here needs the interpreter.
 * due_fd: 1 for a flush, the next when that has ended; 2 to return TP_E_CLOSED. ended_fd: -1 to
 * return 0 after one flush. A flush that failed adds nothing and returns TP_E_IO. */
int tp_flush_when_due(int32_t fd, int32_t due_fd, int32_t ended_fd, struct tp_error *err);

/* ---- volumes -------------------------------------------------------------------------------- */

/* size in bytes, a multiple of 512; kept by the caller, not on disk. Opening twice is
 * TP_E_VOLUME_BUSY. origin, or NULL: the external origin, a device that nobody writes and that
 * outlives the volume. What is not mapped reads as what it has there, zeros beyond its end, and the
 * first write of a block takes the rest of the block from it. It is kept by the caller as well. */
int tp_volume_open(struct tp_pool *pool, uint32_t id, uint64_t size, uint32_t read_only,
		   struct tp_bdev *origin, struct tp_volume **volume_ret, struct tp_error *err);
void tp_volume_close(struct tp_volume *volume);
int tp_volume_resize(struct tp_volume *volume, uint64_t size, struct tp_error *err);
uint32_t tp_volume_id(const struct tp_volume *volume);
uint64_t tp_volume_size(const struct tp_volume *volume);
/* Any offset and length within the volume. All may block. */
int tp_volume_read(struct tp_volume *volume, uint64_t offset, void *buffer, size_t length,
		   struct tp_error *err);
int tp_volume_write(struct tp_volume *volume, uint64_t offset, const void *buffer, size_t length,
		    struct tp_error *err);
/* Whole blocks inside the range are unmapped, partial ends are left: the kernel's discard. What an
 * external origin has there shows again. */
int tp_volume_discard(struct tp_volume *volume, uint64_t offset, uint64_t length,
		      struct tp_error *err);
/* Whole blocks are unmapped, or over an external origin written with zeros; partial ends zeroed:
 * reads as zeros afterwards. */
int tp_volume_zero(struct tp_volume *volume, uint64_t offset, uint64_t length,
		   struct tp_error *err);
/* Everything acknowledged before the call survives power loss on return. */
int tp_volume_flush(struct tp_volume *volume, struct tp_error *err);
/* First mapped byte at or after offset, and the end of that mapped stretch; TP_E_KEY_NOT_FOUND
 * when nothing is mapped from there to the end. All that an external origin has counts as mapped;
 * a stretch may begin where the one before it ends. */
int tp_volume_next_data(struct tp_volume *volume, uint64_t offset, uint64_t *begin_ret,
			uint64_t *end_ret, struct tp_error *err);
/* One volume block's mapping: TP_E_KEY_NOT_FOUND when unmapped. */
int tp_volume_lookup(struct tp_volume *volume, uint64_t block, uint64_t *data_block_ret,
		     uint32_t *shared_ret, struct tp_error *err);

/* cffi: end */

/* cffi: begin */
/* ---- FUSE server ----------------------------------------------------------------------------- */

/*
 * Serves volumes as files on a FUSE connection that somebody else opened, mounted and keeps. The
 * request slots lie in shared memory: a server made later on the same descriptors and the same
 * memory answers what its predecessor had read and not answered.
 */
struct tp_fuse_server;
struct tp_pool;
struct tp_volume;

struct tp_fuse_options {
	uint32_t write_threads;  /* for writes that may block; 0 = 8 */
	uint32_t copy_threads;   /* for those of them that break sharing; 0 = 16 */
	uint32_t read_threads;   /* 0 = 4 */
	uint32_t zero_threads;   /* 0 = 2 */
	uint32_t flush_threads;  /* 0 = 2 */
	uint32_t max_background; /* requests that the kernel sends at once; 0 = 3/4 of the slots */
	uint32_t trim_ms;        /* idle time before memory is given back; 0 = 1000 */
	uint32_t block_size;     /* what statfs reports where there is no pool; 0 = 64 KiB */
	uint32_t no_io_uring;    /* every request goes to the blocking threads */
};

struct tp_fuse_statistics {
	uint64_t requests;     /* read from the kernel */
	uint64_t fast;         /* reads and writes that never blocked */
	uint64_t slow;         /* requests handed to blocking threads */
	uint64_t retried;      /* asynchronous I/O that failed and was repeated there */
	uint64_t replays;      /* open requests of a dead predecessor that were done or answered */
	uint64_t flushes;      /* asked for */
	uint64_t flush_calls;  /* made, each for everyone who waited */
	uint64_t errors;       /* reads, writes and the like answered with an error */
	uint64_t lost_replies; /* answered, but the kernel no longer knew the request */
	uint64_t read_bytes;
	uint64_t written_bytes;
	uint64_t zeroed_bytes;
	uint64_t in_flight;
	uint64_t files;
};

/* Bytes of shared memory for so many requests at once (1 to 4096). */
size_t tp_fuse_slots_size(uint32_t nr_slots);
/* One data thread for each of fuse_fds (1 to 16), which stay the caller's. slots_fd is a memfd of
 * slots_size bytes; it is mapped here. pool may be NULL: then only linear files can be added. */
int tp_fuse_server_create(struct tp_pool *pool, const int *fuse_fds, uint32_t nr_fds, int slots_fd,
			  size_t slots_size, const struct tp_fuse_options *options,
			  struct tp_fuse_server **server_ret, struct tp_error *err);
/* Not while it runs. Files still there are dropped; volumes stay the caller's. Takes NULL. */
void tp_fuse_server_destroy(struct tp_fuse_server *server);
/* A raw file as it is, without a pool: the null target that the data path is compared with. */
int tp_fuse_server_add_linear(struct tp_fuse_server *server, uint32_t id, const char *path,
			      uint32_t read_only, uint64_t generation, struct tp_error *err);
/* The file vanishes for new requests; returns when those that it had are answered. May block. */
int tp_fuse_server_remove_file(struct tp_fuse_server *server, uint32_t id, struct tp_error *err);
/* Answers open requests of a predecessor, then serves until tp_fuse_server_stop (0) or until the
 * kernel ends the connection (TP_E_CLOSED). Files active before must have been added before. */
int tp_fuse_server_run(struct tp_fuse_server *server, struct tp_error *err);
/* From any thread, once or more: no further request is read; those read are answered. */
void tp_fuse_server_stop(struct tp_fuse_server *server);
void tp_fuse_server_get_statistics(struct tp_fuse_server *server,
				   struct tp_fuse_statistics *statistics_ret);

/* `id-N`, N the volume's id. The volume stays open until tp_fuse_server_remove_file returned.
 * generation differs between activations: a handle of an earlier one is refused (ESTALE). */
int tp_fuse_server_add_file(struct tp_fuse_server *server, struct tp_volume *volume,
			    uint32_t read_only, uint64_t generation, struct tp_error *err);

/* cffi: end */

/* cffi: begin */
/* ---- check, dump, delta: an independent reader ----------------------------------------------- */

/*
 * These read a metadata device by themselves, sharing no code with the pool that writes it, so that
 * they can judge it. Nothing is ever written. Metadata may be arbitrarily damaged or hostile. The
 * device stays the caller's and must outlive the handle. A pool that is in use is read through its
 * metadata snapshot only (use_metadata_snapshot), which cannot change until it is released.
 */

enum tp_check_severity {
	TP_CHECK_FATAL = 1, /* writing to this pool may lose or corrupt something */
	TP_CHECK_LEAK = 2,  /* counted and not used: space is lost, nothing else */
	TP_CHECK_NOTE = 3   /* stale or unusual, harms nobody */
};

enum tp_check_structure {
	TP_CHECK_IN_SUPERBLOCK = 0,
	TP_CHECK_IN_METADATA_SNAPSHOT = 1,
	TP_CHECK_IN_MAPPING_TOP_LEVEL = 2,
	TP_CHECK_IN_DEVICE_TREE = 3,
	TP_CHECK_IN_DETAILS_TREE = 4,
	TP_CHECK_IN_DATA_INDEX = 5,
	TP_CHECK_IN_DATA_BITMAP = 6,
	TP_CHECK_IN_DATA_OVERFLOW = 7,
	TP_CHECK_IN_DATA_SPACE_MAP = 8,
	TP_CHECK_IN_METADATA_INDEX = 9,
	TP_CHECK_IN_METADATA_BITMAP = 10,
	TP_CHECK_IN_METADATA_OVERFLOW = 11,
	TP_CHECK_IN_METADATA_SPACE_MAP = 12
};

enum tp_check_type {
	/* any block */
	TP_CHECK_IO_ERROR = 1,
	TP_CHECK_CHECKSUM = 2,
	TP_CHECK_BLOCK_NUMBER = 3, /* the block does not carry its own number */
	TP_CHECK_POINTER_OUT_OF_RANGE = 4,
	TP_CHECK_BLOCK_REUSED = 5, /* one block stands in two structures */
	TP_CHECK_TRUNCATED_DEVICE = 6,
	/* superblock */
	TP_CHECK_MAGIC = 10,
	TP_CHECK_VERSION = 11,
	TP_CHECK_FEATURES = 12,
	TP_CHECK_DATA_BLOCK_SIZE = 13,
	TP_CHECK_METADATA_BLOCK_SIZE = 14,
	TP_CHECK_FLAGS = 15,
	TP_CHECK_NEEDS_CHECK = 16,
	TP_CHECK_NO_METADATA_SNAPSHOT = 17,
	TP_CHECK_POOL_TIME = 18, /* past 24 bits */
	/* nodes */
	TP_CHECK_NODE_FLAGS = 20,
	TP_CHECK_NODE_SIZE = 21, /* entries that do not fit */
	TP_CHECK_NODE_VALUE_SIZE = 22,
	TP_CHECK_NODE_MAX_ENTRIES = 23,
	TP_CHECK_NODE_UNDERFULL = 24,
	TP_CHECK_NODE_EMPTY = 25, /* an internal node without children */
	TP_CHECK_KEYS_OUT_OF_ORDER = 26,
	TP_CHECK_KEYS_DUPLICATE = 27,
	TP_CHECK_SEPARATOR_HIGH = 28,    /* a separator above its child's first key */
	TP_CHECK_SEPARATOR_OVERLAP = 29, /* a child's last key at or past the next separator */
	TP_CHECK_UNEQUAL_DEPTH = 30,
	TP_CHECK_TOO_DEEP = 31, /* a cycle, or more levels than any tree can have */
	/* devices and mappings */
	TP_CHECK_DEVICE_ID = 40, /* past 24 bits */
	TP_CHECK_DETAILS_MISSING = 41,
	TP_CHECK_MAPPINGS_MISSING = 42,
	TP_CHECK_MAPPED_BLOCKS = 43,
	TP_CHECK_DETAILS_TIME = 44, /* in the future of the pool */
	TP_CHECK_MAPPING_PAST_END = 45,
	TP_CHECK_MAPPING_TIME =
		46, /* in the future of the pool: a later snapshot would not be safe */
	/* space maps */
	TP_CHECK_SPACE_MAP_SIZE = 60,
	TP_CHECK_INDEX_MISSING = 61,
	TP_CHECK_INDEX_EXTRA = 62,
	TP_CHECK_INDEX_BEYOND_END = 63,
	TP_CHECK_BITS_BEYOND_END = 64,
	TP_CHECK_COUNT_LOW = 65,
	TP_CHECK_COUNT_HIGH = 66,
	TP_CHECK_OVERFLOW_MISSING = 67,
	TP_CHECK_OVERFLOW_EXTRA = 68,
	TP_CHECK_OVERFLOW_SMALL = 69,
	TP_CHECK_NR_ALLOCATED = 70,
	TP_CHECK_NR_FREE = 71,
	TP_CHECK_NONE_FREE_BEFORE = 72,
	TP_CHECK_COUNTS_UNJUDGED =
		73 /* leaks cannot be told while parts of the trees are unreadable */
};

struct tp_check;

struct tp_check_options {
	uint32_t use_metadata_snapshot; /* the held one, which carries no space maps */
	uint32_t skip_mappings;         /* devices' trees are not read, data counts not compared */
	uint32_t nr_threads;            /* 0: two */
	uint32_t max_faults;            /* kept; the others are counted. 0: 65536 */
	uint64_t nr_data_blocks;        /* of the data device; 0: what the data space map says */
};

struct tp_check_fault {
	uint32_t type;
	uint32_t severity;
	uint32_t structure;
	uint32_t status;     /* of TP_CHECK_IO_ERROR, negated; 0 of the others */
	uint64_t block;      /* the metadata block in which it stands */
	uint64_t data_block; /* the (first) data block concerned, UINT64_MAX for none */
	uint64_t length;     /* this many neighbours have the same fault; 1 where there is one */
	uint64_t device_id;  /* one device that is concerned, UINT64_MAX for none */
	uint64_t key;        /* the key or index concerned, UINT64_MAX for none */
	uint64_t found;
	uint64_t wanted;
	char message[256];
};

struct tp_check_summary {
	uint64_t transaction_id;
	uint32_t time;
	uint32_t needs_check;
	uint32_t superblock_valid; /* else the three above are zeros */
	uint32_t reserved;
	uint64_t nr_faults; /* kept */
	uint64_t nr_fatal;  /* these three include what was not kept */
	uint64_t nr_leaks;
	uint64_t nr_notes;
	uint64_t nr_leaked_data_blocks;
	uint64_t nr_leaked_metadata_blocks;
	uint64_t nr_devices;
	uint64_t nr_mappings; /* all devices', shared ones as often as they are mapped */
	uint64_t nr_blocks_read;
	uint64_t metadata_blocks_total;
	uint64_t metadata_blocks_used;
	uint64_t data_blocks_total;
	uint64_t data_blocks_used;
};

struct tp_check_progress {
	uint64_t done;  /* metadata blocks */
	uint64_t total; /* an upper bound until the end; 0 while unknown */
};

int tp_check_create(struct tp_bdev *metadata, const struct tp_check_options *options,
		    struct tp_check **check_ret, struct tp_error *err);
void tp_check_destroy(struct tp_check *check);
/* Once a handle. 0 whatever it found; failure means that it could not look. May block. */
int tp_check_run(struct tp_check *check, struct tp_error *err);
/* From any thread while tp_check_run runs; cancel makes that return TP_E_INTERRUPTED. */
void tp_check_get_progress(const struct tp_check *check, struct tp_check_progress *progress_ret);
void tp_check_cancel(struct tp_check *check);
/* After tp_check_run. Faults are ordered by structure, block and key. */
void tp_check_get_summary(const struct tp_check *check, struct tp_check_summary *summary_ret);
int tp_check_get_fault(const struct tp_check *check, uint64_t index,
		       struct tp_check_fault *fault_ret);
/* Stable names; NULL for a number that is none. */
const char *tp_check_type_name(uint32_t type);
const char *tp_check_severity_name(uint32_t severity);
const char *tp_check_structure_name(uint32_t structure);

struct tp_dump;

struct tp_dump_superblock {
	uint8_t uuid[16];
	uint32_t flags;
	uint32_t version;
	uint32_t time;
	uint32_t data_block_size; /* sectors */
	uint64_t transaction_id;
	uint64_t held_root;          /* 0 for none */
	uint64_t nr_data_blocks;     /* 0 in a metadata snapshot */
	uint64_t nr_metadata_blocks; /* 0 in a metadata snapshot */
};

struct tp_dump_device {
	uint64_t id;
	uint64_t mapped_blocks;
	uint64_t transaction_id;
	uint32_t creation_time;
	uint32_t snapshotted_time;
};

/* Virtual blocks [begin, begin + length) at data blocks [data_begin, data_begin + length). */
struct tp_dump_run {
	uint64_t device_id;
	uint64_t begin;
	uint64_t data_begin;
	uint64_t length;
	uint32_t time;
	uint32_t reserved;
};

/* Fails where the superblock or a device list cannot be trusted. Not thread-safe. May block. */
int tp_dump_open(struct tp_bdev *metadata, uint32_t use_metadata_snapshot,
		 struct tp_dump **dump_ret, struct tp_error *err);
void tp_dump_close(struct tp_dump *dump);
void tp_dump_get_superblock(const struct tp_dump *dump, struct tp_dump_superblock *superblock_ret);
/* Up to max devices from the index'th on, in id order. */
int tp_dump_devices(const struct tp_dump *dump, uint64_t index, struct tp_dump_device *devices,
		    size_t max, size_t *count_ret);
/* Start anew with one device: TP_E_VOLUME_NOT_FOUND. */
int tp_dump_select(struct tp_dump *dump, uint64_t device_id, struct tp_error *err);
/* Its next runs, as long as they can be; *count_ret 0 at the end. */
int tp_dump_next(struct tp_dump *dump, struct tp_dump_run *runs, size_t max, size_t *count_ret,
		 struct tp_error *err);

enum tp_delta_kind {
	TP_DELTA_SAME = 1,
	TP_DELTA_DIFFERENT = 2,
	TP_DELTA_LEFT_ONLY = 3,
	TP_DELTA_RIGHT_ONLY = 4
};

struct tp_delta;

struct tp_delta_options {
	uint64_t left; /* device ids */
	uint64_t right;
	uint32_t use_metadata_snapshot;
	uint32_t with_same;     /* else shared subtrees are not read, and no SAME is given */
	uint32_t by_data_block; /* a run ends where its data blocks are no neighbours */
	uint32_t nr_threads;    /* 0: two */
};

struct tp_delta_run {
	uint64_t begin;
	uint64_t length;
	uint64_t left_data_begin; /* of the first block; UINT64_MAX on the side that has none */
	uint64_t right_data_begin;
	uint32_t kind;
	uint32_t reserved;
};

/* Data blocks are compared, times are not. Not thread-safe. May block. */
int tp_delta_open(struct tp_bdev *metadata, const struct tp_delta_options *options,
		  struct tp_delta **delta_ret, struct tp_error *err);
void tp_delta_close(struct tp_delta *delta);
/* Next runs in key order; *count_ret 0 at the end. */
int tp_delta_next(struct tp_delta *delta, struct tp_delta_run *runs, size_t max, size_t *count_ret,
		  struct tp_error *err);

/* Data blocks that removing this whole set of devices would free. Reads every mapping. */
int tp_exclusive(struct tp_bdev *metadata, uint32_t use_metadata_snapshot, const uint64_t *ids,
		 size_t nr_ids, uint64_t *blocks_ret, struct tp_error *err);
/* Data blocks that only ids[i] maps, into blocks_ret[i], each device by itself. */
int tp_exclusive_each(struct tp_bdev *metadata, uint32_t use_metadata_snapshot, const uint64_t *ids,
		      size_t nr_ids, uint64_t *blocks_ret, struct tp_error *err);

/* The C core's view of the on-disk records, for the test that compares them with
 * thinpool.format. */
struct tp_disk_field {
	const char *record;
	const char *field;
	uint32_t offset; /* bytes */
	uint32_t size;
};
/* TP_E_OUT_OF_RANGE past the last. */
int tp_disk_field_at(size_t index, struct tp_disk_field *field_ret);

/* cffi: end */

#endif
