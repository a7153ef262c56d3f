/* DMA descriptors: address decoding and what each type does (HW 5.3, HW-24, 25, 31). */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "guard.h"
#include "mic/barrier.h"
#include "mic/dma.h"

/* A reset waits for at most one chunk; small enough to be quick, large enough to cost nothing. */
#define CHUNK (256u * 1024)

/* --- addresses ------------------------------------------------------------------------------------ */

enum space { NOWHERE, GDDR, HOST, MMIO };

static uint64_t min64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* Bytes from `addr` to the next SMPT entry. */
static uint64_t to_boundary(uint64_t addr)
{
	const uint64_t page = 1ull << MIC_SMPT_SHIFT;

	return page - (addr & (page - 1));
}

static bool host_backed(struct mic_bus *bus, uint64_t addr, uint64_t len)
{
	if (!mic_bus_master(bus))
		return false;
	for (uint64_t n; len; addr += n, len -= n) {
		n = min64(len, to_boundary(addr));
		if (!mic_card_at(bus, addr, n))
			return false;
	}
	return true;
}

/* What [addr, addr + len) is as a whole. */
static enum space space_of(struct mic_bus *bus, uint64_t addr, uint64_t len)
{
	if (addr >= MIC_CARD_MMIO_BASE && addr + len <= MIC_CARD_MMIO_BASE + MIC_MMIO_SIZE)
		return MMIO;
	if (addr >= MIC_SMPT_BASE)
		return host_backed(bus, addr, len) ? HOST : NOWHERE;
	return mic_card_at(bus, addr, len) ? GDDR : NOWHERE;
}

static uint32_t load32(struct mic_bus *bus, enum space space, uint64_t addr)
{
	if (space == MMIO)
		return mic_mmio_read(bus, (uint32_t)(addr - MIC_CARD_MMIO_BASE));
	const uint32_t *p = mic_card_at(bus, addr, sizeof *p);

	return p ? mic_load_acquire(p) : 0;
}

static void store32(struct mic_bus *bus, enum space space, uint64_t addr, uint32_t value)
{
	if (space == MMIO) {
		mic_mmio_write(bus, (uint32_t)(addr - MIC_CARD_MMIO_BASE), value);
		return;
	}
	uint32_t *p = mic_card_at(bus, addr, sizeof *p);

	if (p)
		mic_store_release(p, value);
}

/* --- descriptor types ------------------------------------------------------------------------------ */

static int copy(struct mic_bus *bus, uint64_t src, uint64_t dst, uint64_t len, const uint32_t *abort)
{
	for (uint64_t n; len; src += n, dst += n, len -= n) {
		if (abort && mic_load_acquire(abort))
			return -EINTR;
		n = min64(min64(len, CHUNK), min64(to_boundary(src), to_boundary(dst)));
		/* Translated again for every chunk: the host may rewrite an SMPT entry meanwhile, and
		 * then the copy must not go on through the old one. */
		const void *from = mic_card_at(bus, src, n);
		void *to = mic_card_at(bus, dst, n);

		if (!from || !to)
			return from ? MIC_DMA_ERR_DEST : MIC_DMA_ERR_SOURCE;
		memmove(to, from, n);
	}
	return 0;
}

static void copy_registers(struct mic_bus *bus, enum space from, uint64_t src, enum space to, uint64_t dst,
			   uint64_t len)
{
	for (uint64_t i = 0; i < len; i += 4)
		store32(bus, to, dst + i, load32(bus, from, src + i));
}

static int do_memcpy(struct mic_bus *bus, const uint64_t qw[2], const uint32_t *abort,
		     struct mic_dma_effect *effect)
{
	uint64_t src = qw[0] & MIC_DMA_ADDR_MASK, dst = qw[1] & MIC_DMA_ADDR_MASK;
	uint64_t len = (qw[0] >> MIC_DMA_MEMCPY_LEN_SHIFT & MIC_DMA_MEMCPY_LEN_MASK) * MIC_DMA_ALIGN;
	int rc = 0;

	if (!len)
		return MIC_DMA_ERR_LENGTH;
	if ((src | dst) & (MIC_DMA_ALIGN - 1))
		return MIC_DMA_ERR_ALIGN;
	enum space from = space_of(bus, src, len), to = space_of(bus, dst, len);

	if (from == NOWHERE || to == NOWHERE)
		return from == NOWHERE ? MIC_DMA_ERR_SOURCE : MIC_DMA_ERR_DEST;
	if (from == HOST && to == HOST)
		return MIC_DMA_ERR_PAIR;
	if (from == MMIO || to == MMIO)
		copy_registers(bus, from, src, to, dst, len);
	else
		rc = copy(bus, src, dst, len, abort);
	effect->bytes = len;
	effect->interrupt = qw[1] & MIC_DMA_MEMCPY_INTERRUPT;
	effect->write_back = qw[1] & MIC_DMA_MEMCPY_WRITE_BACK;
	return rc;
}

