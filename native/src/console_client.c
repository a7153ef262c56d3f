/* Clients of a card's console: programs of the host over a Unix socket (VOP-60; messages: mic/console.h). */
#define _GNU_SOURCE
#include "console_client.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "mic/barrier.h"

#define OUT      262144u /* bytes that a client may lag behind */
#define RATE     32768u  /* bytes that a client must take in CON_STALL, or it is not waited for */
#define MSG_HEAD 3u

static const char gap_note[] = "\r\n[micemu: output skipped, it is in the log]\r\n";

struct con_client {
	int fd;
	bool gap; /* bytes were skipped, and the note is still to come */
	uint32_t out_first, out_len;
	uint64_t sent;       /* bytes taken since it came */
	uint64_t wait_begun; /* the card waits for this client: since when ... */
	uint64_t wait_sent;  /* ... and `sent` at that time */
	uint8_t head[MSG_HEAD];
	uint32_t head_len; /* bytes of the message header read so far */
	uint32_t left;     /* bytes of the message body to come */
	uint8_t size[4];   /* body of a size message */
	uint8_t out[OUT];
};

int con_watch(int epoll_fd, int fd, uint32_t events)
{
	struct epoll_event ev = {.events = events, .data.fd = fd};

	return fd < 0 ? 0 : epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &ev);
}

void con_clients_init(struct con_clients *cs, int listen_fd, int epoll_fd, struct mic_con_stats *stats)
{
	*cs = (struct con_clients){.listen_fd = listen_fd, .epoll_fd = epoll_fd, .group = -1, .stats = stats};
}

static void drop(struct con_clients *cs, struct con_client **slot)
{
	close((*slot)->fd); /* leaves the epoll set by itself */
	free(*slot);
	*slot = NULL;
	mic_store_relaxed(&cs->stats->clients, cs->stats->clients - 1u);
}

void con_clients_fini(struct con_clients *cs)
{
	for (unsigned i = 0; i < CON_CLIENTS; i++)
		if (cs->client[i])
			drop(cs, &cs->client[i]);
}

/* --- output ----------------------------------------------------------------------------------- */

/* Send what a client still has to get. False: it is gone. */
static bool flush(struct con_client *c)
{
	while (c->out_len) {
		uint32_t part = OUT - c->out_first < c->out_len ? OUT - c->out_first : c->out_len;
		ssize_t n = send(c->fd, c->out + c->out_first, part, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n < 0)
			return errno == EAGAIN || errno == EINTR || errno == ENOBUFS;
		c->out_first = (c->out_first + (uint32_t)n) % OUT;
		c->out_len -= (uint32_t)n;
		c->sent += (uint64_t)n;
	}
	return true;
}

static void queue_bytes(struct con_client *c, const uint8_t *from, uint32_t len)
{
	uint32_t at = (c->out_first + c->out_len) % OUT;
	uint32_t part = OUT - at < len ? OUT - at : len;

	memcpy(c->out + at, from, part);
	memcpy(c->out, from + part, len - part);
	c->out_len += len;
}

static void show(struct con_clients *cs, struct con_client **slot, const uint8_t *from, uint32_t len)
{
	struct con_client *c = *slot;
	uint32_t note = c->gap ? sizeof gap_note - 1 : 0;

	/* Once it lags, a client gets nothing until half of its buffer is free: one gap, not many. */
	if (len + note > OUT - c->out_len || (c->gap && c->out_len > OUT / 2)) {
		c->gap = true;
		mic_count(&cs->stats->client_lost, len);
		return;
	}
	if (c->gap)
		queue_bytes(c, (const uint8_t *)gap_note, note);
	c->gap = false;
	queue_bytes(c, from, len);
	if (!flush(c))
		drop(cs, slot);
}

/* Has this client room for another piece, or is it not waited for? A terminal that shows a large file
 * slows the card down, as a serial line would; one that stops, or trickles, does not. */
static bool ready(struct con_client *c)
{
	if (c->gap || OUT - c->out_len >= CON_PIECE)
		return true;
	uint64_t now = mic_now_ns(), limit = CON_STALL * 1000000ull;

	if (!c->wait_begun || now - c->wait_begun >= 2 * limit) {
		c->wait_begun = now;
		c->wait_sent = c->sent;
	} else if (now - c->wait_begun >= limit) {
		c->gap = c->sent - c->wait_sent < RATE;
		c->wait_begun = c->gap ? 0 : now;
		c->wait_sent = c->sent;
	}
	return c->gap;
}

bool con_clients_ready(struct con_clients *cs)
{
	bool all = true;

	for (unsigned i = 0; i < CON_CLIENTS; i++)
		all &= !cs->client[i] || ready(cs->client[i]);
	return all;
}

void con_clients_show(struct con_clients *cs, const uint8_t *from, uint32_t len)
{
	for (uint32_t i = 0; i < len; i++)
		cs->history[(cs->history_end + i) % CON_HISTORY] = from[i];
	cs->history_end += len;
	for (unsigned i = 0; i < CON_CLIENTS; i++)
		if (cs->client[i])
			show(cs, &cs->client[i], from, len);
}

