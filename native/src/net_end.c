/* Frames in and out of a TAP, a SEQPACKET socket or a responder. */
#define _GNU_SOURCE
#include "net_end.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "mic/iov.h"

int mic_net_end_init(struct mic_net_end *end, int fd, struct mic_resp *resp)
{
	*end = (struct mic_net_end){ .fd = fd, .resp = resp, .hdr_len = MIC_NET_HDR_FULL };
	if ((fd < 0) == !resp)
		return -EINVAL;
	if (resp) {
		end->flat = malloc(MIC_NET_FRAME_MAX);
		if (!end->flat)
			return -ENOMEM;
	}
	return 0;
}

void mic_net_end_fini(struct mic_net_end *end)
{
	free(end->flat);
}

int mic_net_end_fd(const struct mic_net_end *end)
{
	return end->resp ? mic_resp_poll_fd(end->resp) : end->fd;
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
