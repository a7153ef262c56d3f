/* Fault filters: which events they act on, and how (docs/faults.md). */
#define _GNU_SOURCE
#include "fault.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "mic/vring.h"

#define ALWAYS  (1ull << 32)
#define MAX_NS  (3600ull * 1000000000ull) /* nobody is held back for more than an hour */
#define GOLDEN  0x9e3779b97f4a7c15ull
#define MAX_GAP 64u

static struct mic_fault_filter *filter_at(struct mic_bus *bus, unsigned i)
{
	return (struct mic_fault_filter *)(void *)(bus->faults.base + MIC_FAULT_FIRST) + i;
}

/* splitmix64's output function: number n of the sequence that a seed names. */
static uint64_t roll(uint64_t seed, uint64_t n)
{
	uint64_t z = seed * 0xd1342543de82ef95ull + (n + 1) * GOLDEN;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ z >> 27) * 0x94d049bb133111ebull;
	return z ^ z >> 31;
}

/* Count an event that matched; true when the filter acts on it. `dice` is the event's own number. */
static bool acts(struct mic_fault_filter *live, const struct mic_fault_filter *f, uint64_t *dice)
{
	uint64_t n = mic_fetch_add(&live->seen, 1ull), hits = mic_load_relaxed(&live->hits);

	*dice = roll(f->seed, n);
	if (n < f->after || (f->chance < ALWAYS && (*dice & UINT32_MAX) >= f->chance))
		return false;
	*dice = roll(~f->seed, n); /* independent of the decision */
	do {
		if (f->count && hits >= f->count)
			return false;
	} while (!mic_cas(&live->hits, &hits, hits + 1));
	return true;
}

/* Tell the host once; it looks when it has time and clears the mark (host/faults.py). */
static void tell_host(struct mic_bus *bus, struct mic_fault_filter *live)
{
	if (!mic_exchange(&live->notify, 1u))
		signal_fd(bus->fd[MIC_FD_FAULT_HIT]);
}

/* Occupy the link for some bytes; returns when they have arrived. Both directions are independent. */
static uint64_t transfer(struct mic_fault_filter *live, const struct mic_fault_filter *f,
			 const struct mic_fault_event *event)
{
	uint64_t *busy = event->toward == MIC_FAULT_TO_CARD ? &live->busy_to_card : &live->busy_to_host;
	uint64_t now = mic_now_ns(), old = mic_load_relaxed(busy), end, start;
	double wire = f->param0 ? (double)event->bytes * 1e9 / (double)f->param0 : 0;
	uint64_t ns = wire < (double)MAX_NS ? (uint64_t)wire : MAX_NS;

	do {
		start = old > now && old - now <= MAX_NS ? old : now;
		end = start + ns;
	} while (!mic_cas(busy, &old, end));
	return end + (f->param1 < MAX_NS ? f->param1 : MAX_NS);
}

static uint64_t wait_of(const struct mic_fault_filter *f, uint64_t dice)
{
	uint64_t ns = f->param0 < MAX_NS ? f->param0 : MAX_NS;

	return f->param1 && f->param1 < MAX_NS ? ns + dice % (f->param1 + 1) : ns;
}

static void apply(struct mic_fault_filter *live, const struct mic_fault_filter *f,
		  const struct mic_fault_event *event, uint64_t dice, struct mic_fault_verdict *v)
{
	uint64_t due;

	switch (f->effect) {
	case MIC_FAULT_DROP:
		v->drop = true;
		v->dropped_by = &live->id;
		v->dropped_id = f->id;
		break;
	case MIC_FAULT_DELAY:
		v->delay_ns += wait_of(f, dice);
		break;
	case MIC_FAULT_DUPLICATE:
		v->duplicate = true;
		v->again_ns = wait_of(f, dice);
		break;
	case MIC_FAULT_FAIL:
		v->error |= (uint32_t)f->param0;
		break;
	case MIC_FAULT_CORRUPT:
		v->spoil_at = (uint32_t)(dice >> 8);
		v->spoil = (uint8_t)dice ? (uint8_t)dice : 1;
		break;
	case MIC_FAULT_SKIP:
		v->skip = true;
		break;
	case MIC_FAULT_LOSE_INTERRUPT:
		v->lose_interrupt = true;
		break;
	case MIC_FAULT_TORN:
		v->torn = true;
		v->torn_ok = f->param1;
		v->keep = f->param0 - 1; /* 0 becomes UINT64_MAX: the dice decide */
		v->dice = dice;
		break;
	case MIC_FAULT_REORDER:
		v->gap = f->param0 && f->param0 < MAX_GAP ? (uint32_t)f->param0 : 1;
		break;
	case MIC_FAULT_HANG:
		v->hang = true;
		break;
	case MIC_FAULT_KILL:
		v->kill = true;
		break;
	case MIC_FAULT_LINK:
		due = transfer(live, f, event);
		v->due_ns = due > v->due_ns ? due : v->due_ns;
		break;
	default:
		break;
	}
}

static bool concerns(const struct mic_fault_filter *f, const struct mic_fault_event *event)
{
	bool target =
		f->target == MIC_FAULT_ANY ||
		(event->point == MIC_FAULT_AT_DMA ? f->target & event->target : f->target == event->target);

	if (f->effect == MIC_FAULT_LINK)
		return f->points & 1u << event->point && event->toward;
	return target && f->points & 1u << event->point && f->ways & event->way;
}

