/* Driver half of a DMA channel: ring, cookies, completion (HW 5.4 - 5.6, HW-26..30, 33, 34). */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "mic/barrier.h"
#include "mic/dma.h"
#include "mic/vring.h"

#define FLAG_SLOTS       3u /* a fence and the two status descriptors of an interrupt */
#define PENDING_LEVEL    4u /* submit issues by itself beyond this many waiting descriptors */
#define PREP_TIMEOUT_S   5
#define SETUP_TIMEOUT_MS 1000
#define FIRST_COOKIE     1 /* the counter's start: never assigned, counts as complete */

struct record {
	int32_t cookie; /* 0: this slot is not the last one of a transaction */
	uint64_t token;
};

struct mic_dma_chan {
	struct mic_bus *bus;
	struct mic_dma_setup setup;
	uint64_t *ring;
	struct record *records; /* by slot; under `clean` */
	uint32_t *end_slot;     /* by cookie modulo size: the count at which it is complete */

	/* Prep side. `preparing` is held from prep to submit, across threads if the caller likes. */
	pthread_mutex_t prep;
	pthread_cond_t prep_free;
	bool preparing;
	uint32_t head;       /* next slot to fill */
	uint32_t prep_start; /* head before the transaction in preparation */
	uint64_t prep_bytes;
	int32_t cookie; /* last assigned */

	pthread_mutex_t issue;
	uint32_t submitted; /* head of the last submitted transaction */
	uint32_t issued;    /* last value written to DHPR */

	pthread_mutex_t clean;
	uint32_t last_tail; /* slots before it are free again: published after its records are read */
	int32_t completed;
	int32_t cancel_from, cancel_to; /* cookies in (from, to] were terminated */
	uint64_t *done; /* tokens for take_done(): a queue that grows while nobody takes any */
	uint32_t done_room, done_head, done_count;

	struct mic_dma_counters count;
};

static bool host_side(const struct mic_dma_chan *ch)
{
	return ch->setup.c < MIC_DMA_HOST_CHANNELS;
}

static uint32_t read_status(struct mic_dma_chan *ch)
{
	return mic_mmio_read(ch->bus, MIC_REG_DSTAT(ch->setup.c));
}

static void count_add(uint64_t *counter, uint64_t n)
{
	mic_fetch_add(counter, n);
}

/* --- set-up --------------------------------------------------------------------------------------- */

static void set_enable(struct mic_dma_chan *ch, bool on)
{
	uint32_t bit = 2u << (2 * ch->setup.c);

	mic_dcr_update(ch->bus, on ? 0 : bit, on ? bit : 0);
}

static void set_mask(struct mic_dma_chan *ch, bool on)
{
	uint32_t bit = host_side(ch) ? MIC_DMA_DCAR_IM1 : MIC_DMA_DCAR_IM0, off = MIC_REG_DCAR(ch->setup.c);
	uint32_t old = mic_mmio_read(ch->bus, off);

	mic_mmio_write(ch->bus, off, on ? old | bit : old & ~bit);
}

bool mic_dma_halted(struct mic_dma_chan *ch)
{
	return mic_mmio_read(ch->bus, MIC_REG_DCHERR(ch->setup.c)) ||
	       read_status(ch) & MIC_DMA_DSTAT_QUIESCED;
}

/* After the channel was disabled: until the engine is past the descriptor it had begun. */
static int wait_inactive(struct mic_dma_chan *ch, int timeout_ms)
{
	uint64_t end = mic_now_ns() + (uint64_t)timeout_ms * 1000000u;

	for (;;) {
		uint32_t seen = read_status(ch);
		uint64_t now = mic_now_ns();

		if (!(seen & MIC_DMA_DSTAT_ACTIVE))
			return 0;
		if (now >= end)
			return -ETIMEDOUT;
		mic_dma_sleep(ch->bus, ch->setup.c, seen, MIC_DMA_SLEEP_ANY, end - now);
	}
}

