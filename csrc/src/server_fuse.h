/* SPDX-License-Identifier: Apache-2.0 */
/**
 * The inside of the FUSE server: what its files share and nobody else includes.
 *
 * The server speaks linux/fuse.h on descriptors that somebody else opened, mounted and keeps. It
 * knows volumes only through struct tp_fuse_target, never a pool's format.
 *
 * Life of a request: a data thread takes a free slot, reads one request into it, and either
 * starts asynchronous I/O, answers at once, or hands the slot to one of five work queues whose
 * threads may block. Whoever finishes it answers on the descriptor that it was read from, and
 * frees the slot.
 *
 * Invariants
 * - A slot's memory is shared with the supervisor, so what is open survives SIGKILL. Its `unique`
 *   is zeroed before the slot is offered to read(2), hence nonzero means: read, perhaps not
 *   answered.
 * - A request that changes a volume is SLOT_DONE, with its result, before it is answered: a
 *   successor answers it again but never repeats it, for a later write to the same place may have
 *   been acknowledged meanwhile. One that is not SLOT_DONE was not answered; repeating it is right.
 * - Slots offered to read(2) are resident. A signal that finds the kernel faulting a page of ours
 *   makes it fail the request with EIO, which a block device must not show. To make one resident
 *   takes most of a millisecond, so a request that is small is moved to a slot that is not, where
 *   no other resident one is free, and its slot is offered again. While it is moved both slots have
 *   it, and neither was begun: a successor serves one of them.
 * - A file's target is used only between tp_fuse_files_get and tp_fuse_files_put.
 *
 * Thread-safety: stated at each function.
 */
#ifndef THINPOOL_SERVER_FUSE_H
#define THINPOOL_SERVER_FUSE_H

#include "thinpool/abi.h"
#include "thinpool/volume_map.h"

#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/uio.h>

/* ---- limits ---- */

#define FUSE_MAX_IO    (1u << 20) /* bytes in one read or write */
#define FUSE_PAGE      4096u
#define FUSE_MAX_SLOTS 4096u
#define FUSE_MAX_FDS   16u
/* Both fixed parts of a write: its payload then starts on the page boundary behind them. */
#define FUSE_HEAD        (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in))
#define FUSE_READ_SIZE   (FUSE_HEAD + FUSE_MAX_IO)
#define FUSE_SLOT_STRIDE (FUSE_PAGE + FUSE_MAX_IO)
#define FUSE_FIRST_NODE  0x100u /* nodeid of volume id 0 */
#define FUSE_NR_IDS      (1u << 24)

/* ---- requests: server_fuse_proto.c ---- */

struct tp_fuse_request {
	const struct fuse_in_header *header;
	const void *arg;  /* the fixed part behind the header; its size was checked */
	const char *name; /* LOOKUP: ends with a zero byte within the request */
	uint32_t payload; /* bytes of a WRITE's data */
};

/* Look at `length` bytes that were read. 0, or -EIO where the header itself cannot be trusted
 * (nobody can be answered), or -EINVAL, -ENOSYS to be answered. Pure. */
int tp_fuse_decode(const void *bytes, size_t length, struct tp_fuse_request *request_ret);
/* The positive errno that a block device would show for a status. Pure. */
int tp_fuse_errno(int status, int host_errno);
/* The answer to INIT, from what the kernel offered. Returns 0 or -EPROTO. */
int tp_fuse_negotiate(const struct fuse_init_in *in, uint16_t max_background,
		      struct fuse_init_out *out);

/* ---- slots: server_fuse_slots.c ---- */

enum slot_state {
	SLOT_FREE = 0,
	SLOT_OPEN = 1,
	SLOT_DONE = 2
};

struct slot_shared {
	_Atomic uint32_t state;
	uint32_t fd_index; /* which descriptor the request came from */
	int32_t error;     /* SLOT_DONE: 0 or -errno */
	uint32_t written;  /* SLOT_DONE: bytes, of a WRITE */
};

struct tp_fuse_file;

struct slot {
	struct slot_shared *shared;
	struct fuse_in_header *header;  /* FUSE_HEAD bytes before data */
	unsigned char *data;            /* FUSE_MAX_IO bytes, page-aligned */
	struct slot *next;              /* in the free list or in a queue */
	bool resident;                  /* every page faulted in, and locked if we may */
	bool touched;                   /* used since its memory was given back */
	bool failed;                    /* some part of the asynchronous I/O */
	uint32_t pending;               /* parts of the asynchronous I/O still out */
	uint32_t expected, transferred; /* bytes of it */
	struct tp_fuse_request request;
	struct tp_fuse_file *file; /* held while the I/O is out or queued */
	uint64_t offset;
	uint32_t length; /* after clamping to the file's end */
	struct tp_map map;
};

struct slots {
	pthread_mutex_t lock;
	struct slot *resident, *plain; /* free ones, last freed first: few are ever touched */
	uint32_t nr;
	uint32_t nr_free;
	bool starved; /* a data thread wants to be told of the next free slot */
	int fd;       /* our own descriptor of the shared memory */
	unsigned char *memory;
	size_t size;
	struct slot *slots;
};

