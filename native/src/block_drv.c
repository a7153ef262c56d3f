/* virtio-blk, driver half: one ring, many users (VOP 9.4).
 *
 * One lock covers ring, slots and lists. Whoever looks reaps for everybody: a request that belongs to
 * another user is put on that user's list, and the user is woken if it sleeps. The line wakes every
 * sleeper by itself (each has its own view of it). */
#define _GNU_SOURCE
#include "mic/block.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "block_pool.h"
#include "mic/barrier.h"

#define PAGE       4096u
#define SLOT_BYTES 64u /* header at 0, status at 16: one cache line per request */
#define STATUS_OFF 16u
#define SPIN_STEP  16u

struct mic_blk_user {
	struct mic_blk_drv *drv;
	struct mic_blk_user *next; /* all users of the driver */
	struct mic_blk_req *done, **tail;
	bool asleep, wants_slot;
	int line_fd, wake_fd;
	unsigned spin_us;
	struct mic_spin spin;
};

struct mic_blk_drv {
	struct mic_vdrv *vdrv;
	struct mic_dq *dq;
	pthread_mutex_t lock;
	uint64_t features, capacity;
	const uint8_t *status;
	int error; /* ESHUTDOWN or EIO: no more requests */
	unsigned sleepers;
	struct mic_blk_user *users;
	uint64_t slots_addr; /* GDDR: SLOT_BYTES for each request */
	uint8_t *slots;
	struct mic_blk_req *inflight[MIC_MAX_VRING_ENTRIES];
	uint16_t free_slot[MIC_MAX_VRING_ENTRIES];
	unsigned free_slots;
	struct mic_blk_pool pool;
};

/* --- life ------------------------------------------------------------------------------------- */

struct mic_blk_drv *mic_blk_drv_create(struct mic_vdrv *vdrv, uint64_t pool_addr, uint64_t pool_len,
				       uint64_t features, uint64_t capacity, const uint8_t *status)
{
	const uint32_t control = MIC_MAX_VRING_ENTRIES * SLOT_BYTES;

	if (pool_addr % PAGE || pool_len % PAGE || pool_len < 16 * PAGE || pool_len > 1ull << 40 ||
	    !vdrv->num_vq) {
		errno = EINVAL;
		return NULL;
	}
	uint8_t *pool = mic_gddr_at(vdrv->bus, pool_addr, pool_len);

	if (!pool) {
		errno = EFAULT;
		return NULL;
	}
	struct mic_blk_drv *drv = calloc(1, sizeof *drv);

	if (!drv || mic_blk_pool_init(&drv->pool, pool_addr + control, pool_len - control) < 0) {
		free(drv);
		errno = ENOMEM;
		return NULL;
	}
	pthread_mutex_init(&drv->lock, NULL);
	drv->vdrv = vdrv;
	drv->dq = &vdrv->dq[0];
	drv->features = features;
	drv->capacity = capacity;
	drv->status = status;
	drv->slots_addr = pool_addr;
	drv->slots = pool;
	drv->free_slots = MIC_MAX_VRING_ENTRIES;
	for (uint16_t i = 0; i < MIC_MAX_VRING_ENTRIES; i++)
		drv->free_slot[i] = (uint16_t)(MIC_MAX_VRING_ENTRIES - 1 - i);
	return drv;
}

void mic_blk_drv_destroy(struct mic_blk_drv *drv)
{
	if (!drv)
		return;
	pthread_mutex_destroy(&drv->lock);
	mic_blk_pool_fini(&drv->pool);
	free(drv);
}

uint64_t mic_blk_drv_capacity(const struct mic_blk_drv *drv)
{
	return drv->capacity;
}

uint64_t mic_blk_drv_features(const struct mic_blk_drv *drv)
{
	return drv->features;
}

bool mic_blk_drv_stopped(const struct mic_blk_drv *drv)
{
	return mic_load_acquire(&drv->error) != 0;
}

