/* What a SCIF node does for programs that talk through libscif: control pages, wake-ups, and the
 * notifier thread that keeps the readiness of their descriptors (SCIF 2.9, 6). */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "mic/membarrier.h"
#include "mic/scif_abi.h"

static void futex_wake(uint32_t *word)
{
	(void)syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void shared_mutex(uint64_t *words)
{
	pthread_mutexattr_t attr;

	_Static_assert(sizeof(pthread_mutex_t) <= 5 * sizeof(uint64_t), "mutex");
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
	pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init((pthread_mutex_t *)(void *)words, &attr);
	pthread_mutexattr_destroy(&attr);
}

void mic_scif_ctl_init(struct mic_scif_ctl *ctl, uint64_t sid)
{
	shared_mutex(ctl->tx_lock);
	shared_mutex(ctl->rx_lock);
	mic_store_release(&ctl->sid, sid);
}

void mic_scif_wake_rx(struct mic_scif_qpage *qp)
{
	mic_fetch_add(&qp->rx_seq, 1);
	futex_wake(&qp->rx_seq);
}

void mic_scif_wake_tx(struct mic_scif_qpage *qp)
{
	mic_fetch_add(&qp->tx_seq, 1);
	futex_wake(&qp->tx_seq);
}

void mic_scif_ctl_state(struct mic_scif_ctl *ctl, struct mic_scif_qpage *qp, uint32_t state)
{
	mic_store_release(&ctl->state, state);
	mic_scif_wake_rx(qp);
	mic_scif_wake_tx(qp);
}

/* --- copies of programs ------------------------------------------------------------------------ */

uint32_t mic_scif_raise_gen(struct mic_scif_ctl *ctl)
{
	uint32_t next = (mic_load_relaxed(&ctl->gen) + 1) % MIC_SCIF_GENS, classes = 0;

	/* The class that copies will use from now on may still hold some of MIC_SCIF_GENS raises ago. */
	if (mic_load_acquire(&ctl->busy[next]))
		classes = 1u << next;
	/* Pairs with the library: it counts itself in, then looks at gen again. */
	mic_fetch_add(&ctl->gen, 1);
	for (uint32_t i = 0; i < MIC_SCIF_GENS; i++)
		if (i != next && mic_load_seq_cst(&ctl->busy[i]))
			classes |= 1u << i;
	return classes;
}

void mic_scif_ctl_copies(struct mic_scif_ctl *ctl, uint32_t issued, uint32_t done, uint32_t failed)
{
	mic_store_release(&ctl->issued, issued);
	mic_store_release(&ctl->failed, failed);
	/* Last, pairs with the acquire in the library's fences: who sees it sees the copied bytes. */
	mic_store_release(&ctl->done, done);
}

uint32_t mic_scif_busy(struct mic_scif_ctl *ctl, uint32_t classes)
{
	uint32_t still = 0;

	/* Pairs with the library: it counts itself out, then looks at drain. */
	mic_exchange(&ctl->drain, 1u);
	for (uint32_t i = 0; i < MIC_SCIF_GENS; i++)
		if (classes >> i & 1 && mic_load_seq_cst(&ctl->busy[i]))
			still |= 1u << i;
	return still;
}

/* --- queue pairs ------------------------------------------------------------------------------- */

#define QP_OFFLINE 0xdead /* SCIF 3.2: nothing reads it */

void mic_scif_qp_init(struct mic_scif_qpage *qp, uint64_t local_buf, uint64_t local_qp)
{
	qp->local_buf = local_buf;
	qp->local_qp = local_qp;
	qp->qp_state = QP_OFFLINE;
	mic_store_release(&qp->magic, MIC_SCIF_QP_MAGIC);
}

void mic_scif_qp_wipe(struct mic_scif_qpage *qp, uint64_t bytes)
{
	memset(qp, 0, bytes);
}

void mic_scif_qp_notify(struct mic_scif_qpage *qp, uint64_t notify_addr, uint32_t slot)
{
	qp->notify_addr = notify_addr;
	qp->notify_slot = slot;
	mic_store_release(&qp->abi, MIC_SCIF_ABI);
}

void mic_scif_qp_invalid(struct mic_scif_qpage *qp)
{
	mic_store_release(&qp->magic, 0u);
}

uint64_t mic_scif_qp_magic(const struct mic_scif_qpage *qp)
{
	return mic_load_acquire(&qp->magic);
}

void mic_scif_kernel_drained(struct mic_scif_qpage *peer)
{
	mic_fetch_add(&peer->rx_epoch, 1);
	mic_fence_everywhere(); /* pairs with the light fence after a program's commit */
}

void mic_scif_kernel_wants_room(struct mic_scif_qpage *peer)
{
	mic_store_release(&peer->tx_native, 1u);
	mic_fence_everywhere(); /* pairs with the light fence after a program's release */
}

/* --- readiness of a program's descriptor ------------------------------------------------------ */

void mic_scif_token(int fd)
{
	(void)!send(fd, "T", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

void mic_scif_unfill(int fd)
{
	char drop[64];

	while (recv(fd, drop, sizeof drop, MSG_DONTWAIT | MSG_TRUNC) > 0)
		;
}

static void notify(struct mic_scif_notify *page, uint64_t *bits, uint32_t slot)
{
	if (slot >= MIC_SCIF_SLOTS)
		return;
	mic_fetch_or(&bits[slot / 64], 1ull << (slot % 64));
	mic_fetch_add(&page->seq, 1);
	futex_wake(&page->seq);
}

void mic_scif_notify_rx(struct mic_scif_notify *page, uint32_t slot)
{
	notify(page, page->rx, slot);
}

void mic_scif_notify_tx(struct mic_scif_notify *page, uint32_t slot)
{
	notify(page, page->tx, slot);
}

/* --- notifier --------------------------------------------------------------------------------- */

struct mic_scif_notifier {
	struct mic_scif_notify *page;
	pthread_t thread;
	pthread_mutex_t lock; /* guards fd[] and ready[] */
	uint32_t stop;
	int event_fd;
	int fd[MIC_SCIF_SLOTS];              /* -2 unused, -1 kernel client */
	uint64_t ready[MIC_SCIF_SLOTS / 64]; /* kernel clients that were notified */
	int copy_left;
};

static void serve_slot(struct mic_scif_notifier *n, uint32_t slot, int rx)
{
	int fd = n->fd[slot];

	if (fd >= 0 && rx) {
		mic_scif_token(fd);
	} else if (fd >= 0) {
		mic_scif_unfill(fd);
	} else if (fd == -1) {
		n->ready[slot / 64] |= 1ull << (slot % 64);
		(void)!eventfd_write(n->event_fd, 1);
	}
}

static void serve_bits(struct mic_scif_notifier *n, uint64_t *bits, int rx)
{
	for (uint32_t w = 0; w < MIC_SCIF_SLOTS / 64; w++) {
		if (!mic_load_relaxed(&bits[w]))
			continue;
		uint64_t set = mic_exchange(&bits[w], 0);

		for (; set; set &= set - 1)
			serve_slot(n, w * 64 + (uint32_t)__builtin_ctzll(set), rx);
	}
}

/* Hold a robust lock for as long as the process lives: when it dies, the kernel marks the word and
 * wakes one of the programs that sleep on it, so that no call waits for a dead node. */
static void *notifier_main(void *arg)
{
	struct mic_scif_notifier *n = arg;
	struct mic_scif_life *life = (void *)(n->page + 1);
	pthread_mutex_t *alive = (pthread_mutex_t *)(void *)life->alive;

	pthread_mutex_lock(alive);
	mic_fetch_or((uint32_t *)(void *)life->alive, FUTEX_WAITERS);
	for (;;) {
		uint32_t seen = mic_load_acquire(&n->page->seq);

		pthread_mutex_lock(&n->lock);
		serve_bits(n, n->page->rx, 1);
		serve_bits(n, n->page->tx, 0);
		if (mic_load_relaxed(&n->page->left) && mic_exchange(&n->page->left, 0u)) {
			n->copy_left = 1;
			(void)!eventfd_write(n->event_fd, 1);
		}
		pthread_mutex_unlock(&n->lock);
		if (mic_load_acquire(&n->stop))
			break;
		(void)syscall(SYS_futex, &n->page->seq, FUTEX_WAIT, seen, NULL, NULL, 0);
	}
	pthread_mutex_unlock(alive);
	return NULL;
}

struct mic_scif_notifier *mic_scif_notifier_start(struct mic_scif_notify *page, int event_fd)
{
	struct mic_scif_notifier *n = calloc(1, sizeof *n);
	sigset_t all, old;

	if (!n)
		return NULL;
	n->page = page;
	n->event_fd = event_fd;
	for (uint32_t i = 0; i < MIC_SCIF_SLOTS; i++)
		n->fd[i] = -2;
	pthread_mutex_init(&n->lock, NULL);
	shared_mutex(((struct mic_scif_life *)(void *)(page + 1))->alive);
	sigfillset(&all); /* signals are for the process's main thread */
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int rc = pthread_create(&n->thread, NULL, notifier_main, n);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (rc) {
		free(n);
		errno = rc;
		return NULL;
	}
	return n;
}

void mic_scif_notifier_stop(struct mic_scif_notifier *n)
{
	mic_store_release(&n->stop, 1u);
	mic_fetch_add(&n->page->seq, 1);
	futex_wake(&n->page->seq);
	pthread_join(n->thread, NULL);
	pthread_mutex_destroy(&n->lock);
	free(n);
}

void mic_scif_notifier_set(struct mic_scif_notifier *n, uint32_t slot, int fd)
{
	pthread_mutex_lock(&n->lock);
	n->fd[slot] = fd;
	n->ready[slot / 64] &= ~(1ull << (slot % 64));
	pthread_mutex_unlock(&n->lock);
}

void mic_scif_notifier_clear(struct mic_scif_notifier *n, uint32_t slot)
{
	mic_scif_notifier_set(n, slot, -2);
}

int mic_scif_notifier_next(struct mic_scif_notifier *n)
{
	int slot = -1;

	pthread_mutex_lock(&n->lock);
	if (n->copy_left) {
		n->copy_left = 0;
		slot = MIC_SCIF_COPY_LEFT;
	}
	for (uint32_t w = 0; w < MIC_SCIF_SLOTS / 64 && slot == -1; w++) {
		if (!n->ready[w])
			continue;
		slot = (int)(w * 64) + __builtin_ctzll(n->ready[w]);
		n->ready[w] &= n->ready[w] - 1;
	}
	pthread_mutex_unlock(&n->lock);
	return slot;
}
