/* Doorbells that a fault filter holds back: they travel through the filters' memory to the board, where
 * one thread rings them when they are due. A slow doorbell thereby delays nobody who rings it. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "fault.h"
#include "mic/vring.h"

#define TO_HOST 0x80000000u

enum { FREE, CLAIMED, READY };

struct mic_fault_clock {
	struct mic_bus *bus;
	pthread_t thread;
	int stop_fd;
};

static struct mic_fault_late *late_at(struct mic_bus *bus, unsigned i)
{
	return (struct mic_fault_late *)(void *)(bus->faults.base + MIC_FAULT_LATE_FIRST) + i;
}

bool mic_fault_late_add(struct mic_bus *bus, int db, bool to_host, uint64_t delay_ns)
{
	if (db < 0)
		return false;
	for (unsigned i = 0; i < MIC_FAULT_LATE_SLOTS; i++) {
		struct mic_fault_late *l = late_at(bus, i);
		uint32_t expected = FREE;

		if (mic_load_relaxed(&l->state) != FREE || !mic_cas(&l->state, &expected, CLAIMED))
			continue;
		mic_store_relaxed(&l->due, mic_now_ns() + delay_ns);
		mic_store_relaxed(&l->doorbell, (uint32_t)db | (to_host ? TO_HOST : 0u));
		mic_store_release(&l->state, READY);
		signal_fd(bus->fd[MIC_FD_FAULT_LATE]);
		return true;
	}
	return false;
}

void mic_fault_forget_late(struct mic_bus *bus)
{
	for (unsigned i = 0; i < MIC_FAULT_LATE_SLOTS; i++)
		mic_store_release(&late_at(bus, i)->state, FREE);
	mic_store_relaxed((uint32_t *)(void *)(bus->faults.base + MIC_FAULT_LOST_TO_CARD), 0u);
	mic_store_relaxed((uint32_t *)(void *)(bus->faults.base + MIC_FAULT_LOST_TO_HOST), 0u);
}

/* Ring what is due. Returns when the next one is, 0: there is none. */
static uint64_t ring_due(struct mic_bus *bus)
{
	uint64_t now = mic_now_ns(), next = 0;

	for (unsigned i = 0; i < MIC_FAULT_LATE_SLOTS; i++) {
		struct mic_fault_late *l = late_at(bus, i);
		uint32_t ready = READY;

		if (mic_load_acquire(&l->state) != READY)
			continue;
		uint64_t due = mic_load_relaxed(&l->due);
		uint32_t what = mic_load_relaxed(&l->doorbell);

		if (due > now) {
			next = next && next < due ? next : due;
			continue;
		}
		/* A reset that forgot it meanwhile wins. */
		if (!mic_cas(&l->state, &ready, FREE))
			continue;
		int db = (int)(what & 0xffu);

		if (what & TO_HOST)
			mic_ring_host_now(bus, db);
		else
			mic_ring_card_now(bus, db);
	}
	return next;
}

static void *clock_main(void *arg)
{
	struct mic_fault_clock *clock = arg;
	int line = clock->bus->fd[MIC_FD_FAULT_LATE];
	struct pollfd fds[2] = {{.fd = clock->stop_fd, .events = POLLIN}, {.fd = line, .events = POLLIN}};
	eventfd_t drop;

	pthread_setname_np(pthread_self(), "mic-doorbells");
	for (;;) {
		/* Cleared before the entries are read: one that comes after that wakes us again. */
		(void)!eventfd_read(line, &drop);
		uint64_t next = ring_due(clock->bus), now = mic_now_ns();
		uint64_t ns = next > now ? next - now : 1;
		struct timespec ts = {.tv_sec = (time_t)(ns / 1000000000u),
				      .tv_nsec = (long)(ns % 1000000000u)};

		ppoll(fds, 2, next ? &ts : NULL, NULL);
		if (fds[0].revents)
			return NULL;
	}
}

struct mic_fault_clock *mic_fault_clock_start(struct mic_bus *bus)
{
	struct mic_fault_clock *clock = calloc(1, sizeof *clock);
	sigset_t all, old;

	if (!clock)
		return NULL;
	clock->bus = bus;
	clock->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (clock->stop_fd < 0) {
		free(clock);
		return NULL;
	}
	sigfillset(&all); /* signals are the process's business */
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int rc = pthread_create(&clock->thread, NULL, clock_main, clock);

	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (rc) {
		close(clock->stop_fd);
		free(clock);
		errno = rc;
		return NULL;
	}
	return clock;
}

void mic_fault_clock_stop(struct mic_fault_clock *clock)
{
	if (!clock)
		return;
	(void)!eventfd_write(clock->stop_fd, 1);
	pthread_join(clock->thread, NULL);
	close(clock->stop_fd);
	free(clock);
}