int mic_blk_drv_error(const struct mic_blk_drv *drv)
{
	return -mic_load_acquire(&drv->error);
}

struct mic_blk_user *mic_blk_user_open(struct mic_blk_drv *drv)
{
	struct mic_blk_user *u = calloc(1, sizeof *u);

	if (!u)
		return NULL;
	u->drv = drv;
	u->tail = &u->done;
	u->spin_us = drv->vdrv->spin_us;
	u->line_fd = mic_line_open(drv->vdrv->irq_fd);
	u->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (u->line_fd < 0 || u->wake_fd < 0) {
		errno = u->line_fd < 0 ? -u->line_fd : errno;
		mic_blk_user_close(u);
		return NULL;
	}
	pthread_mutex_lock(&drv->lock);
	u->next = drv->users;
	drv->users = u;
	pthread_mutex_unlock(&drv->lock);
	return u;
}

void mic_blk_user_close(struct mic_blk_user *user)
{
	if (!user)
		return;
	struct mic_blk_drv *drv = user->drv;

	pthread_mutex_lock(&drv->lock);
	for (struct mic_blk_user **p = &drv->users; *p; p = &(*p)->next) {
		if (*p == user) {
			*p = user->next;
			break;
		}
	}
	drv->sleepers -= user->asleep;
	pthread_mutex_unlock(&drv->lock);
	if (user->line_fd >= 0)
		close(user->line_fd);
	if (user->wake_fd >= 0)
		close(user->wake_fd);
	free(user);
}

void mic_blk_user_spin(struct mic_blk_user *user, unsigned spin_us)
{
	user->spin_us = spin_us;
}

/* --- the pool --------------------------------------------------------------------------------- */

uint64_t mic_blk_alloc(struct mic_blk_drv *drv, uint32_t len)
{
	pthread_mutex_lock(&drv->lock);
	uint64_t addr = mic_blk_pool_alloc(&drv->pool, len);

	pthread_mutex_unlock(&drv->lock);
	return addr;
}

void mic_blk_free(struct mic_blk_drv *drv, uint64_t addr, uint32_t len)
{
	pthread_mutex_lock(&drv->lock);
	mic_blk_pool_free(&drv->pool, addr, len);
	pthread_mutex_unlock(&drv->lock);
}

uint32_t mic_blk_free_pages(struct mic_blk_drv *drv)
{
	pthread_mutex_lock(&drv->lock);
	uint32_t n = drv->pool.free;

	pthread_mutex_unlock(&drv->lock);
	return n;
}

void *mic_blk_at(struct mic_blk_drv *drv, uint64_t addr, uint32_t len)
{
	return mic_gddr_at(drv->vdrv->bus, addr, len);
}

/* --- completions (all under the lock) --------------------------------------------------------- */

/* Whoever reaps is awake: nobody signals himself. */
static void wake(struct mic_blk_user *u)
{
	if (u->asleep)
		(void)!eventfd_write(u->wake_fd, 1);
}

static void hand_back(struct mic_blk_drv *drv, struct mic_blk_req *req, int error)
{
	struct mic_blk_user *u = req->user;

	drv->inflight[req->slot] = NULL;
	drv->free_slot[drv->free_slots++] = req->slot;
	req->error = error;
	req->next = NULL;
	*u->tail = req;
	u->tail = &req->next;
	wake(u);
}

static void fail_all(struct mic_blk_drv *drv, int error)
{
	mic_store_release(&drv->error, error);
	for (unsigned i = 0; i < MIC_MAX_VRING_ENTRIES; i++)
		if (drv->inflight[i])
			hand_back(drv, drv->inflight[i], error);
	for (struct mic_blk_user *u = drv->users; u; u = u->next)
		wake(u);
}

void mic_blk_drv_stop(struct mic_blk_drv *drv)
{
	pthread_mutex_lock(&drv->lock);
	if (!drv->error)
		fail_all(drv, ESHUTDOWN);
	pthread_mutex_unlock(&drv->lock);
}

