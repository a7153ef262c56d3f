/* Fuzz target: the user-space network responder against hostile frames.
 *
 * Input: records of an operation byte, a length byte and twice that many bytes. An operation sends the bytes
 * as a whole frame, as the payload of a well-formed IP packet, or as the fields of a TCP segment that lies
 * near what the connection expects; or lets the TCP timers fire. Checked: every frame that comes back is
 * well formed, and every byte that a connection echoes is the byte that was sent at that place of the
 * stream, however segments overlapped. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>

#include "../src/responder.h"
#include "fuzz.h"

#define CARD_IP  0xac1f0101u /* 172.31.1.1 */
#define HOST_IP  0xac1f01feu
#define PORTS    3u
#define ISS      0xfffffff0u /* the numbers wrap soon */
#define DATA_MAX 1400u

static const uint8_t card_mac[6] = {2, 0, 0, 0, 0, 1}, host_mac[6] = {2, 0, 0, 0, 0, 0xfe};

enum op { RAW, ICMP, UDP, ARP, SEGMENT, TIMERS, OPS };

/* What the client of one port knows. */
struct client {
	uint32_t seq;   /* next number to send */
	uint32_t ack;   /* next number expected */
	uint32_t first; /* the responder's number of its first data byte */
	bool open;
};

static struct client clients[PORTS];
static uint8_t frame[2048];

static uint8_t stream_byte(uint32_t offset)
{
	return (uint8_t)(offset * 31 + (offset >> 8));
}

static void check_tcp(const uint8_t *t, uint32_t len)
{
	REQUIRE(len >= TCP_LEN);
	uint32_t head = (uint32_t)(t[12] >> 4) * 4, port = get16(t + 2);

	REQUIRE(head >= TCP_LEN && head <= len);
	REQUIRE(!mic_resp_fold(mic_resp_sum(t, len, mic_resp_pseudo(HOST_IP, CARD_IP, PROTO_TCP, len))));
	if (get16(t) != ECHO_PORT || port >= PORTS)
		return;
	struct client *c = &clients[port];

	if (t[13] & 2) { /* SYN: another connection begins */
		*c = (struct client){.seq = get32(t + 8),
				     .ack = get32(t + 4) + 1,
				     .first = get32(t + 4) + 1,
				     .open = true};
		return;
	}
	if (t[13] & 4) {
		c->open = false;
		return;
	}
	if (!c->open)
		return;
	uint32_t at = get32(t + 4) - c->first, n = len - head;

	for (uint32_t i = 0; i < n; i++)
		REQUIRE(t[head + i] == stream_byte(at + i));
	c->seq = get32(t + 8);
	if (get32(t + 4) == c->ack)
		c->ack += n + (t[13] & 1);
}

static void check_frames(struct mic_resp *r)
{
	uint8_t f[FRAME_OUT_MAX];
	uint32_t len;

	while ((len = mic_resp_output(r, f, sizeof f)) != 0) {
		REQUIRE(len >= 60 && len <= FRAME_OUT_MAX);
		REQUIRE(!memcmp(f + 6, host_mac, 6));
		if (get16(f + 12) != 0x0800)
			continue;
		const uint8_t *h = f + ETH_LEN;

		REQUIRE(get16(h + 2) >= IP_LEN && get16(h + 2) + ETH_LEN <= len);
		REQUIRE(!mic_resp_fold(mic_resp_sum(h, IP_LEN, 0)));
		if (h[9] == PROTO_TCP && get32(h + 16) == CARD_IP)
			check_tcp(h + IP_LEN, get16(h + 2) - IP_LEN);
	}
}

