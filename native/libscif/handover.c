/* Copies that the node's DMA channels make while the caller goes on (SCIF 2.13).
 *
 * The hand-over is a request to the node, 20 us and more, and the channel's thread must wake up: only
 * calls that need not be complete on return, and large ones, gain by it. The channel moves cache lines;
 * the ends of a range that does not begin or end with one are the caller's. */
#include "memory.h"

#define LINE  ((size_t)64)
#define LEAST ((size_t)2 << 20) /* bytes: from here on the call returns sooner than a copy would */

bool host_loopback(const struct ep *ep)
{
	return ep->node == 0 && ep->peer_node == 0;
}

bool may_hand_over(const struct ep *ep, const struct range *r)
{
	if (r->len < LEAST || (r->flags & (SCIF_RMA_SYNC | SCIF_RMA_USECPU)) ||
	    (r->loff ^ r->roff) % (off_t)LINE)
		return false;
	/* The last line must come last, and the tail is not the channel's. */
	if ((r->flags & SCIF_RMA_ORDERED) && ((size_t)r->roff + r->len) % LINE)
		return false;
	return !host_loopback(ep) && !mic_load_relaxed(&ep->alone);
}

size_t lines_head(const struct range *r)
{
	return (LINE - (size_t)r->roff % LINE) % LINE;
}

size_t hand_over(struct ep *ep, const struct range *r)
{
	size_t head = lines_head(r), lines = (r->len - head) / LINE * LINE;
	const struct mic_scif_request rq = {
		.op = MIC_SCIF_COPY,
		.sid = ep->sid,
		.a = {(uint64_t)r->loff + head, (uint64_t)r->roff + head, lines,
		      (r->write ? MIC_SCIF_COPY_WRITE : 0u) |
			      (r->flags & SCIF_RMA_ORDERED ? MIC_SCIF_COPY_ORDERED : 0u)},
	};
	struct answer ans = {0};
	int rc = node_call(&rq, NULL, &ans, false);

	answer_close(&ans);
	if (rc == -EOPNOTSUPP)
		mic_store_relaxed(&ep->alone, true);
	return rc < 0 ? 0 : lines;
}
