/* One end of a SCIF connection that copies what it is told to: copier listen PORT | copier connect NODE PORT.
 *
 * A command per line on stdin, an answer per line on stdout:
 *   write N, read N   N asynchronous copies of 2 MiB, then a fence: "errno MS WRONG..." with the wrong bytes of each
 *   sync              a synchronous copy of 2 MiB into the peer's window: likewise
 *   mark              a fence for the peer's copies: "errno MS"
 *   signal VALUE      into the last page of the peer's window, behind all copies: "errno MS"
 *   seen VALUE        has a signal put it into the last page of our own window? "yes" or "no"
 *   end               close the endpoint: "closed" */
#define _GNU_SOURCE
#include <errno.h>
#include <scif.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define COPY   ((size_t)2 << 20)
#define MOST   4
#define AREA   (COPY * MOST)
#define PAGE   ((size_t)4096)
#define WINDOW (AREA + PAGE)
#define RW     (SCIF_PROT_READ | SCIF_PROT_WRITE)

static int ep;
static char *window, *wanted, *found;
static off_t here, there;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static void meet(int port_or_node, int port, int listens)
{
	struct scif_portID peer = {(uint16_t)port_or_node, (uint16_t)port};
	uint64_t end = now_ms() + 20000;
	int l = scif_open();

	if (l < 0 || (listens && (scif_bind(l, (uint16_t)port) < 0 || scif_listen(l, 1) < 0)))
		die("listen");
	ep = l;
	if (listens && scif_accept(l, &peer, &ep, SCIF_ACCEPT_SYNC) < 0)
		die("accept");
	while (!listens && scif_connect(ep, &peer) < 0)
		if ((errno != ECONNREFUSED && errno != ENODEV) || now_ms() > end)
			die("connect");
}

static void expose(void)
{
	window = mmap(NULL, WINDOW, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	wanted = malloc(AREA);
	found = malloc(AREA);
	if (window == MAP_FAILED || !wanted || !found)
		die("memory");
	here = scif_register(ep, window, WINDOW, 0, RW, 0);
	if (here < 0 || scif_send(ep, &here, sizeof here, SCIF_SEND_BLOCK) < 0 ||
	    scif_recv(ep, &there, sizeof there, SCIF_RECV_BLOCK) < 0)
		die("register");
}

static size_t wrong(const char *a, const char *b)
{
	size_t n = 0;

	for (size_t i = 0; i < COPY; i++)
		n += a[i] != b[i];
	return n;
}

static int fence(int who)
{
	int mark;

	if (scif_fence_mark(ep, who, &mark) < 0)
		die("scif_fence_mark");
	return scif_fence_wait(ep, mark) < 0 ? errno : 0;
}

/* New bytes in `wanted`; never those that any copy before has left somewhere. */
static void fresh(void)
{
	static uint32_t round;

	round++;
	for (size_t i = 0; i < AREA; i++)
		wanted[i] = (char)(i * 31 + (i >> 8) * 7 + round);
}

static void copy(int n, int flags, int write)
{
	uint64_t begin = now_ms();

	fresh();
	if (write)
		memcpy(window, wanted, AREA);
	else if (scif_vwriteto(ep, wanted, AREA, there, SCIF_RMA_SYNC) < 0)
		die("scif_vwriteto");
	for (int i = 0; i < n; i++) {
		off_t at = (off_t)(COPY * (size_t)i);
		int rc = write ? scif_writeto(ep, here + at, COPY, there + at, flags)
			       : scif_readfrom(ep, here + at, COPY, there + at, flags);

		if (rc < 0)
			die("copy");
	}
	int code = fence(SCIF_FENCE_INIT_SELF);

	printf("%d %llu", code, (unsigned long long)(now_ms() - begin));
	if (write && scif_vreadfrom(ep, found, AREA, there, SCIF_RMA_SYNC) < 0)
		die("scif_vreadfrom");
	for (int i = 0; i < n; i++)
		printf(" %zu", wrong(wanted + COPY * (size_t)i, (write ? found : window) + COPY * (size_t)i));
	printf("\n");
}

static void signal_peer(uint64_t value)
{
	uint64_t begin = now_ms();
	int rc = scif_fence_signal(ep, 0, 0, there + (off_t)AREA, value,
				   SCIF_FENCE_INIT_SELF | SCIF_SIGNAL_REMOTE);

	printf("%d %llu\n", rc < 0 ? errno : 0, (unsigned long long)(now_ms() - begin));
}

static void obey(const char *word, int n)
{
	if (!strcmp(word, "write") || !strcmp(word, "read")) {
		copy(n, 0, *word == 'w');
	} else if (!strcmp(word, "sync")) {
		copy(1, SCIF_RMA_SYNC, 1);
	} else if (!strcmp(word, "mark")) {
		printf("%d 0\n", fence(SCIF_FENCE_INIT_PEER));
	} else if (!strcmp(word, "signal")) {
		signal_peer((uint64_t)n);
	} else if (!strcmp(word, "seen")) {
		uint64_t v = __atomic_load_n((uint64_t *)(void *)(window + AREA), __ATOMIC_ACQUIRE);

		printf("%s\n", v == (uint64_t)n ? "yes" : "no");
	} else {
		printf(scif_close(ep) < 0 ? "not closed\n" : "closed\n");
		exit(0);
	}
}

int main(int argc, char **argv)
{
	char line[64], word[16];

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc == 3 && !strcmp(argv[1], "listen"))
		meet(0, atoi(argv[2]), 1);
	else if (argc == 4 && !strcmp(argv[1], "connect"))
		meet(atoi(argv[2]), atoi(argv[3]), 0);
	else
		return 2;
	expose();
	printf("ready\n");
	while (fgets(line, sizeof line, stdin)) {
		int n = 0;

		if (sscanf(line, "%15s %d", word, &n) >= 1)
			obey(word, n);
	}
	return 1;
}