/* Map the memory of `fd`. A fresh one (all zeros) is given its layout; another must have ours. */
int tp_fuse_slots_init(struct slots *slots, int fd, size_t size, struct tp_error *err);
void tp_fuse_slots_deinit(struct slots *slots);
/* What INIT settled: 0 while it has not come. Survives the worker. */
uint32_t tp_fuse_slots_minor(const struct slots *slots);
void tp_fuse_slots_set_minor(struct slots *slots, uint32_t minor);
/* Fault every page in, keeping its contents. */
void tp_fuse_slot_make_resident(struct slot *slot);
/* NULL when none is free; then *starved is set. Any thread. The slot is SLOT_OPEN, unique 0. */
struct slot *tp_fuse_slots_take(struct slots *slots, uint32_t fd_index);
/* Move a request of `length` bytes that was read into `from`, and not begun, to a slot that need
 * not be resident; `from` is then as if it had just been taken. NULL, and nothing is changed, where
 * a resident slot is free or none is: then `from` itself is to be used. Any thread. */
struct slot *tp_fuse_slots_move(struct slots *slots, struct slot *from, size_t length);
/* Returns true when starving threads must be woken. Any thread. */
bool tp_fuse_slots_put(struct slots *slots, struct slot *slot);
/* Give the memory of free slots back, keeping `keep` of them resident. Any thread. */
void tp_fuse_slots_trim(struct slots *slots, uint32_t keep);

/* ---- targets and files: server_fuse_files.c ---- */

/* What a file is served from. All may be called by several threads; only map and unmap must not
 * block. Statuses and errors as the tp_volume_* functions of the same names. */
struct tp_fuse_target_ops {
	int (*map)(void *target, uint64_t offset, uint32_t length, int write,
		   struct tp_map *map_ret);
	void (*unmap)(void *target, struct tp_map *map);
	int (*read)(void *target, uint64_t offset, void *buffer, size_t length,
		    struct tp_error *err);
	int (*write)(void *target, uint64_t offset, const void *buffer, size_t length,
		     struct tp_error *err);
	int (*zero)(void *target, uint64_t offset, uint64_t length, struct tp_error *err);
	int (*flush)(void *target, struct tp_error *err);
	int (*next_data)(void *target, uint64_t offset, uint64_t *begin_ret, uint64_t *end_ret,
			 struct tp_error *err);
	uint64_t (*size)(void *target);                         /* does not block */
	uint64_t (*mapped)(struct tp_pool *pool, void *target); /* bytes; may block */
	void (*close)(void *target); /* may be NULL: the target stays its owner's */
};

struct tp_fuse_file {
	uint32_t id;
	_Atomic uint32_t users;
	_Atomic uint32_t active;
	uint32_t read_only;
	uint64_t generation; /* also the handle: one of an earlier activation is refused */
	int fd;              /* for asynchronous I/O, -1: none */
	uint32_t fd_key;     /* one for each open file description: numbers are reused */
	const struct tp_fuse_target_ops *ops;
	void *target;
};

struct files {
	pthread_mutex_t lock; /* adding, removing, listing */
	pthread_cond_t drained;
	/* By id: 4096 leaves of 4096, made on demand, freed at the end. */
	_Atomic(_Atomic(struct tp_fuse_file *) *) leaves[4096];
	uint32_t nr_active;
};

int tp_fuse_files_init(struct files *files);
void tp_fuse_files_deinit(struct files *files);
/* TP_E_VOLUME_EXISTS when the id has a file. On success the target is the file's. */
int tp_fuse_files_add(struct files *files, const struct tp_fuse_file *description,
		      struct tp_error *err);
/* Waits until nobody uses the file, then closes its target. */
int tp_fuse_files_remove(struct files *files, uint32_t id, struct tp_error *err);
/* NULL when there is none. Lock-free. */
struct tp_fuse_file *tp_fuse_files_get(struct files *files, uint64_t nodeid);
void tp_fuse_files_put(struct files *files, struct tp_fuse_file *file);
/* The first active id >= id, FUSE_NR_IDS when there is none. May block briefly. */
uint32_t tp_fuse_files_next(struct files *files, uint32_t id);

extern const struct tp_fuse_target_ops tp_fuse_volume_ops;
extern const struct tp_fuse_target_ops tp_fuse_linear_ops;
void tp_fuse_pool_statfs(struct tp_pool *pool, struct fuse_kstatfs *out);
/* A raw file served as it is: the null target. Owned by the file table afterwards. */
int tp_fuse_linear_open(const char *path, uint32_t read_only, void **target_ret, int *fd_ret,
			struct tp_error *err);

/* ---- how to wait: server_fuse_spin.c ---- */

/* Of one thread. A zeroed one is ready. */
struct tp_fuse_spin {
	int64_t last_ns;   /* when the last request began; 0: another came in between */
	int64_t ns[2];     /* from one to the next, about: asleep, and looking */
	uint32_t nr[2];    /* samples of each, up to what is enough */
	uint32_t requests; /* seen */
	uint32_t in_a_row; /* since the way changed */
	bool looks;
};

