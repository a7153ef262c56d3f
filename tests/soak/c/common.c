/* Patterns, counters, streams of records. */
#include "soak.h"

#include <fcntl.h>
#include <pthread.h>
#include <scif.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define RECORD (48 << 10)

struct page *page;

void page_open(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);

	page = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (page == MAP_FAILED)
		die(path);
	close(fd);
}

struct row *row_named(const char *name)
{
	for (struct row *r = page->row; r < page->row + ROWS; r++)
		if (!strcmp(r->name, name))
			return r;
	fprintf(stderr, "the page has no row %s\n", name);
	exit(1);
}

void wrong(struct row *row, const char *fmt, ...)
{
	va_list args;

	count(&row->wrong, 1);
	if (seen(&row->wrong) > 5)
		return;
	fprintf(stderr, "%s: round %lu: ", row->name, row->rounds);
	va_start(args, fmt);
	vfprintf(stderr, fmt, args);
	va_end(args);
	fputc('\n', stderr);
}

void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t mix(uint64_t z)
{
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
	z = (z ^ z >> 27) * 0x94d049bb133111ebu;
	return z ^ z >> 31;
}

uint64_t dice(uint64_t *state)
{
	return mix(*state += 0x9e3779b97f4a7c15u);
}

static uint64_t word(uint64_t seed, uint64_t i)
{
	return mix(mix(seed) + i * 0x9e3779b97f4a7c15u);
}

void pattern(void *buf, size_t n, uint64_t seed, uint64_t at)
{
	for (char *p = buf; n;) {
		uint64_t w = word(seed, at / 8);
		size_t skip = at % 8, k = 8 - skip < n ? 8 - skip : n;

		memcpy(p, (char *)&w + skip, k);
		p += k;
		at += k;
		n -= k;
	}
}

size_t differs(const void *buf, size_t n, uint64_t seed, uint64_t at)
{
	const char *p = buf;

	for (size_t done = 0; done < n;) {
		uint64_t w = word(seed, (at + done) / 8);
		size_t skip = (at + done) % 8, k = 8 - skip < n - done ? 8 - skip : n - done;

		if (memcmp(p + done, (char *)&w + skip, k))
			for (size_t i = 0; i < k; i++)
				if (p[done + i] != ((char *)&w)[skip + i])
					return done + i;
		done += k;
	}
	return n;
}

uint64_t hash(const void *buf, size_t n)
{
	const uint64_t *p = buf;
	uint64_t h = n;

	for (size_t i = 0; i < n / 8; i++)
		h = mix(h ^ p[i]) + i;
	return h;
}

char *pages(size_t n)
{
	char *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		die("mmap");
	return p;
}

/* --- streams ---------------------------------------------------------------------------------------- */

static ssize_t tcp_send(int fd, const void *buf, size_t n)
{
	return send(fd, buf, n, MSG_NOSIGNAL);
}

static ssize_t tcp_recv(int fd, void *buf, size_t n)
{
	return recv(fd, buf, n, 0);
}

static ssize_t ep_send(int fd, const void *buf, size_t n)
{
	return scif_send(fd, (void *)(uintptr_t)buf, (int)n, SCIF_SEND_BLOCK);
}

static ssize_t ep_recv(int fd, void *buf, size_t n)
{
	return scif_recv(fd, buf, (int)n, SCIF_RECV_BLOCK);
}

const struct link tcp_link = {tcp_send, tcp_recv, -1}, scif_link = {ep_send, ep_recv, -1},
		  tty_link = {write, read, -1};

void put(const struct link *l, const void *buf, size_t n)
{
	for (const char *p = buf; n;) {
		ssize_t k = l->send(l->fd, p, n);

		if (k <= 0)
			die("send");
		p += k;
		n -= (size_t)k;
	}
}

void get(const struct link *l, void *buf, size_t n)
{
	for (char *p = buf; n;) {
		ssize_t k = l->recv(l->fd, p, n);

		if (k <= 0) {
			errno = k ? errno : ECONNRESET;
			die("recv");
		}
		p += k;
		n -= (size_t)k;
	}
}

void *duplex_out(void *arg)
{
	struct duplex *d = arg;
	char *buf = pages(RECORD);
	uint64_t state = d->seed_out, at = 0;
	uint32_t n;

	do {
		n = seen(&page->stop) ? 0 : 1 + dice(&state) % RECORD;
		pattern(buf, n, d->seed_out, at);
		put(&d->link, &n, sizeof n);
		put(&d->link, buf, n);
		at += n;
		count(&d->out->bytes, n);
		count(&d->out->rounds, 1);
	} while (n);
	return NULL;
}

void *duplex_in(void *arg)
{
	struct duplex *d = arg;
	char *buf = pages(RECORD);
	uint64_t at = 0;
	uint32_t n;

	for (;;) {
		get(&d->link, &n, sizeof n);
		if (!n)
			return NULL;
		if (n > RECORD) {
			wrong(d->in, "a record of %u bytes at %lu", n, at);
			return NULL;
		}
		get(&d->link, buf, n);
		size_t bad = differs(buf, n, d->seed_in, at);

		if (bad < n)
			wrong(d->in, "byte %lu of the stream is wrong", at + bad);
		at += n;
		count(&d->in->bytes, n);
		count(&d->in->rounds, 1);
	}
}
