/* virtio-net device half: frames between the host's local end and the rings (VOP 8.5, VOP-58..64). */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "mic/barrier.h"
#include "mic/iov.h"
#include "mic/linger.h"
#include "mic/net.h"
#include "net_end.h"
#include "net_hold.h"

enum { TO_CARD = 0, FROM_CARD = 1 };

#define CHAIN_SEGS  256u         /* segments of one chain at most */
#define POOL_SEGS   (1024u - 1u) /* readv takes 1024, one is the overflow area */
#define BATCH       16u          /* frames per direction before the other one gets its turn */
#define LOOK_ROUNDS 64u          /* busy rounds between two looks at control_fd */
#define SIGNAL_NS   100000000ull /* busy time after which the caller's signal handlers get a turn */
#define MAX_RING    128u

/* Chains taken from the card's receive ring and not used yet. What is taken and not given back is
 * exactly last_avail - used_idx of the ring; when that does not hold, the ring was set up anew. */
struct stash {
	uint16_t head[MAX_RING];
	uint16_t segs[MAX_RING];
	uint64_t len[MAX_RING];
	unsigned first, count; /* chains */
	struct iovec iov[POOL_SEGS + 1];
	unsigned iov_first, iov_count;
	uint64_t bytes;
};

struct mic_net_dev {
	struct mic_vdev *dev;
	struct mic_net_end end;
	struct net_hold *hold; /* frames that fault filters keep */
	struct mic_pcap *cap;
	struct mic_net_stats stats;
	struct mic_linger linger;
	struct stash stash;
	uint8_t *over;    /* what did not fit into the posted chains */
	uint64_t held;    /* length of a frame that waits for more chains, 0 = none */
	uint64_t held_at; /* how much of it lies in the chains already; the rest is in `over` */
	bool starved;     /* the local end is not read: no chains */
	bool mergeable, data_valid;
	uint64_t accepted; /* features that the card took */
	uint64_t want;     /* bytes of chains that hold any frame */
	struct iovec tx[CHAIN_SEGS];
};

struct mic_net_dev *mic_net_dev_create(struct mic_vdev *dev, int local_fd, struct mic_resp *resp)
{
	struct mic_net_dev *nd = calloc(1, sizeof *nd);

	if (!nd)
		return NULL;
	nd->dev = dev;
	nd->accepted = UINT64_MAX;
	nd->over = malloc(MIC_NET_FRAME_MAX + MIC_NET_HDR_FULL);
	nd->hold = net_hold_create(dev->bus, &dev->fault_target);
	int rc = mic_net_end_init(&nd->end, local_fd, resp);

	if (rc < 0 || !nd->over || !nd->hold) {
		mic_net_dev_destroy(nd);
		errno = rc < 0 ? -rc : ENOMEM;
		return NULL;
	}
	mic_linger_init(&nd->linger, dev->spin_us);
	return nd;
}

void mic_net_dev_destroy(struct mic_net_dev *nd)
{
	if (!nd)
		return;
	mic_net_end_fini(&nd->end);
	net_hold_destroy(nd->hold);
	free(nd->over);
	free(nd);
}

int mic_net_dev_error(const struct mic_net_dev *nd)
{
	return nd->end.error;
}

void mic_net_dev_accepted(struct mic_net_dev *nd, uint64_t features)
{
	nd->accepted = features;
}

void mic_net_dev_capture(struct mic_net_dev *nd, struct mic_pcap *cap)
{
	nd->cap = cap;
}

void mic_net_dev_stats(const struct mic_net_dev *nd, struct mic_net_stats *out)
{
	mic_net_stats_read(&nd->stats, out);
}

static void capture(struct mic_net_dev *nd, const struct iovec *iov, unsigned n, uint64_t len)
{
	if (nd->cap)
		mic_pcap_frame(nd->cap, iov, n, nd->end.hdr_len, len - nd->end.hdr_len);
}

/* Do fault filters have a say, or frames that they keep? */
static bool sick(const struct mic_net_dev *nd)
{
	return fault_armed(nd->dev->bus, MIC_FAULT_AT_PACKET) || net_hold_count(nd->hold);
}

/* --- to the card ------------------------------------------------------------------------------ */

static void stash_clear(struct mic_net_dev *nd)
{
	struct stash *s = &nd->stash;

	s->first = s->count = s->iov_first = s->iov_count = 0;
	s->bytes = nd->held = 0;
}

