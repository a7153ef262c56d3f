/* libscif inside: endpoints by descriptor, requests to the node, waiting.
 *
 * Functions return a count or 0, or -errno; only the 22 public ones touch errno, through fail().
 * The node is the authority: nothing here survives in the library that the node could not tell
 * again, so descriptors work after dup, fork and exec. */
#ifndef LIBSCIF_INTERNAL_H
#define LIBSCIF_INTERNAL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#include "mic/barrier.h"
#include "mic/scif_abi.h"
#include "scif.h"

#define PAGE ((size_t)4096)
#define API  __attribute__((visibility("default")))

struct rma_table;

/* What this process knows about one endpoint. The structs are never freed, only reused: a thread that
 * still looks at one finds out by its cookie. */
struct ep {
	uint32_t refs;     /* calls in progress; never reset, see recycle_unused() */
	uint64_t cookie;   /* identity of the socket, 0 = unused */
	uint64_t sid;      /* the node's name for it */
	uint64_t checked;  /* time stamp when the descriptor was last seen to be this endpoint */
	uint32_t attached; /* the pointers below are valid */
	bool listening;    /* accepts may sleep in this process */
	bool alone;        /* no DMA channel reaches the peer */
	uint16_t node, peer_node;
	struct mic_scif_qpage *qp, *peer;
	struct mic_scif_ctl *ctl;
	uint8_t *ring, *peer_ring;
	struct mic_scif_notify *own_notify, *notify;
	struct mic_scif_life *life; /* of our node, read-only */
	uint32_t slot;              /* the peer's bit in *notify */
	uint32_t spin;              /* how long waiting looks before it sleeps, time stamp ticks */
	uint64_t mem_dev, mem_ino;  /* our node's memory */
	struct rma_table *rma;      /* windows as last seen */
	pthread_mutex_t rma_lock;
	uint32_t want; /* bytes that a spinning sender has left */
	struct ep *next_free;
};

static inline int fail(int rc)
{
	errno = -rc;
	return -1;
}

/* --- ep.c ------------------------------------------------------------------------------------- */

/* The endpoint behind a descriptor; keeps it until ep_put(). -EBADF, -ENOTTY (SCIF 1.8), -ENODEV. */
int ep_get(int fd, struct ep **out);
void ep_put(struct ep *ep);
/* Enter a new one into the table. */
int ep_add(int fd, uint64_t cookie, uint64_t sid);
/* Forget a descriptor that is being closed. */
void ep_forget(int fd);
/* Map the connection of `ep`. 0 when it is mapped; -ENOTCONN, -ENODEV, -ENOMEM, -EMFILE. */
int ep_attach(struct ep *ep);
int socket_cookie(int fd, uint64_t *cookie);
/* Once per process, before anything that a fork would have to know of. */
void library_init(void);
/* After fork, in the child: calls of other threads do not exist here. */
void ep_after_fork(void);

/* --- wire.c ----------------------------------------------------------------------------------- */

struct answer {
	struct mic_scif_reply head;
	uint32_t nfds;
	int fds[MIC_SCIF_MAX_FDS];
	void *data; /* head.ndata bytes go here: of malloc, with room for max, and given more if need be */
	size_t max;
};

/* A connection to the node: 0.. or -ENOENT (no node), -EMFILE, ... */
int node_connect(void);
/* Make a connection an endpoint; draws its sid. */
int node_open(int fd, uint64_t cookie, uint64_t *sid);
/* One request on a control connection. `data` follows the request. When `interruptible`, a signal
 * without SA_RESTART cancels it (-EINTR). Returns the status; descriptors in the answer are the
 * caller's. */
int node_call(const struct mic_scif_request *rq, const void *data, struct answer *ans, bool interruptible);
/* A request with up to two arguments and nothing but v0 to come back. */
int node_ask(uint32_t op, uint64_t sid, uint64_t a0, uint64_t a1, uint64_t *v0);
void answer_close(struct answer *ans);
/* 0 when all `nfds` descriptors have come; the kernel drops those for which the process has no number left.
 */
static inline int answer_has(const struct answer *ans, uint32_t nfds)
{
	return ans->nfds == nfds ? 0 : -EMFILE;
}
bool wire_busy(void); /* a request is under way */
void wire_before_fork(void);
void wire_after_fork_parent(void);
void wire_after_fork(void);

/* --- wait.c ----------------------------------------------------------------------------------- */

/* Sleep until *word is no longer `seen`, or the node died, or a signal (-EINTR, without SA_RESTART). */
int sleep_on(struct ep *ep, uint32_t *word, uint32_t seen);
bool spin_allowed(void);
/* A copy under window lists `gen` has ended: count it out, and tell the node if it waits for that. */
void copy_out(struct ep *ep, uint32_t gen);
/* Is our node dead? The kernel has then marked the lock that it held. */
bool node_dead(struct ep *ep);
void lock(uint64_t *words);
void unlock(uint64_t *words);
/* True: taken, as by lock(). */
bool try_lock(uint64_t *words);
uint64_t ticks_per_us(void);

/* --- ready.c ---------------------------------------------------------------------------------- */

/* Poll mask of an attached endpoint (SCIF 2.9). */
int ep_mask(struct ep *ep);
/* There are no bytes: take the token off the descriptor, if the sender had one put on. `surely`: look
 * for stale ones too. rx_lock is held. */
void token_clear(struct ep *ep, int fd, bool surely);
/* Make the descriptor unwritable until the peer frees room. */
void want_room(struct ep *ep, int fd);
void fill(int fd);

/* --- user.c ----------------------------------------------------------------------------------- */

/* Can this process read, or write, all of [p, p + len)? 0 or -EFAULT. */
int user_readable(const void *p, size_t len);
int user_writable(void *p, size_t len);
/* Is it still mapped? The two above remember pages that were fine. 0 or -EFAULT. */
int user_mapped(const void *p, size_t len);
/* Can all of its pages be read now? Remembers nothing. 0 or -EFAULT. */
int user_present(const void *p, size_t len);

#endif
