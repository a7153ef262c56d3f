/* Windows: register, unregister, what they hold (SCIF-78..92). In tests with a peer, the peer uses them. */
#include "t.h"

#define FIRST ((off_t)0x4000000000000000)
#define RW (SCIF_PROT_READ | SCIF_PROT_WRITE)

static char *filled(int n, char seed)
{
	char *p = pages(n);

	for (int i = 0; i < n * PG; i++)
		p[i] = (char)(i * 31 + (i >> 12) + seed);
	return p;
}

TEST(scif_78_79_80_register_argument_errors_come_first)
{
	int e[2], fd = scif_open();
	char *p = pages(4);

	FAILS(scif_register(fd, p + 1, PG, 0, RW, 0), EINVAL);
	FAILS(scif_register(fd, p, PG, 0, RW, 0), ENOTCONN);
	pair(e);
	for (int i = 0; i < 2; i++) {
		FAILS(scif_register(e[0], p + 8, PG, 0, RW, 0), EINVAL);
		FAILS(scif_register(e[0], p, 100, 0, RW, 0), EINVAL);
		FAILS(scif_register(e[0], p, 0, 0, RW, 0), EINVAL);
		FAILS(scif_register(e[0], p, PG, 0, 4, 0), EINVAL);
		FAILS(scif_register(e[0], p, PG, 0, RW, 1), EINVAL);
		FAILS(scif_register(e[0], p, PG, 0, RW, SCIF_MAP_KERNEL), EINVAL);
		FAILS(scif_register(e[0], p, PG, 100, RW, SCIF_MAP_FIXED), EINVAL);
		FAILS(scif_register(e[0], p, PG, -PG, RW, SCIF_MAP_FIXED), EINVAL);
		FAILS(scif_register(e[0], p, 2 * PG, 0x7ffffffffffff000, RW, SCIF_MAP_FIXED), EINVAL);
		if (i == 0) {
			scif_close(e[1]);
			EQ(poll1(e[0], SCIF_POLLIN, 5000), SCIF_POLLHUP);
		}
	}
	FAILS(scif_register(e[0], p, PG, 0, RW, 0), ECONNRESET);
}

TEST(scif_81_82_offsets)
{
	char *p = filled(8, 0);
	int e[2];

	pair(e);
	EQ(scif_register(e[0], p, PG, 0, RW, SCIF_MAP_FIXED), 0);
	FAILS(scif_register(e[0], p, PG, 0, RW, SCIF_MAP_FIXED), EADDRINUSE);
	EQ(scif_register(e[0], p, 2 * PG, 0x10000, RW, SCIF_MAP_FIXED), 0x10000);
	FAILS(scif_register(e[0], p, 2 * PG, 0x11000, RW, SCIF_MAP_FIXED), EADDRINUSE);
	FAILS(scif_register(e[0], p, 2 * PG, 0xf000, RW, SCIF_MAP_FIXED), EADDRINUSE);
	EQ(scif_register(e[0], p, PG, 0x12000, RW, SCIF_MAP_FIXED), 0x12000); /* just above it */
	EQ(scif_register(e[0], p, PG, 0xf000, RW, SCIF_MAP_FIXED), 0xf000); /* and below */
	EQ(scif_register(e[0], p, 3 * PG, 0x77000, RW, 0), FIRST);
	EQ(scif_register(e[0], p, PG, 0x77001, RW, 0), FIRST + 3 * PG);
	OK(scif_unregister(e[0], FIRST, 3 * PG));
	EQ(scif_register(e[0], p, 2 * PG, 0, RW, 0), FIRST);
	EQ(scif_register(e[0], p, 2 * PG, 0, RW, 0), FIRST + 4 * PG);
	EQ(scif_register(e[0], p, PG, 0, RW, 0), FIRST + 2 * PG); /* it fits exactly */
	EQ(scif_register(e[1], p, PG, 0, RW, 0), FIRST);
	EQ(scif_register(e[0], p, PG, 0x7fffffffffffe000, RW, SCIF_MAP_FIXED), 0x7fffffffffffe000);
}

