/* A host in user space at the end of the wire: ARP, ICMP echo, UDP echo (VOP-59). The rest is in net_ping.c,
 * net_dhcp.c and net_tcp.c. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "responder.h"

#define TYPE_IP  0x0800u
#define TYPE_ARP 0x0806u

const uint8_t mic_resp_broadcast[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

static const uint8_t no_mac[6];

/* --- addresses -------------------------------------------------------------------------------- */

static bool own_net(const struct mic_resp *r, uint32_t ip)
{
	return ((ip ^ r->ip) & r->netmask) == 0;
}

static const uint8_t *arp_find(const struct mic_resp *r, uint32_t ip)
{
	for (unsigned i = 0; i < ARP_SLOTS; i++)
		if (r->arp[i].ip == ip)
			return r->arp[i].mac;
	return NULL;
}

static void arp_learn(struct mic_resp *r, uint32_t ip, const uint8_t *mac, uint64_t now)
{
	unsigned oldest = 0;

	if (!ip || !own_net(r, ip) || ip == r->ip || mac[0] & 1)
		return;
	for (unsigned i = 0; i < ARP_SLOTS; i++) {
		if (r->arp[i].ip == ip) {
			oldest = i;
			break;
		}
		if (r->arp[i].used_at < r->arp[oldest].used_at)
			oldest = i;
	}
	r->arp[oldest].ip = ip;
	r->arp[oldest].used_at = now;
	memcpy(r->arp[oldest].mac, mac, 6);
}

/* --- output ----------------------------------------------------------------------------------- */

/* Queue r->scratch; short frames are padded as on a wire. */
static bool send_frame(struct mic_resp *r, const uint8_t *dst, uint16_t type, uint32_t payload)
{
	uint32_t len = ETH_LEN + payload;

	if (r->out_count == OUT_SLOTS) {
		r->stats.out_overflow++;
		return false;
	}
	memcpy(r->scratch, dst, 6);
	memcpy(r->scratch + 6, r->mac, 6);
	put16(r->scratch + 12, type);
	if (len < 60) {
		memset(r->scratch + len, 0, 60 - len);
		len = 60;
	}
	unsigned i = (r->out_first + r->out_count++) % OUT_SLOTS;

	r->out[i].len = len;
	memcpy(r->out[i].frame, r->scratch, len);
	return true;
}

static void send_arp(struct mic_resp *r, uint16_t op, const uint8_t *eth, const uint8_t *mac, uint32_t ip)
{
	uint8_t *a = r->scratch + ETH_LEN;

	put16(a, 1);
	put16(a + 2, TYPE_IP);
	put16(a + 4, 6u << 8 | 4u);
	put16(a + 6, op);
	memcpy(a + 8, r->mac, 6);
	put32(a + 14, r->ip);
	memcpy(a + 18, mac, 6);
	put32(a + 24, ip);
	send_frame(r, eth, TYPE_ARP, 28);
}

bool mic_resp_send_ip_to(struct mic_resp *r, const uint8_t *mac, uint32_t ip, uint8_t proto, uint32_t len)
{
	uint8_t *h = r->scratch + ETH_LEN;

	put16(h, 0x4500);
	put16(h + 2, IP_LEN + len);
	put16(h + 4, r->ip_id++);
	put16(h + 6, 0x4000); /* do not fragment */
	h[8] = 64;
	h[9] = proto;
	put16(h + 10, 0);
	put32(h + 12, r->ip);
	put32(h + 16, ip);
	put16(h + 10, mic_resp_fold(mic_resp_sum(h, IP_LEN, 0)));
	return send_frame(r, mac, TYPE_IP, IP_LEN + len);
}

bool mic_resp_unresolved(const struct mic_resp *r, uint32_t ip)
{
	return own_net(r, ip) && !arp_find(r, ip);
}

void mic_resp_ask(struct mic_resp *r, uint32_t ip)
{
	send_arp(r, 1, mic_resp_broadcast, no_mac, ip);
}

bool mic_resp_send_ip(struct mic_resp *r, uint32_t ip, uint8_t proto, uint32_t len)
{
	const uint8_t *mac = arp_find(r, ip);

	if (mac)
		return mic_resp_send_ip_to(r, mac, ip, proto, len);
	if (own_net(r, ip))
		mic_resp_ask(r, ip);
	return false;
}

/* --- protocols -------------------------------------------------------------------------------- */

static void input_arp(struct mic_resp *r, const uint8_t *a, uint32_t len, uint64_t now)
{
	if (len < 28 || get16(a) != 1 || get16(a + 2) != TYPE_IP || a[4] != 6 || a[5] != 4) {
		r->stats.bad_frames++;
		return;
	}
	uint32_t sender = get32(a + 14), target = get32(a + 24);
	uint8_t mac[6];

	if (target != r->ip) {
		r->stats.ignored_frames++;
		return;
	}
	memcpy(mac, a + 8, 6);
	arp_learn(r, sender, mac, now);
	mic_resp_ping_resolved(r, sender, now);
	if (get16(a + 6) == 1) {
		send_arp(r, 2, mac, mac, sender);
		r->stats.arp_replies++;
	}
}

