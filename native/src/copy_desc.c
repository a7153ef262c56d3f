/* COPY_DESC (VOP 6.4, 7): a byte stream between user elements and the segments of one chain.
 *
 * User memory is touched only through process_vm_readv(2)/writev(2) on this process, so that a bad
 * pointer is EFAULT, as it is for a kernel, and never a signal. Where a sandbox forbids the call, plain
 * copies are made. */
#define _GNU_SOURCE
#include "mic/copy_desc.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "mic/barrier.h"

#define MAX_SEGS         256u
#define ELEMS            64u /* user elements read at a time */
#define ALIGN            ((uint64_t)MIC_DMA_ALIGN)
#define DMA_STATUS_ERROR 3 /* what the real stack leaks as result (VOP 6.4) */

struct mic_copy {
	pthread_mutex_t lock;
	struct mic_vdev *vdev;
	struct mic_vq *vq;
	struct mic_copy_setup setup;
	uint8_t *bounce;
	bool removed;
	bool failed; /* the ring broke; EIO until the reset */
	bool held;   /* a chain was fetched and not completed */
	struct mic_chain chain;
	struct iovec iov[MAX_SEGS];
	unsigned at, segs;      /* next segment, and how many there are */
	size_t off;             /* bytes consumed of segment `at` */
	uint64_t read, written; /* bytes of this chain so far: from the card, to the card */
	struct mic_copy_stats stats;
};

/* --- user memory ------------------------------------------------------------------------------ */

static int user_copy(uint64_t user, void *mine, size_t len, bool to_user)
{
	struct iovec local = {mine, len}, remote = {(void *)(uintptr_t)user, len};
	ssize_t n;

	if (!len)
		return 0;
	do {
		n = to_user ? process_vm_writev(getpid(), &local, 1, &remote, 1, 0)
			    : process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
	} while (n < 0 && errno == EINTR);
	if (n == (ssize_t)len)
		return 0;
	if (n >= 0 || (errno != ENOSYS && errno != EPERM))
		return -EFAULT;
	if (to_user)
		memcpy(remote.iov_base, mine, len);
	else
		memcpy(mine, remote.iov_base, len);
	return 0;
}

int mic_copy_from_user(void *mine, const void *user, size_t len)
{
	return user_copy((uint64_t)(uintptr_t)user, mine, len, false);
}

/* --- DMA -------------------------------------------------------------------------------------- */

static uint64_t card_address(const struct mic_copy *c, const void *p)
{
	return (uint64_t)((const uint8_t *)p - mic_bus_gddr(c->vdev->bus));
}

static int by_channel(struct mic_copy *c, uint64_t dst, uint64_t src, uint64_t len)
{
	struct mic_dma_chan *ch = c->setup.chan;
	int rc = mic_dma_prep_memcpy(ch, dst, src, len, MIC_DMA_PREP_FENCE);

	if (rc == 0) {
		int cookie = mic_dma_submit(ch, 0);

		rc = mic_dma_wait(ch, cookie, c->setup.dma_timeout_ms, true);
		if (rc < 0) /* what is stuck must not write later (VOP-57) */
			mic_dma_terminate(ch, c->setup.dma_timeout_ms);
	}
	return rc;
}

static bool again(int error)
{
	return error == EINTR || error == EAGAIN;
}

/* 0: the time is over, whatever signals came meanwhile. */
static int wait_owner(int fd, short events, uint64_t end_ns)
{
	struct pollfd p = {.fd = fd, .events = events};

	for (;;) {
		uint64_t now = mic_now_ns();
		int rc = now < end_ns ? poll(&p, 1, (int)((end_ns - now) / 1000000) + 1) : 0;

		if (rc >= 0 || errno != EINTR)
			return rc;
	}
}

/* The owner has a limit of its own; ours is for an owner that hangs. Answers to copies that we gave up are
 * passed over. */
static int by_owner(struct mic_copy *c, uint64_t dst, uint64_t src, uint64_t len)
{
	static uint64_t ids;
	struct mic_copy_job job = {mic_fetch_add(&ids, 1u) + 1, dst, src, len};
	struct mic_copy_done done = {0};
	uint64_t end = mic_now_ns() + 2000000ull * (unsigned)c->setup.dma_timeout_ms;
	int fd = c->setup.owner;
	ssize_t n;

	while ((n = send(fd, &job, sizeof job, MSG_NOSIGNAL | MSG_DONTWAIT)) < 0 && again(errno))
		if (wait_owner(fd, POLLOUT, end) == 0)
			return -ETIMEDOUT;
	while (n > 0 && done.id != job.id) {
		if (wait_owner(fd, POLLIN, end) == 0)
			return -ETIMEDOUT;
		n = recv(fd, &done, sizeof done, MSG_DONTWAIT);
		if (n < 0 && again(errno))
			n = 1;
	}
	return n > 0 ? (int)done.result : -EIO;
}

