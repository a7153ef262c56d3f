/* NBD: replies, from the disk back to the client's output. */
#include <endian.h>
#include <errno.h>
#include <string.h>

#include "nbd_internal.h"

static uint32_t nbd_errno(int error)
{
	switch (error) {
	case 0:
		return 0;
	case EPERM:
		return NBD_EPERM;
	case EINVAL:
		return NBD_EINVAL;
	case ENOSPC:
		return NBD_ENOSPC;
	case ENOMEM:
		return NBD_ENOMEM;
	case EOVERFLOW:
		return NBD_EOVERFLOW;
	case EOPNOTSUPP:
		return NBD_ENOTSUP;
	case ESHUTDOWN:
		return NBD_ESHUTDOWN;
	default:
		return NBD_EIO;
	}
}

static void head_simple(struct nbd_piece *p, const struct nbd_job *j, int error)
{
	struct nbd_simple_reply h = {
		.magic = htobe32(NBD_SIMPLE_MAGIC),
		.error = htobe32(nbd_errno(error)),
		.cookie = j->cookie,
	};

	memcpy(p->head, &h, sizeof h);
	p->head_len = sizeof h;
}

static void head_chunk(struct nbd_piece *p, const struct nbd_job *j, uint16_t flags, uint16_t type,
		       uint32_t len)
{
	struct nbd_chunk h = {
		.magic = htobe32(NBD_STRUCTURED_MAGIC),
		.flags = htobe16(flags),
		.type = htobe16(type),
		.cookie = j->cookie,
		.length = htobe32(len),
	};

	memcpy(p->head, &h, sizeof h);
	p->head_len = sizeof h;
}

static void append(struct nbd_client *c, struct nbd_piece *p)
{
	p->next = NULL;
	*c->out_tail = p;
	c->out_tail = &p->next;
}

/* The reply that ends a job without data; in structured mode only READ needs a chunk. */
static bool finish_plain(struct nbd_client *c, const struct nbd_job *j)
{
	struct nbd_piece *p = nbd_new_piece(c, NULL, 0);

	if (!p) {
		nbd_bad_client(c);
		return false;
	}
	if (j->type != NBD_CMD_READ || !c->structured) {
		head_simple(p, j, j->error);
	} else if (j->error) {
		uint32_t error = htobe32(nbd_errno(j->error));
		uint16_t no_text = 0;

		head_chunk(p, j, NBD_REPLY_FLAG_DONE, NBD_REPLY_ERROR, 6);
		memcpy(p->head + p->head_len, &error, sizeof error);
		memcpy(p->head + p->head_len + 4, &no_text, sizeof no_text);
		p->head_len += 6;
	} else {
		head_chunk(p, j, NBD_REPLY_FLAG_DONE, NBD_REPLY_NONE, 0);
	}
	append(c, p);
	return true;
}

/* Queue one finished piece of a READ. */
static void append_data(struct nbd_client *c, struct nbd_job *j, struct nbd_piece *p)
{
	bool last = !j->first && j->next_off == j->length;

	p->data_len = p->len;
	if (c->structured) {
		uint64_t offset = htobe64(p->offset);

		head_chunk(p, j, last ? NBD_REPLY_FLAG_DONE : 0, NBD_REPLY_OFFSET_DATA, 8 + p->len);
		memcpy(p->head + p->head_len, &offset, sizeof offset);
		p->head_len += sizeof offset;
	} else if (!j->begun) {
		head_simple(p, j, 0);
	}
	j->begun = true;
	append(c, p);
}

/* True when the whole reply of a READ is queued. */
static bool collect_read(struct nbd_client *c, struct nbd_job *j)
{
	while (j->first && j->first->done) {
		struct nbd_piece *p = j->first;

		j->first = p->next;
		if (!j->first)
			j->tail = &j->first;
		if (j->error)
			nbd_free_piece(p);
		else
			append_data(c, j, p);
	}
	if (j->outstanding || j->next_off < j->length)
		return false;
	if (j->error && j->begun && !c->structured) {
		nbd_bad_client(c); /* a simple reply cannot take its success back */
		return false;
	}
	return j->begun && !j->error ? true : finish_plain(c, j);
}

/* The rest of a failed READ need not be read. */
static void give_up_rest(struct nbd_client *c, struct nbd_job *j)
{
	if (j->error && j->type == NBD_CMD_READ && c->current == j) {
		j->next_off = j->length;
		c->current = NULL;
		c->stalled = false;
	}
}

void nbd_collect_replies(struct nbd_client *c)
{
	struct nbd_job *j;

	while (!c->broken && (j = c->first_job)) {
		give_up_rest(c, j);
		if (j->type == NBD_CMD_READ) {
			if (!collect_read(c, j))
				return;
		} else {
			if (j->outstanding || c->current == j)
				return;
			if (!j->error && j->flags & NBD_CMD_FLAG_FUA && !j->flushing) {
				if (!nbd_feed_flush(c, j))
					nbd_bad_client(c);
				return;
			}
			if (!finish_plain(c, j))
				return;
		}
		nbd_drop_job(c, j);
	}
}
