/* virtio-console device half: card <-> pty, log file and clients of the host (VOP 8.6, VOP-60). */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "mic/barrier.h"
#include "mic/console.h"
#include "mic/iov.h"

enum { TO_CARD = 0, FROM_CARD = 1 };

#define PIECE       4096u
#define HISTORY     4096u /* what a new client is shown */
#define INPUT       8192u /* typed bytes that wait for buffers of the card */
#define CLIENTS     8u
#define CLIENT_OUT  262144u /* bytes that a client may lag behind */
#define CLIENT_RATE 32768u  /* bytes that a client must take in STALL_MS, or it is not waited for */
#define MSG_HEAD    3u
#define CHAIN_SEGS  256u
#define STALL_MS    1000 /* a reader that takes nothing for so long is not waited for */
#define EVENTS      16
/* At most this many passes before the other events get a look, so that nobody starves control_fd. */
#define PASSES 64u

static const char gap_note[] = "\r\n[micemu: output skipped, it is in the log]\r\n";

struct client {
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
	uint8_t *out;
};

struct mic_con_dev {
	struct mic_vdev *dev;
	int pty_fd, log_fd, listen_fd, epoll_fd;
	int64_t group; /* whose members are welcome, -1: nobody's */
	struct mic_con_stats stats;
	struct client clients[CLIENTS];
	/* The chain whose bytes are being handed out, and the piece that is. */
	struct mic_chain chain;
	struct iovec iov[CHAIN_SEGS];
	bool busy;
	uint64_t chain_at;
	uint8_t piece[PIECE];
	uint32_t piece_len, pty_at; /* [pty_at, piece_len) is still owed to the pty */
	uint64_t stalled_at;        /* when the pty stopped taking bytes, 0 = it does not stall */
	bool waiting;               /* the next piece waits for the pty or a client */
	bool pty_dead;              /* stalled for too long: nobody waits for it until it takes again */
	uint8_t history[HISTORY];
	uint64_t history_end; /* bytes ever shown */
	uint8_t input[INPUT];
	uint32_t in_first, in_len;
	uint32_t size;
	bool resized;
};

/* --- life ------------------------------------------------------------------------------------- */

static int watch(struct mic_con_dev *cd, int fd, uint32_t events)
{
	struct epoll_event ev = {.events = events, .data.fd = fd};

	return fd < 0 ? 0 : epoll_ctl(cd->epoll_fd, EPOLL_CTL_ADD, fd, &ev);
}

struct mic_con_dev *mic_con_dev_create(struct mic_vdev *dev, int pty_fd, int log_fd, int listen_fd)
{
	struct mic_con_dev *cd = calloc(1, sizeof *cd);

	if (!cd)
		return NULL;
	cd->dev = dev;
	cd->pty_fd = pty_fd;
	cd->log_fd = log_fd;
	cd->listen_fd = listen_fd;
	cd->group = -1;
	for (unsigned i = 0; i < CLIENTS; i++)
		cd->clients[i].fd = -1;
	cd->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	/* Edges, because a pty without a reader reports POLLHUP for ever; every wake looks everywhere. */
	if (cd->epoll_fd < 0 || watch(cd, dev->control_fd, EPOLLIN) < 0 ||
	    watch(cd, dev->line_fd, EPOLLIN) < 0 || watch(cd, pty_fd, EPOLLIN | EPOLLOUT | EPOLLET) < 0 ||
	    watch(cd, listen_fd, EPOLLIN | EPOLLET) < 0) {
		int saved = errno;

		mic_con_dev_destroy(cd);
		errno = saved;
		return NULL;
	}
	return cd;
}

void mic_con_dev_admit(struct mic_con_dev *cd, uint32_t group)
{
	cd->group = group;
}

static void drop_client(struct mic_con_dev *cd, struct client *c)
{
	close(c->fd); /* leaves the epoll set by itself */
	free(c->out);
	*c = (struct client){.fd = -1};
	mic_store_relaxed(&cd->stats.clients, cd->stats.clients - 1u);
}

void mic_con_dev_destroy(struct mic_con_dev *cd)
{
	if (!cd)
		return;
	for (unsigned i = 0; i < CLIENTS; i++)
		if (cd->clients[i].fd >= 0)
			drop_client(cd, &cd->clients[i]);
	if (cd->epoll_fd >= 0)
		close(cd->epoll_fd);
	free(cd);
}