static int dma(struct mic_copy *c, uint64_t dst, uint64_t src, uint64_t len)
{
	int rc = c->setup.chan ? by_channel(c, dst, src, len) : by_owner(c, dst, src, len);

	if (rc == 0)
		return 0;
	c->stats.dma_errors++;
	if (rc == -ENOMEM)
		return rc;
	return c->setup.compat ? DMA_STATUS_ERROR : -EIO;
}

static bool has_dma(const struct mic_copy_setup *setup)
{
	return setup->chan || setup->owner;
}

static bool wants_dma(const struct mic_copy *c, size_t len)
{
	return has_dma(&c->setup) && (c->setup.compat || len >= c->setup.dma_min);
}

/* Card to user through the bounce buffer: the source is widened to whole 64-byte lines. */
static int dma_to_user(struct mic_copy *c, uint64_t user, const uint8_t *p, size_t len)
{
	uint64_t src = card_address(c, p), slack = src % ALIGN;

	while (len) {
		size_t n = len < MIC_COPY_BOUNCE - slack ? len : (size_t)(MIC_COPY_BOUNCE - slack);
		uint64_t whole = (slack + n + ALIGN - 1) & ~(ALIGN - 1);
		int rc = dma(c, c->setup.bounce_addr, src - slack, whole);

		if (rc)
			return rc;
		rc = user_copy(user, c->bounce + slack, n, true);
		if (rc)
			return rc;
		c->stats.in_bytes_dma += slack + n;
		user += n;
		src += n;
		len -= n;
		slack = 0; /* only the first chunk starts inside a line */
	}
	return 0;
}

/* User to card: whole lines by DMA when the destination is aligned, the tail by the CPU. The real stack
 * rounds the length up and leaves stale bytes behind the payload; ours never does. */
static int dma_to_card(struct mic_copy *c, uint64_t user, uint8_t *p, size_t len)
{
	size_t lines = len & ~(ALIGN - 1);
	uint64_t dst = card_address(c, p);

	for (size_t done = 0, n; done < lines; done += n) {
		n = lines - done < MIC_COPY_BOUNCE ? lines - done : MIC_COPY_BOUNCE;
		int rc = user_copy(user + done, c->bounce, n, false);

		if (!rc)
			rc = dma(c, dst + done, c->setup.bounce_addr, n);
		if (rc)
			return rc;
		c->stats.out_bytes_dma += n;
	}
	c->stats.tx_len_unaligned += len - lines;
	return user_copy(user + lines, p + lines, len - lines, false);
}

/* --- the stream ------------------------------------------------------------------------------- */

static int to_user(struct mic_copy *c, uint64_t user, uint8_t *p, size_t len)
{
	int rc = wants_dma(c, len) ? dma_to_user(c, user, p, len) : user_copy(user, p, len, true);

	if (!rc) {
		c->stats.in_bytes += len;
		c->read += len;
	}
	return rc;
}

static int to_card(struct mic_copy *c, uint64_t user, uint8_t *p, size_t len)
{
	int rc;

	if (!wants_dma(c, len)) {
		rc = user_copy(user, p, len, false);
	} else if (card_address(c, p) % ALIGN) {
		c->stats.tx_dst_unaligned += len;
		rc = user_copy(user, p, len, false);
	} else {
		rc = dma_to_card(c, user, p, len);
	}
	if (!rc) {
		c->stats.out_bytes += len;
		c->written += len;
	}
	return rc;
}

/* One user element against what is left of the chain. Adds the bytes moved to *moved. */
static int move(struct mic_copy *c, uint64_t user, size_t len, uint64_t *moved)
{
	while (len && c->at < c->segs) {
		struct iovec *seg = &c->iov[c->at];
		size_t part = seg->iov_len - c->off < len ? seg->iov_len - c->off : len;
		uint8_t *p = (uint8_t *)seg->iov_base + c->off;
		int rc = c->at < c->chain.out_num ? to_user(c, user, p, part) : to_card(c, user, p, part);

		if (rc)
			return rc;
		*moved += part;
		user += part;
		len -= part;
		c->off += part;
		if (c->off == seg->iov_len) {
			c->at++;
			c->off = 0;
		}
	}
	return 0;
}

static void forget_chain(struct mic_copy *c)
{
	c->held = false;
	c->at = c->segs = 0;
	c->off = 0;
	c->read = c->written = 0;
}

static void complete(struct mic_copy *c)
{
	uint64_t len = c->setup.compat ? c->read + c->written : c->written;

	mic_vq_push(c->vq, c->chain.head, len > UINT32_MAX ? UINT32_MAX : (uint32_t)len);
	mic_vdev_complete(c->vdev, c->vq);
	forget_chain(c);
}

