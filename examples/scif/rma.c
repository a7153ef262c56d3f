/* One-sided copies: the server exposes a window and watches a flag in its own memory; the client
 * writes the window, then signals with a fence. A copy of this size is made by a DMA channel while
 * the client goes on (`micemu dma mic0`); the fence keeps the order all the same.
 *   rma server PORT | rma client NODE PORT */
#include <scif.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE 4096
#define DATA (512 * PAGE)
#define SIZE (DATA + PAGE) /* the last page holds the flag */

static int die(const char *what)
{
	perror(what);
	return 1;
}

static int server(uint16_t port)
{
	struct scif_portID peer;
	scif_epd_t listener = scif_open(), ep;
	char *mem = aligned_alloc(PAGE, SIZE);

	if (!mem || listener < 0 || scif_bind(listener, port) < 0 || scif_listen(listener, 1) < 0 ||
	    scif_accept(listener, &peer, &ep, SCIF_ACCEPT_SYNC) < 0)
		return die("accept");
	memset(mem, 0, SIZE);
	off_t at = scif_register(ep, mem, SIZE, 0, SCIF_PROT_READ | SCIF_PROT_WRITE, 0);

	if (at == SCIF_REGISTER_FAILED)
		return die("register");
	scif_send(ep, &at, sizeof at, SCIF_SEND_BLOCK);
	uint64_t *flag = (uint64_t *)(mem + DATA);

	while (__atomic_load_n(flag, __ATOMIC_ACQUIRE) != 1)
		sched_yield();
	/* The flag was written after all data: nothing of it can be missing. */
	for (int i = 0; i < DATA; i++)
		if (mem[i] != (char)i)
			return fprintf(stderr, "byte %d is wrong\n", i), 1;
	printf("%d bytes arrived before their flag\n", DATA);
	scif_send(ep, "k", 1, SCIF_SEND_BLOCK);
	return scif_close(ep);
}

static int client(uint16_t node, uint16_t port)
{
	struct scif_portID to = {node, port};
	scif_epd_t ep = scif_open();
	char *mem = aligned_alloc(PAGE, DATA), k;
	off_t there;

	if (!mem || ep < 0)
		return die("open");
	while (scif_connect(ep, &to) < 0)
		if (errno != ECONNREFUSED)
			return die("connect");
	for (int i = 0; i < DATA; i++)
		mem[i] = (char)i;
	off_t here = scif_register(ep, mem, DATA, 0, SCIF_PROT_READ | SCIF_PROT_WRITE, 0);

	if (here == SCIF_REGISTER_FAILED ||
	    scif_recv(ep, &there, sizeof there, SCIF_RECV_BLOCK) != sizeof there)
		return die("windows");
	if (scif_writeto(ep, here, DATA, there, 0) < 0)
		return die("writeto");
	if (scif_fence_signal(ep, 0, 0, there + DATA, 1, SCIF_FENCE_INIT_SELF | SCIF_SIGNAL_REMOTE) < 0)
		return die("signal");
	if (scif_recv(ep, &k, 1, SCIF_RECV_BLOCK) != 1)
		return die("answer");
	printf("written\n");
	return scif_close(ep);
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "server"))
		return server((uint16_t)atoi(argv[2]));
	if (argc == 4 && !strcmp(argv[1], "client"))
		return client((uint16_t)atoi(argv[2]), (uint16_t)atoi(argv[3]));
	fprintf(stderr, "usage: rma server PORT | rma client NODE PORT\n");
	return 2;
}
