/* How long a loop looks for work before it sleeps, and when it should not look at all. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "mic/barrier.h"
#include "mic/vring.h"

#define CENSUS_NS       2000000u  /* how old the count of runnable threads may be ... */
#define CENSUS_MAX_NS   64000000u /* ... and up to this after counts that found too many */
#define SPIN_FIRST_NS   8000u     /* the window after the first short sleep; it doubles from there */
#define SPINS_PER_CHECK 16u       /* successful spins between two looks at the preemption count */
#define PENALTY_MIN_NS  1000000u  /* closed for this long after the first preemption ... */
#define PENALTY_MAX_NS  64000000u /* ... doubling up to this */

uint64_t mic_now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static uint64_t preemptions(void)
{
	struct rusage ru;

	return getrusage(RUSAGE_THREAD, &ru) < 0 ? 0 : (uint64_t)ru.ru_nivcsw;
}

/* Threads that want a CPU now, on the whole machine; 0 when the kernel does not say. */
static unsigned runnable_threads(void)
{
	char text[128];
	int fd = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return 0;
	ssize_t n = read(fd, text, sizeof text - 1);

	close(fd);
	if (n <= 0)
		return 0;
	text[n] = 0;
	const char *p = text;

	for (int field = 0; field < 3 && p; field++) {
		p = strchr(p, ' ');
		p = p ? p + 1 : NULL;
	}
	return p ? (unsigned)strtoul(p, NULL, 10) : 0;
}

static unsigned usable_cpus(void)
{
	cpu_set_t set;

	return sched_getaffinity(0, sizeof set, &set) < 0 ? 1 : (unsigned)CPU_COUNT(&set);
}

static bool spin_allowed(uint64_t now)
{
	/* Of this process; a lost race between threads only counts twice. */
	static uint64_t next_ns, pause_ns = CENSUS_NS;
	static uint32_t allowed;

	if (now < mic_load_relaxed(&next_ns))
		return mic_load_relaxed(&allowed);
	long online = sysconf(_SC_NPROCESSORS_ONLN);
	bool ok = usable_cpus() > 1 && runnable_threads() <= (unsigned)(online > 0 ? online : 1);
	uint64_t pause = mic_load_relaxed(&pause_ns);

	/* Crowded: stay away longer each time, or the crowd would be counted without us and we came back. */
	pause = ok ? CENSUS_NS : pause < CENSUS_MAX_NS ? pause * 2 : pause;
	mic_store_relaxed(&pause_ns, pause);
	mic_store_relaxed(&allowed, ok);
	mic_store_relaxed(&next_ns, now + pause);
	return ok;
}

bool mic_spin_allowed(void)
{
	return spin_allowed(mic_now_ns());
}

uint64_t mic_spin_until(struct mic_spin *s, unsigned max_us)
{
	if (!max_us || !s->window_ns)
		return 0;
	uint64_t now = mic_now_ns();

	return now >= s->closed_ns && spin_allowed(now) ? now + s->window_ns : 0;
}

void mic_spin_done(struct mic_spin *s, bool hit)
{
	s->spins++;
	if (hit && s->spins < SPINS_PER_CHECK)
		return;
	uint64_t count = preemptions();
	bool crowded = count - s->preempted > s->spins / 4;

	s->preempted = count;
	s->spins = 0;
	if (!crowded) {
		s->penalty_ns = 0;
		return;
	}
	s->penalty_ns = s->penalty_ns ? s->penalty_ns * 2 : PENALTY_MIN_NS;
	if (s->penalty_ns > PENALTY_MAX_NS)
		s->penalty_ns = PENALTY_MAX_NS;
	s->closed_ns = mic_now_ns() + s->penalty_ns;
}

void mic_spin_missed(struct mic_spin *s)
{
	mic_spin_done(s, false);
}

void mic_spin_sleeping(struct mic_spin *s)
{
	s->slept_ns = mic_now_ns();
}

void mic_spin_woke(struct mic_spin *s, unsigned max_us)
{
	uint32_t max_ns = max_us * 1000;
	uint64_t slept = mic_now_ns() - s->slept_ns;

	/* A sleep shorter than the longest spin would have been a hit (waking itself costs 30 us). */
	if (slept < max_ns + 30000u)
		s->window_ns = s->window_ns ? s->window_ns * 2 : SPIN_FIRST_NS;
	else
		s->window_ns = s->window_ns >= SPIN_FIRST_NS ? s->window_ns / 2 : 0;
	if (s->window_ns > max_ns)
		s->window_ns = max_ns;
	s->slept_ns = 0;
}
