/* Card memories, register semantics and interrupt delivery (HW 1, 2, 4). */
#define _GNU_SOURCE
#include "mic/bus.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "mic/barrier.h"

struct mic_map {
	uint8_t *base;
	uint64_t size;
};

struct mic_bus {
	struct mic_map gddr, mmio, host, config;
	int fd[MIC_FD_COUNT];
	bool over_pci;    /* this process is the host: register cycles pass the function */
	uint64_t ignored; /* writes to registers that do not exist or are read-only */
};

static const struct mic_reg_row reg_table[MIC_REG_ROWS] = {MIC_REG_TABLE};

static int map_fd(struct mic_map *m, int fd)
{
	struct stat st;

	if (fstat(fd, &st) < 0)
		return -1;
	m->size = (uint64_t)st.st_size;
	m->base = mmap(NULL, m->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
	if (m->base == MAP_FAILED) {
		m->base = NULL;
		return -1;
	}
	/* A core dump of an 8 GiB aperture helps nobody. */
	madvise(m->base, m->size, MADV_DONTDUMP);
	return 0;
}

static void unmap(struct mic_map *m)
{
	if (m->base)
		munmap(m->base, m->size);
}

void mic_bus_detach(struct mic_bus *bus)
{
	if (!bus)
		return;
	unmap(&bus->gddr);
	unmap(&bus->mmio);
	unmap(&bus->host);
	unmap(&bus->config);
	free(bus);
}

struct mic_bus *mic_bus_attach(const int *fds)
{
	struct mic_bus *bus = calloc(1, sizeof *bus);

	if (!bus)
		return NULL;
	memcpy(bus->fd, fds, sizeof bus->fd);
	if (map_fd(&bus->gddr, fds[MIC_FD_GDDR]) < 0 || map_fd(&bus->mmio, fds[MIC_FD_MMIO]) < 0 ||
	    map_fd(&bus->host, fds[MIC_FD_HOST]) < 0 || map_fd(&bus->config, fds[MIC_FD_CONFIG]) < 0)
		goto fail;
	if (bus->mmio.size < MIC_MMIO_SIZE || bus->config.size < MIC_CONFIG_SIZE) {
		errno = EINVAL;
		goto fail;
	}
	return bus;
fail:;
	int saved = errno;
	mic_bus_detach(bus);
	errno = saved;
	return NULL;
}

/* --- registers ------------------------------------------------------------------------------- */

static uint32_t *reg_at(struct mic_bus *bus, uint32_t off)
{
	return (uint32_t *)(void *)(bus->mmio.base + off);
}

static uint16_t config16(struct mic_bus *bus, uint32_t off)
{
	return mic_load_acquire((uint16_t *)(void *)(bus->config.base + off));
}

/* Power state D0? In D3hot the function neither decodes memory nor sends anything. */
static bool awake(struct mic_bus *bus)
{
	return !(config16(bus, MIC_PCI_CAP_PM + 4) & 3u);
}

/* The table row of a register and its index in the row, or NULL for an unknown offset. */
static const struct mic_reg_row *reg_find(uint32_t off, uint32_t *index)
{
	for (unsigned i = 0; i < MIC_REG_ROWS; i++) {
		const struct mic_reg_row *r = &reg_table[i];
		uint32_t delta = off - r->off;

		if (off >= r->off && delta % r->stride == 0 && delta / r->stride < r->count) {
			*index = delta / r->stride;
			return r;
		}
	}
	return NULL;
}

static void signal_fd(int fd)
{
	/* Fails only when the counter is at its maximum: then the line is pending anyway (VOP-53). */
	if (fd >= 0)
		(void)!eventfd_write(fd, 1);
}

/* Does BAR 4 answer this process? The card reaches its registers without passing the function. */
static bool decoded(struct mic_bus *bus)
{
	return !bus->over_pci || !config16(bus, 0) ||
	       (config16(bus, MIC_PCI_COMMAND) & MIC_PCI_COMMAND_MEMORY && awake(bus));
}

void mic_bus_set_over_pci(struct mic_bus *bus, bool on)
{
	bus->over_pci = on;
}

uint32_t mic_mmio_read(struct mic_bus *bus, uint32_t off)
{
	uint32_t index;

	if (!decoded(bus))
		return UINT32_MAX; /* nobody claims the cycle: all ones */
	if (!reg_find(off, &index))
		return 0;
	return mic_load_acquire(reg_at(bus, off));
}

void mic_hw_store(struct mic_bus *bus, uint32_t off, uint32_t value)
{
	mic_store_release(reg_at(bus, off), value);
}

/* The MSI-X table lives in BAR 4 but belongs to the PCI function: RGCR resets the card behind it. */
static bool of_pci_function(enum mic_reg_access access)
{
	return access == MIC_ACCESS_MSIXTBL || access == MIC_ACCESS_MSIXCTL || access == MIC_ACCESS_MSIXPBA;
}

void mic_hw_reset(struct mic_bus *bus)
{
	for (unsigned i = 0; i < MIC_REG_ROWS; i++)
		for (uint32_t k = 0; k < reg_table[i].count && !of_pci_function(reg_table[i].access); k++)
			mic_hw_store(bus, reg_table[i].off + k * reg_table[i].stride, reg_table[i].reset);
	for (unsigned f = MIC_FD_RESET; f < MIC_FD_COUNT; f++) {
		eventfd_t drop;
		(void)!eventfd_read(bus->fd[f], &drop); /* doorbells in flight die with the reset (HW-52) */
	}
}

uint64_t mic_mmio_ignored(struct mic_bus *bus)
{
	return mic_load_relaxed(&bus->ignored);
}

/* --- interrupts to the host ------------------------------------------------------------------- */

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
			signal_fd(bus->fd[MIC_FD_VEC + v]);
	}
}

