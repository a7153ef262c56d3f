/* Fault filters: which descriptors a sick card spoils, and how. The engine carries it out. */
#define _GNU_SOURCE
#include "dma_fault.h"

#include <errno.h>

#include "mic/barrier.h"

void fault_init(struct fault_filters *f)
{
	pthread_mutex_init(&f->lock, NULL);
}

void fault_destroy(struct fault_filters *f)
{
	pthread_mutex_destroy(&f->lock);
}

/* splitmix64: one multiplication chain, no bad seeds. */
static uint64_t roll(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15u;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
	z = (z ^ z >> 27) * 0x94d049bb133111ebu;
	return z ^ z >> 31;
}

static void apply(const struct mic_dma_fault *fault, uint64_t dice, struct fault_verdict *v)
{
	switch (fault->kind) {
	case MIC_DMA_FAULT_DELAY:
		v->delay_ns += fault->param;
		break;
	case MIC_DMA_FAULT_FAIL:
		v->error |= (uint32_t)fault->param;
		break;
	case MIC_DMA_FAULT_CORRUPT:
		v->spoil_at = (uint32_t)(dice >> 8);
		v->spoil = (uint8_t)dice ? (uint8_t)dice : 1;
		break;
	case MIC_DMA_FAULT_SKIP:
		v->skip = true;
		break;
	default:
		v->no_interrupt = true;
		break;
	}
}

bool fault_decide(struct fault_filters *f, unsigned c, struct fault_verdict *v)
{
	bool hit = false;

	if (!mic_load_acquire(&f->used))
		return false;
	*v = (struct fault_verdict){0};
	pthread_mutex_lock(&f->lock);
	for (unsigned i = 0; i < MIC_DMA_FAULTS; i++) {
		struct mic_dma_fault *fault = &f->slot[i];

		if (!(f->used & 1u << i) || !(fault->channels & 1u << c) ||
		    (fault->count && fault->hits >= fault->count))
			continue;
		if (fault->chance != UINT32_MAX && (uint32_t)roll(&fault->seed) >= fault->chance)
			continue;
		fault->hits++;
		apply(fault, roll(&fault->seed), v);
		hit = true;
	}
	pthread_mutex_unlock(&f->lock);
	return hit;
}

int fault_add(struct fault_filters *f, const struct mic_dma_fault *fault)
{
	int id = -ENOSPC;

	if (fault->kind < MIC_DMA_FAULT_DELAY || fault->kind > MIC_DMA_FAULT_NO_INTERRUPT ||
	    (fault->kind == MIC_DMA_FAULT_FAIL && !(uint32_t)fault->param))
		return -EINVAL;
	pthread_mutex_lock(&f->lock);
	for (int i = 0; i < MIC_DMA_FAULTS && id < 0; i++) {
		if (f->used & 1u << i)
			continue;
		f->slot[i] = *fault;
		f->slot[i].hits = 0;
		mic_store_release(&f->used, f->used | 1u << i);
		id = i;
	}
	pthread_mutex_unlock(&f->lock);
	return id;
}

static bool present(const struct fault_filters *f, int id)
{
	return id >= 0 && id < MIC_DMA_FAULTS && f->used & 1u << id;
}

int fault_remove(struct fault_filters *f, int id)
{
	int rc = -ENOENT;

	pthread_mutex_lock(&f->lock);
	if (present(f, id)) {
		mic_store_release(&f->used, f->used & ~(1u << id));
		rc = 0;
	}
	pthread_mutex_unlock(&f->lock);
	return rc;
}

int fault_get(struct fault_filters *f, int id, struct mic_dma_fault *out)
{
	int rc = -ENOENT;

	pthread_mutex_lock(&f->lock);
	if (present(f, id)) {
		*out = f->slot[id];
		rc = 0;
	}
	pthread_mutex_unlock(&f->lock);
	return rc;
}
