/* virtio-blk, device half: requests straight between the image and card memory (VOP 8.7, 9.4). */
#define _GNU_SOURCE
#include "mic/block.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "block_flush.h"
#include "block_hold.h"
#include "block_move.h"
#include "block_sick.h"
#include "mic/barrier.h"

#define MAX_IOV         256u         /* a direct chain of 128 that ends in a table of 128 */
#define BATCH           128u         /* requests between two looks at the control descriptor */
#define SIGNAL_REQUESTS 16u          /* completions, or ... */
#define SIGNAL_BYTES    (256u << 10) /* ... bytes, after which a sleeping driver is told */
#define FEATURE(bit)    (1ull << (bit))

struct mic_blk_dev {
	struct mic_vdev *vdev;
	int fd;
	bool read_only;
	uint64_t capacity; /* sectors */
	uint8_t serial[MIC_VIRTIO_BLK_ID_LEN];
	struct mic_blk_stats stats;
	struct mic_mover *mover;
	struct blk_flush *flush;
	struct blk_hold hold;
	struct iovec iov[MAX_IOV];
};

/* A request taken apart: header copied, data segments without header and status. */
struct request {
	uint32_t type;
	uint64_t sector;
	struct iovec *out, *in; /* data the card wrote; room for data the card reads */
	unsigned out_num, in_num;
	uint64_t out_len, in_len; /* bytes */
	uint8_t *status;
	uint64_t features;
};

struct mic_blk_dev *mic_blk_dev_create(struct mic_vdev *vdev, int fd, uint64_t capacity, bool read_only,
				       const char *serial)
{
	struct mic_blk_dev *dev = calloc(1, sizeof *dev);

	if (!dev)
		return NULL;
	dev->mover = mic_mover_create();
	dev->flush = blk_flush_create();
	if (!dev->mover || !dev->flush) {
		if (dev->mover)
			mic_mover_destroy(dev->mover);
		if (dev->flush)
			blk_flush_destroy(dev->flush);
		free(dev);
		return NULL;
	}
	dev->vdev = vdev;
	dev->fd = fd;
	dev->capacity = capacity;
	dev->read_only = read_only;
	memcpy(dev->serial, serial, strnlen(serial, sizeof dev->serial));
	blk_hold_init(&dev->hold);
	return dev;
}

void mic_blk_dev_destroy(struct mic_blk_dev *dev)
{
	mic_mover_destroy(dev->mover);
	blk_flush_destroy(dev->flush);
	blk_hold_fini(&dev->hold);
	free(dev);
}

void mic_blk_dev_resize(struct mic_blk_dev *dev, uint64_t capacity)
{
	dev->capacity = capacity;
}

void mic_blk_dev_stats(const struct mic_blk_dev *dev, struct mic_blk_stats *out)
{
	*out = dev->stats;
}

/* --- segment lists ---------------------------------------------------------------------------- */

static void iov_skip(struct iovec **iov, unsigned *n, size_t bytes)
{
	while (bytes && bytes >= (*iov)->iov_len) {
		bytes -= (*iov)->iov_len;
		(*iov)++;
		(*n)--;
	}
	if (bytes) {
		(*iov)->iov_base = (uint8_t *)(*iov)->iov_base + bytes;
		(*iov)->iov_len -= bytes;
	}
}

/* Copy up to len bytes between a list and a buffer and step over them. Returns the bytes copied. */
static size_t iov_take(struct iovec **iov, unsigned *n, void *buf, size_t len, bool from_list)
{
	size_t done = 0;

	while (done < len && *n) {
		size_t part = (*iov)->iov_len < len - done ? (*iov)->iov_len : len - done;
		uint8_t *mine = (uint8_t *)buf + done;

		if (from_list)
			mic_copy_once(mine, (*iov)->iov_base, part);
		else
			memcpy((*iov)->iov_base, mine, part);
		iov_skip(iov, n, part);
		done += part;
	}
	return done;
}

