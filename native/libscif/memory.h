/* Memory inside libscif: what is mapped where, moving pages into node memory, windows as seen. */
#ifndef LIBSCIF_MEMORY_H
#define LIBSCIF_MEMORY_H

#include "internal.h"

static inline size_t page_up(size_t n)
{
	return (n + PAGE - 1) & ~(PAGE - 1);
}

/* --- vma.c ------------------------------------------------------------------------------------ */

struct vma {
	uintptr_t start, end;
	bool read, write, exec, shared;
	uint64_t ino, dev, off; /* dev as in st_dev */
};

/* A look at the mappings: one open, however many are read. Nothing here allocates: a signal handler looks. */
struct maps {
	int fd;
	bool text;      /* the kernel has no query */
	uintptr_t past; /* of the text: the end of the last mapping that was read */
	uint32_t at, have;
	char buf[1024];
};

/* 0, or -errno: then there is nothing to close, and closing it does no harm. */
int maps_open(struct maps *m);
void maps_close(struct maps *m);
/* The mapping that holds `addr`, or the next one above it; cheapest with rising addresses. 0; -ENOENT: there
 * is none; -EIO: nobody knows. */
int maps_from(struct maps *m, uintptr_t addr, struct vma *v);
/* The same with a look of its own; or what maps_open() returns. */
int vma_from(uintptr_t addr, struct vma *v);

/* --- pieces.c --------------------------------------------------------------------------------- */

struct seglist {
	struct mic_scif_seg *seg;
	uint32_t n, max;
};

/* Part of the process that lies in node memory because we moved it: bytes [off, off + len) of the run of
 * pages that the node gave for the whole registration. */
struct piece {
	uintptr_t addr;
	size_t len;
	uint64_t off, run, run_len;
};

/* 0 or -ENOMEM; joins what continues the last one. */
int seg_add(struct seglist *l, uint64_t off, uint64_t len);
/* Is it a mapping of the memory (st_dev, st_ino)? */
bool in_node(const struct vma *v, uint64_t dev, uint64_t ino);
/* Around the move of pages and its piece_add(). */
void pieces_lock(void);
void pieces_unlock(void);
/* 0 or -ENOMEM. With the lock held, pieces of a run one after the other. */
int piece_add(uint64_t dev, uint64_t ino, const struct piece *p);
void piece_undo(uint64_t dev, uint64_t ino);
/* Runs of that memory that the process maps nowhere any more, as segments without length: it has forgotten
 * them. Looks only when enough was moved since it looked last, or `now`. */
void pieces_gone(uint64_t dev, uint64_t ino, bool now, struct seglist *gone);
/* Around fork: the child gets private copies of its own. */
void pieces_before_fork(void);
void pieces_after_fork_parent(void);
void pieces_after_fork_child(void);

/* --- move.c ----------------------------------------------------------------------------------- */

/* Bytes of [addr, addr + len) that are not yet in node memory (dev, ino). -EFAULT: some of it cannot be
 * pinned with `prot` (SCIF-83). -ENOMEM: no descriptor left to look. */
int64_t move_plan(uintptr_t addr, size_t len, uint64_t dev, uint64_t ino, int prot);
/* Move them to `room` in memory `fd`, which is as large as was planned, and list the pages of the whole
 * range. Every writer either writes before the copy or after the switch. -EFAULT, -ENOMEM. `moved`: something
 * was. */
int move_range(uintptr_t addr, size_t len, int fd, uint64_t dev, uint64_t ino,
	       const struct mic_scif_seg *room, struct seglist *out, bool *moved);
/* Whole pages, whatever lies in them, to pages that nobody has touched. */
void copy_pages(void *to, const void *from, size_t len);
/* PROT_ bits of a mapping. */
int prot_of(const struct vma *v);

/* --- window.c --------------------------------------------------------------------------------- */

void window_after_fork_child(void);

/* --- map.c ------------------------------------------------------------------------------------ */

void map_after_fork_child(void);

/* --- watch.c ---------------------------------------------------------------------------------- */

struct watch;

/* Windows of a card are mapped at [base, base + len) for our copies: when the card is lost, a copy goes on
 * in private memory, and watch_lost() says so from then on. NULL: no memory. Removed before the unmapping. */
struct watch *watch_add(const void *base, size_t len);
void watch_remove(struct watch *w);
bool watch_lost(const struct watch *w);

/* --- rma.c ------------------------------------------------------------------------------------ */

/* Windows of both sides, and a count in the control page that keeps them in place. 0 or -errno. */
int rma_begin(struct ep *ep, struct rma_table **out);
void rma_end(struct ep *ep, struct rma_table *t);
/* Pointer to `len` bytes inside one window. -ENXIO, -EPERM. */
int rma_at(struct rma_table *t, bool own, off_t off, size_t len, int prot, uint8_t **out);
/* -EIO when a window of the peer in the range was lost while it was copied to or from (SCIF 3.7). After the
 * copy; the whole range lies in windows. */
int rma_intact(const struct rma_table *t, off_t roff, size_t len);
void rma_forget(struct ep *ep);
/* --- handover.c ------------------------------------------------------------------------------- */

/* What an RMA call moves between windows. */
struct range {
	off_t loff, roff;
	size_t len;
	int flags;
	bool write;
};

bool host_loopback(const struct ep *ep);
/* May a DMA channel make this copy, and is it worth the request? */
bool may_hand_over(const struct ep *ep, const struct range *r);
/* Bytes before the first cache line: the caller copies them before the rest is handed over. */
size_t lines_head(const struct range *r);
/* Have a channel copy the lines behind the head: bytes that it took, or 0: all is the caller's. */
size_t hand_over(struct ep *ep, const struct range *r);

/* 0 when connected; -ECONNRESET, -ENOTCONN, -ENODEV. */
int check_connected(struct ep *ep);

#endif
