/* DMA channels: threads, ring fetch, retirement, reset (HW 5.2, 5.7). Descriptors: dma_desc.c. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "fault.h"
#include "guard.h"
#include "mic/barrier.h"
#include "mic/dma.h"
#include "mic/vring.h"

struct channel {
	struct mic_dma_engine *engine;
	unsigned c;
	pthread_t thread;
	struct mic_spin spin;
	struct mic_dma_stats *stats; /* in the card's register page; written by the channel's thread only */
};

struct mic_dma_engine {
	struct mic_bus *bus;
	struct channel channel[MIC_DMA_CHANNELS];
	int wake_fd;    /* readable while `pause` or `stop` is set: level, read by nobody else */
	uint32_t pause; /* threads must park; a copy in flight is cut off */
	uint32_t stop;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	unsigned started, parked; /* under lock */
};

/* The engine is the hardware: it looks at its registers without the checks of a bus cycle. */
static uint32_t read_reg(struct mic_bus *bus, uint32_t off)
{
	return mic_load_acquire((const uint32_t *)(const void *)(mic_bus_mmio(bus) + off));
}

static uint32_t *status_reg(struct mic_bus *bus, unsigned c)
{
	return (uint32_t *)(void *)(mic_bus_mmio(bus) + MIC_REG_DSTAT(c));
}

static struct mic_dma_stats *stats_of(struct mic_bus *bus, unsigned c)
{
	_Static_assert(MIC_DMA_STATS + MIC_DMA_CHANNELS * sizeof(struct mic_dma_stats) <= MIC_DMA_SLEEPERS,
		       "the counters overlap the words of sleepers");
	return (struct mic_dma_stats *)(void *)(mic_bus_mmio(bus) + MIC_DMA_STATS) + c;
}

static bool must_park(struct mic_dma_engine *e)
{
	return mic_load_acquire(&e->pause) || mic_load_acquire(&e->stop);
}

/* --- one descriptor ----------------------------------------------------------------------------- */

/* Card address of slot `index` of the channel's ring: GDDR, or the SMPT entry it names (HW 5.3). */
static uint64_t slot_addr(struct mic_bus *bus, unsigned c, uint32_t hi, uint32_t index)
{
	uint64_t base = read_reg(bus, MIC_REG_DRAR_LO(c));

	if (hi & MIC_DMA_DRAR_SYS)
		base |= (uint64_t)(hi & 3) << 32 |
			(uint64_t)(hi >> MIC_DMA_DRAR_SMPT_SHIFT & 0x1f) << MIC_SMPT_SHIFT | MIC_SMPT_BASE;
	else
		base |= (uint64_t)(hi & 0xf) << 32;
	return base + (uint64_t)index * MIC_DMA_DESC_SIZE;
}

static uint32_t ring_size(uint32_t hi)
{
	return hi >> MIC_DMA_DRAR_SIZE_SHIFT & 0x1ffff;
}

/* Counters first: who sees the completion sees it counted. */
static void account(struct mic_dma_stats *s, const struct mic_dma_effect *effect)
{
	mic_count(&s->descriptors, 1);
	mic_count(&s->bytes, effect->bytes);
	mic_count(&s->interrupts, effect->interrupt);
}

/* Retire: the count moves before the interrupt, after all data (HW-25). */
static void retire(struct channel *ch, uint32_t next, const struct mic_dma_effect *effect)
{
	struct mic_bus *bus = ch->engine->bus;
	uint32_t *dstat = status_reg(bus, ch->c), old = mic_load_acquire(dstat), new;

	account(ch->stats, effect);
	mic_hw_store(bus, MIC_REG_DTPR(ch->c), next);
	/* A driver may halt the channel meanwhile (HW-32): its bits must survive. */
	do {
		new = (old & ~MIC_DMA_DSTAT_COUNT) | next;
	} while (!mic_cas(dstat, &old, new));
	mic_hw_dma_wake(bus, ch->c, next);
	if (effect->interrupt)
		mic_hw_dma_interrupt(bus, ch->c);
}

