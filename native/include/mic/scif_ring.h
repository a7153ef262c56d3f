/* SCIF byte rings: one producer, one consumer, each index written by one side only (SCIF 3.2).
 *
 * The receive buffer and the write index that the receiver reads lie in the receiver's memory; the
 * read index that the sender reads lies in the sender's memory. So nobody ever reads across the
 * link. Indices are byte offsets modulo the size, a power of two; one byte always stays free. The
 * node queues and the kernel clients' ends of endpoint rings are made of this. */
#ifndef MIC_SCIF_RING_H
#define MIC_SCIF_RING_H

#include <stdint.h>

#include "mic/scif_abi.h"

/* cffi-begin */
/* The sending end, private to its owner. */
struct mic_scif_tx {
	uint8_t *buf;     /* receiver's memory */
	uint32_t *windex; /* receiver's memory: what we have published */
	uint32_t *rindex; /* our memory: what the receiver has consumed */
	uint32_t size;    /* bytes, a power of two */
	uint32_t limit;   /* bytes that may be on their way, at most size - 1 */
	uint32_t write;   /* our position; ahead of *windex until the commit */
	uint32_t read;    /* last sight of *rindex */
};

/* The receiving end, private to its owner. */
struct mic_scif_rx {
	uint8_t *buf;     /* our memory */
	uint32_t *windex; /* our memory: what the sender has published */
	uint32_t *rindex; /* sender's memory: what we have consumed */
	uint32_t size;
	uint32_t read;  /* our position; ahead of *rindex until the release */
	uint32_t write; /* last sight of *windex */
};

/* Both ends between queue pair `own`, whose ring is the page behind it, and an attached peer's. A
 * sender fills `limit` of the `size` bytes. */
void mic_scif_rings_init(struct mic_scif_tx *tx, struct mic_scif_rx *rx, struct mic_scif_qpage *own,
			 struct mic_scif_qpage *peer, uint8_t *peer_ring, uint32_t size, uint32_t limit);
/* Free bytes, 0..limit, after a fresh look; -EPROTO: the peer's index is not an offset. */
int mic_scif_tx_room(struct mic_scif_tx *tx);
/* Copy all of `len` bytes in. 0, -EAGAIN (no room for all of it), -EPROTO. Not yet visible. */
int mic_scif_tx_put(struct mic_scif_tx *tx, const void *data, uint32_t len);
/* Publish what was put. */
void mic_scif_tx_commit(struct mic_scif_tx *tx);
/* Both in one. */
int mic_scif_tx_send(struct mic_scif_tx *tx, const void *data, uint32_t len);

/* Bytes that can be read, 0..size - 1, after a fresh look; -EPROTO as above. */
int mic_scif_rx_used(struct mic_scif_rx *rx);
/* Copy exactly `len` bytes out. 0, -EAGAIN (fewer are there), -EPROTO. */
int mic_scif_rx_get(struct mic_scif_rx *rx, void *data, uint32_t len);
/* Tell the sender that what was got may be overwritten. */
void mic_scif_rx_release(struct mic_scif_rx *rx);
/* Both in one. */
int mic_scif_rx_take(struct mic_scif_rx *rx, void *data, uint32_t len);

#define MIC_SCIF_EVENTS 64

/* Looks for the answer to a message for at most `us` at a time; how often it may do so in vain is in
 * linger.h. */
struct mic_linger *mic_scif_linger_new(unsigned us);
void mic_scif_linger_free(struct mic_linger *s);
/* What is ready among the descriptors of `epfd`: their number, at most MIC_SCIF_EVENTS. Before it says 0 it
 * looks for a while at the `n` rings, if there are any; *ring is the first that has something, else -1. */
int mic_scif_events(struct mic_linger *s, struct mic_scif_rx *const *rx, int n, int epfd,
		    int fds[MIC_SCIF_EVENTS], int *ring);
/* cffi-end */

#endif