static int write_zeros(int fd, off_t off, off_t len)
{
	static const uint8_t zeros[64 << 10];

	while (len) {
		ssize_t rc = pwrite(fd, zeros, len < (off_t)sizeof zeros ? (size_t)len : sizeof zeros, off);

		if (rc < 0 && errno == EINTR)
			continue;
		if (rc <= 0)
			return rc ? errno : EIO;
		off += rc;
		len -= rc;
	}
	return 0;
}

static int punch(int fd, int mode, off_t off, off_t len)
{
	int rc;

	do {
		rc = fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, off, len);
	} while (rc < 0 && errno == EINTR);
	return rc < 0 ? errno : 0;
}

static bool unsupported(int err)
{
	return err == EOPNOTSUPP || err == ENODEV || err == ENOSYS || err == EINVAL;
}

/* A discard is a hint: a file system that cannot do it keeps the old bytes. */
static int discard(int fd, off_t off, off_t len)
{
	int err = punch(fd, FALLOC_FL_PUNCH_HOLE, off, len);

	return unsupported(err) ? 0 : err;
}

static int zeroes(int fd, off_t off, off_t len, bool unmap)
{
	int err = unmap ? punch(fd, FALLOC_FL_PUNCH_HOLE, off, len) : EOPNOTSUPP;

	if (unsupported(err))
		err = punch(fd, FALLOC_FL_ZERO_RANGE, off, len);
	return unsupported(err) ? write_zeros(fd, off, len) : err;
}

/* --- requests --------------------------------------------------------------------------------- */

static uint8_t blk_status(int err)
{
	return err ? MIC_VIRTIO_BLK_S_IOERR : MIC_VIRTIO_BLK_S_OK;
}

static bool within(const struct mic_blk_dev *dev, uint64_t sector, uint64_t sectors)
{
	return sector <= dev->capacity && sectors <= dev->capacity - sector;
}

static int move_data(struct mic_blk_dev *dev, struct iovec *iov, unsigned n, uint64_t sector, bool write)
{
	return mic_mover_run(dev->mover, dev->fd, iov, n, (off_t)(sector * MIC_BLK_SECTOR), write);
}

static uint8_t do_read(struct mic_blk_dev *dev, const struct request *r)
{
	dev->stats.reads++;
	if (r->out_len || r->in_len % MIC_BLK_SECTOR || !within(dev, r->sector, r->in_len / MIC_BLK_SECTOR))
		return MIC_VIRTIO_BLK_S_IOERR;
	dev->stats.bytes_read += r->in_len;
	return blk_status(move_data(dev, r->in, r->in_num, r->sector, false));
}

static uint8_t do_write(struct mic_blk_dev *dev, const struct request *r)
{
	dev->stats.writes++;
	if (dev->read_only || r->out_len % MIC_BLK_SECTOR ||
	    !within(dev, r->sector, r->out_len / MIC_BLK_SECTOR))
		return MIC_VIRTIO_BLK_S_IOERR;
	dev->stats.bytes_written += r->out_len;
	return blk_status(move_data(dev, r->out, r->out_num, r->sector, true));
}

static uint8_t do_flush(struct mic_blk_dev *dev, const struct request *r)
{
	if (!(r->features & FEATURE(MIC_VIRTIO_BLK_F_FLUSH)))
		return MIC_VIRTIO_BLK_S_UNSUPP;
	dev->stats.flushes++;
	return blk_status(dev->read_only ? 0 : blk_flush_now(dev->flush, dev->fd));
}

static uint8_t do_get_id(struct mic_blk_dev *dev, struct request *r)
{
	dev->stats.others++;
	iov_take(&r->in, &r->in_num, dev->serial, sizeof dev->serial, false);
	return MIC_VIRTIO_BLK_S_OK;
}