/* Move what is left to the front, so that a chain of any length fits behind it. */
static void stash_compact(struct stash *s)
{
	memmove(s->head, s->head + s->first, s->count * sizeof s->head[0]);
	memmove(s->segs, s->segs + s->first, s->count * sizeof s->segs[0]);
	memmove(s->len, s->len + s->first, s->count * sizeof s->len[0]);
	memmove(s->iov, s->iov + s->iov_first, s->iov_count * sizeof s->iov[0]);
	s->first = s->iov_first = 0;
}

/* Room for one more chain of CHAIN_SEGS segments? */
static bool stash_room(struct stash *s)
{
	if (s->first + s->count == MAX_RING || s->iov_first + s->iov_count + CHAIN_SEGS > POOL_SEGS)
		stash_compact(s);
	return s->count < MAX_RING && s->iov_count + CHAIN_SEGS <= POOL_SEGS;
}

/* Take one posted chain. 1 taken, 0 none, -errno: the ring is broken. */
static int stash_take(struct mic_net_dev *nd)
{
	struct stash *s = &nd->stash;
	struct mic_vq *vq = &nd->dev->vq[TO_CARD];
	struct iovec *at = &s->iov[s->iov_first + s->iov_count];
	struct mic_chain chain;
	int rc = mic_vq_pop(vq, &chain, at, CHAIN_SEGS);

	if (rc <= 0)
		return rc;
	if (chain.in_len < nd->end.hdr_len) {
		/* Of no use for any frame: give it back, do not meet it again. */
		mic_vq_push(vq, chain.head, 0);
		mic_vdev_complete(nd->dev, vq);
		return 1;
	}
	if (chain.out_num)
		memmove(at, at + chain.out_num, chain.in_num * sizeof *at);
	unsigned i = s->first + s->count++;

	s->head[i] = chain.head;
	s->segs[i] = (uint16_t)chain.in_num;
	s->len[i] = chain.in_len;
	s->iov_count += chain.in_num;
	s->bytes += chain.in_len;
	return 1;
}

static int stash_fill(struct mic_net_dev *nd)
{
	struct stash *s = &nd->stash;

	/* Bounded: a driver that posts useless chains as fast as they come back gets no more than a
	 * ring full of attention. */
	for (unsigned i = 0; i < MAX_RING && (nd->mergeable ? s->bytes < nd->want : !s->count); i++) {
		int rc = stash_room(s) ? stash_take(nd) : 0;

		if (rc <= 0)
			return rc;
	}
	return 0;
}

/* Use the first n chains for a frame of len bytes and publish them together: the driver must never
 * see a part of a merged frame. */
static void stash_use(struct mic_net_dev *nd, unsigned n, uint64_t len)
{
	struct stash *s = &nd->stash;
	struct mic_vq *vq = &nd->dev->vq[TO_CARD];

	for (unsigned i = 0; i < n; i++) {
		unsigned c = s->first + i;
		uint64_t part = s->len[c] < len ? s->len[c] : len;

		mic_vq_fill(vq, s->head[c], (uint32_t)part);
		len -= part;
		s->bytes -= s->len[c];
		s->iov_first += s->segs[c];
		s->iov_count -= s->segs[c];
	}
	mic_vq_publish(vq);
	s->first += n;
	s->count -= n;
	mic_vdev_complete(nd->dev, vq);
}

/* A frame of len bytes lies in the first chains: finish its header and hand it over. */
static void deliver(struct mic_net_dev *nd, uint64_t len)
{
	struct stash *s = &nd->stash;
	const struct iovec *iov = s->iov + s->iov_first;
	unsigned n = 0;

	for (uint64_t room = 0; room < len; n++)
		room += s->len[s->first + n];
	if (nd->data_valid) {
		uint8_t flags = 0;

		mic_iov_read(iov, s->iov_count, 0, &flags, 1);
		flags |= 2; /* VOP 8.5: the stock backend marks every frame as verified */
		mic_iov_write(iov, s->iov_count, 0, &flags, 1);
	}
	if (nd->end.hdr_len == MIC_NET_HDR_FULL) {
		uint8_t merged[2] = {(uint8_t)n, (uint8_t)(n >> 8)};

		mic_iov_write(iov, s->iov_count, 10, merged, 2);
	}
	capture(nd, iov, s->iov_count, len);
	mic_count(&nd->stats.to_card_packets, 1u);
	mic_count(&nd->stats.to_card_bytes, len - nd->end.hdr_len);
	stash_use(nd, n, len);
}

