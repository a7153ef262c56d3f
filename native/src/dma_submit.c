/* DMA transactions: prepare, submit, complete (HW 5.5, 5.6, HW-26..30). */
#define _GNU_SOURCE
#include "dma_drv.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <time.h>

#define FLAG_SLOTS     3u /* a fence and the two status descriptors of an interrupt */
#define PENDING_LEVEL  4u /* submit issues by itself beyond this many waiting descriptors */
#define PREP_TIMEOUT_S 5

static void count_add(uint64_t *counter, uint64_t n)
{
	mic_fetch_add(counter, n);
}

/* --- completion ------------------------------------------------------------------------------------ */

static bool grow_done(struct mic_dma_chan *ch)
{
	uint32_t room = ch->done_room ? 2 * ch->done_room : 64;
	uint64_t *bigger = malloc(room * sizeof *bigger);

	if (!bigger)
		return false;
	for (uint32_t i = 0; i < ch->done_count; i++)
		bigger[i] = ch->done[(ch->done_head + i) % ch->done_room];
	free(ch->done);
	ch->done = bigger;
	ch->done_room = room;
	ch->done_head = 0;
	return true;
}

/* False when there is no memory for a token: the slot retires at another look. */
static bool queue_token(struct mic_dma_chan *ch, uint64_t token)
{
	if (!token)
		return true;
	if (ch->done_count == ch->done_room && !grow_done(ch))
		return false;
	ch->done[(ch->done_head + ch->done_count) % ch->done_room] = token;
	mic_store_release(&ch->done_count, ch->done_count + 1);
	return true;
}

/* One slot has retired. */
static bool retire_slot(struct mic_dma_chan *ch, struct record *r)
{
	if (!r->cookie)
		return true;
	if (!queue_token(ch, r->token))
		return false;
	mic_store_release(&ch->completed, r->cookie);
	*r = (struct record){0};
	count_add(&ch->count.completed, 1);
	return true;
}

void dma_cleanup_locked(struct mic_dma_chan *ch)
{
	uint32_t tail = read_status(ch) & MIC_DMA_DSTAT_COUNT, slot = ch->last_tail;

	/* The register is shared memory: believe only counts that can be (between last_tail and DHPR). */
	if (tail >= ch->setup.size ||
	    distance(ch, slot, tail) > distance(ch, slot, mic_load_acquire(&ch->issued))) {
		count_add(&ch->count.bad_status, 1);
		return;
	}
	while (slot != tail && retire_slot(ch, &ch->records[slot]))
		slot = next_slot(ch, slot);
	mic_store_release(&ch->last_tail, slot); /* pairs with the load in free_slots() */
}

void mic_dma_cleanup(struct mic_dma_chan *ch)
{
	pthread_mutex_lock(&ch->clean);
	dma_cleanup_locked(ch);
	pthread_mutex_unlock(&ch->clean);
}

unsigned mic_dma_done_pending(struct mic_dma_chan *ch)
{
	return mic_load_acquire(&ch->done_count);
}

unsigned mic_dma_take_done(struct mic_dma_chan *ch, uint64_t *tokens, unsigned max)
{
	unsigned n = 0;

	pthread_mutex_lock(&ch->clean);
	for (; n < max && ch->done_count; n++) {
		tokens[n] = ch->done[ch->done_head];
		ch->done_head = (ch->done_head + 1) % ch->done_room;
		mic_store_release(&ch->done_count, ch->done_count - 1);
	}
	pthread_mutex_unlock(&ch->clean);
	return n;
}

/* Is `cookie` in the half-open interval (from, to] of a counter that wraps from INT32_MAX to 1? */
static bool cookie_in(int32_t cookie, int32_t from, int32_t to)
{
	return from <= to ? cookie > from && cookie <= to : cookie > from || cookie <= to;
}

int mic_dma_tx_status(struct mic_dma_chan *ch, int cookie)
{
	int rc = 1;

	if (cookie < FIRST_COOKIE)
		return -EINVAL;
	pthread_mutex_lock(&ch->clean);
	int32_t used = mic_load_acquire(&ch->cookie);

	if (cookie_in(cookie, ch->completed, used)) {
		dma_cleanup_locked(ch);
		rc = !cookie_in(cookie, ch->completed, used);
	}
	/* Terminated cookies lie below `completed`; they stay terminated until the next time. */
	if (rc == 1 && cookie_in(cookie, ch->cancel_from, ch->cancel_to))
		rc = -ECANCELED;
	pthread_mutex_unlock(&ch->clean);
	return rc;
}