/* Store DSTAT where DSTATWB points (a memcpy with bit 55). Returns 0 or a DCHERR bit. */
static int write_back(struct mic_bus *bus, unsigned c, uint32_t next)
{
	uint64_t addr = read_reg(bus, MIC_REG_DSTATWB_LO(c)) |
			(uint64_t)(read_reg(bus, MIC_REG_DSTATWB_HI(c)) & 0xff) << 32;
	uint32_t status =
		mic_load_acquire(status_reg(bus, c)) & ~(MIC_DMA_DSTAT_COUNT | MIC_DMA_DSTAT_ACTIVE);
	const uint64_t qw[2] = {status | next, (uint64_t)MIC_DMA_DESC_GENERAL << MIC_DMA_TYPE_SHIFT | addr};
	struct mic_dma_effect none = {0};

	return mic_dma_execute(bus, qw, NULL, &none);
}

/* Hold a channel back as fault filters want; -EINTR when the engine is to stop or reset meanwhile. */
static int hold(struct mic_dma_engine *e, uint64_t due_ns)
{
	struct pollfd wake = {.fd = e->wake_fd, .events = POLLIN};
	uint64_t now = mic_now_ns();

	while (now < due_ns && !must_park(e)) {
		uint64_t ns = due_ns - now > FAULT_LOOK_NS ? due_ns - now - FAULT_LOOK_NS : 0;
		struct timespec ts = {.tv_sec = (time_t)(ns / 1000000000),
				      .tv_nsec = (long)(ns % 1000000000)};

		if (ns)
			ppoll(&wake, 1, &ts, NULL);
		else
			mic_cpu_relax();
		now = mic_now_ns();
	}
	return now < due_ns ? -EINTR : 0;
}

/* A descriptor as fault filters see it: the side that its bytes cross the link to, and how many. */
static struct mic_fault_event event_of(unsigned c, const uint64_t qw[2])
{
	struct mic_fault_event event = {
		.point = MIC_FAULT_AT_DMA, .target = 1u << c, .way = MIC_FAULT_TO_CARD | MIC_FAULT_TO_HOST};
	bool from_host = (qw[0] & MIC_DMA_ADDR_MASK) >= MIC_SMPT_BASE;
	bool to_host = (qw[1] & MIC_DMA_ADDR_MASK) >= MIC_SMPT_BASE;

	if (qw[1] >> MIC_DMA_TYPE_SHIFT == MIC_DMA_DESC_MEMCPY && from_host != to_host) {
		event.toward = to_host ? MIC_FAULT_TO_HOST : MIC_FAULT_TO_CARD;
		event.bytes = (qw[0] >> MIC_DMA_MEMCPY_LEN_SHIFT & MIC_DMA_MEMCPY_LEN_MASK) * MIC_DMA_ALIGN;
	}
	return event;
}

/* Execute one descriptor the way the fault filters want it. */
static int execute_sick(struct channel *ch, const uint64_t qw[2], struct mic_dma_effect *effect)
{
	struct mic_dma_engine *e = ch->engine;
	const struct mic_fault_event event = event_of(ch->c, qw);
	struct mic_fault_verdict v;

	mic_fault_judge(e->bus, &event, &v);
	int rc = v.delay_ns ? hold(e, mic_now_ns() + v.delay_ns) : 0;

	if (!rc)
		rc = (int)v.error;
	if (!rc && !v.skip)
		rc = mic_dma_execute(e->bus, qw, &e->pause, effect);
	if (!rc && v.spoil && !v.skip)
		mic_dma_spoil(e->bus, qw, v.spoil_at, v.spoil);
	if (!rc && v.due_ns)
		rc = hold(e, v.due_ns);
	if (v.lose_interrupt)
		effect->interrupt = false;
	return rc;
}

static int step_at(struct channel *ch, uint32_t hi, uint32_t tail)
{
	struct mic_dma_engine *e = ch->engine;
	struct mic_dma_effect effect = {0};
	uint64_t qw[2];
	uint32_t next = tail + 1 == ring_size(hi) ? 0 : tail + 1;
	int rc = mic_dma_fetch(e->bus, slot_addr(e->bus, ch->c, hi, tail), qw);

	if (!rc && fault_armed(e->bus, MIC_FAULT_AT_DMA))
		rc = execute_sick(ch, qw, &effect);
	else if (!rc)
		rc = mic_dma_execute(e->bus, qw, &e->pause, &effect);
	if (!rc && effect.write_back)
		rc = write_back(e->bus, ch->c, next);
	if (!rc)
		retire(ch, next, &effect);
	return rc;
}

