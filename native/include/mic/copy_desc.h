/* COPY_DESC: the host's copy engine between user buffers and vring chains (VOP 6.4, 7).
 *
 * For backends that keep the shape of the real ioctl; our own backends work on mic_vq directly. Two
 * personalities: compat does what v4.6-v5.9 did, where that is not a defect; modern what virtio 1.x
 * asks for (used.len, errno instead of a DMA status, no lost chain). */
#ifndef MIC_COPY_DESC_H
#define MIC_COPY_DESC_H

#include <stdbool.h>
#include <stdint.h>

#include "mic/dma.h"
#include "mic/vring.h"

/* cffi-begin */
#define MIC_COPY_BOUNCE 65536 /* bytes of the bounce buffer */

/* Bytes moved by one ring (VOP 7): in = card to host. */
struct mic_copy_stats {
	uint64_t in_bytes, in_bytes_dma; /* the second includes what alignment fetched in front */
	uint64_t out_bytes, out_bytes_dma;
	uint64_t tx_dst_unaligned, tx_len_unaligned; /* bytes that the CPU had to copy, and why */
	uint64_t dma_errors;
};

struct mic_copy_setup {
	bool compat;
	struct mic_dma_chan *chan; /* host channel; without it and `owner` the CPU copies everything */
	int owner;            /* or a socket to whoever owns one: mic_copy_job there, _done back; 0: none */
	uint64_t bounce_off;  /* MIC_COPY_BOUNCE bytes of host memory, 64-byte aligned ... */
	uint64_t bounce_addr; /* ... and as the card sees them */
	uint32_t dma_min;     /* shorter copies are the CPU's (modern; compat always uses DMA) */
	int dma_timeout_ms;   /* 5000 on the real stack */
};

/* One copy between card memory and the bounce buffer, as card addresses; and what became of it: 0 or -errno.
 */
struct mic_copy_job {
	uint64_t id, dst, src, len;
};
struct mic_copy_done {
	uint64_t id;
	int64_t result;
};

struct mic_copy;

/* The engine of ring `index` of vdev, which must outlive it. NULL with errno (EINVAL, EFAULT, ENOMEM). */
struct mic_copy *mic_copy_create(struct mic_vdev *vdev, unsigned index, const struct mic_copy_setup *setup);
void mic_copy_destroy(struct mic_copy *c);

/* One COPY_DESC; arg points to a struct mic_copy_desc in this process, whose vr_idx was checked.
 * Returns 0; 1 (compat: no elements, and a chain was fetched); 3 (compat: DMA failed or stuck);
 * -ENODEV (removed, or status 0), -EFAULT (argument, buffer, or a descriptor outside card memory),
 * -EINVAL (elements unreadable, malformed chain), -ELOOP, -EPROTO, -ENXIO (no used ring), -EIO (the ring
 * broke before, VOP 11; modern: DMA). out_len is stored whenever the result is not negative. */
int mic_copy_desc_run(struct mic_copy *c, void *arg);
/* The card resets the device: waits for a running copy, then forgets the half-consumed chain (VOP-57).
 * The caller sets the ring up again. */
void mic_copy_reset(struct mic_copy *c);
/* The device is removed: waits for a running copy; all later ones get -ENODEV (VOP-55). */
void mic_copy_remove(struct mic_copy *c);
void mic_copy_stats(struct mic_copy *c, struct mic_copy_stats *out);
/* cffi-end */

/* Bytes of this process that may not be there, as a kernel takes an argument: 0 or -EFAULT. */
int mic_copy_from_user(void *mine, const void *user, size_t len);

#endif
