/* Echo over SCIF.
 *   echo server PORT        on one node
 *   echo client NODE PORT   on another, or on the same one
 * Build: cc echo.c $(micemu scif --cflags) $(micemu scif --libs) -o echo */
#include <scif.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int die(const char *what)
{
	perror(what);
	return 1;
}

static int server(uint16_t port)
{
	struct scif_portID peer;
	scif_epd_t listener = scif_open(), ep;
	char buf[256];
	int n;

	if (listener < 0 || scif_bind(listener, port) < 0 || scif_listen(listener, 4) < 0)
		return die("listen");
	if (scif_accept(listener, &peer, &ep, SCIF_ACCEPT_SYNC) < 0)
		return die("accept");
	printf("connection from node %d port %d\n", peer.node, peer.port);
	/* One byte, waiting for it; then what else is there. */
	while ((n = scif_recv(ep, buf, 1, SCIF_RECV_BLOCK)) == 1) {
		n += scif_recv(ep, buf + 1, sizeof buf - 1, 0);
		scif_send(ep, buf, n, SCIF_SEND_BLOCK);
	}
	return scif_close(ep);
}

static int client(uint16_t node, uint16_t port)
{
	struct scif_portID to = {node, port};
	scif_epd_t ep = scif_open();
	char out[] = "hello over SCIF", in[sizeof out];

	if (ep < 0)
		return die("open");
	while (scif_connect(ep, &to) < 0)
		if (errno != ECONNREFUSED) /* nobody listens yet: try again on the same endpoint */
			return die("connect");
	if (scif_send(ep, out, sizeof out, SCIF_SEND_BLOCK) != sizeof out ||
	    scif_recv(ep, in, sizeof in, SCIF_RECV_BLOCK) != sizeof in)
		return die("exchange");
	printf("echoed: %s\n", in);
	return scif_close(ep) || strcmp(in, out);
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "server"))
		return server((uint16_t)atoi(argv[2]));
	if (argc == 4 && !strcmp(argv[1], "client"))
		return client((uint16_t)atoi(argv[2]), (uint16_t)atoi(argv[3]));
	fprintf(stderr, "usage: echo server PORT | echo client NODE PORT\n");
	return 2;
}
