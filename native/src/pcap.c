/* Capture files: the data path copies into a byte ring, a thread writes the file. */
#define _GNU_SOURCE
#include "mic/pcap.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "mic/barrier.h"
#include "mic/iov.h"

#define PCAP_MAGIC_NS 0xa1b23c4du
#define PCAP_SNAPLEN  262144u
#define PCAP_ETHERNET 1u
#define MIN_BUFFER    (1ull << 20)
#define MAX_BUFFER    (1ull << 30)
#define NSEC          1000000000ull
#define PIPE_PIECE    4096u /* what a pipe that polls writable takes without blocking */

struct record {
	uint32_t sec, nsec, caplen, len;
};

struct file_header {
	uint32_t magic;
	uint16_t major, minor;
	uint32_t zone, sigfigs, snaplen, linktype;
};

struct mic_pcap {
	int fd;
	int wake_fd; /* eventfd: records are there, or stop is set */
	bool regular;
	uint8_t *ring;
	uint64_t size;     /* power of two */
	uint64_t head;     /* bytes put in, by the data path */
	uint64_t tail;     /* bytes written, by the thread */
	uint32_t sleeping; /* the thread waits on wake_fd */
	uint32_t stop;
	uint64_t deadline; /* CLOCK_MONOTONIC ns after which nothing is written any more, 0 = none */
	uint64_t epoch;    /* wall clock - CLOCK_MONOTONIC at the start: times never run backwards */
	uint64_t captured, dropped, written;
	int error;
	pthread_t thread;
};

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return (uint64_t)ts.tv_sec * NSEC + (uint64_t)ts.tv_nsec;
}

static uint64_t monotonic_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

/* --- data path -------------------------------------------------------------------------------- */

static void ring_put(struct mic_pcap *p, uint64_t at, const void *from, uint64_t len)
{
	uint64_t off = at & (p->size - 1);
	uint64_t part = p->size - off < len ? p->size - off : len;

	memcpy(p->ring + off, from, part);
	memcpy(p->ring, (const uint8_t *)from + part, len - part);
}

static void ring_put_iov(struct mic_pcap *p, uint64_t at, const struct iovec *iov, unsigned n, uint64_t skip,
			 uint64_t len)
{
	uint64_t off = at & (p->size - 1);
	uint64_t part = p->size - off < len ? p->size - off : len;

	mic_iov_read(iov, n, skip, p->ring + off, part);
	mic_iov_read(iov, n, skip + part, p->ring, len - part);
}

void mic_pcap_frame(struct mic_pcap *p, const struct iovec *iov, unsigned n, uint64_t skip, uint64_t len)
{
	uint64_t cap = len < PCAP_SNAPLEN ? len : PCAP_SNAPLEN;
	uint64_t head = p->head;
	/* Pairs with the release store in drain(): that room is really free. */
	uint64_t room = p->size - (head - mic_load_acquire(&p->tail));

	mic_store_relaxed(&p->captured, p->captured + 1);
	if (room < sizeof(struct record) + cap || mic_load_relaxed(&p->error)) {
		mic_store_relaxed(&p->dropped, p->dropped + 1);
		return;
	}
	uint64_t now = p->epoch + monotonic_ns();
	struct record rec = {(uint32_t)(now / NSEC), (uint32_t)(now % NSEC), (uint32_t)cap, (uint32_t)len};

	ring_put(p, head, &rec, sizeof rec);
	ring_put_iov(p, head + sizeof rec, iov, n, skip, cap);
	/* Pairs with the acquire load in writer(). */
	mic_store_release(&p->head, head + sizeof rec + cap);
	mic_full_fence(); /* head before sleeping: pairs with the fence in writer() */
	if (mic_load_relaxed(&p->sleeping))
		(void)!eventfd_write(p->wake_fd, 1);
}

/* --- writer thread ---------------------------------------------------------------------------- */

static int time_left_ms(const struct mic_pcap *p)
{
	uint64_t deadline = mic_load_relaxed(&p->deadline), now = monotonic_ns();

	if (!deadline)
		return -1;
	return deadline > now ? (int)((deadline - now) / 1000000u) + 1 : 0;
}

/* Wait until the file takes bytes, or until the end. 0 writable, -errno. */
static int wait_writable(struct mic_pcap *p)
{
	for (;;) {
		/* Once the end is near, wake_fd stays readable: no need to be told again. */
		struct pollfd f[2] = {{.fd = p->fd, .events = POLLOUT},
				      {.fd = mic_load_acquire(&p->stop) ? -1 : p->wake_fd, .events = POLLIN}};
		eventfd_t drop;
		int timeout = time_left_ms(p);

		if (timeout == 0)
			return -ETIMEDOUT;
		if (poll(f, 2, timeout) < 0 && errno != EINTR)
			return -errno;
		if (f[0].revents)
			return 0;
		if (f[1].revents)
			(void)!eventfd_read(p->wake_fd, &drop);
	}
}

static int write_piece(struct mic_pcap *p, const uint8_t *from, uint64_t len)
{
	if (!p->regular) {
		int rc = wait_writable(p);

		if (rc < 0)
			return rc;
		if (len > PIPE_PIECE)
			len = PIPE_PIECE;
	}
	ssize_t n = write(p->fd, from, len);

	if (n < 0)
		return errno == EINTR || errno == EAGAIN ? 0 : -errno;
	return (int)n;
}

