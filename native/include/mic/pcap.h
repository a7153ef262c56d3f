/* Capture file writer: classic pcap with nanoseconds, Ethernet frames without the vnet header.
 *
 * The data path only copies into a bounded buffer; a thread writes the file. A slow, full or broken
 * file costs records, never time. */
#ifndef MIC_PCAP_H
#define MIC_PCAP_H

#include <stdint.h>
#include <sys/uio.h>

/* cffi-begin */
struct mic_pcap;

struct mic_pcap_stats {
	uint64_t captured, written, dropped; /* records */
	int error;                           /* errno that ended writing, 0 = none */
};

/* fd stays the caller's and stays open until mic_pcap_destroy(). buffer: bytes, rounded up to a power
 * of two, at least 1 MiB. NULL with errno set on failure. */
struct mic_pcap *mic_pcap_create(int fd, uint64_t buffer);
/* Write out what is buffered, for at most flush_ms, and end; the final counters go to *last unless it is
 * NULL (error ETIMEDOUT: not everything could be written in time). */
void mic_pcap_destroy(struct mic_pcap *p, unsigned flush_ms, struct mic_pcap_stats *last);
void mic_pcap_stats(const struct mic_pcap *p, struct mic_pcap_stats *out);
/* cffi-end */

/* One frame: `len` bytes of iov after the first `skip`. One caller at a time. */
void mic_pcap_frame(struct mic_pcap *p, const struct iovec *iov, unsigned n, uint64_t skip, uint64_t len);

#endif
