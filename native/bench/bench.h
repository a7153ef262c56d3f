/* What the benchmark loops and their yardsticks have in common. */
#ifndef BENCH_H
#define BENCH_H

#include <stdint.h>

#include "mic/vring.h"

/* Compute for so long. */
void bench_pause(uint64_t ns);
/* Sorts. */
double bench_median(uint64_t *ns, uint64_t count);
/* Count up a word there and back: half a round trip, nanoseconds. */
double bench_flag(uint64_t count, int serve, uint64_t *own, uint64_t *peer);

#endif
