/* The bus as its own files see it: bus.c (registers), bus_irq.c, bus_dma.c, shm.c (memories). */
#ifndef MIC_BUS_INTERNAL_H
#define MIC_BUS_INTERNAL_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/eventfd.h>

#include "mic/barrier.h"
#include "mic/bus.h"

struct mic_map {
	uint8_t *base;
	uint64_t size;
};

struct mic_bus {
	const uint32_t *armed; /* first word of `faults`: points where a filter may act, normally 0 */
	struct mic_map gddr, mmio, host, config, faults;
	struct mic_map bank; /* window bank of the card, where the DMA engine runs; any access may fault */
	int fd[MIC_FD_COUNT];
	bool over_pci;    /* this process is the host: register cycles pass the function */
	uint64_t ignored; /* writes to registers that do not exist or are read-only */
};

static inline uint32_t *reg_at(struct mic_bus *bus, uint32_t off)
{
	return (uint32_t *)(void *)(bus->mmio.base + off);
}

static inline uint16_t config16(struct mic_bus *bus, uint32_t off)
{
	return mic_load_acquire((uint16_t *)(void *)(bus->config.base + off));
}

/* Power state D0? In D3hot the function neither decodes memory nor sends anything. */
static inline bool awake(struct mic_bus *bus)
{
	return !(config16(bus, MIC_PCI_CAP_PM + 4) & 3u);
}

static inline void signal_fd(int fd)
{
	/* Fails only when the counter is at its maximum: then the line is pending anyway (VOP-53). */
	if (fd >= 0)
		(void)!eventfd_write(fd, 1);
}

/* For people who look: one more of count n of MIC_COUNTS. */
static inline void count_one(struct mic_bus *bus, unsigned n)
{
	mic_fetch_add((uint64_t *)(void *)(bus->config.base + MIC_COUNTS) + n, 1u);
}

/* The same for a host vector or a card line, by its descriptor's number, and count it. */
static inline void signal_line(struct mic_bus *bus, unsigned which)
{
	unsigned n = which >= MIC_FD_IRQ ? MIC_MSIX_TABLE_SIZE + which - MIC_FD_IRQ : which - MIC_FD_VEC;

	count_one(bus, MIC_SRC_DOORBELLS + n);
	signal_fd(bus->fd[which]);
}

/* A doorbell behind all filters: what mic_ring_host() and mic_ring_card() do when none is armed. */
void mic_ring_host_now(struct mic_bus *bus, int db);
void mic_ring_card_now(struct mic_bus *bus, int db);

/* Register writes with an effect, by their kind in the table. */
void mic_write_enable(struct mic_bus *bus, uint32_t value); /* SICE0 */
void mic_write_msix_ctrl(struct mic_bus *bus, uint32_t v, uint32_t value);
void mic_write_dcar(struct mic_bus *bus, uint32_t c, uint32_t value);
void mic_write_dhpr(struct mic_bus *bus, uint32_t c, uint32_t value);

#endif
