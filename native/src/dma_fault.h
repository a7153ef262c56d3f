/* Fault filters of an engine (dma_fault.c). */
#ifndef MIC_DMA_FAULT_H
#define MIC_DMA_FAULT_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "mic/dma.h"

struct fault_filters {
	pthread_mutex_t lock;
	uint32_t used; /* bit per slot; read without the lock: 0 keeps the common path free of it */
	struct mic_dma_fault slot[MIC_DMA_FAULTS];
};

/* What the filters decided about one descriptor. */
struct fault_verdict {
	uint64_t delay_ns;
	uint32_t error; /* DCHERR bits, 0 = go on */
	uint32_t spoil_at;
	uint8_t spoil; /* bits to flip, 0 = none */
	bool skip, no_interrupt;
};

void fault_init(struct fault_filters *f);
void fault_destroy(struct fault_filters *f);
/* True when any filter hit. */
bool fault_decide(struct fault_filters *f, unsigned c, struct fault_verdict *v);
int fault_add(struct fault_filters *f, const struct mic_dma_fault *fault);
int fault_remove(struct fault_filters *f, int id);
int fault_get(struct fault_filters *f, int id, struct mic_dma_fault *out);

#endif
