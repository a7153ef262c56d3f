/* The DMA engine and its driver half with many threads (HW-22..35, 52). */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>

#include "harness.h"
#include "lab.h"
#include "mic/barrier.h"
#include "mic/dma.h"
#include "mic/vring.h"

#define RING       1024u
#define RING_BYTES (RING * 16 + 4096)
#define RINGS      (32 * MIB) /* where the rings lie, in both memories */

struct rig {
	struct lab lab;
	struct mic_dma_engine *engine;
};

static void rig_open(struct rig *r)
{
	lab_open(&r->lab, 64 * MIB, 64 * MIB);
	r->engine = mic_dma_engine_start(r->lab.bus);
	if (!r->engine)
		abort();
}

static void rig_close(struct rig *r)
{
	mic_dma_engine_stop(r->engine);
	lab_close(&r->lab);
}

static struct mic_dma_chan *channel_at(struct rig *r, unsigned c, int cookie)
{
	uint64_t memory = RINGS + c * RING_BYTES, base = memory + (c < 4 ? MIC_SMPT_BASE : 0);
	struct mic_dma_setup s = {.ring = base,
				  .memory = memory,
				  .status = base + RING * 16,
				  .size = RING,
				  .c = c,
				  .cookie = cookie,
				  .max_bytes = c < 4 ? MIC_DMA_HOST_MAX : MIC_DMA_CARD_MAX};

	return mic_dma_chan_create(r->lab.bus, &s);
}

static struct mic_dma_chan *channel(struct rig *r, unsigned c)
{
	return channel_at(r, c, 0);
}

static void close_channel(struct mic_dma_chan *ch)
{
	mic_dma_chan_stop(ch, 1000);
	mic_dma_chan_destroy(ch);
}

struct client {
	struct rig *rig;
	struct mic_dma_chan *ch;
	unsigned id;
};

/* Copies 16 KiB pieces of its own area to host memory and back, and compares. */
static void *copy_and_compare(void *arg)
{
	struct client *cl = arg;
	uint64_t area = cl->id * MIB, host = MIC_SMPT_BASE + area;
	uint8_t *mem = mic_bus_gddr(cl->rig->lab.bus) + area;
	uint64_t seed = cl->id;

	for (int round = 0; round < 150; round++) {
		uint64_t len = (1 + lab_random(&seed) % 1024) * 64;
		int cookie;

		memset(mem, round, len);
		memset(mem + MIB / 2, 0xee, len + 64);
		CHECK_IN_THREAD(mic_dma_prep_memcpy(cl->ch, host, area, len, 0) == 0);
		CHECK_IN_THREAD(mic_dma_submit(cl->ch, 0) > 0);
		CHECK_IN_THREAD(
			mic_dma_prep_memcpy(cl->ch, area + MIB / 2, host, len, MIC_DMA_PREP_INTERRUPT) == 0);
		cookie = mic_dma_submit(cl->ch, 1);
		CHECK_IN_THREAD(cookie > 0);
		CHECK_IN_THREAD(mic_dma_wait(cl->ch, cookie, 20000, true) == 0);
		CHECK_IN_THREAD(memcmp(mem, mem + MIB / 2, len) == 0 && mem[MIB / 2 + len] == 0xee);
	}
	return NULL;
}

TEST(hw_24_eight_channels_at_once)
{
	struct rig r;
	struct client cl[8];
	pthread_t t[8];

	rig_open(&r);
	for (unsigned c = 0; c < 8; c++) {
		cl[c] = (struct client){.rig = &r, .ch = channel(&r, c), .id = c};
		CHECK(cl[c].ch);
	}
	for (unsigned c = 0; c < 8; c++)
		pthread_create(&t[c], NULL, copy_and_compare, &cl[c]);
	for (unsigned c = 0; c < 8; c++) {
		pthread_join(t[c], NULL);
		close_channel(cl[c].ch);
	}
	rig_close(&r);
}

