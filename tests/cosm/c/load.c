/* Full load for a crash drill, both ends in C.
 *   load card PORT            on the card: serves windows and a byte sink, streams TCP to 172.31.1.254
 *   load host NODE PORT NBD   on the host: one thread each that streams, echoes, copies out and in, fences, waits in
 *                             recv and in poll, maps a window, writes and reads the disk, echoes TCP
 * The host end prints "loaded" once every thread did its work twice, and when the card has gone, one line
 * "NAME ERRNO ROUNDS" per thread. Exit status 0 when every call ended with an errno of the specification. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <scif.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define PAGE 4096
#define WINDOW (64 * PAGE)
#define PIECE (64 << 10)
#define TCP_PORT 7
#define DISK_SPAN (4 << 20)

enum kind { SINK = 's', ECHO = 'e', SILENT = 'q' };

static int node, port;
static const char *nbd_path;
static char *pages(size_t n)
{
	char *p = aligned_alloc(PAGE, n);

	if (!p)
		abort();
	memset(p, 0, n);
	return p;
}

/* --- the card ------------------------------------------------------------------------------------ */

static void *card_serve(void *arg)
{
	scif_epd_t ep = (scif_epd_t)(intptr_t)arg;
	char kind, *window = pages(WINDOW), *buf = pages(PIECE);
	off_t at = scif_register(ep, window, WINDOW, 0, SCIF_PROT_READ | SCIF_PROT_WRITE, 0);
	int n;

	if (at < 0 || scif_recv(ep, &kind, 1, SCIF_RECV_BLOCK) != 1 ||
	    scif_send(ep, &at, sizeof at, SCIF_SEND_BLOCK) != sizeof at)
		return NULL;
	if (kind == SINK)
		while (scif_recv(ep, buf, PIECE, SCIF_RECV_BLOCK) > 0)
			;
	else if (kind == ECHO)
		while ((n = scif_recv(ep, buf, 64, SCIF_RECV_BLOCK)) > 0 && scif_send(ep, buf, n, SCIF_SEND_BLOCK) == n)
			;
	else
		pause();
	return NULL;
}

static void *card_tcp(void *arg)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(TCP_PORT) };
	char *buf = pages(PIECE);

	(void)arg;
	inet_pton(AF_INET, "172.31.1.254", &to.sin_addr);
	for (;;) {
		int s = socket(AF_INET, SOCK_STREAM, 0);
		ssize_t n = 0;

		if (!connect(s, (struct sockaddr *)&to, sizeof to))
			while ((n = send(s, buf, PIECE, MSG_NOSIGNAL)) > 0 && recv(s, buf, n, MSG_WAITALL) == n)
				;
		close(s);
		poll(NULL, 0, 20); /* until the host's end listens */
	}
	return NULL;
}

static int card(void)
{
	scif_epd_t l = scif_open(), ep;
	struct scif_portID from;
	pthread_t t;

	if (scif_bind(l, (uint16_t)port) < 0 || scif_listen(l, 32) < 0)
		return perror("listen"), 1;
	pthread_create(&t, NULL, card_tcp, NULL);
	while (!scif_accept(l, &from, &ep, SCIF_ACCEPT_SYNC))
		pthread_create(&t, NULL, card_serve, (void *)(intptr_t)ep);
	return perror("accept"), 1;
}

/* --- the host ------------------------------------------------------------------------------------ */

struct worker {
	const char *name;
	enum kind kind;
	int (*step)(struct worker *w); /* errno of the call that failed, 0 to go on */
	int allowed[3];
	scif_epd_t ep;
	off_t there, here;
	char *mine;
	int fd;
	bool waits; /* its first call is the one that the crash ends */
	long rounds;
	int error;
	pthread_t thread;
};

static int failed(bool yes)
{
	return yes ? errno : 0;
}

static int stream(struct worker *w)
{
	return failed(scif_send(w->ep, w->mine, PIECE, SCIF_SEND_BLOCK) < 0);
}

static int echo(struct worker *w)
{
	return failed(scif_send(w->ep, w->mine, 64, SCIF_SEND_BLOCK) < 0 ||
		      scif_recv(w->ep, w->mine, 64, SCIF_RECV_BLOCK) < 0);
}

