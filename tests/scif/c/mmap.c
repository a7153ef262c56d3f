/* scif_mmap and scif_munmap (SCIF-91..103). */
#include "t.h"

#define FIRST ((off_t)0x4000000000000000)
#define RW (SCIF_PROT_READ | SCIF_PROT_WRITE)
#define MAPFAILS(call, code) do { errno = 0; if ((call) != SCIF_MMAP_FAILED || errno != (code)) \
		DIE("%s: errno %d (%s)", #call, errno, strerror(errno)); } while (0)

static char *filled(int n, char seed)
{
	char *p = pages(n);

	for (int i = 0; i < n * PG; i++)
		p[i] = (char)(i * 31 + (i >> 12) + seed);
	return p;
}

TEST(scif_91_98_unregister_of_a_mapped_window_lingers)
{
	char *p = filled(4, 2), c;
	int e[2];

	pair(e);
	EQ(scif_register(e[0], p, 4 * PG, 0x10000, RW, SCIF_MAP_FIXED), 0x10000);
	char *m = scif_mmap(NULL, 4 * PG, RW, 0, e[1], 0x10000);
	CHECK(m != SCIF_MMAP_FAILED);
	OK(scif_unregister(e[0], 0x10000, 4 * PG));
	OK(scif_unregister(e[0], 0x10000, 4 * PG)); /* repeated on a lingering window */
	CHECK(!memcmp(m, p, 4 * PG));
	m[5] = 'L';
	EQ(p[5], 'L');
	FAILS(scif_vreadfrom(e[1], &c, 1, 0x10000, 0), ENXIO);
	FAILS(scif_register(e[0], p, PG, 0x11000, RW, SCIF_MAP_FIXED), EADDRINUSE);
	OK(scif_munmap(m + PG, PG));
	EQ(m[5], 'L');
	EQ(m[2 * PG], p[2 * PG]);
	OK(scif_munmap(m, PG));
	FAILS(scif_register(e[0], p, PG, 0x11000, RW, SCIF_MAP_FIXED), EADDRINUSE);
	OK(scif_munmap(m + 2 * PG, 2 * PG));
	EQ(scif_register(e[0], p, PG, 0x11000, RW, SCIF_MAP_FIXED), 0x11000);
}

/* The place of an unregistered window is free once nothing of it is mapped, and not before. */
static void taken(int ep, char *p, off_t at)
{
	FAILS(scif_register(ep, p, PG, at, RW, SCIF_MAP_FIXED), EADDRINUSE);
}

static void free_again(int ep, char *p, off_t at)
{
	EQ(scif_register(ep, p, PG, at, RW, SCIF_MAP_FIXED), at);
}

TEST(scif_98_each_window_of_a_mapping_goes_with_its_own_last_page)
{
	char *p = filled(4, 3);
	int e[2];

	pair(e);
	EQ(scif_register(e[0], p, 2 * PG, 0x10000, RW, SCIF_MAP_FIXED), 0x10000);
	EQ(scif_register(e[0], p + 2 * PG, 2 * PG, 0x12000, RW, SCIF_MAP_FIXED), 0x12000);
	char *m = scif_mmap(NULL, 4 * PG, RW, 0, e[1], 0x10000);
	CHECK(m != SCIF_MMAP_FAILED);
	OK(scif_unregister(e[0], 0x10000, 4 * PG));
	OK(scif_munmap(m + PG, 2 * PG)); /* one page of each is left */
	taken(e[0], p, 0x10000);
	taken(e[0], p, 0x12000);
	CHECK(!memcmp(m, p, PG) && !memcmp(m + 3 * PG, p + 3 * PG, PG));
	OK(scif_munmap(m + 3 * PG, PG));
	free_again(e[0], p, 0x12000);
	taken(e[0], p, 0x10000);
	CHECK(!memcmp(m, p, PG));
	OK(scif_munmap(m, PG));
	free_again(e[0], p, 0x10000);
}

TEST(scif_96_98_an_odd_length_counts_whole_pages)
{
	char *p = filled(2, 5);
	int e[2];

	pair(e);
	for (int i = 0; i < 2; i++) { /* a byte of the second page, then of the first one */
		size_t len = i ? 1 : PG + 1;

		EQ(scif_register(e[0], p, 2 * PG, 0x10000, RW, SCIF_MAP_FIXED), 0x10000);
		char *m = scif_mmap(NULL, len, RW, 0, e[1], 0x10000);
		CHECK(m != SCIF_MMAP_FAILED);
		OK(scif_unregister(e[0], 0x10000, 2 * PG));
		taken(e[0], p, 0x10000);
		CHECK(!memcmp(m, p, i ? PG : 2 * PG));
		OK(scif_munmap(m, len));
		free_again(e[0], p, 0x10000);
		OK(scif_unregister(e[0], 0x10000, PG));
	}
}

TEST(scif_97_98_a_mapping_that_another_one_replaces_is_gone)
{
	char *p = filled(2, 7);
	int e[2];

	pair(e);
	EQ(scif_register(e[0], p, PG, 0x10000, RW, SCIF_MAP_FIXED), 0x10000);
	EQ(scif_register(e[0], p + PG, PG, 0x20000, RW, SCIF_MAP_FIXED), 0x20000);
	char *m = scif_mmap(NULL, PG, RW, 0, e[1], 0x10000);
	CHECK(m != SCIF_MMAP_FAILED);
	CHECK(scif_mmap(m, PG, RW, SCIF_MAP_FIXED, e[1], 0x20000) == m);
	CHECK(!memcmp(m, p + PG, PG));
	OK(scif_unregister(e[0], 0x10000, PG));
	free_again(e[0], p, 0x10000);
	OK(scif_unregister(e[0], 0x20000, PG));
	taken(e[0], p, 0x20000);
	OK(scif_munmap(m, PG));
	free_again(e[0], p, 0x20000);
}

static void unmapping_peer(int ep)
{
	for (int i = 0; i < 50; i++) {
		meet(ep);
		char *m = scif_mmap(NULL, 2 * PG, RW, 0, ep, 0x10000);
		CHECK(m != SCIF_MMAP_FAILED);
		meet(ep); /* mapped */
		meet(ep); /* the owner has unregistered */
		OK(scif_munmap(m, PG));
		meet(ep);
		meet(ep); /* the owner has tried */
		OK(scif_munmap(m + PG, PG));
		meet(ep);
	}
}

TEST(scif_98_offsets_are_free_when_the_peer_has_unmapped)
{
	char *p = filled(2, 6);
	pid_t pid;
	int ep = with_peer(unmapping_peer, &pid);

	for (int i = 0; i < 50; i++) {
		EQ(scif_register(ep, p, 2 * PG, 0x10000, RW, SCIF_MAP_FIXED), 0x10000);
		meet(ep);
		meet(ep);
		OK(scif_unregister(ep, 0x10000, 2 * PG));
		meet(ep);
		meet(ep); /* half of it is unmapped */
		FAILS(scif_register(ep, p, PG, 0x10000, RW, SCIF_MAP_FIXED), EADDRINUSE);
		meet(ep);
		meet(ep); /* all of it: the next round's registration finds the place free */
	}
	OK(scif_close(ep));
	reap(pid);
}

static void mapped_peer(int ep)
{
	off_t off;

	recv_all(ep, &off, sizeof off);
	char *m = scif_mmap(NULL, 3 * PG, RW, 0, ep, off);
	CHECK(m != SCIF_MMAP_FAILED);
	for (int i = 0; i < 3 * PG; i++)
		EQ(m[i], (char)(i * 31 + (i >> 12) + 4));
	meet(ep);
	uint64_t *flag = (uint64_t *)(m + 2 * PG);
	for (uint64_t i = 0; i < 2000; i++) { /* ping-pong without a call in the loop */
		while (__atomic_load_n(flag, __ATOMIC_ACQUIRE) != i * 0x100000001)
			sched_yield();
		__atomic_store_n(flag + 8, i * 0x100000001, __ATOMIC_RELEASE);
	}
	meet(ep);
	OK(scif_munmap(m, 3 * PG));
}

TEST(scif_93_mapping_is_live_in_both_directions)
{
	char *p = filled(3, 4);
	pid_t pid;
	int ep = with_peer(mapped_peer, &pid);
	off_t a = scif_register(ep, p, PG, 0, RW, 0), b = scif_register(ep, p + PG, 2 * PG, 0, RW, 0);

	EQ(b, a + PG); /* adjacent: one mapping spans both */
	send_all(ep, &a, sizeof a);
	uint64_t *flag = (uint64_t *)(p + 2 * PG);
	meet(ep); /* the peer has compared */
	for (uint64_t i = 0; i < 2000; i++) {
		__atomic_store_n(flag, i * 0x100000001, __ATOMIC_RELEASE);
		while (__atomic_load_n(flag + 8, __ATOMIC_ACQUIRE) != i * 0x100000001)
			sched_yield();
	}
	meet(ep);
	OK(scif_close(ep));
	reap(pid);
}

TEST(scif_94_95_96_97_mmap_errors)
{
	char *p = pages(8);
	int e[2];

	pair(e);
	scif_register(e[0], p, 2 * PG, 0x10000, RW, SCIF_MAP_FIXED);
	scif_register(e[0], p, 2 * PG, 0x12000, SCIF_PROT_READ, SCIF_MAP_FIXED);
	scif_register(e[0], p, PG, 0x20000, RW, SCIF_MAP_FIXED);
	scif_register(e[0], p, PG, 0x30000, SCIF_PROT_WRITE, SCIF_MAP_FIXED);
	MAPFAILS(scif_mmap(NULL, PG, RW, 0, e[1], 0x14000), ENXIO);
	MAPFAILS(scif_mmap(NULL, 0x11000, SCIF_PROT_READ, 0, e[1], 0x10000), ENXIO);
	MAPFAILS(scif_mmap(NULL, PG, RW, 0, e[1], -PG), ENXIO);
	MAPFAILS(scif_mmap(NULL, 4 * PG, RW, 0, e[1], 0x10000), EPERM);
	MAPFAILS(scif_mmap(NULL, PG, SCIF_PROT_WRITE, 0, e[1], 0x12000), EPERM);
	MAPFAILS(scif_mmap(NULL, PG, SCIF_PROT_READ, 0, e[1], 0x30000), EPERM);
	MAPFAILS(scif_mmap(NULL, PG, RW, 0, e[1], 0x10001), EINVAL);
	MAPFAILS(scif_mmap(NULL, 0, RW, 0, e[1], 0x10000), EINVAL);
	MAPFAILS(scif_mmap(p + 1, PG, RW, SCIF_MAP_FIXED, e[1], 0x10000), EINVAL);
	MAPFAILS(scif_mmap(NULL, PG, RW, 0, 900, 0x10000), EBADF);
	char *m = scif_mmap(NULL, 4 * PG, SCIF_PROT_READ, 0, e[1], 0x10000);
	CHECK(m != SCIF_MMAP_FAILED);
	CHECK(scif_mmap(NULL, PG, 0, 0, e[1], 0x12000) != SCIF_MMAP_FAILED);
	char *odd = scif_mmap(NULL, 100, RW, 0, e[1], 0x10000);
	CHECK(odd != SCIF_MMAP_FAILED);
	odd[PG - 1] = 'o';
	EQ(p[PG - 1], 'o');
	OK(scif_munmap(odd, 100));
	FAILS(scif_munmap(m + 1, PG), EINVAL);
	FAILS(scif_munmap(m, 0), EINVAL);
	OK(scif_munmap(pages(1), PG));
	/* FIXED over an own registered buffer */
	char *own = pages(2);
	CHECK(scif_register(e[1], own, 2 * PG, 0, RW, 0) == FIRST);
	CHECK(scif_mmap(own, 2 * PG, RW, SCIF_MAP_FIXED, e[1], 0x10000) == own);
	own[3] = 'f';
	EQ(p[3], 'f');
}

TEST(scif_103_mmap_on_unconnected_and_disconnected_endpoints)
{
	int e[2];

	MAPFAILS(scif_mmap(NULL, PG, RW, 0, scif_open(), 0), ENOTCONN);
	pair(e);
	scif_close(e[1]);
	EQ(poll1(e[0], SCIF_POLLIN, 5000), SCIF_POLLHUP);
	MAPFAILS(scif_mmap(NULL, PG, RW, 0, e[0], 0), ECONNRESET);
}

static void expose_and_die(int ep)
{
	char *p = filled(2, 6);
	off_t off = scif_register(ep, p, 2 * PG, 0, RW, 0);

	send_all(ep, &off, sizeof off);
	meet(ep);
	kill(getpid(), SIGKILL);
}

TEST(scif_99_mapping_survives_the_death_of_the_owner)
{
	pid_t pid;
	off_t off;
	char c;
	int ep = with_peer(expose_and_die, &pid);

	recv_all(ep, &off, sizeof off);
	char *m = scif_mmap(NULL, 2 * PG, RW, 0, ep, off);
	CHECK(m != SCIF_MMAP_FAILED);
	meet(ep);
	waitpid(pid, NULL, 0);
	FAILS(scif_recv(ep, &c, 1, SCIF_RECV_BLOCK), ECONNRESET);
	for (int i = 0; i < 2 * PG; i++)
		EQ(m[i], (char)(i * 31 + (i >> 12) + 6));
	m[1] = 1;
	FAILS(scif_vreadfrom(ep, &c, 1, off, 0), ECONNRESET); /* SCIF-113 */
	OK(scif_close(ep));
	EQ(m[1], 1);
	OK(scif_munmap(m, 2 * PG));
}

static void expose_and_wait(int ep)
{
	char *p = filled(2, 6), c;
	off_t off = scif_register(ep, p, 2 * PG, 0, RW, 0);

	send_all(ep, &off, sizeof off);
	EVENTUALLY(__atomic_load_n(p, __ATOMIC_ACQUIRE) == 'c'); /* they have closed, and mapped it still */
	EQ(poll1(ep, SCIF_POLLIN | SCIF_POLLOUT, 0), SCIF_POLLOUT);
	__atomic_store_n(p, 'p', __ATOMIC_RELEASE);
	FAILS(scif_recv(ep, &c, 1, SCIF_RECV_BLOCK), ECONNRESET);
}

TEST(scif_101_closing_with_a_live_mapping_does_not_disconnect)
{
	pid_t pid;
	off_t off;
	int ep = with_peer(expose_and_wait, &pid);

	recv_all(ep, &off, sizeof off);
	char *m = scif_mmap(NULL, 2 * PG, RW, 0, ep, off);
	CHECK(m != SCIF_MMAP_FAILED);
	OK(scif_close(ep));
	__atomic_store_n(m, 'c', __ATOMIC_RELEASE);
	EVENTUALLY(__atomic_load_n(m, __ATOMIC_ACQUIRE) == 'p');
	EQ(m[PG], (char)(PG * 31 + 1 + 6));
	OK(scif_munmap(m, 2 * PG));
	reap(pid);
}

TEST(scif_8_98_munmap_closes_no_descriptor_of_the_program)
{
	int e[2], other = open("/dev/null", O_RDONLY);
	char *m = pages(1);

	pair(e);
	off_t off = scif_register(e[1], m, PG, 0, SCIF_PROT_READ, 0);

	CHECK(off >= 0);
	char *p = scif_mmap(NULL, PG, SCIF_PROT_READ, 0, e[0], off);

	CHECK(p != SCIF_MMAP_FAILED);
	/* The program closes all that it does not know, and gets the numbers itself. */
	for (int fd = 100; fd < 600; fd++)
		CHECK(dup2(other, fd) == fd);
	EQ(scif_munmap(p, PG), 0);
	for (int fd = 100; fd < 600; fd++)
		CHECK(fcntl(fd, F_GETFD) >= 0);
}

TEST(scif_100_mapping_is_absent_in_a_forked_child)
{
	char *p = filled(1, 1);
	int e[2], st;

	pair(e);
	off_t off = scif_register(e[0], p, PG, 0, RW, 0);
	char *m = scif_mmap(NULL, PG, RW, 0, e[1], off);
	CHECK(m != SCIF_MMAP_FAILED);
	pid_t pid = fork();
	if (pid == 0) {
		signal(SIGSEGV, SIG_DFL);
		_exit(*(volatile char *)m);
	}
	waitpid(pid, &st, 0);
	CHECK(WIFSIGNALED(st) && WTERMSIG(st) == SIGSEGV);
}