static void send_ip(struct mic_resp *r, uint8_t proto, uint32_t dst, uint32_t len)
{
	uint8_t *h = frame + ETH_LEN;

	memcpy(frame, host_mac, 6);
	memcpy(frame + 6, card_mac, 6);
	put16(frame + 12, 0x0800);
	memset(h, 0, IP_LEN);
	h[0] = 0x45;
	put16(h + 2, IP_LEN + len);
	h[8] = 64;
	h[9] = proto;
	put32(h + 12, CARD_IP);
	put32(h + 16, dst);
	put16(h + 10, mic_resp_fold(mic_resp_sum(h, IP_LEN, 0)));
	mic_resp_input(r, frame, ETH_LEN + IP_LEN + len, 1);
}

/* Fields: port, flags, offset of seq and of ack (signed), window, length. */
static void send_segment(struct mic_resp *r, const uint8_t *p, uint32_t len)
{
	uint8_t field[8] = {0};

	memcpy(field, p, len < sizeof field ? len : sizeof field);
	uint32_t port = field[0] % PORTS, n = (uint32_t)field[6] << 3;
	struct client *c = &clients[port];
	uint8_t *t = frame + ETH_LEN + IP_LEN;

	if (n > DATA_MAX)
		n = DATA_MAX;
	if (!c->open)
		c->seq = ISS;
	uint32_t seq = c->seq + (uint32_t)((int8_t)field[2] * 8);

	if (field[1] & 2)
		seq = ISS; /* every connection begins at the same number, so that offsets are known */
	put16(t, port);
	put16(t + 2, ECHO_PORT);
	put32(t + 4, seq);
	put32(t + 8, c->ack + (uint32_t)((int8_t)field[3] * 8));
	t[12] = 5 << 4;
	t[13] = field[1] & 0x1f;
	put16(t + 14, (uint32_t)field[4] << field[5] % 9);
	put32(t + 16, 0);
	for (uint32_t i = 0; i < n; i++)
		t[TCP_LEN + i] = stream_byte(seq + i - (ISS + 1));
	send_ip(r, PROTO_TCP, HOST_IP, TCP_LEN + n);
}

static void step(struct mic_resp *r, uint8_t op, const uint8_t *p, uint32_t len)
{
	uint8_t *payload = frame + ETH_LEN + IP_LEN;

	switch (op % OPS) {
	case RAW:
		mic_resp_input(r, p, len, op & 0x80);
		break;
	case ICMP:
	case UDP:
		memcpy(payload, p, len);
		send_ip(r, op % OPS == UDP ? PROTO_UDP : PROTO_ICMP, op & 0x80 ? 0xffffffffu : HOST_IP, len);
		break;
	case ARP:
		memset(frame, 0xff, 6);
		memcpy(frame + 6, card_mac, 6);
		put16(frame + 12, 0x0806);
		memcpy(frame + ETH_LEN, p, len);
		mic_resp_input(r, frame, ETH_LEN + len, 0);
		break;
	case SEGMENT:
		send_segment(r, p, len);
		break;
	case TIMERS:
		pthread_mutex_lock(&r->lock);
		mic_resp_tcp_timers(r, UINT64_MAX / 2);
		for (unsigned i = 0; i < TCP_CONNS; i++)
			r->tcp[i].deadline = r->tcp[i].deadline ? 1 : 0; /* due again at the next firing */
		pthread_mutex_unlock(&r->lock);
		break;
	}
	check_frames(r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct mic_resp *r = mic_resp_create(host_mac, HOST_IP, 0xffffff00u, CARD_IP);

	REQUIRE(r);
	memset(clients, 0, sizeof clients);
	while (size >= 2) {
		uint32_t len = data[1] * 2u < size - 2 ? data[1] * 2u : (uint32_t)size - 2;

		step(r, data[0], data + 2, len);
		data += 2 + len;
		size -= 2 + len;
	}
	/* Whatever happened, it still answers. */
	uint8_t ask[28] = {0, 1, 8, 0, 6, 4, 0, 1};

	put32(ask + 14, CARD_IP);
	put32(ask + 24, HOST_IP);
	uint64_t before = r->stats.arp_replies;

	step(r, ARP, ask, sizeof ask);
	REQUIRE(r->stats.arp_replies == before + 1);
	mic_resp_destroy(r);
	return 0;
}
