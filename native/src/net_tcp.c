/* TCP echo (port 7) of the responder: passive open, in-order data, go-back-N, bounded.
 *
 * Enough of RFC 9293 for real clients: MSS, windows both ways with probes, retransmission with
 * back-off, half close by the peer, resets. No options but MSS, no active open, so no TIME-WAIT. */
#include "responder.h"

#include <stdlib.h>

#define F_FIN 1u
#define F_SYN 2u
#define F_RST 4u
#define F_PSH 8u
#define F_ACK 16u

#define RTO_MIN_NS  200000000ull
#define RETRIES_MAX 7u
#define IDLE_NS     60000000000ull /* a connection idle for so long gives way to a new one */
#define MSS_DEFAULT 536u

struct segment {
	uint32_t seq, ack, wnd;
	uint16_t src_port, dst_port, mss;
	uint8_t flags;
	const uint8_t *data;
	uint32_t len;
};

static bool before(uint32_t a, uint32_t b)
{
	return (int32_t)(a - b) < 0;
}

/* --- output ----------------------------------------------------------------------------------- */

static bool send_segment(struct mic_resp *r, uint32_t ip, uint16_t port, uint32_t seq, uint32_t ack,
			 uint8_t flags, uint32_t wnd, uint32_t payload)
{
	uint8_t *tcp = mic_resp_payload(r);
	uint32_t head = flags & F_SYN ? TCP_LEN + 4u : TCP_LEN;

	put16(tcp, ECHO_PORT);
	put16(tcp + 2, port);
	put32(tcp + 4, seq);
	put32(tcp + 8, flags & F_ACK ? ack : 0);
	tcp[12] = (uint8_t)(head / 4 << 4);
	tcp[13] = flags;
	put16(tcp + 14, wnd);
	put32(tcp + 16, 0);
	if (flags & F_SYN) {
		put16(tcp + TCP_LEN, 2u << 8 | 4u);
		put16(tcp + TCP_LEN + 2, TCP_MSS);
	}
	uint32_t sum = mic_resp_pseudo(r->ip, ip, PROTO_TCP, head + payload);

	put16(tcp + 16, mic_resp_fold(mic_resp_sum(tcp, head + payload, sum)));
	return mic_resp_send_ip(r, ip, PROTO_TCP, head + payload);
}

static uint32_t window(const struct tcp_conn *c)
{
	return TCP_BUF - c->len;
}

static bool conn_send(struct mic_resp *r, struct tcp_conn *c, uint32_t seq, uint8_t flags, uint32_t payload)
{
	c->adv_wnd = window(c);
	c->ack_now = false;
	return send_segment(r, c->peer_ip, c->peer_port, seq, c->rcv_nxt, flags, c->adv_wnd, payload);
}

static void conn_free(struct tcp_conn *c)
{
	c->state = TCP_FREE;
	c->deadline = 0;
}

/* Answer a segment that belongs to no connection. */
static void refuse(struct mic_resp *r, const struct packet *pkt, const struct segment *s)
{
	uint32_t end = s->seq + s->len + !!(s->flags & F_SYN) + !!(s->flags & F_FIN);

	if (s->flags & F_RST)
		return;
	r->stats.tcp_reset++;
	uint8_t *tcp = mic_resp_payload(r);
	uint8_t flags = s->flags & F_ACK ? F_RST : F_RST | F_ACK;

	put16(tcp, s->dst_port);
	put16(tcp + 2, s->src_port);
	put32(tcp + 4, s->flags & F_ACK ? s->ack : 0);
	put32(tcp + 8, s->flags & F_ACK ? 0 : end);
	put16(tcp + 12, (TCP_LEN / 4u) << 12 | flags);
	put16(tcp + 14, 0);
	put32(tcp + 16, 0);
	put16(tcp + 16, mic_resp_fold(mic_resp_sum(tcp, TCP_LEN,
						   mic_resp_pseudo(r->ip, pkt->src, PROTO_TCP, TCP_LEN))));
	mic_resp_send_ip(r, pkt->src, PROTO_TCP, TCP_LEN);
}

