/* A DMA channel as its driver owns it: set-up, waiting, ending (HW 5.4, HW-33, 34). */
#define _GNU_SOURCE
#include "dma_drv.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "mic/vring.h"

#define SETUP_TIMEOUT_MS 1000

static bool host_side(const struct mic_dma_chan *ch)
{
	return ch->setup.c < MIC_DMA_HOST_CHANNELS;
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

/* Until the engine does not touch memory for channel `c`. */
static int wait_channel(struct mic_bus *bus, unsigned c, uint64_t end_ns)
{
	uint32_t seen;

	while ((seen = mic_mmio_read(bus, MIC_REG_DSTAT(c))) & MIC_DMA_DSTAT_ACTIVE) {
		uint64_t now = mic_now_ns();

		if (now >= end_ns)
			return -ETIMEDOUT;
		mic_dma_sleep(bus, c, seen, MIC_DMA_SLEEP_ANY, end_ns - now);
	}
	return 0;
}

/* After the channel was disabled: until the engine is past the descriptor it had begun. */
static int wait_inactive(struct mic_dma_chan *ch, int timeout_ms)
{
	return wait_channel(ch->bus, ch->setup.c, mic_now_ns() + (uint64_t)timeout_ms * 1000000u);
}

int mic_dma_quiesce(struct mic_bus *bus, unsigned first, unsigned count, int timeout_ms)
{
	uint64_t end = mic_now_ns() + (uint64_t)timeout_ms * 1000000u;
	uint32_t enables = 0;
	int rc = 0;

	for (unsigned c = first; c < first + count && c < MIC_DMA_CHANNELS; c++)
		enables |= 2u << (2 * c);
	mic_dcr_update(bus, enables, 0);
	for (unsigned c = first; c < first + count && c < MIC_DMA_CHANNELS && !rc; c++)
		rc = wait_channel(bus, c, end);
	return rc;
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
 * rewrite an equal head on a channel that was used before; that is a hardware error, HW-32.)
 * False: the tail, which the other side can write, is no slot of this ring. */
static bool start_at_tail(struct mic_dma_chan *ch)
{
	uint32_t tail = mic_mmio_read(ch->bus, MIC_REG_DTPR(ch->setup.c));

	if (tail >= ch->setup.size)
		return false;
	mic_mmio_write(ch->bus, MIC_REG_DHPR(ch->setup.c), tail);
	ch->head = ch->prep_start = ch->submitted = ch->issued = ch->last_tail = tail;
	return true;
}

static int setup_channel(struct mic_dma_chan *ch)
{
	unsigned c = ch->setup.c;

	mic_dcr_update(ch->bus, (host_side(ch) ? 2u : 3u) << (2 * c), 0); /* card: owner bit <- 0 as well */
	set_mask(ch, true);
	/* An owner that was killed may have left the engine in the middle of a descriptor; and a ring
	 * shorter than the last one cannot continue at its tail. Both end with the next card reset. */
	if (wait_inactive(ch, SETUP_TIMEOUT_MS) || !start_at_tail(ch))
		return -EBUSY;
	mic_mmio_write(ch->bus, MIC_REG_DCHERRMSK(c), 0);
	program_ring(ch);
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

	if (s->cookie < 0 || s->c >= MIC_DMA_CHANNELS || s->size < 8 || s->size > MIC_DMA_RING_SIZE ||
	    s->ring % MIC_DMA_ALIGN || s->memory % MIC_DMA_ALIGN || s->status % 8 || !s->max_bytes ||
	    s->max_bytes % MIC_DMA_ALIGN || s->max_bytes / MIC_DMA_ALIGN > MIC_DMA_MEMCPY_LEN_MASK ||
	    window != (s->c < MIC_DMA_HOST_CHANNELS))
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
	ch->cookie = setup->cookie ? setup->cookie : FIRST_COOKIE;
	ch->completed = ch->cancel_from = ch->cancel_to = ch->cookie;
	init_locks(ch);
	rc = ch->records && ch->end_slot ? setup_channel(ch) : -ENOMEM;
	if (rc) {
		mic_dma_chan_destroy(ch);
		errno = -rc;
		return NULL;
	}
	return ch;
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

int mic_dma_terminate(struct mic_dma_chan *ch, int timeout_ms)
{
	int rc = dma_prep_take(ch, 0);

	if (rc)
		return rc;
	set_enable(ch, false);
	rc = wait_inactive(ch, timeout_ms);
	if (!rc) {
		pthread_mutex_lock(&ch->issue);
		pthread_mutex_lock(&ch->clean);
		dma_drop_records(ch);
		rc = start_at_tail(ch) ? 0 : -EIO;
		pthread_mutex_unlock(&ch->clean);
		pthread_mutex_unlock(&ch->issue);
	}
	if (!rc)
		set_enable(ch, true);
	dma_prep_release(ch);
	return rc;
}

void mic_dma_ack_interrupt(struct mic_dma_chan *ch)
{
	if (host_side(ch))
		return;
	set_mask(ch, true);
	set_mask(ch, false);
}
