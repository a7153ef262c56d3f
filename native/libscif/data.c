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
#include "fence.h"
#include "internal.h"

#include "mic/layout_gen.h"

#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define RING        MIC_SCIF_EP_RING
#define CAPACITY    MIC_SCIF_EP_CAPACITY
#define HOT_STREAK  64u /* waits in a row after which the token stays where it is */
#define HOT_GAP_US  20u
#define SPIN_MAX_US 50u
#define SPIN_MIN_US 1u
#define LINE        64u
#define PIECE_MIN   1024u /* published at once: the other side copies meanwhile */
#define PIECE_MAX   8192u

static uint32_t distance(uint32_t from, uint32_t to)
{
	return (to - from) & (RING - 1);
}

static uint32_t state(const struct ep *ep)
{
	return mic_load_acquire(&ep->ctl->state);
}

/* Bytes that can be read, or -EPROTO when the peer's index is not an offset. rx_lock is held. */
static int used(struct ep *ep)
{
	uint32_t w = mic_load_acquire(&ep->qp->local_write); /* pairs with publish_write() */

	if (w >= RING)
		return -EPROTO;
	ep->ctl->rx_write = w;
	return (int)distance(ep->ctl->rx_read, w);
}

static uint32_t least(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

/* Bytes that may be on their way to a receiver that has promised to take `promised`. */
static uint32_t window(uint32_t promised)
{
	return promised < RING - 1 - CAPACITY ? CAPACITY + promised : RING - 1;
}

/* A quarter of the window, whole cache lines. */
static uint32_t piece(uint32_t promised)
{
	uint32_t n = window(promised) / 4 / LINE * LINE;

	return n < PIECE_MIN ? PIECE_MIN : least(n, PIECE_MAX);
}

/* Bytes that a blocking send may write now, and in `most` how many at once. tx_lock is held. */
static int room_ahead(struct ep *ep, uint32_t *most)
{
	uint64_t word = mic_load_acquire(&ep->qp->local_read); /* pairs with publish_read() */
	uint32_t r = (uint32_t)word, promised = (uint32_t)(word >> 32);

	if (r >= RING)
		return -EPROTO;
	ep->ctl->tx_read = r;
	*most = piece(promised);
	uint32_t n = distance(r, ep->ctl->tx_write), max = window(promised);

	return n < max ? (int)(max - n) : 0;
}

/* Bytes that fit without a reader, as last seen. */
static uint32_t known_room(struct ep *ep)
{
	uint32_t n = distance(ep->ctl->tx_read, ep->ctl->tx_write);

	return n < CAPACITY ? CAPACITY - n : 0;
}

/* Bytes that fit without a reader. tx_lock is held. */
static int room(struct ep *ep)
{
	uint32_t most;
	int n = room_ahead(ep, &most);

	return n < 0 ? n : (int)known_room(ep);
}

static void raise_word(uint32_t *word)
{
	int saved = errno;

	mic_fetch_add(word, 1);
	(void)syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
	errno = saved;
}

static void notify_node(struct mic_scif_notify *page, uint64_t *bits, uint32_t slot)
{
	if (slot >= MIC_SCIF_SLOTS)
		return;
	mic_fetch_or(&bits[slot / 64], 1ull << (slot % 64));
	raise_word(&page->seq);
}

/* --- the descriptor's own readiness ------------------------------------------------------------ */

void fill(int fd)
{
	static const char junk[16384];
	int saved = errno;

	while (send(fd, junk, sizeof junk, MSG_DONTWAIT | MSG_NOSIGNAL) > 0)
		;
	errno = saved;
}

/* Take one token off; the notifier may be just about to put it on. False: there is none. */
static bool take_token(int fd)
{
	uint64_t end = mic_timestamp() + 200 * ticks_per_us();
	char t = 0;

	do {
		if (recv(fd, &t, 1, MSG_DONTWAIT | MSG_PEEK) > 0)
			/* The last token, of a disconnect, stays: the node notices our close by it. */
			return t == 'T' && recv(fd, &t, 1, MSG_DONTWAIT) > 0;
		mic_cpu_relax();
	} while (mic_timestamp() < end);
	return false;
}

/* A notification that the notifier has not seen yet is simply taken back. */
static bool cancel_notify(struct ep *ep)
{
	uint32_t slot = ep->qp->notify_slot;
	uint64_t bit = 1ull << (slot % 64);

	return slot < MIC_SCIF_SLOTS && (mic_fetch_and(&ep->own_notify->rx[slot / 64], ~bit) & bit);
}

static void notify_self(struct ep *ep)
{
	mic_store_release(&ep->qp->told, ep->ctl->epoch + 1);
	notify_node(ep->own_notify, ep->own_notify->rx, ep->qp->notify_slot);
}

void token_clear(struct ep *ep, int fd, bool surely)
{
	struct mic_scif_ctl *ctl = ep->ctl;
	bool told = mic_load_acquire(&ep->qp->told) == ctl->epoch + 1;
	int saved = errno;
	char t;

	if (state(ep) != MIC_SCIF_EP_CONNECTED)
		return;
	if (surely) /* somebody found the descriptor ready, or may: look even if nobody was told */
		while (recv(fd, &t, 1, MSG_DONTWAIT | MSG_PEEK) > 0 && t == 'T' && !told)
			(void)!recv(fd, &t, 1, MSG_DONTWAIT);
	if (told && !cancel_notify(ep))
		take_token(fd);
	errno = saved;
	if (!told)
		return;
	mic_store_release(&ep->peer->rx_epoch, ++ctl->epoch);
	heavy_fence(); /* pairs with the light fence in publish_write() */
	if (used(ep) > 0)
		notify_self(ep);
}

void want_room(struct ep *ep, int fd)
{
	fill(fd);
	mic_store_release(&ep->peer->tx_native, 1u);
	heavy_fence(); /* pairs with the light fence in publish_read() */
	if (room(ep) > 0 && mic_exchange(&ep->peer->tx_native, 0u))
		notify_node(ep->own_notify, ep->own_notify->tx, ep->qp->notify_slot);
}

/* --- publishing --------------------------------------------------------------------------------- */

static void publish_write(struct ep *ep, uint64_t before)
{
	struct mic_scif_ctl *ctl = ep->ctl;

	mic_store_release(&ep->peer->local_write, ctl->tx_write);
	light_fence(); /* pairs with the heavy fences of the receiver */
	if (mic_load_acquire(&ep->qp->rx_asleep)) {
		raise_word(&ep->peer->rx_seq);
		return;
	}
	if (mic_load_acquire(&ep->qp->rx_wait) == before + 1)
		return;
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
	memcpy(copy, q->inline_data, sizeof copy);
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

int ep_mask(struct ep *ep)
{
	struct mic_scif_ctl *ctl = ep->ctl;
	uint32_t st = state(ep);
	uint32_t w = mic_load_acquire(&ep->qp->local_write);
	uint32_t r = (uint32_t)mic_load_acquire(&ep->qp->local_read);
	int mask = st == MIC_SCIF_EP_CONNECTED && !node_dead(ep) ? 0 : POLLHUP;

	if (mic_load_relaxed(&ctl->uncollected))
		return POLLOUT;
	if (w < RING && w != mic_load_relaxed(&ctl->rx_read))
		mask |= POLLIN;
	if (r < RING && distance(r, mic_load_relaxed(&ctl->tx_write)) < CAPACITY)
		mask |= POLLOUT;
	return mask;
}
