/* The ring library against a model, both sides at work at once (VOP 3, 9.1): each thread does what dice say,
 * and everything that it sees must be what the other side has promised. tests/vop/test_vring_model.py is the
 * same for one thread, step by step; here the sanitizers see every order that two CPUs make of it.
 *
 * The threads share nothing but the ring, the buffers that its chains name and the two lines: each knows from
 * the seed what the other one does, so that no lock of the test hides a missing barrier of the library.
 * RING_SEED=N repeats one ring; RING_COUNT=N runs so many of each kind (default 24). */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>

#include "harness.h"
#include "lab.h"
#include "mic/vring.h"

#define BLOCK    0x10000ull /* ring block in host memory */
#define USED     0x20000ull /* the rest: GDDR */
#define TABLES   0x40000ull
#define BUFFERS  0x100000ull
#define SLOT     (16 * KIB)
#define SEG      64u /* bytes, at most */
#define MAX_SEGS 130u
#define MAX_NUM  128u
#define CHAINS   1500u
#define LIMIT_MS 20000 /* without a wake-up: it is lost */

struct ring {
	struct lab lab;
	struct mic_vq vq;
	struct mic_dq dq;
	int kick, call; /* eventfds: driver -> device, device -> driver */
	uint64_t features, seed;
	uint16_t num;
	uint32_t pushed[CHAINS], got[CHAINS]; /* tokens in their order; compared when both have ended */
};

/* --- what both sides know ------------------------------------------------------------------------- */

struct shape {
	unsigned out, in; /* segments */
	uint32_t fill;    /* what the device says that it wrote */
};

static uint32_t dice(uint64_t *state, uint32_t sides)
{
	return lab_random(state) % sides;
}

/* Chain `token`: mostly short; now and then one that no indirect table, or no ring, can hold. */
static struct shape shape_of(const struct ring *r, uint32_t token)
{
	uint64_t s = r->seed * 1000003u + token;
	unsigned most;

	lab_random(&s);
	most = dice(&s, 16) ? 6 : MAX_SEGS / 2;
	return (struct shape){.out = dice(&s, most), .in = dice(&s, most), .fill = lab_random(&s) % 4096};
}

static uint32_t seg_len(uint32_t token, unsigned i)
{
	return 1 + (token * 7 + i * 13) % SEG;
}

/* Ring descriptors that the chain takes. */
static unsigned cost(const struct ring *r, const struct shape *s)
{
	unsigned n = s->out + s->in;

	return r->features >> MIC_VIRTIO_F_INDIRECT_DESC & 1 && n > 1 && n <= MIC_DQ_TABLE ? 1 : n;
}

static bool possible(const struct ring *r, const struct shape *s)
{
	return s->out + s->in && cost(r, s) <= r->num;
}

static uint8_t byte_of(uint32_t token, unsigned i, bool from_device)
{
	return (uint8_t)(token * 5 + i * 3 + (from_device ? 101 : 0));
}

static unsigned wrong_bytes(const uint8_t *p, uint32_t len, uint8_t want)
{
	unsigned n = 0;

	while (len--)
		n += *p++ != want;
	return n;
}

/* Wait for a ring of the line. False: nobody rang, and somebody had to. */
static bool sleep_on(int fd)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};

	if (poll(&p, 1, LIMIT_MS) != 1)
		return false;
	lab_rang(fd);
	return true;
}

/* --- the device ----------------------------------------------------------------------------------- */

struct device {
	struct ring *r;
	uint64_t state;
	uint32_t next; /* the chain that comes up next */
	unsigned pushed, held;
	struct held {
		struct mic_chain chain;
		uint32_t token;
		uint8_t *in[MAX_SEGS];
	} chains[MAX_NUM]; /* popped, not completed */
};

static void skip_impossible(const struct ring *r, uint32_t *token)
{
	struct shape s = shape_of(r, *token);

	while (!possible(r, &s))
		s = shape_of(r, ++*token);
}

/* 1: took the next chain, 0: there is none, -1: it is not what the driver has sent. */
static int take(struct device *d)
{
	struct iovec iov[2 * MAX_SEGS];
	struct held *h = &d->chains[d->held];
	int rc = mic_vq_pop(&d->r->vq, &h->chain, iov, 2 * MAX_SEGS);

	if (rc <= 0)
		return rc;
	skip_impossible(d->r, &d->next);
	struct shape s = shape_of(d->r, d->next);

	if (h->chain.out_num != s.out || h->chain.in_num != s.in)
		return -1;
	for (unsigned i = 0; i < s.out + s.in; i++) {
		if (iov[i].iov_len != seg_len(d->next, i))
			return -1;
		if (i < s.out &&
		    wrong_bytes(iov[i].iov_base, seg_len(d->next, i), byte_of(d->next, i, false)))
			return -1;
		if (i >= s.out)
			h->in[i - s.out] = iov[i].iov_base;
	}
	h->token = d->next++;
	d->held++;
	return 1;
}

