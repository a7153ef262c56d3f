/* Adaptive spinning: look for work a little longer before sleeping, while that pays.
 *
 * Looking in vain costs tokens; they come back at 1/16 of the time that passes, so that spinning
 * never takes more than about 6 % of a CPU for nothing, and an idle device takes none. When another
 * thread wants this CPU (a yield does not come back at once) spinning stops for a while. */
#ifndef MIC_SPIN_H
#define MIC_SPIN_H

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>

#include "mic/barrier.h"
#include "mic/vring.h"

#define MIC_SPIN_TOKENS_MAX 2000000u /* ns */
#define MIC_SPIN_YIELD_NS 4000u      /* a yield that takes longer has run somebody else */
#define MIC_SPIN_BACKOFF_NS 5000000u

struct mic_spin {
	uint64_t slice;   /* ns, longest single look */
	uint64_t tokens;  /* ns that may be lost */
	uint64_t filled;  /* when tokens were last topped up */
	uint64_t begun;   /* start of the current look, 0 = not looking */
	uint64_t blocked; /* no looking before this time: the CPU is wanted */
};

static inline void mic_spin_init(struct mic_spin *s, unsigned spin_us)
{
	*s = (struct mic_spin){ .slice = spin_us * 1000ull, .tokens = MIC_SPIN_TOKENS_MAX };
	if (!mic_spin_allowed())
		s->slice = 0;
}

/* There was work: the look, if any, has paid. */
static inline void mic_spin_hit(struct mic_spin *s)
{
	s->begun = 0;
}

static inline void mic_spin_start(struct mic_spin *s, uint64_t now)
{
	s->tokens += (now - s->filled) / 16;
	if (s->tokens > MIC_SPIN_TOKENS_MAX)
		s->tokens = MIC_SPIN_TOKENS_MAX;
	s->filled = now;
	s->begun = now;
}

/* No work found: look again (true) or go to sleep (false)? */
static inline bool mic_spin_again(struct mic_spin *s)
{
	if (!s->slice)
		return false;
	uint64_t now = mic_now_ns();

	if (!s->begun) {
		if (now < s->blocked)
			return false;
		mic_spin_start(s, now);
	}
	uint64_t spent = now - s->begun;

	if (spent >= s->slice || spent >= s->tokens) {
		s->tokens -= spent < s->tokens ? spent : s->tokens;
		s->begun = 0;
		return false;
	}
	sched_yield();
	if (mic_now_ns() - now > MIC_SPIN_YIELD_NS) {
		/* Work may have come meanwhile, so one more look, but no more spinning for now. */
		s->blocked = now + MIC_SPIN_BACKOFF_NS;
		s->begun = 0;
		return true;
	}
	mic_cpu_relax();
	return true;
}

#endif