TEST(scif_83_memory_that_cannot_be_pinned)
{
	char *p = pages(4);
	int e[2], f = open("/proc/self/exe", O_RDONLY);

	pair(e);
	p[0] = 5;
	munmap(p + 2 * PG, PG);
	FAILS(scif_register(e[0], p, 4 * PG, 0, RW, 0), EFAULT);
	FAILS(scif_register(e[0], p + 2 * PG, PG, 0, SCIF_PROT_READ, 0), EFAULT);
	EQ(p[0], 5);
	p[0] = 6;
	mprotect(p, PG, PROT_READ);
	FAILS(scif_register(e[0], p, PG, 0, SCIF_PROT_WRITE, 0), EFAULT);
	FAILS(scif_register(e[0], p, PG, 0, RW, 0), EFAULT);
	FAILS(scif_register(e[0], p, PG, 0, 0, 0), EFAULT);
	EQ(scif_register(e[0], p, PG, 0, SCIF_PROT_READ, 0), FIRST);
	EQ(p[0], 6);
	char *ro = mmap(NULL, PG, PROT_READ, MAP_PRIVATE, f, 0);
	EQ(scif_register(e[0], ro, PG, 0, SCIF_PROT_READ, 0), FIRST + PG);
	char got[4];
	OK(scif_vreadfrom(e[1], got, 4, FIRST + PG, 0));
	CHECK(!memcmp(got, "\177ELF", 4));
	/* docs/deviations.md: shared mappings cannot be moved into node memory */
	char *shared = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	FAILS(scif_register(e[0], shared, PG, 0, RW, 0), EFAULT);
}

/* Peer: read the window of the other side as soon as it is told of it, then write there. */
static void read_write_peer(int ep)
{
	char *in = malloc(3 * PG);
	off_t off;

	recv_all(ep, &off, sizeof off);
	OK(scif_vreadfrom(ep, in, 3 * PG, off, SCIF_RMA_SYNC));
	for (int i = 0; i < 3 * PG; i++)
		EQ(in[i], (char)(i * 31 + (i >> 12) + 9));
	meet(ep);
	OK(scif_vreadfrom(ep, in, 5, off + 100, SCIF_RMA_SYNC));
	CHECK(!memcmp(in, "owner", 5));
	OK(scif_vwriteto(ep, "peer!", 5, off + 5000, SCIF_RMA_SYNC));
	meet(ep);
	meet(ep); /* the owner has freed the memory */
	OK(scif_vreadfrom(ep, in, 5, off + 5000, SCIF_RMA_SYNC));
	CHECK(!memcmp(in, "peer!", 5));
	meet(ep);
	FAILS(scif_recv(ep, in, 1, SCIF_RECV_BLOCK), ECONNRESET);
}

TEST(scif_84_86_87_109_111_window_is_live_and_survives_munmap)
{
	char *p = filled(3, 9);
	pid_t pid;
	int ep = with_peer(read_write_peer, &pid);
	off_t off = scif_register(ep, p, 3 * PG, 0, RW, 0);

	EQ(off, FIRST);
	for (int i = 0; i < 3 * PG; i++)
		EQ(p[i], (char)(i * 31 + (i >> 12) + 9));
	send_all(ep, &off, sizeof off);
	char c = 'm';
	recv_all(ep, &c, 1);
	memcpy(p + 100, "owner", 5);
	send_all(ep, &c, 1);
	recv_all(ep, &c, 1); /* the peer has read it and written */
	CHECK(!memcmp(p + 5000, "peer!", 5));
	send_all(ep, &c, 1);
	munmap(p, 3 * PG);
	meet(ep);
	meet(ep);
	OK(scif_unregister(ep, off, 3 * PG));
	OK(scif_close(ep));
	reap(pid);
}

TEST(scif_85_the_same_memory_in_several_windows)
{
	char *p = filled(4, 1), c;
	int e[2], f[2];

	pair(e);
	pair(f);
	off_t a = scif_register(e[0], p, 2 * PG, 0, RW, 0), b = scif_register(e[0], p + PG, 3 * PG, 0, RW, 0);
	off_t d = scif_register(f[0], p, 4 * PG, 0, RW, 0);

	OK(scif_vwriteto(e[1], "Z", 1, a + PG + 7, 0));
	EQ(p[PG + 7], 'Z');
	OK(scif_vreadfrom(e[1], &c, 1, b + 7, 0));
	EQ(c, 'Z');
	OK(scif_vreadfrom(f[1], &c, 1, d + PG + 7, 0));
	EQ(c, 'Z');
	p[3 * PG] = 'Y';
	OK(scif_vreadfrom(f[1], &c, 1, d + 3 * PG, 0));
	EQ(c, 'Y');
}

