/* NBD: requests in transmission phase, from the header to the disk. */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nbd_internal.h"

#define RANGE_BYTES 4096u /* pool bytes that a TRIM or WRITE_ZEROES needs for its segment list */

/* --- pieces ----------------------------------------------------------------------------------- */

void nbd_free_piece(struct nbd_piece *p)
{
	if (p->room) {
		mic_blk_free(p->client->nbd->drv, p->req.addr, p->room);
		p->client->held -= p->room;
		p->client->nbd->freed = true;
	}
	free(p);
}

/* A piece with `room` bytes of the pool (0: none needed); NULL when there is no memory now. */
struct nbd_piece *nbd_new_piece(struct nbd_client *c, struct nbd_job *job, uint32_t room)
{
	struct nbd_piece *p = calloc(1, sizeof *p);

	if (!p)
		return NULL;
	p->client = c;
	p->job = job;
	if (room) {
		p->req.addr = mic_blk_alloc(c->nbd->drv, room);
		if (!p->req.addr) {
			free(p);
			return NULL;
		}
		p->room = room;
		c->held += room;
	}
	return p;
}

/* The same for up to `want` bytes of data, fewer when the pool is short. */
static struct nbd_piece *data_piece(struct nbd_client *c, struct nbd_job *job, uint32_t want)
{
	uint32_t room = nbd_grant(c, want < NBD_PIECE ? (want + 4095) & ~4095u : NBD_PIECE);

	while (room) {
		struct nbd_piece *p = nbd_new_piece(c, job, room);

		if (p) {
			p->len = room < want ? room : want;
			return p;
		}
		/* Enough pages, but not in one piece: a smaller one will do. */
		room = room > 4096 ? room / 2 & ~4095u : 0;
	}
	return NULL;
}

static void send_piece(struct nbd_piece *p, uint32_t type, uint32_t len)
{
	p->req.type = type;
	p->req.len = len;
	p->req.sector = p->offset / MIC_BLK_SECTOR;
	p->job->outstanding++;
	p->client->inflight++;
	p->client->nbd->inflight++;
	nbd_submit(p);
}

void nbd_piece_done(struct nbd_piece *p)
{
	struct nbd_client *c = p->client;
	struct nbd_job *j = c->dead ? NULL : p->job; /* a dead client has no jobs any more */

	c->inflight--;
	c->nbd->inflight--;
	c->dirty = true;
	p->done = true;
	if (j) {
		j->outstanding--;
		if (p->req.error && !j->error)
			j->error = p->req.error;
	}
	if (!j || j->type != NBD_CMD_READ)
		nbd_free_piece(p);
}

/* --- jobs ------------------------------------------------------------------------------------- */

static struct nbd_job *new_job(struct nbd_client *c, const struct nbd_request *h)
{
	struct nbd_job *j = calloc(1, sizeof *j);

	if (!j)
		return NULL;
	j->cookie = h->cookie; /* opaque: stays in wire order */
	j->type = be16toh(h->type);
	j->flags = be16toh(h->flags);
	j->offset = be64toh(h->offset);
	j->length = be32toh(h->length);
	j->tail = &j->first;
	*c->last_job = j;
	c->last_job = &j->next;
	c->jobs++;
	return j;
}

void nbd_drop_job(struct nbd_client *c, struct nbd_job *j)
{
	c->first_job = j->next;
	if (!c->first_job)
		c->last_job = &c->first_job;
	c->jobs--;
	free(j);
}

void nbd_drop_jobs(struct nbd_client *c)
{
	while (c->first_job) {
		struct nbd_job *j = c->first_job;

		while (j->first) {
			struct nbd_piece *p = j->first;

			j->first = p->next;
			if (p->done)
				nbd_free_piece(p); /* else it is at the disk and frees itself */
		}
		nbd_drop_job(c, j);
	}
	c->current = NULL;
}

