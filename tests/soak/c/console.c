/* Records over the console, both ways: the card answers each one that it has checked with one of its own.
 *
 * A window of records bounds what is on its way: the console waits only for a reader who keeps reading. */
#include "soak.h"

#include <pthread.h>
#include <semaphore.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <termios.h>
#include <unistd.h>

#define MOST   1000u
#define WINDOW 16
#define READY  "\002soak\002" /* the shell, which echoes the command, never prints that */

struct head {
	uint32_t n, wrong; /* n = 0: the last one; wrong: records that the card did not find right */
};

struct end {
	struct link link;
	struct row *row;
	uint64_t seed;
	sem_t room;
};

/* Input of the card goes in messages of a type byte and a length (docs/console.md). */
static ssize_t typed(int fd, const void *buf, size_t n)
{
	struct __attribute__((packed)) {
		uint8_t type;
		uint16_t n;
		char data[MOST];
	} m = {1, 0, ""};

	m.n = (uint16_t)(n < MOST ? n : MOST);
	memcpy(m.data, buf, m.n);
	struct link raw = {tcp_link.send, tcp_link.recv, fd};

	put(&raw, &m, 3u + m.n);
	return m.n;
}

static void *host_in(void *arg)
{
	struct end *e = arg;
	char data[MOST];
	uint64_t at = 0;
	struct head h;

	for (;;) {
		get(&e->link, &h, sizeof h);
		if (h.wrong)
			wrong(e->row, "the card has received %u wrong records", h.wrong);
		if (!h.n)
			return NULL;
		if (h.n > MOST) {
			wrong(e->row, "a record of %u bytes at %lu", h.n, at);
			exit(1);
		}
		get(&e->link, data, h.n);
		if (differs(data, h.n, ~e->seed, at) < h.n)
			wrong(e->row, "wrong bytes from the card at %lu", at);
		at += h.n;
		count(&e->row->bytes, 2 * h.n);
		count(&e->row->rounds, 1);
		sem_post(&e->room);
	}
}

static void wait_ready(const struct end *e)
{
	for (size_t have = 0; READY[have];) {
		char c;

		get(&e->link, &c, 1);
		have = c == READY[have] ? have + 1 : c == READY[0];
	}
}

void console_host(const char *path, const char *command, struct row *row, uint64_t seed)
{
	struct sockaddr_un at = {.sun_family = AF_UNIX};
	struct end e = {.link = {typed, tcp_link.recv, socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)},
			.row = row,
			.seed = seed};
	struct __attribute__((packed)) {
		struct head head;
		char data[MOST];
	} m = {{0, 0}, ""};
	uint64_t state = seed, sent = 0;
	pthread_t in;

	strncpy(at.sun_path, path, sizeof at.sun_path - 1);
	if (connect(e.link.fd, (struct sockaddr *)&at, sizeof at))
		die(path);
	put(&e.link, command, strlen(command));
	put(&e.link, "\r", 1);
	wait_ready(&e);
	sem_init(&e.room, 0, WINDOW);
	pthread_create(&in, NULL, host_in, &e);
	do {
		m.head.n = seen(&page->stop) ? 0 : 1 + dice(&state) % MOST;
		pattern(m.data, m.head.n, seed, sent);
		sem_wait(&e.room);
		put(&e.link, &m, sizeof m.head + m.head.n);
		sent += m.head.n;
	} while (m.head.n);
	pthread_join(in, NULL);
	close(e.link.fd);
}

void console_card(uint64_t seed)
{
	const struct link in = {tty_link.send, tty_link.recv, 0}, out = {tty_link.send, tty_link.recv, 1};
	struct __attribute__((packed)) {
		struct head head;
		char data[MOST];
	} m;
	uint64_t at = 0;
	uint32_t bad = 0;
	struct termios t, old;

	tcgetattr(0, &old);
	t = old;
	cfmakeraw(&t);
	tcsetattr(0, TCSANOW, &t);
	put(&out, READY, strlen(READY));
	do {
		get(&in, &m.head, sizeof m.head);
		if (m.head.n > MOST) {
			m.head.n = 0;
			bad++;
		}
		get(&in, m.data, m.head.n);
		bad += differs(m.data, m.head.n, seed, at) < m.head.n;
		m.head.wrong = bad;
		pattern(m.data, m.head.n, ~seed, at);
		at += m.head.n;
		put(&out, &m, sizeof m.head + m.head.n);
	} while (m.head.n);
	tcsetattr(0, TCSADRAIN, &old);
}