TEST(scif_85_pages_of_the_heap_with_freed_blocks) /* leak and access checkers run this one, too */
{
	int e[2];
	pid_t pid;

	pair(e);
	char *v[600], *whole = aligned_alloc(PG, 2 * PG);
	for (int i = 0; i < 600; i++)
		v[i] = malloc(40);
	for (int i = 0; i < 600; i += 2)
		free(v[i]);
	char *page = (char *)(((uintptr_t)v[301] + PG - 1) & ~(uintptr_t)(PG - 1));
	CHECK(scif_register(e[0], page, PG, 0, RW, 0) == FIRST);
	memset(whole, 'w', 2 * PG);
	CHECK(scif_register(e[0], whole, 2 * PG, 0, RW, 0) == FIRST + PG);
	free(whole);
	pid = fork(); /* the child gets copies */
	if (pid == 0)
		_exit(0);
	reap(pid);
	for (int i = 1; i < 600; i += 2)
		free(v[i]);
	scif_close(e[0]);
	scif_close(e[1]);
}

TEST(scif_85_neighbours_of_a_small_allocation_stay_intact)
{
	int e[2];

	pair(e);
	char *v[100];
	for (int i = 0; i < 100; i++) {
		v[i] = malloc(64);
		memset(v[i], i, 64);
	}
	char *page = (char *)((uintptr_t)v[50] & ~(uintptr_t)(PG - 1));
	off_t off = scif_register(e[0], page, PG, 0, RW, 0);
	CHECK(off == FIRST);
	OK(scif_vwriteto(e[1], "hello", 5, off + (v[50] - page), 0));
	CHECK(!memcmp(v[50], "hello", 5));
	for (int i = 0; i < 100; i++)
		EQ(v[i][40], i);
	for (int i = 0; i < 100; i++)
		free(v[i]); /* before the unregister */
	for (int i = 0; i < 1000; i++)
		free(malloc((size_t)i * 10));
	OK(scif_unregister(e[0], off, PG));
}

TEST(scif_83_heap_static_and_stack_memory_can_be_registered)
{
	static char fixed[3 * PG];
	char local[3 * PG], *heap = malloc(3 * PG), c;
	char *m[] = { fixed, local, heap };
	int e[2];

	pair(e);
	for (int i = 0; i < 3; i++) {
		char *p = (char *)(((uintptr_t)m[i] + PG - 1) & ~(uintptr_t)(PG - 1));

		memset(m[i], 'a' + i, 3 * PG);
		off_t off = scif_register(e[0], p, PG, 0, RW, 0);
		CHECK(off >= FIRST);
		OK(scif_vreadfrom(e[1], &c, 1, off + 9, 0));
		EQ(c, 'a' + i);
		OK(scif_vwriteto(e[1], "!", 1, off + 10, 0));
		EQ(p[10], '!');
	}
}

TEST(scif_88_89_90_unregister)
{
	char *p = pages(8), c;
	int e[2];

	pair(e);
	for (int i = 0; i < 4; i++)
		EQ(scif_register(e[0], p, 2 * PG, 0x10000 + i * 2 * PG, RW, SCIF_MAP_FIXED), 0x10000 + i * 2 * PG);
	EQ(scif_register(e[0], p, PG, 0x20000, RW, SCIF_MAP_FIXED), 0x20000);
	FAILS(scif_unregister(e[0], 0x10000, 0), EINVAL);
	FAILS(scif_unregister(e[0], 0x10000, 100), EINVAL);
	FAILS(scif_unregister(e[0], 0x10001, PG), EINVAL);
	FAILS(scif_unregister(e[0], -PG, PG), EINVAL);
	FAILS(scif_unregister(e[0], 0x7ffffffffffff000, 2 * PG), EINVAL);
	FAILS(scif_unregister(e[0], 0x10000, (size_t)-PG), EINVAL);
	FAILS(scif_unregister(e[0], 0x50000, PG), ENXIO);
	FAILS(scif_unregister(e[0], 0x10000, 0x11000), ENXIO);
	FAILS(scif_unregister(e[0], 0x10000, 3 * PG), ENXIO);
	FAILS(scif_unregister(e[0], 0x11000, PG), EINVAL);
	FAILS(scif_unregister(e[0], 0x11000, 3 * PG), EINVAL);
	for (int i = 0; i < 8; i++)
		OK(scif_vreadfrom(e[1], &c, 1, 0x10000 + i * PG, 0));
	OK(scif_unregister(e[0], 0x12000, 4 * PG));
	OK(scif_vreadfrom(e[1], &c, 1, 0x10000, 0));
	FAILS(scif_vreadfrom(e[1], &c, 1, 0x12000, 0), ENXIO);
	FAILS(scif_vreadfrom(e[1], &c, 1, 0x15fff, 0), ENXIO);
	OK(scif_vreadfrom(e[1], &c, 1, 0x16000, 0));
	EQ(scif_register(e[0], p, 4 * PG, 0x12000, RW, SCIF_MAP_FIXED), 0x12000);
	OK(scif_vreadfrom(e[1], &c, 1, 0x15fff, 0));
	FAILS(scif_unregister(scif_open(), 0x10000, PG), ENOTCONN);
}

