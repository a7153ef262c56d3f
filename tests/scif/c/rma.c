/* RMA and fences (SCIF-104..124). */
#include "t.h"

#define RW (SCIF_PROT_READ | SCIF_PROT_WRITE)

static char pattern(int i, int seed) { return (char)(i * 17 + (i >> 8) * 3 + seed); }

/* The peer exposes 8 pages as three adjacent windows at 0x10000 and waits for the end. */
static void expose8(int ep)
{
	char *p = pages(8), c;

	for (int i = 0; i < 8 * PG; i++)
		p[i] = pattern(i, 1);
	EQ(scif_register(ep, p, 2 * PG, 0x10000, RW, SCIF_MAP_FIXED), 0x10000);
	EQ(scif_register(ep, p + 2 * PG, PG, 0x12000, RW, SCIF_MAP_FIXED), 0x12000);
	EQ(scif_register(ep, p + 3 * PG, 5 * PG, 0x13000, RW, SCIF_MAP_FIXED), 0x13000);
	meet(ep);
	recv_all(ep, &c, 1);
	if (c == 'v') /* verify what was written: 0x11003 .. + 0x5005 */
		for (int i = 0; i < 0x5005; i++)
			EQ(p[0x1003 + i], pattern(i, 77));
	send_all(ep, &c, 1);
	FAILS(scif_recv(ep, &c, 1, SCIF_RECV_BLOCK), ECONNRESET);
}

TEST(scif_104_109_all_alignments_over_adjacent_windows)
{
	pid_t pid;
	int ep = with_peer(expose8, &pid);
	char *l = pages(8), *v = malloc(8 * PG);

	scif_register(ep, l, 3 * PG, 0x50000, RW, SCIF_MAP_FIXED);
	scif_register(ep, l + 3 * PG, 5 * PG, 0x53000, RW, SCIF_MAP_FIXED);
	meet(ep);
	static const int at[] = { 0, 1, 63, 64, 100, 4095, 4096, 8191, 8195 };
	static const int len[] = { 1, 7, 64, 65, 4096, 4097, 12000, 16384 };
	for (unsigned a = 0; a < 9; a++)
		for (unsigned b = 0; b < 9; b++)
			for (unsigned n = 0; n < 8; n++) {
				int k = len[n];

				memset(l, 0, 8 * PG);
				OK(scif_readfrom(ep, 0x50000 + at[a], (size_t)k, 0x10000 + at[b], SCIF_RMA_SYNC));
				for (int i = 0; i < k; i++)
					if (l[at[a] + i] != pattern(at[b] + i, 1))
						DIE("readfrom: byte %d of %d, %d <- %d", i, k, at[a], at[b]);
				CHECK(l[at[a] + k] == 0 && (at[a] == 0 || l[at[a] - 1] == 0));
				OK(scif_vreadfrom(ep, v + at[a], (size_t)k, 0x10000 + at[b], SCIF_RMA_USECPU));
				CHECK(!memcmp(v + at[a], l + at[a], (size_t)k));
			}
	for (int i = 0; i < 0x5005; i++)
		l[0x1d01 + i] = pattern(i, 77);
	OK(scif_writeto(ep, 0x51d01, 0x5005, 0x11003, SCIF_RMA_SYNC | SCIF_RMA_ORDERED));
	send_all(ep, "v", 1);
	char c;
	recv_all(ep, &c, 1);
	OK(scif_close(ep));
	reap(pid);
}