/* 1 a chain is held now, 0 nothing available, -errno: the ring broke. */
static int fetch(struct mic_copy *c)
{
	/* A chain consumed whole and never completed is lost on the real stack; ours gives it back. */
	if (c->held && !c->setup.compat)
		complete(c);
	forget_chain(c);
	int rc = mic_vq_pop(c->vq, &c->chain, c->iov, MAX_SEGS);

	if (rc < 0) {
		c->failed = true;
		mic_vdev_broken(c->vdev, c->vq);
		return rc;
	}
	c->held = rc;
	c->segs = rc ? c->chain.out_num + c->chain.in_num : 0;
	return rc;
}

/* All user elements in turn. 0, the first error, or what DMA leaks. */
static int move_all(struct mic_copy *c, const struct mic_copy_desc *d, uint64_t *moved)
{
	struct iovec elem[ELEMS];
	uint32_t n;

	for (uint32_t i = 0; i < d->iovcnt && c->at < c->segs; i += n) {
		n = d->iovcnt - i < ELEMS ? d->iovcnt - i : ELEMS;
		if (user_copy(d->iov + i * sizeof *elem, elem, n * sizeof *elem, false) < 0)
			return -EINVAL; /* not EFAULT: the real stack's answer (VOP-40) */
		for (uint32_t k = 0; k < n; k++) {
			int rc = move(c, (uint64_t)(uintptr_t)elem[k].iov_base, elem[k].iov_len, moved);

			if (rc)
				return rc;
		}
	}
	return 0;
}

static int run_locked(struct mic_copy *c, const struct mic_copy_desc *d, uint64_t *moved)
{
	bool fetched = c->at == c->segs;

	if (c->removed || !mic_load_acquire(c->vdev->desc + offsetof(struct mic_device_desc, status)))
		return -ENODEV;
	if (c->failed)
		return -EIO;
	if (c->vq->broken && !mic_vdev_driver_ok(c->vdev))
		return 0; /* the card has not handed its ring over yet: nothing is in it */
	int rc = fetched ? fetch(c) : 1;

	if (rc <= 0)
		return rc;
	if (!d->iovcnt)
		return c->setup.compat && fetched;
	rc = move_all(c, d, moved);

	if (d->update_used && *moved)
		complete(c);
	return rc;
}

int mic_copy_desc_run(struct mic_copy *c, void *arg)
{
	uint64_t user = (uint64_t)(uintptr_t)arg, moved = 0;
	struct mic_copy_desc d = {0};

	if (user_copy(user, &d, sizeof d, false) < 0)
		return -EFAULT;
	pthread_mutex_lock(&c->lock);
	int rc = run_locked(c, &d, &moved);

	pthread_mutex_unlock(&c->lock);
	if (rc < 0)
		return rc;
	d.out_len = (uint32_t)moved;
	return user_copy(user + offsetof(struct mic_copy_desc, out_len), &d.out_len, sizeof d.out_len, true)
		       ? -EFAULT
		       : rc;
}

/* --- life ------------------------------------------------------------------------------------- */

struct mic_copy *mic_copy_create(struct mic_vdev *vdev, unsigned index, const struct mic_copy_setup *setup)
{
	uint64_t size = mic_bus_host_size(vdev->bus);

	errno = 0;
	if (index >= vdev->num_vq)
		errno = EINVAL;
	else if (has_dma(setup) && (setup->bounce_off % ALIGN || setup->bounce_addr % ALIGN))
		errno = EINVAL;
	else if (has_dma(setup) && (setup->bounce_off > size || MIC_COPY_BOUNCE > size - setup->bounce_off))
		errno = EFAULT;
	if (errno)
		return NULL;
	struct mic_copy *c = calloc(1, sizeof *c);

	if (!c)
		return NULL;
	pthread_mutex_init(&c->lock, NULL);
	c->vdev = vdev;
	c->vq = &vdev->vq[index];
	c->setup = *setup;
	if (has_dma(setup))
		c->bounce = mic_bus_host(vdev->bus) + setup->bounce_off;
	return c;
}

void mic_copy_destroy(struct mic_copy *c)
{
	if (!c)
		return;
	pthread_mutex_destroy(&c->lock);
	free(c);
}

void mic_copy_reset(struct mic_copy *c)
{
	pthread_mutex_lock(&c->lock);
	forget_chain(c);
	c->failed = false;
	pthread_mutex_unlock(&c->lock);
}

void mic_copy_remove(struct mic_copy *c)
{
	pthread_mutex_lock(&c->lock);
	forget_chain(c);
	c->removed = true;
	pthread_mutex_unlock(&c->lock);
}

void mic_copy_stats(struct mic_copy *c, struct mic_copy_stats *out)
{
	pthread_mutex_lock(&c->lock);
	*out = c->stats;
	pthread_mutex_unlock(&c->lock);
}
