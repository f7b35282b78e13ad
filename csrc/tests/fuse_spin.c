/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a data thread decides to look or to sleep, against a host that is simulated: a request takes
 * so long when it was looked for, and so long when it was slept for, give or take.
 */
#include "check.h"

#include "server_fuse.h"

#define US 1000ll

struct host {
	struct tp_fuse_spin spin;
	uint64_t seed;
	int64_t now;
	bool looks;
};

/* Requests one after another; how many of 1000 were looked for. */
static uint32_t run(struct host *host, uint32_t n, int64_t asleep, int64_t looking)
{
	uint32_t looked = 0, i;

	for (i = 0; i < n; i++) {
		int64_t ns = host->looks ? looking : asleep;

		looked += host->looks;
		/* A fifth either way, and a hiccup of 3 ms now and then. */
		ns += ns * ((int64_t)test_random_below(&host->seed, 41) - 20) / 100;
		if (!test_random_below(&host->seed, 200))
			ns += 3000 * US;
		host->now += ns;
		host->looks = tp_fuse_spin_next(&host->spin, host->now);
	}
	return (uint32_t)((uint64_t)looked * 1000 / n);
}

static struct host new_host(uint64_t seed)
{
	return (struct host){ .seed = seed, .now = US };
}

static void test_looks_where_it_pays(uint64_t seed)
{
	struct host host = new_host(seed);

	run(&host, 1000, 130 * US, 90 * US);
	CHECK(run(&host, 20000, 130 * US, 90 * US) > 850);
}

static void test_sleeps_where_it_gains_nothing(uint64_t seed)
{
	struct host host = new_host(seed);

	run(&host, 1000, 60 * US, 60 * US);
	CHECK(run(&host, 20000, 60 * US, 60 * US) < 150);
	/* Nor where it makes things worse. */
	run(&host, 2000, 60 * US, 75 * US);
	CHECK(run(&host, 20000, 60 * US, 75 * US) < 60);
}

static void test_sleeps_where_the_wait_is_long(uint64_t seed)
{
	struct host host = new_host(seed);

	run(&host, 1000, 9000 * US, 5000 * US);
	CHECK(run(&host, 20000, 9000 * US, 5000 * US) < 10);
}

static void test_changes_its_mind(uint64_t seed)
{
	struct host host = new_host(seed);

	run(&host, 10000, 130 * US, 90 * US);
	run(&host, 4000, 60 * US, 75 * US);
	CHECK(run(&host, 10000, 60 * US, 75 * US) < 60);
	run(&host, 4000, 130 * US, 90 * US);
	CHECK(run(&host, 10000, 130 * US, 90 * US) > 850);
	/* A slow disk, and a fast one again: found out by the few that are tried. */
	run(&host, 4000, 9000 * US, 9000 * US);
	CHECK(run(&host, 10000, 9000 * US, 9000 * US) < 10);
	run(&host, 60000, 130 * US, 90 * US);
	CHECK(run(&host, 10000, 130 * US, 90 * US) > 850);
}

static void test_pauses_and_others_say_nothing(uint64_t seed)
{
	struct host host = new_host(seed);
	struct tp_fuse_spin before;

	run(&host, 5000, 130 * US, 90 * US);
	before = host.spin;
	host.now += 3600000000ll * US;
	(void)tp_fuse_spin_next(&host.spin, host.now);
	CHECK_EQUAL(host.spin.ns[0], before.ns[0]);
	CHECK_EQUAL(host.spin.ns[1], before.ns[1]);
	tp_fuse_spin_interrupt(&host.spin);
	(void)tp_fuse_spin_next(&host.spin, host.now + 50 * US);
	CHECK_EQUAL(host.spin.ns[0], before.ns[0]);
	CHECK_EQUAL(host.spin.ns[1], before.ns[1]);
}

int main(void)
{
	uint64_t seed = test_seed();

	test_looks_where_it_pays(seed);
	test_sleeps_where_it_gains_nothing(seed);
	test_sleeps_where_the_wait_is_long(seed);
	test_changes_its_mind(seed);
	test_pauses_and_others_say_nothing(seed);
	return 0;
}