static int write_to(struct worker *w)
{
	return failed(scif_writeto(w->ep, w->here, WINDOW, w->there, SCIF_RMA_SYNC) < 0);
}

static int read_from(struct worker *w)
{
	return failed(scif_vreadfrom(w->ep, w->mine, WINDOW, w->there, 0) < 0);
}

static int fence(struct worker *w)
{
	return failed(scif_writeto(w->ep, w->here, PAGE, w->there, 0) < 0 ||
		      scif_fence_signal(w->ep, w->here, 1, w->there, 1,
					SCIF_FENCE_INIT_SELF | SCIF_SIGNAL_LOCAL | SCIF_SIGNAL_REMOTE) < 0);
}

/* A store to a mapping whose card has gone is a SIGBUS (SCIF-102); the mapping goes like any other. */
static _Thread_local sigjmp_buf on_loss;

static void lost(int sig)
{
	(void)sig;
	siglongjmp(on_loss, 1);
}

static int remap(struct worker *w)
{
	volatile char *p = scif_mmap(NULL, WINDOW, SCIF_PROT_READ | SCIF_PROT_WRITE, 0, w->ep, w->there);
	int error = 0;

	if (p == SCIF_MMAP_FAILED)
		return errno;
	if (sigsetjmp(on_loss, 1))
		error = ECONNRESET;
	else
		p[0] = 1;
	return scif_munmap((void *)p, WINDOW) < 0 ? errno : error;
}

static int blocked_recv(struct worker *w)
{
	return failed(scif_recv(w->ep, w->mine, 1, SCIF_RECV_BLOCK) < 0);
}

/* The hang-up of poll stands for the errno of the next call. */
static int blocked_poll(struct worker *w)
{
	struct scif_pollepd p = { .epd = w->ep, .events = SCIF_POLLIN };

	if (scif_poll(&p, 1, -1) != 1 || !(p.revents & SCIF_POLLHUP))
		return EPROTO;
	return failed(scif_send(w->ep, w->mine, 1, 0) < 0);
}

struct __attribute__((packed)) nbd_request {
	uint32_t magic;
	uint16_t flags, type;
	uint64_t cookie, offset;
	uint32_t length;
};

static bool all(int fd, void *buf, size_t n, bool out)
{
	for (char *p = buf; n;) {
		ssize_t k = out ? send(fd, p, n, MSG_NOSIGNAL) : recv(fd, p, n, 0);

		if (k <= 0) {
			errno = k ? errno : ECONNRESET;
			return false;
		}
		p += k;
		n -= (size_t)k;
	}
	return true;
}

/* One write and one read of the disk through the card's virtio driver. */
static int disk(struct worker *w)
{
	char reply[16];

	for (int type = 1; type >= 0; type--) {
		uint64_t at = (uint64_t)w->rounds * PIECE % DISK_SPAN;
		struct nbd_request r = { htobe32(0x25609513), 0, htobe16(type), 1, htobe64(at), htobe32(PIECE) };

		if (!all(w->fd, &r, sizeof r, true) || (type && !all(w->fd, w->mine, PIECE, true)) ||
		    !all(w->fd, reply, sizeof reply, false) || (!type && !all(w->fd, w->mine, PIECE, false)))
			return errno;
	}
	return 0;
}

static void disk_open(struct worker *w)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX };
	struct __attribute__((packed)) { uint32_t flags; char magic[8]; uint32_t option, length; } hello = {
		htobe32(3), "IHAVEOPT", htobe32(1), 0
	};
	char greeting[18], export[10];

	strncpy(at.sun_path, nbd_path, sizeof at.sun_path - 1);
	w->fd = socket(AF_UNIX, SOCK_STREAM, 0);
	if (connect(w->fd, (struct sockaddr *)&at, sizeof at) || !all(w->fd, greeting, sizeof greeting, false) ||
	    !all(w->fd, &hello, sizeof hello, true) || !all(w->fd, export, sizeof export, false)) {
		perror(nbd_path);
		exit(1);
	}
}

/* Echoes what the card streams. The card's end vanishes without a word: that is no error of TCP for a long time,
 * so this thread is asked to end when the others have. */
