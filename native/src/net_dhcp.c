/* DHCP of the responder: one lease, the card's. */
#include "responder.h"

#define DHCP_CLIENT_PORT 68u
#define DHCP_COOKIE      0x63825363u
#define DHCP_MIN         240u
#define DHCP_LEASE_S     86400u

enum { DISCOVER = 1, OFFER = 2, REQUEST = 3, ACK = 5, NAK = 6 }; /* types of messages */
enum {
	OPT_PAD,
	OPT_NETMASK = 1,
	OPT_ROUTER = 3,
	OPT_WANTED = 50,
	OPT_LEASE = 51,
	OPT_TYPE = 53,
	OPT_SERVER = 54,
	OPT_END = 255
};

struct dhcp_request {
	uint8_t type;
	uint32_t wanted, server;
};

/* Options: each length checked against what is left. False: malformed. */
static bool parse_dhcp(const uint8_t *opt, uint32_t len, struct dhcp_request *q)
{
	while (len && opt[0] != OPT_END) {
		if (opt[0] == OPT_PAD) {
			opt++;
			len--;
			continue;
		}
		if (len < 2 || opt[1] > len - 2)
			return false;
		if (opt[0] == OPT_TYPE && opt[1] == 1)
			q->type = opt[2];
		else if (opt[0] == OPT_WANTED && opt[1] == 4)
			q->wanted = get32(opt + 2);
		else if (opt[0] == OPT_SERVER && opt[1] == 4)
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
	bool nak = type == NAK, broadcast = nak || get16(q + 10) & 0x8000;
	uint32_t to = broadcast ? IP_BROADCAST : r->lease_ip;

	memset(b, 0, DHCP_MIN);
	memcpy(b, q, 8); /* op, htype, hlen, hops, xid */
	b[0] = 2;
	b[3] = 0;
	memcpy(b + 10, q + 10, 2);
	if (!nak)
		put32(b + 16, r->lease_ip);
	memcpy(b + 28, q + 28, 16);
	put32(b + 236, DHCP_COOKIE);
	*o++ = OPT_TYPE;
	*o++ = 1;
	*o++ = type;
	o = put_option32(o, OPT_SERVER, r->ip);
	if (!nak) {
		o = put_option32(o, OPT_LEASE, DHCP_LEASE_S);
		o = put_option32(o, OPT_NETMASK, r->netmask);
		o = put_option32(o, OPT_ROUTER, r->ip);
	}
	*o++ = OPT_END;
	uint32_t len = (uint32_t)(o - b);

	if (len < 300) { /* BOOTP's old minimum */
		memset(o, 0, 300 - len);
		len = 300;
	}
	mic_resp_finish_udp(r, to, DHCP_SERVER_PORT, DHCP_CLIENT_PORT, len);
	r->stats.dhcp_replies +=
		mic_resp_send_ip_to(r, broadcast ? mic_resp_broadcast : q + 28, to, PROTO_UDP, UDP_LEN + len);
}

void mic_resp_dhcp_input(struct mic_resp *r, const uint8_t *q, uint32_t len)
{
	struct dhcp_request req = {0};

	if (len < DHCP_MIN || q[0] != 1 || q[1] != 1 || q[2] != 6 || get32(q + 236) != DHCP_COOKIE ||
	    !parse_dhcp(q + DHCP_MIN, len - DHCP_MIN, &req)) {
		r->stats.bad_frames++;
		return;
	}
	uint32_t wanted = req.wanted ? req.wanted : get32(q + 12);

	if (req.type == DISCOVER)
		send_dhcp(r, q, OFFER);
	else if (req.type == REQUEST && (!req.server || req.server == r->ip))
		send_dhcp(r, q, wanted == r->lease_ip ? ACK : NAK);
	else
		r->stats.ignored_frames++;
}
