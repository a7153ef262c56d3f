/* send and recv: the two rings of a connection, and who wakes whom (SCIF 2.7).
 *
 * Without a reader 4095 bytes fit. A program that waits in recv has promised to take what it asked for:
 * beside its read index it tells how many bytes that still is, and a blocking send may be as far ahead of
 * it as if they were taken already, within what the ring holds. Non-blocking sends and poll never look
 * at the promise. When recv ends early (a signal), it takes the promise back and then what came on its
 * strength, which fits into its buffer; so again at most 4095 bytes stay, except that a sender which
 * was copying at that moment may add that one piece. When the reader is killed and others share its
 * endpoint, the promise stands until their next recv.
 *
 * All positions are changed under the lock of their direction. After publishing, a side looks at
 * what its peer left in this side's own queue pair page: does it sleep (wake it), does it wait in
 * recv for exactly these bytes (nothing to do), or may it sit in poll(2) on its descriptor (notify
 * its node, once until it takes the token off again). */
#include "stream.h"

#include <sched.h>
#include <string.h>
#include <sys/socket.h>

#define HOT_STREAK  64u  /* waits in a row after which the token stays where it is */
#define HOT_GAP_US  100u /* more than a notifier takes that wakes on our CPU: else each calls the next */
#define SPIN_MAX_US 50u
#define SPIN_MIN_US 1u

/* --- publishing --------------------------------------------------------------------------------- */

static void publish_write(struct ep *ep, uint64_t before)
{
	struct mic_scif_ctl *ctl = ep->ctl;

	mic_store_release(&ep->peer->local_write, ctl->tx_write);
	light_fence(); /* pairs with the heavy fences of the receiver */
	if (mic_load_acquire(&ep->qp->rx_asleep)) {
		/* Nobody: it is awake again and may have looked before this was there, or it was killed. */
		if (raise_word(&ep->peer->rx_seq) > 0)
			return;
	} else if (mic_load_acquire(&ep->qp->rx_wait) == before + 1) {
		return;
	}
	uint32_t epoch = mic_load_acquire(&ep->qp->rx_epoch) + 1;

	if (ctl->notified != epoch) {
		ctl->notified = epoch;
		mic_store_release(&ep->peer->told, epoch);
		notify_node(ep->notify, ep->notify->rx, ep->slot);
	}
}

static void publish_read(struct ep *ep)
{
	const struct mic_scif_ctl *ctl = ep->ctl;

	mic_store_release(&ep->peer->local_read, ctl->rx_read | (uint64_t)ctl->promised << 32);
	light_fence(); /* pairs with the heavy fences of the sender */
	if (mic_load_acquire(&ep->qp->tx_asleep))
		raise_word(&ep->peer->tx_seq);
	/* Poll shows room only where there would be some without our promise. */
	if (mic_load_relaxed(&ep->qp->tx_native) &&
	    distance(ctl->rx_read, mic_load_acquire(&ep->qp->local_write)) < CAPACITY &&
	    mic_exchange(&ep->qp->tx_native, 0u))
		notify_node(ep->notify, ep->notify->tx, ep->slot);
}

/* --- waiting ------------------------------------------------------------------------------------ */

static bool rx_ready(struct ep *ep)
{
	return mic_load_acquire(&ep->qp->local_write) != ep->ctl->rx_read ||
	       state(ep) != MIC_SCIF_EP_CONNECTED;
}

static bool tx_ready(struct ep *ep)
{
	uint32_t most;

	return room_ahead(ep, &most) != 0 || state(ep) != MIC_SCIF_EP_CONNECTED;
}

/* Room for a whole piece, or for the rest: worth copying. */
static bool tx_roomy(struct ep *ep)
{
	uint32_t most;
	int n = room_ahead(ep, &most);

	return n < 0 || (uint32_t)n >= least(ep->want, most) || state(ep) != MIC_SCIF_EP_CONNECTED;
}

/* Look for a while. After the first microseconds give the CPU away between looks: when the peer waits
 * for this very CPU, spinning would only delay it. */
