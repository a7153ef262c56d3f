/* readfrom, writeto and the v-calls: copies between mapped windows (SCIF 2.13, 2.14), by the caller or,
 * for large ones that need not be complete on return, by a DMA channel (handover.c).
 *
 * The lists of windows come from the node and are kept until their generation changes. A copy counts
 * itself in under the generation that it uses; the node waits for that count before it frees pages. */
#include "memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define LINE 64

struct win_map { /* pages of one window, contiguous here */
	uint8_t *base;
	size_t len;
	uint32_t refs;
	struct watch *watch; /* NULL: its node cannot be lost without us */
};

struct win {
	uint64_t id, offset, len;
	int prot;
	struct win_map *map;
};

struct rma_table {
	uint32_t gen, refs, own, peer;
	struct win w[]; /* own windows, then the peer's, each by offset */
};

/* --- tables ------------------------------------------------------------------------------------- */

static void map_put(struct win_map *m)
{
	if (!m || mic_fetch_add(&m->refs, -1) != 1)
		return;
	watch_remove(m->watch);
	munmap(m->base, m->len);
	free(m);
}

static void table_put(struct rma_table *t)
{
	if (!t || mic_fetch_add(&t->refs, -1) != 1)
		return;
	for (uint32_t i = 0; i < t->own + t->peer; i++)
		map_put(t->w[i].map);
	free(t);
}

static struct win_map *map_window(const struct mic_scif_seg *seg, uint32_t n, size_t len, int fd,
				  bool watched)
{
	struct win_map *m = malloc(sizeof *m);
	size_t at = 0;

	if (!m)
		return NULL;
	*m = (struct win_map){mmap(NULL, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0),
			      len, 1, NULL};
	if (m->base == MAP_FAILED)
		goto no;
	for (uint32_t i = 0; i < n && at < len; at += seg[i++].len)
		if (seg[i].len > len - at ||
		    mmap(m->base + at, seg[i].len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
			 (off_t)seg[i].off) == MAP_FAILED) {
			munmap(m->base, len);
			goto no;
		}
	if (watched) {
		m->watch = watch_add(m->base, len);
		if (!m->watch) {
			munmap(m->base, len);
			goto no;
		}
	}
	madvise(m->base, len, MADV_DONTDUMP);
	return m;
no:
	free(m);
	return NULL;
}

/* What the old list has of a window. Both lists are by offset: `at` goes on from where it was. */
static struct win_map *reuse(const struct rma_table *old, uint32_t *at, uint32_t end,
			     const struct mic_scif_win *w)
{
	while (*at < end && old->w[*at].offset < w->offset)
		++*at;
	if (*at == end || old->w[*at].id != w->id)
		return NULL;
	mic_fetch_add(&old->w[*at].map->refs, 1);
	return old->w[*at].map;
}

/* The lists in an answer; mappings of windows that were known before are kept. */
static int build(const struct ep *ep, const struct answer *ans, const struct rma_table *old,
		 struct rma_table **out)
{
	uint32_t own = (uint32_t)ans->head.v[1], peer = (uint32_t)ans->head.v[2], done = 0;
	bool card = ep->peer_node && ep->peer_node != ep->node; /* the host outlives us all */
	const uint8_t *p = ans->data, *end = p + ans->head.ndata;
	uint32_t at = 0, at_end = old ? old->own : 0; /* in the old list: own windows, then the peer's */
	struct rma_table *t = calloc(1, sizeof *t + (own + peer) * sizeof t->w[0]);

	if (!t)
		return -ENOMEM;
	*t = (struct rma_table){.gen = (uint32_t)ans->head.v[0], .refs = 1};
	for (; done < own + peer; done++) {
		struct mic_scif_win w;

		if ((size_t)(end - p) < sizeof w)
			goto no;
		memcpy(&w, p, sizeof w);
		p += sizeof w;
		if ((size_t)(end - p) / sizeof(struct mic_scif_seg) < w.nsegs)
			goto no;
		struct win *e = &t->w[done];

		if (done == own && old) {
			at = old->own;
			at_end = old->own + old->peer;
		}
		*e = (struct win){w.id, w.offset, w.len, (int)w.prot,
				  old ? reuse(old, &at, at_end, &w) : NULL};
		if (!e->map)
			e->map = map_window((const void *)p, w.nsegs, w.len, ans->fds[done < own ? 0 : 1],
					    card && done >= own);
		if (!e->map)
			goto no;
		p += w.nsegs * sizeof(struct mic_scif_seg);
	}
	t->own = own;
	t->peer = peer;
	*out = t;
	return 0;
no:
	t->own = done;
	table_put(t);
	return -ENOMEM;
}

