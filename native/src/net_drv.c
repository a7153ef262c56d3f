/* virtio-net driver half: frames between the card's local end and the rings, buffers in GDDR. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "mic/barrier.h"
#include "mic/linger.h"
#include "mic/net.h"
#include "net_end.h"

enum { RX = 0, TX = 1 };

#define MAX_BUFS    128u
#define MIN_BUFS    4u
#define TX_BUFS     64u    /* enough to keep both CPUs busy, few enough to stay in the cache */
#define BIG_BUF     65664u /* header and largest frame, in whole cache lines */
#define MERGE_BUF   16384u /* one of several receive buffers of a frame */
#define SMALL_ROOM  128u   /* header, Ethernet, VLAN and slack beyond the MTU */
#define BATCH       16u
#define LOOK_ROUNDS 64u
#define MERGE_MAX   64u /* buffers in one frame at most */

struct mic_net_drv {
	struct mic_vdrv *drv;
	struct mic_net_end end;
	struct mic_net_stats stats;
	struct mic_linger linger;
	uint8_t *mem;  /* the area, mapped */
	uint64_t addr; /* the area, card physical */
	unsigned rx_num, tx_num;
	uint32_t rx_size, tx_size;
	uint64_t tx_base; /* offset of the transmit buffers in the area */
	bool mergeable, split_hdr;
	uint16_t tx_free[MAX_BUFS];
	unsigned tx_nfree;
	/* A received frame in the making. */
	struct iovec part[MERGE_MAX];
	uint16_t part_buf[MERGE_MAX];
	unsigned parts, parts_want;
	uint64_t part_len;
	bool part_bad;
};

/* --- set-up ----------------------------------------------------------------------------------- */

static uint32_t small_buf(uint32_t mtu)
{
	return (mtu + SMALL_ROOM + 63u) & ~63u;
}

static void buffer_sizes(uint64_t features, uint32_t mtu, uint32_t *rx, uint32_t *tx)
{
	uint64_t rx_tso = MIC_NET_F(GUEST_TSO4) | MIC_NET_F(GUEST_TSO6) | MIC_NET_F(GUEST_UFO);
	uint64_t tx_tso = MIC_NET_F(HOST_TSO4) | MIC_NET_F(HOST_TSO6) | MIC_NET_F(GSO);

	*rx = !(features & rx_tso) ? small_buf(mtu) : features & MIC_NET_F(MRG_RXBUF) ? MERGE_BUF : BIG_BUF;
	*tx = features & tx_tso ? BIG_BUF : small_buf(mtu);
}

uint64_t mic_net_drv_area(uint64_t features, uint16_t num, uint32_t mtu)
{
	uint32_t rx, tx;

	buffer_sizes(features, mtu, &rx, &tx);
	uint64_t rx_num = features & MIC_NET_F(MRG_RXBUF) ? num : num / 2u;

	return rx * rx_num + (uint64_t)tx * (num < TX_BUFS ? num : TX_BUFS);
}

/* How many buffers of each kind fit: as many as the ring holds, else a fair share of the area. */
static int place_buffers(struct mic_net_drv *nd, uint64_t len, uint32_t mtu)
{
	const struct mic_dq *rx = &nd->drv->dq[RX], *tx = &nd->drv->dq[TX];
	unsigned rx_max = nd->split_hdr ? rx->num / 2u : rx->num;
	unsigned tx_max = nd->split_hdr ? tx->num / 2u : tx->num;

	buffer_sizes(rx->features, mtu, &nd->rx_size, &nd->tx_size);
	uint64_t half = len / 2;
	uint64_t tx_num = half / nd->tx_size;

	if (tx_num > TX_BUFS)
		tx_num = TX_BUFS;
	if (tx_num > tx_max)
		tx_num = tx_max;
	uint64_t rx_num = (len - tx_num * nd->tx_size) / nd->rx_size;

	nd->rx_num = rx_num > rx_max ? rx_max : (unsigned)rx_num;
	nd->tx_num = (unsigned)tx_num;
	nd->tx_base = (uint64_t)nd->rx_num * nd->rx_size;
	return nd->rx_num < MIN_BUFS || nd->tx_num < MIN_BUFS ? -ENOSPC : 0;
}

/* One buffer as the segments of a chain. A legacy driver keeps the header in a descriptor of its
 * own (VOP 8.5); the memory is the same. */
static unsigned segments(const struct mic_net_drv *nd, struct mic_seg *seg, uint64_t off, uint32_t len)
{
	if (!nd->split_hdr) {
		seg[0] = (struct mic_seg){.addr = nd->addr + off, .len = len};
		return 1;
	}
	seg[0] = (struct mic_seg){.addr = nd->addr + off, .len = nd->end.hdr_len};
	seg[1] = (struct mic_seg){.addr = nd->addr + off + nd->end.hdr_len, .len = len - nd->end.hdr_len};
	return 2;
}

