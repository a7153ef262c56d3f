/* Verified load for the integrity soak.
 *   soak card PAGE SEED PORT            on the card: serves SCIF, streams TCP with 172.31.1.254
 *   soak console SEED                   on the card's console
 *   soak host PAGE SEED PORT NBD SOCK COMMAND   on the host: everything else; COMMAND is typed at the console
 * SOCK Prints "loaded" when every connection is there; ends when the page says stop, with status 0 if all
 * calls worked. What was wrong is counted in the page and said on stderr. */
#include "soak.h"

#include <arpa/inet.h>
#include <poll.h>
#include <pthread.h>
#include <scif.h>
#include <sys/socket.h>
#include <unistd.h>

#define TCP_PORT 7
#define CARD     1
#define DISKS    3

enum kind { MESSAGES = 'm', CARD_IS_PASSIVE = 'p', CARD_IS_ACTIVE = 'a' };

static uint64_t seed;
static int port;

static void both_ways(struct link link, int fd, const char *name, uint64_t mine, uint64_t theirs,
		      const char *side)
{
	char out[24], in[24];
	struct duplex d = {link, NULL, NULL, mine, theirs};
	pthread_t t;

	snprintf(out, sizeof out, "%s from %s", name, side);
	snprintf(in, sizeof in, "%s at %s", name, side);
	d.link.fd = fd;
	d.out = row_named(out);
	d.in = row_named(in);
	pthread_create(&t, NULL, duplex_out, &d);
	duplex_in(&d);
	pthread_join(t, NULL);
}

/* --- the card ------------------------------------------------------------------------------------------ */

static void *card_serve(void *arg)
{
	const int ep = (int)(intptr_t)arg;
	const struct link l = {scif_link.send, scif_link.recv, ep};
	char kind;

	get(&l, &kind, 1);
	if (kind == MESSAGES)
		both_ways(scif_link, ep, "messages", seed + 1, seed + 2, "card");
	else if (kind == CARD_IS_ACTIVE)
		rma_active(ep, row_named("rma by card"), seed + 3);
	else
		rma_passive(ep);
	return NULL;
}

static void *card_tcp(void *arg)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(TCP_PORT)};
	int s = socket(AF_INET, SOCK_STREAM, 0);

	(void)arg;
	inet_pton(AF_INET, "172.31.1.254", &to.sin_addr);
	while (connect(s, (struct sockaddr *)&to, sizeof to)) {
		close(s);
		poll(NULL, 0, 20); /* until the host's end listens */
		s = socket(AF_INET, SOCK_STREAM, 0);
	}
	both_ways(tcp_link, s, "tcp", seed + 4, seed + 5, "card");
	close(s);
	return NULL;
}

static void card(void)
{
	void *(*const work)(void *) = card_serve;
	int l = scif_open(), ep[3];
	struct scif_portID from;
	pthread_t t[4];

	if (scif_bind(l, (uint16_t)port) < 0 || scif_listen(l, 8) < 0)
		die("listen");
	pthread_create(&t[3], NULL, card_tcp, NULL);
	for (int i = 0; i < 3; i++) {
		if (scif_accept(l, &from, &ep[i], SCIF_ACCEPT_SYNC) < 0)
			die("accept");
		pthread_create(&t[i], NULL, work, (void *)(intptr_t)ep[i]);
	}
	for (int i = 0; i < 4; i++)
		pthread_join(t[i], NULL);
}

/* --- the host ------------------------------------------------------------------------------------------ */

struct host {
	const char *nbd, *console, *command;
};

static int connected(enum kind kind)
{
	struct scif_portID to = {CARD, (uint16_t)port};
	struct link l = scif_link;
	char c = (char)kind;

	l.fd = scif_open();
	while (scif_connect(l.fd, &to) < 0)
		if (errno != ECONNREFUSED)
			die("connect");
		else
			poll(NULL, 0, 5); /* the card's end does not listen yet */
	put(&l, &c, 1);
	return l.fd;
}

static void *messages(void *arg)
{
	int ep = connected(MESSAGES);

	(void)arg;
	both_ways(scif_link, ep, "messages", seed + 2, seed + 1, "host");
	scif_close(ep);
	return NULL;
}

static void *rma_by_host(void *arg)
{
	int ep = connected(CARD_IS_PASSIVE);

	(void)arg;
	rma_active(ep, row_named("rma by host"), seed + 6);
	scif_close(ep);
	return NULL;
}

static void *rma_by_card(void *arg)
{
	int ep = connected(CARD_IS_ACTIVE);

	(void)arg;
	rma_passive(ep);
	scif_close(ep);
	return NULL;
}

static void *tcp(void *arg)
{
	struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(TCP_PORT)};
	int one = 1, l = socket(AF_INET, SOCK_STREAM, 0), s;

	(void)arg;
	setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(l, (struct sockaddr *)&here, sizeof here) || listen(l, 1) || (s = accept(l, NULL, NULL)) < 0)
		die("TCP");
	close(l);
	both_ways(tcp_link, s, "tcp", seed + 5, seed + 4, "host");
	close(s);
	return NULL;
}

static void *console(void *arg)
{
	const struct host *h = arg;

	console_host(h->console, h->command, row_named("console"), seed + 7);
	return NULL;
}

static bool loaded(void)
{
	for (const struct row *r = page->row; r < page->row + ROWS; r++)
		if (r->name[0] && r->name[0] != '(' && !seen(&r->rounds))
			return false;
	return true;
}

static void host(const struct host *h)
{
	void *(*const work[])(void *) = {messages, rma_by_host, rma_by_card, tcp, console};
	struct disk_span span[DISKS];
	pthread_t t[5 + DISKS];

	for (int i = 0; i < 5; i++)
		pthread_create(&t[i], NULL, work[i], (void *)(uintptr_t)h);
	for (int i = 0; i < DISKS; i++) {
		char name[24];

		snprintf(name, sizeof name, "disk %d", i);
		span[i] = (struct disk_span){h->nbd, row_named(name), (seed + 8 + (uint64_t)i) << 52,
					     8192u * (unsigned)i};
		pthread_create(&t[5 + i], NULL, disk_work, &span[i]);
	}
	while (!loaded())
		poll(NULL, 0, 5); /* other threads and the card's programs begin */
	puts("loaded");
	fflush(stdout);
	for (int i = 0; i < 5 + DISKS; i++)
		pthread_join(t[i], NULL);
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "console")) {
		console_card(strtoull(argv[2], NULL, 0) + 7);
		return 0;
	}
	if (argc >= 5) {
		page_open(argv[2]);
		seed = strtoull(argv[3], NULL, 0);
		port = atoi(argv[4]);
	}
	if (argc == 5 && !strcmp(argv[1], "card"))
		return card(), 0;
	if (argc == 8 && !strcmp(argv[1], "host"))
		return host(&(struct host){argv[5], argv[6], argv[7]}), 0;
	fprintf(stderr, "usage: soak card|host|console ...\n");
	return 2;
}
