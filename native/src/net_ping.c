/* Pings of the responder: sent by the loop, waited for by whoever asked. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>

#include "responder.h"

#define ARP_TRIES    10u
#define ARP_RETRY_NS 20000000ull

void mic_resp_ping_reply(struct mic_resp *r, const struct packet *pkt, uint64_t now)
{
	struct ping *p = &r->ping;
	unsigned seq = get16(pkt->data + 6) - 1u; /* we number from 1, as ping(8) does */

	if (!p->busy || pkt->src != p->ip || get16(pkt->data + 4) != p->id || seq >= p->sent || p->rtts[seq])
		return;
	p->rtts[seq] = now - p->sent_at[seq] ? now - p->sent_at[seq] : 1;
	p->got++;
}

void mic_resp_ping_resolved(struct mic_resp *r, uint32_t ip, uint64_t now)
{
	if (ip == r->ping.ip && r->ping.arp_tries && !r->ping.sent)
		r->ping.next = now;
}

/* The first request waits a little for the address to be resolved. */
static bool ping_unresolved(struct mic_resp *r, uint64_t now)
{
	struct ping *p = &r->ping;

	if (p->arp_tries >= ARP_TRIES || !mic_resp_unresolved(r, p->ip))
		return false;
	p->arp_tries++;
	p->next = now + ARP_RETRY_NS;
	mic_resp_ask(r, p->ip);
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

void mic_resp_ping_timers(struct mic_resp *r, uint64_t now)
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

uint64_t mic_resp_ping_next(const struct mic_resp *r)
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