static bool spin_for(struct ep *ep, bool (*ready)(struct ep *))
{
	uint64_t start = mic_timestamp(), alone = 4 * ticks_per_us(), now = start;

	do {
		for (int i = 0; i < 32; i++) {
			if (ready(ep))
				return true;
			if (now != start) /* a pause is as long as a cache miss */
				mic_cpu_relax();
		}
		now = mic_timestamp();
		if (now - start > alone && now - start < ep->spin)
			sched_yield();
	} while (now - start < ep->spin);
	return false;
}

/* How long to look the next time: a wait that was nearly over is worth it, a long one is not. */
static void learn(struct ep *ep, uint64_t waited)
{
	uint64_t us = ticks_per_us();

	if (!spin_allowed())
		return;
	if (waited < 4 * SPIN_MAX_US * us)
		ep->spin = (uint32_t)(SPIN_MAX_US * us);
	else if (ep->spin > SPIN_MIN_US * us)
		ep->spin /= 2;
}

/* Sleep until ready. `flag` lies in the peer's page and asks it to raise `seq` in ours. */
static int sleep_until(struct ep *ep, uint32_t *seq, uint32_t *flag, bool (*ready)(struct ep *))
{
	uint64_t start = mic_timestamp();
	int rc = 0;

	while (rc == 0) {
		uint32_t seen = mic_load_acquire(seq);

		mic_store_release(flag, 1u);
		heavy_fence(); /* pairs with the light fence in publish_*() */
		if (ready(ep))
			break;
		rc = sleep_on(ep, seq, seen);
	}
	mic_store_release(flag, 0u);
	learn(ep, mic_timestamp() - start);
	return rc;
}

/* Wait in recv until there is a byte or the peer is gone; rx_lock is held. 0, -EINTR, -ENODEV. */
static int wait_bytes(struct ep *ep)
{
	/* While a token is out the sender does not ask: leave its cache line alone. */
	if (mic_load_relaxed(&ep->qp->told) != ep->ctl->epoch + 1)
		mic_store_release(&ep->peer->rx_wait, ep->ctl->received + 1);
	if (spin_for(ep, rx_ready))
		return 0;
	return sleep_until(ep, &ep->qp->rx_seq, &ep->peer->rx_asleep, rx_ready);
}

/* --- send --------------------------------------------------------------------------------------- */

/* Beside the ring, a short message travels in the cache line of the index: one miss for the reader
 * instead of two. The place is invalid while it changes. */
static void put_inline(struct ep *ep, const uint8_t *p, uint32_t n)
{
	struct mic_scif_qpage *q = ep->peer;
	bool fits = n <= sizeof q->inline_data;

	if (ep->ctl->tx_inline)
		mic_store_release(&q->inline_at, MIC_SCIF_NOT_INLINE);
	mic_signal_fence(); /* the compiler keeps stores in order; the processor does */
	ep->ctl->tx_inline = fits;
	if (!fits)
		return;
	memcpy(q->inline_data, p, n);
	mic_store_relaxed(&q->inline_len, n);
	mic_store_release(&q->inline_at, ep->ctl->tx_write);
}

static void put(struct ep *ep, const uint8_t *p, uint32_t n)
{
	struct mic_scif_ctl *ctl = ep->ctl;
	uint32_t head = least(RING - ctl->tx_write, n);

	put_inline(ep, p, n);
	memcpy(ep->peer_ring + ctl->tx_write, p, head);
	if (n > head)
		memcpy(ep->peer_ring, p + head, n - head);
	ctl->tx_write = (ctl->tx_write + n) & (RING - 1);
	uint64_t before = ctl->sent;

	ctl->sent = before + n;
	publish_write(ep, before);
}

/* How much to put now: 0 none, -errno. In pieces, so that the reader copies while we do; whole ones when
 * waiting for a moment gives that, since the ends of pieces then keep to their own cache lines. */
