/* Endpoints by descriptor: who is behind a number, and the pages of its connection. */
#include "fence.h"
#include "memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef SO_COOKIE
#define SO_COOKIE 57
#endif

#define CHUNK     1024
#define CHUNKS    1024
#define OWN_BYTES (PAGE + MIC_SCIF_EP_RING + PAGE) /* queue pair, ring, control page */
#define RW        (PROT_READ | PROT_WRITE)

static struct ep **chunks[CHUNKS];
static struct ep *free_list;
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;

bool cheap_fence;

static void register_fence(void)
{
	cheap_fence = syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0) == 0;
}

static void before_fork(void)
{
	pieces_before_fork();
	wire_before_fork(); /* last: registering asks the node with the pieces locked */
}

static void after_fork_parent(void)
{
	wire_after_fork_parent();
	pieces_after_fork_parent();
}

static void after_fork(void)
{
	register_fence();
	wire_after_fork(); /* what it closes, the look for pieces may need */
	pieces_after_fork_child();
	window_after_fork_child();
	map_after_fork_child();
	ep_after_fork();
}

static void first_use(void)
{
	int saved = errno;

	register_fence();
	pthread_atfork(before_fork, after_fork_parent, after_fork);
	errno = saved;
}

void library_init(void)
{
	pthread_once(&once, first_use);
}

int socket_cookie(int fd, uint64_t *cookie)
{
	socklen_t len = sizeof *cookie;
	int saved = errno, rc = 0;

	if (getsockopt(fd, SOL_SOCKET, SO_COOKIE, cookie, &len) < 0)
		rc = errno == EBADF ? -EBADF : -ENOTTY;
	errno = saved;
	return rc;
}

static struct ep **slot_of(int fd, bool create)
{
	unsigned c = (unsigned)fd / CHUNK;

	if (fd < 0 || c >= CHUNKS)
		return NULL;
	struct ep **chunk = mic_load_acquire(&chunks[c]);

	if (!chunk && create) {
		chunk = calloc(CHUNK, sizeof *chunk);
		if (chunk)
			mic_store_release(&chunks[c], chunk);
	}
	return chunk ? &chunk[(unsigned)fd % CHUNK] : NULL;
}

static void unmap_pages(struct ep *ep)
{
	void *pages[] = {ep->peer, ep->own_notify, ep->notify, ep->life};

	if (ep->qp)
		munmap(ep->qp, OWN_BYTES);
	if (ep->peer_ring)
		munmap(ep->peer_ring, MIC_SCIF_EP_RING);
	for (unsigned i = 0; i < sizeof pages / sizeof *pages; i++)
		if (pages[i])
			munmap(pages[i], PAGE);
	ep->qp = ep->peer = NULL;
	ep->peer_ring = NULL;
	ep->own_notify = ep->notify = NULL;
	ep->life = NULL;
}

/* The last user is gone: recycle. Called with table_lock held. */
static void recycle(struct ep *ep)
{
	rma_forget(ep);
	unmap_pages(ep);
	ep->next_free = free_list;
	free_list = ep;
}

#define DEAD 0x80000000u /* in refs: no longer in the table */

/* Recycle when nobody is left. A thread that read the slot before it was cleared counts itself in and out at
 * any time (grab()), also while the struct is free or another endpoint's: the count is only ever changed by
 * what others leave of it. Called with table_lock held. */
static void recycle_unused(struct ep *ep)
{
	uint32_t dead = DEAD;

	if (mic_cas(&ep->refs, &dead, 0u))
		recycle(ep);
}

void ep_put(struct ep *ep)
{
	if (mic_fetch_add(&ep->refs, -1) != (DEAD | 1))
		return;
	pthread_mutex_lock(&table_lock);
	recycle_unused(ep);
	pthread_mutex_unlock(&table_lock);
}

/* Take an endpoint out of its slot; table_lock is held. */
static void evict(struct ep **slot)
{
	struct ep *ep = *slot;

	if (!ep)
		return;
	mic_store_release(slot, NULL);
	if (mic_fetch_or(&ep->refs, DEAD) == 0)
		recycle_unused(ep);
}

int ep_add(int fd, uint64_t cookie, uint64_t sid)
{
	library_init();
	pthread_mutex_lock(&table_lock);
	struct ep **slot = slot_of(fd, true), *ep;

	if (!slot)
		goto nomem;
	evict(slot); /* a plain close went unnoticed; it may go on the free list */
	ep = free_list;
	if (ep)
		free_list = ep->next_free;
	else
		ep = calloc(1, sizeof *ep);
	if (!ep)
		goto nomem;
	memset(&ep->cookie, 0, sizeof *ep - offsetof(struct ep, cookie)); /* all but refs */
	ep->cookie = cookie;
	ep->sid = sid;
	pthread_mutex_init(&ep->rma_lock, NULL);
	mic_store_release(slot, ep);
	pthread_mutex_unlock(&table_lock);
	return 0;
nomem:
	pthread_mutex_unlock(&table_lock);
	return -ENOMEM;
}

void ep_forget(int fd)
{
	pthread_mutex_lock(&table_lock);
	struct ep **slot = slot_of(fd, false);

	if (slot)
		evict(slot);
	pthread_mutex_unlock(&table_lock);
}

