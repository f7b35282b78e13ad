/* SPDX-License-Identifier: Apache-2.0 */
/* A team of threads that run one job together, and memory that costs what is touched. */
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "thinpool/error.h"
#include "thinpool/walk.h"

#define PAGE      UINT64_C(4096) /* no larger than the system's */
#define HUGE_PAGE (UINT64_C(2) << 20)

void *tp_walk_map(uint64_t bytes)
{
	void *memory;

	if (bytes > PTRDIFF_MAX)
		return NULL;
	memory = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return memory == MAP_FAILED ? NULL : memory;
}

/* Aligned to huge pages and asked to be in them, which the system may refuse without harm. */
void *tp_walk_map_dense(uint64_t bytes)
{
	uint64_t lead, rest;
	uint8_t *memory;

	if (bytes < HUGE_PAGE || bytes > PTRDIFF_MAX - HUGE_PAGE)
		return tp_walk_map(bytes);
	bytes = (bytes + PAGE - 1) / PAGE * PAGE;
	memory = tp_walk_map(bytes + HUGE_PAGE);
	if (!memory)
		return NULL;
	lead = -(uintptr_t)memory % HUGE_PAGE;
	rest = HUGE_PAGE - lead;
	if (lead)
		munmap(memory, lead);
	if (rest)
		munmap(memory + lead + bytes, rest);
	madvise(memory + lead, bytes, MADV_HUGEPAGE);
	return memory + lead;
}

void tp_walk_touch(void *memory, uint64_t bytes)
{
	volatile uint8_t *touched = memory;

	/* By the small page, since whether it is in huge ones is the system's to say. */
	for (uint64_t at = 0; at < bytes; at += PAGE)
		touched[at] = 0;
}

void tp_walk_unmap(void *memory, uint64_t bytes)
{
	if (memory)
		munmap(memory, bytes ? bytes : 1);
}

struct tp_walk_team {
	pthread_mutex_t lock;
	pthread_cond_t work;
	pthread_cond_t idle;
	tp_walk_job job;
	void *argument;
	uint64_t round; /* of the job: a thread runs each round once */
	unsigned size;
	unsigned nr_running;
	unsigned nr_started; /* threads beside the caller: when there is work for them */
	unsigned next_number;
	bool stop;
	pthread_t threads[TP_WALK_THREADS_MAX];
};

static void *member(void *argument)
{
	struct tp_walk_team *team = argument;
	uint64_t seen = 0;
	unsigned number;

	pthread_mutex_lock(&team->lock);
	number = ++team->next_number;
	for (;;) {
		while (team->round == seen && !team->stop)
			pthread_cond_wait(&team->work, &team->lock);
		if (team->stop)
			break;
		seen = team->round;
		pthread_mutex_unlock(&team->lock);
		team->job(team->argument, number);
		pthread_mutex_lock(&team->lock);
		if (--team->nr_running == 0)
			pthread_cond_signal(&team->idle);
	}
	pthread_mutex_unlock(&team->lock);
	return NULL;
}

int tp_walk_team_create(unsigned nr_threads, struct tp_walk_team **team_ret, struct tp_error *err)
{
	struct tp_walk_team *team;

	if (nr_threads < 1 || nr_threads > TP_WALK_THREADS_MAX)
		return tp_fail(err, TP_E_INVALID, "%u threads: wanted 1 to %u", nr_threads,
			       TP_WALK_THREADS_MAX);
	team = calloc(1, sizeof(*team));
	if (!team)
		return tp_fail(err, TP_E_NO_MEMORY, "no memory for %u threads", nr_threads);
	team->size = nr_threads;
	pthread_mutex_init(&team->lock, NULL);
	pthread_cond_init(&team->work, NULL);
	pthread_cond_init(&team->idle, NULL);
	*team_ret = team;
	return 0;
}

void tp_walk_team_destroy(struct tp_walk_team *team)
{
	if (!team)
		return;
	pthread_mutex_lock(&team->lock);
	team->stop = true;
	pthread_cond_broadcast(&team->work);
	pthread_mutex_unlock(&team->lock);
	for (unsigned i = 0; i < team->nr_started; i++)
		pthread_join(team->threads[i], NULL);
	pthread_cond_destroy(&team->idle);
	pthread_cond_destroy(&team->work);
	pthread_mutex_destroy(&team->lock);
	free(team);
}

unsigned tp_walk_team_size(const struct tp_walk_team *team)
{
	return team->size;
}

/* Under lock, so that each new one finds this round. Those that the system refuses are not missed:
 * jobs share their work out as it comes. */
static void start_all(struct tp_walk_team *team)
{
	while (team->nr_started < team->size - 1 &&
	       !pthread_create(&team->threads[team->nr_started], NULL, member, team))
		team->nr_started++;
}

void tp_walk_team_run(struct tp_walk_team *team, tp_walk_job job, void *argument)
{
	pthread_mutex_lock(&team->lock);
	TP_ASSERT(team->nr_running == 0);
	start_all(team);
	team->job = job;
	team->argument = argument;
	team->nr_running = team->nr_started;
	team->round++;
	pthread_cond_broadcast(&team->work);
	pthread_mutex_unlock(&team->lock);
	job(argument, 0);
	pthread_mutex_lock(&team->lock);
	while (team->nr_running)
		pthread_cond_wait(&team->idle, &team->lock);
	pthread_mutex_unlock(&team->lock);
}
