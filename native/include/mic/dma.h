/* The DMA engine of the card (HW 5): eight channels in the board process, one thread each.
 *
 * A channel sleeps on its kick line (MIC_FD_CHAN), which every write of DHPR or DCR signals, and
 * works off its ring of 16-byte descriptors while it is enabled. What it knows it reads from the
 * registers, so that a driver in any process sees exactly what the hardware would show. */
#ifndef MIC_DMA_H
#define MIC_DMA_H

#include <stdbool.h>
#include <stdint.h>

#include "mic/bus.h"
#include "mic/layout_gen.h"

/* cffi-begin */
struct mic_dma_engine;

/* What one channel did since the engine started. */
struct mic_dma_stats {
	uint64_t descriptors; /* retired */
	uint64_t bytes;       /* copied by memcpy descriptors */
	uint64_t interrupts;  /* raised, masked ones included */
	uint64_t faults;      /* times the channel halted */
	uint64_t wakeups;     /* times its thread left poll(2) */
	uint64_t aborts;      /* descriptors cut off by a reset */
};

/* Start eight channel threads over `bus`, which must outlive the engine. One engine per card, in
 * the board process. NULL with errno set when threads or descriptors run out. */
struct mic_dma_engine *mic_dma_engine_start(struct mic_bus *bus);
/* Card reset: cut off what is in flight, put the channel registers and DCR to their reset values,
 * forget pending interrupts. When it returns no byte is moving; the channels are ready again. */
void mic_dma_engine_reset(struct mic_dma_engine *engine);
/* End all threads and free the engine. Registers stay as they are. */
void mic_dma_engine_stop(struct mic_dma_engine *engine);
void mic_dma_engine_stats(struct mic_dma_engine *engine, unsigned c, struct mic_dma_stats *out);
/* cffi-end */

/* --- descriptors, for the engine and its fuzzer (dma_desc.c) --------------------------------------
 *
 * Memory that fails under an access (a full /dev/shm, a file cut short) is the channel's error, not
 * the process's death: both calls below run guarded once mic_dma_guard_get() installed the handler.
 * Calls of get and put are counted. */
void mic_dma_guard_get(void);
void mic_dma_guard_put(void);

/* What a descriptor did, and what it asks for after it retired. */
struct mic_dma_effect {
	uint64_t bytes; /* copied */
	bool interrupt, write_back;
};

/* Read the descriptor at card address `addr`. 0 or MIC_DMA_ERR_RING / _MEMORY. */
int mic_dma_fetch(struct mic_bus *bus, uint64_t addr, uint64_t qw[2]);
/* Execute it. Returns 0, a DCHERR bit (nothing was touched unless it is _MEMORY), or -EINTR when
 * *abort became true during the copy; `abort` may be NULL. */
int mic_dma_execute(struct mic_bus *bus, const uint64_t qw[2], const uint32_t *abort,
		    struct mic_dma_effect *effect);

#endif