void dma_drop_records(struct mic_dma_chan *ch)
{
	dma_cleanup_locked(ch);
	for (uint32_t slot = ch->last_tail; slot != ch->submitted; slot = next_slot(ch, slot)) {
		struct record *r = &ch->records[slot];

		queue_token(ch, r->token ? r->token | MIC_DMA_TOKEN_DROPPED : 0);
		*r = (struct record){0};
	}
	ch->cancel_from = ch->completed;
	ch->cancel_to = ch->completed = ch->cookie;
}

/* --- submission ------------------------------------------------------------------------------------- */

static uint32_t free_slots(struct mic_dma_chan *ch)
{
	/* Pairs with the release in dma_cleanup_locked(): the records of free slots are cleared. */
	return ch->setup.size - 1 - distance(ch, mic_load_acquire(&ch->last_tail), ch->head);
}

static void put(struct mic_dma_chan *ch, uint64_t qw0, uint64_t qw1)
{
	uint64_t *slot = ch->ring + 2 * (size_t)ch->head;

	mic_store_relaxed(&slot[0], qw0);
	mic_store_relaxed(&slot[1], qw1);
	ch->head = next_slot(ch, ch->head);
}

static void put_status(struct mic_dma_chan *ch, uint64_t dst, uint64_t value, bool interrupt)
{
	put(ch, value,
	    (uint64_t)MIC_DMA_DESC_STATUS << MIC_DMA_TYPE_SHIFT | dst |
		    (interrupt ? MIC_DMA_STATUS_INTERRUPT : 0));
}

/* FENCE is one status write; INTERRUPT two, the second with the interrupt bit (HW-26). */
static void put_flags(struct mic_dma_chan *ch, unsigned flags)
{
	if (flags & MIC_DMA_PREP_FENCE)
		put_status(ch, ch->setup.status, 0, false);
	if (flags & MIC_DMA_PREP_INTERRUPT) {
		put_status(ch, ch->setup.status, 0, false);
		put_status(ch, ch->setup.status, 0, true);
	}
}

void dma_prep_release(struct mic_dma_chan *ch)
{
	pthread_mutex_lock(&ch->prep);
	ch->preparing = false;
	pthread_cond_signal(&ch->prep_free);
	pthread_mutex_unlock(&ch->prep);
}

int dma_prep_take(struct mic_dma_chan *ch, uint64_t need)
{
	struct timespec until;
	int rc = 0;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += PREP_TIMEOUT_S;
	pthread_mutex_lock(&ch->prep);
	while (ch->preparing && !rc)
		rc = pthread_cond_timedwait(&ch->prep_free, &ch->prep, &until);
	if (!ch->preparing) {
		ch->preparing = true;
		rc = 0;
	}
	pthread_mutex_unlock(&ch->prep);
	if (rc)
		return -EBUSY;
	if (free_slots(ch) < need)
		mic_dma_cleanup(ch);
	if (free_slots(ch) < need) {
		count_add(&ch->count.ring_full, 1);
		dma_prep_release(ch);
		return -ENOMEM;
	}
	ch->prep_start = ch->head;
	ch->prep_bytes = 0;
	return 0;
}

static bool valid_flags(unsigned flags)
{
	return !(flags & ~(unsigned)(MIC_DMA_PREP_INTERRUPT | MIC_DMA_PREP_FENCE));
}

static bool valid_piece(const struct mic_dma_piece *p)
{
	return !((p->dst | p->src | p->len) % MIC_DMA_ALIGN) && (p->dst | p->src) <= MIC_DMA_ADDR_MASK &&
	       p->len <= MIC_DMA_ADDR_MASK;
}

/* Descriptors that `len` bytes take. */
static uint64_t slots_for(const struct mic_dma_chan *ch, uint64_t len)
{
	return len / ch->setup.max_bytes + !!(len % ch->setup.max_bytes);
}

static void put_piece(struct mic_dma_chan *ch, struct mic_dma_piece p)
{
	ch->prep_bytes += p.len;
	for (uint64_t n; p.len; p.src += n, p.dst += n, p.len -= n) {
		n = p.len < ch->setup.max_bytes ? p.len : ch->setup.max_bytes;
		put(ch, p.src | n / MIC_DMA_ALIGN << MIC_DMA_MEMCPY_LEN_SHIFT,
		    p.dst | (uint64_t)MIC_DMA_DESC_MEMCPY << MIC_DMA_TYPE_SHIFT);
	}
}

