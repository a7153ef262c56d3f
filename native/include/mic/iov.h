/* Scatter lists: copies to and from a byte offset, whatever the borders of the segments. */
#ifndef MIC_IOV_H
#define MIC_IOV_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

static inline uint64_t mic_iov_copy(const struct iovec *iov, unsigned n, uint64_t off, uint8_t *buf,
				    uint64_t len, bool out)
{
	uint64_t done = 0;

	for (unsigned i = 0; i < n && done < len; i++) {
		if (off >= iov[i].iov_len) {
			off -= iov[i].iov_len;
			continue;
		}
		uint8_t *at = (uint8_t *)iov[i].iov_base + off;
		uint64_t part = iov[i].iov_len - off;

		if (part > len - done)
			part = len - done;
		memcpy(out ? buf + done : at, out ? at : buf + done, part);
		done += part;
		off = 0;
	}
	return done;
}

/* Copy up to len bytes out of iov from byte `off` on; returns the number copied. */
static inline uint64_t mic_iov_read(const struct iovec *iov, unsigned n, uint64_t off, void *to, uint64_t len)
{
	return mic_iov_copy(iov, n, off, to, len, true);
}

/* Copy up to len bytes into iov from byte `off` on; returns the number copied. */
static inline uint64_t mic_iov_write(const struct iovec *iov, unsigned n, uint64_t off, const void *from,
				     uint64_t len)
{
	/* Read only: the direction says so. */
	return mic_iov_copy(iov, n, off, (uint8_t *)(uintptr_t)from, len, false);
}

/* Step over the first bytes of a list, and over segments without any behind them. */
static inline void mic_iov_skip(struct iovec **iov, unsigned *n, size_t bytes)
{
	while (*n && bytes >= (*iov)->iov_len) {
		bytes -= (*iov)->iov_len;
		(*iov)++;
		(*n)--;
	}
	if (*n) {
		(*iov)->iov_base = (uint8_t *)(*iov)->iov_base + bytes;
		(*iov)->iov_len -= bytes;
	}
}

#endif
