/* Fault filters as the data path sees them (fault.c, fault_late.c). */
#ifndef MIC_FAULT_INTERNAL_H
#define MIC_FAULT_INTERNAL_H

#include "bus_internal.h"
#include "mic/fault.h"

/* May a filter act at this point? One load of a word that hardly ever changes; only a hint, so relaxed. */
static inline bool fault_armed(const struct mic_bus *bus, unsigned point)
{
	return __builtin_expect(mic_load_relaxed(bus->armed) & 1u << point, 0);
}

/* Judge a doorbell; true: ring it now. */
bool mic_fault_ring(struct mic_bus *bus, int db, uint32_t source, bool to_host);
/* Ring it in `delay_ns`; false: there is no room, so it has to ring now. */
bool mic_fault_late_add(struct mic_bus *bus, int db, bool to_host, uint64_t delay_ns);

/* When an event with this verdict is over at the earliest (mic_now_ns()); 0: it is not held back. */
uint64_t fault_due(const struct mic_fault_verdict *v);
/* A timer descriptor for due times, or -errno; fault_timer_set() with 0 switches it off. */
int fault_timer_open(void);
void fault_timer_set(int fd, uint64_t due_ns);
/* Sleeping is too coarse for what is due sooner than this: look instead. */
#define FAULT_LOOK_NS 60000u

#endif