TEST(scif_92_106_protections_of_windows)
{
	char *p = pages(4), buf[8] = "";
	int e[2];

	pair(e);
	off_t none = scif_register(e[0], p, PG, 0, 0, 0), r = scif_register(e[0], p, PG, 0, SCIF_PROT_READ, 0);
	off_t w = scif_register(e[0], p, PG, 0, SCIF_PROT_WRITE, 0);
	off_t l = scif_register(e[1], p + PG, PG, 0, RW, 0), lr = scif_register(e[1], p + PG, PG, 0, SCIF_PROT_READ, 0);
	off_t lw = scif_register(e[1], p + PG, PG, 0, SCIF_PROT_WRITE, 0);

	FAILS(scif_vreadfrom(e[1], buf, 8, none, 0), EPERM);
	FAILS(scif_vwriteto(e[1], buf, 8, none, 0), EPERM);
	FAILS(scif_readfrom(e[1], l, 8, none, 0), EPERM);
	FAILS(scif_writeto(e[1], l, 8, none, 0), EPERM);
	FAILS(scif_fence_signal(e[1], 0, 0, none, 1, SCIF_FENCE_INIT_SELF | SCIF_SIGNAL_REMOTE), EPERM);
	for (int prot = 1; prot < 4; prot++) {
		errno = 0;
		CHECK(scif_mmap(NULL, PG, prot, 0, e[1], none) == SCIF_MMAP_FAILED);
		EQ(errno, EPERM);
	}
	FAILS(scif_vwriteto(e[1], buf, 8, r, 0), EPERM);
	FAILS(scif_vreadfrom(e[1], buf, 8, w, 0), EPERM);
	OK(scif_vreadfrom(e[1], buf, 8, r, 0));
	OK(scif_vwriteto(e[1], buf, 8, w, 0));
	OK(scif_readfrom(e[1], l, 8, r, 0));
	OK(scif_writeto(e[1], l, 8, w, 0));
	FAILS(scif_readfrom(e[1], lr, 8, r, 0), EPERM);
	FAILS(scif_writeto(e[1], lw, 8, w, 0), EPERM);
	OK(scif_readfrom(e[1], lw, 8, r, 0));
	OK(scif_writeto(e[1], lr, 8, w, 0));
	/* a first window that allows it and a second that does not */
	EQ(scif_register(e[0], p, PG, 0x10000, RW, SCIF_MAP_FIXED), 0x10000);
	EQ(scif_register(e[0], p, PG, 0x11000, SCIF_PROT_READ, SCIF_MAP_FIXED), 0x11000);
	FAILS(scif_vwriteto(e[1], p + 2 * PG, 2 * PG, 0x10000, 0), EPERM);
	FAILS(scif_vwriteto(e[1], p + 2 * PG, PG + 1, 0x11000, 0), EPERM);
	FAILS(scif_vreadfrom(e[1], p + 2 * PG, 2 * PG, 0x11000, 0), ENXIO);
}

