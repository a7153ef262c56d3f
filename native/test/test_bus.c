/* Registers, interrupts and address decoding with several threads at once (HW-4, 11..14, 35). */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <stdint.h>

#include "harness.h"
#include "lab.h"

static void *ring_doorbells(void *arg)
{
	struct lab *lab = arg;

	for (int i = 0; i < 20000; i++)
		mic_ring_host(lab->bus, i & 3, 0);
	return NULL;
}

/* Does the line ring within a second? Takes the ring. */
static bool rings(int fd)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};

	return poll(&p, 1, 1000) == 1 && lab_rang(fd);
}

TEST(hw_12_enabling_races_with_ringing)
{
	/* Whoever comes second delivers: a ring is never lost between cause and enable. */
	struct lab lab;
	pthread_t t;

	lab_open(&lab, MIB, MIB);
	mic_mmio_write(lab.bus, MIC_REG_MXAR(0), 0xf);
	mic_mmio_write(lab.bus, MIC_REG_SIAC0, 0xf);
	pthread_create(&t, NULL, ring_doorbells, &lab);
	for (int i = 0; i < 20000; i++) {
		mic_mmio_write(lab.bus, MIC_REG_SICC0, 0xf);
		mic_mmio_write(lab.bus, MIC_REG_SICE0, 0xf);
	}
	pthread_join(t, NULL);
	mic_mmio_write(lab.bus, MIC_REG_SICE0, 0xf);
	CHECK(lab_rang(lab.fds[MIC_FD_VEC]) > 0);
	CHECK(mic_mmio_read(lab.bus, MIC_REG_SICR0) == 0);
	lab_close(&lab);
}

struct round {
	struct lab lab;
	pthread_barrier_t start;
};

static void *ring_once_per_round(void *arg)
{
	struct round *r = arg;

	for (int i = 0; i < 3000; i++) {
		pthread_barrier_wait(&r->start);
		mic_ring_host(r->lab.bus, 0, 0);
		pthread_barrier_wait(&r->start);
	}
	return NULL;
}

static void one_message_per_round(struct round *r, uint32_t off, uint32_t hold, uint32_t release, bool *lost)
{
	for (int i = 0; i < 3000; i++) {
		mic_mmio_write(r->lab.bus, off, hold);
		pthread_barrier_wait(&r->start);
		mic_mmio_write(r->lab.bus, off, release); /* while the other thread rings */
		pthread_barrier_wait(&r->start);
		if (lab_rang(r->lab.fds[MIC_FD_VEC]) != 1)
			*lost = true;
	}
}

static void open_msix(struct lab *lab)
{
	uint16_t *config = (void *)mic_bus_config(lab->bus);

	config[0] = 0x8086;
	config[MIC_PCI_COMMAND / 2] = MIC_PCI_COMMAND_MASTER;
	config[(MIC_PCI_CAP_MSIX + 2) / 2] = MIC_PCI_MSIX_ENABLE;
	mic_mmio_write(lab->bus, MIC_REG_MXAR(0), 1);
	mic_mmio_write(lab->bus, MIC_REG_SIAC0, 1);
	mic_mmio_write(lab->bus, MIC_REG_SICE0, 1);
}

TEST(hw_14_unmasking_races_with_a_message)
{
	/* Exactly one message per ring, whichever of ring and unmasking is first. */
	struct round r;
	pthread_t t;
	bool lost = false;

	lab_open(&r.lab, MIB, MIB);
	open_msix(&r.lab);
	pthread_barrier_init(&r.start, NULL, 2);
	pthread_create(&t, NULL, ring_once_per_round, &r);
	one_message_per_round(&r, MIC_REG_MSIX_CTRL(0), 1, 0, &lost);
	pthread_join(t, NULL);
	CHECK(!lost);
	CHECK(mic_mmio_read(r.lab.bus, MIC_REG_MSIX_PBA) == 0);
	pthread_barrier_destroy(&r.start);
	lab_close(&r.lab);
}

static void *interrupt_once_per_round(void *arg)
{
	struct round *r = arg;

	for (int i = 0; i < 3000; i++) {
		pthread_barrier_wait(&r->start);
		mic_hw_dma_interrupt(r->lab.bus, 4);
		pthread_barrier_wait(&r->start);
	}
	return NULL;
}

