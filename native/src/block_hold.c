/* Completions of a disk that are held back until they are due. */
#define _GNU_SOURCE
#include "block_hold.h"

#include <unistd.h>

#include "fault.h"

void blk_hold_init(struct blk_hold *h)
{
	h->timer_fd = -1;
	h->count = 0;
}

void blk_hold_fini(struct blk_hold *h)
{
	if (h->timer_fd >= 0)
		close(h->timer_fd);
}

void blk_hold_settle(struct blk_hold *h, const struct mic_vdev *dev)
{
	unsigned held[MIC_MAX_VRINGS] = {0};

	for (unsigned i = 0; i < h->count; i++)
		held[h->item[i].ring]++;
	/* Between two runs everything that was popped is either pushed or held. */
	for (unsigned r = 0; r < dev->num_vq; r++)
		if (dev->vq[r].popped - dev->vq[r].pushed != held[r])
			h->count = 0;
}

bool blk_hold_add(struct blk_hold *h, unsigned ring, uint16_t head, uint32_t len, uint64_t due)
{
	if (h->timer_fd < 0)
		h->timer_fd = fault_timer_open();
	if (h->timer_fd < 0 || h->count == HOLD_MAX)
		return false;
	h->item[h->count++] = (struct blk_held){.due = due, .len = len, .head = head, .ring = (uint16_t)ring};
	return true;
}

unsigned blk_hold_release(struct blk_hold *h, struct mic_vdev *dev)
{
	unsigned kept = 0, n = h->count;
	uint64_t now = n ? mic_now_ns() : 0;

	for (unsigned i = 0; i < n; i++) {
		if (h->item[i].due <= now)
			mic_vq_push(&dev->vq[h->item[i].ring], h->item[i].head, h->item[i].len);
		else
			h->item[kept++] = h->item[i];
	}
	h->count = kept;
	for (unsigned r = 0; r < dev->num_vq && kept < n; r++)
		mic_vdev_complete(dev, &dev->vq[r]);
	return n - kept;
}

bool blk_hold_soon(struct blk_hold *h)
{
	uint64_t next = UINT64_MAX;

	if (!h->count)
		return false;
	for (unsigned i = 0; i < h->count; i++)
		next = h->item[i].due < next ? h->item[i].due : next;
	if (next <= mic_now_ns() + FAULT_LOOK_NS)
		return true;
	fault_timer_set(h->timer_fd, next - FAULT_LOOK_NS);
	return false;
}