static int status_errno(uint8_t status)
{
	if (status == MIC_VIRTIO_BLK_S_OK)
		return 0;
	return status == MIC_VIRTIO_BLK_S_UNSUPP ? EOPNOTSUPP : EIO;
}

static bool device_needs_reset(const struct mic_blk_drv *drv)
{
	return drv->status && mic_load_acquire(drv->status) & MIC_VIRTIO_NEEDS_RESET;
}

/* Move everything the device has finished to its users. */
static void collect(struct mic_blk_drv *drv)
{
	uint64_t token;
	uint32_t len;
	bool any = false;
	int rc = 0;

	if (drv->error)
		return;
	do {
		while ((rc = mic_dq_get(drv->dq, &token, &len)) > 0) {
			struct mic_blk_req *req = drv->inflight[token];

			hand_back(
				drv, req,
				status_errno(mic_load_relaxed(&drv->slots[token * SLOT_BYTES + STATUS_OFF])));
			any = true;
		}
		/* While somebody sleeps the device must go on interrupting. */
	} while (!rc && any && drv->sleepers && mic_dq_enable_interrupt(drv->dq));
	if (rc < 0 || device_needs_reset(drv)) {
		fail_all(drv, EIO);
		return;
	}
	if (!any)
		return;
	if (!drv->sleepers)
		mic_dq_disable_interrupt(drv->dq);
	for (struct mic_blk_user *u = drv->users; u; u = u->next)
		if (u->wants_slot)
			wake(u);
}

unsigned mic_blk_reap(struct mic_blk_user *user, struct mic_blk_req **out, unsigned max)
{
	struct mic_blk_drv *drv = user->drv;
	unsigned n = 0;

	pthread_mutex_lock(&drv->lock);
	collect(drv);
	for (; n < max && user->done; n++) {
		out[n] = user->done;
		mic_store_relaxed(&user->done, out[n]->next);
	}
	if (!user->done)
		user->tail = &user->done;
	pthread_mutex_unlock(&drv->lock);
	return n;
}

/* --- submission ------------------------------------------------------------------------------- */

static unsigned fill_segments(const struct mic_blk_drv *drv, const struct mic_blk_req *req, uint16_t slot,
			      struct mic_seg *seg)
{
	uint64_t at = drv->slots_addr + (uint64_t)slot * SLOT_BYTES;
	unsigned n = 0;

	seg[n++] = (struct mic_seg){.addr = at, .len = sizeof(struct mic_virtio_blk_req)};
	if (req->len)
		seg[n++] = (struct mic_seg){.addr = req->addr, .len = req->len};
	seg[n++] = (struct mic_seg){.addr = at + STATUS_OFF, .len = 1};
	return n;
}

static bool device_writes(uint32_t type)
{
	return type == MIC_VIRTIO_BLK_T_IN || type == MIC_VIRTIO_BLK_T_GET_ID;
}

static int submit_locked(struct mic_blk_drv *drv, struct mic_blk_req *req)
{
	if (drv->error)
		return -drv->error;
	if (!drv->free_slots)
		return -EAGAIN;
	uint16_t slot = drv->free_slot[drv->free_slots - 1];
	struct mic_virtio_blk_req head = {.type = req->type, .sector = req->sector};
	struct mic_seg seg[3];
	unsigned n = fill_segments(drv, req, slot, seg), in = req->len && device_writes(req->type) ? 2 : 1;

	memcpy(drv->slots + slot * SLOT_BYTES, &head, sizeof head);
	drv->slots[slot * SLOT_BYTES + STATUS_OFF] = 0xff;
	int rc = mic_dq_add(drv->dq, seg, n - in, in, slot);

	if (rc < 0)
		return rc == -ENOSPC ? -EAGAIN : rc;
	drv->free_slots--;
	drv->inflight[slot] = req;
	req->slot = slot;
	return 0;
}