/* A frame of nd->held bytes did not fit. 1 delivered or dropped, 0 still waiting, -errno. */
static int deliver_held(struct mic_net_dev *nd)
{
	struct stash *s = &nd->stash;

	if (!nd->mergeable) {
		nd->held = 0; /* one chain per frame, and it is too short: drop, keep the chain */
		mic_count(&nd->stats.to_card_drops, 1u);
		return 1;
	}
	for (unsigned i = 0; s->bytes < nd->held; i++) {
		int rc = stash_room(s) ? stash_take(nd) : 0;

		if (rc < 0)
			return rc;
		if (rc == 0 && s->count < nd->dev->vq[TO_CARD].num && stash_room(s))
			return 0; /* more may be posted */
		if (rc == 0 || i > MAX_RING) {
			nd->held = 0; /* every buffer of the ring is here and it is not enough */
			mic_count(&nd->stats.to_card_drops, 1u);
			return 1;
		}
	}
	mic_iov_write(s->iov + s->iov_first, s->iov_count, nd->held_at, nd->over, nd->held - nd->held_at);
	deliver(nd, nd->held);
	nd->held = 0;
	return 1;
}

/* 1 a frame moved, 0 nothing to do, -1 the local end is gone; broken rings are dealt with here. */
static int to_card_one(struct mic_net_dev *nd)
{
	struct stash *s = &nd->stash;
	int rc = stash_fill(nd);

	if (rc == 0 && nd->held)
		rc = deliver_held(nd);
	else if (rc == 0 && s->count)
		goto receive;
	if (rc < 0)
		mic_vdev_broken(nd->dev, &nd->dev->vq[TO_CARD]);
	nd->starved = rc <= 0;
	return rc > 0;
receive:;
	unsigned segs = nd->mergeable ? s->iov_count : s->segs[s->first];
	uint64_t room = nd->mergeable ? s->bytes : s->len[s->first];
	struct iovec *last = &s->iov[s->iov_first + segs];
	struct iovec saved = *last; /* the next chain's first segment, or the spare entry */

	*last = (struct iovec){nd->over, MIC_NET_FRAME_MAX + MIC_NET_HDR_FULL};
	const struct iovec *iov = &s->iov[s->iov_first];
	long got = sick(nd) ? net_hold_recv(nd->hold, &nd->end, iov, segs + 1)
			    : mic_net_end_recv(&nd->end, iov, segs + 1);

	*last = saved;
	nd->starved = false;
	if (got <= 0)
		return (int)got;
	if ((uint64_t)got <= nd->end.hdr_len) {
		mic_count(&nd->stats.to_card_drops, 1u);
	} else if ((uint64_t)got > room) {
		nd->held = (uint64_t)got;
		nd->held_at = room;
		if (deliver_held(nd) < 0)
			mic_vdev_broken(nd->dev, &nd->dev->vq[TO_CARD]);
	} else {
		deliver(nd, (uint64_t)got);
	}
	return 1;
}

/* --- from the card ---------------------------------------------------------------------------- */

static int from_card_one(struct mic_net_dev *nd)
{
	struct mic_vq *vq = &nd->dev->vq[FROM_CARD];
	struct mic_chain chain;
	bool filtered = sick(nd);

	if (filtered && net_hold_full(nd->hold, HOLD_TO_HOST))
		return 0;
	int rc = mic_vq_pop(vq, &chain, nd->tx, CHAIN_SEGS);

	if (rc < 0)
		mic_vdev_broken(nd->dev, vq);
	if (rc <= 0)
		return 0;
	rc = filtered ? net_hold_send(nd->hold, &nd->end, nd->tx, chain.out_num, chain.out_len)
		      : mic_net_end_send(&nd->end, nd->tx, chain.out_num, chain.out_len);
	if (rc == 0) {
		capture(nd, nd->tx, chain.out_num, chain.out_len);
		mic_count(&nd->stats.from_card_packets, 1u);
		mic_count(&nd->stats.from_card_bytes, chain.out_len - nd->end.hdr_len);
	} else {
		mic_count(&nd->stats.from_card_drops, 1u);
	}
	mic_vq_push(vq, chain.head, 0);
	mic_vdev_complete(nd->dev, vq);
	return rc < 0 ? -1 : 1;
}

/* --- loop ------------------------------------------------------------------------------------- */

