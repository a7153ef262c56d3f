/* A peer for the stress test, killed at random. It listens, and connects to the processes after it; every
 * connection has a thread at each end, which sends, registers, reads, writes, maps and fences, and verifies
 * every byte. STRESS: "ME PROCESSES CONNECTIONS SEED COUNTERS"; process i is on node i % 3 and listens on
 * port 7000 + i; COUNTERS is a file with a uint64 per connecting thread of all processes, its rounds so far.
 *
 * Ends with 3 when a byte is wrong, with 4 when a call fails other than because the peer died. */
#include "t.h"

#define DATA   (15 * PG)
#define WIN    (DATA + PG) /* the last page holds the fences' flag */
#define LARGE  (576 * PG) /* enough for a DMA channel; a large window has no flag */
#define RW     (SCIF_PROT_READ | SCIF_PROT_WRITE)
#define ROUNDS 60

struct client {
	struct scif_portID to;
	unsigned seed;
	uint64_t *rounds;
	/* While connected: */
	int ep;
	char *mine; /* our window */
	off_t own, win; /* its offset, that of the peer's */
	size_t size; /* of the peer's */
	char *held; /* a mapping that outlives the connection */
	char copy[DATA];
};

static unsigned draw(struct client *c, unsigned below) { return (unsigned)rand_r(&c->seed) % below; }

static void wrong(const char *what)
{
	fprintf(stderr, "wrong bytes: %s\n", what);
	_exit(3);
}

static void same(const char *got, const char *want, size_t n, const char *what)
{
	for (size_t i = 0; i < n; i++) {
		if (got[i] == want[i])
			continue;
		fprintf(stderr, "%s: byte %zu of %zu at %p:", what, i, n, (const void *)got);
		for (size_t k = i; k < n && k < i + 64; k++)
			fprintf(stderr, " %02x/%02x", (unsigned char)got[k], (unsigned char)want[k]);
		fputc('\n', stderr);
		wrong(what);
	}
}

/* A call has failed: the peer died, nothing else happens here. */
static bool lost(const char *what)
{
	if (errno != ECONNRESET && errno != ENOTCONN && errno != ENXIO) {
		fprintf(stderr, "%s: %s\n", what, strerror(errno));
		_exit(4);
	}
	return false;
}

/* What the accepting end says first. */
struct offer {
	off_t off;
	size_t size;
};

static void *serve(void *arg)
{
	int ep = (int)(intptr_t)arg, n, rounds = 0;
	size_t size = now_us() % 8 ? WIN : LARGE;
	char *p = pages((int)(size / PG)), buf[3000];
	struct offer offer = { scif_register(ep, p, size, 0, RW, 0), size };

	if (offer.off < 0)
		lost("register (accepted)");
	else if (scif_send(ep, &offer, sizeof offer, SCIF_SEND_BLOCK) == sizeof offer)
		for (;;) {
			struct scif_pollepd e = { ep, SCIF_POLLIN, 0 };

			if (rounds++ % 2 && scif_poll(&e, 1, -1) < 0)
				break;
			if (scif_recv(ep, buf, 1, SCIF_RECV_BLOCK) != 1)
				break;
			n = scif_recv(ep, buf + 1, sizeof buf - 1, 0);
			if (n < 0 || scif_send(ep, buf, n + 1, SCIF_SEND_BLOCK) != n + 1)
				break;
		}
	scif_close(ep);
	munmap(p, size);
	return NULL;
}

static void serve_all(int port)
{
	int l = listener_on(port, 64);

	for (;;) {
		struct scif_portID from;
		pthread_t t;
		int ep;

		if (scif_accept(l, &from, &ep, SCIF_ACCEPT_SYNC) < 0)
			continue; /* that connector is dead */
		CHECK(pthread_create(&t, NULL, serve, (void *)(intptr_t)ep) == 0);
		pthread_detach(t);
	}
}

static void fill(struct client *c, char *p, size_t n)
{
	uint64_t x = (uint64_t)draw(c, 1u << 30) << 30 | draw(c, 1u << 30) | 1;

	for (size_t i = 0; i < n; i++, x = x * 6364136223846793005u + 1442695040888963407u)
		p[i] = (char)(x >> 56);
}

static bool echo_round(struct client *c)
{
	char out[2500], in[2500];
	int n = 1 + (int)draw(c, sizeof out);
	struct scif_pollepd e = { c->ep, SCIF_POLLIN, 0 };

	fill(c, out, (size_t)n);
	if (scif_send(c->ep, out, n, SCIF_SEND_BLOCK) != n)
		return lost("send");
	if (draw(c, 2) && scif_poll(&e, 1, -1) < 0)
		return lost("poll");
	errno = ECONNRESET; /* the end of the connection may leave part of the answer */
	if (scif_recv(c->ep, in, n, SCIF_RECV_BLOCK) != n)
		return lost("recv");
	same(in, out, (size_t)n, "echo");
	return true;
}

