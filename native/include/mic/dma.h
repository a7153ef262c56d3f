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
/* The same from any process that has attached the card: the engine counts in shared memory. */
void mic_dma_bus_stats(struct mic_bus *bus, unsigned c, struct mic_dma_stats *out);
/* The owner of channels [first, first + count) is gone: disable them and wait until the engine has let go
 * of memory. 0 or -ETIMEDOUT. */
int mic_dma_quiesce(struct mic_bus *bus, unsigned first, unsigned count, int timeout_ms);

/* --- driver half: a channel as its owner's driver sees it (HW 5.4 - 5.6, dma_drv.c) ------------------
 *
 * All calls may come from any thread. A successful prep holds the channel for its caller until
 * mic_dma_submit() or mic_dma_discard(). */
struct mic_dma_chan;

enum mic_dma_flags {
	MIC_DMA_PREP_INTERRUPT = 1, /* interrupt when done */
	MIC_DMA_PREP_FENCE = 32,    /* a status write after the data */
};

struct mic_dma_setup {
	uint64_t ring;      /* card address of size * 16 zeroed bytes: SMPT for channels 0-3, GDDR for 4-7 */
	uint64_t memory;    /* the same as an offset in the owner's memory: the SMPT registers may not be
			     * written yet when a channel is set up (HW 6.3: steps 5 and 10) */
	uint64_t status;    /* card address of 8 bytes that fences may overwrite */
	uint32_t size;      /* descriptors; the driver's ring has MIC_DMA_RING_SIZE */
	uint32_t max_bytes; /* longest copy of one descriptor, a multiple of 64 */
	unsigned c;
	int cookie; /* where the counter starts; 0: at 1, as in the DMA core */
};

struct mic_dma_counters {
	uint64_t transactions, descriptors, bytes; /* submitted */
	uint64_t completed;                        /* transactions */
	uint64_t kicks;                            /* writes of DHPR */
	uint64_t ring_full;                        /* preps that found no room */
	uint64_t bad_status;                       /* DSTAT showed a count that was never issued */
};

/* Take and set up a channel. NULL with errno: EINVAL, EFAULT (ring not in memory), ENOMEM,
 * EBUSY (the channel is halted by an error; it is left disabled and masked, HW-33). */
struct mic_dma_chan *mic_dma_chan_create(struct mic_bus *bus, const struct mic_dma_setup *setup);
/* Disable, mask, wait up to timeout_ms until the engine lets go of memory. 0 or -ETIMEDOUT. */
int mic_dma_chan_stop(struct mic_dma_chan *ch, int timeout_ms);
void mic_dma_chan_destroy(struct mic_dma_chan *ch);

/* Write descriptors for one transaction. 0, -ENOMEM (ring full after a cleanup, HW-29), -EINVAL
 * (nothing to do, HW-30; misaligned; outside 40 bits), -EBUSY (another prep is not submitted for 5 s). */
int mic_dma_prep_memcpy(struct mic_dma_chan *ch, uint64_t dst, uint64_t src, uint64_t len, unsigned flags);
/* Several copies as one transaction, carried out in their order; at least one piece. */
struct mic_dma_piece {
	uint64_t dst, src, len;
};
int mic_dma_prep_sg(struct mic_dma_chan *ch, const struct mic_dma_piece *pieces, unsigned count,
		    unsigned flags);
int mic_dma_prep_imm(struct mic_dma_chan *ch, uint64_t dst, uint64_t value, unsigned flags);
int mic_dma_prep_interrupt(struct mic_dma_chan *ch, unsigned flags);
/* The cookie (> 1) of what was prepared. token != 0 comes back once from mic_dma_take_done(). */
int mic_dma_submit(struct mic_dma_chan *ch, uint64_t token);
/* Take back what was prepared. */
void mic_dma_discard(struct mic_dma_chan *ch);
void mic_dma_issue_pending(struct mic_dma_chan *ch);

/* 1 complete, 0 in progress, -ECANCELED terminated, -EINVAL not a cookie. Polls the channel. As in
 * dmaengine, a cookie that was not assigned yet counts as complete: the counter wraps. */
int mic_dma_tx_status(struct mic_dma_chan *ch, int cookie);
/* Look at DSTAT and retire what is complete. */
void mic_dma_cleanup(struct mic_dma_chan *ch);
/* Tokens (below 2^63) of completed transactions, in order, each exactly once; returns how many.
 * Terminated ones come with this bit, so that their owner can forget them. */
#define MIC_DMA_TOKEN_DROPPED 0x8000000000000000
unsigned mic_dma_take_done(struct mic_dma_chan *ch, uint64_t *tokens, unsigned max);
unsigned mic_dma_done_pending(struct mic_dma_chan *ch);
/* Issue, then wait. 0, -ETIMEDOUT, -ECANCELED, -EINVAL; with `halt_fails` -EIO as soon as the
 * channel has halted. */
int mic_dma_wait(struct mic_dma_chan *ch, int cookie, int timeout_ms, bool halt_fails);
/* Drop all that is not complete. 0, or the channel stays disabled: -ETIMEDOUT when the engine does not let
 * go, -EIO when its tail register is no slot of the ring (until a card reset). */
int mic_dma_terminate(struct mic_dma_chan *ch, int timeout_ms);
/* Stand still after the descriptor in progress, with everything in place: 0 or -ETIMEDOUT. */
int mic_dma_pause(struct mic_dma_chan *ch, int timeout_ms);
void mic_dma_resume(struct mic_dma_chan *ch);
/* The primary handler: a card channel masks and unmasks (erratum, HW 5.6). */
void mic_dma_ack_interrupt(struct mic_dma_chan *ch);
bool mic_dma_halted(struct mic_dma_chan *ch);
void mic_dma_count(struct mic_dma_chan *ch, struct mic_dma_counters *out);
/* cffi-end */

/* --- descriptors, for the engine and its fuzzer (dma_desc.c) --------------------------------------
 *
 * Memory that fails under an access (a full /dev/shm, a file cut short) is the channel's error, not
 * the process's death: both calls below run guarded (src/guard.h), the engine installs the handler. */

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
/* Flip the bits of `mask` in byte `at` (modulo its length) of what the descriptor wrote. */
void mic_dma_spoil(struct mic_bus *bus, const uint64_t qw[2], uint32_t at, uint8_t mask);

#endif
