/* Requests of virtio-blk: what each kind does to the image (VOP 8.7, 9.4). */
#define _GNU_SOURCE
#include "block_request.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "block_sick.h"
#include "mic/barrier.h"
#include "mic/iov.h"

#define FEATURE(bit) (1ull << (bit))

/* --- taking it apart -------------------------------------------------------------------------- */

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
		mic_iov_skip(iov, n, part);
		done += part;
	}
	return done;
}

/* The status byte is the last writable one, whatever the layout. */
bool blk_parse(struct blk_request *r, struct iovec *iov, const struct mic_chain *c)
{
	struct mic_virtio_blk_req head;

	*r = (struct blk_request){
		.out = iov, .out_num = c->out_num, .in = iov + c->out_num, .in_num = c->in_num};
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

bool blk_is_flush(const struct blk_request *r)
{
	return r->type == MIC_VIRTIO_BLK_T_FLUSH && r->features & FEATURE(MIC_VIRTIO_BLK_F_FLUSH);
}

/* --- the image -------------------------------------------------------------------------------- */

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

uint8_t blk_status(int err)
{
	return err ? MIC_VIRTIO_BLK_S_IOERR : MIC_VIRTIO_BLK_S_OK;
}

static bool within(const struct blk_disk *d, uint64_t sector, uint64_t sectors)
{
	return sector <= d->capacity && sectors <= d->capacity - sector;
}

static int move_data(struct blk_disk *d, struct iovec *iov, unsigned n, uint64_t sector, bool write)
{
	return mic_mover_run(d->mover, d->fd, iov, n, (off_t)(sector * MIC_BLK_SECTOR), write);
}

static uint8_t do_read(struct blk_disk *d, const struct blk_request *r)
{
	d->stats.reads++;
	if (r->out_len || r->in_len % MIC_BLK_SECTOR || !within(d, r->sector, r->in_len / MIC_BLK_SECTOR))
		return MIC_VIRTIO_BLK_S_IOERR;
	d->stats.bytes_read += r->in_len;
	return blk_status(move_data(d, r->in, r->in_num, r->sector, false));
}

static uint8_t do_write(struct blk_disk *d, const struct blk_request *r)
{
	d->stats.writes++;
	if (d->read_only || r->out_len % MIC_BLK_SECTOR || !within(d, r->sector, r->out_len / MIC_BLK_SECTOR))
		return MIC_VIRTIO_BLK_S_IOERR;
	d->stats.bytes_written += r->out_len;
	return blk_status(move_data(d, r->out, r->out_num, r->sector, true));
}

static uint8_t do_flush(struct blk_disk *d, const struct blk_request *r)
{
	if (!(r->features & FEATURE(MIC_VIRTIO_BLK_F_FLUSH)))
		return MIC_VIRTIO_BLK_S_UNSUPP;
	d->stats.flushes++;
	return blk_status(d->read_only ? 0 : blk_flush_now(d->flush, d->fd));
}

static uint8_t do_get_id(struct blk_disk *d, struct blk_request *r)
{
	d->stats.others++;
	iov_take(&r->in, &r->in_num, d->serial, sizeof d->serial, false);
	return MIC_VIRTIO_BLK_S_OK;
}

/* One segment of DISCARD or WRITE_ZEROES. */
static uint8_t do_range(struct blk_disk *d, const struct mic_virtio_blk_range *g, bool zero)
{
	off_t off = (off_t)(g->sector * MIC_BLK_SECTOR), len = (off_t)g->num_sectors * MIC_BLK_SECTOR;
	uint32_t most = zero ? MIC_BLK_MAX_ZEROES : MIC_BLK_MAX_DISCARD;

	/* Virtio 1.x: unknown flags, and unmap on a discard, are not supported rather than failed. */
	if (g->flags & ~1u || (!zero && g->flags))
		return MIC_VIRTIO_BLK_S_UNSUPP;
	if (!within(d, g->sector, g->num_sectors) || g->num_sectors > most)
		return MIC_VIRTIO_BLK_S_IOERR;
	if (!len)
		return MIC_VIRTIO_BLK_S_OK;
	return blk_status(zero ? zeroes(d->fd, off, len, g->flags & 1) : discard(d->fd, off, len));
}

static uint8_t do_ranges(struct blk_disk *d, struct blk_request *r, bool zero)
{
	struct mic_virtio_blk_range range[MIC_BLK_MAX_RANGES];
	unsigned bit = zero ? MIC_VIRTIO_BLK_F_WRITE_ZEROES : MIC_VIRTIO_BLK_F_DISCARD;
	size_t n = r->out_len / sizeof range[0];

	if (!(r->features & FEATURE(bit)))
		return MIC_VIRTIO_BLK_S_UNSUPP;
	if (zero)
		d->stats.zeroes++;
	else
		d->stats.discards++;
	if (d->read_only || !n || r->out_len % sizeof range[0] || n > MIC_BLK_MAX_RANGES)
		return MIC_VIRTIO_BLK_S_IOERR;
	iov_take(&r->out, &r->out_num, range, n * sizeof range[0], true);
	for (size_t i = 0; i < n; i++) {
		uint8_t status = do_range(d, &range[i], zero);

		if (status != MIC_VIRTIO_BLK_S_OK)
			return status;
	}
	return MIC_VIRTIO_BLK_S_OK;
}

uint8_t blk_perform(struct blk_disk *d, struct blk_request *r)
{
	switch (r->type) {
	case MIC_VIRTIO_BLK_T_IN:
		return do_read(d, r);
	case MIC_VIRTIO_BLK_T_OUT:
		return do_write(d, r);
	case MIC_VIRTIO_BLK_T_FLUSH:
		return do_flush(d, r);
	case MIC_VIRTIO_BLK_T_GET_ID:
		return do_get_id(d, r);
	case MIC_VIRTIO_BLK_T_DISCARD:
		return do_ranges(d, r, false);
	case MIC_VIRTIO_BLK_T_WRITE_ZEROES:
		return do_ranges(d, r, true);
	default:
		d->stats.others++;
		return MIC_VIRTIO_BLK_S_UNSUPP;
	}
}

uint8_t blk_perform_torn(struct blk_disk *d, struct blk_request *r, const struct mic_fault_verdict *v)
{
	uint64_t sectors = r->out_len / MIC_BLK_SECTOR, left;

	if (r->type != MIC_VIRTIO_BLK_T_OUT || r->out_len % MIC_BLK_SECTOR || !within(d, r->sector, sectors))
		return blk_perform(d, r);
	r->out_len = left = blk_torn_keep(v, sectors) * MIC_BLK_SECTOR;
	for (unsigned i = 0; i < r->out_num; left -= r->out[i++].iov_len)
		if (r->out[i].iov_len >= left) {
			r->out[i].iov_len = left;
			r->out_num = left ? i + 1 : i;
		}
	uint8_t status = blk_perform(d, r);

	return status == MIC_VIRTIO_BLK_S_OK && !v->torn_ok ? MIC_VIRTIO_BLK_S_IOERR : status;
}