static int tcp(struct worker *w)
{
	ssize_t n = recv(w->fd, w->mine, PIECE, 0);

	return n <= 0 || send(w->fd, w->mine, (size_t)n, MSG_NOSIGNAL) != n ? ESHUTDOWN : 0;
}

static void tcp_open(struct worker *w)
{
	struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = htons(TCP_PORT) };
	int one = 1, l = socket(AF_INET, SOCK_STREAM, 0);

	setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(l, (struct sockaddr *)&here, sizeof here) || listen(l, 1)) {
		perror("TCP");
		exit(1);
	}
	w->fd = accept(l, NULL, NULL);
	close(l);
}

static void scif_start(struct worker *w)
{
	struct scif_portID to = { (uint16_t)node, (uint16_t)port };
	char kind = (char)w->kind;

	w->ep = scif_open();
	while (scif_connect(w->ep, &to) < 0)
		if (errno != ECONNREFUSED) {
			perror("connect");
			exit(1);
		} else {
			poll(NULL, 0, 5); /* the card's end does not listen yet */
		}
	w->here = scif_register(w->ep, w->mine, WINDOW, 0, SCIF_PROT_READ | SCIF_PROT_WRITE, 0);
	if (w->here < 0 || scif_send(w->ep, &kind, 1, SCIF_SEND_BLOCK) != 1 ||
	    scif_recv(w->ep, &w->there, sizeof w->there, SCIF_RECV_BLOCK) != sizeof w->there) {
		perror(w->name);
		exit(1);
	}
}

static struct worker workers[] = {
	{ "stream", SINK, stream, { ECONNRESET } },
	{ "echo", ECHO, echo, { ECONNRESET } },
	{ "writeto", SILENT, write_to, { ECONNRESET, EIO } },
	{ "vreadfrom", SILENT, read_from, { ECONNRESET, EIO } },
	{ "fence", SILENT, fence, { ECONNRESET, ENODEV, EIO } },
	{ "mmap", SILENT, remap, { ECONNRESET } },
	{ "recv", SILENT, blocked_recv, { ECONNRESET }, .waits = true },
	{ "poll", SILENT, blocked_poll, { ECONNRESET }, .waits = true },
	{ "disk", 0, disk, { ECONNRESET, EPIPE, EIO } },
	{ "tcp", 0, tcp, { ESHUTDOWN } },
};
#define WORKERS ((int)(sizeof workers / sizeof *workers))

static void *work(void *arg)
{
	struct worker *w = arg;

	while (!(w->error = w->step(w)))
		__atomic_add_fetch(&w->rounds, 1, __ATOMIC_RELAXED);
	return NULL;
}

static bool loaded(void)
{
	for (int i = 0; i < WORKERS; i++)
		if (!workers[i].waits && __atomic_load_n(&workers[i].rounds, __ATOMIC_RELAXED) < 2)
			return false;
	return true;
}

static int host(void)
{
	int status = 0;

	signal(SIGBUS, lost);
	for (struct worker *w = workers; w < workers + WORKERS; w++) {
		w->mine = pages(WINDOW);
		if (w->kind)
			scif_start(w);
		else if (w->step == disk)
			disk_open(w);
		else
			tcp_open(w);
		pthread_create(&w->thread, NULL, work, w);
	}
	while (!loaded())
		poll(NULL, 0, 5);
	puts("loaded");
	fflush(stdout);
	for (struct worker *w = workers; w < workers + WORKERS; w++) {
		bool right = false;

		if (w->step == tcp)
			shutdown(w->fd, SHUT_RDWR);
		pthread_join(w->thread, NULL);
		for (int i = 0; i < 3 && w->error; i++)
			right |= w->error == w->allowed[i];
		printf("%s %s %ld\n", w->name, w->error ? strerrorname_np(w->error) : "0", w->rounds);
		if (w->kind && scif_close(w->ep))
			right = false;
		if (!right)
			status = 1;
	}
	return status;
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "card")) {
		port = atoi(argv[2]);
		return card();
	}
	if (argc == 5 && !strcmp(argv[1], "host")) {
		node = atoi(argv[2]);
		port = atoi(argv[3]);
		nbd_path = argv[4];
		return host();
	}
	fprintf(stderr, "usage: load card PORT | load host NODE PORT NBD\n");
	return 2;
}
