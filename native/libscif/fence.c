/* Fences (SCIF 2.15). What the caller copied is complete when its call returns; what a DMA channel copies is
 * counted in the control page. */
#include "memory.h"

#include <string.h>

#define HOST_LOOPBACK_MARK 0xdead
#define REMOTE_MARK        0x80000000u
#define INIT               (SCIF_FENCE_INIT_SELF | SCIF_FENCE_INIT_PEER)
#define SIGNAL             (SCIF_SIGNAL_LOCAL | SCIF_SIGNAL_REMOTE)

/* Has copy `number` ended, and all before it, without a failure? Numbers wrap at 2^30. */
static bool ended(struct ep *ep, uint32_t number)
{
	/* Pairs with the release in mic_scif_ctl_copies(): the copied bytes are visible. */
	uint32_t done = mic_load_acquire(&ep->ctl->done);

	return ((done - number) & MIC_SCIF_COPY_MASK) <= MIC_SCIF_COPY_MASK / 2 &&
	       !mic_load_acquire(&ep->ctl->failed);
}

static bool one_initiator(int flags)
{
	return (flags & INIT) == SCIF_FENCE_INIT_SELF || (flags & INIT) == SCIF_FENCE_INIT_PEER;
}

static int fence_mark(struct ep *ep, int flags, int *mark)
{
	uint64_t v = 0;
	int rc = check_connected(ep);

	if (rc < 0)
		return rc;
	if (flags & ~INIT || !one_initiator(flags))
		return -EINVAL;
	if (host_loopback(ep))
		v = HOST_LOOPBACK_MARK;
	else if (flags == SCIF_FENCE_INIT_SELF)
		v = (mic_load_acquire(&ep->ctl->issued) & MIC_SCIF_COPY_MASK) + 1;
	else
		rc = node_ask(MIC_SCIF_FENCE_MARK, ep->sid, 0, 0, &v);
	if (rc == 0)
		rc = user_writable(mark, sizeof *mark);
	if (rc == 0)
		*mark = (int)(uint32_t)v;
	return rc;
}

static int fence_wait(struct ep *ep, int mark)
{
	int rc = check_connected(ep);

	if (rc < 0)
		return rc;
	if (host_loopback(ep))
		return mark == HOST_LOOPBACK_MARK ? 0 : -EINVAL;
	mic_full_fence(); /* what was copied before is visible before whatever follows */
	if (!((uint32_t)mark & REMOTE_MARK) && ended(ep, (uint32_t)mark - 1))
		return 0;
	const struct mic_scif_request rq = {.op = MIC_SCIF_FENCE_WAIT, .sid = ep->sid, .a = {(uint32_t)mark}};
	struct answer ans = {0};

	rc = node_call(&rq, NULL, &ans, true);
	answer_close(&ans);
	return rc;
}

/* One 64-bit value, never torn where the offset is a multiple of 8. */
static int put_value(struct rma_table *t, bool own, off_t off, uint64_t value)
{
	uint8_t *p;
	int rc = rma_at(t, own, off, sizeof value, SCIF_PROT_WRITE, &p);

	if (rc < 0)
		return rc;
	mic_full_fence(); /* pairs with the acquire of the poller: it then sees all data (SCIF-124) */
	if ((uintptr_t)p % sizeof value == 0)
		mic_store_release((uint64_t *)(void *)p, value);
	else
		memcpy(p, &value, sizeof value);
	return 0;
}

struct signal_args {
	off_t loff, roff;
	uint64_t lval, rval;
	int flags;
};

static int signal_self(struct ep *ep, const struct signal_args *a)
{
	struct rma_table *t;
	int rc = rma_begin(ep, &t);

	if (rc < 0)
		return rc;
	if (a->flags & SCIF_SIGNAL_LOCAL)
		rc = put_value(t, true, a->loff, a->lval);
	if (rc == 0 && (a->flags & SCIF_SIGNAL_REMOTE))
		rc = put_value(t, false, a->roff, a->rval);
	if (rc == 0 && (a->flags & SCIF_SIGNAL_REMOTE))
		rc = rma_intact(t, a->roff, sizeof a->rval);
	rma_end(ep, t);
	return rc;
}

static int fence_signal(struct ep *ep, const struct signal_args *a)
{
	int rc = check_connected(ep);

	if (rc < 0)
		return rc;
	if (a->flags & ~(INIT | SIGNAL) || !one_initiator(a->flags) || !(a->flags & SIGNAL))
		return -EINVAL;
	if (((a->flags & SCIF_SIGNAL_LOCAL) && a->loff % 4) ||
	    ((a->flags & SCIF_SIGNAL_REMOTE) && a->roff % 4))
		return -EINVAL;
	if ((a->flags & SCIF_FENCE_INIT_SELF) && ended(ep, mic_load_acquire(&ep->ctl->issued)))
		return signal_self(ep, a);
	const struct mic_scif_request rq = {
		.op = MIC_SCIF_FENCE_SIGNAL,
		.sid = ep->sid,
		.a = {(uint64_t)a->loff, a->lval, (uint64_t)a->roff, a->rval, (uint64_t)a->flags},
	};
	struct answer ans = {0};

	mic_full_fence();
	rc = node_call(&rq, NULL, &ans, false);
	answer_close(&ans);
	return rc;
}

API int scif_fence_mark(scif_epd_t epd, int flags, int *mark)
{
	struct ep *ep;
	int rc = ep_get(epd, &ep);

	if (rc < 0)
		return fail(rc);
	rc = fence_mark(ep, flags, mark);
	ep_put(ep);
	return rc < 0 ? fail(rc) : 0;
}

API int scif_fence_wait(scif_epd_t epd, int mark)
{
	struct ep *ep;
	int rc = ep_get(epd, &ep);

	if (rc < 0)
		return fail(rc);
	rc = fence_wait(ep, mark);
	ep_put(ep);
	return rc < 0 ? fail(rc) : 0;
}

API int scif_fence_signal(scif_epd_t epd, off_t loff, uint64_t lval, off_t roff, uint64_t rval, int flags)
{
	const struct signal_args a = {loff, roff, lval, rval, flags};
	struct ep *ep;
	int rc = ep_get(epd, &ep);

	if (rc < 0)
		return fail(rc);
	rc = fence_signal(ep, &a);
	ep_put(ep);
	return rc < 0 ? fail(rc) : 0;
}
