/* Flushes in a thread of their own.
 *
 * One ring of items with three positions: [taken, ended) can be answered, [ended, posted) waits. The thread
 * covers all that wait with one fdatasync: their writes were done before they were posted. */
#define _GNU_SOURCE
#include "block_flush.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "mic/barrier.h"

#define ROOM    (MIC_MAX_VRINGS * MIC_MAX_VRING_ENTRIES) /* what all rings can have in flight */
#define SLOW_NS 200000u /* two wake-ups of a sleeping thread cost about a third of that */

struct blk_flush {
	pthread_t thread;
	bool running, stop;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	int ended_fd, fd;
	uint32_t posted, ended, taken; /* under the lock; `ended` is read without it, too */
	uint64_t last_ns;              /* how long the last flush took */
	struct {
		struct blk_flushed it;
		int err;
	} item[ROOM];
};

struct blk_flush *blk_flush_create(void)
{
	struct blk_flush *f = calloc(1, sizeof *f);

	if (!f)
		return NULL;
	f->ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (f->ended_fd < 0) {
		free(f);
		return NULL;
	}
	pthread_mutex_init(&f->lock, NULL);
	pthread_cond_init(&f->changed, NULL);
	return f;
}

void blk_flush_destroy(struct blk_flush *f)
{
	if (f->running) {
		pthread_mutex_lock(&f->lock);
		f->stop = true;
		pthread_cond_broadcast(&f->changed);
		pthread_mutex_unlock(&f->lock);
		pthread_join(f->thread, NULL);
	}
	pthread_cond_destroy(&f->changed);
	pthread_mutex_destroy(&f->lock);
	close(f->ended_fd);
	free(f);
}

bool blk_flush_slow(const struct blk_flush *f)
{
	return mic_load_relaxed(&f->last_ns) > SLOW_NS;
}

int blk_flush_now(struct blk_flush *f, int fd)
{
	uint64_t start = mic_now_ns();
	int err = fdatasync(fd) < 0 ? errno : 0;

	mic_store_release(&f->last_ns, mic_now_ns() - start);
	return err;
}

static void *run(void *arg)
{
	struct blk_flush *f = arg;

	pthread_mutex_lock(&f->lock);
	for (;;) {
		while (f->ended == f->posted && !f->stop)
			pthread_cond_wait(&f->changed, &f->lock);
		if (f->stop)
			break;
		uint32_t from = f->ended, to = f->posted;
		int fd = f->fd;

		pthread_mutex_unlock(&f->lock);
		int err = blk_flush_now(f, fd);

		pthread_mutex_lock(&f->lock);
		for (; from != to; from++)
			f->item[from % ROOM].err = err;
		mic_store_release(&f->ended, to);
		pthread_cond_broadcast(&f->changed);
		(void)!eventfd_write(f->ended_fd, 1);
	}
	pthread_mutex_unlock(&f->lock);
	return NULL;
}

static bool start(struct blk_flush *f)
{
	sigset_t all, old;

	sigfillset(&all); /* signals are the loop's */
	pthread_sigmask(SIG_SETMASK, &all, &old);
	f->running = pthread_create(&f->thread, NULL, run, f) == 0;
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return f->running;
}

bool blk_flush_post(struct blk_flush *f, int fd, const struct blk_flushed *item)
{
	if (f->posted - f->taken == ROOM || (!f->running && !start(f)))
		return false;
	pthread_mutex_lock(&f->lock);
	f->fd = fd;
	f->item[f->posted++ % ROOM].it = *item;
	pthread_cond_broadcast(&f->changed);
	pthread_mutex_unlock(&f->lock);
	return true;
}

int blk_flush_fd(const struct blk_flush *f)
{
	return f->ended_fd;
}

void blk_flush_woken(struct blk_flush *f)
{
	eventfd_t n;

	(void)!eventfd_read(f->ended_fd, &n);
}

unsigned blk_flush_pending(const struct blk_flush *f)
{
	return f->posted - f->taken;
}

bool blk_flush_take(struct blk_flush *f, struct blk_flushed *item, int *err)
{
	if (mic_load_acquire(&f->ended) == f->taken) /* pairs with run() */
		return false;
	*item = f->item[f->taken % ROOM].it;
	*err = f->item[f->taken % ROOM].err;
	f->taken++;
	return true;
}

void blk_flush_settle(struct blk_flush *f)
{
	pthread_mutex_lock(&f->lock);
	while (f->running && f->ended != f->posted)
		pthread_cond_wait(&f->changed, &f->lock);
	pthread_mutex_unlock(&f->lock);
}
