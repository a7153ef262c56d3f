/* Completions that a fault filter holds back (a slow disk, a slow link): requests are served at once and
 * in parallel with others, their completion appears when it is due. */
#ifndef MIC_BLOCK_HOLD_H
#define MIC_BLOCK_HOLD_H

#include <stdbool.h>
#include <stdint.h>

#include "mic/vring.h"

#define HOLD_MAX (MIC_MAX_VRINGS * MIC_MAX_VRING_ENTRIES) /* what all rings can have in flight */

struct blk_hold {
	int timer_fd; /* readable shortly before the next one is due; -1: never needed so far */
	unsigned count;
	struct blk_held {
		uint64_t due;
		uint32_t len;
		uint16_t head, ring;
	} item[HOLD_MAX];
};

void blk_hold_init(struct blk_hold *h);
void blk_hold_fini(struct blk_hold *h);
/* Forget everything when a ring was set up anew since (a reset): its chains are not ours any more. */
void blk_hold_settle(struct blk_hold *h, const struct mic_vdev *dev);
/* Complete chain `head` of ring `ring` at `due`; false: it cannot be held, complete it now. */
bool blk_hold_add(struct blk_hold *h, unsigned ring, uint16_t head, uint32_t len, uint64_t due);
/* Complete what is due; returns how many. */
unsigned blk_hold_release(struct blk_hold *h, struct mic_vdev *dev);
/* Nothing else to do: true when something is due so soon that looking is better than sleeping. Else the
 * timer is set for a sleep. */
bool blk_hold_soon(struct blk_hold *h);

#endif