static void input_icmp(struct mic_resp *r, const struct packet *pkt, uint64_t now)
{
	if (pkt->len < 8 || mic_resp_fold(mic_resp_sum(pkt->data, pkt->len, 0))) {
		r->stats.bad_frames++;
		return;
	}
	if (pkt->data[0] == 0) {
		mic_resp_ping_reply(r, pkt, now);
	} else if (pkt->data[0] == 8 && pkt->len <= MTU - IP_LEN) {
		uint8_t *icmp = mic_resp_payload(r);

		memcpy(icmp, pkt->data, pkt->len);
		icmp[0] = 0;
		put16(icmp + 2, 0);
		put16(icmp + 2, mic_resp_fold(mic_resp_sum(icmp, pkt->len, 0)));
		r->stats.icmp_replies += mic_resp_send_ip(r, pkt->src, PROTO_ICMP, pkt->len);
	} else {
		r->stats.ignored_frames++;
	}
}

void mic_resp_finish_udp(struct mic_resp *r, uint32_t dst, uint16_t src_port, uint16_t dst_port, uint32_t len)
{
	uint8_t *u = mic_resp_payload(r);

	put16(u, src_port);
	put16(u + 2, dst_port);
	put16(u + 4, UDP_LEN + len);
	put16(u + 6, 0);
	uint32_t sum = mic_resp_sum(u, UDP_LEN + len, mic_resp_pseudo(r->ip, dst, PROTO_UDP, UDP_LEN + len));
	uint16_t folded = mic_resp_fold(sum);

	put16(u + 6, folded ? folded : 0xffff);
}

static void input_udp(struct mic_resp *r, const struct packet *pkt)
{
	const uint8_t *u = pkt->data;
	uint32_t len = pkt->len >= UDP_LEN ? get16(u + 4) : 0;

	if (len < UDP_LEN || len > pkt->len ||
	    (!pkt->csum_ok && get16(u + 6) &&
	     mic_resp_fold(mic_resp_sum(u, len, mic_resp_pseudo(pkt->src, pkt->dst, PROTO_UDP, len))))) {
		r->stats.bad_frames++;
		return;
	}
	uint32_t payload = len - UDP_LEN;

	if (get16(u + 2) == DHCP_SERVER_PORT && r->lease_ip) {
		mic_resp_dhcp_input(r, u + UDP_LEN, payload);
	} else if (get16(u + 2) == ECHO_PORT && get16(u) != ECHO_PORT && pkt->dst == r->ip &&
		   len <= MTU - IP_LEN) { /* echo to echo would never end */
		memcpy(mic_resp_payload(r) + UDP_LEN, u + UDP_LEN, payload);
		mic_resp_finish_udp(r, pkt->src, ECHO_PORT, get16(u), payload);
		r->stats.udp_echoes += mic_resp_send_ip(r, pkt->src, PROTO_UDP, len);
	} else {
		r->stats.ignored_frames++;
	}
}

static void input_ip(struct mic_resp *r, const uint8_t *h, uint32_t len, const uint8_t *mac, bool csum_ok,
		     uint64_t now)
{
	uint32_t head = len >= IP_LEN ? (h[0] & 15u) * 4 : 0;
	uint32_t total = len >= IP_LEN ? get16(h + 2) : 0;

	if (head < IP_LEN || h[0] >> 4 != 4 || total < head || total > len ||
	    mic_resp_fold(mic_resp_sum(h, head, 0))) {
		r->stats.bad_frames++;
		return;
	}
	struct packet pkt = {.src = get32(h + 12),
			     .dst = get32(h + 16),
			     .proto = h[9],
			     .csum_ok = csum_ok,
			     .data = h + head,
			     .len = total - head};

	if (get16(h + 6) & 0x3fff || (pkt.dst != r->ip && pkt.dst != IP_BROADCAST)) {
		r->stats.ignored_frames++; /* fragments, other addresses */
		return;
	}
	arp_learn(r, pkt.src, mac, now);
	if (pkt.proto == PROTO_UDP)
		input_udp(r, &pkt);
	else if (pkt.proto == PROTO_ICMP && pkt.dst == r->ip)
		input_icmp(r, &pkt, now);
	else if (pkt.proto == PROTO_TCP && pkt.dst == r->ip)
		mic_resp_tcp_input(r, &pkt, now);
	else
		r->stats.ignored_frames++;
}

/* --- wire ------------------------------------------------------------------------------------- */

