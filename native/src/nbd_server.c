/* NBD server: sockets, buffers, fairness and the loop. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "mic/barrier.h"
#include "nbd_internal.h"

#define MAX_EVENTS 24
#define REAP       64u
#define OUT_IOV    64u
#define ROUNDS     32u /* buffer-fulls of one client before the others have their turn */
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

void nbd_bad_client(struct nbd_client *c)
{
	if (!c->broken)
		c->nbd->stats.bad_clients++;
	c->broken = true;
}

static void forget(struct mic_nbd *nbd, struct nbd_client *c)
{
	for (unsigned i = 0; i < MIC_NBD_CLIENTS; i++)
		if (nbd->client[i] == c)
			nbd->client[i] = NULL;
	free(c);
}

/* Close the socket and free all but what the disk still holds; the last piece frees the rest. */
static void disconnect(struct nbd_client *c)
{
	struct mic_nbd *nbd = c->nbd;

	if (!c->dead) {
		epoll_ctl(nbd->ep, EPOLL_CTL_DEL, c->fd, NULL); /* a fork may hold the socket open */
		close(c->fd);
		nbd_drop_jobs(c);
		if (c->filling)
			nbd_free_piece(c->filling);
		c->filling = NULL;
		while (c->out) {
			struct nbd_piece *p = c->out;

			c->out = p->next;
			nbd_free_piece(p);
		}
		c->dead = true;
		mic_store_relaxed(&nbd->clients, nbd->clients - 1);
	}
	if (!c->inflight)
		forget(nbd, c);
}

static void set_listening(struct mic_nbd *nbd)
{
	bool want = false;

	for (unsigned i = 0; i < MIC_NBD_CLIENTS; i++)
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

		if (fd < 0)
			return;
		add_client(nbd, fd, &nbd->client[i]);
	}
}

/* --- output ----------------------------------------------------------------------------------- */

static unsigned add_part(struct iovec *iov, unsigned n, void *base, size_t len, size_t *skip)
{
	if (*skip >= len) {
		*skip -= len;
		return n;
	}
	iov[n] = (struct iovec){.iov_base = (uint8_t *)base + *skip, .iov_len = len - *skip};
	*skip = 0;
	return n + 1;
}

static unsigned gather(struct nbd_client *c, struct iovec *iov)
{
	size_t skip = c->out_sent, none = 0;
	unsigned n = 0;

	if (c->out_len > c->out_at)
		n = add_part(iov, n, c->outbuf + c->out_at, c->out_len - c->out_at, &none);
	for (struct nbd_piece *p = c->out; p && n + 2 <= OUT_IOV; p = p->next) {
		n = add_part(iov, n, p->head, p->head_len, &skip);
		if (p->data_len)
			n = add_part(iov, n, mic_blk_at(c->nbd->drv, p->req.addr, p->data_len), p->data_len,
				     &skip);
	}
	return n;
}

static void sent(struct nbd_client *c, size_t bytes)
{
	size_t plain = c->out_len - c->out_at < bytes ? c->out_len - c->out_at : bytes;

	c->out_at += (uint32_t)plain;
	if (c->out_at == c->out_len)
		c->out_at = c->out_len = 0;
	bytes -= plain;
	while (c->out) {
		struct nbd_piece *p = c->out;
		size_t left = p->head_len + p->data_len - c->out_sent;

		if (bytes < left) {
			c->out_sent += (uint32_t)bytes;
			return;
		}
		bytes -= left;
		c->out_sent = 0;
		c->out = p->next;
		if (!c->out)
			c->out_tail = &c->out;
		nbd_free_piece(p);
	}
}

/* Send what can be sent: true when everything is gone. */
static bool flush(struct nbd_client *c)
{
	struct iovec iov[OUT_IOV];

	while (!c->broken) {
		struct msghdr m = {.msg_iov = iov, .msg_iovlen = gather(c, iov)};

		if (!m.msg_iovlen)
			return true;
		ssize_t n = sendmsg(c->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n >= 0)
			sent(c, (size_t)n);
		else if (errno == EAGAIN || errno == EWOULDBLOCK)
			return false;
		else if (errno != EINTR)
			c->broken = true; /* the client has gone: nobody's fault */
	}
	return false;
}