static int write_all(struct mic_pcap *p, const uint8_t *from, uint64_t len)
{
	while (len) {
		int n = write_piece(p, from, len < (1u << 20) ? len : 1u << 20);

		if (n < 0)
			return n;
		from += n;
		len -= (uint64_t)n;
	}
	return 0;
}

/* Write one record out of the ring; a file that ends in the middle of one is cut back. */
static int write_record(struct mic_pcap *p, uint64_t *tail)
{
	uint64_t off = *tail & (p->size - 1);
	uint8_t raw[sizeof(struct record)];
	struct record rec;

	for (unsigned i = 0; i < sizeof raw; i++)
		raw[i] = p->ring[(off + i) & (p->size - 1)];
	memcpy(&rec, raw, sizeof rec);
	uint64_t len = sizeof rec + rec.caplen;
	uint64_t part = p->size - off < len ? p->size - off : len;
	off_t start = p->regular ? lseek(p->fd, 0, SEEK_CUR) : -1;
	int rc = write_all(p, p->ring + off, part);

	if (rc == 0)
		rc = write_all(p, p->ring, len - part);
	if (rc < 0 && start >= 0 && ftruncate(p->fd, start) == 0)
		(void)!lseek(p->fd, start, SEEK_SET);
	*tail += len;
	return rc;
}

static void fail(struct mic_pcap *p, int rc)
{
	mic_store_relaxed(&p->error, -rc);
}

static void drain(struct mic_pcap *p, uint64_t head)
{
	uint64_t tail = p->tail;

	while (tail != head) {
		int rc = mic_load_relaxed(&p->error) ? 0 : write_record(p, &tail);

		if (mic_load_relaxed(&p->error))
			tail = head; /* given up: free the buffer */
		else if (rc < 0)
			fail(p, rc);
		else
			mic_store_relaxed(&p->written, p->written + 1);
		mic_store_release(&p->tail, tail); /* pairs with the acquire load in mic_pcap_frame() */
	}
}

static void *writer(void *arg)
{
	struct mic_pcap *p = arg;
	const struct file_header h = {PCAP_MAGIC_NS, 2, 4, 0, 0, PCAP_SNAPLEN, PCAP_ETHERNET};
	int rc = write_all(p, (const uint8_t *)&h, sizeof h);

	if (rc < 0)
		fail(p, rc);
	for (;;) {
		/* stop before head: what was captured before the stop is still written. */
		uint32_t stop = mic_load_acquire(&p->stop);
		uint64_t head = mic_load_acquire(&p->head);
		struct pollfd f = {.fd = p->wake_fd, .events = POLLIN};
		eventfd_t drop;

		drain(p, head);
		if (stop)
			return NULL;
		mic_store_relaxed(&p->sleeping, 1);
		mic_full_fence(); /* sleeping before head: pairs with the fence in mic_pcap_frame() */
		if (mic_load_acquire(&p->head) == head && !mic_load_acquire(&p->stop))
			(void)!poll(&f, 1, -1);
		mic_store_relaxed(&p->sleeping, 0);
		(void)!eventfd_read(p->wake_fd, &drop);
	}
}

/* --- life ------------------------------------------------------------------------------------- */

static int start_thread(struct mic_pcap *p)
{
	sigset_t all, old;

	/* Signals belong to the program's own threads; SIGPIPE shows as EPIPE. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int rc = pthread_create(&p->thread, NULL, writer, p);

	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return rc;
}

struct mic_pcap *mic_pcap_create(int fd, uint64_t buffer)
{
	struct mic_pcap *p = calloc(1, sizeof *p);
	struct stat st;
	int rc;

	if (!p)
		return NULL;
	p->fd = fd;
	p->epoch = clock_ns(CLOCK_REALTIME) - monotonic_ns();
	p->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	for (p->size = MIN_BUFFER; p->size < buffer && p->size < MAX_BUFFER;)
		p->size *= 2;
	p->ring = malloc(p->size);
	rc = p->wake_fd < 0 || fstat(fd, &st) < 0 ? errno : p->ring ? 0 : ENOMEM;
	if (rc == 0) {
		p->regular = S_ISREG(st.st_mode);
		rc = start_thread(p);
	}
	if (rc == 0)
		return p;
	if (p->wake_fd >= 0)
		close(p->wake_fd);
	free(p->ring);
	free(p);
	errno = rc;
	return NULL;
}

void mic_pcap_destroy(struct mic_pcap *p, unsigned flush_ms, struct mic_pcap_stats *last)
{
	if (!p)
		return;
	mic_store_relaxed(&p->deadline, monotonic_ns() + flush_ms * 1000000ull);
	mic_store_release(&p->stop, 1); /* pairs with the acquire loads of the thread */
	(void)!eventfd_write(p->wake_fd, 1);
	pthread_join(p->thread, NULL);
	if (last)
		mic_pcap_stats(p, last);
	close(p->wake_fd);
	free(p->ring);
	free(p);
}

void mic_pcap_stats(const struct mic_pcap *p, struct mic_pcap_stats *out)
{
	*out = (struct mic_pcap_stats){
		.captured = mic_load_relaxed(&p->captured),
		.written = mic_load_relaxed(&p->written),
		.dropped = mic_load_relaxed(&p->dropped),
		.error = mic_load_relaxed(&p->error),
	};
}