static bool enabled(struct mic_bus *bus, unsigned c)
{
	return read_reg(bus, MIC_REG_DCR) & 2u << (2 * c) &&
	       !(mic_load_acquire(status_reg(bus, c)) & MIC_DMA_DSTAT_QUIESCED);
}

/* Returns 1 after a descriptor, 0 when there is nothing to do (or no more, after a fault), -EINTR
 * when a reset cut it off. */
static int step(struct channel *ch)
{
	struct mic_bus *bus = ch->engine->bus;
	unsigned c = ch->c;

	if (!enabled(bus, c))
		return 0;
	/* Pairs with the exchange in mic_write_dhpr(): descriptors below the head are written. */
	uint32_t head = read_reg(bus, MIC_REG_DHPR(c)), tail = read_reg(bus, MIC_REG_DTPR(c));

	if (head == tail)
		return 0;
	uint32_t hi = read_reg(bus, MIC_REG_DRAR_HI(c)), size = ring_size(hi);
	int rc;

	if (!size)
		rc = MIC_DMA_ERR_RING;
	else if (head >= size || tail >= size)
		rc = MIC_DMA_ERR_HEAD;
	else
		rc = step_at(ch, hi, tail);
	if (rc > 0) {
		mic_count(&ch->stats->faults, 1);
		mic_hw_dma_fault(bus, c, (uint32_t)rc);
		return 0;
	}
	if (rc < 0) {
		mic_count(&ch->stats->aborts, 1);
		return rc;
	}
	return 1;
}

/* Work until there is none. ACTIVE tells a driver that disabled the channel whether the engine may
 * still touch memory: set before DCR is read, so one of the two sees the other. */
static void run(struct channel *ch)
{
	uint32_t *dstat = status_reg(ch->engine->bus, ch->c);

	mic_fetch_or(dstat, MIC_DMA_DSTAT_ACTIVE);
	while (!must_park(ch->engine) && step(ch) > 0)
		;
	mic_fetch_and(dstat, ~MIC_DMA_DSTAT_ACTIVE);
	mic_hw_dma_wake(ch->engine->bus, ch->c, MIC_DMA_SLEEP_ANY);
}

/* Look for more work for a while before sleeping: waking this thread costs more than most copies. */
static bool linger(struct channel *ch)
{
	struct mic_bus *bus = ch->engine->bus;
	uint64_t end = enabled(bus, ch->c) ? mic_spin_until(&ch->spin, MIC_SPIN_US) : 0;

	while (mic_now_ns() < end && !must_park(ch->engine)) {
		if (read_reg(bus, MIC_REG_DHPR(ch->c)) != read_reg(bus, MIC_REG_DTPR(ch->c)))
			return true;
		mic_cpu_relax();
	}
	if (end)
		mic_spin_missed(&ch->spin);
	return false;
}

/* --- threads ------------------------------------------------------------------------------------ */

static void park(struct mic_dma_engine *e)
{
	pthread_mutex_lock(&e->lock);
	e->parked++;
	pthread_cond_broadcast(&e->changed);
	while (mic_load_acquire(&e->pause) && !mic_load_acquire(&e->stop))
		pthread_cond_wait(&e->changed, &e->lock);
	e->parked--;
	pthread_mutex_unlock(&e->lock);
}

static void *channel_main(void *arg)
{
	struct channel *ch = arg;
	struct mic_dma_engine *e = ch->engine;
	int kick = mic_bus_fd(e->bus, MIC_FD_CHAN + ch->c);
	struct pollfd fds[2] = {{.fd = kick, .events = POLLIN}, {.fd = e->wake_fd, .events = POLLIN}};
	eventfd_t drop;
	char name[16];

	snprintf(name, sizeof name, "mic-dma%u", ch->c);
	pthread_setname_np(pthread_self(), name);
	for (;;) {
		mic_spin_sleeping(&ch->spin);
		poll(fds, 2, -1);
		mic_spin_woke(&ch->spin, MIC_SPIN_US);
		mic_count(&ch->stats->wakeups, 1);
		if (mic_load_acquire(&e->stop))
			return NULL;
		if (mic_load_acquire(&e->pause)) {
			park(e);
			continue;
		}
		/* Cleared before the registers are read: a kick after that wakes us again. */
		if (eventfd_read(kick, &drop) == 0)
			do
				run(ch);
			while (linger(ch));
	}
}