/* Complete `n` of the chains in any order, with one store. */
static void complete(struct device *d, unsigned n)
{
	for (; n; n--) {
		struct held *h = &d->chains[dice(&d->state, d->held)];
		struct shape s = shape_of(d->r, h->token);

		for (unsigned i = 0; i < s.in; i++)
			memset(h->in[i], byte_of(h->token, s.out + i, true), seg_len(h->token, s.out + i));
		d->r->pushed[d->pushed++] = h->token;
		mic_vq_fill(&d->r->vq, h->chain.head, s.fill);
		memmove(h, h + 1, (size_t)(d->chains + --d->held - h) * sizeof *h);
	}
	mic_vq_publish(&d->r->vq);
	if (mic_vq_should_interrupt(&d->r->vq))
		eventfd_write(d->r->call, 1);
}

static void *device_main(void *arg)
{
	struct device *d = arg;

	while (d->pushed < CHAINS) {
		uint32_t what = dice(&d->state, 8);
		int rc = 0;

		if (what < 4 && d->held < MAX_NUM) {
			rc = take(d);
			CHECK_IN_THREAD(rc >= 0);
		} else if (what < 7 && d->held) {
			complete(d, 1 + dice(&d->state, d->held));
		} else if (!mic_vq_enable_kick(&d->r->vq)) {
			/* Nothing is available: what is held goes back, else the driver may wait for it. */
			if (d->held)
				complete(d, d->held);
			if (d->pushed == CHAINS)
				break;
			CHECK_IN_THREAD(sleep_on(d->r->kick));
			mic_vq_disable_kick(&d->r->vq);
		} else {
			mic_vq_disable_kick(&d->r->vq);
		}
	}
	return NULL;
}

/* --- the driver ----------------------------------------------------------------------------------- */

struct driver {
	struct ring *r;
	uint64_t state;
	uint32_t next;
	unsigned added, got, free; /* free: descriptors of the ring */
	unsigned slots;            /* unused buffers */
	uint16_t slot[MAX_NUM];
};

/* 0, or an errno as the model says it; -1: the library says something else. */
static int add(struct driver *d)
{
	struct shape s = shape_of(d->r, d->next);
	struct mic_seg seg[2 * MAX_SEGS] = {{0}};
	unsigned n = s.out + s.in;
	uint16_t slot = d->slot[d->slots - 1];
	int want = !possible(d->r, &s) ? EINVAL : cost(d->r, &s) > d->free ? ENOSPC : 0;

	for (unsigned i = 0; i < n; i++) {
		seg[i] = (struct mic_seg){BUFFERS + slot * SLOT + i * SEG, seg_len(d->next, i)};
		if (!want && i < s.out)
			memset(mic_bus_gddr(d->r->lab.bus) + seg[i].addr, byte_of(d->next, i, false),
			       seg[i].len);
	}
	if (mic_dq_stage(&d->r->dq, seg, s.out, s.in, (uint64_t)slot << 32 | d->next) != -want)
		return -1;
	if (want != ENOSPC)
		d->next++;
	if (!want) {
		d->free -= cost(d->r, &s);
		d->slots--;
		d->added++;
	}
	return want;
}

/* 1: a completion, 0: there is none, -1: it is not what the device has written. */
static int get(struct driver *d)
{
	uint64_t token;
	uint32_t len, room = 0;
	int rc = mic_dq_get(&d->r->dq, &token, &len);

	if (rc <= 0)
		return rc;
	struct shape s = shape_of(d->r, (uint32_t)token);
	const uint8_t *buf = mic_bus_gddr(d->r->lab.bus) + BUFFERS + (token >> 32) * SLOT;

	for (unsigned i = s.out; i < s.out + s.in; i++) {
		uint32_t n = seg_len((uint32_t)token, i);

		room += n;
		if (wrong_bytes(buf + i * SEG, n, byte_of((uint32_t)token, i, true)))
			return -1;
	}
	if (len != (s.fill < room ? s.fill : room))
		return -1;
	d->r->got[d->got++] = (uint32_t)token;
	d->free += cost(d->r, &s);
	d->slot[d->slots++] = (uint16_t)(token >> 32);
	return d->r->dq.free_num == d->free ? 1 : -1;
}