TEST(hw_28_four_clients_of_one_channel)
{
	struct rig r;
	struct client cl[4];
	pthread_t t[4];
	uint64_t tokens[64], n = 0;
	struct mic_dma_counters count;

	rig_open(&r);
	struct mic_dma_chan *ch = channel(&r, 0);

	CHECK(ch);
	for (unsigned i = 0; i < 4; i++) {
		cl[i] = (struct client){.rig = &r, .ch = ch, .id = i};
		pthread_create(&t[i], NULL, copy_and_compare, &cl[i]);
	}
	for (unsigned i = 0; i < 4; i++)
		pthread_join(t[i], NULL);
	mic_dma_cleanup(ch);
	for (unsigned k; (k = mic_dma_take_done(ch, tokens, 64)); n += k)
		;
	mic_dma_count(ch, &count);
	CHECK(n == 600 && count.transactions == 1200 && count.completed == 1200);
	close_channel(ch);
	rig_close(&r);
}

TEST(hw_52_resets_under_load)
{
	/* After a reset nothing moves: memory that is written then stays as it is. */
	struct rig r;
	uint8_t *mem;

	rig_open(&r);
	mem = mic_bus_gddr(r.lab.bus);
	for (int round = 0; round < 40; round++) {
		struct mic_dma_chan *ch[8];

		memset(mem, 1, MIB);
		for (unsigned c = 0; c < 8; c++) {
			ch[c] = channel(&r, c);
			CHECK(ch[c]);
			for (int i = 0; i < 20; i++) {
				CHECK(mic_dma_prep_memcpy(ch[c], (1 + c) * MIB, 0, MIB - 64,
							  MIC_DMA_PREP_INTERRUPT) == 0);
				CHECK(mic_dma_submit(ch[c], 0) > 0);
			}
			mic_dma_issue_pending(ch[c]);
		}
		mic_dma_engine_reset(r.engine);
		mic_hw_reset(r.lab.bus);
		for (uint32_t i = 0; i < MIC_SMPT_ENTRIES; i++)
			mic_mmio_write(r.lab.bus, MIC_REG_SMPT(i), i << 2);
		memset(mem + MIB, 0, 8 * MIB);
		for (unsigned c = 0; c < 8; c++) {
			CHECK(mic_mmio_read(r.lab.bus, MIC_REG_DSTAT(c)) == 0);
			mic_dma_chan_destroy(ch[c]);
		}
		for (size_t i = MIB; i < 9 * MIB; i += 4096)
			CHECK(mem[i] == 0);
		for (int f = MIC_FD_VEC; f < MIC_FD_COUNT; f++)
			CHECK(f >= MIC_FD_CHAN || lab_rang(r.lab.fds[f]) == 0);
	}
	rig_close(&r);
}

TEST(hw_22_engine_starts_and_stops)
{
	struct rig r;

	lab_open(&r.lab, 64 * MIB, 64 * MIB);
	for (int i = 0; i < 30; i++) {
		r.engine = mic_dma_engine_start(r.lab.bus);
		CHECK(r.engine);
		mic_dma_engine_reset(r.engine);
		struct mic_dma_chan *ch = channel(&r, 5);

		CHECK(ch);
		for (int k = 0; k < 10; k++) {
			CHECK(mic_dma_prep_memcpy(ch, MIB, 0, MIB, 0) == 0);
			CHECK(mic_dma_submit(ch, 0) > 0);
		}
		mic_dma_issue_pending(ch);
		mic_dma_engine_stop(r.engine); /* in the middle of it */
		mic_dma_chan_destroy(ch);
	}
	lab_close(&r.lab);
}

TEST(hw_31_failing_memory_is_an_error_of_its_channel)
{
	struct rig r;

	rig_open(&r);
	struct mic_dma_chan *bad = channel(&r, 4), *good = channel(&r, 5);

	CHECK(bad && good);
	CHECK(ftruncate(r.lab.fds[MIC_FD_HOST], (off_t)MIB) == 0);
	for (int i = 0; i < 3; i++) {
		CHECK(mic_dma_prep_memcpy(bad, MIC_SMPT_BASE + 8 * MIB, 0, 64 * KIB, 0) == 0);
		CHECK(mic_dma_wait(bad, mic_dma_submit(bad, 0), 5000, true) == -EIO);
		CHECK(mic_mmio_read(r.lab.bus, MIC_REG_DCHERR(4)) == MIC_DMA_ERR_MEMORY);
		CHECK(mic_dma_prep_memcpy(good, MIC_SMPT_BASE, 0, 64 * KIB, 0) == 0);
		CHECK(mic_dma_wait(good, mic_dma_submit(good, 0), 5000, true) == 0);
	}
	close_channel(bad);
	close_channel(good);
	rig_close(&r);
}