TEST(scif_16_fork_after_register_leaves_each_its_own_copy)
{
	char *p = filled(3, 3), c;
	int e[2];

	pair(e);
	off_t off = scif_register(e[0], p, 3 * PG, 0, RW, 0);
	strcpy(p, "before");
	int pp[2];
	CHECK(pipe(pp) == 0);
	pid_t pid = fork();
	if (pid == 0) {
		CHECK(read(pp[0], &c, 1) == 1);
		CHECK(!strcmp(p, "before"));
		strcpy(p, "child");
		_exit(0);
	}
	strcpy(p, "parent");
	CHECK(write(pp[1], "x", 1) == 1);
	reap(pid);
	CHECK(!strcmp(p, "parent"));
	OK(scif_vreadfrom(e[1], &c, 1, off, 0));
	EQ(c, 'p');
}

#define LARGE 2048 /* pages: to copy them takes longer than to write one */

static void fork_without_descriptors(rlim_t soft, rlim_t hard)
{
	struct rlimit limit = { soft, hard };
	int e[2], status;

	pair(e);
	char *p = filled(LARGE, 1);
	char last = p[LARGE * PG - 1];

	CHECK(scif_register(e[0], p, LARGE * PG, 0, RW, 0) >= 0);
	OK(setrlimit(RLIMIT_NOFILE, &limit));
	while (dup(0) >= 0)
		;
	EQ(errno, EMFILE);
	pid_t pid = fork();

	if (pid == 0) {
		bool fine = p[LARGE * PG - 1] == last;

		p[0] = 'c';
		_exit(!fine);
	}
	CHECK(pid > 0);
	p[LARGE * PG - 1] = (char)(last + 1);
	EQ(waitpid(pid, &status, 0), pid);
	EQ(p[0], 1);
	/* With nothing left below the hard limit either, nobody tells the parent to wait. */
	if (soft < hard)
		EQ(status, 0);
}

TEST(scif_16_a_fork_at_the_limit_of_descriptors_leaves_each_its_own_copy)
{
	struct rlimit had;

	OK(getrlimit(RLIMIT_NOFILE, &had));
	fork_without_descriptors(600, had.rlim_max);
}

TEST(scif_16_a_fork_at_the_hard_limit_of_descriptors_leaves_the_parents_memory_alone)
{
	fork_without_descriptors(600, 600);
}

static char *racing;

static volatile int stop_racing;

static uint64_t wrote[64];

static void *racer(void *arg)
{
	(void)arg;
	while (!stop_racing)
		for (int i = 0; i < 64; i++)
			*(volatile uint64_t *)(racing + i * PG) = ++wrote[i];
	return NULL;
}

TEST(scif_86_register_loses_no_racing_write)
{
	pthread_t t;
	int e[2];

	pair(e);
	for (int round = 0; round < 40; round++) {
		racing = pages(64);
		memset(wrote, 0, sizeof wrote);
		stop_racing = 0;
		pthread_create(&t, NULL, racer, NULL);
		EVENTUALLY(__atomic_load_n(&wrote[63], __ATOMIC_ACQUIRE)); /* it runs */
		off_t off = scif_register(e[0], racing, 64 * PG, 0, RW, 0);
		CHECK(off >= 0);
		stop_racing = 1;
		pthread_join(t, NULL);
		for (int i = 0; i < 64; i++)
			EQ(*(uint64_t *)(racing + i * PG), wrote[i]);
		OK(scif_unregister(e[0], off, 64 * PG));
		munmap(racing, 64 * PG);
	}
}

TEST(scif_86_register_without_userfaultfd_loses_no_racing_write)
{
	setenv("MICEMU_SCIF_NO_UFFD", "1", 1);
	test_scif_86_register_loses_no_racing_write();
}

TEST(scif_82_node_memory_runs_out_and_comes_back)
{
	int e[2], n = 0;
	off_t off[64];

	pair(e);
	while (n < 64) { /* the node has 63 MiB */
		char *p = pages(1024);

		off[n] = scif_register(e[0], p, 1024 * PG, 0, RW, 0);
		if (off[n] < 0) {
			EQ(errno, ENOMEM);
			p[5] = 1; /* still private and usable */
			break;
		}
		n++;
		munmap(p, 1024 * PG);
	}
	CHECK(n > 5 && n < 64);
	for (int i = 0; i < n; i++)
		OK(scif_unregister(e[0], off[i], 1024 * PG));
	char *p = pages(1024);
	CHECK(scif_register(e[0], p, 1024 * PG, 0, RW, 0) >= 0);
}
