/* Ping-pong through a mapped window: no call at all in the loop, as the fastest programs do it.
 *   flag server PORT | flag client NODE PORT */
#include <sched.h>
#include <scif.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PAGE   4096
#define ROUNDS 20000ull

static int die(const char *what)
{
	perror(what);
	return 1;
}

/* Look for a while, then let others run: the peer may need this very CPU. */
static void await(const uint64_t *word, uint64_t value)
{
	for (unsigned looks = 0; __atomic_load_n(word, __ATOMIC_ACQUIRE) != value; looks++)
		if (looks > 1000)
			sched_yield();
}

static int server(uint16_t port)
{
	struct scif_portID peer;
	scif_epd_t listener = scif_open(), ep;
	uint64_t *mem = aligned_alloc(PAGE, PAGE);

	if (!mem || listener < 0 || scif_bind(listener, port) < 0 || scif_listen(listener, 1) < 0 ||
	    scif_accept(listener, &peer, &ep, SCIF_ACCEPT_SYNC) < 0)
		return die("accept");
	memset(mem, 0, PAGE);
	off_t at = scif_register(ep, mem, PAGE, 0, SCIF_PROT_READ | SCIF_PROT_WRITE, 0);

	if (at == SCIF_REGISTER_FAILED)
		return die("register");
	scif_send(ep, &at, sizeof at, SCIF_SEND_BLOCK);
	for (uint64_t i = 1; i <= ROUNDS; i++) {
		await(&mem[0], i);
		__atomic_store_n(&mem[8], i, __ATOMIC_RELEASE);
	}
	scif_recv(ep, &at, 1, SCIF_RECV_BLOCK); /* until the client has closed */
	return scif_close(ep);
}

static int client(uint16_t node, uint16_t port)
{
	struct scif_portID to = {node, port};
	scif_epd_t ep = scif_open();
	struct timespec a, b;
	off_t there;

	if (ep < 0)
		return die("open");
	while (scif_connect(ep, &to) < 0)
		if (errno != ECONNREFUSED)
			return die("connect");
	if (scif_recv(ep, &there, sizeof there, SCIF_RECV_BLOCK) != sizeof there)
		return die("window");
	uint64_t *mem = scif_mmap(NULL, PAGE, SCIF_PROT_READ | SCIF_PROT_WRITE, 0, ep, there);

	if (mem == SCIF_MMAP_FAILED)
		return die("mmap");
	clock_gettime(CLOCK_MONOTONIC, &a);
	for (uint64_t i = 1; i <= ROUNDS; i++) {
		__atomic_store_n(&mem[0], i, __ATOMIC_RELEASE);
		await(&mem[8], i);
	}
	clock_gettime(CLOCK_MONOTONIC, &b);
	double ns = (double)(b.tv_sec - a.tv_sec) * 1e9 + (double)(b.tv_nsec - a.tv_nsec);

	printf("round trip %.0f ns\n", ns / (double)ROUNDS);
	scif_munmap(mem, PAGE);
	return scif_close(ep);
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "server"))
		return server((uint16_t)atoi(argv[2]));
	if (argc == 4 && !strcmp(argv[1], "client"))
		return client((uint16_t)atoi(argv[2]), (uint16_t)atoi(argv[3]));
	fprintf(stderr, "usage: flag server PORT | flag client NODE PORT\n");
	return 2;
}
