/* SPDX-License-Identifier: Apache-2.0 */
/* All requests but READ, WRITE, FSYNC and FALLOCATE, whose work is with data. */
#include "server_fuse.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define NAME_MAX_LENGTH 16 /* "id-16777215" */
#define FILE_MODE       0600u
/* Directory offsets: 1 and 2 stand behind "." and "..", FIRST_OFFSET + id behind a file. */
#define FIRST_OFFSET 3u

/* The id of "id-N", or FUSE_NR_IDS: N is decimal and has no leading zeros. */
static uint32_t parse_name(const char *name)
{
	uint32_t id = 0;
	const char *p = name + 3;

	if (strncmp(name, "id-", 3) != 0 || !*p || (*p == '0' && p[1]))
		return FUSE_NR_IDS;
	for (; *p; p++) {
		if (*p < '0' || *p > '9')
			return FUSE_NR_IDS;
		id = id * 10 + (uint32_t)(*p - '0');
		if (id >= FUSE_NR_IDS)
			return FUSE_NR_IDS;
	}
	return id;
}

static void fill_common(const struct tp_fuse_server *server, uint64_t nodeid,
			struct fuse_attr *attr)
{
	memset(attr, 0, sizeof(*attr));
	attr->ino = nodeid;
	attr->atime = attr->mtime = attr->ctime = (uint64_t)server->start_time;
	attr->uid = geteuid();
	attr->gid = getegid();
	/* Not the pool's: kernels derive the size of cached pages from it. */
	attr->blksize = FUSE_PAGE;
}

static void fill_root(const struct tp_fuse_server *server, struct fuse_attr *attr)
{
	fill_common(server, FUSE_ROOT_ID, attr);
	attr->mode = S_IFDIR | 0755;
	attr->nlink = 2;
}

/* Blocks: the mapped amount is in the metadata. */
static void fill_file(const struct tp_fuse_server *server, struct tp_fuse_file *file,
		      struct fuse_attr *attr)
{
	fill_common(server, file->id + FUSE_FIRST_NODE, attr);
	attr->mode = S_IFREG | FILE_MODE;
	attr->nlink = 1;
	attr->size = file->ops->size(file->target);
	attr->blocks = file->ops->mapped(server->pool, file->target) / 512;
}

/* No name or attribute is cached: files come, go and are resized, and nobody walks here often. */
static void fill_entry(const struct tp_fuse_server *server, struct tp_fuse_file *file,
		       struct fuse_entry_out *entry)
{
	memset(entry, 0, sizeof(*entry));
	entry->nodeid = file->id + FUSE_FIRST_NODE;
	fill_file(server, file, &entry->attr);
}

static void do_init(struct tp_fuse_server *server, struct slot *slot)
{
	const struct fuse_init_in *in = slot->request.arg;
	struct fuse_init_out out;
	int error;

	error = tp_fuse_negotiate(in, (uint16_t)server->options.max_background, &out);
	if (!error && in->major == FUSE_KERNEL_VERSION)
		tp_fuse_slots_set_minor(&server->slots, out.minor);
	tp_fuse_reply(server, slot, error, &out, sizeof(out));
}

static void do_lookup(struct tp_fuse_server *server, struct slot *slot)
{
	uint32_t id = parse_name(slot->request.name);
	struct fuse_entry_out entry;
	struct tp_fuse_file *file;

	file = slot->header->nodeid == FUSE_ROOT_ID && id < FUSE_NR_IDS
		       ? tp_fuse_files_get(&server->files, (uint64_t)id + FUSE_FIRST_NODE)
		       : NULL;
	if (!file) {
		tp_fuse_reply(server, slot, -ENOENT, NULL, 0);
		return;
	}
	fill_entry(server, file, &entry);
	tp_fuse_files_put(&server->files, file);
	tp_fuse_reply(server, slot, 0, &entry, sizeof(entry));
}