uint32_t mic_con_dev_size(const struct mic_con_dev *cd)
{
	return cd->size;
}

void mic_con_dev_stats(const struct mic_con_dev *cd, struct mic_con_stats *out)
{
	const struct mic_con_stats *s = &cd->stats;

	*out = (struct mic_con_stats){
		.to_card_bytes = mic_load_relaxed(&s->to_card_bytes),
		.from_card_bytes = mic_load_relaxed(&s->from_card_bytes),
		.log_errors = mic_load_relaxed(&s->log_errors),
		.pty_lost = mic_load_relaxed(&s->pty_lost),
		.client_lost = mic_load_relaxed(&s->client_lost),
		.clients_seen = mic_load_relaxed(&s->clients_seen),
		.clients_refused = mic_load_relaxed(&s->clients_refused),
		.clients = mic_load_relaxed(&s->clients),
		.last_log_errno = mic_load_relaxed(&s->last_log_errno),
	};
}

/* --- output: log, pty, clients ---------------------------------------------------------------- */

static void write_log(struct mic_con_dev *cd)
{
	uint32_t at = 0;

	while (cd->log_fd >= 0 && at < cd->piece_len) {
		ssize_t n = write(cd->log_fd, cd->piece + at, cd->piece_len - at);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0) {
			/* A full disk must not stop the console: count it and go on. */
			mic_count(&cd->stats.log_errors, 1u);
			mic_store_relaxed(&cd->stats.last_log_errno, errno);
			return;
		}
		at += (uint32_t)n;
	}
}

/* Send what a client still has to get. False: it is gone. */
static bool flush_client(struct client *c)
{
	while (c->out_len) {
		uint32_t part =
			CLIENT_OUT - c->out_first < c->out_len ? CLIENT_OUT - c->out_first : c->out_len;
		ssize_t n = send(c->fd, c->out + c->out_first, part, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n < 0)
			return errno == EAGAIN || errno == EINTR || errno == ENOBUFS;
		c->out_first = (c->out_first + (uint32_t)n) % CLIENT_OUT;
		c->out_len -= (uint32_t)n;
		c->sent += (uint64_t)n;
	}
	return true;
}

static void queue_bytes(struct client *c, const uint8_t *from, uint32_t len)
{
	uint32_t at = (c->out_first + c->out_len) % CLIENT_OUT;
	uint32_t part = CLIENT_OUT - at < len ? CLIENT_OUT - at : len;

	memcpy(c->out + at, from, part);
	memcpy(c->out, from + part, len - part);
	c->out_len += len;
}

static void show_client(struct mic_con_dev *cd, struct client *c, const uint8_t *from, uint32_t len)
{
	uint32_t note = c->gap ? sizeof gap_note - 1 : 0;

	/* Once it lags, a client gets nothing until half of its buffer is free: one gap, not many. */
	if (len + note > CLIENT_OUT - c->out_len || (c->gap && c->out_len > CLIENT_OUT / 2)) {
		c->gap = true;
		mic_count(&cd->stats.client_lost, len);
		return;
	}
	if (c->gap)
		queue_bytes(c, (const uint8_t *)gap_note, note);
	c->gap = false;
	queue_bytes(c, from, len);
	if (!flush_client(c))
		drop_client(cd, c);
}

/* Has this client room for another piece, or is it not waited for? A terminal that shows a large file
 * slows the card down, as a serial line would; one that stops, or trickles, does not. */
static bool client_ready(struct client *c)
{
	if (c->fd < 0 || c->gap || CLIENT_OUT - c->out_len >= PIECE)
		return true;
	uint64_t now = mic_now_ns(), limit = STALL_MS * 1000000ull;

	if (!c->wait_begun || now - c->wait_begun >= 2 * limit) {
		c->wait_begun = now;
		c->wait_sent = c->sent;
	} else if (now - c->wait_begun >= limit) {
		c->gap = c->sent - c->wait_sent < CLIENT_RATE;
		c->wait_begun = c->gap ? 0 : now;
		c->wait_sent = c->sent;
	}
	return c->gap;
}