TEST(scif_105_107_113_errors)
{
	char *p = pages(2), buf[64], *big = pages(3);
	int e[2], fd = scif_open();

	FAILS(scif_readfrom(fd, 0, 1, 0, 0x100), ENOTCONN);
	pair(e);
	scif_register(e[0], p, PG, 0x10000, RW, SCIF_MAP_FIXED);
	scif_register(e[1], p + PG, PG, 0x20000, RW, SCIF_MAP_FIXED);
	for (off_t at = 0x40000; at < 0x43000; at += 2 * PG) { /* with a gap of a page */
		scif_register(e[0], p, PG, at, RW, SCIF_MAP_FIXED);
		scif_register(e[1], p + PG, PG, at, RW, SCIF_MAP_FIXED);
	}
	FAILS(scif_vreadfrom(e[1], big, 2 * PG, 0x40000, 0), ENXIO);
	FAILS(scif_vreadfrom(e[1], big, 3 * PG, 0x40000, 0), ENXIO);
	FAILS(scif_readfrom(e[1], 0x40000, 3 * PG, 0x10000, 0), ENXIO);
	OK(scif_readfrom(e[1], 0x20000, 64, 0x10000, 0));
	FAILS(scif_readfrom(e[1], 0x20000, 0, 0x10000, 0), EINVAL);
	FAILS(scif_vreadfrom(e[1], buf, 0, 0x10000, 0), EINVAL);
	FAILS(scif_readfrom(e[1], 0x30000, 64, 0x10000, 0), ENXIO);
	FAILS(scif_readfrom(e[1], 0x20000, 64, 0x30000, 0), ENXIO);
	FAILS(scif_readfrom(e[1], 0x20fff, 2, 0x10000, 0), ENXIO);
	FAILS(scif_readfrom(e[1], 0x20000, 2, 0x10fff, 0), ENXIO);
	FAILS(scif_readfrom(e[1], -5, 2, 0x10000, 0), ENXIO);
	FAILS(scif_vreadfrom(e[1], buf, 2, -1, 0), ENXIO);
	FAILS(scif_readfrom(e[1], 0x20000, (size_t)-1, 0x10000, 0), ENXIO);
	FAILS(scif_vwriteto(e[1], buf, 1, 0x10000, 0x100), EINVAL);
	OK(scif_vwriteto(e[1], buf, 1, 0x10000, 0x104));
	/* local errors win over remote ones */
	scif_register(e[1], p + PG, PG, 0x21000, SCIF_PROT_READ, SCIF_MAP_FIXED);
	FAILS(scif_readfrom(e[1], 0x21000, 1, 0x90000, 0), EPERM);
	FAILS(scif_vreadfrom(e[1], NULL, 8, 0x10000, 0), ENXIO); /* NULL means local offset 0 */
	scif_close(e[0]);
	EQ(poll1(e[1], SCIF_POLLIN, 5000), SCIF_POLLHUP);
	FAILS(scif_vreadfrom(e[1], buf, 1, 0x10000, 0x100), ECONNRESET);
	FAILS(scif_readfrom(e[1], 0x20000, 1, 0x10000, 0), ECONNRESET);
}

