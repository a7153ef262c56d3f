/* SCIF through its public header, as a program would use it (`micemu scif perf`). */
#define _GNU_SOURCE
#include "mic/scif_bench.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "bench.h"
#include "mic/barrier.h"
#include "scif.h"

#define PAGE 4096u

static int send_all(int epd, void *buf, uint32_t size)
{
	int n = scif_send(epd, buf, (int)size, SCIF_SEND_BLOCK);

	return n == (int)size ? 0 : n < 0 ? -errno : -EIO;
}

static int recv_all(int epd, void *buf, uint32_t size)
{
	int n = scif_recv(epd, buf, (int)size, SCIF_RECV_BLOCK);

	return n == (int)size ? 0 : n < 0 ? -errno : -EIO;
}

static int there_and_back(int epd, void *buf, uint32_t size, int serve)
{
	int rc = serve ? recv_all(epd, buf, size) : send_all(epd, buf, size);

	if (rc == 0)
		rc = serve ? send_all(epd, buf, size) : recv_all(epd, buf, size);
	return rc;
}

static double ping(int epd, const struct mic_bench *b, uint8_t *buf, int serve)
{
	uint64_t start = mic_now_ns();

	for (uint64_t i = 0; i < b->count; i++) {
		int rc = there_and_back(epd, buf, b->size, serve);

		if (rc < 0)
			return rc;
	}
	return (double)(mic_now_ns() - start) / (double)b->count / 2;
}

static double paced(int epd, const struct mic_bench *b, uint8_t *buf, int serve)
{
	uint64_t *ns = calloc(b->count, sizeof *ns);
	double half = -EINVAL;

	if (!ns)
		return -ENOMEM;
	for (uint64_t i = 0; i < b->count; i++) {
		bench_pause(serve ? 0 : b->pause_ns);
		uint64_t start = mic_now_ns();
		int rc = there_and_back(epd, buf, b->size, serve);

		if (rc < 0) {
			half = rc;
			goto out;
		}
		ns[i] = mic_now_ns() - start;
	}
	half = bench_median(ns, b->count) / 2;
out:
	free(ns);
	return half;
}

static double stream(int epd, const struct mic_bench *b, uint8_t *buf, int serve)
{
	uint64_t start = mic_now_ns();
	int rc = 0;

	for (uint64_t i = 0; i < b->count && rc == 0; i++)
		rc = serve ? recv_all(epd, buf, b->size) : send_all(epd, buf, b->size);
	if (rc == 0)
		rc = serve ? send_all(epd, buf, 1) : recv_all(epd, buf, 1);
	return rc < 0 ? rc : (double)(mic_now_ns() - start) / (double)b->count;
}

double mic_bench_scif(int epd, const struct mic_bench *b, int serve, uint64_t *own, uint64_t *peer)
{
	uint8_t *buf = aligned_alloc(PAGE, (b->size + PAGE) / PAGE * PAGE);
	double ns = -EINVAL;

	if (!buf)
		return -ENOMEM;
	memset(buf, 1, b->size + 1);
	if (b->op == MIC_BENCH_PING)
		ns = ping(epd, b, buf, serve);
	else if (b->op == MIC_BENCH_PACED)
		ns = paced(epd, b, buf, serve);
	else if (b->op == MIC_BENCH_STREAM)
		ns = stream(epd, b, buf, serve);
	else if (b->op == MIC_BENCH_FLAG)
		ns = bench_flag(b->count, serve, own, peer);
	free(buf);
	return ns;
}

double mic_bench_rma(int epd, int64_t loff, int64_t roff, uint64_t size, uint64_t area, uint64_t count,
		     int write)
{
	uint64_t start = mic_now_ns(), at = 0;

	for (uint64_t i = 0; i < count; i++) {
		off_t l = loff + (off_t)at, r = roff + (off_t)at;
		int rc = write ? scif_writeto(epd, l, size, r, SCIF_RMA_SYNC)
			       : scif_readfrom(epd, l, size, r, SCIF_RMA_SYNC);

		if (rc < 0)
			return -errno;
		at = at + 2 * size <= area ? at + size : 0;
	}
	return (double)(mic_now_ns() - start) / (double)count;
}

static void *touched(uint64_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		return NULL;
	memset(p, 1, size);
	return p;
}

/* Register and unregister once; adds to *ns. */
static int register_once(int epd, void *p, uint64_t size, uint64_t *ns)
{
	uint64_t start = mic_now_ns();
	off_t at = scif_register(epd, p, size, 0, SCIF_PROT_READ | SCIF_PROT_WRITE, 0);

	if (at < 0 || scif_unregister(epd, at, size) < 0)
		return -errno;
	*ns += mic_now_ns() - start;
	return 0;
}

double mic_bench_register(int epd, uint64_t size, uint64_t count, int fresh)
{
	uint64_t ns = 0, warm = 0;
	void *p = NULL;
	int rc = 0;

	for (uint64_t i = 0; i < count && rc == 0; i++) {
		if (!p) {
			p = touched(size);
			if (!p)
				return -ENOMEM;
			if (!fresh)
				rc = register_once(epd, p, size, &warm);
		}
		if (rc == 0)
			rc = register_once(epd, p, size, &ns);
		if (fresh) {
			munmap(p, size);
			p = NULL;
		}
	}
	if (p)
		munmap(p, size);
	return rc < 0 ? rc : (double)ns / (double)count;
}

double mic_bench_connect(uint16_t node, uint16_t port, uint64_t count)
{
	uint64_t start = mic_now_ns();

	for (uint64_t i = 0; i < count; i++) {
		struct scif_portID dst = {node, port};
		int epd = scif_open();

		if (epd < 0 || scif_connect(epd, &dst) < 0 || scif_close(epd) < 0)
			return -errno;
	}
	return (double)(mic_now_ns() - start) / (double)count;
}

int mic_bench_accept(int epd, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++) {
		struct scif_portID peer;
		int conn;

		if (scif_accept(epd, &peer, &conn, SCIF_ACCEPT_SYNC) < 0 || scif_close(conn) < 0)
			return -errno;
	}
	return 0;
}
