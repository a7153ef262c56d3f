/* One request of a disk: taken off its chain, and done to the image (block_dev.c is the only user). */
#ifndef MIC_BLOCK_REQUEST_H
#define MIC_BLOCK_REQUEST_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "block_flush.h"
#include "block_move.h"
#include "mic/block.h"
#include "mic/fault.h"

struct blk_disk {
	int fd;
	bool read_only;
	uint64_t capacity; /* sectors */
	uint8_t serial[MIC_VIRTIO_BLK_ID_LEN];
	struct mic_blk_stats stats;
	struct mic_mover *mover;
	struct blk_flush *flush;
};

/* A request taken apart: header copied, data segments without header and status. */
struct blk_request {
	uint32_t type;
	uint64_t sector;
	struct iovec *out, *in; /* data the card wrote; room for data the card reads */
	unsigned out_num, in_num;
	uint64_t out_len, in_len; /* bytes */
	uint8_t *status;          /* NULL: nowhere to answer */
	uint64_t features;        /* of the ring: the caller's */
};

/* Take header and status byte off a chain, whose segments are used up; false when the header is short. */
bool blk_parse(struct blk_request *r, struct iovec *iov, const struct mic_chain *c);
/* Was FLUSH negotiated, and is this one? */
bool blk_is_flush(const struct blk_request *r);
/* The status byte of what became of a system call: 0 or an errno. */
uint8_t blk_status(int err);
/* Do it; the status byte. */
uint8_t blk_perform(struct blk_disk *d, struct blk_request *r);
/* A write of which only the first sectors reach the disk. One that is not legal fails as it always does. */
uint8_t blk_perform_torn(struct blk_disk *d, struct blk_request *r, const struct mic_fault_verdict *v);

#endif