/* What is wrong with a request, 0 when nothing is. */
static int check(const struct nbd_client *c, const struct nbd_job *j)
{
	uint16_t flags = nbd_transmission_flags(c->nbd), known = NBD_CMD_FLAG_FUA;
	uint64_t size = mic_blk_drv_capacity(c->nbd->drv) * MIC_BLK_SECTOR;
	bool writes = j->type == NBD_CMD_WRITE || j->type == NBD_CMD_TRIM || j->type == NBD_CMD_WRITE_ZEROES;

	if (j->type == NBD_CMD_READ)
		known = NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF;
	else if (j->type == NBD_CMD_WRITE_ZEROES)
		known = NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE;
	else if (j->type != NBD_CMD_WRITE && j->type != NBD_CMD_TRIM && j->type != NBD_CMD_FLUSH)
		return EINVAL;
	if (writes && c->nbd->read_only)
		return EPERM;
	if (j->flags & ~known || (j->flags & NBD_CMD_FLAG_FUA && !(flags & NBD_TF_SEND_FUA) && writes))
		return EINVAL;
	if ((j->type == NBD_CMD_TRIM && !(flags & NBD_TF_SEND_TRIM)) ||
	    (j->type == NBD_CMD_WRITE_ZEROES && !(flags & NBD_TF_SEND_WRITE_ZEROES)) ||
	    (j->type == NBD_CMD_FLUSH && (j->offset || j->length || !(flags & NBD_TF_SEND_FLUSH))))
		return EINVAL;
	if (j->offset % MIC_BLK_SECTOR || j->length % MIC_BLK_SECTOR)
		return EINVAL;
	if (j->type == NBD_CMD_READ && j->length > MIC_NBD_MAX_PAYLOAD)
		return EOVERFLOW;
	if (j->offset > size || j->length > size - j->offset)
		return j->type == NBD_CMD_READ ? EINVAL : ENOSPC;
	return 0;
}

/* DF asks for one chunk: it can be as large as the biggest piece (the protocol's 64 KiB and more). */
static int check_df(const struct nbd_client *c, const struct nbd_job *j)
{
	if (!(j->flags & NBD_CMD_FLAG_DF))
		return 0;
	if (!c->structured)
		return EINVAL;
	return j->length > nbd_share(c->nbd) ? EOVERFLOW : 0;
}

static bool take_request(struct nbd_client *c)
{
	struct nbd_request h;

	if (c->in_len - c->in_at < sizeof h || c->jobs >= NBD_MAX_JOBS)
		return false;
	memcpy(&h, c->inbuf + c->in_at, sizeof h);
	c->in_at += sizeof h;
	uint16_t type = be16toh(h.type);
	uint32_t len = be32toh(h.length);

	if (be32toh(h.magic) != NBD_REQUEST_MAGIC || (type == NBD_CMD_WRITE && len > MIC_NBD_MAX_PAYLOAD)) {
		nbd_bad_client(c);
		return false;
	}
	if (type == NBD_CMD_DISC) {
		c->closing = true;
		return false;
	}
	struct nbd_job *j = new_job(c, &h);

	if (!j) {
		nbd_bad_client(c);
		return false;
	}
	c->nbd->stats.requests++;
	j->error = check(c, j);
	if (!j->error)
		j->error = check_df(c, j);
	if (j->error) {
		c->skip = type == NBD_CMD_WRITE ? len : 0;
		j->next_off = j->length;
		return true;
	}
	c->current = j;
	nbd_feed(c);
	return true;
}

/* --- giving a job to the disk ----------------------------------------------------------------- */

static bool feed_read(struct nbd_client *c, struct nbd_job *j)
{
	while (j->next_off < j->length) {
		struct nbd_piece *p = data_piece(c, j, j->length - j->next_off);

		if (!p || (j->flags & NBD_CMD_FLAG_DF && p->len < j->length)) {
			if (p)
				nbd_free_piece(p);
			return false;
		}
		p->offset = j->offset + j->next_off;
		j->next_off += p->len;
		*j->tail = p;
		j->tail = &p->next;
		send_piece(p, MIC_VIRTIO_BLK_T_IN, p->len);
	}
	c->nbd->stats.bytes_read += j->length;
	return true;
}

