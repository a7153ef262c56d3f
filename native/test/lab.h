/* A card's memories and lines inside one process, for tests and fuzzers. */
#ifndef MIC_TEST_LAB_H
#define MIC_TEST_LAB_H

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "mic/bus.h"

#define KIB 1024ull
#define MIB (1024 * KIB)
#define GIB (1024 * MIB)

struct lab {
	int fds[MIC_FD_COUNT];
	struct mic_bus *bus;
};

static inline int lab_memory(const char *name, uint64_t size)
{
	int fd = memfd_create(name, MFD_CLOEXEC);

	if (fd < 0 || ftruncate(fd, (off_t)size) < 0)
		abort();
	return fd;
}

static inline void lab_open(struct lab *lab, uint64_t gddr, uint64_t host)
{
	lab->fds[MIC_FD_GDDR] = lab_memory("gddr", gddr);
	lab->fds[MIC_FD_MMIO] = lab_memory("mmio", MIC_MMIO_SIZE);
	lab->fds[MIC_FD_HOST] = lab_memory("host", host);
	lab->fds[MIC_FD_CONFIG] = lab_memory("config", MIC_CONFIG_OBJECT_SIZE);
	lab->fds[MIC_FD_FAULTS] = lab_memory("faults", MIC_FAULT_SIZE);
	for (int i = MIC_FD_RESET; i < MIC_FD_COUNT; i++)
		lab->fds[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	lab->bus = mic_bus_attach(lab->fds);
	if (!lab->bus)
		abort();
	mic_hw_reset(lab->bus);
	for (uint32_t i = 0; i < MIC_SMPT_ENTRIES; i++)
		mic_mmio_write(lab->bus, MIC_REG_SMPT(i), i << 2);
}

static inline void lab_close(struct lab *lab)
{
	mic_bus_detach(lab->bus);
	for (int i = 0; i < MIC_FD_COUNT; i++)
		close(lab->fds[i]);
}

/* What a line has counted; 0 = it did not ring. */
static inline uint64_t lab_rang(int fd)
{
	eventfd_t n;

	return eventfd_read(fd, &n) ? 0 : n;
}

/* A small generator: the same numbers on every run. */
static inline uint32_t lab_random(uint64_t *state)
{
	*state = *state * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)(*state >> 33);
}

#endif