static bool clients_ready(struct mic_con_dev *cd)
{
	bool ready = true;

	for (unsigned i = 0; i < CLIENTS; i++)
		ready &= client_ready(&cd->clients[i]);
	return ready;
}

static void remember(struct mic_con_dev *cd)
{
	for (uint32_t i = 0; i < cd->piece_len; i++)
		cd->history[(cd->history_end + i) % HISTORY] = cd->piece[i];
	cd->history_end += cd->piece_len;
}

/* Is a slave of the pty open anywhere? */
static bool pty_has_reader(const struct mic_con_dev *cd)
{
	struct pollfd p = {.fd = cd->pty_fd};

	return cd->pty_fd >= 0 && poll(&p, 1, 0) >= 0 && !(p.revents & (POLLHUP | POLLERR | POLLNVAL));
}

static void forget_pty_rest(struct mic_con_dev *cd)
{
	mic_count(&cd->stats.pty_lost, cd->piece_len - cd->pty_at);
	cd->pty_at = cd->piece_len;
	cd->stalled_at = 0;
}

/* Hand the rest of the piece to the pty. True when nothing is owed any more. */
static bool feed_pty(struct mic_con_dev *cd)
{
	if (cd->pty_at == cd->piece_len)
		return true;
	if (!pty_has_reader(cd)) {
		cd->pty_at = cd->piece_len; /* nobody is there, as on a serial line; the log has it */
		cd->stalled_at = 0;
		return true;
	}
	while (cd->pty_at < cd->piece_len) {
		ssize_t n = write(cd->pty_fd, cd->piece + cd->pty_at, cd->piece_len - cd->pty_at);

		if (n <= 0)
			break;
		cd->pty_at += (uint32_t)n;
		if (!cd->pty_dead)
			cd->stalled_at = 0;
	}
	if (cd->pty_at == cd->piece_len) {
		cd->stalled_at = 0;
		cd->pty_dead = false;
		return true;
	}
	uint64_t now = mic_now_ns();

	if (!cd->stalled_at)
		cd->stalled_at = now;
	if (cd->pty_dead || now - cd->stalled_at >= STALL_MS * 1000000ull) {
		cd->pty_dead = true;
		forget_pty_rest(cd);
		return true;
	}
	return false;
}

/* The next piece of card output, to everybody. 1 progress, 0 nothing, or the ring is broken. */
static int from_card(struct mic_con_dev *cd)
{
	struct mic_vq *vq = &cd->dev->vq[FROM_CARD];

	bool ready = feed_pty(cd);

	cd->waiting = !clients_ready(cd) || !ready;
	if (cd->waiting)
		return 0;
	if (!cd->busy) {
		int rc = mic_vq_pop(vq, &cd->chain, cd->iov, CHAIN_SEGS);

		if (rc < 0)
			mic_vdev_broken(cd->dev, vq);
		if (rc <= 0)
			return 0;
		cd->busy = true;
		cd->chain_at = 0;
	}
	cd->piece_len = (uint32_t)mic_iov_read(cd->iov, cd->chain.out_num, cd->chain_at, cd->piece, PIECE);
	cd->pty_at = 0;
	cd->chain_at += cd->piece_len;
	mic_count(&cd->stats.from_card_bytes, cd->piece_len);
	write_log(cd);
	remember(cd);
	for (unsigned i = 0; i < CLIENTS; i++)
		if (cd->clients[i].fd >= 0)
			show_client(cd, &cd->clients[i], cd->piece, cd->piece_len);
	feed_pty(cd);
	if (cd->chain_at >= cd->chain.out_len) {
		cd->busy = false;
		mic_vq_push(vq, cd->chain.head, 0);
		mic_vdev_complete(cd->dev, vq);
	}
	return 1;
}

/* --- input: pty, clients ---------------------------------------------------------------------- */

/* Free space of the input ring in one piece. */
static uint32_t input_space(const struct mic_con_dev *cd, uint8_t **at)
{
	uint32_t end = (cd->in_first + cd->in_len) % INPUT, room = INPUT - cd->in_len;

	*at = (uint8_t *)cd->input + end;
	return room < INPUT - end ? room : INPUT - end;
}

