/* The rate of the time stamp counter, as libscif measures it once in a process. */
#define _GNU_SOURCE
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../libscif/wait.c"
#include "harness.h"

#define LOST_NS 3000000

static unsigned reading, lost_at;
static bool lost_before;

static void lose_the_cpu(void)
{
	const struct timespec t = {.tv_nsec = LOST_NS};

	syscall(SYS_nanosleep, &t, NULL);
}

/* In the place of libc's: one of the readings meets another thread that takes the CPU. */
int clock_gettime(clockid_t clock, struct timespec *t)
{
	bool lost = ++reading == lost_at;

	if (lost && lost_before)
		lose_the_cpu();
	int rc = (int)syscall(SYS_clock_gettime, clock, t);

	if (lost && !lost_before)
		lose_the_cpu();
	return rc;
}

static uint64_t rate(void)
{
	struct timespec a, b;

	syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &a);
	uint64_t from = mic_timestamp();

	for (int i = 0; i < 10; i++)
		lose_the_cpu();
	syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &b);
	return (mic_timestamp() - from) * 1000 /
	       ((uint64_t)(b.tv_sec - a.tv_sec) * 1000000000u + (uint64_t)b.tv_nsec - (uint64_t)a.tv_nsec);
}

TEST(a_reading_that_loses_its_cpu_leaves_the_rate_right)
{
	uint64_t right = rate();

	for (unsigned i = 0; i < 24; i++) { /* the first readings, or later ones */
		int status;
		pid_t pid = fork();

		if (pid == 0) {
			lost_at = 1 + i / 2;
			lost_before = i % 2;
			uint64_t known = ticks_per_us();

			_exit(known < right / 2 || known > 2 * right);
		}
		CHECK(waitpid(pid, &status, 0) == pid);
		CHECK(status == 0);
	}
}
