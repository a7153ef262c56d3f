/* One disk, its backend thread and several users at once: races in the shared driver and the NBD server. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#include "harness.h"
#include "lab.h"
#include "mic/nbd.h"

#define BLOCK    0x10000ull
#define SLOT     0x1000ull
#define USED     0x8000ull
#define POOL     0x100000ull
#define POOL_LEN (4 * MIB)
#define TABLES   0x10000ull
#define CAPACITY 8192u /* sectors */
#define USERS    3u
#define ROUNDS   400u
#define RING     (1ull << MIC_VIRTIO_F_EVENT_IDX | 1ull << MIC_VIRTIO_F_INDIRECT_DESC)

struct rig {
	struct lab lab;
	struct mic_vdev vdev;
	struct mic_vdrv vdrv;
	struct mic_blk_dev *dev;
	struct mic_blk_drv *drv;
	pthread_t backend;
	int control, stop, image;
};

struct worker {
	struct rig *r;
	unsigned k;
};

static void *serve(void *arg)
{
	struct rig *r = arg;
	int rc;

	while ((rc = mic_blk_dev_run(r->dev)) != MIC_RUN_CONTROL)
		CHECK_IN_THREAD(rc > 0);
	return NULL;
}

static void rig_open(struct rig *r, uint64_t ring_features, unsigned spin_us)
{
	uint64_t features = ring_features | 1ull << MIC_VIRTIO_BLK_F_FLUSH;

	lab_open(&r->lab, 8 * MIB, 1 * MIB);
	mic_mmio_write(r->lab.bus, MIC_REG_MXAR(0), 1u << MIC_SRC_DOORBELL);
	mic_mmio_write(r->lab.bus, MIC_REG_SICE0, 1u << MIC_SRC_DOORBELL);
	r->control = eventfd(0, EFD_NONBLOCK);
	r->stop = eventfd(0, EFD_NONBLOCK);
	r->image = lab_memory("image", CAPACITY * MIC_BLK_SECTOR);
	CHECK(mic_vdrv_init(&r->vdrv, r->lab.bus, r->lab.fds[MIC_FD_IRQ], r->stop, 0, 1) == 0);
	CHECK(mic_vdev_init(&r->vdev, r->lab.bus, SLOT, SLOT + 64, r->lab.fds[MIC_FD_VEC], r->control, 1) == 0);
	r->vdrv.spin_us = r->vdev.spin_us = spin_us;
	CHECK(mic_dq_init(&r->vdrv.dq[0], r->lab.bus, MIC_SMPT_BASE + BLOCK, USED, 128, features, TABLES) == 0);
	CHECK(mic_vq_init(&r->vdev.vq[0], r->lab.bus, BLOCK, USED, 128, features) == 0);
	mic_bus_host(r->lab.bus)[SLOT + offsetof(struct mic_device_desc, status)] = MIC_VIRTIO_DRIVER_OK;
	r->dev = mic_blk_dev_create(&r->vdev, r->image, CAPACITY, false, "test");
	r->drv = mic_blk_drv_create(&r->vdrv, POOL, POOL_LEN, features, CAPACITY, NULL);
	CHECK(r->dev && r->drv);
	pthread_create(&r->backend, NULL, serve, r);
}

static void rig_close(struct rig *r)
{
	eventfd_write(r->control, 1);
	pthread_join(r->backend, NULL);
	mic_blk_drv_destroy(r->drv);
	mic_blk_dev_destroy(r->dev);
	mic_vdev_fini(&r->vdev);
	mic_vdrv_fini(&r->vdrv);
	close(r->control);
	close(r->stop);
	close(r->image);
	lab_close(&r->lab);
}

/* Writes and reads back a pattern of its own in an area of its own. */
static void *work(void *arg)
{
	struct worker *w = arg;
	struct mic_blk_user *u = mic_blk_user_open(w->r->drv);
	uint64_t addr = mic_blk_alloc(w->r->drv, 4096);
	uint32_t *mem = mic_blk_at(w->r->drv, addr, 4096);

	CHECK_IN_THREAD(u && addr);
	for (unsigned i = 0; i < ROUNDS; i++) {
		uint64_t sector = w->k * 1024 + i % 64 * 8;

		for (unsigned j = 0; j < 1024; j++)
			mem[j] = w->k << 24 ^ i << 8 ^ j;
		CHECK_IN_THREAD(mic_blk_execute(u, MIC_VIRTIO_BLK_T_OUT, sector, addr, 4096) == 0);
		memset(mem, 0, 4096);
		CHECK_IN_THREAD(mic_blk_execute(u, MIC_VIRTIO_BLK_T_IN, sector, addr, 4096) == 0);
		for (unsigned j = 0; j < 1024; j++)
			CHECK_IN_THREAD(mem[j] == (w->k << 24 ^ i << 8 ^ j));
	}
	mic_blk_free(w->r->drv, addr, 4096);
	mic_blk_user_close(u);
	return NULL;
}

static void many_users(uint64_t features, unsigned spin_us)
{
	struct rig r;
	struct worker w[USERS];
	pthread_t t[USERS];

	rig_open(&r, features, spin_us);
	for (unsigned k = 0; k < USERS; k++) {
		w[k] = (struct worker){&r, k};
		pthread_create(&t[k], NULL, work, &w[k]);
	}
	for (unsigned k = 0; k < USERS; k++)
		pthread_join(t[k], NULL);
	CHECK(mic_blk_free_pages(r.drv) == (POOL_LEN - 8 * KIB) / 4096);
	rig_close(&r);
}

TEST(users_that_sleep)
{
	many_users(RING, 0);
}

TEST(users_that_spin)
{
	many_users(RING, 50);
}

TEST(users_of_a_plain_ring)
{
	many_users(0, 0);
}

static void *endless(void *arg)
{
	struct rig *r = arg;
	struct mic_blk_user *u = mic_blk_user_open(r->drv);
	uint64_t addr = mic_blk_alloc(r->drv, 4096);
	int rc;

	while ((rc = mic_blk_execute(u, MIC_VIRTIO_BLK_T_IN, 0, addr, 4096)) == 0)
		;
	CHECK_IN_THREAD(rc == -ESHUTDOWN);
	mic_blk_user_close(u);
	return NULL;
}

/* A stopped driver lets every user go, whatever it was doing. */
TEST(stop_under_load)
{
	for (unsigned round = 0; round < 20; round++) {
		struct rig r;
		pthread_t t[USERS];

		rig_open(&r, RING, round % 2 * 50);
		for (unsigned k = 0; k < USERS; k++)
			pthread_create(&t[k], NULL, endless, &r);
		usleep(1000 * (round % 5)); /* anywhere in their work */
		if (round % 4 < 2)
			mic_blk_drv_stop(r.drv);
		else
			eventfd_write(r.stop, 1);
		/* A spinning user looks at stop_fd only before it sleeps. */
		if (round % 4 >= 2)
			mic_blk_drv_stop(r.drv);
		for (unsigned k = 0; k < USERS; k++)
			pthread_join(t[k], NULL);
		rig_close(&r);
	}
}

TEST(load_generator)
{
	struct rig r;

	rig_open(&r, RING, 50);
	for (unsigned depth = 1; depth <= 32; depth += 31) {
		struct mic_blk_bench b = {.block = 4096, .depth = depth, .runtime_ms = 100, .random = true};

		CHECK(mic_blk_bench(r.drv, &b, depth == 1 ? 0 : 50, r.stop) == 0);
		CHECK(b.done > 0 && b.iops > 0);
	}
	rig_close(&r);
}
