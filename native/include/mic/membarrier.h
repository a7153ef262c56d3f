/* The expensive half of "publish, then ask whether the other side sleeps", for those who sleep seldom. */
#ifndef MIC_MEMBARRIER_H
#define MIC_MEMBARRIER_H

#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "mic/barrier.h"

/* A full fence here and on every CPU that runs a process registered for it: programs with libscif, whose own
 * half then costs nothing (libscif/fence.h). */
static inline void mic_fence_everywhere(void)
{
	mic_full_fence();
	(void)syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL_EXPEDITED, 0, 0);
}

#endif
