/* NBD server: its clients, the pool they share, and the loop. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "mic/barrier.h"
#include "nbd_internal.h"

#define MAX_EVENTS 24
#define REAP       64u
#define NO_FDS_MS  100
#define STALL_MS   20
#define DESTROY_NS 5000000000ull /* how long destroy waits for what the device holds */

enum { TAG_LISTEN = 1, TAG_STOP, TAG_LINE, TAG_WAKE };

/* --- life ------------------------------------------------------------------------------------- */

static int watch(struct mic_nbd *nbd, int fd, uint32_t events, void *tag)
{
	struct epoll_event ev = {.events = events, .data.ptr = tag};

	return epoll_ctl(nbd->ep, EPOLL_CTL_ADD, fd, &ev) < 0 ? -errno : 0;
}

static void *tag(uintptr_t t)
{
	return (void *)t; /* never a pointer: all tags are below the first page */
}

static int open_parts(struct mic_nbd *nbd)
{
	int fds[2];

	nbd->user = mic_blk_user_open(nbd->drv);
	nbd->ep = epoll_create1(EPOLL_CLOEXEC);
	if (!nbd->user || nbd->ep < 0)
		return -errno;
	int flags = fcntl(nbd->listen_fd, F_GETFL);

	if (flags < 0 || fcntl(nbd->listen_fd, F_SETFL, flags | O_NONBLOCK) < 0)
		return -errno;
	mic_blk_wake_fds(nbd->user, fds);
	nbd->line_fd = fds[0];
	int rc = watch(nbd, nbd->listen_fd, EPOLLIN, tag(TAG_LISTEN));

	if (!rc)
		rc = watch(nbd, fds[1], EPOLLIN, tag(TAG_WAKE));
	nbd->listening = true;
	return rc;
}

struct mic_nbd *mic_nbd_create(struct mic_blk_drv *drv, int listen_fd, const char *name, bool read_only)
{
	struct mic_nbd *nbd = calloc(1, sizeof *nbd);

	if (!nbd)
		return NULL;
	nbd->drv = drv;
	nbd->listen_fd = listen_fd;
	nbd->ep = -1;
	nbd->read_only = read_only;
	strncpy(nbd->name, name, NBD_MAX_NAME);
	nbd->queue_tail = &nbd->queue;
	nbd->spin_us = MIC_SPIN_US;
	nbd->roomy = sysconf(_SC_NPROCESSORS_ONLN) > 3;
	uint64_t fair = mic_blk_free_pages(drv) * 4096ull / (2 * MIC_NBD_CLIENTS);

	nbd->share = fair < NBD_SHARE ? (uint32_t)fair & ~4095u : NBD_SHARE;
	int rc = open_parts(nbd);

	if (rc < 0) {
		mic_nbd_destroy(nbd);
		errno = -rc;
		return NULL;
	}
	return nbd;
}

void mic_nbd_stats(const struct mic_nbd *nbd, struct mic_nbd_stats *out)
{
	*out = nbd->stats;
	out->clients_now = mic_load_relaxed(&nbd->clients);
}

void mic_nbd_spin(struct mic_nbd *nbd, unsigned spin_us)
{
	nbd->spin_us = spin_us;
	mic_blk_user_spin(nbd->user, spin_us);
}

uint32_t nbd_share(const struct mic_nbd *nbd)
{
	return nbd->share;
}

uint32_t nbd_grant(struct nbd_client *c, uint32_t len)
{
	struct mic_nbd *nbd = c->nbd;
	uint64_t left = mic_blk_free_pages(nbd->drv) * 4096ull, promised = 0;
	uint32_t mine = c->held < nbd->share ? nbd->share - c->held : 0;

	if (len <= mine && len <= left)
		return len;
	for (unsigned i = 0; i < MIC_NBD_CLIENTS; i++) {
		struct nbd_client *o = nbd->client[i];

		if (!o)
			promised += nbd->share; /* whoever comes next must find something */
		else if (o != c && !o->dead && o->held < nbd->share)
			promised += nbd->share - o->held;
	}
	uint64_t room = left > promised + mine ? left - promised : mine < left ? mine : left;

	return len <= room ? len : (uint32_t)room & ~4095u;
}

/* --- pieces to the disk ----------------------------------------------------------------------- */

void nbd_submit(struct nbd_piece *p)
{
	struct mic_nbd *nbd = p->client->nbd;

	if (nbd->queue || mic_blk_submit(nbd->user, &p->req) < 0) {
		/* Ring full, or the device is gone: the loop sorts it out. */
		p->queued = NULL;
		*nbd->queue_tail = p;
		nbd->queue_tail = &p->queued;
		return;
	}
	nbd->kick = true;
}

