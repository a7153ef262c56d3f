/* Card memories, register semantics and interrupt delivery (HW 1, 2, 4). */
#define _GNU_SOURCE
#include "mic/bus.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "mic/barrier.h"

struct mic_map {
	uint8_t *base;
	uint64_t size;
};

struct mic_bus {
	struct mic_map gddr, mmio, host, config;
	int fd[MIC_FD_COUNT];
	uint64_t ignored; /* writes to registers that do not exist or are read-only */
};

static const struct mic_reg_row reg_table[MIC_REG_ROWS] = { MIC_REG_TABLE };

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

uint32_t mic_mmio_read(struct mic_bus *bus, uint32_t off)
{
	uint32_t index;

	if (!reg_find(off, &index))
		return 0;
	return mic_load_acquire(reg_at(bus, off));
}

void mic_hw_store(struct mic_bus *bus, uint32_t off, uint32_t value)
{
	mic_store_release(reg_at(bus, off), value);
}

void mic_hw_reset(struct mic_bus *bus)
{
	for (unsigned i = 0; i < MIC_REG_ROWS; i++)
		for (uint32_t k = 0; k < reg_table[i].count; k++)
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

static void deliver_host(struct mic_bus *bus, uint32_t sources)
{
	uint32_t autoclear = mic_load_acquire(reg_at(bus, MIC_REG_SIAC0)) & sources;

	if (autoclear)
		mic_fetch_and(reg_at(bus, MIC_REG_SICR0), ~autoclear);
	uint32_t mapped = 0;
	for (unsigned v = 0; v < MIC_MXAR_COUNT; v++) {
		uint32_t map = mic_load_acquire(reg_at(bus, MIC_REG_MXAR(v)));

		mapped |= map & sources;
		if (map & sources)
			signal_fd(bus->fd[MIC_FD_VEC + v]);
	}
	/* Sources without auto-clear and without a vector: INTx, the line is vector 0's (HW 4.3). */
	if (sources & ~mapped & ~autoclear)
		signal_fd(bus->fd[MIC_FD_VEC]);
}

void mic_raise_host(struct mic_bus *bus, uint32_t sources)
{
	mic_fetch_or(reg_at(bus, MIC_REG_SICR0), sources);
	/* Pairs with the or in write_enable(): one of the two sees the other's bit. */
	uint32_t enabled = mic_load_acquire(reg_at(bus, MIC_REG_SICE0)) & sources;

	if (enabled)
		deliver_host(bus, enabled);
}

static void write_enable(struct mic_bus *bus, uint32_t value)
{
	uint32_t old = mic_fetch_or(reg_at(bus, MIC_REG_SICE0), value);
	uint32_t pending = mic_load_acquire(reg_at(bus, MIC_REG_SICR0)) & value & ~old;

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

static void channel_fault(struct mic_bus *bus, uint32_t c)
{
	mic_fetch_or(reg_at(bus, MIC_REG_DCHERR(c)), 1u);
	mic_fetch_or(reg_at(bus, MIC_REG_DSTAT(c)), MIC_DMA_DSTAT_QUIESCED | MIC_DMA_DSTAT_ERROR);
}

static void write_dhpr(struct mic_bus *bus, uint32_t c, uint32_t value)
{
	uint32_t old = mic_exchange(reg_at(bus, MIC_REG_DHPR(c)), value);
	uint32_t enable = mic_load_acquire(reg_at(bus, MIC_REG_DCR)) & (2u << (2 * c));

	/* The same head twice would mean a full ring to the engine (HW-32). */
	if (enable && old == value)
		channel_fault(bus, c);
	signal_fd(bus->fd[MIC_FD_CHAN + c]);
}

void mic_mmio_write(struct mic_bus *bus, uint32_t off, uint32_t value)
{
	uint32_t index;
	const struct mic_reg_row *row = reg_find(off, &index);

	if (!row) {
		mic_fetch_add(&bus->ignored, 1);
		return;
	}
	switch (row->access) {
	case MIC_ACCESS_RW:
		mic_store_release(reg_at(bus, off), value);
		break;
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
		mic_store_release(reg_at(bus, off), value);
		signal_fd(bus->fd[MIC_FD_CHAN + index]);
		break;
	case MIC_ACCESS_DCR:
		mic_store_release(reg_at(bus, off), value);
		for (unsigned c = 0; c < MIC_DMA_CHANNELS; c++)
			signal_fd(bus->fd[MIC_FD_CHAN + c]);
		break;
	}
}

/* --- memories --------------------------------------------------------------------------------- */

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
	return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)len) < 0 ? -errno : 0;
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
