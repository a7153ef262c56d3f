/* The data pages of a virtio-blk driver in GDDR: runs of pages, first fit. The caller has the lock. */
#ifndef MIC_BLOCK_POOL_H
#define MIC_BLOCK_POOL_H

#include <stdint.h>

struct mic_blk_pool {
	uint64_t addr; /* GDDR */
	uint32_t pages, free;
	uint8_t *used; /* one byte per page */
};

/* ``len`` bytes of whole pages at ``addr``. 0 or -ENOMEM. */
int mic_blk_pool_init(struct mic_blk_pool *pool, uint64_t addr, uint64_t len);
void mic_blk_pool_fini(struct mic_blk_pool *pool);
/* GDDR address of pages for ``len`` bytes; 0 when there is no such run. */
uint64_t mic_blk_pool_alloc(struct mic_blk_pool *pool, uint32_t len);
void mic_blk_pool_free(struct mic_blk_pool *pool, uint64_t addr, uint32_t len);

#endif
