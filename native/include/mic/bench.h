/* Yardsticks for `micemu bench`: what the bare machine does with the same pages. */
#ifndef MIC_BENCH_H
#define MIC_BENCH_H

#include <stdint.h>

/* cffi-begin */
/* memcpy `len` bytes `count` times, walking through areas of `area` bytes (a multiple of len) from
 * the start again and again. Returns the nanoseconds it took. */
uint64_t mic_bench_memcpy(void *dst, const void *src, uint64_t len, uint64_t area, uint64_t count);
/* cffi-end */

#endif
