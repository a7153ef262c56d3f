/* What of this process lies in node memory, and what of that it has given up since.
 *
 * Nobody tells the library that a program unmaps memory: it looks through the mappings of the process now
 * and then. One look costs as much as there are mappings, so it waits until so much was moved that each
 * registration pays for a few of them, or until the node has no memory left. */
#include "memory.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>

#define SWEEP_BYTES (16u << 20) /* moved since the last look: memory that may be held for nothing */
#define SWEEP_MOVES 64u
#define SWEEP_PER   8u  /* mappings that a registration may pay for */
#define BEYOND      64u /* descriptors above the limit, some of which may be in use */

/* The pieces in one memory: a process uses one, unless its node is replaced. Never freed. */
struct home {
	uint64_t dev, ino;
	struct piece *piece;
	unsigned n, max;
	unsigned moves, due; /* since the last sweep, and until the next */
	uint64_t bytes;      /* the same, for SWEEP_BYTES */
	struct home *next;
};

static struct home *homes;
static pthread_mutex_t piece_lock = PTHREAD_MUTEX_INITIALIZER;

int seg_add(struct seglist *l, uint64_t off, uint64_t len)
{
	if (l->n && l->seg[l->n - 1].off + l->seg[l->n - 1].len == off) {
		l->seg[l->n - 1].len += len;
		return 0;
	}
	if (l->n == l->max) {
		uint32_t max = l->max ? 2 * l->max : 16;
		void *p = realloc(l->seg, max * sizeof *l->seg);

		if (!p)
			return -ENOMEM;
		l->seg = p;
		l->max = max;
	}
	l->seg[l->n++] = (struct mic_scif_seg){off, len};
	return 0;
}

bool in_node(const struct vma *v, uint64_t dev, uint64_t ino)
{
	return v->shared && v->ino == ino && v->dev == dev;
}

void pieces_lock(void)
{
	pthread_mutex_lock(&piece_lock);
}

void pieces_unlock(void)
{
	pthread_mutex_unlock(&piece_lock);
}

static struct home *home_of(uint64_t dev, uint64_t ino)
{
	struct home *h = homes;

	while (h && (h->dev != dev || h->ino != ino))
		h = h->next;
	return h;
}

int piece_add(uint64_t dev, uint64_t ino, const struct piece *p)
{
	struct home *h = home_of(dev, ino);

	if (!h) {
		h = malloc(sizeof *h);
		if (!h)
			return -ENOMEM;
		*h = (struct home){.dev = dev, .ino = ino, .due = SWEEP_MOVES, .next = homes};
		homes = h;
	}
	if (h->n == h->max) {
		unsigned max = h->max ? 2 * h->max : 64;
		void *q = realloc(h->piece, max * sizeof *h->piece);

		if (!q)
			return -ENOMEM;
		h->piece = q;
		h->max = max;
	}
	h->piece[h->n++] = *p;
	h->moves++;
	h->bytes += p->len;
	return 0;
}

void piece_undo(uint64_t dev, uint64_t ino)
{
	home_of(dev, ino)->n--;
}

/* --- what was given up ------------------------------------------------------------------------------ */

static int by_offset(const void *a, const void *b)
{
	const struct mic_scif_seg *x = a, *y = b;

	return x->off < y->off ? -1 : x->off > y->off;
}

/* All that the process maps of a memory, in order and without overlaps. */
static int mapped_ranges(uint64_t dev, uint64_t ino, struct seglist *out, unsigned *looked)
{
	struct maps m;
	struct vma v;
	int rc = maps_open(&m);
	uint32_t n = 0;

	out->n = 0;
	*looked = 0;
	for (uintptr_t a = 0; rc == 0; a = v.end, ++*looked) {
		rc = maps_from(&m, a, &v);
		if (rc == 0 && in_node(&v, dev, ino))
			rc = seg_add(out, v.off, v.end - v.start);
	}
	maps_close(&m);
	if (rc != -ENOENT) /* not seen to the end: nothing can be said */
		return rc;
	if (out->n)
		qsort(out->seg, out->n, sizeof *out->seg, by_offset);
	for (uint32_t i = 0; i < out->n; i++) {
		struct mic_scif_seg *last = n ? &out->seg[n - 1] : NULL, s = out->seg[i];

		if (!last || s.off > last->off + last->len)
			out->seg[n++] = s;
		else if (s.off + s.len > last->off + last->len)
			last->len = s.off + s.len - last->off;
	}
	out->n = n;
	return 0;
}