/* Let timer_fd fire at the earliest deadline. */
static void arm_timer(struct mic_resp *r)
{
	uint64_t a = mic_resp_ping_next(r), b = mic_resp_tcp_next(r);
	uint64_t next = !a || (b && b < a) ? b : a;

	if (next == r->armed)
		return;
	/* 0 switches it off; a deadline in the past, of a ping that wants to go out now, fires at once. */
	struct itimerspec at = {.it_value = {(time_t)(next / 1000000000u), (long)(next % 1000000000u)}};

	timerfd_settime(r->timer_fd, TFD_TIMER_ABSTIME, &at, NULL);
	r->armed = next;
}

void mic_resp_input(struct mic_resp *r, const uint8_t *f, uint32_t len, int csum_ok)
{
	uint64_t now = mic_now_ns();

	pthread_mutex_lock(&r->lock);
	r->stats.frames_in++;
	if (len < ETH_LEN)
		r->stats.bad_frames++;
	else if (memcmp(f, r->mac, 6) != 0 && memcmp(f, mic_resp_broadcast, 6) != 0)
		r->stats.ignored_frames++;
	else if (get16(f + 12) == TYPE_ARP)
		input_arp(r, f + ETH_LEN, len - ETH_LEN, now);
	else if (get16(f + 12) == TYPE_IP)
		input_ip(r, f + ETH_LEN, len - ETH_LEN, f + 6, csum_ok != 0, now);
	else
		r->stats.ignored_frames++;
	mic_resp_ping_timers(r, now);
	arm_timer(r);
	/* What waits for output keeps the loop awake, whoever calls. */
	if (r->out_count)
		(void)!eventfd_write(r->wake_fd, 1);
	pthread_mutex_unlock(&r->lock);
}

uint32_t mic_resp_output(struct mic_resp *r, uint8_t *frame, uint32_t cap)
{
	uint64_t now = mic_now_ns(), drop;
	uint32_t len = 0;

	pthread_mutex_lock(&r->lock);
	if (!r->out_count) {
		(void)!read(r->wake_fd, &drop, sizeof drop);
		if (r->armed && r->armed <= now) {
			(void)!read(r->timer_fd, &drop, sizeof drop);
			r->armed = 0;
		}
		mic_resp_tcp_timers(r, now);
		mic_resp_ping_timers(r, now);
		arm_timer(r);
	}
	if (r->out_count && r->out[r->out_first].len <= cap) {
		len = r->out[r->out_first].len;
		memcpy(frame, r->out[r->out_first].frame, len);
		r->out_first = (r->out_first + 1) % OUT_SLOTS;
		r->out_count--;
		r->stats.frames_out++;
	}
	pthread_mutex_unlock(&r->lock);
	return len;
}

int mic_resp_poll_fd(const struct mic_resp *r)
{
	return r->poll_fd;
}

void mic_resp_stats(struct mic_resp *r, struct mic_resp_stats *out)
{
	pthread_mutex_lock(&r->lock);
	*out = r->stats;
	pthread_mutex_unlock(&r->lock);
}

/* --- life ------------------------------------------------------------------------------------- */

static int open_fds(struct mic_resp *r)
{
	struct epoll_event ev = {.events = EPOLLIN};

	r->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	r->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	r->poll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (r->wake_fd < 0 || r->timer_fd < 0 || r->poll_fd < 0)
		return -1;
	if (epoll_ctl(r->poll_fd, EPOLL_CTL_ADD, r->wake_fd, &ev) < 0)
		return -1;
	return epoll_ctl(r->poll_fd, EPOLL_CTL_ADD, r->timer_fd, &ev);
}

struct mic_resp *mic_resp_create(const uint8_t *mac, uint32_t ip, uint32_t netmask, uint32_t lease_ip)
{
	struct mic_resp *r = calloc(1, sizeof *r);
	pthread_condattr_t attr;

	if (!r)
		return NULL;
	r->wake_fd = r->timer_fd = r->poll_fd = -1;
	pthread_mutex_init(&r->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&r->ping_done, &attr);
	pthread_condattr_destroy(&attr);
	memcpy(r->mac, mac, 6);
	r->ip = ip;
	r->netmask = netmask;
	r->lease_ip = lease_ip;
	r->tcp = calloc(TCP_CONNS, sizeof *r->tcp);
	if (!r->tcp || getrandom(&r->secret, sizeof r->secret, 0) < 0 || open_fds(r) < 0) {
		int saved = errno;

		mic_resp_destroy(r);
		errno = saved;
		return NULL;
	}
	r->ping.id = (uint16_t)r->secret;
	return r;
}

void mic_resp_destroy(struct mic_resp *r)
{
	if (!r)
		return;
	for (unsigned i = 0; i < 3; i++) {
		int fd = (const int[]){r->poll_fd, r->timer_fd, r->wake_fd}[i];

		if (fd >= 0)
			close(fd);
	}
	pthread_cond_destroy(&r->ping_done);
	pthread_mutex_destroy(&r->lock);
	free(r->tcp);
	free(r);
}