static void advance(struct tcp_conn *c, uint32_t n)
{
	c->snd_nxt += n;
	if (before(c->snd_max, c->snd_nxt))
		c->snd_max = c->snd_nxt;
}

/* Send one piece of the echo buffer from snd_nxt on. */
static bool send_data(struct mic_resp *r, struct tcp_conn *c, uint32_t len)
{
	uint32_t at = (c->start + (c->snd_nxt - c->snd_una)) % TCP_BUF;
	uint32_t part = TCP_BUF - at < len ? TCP_BUF - at : len;
	uint8_t *to = mic_resp_payload(r) + TCP_LEN;

	memcpy(to, c->buf + at, part);
	memcpy(to + part, c->buf, len - part);
	bool sent = conn_send(r, c, c->snd_nxt, F_ACK | F_PSH, len);

	if (sent)
		advance(c, len);
	return sent;
}

/* Bytes of the buffer that were sent and not acknowledged; a FIN in flight does not count. */
static uint32_t in_flight(const struct tcp_conn *c)
{
	uint32_t n = c->snd_nxt - c->snd_una;

	return n > c->len ? c->len : n;
}

/* Send what buffer, window and state allow. */
static void push_out(struct mic_resp *r, struct tcp_conn *c, uint64_t now, bool probe)
{
	while (c->state == TCP_OPEN) {
		uint32_t flying = in_flight(c), left = c->len - flying;
		uint32_t room = c->snd_wnd > flying ? c->snd_wnd - flying : 0;

		if (probe && !room && !flying)
			room = 1;
		probe = false;
		if (left > room)
			left = room;
		if (left > c->mss)
			left = c->mss;
		if (!left || !send_data(r, c, left))
			break;
	}
	if (c->state == TCP_OPEN && c->fin_rcvd && in_flight(c) == c->len) {
		c->state = TCP_LAST_ACK;
		if (conn_send(r, c, c->snd_nxt, F_ACK | F_FIN, 0))
			advance(c, 1);
	}
	/* A window that opened again must be told, the peer may wait for it. */
	if (c->ack_now || (c->adv_wnd < TCP_MSS && window(c) >= 2 * TCP_MSS))
		conn_send(r, c, c->snd_nxt, F_ACK, 0);
	bool waiting = c->len || c->state != TCP_OPEN;

	if (!waiting)
		c->deadline = 0;
	else if (!c->deadline)
		c->deadline = now + c->rto;
}

/* --- input ------------------------------------------------------------------------------------ */

static struct tcp_conn *find(struct mic_resp *r, uint32_t ip, uint16_t port)
{
	for (unsigned i = 0; i < TCP_CONNS; i++)
		if (r->tcp[i].state != TCP_FREE && r->tcp[i].peer_ip == ip && r->tcp[i].peer_port == port)
			return &r->tcp[i];
	return NULL;
}

/* A free slot, or the one that can best be spared: half open, or idle for a minute. */
static struct tcp_conn *claim(struct mic_resp *r, uint64_t now)
{
	struct tcp_conn *best = NULL;

	for (unsigned i = 0; i < TCP_CONNS; i++) {
		struct tcp_conn *c = &r->tcp[i];

		if (c->state == TCP_FREE)
			return c;
		if ((c->state == TCP_SYN_RCVD || now - c->used_at > IDLE_NS) &&
		    (!best || c->used_at < best->used_at))
			best = c;
	}
	return best;
}