/* Features and ring state may have changed since the last run. */
static void settle(struct mic_net_dev *nd)
{
	const struct mic_vq *vq = &nd->dev->vq[TO_CARD];
	uint64_t tso = MIC_NET_F(GUEST_TSO4) | MIC_NET_F(GUEST_TSO6);
	uint64_t features = vq->features & nd->accepted;

	if ((uint16_t)(vq->last_avail - vq->used_idx) != nd->stash.count)
		stash_clear(nd);
	if (nd->end.hdr_len != mic_net_hdr_len(features))
		net_hold_clear(nd->hold); /* kept frames have headers of the old length */
	nd->end.hdr_len = mic_net_hdr_len(features);
	nd->mergeable = features & MIC_NET_F(MRG_RXBUF);
	nd->data_valid = (features & tso) && !(features & MIC_NET_F(GUEST_CSUM));
	nd->want = MIC_NET_HDR_FULL + (features & tso ? MIC_NET_FRAME_MAX : 2048u);
}

static bool ring_ready(const struct mic_vq *vq)
{
	return vq->used && !vq->broken;
}

/* Up to BATCH frames each way. 1 something moved, 0 nothing, -1 the local end is gone. */
static int pump(struct mic_net_dev *nd)
{
	int rc = net_hold_count(nd->hold) ? net_hold_flush(nd->hold, &nd->end) : 0, moved = rc > 0;

	for (unsigned i = 0; i < BATCH && rc >= 0 && ring_ready(&nd->dev->vq[FROM_CARD]); i++) {
		rc = from_card_one(nd);
		if (rc <= 0)
			break;
		moved = 1;
	}
	for (unsigned i = 0; i < BATCH && rc >= 0 && ring_ready(&nd->dev->vq[TO_CARD]); i++) {
		rc = to_card_one(nd);
		if (rc <= 0)
			break;
		moved = 1;
	}
	return rc < 0 ? -1 : moved;
}

/* Before sleeping: ask for the kicks that matter. True when work came meanwhile. */
static bool arm(struct mic_net_dev *nd)
{
	struct mic_vq *in = &nd->dev->vq[FROM_CARD], *out = &nd->dev->vq[TO_CARD];
	bool again = false;

	if (ring_ready(in) && !net_hold_full(nd->hold, HOLD_TO_HOST))
		again = mic_vq_enable_kick(in);
	if (ring_ready(out) && nd->starved)
		again |= mic_vq_enable_kick(out);
	return again || mic_vdev_handshake(nd->dev);
}

static void disarm(struct mic_net_dev *nd)
{
	for (unsigned q = 0; q < 2; q++)
		if (ring_ready(&nd->dev->vq[q]))
			mic_vq_disable_kick(&nd->dev->vq[q]);
}

/* Wait, or with timeout 0 only look. Returns a mic_run, or 0 to go on. */
static int look(struct mic_net_dev *nd, bool serving, int timeout_ms)
{
	struct mic_vdev *dev = nd->dev;
	bool deaf = !serving || nd->starved || !ring_ready(&dev->vq[TO_CARD]);
	bool blocked = deaf || net_hold_full(nd->hold, HOLD_TO_CARD);
	int extra[2] = {mic_net_end_fd(&nd->end, blocked), -1};

	if (net_hold_count(nd->hold) && net_hold_soon(nd->hold, !deaf, &extra[1]))
		timeout_ms = 0;
	int ready = mic_vdev_sleep(dev, extra, 2, timeout_ms);

	if (ready == -EINTR)
		return MIC_RUN_SIGNAL;
	return mic_net_end_woken(&nd->end, ready, blocked);
}

int mic_net_dev_run(struct mic_net_dev *nd)
{
	uint64_t began = mic_now_ns();
	unsigned rounds = 0;

	settle(nd);
	disarm(nd);
	for (;;) {
		if (mic_vdev_handshake(nd->dev))
			return MIC_RUN_HANDSHAKE;
		bool serving = mic_vdev_driver_ok(nd->dev);
		int moved = serving ? pump(nd) : 0;
		int why = 0;

		if (moved < 0)
			return MIC_RUN_LOCAL;
		if (moved) {
			mic_linger_hit(&nd->linger);
			if (++rounds % LOOK_ROUNDS == 0)
				why = look(nd, serving, 0);
			if (!why && rounds % LOOK_ROUNDS == 0 && mic_now_ns() - began > SIGNAL_NS)
				why = MIC_RUN_SIGNAL;
		} else if (!serving || !mic_linger_again(&nd->linger)) {
			if (!arm(nd)) {
				mic_count(&nd->stats.sleeps, 1u);
				why = look(nd, serving, -1);
				began = mic_now_ns();
			}
			disarm(nd);
		}
		if (why)
			return why;
	}
}
