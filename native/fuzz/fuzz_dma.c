/* Fuzz target: DMA descriptors against an independent reading of HW 5.3 and 5.7.
 *
 * Input: one byte of set-up, eight bytes for SMPT entries, then 17 bytes per descriptor: a shape
 * byte that may fold the addresses into interesting places, and the two quadwords. Checked: valid or
 * not as the model says, the bytes that moved, the bytes around them. */
#define _GNU_SOURCE
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../test/lab.h"
#include "fuzz.h"
#include "mic/dma.h"

#define GDDR   (128 * KIB)
#define HOST   (16 * GIB + 64 * KIB) /* sparse; ends in the second SMPT entry */
#define MARGIN 64u

static struct lab lab;
static uint8_t before[2 * MIB], source[2 * MIB];
static uint32_t smpt[MIC_SMPT_ENTRIES]; /* as they are before the descriptor under test */

enum place { NOWHERE, IN_GDDR, IN_HOST, IN_MMIO };

static void read_smpt(void)
{
	for (uint32_t i = 0; i < MIC_SMPT_ENTRIES; i++)
		smpt[i] = mic_mmio_read(lab.bus, MIC_REG_SMPT(i));
}

static bool master(void)
{
	const uint16_t *config = (const void *)mic_bus_config(lab.bus);

	return !config[0] || config[MIC_PCI_COMMAND / 2] & MIC_PCI_COMMAND_MASTER;
}

/* Host address of one byte, by the translation rule of HW 3. */
static bool host_byte(uint64_t addr, uint64_t *host)
{
	if (addr < MIC_SMPT_BASE || addr >= MIC_SMPT_END)
		return false;
	uint64_t entry = (addr - MIC_SMPT_BASE) / (16 * GIB);
	*host = (uint64_t)(smpt[entry] / 4) * (16 * GIB) + (addr - MIC_SMPT_BASE) % (16 * GIB);
	return *host < HOST;
}

static enum place place_of(uint64_t addr, uint64_t len)
{
	uint64_t unused;

	if (addr >= MIC_CARD_MMIO_BASE && addr - MIC_CARD_MMIO_BASE + len <= MIC_MMIO_SIZE)
		return IN_MMIO;
	if (addr + len <= GDDR)
		return IN_GDDR;
	if (addr < MIC_SMPT_BASE || !master())
		return NOWHERE;
	/* Ends and both sides of an entry boundary decide: in between an entry is contiguous. */
	uint64_t edge = (addr + len - 1) / (16 * GIB) * (16 * GIB);

	if (!host_byte(addr, &unused) || !host_byte(addr + len - 1, &unused))
		return NOWHERE;
	if (edge > addr && (!host_byte(edge - 1, &unused) || !host_byte(edge, &unused)))
		return NOWHERE;
	return IN_HOST;
}

/* A pointer to one byte in the model's own arithmetic; NULL outside memory. */
static uint8_t *byte_at(uint64_t addr)
{
	uint64_t host;

	if (addr < GDDR)
		return mic_bus_gddr(lab.bus) + addr;
	return host_byte(addr, &host) ? mic_bus_host(lab.bus) + host : NULL;
}

/* Up to the next multiple of 64: memories, SMPT entries and copies begin and end there, so a piece is
 * contiguous wherever it is. */
static uint64_t piece(uint64_t addr, uint64_t len)
{
	uint64_t room = 64 - addr % 64;

	return len < room ? len : room;
}

static void save(uint8_t *to, uint64_t addr, uint64_t len)
{
	for (uint64_t i = 0, n; i < len; i += n) {
		uint8_t *p = byte_at(addr + i);

		n = piece(addr + i, len - i);
		if (p)
			memcpy(to + i, p, n);
		else
			memset(to + i, 0, n);
	}
}

/* What is memory there holds ``want``. */
static void require(uint64_t addr, const uint8_t *want, uint64_t len)
{
	for (uint64_t i = 0, n; i < len; i += n) {
		uint8_t *p = byte_at(addr + i);

		n = piece(addr + i, len - i);
		REQUIRE(!p || !memcmp(p, want + i, n));
	}
}

static int expected(const uint64_t qw[2], uint64_t *src, uint64_t *dst, uint64_t *len)
{
	uint64_t type = qw[1] >> 60;

	*src = qw[0] & 0xffffffffffull;
	*dst = qw[1] & 0xffffffffffull;
	*len = type == 1 ? (qw[0] >> 46 & 0x3fff) * 64 : type == 2 ? 8 : type == 3 ? 4 : 0;
	if (type == 0)
		return 0;
	if (type > 3)
		return MIC_DMA_ERR_TYPE;
	if (!*len)
		return MIC_DMA_ERR_LENGTH;
	if (*dst % (type == 1 ? 64 : *len) || (type == 1 && *src % 64))
		return MIC_DMA_ERR_ALIGN;
	if (type == 1 && place_of(*src, *len) == NOWHERE)
		return MIC_DMA_ERR_SOURCE;
	if (place_of(*dst, *len) == NOWHERE)
		return MIC_DMA_ERR_DEST;
	if (type == 1 && place_of(*src, *len) == IN_HOST && place_of(*dst, *len) == IN_HOST)
		return MIC_DMA_ERR_PAIR;
	return 0;
}

