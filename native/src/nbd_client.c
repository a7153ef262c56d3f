/* NBD: one client's socket, its buffers and its end. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "mic/barrier.h"
#include "nbd_internal.h"

#define OUT_IOV 64u
#define ROUNDS  32u /* buffer-fulls of one client before the others have their turn */

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
void nbd_disconnect(struct nbd_client *c)
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
void nbd_pump(struct nbd_client *c, bool readable)
{
	c->dirty = false;
	if (c->dead) {
		nbd_disconnect(c);
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
		nbd_disconnect(c);
		return;
	}
	set_interest(c, all_sent);
}