/* All writes so far are done. */
static bool fence(struct client *c)
{
	uint64_t value = (uint64_t)draw(c, 1u << 30), got = 0;
	volatile uint64_t *flag = (uint64_t *)(c->mine + DATA);
	int mark;

	if (draw(c, 2)) {
		if (scif_fence_mark(c->ep, SCIF_FENCE_INIT_SELF, &mark) < 0)
			return lost("fence_mark");
		return scif_fence_wait(c->ep, mark) == 0 || lost("fence_wait");
	}
	if (scif_fence_signal(c->ep, c->own + DATA, value, c->win + DATA, ~value,
			      SCIF_FENCE_INIT_SELF | SCIF_SIGNAL_LOCAL | SCIF_SIGNAL_REMOTE) < 0)
		return lost("fence_signal");
	if (*flag != value)
		wrong("local flag");
	if (scif_vreadfrom(c->ep, &got, sizeof got, c->win + DATA, 0) < 0)
		return lost("flag");
	if (got != ~value)
		wrong("remote flag");
	return true;
}

static bool rma_round(struct client *c)
{
	size_t n = 1 + draw(c, DATA - 1), at = draw(c, DATA - (unsigned)n + 1), l = draw(c, DATA - (unsigned)n + 1);
	int flags = (draw(c, 2) ? SCIF_RMA_USECPU : 0) | (draw(c, 2) ? SCIF_RMA_ORDERED : 0);
	bool sync = draw(c, 2), v = draw(c, 2);
	char *p = c->mine + l;

	fill(c, p, n);
	memcpy(c->copy, p, n);
	if (sync)
		flags |= SCIF_RMA_SYNC;
	if ((v ? scif_vwriteto(c->ep, p, n, c->win + (off_t)at, flags)
	       : scif_writeto(c->ep, c->own + (off_t)l, n, c->win + (off_t)at, flags)) < 0)
		return lost("write");
	if (!sync && !fence(c))
		return false;
	memset(p, 0, n);
	flags = SCIF_RMA_SYNC;
	if ((draw(c, 2) ? scif_vreadfrom(c->ep, p, n, c->win + (off_t)at, flags)
			: scif_readfrom(c->ep, c->own + (off_t)l, n, c->win + (off_t)at, flags)) < 0)
		return lost("read");
	same(p, c->copy, n, "RMA");
	return true;
}

/* Stores into a mapping of the peer's window are what a copy reads, and the other way round. */
static bool map_round(struct client *c)
{
	unsigned first = draw(c, DATA / PG), count = 1 + draw(c, DATA / PG - first);
	size_t n = (size_t)count * PG;
	off_t at = c->win + (off_t)first * PG;
	char *m = scif_mmap(NULL, n, RW, 0, c->ep, at);
	bool ok;

	if (m == SCIF_MMAP_FAILED)
		return lost("mmap");
	fill(c, m, n);
	memcpy(c->copy, m, n);
	ok = scif_vreadfrom(c->ep, c->mine, n, at, SCIF_RMA_SYNC) == 0 || lost("read what was mapped");
	if (ok)
		same(c->mine, c->copy, n, "a store into a mapping");
	fill(c, c->copy, n);
	ok = ok && (scif_vwriteto(c->ep, c->copy, n, at, SCIF_RMA_SYNC) == 0 || lost("write what is mapped"));
	if (ok)
		same(m, c->copy, n, "a mapping");
	if (!c->held && draw(c, 8) == 0) {
		c->held = m; /* its first page stays until after the close */
		CHECK(n == PG || scif_munmap(m + PG, n - PG) == 0);
	} else if (scif_munmap(m, n) < 0) {
		return lost("munmap");
	}
	return ok;
}

/* A window that comes and goes. */
static bool register_round(struct client *c)
{
	size_t n = (1 + draw(c, 4)) * PG, at = draw(c, DATA - (unsigned)n);
	char *p = pages(4);
	off_t off;
	bool ok;

	fill(c, p, n);
	memcpy(c->copy, p, n);
	off = scif_register(c->ep, p, n, 0, RW, 0);
	ok = off >= 0 || lost("register");
	ok = ok && (scif_writeto(c->ep, off, n, c->win + (off_t)at, SCIF_RMA_SYNC) == 0 || lost("write from it"));
	if (ok)
		memset(p, 0, n);
	ok = ok && (scif_readfrom(c->ep, off, n, c->win + (off_t)at, SCIF_RMA_SYNC) == 0 || lost("read into it"));
	if (ok)
		same(p, c->copy, n, "a window of its own");
	if (off >= 0 && draw(c, 4))
		ok = (scif_unregister(c->ep, off, n) == 0 || lost("unregister")) && ok;
	munmap(p, 4 * PG);
	return ok;
}

