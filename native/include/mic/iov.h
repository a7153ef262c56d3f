/* Scatter lists: copies to and from a byte offset, whatever the borders of the segments. */
#ifndef MIC_IOV_H
#define MIC_IOV_H

#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

/* Copy up to len bytes out of iov from byte `off` on; returns the number copied. */
static inline uint64_t mic_iov_read(const struct iovec *iov, unsigned n, uint64_t off, void *to, uint64_t len)
{
	uint8_t *p = to;
	uint64_t done = 0;

	for (unsigned i = 0; i < n && done < len; i++) {
		if (off >= iov[i].iov_len) {
			off -= iov[i].iov_len;
			continue;
		}
		uint64_t part = iov[i].iov_len - off;

		if (part > len - done)
			part = len - done;
		memcpy(p + done, (const uint8_t *)iov[i].iov_base + off, part);
		done += part;
		off = 0;
	}
	return done;
}

/* Copy up to len bytes into iov from byte `off` on; returns the number copied. */
static inline uint64_t mic_iov_write(const struct iovec *iov, unsigned n, uint64_t off, const void *from,
				     uint64_t len)
{
	const uint8_t *p = from;
	uint64_t done = 0;

	for (unsigned i = 0; i < n && done < len; i++) {
		if (off >= iov[i].iov_len) {
			off -= iov[i].iov_len;
			continue;
		}
		uint64_t part = iov[i].iov_len - off;

		if (part > len - done)
			part = len - done;
		memcpy((uint8_t *)iov[i].iov_base + off, p + done, part);
		done += part;
		off = 0;
	}
	return done;
}

#endif
