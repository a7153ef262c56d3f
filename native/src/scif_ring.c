/* SCIF byte rings (SCIF 3.2). */
#include "mic/scif_ring.h"

#include <errno.h>
#include <string.h>

#include "mic/barrier.h"

void mic_scif_rings_init(struct mic_scif_tx *tx, struct mic_scif_rx *rx, struct mic_scif_qpage *own,
			 struct mic_scif_qpage *peer, uint8_t *peer_ring, uint32_t size, uint32_t limit)
{
	/* The index is the lower half of local_read; programs keep a promise in the upper one. */
	*tx = (struct mic_scif_tx){.buf = peer_ring,
				   .windex = &peer->local_write,
				   .rindex = (uint32_t *)&own->local_read,
				   .size = size,
				   .limit = limit};
	*rx = (struct mic_scif_rx){.buf = (uint8_t *)own + 4096, /* the ring follows its page */
				   .windex = &own->local_write,
				   .rindex = (uint32_t *)&peer->local_read,
				   .size = size};
}

static uint32_t distance(uint32_t from, uint32_t to, uint32_t size)
{
	return (to - from) & (size - 1);
}

/* Refresh the cached index of the peer. The peer may write anything there. */
static int look(const uint32_t *index, uint32_t size, uint32_t *cached)
{
	uint32_t now = mic_load_acquire(index); /* pairs with the commit or release of the peer */

	if (now >= size)
		return -EPROTO;
	*cached = now;
	return 0;
}

static uint32_t room(const struct mic_scif_tx *tx)
{
	uint32_t used = distance(tx->read, tx->write, tx->size);

	return used < tx->limit ? tx->limit - used : 0; /* a hostile read index can go back */
}

int mic_scif_tx_room(struct mic_scif_tx *tx)
{
	int rc = look(tx->rindex, tx->size, &tx->read);

	return rc < 0 ? rc : (int)room(tx);
}

int mic_scif_tx_put(struct mic_scif_tx *tx, const void *data, uint32_t len)
{
	if (room(tx) < len) {
		int rc = look(tx->rindex, tx->size, &tx->read);

		if (rc < 0)
			return rc;
		if (room(tx) < len)
			return -EAGAIN;
	}
	uint32_t head = tx->size - tx->write;

	if (head > len)
		head = len;
	memcpy(tx->buf + tx->write, data, head);
	memcpy(tx->buf, (const uint8_t *)data + head, len - head);
	tx->write = (tx->write + len) & (tx->size - 1);
	return 0;
}

void mic_scif_tx_commit(struct mic_scif_tx *tx)
{
	mic_store_release(tx->windex, tx->write); /* pairs with look() of the receiver */
}

int mic_scif_tx_send(struct mic_scif_tx *tx, const void *data, uint32_t len)
{
	int rc = mic_scif_tx_put(tx, data, len);

	if (rc == 0)
		mic_scif_tx_commit(tx);
	return rc;
}

int mic_scif_rx_used(struct mic_scif_rx *rx)
{
	int rc = look(rx->windex, rx->size, &rx->write);

	return rc < 0 ? rc : (int)distance(rx->read, rx->write, rx->size);
}

int mic_scif_rx_get(struct mic_scif_rx *rx, void *data, uint32_t len)
{
	if (distance(rx->read, rx->write, rx->size) < len) {
		int used = mic_scif_rx_used(rx);

		if (used < 0)
			return used;
		if ((uint32_t)used < len)
			return -EAGAIN;
	}
	uint32_t head = rx->size - rx->read;

	if (head > len)
		head = len;
	memcpy(data, rx->buf + rx->read, head);
	memcpy((uint8_t *)data + head, rx->buf, len - head);
	rx->read = (rx->read + len) & (rx->size - 1);
	return 0;
}

void mic_scif_rx_release(struct mic_scif_rx *rx)
{
	mic_store_release(rx->rindex, rx->read); /* pairs with look() of the sender */
}

int mic_scif_rx_take(struct mic_scif_rx *rx, void *data, uint32_t len)
{
	int rc = mic_scif_rx_get(rx, data, len);

	if (rc == 0)
		mic_scif_rx_release(rx);
	return rc;
}
