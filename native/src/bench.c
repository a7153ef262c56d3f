/* Yardsticks for `micemu bench`. */
#include "mic/bench.h"

#include <string.h>

#include "mic/barrier.h"
#include "mic/vring.h"

uint64_t mic_bench_memcpy(void *dst, const void *src, uint64_t len, uint64_t area, uint64_t count)
{
	uint64_t start = mic_now_ns(), off = 0;

	for (; count; count--) {
		memcpy((uint8_t *)dst + off, (const uint8_t *)src + off, len);
		mic_signal_fence(); /* the copy must happen, every time */
		off = off + 2 * len <= area ? off + len : 0;
	}
	return mic_now_ns() - start;
}
