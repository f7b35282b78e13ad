/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scripted faults in front of another device. Nothing here is random: a rule says what happens to
 * which operation, and the same sequence of operations meets the same faults.
 *
 * Every rule counts each operation that it matches; it is due from its nth on until it has fired
 * `count` times. Of the rules that are due the first in order of addition acts; the others have
 * then not fired and are due still.
 *
 * It has no descriptor for asynchronous I/O, which would go past it.
 *
 * Thread-safety: one mutex over rules and counters, not held during I/O. Under several threads
 * "nth" is in the order in which operations arrive here.
 */
#include "thinpool/bdev.h"
#include "thinpool/error.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define ALL_OPS (TP_FAULT_READ | TP_FAULT_WRITE | TP_FAULT_FLUSH | TP_FAULT_PUNCH)

struct rule {
	uint32_t ops;
	uint32_t kind;
	uint64_t begin;
	uint64_t end;
	uint64_t nth;
	uint64_t count; /* 0: for ever */
	int32_t host_errno;
	uint64_t arg;
	uint64_t seen;
	uint64_t fired;
};

struct fault_bdev {
	struct tp_bdev bdev;
	struct tp_bdev *below;
	pthread_mutex_t lock;
	struct rule *rules;
	size_t nr_rules;
	uint64_t operations;
	uint64_t fired;
	pthread_cond_t released;
	uint64_t nr_releases;
	uint64_t held; /* operations that wait for a release */
};

static const struct tp_bdev_ops fault_ops;

/* NULL when it is a device of another kind: a caller's mistake that Python can make. */
static struct fault_bdev *as_fault(const struct tp_bdev *bdev)
{
	return bdev->ops == &fault_ops ? (struct fault_bdev *)bdev : NULL;
}

static int matches(const struct rule *rule, uint32_t op, uint64_t offset, uint64_t length)
{
	if (!(rule->ops & op))
		return 0;
	return op == TP_FAULT_FLUSH || (offset < rule->end && offset + length > rule->begin);
}

/* Count the operation; the rule that acts on it, or one of kind 0. */
static struct rule arrive(struct fault_bdev *fault, uint32_t op, uint64_t offset, uint64_t length)
{
	struct rule acting = { 0 };

	pthread_mutex_lock(&fault->lock);
	fault->operations++;
	for (size_t i = 0; i < fault->nr_rules; i++) {
		struct rule *rule = &fault->rules[i];

		if (!matches(rule, op, offset, length))
			continue;
		rule->seen++;
		if (acting.kind || rule->seen < rule->nth ||
		    (rule->count && rule->fired >= rule->count))
			continue;
		rule->fired++;
		fault->fired++;
		acting = *rule;
	}
	pthread_mutex_unlock(&fault->lock);
	return acting;
}

/* Wait until the next release: whoever scripts it sees to one. */
static void hold(struct fault_bdev *fault)
{
	uint64_t seen;

	pthread_mutex_lock(&fault->lock);
	seen = fault->nr_releases;
	fault->held++;
	while (fault->nr_releases == seen)
		pthread_cond_wait(&fault->released, &fault->lock);
	fault->held--;
	pthread_mutex_unlock(&fault->lock);
}

static int scripted(const struct rule *rule, const char *what, uint64_t offset, uint64_t length,
		    struct tp_error *err)
{
	return tp_fail_errno(err, TP_E_IO, rule->host_errno,
			     "scripted fault in a %s of %" PRIu64 " bytes at %" PRIu64, what,
			     length, offset);
}

static void flip(void *buffer, size_t length, uint64_t bit)
{
	bit %= (uint64_t)length * 8;
	((unsigned char *)buffer)[bit / 8] ^= (unsigned char)(1U << bit % 8);
}

static int fault_read(struct tp_bdev *bdev, uint64_t offset, void *buffer, size_t length,
		      struct tp_error *err)
{
	struct fault_bdev *fault = as_fault(bdev);
	struct rule rule = arrive(fault, TP_FAULT_READ, offset, length);
	int status;

	if (rule.kind == TP_FAULT_HOLD)
		hold(fault);
	if (rule.kind == TP_FAULT_ERROR)
		return scripted(&rule, "read", offset, length, err);
	if (rule.kind == TP_FAULT_MISDIRECT)
		offset += rule.arg;
	status = tp_bdev_read(fault->below, offset, buffer, length, err);
	if (!status && rule.kind == TP_FAULT_BIT_FLIP)
		flip(buffer, length, rule.arg);
	return status;
}

/* The first bytes reach the device whatever its alignment: a disk tears by its own units. */
static int write_torn(struct fault_bdev *fault, uint64_t offset, const unsigned char *buffer,
		      size_t length, struct tp_error *err)
{
	size_t align = fault->below->io_align;
	size_t whole = length & ~(align - 1);
	unsigned char *unit;
	int status = tp_bdev_write(fault->below, offset, buffer, whole, err);

	if (status || whole == length)
		return status;
	unit = malloc(align);
	if (!unit)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to tear a write");
	status = tp_bdev_read(fault->below, offset + whole, unit, align, err);
	if (!status) {
		memcpy(unit, buffer + whole, length - whole);
		status = tp_bdev_write(fault->below, offset + whole, unit, align, err);
	}
	free(unit);
	return status;
}