static void program_ring(struct mic_dma_chan *ch)
{
	uint64_t ring = ch->setup.ring;
	uint32_t hi = ch->setup.size << MIC_DMA_DRAR_SIZE_SHIFT;

	if (host_side(ch))
		hi |= MIC_DMA_DRAR_SYS | ((uint32_t)(ring >> 32) & 3u) |
		      ((uint32_t)(ring >> MIC_SMPT_SHIFT) & 0x1fu) << MIC_DMA_DRAR_SMPT_SHIFT;
	else
		hi |= (uint32_t)(ring >> 32) & 0xfu;
	mic_mmio_write(ch->bus, MIC_REG_DRAR_LO(ch->setup.c), (uint32_t)ring);
	mic_mmio_write(ch->bus, MIC_REG_DRAR_HI(ch->setup.c), hi);
}

/* Continue where the hardware stands. The head register is put there too, while the channel is
 * disabled: what an earlier owner left unfinished must not run. (The chapter's "issued <- 0" would
 * rewrite an equal head on a channel that was used before; that is a hardware error, HW-32.) */
static void start_at_tail(struct mic_dma_chan *ch)
{
	uint32_t tail = mic_mmio_read(ch->bus, MIC_REG_DTPR(ch->setup.c));

	mic_mmio_write(ch->bus, MIC_REG_DHPR(ch->setup.c), tail);
	ch->head = ch->prep_start = ch->submitted = ch->issued = ch->last_tail = tail;
}

static int setup_channel(struct mic_dma_chan *ch)
{
	unsigned c = ch->setup.c;

	mic_dcr_update(ch->bus, (host_side(ch) ? 2u : 3u) << (2 * c), 0); /* card: owner bit <- 0 as well */
	set_mask(ch, true);
	/* An owner that was killed may have left the engine in the middle of a descriptor; and a ring
	 * shorter than the last one cannot continue at its tail. Both end with the next card reset. */
	if (wait_inactive(ch, SETUP_TIMEOUT_MS) || mic_mmio_read(ch->bus, MIC_REG_DTPR(c)) >= ch->setup.size)
		return -EBUSY;
	mic_mmio_write(ch->bus, MIC_REG_DCHERRMSK(c), 0);
	program_ring(ch);
	start_at_tail(ch);
	set_mask(ch, false);
	set_enable(ch, true);
	if (!mic_dma_halted(ch))
		return 0;
	set_enable(ch, false);
	set_mask(ch, true);
	return -EBUSY;
}

static uint64_t *ring_memory(struct mic_bus *bus, const struct mic_dma_setup *s)
{
	uint64_t len = (uint64_t)s->size * MIC_DMA_DESC_SIZE, size = mic_bus_host_size(bus);

	if (s->c >= MIC_DMA_HOST_CHANNELS)
		return mic_gddr_at(bus, s->memory, len);
	if (s->memory > size || len > size - s->memory)
		return NULL;
	return (uint64_t *)(void *)(mic_bus_host(bus) + s->memory);
}

static int check_setup(struct mic_bus *bus, const struct mic_dma_setup *s)
{
	bool window = s->ring >= MIC_SMPT_BASE;

	if (s->c >= MIC_DMA_CHANNELS || s->size < 8 || s->size > MIC_DMA_RING_SIZE || s->ring % MIC_DMA_ALIGN ||
	    s->memory % MIC_DMA_ALIGN || s->status % 8 || !s->max_bytes || s->max_bytes % MIC_DMA_ALIGN ||
	    s->max_bytes / MIC_DMA_ALIGN > MIC_DMA_MEMCPY_LEN_MASK || window != (s->c < MIC_DMA_HOST_CHANNELS))
		return -EINVAL;
	return ring_memory(bus, s) ? 0 : -EFAULT;
}

