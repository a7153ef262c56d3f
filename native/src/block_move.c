/* Data of block requests: preadv and pwritev straight into card memory, large ones by two CPUs.
 *
 * A request of some hundred KiB is nothing but a copy, and one CPU copies no faster than it can. Beyond
 * MIN_SPLIT a second thread takes the upper half of the request; the caller always does the lower half
 * itself and looks for the other's end before it sleeps, so a small machine loses nothing. */
#define _GNU_SOURCE
#include "block_move.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "mic/barrier.h"
#include "mic/iov.h"
#include "mic/vring.h"

#define MAX_IOV   1024u
#define MIN_SPLIT (512u << 10) /* bytes: below, waking a thread costs more than it saves */
#define LOOK_NS   30000u       /* how long either side looks before it sleeps */

struct mic_mover {
	pthread_t thread;
	bool running;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	uint32_t posted, done; /* numbers of jobs; equal = nothing to do. Written under the lock. */
	bool stop;
	/* the job: the caller's until posted, the thread's until done */
	int fd, result;
	unsigned n;
	off_t off;
	bool write;
	struct iovec iov[MAX_IOV];
};

static int move(int fd, struct iovec *iov, unsigned n, off_t off, bool write)
{
	while (n) {
		ssize_t rc = write ? pwritev(fd, iov, (int)n, off) : preadv(fd, iov, (int)n, off);

		if (rc < 0 && errno == EINTR)
			continue;
		if (rc < 0)
			return errno;
		if (rc == 0 && write)
			return EIO;
		if (rc == 0) { /* beyond the end of the image */
			for (unsigned i = 0; i < n; i++)
				memset(iov[i].iov_base, 0, iov[i].iov_len);
			return 0;
		}
		off += rc;
		mic_iov_skip(&iov, &n, (size_t)rc);
	}
	return 0;
}

/* Look for a while whether a counter has reached `want`; pairs with the release stores of both sides. */
static bool look(const uint32_t *counter, uint32_t want)
{
	if (!mic_spin_allowed())
		return mic_load_acquire(counter) == want;
	for (uint64_t end = mic_now_ns() + LOOK_NS; mic_now_ns() < end; mic_cpu_relax())
		if (mic_load_acquire(counter) == want)
			return true;
	return false;
}

static void *serve(void *arg)
{
	struct mic_mover *m = arg;

	for (;;) {
		uint32_t next = m->done + 1; /* only this thread writes done */

		if (!look(&m->posted, next)) {
			pthread_mutex_lock(&m->lock);
			while (m->posted != next && !m->stop)
				pthread_cond_wait(&m->changed, &m->lock);
			bool stop = m->stop;
			pthread_mutex_unlock(&m->lock);
			if (stop)
				return NULL;
		}
		m->result = move(m->fd, m->iov, m->n, m->off, m->write);
		pthread_mutex_lock(&m->lock);
		mic_store_release(&m->done, next);
		pthread_cond_broadcast(&m->changed);
		pthread_mutex_unlock(&m->lock);
	}
}

struct mic_mover *mic_mover_create(void)
{
	struct mic_mover *m = calloc(1, sizeof *m);

	if (!m)
		return NULL;
	pthread_mutex_init(&m->lock, NULL);
	pthread_cond_init(&m->changed, NULL);
	return m;
}

void mic_mover_destroy(struct mic_mover *m)
{
	if (!m)
		return;
	if (m->running) {
		pthread_mutex_lock(&m->lock);
		m->stop = true;
		pthread_cond_broadcast(&m->changed);
		pthread_mutex_unlock(&m->lock);
		pthread_join(m->thread, NULL);
	}
	pthread_cond_destroy(&m->changed);
	pthread_mutex_destroy(&m->lock);
	free(m);
}

/* The thread, started when it is first needed; it handles no signals (they are Python's). */
static bool ready(struct mic_mover *m)
{
	if (!m->running) {
		sigset_t all, old;

		sigfillset(&all);
		pthread_sigmask(SIG_SETMASK, &all, &old);
		m->running = pthread_create(&m->thread, NULL, serve, m) == 0;
		pthread_sigmask(SIG_SETMASK, &old, NULL);
	}
	return m->running;
}

/* Give the bytes from `at` on to the thread and cut them off the list. Returns the segments that stay. */
static unsigned post_rest(struct mic_mover *m, int fd, struct iovec *iov, unsigned n, size_t at, off_t off,
			  bool write)
{
	struct iovec *rest = m->iov;
	unsigned keep = 0;
	size_t left = at;

	memcpy(m->iov, iov, n * sizeof *iov);
	m->n = n;
	mic_iov_skip(&rest, &m->n, at);
	memmove(m->iov, rest, m->n * sizeof *rest);
	while (left) {
		if (iov[keep].iov_len > left)
			iov[keep].iov_len = left;
		left -= iov[keep++].iov_len;
	}
	m->fd = fd;
	m->off = off + (off_t)at;
	m->write = write;
	pthread_mutex_lock(&m->lock);
	mic_store_release(&m->posted, m->posted + 1);
	pthread_cond_broadcast(&m->changed);
	pthread_mutex_unlock(&m->lock);
	return keep;
}

int mic_mover_run(struct mic_mover *m, int fd, struct iovec *iov, unsigned n, off_t off, bool write)
{
	size_t total = 0;

	for (unsigned i = 0; i < n; i++)
		total += iov[i].iov_len;
	if (total < MIN_SPLIT || n > MAX_IOV || !mic_spin_allowed() || !ready(m))
		return move(fd, iov, n, off, write);
	/* Whole pages for each half: two threads never write to one page of the file. */
	n = post_rest(m, fd, iov, n, (total / 2) & ~(size_t)4095, off, write);
	int mine = move(fd, iov, n, off, write);

	if (!look(&m->done, m->posted)) {
		pthread_mutex_lock(&m->lock);
		while (m->done != m->posted)
			pthread_cond_wait(&m->changed, &m->lock);
		pthread_mutex_unlock(&m->lock);
	}
	return mine ? mine : m->result;
}