/* Does any range touch [off, off + len)? */
static bool touched(const struct seglist *l, uint64_t off, uint64_t len)
{
	uint32_t lo = 0, hi = l->n;

	while (lo < hi) { /* the first that ends behind off */
		uint32_t mid = lo + (hi - lo) / 2;

		if (l->seg[mid].off + l->seg[mid].len <= off)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo < l->n && l->seg[lo].off < off + len;
}

static bool any_gone(const struct home *h, const struct seglist *there)
{
	for (unsigned i = 0; i < h->n; i++)
		if (!touched(there, h->piece[i].run, h->piece[i].run_len))
			return true;
	return false;
}

/* Forget the runs that are in neither list. */
static int forget(struct home *h, const struct seglist *one, const struct seglist *two, struct seglist *gone)
{
	unsigned kept = 0, i = 0;
	uint64_t last = UINT64_MAX;
	int rc = 0;

	for (; i < h->n && rc == 0; i++) {
		const struct piece p = h->piece[i];

		if (touched(one, p.run, p.run_len) || touched(two, p.run, p.run_len)) {
			h->piece[kept++] = p;
		} else if (p.run != last) { /* pieces of a run lie side by side */
			rc = seg_add(gone, p.run, 0);
			last = p.run;
			if (rc < 0)
				h->piece[kept++] = p;
		}
	}
	while (i < h->n)
		h->piece[kept++] = h->piece[i++];
	h->n = kept;
	return rc;
}

static void sweep(struct home *h, struct seglist *gone)
{
	struct seglist one = {0}, two = {0};
	unsigned looked;
	int rc = mapped_ranges(h->dev, h->ino, &one, &looked);

	/* A thread may move a mapping (mremap, realloc) from where this has not looked yet to where it has:
	 * only what a second look does not find either is gone. */
	if (rc == 0 && any_gone(h, &one)) {
		rc = mapped_ranges(h->dev, h->ino, &two, &looked);
		if (rc == 0)
			forget(h, &one, &two, gone);
	}
	h->moves = 0;
	h->bytes = 0;
	h->due = SWEEP_MOVES;
	if (h->due < h->n)
		h->due = h->n;
	if (h->due < looked / SWEEP_PER)
		h->due = looked / SWEEP_PER;
	free(one.seg);
	free(two.seg);
}

void pieces_gone(uint64_t dev, uint64_t ino, bool now, struct seglist *gone)
{
	struct home *h;

	pieces_lock();
	h = home_of(dev, ino);
	if (h && h->n && (now || h->moves >= h->due || h->bytes >= SWEEP_BYTES))
		sweep(h, gone);
	pieces_unlock();
}

/* --- fork ------------------------------------------------------------------------------------------- */

static int fork_pipe[2] = {-1, -1};

static bool any_pieces(void)
{
	for (const struct home *h = homes; h; h = h->next)
		if (h->n)
			return true;
	return false;
}

/* A fork cannot be refused: when the program has used all descriptors that it may have, these are beyond
 * them. */
static int pipe_beyond(int fds[2])
{
	struct rlimit had, more;

	if (getrlimit(RLIMIT_NOFILE, &had) < 0)
		return -1;
	more = had;
	more.rlim_cur = had.rlim_max - had.rlim_cur > BEYOND ? had.rlim_cur + BEYOND : had.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &more) < 0)
		return -1;
	int rc = pipe2(fds, O_CLOEXEC);

	setrlimit(RLIMIT_NOFILE, &had);
	return rc;
}

void pieces_before_fork(void)
{
	int saved = errno;

	pieces_lock();
	if ((any_pieces() || wire_busy()) && pipe2(fork_pipe, O_CLOEXEC) < 0 && pipe_beyond(fork_pipe) < 0)
		fork_pipe[0] = fork_pipe[1] = -1;
	errno = saved;
}

void pieces_after_fork_parent(void)
{
	char c;

	/* What the parent writes from now on is not the child's: wait until it has its copies. And when the
	 * parent is killed its requests end: until the child has closed its copies of their connections,
	 * they would not. */
	if (fork_pipe[0] >= 0) {
		close(fork_pipe[1]);
		while (read(fork_pipe[0], &c, 1) < 0 && errno == EINTR)
			;
		close(fork_pipe[0]);
		fork_pipe[0] = -1;
	}
	pieces_unlock();
}

static void make_private(uintptr_t addr, size_t len, const struct vma *v)
{
	uint8_t *to = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (to == MAP_FAILED)
		return;
	copy_pages(to, (const void *)addr, len);
	if (!v->write || v->exec)
		mprotect(to, len, prot_of(v));
	mremap(to, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)addr);
}

static void home_private(struct maps *m, struct home *h)
{
	for (unsigned i = 0; i < h->n; i++) {
		const struct piece *p = &h->piece[i];
		uintptr_t end = p->addr + p->len;
		struct vma v;

		for (uintptr_t a = p->addr; a < end && maps_from(m, a, &v) == 0 && v.start < end; a = v.end) {
			uintptr_t from = v.start > a ? v.start : a, to = v.end < end ? v.end : end;

			if (in_node(&v, h->dev, h->ino))
				make_private(from, to - from, &v);
		}
	}
	h->n = 0;
	h->moves = 0;
	h->bytes = 0;
	h->due = SWEEP_MOVES;
}

void pieces_after_fork_child(void)
{
	struct maps m;

	if (fork_pipe[0] >= 0)
		close(fork_pipe[0]); /* first: it leaves a descriptor for the look */
	if (any_pieces() && maps_open(&m) == 0) {
		for (struct home *h = homes; h; h = h->next)
			home_private(&m, h);
		maps_close(&m);
	}
	if (fork_pipe[0] >= 0) {
		close(fork_pipe[1]); /* the parent goes on */
		fork_pipe[0] = -1;
	}
	pthread_mutex_init(&piece_lock, NULL);
}
