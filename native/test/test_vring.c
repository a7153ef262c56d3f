/* Both halves of the ring library in two threads (VOP 3, 9.1). */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>

#include "harness.h"
#include "lab.h"
#include "mic/vring.h"

#define BLOCK   0x10000ull  /* ring block in host memory */
#define USED    0x20000ull  /* used ring in GDDR */
#define TABLES  0x40000ull  /* indirect tables */
#define BUFFERS 0x100000ull /* GDDR */
#define ROUNDS  20000u

struct pair {
	struct lab lab;
	struct mic_vq vq;
	struct mic_dq dq;
	int kick, call; /* eventfds: driver -> device, device -> driver */
	uint64_t features;
	uint16_t num;
};

/* False: nobody rang, and somebody had to. */
static bool sleep_on(int fd)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};

	if (poll(&p, 1, 20000) != 1)
		return false;
	lab_rang(fd);
	return true;
}

/* Echo: writes the readable bytes, plus one each, into the writable part. */
static void serve(struct pair *p, const struct mic_chain *chain, const struct iovec *iov)
{
	uint8_t *in = iov[chain->out_num].iov_base;
	const uint8_t *out = iov[0].iov_base;

	for (size_t i = 0; i < chain->in_len; i++)
		in[i] = (uint8_t)(out[i] + 1);
	mic_vq_push(&p->vq, chain->head, (uint32_t)chain->in_len);
	if (mic_vq_should_interrupt(&p->vq))
		eventfd_write(p->call, 1);
}

static void *device(void *arg)
{
	struct pair *p = arg;
	struct iovec iov[16];
	struct mic_chain chain;

	for (unsigned done = 0; done < ROUNDS;) {
		int rc = mic_vq_pop(&p->vq, &chain, iov, 16);

		CHECK_IN_THREAD(rc >= 0);
		if (rc == 1) {
			serve(p, &chain, iov);
			done++;
		} else if (!mic_vq_enable_kick(&p->vq)) {
			CHECK_IN_THREAD(sleep_on(p->kick));
			mic_vq_disable_kick(&p->vq);
		}
	}
	return NULL;
}

static void collect(struct pair *p, unsigned *done, uint64_t *bad)
{
	uint64_t token;
	uint32_t len;

	while (mic_dq_get(&p->dq, &token, &len) == 1) {
		const uint8_t *buf = mic_bus_gddr(p->lab.bus) + BUFFERS + token % p->num * 256;

		for (unsigned i = 0; i < 64; i++)
			*bad += buf[128 + i] != (uint8_t)(token + i + 1);
		*bad += len != 64 || token != *done;
		++*done;
	}
}

/* Make one more chain available; 0 or -ENOSPC. */
static int add(struct pair *p, unsigned n)
{
	uint64_t buf = BUFFERS + n % p->num * 256;
	struct mic_seg seg[2] = {{buf, 64}, {buf + 128, 64}};

	for (unsigned i = 0; i < 64; i++)
		mic_bus_gddr(p->lab.bus)[buf + i] = (uint8_t)(n + i);
	int rc = mic_dq_add(&p->dq, seg, 1, 1, n);

	if (!rc && mic_dq_should_kick(&p->dq))
		eventfd_write(p->kick, 1);
	return rc;
}

static void drive(struct pair *p)
{
	unsigned added = 0, done = 0, before;
	uint64_t bad = 0;

	while (done < ROUNDS) {
		while (added < ROUNDS && added - done < p->num) {
			int rc = add(p, added);

			CHECK(rc == 0 || rc == -ENOSPC);
			if (rc)
				break;
			added++;
		}
		before = done;
		collect(p, &done, &bad);
		CHECK(!p->dq.broken);
		if (done == before && !mic_dq_enable_interrupt(&p->dq)) {
			CHECK(sleep_on(p->call));
			mic_dq_disable_interrupt(&p->dq);
		}
	}
	CHECK(bad == 0);
}

static void exchange(uint64_t features, uint16_t num)
{
	struct pair p = {.features = features, .num = num};
	pthread_t t;

	lab_open(&p.lab, 4 * MIB, 4 * MIB);
	p.kick = eventfd(0, EFD_NONBLOCK);
	p.call = eventfd(0, EFD_NONBLOCK);
	CHECK(mic_dq_init(&p.dq, p.lab.bus, MIC_SMPT_BASE + BLOCK, USED, num, features, TABLES) == 0);
	CHECK(mic_vq_init(&p.vq, p.lab.bus, BLOCK, USED, num, features) == 0);
	pthread_create(&t, NULL, device, &p);
	drive(&p);
	pthread_join(t, NULL);
	close(p.kick);
	close(p.call);
	lab_close(&p.lab);
}

TEST(vop_53_plain_ring)
{
	exchange(0, 128);
}

TEST(vop_53_event_index)
{
	exchange(1ull << MIC_VIRTIO_F_EVENT_IDX, 128);
}

TEST(vop_53_indirect_and_event_index)
{
	exchange(1ull << MIC_VIRTIO_F_EVENT_IDX | 1ull << MIC_VIRTIO_F_INDIRECT_DESC, 64);
}

TEST(vop_53_two_entries)
{
	exchange(1ull << MIC_VIRTIO_F_EVENT_IDX, 2);
}