/* One segment of DISCARD or WRITE_ZEROES. */
static uint8_t do_range(struct mic_blk_dev *dev, const struct mic_virtio_blk_range *g, bool zero)
{
	off_t off = (off_t)(g->sector * MIC_BLK_SECTOR), len = (off_t)g->num_sectors * MIC_BLK_SECTOR;
	uint32_t most = zero ? MIC_BLK_MAX_ZEROES : MIC_BLK_MAX_DISCARD;

	/* Virtio 1.x: unknown flags, and unmap on a discard, are not supported rather than failed. */
	if (g->flags & ~1u || (!zero && g->flags))
		return MIC_VIRTIO_BLK_S_UNSUPP;
	if (!within(dev, g->sector, g->num_sectors) || g->num_sectors > most)
		return MIC_VIRTIO_BLK_S_IOERR;
	if (!len)
		return MIC_VIRTIO_BLK_S_OK;
	return blk_status(zero ? zeroes(dev->fd, off, len, g->flags & 1) : discard(dev->fd, off, len));
}

static uint8_t do_ranges(struct mic_blk_dev *dev, struct request *r, bool zero)
{
	struct mic_virtio_blk_range range[MIC_BLK_MAX_RANGES];
	unsigned bit = zero ? MIC_VIRTIO_BLK_F_WRITE_ZEROES : MIC_VIRTIO_BLK_F_DISCARD;
	size_t n = r->out_len / sizeof range[0];

	if (!(r->features & FEATURE(bit)))
		return MIC_VIRTIO_BLK_S_UNSUPP;
	if (zero)
		dev->stats.zeroes++;
	else
		dev->stats.discards++;
	if (dev->read_only || !n || r->out_len % sizeof range[0] || n > MIC_BLK_MAX_RANGES)
		return MIC_VIRTIO_BLK_S_IOERR;
	iov_take(&r->out, &r->out_num, range, n * sizeof range[0], true);
	for (size_t i = 0; i < n; i++) {
		uint8_t status = do_range(dev, &range[i], zero);

		if (status != MIC_VIRTIO_BLK_S_OK)
			return status;
	}
	return MIC_VIRTIO_BLK_S_OK;
}

static uint8_t perform(struct mic_blk_dev *dev, struct request *r)
{
	switch (r->type) {
	case MIC_VIRTIO_BLK_T_IN:
		return do_read(dev, r);
	case MIC_VIRTIO_BLK_T_OUT:
		return do_write(dev, r);
	case MIC_VIRTIO_BLK_T_FLUSH:
		return do_flush(dev, r);
	case MIC_VIRTIO_BLK_T_GET_ID:
		return do_get_id(dev, r);
	case MIC_VIRTIO_BLK_T_DISCARD:
		return do_ranges(dev, r, false);
	case MIC_VIRTIO_BLK_T_WRITE_ZEROES:
		return do_ranges(dev, r, true);
	default:
		dev->stats.others++;
		return MIC_VIRTIO_BLK_S_UNSUPP;
	}
}

/* A write of which only the first sectors reach the disk. One that is not legal fails as it always does. */
static uint8_t perform_torn(struct mic_blk_dev *dev, struct request *r, const struct mic_fault_verdict *v)
{
	uint64_t sectors = r->out_len / MIC_BLK_SECTOR, left;

	if (r->type != MIC_VIRTIO_BLK_T_OUT || r->out_len % MIC_BLK_SECTOR ||
	    !within(dev, r->sector, sectors))
		return perform(dev, r);
	r->out_len = left = blk_torn_keep(v, sectors) * MIC_BLK_SECTOR;
	for (unsigned i = 0; i < r->out_num; left -= r->out[i++].iov_len)
		if (r->out[i].iov_len >= left) {
			r->out[i].iov_len = left;
			r->out_num = left ? i + 1 : i;
		}
	uint8_t status = perform(dev, r);

	return status == MIC_VIRTIO_BLK_S_OK && !v->torn_ok ? MIC_VIRTIO_BLK_S_IOERR : status;
}

/* Serve a request the way fault filters want it; its completion is held back until *due, 0 = not at all. */
static uint8_t perform_sick(struct mic_blk_dev *dev, struct request *r, uint64_t *due)
{
	const struct mic_fault_event event =
		blk_event(dev->vdev->fault_target, r->type, r->out_len + r->in_len);
	struct mic_fault_verdict v;

	if (!mic_fault_judge(dev->vdev->bus, &event, &v))
		return perform(dev, r);
	*due = fault_due(&v);
	if (v.error)
		return v.error == EOPNOTSUPP ? MIC_VIRTIO_BLK_S_UNSUPP : MIC_VIRTIO_BLK_S_IOERR;
	return v.torn ? perform_torn(dev, r, &v) : perform(dev, r);
}

