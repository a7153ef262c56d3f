/* A DMA channel's driver: dma_drv.c (set-up, waiting, ending) and dma_submit.c (prepare, submit,
 * complete). */
#ifndef MIC_DMA_DRV_H
#define MIC_DMA_DRV_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "mic/barrier.h"
#include "mic/dma.h"

#define FIRST_COOKIE 1 /* the counter's start: never assigned, counts as complete */

struct record {
	int32_t cookie; /* 0: this slot is not the last one of a transaction */
	uint64_t token;
};

struct mic_dma_chan {
	struct mic_bus *bus;
	struct mic_dma_setup setup;
	uint64_t *ring;
	struct record *records; /* by slot; under `clean` */
	uint32_t *end_slot;     /* by cookie modulo size: the count at which it is complete */

	/* Prep side. `preparing` is held from prep to submit, across threads if the caller likes. */
	pthread_mutex_t prep;
	pthread_cond_t prep_free;
	bool preparing;
	uint32_t head;       /* next slot to fill */
	uint32_t prep_start; /* head before the transaction in preparation */
	uint64_t prep_bytes;
	int32_t cookie; /* last assigned */

	pthread_mutex_t issue;
	uint32_t submitted; /* head of the last submitted transaction */
	uint32_t issued;    /* last value written to DHPR */

	pthread_mutex_t clean;
	uint32_t last_tail; /* slots before it are free again: published after its records are read */
	int32_t completed;
	int32_t cancel_from, cancel_to; /* cookies in (from, to] were terminated */
	uint64_t *done; /* tokens for take_done(): a queue that grows while nobody takes any */
	uint32_t done_room, done_head, done_count;

	struct mic_dma_counters count;
};

static inline uint32_t read_status(struct mic_dma_chan *ch)
{
	return mic_mmio_read(ch->bus, MIC_REG_DSTAT(ch->setup.c));
}

static inline uint32_t distance(const struct mic_dma_chan *ch, uint32_t from, uint32_t to)
{
	return to >= from ? to - from : to + ch->setup.size - from;
}

static inline uint32_t next_slot(const struct mic_dma_chan *ch, uint32_t slot)
{
	return slot + 1 == ch->setup.size ? 0 : slot + 1;
}

/* Take the prep side and see to `need` free slots, with one cleanup if they are short. */
int dma_prep_take(struct mic_dma_chan *ch, uint64_t need);
void dma_prep_release(struct mic_dma_chan *ch);
/* Retire what is complete; with `clean` held. */
void dma_cleanup_locked(struct mic_dma_chan *ch);
/* Forget everything that is submitted and not complete; with `issue` and `clean` held. */
void dma_drop_records(struct mic_dma_chan *ch);

#endif