int mic_dma_prep_sg(struct mic_dma_chan *ch, const struct mic_dma_piece *pieces, unsigned count,
		    unsigned flags)
{
	uint64_t need = FLAG_SLOTS;
	int rc;

	if (!count || !valid_flags(flags))
		return -EINVAL;
	for (unsigned i = 0; i < count; i++) {
		if (!valid_piece(&pieces[i]))
			return -EINVAL;
		need += slots_for(ch, pieces[i].len);
	}
	if (need == FLAG_SLOTS && !flags)
		return -EINVAL; /* nothing to do */
	rc = dma_prep_take(ch, need);
	if (rc)
		return rc;
	for (unsigned i = 0; i < count; i++)
		put_piece(ch, pieces[i]);
	put_flags(ch, flags);
	return 0;
}

int mic_dma_prep_memcpy(struct mic_dma_chan *ch, uint64_t dst, uint64_t src, uint64_t len, unsigned flags)
{
	const struct mic_dma_piece piece = {dst, src, len};

	return mic_dma_prep_sg(ch, &piece, 1, flags);
}

int mic_dma_prep_imm(struct mic_dma_chan *ch, uint64_t dst, uint64_t value, unsigned flags)
{
	int rc;

	if (dst % 8 || dst > MIC_DMA_ADDR_MASK || !valid_flags(flags))
		return -EINVAL;
	rc = dma_prep_take(ch, 1 + FLAG_SLOTS);
	if (rc)
		return rc;
	put_status(ch, dst, value, false);
	put_flags(ch, flags);
	return 0;
}

int mic_dma_prep_interrupt(struct mic_dma_chan *ch, unsigned flags)
{
	int rc;

	/* Without a descriptor the record would be the previous transaction's (HW 5.5). */
	if (!flags || !valid_flags(flags))
		return -EINVAL;
	rc = dma_prep_take(ch, FLAG_SLOTS);
	if (rc)
		return rc;
	put_flags(ch, flags);
	return 0;
}

/* Called with `issue` held. */
static void issue_locked(struct mic_dma_chan *ch)
{
	if (ch->submitted == ch->issued)
		return; /* the same head twice is a hardware error (HW-32) */
	/* Release, before the register write: cleanup accepts counts up to it. The exchange behind
	 * the write of DHPR orders the descriptors before it. */
	mic_store_release(&ch->issued, ch->submitted);
	mic_mmio_write(ch->bus, MIC_REG_DHPR(ch->setup.c), ch->submitted);
	count_add(&ch->count.kicks, 1);
}

void mic_dma_issue_pending(struct mic_dma_chan *ch)
{
	pthread_mutex_lock(&ch->issue);
	issue_locked(ch);
	pthread_mutex_unlock(&ch->issue);
}

int mic_dma_submit(struct mic_dma_chan *ch, uint64_t token)
{
	uint32_t last = (ch->head ? ch->head : ch->setup.size) - 1;
	int32_t cookie = ch->cookie == INT32_MAX ? FIRST_COOKIE : ch->cookie + 1;

	if (!ch->preparing || ch->head == ch->prep_start)
		return -EINVAL;
	pthread_mutex_lock(&ch->clean);
	ch->records[last] = (struct record){.cookie = cookie, .token = token};
	mic_store_relaxed(&ch->end_slot[(uint32_t)cookie % ch->setup.size], ch->head);
	mic_store_release(&ch->cookie, cookie);
	pthread_mutex_unlock(&ch->clean);
	count_add(&ch->count.transactions, 1);
	count_add(&ch->count.descriptors, distance(ch, ch->prep_start, ch->head));
	count_add(&ch->count.bytes, ch->prep_bytes);
	pthread_mutex_lock(&ch->issue);
	ch->submitted = ch->head;
	if (distance(ch, ch->issued, ch->submitted) > PENDING_LEVEL + 1)
		issue_locked(ch);
	pthread_mutex_unlock(&ch->issue);
	dma_prep_release(ch);
	return cookie;
}

void mic_dma_discard(struct mic_dma_chan *ch)
{
	if (!ch->preparing)
		return;
	ch->head = ch->prep_start;
	dma_prep_release(ch);
}

void mic_dma_count(struct mic_dma_chan *ch, struct mic_dma_counters *out)
{
	out->transactions = mic_load_relaxed(&ch->count.transactions);
	out->descriptors = mic_load_relaxed(&ch->count.descriptors);
	out->bytes = mic_load_relaxed(&ch->count.bytes);
	out->completed = mic_load_relaxed(&ch->count.completed);
	out->kicks = mic_load_relaxed(&ch->count.kicks);
	out->ring_full = mic_load_relaxed(&ch->count.ring_full);
	out->bad_status = mic_load_relaxed(&ch->count.bad_status);
}
