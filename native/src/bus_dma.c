/* Registers of the DMA channels that do more than hold a value (HW 5.2, 5.7, HW-32, 35). */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "bus_internal.h"

static bool host_owned(struct mic_bus *bus, unsigned c)
{
	return mic_load_acquire(reg_at(bus, MIC_REG_DCR)) & 1u << (2 * c);
}

static uint32_t dma_mask_bit(struct mic_bus *bus, unsigned c)
{
	return host_owned(bus, c) ? MIC_DMA_DCAR_IM1 : MIC_DMA_DCAR_IM0;
}

static void deliver_dma(struct mic_bus *bus, unsigned c)
{
	if (host_owned(bus, c))
		mic_raise_host(bus, 1u << (MIC_SRC_DMA + c));
	else if (c >= MIC_DMA_HOST_CHANNELS) /* the card has no line for the host's channels */
		mic_raise_card(bus, MIC_CARD_IRQ_DMA + c - MIC_DMA_HOST_CHANNELS);
}

void mic_hw_dma_interrupt(struct mic_bus *bus, unsigned c)
{
	/* Pairs with the exchange in mic_write_dcar(): whoever comes second sees the other and delivers. */
	uint32_t old = mic_fetch_or(reg_at(bus, MIC_REG_DCAR(c)), MIC_DMA_DCAR_IS0);

	if (!(old & dma_mask_bit(bus, c)))
		deliver_dma(bus, c);
}

/* Masking acknowledges what is pending; unmasking raises what came since (HW-35, HW 5.7). */
void mic_write_dcar(struct mic_bus *bus, uint32_t c, uint32_t value)
{
	uint32_t mask = dma_mask_bit(bus, c), *reg = reg_at(bus, MIC_REG_DCAR(c));
	uint32_t old = mic_load_acquire(reg), new;

	do {
		new = (value & ~MIC_DMA_DCAR_IS0) | (value & mask ? 0 : old & MIC_DMA_DCAR_IS0);
	} while (!mic_cas(reg, &old, new));
	if (old & mask && new &MIC_DMA_DCAR_IS0)
		deliver_dma(bus, c);
}

/* --- sleeping on DSTAT: see mic_dma_sleep() -------------------------------------------------------- */

/* What is waited for. Sleepers sleep on this word, not on DSTAT: a wake takes every wish back, also that of
 * one who has not fallen asleep yet and to whom DSTAT says nothing new. */
static uint32_t *sleepers(struct mic_bus *bus, unsigned c)
{
	return reg_at(bus, MIC_DMA_SLEEPERS + 4 * c);
}

void mic_hw_dma_wake(struct mic_bus *bus, unsigned c, uint32_t count)
{
	/* Pairs with the exchange in mic_dma_sleep(): either we see the sleeper or it sees DSTAT. */
	uint32_t want = mic_load_seq_cst(sleepers(bus, c));

	if (!want || (count < MIC_DMA_SLEEP_ANY && want != MIC_DMA_SLEEP_ANY && want != count + 1))
		return;
	/* Nobody is counted, so a sleeper that was killed costs one wake-up, not one per descriptor. */
	mic_exchange(sleepers(bus, c), 0u);
	syscall(SYS_futex, sleepers(bus, c), FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

void mic_dma_sleep(struct mic_bus *bus, unsigned c, uint32_t seen, uint32_t count, uint64_t timeout_ns)
{
	struct timespec ts = {.tv_sec = (time_t)(timeout_ns / 1000000000),
			      .tv_nsec = (long)(timeout_ns % 1000000000)};
	uint32_t want = count < MIC_DMA_SLEEP_ANY ? count + 1 : count, other = 0, word;

	/* Two sleepers with different wishes share the word: then every descriptor wakes both. */
	do
		word = other && other != want ? MIC_DMA_SLEEP_ANY : want;
	while (!mic_cas(sleepers(bus, c), &other, word));
	if (mic_load_seq_cst(reg_at(bus, MIC_REG_DSTAT(c))) == seen)
		syscall(SYS_futex, sleepers(bus, c), FUTEX_WAIT, word, &ts, NULL, 0);
}

void mic_hw_dma_fault(struct mic_bus *bus, unsigned c, uint32_t error)
{
	mic_fetch_or(reg_at(bus, MIC_REG_DCHERR(c)), error);
	mic_fetch_or(reg_at(bus, MIC_REG_DSTAT(c)), MIC_DMA_DSTAT_QUIESCED | MIC_DMA_DSTAT_ERROR);
	mic_hw_dma_wake(bus, c, MIC_DMA_SLEEP_ANY);
	if (!(mic_load_acquire(reg_at(bus, MIC_REG_DCHERRMSK(c))) & error))
		mic_raise_host(bus, 1u << MIC_SRC_ERR);
}

void mic_dcr_update(struct mic_bus *bus, uint32_t clear, uint32_t set)
{
	uint32_t *reg = reg_at(bus, MIC_REG_DCR), old = mic_load_acquire(reg);

	while (!mic_cas(reg, &old, (old & ~clear) | set))
		;
	for (unsigned c = 0; c < MIC_DMA_CHANNELS; c++)
		if ((clear | set) & 3u << (2 * c))
			signal_fd(bus->fd[MIC_FD_CHAN + c]);
}

void mic_write_dhpr(struct mic_bus *bus, uint32_t c, uint32_t value)
{
	uint32_t old = mic_exchange(reg_at(bus, MIC_REG_DHPR(c)), value);
	uint32_t enable = mic_load_acquire(reg_at(bus, MIC_REG_DCR)) & (2u << (2 * c));

	/* The same head twice would mean a full ring to the engine (HW-32). */
	if (enable && old == value)
		mic_hw_dma_fault(bus, c, MIC_DMA_ERR_HEAD);
	signal_fd(bus->fd[MIC_FD_CHAN + c]);
}
