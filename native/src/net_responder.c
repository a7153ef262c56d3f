/* A host in user space at the end of the wire: ARP, ICMP echo, UDP echo, DHCP, pings (VOP-59). */
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

#define TYPE_IP      0x0800u
#define TYPE_ARP     0x0806u
#define BROADCAST    0xffffffffu
#define DHCP_COOKIE  0x63825363u
#define DHCP_MIN     240u
#define DHCP_LEASE_S 86400u
#define ARP_TRIES    10u
#define ARP_RETRY_NS 20000000ull

static const uint8_t mac_broadcast[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

static const uint8_t no_mac[6];

/* --- sums and addresses ----------------------------------------------------------------------- */

uint32_t mic_resp_sum(const uint8_t *p, uint32_t len, uint32_t sum)
{
	uint64_t wide = sum;

	for (; len >= 2; p += 2, len -= 2)
		wide += get16(p);
	if (len)
		wide += (uint64_t)p[0] << 8;
	while (wide >> 16)
		wide = (wide & 0xffff) + (wide >> 16);
	return (uint32_t)wide;
}

uint16_t mic_resp_fold(uint32_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)~sum;
}

uint32_t mic_resp_pseudo(uint32_t src, uint32_t dst, uint8_t proto, uint32_t len)
{
	uint8_t h[12];

	put32(h, src);
	put32(h + 4, dst);
	put16(h + 8, proto);
	put16(h + 10, len);
	return mic_resp_sum(h, sizeof h, 0);
}

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

static bool send_ip_to(struct mic_resp *r, const uint8_t *mac, uint32_t ip, uint8_t proto, uint32_t len)
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

bool mic_resp_send_ip(struct mic_resp *r, uint32_t ip, uint8_t proto, uint32_t len)
{
	const uint8_t *mac = arp_find(r, ip);

	if (mac)
		return send_ip_to(r, mac, ip, proto, len);
	if (own_net(r, ip))
		send_arp(r, 1, mac_broadcast, no_mac, ip);
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
	if (sender == r->ping.ip && r->ping.arp_tries && !r->ping.sent)
		r->ping.next = now; /* resolved: do not wait for the next try */
	if (get16(a + 6) == 1) {
		send_arp(r, 2, mac, mac, sender);
		r->stats.arp_replies++;
	}
}

static void ping_reply(struct mic_resp *r, const struct packet *pkt, uint64_t now)
{
	struct ping *p = &r->ping;
	unsigned seq = get16(pkt->data + 6) - 1u; /* we number from 1, as ping(8) does */

	if (!p->busy || pkt->src != p->ip || get16(pkt->data + 4) != p->id || seq >= p->sent || p->rtts[seq])
		return;
	p->rtts[seq] = now - p->sent_at[seq] ? now - p->sent_at[seq] : 1;
	p->got++;
}