static int refresh(struct ep *ep)
{
	const struct mic_scif_request rq = {.op = MIC_SCIF_WINDOWS, .sid = ep->sid};
	struct answer ans = {.max = MIC_SCIF_PACKET, .data = malloc(MIC_SCIF_PACKET)};
	struct rma_table *t = NULL, *old;
	int rc = ans.data ? node_call(&rq, NULL, &ans, false) : -ENOMEM;

	if (rc == 0)
		rc = answer_has(&ans, 2);
	if (rc == 0) {
		pthread_mutex_lock(&ep->rma_lock);
		old = ep->rma;
		rc = build(ep, &ans, old, &t);
		if (rc == 0)
			ep->rma = t;
		pthread_mutex_unlock(&ep->rma_lock);
		if (rc == 0)
			table_put(old);
	}
	answer_close(&ans);
	free(ans.data);
	return rc;
}

void rma_forget(struct ep *ep)
{
	table_put(ep->rma);
	ep->rma = NULL;
}

int rma_begin(struct ep *ep, struct rma_table **out)
{
	int rc;

	for (;;) {
		uint32_t gen = mic_load_acquire(&ep->ctl->gen);

		mic_fetch_add(&ep->ctl->busy[gen % MIC_SCIF_GENS], 1);
		/* Counted in, then look again: pairs with the node, which raises, then reads the count. */
		if (mic_load_acquire(&ep->ctl->gen) == gen) {
			pthread_mutex_lock(&ep->rma_lock);
			struct rma_table *t = ep->rma;

			if (t && t->gen == gen)
				mic_fetch_add(&t->refs, 1);
			else
				t = NULL;
			pthread_mutex_unlock(&ep->rma_lock);
			if (t) {
				*out = t;
				return 0;
			}
		}
		copy_out(ep, gen);
		if (mic_load_acquire(&ep->ctl->state) != MIC_SCIF_EP_CONNECTED)
			return -ECONNRESET;
		rc = refresh(ep);
		if (rc < 0)
			return rc;
	}
}

void rma_end(struct ep *ep, struct rma_table *t)
{
	copy_out(ep, t->gen);
	table_put(t);
}

/* --- ranges ------------------------------------------------------------------------------------- */

/* A position in a side's windows, or in plain memory when `w` is NULL. */
struct cursor {
	const struct win *w;
	uint8_t *p;
	size_t left; /* bytes until the window's end */
};

