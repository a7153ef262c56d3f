/* Disk requests the way fault filters want them (block_dev.c, block_request.c). */
#ifndef MIC_BLOCK_SICK_H
#define MIC_BLOCK_SICK_H

#include <stdint.h>

#include "fault.h"
#include "mic/block.h"

/* The request of a kind as filters see it. bytes: of data. */
static inline struct mic_fault_event blk_event(uint32_t target, uint32_t type, uint64_t bytes)
{
	struct mic_fault_event e = {.point = MIC_FAULT_AT_DISK, .target = target, .bytes = bytes};

	switch (type) {
	case MIC_VIRTIO_BLK_T_IN:
		e.way = MIC_FAULT_READ;
		e.toward = MIC_FAULT_TO_CARD;
		break;
	case MIC_VIRTIO_BLK_T_OUT:
		e.way = MIC_FAULT_WRITE;
		e.toward = MIC_FAULT_TO_HOST;
		break;
	case MIC_VIRTIO_BLK_T_FLUSH:
		e.way = MIC_FAULT_FLUSH;
		break;
	case MIC_VIRTIO_BLK_T_DISCARD:
	case MIC_VIRTIO_BLK_T_WRITE_ZEROES:
		e.way = MIC_FAULT_DISCARD;
		break;
	default: /* identity and unknown kinds are left alone */
		break;
	}
	return e;
}

/* How many of `sectors` a torn write leaves on the disk. */
static inline uint64_t blk_torn_keep(const struct mic_fault_verdict *v, uint64_t sectors)
{
	if (v->keep == UINT64_MAX)
		return sectors ? v->dice % sectors : 0;
	return v->keep < sectors ? v->keep : sectors;
}

#endif