int mic_blk_submit(struct mic_blk_user *user, struct mic_blk_req *req)
{
	struct mic_blk_drv *drv = user->drv;

	req->user = user;
	pthread_mutex_lock(&drv->lock);
	int rc = submit_locked(drv, req);

	pthread_mutex_unlock(&drv->lock);
	return rc;
}

void mic_blk_kick(struct mic_blk_user *user)
{
	struct mic_blk_drv *drv = user->drv;

	pthread_mutex_lock(&drv->lock);
	mic_vdrv_kick(drv->vdrv, drv->dq);
	pthread_mutex_unlock(&drv->lock);
}

/* --- waiting ---------------------------------------------------------------------------------- */

bool mic_blk_pending(const struct mic_blk_user *user)
{
	return mic_dq_has_completion(user->drv->dq) || mic_load_relaxed(&user->done) ||
	       mic_blk_drv_stopped(user->drv);
}

bool mic_blk_spin(struct mic_blk_user *user)
{
	uint64_t end = mic_spin_until(&user->spin, user->spin_us);

	if (!end)
		return false;
	do {
		for (unsigned i = 0; i < SPIN_STEP; i++) {
			if (mic_blk_pending(user)) {
				mic_spin_done(&user->spin, true);
				return true;
			}
			mic_cpu_relax();
		}
	} while (mic_now_ns() < end);
	mic_spin_done(&user->spin, false);
	return false;
}

bool mic_blk_arm(struct mic_blk_user *user, bool want_slot)
{
	struct mic_blk_drv *drv = user->drv;

	pthread_mutex_lock(&drv->lock);
	bool ready = mic_dq_enable_interrupt(drv->dq) || user->done || drv->error ||
		     device_needs_reset(drv) || (want_slot && drv->free_slots && drv->dq->free_num >= 3);

	if (!ready) {
		user->asleep = true;
		user->wants_slot = want_slot;
		drv->sleepers++;
		mic_spin_sleeping(&user->spin);
	}
	pthread_mutex_unlock(&drv->lock);
	return !ready;
}

void mic_blk_awake(struct mic_blk_user *user)
{
	struct mic_blk_drv *drv = user->drv;

	pthread_mutex_lock(&drv->lock);
	if (user->asleep) {
		user->asleep = user->wants_slot = false;
		drv->sleepers--;
		mic_spin_woke(&user->spin, user->spin_us);
	}
	pthread_mutex_unlock(&drv->lock);
	eventfd_t drop;

	(void)!eventfd_read(user->wake_fd, &drop);
	mic_line_take(user->line_fd);
}

void mic_blk_wake_fds(const struct mic_blk_user *user, int fds[2])
{
	fds[0] = user->line_fd;
	fds[1] = user->wake_fd;
}

/* Sleep until something may have changed for this user. */
static void wait_for(struct mic_blk_user *user, bool want_slot)
{
	int fds[3] = {user->drv->vdrv->stop_fd, user->line_fd, user->wake_fd};

	if (mic_blk_spin(user) || !mic_blk_arm(user, want_slot))
		return;
	int mask = mic_wait_fds(fds, 3, -1);

	mic_blk_awake(user);
	if (mask > 0 && mask & 1)
		mic_blk_drv_stop(user->drv);
}

int mic_blk_execute(struct mic_blk_user *user, uint32_t type, uint64_t sector, uint64_t addr, uint32_t len)
{
	struct mic_blk_req req = {.type = type, .sector = sector, .addr = addr, .len = len}, *back;
	int rc;

	while ((rc = mic_blk_submit(user, &req)) == -EAGAIN) {
		wait_for(user, true);
		mic_blk_reap(user, &back, 0);
	}
	if (rc < 0)
		return rc;
	mic_blk_kick(user);
	while (!mic_blk_reap(user, &back, 1))
		wait_for(user, false);
	return -req.error;
}
