/* A peer for the stress test: `server PORT` serves windows and echoes, `client NODE PORT SEED` verifies.
 * Killed at random. Ends with 3 when a byte is wrong; lost connections are normal. */
#include "t.h"

#define MB  (1 << 20)
#define WIN (576 * PG)

static void *serve(void *arg)
{
	int ep = (int)(intptr_t)arg, n;
	char *p = pages(WIN / PG), buf[3000];
	off_t off = scif_register(ep, p, WIN, 0, SCIF_PROT_READ | SCIF_PROT_WRITE, 0);

	if (off >= 0 && scif_send(ep, &off, sizeof off, SCIF_SEND_BLOCK) == sizeof off)
		while ((n = scif_recv(ep, buf, 1, SCIF_RECV_BLOCK)) == 1) {
			n = scif_recv(ep, buf + 1, sizeof buf - 1, 0);
			if (n < 0 || scif_send(ep, buf, n + 1, SCIF_SEND_BLOCK) != n + 1)
				break;
		}
	scif_close(ep);
	munmap(p, WIN);
	return NULL;
}

static void server_main(int port)
{
	int l = scif_open();
	uint64_t end = now_us() + 10000000;

	/* The last server was killed: the port is taken until its last connection has ended (SCIF-25). */
	while (scif_bind(l, (uint16_t)port) < 0) {
		CHECK(errno == EINVAL && now_us() < end);
		sched_yield();
	}
	CHECK(scif_listen(l, 64) == 0);
	for (;;) {
		struct scif_portID from;
		pthread_t t;
		int ep;

		if (scif_accept(l, &from, &ep, SCIF_ACCEPT_SYNC) < 0)
			continue;
		if (pthread_create(&t, NULL, serve, (void *)(intptr_t)ep))
			scif_close(ep);
		else
			pthread_detach(t);
	}
}

static void wrong(const char *what)
{
	fprintf(stderr, "wrong bytes: %s\n", what);
	_exit(3);
}

static bool echo_round(int ep, unsigned *seed)
{
	char out[2500], in[2500];
	int n = 1 + rand_r(seed) % 2500;

	for (int i = 0; i < n; i++)
		out[i] = (char)rand_r(seed);
	if (scif_send(ep, out, n, SCIF_SEND_BLOCK) != n || scif_recv(ep, in, n, SCIF_RECV_BLOCK) != n)
		return false;
	if (memcmp(in, out, (size_t)n))
		wrong("echo");
	return true;
}

static bool rma_round(int ep, off_t win, char *mine, off_t own, unsigned *seed)
{
	size_t n = 1 + (size_t)rand_r(seed) % 60000, at = (size_t)rand_r(seed) % (WIN - n), l = (size_t)rand_r(seed) % (WIN - n);
	static __thread char copy[WIN];

	for (size_t i = 0; i < n; i += 7)
		mine[l + i] = (char)rand_r(seed);
	memcpy(copy, mine + l, n);
	if (scif_writeto(ep, own + (off_t)l, n, win + (off_t)at, SCIF_RMA_SYNC) < 0)
		return false;
	memset(mine + l, 0, n);
	if (scif_vreadfrom(ep, mine + l, n, win + (off_t)at, 0) < 0)
		return false;
	if (memcmp(mine + l, copy, n))
		wrong("RMA");
	return true;
}

/* The same with a copy that a DMA channel makes, if one reaches the peer, and a fence. */
static bool large_round(int ep, off_t win, char *mine, off_t own, unsigned *seed)
{
	size_t n = 2 * MB + (size_t)rand_r(seed) % (WIN - 2 * MB - 128), at = (size_t)rand_r(seed) % (WIN - n), l = at % 64;
	char first = (char)rand_r(seed);
	int mark;

	for (size_t i = 0; i < n; i++)
		mine[l + i] = (char)((char)i + first);
	if (scif_writeto(ep, own + (off_t)l, n, win + (off_t)at, rand_r(seed) % 2 ? SCIF_RMA_ORDERED : 0) < 0 ||
	    scif_fence_mark(ep, SCIF_FENCE_INIT_SELF, &mark) < 0 || scif_fence_wait(ep, mark) < 0)
		return false;
	memset(mine + l, 0, n);
	if (scif_readfrom(ep, own + (off_t)l, n, win + (off_t)at, 0) < 0 ||
	    scif_fence_mark(ep, SCIF_FENCE_INIT_SELF, &mark) < 0 || scif_fence_wait(ep, mark) < 0)
		return false;
	for (size_t i = 0; i < n; i++)
		if (mine[l + i] != (char)((char)i + first))
			wrong("large RMA");
	return true;
}

static void client_main(int node, int port, unsigned seed)
{
	struct scif_portID to = { (uint16_t)node, (uint16_t)port };

	for (;;) {
		int ep = scif_open();
		off_t win, own;

		if (ep < 0 || scif_connect(ep, &to) < 0) {
			if (ep >= 0)
				scif_close(ep);
			usleep(2000);
			continue;
		}
		char *mine = pages(WIN / PG);
		own = scif_register(ep, mine, WIN, 0, SCIF_PROT_READ | SCIF_PROT_WRITE, 0);
		bool ok = own >= 0 && scif_recv(ep, &win, sizeof win, SCIF_RECV_BLOCK) == sizeof win;

		for (int i = 0; ok && i < 50; i++)
			ok = echo_round(ep, &seed) && rma_round(ep, win, mine, own, &seed) &&
			     (i % 8 || large_round(ep, win, mine, own, &seed));
		if (ok && rand_r(&seed) % 2)
			scif_unregister(ep, own, WIN);
		scif_close(ep);
		munmap(mine, WIN);
	}
}

TEST(stress_program)
{
	const char *role = getenv("STRESS");

	if (!role)
		return;
	alarm(0);
	int a = 0, b = 0, c = 0;
	if (sscanf(role, "server %d", &a) == 1)
		server_main(a);
	else if (sscanf(role, "client %d %d %d", &a, &b, &c) == 3)
		client_main(a, b, (unsigned)c);
}
