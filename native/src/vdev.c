/* Devices and drivers around their rings: hand-shake bytes, lines, sleeping (VOP 2, 4). */
#define _GNU_SOURCE
#include "mic/vring.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "mic/barrier.h"

#define MAX_EXTRA 5u
#define SPIN_STEP 32u /* looks between two questions to the clock */

/* --- lines and sleeping ----------------------------------------------------------------------- */

int mic_line_open(int fd)
{
	int ep = epoll_create1(EPOLL_CLOEXEC);

	if (ep < 0)
		return -errno;
	struct epoll_event ev = {.events = EPOLLIN | EPOLLET};

	if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev) < 0) {
		int err = errno;

		close(ep);
		return -err;
	}
	return ep;
}

void mic_line_take(int line_fd)
{
	struct epoll_event ev;

	(void)!epoll_wait(line_fd, &ev, 1, 0);
}

int mic_wait_fds(const int *fds, unsigned n, int timeout_ms)
{
	struct pollfd p[8];
	int mask = 0;

	if (n > 8)
		return -EINVAL;
	for (unsigned i = 0; i < n; i++)
		p[i] = (struct pollfd){.fd = fds[i], .events = POLLIN};
	int rc = poll(p, n, timeout_ms);

	if (rc < 0)
		return -errno;
	for (unsigned i = 0; i < n; i++)
		if (p[i].revents)
			mask |= 1 << i;
	return mask;
}

/* Sleep on a line, a control descriptor and others; the line's edge is taken. */
static int sleep_on(int line_fd, int control_fd, const int *extra, unsigned n, int timeout_ms)
{
	int fds[2 + MAX_EXTRA] = {line_fd, control_fd};

	if (n > MAX_EXTRA)
		return -EINVAL;
	for (unsigned i = 0; i < n; i++)
		fds[2 + i] = extra[i];
	int mask = mic_wait_fds(fds, 2 + n, timeout_ms);

	if (mask > 0 && mask & 1)
		mic_line_take(line_fd);
	return mask;
}

/* --- device half ------------------------------------------------------------------------------ */

int mic_vdev_init(struct mic_vdev *dev, struct mic_bus *bus, uint64_t slot_off, uint64_t ctrl_off,
		  int kick_fd, int control_fd, unsigned num_vq)
{
	uint64_t size = mic_bus_host_size(bus);

	memset(dev, 0, sizeof *dev);
	dev->line_fd = -1;
	if (num_vq > MIC_MAX_VRINGS)
		return -EINVAL;
	if (slot_off > size - sizeof(struct mic_device_desc) ||
	    ctrl_off > size - sizeof(struct mic_device_ctrl))
		return -EFAULT;
	dev->bus = bus;
	dev->desc = mic_bus_host(bus) + slot_off;
	dev->ctrl = mic_bus_host(bus) + ctrl_off;
	dev->kick_fd = kick_fd;
	dev->control_fd = control_fd;
	dev->num_vq = num_vq;
	dev->spin_us = MIC_SPIN_US;
	for (unsigned i = 0; i < MIC_MAX_VRINGS; i++)
		dev->vq[i] = (struct mic_vq){.bus = bus, .broken = true, .error = ENXIO};
	dev->line_fd = mic_line_open(kick_fd);
	return dev->line_fd < 0 ? dev->line_fd : 0;
}

void mic_vdev_fini(struct mic_vdev *dev)
{
	if (dev->line_fd >= 0)
		close(dev->line_fd);
	dev->line_fd = -1;
}

static uint8_t load_status(const struct mic_vdev *dev)
{
	return mic_load_acquire(dev->desc + offsetof(struct mic_device_desc, status));
}

/* The card set one of its request bytes and rang; Python clears them when it has acted. */
static bool card_asks(const struct mic_vdev *dev)
{
	return mic_load_acquire(dev->ctrl + offsetof(struct mic_device_ctrl, vdev_reset)) ||
	       mic_load_acquire(dev->ctrl + offsetof(struct mic_device_ctrl, guest_ack)) ||
	       mic_load_acquire(dev->ctrl + offsetof(struct mic_device_ctrl, used_address_updated));
}