/* A descriptor that this library has not seen: inherited through exec, received, or a dup. */
static int adopt(int fd, uint64_t cookie)
{
	uint64_t sid = 0;
	int rc = node_ask(MIC_SCIF_FIND, 0, cookie, 0, &sid);

	if (rc < 0)
		return rc == -ENOENT || rc == -ECONNREFUSED ? -ENOTTY : rc;
	return ep_add(fd, cookie, sid);
}

/* In a hot loop the descriptor was looked at a moment ago: closing one takes longer than this. */
static bool just_checked(struct ep *ep)
{
	uint64_t now = mic_timestamp();

	return now - ep->checked < ticks_per_us() && ep->attached &&
	       mic_load_relaxed(&ep->ctl->sid) == ep->sid;
}

static struct ep *grab(struct ep **slot)
{
	struct ep *ep = slot ? mic_load_acquire(slot) : NULL;

	if (!ep)
		return NULL;
	mic_fetch_add(&ep->refs, 1);
	if (mic_load_acquire(slot) == ep)
		return ep;
	ep_put(ep); /* closed and perhaps reused meanwhile */
	return NULL;
}

int ep_get(int fd, struct ep **out)
{
	for (int tries = 0; tries < 3; tries++) {
		struct ep *ep = grab(slot_of(fd, false));
		uint64_t cookie;
		int rc;

		if (ep && just_checked(ep)) {
			*out = ep;
			return 0;
		}
		rc = socket_cookie(fd, &cookie);
		if (rc == 0 && ep && ep->cookie == cookie) {
			ep->checked = mic_timestamp();
			*out = ep;
			return 0;
		}
		if (ep)
			ep_put(ep);
		if (rc == 0)
			rc = adopt(fd, cookie);
		if (rc < 0) {
			ep_forget(fd);
			return rc;
		}
	}
	return -EBADF;
}

void ep_after_fork(void)
{
	pthread_mutex_init(&table_lock, NULL);
	/* A thread that is not here may have held an endpoint's; what it guards is one pointer. */
	for (unsigned c = 0; c < CHUNKS; c++)
		for (unsigned i = 0; chunks[c] && i < CHUNK; i++)
			if (chunks[c][i])
				pthread_mutex_init(&chunks[c][i]->rma_lock, NULL);
}

static void *map(int fd, uint64_t off, size_t len, int prot)
{
	void *p = mmap(NULL, len, prot, MAP_SHARED, fd, (off_t)off);

	if (p == MAP_FAILED)
		return NULL;
	madvise(p, len, MADV_DONTDUMP);
	return p;
}

static int map_connection(struct ep *ep, const struct answer *ans)
{
	const uint64_t *v = ans->head.v;
	struct stat st;

	uint8_t *own = map(ans->fds[0], v[MIC_SCIF_V_OWN_QP], OWN_BYTES, RW);
	ep->peer = map(ans->fds[1], v[MIC_SCIF_V_PEER_QP], PAGE, RW);
	ep->peer_ring = map(ans->fds[1], v[MIC_SCIF_V_PEER_RING], MIC_SCIF_EP_RING, RW);
	ep->own_notify = map(ans->fds[0], v[MIC_SCIF_V_OWN_NOTIFY], PAGE, RW);
	ep->life = map(ans->fds[0], v[MIC_SCIF_V_OWN_NOTIFY] + PAGE, PAGE, PROT_READ);
	ep->notify = map(ans->fds[1], v[MIC_SCIF_V_PEER_NOTIFY], PAGE, RW);
	ep->qp = (void *)own;
	if (!own || !ep->peer || !ep->peer_ring || !ep->own_notify || !ep->life || !ep->notify) {
		unmap_pages(ep);
		return -ENOMEM;
	}
	ep->ring = own + PAGE;
	ep->ctl = (void *)(own + PAGE + MIC_SCIF_EP_RING);
	if (fstat(ans->fds[0], &st) == 0) {
		ep->mem_dev = st.st_dev;
		ep->mem_ino = st.st_ino;
	}
	ep->slot = (uint32_t)v[MIC_SCIF_V_PEER_SLOT];
	ep->node = (uint16_t)v[MIC_SCIF_V_NODES];
	ep->peer_node = (uint16_t)(v[MIC_SCIF_V_NODES] >> 16);
	ep->spin = spin_allowed() ? (uint32_t)(20 * ticks_per_us()) : 0;
	return 0;
}

int ep_attach(struct ep *ep)
{
	if (mic_load_acquire(&ep->attached))
		return 0;
	const struct mic_scif_request rq = {.op = MIC_SCIF_ATTACH, .sid = ep->sid};
	struct answer ans = {0};
	int rc = node_call(&rq, NULL, &ans, false);

	if (rc == 0)
		rc = answer_has(&ans, 2);
	if (rc == 0) {
		pthread_mutex_lock(&table_lock);
		if (!ep->attached) {
			rc = map_connection(ep, &ans);
			if (rc == 0)
				mic_store_release(&ep->attached, 1u);
		}
		pthread_mutex_unlock(&table_lock);
	}
	answer_close(&ans);
	return rc;
}
