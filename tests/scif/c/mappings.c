/* What the library finds out about the mappings of the process, how often it looks, and what it gives back
 * (SCIF-82, 85, 86). The calls that it looks with are counted here, or made to fail. */
#include "t.h"
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#define RW (SCIF_PROT_READ | SCIF_PROT_WRITE)
#define MB (1 << 20)

static int looks, queries, no_descriptor, no_query;

int open(const char *path, int flags, ...)
{
	va_list ap;
	mode_t mode = 0;

	if (flags & O_CREAT) {
		va_start(ap, flags);
		mode = va_arg(ap, mode_t);
		va_end(ap);
	}
	if (!strcmp(path, "/proc/self/maps")) {
		looks++;
		if (no_descriptor) {
			errno = EMFILE;
			return -1;
		}
	}
	return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int ioctl(int fd, unsigned long request, ...)
{
	va_list ap;

	va_start(ap, request);
	void *arg = va_arg(ap, void *);
	va_end(ap);
	if (_IOC_TYPE(request) == 'f' && _IOC_NR(request) == 17) {
		queries++;
		if (no_query) { /* a kernel before 6.11 */
			errno = ENOTTY;
			return -1;
		}
	}
	return (int)syscall(SYS_ioctl, fd, request, arg);
}

static char *registered(int ep, int n, off_t *off)
{
	char *p = pages(n);

	for (int i = 0; i < n; i++)
		p[i * PG] = (char)(i + 1);
	*off = scif_register(ep, p, (size_t)n * PG, 0, RW, 0);
	CHECK(*off >= 0);
	return p;
}

/* Memory that was a window, and is no more. */
static char *used(int ep, int n)
{
	off_t off;
	char *p = registered(ep, n, &off);

	OK(scif_unregister(ep, off, (size_t)n * PG));
	return p;
}

static void many_mappings(int n)
{
	char *p = pages(2 * n);

	for (int i = 0; i < n; i++)
		CHECK(mprotect(p + 2 * i * PG, PG, PROT_READ) == 0);
}

TEST(scif_86_register_looks_at_few_of_many_mappings)
{
	enum { OTHERS = 2000, TIMES = 400 };
	char *kept[TIMES];
	int e[2];

	pair(e);
	munmap(used(e[0], 1), PG);
	many_mappings(OTHERS / 2);
	looks = queries = 0;
	for (int i = 0; i < TIMES; i++)
		munmap(used(e[0], 1), PG);
	CHECK(looks > 0 && queries > 0); /* they are counted */
	CHECK(looks <= 4 * TIMES);
	CHECK(queries <= 30 * TIMES + 4 * OTHERS);
	looks = queries = 0;
	for (int i = 0; i < TIMES; i++) /* the same with windows' memory that stays */
		kept[i] = used(e[0], 1);
	CHECK(looks <= 4 * TIMES);
	CHECK(queries <= 30 * TIMES + 4 * OTHERS);
	for (int i = 0; i < TIMES; i++)
		munmap(kept[i], PG);
	looks = queries = 0;
	munmap(used(e[0], 1), PG); /* the first that could find all of these */
	CHECK(looks <= 6);
	CHECK(queries <= 3 * (OTHERS + TIMES + 200));
}

static void all_of_a_range(int ep, int peer)
{
	char c, *p = pages(6);
	off_t off;

	for (int i = 0; i < 6; i++)
		p[i * PG] = (char)('a' + i);
	CHECK(scif_register(ep, p + PG, PG, 0, RW, 0) >= 0);
	CHECK(scif_register(ep, p + 4 * PG, PG, 0, RW, 0) >= 0);
	off = scif_register(ep, p, 6 * PG, 0, RW, 0); /* four mappings, two of them already there */
	CHECK(off >= 0);
	for (int i = 0; i < 6; i++) {
		OK(scif_vreadfrom(peer, &c, 1, off + i * PG, 0));
		EQ(c, 'a' + i);
		p[i * PG] = (char)('A' + i);
		OK(scif_vreadfrom(peer, &c, 1, off + i * PG, 0));
		EQ(c, 'A' + i);
	}
	munmap(p + 5 * PG, PG);
	FAILS(scif_register(ep, p, 6 * PG, 0, RW, 0), EFAULT);
	mprotect(p, PG, PROT_READ);
	FAILS(scif_register(ep, p, 2 * PG, 0, RW, 0), EFAULT);
	CHECK(scif_register(ep, p, 5 * PG, 0, SCIF_PROT_READ, 0) >= 0);
}

TEST(scif_83_85_register_without_the_kernels_query)
{
	int e[2];
	char name[256], *dir = pages(1);

	pair(e);
	no_query = 1;
	many_mappings(40);
	memset(name, 'n', 240); /* a line with a long name, and a file without one */
	name[240] = 0;
	int fd = memfd_create(name, 0);
	CHECK(fd >= 0 && ftruncate(fd, PG) == 0);
	CHECK(mmap(NULL, PG, PROT_READ, MAP_SHARED, fd, 0) != MAP_FAILED);
	CHECK(dir);
	all_of_a_range(e[0], e[1]);
	char *stays = used(e[0], 2);
	for (int i = 0; i < 300; i++)
		munmap(used(e[0], 1), PG);
	CHECK(queries > 0);
	EQ(stays[PG], 2);
}

/* The node of these tests has room for 46 MiB. */
TEST(scif_82_a_full_node_gets_back_what_was_unmapped)
{
	off_t off;
	int e[2];

	pair(e);
	registered(e[0], 32 * MB / PG, &off);
	munmap(used(e[0], 10 * MB / PG), 10 * MB); /* too little to look for */
	int before = queries;
	registered(e[0], 1, &off);
	CHECK(queries - before < 10);
	registered(e[0], 10 * MB / PG, &off); /* until it is needed */
	FAILS(scif_register(e[0], pages(16 * MB / PG), 16 * MB, 0, RW, 0), ENOMEM);
}

static void take_half(int ep)
{
	off_t off;

	meet(ep);
	registered(ep, 24 * MB / PG, &off);
	meet(ep);
}

TEST(scif_82_a_program_does_not_hold_much_that_it_has_unmapped)
{
	pid_t pid;
	int ep = with_peer(take_half, &pid);

	for (int i = 0; i < 45; i++) /* it would hold almost all of it */
		munmap(used(ep, MB / PG), MB);
	meet(ep);
	meet(ep);
	OK(scif_close(ep));
	reap(pid);
}

TEST(scif_85_pages_are_kept_when_the_library_cannot_look)
{
	int e[2];

	pair(e);
	char *stays = used(e[0], 1);
	for (int i = 0; i < 150; i++) { /* whenever the time to look comes, it comes with this one */
		no_descriptor = 1;
		FAILS(scif_register(e[0], pages(1), PG, 0, RW, 0), ENOMEM);
		no_descriptor = 0;
		char *p = used(e[0], 1);
		memset(p, 0x77, PG);
		if (i % 2)
			munmap(p, PG);
	}
	EQ(stays[0], 1);
	EQ(stays[1], 0);
}

TEST(scif_85_pages_that_were_moved_elsewhere_are_kept)
{
	int e[2];

	pair(e);
	char *p = used(e[0], 4);
	char *q = mremap(p, 4 * PG, 4 * PG, MREMAP_MAYMOVE | MREMAP_FIXED, pages(4));
	CHECK(q != MAP_FAILED);
	munmap(q, PG);
	munmap(q + 2 * PG, 2 * PG); /* one page of the four is left, at another place */
	for (int i = 0; i < 300; i++) {
		char *r = used(e[0], 1);
		memset(r, 0x66, PG);
		munmap(r, PG);
	}
	EQ(q[PG], 2);
	EQ(q[PG + 1], 0);
}

TEST(scif_85_87_a_window_keeps_the_pages_that_another_one_had_too)
{
	int e[2], f[2];
	off_t a, b;
	char c;

	pair(e);
	pair(f);
	char *p = registered(e[0], 1, &a);
	b = scif_register(f[0], p, PG, 0, RW, 0);
	CHECK(b >= 0);
	munmap(p, PG);
	for (int round = 0; round < 2; round++) { /* then without the first window */
		for (int i = 0; i < 300; i++) { /* the library looks, and the pages would be somebody's */
			char *r = used(e[0], 1);
			memset(r, 0x66, PG);
			munmap(r, PG);
		}
		OK(scif_vreadfrom(f[1], &c, 1, b, 0));
		EQ(c, 1);
		OK(scif_vreadfrom(f[1], &c, 1, b + 1, 0));
		EQ(c, 0);
		if (round == 0)
			OK(scif_unregister(e[0], a, PG));
	}
}

static int busy_ep;
static volatile int stop_busy;
static void *busy(void *arg)
{
	(void)arg;
	while (!stop_busy)
		munmap(used(busy_ep, 16), 16 * PG);
	return NULL;
}

TEST(scif_16_a_child_of_a_fork_during_register_can_register)
{
	pthread_t t;
	int e[2];

	pair(e);
	busy_ep = e[0];
	pthread_create(&t, NULL, busy, NULL);
	for (int i = 0; i < 20; i++) {
		pid_t pid = fork();

		if (pid == 0) {
			off_t off;

			alarm(20);
			pair(e);
			registered(e[0], 2, &off);
			_exit(0);
		}
		reap(pid);
	}
	stop_busy = 1;
	pthread_join(t, NULL);
}

TEST(scif_86_a_fault_of_the_program_ends_it_also_without_userfaultfd)
{
	off_t off;
	int e[2], st;

	setenv("MICEMU_SCIF_NO_UFFD", "1", 1);
	pair(e);
	pid_t pid = fork();
	if (pid == 0) {
		alarm(20);
		signal(SIGSEGV, SIG_DFL);
		pair(e);
		for (int i = 0; i < 3; i++)
			registered(e[0], 1, &off);
		char *p = pages(1);
		munmap(p, PG);
		*(volatile char *)p = 1;
		_exit(0);
	}
	EQ(waitpid(pid, &st, 0), pid);
	CHECK(WIFSIGNALED(st));
	EQ(WTERMSIG(st), SIGSEGV);
}

TEST(scif_83_a_file_may_be_shorter_than_its_mapping)
{
	int e[2], f = memfd_create("short", 0);

	CHECK(f >= 0 && ftruncate(f, PG) == 0);
	char *p = mmap(NULL, 2 * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE, f, 0);

	pair(e);
	FAILS(scif_register(e[0], p, 2 * PG, 0, SCIF_PROT_READ | SCIF_PROT_WRITE, 0), EFAULT);
	CHECK(scif_register(e[0], p, PG, 0, SCIF_PROT_READ | SCIF_PROT_WRITE, 0) >= 0);
}

/* The library's requests pass here: at the next one another thread, so to speak, maps something else. */
static char *mapped_anew;
ssize_t sendmsg(int fd, const struct msghdr *m, int flags)
{
	char *p = __atomic_exchange_n(&mapped_anew, NULL, __ATOMIC_SEQ_CST);

	if (p)
		CHECK(mmap(p, PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p);
	return syscall(SYS_sendmsg, fd, m, flags);
}

TEST(scif_83_memory_that_changes_while_it_is_registered_takes_no_pages_of_others)
{
	off_t off;
	int e[2];

	pair(e);
	char *p = registered(e[0], 1, &off);

	p[0] = 7;
	mapped_anew = p; /* planned: nothing to move, the node gives no page */
	FAILS(scif_register(e[0], p, PG, 0, SCIF_PROT_READ | SCIF_PROT_WRITE, 0), EFAULT);
	CHECK(!mapped_anew);
	p[0] = 8;
	CHECK(madvise(p, PG, MADV_DONTNEED) == 0);
	EQ(p[0], 0); /* still the program's own page, nobody's memory */
	EQ(scif_unregister(e[0], off, PG), 0);
}