/* Store `size` bytes (8: status, 4: general) of qw0. */
static int do_store(struct mic_bus *bus, const uint64_t qw[2], unsigned size, struct mic_dma_effect *effect)
{
	uint64_t dst = qw[1] & MIC_DMA_ADDR_MASK;

	if (dst & (size - 1))
		return MIC_DMA_ERR_ALIGN;
	enum space to = space_of(bus, dst, size);
	uint64_t *p = to == MMIO ? NULL : mic_card_at(bus, dst, size);

	/* p is NULL as well when the SMPT entry was rewritten since space_of(). */
	if (to == NOWHERE || (to != MMIO && !p))
		return MIC_DMA_ERR_DEST;
	if (p && size == 8) {
		mic_store_release(p, qw[0]);
	} else {
		store32(bus, to, dst, (uint32_t)qw[0]);
		if (size == 8)
			store32(bus, to, dst + 4, (uint32_t)(qw[0] >> 32));
	}
	effect->interrupt = size == 8 && qw[1] & MIC_DMA_STATUS_INTERRUPT;
	return 0;
}

struct job { /* one guarded call */
	struct mic_bus *bus;
	uint64_t *out;
	const uint64_t *qw;
	uint64_t addr;
	const uint32_t *abort;
	struct mic_dma_effect *effect;
	uint32_t at;
	uint8_t mask;
};

static int execute(void *arg)
{
	const struct job *j = arg;

	switch (j->qw[1] >> MIC_DMA_TYPE_SHIFT) {
	case MIC_DMA_DESC_NOP:
		return 0;
	case MIC_DMA_DESC_MEMCPY:
		return do_memcpy(j->bus, j->qw, j->abort, j->effect);
	case MIC_DMA_DESC_STATUS:
		return do_store(j->bus, j->qw, 8, j->effect);
	case MIC_DMA_DESC_GENERAL:
		return do_store(j->bus, j->qw, 4, j->effect);
	default:
		return MIC_DMA_ERR_TYPE; /* the key types 4 and 5 too */
	}
}

int mic_dma_execute(struct mic_bus *bus, const uint64_t qw[2], const uint32_t *abort,
		    struct mic_dma_effect *effect)
{
	struct job j = {.bus = bus, .qw = qw, .abort = abort, .effect = effect};

	return mic_guarded(execute, &j, MIC_DMA_ERR_MEMORY);
}

static int fetch(void *arg)
{
	const struct job *j = arg;
	const uint64_t *p;

	if (j->addr & (MIC_DMA_DESC_SIZE - 1) || (j->addr >= MIC_SMPT_BASE && !mic_bus_master(j->bus)))
		return MIC_DMA_ERR_RING;
	p = mic_card_at(j->bus, j->addr, MIC_DMA_DESC_SIZE);
	if (!p)
		return MIC_DMA_ERR_RING;
	j->out[0] = mic_load_acquire(&p[0]);
	j->out[1] = mic_load_acquire(&p[1]);
	return 0;
}

int mic_dma_fetch(struct mic_bus *bus, uint64_t addr, uint64_t qw[2])
{
	struct job j = {.bus = bus, .addr = addr, .out = qw};

	return mic_guarded(fetch, &j, MIC_DMA_ERR_MEMORY);
}

static int spoil(void *arg)
{
	const struct job *j = arg;
	uint64_t type = j->qw[1] >> MIC_DMA_TYPE_SHIFT, len = type == MIC_DMA_DESC_STATUS ? 8 : 4;

	if (type == MIC_DMA_DESC_NOP)
		return 0;
	if (type == MIC_DMA_DESC_MEMCPY)
		len = (j->qw[0] >> MIC_DMA_MEMCPY_LEN_SHIFT & MIC_DMA_MEMCPY_LEN_MASK) * MIC_DMA_ALIGN;
	uint8_t *p = mic_card_at(j->bus, (j->qw[1] & MIC_DMA_ADDR_MASK) + j->at % len, 1);

	if (p)
		mic_store_relaxed(p, (uint8_t)(mic_load_relaxed(p) ^ j->mask));
	return 0;
}

void mic_dma_spoil(struct mic_bus *bus, const uint64_t qw[2], uint32_t at, uint8_t mask)
{
	struct job j = {.bus = bus, .qw = qw, .at = at, .mask = mask};

	mic_guarded(spoil, &j, 0);
}
