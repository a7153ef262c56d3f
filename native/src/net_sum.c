/* Checksums of the Internet protocols (RFC 1071). */
#include "responder.h"

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