static void check_effect(const uint64_t qw[2], uint64_t dst, uint64_t len, bool plain_copy)
{
	require(dst - MARGIN, before, MARGIN);
	if (plain_copy)
		require(dst, source, len);
	else if (qw[1] >> 60 != 1)
		require(dst, (const uint8_t *)qw, len); /* the value is the low bytes of the first quadword */
	require(dst + len, before + MARGIN + len, MARGIN);
}

static bool aliases(uint64_t a, uint64_t b)
{
	uint64_t x, y;

	/* Two SMPT entries may show the same host page: then margins and copies overlap. */
	return host_byte(a, &x) && host_byte(b, &y) && a != b && (x > y ? x - y : y - x) < 4 * MIB;
}

static void run_one(const uint64_t qw[2])
{
	struct mic_dma_effect effect = {0};
	uint64_t src, dst, len;
	int want = expected(qw, &src, &dst, &len);
	enum place to = want || !len ? NOWHERE : place_of(dst, len);
	bool copy = qw[1] >> 60 == 1, memory = to == IN_GDDR || to == IN_HOST;
	bool from_memory = copy && !want && place_of(src, len) != IN_MMIO;

	if (memory)
		save(before, dst - MARGIN, len + 2 * MARGIN);
	if (from_memory)
		save(source, src, len);
	int rc = mic_dma_execute(lab.bus, qw, NULL, &effect);

	REQUIRE(rc == want);
	REQUIRE(rc || effect.bytes == (copy ? len : 0));
	if (memory && !aliases(dst - MARGIN, dst + len + MARGIN))
		check_effect(qw, dst, len, from_memory);
	if (to == IN_MMIO)
		read_smpt();
}

/* Move an address into the places where mistakes live: ends of memories, entry boundaries. */
static uint64_t fold(uint64_t addr, unsigned how)
{
	uint64_t low = addr % (256 * KIB);

	switch (how & 7) {
	case 0:
		return addr & 0xffffffffffull;
	case 1:
		return low & ~63ull;
	case 2:
		return MIC_SMPT_BASE + (low & ~63ull);
	case 3:
		return MIC_SMPT_BASE + 16 * GIB - 128 * KIB + (low & ~63ull);
	case 4:
		return MIC_CARD_MMIO_BASE + (low & ~3ull);
	case 5:
		return MIC_SMPT_BASE + (addr & 0x1f) * (16 * GIB) + (low & ~63ull);
	case 6:
		return GDDR - 256 + addr % 512;
	default:
		return MIC_SMPT_END - (low & ~63ull);
	}
}

static void set_up(const uint8_t *data)
{
	uint16_t *config = (void *)mic_bus_config(lab.bus);

	mic_hw_reset(lab.bus);
	config[0] = data[0] & 1 ? 0x8086 : 0;
	config[MIC_PCI_COMMAND / 2] = data[0] & 2 ? MIC_PCI_COMMAND_MASTER : 0;
	for (uint32_t i = 0; i < MIC_SMPT_ENTRIES; i++)
		mic_mmio_write(lab.bus, MIC_REG_SMPT(i), (uint32_t)data[1 + i % 8] % 5 << 2);
	read_smpt();
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	lab_open(&lab, GDDR, HOST);
	for (uint64_t i = 0; i < GDDR; i++)
		mic_bus_gddr(lab.bus)[i] = (uint8_t)(i * 31 >> 3);
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static unsigned runs;

	if (size < 9)
		return 0;
	set_up(data);
	for (data += 9, size -= 9; size >= 17; data += 17, size -= 17) {
		uint64_t qw[2];

		memcpy(qw, data + 1, sizeof qw);
		qw[0] = (qw[0] & ~0xffffffffffull) | fold(qw[0] & 0xffffffffffull, data[0]);
		qw[1] = (qw[1] & ~0xffffffffffull) | fold(qw[1] & 0xffffffffffull, data[0] >> 3);
		if (data[0] & 0x40) /* mostly short copies: long ones are slow and rarely fit */
			qw[0] &= ~(0x3ff0ull << 46);
		run_one(qw);
	}
	if (++runs % 1024 == 0) /* pages that raw addresses touched */
		mic_punch(lab.fds[MIC_FD_HOST], MIB, 15 * GIB);
	return 0;
}
