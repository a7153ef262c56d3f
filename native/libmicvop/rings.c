/* The device's hand-shakes with the card, its chains and their counters. */
#include "file.h"

#include <stdio.h>

#include "mic/barrier.h"
#include "mic/iov.h"

static uint8_t *ctrl(struct mic_vop *f, size_t field)
{
	return f->vdev.ctrl + field;
}

#define CTRL(f, name) ctrl((f), offsetof(struct mic_device_ctrl, name))

/* What the card accepted of our offer, never more than that (VOP 4.4). */
static uint64_t accepted(struct mic_vop *f)
{
	const uint8_t *at = f->vdev.desc + sizeof(struct mic_device_desc) +
			    sizeof(struct mic_vqconfig) * f->shape.num_vq + f->shape.feature_len;
	uint64_t bits = 0;

	mic_copy_once(&bits, at, f->shape.feature_len);
	return bits & f->offered;
}

/* VOP 4.3 step 11. A bad offer leaves the rings unusable, and no acknowledgement (VOP-47). */
static void take_rings(struct mic_vop *f)
{
	bool good = true;

	f->accepted = accepted(f);
	for (unsigned i = 0; i < f->shape.num_vq; i++) {
		struct mic_vqconfig vq;

		mic_copy_once(&vq, f->vdev.desc + sizeof(struct mic_device_desc) + i * sizeof vq, sizeof vq);
		mic_copy_reset(f->copy[i]);
		good &= mic_vq_init(&f->vdev.vq[i], f->bus, f->blocks[i], vq.used_address, (uint16_t)f->num,
				    f->accepted) == 0;
	}
	mic_store_release(CTRL(f, used_address_updated), 0);
	if (good)
		mic_vdev_interrupt(&f->vdev);
}

/* VOP 4.5: everything is forgotten before the acknowledgement (VOP-13, 57). */
static void reset(struct mic_vop *f)
{
	f->generation++;
	f->news |= MIC_VOP_RESET;
	f->accepted = 0;
	for (unsigned i = 0; i < f->shape.num_vq; i++) {
		mic_copy_reset(f->copy[i]);
		if (f->vdev.vq[i].info)
			mic_store_release((uint16_t *)(void *)f->vdev.vq[i].info, 0);
		f->vdev.vq[i].broken = true;
		f->vdev.vq[i].error = ENXIO;
	}
	mic_store_release(f->vdev.desc + offsetof(struct mic_device_desc, status), 0);
	mic_store_release(CTRL(f, vdev_reset), 0);
	mic_store_release(CTRL(f, host_ack), 1);
	mic_vdev_interrupt(&f->vdev);
}

void vop_handshake(struct mic_vop *f)
{
	if (mic_load_acquire(CTRL(f, used_address_updated)))
		take_rings(f);
	if (mic_load_acquire(CTRL(f, vdev_reset)))
		reset(f);
	if (mic_load_acquire(CTRL(f, guest_ack))) {
		static const char ack[] = "{\"op\":\"guest_ack\"}\n";

		/* In this order: a scan of the card in between must not take the old change for a new one. */
		mic_store_release(CTRL(f, config_change), 0);
		mic_store_release(CTRL(f, guest_ack), 0);
		(void)vop_wire_send(&f->wire, ack, sizeof ack - 1);
	}
}

static int fail(int error)
{
	errno = error;
	return -1;
}

API int mic_vop_pop(struct mic_vop *f, unsigned ring, struct mic_vop_chain *chain)
{
	struct mic_chain c;

	if (!f->added || f->removed)
		return fail(f->added ? ENODEV : EINVAL);
	if (ring >= f->shape.num_vq)
		return fail(EINVAL);
	struct mic_vq *vq = &f->vdev.vq[ring];

	if (!mic_vdev_driver_ok(&f->vdev) && vq->broken)
		return 0; /* not set up yet */
	bool fresh = !vq->broken;
	int rc = mic_vq_pop(vq, &c, chain->iov, MIC_VOP_SEGMENTS);

	if (rc < 0) {
		if (fresh)
			mic_vdev_broken(&f->vdev, vq);
		return fail(-rc);
	}
	if (!rc)
		return 0;
	chain->ring = ring;
	chain->head = c.head;
	chain->generation = f->generation;
	chain->out_num = c.out_num;
	chain->in_num = c.in_num;
	chain->out_len = c.out_len;
	chain->in_len = c.in_len;
	return 1;
}

API int mic_vop_push(struct mic_vop *f, const struct mic_vop_chain *chain, uint32_t written)
{
	if (!f->added || f->removed)
		return fail(f->added ? ENODEV : EINVAL);
	if (chain->ring >= f->shape.num_vq || written > chain->in_len)
		return fail(EINVAL);
	if (chain->generation != f->generation)
		return fail(ESTALE);
	mic_vq_push(&f->vdev.vq[chain->ring], chain->head, written);
	mic_vdev_complete(&f->vdev, &f->vdev.vq[chain->ring]);
	return 0;
}

API size_t mic_vop_read(const struct mic_vop_chain *chain, size_t at, void *to, size_t len)
{
	return mic_iov_read(chain->iov, chain->out_num, at, to, len);
}

API size_t mic_vop_write(const struct mic_vop_chain *chain, size_t at, const void *from, size_t len)
{
	return mic_iov_write(chain->iov + chain->out_num, chain->in_num, at, from, len);
}

/* The host asks what COPY_DESC has moved, for the debug file vdev_info (VOP-31). */
void vop_tell_counters(struct mic_vop *f)
{
	struct mic_copy_stats sum = {0}, s;
	char text[400];

	for (unsigned i = 0; i < MIC_MAX_VRINGS; i++)
		if (f->copy[i]) {
			mic_copy_stats(f->copy[i], &s);
			sum.in_bytes += s.in_bytes;
			sum.in_bytes_dma += s.in_bytes_dma;
			sum.out_bytes += s.out_bytes;
			sum.out_bytes_dma += s.out_bytes_dma;
			sum.tx_dst_unaligned += s.tx_dst_unaligned;
			sum.tx_len_unaligned += s.tx_len_unaligned;
		}
	int len =
		snprintf(text, sizeof text,
			 "{\"op\":\"counters\",\"counters\":{\"in_bytes\":%llu,\"in_bytes_dma\":%llu,"
			 "\"out_bytes\":%llu,\"out_bytes_dma\":%llu,\"tx_dst_unaligned\":%llu,"
			 "\"tx_len_unaligned\":%llu}}\n",
			 (unsigned long long)sum.in_bytes, (unsigned long long)sum.in_bytes_dma,
			 (unsigned long long)sum.out_bytes, (unsigned long long)sum.out_bytes_dma,
			 (unsigned long long)sum.tx_dst_unaligned, (unsigned long long)sum.tx_len_unaligned);

	(void)vop_wire_send(&f->wire, text, (size_t)len);
}