static int next_piece(struct ep *ep, uint32_t left, bool block)
{
	uint32_t most = left;
	int n;

	/* A stale view of the reader is good enough while it shows room without its promise. */
	if (known_room(ep) >= left && left <= PIECE_MIN)
		return (int)left;
	ep->want = left;
	if (block) {
		if (!tx_roomy(ep))
			spin_for(ep, tx_roomy);
		n = room_ahead(ep, &most);
	} else {
		n = room(ep);
	}
	if (n < 0)
		return -ECONNRESET; /* the peer damaged its index: it is as good as gone */
	return (int)least((uint32_t)n, least(left, most));
}

/* tx_lock is held. Bytes sent, or -errno when none. */
static int send_some(struct ep *ep, int fd, const uint8_t *p, uint32_t len, bool block)
{
	uint32_t done = 0;
	int rc = 0;

	while (done < len && rc >= 0) {
		if (state(ep) != MIC_SCIF_EP_CONNECTED) {
			rc = -ECONNRESET;
			break;
		}
		rc = next_piece(ep, len - done, block);
		if (rc > 0) {
			put(ep, p + done, (uint32_t)rc);
			done += (uint32_t)rc;
		} else if (rc == 0 && block) {
			rc = sleep_until(ep, &ep->qp->tx_seq, &ep->peer->tx_asleep, tx_ready);
		} else if (rc == 0) {
			want_room(ep, fd);
			break;
		}
	}
	return done || rc >= 0 ? (int)done : rc;
}

/* Checks that come before the state (SCIF 2.7). 1: go on. */
static int check_args(int len, int flags)
{
	if (len == 0)
		return 0;
	if (len < 0 || (flags && !(flags & 1)))
		return -EINVAL;
	return 1;
}

static int do_send(struct ep *ep, int fd, const void *msg, int len, int flags)
{
	int rc = user_readable(msg, (size_t)len);

	if (rc == 0)
		rc = ep_attach(ep);
	if (rc < 0)
		return rc;
	/* A reader that waits has just written there; publish_write() looks at it. */
	__builtin_prefetch(&ep->qp->rx_wait);
	lock(ep->ctl->tx_lock);
	rc = send_some(ep, fd, msg, (uint32_t)len, flags & SCIF_SEND_BLOCK);
	unlock(ep->ctl->tx_lock);
	return rc;
}

API int scif_send(scif_epd_t epd, void *msg, int len, int flags)
{
	struct ep *ep;
	int rc = check_args(len, flags);

	if (rc > 0)
		rc = ep_get(epd, &ep);
	if (rc < 0)
		return fail(rc);
	if (len == 0)
		return 0;
	rc = do_send(ep, epd, msg, len, flags);
	ep->checked = mic_timestamp();
	ep_put(ep);
	return rc < 0 ? fail(rc) : rc;
}

/* --- recv --------------------------------------------------------------------------------------- */

static bool get_inline(struct ep *ep, uint8_t *p, uint32_t n)
{
	const struct mic_scif_qpage *q = ep->qp;
	uint8_t copy[sizeof q->inline_data];
	uint32_t at = ep->ctl->rx_read;

	if (n > sizeof copy || mic_load_acquire(&q->inline_at) != at || mic_load_relaxed(&q->inline_len) < n)
		return false;
	mic_copy_once(copy, q->inline_data, sizeof copy);
	/* Loads stay in order: if the place is still valid, it was while we copied. */
	if (mic_load_acquire(&q->inline_at) != at)
		return false;
	memcpy(p, copy, n);
	return true;
}

static void get(struct ep *ep, uint8_t *p, uint32_t n)
{
	struct mic_scif_ctl *ctl = ep->ctl;
	uint32_t head = least(RING - ctl->rx_read, n);

	if (!get_inline(ep, p, n)) {
		/* Ask for all lines at once: each is in the sender's cache. */
		for (uint32_t i = 0; i < head; i += LINE)
			__builtin_prefetch(ep->ring + ctl->rx_read + i);
		memcpy(p, ep->ring + ctl->rx_read, head);
		if (n > head)
			memcpy(p + head, ep->ring, n - head);
	}
	ctl->rx_read = (ctl->rx_read + n) & (RING - 1);
	ctl->received += n;
	ctl->promised -= least(ctl->promised, n);
	publish_read(ep);
}

