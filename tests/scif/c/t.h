/* A small harness: TEST(name) { ... }, chosen by name on the command line. NODEn holds the socket of
 * node n; A and B are the nodes of the route under test (environment, default 0 and 0). */
#ifndef T_H
#define T_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <scif.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct test {
	const char *name;
	void (*run)(void);
	struct test *next;
};
extern struct test *tests;

#define TEST(fn) \
	static void test_##fn(void); \
	static struct test t_##fn = { #fn, test_##fn, NULL }; \
	__attribute__((constructor)) static void reg_##fn(void) { t_##fn.next = tests; tests = &t_##fn; } \
	static void test_##fn(void)

#define DIE(...) do { fprintf(stderr, "%s:%d: ", __FILE__, __LINE__); fprintf(stderr, __VA_ARGS__); \
		fputc('\n', stderr); fflush(NULL); _exit(1); } while (0)
#define CHECK(x) do { if (!(x)) DIE("%s failed, errno %d (%s)", #x, errno, strerror(errno)); } while (0)
#define EQ(a, b) do { long long a_ = (long long)(a), b_ = (long long)(b); \
		if (a_ != b_) DIE("%s is %lld (%#llx), not %lld (%#llx); errno %d (%s)", #a, a_, a_, b_, b_, errno, \
				  strerror(errno)); } while (0)
/* The call fails with this errno. */
#define FAILS(call, code) do { errno = 0; long long r_ = (long long)(call); \
		if (r_ != -1 || errno != (code)) DIE("%s gave %lld, errno %d (%s), not errno %d (%s)", #call, r_, errno, \
						     strerror(errno), code, strerror(code)); } while (0)