/* The ranges of one TRIM or WRITE_ZEROES request at byte `at` of the job. Returns the bytes covered. */
static uint32_t fill_ranges(struct mic_virtio_blk_range *r, const struct nbd_job *j, uint32_t at, unsigned *n)
{
	bool zero = j->type == NBD_CMD_WRITE_ZEROES;
	uint64_t most = (zero ? MIC_BLK_MAX_ZEROES : MIC_BLK_MAX_DISCARD) * (uint64_t)MIC_BLK_SECTOR;
	uint32_t start = at;

	for (*n = 0; *n < MIC_BLK_MAX_RANGES && at < j->length; (*n)++) {
		uint32_t len = j->length - at < most ? j->length - at : (uint32_t)most;

		r[*n].sector = (j->offset + at) / MIC_BLK_SECTOR;
		r[*n].num_sectors = len / MIC_BLK_SECTOR;
		r[*n].flags = zero && !(j->flags & NBD_CMD_FLAG_NO_HOLE);
		at += len;
	}
	return at - start;
}

static bool feed_ranges(struct nbd_client *c, struct nbd_job *j)
{
	while (j->next_off < j->length) {
		unsigned n;
		struct nbd_piece *p = nbd_grant(c, RANGE_BYTES) ? nbd_new_piece(c, j, RANGE_BYTES) : NULL;

		if (!p)
			return false;
		j->next_off +=
			fill_ranges(mic_blk_at(c->nbd->drv, p->req.addr, RANGE_BYTES), j, j->next_off, &n);
		send_piece(p,
			   j->type == NBD_CMD_TRIM ? MIC_VIRTIO_BLK_T_DISCARD : MIC_VIRTIO_BLK_T_WRITE_ZEROES,
			   n * (uint32_t)sizeof(struct mic_virtio_blk_range));
	}
	return true;
}

bool nbd_feed_flush(struct nbd_client *c, struct nbd_job *j)
{
	struct nbd_piece *p = nbd_new_piece(c, j, 0);

	if (!p)
		return false;
	j->flushing = true;
	send_piece(p, MIC_VIRTIO_BLK_T_FLUSH, 0);
	return true;
}

/* WRITE: the next piece to receive into. */
static bool feed_write(struct nbd_client *c, struct nbd_job *j)
{
	if (j->next_off == j->length && !c->filling)
		return true;
	if (!c->filling) {
		c->filling = data_piece(c, j, j->length - j->next_off);
		if (!c->filling)
			return false;
		c->filling->offset = j->offset + j->next_off;
		j->next_off += c->filling->len;
	}
	return false; /* until its bytes are here */
}

void nbd_feed(struct nbd_client *c)
{
	struct nbd_job *j = c->current;
	bool fed;

	if (!j)
		return;
	switch (j->type) {
	case NBD_CMD_READ:
		fed = feed_read(c, j);
		break;
	case NBD_CMD_WRITE:
		fed = feed_write(c, j);
		break;
	case NBD_CMD_FLUSH:
		fed = nbd_feed_flush(c, j);
		break;
	default:
		fed = feed_ranges(c, j);
		break;
	}
	c->stalled = !fed && !c->filling;
	if (fed)
		c->current = NULL;
}

/* Bytes of the piece being filled that are in the input buffer already. */
static bool take_payload(struct nbd_client *c)
{
	struct nbd_piece *p = c->filling;
	uint32_t have = c->in_len - c->in_at, n = p->len - p->filled < have ? p->len - p->filled : have;

	memcpy(mic_blk_at(c->nbd->drv, p->req.addr + p->filled, n), c->inbuf + c->in_at, n);
	c->in_at += n;
	p->filled += n;
	if (p->filled < p->len)
		return false;
	c->filling = NULL;
	c->nbd->stats.bytes_written += p->len;
	send_piece(p, MIC_VIRTIO_BLK_T_OUT, p->len);
	nbd_feed(c);
	return true;
}

bool nbd_transmit(struct nbd_client *c)
{
	if (c->filling)
		return take_payload(c);
	if (c->current)
		return false; /* waits for memory */
	return take_request(c);
}
