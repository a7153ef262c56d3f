/* The two halves of "publish, then ask whether the peer sleeps".
 *
 * A sender asks after every message, a sleeper only when it falls asleep: so the sleeper pays. Its
 * heavy fence makes every CPU that runs a registered process pass a full fence (membarrier(2));
 * the light one then only has to keep the compiler in order. Where the system refuses the
 * registration, both are full fences. */
#ifndef LIBSCIF_FENCE_H
#define LIBSCIF_FENCE_H

#include <stdbool.h>

#include "mic/membarrier.h"

extern bool cheap_fence; /* this process is registered */

static inline void light_fence(void)
{
	if (cheap_fence)
		__asm__ __volatile__("" ::: "memory");
	else
		mic_full_fence();
}

static inline void heavy_fence(void)
{
	mic_fence_everywhere();
}

#endif