/* Take header and status byte off a chain; false when the header is short. The status byte is the last
 * writable one, whatever the layout; without any there is nowhere to answer. */
static bool parse(struct request *r, struct iovec *iov, const struct mic_chain *c)
{
	struct mic_virtio_blk_req head;

	*r = (struct request){.out = iov, .out_num = c->out_num, .in = iov + c->out_num, .in_num = c->in_num};
	if (c->in_num) {
		struct iovec *last = &r->in[c->in_num - 1];

		r->status = (uint8_t *)last->iov_base + --last->iov_len;
		r->in_num -= !last->iov_len;
		r->in_len = c->in_len - 1;
	}
	if (iov_take(&r->out, &r->out_num, &head, sizeof head, true) < sizeof head)
		return false;
	r->type = head.type;
	r->sector = head.sector;
	r->out_len = c->out_len - sizeof head;
	return true;
}

/* A flush that will take long goes to the thread; the requests behind it need not wait. */
static bool flush_later(struct mic_blk_dev *dev, const struct request *r, const struct mic_chain *c,
			unsigned ring)
{
	const struct blk_flushed item = {
		.len = (uint32_t)c->in_len, .head = c->head, .ring = (uint16_t)ring, .status = r->status};

	if (r->type != MIC_VIRTIO_BLK_T_FLUSH || !(r->features & FEATURE(MIC_VIRTIO_BLK_F_FLUSH)) ||
	    dev->read_only || !blk_flush_slow(dev->flush) || !blk_flush_post(dev->flush, dev->fd, &item))
		return false;
	dev->stats.flushes++;
	return true;
}

/* Returns the bytes written into the chain; LATER: it is answered when its flush has ended. */
#define LATER UINT32_MAX
static uint32_t serve_chain(struct mic_blk_dev *dev, const struct mic_vq *vq, const struct mic_chain *c,
			    unsigned ring, uint64_t *due)
{
	struct request r;
	uint8_t status = MIC_VIRTIO_BLK_S_IOERR;

	bool whole = parse(&r, dev->iov, c);

	r.features = vq->features;
	if (whole && r.status && !fault_armed(dev->vdev->bus, MIC_FAULT_AT_DISK) &&
	    flush_later(dev, &r, c, ring))
		return LATER;
	if (whole && r.status && fault_armed(dev->vdev->bus, MIC_FAULT_AT_DISK))
		status = perform_sick(dev, &r, due);
	else if (whole && r.status)
		status = perform(dev, &r);
	if (status != MIC_VIRTIO_BLK_S_OK)
		dev->stats.errors++;
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

	while (blk_flush_take(dev->flush, &item, &err)) {
		struct mic_vq *vq = &dev->vdev->vq[item.ring];

		*item.status = blk_status(err);
		dev->stats.errors += err != 0;
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
	n += blk_flush_pending(dev->flush) ? serve_flushed(dev) : 0;
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
		int also[2] = {blk_flush_fd(dev->flush), dev->hold.timer_fd};
		int mask = mic_vdev_sleep(vdev, also, dev->hold.count ? 2 : 1, -1);

		if (mask < 0)
			return mask == -EINTR ? MIC_RUN_SIGNAL : mask;
		if (mask & 4)
			blk_flush_woken(dev->flush);
		if (mask & 2)
			return MIC_RUN_CONTROL;
	}
}

int mic_blk_dev_run(struct mic_blk_dev *dev)
{
	int rc = run(dev);

	/* What comes next may be a reset: flushes that wait are answered before. */
	if (blk_flush_pending(dev->flush)) {
		blk_flush_settle(dev->flush);
		serve_flushed(dev);
	}
	return rc;
}