static int post_rx(struct mic_net_drv *nd, unsigned buf)
{
	struct mic_seg seg[2];
	unsigned n = segments(nd, seg, (uint64_t)buf * nd->rx_size, nd->rx_size);

	return mic_dq_add(&nd->drv->dq[RX], seg, 0, n, buf);
}

static int post_all(struct mic_net_drv *nd)
{
	for (unsigned i = 0; i < nd->rx_num; i++) {
		int rc = post_rx(nd, i);

		if (rc < 0)
			return rc;
	}
	for (unsigned i = 0; i < nd->tx_num; i++)
		nd->tx_free[nd->tx_nfree++] = (uint16_t)i;
	return 0;
}

struct mic_net_drv *mic_net_drv_create(struct mic_vdrv *drv, int local_fd, struct mic_resp *resp,
				       uint64_t area, uint64_t len, uint32_t mtu)
{
	uint64_t features = drv->dq[RX].features;
	struct mic_net_drv *nd = calloc(1, sizeof *nd);
	int rc = -EINVAL;

	if (!nd)
		return NULL;
	nd->drv = drv;
	nd->addr = area;
	nd->end.gone_fd = -1;
	if (area & 63u || mtu < 68 || mtu > 65535)
		goto fail;
	rc = mic_net_end_init(&nd->end, local_fd, resp);
	if (rc < 0)
		goto fail;
	nd->end.hdr_len = mic_net_hdr_len(features);
	nd->mergeable = features & MIC_NET_F(MRG_RXBUF);
	nd->split_hdr = !(features & (1ull << MIC_VIRTIO_F_VERSION_1 | MIC_NET_F(MRG_RXBUF)));
	nd->mem = mic_gddr_at(drv->bus, area, len);
	rc = nd->mem ? place_buffers(nd, len, mtu) : -EFAULT;
	if (rc == 0)
		rc = post_all(nd);
	if (rc < 0)
		goto fail;
	mic_linger_init(&nd->linger, drv->spin_us);
	return nd;
fail:
	mic_net_drv_destroy(nd);
	errno = -rc;
	return NULL;
}

void mic_net_drv_destroy(struct mic_net_drv *nd)
{
	if (!nd)
		return;
	mic_net_end_fini(&nd->end);
	free(nd);
}

int mic_net_drv_error(const struct mic_net_drv *nd)
{
	return nd->end.error;
}

void mic_net_drv_stats(const struct mic_net_drv *nd, struct mic_net_stats *out)
{
	mic_net_stats_read(&nd->stats, out);
}

/* --- receive ---------------------------------------------------------------------------------- */

/* Give the buffers of the frame in the making back to the device. */
static int recycle(struct mic_net_drv *nd)
{
	int rc = 0;

	for (unsigned i = 0; i < nd->parts && rc == 0; i++)
		rc = post_rx(nd, nd->part_buf[i]);
	nd->parts = nd->parts_want = 0;
	nd->part_len = 0;
	nd->part_bad = false;
	return rc;
}

/* The first buffer of a frame says how many there are. */
static unsigned frame_parts(const struct mic_net_drv *nd, const uint8_t *mem, uint32_t len)
{
	if (!nd->mergeable || len < nd->end.hdr_len)
		return 1;
	unsigned n = mic_load_relaxed(&mem[10]) | (unsigned)mic_load_relaxed(&mem[11]) << 8;

	return n >= 1 && n <= MERGE_MAX && n <= nd->rx_num ? n : 1;
}

static int finish_frame(struct mic_net_drv *nd)
{
	int rc = 1;

	if (!nd->part_bad)
		rc = mic_net_end_send(&nd->end, nd->part, nd->parts, nd->part_len);
	if (rc == 0) {
		mic_count(&nd->stats.to_card_packets, 1u);
		mic_count(&nd->stats.to_card_bytes, nd->part_len - nd->end.hdr_len);
	} else {
		mic_count(&nd->stats.to_card_drops, 1u);
	}
	int again = recycle(nd);

	return rc < 0 || again < 0 ? -1 : 1;
}