/* A request begins that came alone. Whether to look, rather than sleep, until the next begins. */
bool tp_fuse_spin_next(struct tp_fuse_spin *spin, int64_t now_ns);
/* The time since the last request says nothing. */
void tp_fuse_spin_interrupt(struct tp_fuse_spin *spin);

/* ---- threads: server_fuse.c, server_fuse_data.c, server_fuse_work.c ---- */

enum work_kind {
	WORK_READ,  /* reads and everything that looks: never waits for space */
	WORK_WRITE, /* may wait for space, so nothing else stands behind it */
	WORK_COPY,  /* a write that breaks sharing: the disk is quicker with more of them at once,
		     * and the host's filesystem slower with more first writes */
	WORK_ZERO,  /* gives space back: must not stand behind writes that wait for it */
	WORK_FLUSH,
	NR_WORK_KINDS
};

struct tp_fuse_server;

struct work_queue {
	pthread_mutex_t lock;
	pthread_cond_t wake;
	struct slot *head;
	struct slot **tail;
	bool ending;
	enum work_kind kind;
	struct tp_fuse_server *server;
	uint32_t nr_threads;
	pthread_t *threads;
};

struct counters {
	_Atomic uint64_t requests, fast, slow, replays, flushes, flush_calls, errors;
	_Atomic uint64_t read_bytes, written_bytes, zeroed_bytes;
	_Atomic uint64_t retried;      /* fast I/O that failed and went the slow way */
	_Atomic uint64_t lost_replies; /* the kernel did not know the request any more */
};

struct data_thread {
	struct tp_fuse_server *server;
	uint32_t index;
	int fuse_fd;
	int event_fd;
	pthread_t thread;
	struct counters counters; /* cache lines of its own: no sharing on the fast path */
} __attribute__((aligned(128)));

struct tp_fuse_server {
	struct tp_pool *pool; /* NULL: null targets only */
	struct tp_fuse_options options;
	struct slots slots;
	struct files files;
	struct work_queue queues[NR_WORK_KINDS];
	struct counters counters; /* of all but the data threads */
	struct data_thread *data;
	uint32_t nr_fds;
	int fuse_fds[FUSE_MAX_FDS];
	int hurry_fd;       /* tp_fuse_hurry's; -1: not to be had */
	int64_t start_time; /* seconds: the times of all files */
	_Atomic uint32_t next_fd_key;
	_Atomic uint32_t crowded; /* requests overlap: all data threads take them, else the first */
	_Atomic uint32_t stopping;
	_Atomic uint32_t disconnected; /* the kernel ended the connection */
	_Atomic uint32_t running;
	pthread_mutex_t control; /* guards run, stop and the conditions below */
	pthread_cond_t control_changed;
};

static inline void count(_Atomic uint64_t *counter, uint64_t by)
{
	atomic_fetch_add_explicit(counter, by, memory_order_relaxed);
}

/* server_fuse_data.c: body of a data thread; argument is its struct data_thread. */
void *tp_fuse_data_thread(void *argument);
/* Wake one, or all, to look at stopping and at free slots. Any thread. */
void tp_fuse_data_wake(struct data_thread *thread);
void tp_fuse_data_wake_all(struct tp_fuse_server *server);

/* server_fuse_work.c */
int tp_fuse_work_start(struct work_queue *queue, struct tp_fuse_server *server, enum work_kind kind,
		       uint32_t nr_threads, struct tp_error *err);
/* Lets queued work end, then joins. */
void tp_fuse_work_stop(struct work_queue *queue);
void tp_fuse_work_push(struct work_queue *queue, struct slot *slot);
/* Send a decoded request where it belongs by way of threads that may block. */
void tp_fuse_dispatch_slow(struct tp_fuse_server *server, struct slot *slot);

/* server_fuse_reply.c: each answers and frees the slot. error is 0 or -errno. Any thread. */
void tp_fuse_reply(struct tp_fuse_server *server, struct slot *slot, int error, const void *payload,
		   size_t length);
/* For what changes a volume: makes the slot SLOT_DONE first. */
void tp_fuse_reply_done(struct tp_fuse_server *server, struct slot *slot, int error,
			uint32_t written);
/* Answer again what a predecessor had done. */
void tp_fuse_reply_again(struct tp_fuse_server *server, struct slot *slot);
/* After answers, by the thread that gave them: let those who wait for them know now. */
void tp_fuse_hurry(struct tp_fuse_server *server);
/* No answer is wanted, or none can be given. */
void tp_fuse_drop(struct tp_fuse_server *server, struct slot *slot);

/* server_fuse_ops.c: everything but reading and writing data. Answers. */
void tp_fuse_operate(struct tp_fuse_server *server, struct slot *slot);
/* Whether tp_fuse_operate answers that opcode without blocking. */
bool tp_fuse_is_quick(uint32_t opcode);
/* Clamp a READ or WRITE to its file and take a hold of it: fills file, offset, length.
 * Returns 0, or -errno to be answered; length may be 0. */
int tp_fuse_prepare_io(struct tp_fuse_server *server, struct slot *slot);

#endif
