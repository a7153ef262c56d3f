/* One disk, its backend thread and several users at once: races in the shared driver and the NBD server. */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>

#include "harness.h"
#include "lab.h"
#include "mic/barrier.h"
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
	CHECK(mic_vdev_init(&r->vdev, r->lab.bus, SLOT, SLOT + 64, r->lab.fds[MIC_FD_VEC], r->control, 1) ==
	      0);
	r->vdrv.spin_us = r->vdev.spin_us = spin_us;
	CHECK(mic_dq_init(&r->vdrv.dq[0], r->lab.bus, MIC_SMPT_BASE + BLOCK, USED, 128, features, TABLES) ==
	      0);
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

/* In place of the C library's: a disk whose flushes take as long as a test wants. */
static uint32_t flushes, flush_gate;

int fdatasync(int fd)
{
	struct timespec while_slow = {0, 500000};

	(void)fd;
	mic_fetch_add(&flushes, 1);
	do
		nanosleep(&while_slow, NULL);
	while (mic_load_acquire(&flush_gate));
	return 0;
}

static void *flush(void *arg)
{
	struct mic_blk_user *u = mic_blk_user_open(((struct rig *)arg)->drv);

	CHECK_IN_THREAD(u && mic_blk_execute(u, MIC_VIRTIO_BLK_T_FLUSH, 0, 0, 0) == 0);
	mic_blk_user_close(u);
	return NULL;
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

/* Others read and write while a flush takes its time. */
TEST(requests_overtake_a_slow_flush)
{
	struct rig r;
	pthread_t t[USERS];
	struct worker w = {&r, 1};

	rig_open(&r, RING, 0);
	flush(&r); /* the first one tells that this disk is slow */
	mic_store_release(&flush_gate, 1u);
	for (unsigned k = 0; k < USERS; k++)
		pthread_create(&t[k], NULL, flush, &r);
	while (mic_load_acquire(&flushes) < 2)
		sched_yield();
	work(&w); /* all of its rounds, with the flush still on its way */
	CHECK(mic_load_acquire(&flushes) == 2);
	mic_store_release(&flush_gate, 0u);
	for (unsigned k = 0; k < USERS; k++)
		pthread_join(t[k], NULL);
	rig_close(&r);
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

/* --- NBD -------------------------------------------------------------------------------------- */

#define NBD_ROUNDS 300u
#define NBD_DEPTH  8u
#define NBD_LEN    4096u

struct nbd_rig {
	struct rig r;
	struct mic_nbd *nbd;
	struct sockaddr_un name;
	socklen_t name_len;
	int listener, stop;
};

struct nbd_head {
	uint32_t magic;
	uint16_t flags, type;
	uint64_t cookie, offset;
	uint32_t length;
} __attribute__((packed));

static bool receive(int fd, void *buf, size_t len)
{
	return recv(fd, buf, len, MSG_WAITALL) == (ssize_t)len;
}

static int nbd_connect(const struct nbd_rig *n)
{
	static const char go[] = "\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\6\0\0\0\0\0"; /* and the literal's own 0 */
	char answer[18 + 20 + 12 + 20];
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	if (connect(fd, (const struct sockaddr *)&n->name, n->name_len) ||
	    send(fd, go, sizeof go, MSG_NOSIGNAL) != sizeof go || !receive(fd, answer, sizeof answer))
		return -1;
	return fd;
}

static bool nbd_ask(int fd, uint16_t type, uint64_t offset, const void *payload)
{
	struct nbd_head h = {htobe32(0x25609513), 0, htobe16(type), offset, htobe64(offset),
			     htobe32(NBD_LEN)};

	return send(fd, &h, sizeof h, MSG_NOSIGNAL) == sizeof h &&
	       (!payload || send(fd, payload, NBD_LEN, MSG_NOSIGNAL) == NBD_LEN);
}

static bool nbd_answer(int fd, uint64_t offset)
{
	struct {
		uint32_t magic, error;
		uint64_t cookie;
	} __attribute__((packed)) a;

	return receive(fd, &a, sizeof a) && !a.error && a.cookie == offset;
}

/* Eight writes, then eight reads, in an area of its own. */
static void *nbd_client(void *arg)
{
	struct worker *w = arg;
	const struct nbd_rig *n = (const struct nbd_rig *)(void *)w->r; /* the rig is its first field */
	uint32_t page[NBD_LEN / 4];
	int fd = nbd_connect(n);

	CHECK_IN_THREAD(fd >= 0);
	for (unsigned i = 0; i < NBD_ROUNDS; i++) {
		for (unsigned q = 0; q < NBD_DEPTH; q++) {
			for (unsigned j = 0; j < NBD_LEN / 4; j++)
				page[j] = w->k << 24 ^ i << 12 ^ q << 10 ^ j;
			CHECK_IN_THREAD(nbd_ask(fd, 1, (w->k * NBD_DEPTH + q) * NBD_LEN, page));
		}
		for (unsigned q = 0; q < NBD_DEPTH; q++)
			CHECK_IN_THREAD(nbd_answer(fd, (w->k * NBD_DEPTH + q) * NBD_LEN));
		for (unsigned q = 0; q < NBD_DEPTH; q++)
			CHECK_IN_THREAD(nbd_ask(fd, 0, (w->k * NBD_DEPTH + q) * NBD_LEN, NULL));
		for (unsigned q = 0; q < NBD_DEPTH; q++) {
			CHECK_IN_THREAD(nbd_answer(fd, (w->k * NBD_DEPTH + q) * NBD_LEN));
			CHECK_IN_THREAD(receive(fd, page, NBD_LEN));
			CHECK_IN_THREAD(page[7] == (w->k << 24 ^ i << 12 ^ q << 10 ^ 7));
		}
	}
	close(fd);
	return NULL;
}

static void *nbd_serve(void *arg)
{
	struct nbd_rig *n = arg;

	CHECK_IN_THREAD(mic_nbd_run(n->nbd, n->stop) == 0);
	return NULL;
}

static void nbd_open(struct nbd_rig *n, unsigned spin_us)
{
	rig_open(&n->r, RING, spin_us);
	n->stop = eventfd(0, EFD_NONBLOCK);
	n->listener = socket(AF_UNIX, SOCK_STREAM, 0);
	n->name.sun_family = AF_UNIX; /* an abstract name: nothing to clean up */
	int len =
		snprintf(n->name.sun_path + 1, sizeof n->name.sun_path - 1, "micemu-test-%d", (int)getpid());

	n->name_len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)len);
	CHECK(bind(n->listener, (struct sockaddr *)&n->name, n->name_len) == 0 &&
	      listen(n->listener, 8) == 0);
	n->nbd = mic_nbd_create(n->r.drv, n->listener, "vda", false);
	CHECK(n->nbd);
	mic_nbd_spin(n->nbd, spin_us);
}

/* NBD clients and another user of the same driver, together. */
static void nbd_and_users(unsigned spin_us)
{
	struct nbd_rig n;
	struct worker w[USERS];
	pthread_t t[USERS], server;

	nbd_open(&n, spin_us);
	pthread_create(&server, NULL, nbd_serve, &n);
	for (unsigned k = 0; k < USERS; k++) {
		w[k] = (struct worker){&n.r, k + 1};
		pthread_create(&t[k], NULL, k ? nbd_client : work, &w[k]);
	}
	for (unsigned k = 0; k < USERS; k++)
		pthread_join(t[k], NULL);
	eventfd_write(n.stop, 1);
	pthread_join(server, NULL);
	mic_nbd_destroy(n.nbd);
	CHECK(mic_blk_free_pages(n.r.drv) == (POOL_LEN - 8 * KIB) / 4096);
	close(n.listener);
	close(n.stop);
	rig_close(&n.r);
}

TEST(nbd_that_sleeps)
{
	nbd_and_users(0);
}

TEST(nbd_that_spins)
{
	nbd_and_users(50);
}
