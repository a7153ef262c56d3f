/* The memories of a card, address translation, and single accesses to shared memory (HW 1, 3). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>

#include "bus_internal.h"

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

uint8_t *mic_bus_faults(struct mic_bus *bus)
{
	return bus->faults.base;
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