void mic_dma_chan_destroy(struct mic_dma_chan *ch)
{
	if (!ch)
		return;
	pthread_mutex_destroy(&ch->prep);
	pthread_cond_destroy(&ch->prep_free);
	pthread_mutex_destroy(&ch->issue);
	pthread_mutex_destroy(&ch->clean);
	free(ch->records);
	free(ch->end_slot);
	free(ch->done);
	free(ch);
}

static void init_locks(struct mic_dma_chan *ch)
{
	pthread_condattr_t attr;

	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&ch->prep_free, &attr);
	pthread_condattr_destroy(&attr);
	pthread_mutex_init(&ch->prep, NULL);
	pthread_mutex_init(&ch->issue, NULL);
	pthread_mutex_init(&ch->clean, NULL);
}

struct mic_dma_chan *mic_dma_chan_create(struct mic_bus *bus, const struct mic_dma_setup *setup)
{
	int rc = check_setup(bus, setup);
	struct mic_dma_chan *ch = rc ? NULL : calloc(1, sizeof *ch);

	if (!ch) {
		errno = rc ? -rc : ENOMEM;
		return NULL;
	}
	ch->bus = bus;
	ch->setup = *setup;
	ch->ring = ring_memory(bus, setup);
	ch->records = calloc(setup->size, sizeof *ch->records);
	ch->end_slot = calloc(setup->size, sizeof *ch->end_slot);
	ch->cookie = ch->completed = ch->cancel_from = ch->cancel_to = FIRST_COOKIE;
	init_locks(ch);
	rc = ch->records && ch->end_slot ? setup_channel(ch) : -ENOMEM;
	if (rc) {
		mic_dma_chan_destroy(ch);
		errno = -rc;
		return NULL;
	}
	return ch;
}

/* --- completion ------------------------------------------------------------------------------------ */

static uint32_t distance(const struct mic_dma_chan *ch, uint32_t from, uint32_t to)
{
	return to >= from ? to - from : to + ch->setup.size - from;
}

static uint32_t next_slot(const struct mic_dma_chan *ch, uint32_t slot)
{
	return slot + 1 == ch->setup.size ? 0 : slot + 1;
}

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

/* Called with `clean` held. */
static void cleanup_locked(struct mic_dma_chan *ch)
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
	cleanup_locked(ch);
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
		cleanup_locked(ch);
		rc = !cookie_in(cookie, ch->completed, used);
	}
	/* Terminated cookies lie below `completed`; they stay terminated until the next time. */
	if (rc == 1 && cookie_in(cookie, ch->cancel_from, ch->cancel_to))
		rc = -ECANCELED;
	pthread_mutex_unlock(&ch->clean);
	return rc;
}

/* --- submission ------------------------------------------------------------------------------------- */