/* --- input ------------------------------------------------------------------------------------ */

static int taken(ssize_t n)
{
	return n > 0 ? 1 : n < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
}

/* A message header or a window size: small, collected byte by byte. 1 progress, 0 nothing, -1 end. */
static int read_control(struct con_clients *cs, struct con_client *c)
{
	bool head = c->head_len < MSG_HEAD;
	uint8_t *to = head ? c->head + c->head_len : c->size + sizeof c->size - c->left;
	ssize_t n = recv(c->fd, to, head ? MSG_HEAD - c->head_len : c->left, MSG_DONTWAIT);

	if (n <= 0)
		return taken(n);
	if (head) {
		c->head_len += (uint32_t)n;
		if (c->head_len < MSG_HEAD)
			return 1;
		c->left = c->head[1] | (uint32_t)c->head[2] << 8;
		if (c->head[0] == MIC_CON_MSG_SIZE ? c->left != sizeof c->size
						   : c->head[0] != MIC_CON_MSG_INPUT)
			return -1;
	} else {
		c->left -= (uint32_t)n;
		if (!c->left) {
			cs->size = (uint32_t)(c->size[0] | c->size[1] << 8) << 16 | c->size[2] |
				   (uint32_t)c->size[3] << 8;
			cs->resized = true;
		}
	}
	if (!c->left)
		c->head_len = 0;
	return 1;
}

static int read_input(struct con_clients *cs, struct con_client *c, struct con_input *in)
{
	uint8_t *at;

	if (c->head_len < MSG_HEAD || c->head[0] == MIC_CON_MSG_SIZE)
		return read_control(cs, c);
	uint32_t room = con_input_space(in, &at);

	if (!room)
		return 0;
	ssize_t n = recv(c->fd, at, room < c->left ? room : c->left, MSG_DONTWAIT);

	if (n <= 0)
		return taken(n);
	in->len += (uint32_t)n;
	c->left -= (uint32_t)n;
	if (!c->left)
		c->head_len = 0;
	return 1;
}

int con_clients_serve(struct con_clients *cs, struct con_input *in)
{
	int moved = 0;

	for (unsigned i = 0; i < CON_CLIENTS; i++) {
		struct con_client *c = cs->client[i];

		if (!c)
			continue;
		int rc = flush(c) ? read_input(cs, c, in) : -1;

		if (rc < 0)
			drop(cs, &cs->client[i]);
		moved |= rc != 0;
	}
	return moved;
}

/* --- who may come ----------------------------------------------------------------------------- */

/* Has the peer this supplementary group? */
static bool has_group(int fd, gid_t group)
{
	socklen_t len = NGROUPS_MAX * sizeof(gid_t);
	gid_t *groups = malloc(len);
	bool found = false;

	if (groups && getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, &len) == 0)
		for (size_t i = 0; i < len / sizeof *groups; i++)
			found |= groups[i] == group;
	free(groups);
	return found;
}

/* Only the user who runs the card, root, and the members of the instance's group: mic_emu/peers.py. */
static bool welcome(const struct con_clients *cs, int fd)
{
	struct ucred peer;
	socklen_t len = sizeof peer;

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) < 0)
		return false;
	if (peer.uid == 0 || peer.uid == geteuid())
		return true;
	return cs->group >= 0 && (peer.gid == (gid_t)cs->group || has_group(fd, (gid_t)cs->group));
}

static void show_history(struct con_clients *cs, struct con_client **slot)
{
	uint64_t n = cs->history_end < CON_HISTORY ? cs->history_end : CON_HISTORY;
	uint32_t from = (uint32_t)((cs->history_end - n) % CON_HISTORY);
	uint32_t part = CON_HISTORY - from < n ? CON_HISTORY - from : (uint32_t)n;

	queue_bytes(*slot, cs->history + from, part);
	queue_bytes(*slot, cs->history, (uint32_t)n - part);
	if (!flush(*slot))
		drop(cs, slot);
}

int con_clients_accept(struct con_clients *cs)
{
	struct con_client **slot = NULL;
	int fd = cs->listen_fd < 0 ? -1 : accept4(cs->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

	if (fd < 0)
		return 0;
	for (unsigned i = 0; i < CON_CLIENTS && !slot; i++)
		if (!cs->client[i])
			slot = &cs->client[i];
	struct con_client *c = slot && welcome(cs, fd) ? calloc(1, sizeof *c) : NULL;

	if (!c || con_watch(cs->epoll_fd, fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET) < 0) {
		mic_count(&cs->stats->clients_refused, 1u);
		free(c);
		close(fd);
		return 1;
	}
	c->fd = fd;
	*slot = c;
	mic_count(&cs->stats->clients, 1u);
	mic_count(&cs->stats->clients_seen, 1u);
	show_history(cs, slot);
	return 1;
}
