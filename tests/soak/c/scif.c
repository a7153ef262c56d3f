/* RMA both ways against a mirror: whatever was written is there, whatever is read is what was written. */
#include "soak.h"

#include <scif.h>

#define WINDOW (4u << 20)
#define BIG    (3u << 20) /* now and then: a DMA channel makes the copy */
#define SMALL  (128u << 10)
#define RW     (SCIF_PROT_READ | SCIF_PROT_WRITE)

struct rma {
	int ep;
	struct row *row;
	char *mine, *plain, *mirror;
	off_t here, there;
	uint64_t state, fresh;
};

static off_t registered(int ep, char *window)
{
	off_t at = scif_register(ep, window, WINDOW, 0, RW, 0);

	if (at < 0)
		die("scif_register");
	return at;
}

/* A copy without SCIF_RMA_SYNC has ended when the mark behind it has. */
static void settle(struct rma *r, int rc, int flags, const char *call)
{
	int mark;

	if (rc < 0)
		die(call);
	if (!(flags & SCIF_RMA_SYNC) &&
	    (scif_fence_mark(r->ep, SCIF_FENCE_INIT_SELF, &mark) < 0 || scif_fence_wait(r->ep, mark) < 0))
		die("fence");
}

static void write_step(struct rma *r, bool plain, size_t lo, size_t ro, size_t n, int flags)
{
	char *from = (plain ? r->plain : r->mine) + lo;
	int rc;

	pattern(from, n, r->fresh++, 0);
	memcpy(r->mirror + ro, from, n);
	rc = plain ? scif_vwriteto(r->ep, from, n, r->there + (off_t)ro, flags)
		   : scif_writeto(r->ep, r->here + (off_t)lo, n, r->there + (off_t)ro, flags);
	settle(r, rc, flags, "writeto");
}

static void read_step(struct rma *r, bool plain, size_t lo, size_t ro, size_t n, int flags)
{
	char *to = (plain ? r->plain : r->mine) + lo;
	int rc;

	memset(to, 0xee, n);
	rc = plain ? scif_vreadfrom(r->ep, to, n, r->there + (off_t)ro, flags)
		   : scif_readfrom(r->ep, r->here + (off_t)lo, n, r->there + (off_t)ro, flags);
	settle(r, rc, flags, "readfrom");
	if (memcmp(to, r->mirror + ro, n))
		wrong(r->row, "%zu bytes read at %zu are not what was written", n, ro);
}

static void step(struct rma *r)
{
	bool big = dice(&r->state) % 32 == 0, plain = dice(&r->state) % 2 && !big;
	size_t n = big ? BIG : 1 + dice(&r->state) % SMALL;
	size_t lo = dice(&r->state) % (WINDOW - n), ro = dice(&r->state) % (WINDOW - n);
	int flags = dice(&r->state) % 2 && !big ? SCIF_RMA_SYNC : 0;

	if (big) {
		lo &= ~63ul;
		ro &= ~63ul;
	}
	if (dice(&r->state) % 2)
		write_step(r, plain, lo, ro, n, flags);
	else
		read_step(r, plain, lo, ro, n, flags);
	count(&r->row->bytes, n);
	count(&r->row->rounds, 1);
}

/* The peer's own view of its window. */
static void ask_peer(struct rma *r)
{
	const struct link l = {scif_link.send, scif_link.recv, r->ep};
	uint64_t theirs;

	put(&l, "h", 1);
	get(&l, &theirs, sizeof theirs);
	if (theirs != hash(r->mirror, WINDOW))
		wrong(r->row, "the peer sees other bytes in its window");
}

void rma_active(int ep, struct row *row, uint64_t seed)
{
	struct rma r = {ep, row, pages(WINDOW), pages(WINDOW), pages(WINDOW), 0, 0, seed, seed << 20};
	const struct link l = {scif_link.send, scif_link.recv, ep};

	r.here = registered(ep, r.mine);
	get(&l, &r.there, sizeof r.there);
	for (int i = 1; !seen(&page->stop); i++) {
		step(&r);
		if (i % 64 == 0)
			ask_peer(&r);
		if (i % 16 == 0) { /* windows come and go meanwhile */
			if (scif_unregister(ep, r.here, WINDOW) < 0)
				die("scif_unregister");
			r.here = registered(ep, r.mine);
		}
	}
	ask_peer(&r);
	put(&l, "e", 1);
	get(&l, &r.fresh, 1); /* the peer has left the window too */
}

void rma_passive(int ep)
{
	char *window = pages(WINDOW), command;
	off_t at = registered(ep, window);
	const struct link l = {scif_link.send, scif_link.recv, ep};

	put(&l, &at, sizeof at);
	for (;;) {
		get(&l, &command, 1);
		if (command == 'e')
			break;
		uint64_t h = hash(window, WINDOW);

		put(&l, &h, sizeof h);
	}
	put(&l, "e", 1);
}