static void *terminate_often(void *arg)
{
	struct mic_dma_chan *ch = arg;

	for (int i = 0; i < 200; i++)
		CHECK_IN_THREAD(mic_dma_terminate(ch, 5000) == 0);
	return NULL;
}

TEST(hw_28_terminate_races_with_clients)
{
	/* Every transaction ends in exactly one of: completed, terminated; every token comes back. */
	struct rig r;
	pthread_t t;
	uint64_t tokens[64], completed = 0, dropped = 0, submitted = 0;

	rig_open(&r);
	struct mic_dma_chan *ch = channel(&r, 6);

	CHECK(ch);
	pthread_create(&t, NULL, terminate_often, ch);
	for (int i = 0; i < 3000; i++) {
		int rc = mic_dma_prep_memcpy(ch, MIB, 0, 4096, MIC_DMA_PREP_INTERRUPT);

		CHECK(rc == 0 || rc == -ENOMEM);
		if (rc)
			continue;
		int cookie = mic_dma_submit(ch, ++submitted);

		CHECK(cookie > 0);
		if (i % 5 == 0) {
			rc = mic_dma_wait(ch, cookie, 10000, true);
			CHECK(rc == 0 || rc == -ECANCELED);
		}
	}
	pthread_join(t, NULL);
	CHECK(mic_dma_terminate(ch, 5000) == 0);
	for (unsigned k; (k = mic_dma_take_done(ch, tokens, 64));)
		for (unsigned i = 0; i < k; i++)
			*(tokens[i] >> 63 ? &dropped : &completed) += 1;
	CHECK(completed + dropped == submitted);
	close_channel(ch);
	rig_close(&r);
}

TEST(hw_33_a_tail_outside_the_ring_is_believed_by_nobody)
{
	/* The other side can write DTPR; what lies behind the ring and the driver's records is not the
	 * channel's. */
	struct rig r;

	rig_open(&r);
	struct mic_dma_chan *ch = channel(&r, 1), *good = channel(&r, 2);

	CHECK(ch && good);
	CHECK(mic_dma_prep_memcpy(ch, MIB, 0, 4096, 0) == 0 && mic_dma_submit(ch, 0) > 0);
	CHECK(mic_dma_pause(ch, 1000) == 0);
	for (uint32_t tail = RING; tail; tail <<= 1) {
		mic_hw_store(r.lab.bus, MIC_REG_DTPR(1), tail);
		CHECK(mic_dma_terminate(ch, 1000) == -EIO);
		CHECK(mic_dma_prep_imm(ch, 0x1000, 1, 0) == 0);
		CHECK(mic_dma_submit(ch, 0) > 0);
		mic_dma_issue_pending(ch);
		errno = 0;
		CHECK(!channel(&r, 1) && errno == EBUSY);
	}
	mic_hw_store(r.lab.bus, MIC_REG_DTPR(1), RING - 1);
	CHECK(mic_dma_terminate(ch, 1000) == 0);
	CHECK(mic_dma_prep_imm(ch, 0x1000, 7, 0) == 0);
	CHECK(mic_dma_wait(ch, mic_dma_submit(ch, 0), 5000, true) == 0);
	CHECK(mic_dma_prep_imm(good, 0x2000, 7, 0) == 0);
	CHECK(mic_dma_wait(good, mic_dma_submit(good, 0), 5000, true) == 0);
	close_channel(ch);
	close_channel(good);
	rig_close(&r);
}

