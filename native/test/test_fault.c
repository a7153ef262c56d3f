/* Fault filters with several threads at once: counts are exact, removal is safe, late doorbells arrive. */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <stdint.h>

#include "harness.h"
#include "lab.h"
#include "mic/barrier.h"
#include "mic/fault.h"

#define THREADS 4
#define EVENTS  20000u

static struct mic_fault_filter *slot(struct lab *lab, unsigned i)
{
	return (struct mic_fault_filter *)(void *)(mic_bus_faults(lab->bus) + MIC_FAULT_FIRST) + i;
}

/* As mic_emu/faults.py does it: the fields, then the id. */
static void install(struct lab *lab, unsigned i, uint32_t id, const struct mic_fault_filter *f)
{
	const uint64_t *src = (const uint64_t *)(const void *)f;
	uint64_t *dst = (uint64_t *)(void *)slot(lab, i);

	for (unsigned w = 1; w < sizeof *f / 8; w++)
		mic_store_release(&dst[w], src[w]);
	mic_store_release(&slot(lab, i)->effect, f->effect);
	mic_store_release(&slot(lab, i)->id, id);
	mic_store_release((uint32_t *)(void *)mic_bus_faults(lab->bus), UINT32_MAX);
}

static void take_out(struct lab *lab, unsigned i)
{
	mic_store_release(&slot(lab, i)->id, 0u);
}

static const struct mic_fault_filter drop = {.effect = MIC_FAULT_DROP,
					     .points = 1u << MIC_FAULT_AT_DISK,
					     .target = MIC_FAULT_ANY,
					     .ways = MIC_FAULT_READ,
					     .chance = 1ull << 31,
					     .count = 1000,
					     .seed = 7};
static const struct mic_fault_event event = {.point = MIC_FAULT_AT_DISK,
					     .target = 24,
					     .way = MIC_FAULT_READ,
					     .toward = MIC_FAULT_TO_CARD,
					     .bytes = 512};

struct judge {
	struct lab *lab;
	uint64_t drops;
};

static void *judge_many(void *arg)
{
	struct judge *j = arg;
	struct mic_fault_verdict v;

	for (unsigned i = 0; i < EVENTS; i++) {
		mic_fault_judge(j->lab->bus, &event, &v);
		j->drops += v.drop;
	}
	return NULL;
}

static uint64_t judge_in_threads(struct lab *lab)
{
	struct judge j[THREADS];
	pthread_t t[THREADS];
	uint64_t drops = 0;

	for (unsigned i = 0; i < THREADS; i++) {
		j[i] = (struct judge){.lab = lab};
		pthread_create(&t[i], NULL, judge_many, &j[i]);
	}
	for (unsigned i = 0; i < THREADS; i++) {
		pthread_join(t[i], NULL);
		drops += j[i].drops;
	}
	return drops;
}

TEST(count_and_seen_are_exact_with_four_threads)
{
	struct lab lab;

	lab_open(&lab, MIB, MIB);
	install(&lab, 3, 1, &drop);
	CHECK(judge_in_threads(&lab) == 1000);
	CHECK(slot(&lab, 3)->hits == 1000);
	CHECK(slot(&lab, 3)->seen == THREADS * EVENTS);
	CHECK(lab_rang(lab.fds[MIC_FD_FAULT_HIT]) == 1);
	lab_close(&lab);
}

TEST(which_events_are_hit_does_not_depend_on_who_asks)
{
	struct mic_fault_filter half = drop;
	struct lab lab;

	half.count = 0;
	lab_open(&lab, MIB, MIB);
	install(&lab, 0, 1, &half);
	uint64_t first = judge_in_threads(&lab);

	take_out(&lab, 0);
	install(&lab, 5, 2, &half);
	CHECK(judge_in_threads(&lab) == first);
	CHECK(first > THREADS * EVENTS * 49 / 100 && first < THREADS * EVENTS * 51 / 100);
	lab_close(&lab);
}

static void *come_and_go(void *arg)
{
	struct lab *lab = arg;
	struct mic_fault_filter f = drop;

	for (uint32_t n = 0; n < 5000; n++) {
		f.effect = 1 + n % (MIC_FAULT_REORDER);
		f.seed = n;
		install(lab, n % MIC_FAULT_SLOTS, n + 1, &f);
		take_out(lab, (n + 7) % MIC_FAULT_SLOTS);
	}
	return NULL;
}

TEST(filters_come_and_go_while_events_are_judged)
{
	struct lab lab;
	pthread_t t;

	lab_open(&lab, MIB, MIB);
	pthread_create(&t, NULL, come_and_go, &lab);
	judge_in_threads(&lab);
	pthread_join(t, NULL);
	lab_close(&lab);
}

static void *ring_many(void *arg)
{
	struct lab *lab = arg;

	for (int i = 0; i < 2000; i++)
		mic_ring_card(lab->bus, i & 3, 0);
	return NULL;
}

TEST(late_doorbells_of_two_threads_all_leave)
{
	const struct mic_fault_filter late = {.effect = MIC_FAULT_DELAY,
					      .points = 1u << MIC_FAULT_AT_DOORBELL,
					      .target = MIC_FAULT_ANY,
					      .ways = MIC_FAULT_TO_CARD,
					      .chance = 1ull << 32,
					      .param0 = 10000};
	struct lab lab;
	pthread_t t[2];
	struct pollfd p = {.events = POLLIN};
	bool free_again = false;

	lab_open(&lab, MIB, MIB);
	install(&lab, 0, 1, &late);
	struct mic_fault_clock *clock = mic_fault_clock_start(lab.bus);

	CHECK(clock);
	for (unsigned i = 0; i < 2; i++)
		pthread_create(&t[i], NULL, ring_many, &lab);
	for (unsigned i = 0; i < 2; i++)
		pthread_join(t[i], NULL);
	p.fd = lab.fds[MIC_FD_IRQ];
	CHECK(poll(&p, 1, 5000) == 1);
	for (int ms = 0; ms < 5000 && !free_again; ms++) {
		const uint8_t *late_at = mic_bus_faults(lab.bus) + MIC_FAULT_LATE_FIRST;

		free_again = true;
		for (unsigned i = 0; i < MIC_FAULT_LATE_SLOTS; i++)
			free_again &= !mic_load_acquire(
				&((const struct mic_fault_late *)(const void *)late_at)[i].state);
		poll(NULL, 0, 1);
	}
	CHECK(free_again);
	mic_fault_clock_stop(clock);
	lab_close(&lab);
}
