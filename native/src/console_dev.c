/* virtio-console device half: card <-> pty, log file and clients of the host (VOP 8.6, VOP-60).
 * The clients are in console_client.c. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "console_client.h"
#include "mic/barrier.h"
#include "mic/iov.h"

enum { TO_CARD = 0, FROM_CARD = 1 };

#define CHAIN_SEGS 256u
#define EVENTS     16
/* At most this many passes before the other events get a look, so that nobody starves control_fd. */
#define PASSES 64u

struct mic_con_dev {
	struct mic_vdev *dev;
	int pty_fd, log_fd, epoll_fd;
	struct mic_con_stats stats;
	struct con_clients clients;
	struct con_input input;
	/* The chain whose bytes are being handed out, and the piece that is. */
	struct mic_chain chain;
	struct iovec iov[CHAIN_SEGS];
	bool busy;
	uint64_t chain_at;
	uint8_t piece[CON_PIECE];
	uint32_t piece_len, pty_at; /* [pty_at, piece_len) is still owed to the pty */
	uint64_t stalled_at;        /* when the pty stopped taking bytes, 0 = it does not stall */
	bool waiting;               /* the next piece waits for the pty or a client */
	bool pty_dead;              /* stalled for too long: nobody waits for it until it takes again */
};

/* --- life ------------------------------------------------------------------------------------- */

struct mic_con_dev *mic_con_dev_create(struct mic_vdev *dev, int pty_fd, int log_fd, int listen_fd)
{
	struct mic_con_dev *cd = calloc(1, sizeof *cd);

	if (!cd)
		return NULL;
	cd->dev = dev;
	cd->pty_fd = pty_fd;
	cd->log_fd = log_fd;
	cd->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	con_clients_init(&cd->clients, listen_fd, cd->epoll_fd, &cd->stats);
	/* Edges, because a pty without a reader reports POLLHUP for ever; every wake looks everywhere. */
	if (cd->epoll_fd < 0 || con_watch(cd->epoll_fd, dev->control_fd, EPOLLIN) < 0 ||
	    con_watch(cd->epoll_fd, dev->line_fd, EPOLLIN) < 0 ||
	    con_watch(cd->epoll_fd, pty_fd, EPOLLIN | EPOLLOUT | EPOLLET) < 0 ||
	    con_watch(cd->epoll_fd, listen_fd, EPOLLIN | EPOLLET) < 0) {
		int saved = errno;

		mic_con_dev_destroy(cd);
		errno = saved;
		return NULL;
	}
	return cd;
}

void mic_con_dev_admit(struct mic_con_dev *cd, uint32_t group)
{
	cd->clients.group = group;
}

void mic_con_dev_destroy(struct mic_con_dev *cd)
{
	if (!cd)
		return;
	con_clients_fini(&cd->clients);
	if (cd->epoll_fd >= 0)
		close(cd->epoll_fd);
	free(cd);
}

uint32_t mic_con_dev_size(const struct mic_con_dev *cd)
{
	return cd->clients.size;
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

/* --- output: log, pty -------------------------------------------------------------------------- */

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
	if (cd->pty_dead || now - cd->stalled_at >= CON_STALL * 1000000ull) {
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

	cd->waiting = !con_clients_ready(&cd->clients) || !ready;
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
	cd->piece_len =
		(uint32_t)mic_iov_read(cd->iov, cd->chain.out_num, cd->chain_at, cd->piece, CON_PIECE);
	cd->pty_at = 0;
	cd->chain_at += cd->piece_len;
	mic_count(&cd->stats.from_card_bytes, cd->piece_len);
	write_log(cd);
	con_clients_show(&cd->clients, cd->piece, cd->piece_len);
	feed_pty(cd);
	if (cd->chain_at >= cd->chain.out_len) {
		cd->busy = false;
		mic_vq_push(vq, cd->chain.head, 0);
		mic_vdev_complete(cd->dev, vq);
	}
	return 1;
}

/* --- input ------------------------------------------------------------------------------------ */

static int read_pty(struct mic_con_dev *cd)
{
	uint8_t *at;
	uint32_t room = con_input_space(&cd->input, &at);

	if (cd->pty_fd < 0 || !room)
		return 0;
	ssize_t n = read(cd->pty_fd, at, room); /* EIO: no slave is open, and nothing is left to read */

	if (n <= 0)
		return 0;
	cd->input.len += (uint32_t)n;
	return 1;
}

/* Typed bytes into the card's buffers. */
static int to_card(struct mic_con_dev *cd)
{
	struct mic_vq *vq = &cd->dev->vq[TO_CARD];
	struct con_input *typed = &cd->input;
	struct iovec iov[CHAIN_SEGS];
	struct mic_chain chain;

	if (!typed->len)
		return 0;
	int rc = mic_vq_pop(vq, &chain, iov, CHAIN_SEGS);

	if (rc < 0)
		mic_vdev_broken(cd->dev, vq);
	if (rc <= 0)
		return 0;
	uint32_t part = CON_INPUT - typed->first < typed->len ? CON_INPUT - typed->first : typed->len;
	const struct iovec *in = iov + chain.out_num;
	uint64_t n = mic_iov_write(in, chain.in_num, 0, typed->bytes + typed->first, part);

	n += mic_iov_write(in, chain.in_num, n, typed->bytes, typed->len - part);
	typed->first = (typed->first + (uint32_t)n) % CON_INPUT;
	typed->len -= (uint32_t)n;
	mic_count(&cd->stats.to_card_bytes, n);
	mic_vq_push(vq, chain.head, (uint32_t)n);
	mic_vdev_complete(cd->dev, vq);
	return 1;
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
	int moved =
		con_clients_accept(&cd->clients) | con_clients_serve(&cd->clients, &cd->input) | read_pty(cd);

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
		bool wanted = q == FROM_CARD ? !cd->waiting : cd->input.len != 0;

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
		if (cd->clients.resized) {
			cd->clients.resized = false;
			return MIC_RUN_RESIZE;
		}
		if (pump(cd)) {
			if (++passes % PASSES == 0)
				why = look(cd, 0);
			if (!why && passes % (PASSES * 64u) == 0)
				why = MIC_RUN_SIGNAL; /* under load signal handlers need a turn, too */
		} else if (!cd->clients.resized) {
			/* Who is waited for wakes us when it takes bytes, and at the latest at its limit. */
			if (!arm(cd))
				why = look(cd, cd->waiting ? (int)CON_STALL : -1);
			disarm(cd);
		}
		if (why)
			return why;
	}
}
