/* Fault filters (docs/faults.md): what the hardware of a card does wrong, on purpose.
 *
 * The host process writes filters into a small memory object of the card, which every process of the
 * card maps: board, backends, card OS. Whoever is about to do something that filters may act on (ring
 * a doorbell, run a descriptor, serve a disk request, move a frame) asks mic_fault_judge() when the
 * point is armed; otherwise that costs one load and one branch. Decisions depend on nothing but the
 * filter's seed and the number of the event, so that several threads and processes need no lock and
 * the same seed gives the same sequence.
 *
 * The card could write to the filters as well; it would only harm devices of its own. So readers check
 * what they use and nobody waits without an end. */
#ifndef MIC_FAULT_H
#define MIC_FAULT_H

#include <stdbool.h>
#include <stdint.h>

#include "mic/bus.h"

/* cffi-begin */
/* Something that happens. */
struct mic_fault_event {
	uint32_t point;  /* MIC_FAULT_AT_* */
	uint32_t target; /* device, or 1 << channel */
	uint32_t way;    /* one bit: MIC_FAULT_TO_*, at a disk MIC_FAULT_READ and so on */
	uint32_t toward; /* MIC_FAULT_TO_CARD or _TO_HOST: where its bytes cross the link, 0 = they do not */
	uint64_t bytes;
};

/* What all filters together make of it. */
struct mic_fault_verdict {
	bool drop, duplicate, skip, lose_interrupt, torn, torn_ok, hang, kill;
	uint32_t error;    /* DCHERR bits or errno, 0 = none */
	uint32_t spoil_at; /* corrupt: which byte, modulo their number, ... */
	uint8_t spoil;     /* ... and which bits to flip; 0 = none */
	uint64_t delay_ns;
	uint64_t again_ns; /* duplicate: after this time */
	uint64_t due_ns;   /* link: the bytes are there at this time (mic_now_ns()), 0 = no link filter */
	uint64_t keep;     /* torn: sectors that persist; UINT64_MAX: dice modulo the sectors of the write */
	uint64_t dice;
	uint32_t gap;               /* reorder: frames that overtake, 0 = none */
	const uint32_t *dropped_by; /* drop: the live id of the filter, ... */
	uint32_t dropped_id;        /* ... which was this */
};

/* Judge an event. Filters act in the order of their ids; one that drops ends the walk. Returns how many
 * acted; *v is complete in any case. */
unsigned mic_fault_judge(struct mic_bus *bus, const struct mic_fault_event *event,
			 struct mic_fault_verdict *v);
/* Is the next heartbeat of the card to be left out? For the card OS. */
bool mic_fault_drops_heartbeat(struct mic_bus *bus);
/* Ring each doorbell that filters have dropped once. A filter was removed before: a ring that asked for one
 * notification and lost it asks for no other (EVENT_IDX), and would stand still for ever. */
void mic_fault_ring_lost(struct mic_bus *bus);
/* Drop the doorbells that are on their way, forget those that were lost (reset). */
void mic_fault_forget_late(struct mic_bus *bus);

/* Rings late doorbells when they are due: one thread, in the board process. NULL with errno. */
struct mic_fault_clock;
struct mic_fault_clock *mic_fault_clock_start(struct mic_bus *bus);
void mic_fault_clock_stop(struct mic_fault_clock *clock);
/* cffi-end */

#endif