/* Tell the sender how many bytes we shall take, whatever happens. rx_lock is held. */
static void promise(struct ep *ep, uint32_t n)
{
	ep->ctl->promised = n;
	publish_read(ep);
}

/* Leave recv early, `len` bytes short: take back what the sender may count on, and then take what it
 * has sent because of that. Bytes taken. rx_lock is held. */
static uint32_t leave(struct ep *ep, uint8_t *p, uint32_t len)
{
	mic_store_release(&ep->peer->rx_wait, 0ull);
	promise(ep, 0);
	heavy_fence(); /* pairs with the light fence in publish_write() */
	int n = used(ep);

	if (n <= 0)
		return 0;
	len = least(len, (uint32_t)n);
	get(ep, p, len);
	if (used(ep) > 0)
		notify_self(ep);
	return len;
}

struct receive { /* one call of recv */
	uint64_t start;
	bool block, waited;
};

/* rx_lock is held. Bytes received, or -errno when none. */
static int recv_some(struct ep *ep, uint8_t *p, uint32_t len, struct receive *r)
{
	uint32_t done = 0;
	int rc = 0;

	/* Not for a few bytes, nor for those that are here. What a killed reader has promised must go. */
	if (r->block && len > PIECE_MIN && (uint32_t)used(ep) < len)
		promise(ep, len);
	else if (ep->ctl->promised)
		promise(ep, 0);
	while (done < len) {
		uint32_t st = state(ep); /* before the look: what came before the close counts */
		int n = used(ep);

		if (n > 0) {
			uint32_t k = least(least(len - done, (uint32_t)n), piece(ep->ctl->promised));

			get(ep, p + done, k);
			done += k;
			continue;
		}
		if (n < 0 || st != MIC_SCIF_EP_CONNECTED) {
			rc = -ECONNRESET;
			break;
		}
		if (!r->block)
			break;
		r->waited = true;
		rc = wait_bytes(ep);
		if (rc < 0) {
			done += leave(ep, p + done, len - done);
			break;
		}
	}
	return done ? (int)done : rc;
}

/* Leave the descriptor's token only where there are bytes, or where nobody polls it: a program that
 * has waited in recv many times in a row, with hardly anything in between. */
static void settle_token(struct ep *ep, int fd, const struct receive *r, int rc)
{
	struct mic_scif_ctl *ctl = ep->ctl;

	if (!r->block || r->start - ctl->last_recv > HOT_GAP_US * ticks_per_us())
		ctl->streak = 0;
	else if (r->waited && ctl->streak < HOT_STREAK)
		ctl->streak++;
	if (ctl->streak < HOT_STREAK && ctl->rx_read == ctl->rx_write)
		token_clear(ep, fd, rc == 0 && !r->block);
	/* More came than we had waited for, and the sender told nobody. */
	if (r->waited && ctl->rx_read != ctl->rx_write && mic_load_relaxed(&ep->qp->told) != ctl->epoch + 1)
		notify_self(ep);
	ctl->last_recv = mic_timestamp();
}

static int do_recv(struct ep *ep, int fd, void *msg, int len, int flags)
{
	struct receive r = {mic_timestamp(), flags & SCIF_RECV_BLOCK, false};
	int rc = ep_attach(ep);

	if (rc < 0)
		return rc;
	rc = user_writable(msg, (size_t)len);
	if (rc < 0)
		return rc;
	lock(ep->ctl->rx_lock);
	rc = recv_some(ep, msg, (uint32_t)len, &r);
	settle_token(ep, fd, &r, rc);
	unlock(ep->ctl->rx_lock);
	return rc;
}

API int scif_recv(scif_epd_t epd, void *msg, int len, int flags)
{
	struct ep *ep;
	int rc = check_args(len, flags);

	if (rc > 0)
		rc = ep_get(epd, &ep);
	if (rc < 0)
		return fail(rc);
	if (len == 0)
		return 0;
	rc = do_recv(ep, epd, msg, len, flags);
	ep->checked = mic_timestamp();
	ep_put(ep);
	return rc < 0 ? fail(rc) : rc;
}