/* Stop all threads at a place where they touch nothing. Called with the lock held. */
static void pause_all(struct mic_dma_engine *e)
{
	mic_store_release(&e->pause, 1);
	(void)!eventfd_write(e->wake_fd, 1);
	while (e->parked < e->started)
		pthread_cond_wait(&e->changed, &e->lock);
}

static void resume_all(struct mic_dma_engine *e)
{
	eventfd_t drop;

	(void)!eventfd_read(e->wake_fd, &drop);
	mic_store_release(&e->pause, 0);
	pthread_cond_broadcast(&e->changed);
}

void mic_dma_engine_reset(struct mic_dma_engine *e)
{
	static const uint32_t first = MIC_REG_DCAR(0), last = MIC_REG_DCHERRMSK(0);

	pthread_mutex_lock(&e->lock);
	pause_all(e);
	mic_hw_store(e->bus, MIC_REG_DCR, MIC_DMA_DCR_RESET);
	for (uint32_t c = 0; c < MIC_DMA_CHANNELS; c++)
		for (uint32_t off = first; off <= last; off += 4)
			mic_hw_store(e->bus, off + (MIC_REG_DCAR(c) - MIC_REG_DCAR(0)), 0);
	resume_all(e);
	pthread_mutex_unlock(&e->lock);
}

void mic_dma_engine_stop(struct mic_dma_engine *e)
{
	if (!e)
		return;
	pthread_mutex_lock(&e->lock);
	mic_store_release(&e->stop, 1);
	mic_store_release(&e->pause, 1); /* cuts off a copy in flight; nobody stays parked under stop */
	pthread_cond_broadcast(&e->changed);
	pthread_mutex_unlock(&e->lock);
	(void)!eventfd_write(e->wake_fd, 1);
	for (unsigned c = 0; c < e->started; c++)
		pthread_join(e->channel[c].thread, NULL);
	mic_guard_put();
	if (e->wake_fd >= 0)
		close(e->wake_fd);
	pthread_cond_destroy(&e->changed);
	pthread_mutex_destroy(&e->lock);
	free(e);
}

static int start_threads(struct mic_dma_engine *e)
{
	sigset_t all, old;
	int rc = 0;

	/* Signals are the process's business; SIGBUS must stay open for the guarded accesses. */
	sigfillset(&all);
	sigdelset(&all, SIGBUS);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	for (unsigned c = 0; c < MIC_DMA_CHANNELS && !rc; c++) {
		e->channel[c] = (struct channel){.engine = e, .c = c, .stats = stats_of(e->bus, c)};
		*e->channel[c].stats = (struct mic_dma_stats){0};
		rc = pthread_create(&e->channel[c].thread, NULL, channel_main, &e->channel[c]);
		if (!rc)
			e->started++;
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return rc;
}

struct mic_dma_engine *mic_dma_engine_start(struct mic_bus *bus)
{
	struct mic_dma_engine *e = calloc(1, sizeof *e);
	int rc;

	if (!e)
		return NULL;
	e->bus = bus;
	pthread_mutex_init(&e->lock, NULL);
	pthread_cond_init(&e->changed, NULL);
	mic_guard_get();
	e->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	rc = e->wake_fd < 0 ? errno : -mic_bus_map_bank(bus);
	if (!rc)
		rc = start_threads(e);
	if (rc) {
		mic_dma_engine_stop(e);
		errno = rc;
		return NULL;
	}
	return e;
}

void mic_dma_engine_stats(struct mic_dma_engine *e, unsigned c, struct mic_dma_stats *out)
{
	mic_dma_bus_stats(e->bus, c, out);
}

void mic_dma_bus_stats(struct mic_bus *bus, unsigned c, struct mic_dma_stats *out)
{
	const struct mic_dma_stats *s;

	*out = (struct mic_dma_stats){0};
	if (c >= MIC_DMA_CHANNELS)
		return;
	s = stats_of(bus, c);
	out->descriptors = mic_load_relaxed(&s->descriptors);
	out->bytes = mic_load_relaxed(&s->bytes);
	out->interrupts = mic_load_relaxed(&s->interrupts);
	out->faults = mic_load_relaxed(&s->faults);
	out->wakeups = mic_load_relaxed(&s->wakeups);
	out->aborts = mic_load_relaxed(&s->aborts);
}
