/* virtio-blk, device half: its rings, and who answers when (VOP 8.7, 9.4). Requests: block_request.c. */
#define _GNU_SOURCE
#include "mic/block.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "block_hold.h"
#include "block_request.h"
#include "block_sick.h"

#define MAX_IOV         256u         /* a direct chain of 128 that ends in a table of 128 */
#define BATCH           128u         /* requests between two looks at the control descriptor */
#define SIGNAL_REQUESTS 16u          /* completions, or ... */
#define SIGNAL_BYTES    (256u << 10) /* ... bytes, after which a sleeping driver is told */

struct mic_blk_dev {
	struct mic_vdev *vdev;
	struct blk_disk disk;
	struct blk_hold hold;
	struct iovec iov[MAX_IOV];
};

struct mic_blk_dev *mic_blk_dev_create(struct mic_vdev *vdev, int fd, uint64_t capacity, bool read_only,
				       const char *serial)
{
	struct mic_blk_dev *dev = calloc(1, sizeof *dev);

	if (!dev)
		return NULL;
	dev->disk.mover = mic_mover_create();
	dev->disk.flush = blk_flush_create();
	if (!dev->disk.mover || !dev->disk.flush) {
		if (dev->disk.mover)
			mic_mover_destroy(dev->disk.mover);
		if (dev->disk.flush)
			blk_flush_destroy(dev->disk.flush);
		free(dev);
		return NULL;
	}
	dev->vdev = vdev;
	dev->disk.fd = fd;
	dev->disk.capacity = capacity;
	dev->disk.read_only = read_only;
	memcpy(dev->disk.serial, serial, strnlen(serial, sizeof dev->disk.serial));
	blk_hold_init(&dev->hold);
	return dev;
}

void mic_blk_dev_destroy(struct mic_blk_dev *dev)
{
	mic_mover_destroy(dev->disk.mover);
	blk_flush_destroy(dev->disk.flush);
	blk_hold_fini(&dev->hold);
	free(dev);
}

void mic_blk_dev_stats(const struct mic_blk_dev *dev, struct mic_blk_stats *out)
{
	*out = dev->disk.stats;
}

/* Serve a request the way fault filters want it; its completion is held back until *due, 0 = not at all. */
static uint8_t perform_sick(struct mic_blk_dev *dev, struct blk_request *r, uint64_t *due)
{
	const struct mic_fault_event event =
		blk_event(dev->vdev->fault_target, r->type, r->out_len + r->in_len);
	struct mic_fault_verdict v;

	if (!mic_fault_judge(dev->vdev->bus, &event, &v))
		return blk_perform(&dev->disk, r);
	*due = fault_due(&v);
	if (v.error)
		return v.error == EOPNOTSUPP ? MIC_VIRTIO_BLK_S_UNSUPP : MIC_VIRTIO_BLK_S_IOERR;
	return v.torn ? blk_perform_torn(&dev->disk, r, &v) : blk_perform(&dev->disk, r);
}

/* A flush that will take long goes to the thread; the requests behind it need not wait. */
static bool flush_later(struct mic_blk_dev *dev, const struct blk_request *r, const struct mic_chain *c,
			unsigned ring)
{
	const struct blk_flushed item = {
		.len = (uint32_t)c->in_len, .head = c->head, .ring = (uint16_t)ring, .status = r->status};

	if (!blk_is_flush(r) || dev->disk.read_only || !blk_flush_slow(dev->disk.flush) ||
	    !blk_flush_post(dev->disk.flush, dev->disk.fd, &item))
		return false;
	dev->disk.stats.flushes++;
	return true;
}

/* Returns the bytes written into the chain; LATER: it is answered when its flush has ended. */
#define LATER UINT32_MAX
static uint32_t serve_chain(struct mic_blk_dev *dev, const struct mic_vq *vq, const struct mic_chain *c,
			    unsigned ring, uint64_t *due)
{
	struct blk_request r;
	uint8_t status = MIC_VIRTIO_BLK_S_IOERR;

	bool whole = blk_parse(&r, dev->iov, c);

	r.features = vq->features;
	if (whole && r.status && !fault_armed(dev->vdev->bus, MIC_FAULT_AT_DISK) &&
	    flush_later(dev, &r, c, ring))
		return LATER;
	if (whole && r.status && fault_armed(dev->vdev->bus, MIC_FAULT_AT_DISK))
		status = perform_sick(dev, &r, due);
	else if (whole && r.status)
		status = blk_perform(&dev->disk, &r);
	if (status != MIC_VIRTIO_BLK_S_OK)
		dev->disk.stats.errors++;
	if (!r.status)
		return 0;
	*r.status = status;
	return status == MIC_VIRTIO_BLK_S_OK ? (uint32_t)c->in_len : 1;
}