bool mic_vdev_handshake(struct mic_vdev *dev)
{
	uint8_t status = load_status(dev);

	if (status == dev->status)
		return card_asks(dev);
	dev->status = status;
	return true;
}

bool mic_vdev_driver_ok(const struct mic_vdev *dev)
{
	return load_status(dev) & MIC_VIRTIO_DRIVER_OK;
}

void mic_vdev_interrupt(struct mic_vdev *dev)
{
	int8_t db = (int8_t)mic_load_acquire(dev->ctrl + offsetof(struct mic_device_ctrl, h2c_vdev_db));

	dev->interrupts++;
	mic_ring_card(dev->bus, db, dev->fault_target);
}

void mic_vdev_complete(struct mic_vdev *dev, struct mic_vq *vq)
{
	if (mic_vq_should_interrupt(vq))
		mic_vdev_interrupt(dev);
}

void mic_vdev_broken(struct mic_vdev *dev, struct mic_vq *vq)
{
	vq->broken = true;
	/* The card writes this byte as well, hence the atomic or. */
	mic_fetch_or(dev->desc + offsetof(struct mic_device_desc, status), MIC_VIRTIO_NEEDS_RESET);
	mic_vdev_interrupt(dev);
}

static bool vdev_look(const struct mic_vdev *dev)
{
	uint8_t status = load_status(dev);

	if (status != dev->status || card_asks(dev))
		return true;
	if (!(status & MIC_VIRTIO_DRIVER_OK))
		return false;
	for (unsigned i = 0; i < dev->num_vq; i++)
		if (mic_vq_has_work(&dev->vq[i]))
			return true;
	return false;
}

bool mic_vdev_spin(struct mic_vdev *dev)
{
	uint64_t end = mic_spin_until(&dev->spin, dev->spin_us);

	if (!end)
		return false;
	do {
		for (unsigned i = 0; i < SPIN_STEP; i++) {
			if (vdev_look(dev)) {
				mic_spin_done(&dev->spin, true);
				return true;
			}
			mic_cpu_relax();
		}
	} while (mic_now_ns() < end);
	mic_spin_done(&dev->spin, false);
	return false;
}

int mic_vdev_sleep(struct mic_vdev *dev, const int *extra, unsigned n, int timeout_ms)
{
	mic_spin_sleeping(&dev->spin);
	int mask = sleep_on(dev->line_fd, dev->control_fd, extra, n, timeout_ms);

	mic_spin_woke(&dev->spin, dev->spin_us);
	dev->wakeups++;
	return mask;
}

/* --- driver half ------------------------------------------------------------------------------ */

int mic_vdrv_init(struct mic_vdrv *drv, struct mic_bus *bus, int irq_fd, int stop_fd, int c2h_db,
		  unsigned num_vq)
{
	memset(drv, 0, sizeof *drv);
	drv->line_fd = -1;
	if (num_vq > MIC_MAX_VRINGS)
		return -EINVAL;
	drv->bus = bus;
	drv->irq_fd = irq_fd;
	drv->stop_fd = stop_fd;
	drv->c2h_db = c2h_db;
	drv->num_vq = num_vq;
	drv->spin_us = MIC_SPIN_US;
	for (unsigned i = 0; i < MIC_MAX_VRINGS; i++)
		drv->dq[i].broken = true;
	drv->line_fd = mic_line_open(irq_fd);
	return drv->line_fd < 0 ? drv->line_fd : 0;
}

void mic_vdrv_fini(struct mic_vdrv *drv)
{
	if (drv->line_fd >= 0)
		close(drv->line_fd);
	drv->line_fd = -1;
}

void mic_vdrv_kick(struct mic_vdrv *drv, struct mic_dq *dq)
{
	if (!mic_dq_should_kick(dq))
		return;
	drv->kicks++;
	mic_ring_host(drv->bus, drv->c2h_db, drv->fault_target);
}

int mic_vdrv_sleep(struct mic_vdrv *drv, const int *extra, unsigned n, int timeout_ms)
{
	mic_spin_sleeping(&drv->spin);
	int mask = sleep_on(drv->line_fd, drv->stop_fd, extra, n, timeout_ms);

	mic_spin_woke(&drv->spin, drv->spin_us);
	drv->wakeups++;
	return mask;
}