TEST(hw_35_unmasking_a_channel_races_with_its_interrupt)
{
	struct round r;
	pthread_t t;
	bool lost = false;

	lab_open(&r.lab, MIB, MIB);
	mic_dcr_update(r.lab.bus, 1u << 8, 0);
	pthread_barrier_init(&r.start, NULL, 2);
	pthread_create(&t, NULL, interrupt_once_per_round, &r);
	for (int i = 0; i < 3000; i++) {
		mic_mmio_write(r.lab.bus, MIC_REG_DCAR(4), MIC_DMA_DCAR_IM0);
		pthread_barrier_wait(&r.start);
		mic_mmio_write(r.lab.bus, MIC_REG_DCAR(4), 0);
		pthread_barrier_wait(&r.start);
		lost |= lab_rang(r.lab.fds[MIC_FD_IRQ + MIC_CARD_IRQ_DMA]) != 1;
	}
	pthread_join(t, NULL);
	CHECK(!lost);
	pthread_barrier_destroy(&r.start);
	lab_close(&r.lab);
}

static void *toggle_own_bits(void *arg)
{
	struct mic_bus *bus = ((struct lab *)arg)->bus;

	for (int i = 0; i < 20001; i++)
		mic_dcr_update(bus, i & 1 ? 0xaa00 : 0, i & 1 ? 0 : 0xaa00);
	return NULL;
}

TEST(hw_22_both_sides_change_dcr)
{
	/* DCR is shared by the drivers of both sides: no update of one may undo the other's. */
	struct lab lab;
	pthread_t t;

	lab_open(&lab, MIB, MIB);
	pthread_create(&t, NULL, toggle_own_bits, &lab);
	for (int i = 0; i < 20001; i++)
		mic_dcr_update(lab.bus, i & 1 ? 0xaa : 0, i & 1 ? 0 : 0xaa);
	pthread_join(t, NULL);
	CHECK(mic_mmio_read(lab.bus, MIC_REG_DCR) == (0x55 | 0xaaaa));
	lab_close(&lab);
}

TEST(hw_04_every_offset_can_be_written)
{
	struct lab lab;
	uint64_t seed = 1;

	lab_open(&lab, MIB, MIB);
	for (uint32_t off = 0; off < MIC_MMIO_SIZE + 64; off++)
		mic_mmio_write(lab.bus, off, lab_random(&seed));
	for (int i = 0; i < 100000; i++) {
		mic_mmio_write(lab.bus, lab_random(&seed), lab_random(&seed));
		mic_mmio_read(lab.bus, lab_random(&seed));
	}
	CHECK(mic_mmio_ignored(lab.bus) > 0);
	CHECK(mic_mmio_read(lab.bus, 0x1f000) == 0);
	CHECK(mic_mmio_read(lab.bus, MIC_REG_SPAD(0) + 1) == 0);
	lab_close(&lab);
}

TEST(hw_11_translation_never_leaves_the_memories)
{
	struct lab lab;
	uint64_t seed = 7;

	lab_open(&lab, 3 * MIB, 5 * MIB);
	for (int i = 0; i < 200000; i++) {
		uint64_t addr = (uint64_t)lab_random(&seed) << (lab_random(&seed) % 34),
			 len = lab_random(&seed) % (6 * MIB);
		uint8_t *p;

		mic_mmio_write(lab.bus, MIC_REG_SMPT(lab_random(&seed) % 32), lab_random(&seed) & 0x1f);
		if (i & 1)
			addr += MIC_SMPT_BASE;
		p = mic_card_at(lab.bus, addr, len);
		if (p) {
			uint8_t *g = mic_bus_gddr(lab.bus), *h = mic_bus_host(lab.bus);

			CHECK((p >= g && p + len <= g + 3 * MIB) || (p >= h && p + len <= h + 5 * MIB));
		}
	}
	lab_close(&lab);
}

TEST(hw_20_data_before_the_ring)
{
	struct lab lab;

	lab_open(&lab, MIB, MIB);
	mic_mmio_write(lab.bus, MIC_REG_MXAR(0), 1);
	mic_mmio_write(lab.bus, MIC_REG_SIAC0, 1);
	mic_mmio_write(lab.bus, MIC_REG_SICE0, 1);
	for (uint64_t i = 1; i < 1000; i++) {
		mic_shm_store(mic_bus_host(lab.bus), 8, i);
		mic_ring_host(lab.bus, 0, 0);
		CHECK(rings(lab.fds[MIC_FD_VEC]));
		CHECK(mic_shm_load(mic_bus_host(lab.bus), 8) == i);
	}
	lab_close(&lab);
}