/* -ENOENT where nothing is served under that nodeid. */
static int attributes_of(struct tp_fuse_server *server, uint64_t nodeid, struct fuse_attr_out *out)
{
	struct tp_fuse_file *file;

	memset(out, 0, sizeof(*out));
	if (nodeid == FUSE_ROOT_ID) {
		fill_root(server, &out->attr);
		return 0;
	}
	file = tp_fuse_files_get(&server->files, nodeid);
	if (!file)
		return -ENOENT;
	fill_file(server, file, &out->attr);
	tp_fuse_files_put(&server->files, file);
	return 0;
}

static void do_getattr(struct tp_fuse_server *server, struct slot *slot)
{
	struct fuse_attr_out out;
	int error = attributes_of(server, slot->header->nodeid, &out);

	tp_fuse_reply(server, slot, error, &out, sizeof(out));
}

/* What changes nothing is allowed: times are not kept, so setting them is no lie that matters. */
static int check_setattr(const struct fuse_setattr_in *in, const struct fuse_attr *attr)
{
	if ((in->valid & FATTR_SIZE) && in->size != attr->size)
		return -EPERM;
	if ((in->valid & FATTR_MODE) && (in->mode & 07777) != (attr->mode & 07777))
		return -EPERM;
	if ((in->valid & FATTR_UID) && in->uid != attr->uid)
		return -EPERM;
	if ((in->valid & FATTR_GID) && in->gid != attr->gid)
		return -EPERM;
	return 0;
}

static void do_setattr(struct tp_fuse_server *server, struct slot *slot)
{
	struct fuse_attr_out out;
	int error = attributes_of(server, slot->header->nodeid, &out);

	if (!error)
		error = check_setattr(slot->request.arg, &out.attr);
	tp_fuse_reply(server, slot, error, &out, sizeof(out));
}

static void do_open(struct tp_fuse_server *server, struct slot *slot)
{
	const struct fuse_open_in *in = slot->request.arg;
	struct fuse_open_out out = {
		.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES,
	};
	struct tp_fuse_file *file = tp_fuse_files_get(&server->files, slot->header->nodeid);
	int error = file ? 0 : -ENOENT;

	if (file) {
		out.fh = file->generation;
		if (file->read_only && (in->flags & O_ACCMODE) != O_RDONLY)
			error = -EROFS;
		tp_fuse_files_put(&server->files, file);
	}
	tp_fuse_reply(server, slot, error, &out, sizeof(out));
}

static void do_opendir(struct tp_fuse_server *server, struct slot *slot)
{
	struct fuse_open_out out = { 0 };

	tp_fuse_reply(server, slot, slot->header->nodeid == FUSE_ROOT_ID ? 0 : -ENOTDIR, &out,
		      sizeof(out));
}

struct listing {
	struct tp_fuse_server *server;
	unsigned char *buffer;
	size_t size, used;
	bool plus;
};

/* False when it does not fit. file is NULL for "." and "..". */
static bool list_entry(struct listing *listing, const char *name, uint64_t nodeid, uint32_t type,
		       uint64_t next_offset, struct tp_fuse_file *file)
{
	size_t fixed = listing->plus ? FUSE_NAME_OFFSET_DIRENTPLUS : FUSE_NAME_OFFSET;
	size_t length = strlen(name);
	size_t whole = FUSE_DIRENT_ALIGN(fixed + length);
	unsigned char *at = listing->buffer + listing->used;
	struct fuse_dirent *entry;

	if (listing->size - listing->used < whole)
		return false;
	memset(at, 0, whole);
	/* nodeid 0 in the entry: the kernel makes no inode of "." and "..". */
	if (listing->plus && file)
		fill_entry(listing->server, file, (struct fuse_entry_out *)at);
	entry = listing->plus ? &((struct fuse_direntplus *)at)->dirent : (struct fuse_dirent *)at;
	entry->ino = nodeid;
	entry->off = next_offset;
	entry->namelen = (uint32_t)length;
	entry->type = type;
	memcpy(entry->name, name, length);
	listing->used += whole;
	return true;
}

