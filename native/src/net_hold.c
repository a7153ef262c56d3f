/* Frames that fault filters drop, repeat, hold back or reorder. */
#define _GNU_SOURCE
#include "net_hold.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "mic/iov.h"

#define MAX_FRAMES  1024u
#define MAX_BYTES   (8u << 20)
#define REORDER_NS  10000000u /* a frame that nobody overtakes goes on after this time */
#define RECV_ROUNDS 16u       /* frames looked at for one that goes on */

struct frame {
	uint64_t due;
	uint32_t len, gap; /* gap: frames that still have to overtake it */
	uint8_t *bytes;
};

struct queue {
	struct frame frame[MAX_FRAMES]; /* in the order in which they came */
	unsigned count;
	uint64_t bytes;
};

struct net_hold {
	struct mic_bus *bus;
	const uint32_t *target;
	int timer_fd;
	struct queue queue[2];
};

struct net_hold *net_hold_create(struct mic_bus *bus, const uint32_t *target)
{
	struct net_hold *h = calloc(1, sizeof *h);

	if (!h)
		return NULL;
	h->bus = bus;
	h->target = target;
	h->timer_fd = fault_timer_open();
	if (h->timer_fd < 0) {
		free(h);
		return NULL;
	}
	return h;
}

void net_hold_clear(struct net_hold *h)
{
	for (unsigned dir = 0; dir < 2; dir++) {
		for (unsigned i = 0; i < h->queue[dir].count; i++)
			free(h->queue[dir].frame[i].bytes);
		h->queue[dir].count = 0;
		h->queue[dir].bytes = 0;
	}
}

void net_hold_destroy(struct net_hold *h)
{
	if (!h)
		return;
	net_hold_clear(h);
	close(h->timer_fd);
	free(h);
}

unsigned net_hold_count(const struct net_hold *h)
{
	return h->queue[HOLD_TO_CARD].count + h->queue[HOLD_TO_HOST].count;
}

bool net_hold_full(const struct net_hold *h, unsigned dir)
{
	/* Two frames of the largest size must fit: one and its duplicate. */
	return h->queue[dir].count + 2 > MAX_FRAMES ||
	       h->queue[dir].bytes + 2 * (MIC_NET_FRAME_MAX + MIC_NET_HDR_FULL) > MAX_BYTES;
}

/* Copy a frame in; one that finds no memory is lost, as on a wire. */
static void put(struct queue *q, const struct iovec *iov, unsigned n, uint64_t len, uint64_t due,
		uint32_t gap)
{
	uint8_t *bytes = malloc(len);

	if (!bytes)
		return;
	mic_iov_read(iov, n, 0, bytes, len);
	q->frame[q->count++] = (struct frame){.due = due, .len = (uint32_t)len, .gap = gap, .bytes = bytes};
	q->bytes += len;
}

/* The first frame that may go on now; -1: none. */
static int ripe(const struct queue *q, uint64_t now)
{
	for (unsigned i = 0; i < q->count; i++)
		if (q->frame[i].due <= now)
			return (int)i;
	return -1;
}

static void take_out(struct queue *q, unsigned i)
{
	q->bytes -= q->frame[i].len;
	free(q->frame[i].bytes);
	memmove(&q->frame[i], &q->frame[i + 1], (--q->count - i) * sizeof q->frame[0]);
}

/* A frame went by: those that waited for it are one nearer. */
static void overtaken(struct queue *q)
{
	for (unsigned i = 0; i < q->count; i++)
		if (q->frame[i].gap && !--q->frame[i].gap)
			q->frame[i].due = 0;
}

/* Judge a frame of len bytes (with vnet header) that lies in iov. How often it goes on now: 0, 1 or 2. */
static unsigned judge(struct net_hold *h, unsigned dir, const struct iovec *iov, unsigned n, uint64_t len)
{
	uint32_t way = dir == HOLD_TO_CARD ? MIC_FAULT_TO_CARD : MIC_FAULT_TO_HOST;
	const struct mic_fault_event event = {
		.point = MIC_FAULT_AT_PACKET, .target = *h->target, .way = way, .toward = way, .bytes = len};
	struct queue *q = &h->queue[dir];
	struct mic_fault_verdict v;

	if (!mic_fault_judge(h->bus, &event, &v))
		return 1;
	if (v.drop)
		return 0;
	uint64_t due = fault_due(&v);
	unsigned copies = v.duplicate ? 2 : 1;

	if (v.gap && !due)
		put(q, iov, n, len, mic_now_ns() + REORDER_NS, v.gap);
	for (unsigned i = 0; i < copies && due; i++)
		put(q, iov, n, len, due, 0);
	return due || v.gap ? 0 : copies;
}

long net_hold_recv(struct net_hold *h, struct mic_net_end *end, const struct iovec *iov, unsigned n)
{
	struct queue *q = &h->queue[HOLD_TO_CARD];

	for (unsigned round = 0; round < RECV_ROUNDS; round++) {
		int i = q->count ? ripe(q, mic_now_ns()) : -1;

		if (i >= 0) {
			uint32_t len = q->frame[i].len;

			mic_iov_write(iov, n, 0, q->frame[i].bytes, len);
			take_out(q, (unsigned)i);
			return (long)len;
		}
		if (net_hold_full(h, HOLD_TO_CARD))
			return 0;
		long got = mic_net_end_recv(end, iov, n);

		if (got <= (long)end->hdr_len)
			return got;
		unsigned copies = judge(h, HOLD_TO_CARD, iov, n, (uint64_t)got);

		if (copies)
			overtaken(q);
		if (copies > 1)
			put(q, iov, n, (uint64_t)got, 0, 0);
		if (copies)
			return got;
	}
	return 0;
}

int net_hold_send(struct net_hold *h, struct mic_net_end *end, const struct iovec *iov, unsigned n,
		  uint64_t len)
{
	int rc = 0;

	if (len < end->hdr_len + MIC_NET_ETH || len > MIC_NET_FRAME_MAX + MIC_NET_HDR_FULL)
		return 1; /* no frame: dropped as ever */
	unsigned copies = judge(h, HOLD_TO_HOST, iov, n, len);

	for (unsigned i = 0; i < copies && rc >= 0; i++)
		rc = mic_net_end_send(end, iov, n, len);
	if (copies)
		overtaken(&h->queue[HOLD_TO_HOST]);
	return rc;
}

int net_hold_flush(struct net_hold *h, struct mic_net_end *end)
{
	struct queue *q = &h->queue[HOLD_TO_HOST];
	int moved = 0, i;

	while (q->count && (i = ripe(q, mic_now_ns())) >= 0) {
		struct iovec iov = {q->frame[i].bytes, q->frame[i].len};

		if (mic_net_end_send(end, &iov, 1, iov.iov_len) < 0)
			return -1;
		take_out(q, (unsigned)i);
		moved = 1;
	}
	return moved;
}

bool net_hold_soon(struct net_hold *h, bool recv, int *fd)
{
	uint64_t next = UINT64_MAX;

	for (unsigned dir = recv ? HOLD_TO_CARD : HOLD_TO_HOST; dir <= HOLD_TO_HOST; dir++)
		for (unsigned i = 0; i < h->queue[dir].count; i++)
			if (h->queue[dir].frame[i].due < next)
				next = h->queue[dir].frame[i].due;
	*fd = -1;
	if (next == UINT64_MAX)
		return false;
	if (next <= mic_now_ns() + FAULT_LOOK_NS)
		return true;
	fault_timer_set(h->timer_fd, next - FAULT_LOOK_NS);
	*fd = h->timer_fd;
	return false;
}
