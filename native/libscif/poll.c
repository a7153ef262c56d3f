/* scif_poll: exact masks for endpoints, whatever the descriptor shows (SCIF 2.9). */
#include "internal.h"

#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

#define ALWAYS    (POLLERR | POLLHUP | POLLNVAL)
#define STACK_FDS 64

static int64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Milliseconds until `end`, rounded up: a time-out is never early. */
static int left_ms(int64_t end)
{
	int64_t left = end - now_ns();

	return left > 0 ? (int)((left + 999999) / 1000000) : 0;
}

/* Mask of an endpoint that has no mapped connection (unbound ... listening, connecting). `pending`: a
 * non-blocking connect is, so that POLLOUT of the descriptor will mean its end. */
static int asked_mask(struct ep *ep, int fd, bool *pending)
{
	const struct mic_scif_request rq = {.op = MIC_SCIF_MASK, .sid = ep->sid};
	struct answer ans = {0};
	int saved = errno, rc;
	char drop;

	if (ep_attach(ep) == 0)
		return ep_mask(ep);
	rc = node_call(&rq, NULL, &ans, false);
	answer_close(&ans);
	if (ans.head.v[2]) /* a request was withdrawn: one token less */
		(void)!recv(fd, &drop, 1, MSG_DONTWAIT);
	errno = saved;
	*pending = ans.head.v[1];
	return rc < 0 ? POLLERR : (int)ans.head.v[0];
}

/* Look at one entry; what poll(2) must watch for it goes to `native`. */
static void look(struct pollfd *e, struct pollfd *native)
{
	struct ep *ep;

	native->fd = e->fd;
	native->events = e->events;
	native->revents = 0;
	e->revents = 0;
	if (e->fd < 0 || ep_get(e->fd, &ep) < 0)
		return; /* not an endpoint: poll(2) knows */
	bool pending = false;
	int mask = mic_load_acquire(&ep->attached) ? ep_mask(ep) : asked_mask(ep, e->fd, &pending);

	e->revents = (short)(mask & (e->events | ALWAYS));
	native->events = e->events & POLLIN;
	if (ep->attached || pending)
		native->events |= e->events & POLLOUT;
	ep_put(ep);
}

/* Before sleeping: nothing stale may be ready, everything that will come must show. */
static void arm(struct pollfd *e)
{
	struct ep *ep;

	if (e->fd < 0 || ep_get(e->fd, &ep) < 0)
		return;
	if (ep->attached && !mic_load_relaxed(&ep->ctl->uncollected)) {
		int mask;

		/* Both locks may be held for long by a blocked call: then that call keeps things right. */
		if (try_lock(ep->ctl->rx_lock)) {
			if (!(ep_mask(ep) & POLLIN))
				token_clear(ep, e->fd, true);
			unlock(ep->ctl->rx_lock);
		}
		mask = ep_mask(ep);
		if ((e->events & POLLOUT) && !(mask & POLLOUT) && try_lock(ep->ctl->tx_lock)) {
			want_room(ep, e->fd);
			unlock(ep->ctl->tx_lock);
		}
	}
	ep_put(ep);
}

static int count(const struct pollfd *e, unsigned n)
{
	int ready = 0;

	for (unsigned i = 0; i < n; i++)
		ready += e[i].revents != 0;
	return ready;
}

/* One pass: exact look, then poll(2) for the descriptors of other kinds without waiting. */
static int pass(struct pollfd *e, struct pollfd *native, unsigned n, bool *foreign)
{
	*foreign = false;
	for (unsigned i = 0; i < n; i++) {
		struct ep *ep;

		look(&e[i], &native[i]);
		if (e[i].fd >= 0 && ep_get(e[i].fd, &ep) == 0)
			ep_put(ep);
		else
			*foreign = true;
	}
	return count(e, n);
}

static int take_foreign(struct pollfd *e, struct pollfd *native, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		struct ep *ep;

		if (e[i].fd < 0)
			continue;
		if (ep_get(e[i].fd, &ep) == 0)
			ep_put(ep);
		else
			e[i].revents = native[i].revents;
	}
	return count(e, n);
}

static int poll_loop(struct pollfd *e, struct pollfd *native, unsigned n, int timeout)
{
	int64_t end = timeout > 0 ? now_ns() + timeout * INT64_C(1000000) : 0;
	bool armed = false;

	for (;;) {
		bool foreign;
		int ready = pass(e, native, n, &foreign), wait = timeout > 0 ? left_ms(end) : timeout;

		if (ready)
			wait = 0;
		if (ready && !foreign)
			return ready;
		if (!ready && wait && !armed) {
			for (unsigned i = 0; i < n; i++)
				arm(&e[i]);
			armed = true;
			continue; /* look again: something may have come before it was armed */
		}
		int rc = poll(native, n, wait);

		if (rc < 0)
			return -errno;
		ready = take_foreign(e, native, n);
		if (ready || (timeout >= 0 && wait == 0))
			return ready;
		armed = false;
	}
}

API int scif_poll(struct scif_pollepd *epds, unsigned int nepds, long timeout)
{
	struct pollfd stack[STACK_FDS], *native = stack;
	struct pollfd *e = (struct pollfd *)(void *)epds;
	int saved = errno, rc;

	_Static_assert(sizeof(struct scif_pollepd) == sizeof(struct pollfd), "pollepd");
	if (nepds && (nepds > 1u << 20 || user_writable(epds, nepds * sizeof *epds) < 0))
		return fail(nepds > 1u << 20 ? -EINVAL : -EFAULT);
	if (nepds > STACK_FDS)
		native = malloc(nepds * sizeof *native);
	if (!native)
		return fail(-ENOMEM);
	rc = poll_loop(e, native, nepds, (int)timeout);
	if (native != stack)
		free(native);
	if (rc < 0)
		return fail(rc);
	errno = saved;
	return rc;
}
