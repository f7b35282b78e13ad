/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whether a data thread keeps looking for what comes next, or sleeps until it is told.
 *
 * On an idle processor each wake-up waits for the processor itself, which in a virtual machine
 * takes tens of microseconds: the hypervisor has taken it away. A thread that keeps looking keeps
 * it. What that gains differs from host to host and from load to load, so it is measured where
 * requests come one by one: from one to the next, which has everything in it. Looking is what is
 * done as long as it makes that shorter by a share of 1 / PAYS_SHARE. Of every EXPLORE requests a
 * few are done the other way.
 */
#include "server_fuse.h"

#define PAYS_SHARE 10
#define EXPLORE    512u
#define BLOCK      16u /* requests in a row that are done the other way */
#define SETTLE     4u  /* of them, those that only change over */
#define SELDOM     16u /* where looking cannot pay, only every so many times */
#define FIRST      32u /* samples of each way before anything is decided */
#define WEIGHT     32  /* of the past, against one sample */
#define WEIGHT_FEW 8   /* where samples are few */
#define CLIP       2   /* times the mean: one hiccup is no opinion */
#define LONG_NS    200000ll
#define PAUSE_NS   100000000ll /* nobody asked for anything: no sample */

static bool can_pay(const struct tp_fuse_spin *spin)
{
	return spin->ns[1] < LONG_NS;
}

static bool pays(const struct tp_fuse_spin *spin)
{
	return can_pay(spin) && spin->ns[0] - spin->ns[1] > spin->ns[0] / PAYS_SHARE;
}

static bool choose(const struct tp_fuse_spin *spin)
{
	uint32_t at = spin->requests % EXPLORE;
	bool best = pays(spin);

	if (spin->nr[0] < FIRST || spin->nr[1] < FIRST)
		return spin->nr[0] >= FIRST;
	if (at >= BLOCK || (!can_pay(spin) && spin->requests / EXPLORE % SELDOM))
		return best;
	return !best;
}

static void sample(struct tp_fuse_spin *spin, int64_t ns)
{
	int64_t *mean = &spin->ns[spin->looks];
	bool few = spin->nr[spin->looks] < FIRST || spin->requests % EXPLORE < BLOCK;

	if (spin->nr[spin->looks] < FIRST)
		spin->nr[spin->looks]++;
	if (!*mean)
		*mean = ns;
	ns = ns < CLIP * *mean ? ns : CLIP * *mean;
	*mean += (ns - *mean) / (few ? WEIGHT_FEW : WEIGHT);
}

bool tp_fuse_spin_next(struct tp_fuse_spin *spin, int64_t now_ns)
{
	int64_t ns = now_ns - spin->last_ns;
	bool looks;

	if (spin->last_ns && spin->in_a_row >= SETTLE && ns < PAUSE_NS)
		sample(spin, ns);
	spin->last_ns = now_ns;
	spin->requests++;
	spin->in_a_row++;
	looks = choose(spin);
	if (looks != spin->looks)
		spin->in_a_row = 0;
	spin->looks = looks;
	return looks;
}

void tp_fuse_spin_interrupt(struct tp_fuse_spin *spin)
{
	spin->last_ns = 0;
}