static const struct win *find(const struct rma_table *t, bool own, uint64_t off)
{
	const struct win *w = own ? t->w : t->w + t->own;
	uint32_t lo = 0, hi = own ? t->own : t->peer;

	while (lo < hi) {
		uint32_t mid = (lo + hi) / 2;

		if (w[mid].offset + w[mid].len <= off)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo < (own ? t->own : t->peer) && w[lo].offset <= off ? &w[lo] : NULL;
}

/* Walk [off, off + len): every byte in a window that allows `prot` (SCIF 2.13, rows 6-9). */
static int range(const struct rma_table *t, bool own, off_t off, size_t len, int prot, struct cursor *c)
{
	const struct win *last = (own ? t->w : t->w + t->own) + (own ? t->own : t->peer);
	const struct win *w = off < 0 ? NULL : find(t, own, (uint64_t)off);
	uint64_t at = (uint64_t)off, end = at + len;

	if (!w || end < at)
		return -ENXIO;
	*c = (struct cursor){w, w->map->base + (at - w->offset), w->len - (at - w->offset)};
	for (;; w++) {
		if (w == last || w->offset > at)
			return -ENXIO;
		if (prot & ~w->prot)
			return -EPERM;
		at = w->offset + w->len;
		if (at >= end)
			return 0;
	}
}

int rma_at(struct rma_table *t, bool own, off_t off, size_t len, int prot, uint8_t **out)
{
	struct cursor c;
	int rc = range(t, own, off, len, prot, &c);

	if (rc < 0)
		return rc;
	if (c.left < len)
		return -ENXIO;
	*out = c.p;
	return 0;
}

int rma_intact(const struct rma_table *t, off_t roff, size_t len)
{
	const struct win *w = find(t, false, (uint64_t)roff), *last = t->w + t->own + t->peer;

	for (; w && w < last && w->offset < (uint64_t)roff + len; w++)
		if (watch_lost(w->map->watch))
			return -EIO;
	return 0;
}

static void step(struct cursor *c, size_t n)
{
	c->p += n;
	c->left -= n;
	if (!c->left && c->w) {
		c->w++; /* adjacent: range() has seen it, or this was the end */
		c->p = NULL;
	}
}

static size_t span(struct cursor *c, size_t want)
{
	if (!c->p && c->w) {
		c->p = c->w->map->base;
		c->left = c->w->len;
	}
	return want < c->left ? want : c->left;
}

static void skip(struct cursor *c, size_t n)
{
	for (size_t k; n; n -= k) {
		k = span(c, n);
		step(c, k);
	}
}

static void copy(struct cursor *dst, struct cursor *src, size_t len)
{
	while (len) {
		size_t n = span(src, span(dst, len));

		memcpy(dst->p, src->p, n);
		step(dst, n);
		step(src, n);
		len -= n;
	}
}

/* With SCIF_RMA_ORDERED the last cache line becomes visible after all others (SCIF-112). */
static void transfer(struct cursor *dst, struct cursor *src, size_t len, int flags)
{
	size_t tail = 0;

	if (flags & SCIF_RMA_ORDERED) {
		tail = ((uintptr_t)dst->p + len) % LINE;
		if (!tail)
			tail = LINE;
		if (tail > len)
			tail = len;
	}
	copy(dst, src, len - tail);
	mic_full_fence(); /* pairs with the acquire of whoever polls the last line */
	copy(dst, src, tail);
}

/* The same with a DMA channel, if it takes the lines in the middle. */
static void transfer_async(struct ep *ep, struct cursor *dst, struct cursor *src, const struct range *r)
{
	size_t head = lines_head(r), taken;

	copy(dst, src, head);
	taken = hand_over(ep, r);
	skip(dst, taken);
	skip(src, taken);
	transfer(dst, src, r->len - head - taken, r->flags);
}

/* --- the four calls ----------------------------------------------------------------------------- */

#define RMA_FLAGS (SCIF_RMA_USECPU | SCIF_RMA_USECACHE | SCIF_RMA_SYNC | SCIF_RMA_ORDERED)

/* `addr` NULL: the local side is the window range at loff. */
static int rma(struct ep *ep, void *addr, off_t loff, size_t len, off_t roff, int flags, bool write)
{
	const struct range r = {loff, roff, len, flags, write};
	struct cursor local = {NULL, addr, len}, remote;
	struct rma_table *t = NULL;
	int rc = check_connected(ep);

	if (rc == 0 && flags && !(flags & RMA_FLAGS))
		rc = -EINVAL;
	if (rc == 0 && addr && len)
		rc = write ? user_readable(addr, len) : user_writable(addr, len);
	if (rc == 0 && addr && len)
		rc = user_mapped(addr, len); /* SCIF-110: it may have been unmapped since it was fine */
	if (rc == 0 && !len)
		rc = -EINVAL;
	if (rc == 0)
		rc = rma_begin(ep, &t);
	if (rc < 0)
		return rc;
	if (!addr)
		rc = range(t, true, loff, len, write ? SCIF_PROT_READ : SCIF_PROT_WRITE, &local);
	if (rc == 0)
		rc = range(t, false, roff, len, write ? SCIF_PROT_WRITE : SCIF_PROT_READ, &remote);
	if (rc == 0) {
		if (!addr && may_hand_over(ep, &r))
			transfer_async(ep, write ? &remote : &local, write ? &local : &remote, &r);
		else
			transfer(write ? &remote : &local, write ? &local : &remote, len, flags);
		rc = rma_intact(t, roff, len);
	}
	rma_end(ep, t);
	return rc;
}

static int call(int epd, void *addr, off_t loff, size_t len, off_t roff, int flags, bool write)
{
	struct ep *ep;
	int rc = ep_get(epd, &ep);

	if (rc < 0)
		return fail(rc);
	rc = rma(ep, addr, loff, len, roff, flags, write);
	ep->checked = mic_timestamp();
	ep_put(ep);
	return rc < 0 ? fail(rc) : 0;
}

API int scif_readfrom(scif_epd_t epd, off_t loffset, size_t len, off_t roffset, int rma_flags)
{
	return call(epd, NULL, loffset, len, roffset, rma_flags, false);
}

API int scif_writeto(scif_epd_t epd, off_t loffset, size_t len, off_t roffset, int rma_flags)
{
	return call(epd, NULL, loffset, len, roffset, rma_flags, true);
}

API int scif_vreadfrom(scif_epd_t epd, void *addr, size_t len, off_t offset, int rma_flags)
{
	return call(epd, addr, 0, len, offset, rma_flags, false);
}

API int scif_vwriteto(scif_epd_t epd, void *addr, size_t len, off_t offset, int rma_flags)
{
	return call(epd, addr, 0, len, offset, rma_flags, true);
}
