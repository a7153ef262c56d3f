/* virtio-net, both halves, and the user-space responder (VOP 8.5, 9.2).
 *
 * device  backend process: TAP of the host <-> rings. Queue 0 = to the card, queue 1 = from it.
 * driver  card OS: rings <-> TAP of the card.
 *
 * Frames go by readv/writev between the TAP and card memory: there is no bounce copy. A local end
 * is a descriptor that reads and writes whole frames behind a virtio_net_hdr (TAP with IFF_VNET_HDR,
 * or a SOCK_SEQPACKET socket), or a responder where no TAP may be had. */
#ifndef MIC_NET_H
#define MIC_NET_H

#include <stdint.h>

#include "mic/pcap.h"
#include "mic/vring.h"

/* cffi-begin */
struct mic_net_stats {
	uint64_t to_card_packets, to_card_bytes, to_card_drops;
	uint64_t from_card_packets, from_card_bytes, from_card_drops;
	uint64_t sleeps; /* how often the loop blocked */
};

/* --- responder -------------------------------------------------------------------------------- */

/* A host of its own: answers ARP, ICMP echo, UDP echo and TCP echo (port 7) for one address, hands
 * out one DHCP lease, sends pings. Everything it receives is hostile: each length is checked, every
 * table is bounded. */
struct mic_resp;

struct mic_resp_stats {
	uint64_t frames_in, frames_out, bad_frames, ignored_frames, out_overflow;
	uint64_t arp_replies, icmp_replies, udp_echoes, dhcp_replies;
	uint64_t tcp_accepted, tcp_refused, tcp_reset, tcp_echoed, tcp_retransmits;
};

/* Addresses are host-order numbers. lease_ip: what DHCP hands out, 0 = no DHCP server.
 * NULL with errno set on failure. */
struct mic_resp *mic_resp_create(const uint8_t *mac, uint32_t ip, uint32_t netmask, uint32_t lease_ip);
void mic_resp_destroy(struct mic_resp *r);
/* One Ethernet frame from the wire; csum_ok: the sender's checksum is not filled in yet (vnet header),
 * do not verify it. */
void mic_resp_input(struct mic_resp *r, const uint8_t *frame, uint32_t len, int csum_ok);
/* Next frame for the wire: its length, or 0. cap >= 1514 bytes. */
uint32_t mic_resp_output(struct mic_resp *r, uint8_t *frame, uint32_t cap);
/* Readable when mic_resp_output() has something to say: frames are queued or a timer is due. */
int mic_resp_poll_fd(const struct mic_resp *r);
/* Send `count` echo requests, one each interval_ms, and wait for the answers until timeout_ms after
 * the last. Blocks the calling thread; the loop must run in another. rtts_ns[i] is 0 for a lost one.
 * Returns the number of answers, -EBUSY when another ping runs, -EINVAL (count 1..65535, payload
 * <= 1472). */
int mic_resp_ping(struct mic_resp *r, uint32_t ip, unsigned count, unsigned interval_ms, unsigned timeout_ms,
		  unsigned payload, uint64_t *rtts_ns);
void mic_resp_stats(struct mic_resp *r, struct mic_resp_stats *out);

/* --- device half ------------------------------------------------------------------------------ */

struct mic_net_dev;

/* local_fd: non-blocking TAP or SEQPACKET socket, or -1 with a responder. The caller keeps both and
 * the vdev alive. NULL with errno set on failure. */
struct mic_net_dev *mic_net_dev_create(struct mic_vdev *dev, int local_fd, struct mic_resp *resp);
void mic_net_dev_destroy(struct mic_net_dev *nd);
/* What the card has accepted of the offered features (default: all): header length, merged buffers and
 * DATA_VALID follow it. Call it before a run when the rings were set up. */
void mic_net_dev_accepted(struct mic_net_dev *nd, uint64_t features);
/* Serve the rings until something needs a decision; returns an enum mic_run. MIC_RUN_LOCAL: the
 * local end failed, mic_net_dev_error() has the errno. MIC_RUN_SIGNAL also comes now and then under
 * load, so that the caller's signal handlers run. */
int mic_net_dev_run(struct mic_net_dev *nd);
int mic_net_dev_error(const struct mic_net_dev *nd);
/* Copy every frame of both directions to `cap` from now on; NULL stops. Call between two runs. */
void mic_net_dev_capture(struct mic_net_dev *nd, struct mic_pcap *cap);
void mic_net_dev_stats(const struct mic_net_dev *nd, struct mic_net_stats *out);

/* --- driver half ------------------------------------------------------------------------------ */

struct mic_net_drv;

/* Bytes of GDDR that the driver wants for its buffers with these features; it works with less. */
uint64_t mic_net_drv_area(uint64_t features, uint16_t num, uint32_t mtu);
/* Rings are set up already (mic_dq_init for dq[0] and dq[1]). area: card physical address, 64-byte
 * aligned, of `len` bytes that belong to the driver. NULL with errno: EINVAL, EFAULT (outside GDDR),
 * ENOSPC (not even four buffers per direction), ENOMEM. */
struct mic_net_drv *mic_net_drv_create(struct mic_vdrv *drv, int local_fd, struct mic_resp *resp,
				       uint64_t area, uint64_t len, uint32_t mtu);
void mic_net_drv_destroy(struct mic_net_drv *nd);
/* Run until stop_fd is readable (MIC_RUN_CONTROL), the local end fails (MIC_RUN_LOCAL) or the device
 * breaks a ring (-EIO). */
int mic_net_drv_run(struct mic_net_drv *nd);
int mic_net_drv_error(const struct mic_net_drv *nd);
void mic_net_drv_stats(const struct mic_net_drv *nd, struct mic_net_stats *out);

/* --- yardstick -------------------------------------------------------------------------------- */

/* What a virtio-net pair has to be measured against: copy frames between two TAPs with one thread and
 * one buffer until stop_fd is readable. 0 or -errno. */
int mic_net_bridge(int tap_a, int tap_b, int stop_fd);
/* cffi-end */

#endif
