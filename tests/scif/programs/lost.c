/* Both sides of test_lost_node.py.
 *
 * lost owner PORT BYTE        a window full of BYTE at offset 0; prints "up"; tells each client that asks
 *                             whether every byte of it is still BYTE
 * lost user NODE PORT [plain] maps the window, prints "ready", then a line for each command of its input:
 *   ask         the owner's answer, y or n
 *   look        stores to and loads from every page of the mapping: how many faulted, how many did not
 *   hammer MS   the same for so long
 *   copy        vreadfrom, vwriteto, readfrom, fence signal by us, by the peer: their errnos
 *   loop        copies in both directions until one fails: "began", then its errno
 *   touch       one load, unguarded
 * The user catches SIGBUS from before its first SCIF call, unless it is plain. */
#include "../c/t.h"

#include <setjmp.h>

#define LEN  (16 << 20)
#define MINE 0x10000000
#define RW   (SCIF_PROT_READ | SCIF_PROT_WRITE)

static sigjmp_buf env;
static volatile uint8_t *map;

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	(void)sig;
	(void)context;
	uintptr_t at = (uintptr_t)info->si_addr;

	if (at < (uintptr_t)map || at >= (uintptr_t)map + LEN)
		DIE("SIGBUS outside of the mapping, at %#zx", (size_t)at);
	siglongjmp(env, 1);
}

static void *serve(void *arg)
{
	const uint8_t *window = ((void **)arg)[0];
	int ep = (int)(intptr_t)((void **)arg)[1];
	char c;

	send_all(ep, "r", 1);
	while (scif_recv(ep, &c, 1, SCIF_RECV_BLOCK) == 1) {
		bool same = true;

		for (size_t i = 1; i < LEN; i++)
			same &= window[i] == window[0];
		send_all(ep, same ? "y" : "n", 1);
	}
	return NULL;
}

static void owner(int port, int byte)
{
	int l = listener_on(port, 8);
	char *p = pages(LEN / PG);

	memset(p, byte, LEN);
	printf("up\n");
	fflush(stdout);
	for (;;) {
		pthread_t t;
		void **arg = malloc(2 * sizeof *arg);
		int ep = accept_from(l, NULL);

		CHECK(scif_register(ep, p, LEN, 0, RW, SCIF_MAP_FIXED) == 0);
		arg[0] = p;
		arg[1] = (void *)(intptr_t)ep;
		CHECK(pthread_create(&t, NULL, serve, arg) == 0);
	}
}

static void look(long *faults, long *good)
{
	for (volatile size_t at = 0; at < LEN; at += PG)
		for (volatile int store = 0; store < 2; store++) {
			if (sigsetjmp(env, 1)) {
				++*faults;
				continue;
			}
			if (store)
				map[at] = 0xee;
			else
				(void)map[at];
			++*good;
		}
}

static void hammer(int ms)
{
	uint64_t end = now_us() + (uint64_t)ms * 1000;
	long faults = 0, good = 0;

	while (now_us() < end)
		look(&faults, &good);
	printf("%ld %ld\n", faults, good);
}

#define CODE(call) ((call) < 0 ? errno : 0)

static int copy_loop(int ep, char *buf)
{
	bool first = true;
	int rc = 0;

	while (!rc) {
		rc = CODE(scif_vreadfrom(ep, buf, LEN, 0, 0));
		if (!rc)
			rc = CODE(scif_vwriteto(ep, buf, LEN, 0, 0));
		if (!rc && first)
			printf("began\n");
		fflush(stdout);
		first = false;
	}
	return rc;
}

static void copies(int ep, char *buf)
{
	const int self = SCIF_FENCE_INIT_SELF | SCIF_SIGNAL_REMOTE;
	const int peer = SCIF_FENCE_INIT_PEER | SCIF_SIGNAL_LOCAL; /* the peer writes its own window (SCIF-123) */
	int a = CODE(scif_vreadfrom(ep, buf, 100, 5000, 0));
	int b = CODE(scif_vwriteto(ep, buf, LEN, 0, 0));
	int c = CODE(scif_readfrom(ep, MINE, LEN, 0, SCIF_RMA_SYNC));
	int d = CODE(scif_fence_signal(ep, 0, 0, 64, 1, self));

	printf("%d %d %d %d %d\n", a, b, c, d, CODE(scif_fence_signal(ep, 0, 0, 64, 1, peer)));
}

static void obey(int ep, const char *line, char *buf)
{
	long faults = 0, good = 0;
	char c = '?';

	if (!strcmp(line, "ask")) {
		send_all(ep, &c, 1);
		recv_all(ep, &c, 1);
		printf("%c\n", c);
	} else if (!strcmp(line, "look")) {
		look(&faults, &good);
		printf("%ld %ld\n", faults, good);
	} else if (!strncmp(line, "hammer ", 7)) {
		hammer(atoi(line + 7));
	} else if (!strcmp(line, "copy")) {
		copies(ep, buf);
	} else if (!strcmp(line, "loop")) {
		printf("%d\n", copy_loop(ep, buf));
	} else {
		printf("%d\n", map[0]);
	}
	fflush(stdout);
}

static void user(int node, int port, bool plain)
{
	struct sigaction sa = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};
	char line[64], *buf = pages(LEN / PG), *mine = pages(LEN / PG);

	if (!plain)
		CHECK(sigaction(SIGBUS, &sa, NULL) == 0);
	int ep = connect_to(node, port);

	recv_all(ep, line, 1); /* the window is registered */
	map = scif_mmap(NULL, LEN, RW, 0, ep, 0);
	CHECK(map != SCIF_MMAP_FAILED);
	memset(buf, map[0], LEN);
	CHECK(scif_register(ep, mine, LEN, MINE, RW, SCIF_MAP_FIXED) == MINE);
	CHECK(scif_vwriteto(ep, buf, LEN, 0, 0) == 0); /* the library's mapping exists, too */
	printf("ready\n");
	fflush(stdout);
	while (fgets(line, sizeof line, stdin)) {
		line[strcspn(line, "\n")] = 0;
		obey(ep, line, buf);
	}
}

int main(int argc, char **argv)
{
	signal(SIGPIPE, SIG_DFL);
	if (argc > 3 && !strcmp(argv[1], "owner"))
		owner(atoi(argv[2]), atoi(argv[3]));
	else if (argc > 3)
		user(atoi(argv[2]), atoi(argv[3]), argc > 4);
	return 0;
}
