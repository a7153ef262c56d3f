/* The positions of a connection's two rings, and how one side tells the other of a change.
 *
 * Indices are byte offsets; each is written by one side only, under the lock of its direction. */
#ifndef LIBSCIF_STREAM_H
#define LIBSCIF_STREAM_H

#include "fence.h"
#include "internal.h"

#include <limits.h>
#include <linux/futex.h>

#define RING      MIC_SCIF_EP_RING
#define CAPACITY  MIC_SCIF_EP_CAPACITY
#define LINE      64u
#define PIECE_MIN 1024u /* published at once: the other side copies meanwhile */
#define PIECE_MAX 8192u

static inline uint32_t distance(uint32_t from, uint32_t to)
{
	return (to - from) & (RING - 1);
}

static inline uint32_t state(const struct ep *ep)
{
	return mic_load_acquire(&ep->ctl->state);
}

/* Bytes that can be read, or -EPROTO when the peer's index is not an offset. rx_lock is held. */
static inline int used(struct ep *ep)
{
	struct mic_scif_ctl *ctl = ep->ctl;
	bool over = state(ep) != MIC_SCIF_EP_CONNECTED;
	uint32_t w = mic_load_acquire(&ep->qp->local_write); /* pairs with publish_write() */

	if (w >= RING)
		return -EPROTO;
	/* A program on a lost node may live on and send for ever: what it had sent by now is the rest. */
	if (over && !ctl->rx_end)
		mic_store_release(&ctl->rx_end, w + 1);
	if (over)
		w = ctl->rx_end - 1;
	ctl->rx_write = w;
	return (int)distance(ctl->rx_read, w);
}

static inline uint32_t least(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

/* Bytes that may be on their way to a receiver that has promised to take `promised`. */
static inline uint32_t window(uint32_t promised)
{
	return promised < RING - 1 - CAPACITY ? CAPACITY + promised : RING - 1;
}

/* A quarter of the window, whole cache lines. */
static inline uint32_t piece(uint32_t promised)
{
	uint32_t n = window(promised) / 4 / LINE * LINE;

	return n < PIECE_MIN ? PIECE_MIN : least(n, PIECE_MAX);
}

/* Bytes that a blocking send may write now, and in `most` how many at once. tx_lock is held. */
static inline int room_ahead(struct ep *ep, uint32_t *most)
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
static inline uint32_t known_room(struct ep *ep)
{
	uint32_t n = distance(ep->ctl->tx_read, ep->ctl->tx_write);

	return n < CAPACITY ? CAPACITY - n : 0;
}

/* Bytes that fit without a reader. tx_lock is held. */
static inline int room(struct ep *ep)
{
	uint32_t most;
	int n = room_ahead(ep, &most);

	return n < 0 ? n : (int)known_room(ep);
}

/* How many slept on it. */
static inline long raise_word(uint32_t *word)
{
	int saved = errno;

	mic_fetch_add(word, 1);
	long woken = syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);

	errno = saved;
	return woken;
}

static inline void notify_node(struct mic_scif_notify *page, uint64_t *bits, uint32_t slot)
{
	if (slot >= MIC_SCIF_SLOTS)
		return;
	mic_fetch_or(&bits[slot / 64], 1ull << (slot % 64));
	raise_word(&page->seq);
}

/* Have our own node put a token on our descriptor. */
void notify_self(struct ep *ep);

#endif
