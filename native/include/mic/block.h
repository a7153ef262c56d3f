/* virtio-blk, both halves (VOP 8.7, 9.4).
 *
 * mic_blk_dev  the backend's loop over a raw image: one process per disk on the host.
 * mic_blk_drv  the card's driver: many threads of the card OS submit to it. */
#ifndef MIC_BLOCK_H
#define MIC_BLOCK_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "mic/vring.h"

/* cffi-begin */
/* --- device half ------------------------------------------------------------------------------ */

#define MIC_BLK_SECTOR 512
/* What our device says in its configuration space. */
#define MIC_BLK_SEG_MAX     126
#define MIC_BLK_MAX_RANGES  16       /* segments of one DISCARD or WRITE_ZEROES */
#define MIC_BLK_MAX_DISCARD 0x400000 /* sectors (2 GiB) */
#define MIC_BLK_MAX_ZEROES  0x8000   /* sectors (16 MiB): written by hand in the worst case */

struct mic_blk_stats {
	uint64_t reads, writes, flushes, discards, zeroes, others, errors;
	uint64_t bytes_read, bytes_written;
};

struct mic_blk_dev;

/* A disk over `vdev` (which the caller keeps) and image descriptor `fd`. capacity is in sectors;
 * whatever the image lacks reads as zeros. serial: up to 20 bytes, zero padded. NULL: no memory. */
struct mic_blk_dev *mic_blk_dev_create(struct mic_vdev *vdev, int fd, uint64_t capacity, bool read_only,
				       const char *serial);
void mic_blk_dev_destroy(struct mic_blk_dev *dev);
void mic_blk_dev_stats(const struct mic_blk_dev *dev, struct mic_blk_stats *out);
/* Serve until Python is needed: enum mic_run, or -errno. A ring that breaks is flagged (VOP 11) and
 * the loop goes on; the card's reset repairs it. */
int mic_blk_dev_run(struct mic_blk_dev *dev);

/* --- driver half ------------------------------------------------------------------------------ */

/* The disk as the card sees it, and the GDDR it may use. Several threads share it; each opens a
 * `mic_blk_user` of its own. */
struct mic_blk_drv;
struct mic_blk_user;

/* One request. The caller fills the first part and keeps it alive until it comes back. */
struct mic_blk_req {
	uint32_t type; /* MIC_VIRTIO_BLK_T_* */
	uint32_t len;  /* bytes of data at addr */
	uint64_t sector;
	uint64_t addr;   /* GDDR: mic_blk_alloc() */
	uint64_t cookie; /* the caller's own */
	int error;       /* filled in: 0, or EIO, EOPNOTSUPP, ESHUTDOWN (device gone) */
	uint16_t slot;
	struct mic_blk_user *user;
	struct mic_blk_req *next;
};

/* vdrv: ready rings, kept by the caller; ring 0 is used. pool_addr, pool_len: page-aligned GDDR that
 * the caller has reserved, at least 64 KiB. capacity in sectors. status: the device's status byte in
 * the device page (watched for NEEDS_RESET), or NULL. NULL with errno EINVAL, EFAULT or ENOMEM. */
struct mic_blk_drv *mic_blk_drv_create(struct mic_vdrv *vdrv, uint64_t pool_addr, uint64_t pool_len,
				       uint64_t features, uint64_t capacity, const uint8_t *status);
/* Ends what is outstanding with ESHUTDOWN; callers of every user get -ESHUTDOWN from then on. The
 * device may still write the buffers until the card has reset it. */
void mic_blk_drv_stop(struct mic_blk_drv *drv);
/* After all users were closed. */
void mic_blk_drv_destroy(struct mic_blk_drv *drv);
uint64_t mic_blk_drv_capacity(const struct mic_blk_drv *drv);
uint64_t mic_blk_drv_features(const struct mic_blk_drv *drv);
bool mic_blk_drv_stopped(const struct mic_blk_drv *drv);
/* -ESHUTDOWN or -EIO once it has stopped, else 0. */
int mic_blk_drv_error(const struct mic_blk_drv *drv);

/* Pages of the pool: an address, or 0 when nothing of that size is free. */
uint64_t mic_blk_alloc(struct mic_blk_drv *drv, uint32_t len);
void mic_blk_free(struct mic_blk_drv *drv, uint64_t addr, uint32_t len);
uint32_t mic_blk_free_pages(struct mic_blk_drv *drv);
void *mic_blk_at(struct mic_blk_drv *drv, uint64_t addr, uint32_t len);

/* NULL with errno. A user belongs to one thread at a time. */
struct mic_blk_user *mic_blk_user_open(struct mic_blk_drv *drv);
/* The longest spin of this user in microseconds (default: that of the vdrv). */
void mic_blk_user_spin(struct mic_blk_user *user, unsigned spin_us);
/* Waits for nothing: the user's requests must have come back. */
void mic_blk_user_close(struct mic_blk_user *user);
/* Queue a request (0), -EAGAIN: the ring is full, -ESHUTDOWN, -EIO. Kick when the batch is complete. */
int mic_blk_submit(struct mic_blk_user *user, struct mic_blk_req *req);
void mic_blk_kick(struct mic_blk_user *user);
/* Requests of this user that have come back: up to max, 0 when there are none now. */
unsigned mic_blk_reap(struct mic_blk_user *user, struct mic_blk_req **out, unsigned max);
/* Is there something to reap now? (a look, no lock) */
bool mic_blk_pending(const struct mic_blk_user *user);
/* Look for a while; true when there is something to reap. */
bool mic_blk_spin(struct mic_blk_user *user);
/* Ask for an interrupt; false when there is something to reap (or, want_slot, a request would fit now).
 * When true, sleep on mic_blk_wake_fds() and call mic_blk_awake() afterwards. */
bool mic_blk_arm(struct mic_blk_user *user, bool want_slot);
void mic_blk_awake(struct mic_blk_user *user);
/* The descriptors that wake a user: the line, and one for what other threads reaped. */
void mic_blk_wake_fds(const struct mic_blk_user *user, int fds[2]);
/* One request, start to end: 0, -EIO, -EOPNOTSUPP, -ESHUTDOWN, never -EINTR. */
int mic_blk_execute(struct mic_blk_user *user, uint32_t type, uint64_t sector, uint64_t addr, uint32_t len);

struct mic_blk_bench {
	uint32_t block; /* bytes of one request */
	uint32_t depth; /* requests in flight, 1..64 */
	uint32_t runtime_ms;
	bool random, write;
	uint64_t done; /* results from here on */
	double iops, mb_per_s, p50_us, p99_us;
};

/* Load the disk through a user of its own that spins for up to spin_us (0: always sleeps). Returns 0,
 * -EINVAL, -ENOMEM (pool), the errno of the first failed request, -ESHUTDOWN (stop_fd), -ETIMEDOUT. */
int mic_blk_bench(struct mic_blk_drv *drv, struct mic_blk_bench *b, unsigned spin_us, int stop_fd);
/* cffi-end */

#endif