/* --- the loop --------------------------------------------------------------------------------- */

/* Serve at most BATCH requests of a ring; returns how many there were. */
static unsigned serve_ring(struct mic_blk_dev *dev, unsigned ring)
{
	struct mic_vq *vq = &dev->vdev->vq[ring];
	unsigned n = 0, unsignalled = 0;
	uint64_t bytes = 0;
	struct mic_chain chain;

	if (!mic_vq_has_work(vq))
		return 0;
	mic_vq_disable_kick(vq);
	while (n < BATCH) {
		int rc = mic_vq_pop(vq, &chain, dev->iov, MAX_IOV);

		if (rc < 0)
			mic_vdev_broken(dev->vdev, vq);
		if (rc <= 0)
			break;
		uint64_t due = 0;
		uint32_t len = serve_chain(dev, vq, &chain, ring, &due);

		if (len == LATER)
			len = 0;
		else if (!due || !blk_hold_add(&dev->hold, ring, chain.head, len, due))
			mic_vq_push(vq, chain.head, len);
		n++;
		bytes += chain.out_len + chain.in_len;
		if (++unsignalled >= SIGNAL_REQUESTS || bytes >= SIGNAL_BYTES) {
			mic_vdev_complete(dev->vdev, vq);
			unsignalled = 0;
			bytes = 0;
		}
	}
	mic_vdev_complete(dev->vdev, vq);
	return n;
}

/* Answer the flushes that have ended; returns how many. */
static unsigned serve_flushed(struct mic_blk_dev *dev)
{
	struct blk_flushed item;
	unsigned n = 0;
	int err;

	while (blk_flush_take(dev->disk.flush, &item, &err)) {
		struct mic_vq *vq = &dev->vdev->vq[item.ring];

		*item.status = blk_status(err);
		dev->disk.stats.errors += err != 0;
		mic_vq_push(vq, item.head, err ? 1 : item.len);
		mic_vdev_complete(dev->vdev, vq);
		n++;
	}
	return n;
}

static unsigned serve_all(struct mic_blk_dev *dev)
{
	unsigned n = 0;

	if (!mic_vdev_driver_ok(dev->vdev))
		return 0;
	for (unsigned i = 0; i < dev->vdev->num_vq; i++)
		n += serve_ring(dev, i);
	n += blk_flush_pending(dev->disk.flush) ? serve_flushed(dev) : 0;
	return n + (dev->hold.count ? blk_hold_release(&dev->hold, dev->vdev) : 0);
}

/* Ask for kicks on every ring; true when one has work already. */
static bool arm(struct mic_blk_dev *dev)
{
	bool work = false;

	if (!mic_vdev_driver_ok(dev->vdev))
		return false;
	for (unsigned i = 0; i < dev->vdev->num_vq; i++)
		work |= mic_vq_enable_kick(&dev->vdev->vq[i]);
	return work;
}

static bool control_ready(const struct mic_blk_dev *dev)
{
	return mic_wait_fds(&dev->vdev->control_fd, 1, 0) > 0;
}

static int run(struct mic_blk_dev *dev)
{
	struct mic_vdev *vdev = dev->vdev;
	unsigned since = 0;

	blk_hold_settle(&dev->hold, vdev);
	for (;;) {
		if (mic_vdev_handshake(vdev))
			return MIC_RUN_HANDSHAKE;
		unsigned n = serve_all(dev);

		since += n;
		if (since >= BATCH) {
			since = 0;
			if (control_ready(dev))
				return MIC_RUN_CONTROL;
		}
		if (n || mic_vdev_spin(vdev) || arm(dev))
			continue;
		if (mic_vdev_handshake(vdev))
			return MIC_RUN_HANDSHAKE;
		since = 0;
		if (blk_hold_soon(&dev->hold))
			continue;
		int also[2] = {blk_flush_fd(dev->disk.flush), dev->hold.timer_fd};
		int mask = mic_vdev_sleep(vdev, also, dev->hold.count ? 2 : 1, -1);

		if (mask < 0)
			return mask == -EINTR ? MIC_RUN_SIGNAL : mask;
		if (mask & 4)
			blk_flush_woken(dev->disk.flush);
		if (mask & 2)
			return MIC_RUN_CONTROL;
	}
}

int mic_blk_dev_run(struct mic_blk_dev *dev)
{
	int rc = run(dev);

	/* What comes next may be a reset: flushes that wait are answered before. */
	if (blk_flush_pending(dev->disk.flush)) {
		blk_flush_settle(dev->disk.flush);
		serve_flushed(dev);
	}
	return rc;
}