/* Put what waits into the ring, as far as it fits. */
static void drain_queue(struct mic_nbd *nbd)
{
	while (nbd->queue) {
		struct nbd_piece *p = nbd->queue;
		int rc = p->client->dead ? -ECANCELED : mic_blk_submit(nbd->user, &p->req);

		if (rc == -EAGAIN)
			return;
		nbd->queue = p->queued;
		if (!nbd->queue)
			nbd->queue_tail = &nbd->queue;
		if (!rc) {
			nbd->kick = true;
			continue;
		}
		p->req.error = -rc;
		nbd_piece_done(p);
	}
}

static void kick(struct mic_nbd *nbd)
{
	if (nbd->kick)
		mic_blk_kick(nbd->user);
	nbd->kick = false;
}

/* --- clients ---------------------------------------------------------------------------------- */

static void set_listening(struct mic_nbd *nbd)
{
	bool want = false;

	for (unsigned i = 0; i < MIC_NBD_CLIENTS && !nbd->no_fds; i++)
		want |= !nbd->client[i];
	if (want == nbd->listening)
		return;
	struct epoll_event ev = {.events = want ? EPOLLIN : 0, .data.ptr = tag(TAG_LISTEN)};

	epoll_ctl(nbd->ep, EPOLL_CTL_MOD, nbd->listen_fd, &ev);
	nbd->listening = want;
}

static void add_client(struct mic_nbd *nbd, int fd, struct nbd_client **slot)
{
	struct nbd_client *c = calloc(1, sizeof *c);

	if (!c) {
		close(fd);
		return;
	}
	c->fd = fd;
	c->nbd = nbd;
	c->last_job = &c->first_job;
	c->out_tail = &c->out;
	c->events = EPOLLIN;
	c->dirty = true;
	nbd_greet(c);
	if (watch(nbd, fd, c->events, c) < 0) {
		close(fd);
		free(c);
		return;
	}
	*slot = c;
	mic_store_relaxed(&nbd->clients, nbd->clients + 1);
	nbd->stats.clients_ever++;
}

