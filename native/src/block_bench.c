/* A load generator for `micemu bench`: the driver half against whatever serves the disk. */
#include <errno.h>
#include <stdlib.h>

#include "mic/block.h"

#define MAX_DEPTH   64u
#define MAX_SAMPLES (1u << 20)

struct load {
	struct mic_blk_drv *drv;
	struct mic_blk_user *user;
	struct mic_blk_bench *b;
	struct mic_blk_req req[MAX_DEPTH];
	uint64_t started[MAX_DEPTH];
	uint64_t blocks, at, seed;
	unsigned inflight;
	uint32_t *sample; /* latencies in ns */
	unsigned samples;
	int stop_fd;
	int error;
};

static uint64_t next_sector(struct load *l)
{
	uint64_t block;

	if (l->b->random) {
		l->seed ^= l->seed << 13;
		l->seed ^= l->seed >> 7;
		l->seed ^= l->seed << 17;
		block = l->seed % l->blocks;
	} else {
		block = l->at++ % l->blocks;
	}
	return block * (l->b->block / MIC_BLK_SECTOR);
}

static void start(struct load *l, struct mic_blk_req *req, uint64_t now)
{
	req->sector = next_sector(l);
	l->started[req->cookie] = now;
	int rc = mic_blk_submit(l->user, req);

	if (rc < 0)
		l->error = rc;
	else
		l->inflight++;
}

static void finish(struct load *l, const struct mic_blk_req *req, uint64_t now)
{
	l->inflight--;
	l->b->done++;
	if (req->error)
		l->error = -req->error;
	if (l->samples < MAX_SAMPLES)
		l->sample[l->samples++] = (uint32_t)(now - l->started[req->cookie]);
}

static void wait_done(struct load *l)
{
	int fds[3];

	if (mic_blk_spin(l->user) || !mic_blk_arm(l->user, false))
		return;
	mic_blk_wake_fds(l->user, fds);
	fds[2] = l->stop_fd;
	int mask = mic_wait_fds(fds, 3, 10000);

	mic_blk_awake(l->user);
	if (mask > 0 && !(mask & 4))
		return;
	l->error = mask == 0 ? -ETIMEDOUT : mask < 0 ? mask : -ESHUTDOWN;
	mic_blk_drv_stop(l->drv); /* whatever is in flight comes back now */
}

static void run(struct load *l)
{
	uint64_t now = mic_now_ns(), end = now + l->b->runtime_ms * 1000000ull;
	struct mic_blk_req *back[MAX_DEPTH];

	for (unsigned i = 0; i < l->b->depth; i++)
		start(l, &l->req[i], now);
	mic_blk_kick(l->user);
	while (l->inflight) {
		unsigned n = mic_blk_reap(l->user, back, MAX_DEPTH);

		if (!n) {
			wait_done(l);
			continue;
		}
		now = mic_now_ns();
		for (unsigned i = 0; i < n; i++) {
			finish(l, back[i], now);
			if (now < end && !l->error)
				start(l, back[i], now);
		}
		mic_blk_kick(l->user);
	}
}

static int by_value(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

static void report(struct load *l, uint64_t ns)
{
	struct mic_blk_bench *b = l->b;

	b->iops = (double)b->done * 1e9 / (double)ns;
	b->mb_per_s = b->iops * b->block / 1e6;
	qsort(l->sample, l->samples, sizeof *l->sample, by_value);
	b->p50_us = l->samples ? l->sample[l->samples / 2] / 1e3 : 0;
	b->p99_us = l->samples ? l->sample[l->samples * 99ull / 100] / 1e3 : 0;
}

static int prepare(struct load *l, struct mic_blk_drv *drv)
{
	l->sample = malloc(MAX_SAMPLES * sizeof *l->sample);
	l->user = mic_blk_user_open(drv);
	if (!l->sample || !l->user)
		return -ENOMEM;
	for (unsigned i = 0; i < l->b->depth; i++) {
		struct mic_blk_req *r = &l->req[i];

		r->type = l->b->write ? MIC_VIRTIO_BLK_T_OUT : MIC_VIRTIO_BLK_T_IN;
		r->len = l->b->block;
		r->cookie = i;
		r->addr = mic_blk_alloc(drv, r->len);
		if (!r->addr)
			return -ENOMEM;
	}
	return 0;
}

int mic_blk_bench(struct mic_blk_drv *drv, struct mic_blk_bench *b, unsigned spin_us, int stop_fd)
{
	struct load l = {.drv = drv, .b = b, .seed = 88172645463325252ull, .stop_fd = stop_fd};

	if (!b->depth || b->depth > MAX_DEPTH || !b->block || b->block % MIC_BLK_SECTOR)
		return -EINVAL;
	l.blocks = mic_blk_drv_capacity(drv) / (b->block / MIC_BLK_SECTOR);
	if (!l.blocks)
		return -EINVAL;
	b->done = 0;
	int rc = prepare(&l, drv);

	if (!rc) {
		uint64_t t0 = mic_now_ns();

		mic_blk_user_spin(l.user, spin_us);
		run(&l);
		report(&l, mic_now_ns() - t0);
		rc = l.error;
	}
	for (unsigned i = 0; i < b->depth; i++)
		if (l.req[i].addr)
			mic_blk_free(drv, l.req[i].addr, b->block);
	mic_blk_user_close(l.user);
	free(l.sample);
	return rc;
}