static void send_vector(struct mic_bus *bus, unsigned v)
{
	if (!vector_masked(bus, v)) {
		signal_fd(bus->fd[MIC_FD_VEC + v]);
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
			signal_fd(bus->fd[MIC_FD_VEC + v]);
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
			signal_fd(bus->fd[MIC_FD_VEC]);
		break;
	case IRQ_INTX:
		signal_fd(bus->fd[MIC_FD_VEC]); /* the line is vector 0's, whatever the map says */
		break;
	}
}

void mic_raise_host(struct mic_bus *bus, uint32_t sources)
{
	mic_fetch_or(reg_at(bus, MIC_REG_SICR0), sources);
	mic_full_fence(); /* pairs with write_enable(): one of the two sees the other's bit */
	uint32_t enabled = mic_load_acquire(reg_at(bus, MIC_REG_SICE0)) & sources;

	if (enabled)
		deliver_host(bus, enabled);
}

static void write_enable(struct mic_bus *bus, uint32_t value)
{
	uint32_t old = mic_fetch_or(reg_at(bus, MIC_REG_SICE0), value);

	mic_full_fence(); /* pairs with mic_raise_host() */
	uint32_t pending = mic_load_acquire(reg_at(bus, MIC_REG_SICR0)) & value & ~old;

	if (pending)
		deliver_host(bus, pending);
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
		signal_fd(bus->fd[MIC_FD_IRQ + irq]);
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

/* --- register writes with an effect ----------------------------------------------------------- */

static void write_apicicr(struct mic_bus *bus, uint32_t n, uint32_t off, uint32_t value)
{
	mic_store_release(reg_at(bus, off), value);
	if (!(value & MIC_APICICR_SEND))
		return;
	/* Interrupt 7 with the bootstrap's vector is the boot interrupt until the card's kernel
	 * programs a vector of its own (HW 4.1). */
	if (n == 7 && (value & 0xff) == MIC_BOOT_VECTOR)
		signal_fd(bus->fd[MIC_FD_BOOT]);
	mic_raise_card(bus, n);
}

/* --- DMA channels ------------------------------------------------------------------------------ */

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
	/* Pairs with the exchange in write_dcar(): whoever comes second sees the other and delivers. */
	uint32_t old = mic_fetch_or(reg_at(bus, MIC_REG_DCAR(c)), MIC_DMA_DCAR_IS0);

	if (!(old & dma_mask_bit(bus, c)))
		deliver_dma(bus, c);
}

