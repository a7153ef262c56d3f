/* virtio-console driver half: the card's pty master <-> rings, buffers in GDDR (VOP 8.6). */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "mic/barrier.h"
#include "mic/console.h"

enum { RX = 0, TX = 1 };

#define BUF      4096u /* one page per direction and element, as the stock backend */
#define BUFS_MAX 32u
#define BUFS_MIN 2u
#define EVENTS   4
#define PASSES   64u

struct mic_con_drv {
	struct mic_vdrv *drv;
	int local_fd, epoll_fd;
	struct mic_con_stats stats;
	uint8_t *mem;
	uint64_t addr;
	unsigned bufs; /* per direction; receive buffers first */
	uint16_t tx_free[BUFS_MAX];
	unsigned tx_nfree;
	/* The received buffer that is being written out. */
	bool busy;
	uint64_t rx_buf;
	uint32_t rx_at, rx_len;
	bool gone; /* the local end is closed */
};

static int post_rx(struct mic_con_drv *cd, uint64_t buf)
{
	struct mic_seg seg = {.addr = cd->addr + buf * BUF, .len = BUF};

	return mic_dq_add(&cd->drv->dq[RX], &seg, 0, 1, buf);
}

static int post_all(struct mic_con_drv *cd)
{
	for (unsigned i = 0; i < cd->bufs; i++) {
		int rc = post_rx(cd, i);

		if (rc < 0)
			return rc;
		cd->tx_free[cd->tx_nfree++] = (uint16_t)i;
	}
	return 0;
}

static int watch(struct mic_con_drv *cd, int fd, uint32_t events)
{
	struct epoll_event ev = {.events = events, .data.fd = fd};

	return fd >= 0 && epoll_ctl(cd->epoll_fd, EPOLL_CTL_ADD, fd, &ev) < 0 ? -errno : 0;
}

struct mic_con_drv *mic_con_drv_create(struct mic_vdrv *drv, int local_fd, uint64_t area, uint64_t len)
{
	struct mic_con_drv *cd = calloc(1, sizeof *cd);
	uint64_t bufs = len / BUF / 2;
	int rc = 0;

	if (!cd)
		return NULL;
	cd->drv = drv;
	cd->local_fd = local_fd;
	cd->addr = area;
	cd->mem = mic_gddr_at(drv->bus, area, len);
	cd->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	for (unsigned q = 0; q < 2; q++)
		if (bufs > drv->dq[q].num)
			bufs = drv->dq[q].num;
	cd->bufs = bufs > BUFS_MAX ? BUFS_MAX : (unsigned)bufs;
	if (cd->epoll_fd < 0)
		rc = -errno;
	else if (!cd->mem)
		rc = -EFAULT;
	else if (cd->bufs < BUFS_MIN)
		rc = -ENOSPC;
	/* Edges for the pty: without a slave it reports POLLHUP for ever. */
	if (rc == 0)
		rc = watch(cd, local_fd, EPOLLIN | EPOLLOUT | EPOLLET);
	if (rc == 0)
		rc = watch(cd, drv->stop_fd, EPOLLIN);
	if (rc == 0)
		rc = watch(cd, drv->line_fd, EPOLLIN);
	if (rc == 0)
		rc = post_all(cd);
	if (rc == 0)
		return cd;
	mic_con_drv_destroy(cd);
	errno = -rc;
	return NULL;
}

void mic_con_drv_destroy(struct mic_con_drv *cd)
{
	if (!cd)
		return;
	if (cd->epoll_fd >= 0)
		close(cd->epoll_fd);
	free(cd);
}

void mic_con_drv_stats(const struct mic_con_drv *cd, struct mic_con_stats *out)
{
	*out = (struct mic_con_stats){
		.to_card_bytes = mic_load_relaxed(&cd->stats.to_card_bytes),
		.from_card_bytes = mic_load_relaxed(&cd->stats.from_card_bytes),
	};
}

