#include "block_pool.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PAGE 4096u

static uint32_t pages_of(uint32_t len)
{
	return len / PAGE + (len % PAGE != 0);
}

int mic_blk_pool_init(struct mic_blk_pool *pool, uint64_t addr, uint64_t len)
{
	uint32_t pages = (uint32_t)(len / PAGE);

	*pool = (struct mic_blk_pool){.addr = addr, .pages = pages, .free = pages, .used = calloc(1, pages)};
	return pool->used ? 0 : -ENOMEM;
}

void mic_blk_pool_fini(struct mic_blk_pool *pool)
{
	free(pool->used);
}

uint64_t mic_blk_pool_alloc(struct mic_blk_pool *pool, uint32_t len)
{
	uint32_t want = pages_of(len), run = 0;

	/* First fit: what was used last is likely still in the cache. */
	for (uint32_t i = 0; want && want <= pool->free && i < pool->pages; i++) {
		run = pool->used[i] ? 0 : run + 1;
		if (run == want) {
			memset(pool->used + i + 1 - want, 1, want);
			pool->free -= want;
			return pool->addr + (uint64_t)(i + 1 - want) * PAGE;
		}
	}
	return 0;
}

void mic_blk_pool_free(struct mic_blk_pool *pool, uint64_t addr, uint32_t len)
{
	memset(pool->used + (addr - pool->addr) / PAGE, 0, pages_of(len));
	pool->free += pages_of(len);
}
