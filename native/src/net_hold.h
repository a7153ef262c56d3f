/* Frames of a network device that fault filters drop, repeat, hold back or reorder.
 *
 * A frame that cannot go on at once is copied and waits here, bounded in number and bytes; a direction
 * that is full is not read any further, so that a slow link slows its senders down and loses nothing. */
#ifndef MIC_NET_HOLD_H
#define MIC_NET_HOLD_H

#include <stdbool.h>
#include <sys/uio.h>

#include "fault.h"
#include "net_end.h"

enum { HOLD_TO_CARD, HOLD_TO_HOST };

struct net_hold;

/* target: the device, as in mic_vdev. NULL: no memory. */
struct net_hold *net_hold_create(struct mic_bus *bus, const uint32_t *target);
void net_hold_destroy(struct net_hold *h);
/* Forget all frames. */
void net_hold_clear(struct net_hold *h);
/* Frames that wait. */
unsigned net_hold_count(const struct net_hold *h);
bool net_hold_full(const struct net_hold *h, unsigned dir);
/* A frame from the local end for the card, as mic_net_end_recv() gives it, behind the filters. */
long net_hold_recv(struct net_hold *h, struct mic_net_end *end, const struct iovec *iov, unsigned n);
/* A frame of the card, as mic_net_end_send() takes it. Not while net_hold_full(). */
int net_hold_send(struct net_hold *h, struct mic_net_end *end, const struct iovec *iov, unsigned n,
		  uint64_t len);
/* Send what is due: 1 something moved, 0 nothing, -1 the end is gone. */
int net_hold_flush(struct net_hold *h, struct mic_net_end *end);
/* Before a sleep: true when something is due so soon that looking is better. Else *fd is what to sleep on
 * (-1: nothing waits). `recv`: frames for the card can be taken now. */
bool net_hold_soon(struct net_hold *h, bool recv, int *fd);

#endif