/* Host -> card. 1 progress, 0 nothing or the pty is full, -1 the ring is broken. */
static int receive(struct mic_con_drv *cd)
{
	if (!cd->busy) {
		int rc = mic_dq_get(&cd->drv->dq[RX], &cd->rx_buf, &cd->rx_len);

		if (rc <= 0)
			return rc < 0 ? -1 : 0;
		if (cd->rx_buf >= cd->bufs || cd->rx_len > BUF)
			return -1;
		cd->busy = true;
		cd->rx_at = 0;
	}
	while (cd->rx_at < cd->rx_len) {
		ssize_t n =
			write(cd->local_fd, cd->mem + cd->rx_buf * BUF + cd->rx_at, cd->rx_len - cd->rx_at);

		if (n < 0 && (errno == EPIPE || errno == ECONNRESET || errno == EBADF))
			cd->gone = true;
		if (n < 0 && errno == EIO)
			break; /* no slave: what was typed at nobody is lost, as on a serial line */
		if (n <= 0)
			return 0;
		cd->rx_at += (uint32_t)n;
		mic_count(&cd->stats.to_card_bytes, (uint64_t)n);
	}
	cd->busy = false;
	if (post_rx(cd, cd->rx_buf) < 0)
		return -1;
	mic_vdrv_kick(cd->drv, &cd->drv->dq[RX]);
	return 1;
}

static int reap(struct mic_con_drv *cd)
{
	uint64_t buf;
	uint32_t len;
	int rc;

	while ((rc = mic_dq_get(&cd->drv->dq[TX], &buf, &len)) > 0) {
		if (buf >= cd->bufs || cd->tx_nfree >= cd->bufs)
			return -EIO;
		cd->tx_free[cd->tx_nfree++] = (uint16_t)buf;
	}
	return rc;
}

/* Card -> host. 1 progress, 0 nothing to send or no buffer, -1 the ring is broken. */
static int transmit(struct mic_con_drv *cd)
{
	if (reap(cd) < 0)
		return -1;
	if (!cd->tx_nfree)
		return 0;
	unsigned buf = cd->tx_free[cd->tx_nfree - 1];
	uint64_t off = (uint64_t)(cd->bufs + buf) * BUF;
	ssize_t n = read(cd->local_fd, cd->mem + off, BUF);

	if (n == 0 || (n < 0 && (errno == ECONNRESET || errno == EBADF)))
		cd->gone = true;
	if (n <= 0)
		return 0; /* EAGAIN, or EIO: no slave is open now */
	struct mic_seg seg = {.addr = cd->addr + off, .len = (uint32_t)n};

	if (mic_dq_add(&cd->drv->dq[TX], &seg, 1, 0, buf) < 0)
		return -1;
	cd->tx_nfree--;
	mic_count(&cd->stats.from_card_bytes, (uint64_t)n);
	mic_vdrv_kick(cd->drv, &cd->drv->dq[TX]);
	return 1;
}

static bool arm(struct mic_con_drv *cd)
{
	bool again = false;

	if (!cd->busy)
		again = mic_dq_enable_interrupt(&cd->drv->dq[RX]);
	if (!cd->tx_nfree)
		again |= mic_dq_enable_interrupt(&cd->drv->dq[TX]);
	return again;
}

static int look(struct mic_con_drv *cd, int timeout_ms)
{
	struct epoll_event ev[EVENTS];
	int n = epoll_wait(cd->epoll_fd, ev, EVENTS, timeout_ms);
	int why = 0;

	if (n < 0)
		return errno == EINTR ? 0 : -errno;
	for (int i = 0; i < n; i++) {
		if (ev[i].data.fd == cd->drv->stop_fd)
			why = MIC_RUN_CONTROL;
		if (ev[i].data.fd == cd->drv->line_fd) {
			cd->drv->wakeups++;
			mic_line_take(cd->drv->line_fd);
		}
	}
	return why;
}

int mic_con_drv_run(struct mic_con_drv *cd)
{
	unsigned passes = 0;

	mic_vdrv_kick(cd->drv, &cd->drv->dq[RX]);
	for (;;) {
		int in = receive(cd), out = in < 0 ? -1 : transmit(cd), why = 0;

		if (in < 0 || out < 0)
			return -EIO;
		if (cd->gone)
			return MIC_RUN_LOCAL;
		if (in || out) {
			if (++passes % PASSES == 0)
				why = look(cd, 0);
		} else {
			if (!arm(cd))
				why = look(cd, -1);
			mic_dq_disable_interrupt(&cd->drv->dq[RX]);
			mic_dq_disable_interrupt(&cd->drv->dq[TX]);
		}
		if (why)
			return why;
	}
}
