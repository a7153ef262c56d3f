/* For copies.c and marks.c: three adjacent windows of 8 MiB on each side, and what they hold. */
#ifndef COPIES_H
#define COPIES_H
#include "t.h"

#define RW    (SCIF_PROT_READ | SCIF_PROT_WRITE)
#define SELF  SCIF_FENCE_INIT_SELF
#define PEER  SCIF_FENCE_INIT_PEER
#define MB    (1 << 20)
#define AREA  (8 * MB) /* of each side: three adjacent windows */
#define AT    0x10000000
#define OWN   0x50000000

static inline char pattern(size_t i, int seed) { return (char)(i * 17 + (i >> 8) * 3 + (i >> 16) * 7 + (size_t)seed); }

static inline void fill(char *p, size_t n, int seed)
{
	for (size_t i = 0; i < n; i++)
		p[i] = pattern(i, seed);
}

static inline void verify(const char *p, size_t n, int seed, const char *what)
{
	for (size_t i = 0; i < n; i++)
		if (p[i] != pattern(i, seed))
			DIE("%s: byte %zu of %zu is %#x, not %#x", what, i, n, p[i] & 255, pattern(i, seed) & 255);
}

static inline char *expose(int ep, off_t at)
{
	char *p = pages(AREA / PG);

	EQ(scif_register(ep, p, MB, at, RW, SCIF_MAP_FIXED), at);
	EQ(scif_register(ep, p + MB, 3 * MB, at + MB, RW, SCIF_MAP_FIXED), at + MB);
	EQ(scif_register(ep, p + 4 * MB, AREA - 4 * MB, at + 4 * MB, RW, SCIF_MAP_FIXED), at + 4 * MB);
	return p;
}

static inline void fence(int ep)
{
	int mark = 0;

	OK(scif_fence_mark(ep, SELF, &mark));
	OK(scif_fence_wait(ep, mark));
	OK(scif_fence_wait(ep, mark));
}

static inline void until_closed(int ep)
{
	char c;

	while (scif_recv(ep, &c, 1, SCIF_RECV_BLOCK) == 1)
		;
	EQ(errno, ECONNRESET);
}

static inline void expose_only(int ep)
{
	expose(ep, AT);
	meet(ep);
	until_closed(ep);
}
#endif
