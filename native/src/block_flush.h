/* Flushes that take their time: another thread makes them, so the disk's other requests go on. */
#ifndef MIC_BLOCK_FLUSH_H
#define MIC_BLOCK_FLUSH_H

#include <stdbool.h>
#include <stdint.h>

#include "mic/vring.h"

struct blk_flush;

/* A flush that waits, and what is needed to answer it. */
struct blk_flushed {
	uint32_t len; /* of the answer */
	uint16_t head, ring;
	uint8_t *status;
};

/* NULL: no memory. */
struct blk_flush *blk_flush_create(void);
void blk_flush_destroy(struct blk_flush *f);
/* Should a flush go to the thread? Not as long as the file's flushes are quick: then two wake-ups cost more.
 */
bool blk_flush_slow(const struct blk_flush *f);
/* Flush here and now. 0 or the errno. */
int blk_flush_now(struct blk_flush *f, int fd);
/* Flush in the thread; false: it has no room, or there is no thread. */
bool blk_flush_post(struct blk_flush *f, int fd, const struct blk_flushed *item);
/* A descriptor that is readable when some have ended. */
int blk_flush_fd(const struct blk_flush *f);
/* It was readable: make it unreadable, before a look at what has ended. */
void blk_flush_woken(struct blk_flush *f);
/* How many wait for their end or to be taken. */
unsigned blk_flush_pending(const struct blk_flush *f);
/* Take one that has ended, *err is 0 or its errno; false: none has. */
bool blk_flush_take(struct blk_flush *f, struct blk_flushed *item, int *err);
/* Wait until all have ended: nothing may touch card memory after a reset. */
void blk_flush_settle(struct blk_flush *f);

#endif