static void accept_clients(struct mic_nbd *nbd)
{
	for (unsigned i = 0; i < MIC_NBD_CLIENTS; i++) {
		if (nbd->client[i])
			continue;
		int fd = accept4(nbd->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

		if (fd < 0) {
			/* Out of descriptors: the connection stays in the queue; look again later. */
			nbd->no_fds =
				errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS;
			return;
		}
		add_client(nbd, fd, &nbd->client[i]);
	}
}

/* --- the loop --------------------------------------------------------------------------------- */

static bool reap(struct mic_nbd *nbd)
{
	struct mic_blk_req *back[REAP];
	unsigned n = mic_blk_reap(nbd->user, back, REAP);

	for (unsigned i = 0; i < n; i++)
		nbd_piece_done((struct nbd_piece *)(void *)back[i]); /* req is its first field */
	return n;
}

/* Returns how many clients wait for memory. */
static unsigned pump_dirty(struct mic_nbd *nbd)
{
	unsigned stalled = 0;

	nbd->freed = false;
	for (unsigned i = 0; i < MIC_NBD_CLIENTS; i++) {
		struct nbd_client *c = nbd->client[i];

		if (c && (c->dirty || c->stalled || (c->dead && !c->inflight)))
			nbd_pump(c, false);
		c = nbd->client[i];
		stalled += c && c->stalled;
	}
	set_listening(nbd);
	return stalled;
}

static void disconnect_all(struct mic_nbd *nbd)
{
	for (unsigned i = 0; i < MIC_NBD_CLIENTS; i++)
		if (nbd->client[i])
			nbd_disconnect(nbd->client[i]);
}

/* Other users of the disk ring the line as well: it is watched only while something of ours is there. */
static void watch_line(struct mic_nbd *nbd, bool on)
{
	if (on == nbd->line_watched)
		return;
	if (on)
		watch(nbd, nbd->line_fd, EPOLLIN, tag(TAG_LINE));
	else
		epoll_ctl(nbd->ep, EPOLL_CTL_DEL, nbd->line_fd, NULL);
	nbd->line_watched = on;
}

/* The line rang. What it announced is reaped after this, in the same round. */
static void take_line(struct mic_nbd *nbd)
{
	if (nbd->inflight)
		mic_line_take(nbd->line_fd);
	else
		watch_line(nbd, false);
}

/* Returns how many events there were, or -errno; *stop when stop_fd is one of them. */
static int handle_events(struct mic_nbd *nbd, int timeout_ms, bool *stop)
{
	struct epoll_event ev[MAX_EVENTS];
	int n = epoll_wait(nbd->ep, ev, MAX_EVENTS, timeout_ms);

	if (n < 0)
		return -errno;
	for (int i = 0; i < n; i++) {
		uintptr_t t = (uintptr_t)ev[i].data.ptr;

		if (t == TAG_STOP)
			*stop = true;
		else if (t == TAG_LINE)
			take_line(nbd);
		else if (t == TAG_LISTEN)
			accept_clients(nbd);
		else if (t > TAG_WAKE)
			nbd_pump(ev[i].data.ptr, true);
	}
	return n;
}

static bool spin(struct mic_nbd *nbd, bool *stop)
{
	/* Client, server and backend make three: on a small machine the client needs the CPU while it is
	 * its turn, so only the disk is worth a spin. */
	if (!nbd->inflight && !nbd->roomy)
		return false;
	uint64_t end = mic_spin_until(&nbd->spin, nbd->spin_us);

	if (!end)
		return false;
	do {
		if ((nbd->inflight && mic_blk_pending(nbd->user)) || handle_events(nbd, 0, stop) > 0) {
			mic_spin_done(&nbd->spin, true);
			return true;
		}
	} while (mic_now_ns() < end);
	mic_spin_done(&nbd->spin, false);
	return false;
}

/* Sleep until a socket, the disk or stop_fd has something. 0 or -errno. */
static int sleep_until_event(struct mic_nbd *nbd, unsigned stalled, bool *stop)
{
	/* Pool pages that other users of the driver give back ring no bell. */
	int timeout_ms = stalled ? STALL_MS : nbd->no_fds ? NO_FDS_MS : -1;

	if (nbd->inflight)
		watch_line(nbd, true);
	if (!mic_blk_arm(nbd->user, nbd->queue != NULL))
		return 0;
	nbd->no_fds = false; /* not listening during this sleep; afterwards it is tried again */
	mic_spin_sleeping(&nbd->spin);
	int n = handle_events(nbd, timeout_ms, stop);

	mic_spin_woke(&nbd->spin, nbd->spin_us);
	mic_blk_awake(nbd->user);
	return n < 0 ? n : 0;
}

static int serve(struct mic_nbd *nbd)
{
	bool stop = false;

	for (;;) {
		bool any = reap(nbd);

		drain_queue(nbd);
		unsigned stalled = pump_dirty(nbd);

		any |= stalled && nbd->freed; /* one's output was another's memory */
		kick(nbd);
		if (mic_blk_drv_stopped(nbd->drv)) {
			disconnect_all(nbd);
			return mic_blk_drv_error(nbd->drv);
		}
		if (stop)
			return 0;
		int rc = any || spin(nbd, &stop) ? 0 : sleep_until_event(nbd, stalled, &stop);

		if (rc < 0)
			return rc;
	}
}

int mic_nbd_run(struct mic_nbd *nbd, int stop_fd)
{
	int rc = watch(nbd, stop_fd, EPOLLIN, tag(TAG_STOP));

	if (rc < 0)
		return rc;
	rc = serve(nbd);
	epoll_ctl(nbd->ep, EPOLL_CTL_DEL, stop_fd, NULL);
	return rc;
}

/* The disk still writes into the pool: wait for it, but not for ever. */
static void wait_for_disk(struct mic_nbd *nbd)
{
	uint64_t end = mic_now_ns() + DESTROY_NS;
	int fds[2];

	mic_blk_wake_fds(nbd->user, fds);
	while (nbd->inflight) {
		drain_queue(nbd);
		kick(nbd);
		if (reap(nbd))
			continue;
		if (mic_now_ns() > end)
			mic_blk_drv_stop(nbd->drv);
		else if (mic_blk_arm(nbd->user, true))
			mic_wait_fds(fds, 2, 100);
		mic_blk_awake(nbd->user);
	}
}

void mic_nbd_destroy(struct mic_nbd *nbd)
{
	if (!nbd)
		return;
	disconnect_all(nbd);
	if (nbd->user)
		wait_for_disk(nbd);
	disconnect_all(nbd);
	mic_blk_user_close(nbd->user);
	if (nbd->ep >= 0)
		close(nbd->ep);
	free(nbd);
}
