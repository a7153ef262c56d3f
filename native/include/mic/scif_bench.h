/* The inner loops of `micemu scif perf`, and beside each what the bare machine does. */
#ifndef MIC_SCIF_BENCH_H
#define MIC_SCIF_BENCH_H

#include <stdint.h>

/* cffi-begin */
enum mic_bench_op {
	MIC_BENCH_PING,   /* messages there and back */
	MIC_BENCH_PACED,  /* the same after a pause, so that the peer sleeps */
	MIC_BENCH_STREAM, /* messages one way, one byte back at the end */
	MIC_BENCH_FLAG,   /* a word there and back through mapped memory */
};

struct mic_bench {
	uint32_t op;       /* enum mic_bench_op */
	uint32_t size;     /* bytes of a message */
	uint64_t count;    /* messages, or round trips */
	uint64_t pause_ns; /* PACED: before each round trip */
};

/* Both ends call this with the same struct, the serving one with `serve`; `own` and `peer` are for FLAG:
 * a word of our memory that the peer writes, and of its memory that we write. Nanoseconds for one
 * half round trip (PING: mean, PACED: median), for one message (STREAM); -errno. */
double mic_bench_scif(int epd, const struct mic_bench *b, int serve, uint64_t *own, uint64_t *peer);
/* The yardstick, with a child process on CPU `cpu`: a shared cache line (PING, FLAG), a futex in it
 * (PACED), a Unix stream socket (STREAM). */
double mic_bench_limit(const struct mic_bench *b, int cpu);

/* Nanoseconds for one copy of `size` bytes between our window at `loff` and the peer's at `roff`, walking
 * through `area` bytes; -errno. */
double mic_bench_rma(int epd, int64_t loff, int64_t roff, uint64_t size, uint64_t area, uint64_t count,
		     int write);
/* Nanoseconds for scif_register and scif_unregister of `size` bytes, each time other memory (`fresh`) or
 * the same; -errno. */
double mic_bench_register(int epd, uint64_t size, uint64_t count, int fresh);
/* Nanoseconds for scif_open, scif_connect and scif_close; -errno. */
double mic_bench_connect(uint16_t node, uint16_t port, uint64_t count);
/* The yardstick: connect to a Unix stream socket, a byte there and back, close. */
double mic_bench_connect_limit(const char *path, uint64_t count);
/* The other side: scif_accept and scif_close. 0 or -errno. */
int mic_bench_accept(int epd, uint64_t count);
/* cffi-end */

#endif
