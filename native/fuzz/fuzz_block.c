/* Fuzz target: the virtio-blk backend against hostile requests.
 *
 * Input: a list of requests of 1 + 3 * k bytes: number of segments k (1-7), then for each segment a flag
 * (writable) with its place, and a 16-bit length. What the segments hold comes from the input too. The
 * image is a small memory file: nothing may change behind its capacity or in front of the area. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../test/lab.h"
#include "fuzz.h"
#include "mic/block.h"

#define GDDR     (1 * MIB)
#define BLOCK    0x10000ull
#define SLOT     0x1000ull
#define USED     0x8000ull
#define BUFFERS  0x10000ull
#define CAPACITY 64u /* sectors */

static struct lab lab;
static struct mic_vdev vdev;
static struct mic_blk_dev *blk;
static struct mic_dq dq;
static int image, control;

static void open_all(void)
{
	lab_open(&lab, GDDR, 1 * MIB);
	image = lab_memory("image", 2 * CAPACITY * MIC_BLK_SECTOR);
	control = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK); /* readable: the loop returns when it would sleep */
	if (mic_vdev_init(&vdev, lab.bus, SLOT, SLOT + 64, lab.fds[MIC_FD_VEC], control, 1))
		abort();
	blk = mic_blk_dev_create(&vdev, image, CAPACITY, false, "fuzz");
}

static void set_up_rings(void)
{
	const uint64_t features = 1ull << MIC_VIRTIO_F_INDIRECT_DESC | 1ull << MIC_VIRTIO_BLK_F_FLUSH |
				  1ull << MIC_VIRTIO_BLK_F_DISCARD | 1ull << MIC_VIRTIO_BLK_F_WRITE_ZEROES;

	if (mic_dq_init(&dq, lab.bus, MIC_SMPT_BASE + BLOCK, USED, 128, features, 0) ||
	    mic_vq_init(&vdev.vq[0], lab.bus, BLOCK, USED, 128, features))
		abort();
	mic_bus_host(lab.bus)[SLOT + offsetof(struct mic_device_desc, status)] = MIC_VIRTIO_DRIVER_OK;
}

/* One request from the input, readable segments first; returns the bytes used. */
static size_t add_request(const uint8_t *data, size_t size)
{
	struct mic_seg seg[7];
	unsigned n = data[0] % 7 + 1, at = 0, readable = 0;

	if (size < 1 + 3 * n)
		return size;
	for (unsigned writable = 0; writable < 2; writable++) {
		for (unsigned i = 0; i < n; i++) {
			const uint8_t *p = data + 1 + 3 * i;

			if ((p[0] & 1) != writable)
				continue;
			seg[at++] = (struct mic_seg){
				.addr = BUFFERS + (p[0] >> 1) * 16u,
				.len = p[1] | (uint32_t)p[2] << 8,
			};
		}
		readable = writable ? readable : at;
	}
	mic_dq_add(&dq, seg, readable, n - readable, 0);
	return 1 + 3 * n;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t tail[MIC_BLK_SECTOR];

	if (!blk)
		open_all();
	set_up_rings();
	memset(mic_bus_gddr(lab.bus) + BUFFERS, 0, 64 * KIB);
	memcpy(mic_bus_gddr(lab.bus) + BUFFERS, data, size < 64 * KIB ? size : 64 * KIB);
	for (size_t at = 0; at < size; at += add_request(data + at, size - at))
		;
	int rc;

	while ((rc = mic_blk_dev_run(blk)) == MIC_RUN_HANDSHAKE)
		;
	if (rc != MIC_RUN_CONTROL)
		abort();
	if (pread(image, tail, sizeof tail, CAPACITY * MIC_BLK_SECTOR) != sizeof tail)
		abort();
	for (unsigned i = 0; i < sizeof tail; i++)
		if (tail[i])
			abort(); /* a write beyond the capacity */
	return 0;
}