static uint32_t free_slots(struct mic_dma_chan *ch)
{
	/* Pairs with the release in cleanup_locked(): the records of free slots are cleared. */
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

static void prep_release(struct mic_dma_chan *ch)
{
	pthread_mutex_lock(&ch->prep);
	ch->preparing = false;
	pthread_cond_signal(&ch->prep_free);
	pthread_mutex_unlock(&ch->prep);
}

/* Take the prep side and see to `need` free slots, with one cleanup if they are short. */
static int prep_take(struct mic_dma_chan *ch, uint64_t need)
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
		prep_release(ch);
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

int mic_dma_prep_memcpy(struct mic_dma_chan *ch, uint64_t dst, uint64_t src, uint64_t len, unsigned flags)
{
	uint32_t max = ch->setup.max_bytes;
	int rc;

	if ((!len && !flags) || (dst | src | len) % MIC_DMA_ALIGN || (dst | src) > MIC_DMA_ADDR_MASK ||
	    len > MIC_DMA_ADDR_MASK || !valid_flags(flags))
		return -EINVAL;
	rc = prep_take(ch, len / max + !!(len % max) + FLAG_SLOTS);
	if (rc)
		return rc;
	ch->prep_bytes = len;
	for (uint64_t n; len; src += n, dst += n, len -= n) {
		n = len < max ? len : max;
		put(ch, src | n / MIC_DMA_ALIGN << MIC_DMA_MEMCPY_LEN_SHIFT,
		    dst | (uint64_t)MIC_DMA_DESC_MEMCPY << MIC_DMA_TYPE_SHIFT);
	}
	put_flags(ch, flags);
	return 0;
}

int mic_dma_prep_imm(struct mic_dma_chan *ch, uint64_t dst, uint64_t value, unsigned flags)
{
	int rc;

	if (dst % 8 || dst > MIC_DMA_ADDR_MASK || !valid_flags(flags))
		return -EINVAL;
	rc = prep_take(ch, 1 + FLAG_SLOTS);
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
	rc = prep_take(ch, FLAG_SLOTS);
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
	prep_release(ch);
	return cookie;
}

void mic_dma_discard(struct mic_dma_chan *ch)
{
	if (!ch->preparing)
		return;
	ch->head = ch->prep_start;
	prep_release(ch);
}

/* --- waiting and ending ------------------------------------------------------------------------------ */

int mic_dma_wait(struct mic_dma_chan *ch, int cookie, int timeout_ms, bool halt_fails)
{
	uint64_t start = mic_now_ns(), end = start + (uint64_t)timeout_ms * 1000000u;
	uint64_t spin_end = mic_spin_allowed() ? start + MIC_SPIN_US * 1000u : 0;
	uint32_t target = mic_load_relaxed(&ch->end_slot[(uint32_t)cookie % ch->setup.size]);

	mic_dma_issue_pending(ch);
	for (;;) {
		uint32_t seen = read_status(ch);
		int rc = mic_dma_tx_status(ch, cookie);
		uint64_t now = mic_now_ns();

		if (rc)
			return rc < 0 ? rc : 0;
		if (halt_fails && mic_dma_halted(ch))
			return -EIO;
		if (now >= end)
			return -ETIMEDOUT;
		if (now < spin_end)
			mic_cpu_relax();
		else
			mic_dma_sleep(ch->bus, ch->setup.c, seen, target, end - now);
	}
}

int mic_dma_chan_stop(struct mic_dma_chan *ch, int timeout_ms)
{
	set_enable(ch, false);
	set_mask(ch, true);
	int rc = wait_inactive(ch, timeout_ms);

	mic_dma_cleanup(ch);
	return rc;
}

int mic_dma_pause(struct mic_dma_chan *ch, int timeout_ms)
{
	set_enable(ch, false);
	return wait_inactive(ch, timeout_ms);
}

void mic_dma_resume(struct mic_dma_chan *ch)
{
	set_enable(ch, true);
}

/* Called with `issue` and `clean` held, channel disabled and inactive. */
static void drop_records(struct mic_dma_chan *ch)
{
	cleanup_locked(ch);
	for (uint32_t slot = ch->last_tail; slot != ch->submitted; slot = next_slot(ch, slot)) {
		struct record *r = &ch->records[slot];

		queue_token(ch, r->token ? r->token | MIC_DMA_TOKEN_DROPPED : 0);
		*r = (struct record){0};
	}
	ch->cancel_from = ch->completed;
	ch->cancel_to = ch->completed = ch->cookie;
	start_at_tail(ch);
}

int mic_dma_terminate(struct mic_dma_chan *ch, int timeout_ms)
{
	int rc = prep_take(ch, 0);

	if (rc)
		return rc;
	set_enable(ch, false);
	rc = wait_inactive(ch, timeout_ms);
	if (!rc) {
		pthread_mutex_lock(&ch->issue);
		pthread_mutex_lock(&ch->clean);
		drop_records(ch);
		pthread_mutex_unlock(&ch->clean);
		pthread_mutex_unlock(&ch->issue);
		set_enable(ch, true);
	}
	prep_release(ch);
	return rc;
}

void mic_dma_ack_interrupt(struct mic_dma_chan *ch)
{
	if (host_side(ch))
		return;
	set_mask(ch, true);
	set_mask(ch, false);
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