/* --- input ------------------------------------------------------------------------------------ */

static void drop_skipped(struct nbd_client *c)
{
	uint32_t have = c->in_len - c->in_at, n = c->skip < have ? (uint32_t)c->skip : have;

	c->in_at += n;
	c->skip -= n;
}

/* Consume what the input buffer holds. */
static void consume(struct nbd_client *c)
{
	bool more = true;

	while (more && !c->broken && !c->closing) {
		drop_skipped(c);
		if (c->skip)
			break;
		more = c->phase == NBD_TRANSMISSION ? nbd_transmit(c) : nbd_negotiate(c);
	}
	if (c->in_at == c->in_len)
		c->in_at = c->in_len = 0;
}

/* Does the client's next byte have somewhere to go? */
static bool wants_input(const struct nbd_client *c)
{
	return !c->closing && !c->broken && !c->stalled && c->jobs < NBD_MAX_JOBS &&
	       (c->filling || c->skip || c->in_len - c->in_at < NBD_INBUF / 2) &&
	       (c->phase == NBD_TRANSMISSION || c->out_len < NBD_OUTBUF / 2);
}

static void compact(struct nbd_client *c)
{
	if (!c->in_at)
		return;
	memmove(c->inbuf, c->inbuf + c->in_at, c->in_len - c->in_at);
	c->in_len -= c->in_at;
	c->in_at = 0;
}

/* One read: payload straight to its pages, what follows into the buffer. True when bytes came. */
static bool receive(struct nbd_client *c)
{
	struct nbd_piece *p = c->filling;
	struct iovec iov[2];
	int n = 0;
	size_t direct = 0;

	compact(c);
	if (p && !c->in_len) {
		direct = p->len - p->filled;
		iov[n++] = (struct iovec){mic_blk_at(c->nbd->drv, p->req.addr + p->filled, (uint32_t)direct),
					  direct};
	}
	iov[n++] = (struct iovec){c->inbuf + c->in_len, NBD_INBUF - c->in_len};
	ssize_t got = readv(c->fd, iov, n);

	if (got <= 0) {
		if (got == 0 || (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR))
			c->broken = true;
		return false;
	}
	size_t payload = (size_t)got < direct ? (size_t)got : direct;

	if (payload)
		p->filled += (uint32_t)payload;
	c->in_len += (uint32_t)((size_t)got - payload);
	return true;
}

static void set_interest(struct nbd_client *c, bool all_sent)
{
	uint32_t want = (wants_input(c) ? (uint32_t)EPOLLIN : 0) | (all_sent ? 0 : (uint32_t)EPOLLOUT);

	if (want == c->events)
		return;
	struct epoll_event ev = {.events = want, .data.ptr = c};

	epoll_ctl(c->nbd->ep, EPOLL_CTL_MOD, c->fd, &ev);
	c->events = want;
}

/* Move a client forward as far as it goes. */
static void pump(struct nbd_client *c, bool readable)
{
	c->dirty = false;
	if (c->dead) {
		disconnect(c);
		return;
	}
	for (unsigned round = 0; round < ROUNDS; round++) {
		if (c->current && !c->filling)
			nbd_feed(c);
		consume(c);
		nbd_collect_replies(c);
		if (!readable || !wants_input(c) || !receive(c))
			break;
	}
	consume(c);
	nbd_collect_replies(c);
	bool all_sent = flush(c);

	if (c->broken || (c->closing && all_sent && !c->jobs)) {
		disconnect(c);
		return;
	}
	set_interest(c, all_sent);
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
			pump(c, false);
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
			disconnect(nbd->client[i]);
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
		else if (t == TAG_LINE && !nbd->inflight)
			watch_line(nbd, false);
		else if (t == TAG_LISTEN)
			accept_clients(nbd);
		else if (t > TAG_WAKE)
			pump(ev[i].data.ptr, true);
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
	int timeout_ms = stalled ? STALL_MS : -1;

	if (nbd->inflight)
		watch_line(nbd, true);
	if (!mic_blk_arm(nbd->user, nbd->queue != NULL))
		return 0;
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
