/* Fuzz target: the NBD server, over a real driver, ring and backend (two threads of this process).
 *
 * Input: byte 0 chooses the prologue (none, GO, structured + GO, EXPORT_NAME), byte 1 how the rest is cut
 * into sends. After each connection every page of the pool must be back. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "../test/lab.h"
#include "fuzz.h"
#include "mic/nbd.h"

#define GDDR     (8 * MIB)
#define BLOCK    0x10000ull
#define SLOT     0x1000ull
#define USED     0x8000ull
#define POOL     0x10000ull
#define POOL_LEN (2 * MIB)
#define CAPACITY 4096u /* sectors */

static struct lab lab;
static struct mic_vdev vdev;
static struct mic_vdrv vdrv;
static struct mic_blk_dev *dev;
static struct mic_blk_drv *drv;
static struct mic_nbd *nbd;
static struct sockaddr_un name;
static socklen_t name_len;
static uint32_t pool_pages;
static int never;

static void *run_device(void *arg)
{
	while (mic_blk_dev_run(dev) > 0)
		;
	return arg;
}

static void *run_server(void *arg)
{
	while (mic_nbd_run(nbd, never) == -EINTR) /* the fuzzer's alarm clock */
		;
	abort(); /* it has no reason to end */
	return arg;
}

static int listener(void)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	name.sun_family = AF_UNIX; /* an abstract name: nothing to clean up */
	int n = snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "micemu-fuzz-%d", (int)getpid());

	name_len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
	if (fd < 0 || bind(fd, (struct sockaddr *)&name, name_len) || listen(fd, 8))
		abort();
	return fd;
}

static void start(void)
{
	const uint64_t features = 1ull << MIC_VIRTIO_F_INDIRECT_DESC | 1ull << MIC_VIRTIO_F_EVENT_IDX |
				  1ull << MIC_VIRTIO_BLK_F_FLUSH | 1ull << MIC_VIRTIO_BLK_F_DISCARD |
				  1ull << MIC_VIRTIO_BLK_F_WRITE_ZEROES;
	pthread_t t;

	lab_open(&lab, GDDR, 1 * MIB);
	mic_mmio_write(lab.bus, MIC_REG_MXAR(0), 1u << MIC_SRC_DOORBELL);
	mic_mmio_write(lab.bus, MIC_REG_SICE0, 1u << MIC_SRC_DOORBELL);
	never = eventfd(0, EFD_CLOEXEC);
	mic_vdrv_init(&vdrv, lab.bus, lab.fds[MIC_FD_IRQ], never, 0, 1);
	mic_vdev_init(&vdev, lab.bus, SLOT, SLOT + 64, lab.fds[MIC_FD_VEC], never, 1);
	if (mic_dq_init(&vdrv.dq[0], lab.bus, MIC_SMPT_BASE + BLOCK, USED, 128, features, POOL + POOL_LEN) ||
	    mic_vq_init(&vdev.vq[0], lab.bus, BLOCK, USED, 128, features))
		abort();
	mic_bus_host(lab.bus)[SLOT + offsetof(struct mic_device_desc, status)] = MIC_VIRTIO_DRIVER_OK;
	dev = mic_blk_dev_create(&vdev, lab_memory("image", CAPACITY * MIC_BLK_SECTOR), CAPACITY, false,
				 "fuzz");
	drv = mic_blk_drv_create(&vdrv, POOL, POOL_LEN, features, CAPACITY, NULL);
	nbd = mic_nbd_create(drv, listener(), "vda", false);
	if (!dev || !drv || !nbd)
		abort();
	pool_pages = mic_blk_free_pages(drv);
	if (pthread_create(&t, NULL, run_device, NULL) || pthread_create(&t, NULL, run_server, NULL))
		abort();
}

#define OPTION "IHAVEOPT"
static const struct {
	const char *bytes;
	size_t len;
} prologue[] = {
	{"", 0},
	{"\0\0\0\3" OPTION "\0\0\0\7\0\0\0\6\0\0\0\0\0\0", 4 + 16 + 6},
	{"\0\0\0\3" OPTION "\0\0\0\10\0\0\0\0" OPTION "\0\0\0\7\0\0\0\6\0\0\0\0\0\0", 4 + 16 + 16 + 6},
	{"\0\0\0\3" OPTION "\0\0\0\1\0\0\0\0", 4 + 16},
};

static void send_all(int fd, const void *bytes, size_t len)
{
	char drop[4096];

	/* The server may have hung up, or wait for us to read, or be slower than we are: no error. */
	while (len) {
		struct pollfd p = {.fd = fd, .events = POLLIN | POLLOUT};
		ssize_t n = send(fd, bytes, len, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n > 0) {
			bytes = (const char *)bytes + n;
			len -= (size_t)n;
		} else if (errno != EAGAIN || poll(&p, 1, -1) < 0) {
			return;
		} else if (p.revents & POLLIN && recv(fd, drop, sizeof drop, MSG_DONTWAIT) == 0) {
			return;
		}
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct mic_nbd_stats stats;
	char drop[65536];

	if (!nbd)
		start();
	if (size < 2)
		return 0;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || connect(fd, (struct sockaddr *)&name, name_len))
		abort();
	send_all(fd, prologue[data[0] & 3].bytes, prologue[data[0] & 3].len);
	size_t cut = data[1] ? data[1] : size;

	for (size_t at = 2; at < size; at += cut)
		send_all(fd, data + at, size - at < cut ? size - at : cut);
	shutdown(fd, SHUT_WR);
	while (data[0] & 4 && recv(fd, drop, sizeof drop, 0) > 0)
		;
	close(fd);
	do {
		sched_yield();
		mic_nbd_stats(nbd, &stats);
	} while (stats.clients_now || mic_blk_free_pages(drv) != pool_pages);
	return 0;
}
