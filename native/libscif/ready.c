/* Readiness of an endpoint: exact masks, and the token that makes its descriptor readable (SCIF 2.9).
 *
 * A sender whose peer does not wait in recv has the peer's node put a token on the descriptor, once until
 * the receiver takes it off; a descriptor is unwritable while its socket is filled. */
#include "stream.h"

#include <poll.h>
#include <sys/socket.h>

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

void notify_self(struct ep *ep)
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

int ep_mask(struct ep *ep)
{
	struct mic_scif_ctl *ctl = ep->ctl;
	uint32_t st = state(ep);
	uint32_t w = mic_load_acquire(&ep->qp->local_write);
	uint32_t r = (uint32_t)mic_load_acquire(&ep->qp->local_read);
	int mask = st == MIC_SCIF_EP_CONNECTED && !node_dead(ep) ? 0 : POLLHUP;

	if (mic_load_relaxed(&ctl->uncollected))
		return POLLOUT;
	uint32_t end = mic_load_acquire(&ctl->rx_end);

	if (end)
		w = end - 1;
	if (w < RING && w != mic_load_relaxed(&ctl->rx_read))
		mask |= POLLIN;
	if (r < RING && distance(r, mic_load_relaxed(&ctl->tx_write)) < CAPACITY)
		mask |= POLLOUT;
	return mask;
}