static int write_flipped(struct fault_bdev *fault, uint64_t offset, const void *buffer,
			 size_t length, uint64_t bit, struct tp_error *err)
{
	void *copy = malloc(length);
	int status;

	if (!copy)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory to flip a bit of a write");
	memcpy(copy, buffer, length);
	flip(copy, length, bit);
	status = tp_bdev_write(fault->below, offset, copy, length, err);
	free(copy);
	return status;
}

static int fault_write(struct tp_bdev *bdev, uint64_t offset, const void *buffer, size_t length,
		       struct tp_error *err)
{
	struct fault_bdev *fault = as_fault(bdev);
	struct rule rule = arrive(fault, TP_FAULT_WRITE, offset, length);
	int status;

	switch (rule.kind) {
	case TP_FAULT_ERROR:
		return scripted(&rule, "write", offset, length, err);
	case TP_FAULT_TORN:
		status = write_torn(fault, offset, buffer,
				    rule.arg < length ? (size_t)rule.arg : length, err);
		return status ? status : scripted(&rule, "torn write", offset, length, err);
	case TP_FAULT_BIT_FLIP:
		return write_flipped(fault, offset, buffer, length, rule.arg, err);
	case TP_FAULT_LOST_WRITE:
		return 0;
	case TP_FAULT_MISDIRECT:
		offset += rule.arg;
		break;
	case TP_FAULT_HOLD:
		hold(fault);
		break;
	}
	return tp_bdev_write(fault->below, offset, buffer, length, err);
}

static int fault_flush(struct tp_bdev *bdev, struct tp_error *err)
{
	struct fault_bdev *fault = as_fault(bdev);
	struct rule rule = arrive(fault, TP_FAULT_FLUSH, 0, 0);

	if (rule.kind == TP_FAULT_ERROR)
		return tp_fail_errno(err, TP_E_IO, rule.host_errno, "scripted fault in a flush");
	if (rule.kind == TP_FAULT_DROP_FLUSH)
		return 0;
	if (rule.kind == TP_FAULT_HOLD)
		hold(fault);
	return tp_bdev_flush(fault->below, err);
}

/* Not counted, as nothing is done: scripted faults are those of operations. */
static int fault_check(struct tp_bdev *bdev, struct tp_error *err)
{
	return tp_bdev_check(as_fault(bdev)->below, err);
}

static void fault_start(struct tp_bdev *bdev)
{
	tp_bdev_start(as_fault(bdev)->below);
}

static int fault_punch(struct tp_bdev *bdev, uint64_t offset, uint64_t length, struct tp_error *err)
{
	struct fault_bdev *fault = as_fault(bdev);
	struct rule rule = arrive(fault, TP_FAULT_PUNCH, offset, length);
	uint64_t torn;
	int status;

	switch (rule.kind) {
	case TP_FAULT_ERROR:
		return scripted(&rule, "punch", offset, length, err);
	case TP_FAULT_TORN:
		torn = (rule.arg < length ? rule.arg : length) &
		       ~(uint64_t)(fault->below->io_align - 1);
		status = tp_bdev_punch(fault->below, offset, torn, err);
		return status ? status : scripted(&rule, "torn punch", offset, length, err);
	case TP_FAULT_LOST_WRITE:
		return 0;
	case TP_FAULT_MISDIRECT:
		offset += rule.arg;
		break;
	case TP_FAULT_HOLD:
		hold(fault);
		break;
	}
	return tp_bdev_punch(fault->below, offset, length, err);
}

/* Not counted: it changes nothing that can be read. */
static int fault_allocate(struct tp_bdev *bdev, uint64_t offset, uint64_t length,
			  struct tp_error *err)
{
	return tp_bdev_allocate(as_fault(bdev)->below, offset, length, err);
}

static int fault_resize(struct tp_bdev *bdev, uint64_t size, struct tp_error *err)
{
	return tp_bdev_resize(as_fault(bdev)->below, size, err);
}

static uint64_t fault_size(const struct tp_bdev *bdev)
{
	return tp_bdev_size(as_fault(bdev)->below);
}

static int fault_next_data(struct tp_bdev *bdev, uint64_t offset, uint64_t *begin_ret,
			   uint64_t *end_ret, struct tp_error *err)
{
	return tp_bdev_next_data(as_fault(bdev)->below, offset, begin_ret, end_ret, err);
}

static void fault_close(struct tp_bdev *bdev)
{
	struct fault_bdev *fault = as_fault(bdev);

	pthread_cond_destroy(&fault->released);
	pthread_mutex_destroy(&fault->lock);
	free(fault->rules);
	free(fault);
}