static int read_pty(struct mic_con_dev *cd)
{
	uint8_t *at;
	uint32_t room = input_space(cd, &at);

	if (cd->pty_fd < 0 || !room)
		return 0;
	ssize_t n = read(cd->pty_fd, at, room); /* EIO: no slave is open, and nothing is left to read */

	if (n <= 0)
		return 0;
	cd->in_len += (uint32_t)n;
	return 1;
}

/* A message header or a window size: small, collected byte by byte. 1 progress, -1 end. */
static int read_control(struct mic_con_dev *cd, struct client *c)
{
	bool head = c->head_len < MSG_HEAD;
	uint8_t *to = head ? c->head + c->head_len : c->size + sizeof c->size - c->left;
	ssize_t n = recv(c->fd, to, head ? MSG_HEAD - c->head_len : c->left, MSG_DONTWAIT);

	if (n <= 0)
		return n < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
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
			cd->size = (uint32_t)(c->size[0] | c->size[1] << 8) << 16 | c->size[2] |
				   (uint32_t)c->size[3] << 8;
			cd->resized = true;
		}
	}
	if (!c->left)
		c->head_len = 0;
	return 1;
}

static int read_client(struct mic_con_dev *cd, struct client *c)
{
	uint8_t *at;

	if (c->head_len < MSG_HEAD || c->head[0] == MIC_CON_MSG_SIZE)
		return read_control(cd, c);
	uint32_t room = input_space(cd, &at);

	if (!room)
		return 0;
	ssize_t n = recv(c->fd, at, room < c->left ? room : c->left, MSG_DONTWAIT);

	if (n <= 0)
		return n < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
	cd->in_len += (uint32_t)n;
	c->left -= (uint32_t)n;
	if (!c->left)
		c->head_len = 0;
	return 1;
}

/* Typed bytes into the card's buffers. */
static int to_card(struct mic_con_dev *cd)
{
	struct mic_vq *vq = &cd->dev->vq[TO_CARD];
	struct iovec iov[CHAIN_SEGS];
	struct mic_chain chain;

	if (!cd->in_len)
		return 0;
	int rc = mic_vq_pop(vq, &chain, iov, CHAIN_SEGS);

	if (rc < 0)
		mic_vdev_broken(cd->dev, vq);
	if (rc <= 0)
		return 0;
	uint32_t part = INPUT - cd->in_first < cd->in_len ? INPUT - cd->in_first : cd->in_len;
	const struct iovec *in = iov + chain.out_num;
	uint64_t n = mic_iov_write(in, chain.in_num, 0, cd->input + cd->in_first, part);

	n += mic_iov_write(in, chain.in_num, n, cd->input, cd->in_len - part);
	cd->in_first = (cd->in_first + (uint32_t)n) % INPUT;
	cd->in_len -= (uint32_t)n;
	mic_count(&cd->stats.to_card_bytes, n);
	mic_vq_push(vq, chain.head, (uint32_t)n);
	mic_vdev_complete(cd->dev, vq);
	return 1;
}

/* --- clients ---------------------------------------------------------------------------------- */

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
static bool welcome(const struct mic_con_dev *cd, int fd)
{
	struct ucred peer;
	socklen_t len = sizeof peer;

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) < 0)
		return false;
	if (peer.uid == 0 || peer.uid == geteuid())
		return true;
	return cd->group >= 0 && (peer.gid == (gid_t)cd->group || has_group(fd, (gid_t)cd->group));
}

static void show_history(struct mic_con_dev *cd, struct client *c)
{
	uint64_t n = cd->history_end < HISTORY ? cd->history_end : HISTORY;
	uint32_t from = (uint32_t)((cd->history_end - n) % HISTORY);
	uint32_t part = HISTORY - from < n ? HISTORY - from : (uint32_t)n;

	queue_bytes(c, cd->history + from, part);
	queue_bytes(c, cd->history, (uint32_t)n - part);
	if (!flush_client(c))
		drop_client(cd, c);
}