/* The call succeeds and leaves errno alone. */
#define OK(call) do { errno = 0; long long ok_ = (long long)(call); \
		if (ok_ == -1 || errno) \
			DIE("%s gave %lld, errno %d (%s)", #call, ok_, errno, strerror(errno)); } while (0)

static inline int node_a(void) { return getenv("A") ? atoi(getenv("A")) : 0; }
static inline int node_b(void) { return getenv("B") ? atoi(getenv("B")) : 0; }

/* From now on this process is on node n. */
static inline void on_node(int n)
{
	char key[16];

	snprintf(key, sizeof key, "NODE%d", n);
	CHECK(getenv(key));
	setenv("MICEMU_SCIF_SOCKET", getenv(key), 1);
}

static inline uint64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* Wait for a condition, at most 10 s. */
#define EVENTUALLY(x) do { uint64_t end_ = now_us() + 10000000; \
		while (!(x)) { if (now_us() > end_) DIE("never: %s", #x); sched_yield(); } } while (0)

/* A thread says that its next call blocks; another one waits until it does. */
static pid_t blocking_thread;

static inline void about_to_block(void)
{
	__atomic_store_n(&blocking_thread, (pid_t)syscall(SYS_gettid), __ATOMIC_RELEASE);
}
static inline int is_asleep(pid_t tid)
{
	char path[64], line[512] = "";
	FILE *f;

	snprintf(path, sizeof path, "/proc/self/task/%d/stat", (int)tid);
	f = fopen(path, "r");
	if (!f)
		return 0;
	char *got = fgets(line, sizeof line, f), *name_end = strrchr(line, ')');

	fclose(f);
	return got && name_end && name_end[1] && name_end[2] == 'S';
}
static inline void wait_until_blocked(void)
{
	pid_t tid = 0;

	EVENTUALLY((tid = __atomic_load_n(&blocking_thread, __ATOMIC_ACQUIRE)));
	EVENTUALLY(is_asleep(tid));
	usleep(20000); /* on its way into the call it may have slept for a moment */
	EVENTUALLY(is_asleep(tid));
	__atomic_store_n(&blocking_thread, 0, __ATOMIC_RELEASE);
}

static inline int listener_on(int port, int backlog)
{
	int l = scif_open();

	CHECK(l >= 0);
	CHECK(scif_bind(l, (uint16_t)port) >= 0);
	CHECK(scif_listen(l, backlog) == 0);
	return l;
}

static inline int accept_from(int l, struct scif_portID *peer)
{
	struct scif_portID p;
	int fd = -7;

	CHECK(scif_accept(l, peer ? peer : &p, &fd, SCIF_ACCEPT_SYNC) == 0);
	return fd;
}

static inline int connect_to(int node, int port)
{
	struct scif_portID dst = { (uint16_t)node, (uint16_t)port };
	uint64_t end = now_us() + 10000000;
	int fd = scif_open();

	CHECK(fd >= 0);
	while (scif_connect(fd, &dst) < 0) {
		CHECK(errno == ECONNREFUSED || errno == ENODEV);
		CHECK(now_us() < end);
		usleep(1000);
	}
	return fd;
}

struct connector { int node, port, fd; };
static inline void *connector_main(void *arg)
{
	struct connector *c = arg;

	c->fd = connect_to(c->node, c->port);
	return NULL;
}

/* Two connected ends in this process (loopback on node A): [0] connected, [1] accepted. */
static inline void pair(int e[2])
{
	pthread_t t;
	on_node(node_a());
	int l = scif_open(), port = scif_bind(l, 0);
	struct connector c = { node_a(), port, -1 };

	CHECK(port > 0);
	CHECK(scif_listen(l, 4) == 0);
	CHECK(pthread_create(&t, NULL, connector_main, &c) == 0);
	e[1] = accept_from(l, NULL);
	pthread_join(t, NULL);
	e[0] = c.fd;
	CHECK(scif_close(l) == 0);
}

/* A child on node B that connects to us (on node A) and runs fn. Returns our end. */
static inline int with_peer(void (*fn)(int ep), pid_t *pid)
{
	on_node(node_a());
	int l = scif_open(), port = scif_bind(l, 0);

	CHECK(port > 0);
	CHECK(scif_listen(l, 4) == 0);
	fflush(NULL);
	*pid = fork();
	CHECK(*pid >= 0);
	if (*pid == 0) {
		alarm(50);
		on_node(node_b());
		int ep = connect_to(node_a(), port);

		fn(ep);
		_exit(0);
	}
	int ep = accept_from(l, NULL);

	CHECK(scif_close(l) == 0);
	return ep;
}

static inline void reap(pid_t pid)
{
	int st;

	CHECK(waitpid(pid, &st, 0) == pid);
	if (!WIFEXITED(st) || WEXITSTATUS(st))
		DIE("the peer ended with %#x", st);
}

static inline void send_all(int ep, const void *p, int n)
{
	EQ(scif_send(ep, (void *)(uintptr_t)p, n, SCIF_SEND_BLOCK), n);
}
static inline void recv_all(int ep, void *p, int n)
{
	EQ(scif_recv(ep, p, n, SCIF_RECV_BLOCK), n);
}
/* Both sides: a point that both have reached. */
static inline void meet(int ep)
{
	char c = 'm';

	send_all(ep, &c, 1);
	recv_all(ep, &c, 1);
	CHECK(c == 'm');
}

/* Both ends are here: a byte each way. */
static inline void meet_both(const int e[2])
{
	char c = 'b';

	send_all(e[0], &c, 1);
	recv_all(e[1], &c, 1);
	send_all(e[1], &c, 1);
	recv_all(e[0], &c, 1);
}

static inline int poll1(int ep, short events, int ms)
{
	struct scif_pollepd p = { ep, events, 0 };
	int rc = scif_poll(&p, 1, ms);

	CHECK(rc >= 0);
	EQ(rc, p.revents != 0);
	return p.revents;
}
static inline int native1(int ep, short events, int ms)
{
	struct pollfd p = { ep, events, 0 };
	int rc = poll(&p, 1, ms);

	CHECK(rc >= 0);
	return p.revents;
}

#define PG 4096
static inline char *pages(int n)
{
	char *p = mmap(NULL, (size_t)n * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED);
	return p;
}
#endif
