/* Waiting in shared memory: spinning, sleeping, locks that survive their holder's death. */
#include "internal.h"

#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif

struct waitv { /* struct futex_waitv of newer headers */
	uint64_t val, uaddr;
	uint32_t flags, reserved;
};
#define WAITV_U32 2u

struct moment {
	uint64_t ns, ticks;
};

/* Both clocks at once: of a few readings the one between whose halves the least happened. A thread that loses
 * its CPU there would take a wrong rate along for the life of the process. */
static struct moment both_clocks(void)
{
	struct moment best = {0};
	uint64_t least = UINT64_MAX;

	for (int i = 0; i < 5; i++) {
		struct timespec t;
		uint64_t before = mic_timestamp();

		clock_gettime(CLOCK_MONOTONIC, &t);
		uint64_t took = mic_timestamp() - before;

		if (took >= least)
			continue;
		least = took;
		best = (struct moment){(uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec,
				       before + took / 2};
	}
	return best;
}

uint64_t ticks_per_us(void)
{
	static uint64_t ticks;
	uint64_t known = mic_load_relaxed(&ticks);

	if (known)
		return known;
	struct moment a = both_clocks(), b;

	do /* 50 us, once in a process */
		b = both_clocks();
	while (b.ns - a.ns < 50000);
	known = (b.ticks - a.ticks) * 1000 / (b.ns - a.ns);
	mic_store_relaxed(&ticks, known ? known : 1);
	return known ? known : 1;
}

bool spin_allowed(void)
{
	static uint32_t cached; /* 1 no, 2 yes */
	uint32_t c = mic_load_relaxed(&cached);

	if (!c) {
		cpu_set_t set;

		c = sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) < 2 &&
				    sysconf(_SC_NPROCESSORS_ONLN) < 2
			    ? 1
			    : 2;
		mic_store_relaxed(&cached, c);
	}
	return c == 2;
}

bool node_dead(struct ep *ep)
{
	return mic_load_acquire((const uint32_t *)(const void *)ep->life->alive) & FUTEX_OWNER_DIED;
}

/* The kernel wakes one sleeper of a dead node's lock; it wakes the others. */
static int report_death(struct ep *ep)
{
	(void)syscall(SYS_futex, ep->life->alive, FUTEX_WAKE, 1 << 30, NULL, NULL, 0);
	return -ENODEV;
}

int sleep_on(struct ep *ep, uint32_t *word, uint32_t seen)
{
	static uint32_t refused; /* before Linux 5.16, or by a tool or filter that does not know the call */
	const uint32_t *alive = (const uint32_t *)(const void *)ep->life->alive;
	uint32_t owner = mic_load_acquire(alive);
	struct waitv w[2] = {{seen, (uint64_t)(uintptr_t)word, WAITV_U32, 0},
			     {owner, (uint64_t)(uintptr_t)alive, WAITV_U32, 0}};
	int saved = errno, rc = 0;

	if (owner & FUTEX_OWNER_DIED)
		return report_death(ep);
	/* Without a time-out both calls are restarted after a handler with SA_RESTART (SCIF 2.7). */
	if (!mic_load_relaxed(&refused)) {
		rc = syscall(SYS_futex_waitv, w, 2, 0, NULL, 0) < 0 ? errno : 0;
		if (rc == ENOSYS || rc == EPERM)
			mic_store_relaxed(&refused, 1u);
	}
	if (mic_load_relaxed(&refused))
		rc = syscall(SYS_futex, word, FUTEX_WAIT, seen, NULL, NULL, 0) < 0 ? errno : 0;
	errno = saved;
	if (node_dead(ep))
		return report_death(ep);
	return rc == EINTR ? -EINTR : 0;
}

void lock(uint64_t *words)
{
	pthread_mutex_t *m = (pthread_mutex_t *)(void *)words;

	/* A holder that died in the middle of a copy leaves the positions as before it. */
	if (pthread_mutex_lock(m) == EOWNERDEAD)
		pthread_mutex_consistent(m);
}

bool try_lock(uint64_t *words)
{
	pthread_mutex_t *m = (pthread_mutex_t *)(void *)words;
	int rc = pthread_mutex_trylock(m);

	if (rc == EOWNERDEAD)
		rc = pthread_mutex_consistent(m);
	return rc == 0;
}

void unlock(uint64_t *words)
{
	pthread_mutex_unlock((pthread_mutex_t *)(void *)words);
}

void copy_out(struct ep *ep, uint32_t gen)
{
	struct mic_scif_notify *page = ep->own_notify;

	mic_fetch_add(&ep->ctl->busy[gen % MIC_SCIF_GENS], -1);
	/* Pairs with the node, which sets drain, then reads the counts. */
	if (!mic_load_seq_cst(&ep->ctl->drain) || !mic_exchange(&ep->ctl->drain, 0u))
		return;
	mic_store_release(&page->left, 1u);
	mic_fetch_add(&page->seq, 1);
	(void)syscall(SYS_futex, &page->seq, FUTEX_WAKE, 1 << 30, NULL, NULL, 0);
}