static void accept_syn(struct mic_resp *r, const struct packet *pkt, const struct segment *s, uint64_t now)
{
	struct tcp_conn *c = claim(r, now);

	if (!c) {
		r->stats.tcp_refused++;
		refuse(r, pkt, s);
		return;
	}
	/* Not guessable without the secret, different for each connection (RFC 6528 in small). */
	uint32_t iss =
		(r->secret ^ pkt->src ^ (uint32_t)s->src_port << 16) * 2654435761u + (uint32_t)(now >> 12);

	c->state = TCP_SYN_RCVD;
	c->peer_ip = pkt->src;
	c->peer_port = s->src_port;
	c->snd_una = iss;
	c->snd_nxt = c->snd_max = iss + 1;
	c->snd_wnd = s->wnd;
	c->rcv_nxt = s->seq + 1;
	c->mss = s->mss < 64 ? 64 : s->mss > TCP_MSS ? TCP_MSS : s->mss;
	c->fin_rcvd = c->ack_now = false;
	c->retries = 0;
	c->rto = RTO_MIN_NS;
	c->deadline = now + c->rto;
	c->used_at = now;
	c->start = c->len = 0;
	conn_send(r, c, iss, F_SYN | F_ACK, 0);
}

/* Take in an acknowledgement of something that was sent. False: the connection is closed now. */
static bool take_ack(struct mic_resp *r, struct tcp_conn *c, const struct segment *s, uint64_t now)
{
	if (c->state == TCP_SYN_RCVD) {
		c->state = TCP_OPEN;
		c->snd_una = s->ack;
		r->stats.tcp_accepted++;
	} else if (before(c->snd_una, s->ack)) {
		uint32_t n = s->ack - c->snd_una;
		uint32_t bytes = n > c->len ? c->len : n;

		c->start = (c->start + bytes) % TCP_BUF;
		c->len -= bytes;
		c->snd_una = s->ack;
		if (before(c->snd_nxt, s->ack))
			c->snd_nxt = s->ack;               /* it had arrived before we went back */
		if (c->fin_rcvd && !c->len && n > bytes) { /* our FIN is answered: LAST-ACK ends */
			conn_free(c);
			return false;
		}
	} else {
		c->snd_wnd = s->wnd;
		return true;
	}
	c->snd_wnd = s->wnd;
	c->retries = 0;
	c->rto = RTO_MIN_NS;
	c->deadline = 0;
	c->used_at = now;
	return true;
}

/* Put the new part of a segment into the echo buffer. */
static void take_data(struct mic_resp *r, struct tcp_conn *c, const struct segment *s)
{
	uint32_t old = c->rcv_nxt - s->seq; /* bytes at the front that are known already */
	uint32_t space = TCP_BUF - c->len;

	if (s->len || s->flags & F_FIN)
		c->ack_now = true;
	if (before(c->rcv_nxt, s->seq) || old > s->len || c->fin_rcvd || c->state != TCP_OPEN)
		return;
	uint32_t n = s->len - old;
	bool all = n <= space;

	if (!all)
		n = space;
	uint32_t at = (c->start + c->len) % TCP_BUF;
	uint32_t part = TCP_BUF - at < n ? TCP_BUF - at : n;

	if (n) {
		memcpy(c->buf + at, s->data + old, part);
		memcpy(c->buf, s->data + old + part, n - part);
	}
	c->len += n;
	c->rcv_nxt += n;
	r->stats.tcp_echoed += n;
	if (all && s->flags & F_FIN) {
		c->rcv_nxt++;
		c->fin_rcvd = true;
	}
}

static void conn_input(struct mic_resp *r, struct tcp_conn *c, const struct packet *pkt,
		       const struct segment *s, uint64_t now)
{
	if (s->flags & F_RST) {
		/* Exactly the next number, or it may be forged (RFC 5961). */
		if (s->seq == c->rcv_nxt)
			conn_free(c);
		else if (s->seq - c->rcv_nxt < window(c))
			conn_send(r, c, c->snd_nxt, F_ACK, 0);
		return;
	}
	if (s->flags & F_SYN) {
		if (c->state == TCP_SYN_RCVD && s->seq + 1 == c->rcv_nxt)
			conn_send(r, c, c->snd_una, F_SYN | F_ACK, 0);
		else
			conn_send(r, c, c->snd_nxt, F_ACK, 0);
		return;
	}
	if (!(s->flags & F_ACK))
		return;
	if (c->state == TCP_SYN_RCVD && s->ack != c->snd_nxt) {
		refuse(r, pkt, s);
		return;
	}
	if (before(c->snd_max, s->ack)) {
		conn_send(r, c, c->snd_nxt, F_ACK, 0); /* of something that was never sent */
		return;
	}
	if (!take_ack(r, c, s, now))
		return;
	take_data(r, c, s);
	push_out(r, c, now, false);
}

