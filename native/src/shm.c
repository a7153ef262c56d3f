/* The memories of a card, address translation, and single accesses to shared memory (HW 1, 3). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bus_internal.h"
#include "guard.h"

#define PAGE         4096u
#define RESERVE_STEP (1u << 20) /* bytes: some 0.1 ms */

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
		return addr < MIC_WINDOW_BANK ? mic_gddr_at(bus, addr, len)
					      : within(&bus->bank, addr - MIC_WINDOW_BANK, len);
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
	/* A signal interrupts it, and what it has done by then is undone: in steps that end soon. */
	for (uint64_t n; len; off += n, len -= n) {
		n = len < RESERVE_STEP ? len : RESERVE_STEP;
		while (fallocate(fd, FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)n) < 0)
			if (errno != EINTR)
				return -errno;
	}
	return 0;
}

uint64_t mic_gddr_size(uint64_t object_size)
{
	return object_size > MIC_WINDOW_BANK ? object_size - MIC_WINDOW_BANK : object_size;
}

int mic_gddr_revoke(int fd)
{
	struct stat st;

	if (fstat(fd, &st) < 0)
		return -errno;
	return ftruncate(fd, (off_t)mic_gddr_size((uint64_t)st.st_size)) < 0 ? -errno : 0;
}

struct small_write {
	uint8_t *to;
	const void *data;
	size_t len;
};

static int small_write(void *arg)
{
	const struct small_write *w = arg;
	uint64_t value;

	if (w->len == sizeof value && (uintptr_t)w->to % sizeof value == 0) {
		memcpy(&value, w->data, sizeof value);
		mic_store_release((uint64_t *)(void *)w->to, value);
	} else {
		memcpy(w->to, w->data, w->len);
	}
	return 0;
}

int mic_shm_write_at(int fd, uint64_t off, const void *data, size_t len)
{
	uint64_t first = off & ~(uint64_t)(PAGE - 1);
	uint8_t *map;
	int rc;

	if (len > sizeof(uint64_t))
		return -EINVAL;
	map = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)first);
	if (map == MAP_FAILED)
		return -errno;
	struct small_write w = {map + (off - first), data, len};

	mic_guard_get();
	rc = mic_guarded(small_write, &w, -EIO);
	mic_guard_put();
	munmap(map, 2 * PAGE);
	return rc;
}

int mic_eventfd(int flags)
{
	int fd = eventfd(0, flags);

	return fd < 0 ? -errno : fd;
}