/* Masking acknowledges what is pending; unmasking raises what came since (HW-35, HW 5.7). */
static void write_dcar(struct mic_bus *bus, uint32_t c, uint32_t value)
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
	mic_store_relaxed(sleepers(bus, c), 0);
	syscall(SYS_futex, reg_at(bus, MIC_REG_DSTAT(c)), FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

void mic_dma_sleep(struct mic_bus *bus, unsigned c, uint32_t seen, uint32_t count, uint64_t timeout_ns)
{
	struct timespec ts = {.tv_sec = (time_t)(timeout_ns / 1000000000),
			      .tv_nsec = (long)(timeout_ns % 1000000000)};
	uint32_t *dstat = reg_at(bus, MIC_REG_DSTAT(c)), want = count < MIC_DMA_SLEEP_ANY ? count + 1 : count;
	uint32_t other = mic_exchange(sleepers(bus, c), want);

	/* Two sleepers with different wishes share the word: then every descriptor wakes both. */
	if (other && other != want)
		mic_exchange(sleepers(bus, c), MIC_DMA_SLEEP_ANY);
	if (mic_load_seq_cst(dstat) == seen)
		syscall(SYS_futex, dstat, FUTEX_WAIT, seen, &ts, NULL, 0);
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

static void write_dhpr(struct mic_bus *bus, uint32_t c, uint32_t value)
{
	uint32_t old = mic_exchange(reg_at(bus, MIC_REG_DHPR(c)), value);
	uint32_t enable = mic_load_acquire(reg_at(bus, MIC_REG_DCR)) & (2u << (2 * c));

	/* The same head twice would mean a full ring to the engine (HW-32). */
	if (enable && old == value)
		mic_hw_dma_fault(bus, c, MIC_DMA_ERR_HEAD);
	signal_fd(bus->fd[MIC_FD_CHAN + c]);
}

void mic_mmio_write(struct mic_bus *bus, uint32_t off, uint32_t value)
{
	uint32_t index;
	const struct mic_reg_row *row = decoded(bus) ? reg_find(off, &index) : NULL;

	if (!row) {
		mic_fetch_add(&bus->ignored, 1);
		return;
	}
	switch (row->access) {
	case MIC_ACCESS_RW:
		mic_store_release(reg_at(bus, off), value);
		break;
	case MIC_ACCESS_MSIXTBL:
		mic_store_release(reg_at(bus, off), value);
		break;
	case MIC_ACCESS_MSIXCTL:
		mic_store_release(reg_at(bus, off), value & 1u);
		if (!(value & 1u))
			flush_pending(bus, 1u << index);
		break;
	case MIC_ACCESS_PBACR:
		if (value & 1u)
			mic_fetch_and(reg_at(bus, MIC_REG_MSIX_PBA), 0u);
		break;
	case MIC_ACCESS_MSIXPBA:
	case MIC_ACCESS_RO:
		mic_fetch_add(&bus->ignored, 1);
		break;
	case MIC_ACCESS_CAUSE:
		mic_fetch_and(reg_at(bus, off), ~value);
		break;
	case MIC_ACCESS_ENABLE:
		write_enable(bus, value);
		break;
	case MIC_ACCESS_DISABLE:
		mic_fetch_and(reg_at(bus, MIC_REG_SICE0), ~value);
		break;
	case MIC_ACCESS_SDBIC:
		mic_store_release(reg_at(bus, off), value & ~MIC_SDBIC_REQUEST);
		if (value & MIC_SDBIC_REQUEST)
			mic_raise_host(bus, 1u << (MIC_SRC_DOORBELL + index));
		break;
	case MIC_ACCESS_APICICR:
		write_apicicr(bus, index, off, value);
		break;
	case MIC_ACCESS_RDMASR:
		mic_raise_card(bus, 8 + index);
		break;
	case MIC_ACCESS_RGCR:
		mic_store_release(reg_at(bus, off), value);
		if (value & MIC_RGCR_RESET)
			signal_fd(bus->fd[MIC_FD_RESET]);
		break;
	case MIC_ACCESS_DHPR:
		write_dhpr(bus, index, value);
		break;
	case MIC_ACCESS_DCAR:
		write_dcar(bus, index, value);
		break;
	case MIC_ACCESS_DCR:
		mic_dcr_update(bus, ~value, value);
		break;
	}
}

/* --- memories --------------------------------------------------------------------------------- */

bool mic_bus_master(struct mic_bus *bus)
{
	return !config16(bus, 0) || (config16(bus, MIC_PCI_COMMAND) & MIC_PCI_COMMAND_MASTER && awake(bus));
}

int mic_bus_fd(struct mic_bus *bus, unsigned which)
{
	return which < MIC_FD_COUNT ? bus->fd[which] : -1;
}

uint8_t *mic_bus_gddr(struct mic_bus *bus)
{
	return bus->gddr.base;
}

uint64_t mic_bus_gddr_size(struct mic_bus *bus)
{
	return bus->gddr.size;
}

uint8_t *mic_bus_host(struct mic_bus *bus)
{
	return bus->host.base;
}

uint64_t mic_bus_host_size(struct mic_bus *bus)
{
	return bus->host.size;
}

uint8_t *mic_bus_mmio(struct mic_bus *bus)
{
	return bus->mmio.base;
}

uint8_t *mic_bus_config(struct mic_bus *bus)
{
	return bus->config.base;
}

static void *within(const struct mic_map *m, uint64_t addr, uint64_t len)
{
	if (addr > m->size || len > m->size - addr)
		return NULL;
	return m->base + addr;
}

void *mic_gddr_at(struct mic_bus *bus, uint64_t addr, uint64_t len)
{
	return within(&bus->gddr, addr, len);
}

void *mic_card_at(struct mic_bus *bus, uint64_t addr, uint64_t len)
{
	if (addr < MIC_SMPT_BASE)
		return mic_gddr_at(bus, addr, len);
	if (addr >= MIC_SMPT_END)
		return NULL;
	const uint64_t page = 1ull << MIC_SMPT_SHIFT;
	uint64_t rel = addr - MIC_SMPT_BASE, inside = rel & (page - 1);

	if (len > page - inside)
		return NULL;
	uint32_t entry = mic_load_acquire(reg_at(bus, MIC_REG_SMPT((uint32_t)(rel >> MIC_SMPT_SHIFT))));

	return within(&bus->host, ((uint64_t)(entry >> 2) << MIC_SMPT_SHIFT) + inside, len);
}

uint64_t mic_shm_load(const void *p, unsigned size)
{
	switch (size) {
	case 1:
		return mic_load_acquire((const uint8_t *)p);
	case 2:
		return mic_load_acquire((const uint16_t *)p);
	case 4:
		return mic_load_acquire((const uint32_t *)p);
	default:
		return mic_load_acquire((const uint64_t *)p);
	}
}

void mic_shm_store(void *p, unsigned size, uint64_t value)
{
	switch (size) {
	case 1:
		mic_store_release((uint8_t *)p, (uint8_t)value);
		break;
	case 2:
		mic_store_release((uint16_t *)p, (uint16_t)value);
		break;
	case 4:
		mic_store_release((uint32_t *)p, (uint32_t)value);
		break;
	default:
		mic_store_release((uint64_t *)p, value);
		break;
	}
}

void mic_shm_fence(void)
{
	mic_full_fence();
}

int mic_punch(int fd, uint64_t off, uint64_t len)
{
	return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)len) < 0 ? -errno
												     : 0;
}

int mic_reserve(int fd, uint64_t off, uint64_t len)
{
	return fallocate(fd, 0, (off_t)off, (off_t)len) < 0 ? -errno : 0;
}

int mic_eventfd(int flags)
{
	int fd = eventfd(0, flags);

	return fd < 0 ? -errno : fd;
}