static void input_icmp(struct mic_resp *r, const struct packet *pkt, uint64_t now)
{
	if (pkt->len < 8 || mic_resp_fold(mic_resp_sum(pkt->data, pkt->len, 0))) {
		r->stats.bad_frames++;
		return;
	}
	if (pkt->data[0] == 0) {
		ping_reply(r, pkt, now);
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

/* UDP header in front of `len` bytes that are in place. */
static void finish_udp(struct mic_resp *r, uint32_t dst, uint16_t src_port, uint16_t dst_port, uint32_t len)
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

struct dhcp_request {
	uint8_t type;
	uint32_t wanted, server;
};

/* Options: each length checked against what is left. False: malformed. */
static bool parse_dhcp(const uint8_t *opt, uint32_t len, struct dhcp_request *q)
{
	while (len && opt[0] != 255) {
		if (opt[0] == 0) {
			opt++;
			len--;
			continue;
		}
		if (len < 2 || opt[1] > len - 2)
			return false;
		if (opt[0] == 53 && opt[1] == 1)
			q->type = opt[2];
		else if (opt[0] == 50 && opt[1] == 4)
			q->wanted = get32(opt + 2);
		else if (opt[0] == 54 && opt[1] == 4)
			q->server = get32(opt + 2);
		len -= opt[1] + 2u;
		opt += opt[1] + 2u;
	}
	return q->type != 0;
}

static uint8_t *put_option32(uint8_t *o, uint8_t code, uint32_t value)
{
	o[0] = code;
	o[1] = 4;
	put32(o + 2, value);
	return o + 6;
}

static void send_dhcp(struct mic_resp *r, const uint8_t *q, uint8_t type)
{
	uint8_t *b = mic_resp_payload(r) + UDP_LEN, *o = b + DHCP_MIN;
	bool nak = type == 6, broadcast = nak || get16(q + 10) & 0x8000;
	uint32_t to = broadcast ? BROADCAST : r->lease_ip;

	memset(b, 0, DHCP_MIN);
	memcpy(b, q, 8); /* op, htype, hlen, hops, xid */
	b[0] = 2;
	b[3] = 0;
	memcpy(b + 10, q + 10, 2);
	if (!nak)
		put32(b + 16, r->lease_ip);
	memcpy(b + 28, q + 28, 16);
	put32(b + 236, DHCP_COOKIE);
	*o++ = 53;
	*o++ = 1;
	*o++ = type;
	o = put_option32(o, 54, r->ip);
	if (!nak) {
		o = put_option32(o, 51, DHCP_LEASE_S);
		o = put_option32(o, 1, r->netmask);
		o = put_option32(o, 3, r->ip);
	}
	*o++ = 255;
	uint32_t len = (uint32_t)(o - b);

	if (len < 300) { /* BOOTP's old minimum */
		memset(o, 0, 300 - len);
		len = 300;
	}
	finish_udp(r, to, 67, 68, len);
	r->stats.dhcp_replies +=
		send_ip_to(r, broadcast ? mac_broadcast : q + 28, to, PROTO_UDP, UDP_LEN + len);
}

static void input_dhcp(struct mic_resp *r, const uint8_t *q, uint32_t len)
{
	struct dhcp_request req = {0};

	if (len < DHCP_MIN || q[0] != 1 || q[1] != 1 || q[2] != 6 || get32(q + 236) != DHCP_COOKIE ||
	    !parse_dhcp(q + DHCP_MIN, len - DHCP_MIN, &req)) {
		r->stats.bad_frames++;
		return;
	}
	uint32_t wanted = req.wanted ? req.wanted : get32(q + 12);

	if (req.type == 1)
		send_dhcp(r, q, 2);
	else if (req.type == 3 && (!req.server || req.server == r->ip))
		send_dhcp(r, q, wanted == r->lease_ip ? 5 : 6);
	else
		r->stats.ignored_frames++;
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

	if (get16(u + 2) == 67 && r->lease_ip) {
		input_dhcp(r, u + UDP_LEN, payload);
	} else if (get16(u + 2) == ECHO_PORT && get16(u) != ECHO_PORT && pkt->dst == r->ip &&
		   len <= MTU - IP_LEN) { /* echo to echo would never end */
		memcpy(mic_resp_payload(r) + UDP_LEN, u + UDP_LEN, payload);
		finish_udp(r, pkt->src, ECHO_PORT, get16(u), payload);
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

	if (get16(h + 6) & 0x3fff || (pkt.dst != r->ip && pkt.dst != BROADCAST)) {
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

/* --- pings ------------------------------------------------------------------------------------ */

/* The first request waits a little for the address to be resolved. */
static bool ping_unresolved(struct mic_resp *r, uint64_t now)
{
	struct ping *p = &r->ping;

	if (p->arp_tries >= ARP_TRIES || !own_net(r, p->ip) || arp_find(r, p->ip))
		return false;
	p->arp_tries++;
	p->next = now + ARP_RETRY_NS;
	send_arp(r, 1, mac_broadcast, no_mac, p->ip);
	return true;
}

static void send_ping(struct mic_resp *r, uint64_t now)
{
	struct ping *p = &r->ping;
	uint8_t *icmp = mic_resp_payload(r);

	if (ping_unresolved(r, now))
		return;
	put16(icmp, 8u << 8);
	put16(icmp + 2, 0);
	put16(icmp + 4, p->id);
	put16(icmp + 6, p->sent + 1);
	for (unsigned i = 0; i < p->payload; i++)
		icmp[8 + i] = (uint8_t)i;
	put16(icmp + 2, mic_resp_fold(mic_resp_sum(icmp, 8 + p->payload, 0)));
	p->sent_at[p->sent++] = now;
	mic_resp_send_ip(r, p->ip, PROTO_ICMP, 8 + p->payload);
	p->next = now + p->interval;
	if (p->sent == p->count)
		p->end = now + p->timeout;
}

static void ping_timers(struct mic_resp *r, uint64_t now)
{
	struct ping *p = &r->ping;

	if (!p->busy)
		return;
	if (p->sent < p->count && p->next <= now)
		send_ping(r, now);
	if (p->end && (p->got == p->count || p->end <= now)) {
		p->busy = false;
		pthread_cond_broadcast(&r->ping_done);
	}
}

static uint64_t ping_next(const struct mic_resp *r)
{
	const struct ping *p = &r->ping;

	if (!p->busy)
		return 0;
	return p->sent < p->count ? p->next : p->end;
}

int mic_resp_ping(struct mic_resp *r, uint32_t ip, unsigned count, unsigned interval_ms, unsigned timeout_ms,
		  unsigned payload, uint64_t *rtts_ns)
{
	if (!count || count > 65535 || payload > MTU - IP_LEN - 8)
		return -EINVAL;
	uint64_t *sent_at = calloc(count, sizeof *sent_at);

	if (!sent_at)
		return -ENOMEM;
	memset(rtts_ns, 0, count * sizeof *rtts_ns);
	pthread_mutex_lock(&r->lock);
	int rc = r->ping.busy || r->ping.sent_at ? -EBUSY : 0;

	if (rc == 0) {
		r->ping = (struct ping){.busy = true,
					.ip = ip,
					.id = (uint16_t)(r->ping.id + 1u),
					.count = count,
					.payload = payload,
					.interval = interval_ms * 1000000ull,
					.timeout = timeout_ms * 1000000ull,
					.next = mic_now_ns(),
					.sent_at = sent_at,
					.rtts = rtts_ns};
		(void)!eventfd_write(r->wake_fd, 1);
		/* The loop owns the time limits; should it have stopped, this thread has its own. */
		struct timespec limit;
		uint64_t all = (uint64_t)count * interval_ms + timeout_ms + 1000u;

		clock_gettime(CLOCK_MONOTONIC, &limit);
		limit.tv_sec += (time_t)(all / 1000u) + 1;
		while (r->ping.busy && !rc)
			rc = -pthread_cond_timedwait(&r->ping_done, &r->lock, &limit);
		rc = (int)r->ping.got;
		r->ping.busy = false;
		r->ping.sent_at = r->ping.rtts = NULL;
	}
	pthread_mutex_unlock(&r->lock);
	free(sent_at);
	return rc;
}

/* --- wire ------------------------------------------------------------------------------------- */

/* Let timer_fd fire at the earliest deadline. */
static void arm_timer(struct mic_resp *r)
{
	uint64_t a = ping_next(r), b = mic_resp_tcp_next(r);
	uint64_t next = !a || (b && b < a) ? b : a;

	if (next == r->armed)
		return;
	/* A ping that wants to go out now has a deadline in the past: 1 ns is not "off". */
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
	else if (memcmp(f, r->mac, 6) != 0 && memcmp(f, mac_broadcast, 6) != 0)
		r->stats.ignored_frames++;
	else if (get16(f + 12) == TYPE_ARP)
		input_arp(r, f + ETH_LEN, len - ETH_LEN, now);
	else if (get16(f + 12) == TYPE_IP)
		input_ip(r, f + ETH_LEN, len - ETH_LEN, f + 6, csum_ok != 0, now);
	else
		r->stats.ignored_frames++;
	ping_timers(r, now);
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
		ping_timers(r, now);
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