/* Make up to `n` more chains available with one store; true when there was room for one. */
static bool send(struct driver *d, unsigned n)
{
	unsigned before = d->added;
	int rc = 0;

	while (n-- && rc != ENOSPC && d->slots && d->added < CHAINS) {
		rc = add(d);
		CHECK_OR_RETURN(rc >= 0, false);
	}
	mic_dq_publish(&d->r->dq);
	if (mic_dq_should_kick(&d->r->dq))
		eventfd_write(d->r->kick, 1);
	return d->added != before;
}

static void driver_main(struct driver *d)
{
	while (d->got < CHAINS && !__atomic_load_n(&failures, __ATOMIC_RELAXED)) {
		uint32_t what = dice(&d->state, 8);
		int rc = 0;

		if (what < 3) {
			send(d, 1 + dice(&d->state, 8));
		} else if (what < 7) {
			rc = get(d);
			CHECK(rc >= 0);
		} else if (!mic_dq_enable_interrupt(&d->r->dq)) {
			if (d->added == d->got && !send(d, 8))
				continue; /* only impossible ones came up */
			CHECK(sleep_on(d->r->call));
			mic_dq_disable_interrupt(&d->r->dq);
		} else {
			mic_dq_disable_interrupt(&d->r->dq);
		}
	}
}

/* --- rings ---------------------------------------------------------------------------------------- */

/* All indices of both halves, so that the wrap-around is near (as test_vring_model.py does it). */
static void start_at(struct ring *r, uint16_t index)
{
	r->dq.avail_idx = r->dq.last_used = r->dq.kicked = index;
	r->vq.last_avail = r->vq.used_idx = r->vq.signalled = index;
	*(uint16_t *)(void *)(r->dq.avail + 2) = index;
	*(uint16_t *)(void *)(r->dq.used + 2) = index;
}

static void run_ring(uint64_t seed, uint64_t features)
{
	static struct device dev; /* large */
	struct ring *r = calloc(1, sizeof *r);
	struct driver drv = {.r = r, .state = seed ^ 0x5555};
	pthread_t t;

	CHECK(r);
	r->features = features;
	r->seed = seed;
	r->num = (uint16_t)(1u << seed % 8); /* every size that VOP 3 allows */
	lab_open(&r->lab, 4 * MIB, 1 * MIB);
	r->kick = eventfd(0, EFD_NONBLOCK);
	r->call = eventfd(0, EFD_NONBLOCK);
	CHECK(mic_dq_init(&r->dq, r->lab.bus, MIC_SMPT_BASE + BLOCK, USED, r->num, features, TABLES) == 0);
	CHECK(mic_vq_init(&r->vq, r->lab.bus, BLOCK, USED, r->num, features) == 0);
	start_at(r, (uint16_t)(seed % 3 ? 65535 - seed % 97 : 0));
	mic_vq_disable_kick(&r->vq);
	mic_dq_disable_interrupt(&r->dq);
	dev = (struct device){.r = r, .state = seed ^ 0xaaaa};
	drv.free = r->num;
	while (drv.slots < r->num) {
		drv.slot[drv.slots] = (uint16_t)drv.slots;
		drv.slots++;
	}
	pthread_create(&t, NULL, device_main, &dev);
	driver_main(&drv);
	pthread_join(t, NULL);
	if (memcmp(r->pushed, r->got, sizeof r->got))
		__atomic_fetch_add(&failures, 1, __ATOMIC_SEQ_CST);
	if (failures)
		printf("RING_SEED=%llu: %u entries, features %#llx: %u added, %u pushed, %u got\n",
		       (unsigned long long)seed, r->num, (unsigned long long)features, drv.added, dev.pushed,
		       drv.got);
	close(r->kick);
	close(r->call);
	lab_close(&r->lab);
	free(r);
}

static void rings(uint64_t features)
{
	const char *one = getenv("RING_SEED"), *count = getenv("RING_COUNT");
	uint64_t first = one ? strtoull(one, NULL, 0) : 1;

	for (uint64_t n = one ? 1 : count ? strtoull(count, NULL, 0) : 24; n && !failures; n--)
		run_ring(first++, features);
}

TEST(vop_53_model_plain_rings)
{
	rings(0);
}

TEST(vop_53_model_event_index)
{
	rings(1ull << MIC_VIRTIO_F_EVENT_IDX);
}

TEST(vop_53_model_indirect)
{
	rings(1ull << MIC_VIRTIO_F_INDIRECT_DESC);
}

TEST(vop_53_model_indirect_and_event_index)
{
	rings(1ull << MIC_VIRTIO_F_EVENT_IDX | 1ull << MIC_VIRTIO_F_INDIRECT_DESC);
}