/* 1 a buffer was taken, 0 nothing there, -1 the local end or the ring is gone. */
static int receive_one(struct mic_net_drv *nd)
{
	uint64_t buf;
	uint32_t len;
	int rc = mic_dq_get(&nd->drv->dq[RX], &buf, &len);

	if (rc <= 0)
		return rc < 0 ? -1 : 0;
	if (buf >= nd->rx_num)
		return -1;
	uint8_t *mem = nd->mem + buf * nd->rx_size;

	if (!nd->parts)
		nd->parts_want = frame_parts(nd, mem, len);
	if (len > nd->rx_size || len == 0) {
		nd->part_bad = true; /* the device says that it wrote what it cannot have written */
		len = 0;
	}
	nd->part[nd->parts] = (struct iovec){mem, len};
	nd->part_buf[nd->parts++] = (uint16_t)buf;
	nd->part_len += len;
	return nd->parts < nd->parts_want ? 1 : finish_frame(nd);
}

/* --- transmit --------------------------------------------------------------------------------- */

static int reap(struct mic_net_drv *nd)
{
	uint64_t buf;
	uint32_t len;
	int rc;

	while ((rc = mic_dq_get(&nd->drv->dq[TX], &buf, &len)) > 0) {
		if (buf >= nd->tx_num || nd->tx_nfree >= nd->tx_num)
			return -EIO;
		nd->tx_free[nd->tx_nfree++] = (uint16_t)buf;
	}
	return rc;
}

/* 1 a frame was sent, 0 nothing to send or no buffer, -1 the local end or the ring is gone. */
static int transmit_one(struct mic_net_drv *nd)
{
	if (reap(nd) < 0)
		return -1;
	if (!nd->tx_nfree)
		return 0;
	unsigned buf = nd->tx_free[nd->tx_nfree - 1];
	uint64_t off = nd->tx_base + (uint64_t)buf * nd->tx_size;
	struct iovec iov = {nd->mem + off, nd->tx_size};
	long got = mic_net_end_recv(&nd->end, &iov, 1);

	if (got <= 0)
		return (int)got;
	if ((uint64_t)got < nd->end.hdr_len + MIC_NET_ETH) {
		mic_count(&nd->stats.from_card_drops, 1u);
		return 1;
	}
	if (nd->end.hdr_len == MIC_NET_HDR_FULL)
		memset(nd->mem + off + 10, 0, 2); /* num_buffers is the device's field */
	struct mic_seg seg[2];
	unsigned n = segments(nd, seg, off, (uint32_t)got);

	if (mic_dq_add(&nd->drv->dq[TX], seg, n, 0, buf) < 0)
		return -1;
	nd->tx_nfree--;
	mic_count(&nd->stats.from_card_packets, 1u);
	mic_count(&nd->stats.from_card_bytes, (uint64_t)got - nd->end.hdr_len);
	mic_vdrv_kick(nd->drv, &nd->drv->dq[TX]);
	return 1;
}

/* --- loop ------------------------------------------------------------------------------------- */

static int pump(struct mic_net_drv *nd)
{
	int moved = 0, rc = 0;
	unsigned i;

	for (i = 0; i < BATCH && (rc = receive_one(nd)) > 0; i++)
		moved = 1;
	if (i)
		mic_vdrv_kick(nd->drv, &nd->drv->dq[RX]);
	for (i = 0; i < BATCH && rc >= 0 && (rc = transmit_one(nd)) > 0; i++)
		moved = 1;
	return rc < 0 ? -1 : moved;
}

/* Before sleeping: ask for the interrupts that matter. True when something came meanwhile. */
static bool arm(struct mic_net_drv *nd)
{
	bool again = mic_dq_enable_interrupt(&nd->drv->dq[RX]);

	if (!nd->tx_nfree)
		again |= mic_dq_enable_interrupt(&nd->drv->dq[TX]);
	return again;
}

static int look(struct mic_net_drv *nd, int timeout_ms)
{
	bool blocked = !nd->tx_nfree;
	int extra = mic_net_end_fd(&nd->end, blocked);
	int ready = mic_vdrv_sleep(nd->drv, &extra, 1, timeout_ms);

	if (ready == -EINTR)
		return 0;
	return mic_net_end_woken(&nd->end, ready, blocked);
}

int mic_net_drv_run(struct mic_net_drv *nd)
{
	unsigned rounds = 0;

	mic_vdrv_kick(nd->drv, &nd->drv->dq[RX]);
	for (;;) {
		int moved = pump(nd), why = 0;

		if (moved < 0)
			return nd->end.error ? MIC_RUN_LOCAL : -EIO;
		if (moved) {
			mic_linger_hit(&nd->linger);
			if (++rounds % LOOK_ROUNDS == 0)
				why = look(nd, 0);
		} else if (!mic_linger_again(&nd->linger)) {
			if (!arm(nd)) {
				mic_count(&nd->stats.sleeps, 1u);
				why = look(nd, -1);
			}
			mic_dq_disable_interrupt(&nd->drv->dq[RX]);
			mic_dq_disable_interrupt(&nd->drv->dq[TX]);
		}
		if (why)
			return why;
	}
}
