/* The local end of a network device: a frame descriptor (TAP, SEQPACKET socket) or a responder. */
#ifndef MIC_NET_END_H
#define MIC_NET_END_H

#include <stdbool.h>
#include <sys/uio.h>

#include "mic/net.h"

#define MIC_NET_HDR_LEGACY 10u
#define MIC_NET_HDR_FULL   12u
#define MIC_NET_ETH        14u
/* Largest frame: 64 KiB of IP with its Ethernet header and a VLAN tag. */
#define MIC_NET_FRAME_MAX (65536u + MIC_NET_ETH + 4u)
#define MIC_NET_F(bit)    (1ull << MIC_VIRTIO_NET_F_##bit)

struct mic_net_end {
	int fd;
	int gone_fd; /* readable when fd has failed, data or not; -1 with a responder */
	struct mic_resp *resp;
	uint8_t *flat; /* responder only: one frame in one piece */
	unsigned hdr_len;
	int error; /* errno that ended it, positive */
};

int mic_net_end_init(struct mic_net_end *end, int fd, struct mic_resp *resp);
void mic_net_end_fini(struct mic_net_end *end);
/* What to sleep on: frames, or while `blocked` (no buffers) only the end of the local end. */
int mic_net_end_fd(const struct mic_net_end *end, bool blocked);
/* What a sleep on that descriptor (the third of its mask, or -errno) means: a mic_run, or 0 to go on. */
int mic_net_end_woken(struct mic_net_end *end, int ready, bool blocked);
/* One frame with its vnet header: bytes, 0 nothing there, -1 the end is gone (end->error). */
long mic_net_end_recv(struct mic_net_end *end, const struct iovec *iov, unsigned n);
/* 0 sent, 1 dropped, -1 the end is gone. len = bytes in iov, header included. */
int mic_net_end_send(struct mic_net_end *end, const struct iovec *iov, unsigned n, uint64_t len);

/* A snapshot for another thread. */
void mic_net_stats_read(const struct mic_net_stats *s, struct mic_net_stats *out);

/* Length of the vnet header with these features (VOP 9.2). */
static inline unsigned mic_net_hdr_len(uint64_t features)
{
	if (features & (MIC_NET_F(MRG_RXBUF) | 1ull << MIC_VIRTIO_F_VERSION_1))
		return MIC_NET_HDR_FULL;
	return MIC_NET_HDR_LEGACY;
}

#endif