/* Copies that a DMA channel makes, if one reaches the peer; the fence waits for them. */
static bool large_round(struct client *c)
{
	size_t n = LARGE - 2 * PG - draw(c, PG), at = draw(c, PG), l = at % 64;
	char *p = pages(LARGE / PG), first = (char)draw(c, 256);
	off_t off = scif_register(c->ep, p, LARGE, 0, RW, 0);
	int mark;
	bool ok = off >= 0 || lost("register (large)");

	for (size_t i = 0; i < n; i++)
		p[l + i] = (char)((char)i + first);
	ok = ok && (scif_writeto(c->ep, off + (off_t)l, n, c->win + (off_t)at, draw(c, 2) ? SCIF_RMA_ORDERED : 0) == 0 ||
		    lost("write (large)"));
	ok = ok && (scif_fence_mark(c->ep, SCIF_FENCE_INIT_SELF, &mark) == 0 || lost("mark (large)"));
	ok = ok && (scif_fence_wait(c->ep, mark) == 0 || lost("wait (large)"));
	if (ok)
		memset(p, 0, LARGE);
	ok = ok && (scif_readfrom(c->ep, off + (off_t)l, n, c->win + (off_t)at, 0) == 0 || lost("read (large)"));
	ok = ok && (scif_fence_mark(c->ep, SCIF_FENCE_INIT_SELF, &mark) == 0 || lost("mark (large read)"));
	ok = ok && (scif_fence_wait(c->ep, mark) == 0 || lost("wait (large read)"));
	for (size_t i = 0; ok && i < n; i++)
		if (p[l + i] != (char)((char)i + first))
			wrong("large RMA");
	if (ok)
		ok = scif_unregister(c->ep, off, LARGE) == 0 || lost("unregister (large)");
	munmap(p, LARGE);
	return ok;
}

static void connected(struct client *c)
{
	bool (*const all[])(struct client *) = { echo_round, rma_round, map_round, register_round };
	struct offer offer;
	bool ok;

	c->mine = pages(16);
	c->own = scif_register(c->ep, c->mine, WIN, 0, RW, 0);
	ok = c->own >= 0 || lost("register (connected)");
	ok = ok && scif_recv(c->ep, &offer, sizeof offer, SCIF_RECV_BLOCK) == sizeof offer;
	if (ok)
		c->win = offer.off, c->size = offer.size;
	for (int i = 0; ok && i < ROUNDS; i++) {
		ok = c->size == LARGE && i % 8 == 0 ? large_round(c) : all[draw(c, 4)](c);
		if (ok)
			__atomic_fetch_add(c->rounds, 1, __ATOMIC_RELAXED);
	}
	if (ok && draw(c, 2))
		CHECK(scif_unregister(c->ep, c->own, WIN) == 0 || !lost("unregister"));
}

static void *client_main(void *arg)
{
	struct client *c = arg;

	for (;;) {
		CHECK((c->ep = scif_open()) >= 0);
		if (scif_connect(c->ep, &c->to) >= 0) {
			connected(c);
		} else {
			CHECK(errno == ECONNREFUSED);
			usleep(2000);
		}
		CHECK(scif_close(c->ep) == 0);
		if (c->held)
			CHECK(scif_munmap(c->held, PG) == 0);
		if (c->mine)
			munmap(c->mine, WIN);
		c->held = c->mine = NULL;
	}
}

TEST(stress_program)
{
	const char *role = getenv("STRESS");
	int me, processes, connections, fd, at = 0;
	unsigned seed;
	pthread_t t;

	if (!role)
		return;
	alarm(0);
	CHECK(sscanf(role, "%d %d %d %u %n", &me, &processes, &connections, &seed, &at) == 4 && at);
	on_node(me % 3);
	CHECK((fd = open(role + at, O_RDWR)) >= 0);
	size_t total = (size_t)(processes * connections);
	uint64_t *counters = mmap(NULL, total * sizeof *counters, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	CHECK(counters != MAP_FAILED);
	for (int k = 0; k < connections; k++) {
		int other = (me + 1 + k) % processes;
		struct client *c = calloc(1, sizeof *c);

		CHECK(c);
		c->to = (struct scif_portID){ (uint16_t)(other % 3), (uint16_t)(7000 + other) };
		c->seed = seed + (unsigned)k;
		c->rounds = &counters[me * connections + k];
		CHECK(pthread_create(&t, NULL, client_main, c) == 0);
	}
	serve_all(7000 + me);
}