TEST(hw_35_interrupts_of_a_busy_channel)
{
	/* The handler masks, unmasks and looks: with every interrupt taken, no completion stays unseen. */
	struct rig r;
	int seen = 0;
	uint64_t token;

	rig_open(&r);
	struct mic_dma_chan *ch = channel(&r, 7);

	CHECK(ch);
	for (int i = 0; i < 2000; i++) {
		CHECK(mic_dma_prep_imm(ch, 0x1000, (uint64_t)i, MIC_DMA_PREP_INTERRUPT) == 0);
		CHECK(mic_dma_submit(ch, 1) > 0);
		mic_dma_issue_pending(ch);
		if (i % 3)
			continue; /* the ring holds 1024: several may be under way */
		while (seen <= i) {
			int fd = r.lab.fds[MIC_FD_IRQ + MIC_CARD_IRQ_DMA + 3],
			    ready = mic_wait_fds(&fd, 1, 10000);

			CHECK(ready == 1);
			lab_rang(fd);
			mic_dma_ack_interrupt(ch);
			mic_dma_cleanup(ch);
			while (mic_dma_take_done(ch, &token, 1))
				seen++;
		}
	}
	close_channel(ch);
	rig_close(&r);
}

TEST(hw_28_cookies_wrap_to_one)
{
	/* After INT32_MAX comes 1, never 0 or less; order and completion hold across the wrap. */
	struct rig r;
	int cookies[40], last;

	rig_open(&r);
	struct mic_dma_chan *ch = channel_at(&r, 3, INT32_MAX - 20);

	CHECK(ch);
	CHECK(mic_dma_pause(ch, 1000) == 0);
	for (int i = 0; i < 40; i++) {
		CHECK(mic_dma_prep_imm(ch, 0x1000, (uint64_t)i, 0) == 0);
		cookies[i] = mic_dma_submit(ch, 0);
		CHECK(cookies[i] == (i < 20 ? INT32_MAX - 19 + i : i - 19));
	}
	for (int i = 0; i < 40; i++)
		CHECK(mic_dma_tx_status(ch, cookies[i]) == 0);
	mic_dma_resume(ch);
	last = cookies[39];
	CHECK(mic_dma_wait(ch, last, 5000, true) == 0);
	for (int i = 0; i < 40; i++)
		CHECK(mic_dma_tx_status(ch, cookies[i]) == 1);
	close_channel(ch);
	rig_close(&r);
}

struct sleeper {
	struct lab *lab;
	uint32_t asked; /* the count that it waits for; the engine runs to it */
	uint32_t overslept;
};

#define SLEEPS         200000u
#define SLEEP_LIMIT_MS 3000u

static void *sleep_for_each_count(void *arg)
{
	struct sleeper *s = arg;
	struct mic_bus *bus = s->lab->bus;

	for (uint32_t n = 1; n <= SLEEPS && !s->overslept; n++) {
		uint64_t start = mic_now_ns();

		mic_store_release(&s->asked, n);
		for (;;) {
			uint32_t seen = mic_mmio_read(bus, MIC_REG_DSTAT(4));

			if ((seen & MIC_DMA_DSTAT_COUNT) == n % RING)
				break;
			mic_dma_sleep(bus, 4, seen, n % RING, SLEEP_LIMIT_MS * 1000000ull);
		}
		if (mic_now_ns() - start > SLEEP_LIMIT_MS * 1000000ull)
			mic_store_release(&s->overslept, n);
	}
	mic_store_release(&s->asked, UINT32_MAX);
	return NULL;
}

TEST(hw_25_a_wish_that_meets_a_wake_is_not_lost)
{
	/* A driver says what it waits for while the engine, which has gone idle, wakes those before it. */
	struct lab lab;
	struct sleeper s = {.lab = &lab};
	pthread_t t;
	uint64_t state = 1;

	lab_open(&lab, 1 * MIB, 1 * MIB);
	uint32_t *dstat = (uint32_t *)(void *)(mic_bus_mmio(lab.bus) + MIC_REG_DSTAT(4));

	pthread_create(&t, NULL, sleep_for_each_count, &s);
	for (uint32_t done = 0, asked; (asked = mic_load_acquire(&s.asked)) != UINT32_MAX;) {
		for (uint32_t i = lab_random(&state) % 128; i; i--)
			mic_cpu_relax();
		mic_hw_dma_wake(lab.bus, 4, MIC_DMA_SLEEP_ANY);
		if (asked == done)
			continue;
		for (uint32_t i = lab_random(&state) % 128; i; i--)
			mic_cpu_relax();
		done = asked;
		mic_store_release(dstat, done % RING);
		mic_hw_dma_wake(lab.bus, 4, done % RING);
	}
	pthread_join(t, NULL);
	CHECK(!s.overslept);
	lab_close(&lab);
}
