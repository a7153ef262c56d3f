/* Interrupts to the host in all their modes, and the lines to the card (HW 4). */
#define _GNU_SOURCE
#include "bus_internal.h"

enum irq_mode {
	IRQ_NONE, /* the function may not send anything now */
	IRQ_BARE, /* no configuration space: MSI-X without masks */
	IRQ_MSIX,
	IRQ_MSI,
	IRQ_INTX,
};

/* How the function signals now: what the driver wrote into configuration space decides (HW 4.3). */
static enum irq_mode irq_mode(struct mic_bus *bus)
{
	if (!config16(bus, 0))
		return IRQ_BARE;
	uint16_t command = config16(bus, MIC_PCI_COMMAND);

	if (!awake(bus))
		return IRQ_NONE;
	if (config16(bus, MIC_PCI_CAP_MSIX + 2) & MIC_PCI_MSIX_ENABLE)
		return IRQ_MSIX; /* bus mastering is looked at per vector: without it messages stay pending */
	if (config16(bus, MIC_PCI_CAP_MSI + 2) & MIC_PCI_MSI_ENABLE)
		return command & MIC_PCI_COMMAND_MASTER ? IRQ_MSI : IRQ_NONE;
	return command & MIC_PCI_COMMAND_INTX_OFF ? IRQ_NONE : IRQ_INTX;
}

static bool vector_masked(struct mic_bus *bus, unsigned v)
{
	return config16(bus, MIC_PCI_CAP_MSIX + 2) & MIC_PCI_MSIX_MASKALL || !mic_bus_master(bus) ||
	       mic_load_acquire(reg_at(bus, MIC_REG_MSIX_CTRL(v))) & 1u;
}

/* Send the pending messages among `vectors` that are not masked any more. */
static void flush_pending(struct mic_bus *bus, uint32_t vectors)
{
	/* Pairs with the fence in send_vector(): either it sees the unmasking or we see its bit. */
	mic_full_fence();
	for (unsigned v = 0; v < MIC_MSIX_TABLE_SIZE; v++) {
		uint32_t bit = vectors & 1u << v;

		if (bit && !vector_masked(bus, v) && mic_fetch_and(reg_at(bus, MIC_REG_MSIX_PBA), ~bit) & bit)
			signal_line(bus, MIC_FD_VEC + v);
	}
}

static void send_vector(struct mic_bus *bus, unsigned v)
{
	if (!vector_masked(bus, v)) {
		signal_line(bus, MIC_FD_VEC + v);
		return;
	}
	mic_fetch_or(reg_at(bus, MIC_REG_MSIX_PBA), 1u << v);
	mic_full_fence(); /* pairs with the fence in flush_pending() */
	flush_pending(bus, 1u << v);
}

static void deliver_msix(struct mic_bus *bus, uint32_t sources, bool bare)
{
	uint32_t map[MIC_MXAR_COUNT], mapped = 0;

	for (unsigned v = 0; v < MIC_MXAR_COUNT; v++) {
		map[v] = mic_load_acquire(reg_at(bus, MIC_REG_MXAR(v))) & sources;
		mapped |= map[v];
	}
	/* Auto-clear happens before the message, or a cause set meanwhile would be lost (HW-13). */
	mapped &= mic_load_acquire(reg_at(bus, MIC_REG_SIAC0));
	if (mapped)
		mic_fetch_and(reg_at(bus, MIC_REG_SICR0), ~mapped);
	for (unsigned v = 0; v < MIC_MXAR_COUNT; v++) {
		if (map[v] && bare)
			signal_line(bus, MIC_FD_VEC + v);
		else if (map[v])
			send_vector(bus, v);
	}
}

/* `sources`: causes that are set and enabled. */
static void deliver_host(struct mic_bus *bus, uint32_t sources)
{
	switch (irq_mode(bus)) {
	case IRQ_NONE:
		break; /* the cause stays; mic_bus_config_changed() comes back to it */
	case IRQ_BARE:
		deliver_msix(bus, sources, true);
		break;
	case IRQ_MSIX:
		deliver_msix(bus, sources, false);
		break;
	case IRQ_MSI:
		if (mic_load_acquire(reg_at(bus, MIC_REG_MXAR(0))) & sources)
			signal_line(bus, MIC_FD_VEC);
		break;
	case IRQ_INTX:
		signal_line(bus, MIC_FD_VEC); /* the line is vector 0's, whatever the map says */
		break;
	}
}

void mic_raise_host(struct mic_bus *bus, uint32_t sources)
{
	mic_fetch_or(reg_at(bus, MIC_REG_SICR0), sources);
	mic_full_fence(); /* pairs with mic_write_enable(): one of the two sees the other's bit */
	uint32_t enabled = mic_load_acquire(reg_at(bus, MIC_REG_SICE0)) & sources;

	if (enabled)
		deliver_host(bus, enabled);
}

void mic_write_enable(struct mic_bus *bus, uint32_t value)
{
	uint32_t old = mic_fetch_or(reg_at(bus, MIC_REG_SICE0), value);

	mic_full_fence(); /* pairs with mic_raise_host() */
	uint32_t pending = mic_load_acquire(reg_at(bus, MIC_REG_SICR0)) & value & ~old;

	if (pending)
		deliver_host(bus, pending);
}

void mic_write_msix_ctrl(struct mic_bus *bus, uint32_t v, uint32_t value)
{
	mic_store_release(reg_at(bus, MIC_REG_MSIX_CTRL(v)), value & 1u);
	if (!(value & 1u))
		flush_pending(bus, 1u << v);
}

void mic_bus_config_changed(struct mic_bus *bus)
{
	if (irq_mode(bus) == IRQ_MSIX)
		flush_pending(bus, UINT32_MAX);
	uint32_t pending =
		mic_load_acquire(reg_at(bus, MIC_REG_SICR0)) & mic_load_acquire(reg_at(bus, MIC_REG_SICE0));

	if (pending)
		deliver_host(bus, pending);
}

void mic_raise_card(struct mic_bus *bus, unsigned irq)
{
	if (irq < MIC_CARD_IRQS)
		signal_line(bus, MIC_FD_IRQ + irq);
}

void mic_ring_host(struct mic_bus *bus, int db)
{
	if (db >= 0 && db < (int)MIC_SRC_DOORBELLS)
		mic_mmio_write(bus, MIC_REG_SDBIC((unsigned)db), MIC_SDBIC_REQUEST);
}

void mic_ring_card(struct mic_bus *bus, int db)
{
	if (db >= 0 && db < 8) {
		uint32_t off = MIC_REG_APICICR((unsigned)db);

		mic_mmio_write(bus, off, mic_mmio_read(bus, off) | MIC_APICICR_SEND);
	} else if (db >= 8 && db < (int)MIC_CARD_DOORBELLS) {
		mic_mmio_write(bus, MIC_REG_RDMASR((unsigned)db - 8), 0);
	}
}
