/* Accesses to shared memory that somebody may cut off: an error instead of the process's death.
 *
 * The handler is installed while anybody wants it; threads that use mic_guarded() keep SIGBUS open. */
#ifndef MIC_GUARD_H
#define MIC_GUARD_H

void mic_guard_get(void);
void mic_guard_put(void);
/* fn(arg), or `lost` when the memory under one of its accesses is gone. fn must own nothing: it is left in
 * the middle. Guards do not nest. */
int mic_guarded(int (*fn)(void *), void *arg, int lost);

#endif