TEST(scif_108_110_v_calls_and_the_callers_memory)
{
	char *p = pages(2), *m = pages(2), *ro;
	int e[2];

	pair(e);
	memset(p, 'w', PG);
	scif_register(e[0], p, 2 * PG, 0x10000, RW, SCIF_MAP_FIXED);
	ro = mmap(NULL, PG, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	OK(scif_vwriteto(e[1], ro, 10, 0x10000, 0));
	FAILS(scif_vreadfrom(e[1], ro, 10, 0x10000, 0), EFAULT);
	for (int i = 0; i < 3; i++) {
		m[0] = (char)('0' + i);
		OK(scif_vwriteto(e[1], m, PG, 0x10000, SCIF_RMA_USECACHE));
		EQ(p[0], '0' + i);
		munmap(m, 2 * PG);
		CHECK(mmap(m, 2 * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == m);
	}
	munmap(m, 2 * PG);
	FAILS(scif_vreadfrom(e[1], m, 2 * PG, 0x10000, SCIF_RMA_USECACHE), EFAULT);
	for (int i = 0; i < 2; i++) { /* one that was fine, and is no more */
		m = pages(2);
		OK(scif_vwriteto(e[1], m, 2 * PG, 0x10000, 0));
		OK(scif_vreadfrom(e[1], m, 2 * PG, 0x10000, SCIF_RMA_USECACHE));
		munmap(m + PG, PG);
		FAILS(scif_vwriteto(e[1], m, 2 * PG, 0x10000, SCIF_RMA_USECACHE), EFAULT);
		FAILS(scif_vreadfrom(e[1], m + PG - 8, 16, 0x10000, 0), EFAULT);
		OK(scif_vreadfrom(e[1], m + PG - 8, 8, 0x10000, 0));
		munmap(m, PG);
	}
	FAILS(scif_vwriteto(e[1], (void *)16, 8, 0x10000, 0), EFAULT);
}

static void poll_last_line(int ep)
{
	char *p = pages(16);
	off_t off = scif_register(ep, p, 16 * PG, 0, RW, 0);

	send_all(ep, &off, sizeof off);
	for (char round = 1; round < 50; round++) {
		volatile char *last = p + 16 * PG - 1;

		while (__atomic_load_n(last, __ATOMIC_ACQUIRE) != round)
			sched_yield();
		for (int i = 0; i < 16 * PG; i++)
			EQ(p[i], round);
		send_all(ep, &round, 1);
	}
}

TEST(scif_112_ordered_writes_the_last_line_last)
{
	pid_t pid;
	off_t off;
	char *p = pages(16), c;
	int ep = with_peer(poll_last_line, &pid);

	recv_all(ep, &off, sizeof off);
	for (char round = 1; round < 50; round++) {
		memset(p, round, 16 * PG);
		OK(scif_vwriteto(ep, p, 16 * PG, off, SCIF_RMA_ORDERED));
		recv_all(ep, &c, 1);
		EQ(c, round);
	}
	reap(pid);
}

TEST(scif_115_116_118_marks_on_the_host_loopback)
{
	int e[2], mark = 0;

	FAILS(scif_fence_mark(scif_open(), 0, &mark), ENOTCONN);
	pair(e);
	FAILS(scif_fence_mark(e[0], 0, &mark), EINVAL);
	FAILS(scif_fence_mark(e[0], 3, &mark), EINVAL);
	for (int other = 4; other; other <<= 1) {
		FAILS(scif_fence_mark(e[0], other, &mark), EINVAL);
		FAILS(scif_fence_mark(e[0], other | SCIF_FENCE_INIT_SELF, &mark), EINVAL);
		FAILS(scif_fence_mark(e[0], other | SCIF_FENCE_INIT_PEER, &mark), EINVAL);
	}
	EQ(mark, 0);
	FAILS(scif_fence_mark(e[0], 1, NULL), EFAULT);
	OK(scif_fence_mark(e[0], SCIF_FENCE_INIT_SELF, &mark));
	EQ(mark, 0xdead);
	OK(scif_fence_mark(e[0], SCIF_FENCE_INIT_PEER, &mark));
	EQ(mark, 0xdead);
	OK(scif_fence_wait(e[0], mark));
	FAILS(scif_fence_wait(e[0], 5), EINVAL);
}

static void wait_end(int ep)
{
	char c;

	meet(ep);
	FAILS(scif_recv(ep, &c, 1, SCIF_RECV_BLOCK), ECONNRESET);
}

TEST(scif_117_118_marks_and_waits)
{
	pid_t pid;
	int ep = with_peer(wait_end, &pid), mark = 0;

	meet(ep);
	if (node_a() || node_b()) {
		OK(scif_fence_mark(ep, SCIF_FENCE_INIT_SELF, &mark));
		CHECK(mark > 0);
		OK(scif_fence_wait(ep, mark));
		OK(scif_fence_wait(ep, mark));
		OK(scif_fence_mark(ep, SCIF_FENCE_INIT_PEER, &mark));
		CHECK(mark < 0);
		OK(scif_fence_wait(ep, mark));
		OK(scif_fence_wait(ep, mark));
	}
	OK(scif_close(ep));
	reap(pid);
}

TEST(scif_120_121_122_signal_errors)
{
	char *p = pages(4);
	int e[2], S = SCIF_FENCE_INIT_SELF, P = SCIF_FENCE_INIT_PEER, L = SCIF_SIGNAL_LOCAL, R = SCIF_SIGNAL_REMOTE;

	FAILS(scif_fence_signal(scif_open(), 0, 1, 0, 1, S | L), ENOTCONN);
	pair(e);
	scif_register(e[0], p, PG, 0x10000, RW, SCIF_MAP_FIXED);
	scif_register(e[0], p + PG, PG, 0x11000, RW, SCIF_MAP_FIXED);
	scif_register(e[0], p, PG, 0x20000, SCIF_PROT_READ, SCIF_MAP_FIXED);
	scif_register(e[1], p + 2 * PG, PG, 0x30000, RW, SCIF_MAP_FIXED);
	scif_register(e[1], p + 3 * PG, PG, 0x40000, SCIF_PROT_READ, SCIF_MAP_FIXED);
	FAILS(scif_fence_signal(e[1], 0, 1, 0x10000, 1, S), EINVAL);
	FAILS(scif_fence_signal(e[1], 0x30000, 1, 0x10000, 1, R | L), EINVAL);
	FAILS(scif_fence_signal(e[1], 0, 1, 0x10000, 1, R), EINVAL);
	FAILS(scif_fence_signal(e[1], 0, 1, 0x10000, 1, S | P | R), EINVAL);
	for (int unknown = 4; unknown; unknown <<= unknown == 8 ? 3 : 1)
		FAILS(scif_fence_signal(e[1], 0, 1, 0x10000, 1, S | R | unknown), EINVAL);
	FAILS(scif_fence_signal(e[1], 0, 1, 0x10002, 1, S | R), EINVAL);
	for (int off = 1; off < 4; off++) {
		FAILS(scif_fence_signal(e[1], 0x30000 + off, 1, 0x10000, 1, S | L), EINVAL);
		FAILS(scif_fence_signal(e[1], 0x30000, 1, 0x10000 + off, 1, P | R | L), EINVAL);
	}
	OK(scif_fence_signal(e[1], 0x30001, 1, 0x10000, 1, S | R)); /* the other half is not looked at */
	OK(scif_fence_signal(e[1], 0, 0, 0x10ff8, 0x1122334455667788, S | R));
	EQ(*(uint64_t *)(p + 0xff8), 0x1122334455667788);
	OK(scif_fence_signal(e[1], 0, 0, 0x10014, 0xaabbccdd11223344, S | R));
	CHECK(!memcmp(p + 0x14, "\x44\x33\x22\x11\xdd\xcc\xbb\xaa", 8));
	OK(scif_fence_signal(e[1], 0, 0, 0x10024, 0x99aabbccddeeff00, P | L)); /* by the node */
	CHECK(!memcmp(p + 0x24, "\x00\xff\xee\xdd\xcc\xbb\xaa\x99", 8));
	FAILS(scif_fence_signal(e[1], 0, 1, 0x10ffc, 1, S | R), ENXIO);
	FAILS(scif_fence_signal(e[1], 0, 1, 0x50000, 1, S | R), ENXIO);
	FAILS(scif_fence_signal(e[1], 0, 1, 0x20000, 1, S | R), EPERM);
	FAILS(scif_fence_signal(e[1], 0x40000, 1, 0, 1, S | L), EPERM);
	FAILS(scif_fence_signal(e[1], 0x30ffc, 1, 0, 1, S | L), ENXIO);
	FAILS(scif_fence_signal(e[1], 0, 1, 0x20000, 1, P | L), ENXIO); /* as the peer sees it */
	FAILS(scif_fence_signal(e[1], 0, 1, 0x50000, 1, P | L), ENXIO);
	FAILS(scif_fence_signal(e[1], 0, 1, 0x10ffc, 1, P | L), ENXIO);
	FAILS(scif_fence_signal(e[1], 0x50000, 1, 0, 1, P | R), ENXIO);
	FAILS(scif_fence_signal(e[1], 0x40000, 1, 0, 1, P | R), ENXIO);
	EQ(p[3 * PG], 0);
}

static void expose_flags(int ep)
{
	uint64_t *p = (uint64_t *)pages(1);
	char c;

	EQ(scif_register(ep, p, PG, 0x10000, RW, SCIF_MAP_FIXED), 0x10000);
	meet(ep);
	uint64_t want[] = { 0x2222222222222222, 0x3333333333333333, 0, 7, 9 };
	for (int i = 0; i < 5; i++) {
		while (__atomic_load_n(&p[i], __ATOMIC_ACQUIRE) != want[i])
			sched_yield();
		send_all(ep, "s", 1);
	}
	EQ(p[2], 0); /* never meant for us */
	FAILS(scif_recv(ep, &c, 1, SCIF_RECV_BLOCK), ECONNRESET);
}

TEST(scif_123_placement_of_signals_follows_the_code)
{
	uint64_t *p = (uint64_t *)pages(1);
	pid_t pid;
	char c;
	int ep = with_peer(expose_flags, &pid);

	EQ(scif_register(ep, p, PG, 0x20000, RW, SCIF_MAP_FIXED), 0x20000);
	meet(ep);
	OK(scif_fence_signal(ep, 0x20000, 0x1111, 0, 0, SCIF_FENCE_INIT_SELF | SCIF_SIGNAL_LOCAL));
	EQ(p[0], 0x1111);
	OK(scif_fence_signal(ep, 0, 0, 0x10000, 0x2222222222222222, SCIF_FENCE_INIT_SELF | SCIF_SIGNAL_REMOTE));
	recv_all(ep, &c, 1);
	/* INIT_PEER: LOCAL is the peer's own window, REMOTE is ours */
	OK(scif_fence_signal(ep, 0x20008, 1, 0x10008, 0x3333333333333333, SCIF_FENCE_INIT_PEER | SCIF_SIGNAL_LOCAL));
	recv_all(ep, &c, 1);
	EQ(p[1], 0);
	OK(scif_fence_signal(ep, 0x20008, 0x4444, 0x10010, 5, SCIF_FENCE_INIT_PEER | SCIF_SIGNAL_REMOTE));
	EVENTUALLY(__atomic_load_n(&p[1], __ATOMIC_ACQUIRE) == 0x4444);
	recv_all(ep, &c, 1);
	OK(scif_fence_signal(ep, 0x20010, 6, 0x10018, 7,
			     SCIF_FENCE_INIT_PEER | SCIF_SIGNAL_REMOTE | SCIF_SIGNAL_LOCAL));
	EVENTUALLY(__atomic_load_n(&p[2], __ATOMIC_ACQUIRE) == 6);
	recv_all(ep, &c, 1); /* 7 is there */
	OK(scif_fence_signal(ep, 0x20018, 8, 0x10020, 9,
			     SCIF_FENCE_INIT_SELF | SCIF_SIGNAL_REMOTE | SCIF_SIGNAL_LOCAL));
	EQ(p[3], 8);
	recv_all(ep, &c, 1); /* and 9 */
	OK(scif_close(ep));
	reap(pid);
}

static void poll_signal(int ep)
{
	char *p = pages(9);
	off_t off = scif_register(ep, p, 9 * PG, 0, RW, 0);

	send_all(ep, &off, sizeof off);
	for (uint64_t round = 1; round < 100; round++) {
		while (__atomic_load_n((uint64_t *)(p + 8 * PG), __ATOMIC_ACQUIRE) != round)
			sched_yield();
		for (int i = 0; i < 8 * PG; i++)
			EQ((unsigned char)p[i], round);
		send_all(ep, "k", 1);
	}
}

TEST(scif_124_a_poller_of_the_signal_sees_all_earlier_data)
{
	pid_t pid;
	off_t off;
	char *p = pages(8), c;
	int ep = with_peer(poll_signal, &pid);

	recv_all(ep, &off, sizeof off);
	for (uint64_t round = 1; round < 100; round++) {
		memset(p, (int)round, 8 * PG);
		OK(scif_vwriteto(ep, p, 8 * PG, off, 0));
		OK(scif_fence_signal(ep, 0, 0, off + 8 * PG, round, SCIF_FENCE_INIT_SELF | SCIF_SIGNAL_REMOTE));
		recv_all(ep, &c, 1);
	}
	reap(pid);
}

static volatile int stop_copying;
static int copy_ep;
static void *copier(void *arg)
{
	char *buf = malloc(4 << 20);
	int ok = 0;

	(void)arg;
	while (!stop_copying)
		if (scif_vwriteto(copy_ep, buf, 4 << 20, 0x10000, 0) == 0)
			ok++;
		else
			CHECK(errno == ENXIO || errno == ECONNRESET);
	CHECK(ok > 0);
	return NULL;
}

TEST(scif_114_unregister_waits_for_copies_in_progress)
{
	int e[2];
	pthread_t t;

	pair(e);
	copy_ep = e[1];
	char *p = pages(1024);
	EQ(scif_register(e[0], p, 4 << 20, 0x10000, RW, SCIF_MAP_FIXED), 0x10000);
	pthread_create(&t, NULL, copier, NULL);
	for (int i = 0; i < 20; i++) {
		usleep(2000);
		OK(scif_unregister(e[0], 0x10000, 4 << 20));
		munmap(p, 4 << 20); /* the pages are free for the next one, whose bytes must stay */
		p = pages(1024);
		memset(p, 0x5a, 4 << 20);
		EQ(scif_register(e[0], p, 4 << 20, 0x5000000, RW, SCIF_MAP_FIXED), 0x5000000);
		usleep(3000);
		for (int k = 0; k < 4 << 20; k += 64)
			EQ(p[k], 0x5a);
		OK(scif_unregister(e[0], 0x5000000, 4 << 20));
		EQ(scif_register(e[0], p, 4 << 20, 0x10000, RW, SCIF_MAP_FIXED), 0x10000);
	}
	usleep(3000);
	stop_copying = 1;
	pthread_join(t, NULL);
}

TEST(scif_104_thousands_of_windows)
{
	enum { N = 3000 }; /* their list is beyond a packet */
	const off_t from = 0x4000000000000000;
	int e[2];
	char *p = pages(N), *q = malloc(N * PG);

	pair(e);
	for (int i = 0; i < N; i++) {
		memset(p + i * PG, i % 251, PG);
		EQ(scif_register(e[0], p + i * PG, PG, 0, SCIF_PROT_READ | SCIF_PROT_WRITE, 0), from + i * PG);
	}
	OK(scif_vreadfrom(e[1], q, PG, from + (N - 1) * PG, 0));
	EQ((unsigned char)*q, (N - 1) % 251);
	OK(scif_vreadfrom(e[1], q, N * PG, from, 0));
	char *m = scif_mmap(NULL, N * PG, SCIF_PROT_READ, 0, e[1], from);
	CHECK(m != SCIF_MMAP_FAILED);
	CHECK(!memcmp(p, q, N * PG) && !memcmp(p, m, N * PG));
	OK(scif_munmap(m, N * PG));
	OK(scif_unregister(e[0], from + PG, PG)); /* most mappings are kept */
	FAILS(scif_vreadfrom(e[1], q, N * PG, from, 0), ENXIO);
	OK(scif_vreadfrom(e[1], q, (N - 2) * PG, from + 2 * PG, 0));
	OK(scif_unregister(e[0], from + 2 * PG, (N - 2) * PG));
}