static const struct tp_bdev_ops fault_ops = {
	.name = "fault",
	.read = fault_read,
	.write = fault_write,
	.flush = fault_flush,
	.check = fault_check,
	.start = fault_start,
	.punch = fault_punch,
	.resize = fault_resize,
	.size = fault_size,
	.next_data = fault_next_data,
	.allocate = fault_allocate,
	.close = fault_close,
};

int tp_bdev_fault_open(struct tp_bdev *below, struct tp_bdev **bdev_ret, struct tp_error *err)
{
	struct fault_bdev *fault = calloc(1, sizeof(*fault));

	if (!fault)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for a fault device");
	fault->bdev = *below;
	fault->bdev.ops = &fault_ops;
	fault->bdev.fd = -1;
	fault->below = below;
	pthread_mutex_init(&fault->lock, NULL);
	pthread_cond_init(&fault->released, NULL);
	*bdev_ret = &fault->bdev;
	return 0;
}

/* What each kind can be done to. */
static uint32_t ops_of_kind(uint32_t kind)
{
	switch (kind) {
	case TP_FAULT_ERROR:
	case TP_FAULT_HOLD:
		return ALL_OPS;
	case TP_FAULT_TORN:
	case TP_FAULT_LOST_WRITE:
		return TP_FAULT_WRITE | TP_FAULT_PUNCH;
	case TP_FAULT_DROP_FLUSH:
		return TP_FAULT_FLUSH;
	case TP_FAULT_MISDIRECT:
		return TP_FAULT_READ | TP_FAULT_WRITE | TP_FAULT_PUNCH;
	case TP_FAULT_BIT_FLIP:
		return TP_FAULT_READ | TP_FAULT_WRITE;
	default:
		return 0;
	}
}

int tp_bdev_fault_add(struct tp_bdev *bdev, uint32_t ops, uint32_t kind, uint64_t begin,
		      uint64_t end, uint64_t nth, uint64_t count, int32_t host_errno, uint64_t arg,
		      struct tp_error *err)
{
	struct fault_bdev *fault = as_fault(bdev);
	struct rule rule = {
		.ops = ops,
		.kind = kind,
		.begin = begin,
		.end = end,
		.nth = nth,
		.count = count,
		.host_errno = host_errno ? host_errno : EIO,
		.arg = arg,
	};
	struct rule *rules;

	if (!fault)
		return tp_fail(err, TP_E_INVALID, "not a fault device but a %s one",
			       bdev->ops->name);
	if (!ops || ops & ~ops_of_kind(kind))
		return tp_fail(err, TP_E_INVALID,
			       "a fault of kind %" PRIu32
			       " cannot be done to operations 0x%" PRIx32,
			       kind, ops);
	if (begin >= end || !nth)
		return tp_fail(err, TP_E_INVALID, "a rule begins before its end and counts from 1");
	pthread_mutex_lock(&fault->lock);
	rules = realloc(fault->rules, (fault->nr_rules + 1) * sizeof(*rules));
	if (rules) {
		rules[fault->nr_rules++] = rule;
		fault->rules = rules;
	}
	pthread_mutex_unlock(&fault->lock);
	return rules ? 0 : tp_fail(err, TP_E_NO_MEMORY, "no memory for a rule");
}

void tp_bdev_fault_clear(struct tp_bdev *bdev)
{
	struct fault_bdev *fault = as_fault(bdev);

	if (!fault)
		return;
	pthread_mutex_lock(&fault->lock);
	fault->nr_rules = 0;
	pthread_mutex_unlock(&fault->lock);
}

static uint64_t counter(const struct tp_bdev *bdev, const uint64_t *value)
{
	struct fault_bdev *fault = as_fault(bdev);
	uint64_t found;

	pthread_mutex_lock(&fault->lock);
	found = *value;
	pthread_mutex_unlock(&fault->lock);
	return found;
}

uint64_t tp_bdev_fault_operations(const struct tp_bdev *bdev)
{
	struct fault_bdev *fault = as_fault(bdev);

	return fault ? counter(bdev, &fault->operations) : 0;
}

uint64_t tp_bdev_fault_fired(const struct tp_bdev *bdev)
{
	struct fault_bdev *fault = as_fault(bdev);

	return fault ? counter(bdev, &fault->fired) : 0;
}

uint64_t tp_bdev_fault_held(const struct tp_bdev *bdev)
{
	struct fault_bdev *fault = as_fault(bdev);

	return fault ? counter(bdev, &fault->held) : 0;
}

void tp_bdev_fault_release(struct tp_bdev *bdev)
{
	struct fault_bdev *fault = as_fault(bdev);

	if (!fault)
		return;
	pthread_mutex_lock(&fault->lock);
	fault->nr_releases++;
	pthread_cond_broadcast(&fault->released);
	pthread_mutex_unlock(&fault->lock);
}