static void list_files(struct listing *listing, uint32_t id)
{
	struct files *files = &listing->server->files;
	char name[NAME_MAX_LENGTH];
	struct tp_fuse_file *file;
	bool fits = true;

	for (id = tp_fuse_files_next(files, id); fits && id < FUSE_NR_IDS;
	     id = tp_fuse_files_next(files, id + 1)) {
		file = tp_fuse_files_get(files, (uint64_t)id + FUSE_FIRST_NODE);
		if (!file)
			continue;
		snprintf(name, sizeof(name), "id-%u", id);
		fits = list_entry(listing, name, (uint64_t)id + FUSE_FIRST_NODE, S_IFREG >> 12,
				  (uint64_t)id + FIRST_OFFSET, file);
		tp_fuse_files_put(files, file);
	}
}

static void do_readdir(struct tp_fuse_server *server, struct slot *slot)
{
	const struct fuse_read_in *in = slot->request.arg;
	struct listing listing = {
		.server = server,
		.buffer = slot->data,
		.size = in->size < FUSE_MAX_IO ? in->size : FUSE_MAX_IO,
		.plus = slot->header->opcode == FUSE_READDIRPLUS,
	};
	uint64_t offset = in->offset;
	bool fits = true;

	if (slot->header->nodeid != FUSE_ROOT_ID) {
		tp_fuse_reply(server, slot, -ENOTDIR, NULL, 0);
		return;
	}
	if (offset < 1)
		fits = list_entry(&listing, ".", FUSE_ROOT_ID, S_IFDIR >> 12, 1, NULL);
	if (fits && offset < 2)
		fits = list_entry(&listing, "..", FUSE_ROOT_ID, S_IFDIR >> 12, 2, NULL);
	if (offset < FIRST_OFFSET)
		offset = FIRST_OFFSET - 1;
	/* The offset behind a file is FIRST_OFFSET + id: go on with the id after it. */
	if (fits && offset - (FIRST_OFFSET - 1) < FUSE_NR_IDS)
		list_files(&listing, (uint32_t)(offset - (FIRST_OFFSET - 1)));
	tp_fuse_reply(server, slot, 0, listing.buffer, listing.used);
}

static void do_statfs(struct tp_fuse_server *server, struct slot *slot)
{
	struct fuse_statfs_out out;

	memset(&out, 0, sizeof(out));
	out.st.bsize = out.st.frsize = server->options.block_size;
	out.st.namelen = NAME_MAX_LENGTH;
	out.st.files = server->files.nr_active;
	if (server->pool)
		tp_fuse_pool_statfs(server->pool, &out.st);
	tp_fuse_reply(server, slot, 0, &out, sizeof(out));
}

/* SEEK_DATA and SEEK_HOLE; the others never reach a server. Past the end: ENXIO. */
static int seek(struct tp_fuse_file *file, uint64_t offset, uint32_t whence, uint64_t *found_ret)
{
	uint64_t size = file->ops->size(file->target);
	uint64_t begin, end;
	struct tp_error err = { 0 };
	int status;

	if (whence != SEEK_DATA && whence != SEEK_HOLE)
		return -EINVAL;
	if (offset >= size)
		return -ENXIO;
	*found_ret = offset;
	for (;;) {
		status = file->ops->next_data(file->target, *found_ret, &begin, &end, &err);
		if (status == TP_E_KEY_NOT_FOUND)
			return whence == SEEK_DATA ? -ENXIO : 0;
		if (status)
			return -tp_fuse_errno(status, err.host_errno);
		if (whence == SEEK_DATA) {
			*found_ret = begin > *found_ret ? begin : *found_ret;
			return 0;
		}
		if (begin > *found_ret)
			return 0;
		/* The end of the file counts as a hole. Stretches may touch: look on. */
		*found_ret = end;
		if (end >= size) {
			*found_ret = size;
			return 0;
		}
	}
}

static void do_lseek(struct tp_fuse_server *server, struct slot *slot)
{
	const struct fuse_lseek_in *in = slot->request.arg;
	struct fuse_lseek_out out = { 0 };
	struct tp_fuse_file *file = tp_fuse_files_get(&server->files, slot->header->nodeid);
	int error = -ENOENT;

	if (file) {
		error = in->fh == file->generation ? seek(file, in->offset, in->whence, &out.offset)
						   : -ESTALE;
		tp_fuse_files_put(&server->files, file);
	}
	tp_fuse_reply(server, slot, error, &out, sizeof(out));
}