/* MSS option, or the default; options are hostile. */
static uint16_t parse_mss(const uint8_t *opt, uint32_t len)
{
	while (len >= 2 && opt[0] != 0) {
		uint32_t n = opt[0] == 1 ? 1 : opt[1];

		if (n == 0 || n > len || (n == 1 && opt[0] != 1))
			break;
		if (opt[0] == 2 && n == 4)
			return get16(opt + 2);
		opt += n;
		len -= n;
	}
	return MSS_DEFAULT;
}

void mic_resp_tcp_input(struct mic_resp *r, const struct packet *pkt, uint64_t now)
{
	const uint8_t *p = pkt->data;
	uint32_t head = pkt->len >= TCP_LEN ? (uint32_t)(p[12] >> 4) * 4 : 0;

	if (head < TCP_LEN || head > pkt->len ||
	    (!pkt->csum_ok &&
	     mic_resp_fold(
		     mic_resp_sum(p, pkt->len, mic_resp_pseudo(pkt->src, pkt->dst, PROTO_TCP, pkt->len))))) {
		r->stats.bad_frames++;
		return;
	}
	struct segment s = {.seq = get32(p + 4),
			    .ack = get32(p + 8),
			    .wnd = get16(p + 14),
			    .src_port = get16(p),
			    .dst_port = get16(p + 2),
			    .mss = parse_mss(p + TCP_LEN, head - TCP_LEN),
			    .flags = p[13],
			    .data = p + head,
			    .len = pkt->len - head};
	struct tcp_conn *c = s.dst_port == ECHO_PORT ? find(r, pkt->src, s.src_port) : NULL;

	if (c)
		conn_input(r, c, pkt, &s, now);
	else if (s.dst_port == ECHO_PORT && (s.flags & (F_SYN | F_ACK | F_RST | F_FIN)) == F_SYN)
		accept_syn(r, pkt, &s, now);
	else
		refuse(r, pkt, &s);
}

/* --- timers ----------------------------------------------------------------------------------- */

static void conn_timer(struct mic_resp *r, struct tcp_conn *c, uint64_t now)
{
	if (++c->retries > RETRIES_MAX) {
		conn_send(r, c, c->snd_nxt, F_RST | F_ACK, 0);
		r->stats.tcp_reset++;
		conn_free(c);
		return;
	}
	r->stats.tcp_retransmits++;
	c->rto *= 2;
	c->deadline = now + c->rto;
	if (c->state == TCP_SYN_RCVD) {
		conn_send(r, c, c->snd_una, F_SYN | F_ACK, 0);
		return;
	}
	/* Go back to the first byte without an answer; a FIN is sent again behind the data. */
	c->snd_nxt = c->snd_una;
	c->state = TCP_OPEN;
	push_out(r, c, now, true);
}

void mic_resp_tcp_timers(struct mic_resp *r, uint64_t now)
{
	for (unsigned i = 0; i < TCP_CONNS; i++)
		if (r->tcp[i].state != TCP_FREE && r->tcp[i].deadline && r->tcp[i].deadline <= now)
			conn_timer(r, &r->tcp[i], now);
}

uint64_t mic_resp_tcp_next(const struct mic_resp *r)
{
	uint64_t next = 0;

	for (unsigned i = 0; i < TCP_CONNS; i++) {
		const struct tcp_conn *c = &r->tcp[i];

		if (c->state != TCP_FREE && c->deadline && (!next || c->deadline < next))
			next = c->deadline;
	}
	return next;
}
