/* Frames in and out of a TAP, a SEQPACKET socket or a responder. */
#define _GNU_SOURCE
#include "net_end.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "mic/barrier.h"
#include "mic/iov.h"

/* A view of fd that is readable only when it has failed or hung up. The kernel reports the end of a TAP
 * as a wake for readers, who then find POLLERR: asking for POLLPRI, which no TAP has, lets the wake in
 * and no frame. */
static int watch_end(int fd)
{
	int ep = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event ev = {.events = EPOLLPRI};

	if (ep < 0)
		return -errno;
	if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev) < 0) {
		int rc = -errno;

		close(ep);
		return rc;
	}
	return ep;
}

int mic_net_end_init(struct mic_net_end *end, int fd, struct mic_resp *resp)
{
	*end = (struct mic_net_end){.fd = fd, .gone_fd = -1, .resp = resp, .hdr_len = MIC_NET_HDR_FULL};
	if ((fd < 0) == !resp)
		return -EINVAL;
	if (resp) {
		end->flat = malloc(MIC_NET_FRAME_MAX);
		return end->flat ? 0 : -ENOMEM;
	}
	end->gone_fd = watch_end(fd);
	return end->gone_fd < 0 ? end->gone_fd : 0;
}

void mic_net_end_fini(struct mic_net_end *end)
{
	if (end->gone_fd >= 0)
		close(end->gone_fd);
	free(end->flat);
}

int mic_net_end_fd(const struct mic_net_end *end, bool blocked)
{
	if (end->resp)
		return blocked ? -1 : mic_resp_poll_fd(end->resp);
	return blocked ? end->gone_fd : end->fd;
}

int mic_net_end_woken(struct mic_net_end *end, int ready, bool blocked)
{
	if (ready < 0) {
		end->error = -ready;
		return MIC_RUN_LOCAL;
	}
	if (ready & 2)
		return MIC_RUN_CONTROL;
	if (blocked && ready & 4) {
		end->error = ENODEV;
		return MIC_RUN_LOCAL;
	}
	return 0;
}

static long resp_recv(struct mic_net_end *end, const struct iovec *iov, unsigned n)
{
	static const uint8_t no_offload[MIC_NET_HDR_FULL];
	uint32_t len = mic_resp_output(end->resp, end->flat, MIC_NET_FRAME_MAX);

	if (!len)
		return 0;
	mic_iov_write(iov, n, 0, no_offload, end->hdr_len);
	mic_iov_write(iov, n, end->hdr_len, end->flat, len);
	return (long)(len + end->hdr_len);
}

static int resp_send(struct mic_net_end *end, const struct iovec *iov, unsigned n, uint64_t len)
{
	uint8_t flags = 0;

	if (len - end->hdr_len > MIC_NET_FRAME_MAX)
		return 1;
	mic_iov_read(iov, n, 0, &flags, 1);
	uint64_t got = mic_iov_read(iov, n, end->hdr_len, end->flat, len - end->hdr_len);

	mic_resp_input(end->resp, end->flat, (uint32_t)got, flags & 3);
	return 0;
}

/* Does this errno mean "not now" rather than "never again"? */
static int passing(int err)
{
	return err == EAGAIN || err == EINTR || err == ENOBUFS || err == ENOMEM;
}

long mic_net_end_recv(struct mic_net_end *end, const struct iovec *iov, unsigned n)
{
	if (end->resp)
		return resp_recv(end, iov, n);
	ssize_t got = readv(end->fd, iov, (int)n);

	if (got > 0)
		return got;
	if (got < 0 && passing(errno))
		return 0;
	end->error = got < 0 ? errno : ECONNRESET;
	return -1;
}

int mic_net_end_send(struct mic_net_end *end, const struct iovec *iov, unsigned n, uint64_t len)
{
	if (len < end->hdr_len + MIC_NET_ETH)
		return 1;
	if (end->resp)
		return resp_send(end, iov, n, len);
	if (writev(end->fd, iov, (int)n) >= 0)
		return 0;
	/* EIO: the interface is down; EINVAL: a header that the kernel refuses. Like a NIC: drop. */
	if (errno == EBADFD || errno == EBADF || errno == EPIPE || errno == ECONNRESET) {
		end->error = errno;
		return -1;
	}
	return 1;
}

void mic_net_stats_read(const struct mic_net_stats *s, struct mic_net_stats *out)
{
	*out = (struct mic_net_stats){
		.to_card_packets = mic_load_relaxed(&s->to_card_packets),
		.to_card_bytes = mic_load_relaxed(&s->to_card_bytes),
		.to_card_drops = mic_load_relaxed(&s->to_card_drops),
		.from_card_packets = mic_load_relaxed(&s->from_card_packets),
		.from_card_bytes = mic_load_relaxed(&s->from_card_bytes),
		.from_card_drops = mic_load_relaxed(&s->from_card_drops),
		.sleeps = mic_load_relaxed(&s->sleeps),
	};
}
