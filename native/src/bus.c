/* A process's view of a card: attach, and register semantics (HW 2). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bus_internal.h"
#include "mic/fault.h"

static const struct mic_reg_row reg_table[MIC_REG_ROWS] = {MIC_REG_TABLE};

static uint64_t object_size(int fd)
{
	struct stat st;

	return fstat(fd, &st) < 0 ? 0 : (uint64_t)st.st_size;
}

static int map_bytes(struct mic_map *m, int fd, uint64_t size)
{
	m->size = size;
	m->base = mmap(NULL, m->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
	if (m->base == MAP_FAILED) {
		m->base = NULL;
		return -1;
	}
	/* A core dump of an 8 GiB aperture helps nobody. */
	madvise(m->base, m->size, MADV_DONTDUMP);
	return 0;
}

static int map_fd(struct mic_map *m, int fd)
{
	return map_bytes(m, fd, object_size(fd));
}

static void unmap(struct mic_map *m)
{
	if (m->base)
		munmap(m->base, m->size);
}

/* The fault filters; a card without them has a page of its own where nothing is ever armed. */
static int map_faults(struct mic_bus *bus)
{
	if (bus->fd[MIC_FD_FAULTS] >= 0) {
		if (map_fd(&bus->faults, bus->fd[MIC_FD_FAULTS]) < 0)
			return -1;
	} else {
		bus->faults.size = MIC_FAULT_SIZE;
		bus->faults.base = mmap(NULL, MIC_FAULT_SIZE, PROT_READ | PROT_WRITE,
					MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (bus->faults.base == MAP_FAILED) {
			bus->faults.base = NULL;
			return -1;
		}
	}
	if (bus->faults.size < MIC_FAULT_SIZE) {
		errno = EINVAL;
		return -1;
	}
	bus->armed = (const uint32_t *)(const void *)bus->faults.base;
	return 0;
}

void mic_bus_detach(struct mic_bus *bus)
{
	if (!bus)
		return;
	unmap(&bus->gddr);
	unmap(&bus->bank);
	unmap(&bus->mmio);
	unmap(&bus->host);
	unmap(&bus->config);
	unmap(&bus->faults);
	free(bus);
}

struct mic_bus *mic_bus_attach(const int *fds)
{
	struct mic_bus *bus = calloc(1, sizeof *bus);

	if (!bus)
		return NULL;
	memcpy(bus->fd, fds, sizeof bus->fd);
	if (map_bytes(&bus->gddr, fds[MIC_FD_GDDR], mic_gddr_size(object_size(fds[MIC_FD_GDDR]))) < 0 ||
	    map_fd(&bus->mmio, fds[MIC_FD_MMIO]) < 0 || map_fd(&bus->host, fds[MIC_FD_HOST]) < 0 ||
	    map_fd(&bus->config, fds[MIC_FD_CONFIG]) < 0)
		goto fail;
	if (bus->mmio.size < MIC_MMIO_SIZE || bus->config.size < MIC_CONFIG_OBJECT_SIZE) {
		errno = EINVAL;
		goto fail;
	}
	if (map_faults(bus) < 0)
		goto fail;
	return bus;
fail:;
	int saved = errno;
	mic_bus_detach(bus);
	errno = saved;
	return NULL;
}

int mic_bus_map_bank(struct mic_bus *bus)
{
	struct mic_map *m = &bus->bank;

	if (m->base)
		return 0;
	m->size = bus->gddr.size;
	m->base = mmap(NULL, m->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
		       bus->fd[MIC_FD_GDDR], (off_t)MIC_WINDOW_BANK);
	if (m->base == MAP_FAILED) {
		*m = (struct mic_map){0};
		return -errno;
	}
	madvise(m->base, m->size, MADV_DONTDUMP);
	return 0;
}

/* One step for every thread: an access meets either the old memory or the new. */
static int remap(struct mic_map *m, int fd, uint64_t offset)
{
	if (!m->base)
		return 0;
	if (mmap(m->base, m->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, fd,
		 (off_t)offset) == MAP_FAILED)
		return -errno;
	madvise(m->base, m->size, MADV_DONTDUMP);
	return 0;
}

int mic_bus_replace_gddr(struct mic_bus *bus, int fd)
{
	if (mic_gddr_size(object_size(fd)) != bus->gddr.size)
		return -EINVAL;
	int rc = remap(&bus->gddr, fd, 0);

	if (rc == 0)
		rc = remap(&bus->bank, fd, MIC_WINDOW_BANK);
	if (rc < 0)
		return rc;
	return dup3(fd, bus->fd[MIC_FD_GDDR], O_CLOEXEC) < 0 ? -errno : 0;
}

int mic_bus_fd(struct mic_bus *bus, unsigned which)
{
	return which < MIC_FD_COUNT ? bus->fd[which] : -1;
}

bool mic_bus_master(struct mic_bus *bus)
{
	return !config16(bus, 0) || (config16(bus, MIC_PCI_COMMAND) & MIC_PCI_COMMAND_MASTER && awake(bus));
}

/* --- registers ------------------------------------------------------------------------------- */

/* The table row of a register and its index in the row, or NULL for an unknown offset. */
static const struct mic_reg_row *reg_find(uint32_t off, uint32_t *index)
{
	for (unsigned i = 0; i < MIC_REG_ROWS; i++) {
		const struct mic_reg_row *r = &reg_table[i];
		uint32_t delta = off - r->off;

		if (off < r->off || delta >= r->count * r->stride || delta % r->stride)
			continue;
		*index = delta / r->stride;
		return r;
	}
	return NULL;
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
	/* Doorbells in flight die with the reset (HW-52); fault filters are no part of the card and stay. */
	mic_fault_forget_late(bus);
	for (unsigned f = MIC_FD_RESET; f < MIC_FD_FAULT_HIT; f++) {
		eventfd_t drop;
		(void)!eventfd_read(bus->fd[f], &drop);
	}
}

uint64_t mic_mmio_ignored(struct mic_bus *bus)
{
	return mic_load_relaxed(&bus->ignored);
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
		mic_write_msix_ctrl(bus, index, value);
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
		mic_write_enable(bus, value);
		break;
	case MIC_ACCESS_DISABLE:
		mic_fetch_and(reg_at(bus, MIC_REG_SICE0), ~value);
		break;
	case MIC_ACCESS_SDBIC:
		mic_store_release(reg_at(bus, off), value & ~MIC_SDBIC_REQUEST);
		if (value & MIC_SDBIC_REQUEST) {
			count_one(bus, index);
			mic_raise_host(bus, 1u << (MIC_SRC_DOORBELL + index));
		}
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
		mic_write_dhpr(bus, index, value);
		break;
	case MIC_ACCESS_DCAR:
		mic_write_dcar(bus, index, value);
		break;
	case MIC_ACCESS_DCR:
		mic_dcr_update(bus, ~value, value);
		break;
	}
}
