/* Inside of the user-space responder: frames, ARP and timers in net_responder.c, pings, DHCP and TCP echo in
 * files of their own. */
#ifndef MIC_RESPONDER_H
#define MIC_RESPONDER_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "mic/net.h"

#define ETH_LEN          14u
#define IP_LEN           20u
#define TCP_LEN          20u
#define UDP_LEN          8u
#define FRAME_OUT_MAX    1514u
#define MTU              1500u
#define OUT_SLOTS        64u
#define ARP_SLOTS        16u
#define ECHO_PORT        7u
#define IP_BROADCAST     0xffffffffu
#define DHCP_SERVER_PORT 67u
#define TCP_CONNS        16u
#define TCP_BUF          16384u
#define TCP_MSS          (MTU - IP_LEN - TCP_LEN)

enum { PROTO_ICMP = 1, PROTO_TCP = 6, PROTO_UDP = 17 };

enum tcp_state { TCP_FREE, TCP_SYN_RCVD, TCP_OPEN, TCP_LAST_ACK };

struct tcp_conn {
	enum tcp_state state;
	uint32_t peer_ip;
	uint16_t peer_port;
	uint32_t snd_una, snd_nxt, snd_wnd, rcv_nxt, adv_wnd;
	uint32_t snd_max; /* highest number ever sent; snd_nxt goes back on a time-out */
	uint16_t mss;
	bool fin_rcvd; /* the peer has finished; so do we after the last echoed byte */
	bool ack_now;
	unsigned retries;
	uint64_t rto, deadline; /* ns; deadline 0 = timer off */
	uint64_t used_at;
	uint32_t start, len; /* echo buffer: bytes from snd_una on, sent or not */
	uint8_t buf[TCP_BUF];
};

struct ping {
	bool busy;
	uint32_t ip;
	uint16_t id;
	unsigned count, sent, got, payload;
	unsigned arp_tries;
	uint64_t interval, timeout; /* ns */
	uint64_t next, end;         /* ns; end = when waiting ends, 0 = not all sent */
	uint64_t *sent_at, *rtts;
};

struct mic_resp {
	pthread_mutex_t lock;
	pthread_cond_t ping_done;
	int poll_fd, wake_fd, timer_fd; /* poll_fd is an epoll of the other two */
	uint64_t armed;                 /* when timer_fd fires, 0 = off */
	uint8_t mac[6];
	uint32_t ip, netmask, lease_ip;
	uint16_t ip_id;
	uint32_t secret; /* initial sequence numbers */
	struct {
		uint32_t ip;
		uint8_t mac[6];
		uint64_t used_at;
	} arp[ARP_SLOTS];
	unsigned out_first, out_count;
	struct {
		uint32_t len;
		uint8_t frame[FRAME_OUT_MAX];
	} out[OUT_SLOTS];
	struct ping ping;
	struct tcp_conn *tcp; /* TCP_CONNS of them */
	struct mic_resp_stats stats;
	uint8_t scratch[FRAME_OUT_MAX];
};

/* A checked IPv4 packet. */
struct packet {
	uint32_t src, dst;
	uint8_t proto;
	bool csum_ok; /* do not verify */
	const uint8_t *data;
	uint32_t len;
};

static inline uint16_t get16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static inline uint32_t get32(const uint8_t *p)
{
	return (uint32_t)get16(p) << 16 | get16(p + 2);
}

static inline void put16(uint8_t *p, uint32_t v)
{
	p[0] = (uint8_t)(v >> 8);
	p[1] = (uint8_t)v;
}

static inline void put32(uint8_t *p, uint32_t v)
{
	put16(p, v >> 16);
	put16(p + 2, v & 0xffff);
}

/* net_sum.c: unfolded one's complement sum; len may be odd only in the last piece. */
uint32_t mic_resp_sum(const uint8_t *p, uint32_t len, uint32_t sum);
uint16_t mic_resp_fold(uint32_t sum);
/* Sum of the pseudo header of TCP and UDP. */
uint32_t mic_resp_pseudo(uint32_t src, uint32_t dst, uint8_t proto, uint32_t len);
/* net_responder.c: send r->scratch, whose payload behind the IP header is filled in, to ip. False when the
 * output queue is full or the address is not resolved yet (an ARP request went out instead). */
bool mic_resp_send_ip(struct mic_resp *r, uint32_t ip, uint8_t proto, uint32_t len);

/* The same to an address whose MAC is known. */
bool mic_resp_send_ip_to(struct mic_resp *r, const uint8_t *mac, uint32_t ip, uint8_t proto, uint32_t len);
extern const uint8_t mic_resp_broadcast[6];
/* Must ARP find ip before anything reaches it? Ask. */
bool mic_resp_unresolved(const struct mic_resp *r, uint32_t ip);
void mic_resp_ask(struct mic_resp *r, uint32_t ip);
/* UDP header in front of `len` bytes that are in place. */
void mic_resp_finish_udp(struct mic_resp *r, uint32_t dst, uint16_t src_port, uint16_t dst_port,
			 uint32_t len);

static inline uint8_t *mic_resp_payload(struct mic_resp *r)
{
	return r->scratch + ETH_LEN + IP_LEN;
}

/* net_ping.c: an answer came; an address was resolved, so a ping need not wait for its next try. */
void mic_resp_ping_reply(struct mic_resp *r, const struct packet *pkt, uint64_t now);
void mic_resp_ping_resolved(struct mic_resp *r, uint32_t ip, uint64_t now);
void mic_resp_ping_timers(struct mic_resp *r, uint64_t now);
/* The next time at which mic_resp_ping_timers() has something to do, 0 = never. */
uint64_t mic_resp_ping_next(const struct mic_resp *r);

/* net_dhcp.c: a request of len bytes. */
void mic_resp_dhcp_input(struct mic_resp *r, const uint8_t *q, uint32_t len);

/* net_tcp.c */
void mic_resp_tcp_input(struct mic_resp *r, const struct packet *pkt, uint64_t now);
void mic_resp_tcp_timers(struct mic_resp *r, uint64_t now);
/* The next time at which mic_resp_tcp_timers() has something to do, 0 = never. */
uint64_t mic_resp_tcp_next(const struct mic_resp *r);

#endif