bool tp_fuse_is_quick(uint32_t opcode)
{
	switch (opcode) {
	case FUSE_LOOKUP:
	case FUSE_GETATTR:
	case FUSE_SETATTR:
	case FUSE_READDIR:
	case FUSE_READDIRPLUS:
	case FUSE_STATFS:
	case FUSE_LSEEK:
	case FUSE_READ:
	case FUSE_WRITE:
	case FUSE_FSYNC:
	case FUSE_FALLOCATE:
		return false;
	default:
		return true;
	}
}

static int refusal(uint32_t opcode)
{
	switch (opcode) {
	case FUSE_SYMLINK:
	case FUSE_MKNOD:
	case FUSE_MKDIR:
	case FUSE_UNLINK:
	case FUSE_RMDIR:
	case FUSE_RENAME:
	case FUSE_RENAME2:
	case FUSE_LINK:
	case FUSE_CREATE:
		return -EPERM;
	case FUSE_READLINK:
		return -EINVAL;
	default:
		return -ENOSYS; /* the kernel remembers it, or falls back */
	}
}

void tp_fuse_operate(struct tp_fuse_server *server, struct slot *slot)
{
	switch (slot->header->opcode) {
	case FUSE_INIT:
		do_init(server, slot);
		break;
	case FUSE_LOOKUP:
		do_lookup(server, slot);
		break;
	case FUSE_GETATTR:
		do_getattr(server, slot);
		break;
	case FUSE_SETATTR:
		do_setattr(server, slot);
		break;
	case FUSE_OPEN:
		do_open(server, slot);
		break;
	case FUSE_OPENDIR:
		do_opendir(server, slot);
		break;
	case FUSE_READDIR:
	case FUSE_READDIRPLUS:
		do_readdir(server, slot);
		break;
	case FUSE_STATFS:
		do_statfs(server, slot);
		break;
	case FUSE_LSEEK:
		do_lseek(server, slot);
		break;
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
	case FUSE_INTERRUPT:
		tp_fuse_drop(server, slot);
		break;
	case FUSE_FLUSH: /* at each close(): a disk does not flush there either */
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
	case FUSE_FSYNCDIR:
	case FUSE_ACCESS: /* the kernel checked: default_permissions */
	case FUSE_DESTROY:
		tp_fuse_reply(server, slot, 0, NULL, 0);
		break;
	default:
		tp_fuse_reply(server, slot, refusal(slot->header->opcode), NULL, 0);
		break;
	}
}

int tp_fuse_prepare_io(struct tp_fuse_server *server, struct slot *slot)
{
	/* struct fuse_write_in begins like struct fuse_read_in: fh, offset, size. */
	const struct fuse_read_in *in = slot->request.arg;
	bool write = slot->header->opcode == FUSE_WRITE;
	struct tp_fuse_file *file = tp_fuse_files_get(&server->files, slot->header->nodeid);
	uint64_t size;
	int error = 0;

	if (!file)
		return -EIO;
	size = file->ops->size(file->target);
	slot->offset = in->offset;
	slot->length = in->size;
	if (in->fh != file->generation)
		error = -ESTALE;
	else if (write && file->read_only)
		error = -EROFS;
	else if (slot->length > FUSE_MAX_IO)
		error = -EINVAL;
	else if (slot->offset >= size && write && slot->length)
		error = -ENOSPC; /* as at the end of a disk */
	if (error) {
		tp_fuse_files_put(&server->files, file);
		return error;
	}
	if (slot->offset >= size)
		slot->length = 0;
	else if (slot->length > size - slot->offset)
		slot->length = (uint32_t)(size - slot->offset);
	slot->file = file;
	return 0;
}
_Static_assert(offsetof(struct fuse_read_in, offset) == offsetof(struct fuse_write_in, offset) &&
		       offsetof(struct fuse_read_in, size) == offsetof(struct fuse_write_in, size),
	       "READ and WRITE begin alike");