/* A private copy, word by word: the counters among them change all the time. */
static void copy_filter(struct mic_fault_filter *to, const struct mic_fault_filter *from)
{
	const uint64_t *src = (const uint64_t *)(const void *)from;
	uint64_t word[sizeof *to / sizeof(uint64_t)];

	/* Acquire: in order, and before the caller looks at the id again. */
	for (unsigned i = 0; i < sizeof word / sizeof word[0]; i++)
		word[i] = mic_load_acquire(&src[i]);
	memcpy(to, word, sizeof *to);
}

/* The live filters that concern an event, in the order of their ids: copies, and where they are. */
static unsigned collect(struct mic_bus *bus, const struct mic_fault_event *event,
			struct mic_fault_filter *copy, struct mic_fault_filter **live)
{
	unsigned n = 0;

	for (unsigned i = 0; i < MIC_FAULT_SLOTS; i++) {
		struct mic_fault_filter *f = filter_at(bus, i), c;
		uint32_t id = mic_load_acquire(&f->id);

		if (!id)
			continue;
		copy_filter(&c, f);
		/* Removed or replaced meanwhile: it does not act any more. */
		if (mic_load_acquire(&f->id) != id || !concerns(&c, event))
			continue;
		c.id = id;
		unsigned at = n++;

		for (; at && copy[at - 1].id > id; at--) {
			copy[at] = copy[at - 1];
			live[at] = live[at - 1];
		}
		copy[at] = c;
		live[at] = f;
	}
	return n;
}

unsigned mic_fault_judge(struct mic_bus *bus, const struct mic_fault_event *event,
			 struct mic_fault_verdict *v)
{
	struct mic_fault_filter copy[MIC_FAULT_SLOTS], *live[MIC_FAULT_SLOTS];
	unsigned n = collect(bus, event, copy, live), hit = 0;
	uint64_t dice;

	*v = (struct mic_fault_verdict){0};
	for (unsigned i = 0; i < n && !v->drop; i++) {
		if (!acts(live[i], &copy[i], &dice))
			continue;
		hit++;
		apply(live[i], &copy[i], event, dice, v);
		if (copy[i].effect != MIC_FAULT_LINK) /* every transfer is one: no news */
			tell_host(bus, live[i]);
	}
	return hit;
}

bool mic_fault_drops_heartbeat(struct mic_bus *bus)
{
	const struct mic_fault_event event = {
		.point = MIC_FAULT_AT_HEARTBEAT, .target = MIC_FAULT_ANY, .way = MIC_FAULT_TO_HOST};
	struct mic_fault_verdict v;

	return fault_armed(bus, MIC_FAULT_AT_HEARTBEAT) && mic_fault_judge(bus, &event, &v) && v.drop;
}

/* The card OS ends or stops at this doorbell: it alone rings the host. As pid 1 of the card it is deaf to its
 * own signals; then it exits, or holds still until the host process, which was told, has stopped it. */
static void stop_here(bool for_good)
{
	const struct timespec until_stopped = {.tv_sec = 1};

	kill(getpid(), for_good ? SIGKILL : SIGSTOP);
	if (for_good)
		_exit(128 + SIGKILL);
	nanosleep(&until_stopped, NULL);
}

static uint32_t *lost_word(struct mic_bus *bus, bool to_host)
{
	return (uint32_t *)(void *)(bus->faults.base +
				    (to_host ? MIC_FAULT_LOST_TO_HOST : MIC_FAULT_LOST_TO_CARD));
}

/* False: the filter was removed meanwhile, so it must ring after all. */
static bool note_lost(struct mic_bus *bus, int db, bool to_host, const struct mic_fault_verdict *v)
{
	if (db >= 0 && db < 32)
		(void)mic_fetch_or(lost_word(bus, to_host), 1u << db);
	/* Noted before the last look: pairs with the fence in mic_fault_ring_lost(). */
	mic_full_fence();
	return mic_load_relaxed(v->dropped_by) == v->dropped_id;
}

void mic_fault_ring_lost(struct mic_bus *bus)
{
	mic_full_fence();
	uint32_t to_card = mic_exchange(lost_word(bus, false), 0u),
		 to_host = mic_exchange(lost_word(bus, true), 0u);

	for (int db = 0; db < 32; db++) {
		if (to_card & 1u << db)
			mic_ring_card_now(bus, db);
		if (to_host & 1u << db)
			mic_ring_host_now(bus, db);
	}
}

bool mic_fault_ring(struct mic_bus *bus, int db, uint32_t source, bool to_host)
{
	const struct mic_fault_event event = {.point = MIC_FAULT_AT_DOORBELL,
					      .target = source,
					      .way = to_host ? MIC_FAULT_TO_HOST : MIC_FAULT_TO_CARD};
	struct mic_fault_verdict v;

	if (!mic_fault_judge(bus, &event, &v))
		return true;
	if (to_host && (v.kill || v.hang))
		stop_here(v.kill);
	if (v.drop)
		return !note_lost(bus, db, to_host, &v);
	if (v.duplicate)
		mic_fault_late_add(bus, db, to_host, v.delay_ns + v.again_ns);
	return !v.delay_ns || !mic_fault_late_add(bus, db, to_host, v.delay_ns);
}

/* --- due times -------------------------------------------------------------------------------- */

uint64_t fault_due(const struct mic_fault_verdict *v)
{
	uint64_t due = v->delay_ns ? mic_now_ns() + v->delay_ns : 0;

	return due > v->due_ns ? due : v->due_ns;
}

int fault_timer_open(void)
{
	int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);

	return fd < 0 ? -errno : fd;
}

void fault_timer_set(int fd, uint64_t due_ns)
{
	struct itimerspec at = {.it_value = {.tv_sec = (time_t)(due_ns / 1000000000u),
					     .tv_nsec = (long)(due_ns % 1000000000u)}};

	timerfd_settime(fd, TFD_TIMER_ABSTIME, &at, NULL);
}