static int accept_client(struct mic_con_dev *cd)
{
	struct client *c = NULL;
	int fd = cd->listen_fd < 0 ? -1 : accept4(cd->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

	if (fd < 0)
		return 0;
	for (unsigned i = 0; i < CLIENTS && !c; i++)
		if (cd->clients[i].fd < 0)
			c = &cd->clients[i];
	uint8_t *out = c && welcome(cd, fd) ? malloc(CLIENT_OUT) : NULL;

	if (!out || watch(cd, fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET) < 0) {
		mic_count(&cd->stats.clients_refused, 1u);
		free(out);
		close(fd);
		return 1;
	}
	*c = (struct client){.fd = fd, .out = out};
	mic_count(&cd->stats.clients, 1u);
	mic_count(&cd->stats.clients_seen, 1u);
	show_history(cd, c);
	return 1;
}

static int serve_clients(struct mic_con_dev *cd)
{
	int moved = 0;

	for (unsigned i = 0; i < CLIENTS; i++) {
		struct client *c = &cd->clients[i];

		if (c->fd < 0)
			continue;
		int rc = flush_client(c) ? read_client(cd, c) : -1;

		if (rc < 0)
			drop_client(cd, c);
		moved |= rc != 0;
	}
	return moved;
}

/* --- loop ------------------------------------------------------------------------------------- */

static bool ring_ready(const struct mic_vq *vq)
{
	return vq->used && !vq->broken;
}

/* One step of everything. Nonzero: something moved, do it again. */
static int pump(struct mic_con_dev *cd)
{
	bool serving = mic_vdev_driver_ok(cd->dev);
	int moved = accept_client(cd) | serve_clients(cd) | read_pty(cd);

	if (serving && ring_ready(&cd->dev->vq[TO_CARD]))
		moved |= to_card(cd);
	if (serving && ring_ready(&cd->dev->vq[FROM_CARD]))
		moved |= from_card(cd);
	else
		cd->waiting = !feed_pty(cd);
	return moved;
}

static bool arm(struct mic_con_dev *cd)
{
	bool again = false;

	for (unsigned q = 0; q < 2; q++) {
		bool wanted = q == FROM_CARD ? !cd->waiting : cd->in_len != 0;

		if (wanted && mic_vdev_driver_ok(cd->dev) && ring_ready(&cd->dev->vq[q]))
			again |= mic_vq_enable_kick(&cd->dev->vq[q]);
	}
	return again || mic_vdev_handshake(cd->dev);
}

static void disarm(struct mic_con_dev *cd)
{
	for (unsigned q = 0; q < 2; q++)
		if (ring_ready(&cd->dev->vq[q]))
			mic_vq_disable_kick(&cd->dev->vq[q]);
}

static int look(struct mic_con_dev *cd, int timeout_ms)
{
	struct epoll_event ev[EVENTS];
	int n = epoll_wait(cd->epoll_fd, ev, EVENTS, timeout_ms);
	int why = 0;

	if (n < 0)
		return errno == EINTR ? MIC_RUN_SIGNAL : MIC_RUN_LOCAL;
	for (int i = 0; i < n; i++) {
		if (ev[i].data.fd == cd->dev->control_fd)
			why = MIC_RUN_CONTROL;
		if (ev[i].data.fd == cd->dev->line_fd) {
			cd->dev->wakeups++;
			mic_line_take(cd->dev->line_fd);
		}
	}
	return why;
}

/* The rings were set up anew: the chain in hand belongs to the past. Every chain that is taken is
 * given back except that one, so the ring's own indices tell. */
static void settle(struct mic_con_dev *cd)
{
	const struct mic_vq *vq = &cd->dev->vq[FROM_CARD];

	if ((uint16_t)(vq->last_avail - vq->used_idx) != (cd->busy ? 1 : 0))
		cd->busy = false;
}

int mic_con_dev_run(struct mic_con_dev *cd)
{
	unsigned passes = 0;

	settle(cd);
	disarm(cd);
	for (;;) {
		int why = 0;

		if (mic_vdev_handshake(cd->dev))
			return MIC_RUN_HANDSHAKE;
		if (cd->resized) {
			cd->resized = false;
			return MIC_RUN_RESIZE;
		}
		if (pump(cd)) {
			if (++passes % PASSES == 0)
				why = look(cd, 0);
			if (!why && passes % (PASSES * 64u) == 0)
				why = MIC_RUN_SIGNAL; /* under load signal handlers need a turn, too */
		} else if (!cd->resized) {
			/* Who is waited for wakes us when it takes bytes, and at the latest at its limit. */
			if (!arm(cd))
				why = look(cd, cd->waiting ? STALL_MS : -1);
			disarm(cd);
		}
		if (why)
			return why;
	}
}
